// What the kernels share in which a thread has the columns of one 16-byte vector.
#pragma once
#include "numerics.cuh"

template <class T>
struct Add {
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

// A vector of elements that are not aligned to one.
template <class X>
__device__ __forceinline__ uint4 gathered(const X* from) {
    constexpr int WIDTH = 16 / sizeof(X);
    union {
        X x[WIDTH];
        uint4 raw;
    } all;
#pragma unroll
    for (int w = 0; w < WIDTH; w++) all.x[w] = from[w];
    return all.raw;
}

// Add lane number `lane` to the sums that wait, as neighbours: afterwards `sum` is the last neighbours' sum.
template <int LEVEL = 0, class A, int WIDTH, int COUNT>
__device__ __forceinline__ void push(int lane, A (&sum)[WIDTH], A (&waiting)[COUNT][WIDTH]) {
    if constexpr (LEVEL < COUNT) {
        if (lane >> LEVEL & 1) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) sum[w] = waiting[LEVEL][w] + sum[w];
            push<LEVEL + 1>(lane, sum, waiting);
        } else {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) waiting[LEVEL][w] = sum[w];
        }
    }
}

// Fold, as neighbours, what COUNT warps have of a column; the next warp's lies a tile's columns behind.
template <int COUNT, class T, class Fold>
__device__ __forceinline__ T fold_warps(const T* from, int columns, Fold fold) {
    if constexpr (COUNT == 1) {
        return *from;
    } else {
        return fold(fold_warps<COUNT / 2>(from, columns, fold),
                    fold_warps<COUNT / 2>(from + COUNT / 2 * columns, columns, fold));
    }
}
