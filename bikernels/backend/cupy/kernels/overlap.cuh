// Launches that overlap (programmatic dependent launch, sm_90 on; elsewhere kernels run one after the other anyway).
#pragma once

// Let the next kernel of the stream be scheduled; its own wait still sees this one's results.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Wait until the kernels before this one have finished and their results are visible.
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bring 128 bytes to the L2. Allowed before `wait_for_predecessors`: it is the L2 that other multiprocessors write to.
__device__ __forceinline__ void prefetch_line(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
}
