// What the matrix products share: their parameters, the order of the tiles, and the epilogue.
//
// Operands are seen as MN x K: stride[0] steps along m (of a) or n (of b), stride[1] along k. Which of the caller's
// operands is a and which is b is the schedule's choice, because every fold is symmetric in them.
#pragma once
#include "layout.cuh"
#include "numerics.cuh"

struct Matmul {
    long long m, n, k;
    long long a_stride[2], b_stride[2];
    long long a_along_k, b_along_k;        // along which dimension an operand is read
    long long c_stride[2], out_stride[2];  // along m, along n
    long long addend;                      // whether there is a c
    long long c_dtype, out_dtype;
    long long tiles;  // of all matrices
    Divisor tiles_of_matrix, tiles_of_band;
    long long batch_dims;
    Dims<4> batch;  // operands a, b, c, out
};

// Tiles along m that are walked before the next step along n, so that CTAs that run together share operands in the L2.
constexpr int BAND = MATMUL_BAND;

// Where a CTA's tile lies.
struct TilePosition {
    long long a, b, c, out;  // offsets of the matrices
    long long m, n;          // the tile's first row and column
};

template <int HEIGHT, int WIDTH>
__device__ __forceinline__ TilePosition tile_position(const Matmul& p, long long tile) {
    long long offset[4];
    p.batch.offsets(p.tiles_of_matrix.divide(tile), 0, p.batch_dims, offset);
    const long long first = p.tiles_of_band.divide(tile) * BAND;
    // Of a band of `height` tiles the tile is one of height * tiles along n: less than 2^32, or the output has 2^40
    // elements.
    const unsigned height = min(static_cast<long long>(BAND), (p.m + HEIGHT - 1) / HEIGHT - first);
    const unsigned column = static_cast<unsigned>(tile) / height, row = static_cast<unsigned>(tile) % height;
    return {offset[0], offset[1], offset[2], offset[3], (first + row) * HEIGHT, static_cast<long long>(column) * WIDTH};
}

// How many of `tile` rows, columns or steps from `first` on lie before `end`.
__device__ __forceinline__ int left_of(long long first, long long end, int tile) {
    return static_cast<int>(max(0ll, min(end - first, static_cast<long long>(tile))));
}

// Finishes one element: acc is the fold's result, +0 if it is a zero.
template <class A>
struct Epilogue {
    const Matmul& p;
    void* out;
    const void* c;
    A alpha, beta;

    __device__ __forceinline__ void write(const TilePosition& tile, long long m, long long n, A acc) const {
        A t = acc;
        if (alpha != 1) t = alpha * t;
        if (p.addend) {
            const long long offset = tile.c + m * p.c_stride[0] + n * p.c_stride[1];
            t = fused(beta, Element<any_dtype, A>::load(c, offset, static_cast<int>(p.c_dtype)), t);
        }
        store(out, tile.out + m * p.out_stride[0] + n * p.out_stride[1], static_cast<int>(p.out_dtype), t);
    }
};
