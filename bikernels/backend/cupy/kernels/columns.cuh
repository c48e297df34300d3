// Reductions along a strided axis: 32 rows (columns of memory that lie side by side) per CTA, one per lane of each
// warp.
//
// A thread sums 8 neighbouring lanes of the tree for its column; the 32 groups of lanes of a chunk meet in shared
// memory, transposed, so that the upper levels are the same shuffles as in a contiguous row.
#pragma once
#include "reduction.cuh"

constexpr int COLUMNS = WARP;
constexpr int GROUPS = SUM_LANES / THREAD_LANES;
static_assert(GROUPS == WARP, "a group of lanes per thread of a warp");

// One chunk for the CTA's 32 columns. `partial` is shared memory; the sums are in sums[column] after the next barrier.
template <class A, int UNROLL, class Load>
__device__ __forceinline__ void sum_column_chunk(long long first, long long n, A (*partial)[COLUMNS + 1], A* sums,
                                                 Load load) {
    const int warps = blockDim.x / WARP;
    for (int group = warp_id(); group < GROUPS; group += warps) {
        partial[group][lane_id()] = sum_thread_lanes<A, UNROLL>(first + group * THREAD_LANES, n, load);
    }
    __syncthreads();
    for (int column = warp_id(); column < COLUMNS; column += warps) {
        const A sum = sum_warp(partial[lane_id()][column]);
        if (lane_id() == 0) sums[column] = sum;
    }
    __syncthreads();  // `partial` is free for the next chunk
}

// The sum of at most 32 chunks for each column, in sums[0][column] after the last barrier.
template <class A, int UNROLL, class Load>
__device__ __forceinline__ void sum_columns(long long n, A (*partial)[COLUMNS + 1], A (*sums)[COLUMNS + 1], Load load) {
    const int chunks = static_cast<int>(chunks_of(n));
    const int warps = blockDim.x / WARP;
    for (int chunk = 0; chunk < chunks; chunk++) {
        sum_column_chunk<A, UNROLL>(static_cast<long long>(chunk) * SUM_CHUNK, n, partial, sums[chunk], load);
    }
    if (chunks == 1) return;
    for (int column = warp_id(); column < COLUMNS; column += warps) {
        // Each chunk's sum is the only element of its lane; the lanes beyond hold +0.
        const A sum = sum_warp(lane_id() < chunks ? sums[lane_id()][column] : A(0));
        __syncwarp();
        if (lane_id() == 0) sums[0][column] = sum;
    }
    __syncthreads();
}
