// Reductions along a strided axis (see columns.cuh). A column has at most 32 chunks.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. WIDTH: columns of a thread.
// IN_CLUSTER: whether a tile is a cluster's. THREADS: of a CTA, at most.
#include "columns.cuh"
#include "softmax.cuh"

using A = ACCUMULATE;
using Tile = Columns<ELEMENT, A, WIDTH, IN_CLUSTER>;

struct Arrays {
    void* out;
    const void* grad;
    const void* mean;
    const void* rstd;
};

__device__ __forceinline__ A add(A a, A b) { return a + b; }

// Share a sum of each chunk, which of_chunk(chunk, sum) writes for the thread's columns and lanes.
template <class OfChunk>
__device__ __forceinline__ void share_chunks(const Tile& tile, OfChunk of_chunk) {
    for (int chunk = tile.rank; chunk < tile.chunks; chunk += tile.ctas) {
        A sum[WIDTH];
        of_chunk(chunk, sum);
        tile.fold_groups(sum, tile.chunk_sums + chunk * tile.tile, add);
    }
    tile.meet();
}

// of[w] = value(at) of the thread's columns, each computed once in a CTA.
template <class Value>
__device__ __forceinline__ void column_values(const Tile& tile, A (&of)[WIDTH], Value value) {
#pragma unroll 1
    for (int at = threadIdx.x; at < tile.tile; at += blockDim.x) tile.partial[at] = value(at);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WIDTH; w++) of[w] = tile.partial[tile.left + w];
}

// Write result(at) for each column of the tile.
template <class Result>
__device__ __forceinline__ void write_columns(const Tile& tile, long long first, void* out, Result result) {
    if (tile.rank > 0) return;
    const Reduction& p = tile.p;
    for (int at = threadIdx.x; at < tile.tile && first + at < p.rows; at += blockDim.x)
        store(out, p.row_offset<OF_OUT>(first + at), p.out_dtype(), result(at));
}

struct Mean {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
        share_chunks(tile, [&](int chunk, A(&sum)[WIDTH]) { tile.sum_elements(chunk, sum); });
        write_columns(tile, first, arrays.out,
                      [&](int at) { return tile.sum_of_chunks(at) / static_cast<A>(p.divisor); });
    }
};

struct Variance {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
        share_chunks(tile, [&](int chunk, A(&sum)[WIDTH]) { tile.sum_elements(chunk, sum); });
        A mean[WIDTH];
        column_values(tile, mean, [&](int at) { return tile.sum_of_chunks(at) / static_cast<A>(p.n); });
        tile.meet();  // every CTA has read what the next sums overwrite
        share_chunks(tile, [&](int chunk, A(&sum)[WIDTH]) {
            tile.sum_terms<8>(chunk, sum, [&](int i, A(&lane)[WIDTH]) {
                A v[WIDTH];
                tile.read(i, v);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) {
                    const A y = v[w] - mean[w];
                    lane[w] += y * y;
                }
            });
        });
        write_columns(tile, first, arrays.out, [&](int at) {
            const A variance = tile.sum_of_chunks(at) / static_cast<A>(p.divisor);
            return p.logarithm ? root(variance) : variance;
        });
    }
};

template <bool CENTRED>
struct WeightBackward {
    // At a time; single columns have 64 registers a thread.
    static constexpr int STEPS = WIDTH == 1 && sizeof(A) == 8 ? 1 : 8;

    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
        const WeightTerms<ELEMENT, A, WIDTH, CENTRED> terms(p, tile.column, arrays.grad, arrays.mean, arrays.rstd);
        share_chunks(tile, [&](int chunk, A(&sum)[WIDTH]) {
            tile.sum_terms<STEPS>(chunk, sum, [&](int i, A(&lane)[WIDTH]) {
                A v[WIDTH];
                tile.read(i, v);
                terms.add(i, v, lane);
            });
        });
        write_columns(tile, first, arrays.out, [&](int at) { return tile.sum_of_chunks(at); });
    }
};

using RmsNormWeightBackward = WeightBackward<false>;
using LayerNormWeightBackward = WeightBackward<true>;

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

template <Form FORM>
struct SoftmaxFamily {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
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
        share_chunks(tile, [&](int chunk, A(&sum)[WIDTH]) {
            tile.sum_terms<2>(chunk, sum, [&](int i, A(&lane)[WIDTH]) {
                A v[WIDTH];
                tile.read(i, v);
                add_terms(v, maximum, is_precise, lane, count);
            });
        });
        tile.fold_groups(count, tile.counts + tile.rank * tile.tile, add);
        tile.meet();
        const auto normaliser_of = [&](int at) {
            A all = 0;
            for (int cta = 0; cta < tile.ctas; cta++) all += tile.counts[cta * tile.tile + at];
            return softmax_normaliser(all, tile.sum_of_chunks(at), FORM != Form::SOFTMAX);
        };
        if constexpr (FORM == Form::LOGSUMEXP) {
            write_columns(tile, first, arrays.out, [&](int at) {
                A m = tile.maxima[at];
                for (int cta = 1; cta < tile.ctas; cta++) m = larger_nan(m, tile.maxima[cta * tile.tile + at]);
                return m - m != 0 && m == m ? m : m + normaliser_of(at);
            });
            return;
        }
        A normaliser[WIDTH];
        column_values(tile, normaliser, normaliser_of);

        const ColumnWriter<A, WIDTH> writer(p, arrays.out, p.row_offset<OF_OUT>(min(tile.column, p.rows - WIDTH)));
        tile.for_elements([&](int i) {
            A v[WIDTH];
            tile.read(i, v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++)
                v[w] = softmax_element(v[w], maximum[w], normaliser[w], FORM == Form::LOG_SOFTMAX, is_precise);
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

using Softmax = SoftmaxFamily<Form::SOFTMAX>;
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX>;
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP>;

// `bits`: the logarithm of the number of groups.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS > 0 ? 512 / THREADS : 1)
    reduce_columns(const __grid_constant__ Reduction p, int bits, void* out, const void* x, const void* grad,
                   const void*, const void*, void* mean, void* rstd) {
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
        OPERATION::run(tile, p, first, Arrays{out, grad, mean, rstd});
        tile.meet();  // shared memory is free for the next tile
    }
}
