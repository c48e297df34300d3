// Sums along a strided axis of at most SUM_LANES elements, of many columns that lie side by side in whole 16-byte vectors:
// a thread has the columns of one vector and up to eight neighbouring elements of them, each alone in its lane of the tree,
// and reads them all before it uses the first.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. THREADS: of a CTA.
#include "column_vectors.cuh"
#include "overlap.cuh"
#include "reduction.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

constexpr int WIDTH = 16 / sizeof(X);  // columns of a thread
constexpr int WARPS = THREADS / WARP;

struct Tile {
    const Reduction& p;
    const int n, bits;        // elements; the logarithm of the tile's vectors, at most WARP
    const int left, begin;    // of this thread: its first column in the tile, and its first element
    const long long first;    // column of the tile
    bool is_present;
    uint4 raw[THREAD_LANES];  // its elements

    __device__ __forceinline__ Tile(const Reduction& p, int bits, const void* all)
        : p(p),
          n(static_cast<int>(p.n)),
          bits(bits),
          left((threadIdx.x & ((1 << bits) - 1)) * WIDTH),
          begin((threadIdx.x >> bits) * THREAD_LANES),
          first((static_cast<long long>(blockIdx.x) << bits) * WIDTH) {
        is_present = first + left < p.rows;  // with all its columns
        const long long step = p.step[OF_X];
        const X* const from =
            static_cast<const X*>(all) + p.row_offset<OF_X>(min(first + left, p.rows - WIDTH)) + begin * step;
        const bool has_vectors = is_vector_aligned(from);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            raw[j] = make_uint4(0, 0, 0, 0);
            if (begin + j < n) {
                if (has_vectors) {
                    raw[j] = *reinterpret_cast<const uint4*>(from + j * step);
                } else {
                    raw[j] = gathered(from + j * step);
                }
            }
        }
    }

    // The sums of the tile's columns, of term(v, w) for an element v of column w of the thread: that of column threadIdx.x
    // in each of the threads that have one. `sums`: for every warp, WIDTH * WARP.
    template <class Term>
    __device__ __forceinline__ A sum(A* sums, Term term) const {
        A total[WIDTH], waiting[3][WIDTH];
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            A v[WIDTH];
            unpack(raw[j], static_cast<X*>(nullptr), v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                A sum = A(0) + (begin + j < n ? term(v[w], w) : A(0));
                // The lanes as neighbours: what waits at a level is the sum before.
                if (j & 1) sum = waiting[0][w] + sum;
                if ((j & 3) == 3) sum = waiting[1][w] + sum;
                if ((j & 7) == 7) sum = waiting[2][w] + sum;
                total[w] = sum;
                if ((j & 1) == 0) waiting[0][w] = sum;
                if ((j & 3) == 1) waiting[1][w] = sum;
                if ((j & 7) == 3) waiting[2][w] = sum;
            }
        }
#pragma unroll 1
        for (int mask = 1 << bits; mask < WARP; mask *= 2) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) total[w] += __shfl_xor_sync(~0u, total[w], mask);
        }
        const int columns = WIDTH << bits;
        if (lane_id() >> bits == 0) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) sums[warp_id() * columns + left + w] = total[w];
        }
        __syncthreads();
        return threadIdx.x < columns ? fold_warps<WARPS>(sums + threadIdx.x, columns, Add<A>()) : A(0);
    }

    template <class Result>
    __device__ __forceinline__ void write(void* out, Result result) const {
        if (threadIdx.x < WIDTH << bits && first + threadIdx.x < p.rows)
            store(out, p.row_offset<OF_OUT>(first + threadIdx.x), p.out_dtype(), result);
    }

};

struct Mean {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, void* out) {
        __shared__ A sums[WARPS * WARP * WIDTH];
        tile.write(out, tile.sum(sums, [](A v, int) { return v; }) / static_cast<A>(p.divisor));
    }
};

struct Variance {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, void* out) {
        __shared__ A sums[WARPS * WARP * WIDTH], means[WARP * WIDTH];
        const A of_column = tile.sum(sums, [](A v, int) { return v; }) / static_cast<A>(p.n);
        if (threadIdx.x < WIDTH << tile.bits) means[threadIdx.x] = of_column;
        __syncthreads();  // and `sums` is free
        A mean[WIDTH];
#pragma unroll
        for (int w = 0; w < WIDTH; w++) mean[w] = means[tile.left + w];
        const A sum = tile.sum(sums, [&](A v, int w) { return (v - mean[w]) * (v - mean[w]); });
        const A variance = sum / static_cast<A>(p.divisor);
        tile.write(out, p.logarithm ? root(variance) : variance);
    }
};

// `bits`: the logarithm of the vectors of a tile.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    reduce_short_tiles(const __grid_constant__ Reduction p, int bits, void* out, const void* x) {
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();
    OPERATION::run(Tile(p, bits, x), p, out);
}
