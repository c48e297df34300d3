// Instructions of Hopper (sm_90a): memory barriers, the tensor memory accelerator (TMA), registers, wgmma. Thin wrappers;
// the PTX manual has their semantics.
#pragma once
#include "async_copy.cuh"
#include "numerics.cuh"
#include "overlap.cuh"

// A CUtensorMap: what cuTensorMapEncodeTiled fills in.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// ---------------------------------------------------------------------------------------------------- memory barriers

__device__ __forceinline__ void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make initialised barriers visible to the other CTAs of the cluster and to the TMA.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
}

// Let asynchronous instructions read what threads wrote to shared memory before a barrier.
__device__ __forceinline__ void fence_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Arrive once.
__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Wait until the phase of this parity has completed.
__device__ __forceinline__ void wait_barrier(unsigned barrier, unsigned parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Arrive once, and let the phase wait for `bytes` more from the TMA.
__device__ __forceinline__ void arrive_and_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrive at the barrier that lies at the same address in CTA `rank` of the cluster. Relaxed: nothing that the thread has
// written is to be seen there, and a release would wait for all its accesses.
__device__ __forceinline__ void arrive_in_cluster(unsigned barrier, unsigned rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    return size;
}

// A barrier of all threads of all CTAs of the cluster, in two halves: each thread arrives, and has waited before it
// arrives again. Neither asks the threads of a warp to stay together.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}

// Wait for all threads of a cluster of so many CTAs, or of this CTA if it is alone, as it always is before sm_90.
__device__ __forceinline__ void sync_ctas(int ctas) {
#if __CUDA_ARCH__ >= 900
    if (ctas > 1) {
        sync_cluster();
        return;
    }
#endif
    __syncthreads();
}

// Write to what lies at that address of shared memory in CTA `rank` of the cluster.
__device__ __forceinline__ void store_in_cluster(unsigned shared, unsigned rank, unsigned value) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.u32 [there], %2;\n"
        "}" ::"r"(shared),
        "r"(rank), "r"(value)
        : "memory");
}
__device__ __forceinline__ void store_in_cluster(unsigned shared, unsigned rank, float value) {
    store_in_cluster(shared, rank, __float_as_uint(value));
}
__device__ __forceinline__ void store_in_cluster(unsigned shared, unsigned rank, double value) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "st.shared::cluster.f64 [there], %2;\n"
        "}" ::"r"(shared),
        "r"(rank), "d"(value)
        : "memory");
}

// The same, counting the bytes at the barrier that lies at that address there: who waits for it finds them.
__device__ __forceinline__ void send_in_cluster(unsigned shared, unsigned rank, unsigned value, unsigned barrier) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mapa.shared::cluster.u32 counter, %3, %1;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %2, [counter];\n"
        "}" ::"r"(shared),
        "r"(rank), "r"(value), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void send_in_cluster(unsigned shared, unsigned rank, uint2 value, unsigned barrier) {
    asm volatile(
        "{\n"
        ".reg .b32 there, counter;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mapa.shared::cluster.u32 counter, %4, %1;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [there], {%2, %3}, [counter];\n"
        "}" ::"r"(shared),
        "r"(rank), "r"(value.x), "r"(value.y), "r"(barrier)
        : "memory");
}

// ----------------------------------------------------------------------------------------------------------------- TMA

__device__ __forceinline__ void prefetch_descriptor(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Where a box begins, the contiguous dimension first.
struct Coordinates {
    int x[4];
};

// Copy a box to the same shared address of every CTA in `mask`, and count its bytes at the barrier there.
template <bool MULTICAST>
__device__ __forceinline__ void load_box(unsigned shared, const TensorMap& map, const Coordinates& c, unsigned barrier,
                                         unsigned short mask) {
    if constexpr (MULTICAST) {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared),
            "l"(&map), "r"(c.x[0]), "r"(c.x[1]), "r"(c.x[2]), "r"(c.x[3]), "r"(barrier), "h"(mask)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared),
            "l"(&map), "r"(c.x[0]), "r"(c.x[1]), "r"(c.x[2]), "r"(c.x[3]), "r"(barrier)
            : "memory");
    }
}

// Copy `bytes`, a multiple of 16 from and to such a multiple, and count them at the barrier. `is_last`: as what will not be
// read again, they leave the L2 first.
__device__ __forceinline__ void copy_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier,
                                          bool is_last) {
    if (is_last) {
        asm volatile(
            "{\n"
            ".reg .b64 policy;\n"
            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1], %2, [%3], policy;\n"
            "}" ::"r"(shared),
            "l"(global), "r"(bytes), "r"(barrier)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
            "l"(global), "r"(bytes), "r"(barrier)
            : "memory");
    }
}

// Have the L2 fetch `bytes`, a multiple of 16 from such a multiple on.
__device__ __forceinline__ void prefetch_bulk(const void* global, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// ------------------------------------------------------------------------------------------------------------ registers

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --------------------------------------------------------------------------------------------------------------- wgmma

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A matrix in shared memory, as wgmma takes it: `low` holds the start address and the leading stride, `high` the other
// stride between 8 x 16-byte blocks and the swizzle (all but the swizzle in units of 16 bytes). In a cluster, the bits of
// an address above those of shared memory name the CTA. Shared memory is smaller than the field, so that a matrix further
// on is low + bytes / 16.
struct MatrixDescriptor {
    unsigned low, high;

    __device__ __forceinline__ MatrixDescriptor(unsigned address, unsigned leading, unsigned stride, int swizzle)
        : low((address & 0x3FFFF) >> 4 | leading >> 4 << 16),
          high(stride >> 4 | (swizzle == 128 ? 1u : swizzle == 64 ? 2u : swizzle == 32 ? 3u : 0u) << 30) {}
};

// One group of 16 of the contract for a 64 x WGMMA_N tile: acc += a * b, from shared memory. The file that includes this
// one defines WGMMA_N (a multiple of 8), ELEMENT, and whether each operand is K-contiguous. In the instruction's text the
// accumulators come first, four for every 8 columns (WGMMA_NAMES, WGMMA_ACC), then the halves of the descriptors.
#ifdef WGMMA_N
#define WGMMA_PASTE_(a, b) a##b
#define WGMMA_PASTE(a, b) WGMMA_PASTE_(a, b)
#define WGMMA_TEXT_(a) #a
#define WGMMA_TEXT(a) WGMMA_TEXT_(a)
#define WGMMA_TYPE_bfloat16 "bf16"
#define WGMMA_TYPE_float16 "f16"
#define WGMMA_TRANSPOSE_0 "1"
#define WGMMA_TRANSPOSE_1 "0"
#define WGMMA_FOUR(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])

// clang-format off
#define WGMMA_NAMES_8 "%0, %1, %2, %3"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %4, %5, %6, %7"
#define WGMMA_NAMES_24 WGMMA_NAMES_16 ", %8, %9, %10, %11"
#define WGMMA_NAMES_32 WGMMA_NAMES_24 ", %12, %13, %14, %15"
#define WGMMA_NAMES_40 WGMMA_NAMES_32 ", %16, %17, %18, %19"
#define WGMMA_NAMES_48 WGMMA_NAMES_40 ", %20, %21, %22, %23"
#define WGMMA_NAMES_56 WGMMA_NAMES_48 ", %24, %25, %26, %27"
#define WGMMA_NAMES_64 WGMMA_NAMES_56 ", %28, %29, %30, %31"
#define WGMMA_NAMES_72 WGMMA_NAMES_64 ", %32, %33, %34, %35"
#define WGMMA_NAMES_80 WGMMA_NAMES_72 ", %36, %37, %38, %39"
#define WGMMA_NAMES_88 WGMMA_NAMES_80 ", %40, %41, %42, %43"
#define WGMMA_NAMES_96 WGMMA_NAMES_88 ", %44, %45, %46, %47"
#define WGMMA_NAMES_104 WGMMA_NAMES_96 ", %48, %49, %50, %51"
#define WGMMA_NAMES_112 WGMMA_NAMES_104 ", %52, %53, %54, %55"
#define WGMMA_NAMES_120 WGMMA_NAMES_112 ", %56, %57, %58, %59"
#define WGMMA_NAMES_128 WGMMA_NAMES_120 ", %60, %61, %62, %63"
#define WGMMA_NAMES_136 WGMMA_NAMES_128 ", %64, %65, %66, %67"
#define WGMMA_NAMES_144 WGMMA_NAMES_136 ", %68, %69, %70, %71"
#define WGMMA_NAMES_152 WGMMA_NAMES_144 ", %72, %73, %74, %75"
#define WGMMA_NAMES_160 WGMMA_NAMES_152 ", %76, %77, %78, %79"
#define WGMMA_NAMES_168 WGMMA_NAMES_160 ", %80, %81, %82, %83"
#define WGMMA_NAMES_176 WGMMA_NAMES_168 ", %84, %85, %86, %87"
#define WGMMA_NAMES_184 WGMMA_NAMES_176 ", %88, %89, %90, %91"
#define WGMMA_NAMES_192 WGMMA_NAMES_184 ", %92, %93, %94, %95"
#define WGMMA_NAMES_200 WGMMA_NAMES_192 ", %96, %97, %98, %99"
#define WGMMA_NAMES_208 WGMMA_NAMES_200 ", %100, %101, %102, %103"
#define WGMMA_NAMES_216 WGMMA_NAMES_208 ", %104, %105, %106, %107"
#define WGMMA_NAMES_224 WGMMA_NAMES_216 ", %108, %109, %110, %111"
#define WGMMA_NAMES_232 WGMMA_NAMES_224 ", %112, %113, %114, %115"
#define WGMMA_NAMES_240 WGMMA_NAMES_232 ", %116, %117, %118, %119"
#define WGMMA_NAMES_248 WGMMA_NAMES_240 ", %120, %121, %122, %123"
#define WGMMA_NAMES_256 WGMMA_NAMES_248 ", %124, %125, %126, %127"
#define WGMMA_ACC_8 WGMMA_FOUR(0)
#define WGMMA_ACC_16 WGMMA_ACC_8, WGMMA_FOUR(4)
#define WGMMA_ACC_24 WGMMA_ACC_16, WGMMA_FOUR(8)
#define WGMMA_ACC_32 WGMMA_ACC_24, WGMMA_FOUR(12)
#define WGMMA_ACC_40 WGMMA_ACC_32, WGMMA_FOUR(16)
#define WGMMA_ACC_48 WGMMA_ACC_40, WGMMA_FOUR(20)
#define WGMMA_ACC_56 WGMMA_ACC_48, WGMMA_FOUR(24)
#define WGMMA_ACC_64 WGMMA_ACC_56, WGMMA_FOUR(28)
#define WGMMA_ACC_72 WGMMA_ACC_64, WGMMA_FOUR(32)
#define WGMMA_ACC_80 WGMMA_ACC_72, WGMMA_FOUR(36)
#define WGMMA_ACC_88 WGMMA_ACC_80, WGMMA_FOUR(40)
#define WGMMA_ACC_96 WGMMA_ACC_88, WGMMA_FOUR(44)
#define WGMMA_ACC_104 WGMMA_ACC_96, WGMMA_FOUR(48)
#define WGMMA_ACC_112 WGMMA_ACC_104, WGMMA_FOUR(52)
#define WGMMA_ACC_120 WGMMA_ACC_112, WGMMA_FOUR(56)
#define WGMMA_ACC_128 WGMMA_ACC_120, WGMMA_FOUR(60)
#define WGMMA_ACC_136 WGMMA_ACC_128, WGMMA_FOUR(64)
#define WGMMA_ACC_144 WGMMA_ACC_136, WGMMA_FOUR(68)
#define WGMMA_ACC_152 WGMMA_ACC_144, WGMMA_FOUR(72)
#define WGMMA_ACC_160 WGMMA_ACC_152, WGMMA_FOUR(76)
#define WGMMA_ACC_168 WGMMA_ACC_160, WGMMA_FOUR(80)
#define WGMMA_ACC_176 WGMMA_ACC_168, WGMMA_FOUR(84)
#define WGMMA_ACC_184 WGMMA_ACC_176, WGMMA_FOUR(88)
#define WGMMA_ACC_192 WGMMA_ACC_184, WGMMA_FOUR(92)
#define WGMMA_ACC_200 WGMMA_ACC_192, WGMMA_FOUR(96)
#define WGMMA_ACC_208 WGMMA_ACC_200, WGMMA_FOUR(100)
#define WGMMA_ACC_216 WGMMA_ACC_208, WGMMA_FOUR(104)
#define WGMMA_ACC_224 WGMMA_ACC_216, WGMMA_FOUR(108)
#define WGMMA_ACC_232 WGMMA_ACC_224, WGMMA_FOUR(112)
#define WGMMA_ACC_240 WGMMA_ACC_232, WGMMA_FOUR(116)
#define WGMMA_ACC_248 WGMMA_ACC_240, WGMMA_FOUR(120)
#define WGMMA_ACC_256 WGMMA_ACC_248, WGMMA_FOUR(124)
#define WGMMA_A_8 "{%4, %5}"
#define WGMMA_B_8 "{%6, %7}"
#define WGMMA_A_16 "{%8, %9}"
#define WGMMA_B_16 "{%10, %11}"
#define WGMMA_A_24 "{%12, %13}"
#define WGMMA_B_24 "{%14, %15}"
#define WGMMA_A_32 "{%16, %17}"
#define WGMMA_B_32 "{%18, %19}"
#define WGMMA_A_40 "{%20, %21}"
#define WGMMA_B_40 "{%22, %23}"
#define WGMMA_A_48 "{%24, %25}"
#define WGMMA_B_48 "{%26, %27}"
#define WGMMA_A_56 "{%28, %29}"
#define WGMMA_B_56 "{%30, %31}"
#define WGMMA_A_64 "{%32, %33}"
#define WGMMA_B_64 "{%34, %35}"
#define WGMMA_A_72 "{%36, %37}"
#define WGMMA_B_72 "{%38, %39}"
#define WGMMA_A_80 "{%40, %41}"
#define WGMMA_B_80 "{%42, %43}"
#define WGMMA_A_88 "{%44, %45}"
#define WGMMA_B_88 "{%46, %47}"
#define WGMMA_A_96 "{%48, %49}"
#define WGMMA_B_96 "{%50, %51}"
#define WGMMA_A_104 "{%52, %53}"
#define WGMMA_B_104 "{%54, %55}"
#define WGMMA_A_112 "{%56, %57}"
#define WGMMA_B_112 "{%58, %59}"
#define WGMMA_A_120 "{%60, %61}"
#define WGMMA_B_120 "{%62, %63}"
#define WGMMA_A_128 "{%64, %65}"
#define WGMMA_B_128 "{%66, %67}"
#define WGMMA_A_136 "{%68, %69}"
#define WGMMA_B_136 "{%70, %71}"
#define WGMMA_A_144 "{%72, %73}"
#define WGMMA_B_144 "{%74, %75}"
#define WGMMA_A_152 "{%76, %77}"
#define WGMMA_B_152 "{%78, %79}"
#define WGMMA_A_160 "{%80, %81}"
#define WGMMA_B_160 "{%82, %83}"
#define WGMMA_A_168 "{%84, %85}"
#define WGMMA_B_168 "{%86, %87}"
#define WGMMA_A_176 "{%88, %89}"
#define WGMMA_B_176 "{%90, %91}"
#define WGMMA_A_184 "{%92, %93}"
#define WGMMA_B_184 "{%94, %95}"
#define WGMMA_A_192 "{%96, %97}"
#define WGMMA_B_192 "{%98, %99}"
#define WGMMA_A_200 "{%100, %101}"
#define WGMMA_B_200 "{%102, %103}"
#define WGMMA_A_208 "{%104, %105}"
#define WGMMA_B_208 "{%106, %107}"
#define WGMMA_A_216 "{%108, %109}"
#define WGMMA_B_216 "{%110, %111}"
#define WGMMA_A_224 "{%112, %113}"
#define WGMMA_B_224 "{%114, %115}"
#define WGMMA_A_232 "{%116, %117}"
#define WGMMA_B_232 "{%118, %119}"
#define WGMMA_A_240 "{%120, %121}"
#define WGMMA_B_240 "{%122, %123}"
#define WGMMA_A_248 "{%124, %125}"
#define WGMMA_B_248 "{%126, %127}"
#define WGMMA_A_256 "{%128, %129}"
#define WGMMA_B_256 "{%130, %131}"
// clang-format on

__device__ __forceinline__ void wgmma(float (&acc)[WGMMA_N / 2], MatrixDescriptor a, MatrixDescriptor b) {
    asm volatile(
        "{\n"
        ".reg .b64 a, b;\n"
        "mov.b64 a, " WGMMA_PASTE(WGMMA_A_, WGMMA_N) ";\n"
        "mov.b64 b, " WGMMA_PASTE(WGMMA_B_, WGMMA_N) ";\n"
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TEXT(WGMMA_N) "k16.f32." WGMMA_PASTE(WGMMA_TYPE_, ELEMENT) "."
        WGMMA_PASTE(WGMMA_TYPE_, ELEMENT) " {" WGMMA_PASTE(WGMMA_NAMES_, WGMMA_N) "}, a, b, 1, 1, 1, "
        WGMMA_PASTE(WGMMA_TRANSPOSE_, A_K_CONTIGUOUS) ", " WGMMA_PASTE(WGMMA_TRANSPOSE_, B_K_CONTIGUOUS) ";\n"
        "}"
        : WGMMA_PASTE(WGMMA_ACC_, WGMMA_N)
        : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high));
}
#endif
