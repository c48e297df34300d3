// Reductions along a strided axis (see columns.cuh). A column has at most 32 chunks.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. WIDTH: columns of a thread.
// IN_CLUSTER: whether a tile is a cluster's. THREADS: of a CTA, at most.
#include "columns.cuh"
#include "softmax.cuh"

using A = ACCUMULATE;
using Tile = Columns<ELEMENT, A, WIDTH, IN_CLUSTER>;

__device__ __forceinline__ A add(A a, A b) { return a + b; }

struct Mean {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first, void* out) {
        for (int chunk = tile.rank; chunk < tile.chunks; chunk += tile.ctas) {
            A sum[WIDTH];
            tile.sum_elements(chunk, sum);
            tile.fold_groups(sum, tile.chunk_sums + chunk * tile.tile, add);
        }
        tile.meet();
        if (tile.rank > 0) return;
        for (int at = threadIdx.x; at < tile.tile && first + at < p.rows; at += blockDim.x) {
            long long start[2];
            p.row_offsets(first + at, start);
            store(out, start[1], static_cast<int>(p.out_dtype), tile.sum_of_chunks(at) / static_cast<A>(p.divisor));
        }
    }
};

template <bool LOGARITHM>
struct SoftmaxFamily {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long, void* out) {
        const bool is_precise = p.is_precise();

        A maximum[WIDTH];  // it is exact, so its order is free
#pragma unroll
        for (int w = 0; w < WIDTH; w++) maximum[w] = lowest<A>();
        tile.for_elements([&](int i) {
            A v[WIDTH];
            tile.read(i, v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) maximum[w] = larger_nan(maximum[w], v[w]);
        });
        tile.fold_groups(maximum, tile.maxima + tile.rank * tile.tile, [](A a, A b) { return larger_nan(a, b); });
        tile.meet();
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            maximum[w] = tile.maxima[tile.left + w];
            for (int cta = 1; cta < tile.ctas; cta++)
                maximum[w] = larger_nan(maximum[w], tile.maxima[cta * tile.tile + tile.left + w]);
        }

        A count[WIDTH] = {};  // exact, and so is their sum: a column has at most 2^16 elements
        for (int chunk = tile.rank; chunk < tile.chunks; chunk += tile.ctas) {
            A sum[WIDTH];
            tile.sum_terms(chunk, sum, [&](int i, A(&lane)[WIDTH]) {
                A v[WIDTH];
                tile.read(i, v);
                add_terms(v, maximum, is_precise, lane, count);
            });
            tile.fold_groups(sum, tile.chunk_sums + chunk * tile.tile, add);
        }
        tile.fold_groups(count, tile.counts + tile.rank * tile.tile, add);
        tile.meet();
        A normaliser[WIDTH];
#pragma unroll 1
        for (int at = threadIdx.x; at < tile.tile; at += blockDim.x) {
            A all = 0;
            for (int cta = 0; cta < tile.ctas; cta++) all += tile.counts[cta * tile.tile + at];
            tile.partial[at] = softmax_normaliser(all, tile.sum_of_chunks(at), LOGARITHM);
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WIDTH; w++) normaliser[w] = tile.partial[tile.left + w];

        long long start[2];
        p.row_offsets(min(tile.column, p.rows - WIDTH), start);
        const ColumnWriter<A, WIDTH> writer(p, out, start[1]);
        tile.for_elements([&](int i) {
            A v[WIDTH];
            tile.read(i, v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++)
                v[w] = softmax_element(v[w], maximum[w], normaliser[w], LOGARITHM, is_precise);
            writer.write(i, v);
        });
    }

  private:
    template <class F>
    static __device__ __forceinline__ void add_terms(const F (&v)[WIDTH], const F (&maximum)[WIDTH], bool is_precise,
                                                     F (&lane)[WIDTH], F (&count)[WIDTH]) {
        if constexpr (is_same<F, float>::value) {
            float least = 0, most = NEAR;
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                const float t = v[w] - maximum[w];
                least = t > NEAR ? least : t;  // a NaN, too
                most = fmaxf(most, t);
            }
            if (least == 0 && most < 0) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) {
                    float error;
                    const float t = difference(v[w], maximum[w], error);
                    lane[w] += exponential_near<true>(t, is_precise ? error : 0.0f);
                }
                return;
            }
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            unsigned is_maximum = 0;
            lane[w] += counted_exponential(v[w], maximum[w], is_precise, is_maximum);
            count[w] += is_maximum;
        }
    }
};

using LogSoftmax = SoftmaxFamily<true>;
using Softmax = SoftmaxFamily<false>;

// `bits`: the logarithm of the number of groups.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS > 0 ? 512 / THREADS : 1)
    reduce_columns(const __grid_constant__ Reduction p, int bits, void* out, const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    Tile tile(p, bits, shared);
    if constexpr (IN_CLUSTER) sync_cluster();  // no CTA writes to another that has not started
#if __CUDA_ARCH__ >= 900
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();
#endif
    for (long long first = blockIdx.x / tile.ctas * static_cast<long long>(tile.tile); first < p.rows;
         first += gridDim.x / tile.ctas * static_cast<long long>(tile.tile)) {
        tile.move(first, x);
        OPERATION::run(tile, p, first, out);
        tile.meet();  // shared memory is free for the next tile
    }
}
