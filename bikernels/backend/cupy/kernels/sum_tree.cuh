// The contract's sum tree: element i of a chunk goes, in order, to lane i mod SUM_LANES; lanes are added as neighbours.
//
// A thread owns THREAD_LANES neighbouring lanes, that is 8 consecutive elements of every SUM_LANES: one 16-byte vector
// of a 16-bit dtype. 32 threads own all lanes, so the upper levels of a chunk's tree are one warp's shuffles. Elements
// that are not there count as +0, and since no partial is ever -0, leaving them out changes no bit.
#pragma once

constexpr int WARP = 32;
constexpr int THREAD_LANES = SUM_LANES / WARP;
static_assert(THREAD_LANES == 8, "readers deliver 8 elements");
static_assert(SUM_CHUNK % SUM_LANES == 0, "every lane of a full chunk has as many elements");

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }
__device__ __forceinline__ long long chunks_of(long long n) { return (n + SUM_CHUNK - 1) / SUM_CHUNK; }

// The neighbours' sum of a thread's lanes.
template <class A>
__device__ __forceinline__ A fold_thread_lanes(A (&lane)[THREAD_LANES]) {
#pragma unroll
    for (int count = THREAD_LANES / 2; count > 0; count /= 2) {
#pragma unroll
        for (int j = 0; j < count; j++) lane[j] = lane[2 * j] + lane[2 * j + 1];
    }
    return lane[0];
}

// The sum of 8 neighbouring lanes of one chunk. `first` is the position of the first lane's first element;
// load(i, v) reads elements i … i+7, +0 from n on.
// UNROLL: loads in flight.
template <class A, int UNROLL, class Load>
__device__ __forceinline__ A sum_thread_lanes(long long first, long long n, Load load) {
    A lane[THREAD_LANES] = {};
#pragma unroll UNROLL
    for (int step = 0; step < SUM_CHUNK / SUM_LANES; step++) {
        const long long i = first + step * SUM_LANES;
        if (i < n) {
            A v[THREAD_LANES];
            load(i, v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) lane[j] += v[j];
        }
    }
    return fold_thread_lanes(lane);
}

// The neighbours' sum over the threads of a warp, in every thread.
template <class A>
__device__ __forceinline__ A sum_warp(A sum) {
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    return sum;
}

// The sum of the chunk that starts at `first`, by one warp; in every thread.
template <class A, int UNROLL, class Load>
__device__ __forceinline__ A sum_chunk(long long first, long long n, Load load) {
    return sum_warp(sum_thread_lanes<A, UNROLL>(first + lane_id() * THREAD_LANES, n, load));
}

// The sum of a row of at most SUM_CHUNK chunks by `warps` warps of one CTA (one warp: at most one chunk); in every
// thread. `sums` is shared memory for a value per chunk, which all warps may still be reading on return.
template <class A, int UNROLL, class Load>
__device__ __forceinline__ A sum_row(long long n, int warps, A* sums, Load load) {
    if (warps == 1) return sum_chunk<A, UNROLL>(0, n, load);
    const int chunks = static_cast<int>(chunks_of(n));
    for (int chunk = warp_id(); chunk < chunks; chunk += warps) {
        const A sum = sum_chunk<A, UNROLL>(static_cast<long long>(chunk) * SUM_CHUNK, n, load);
        if (lane_id() == 0) sums[chunk] = sum;
    }
    __syncthreads();
    return sum_chunk<A, 1>(0, chunks, [&](long long i, A(&v)[THREAD_LANES]) {
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) v[j] = i + j < chunks ? sums[i + j] : A(0);
    });
}
