// Reductions along a strided axis (see columns.cuh). A column has at most 32 chunks.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. IN_CLUSTER: whether a tile is a
// cluster's. THREADS: of a CTA, at most.
#include "columns.cuh"
#include "softmax.cuh"

using A = ACCUMULATE;
using Tile = Columns<ELEMENT, A, IN_CLUSTER>;

struct Arrays {
    void* out;
    const void* grad;
    const void* mean;
    const void* rstd;
};

__device__ __forceinline__ A add(A a, A b) { return a + b; }

// Share a sum of each chunk: of_chunk(chunk) is that of the thread's column and lanes.
template <class OfChunk>
__device__ __forceinline__ void share_chunks(const Tile& tile, OfChunk of_chunk) {
    for (int chunk = tile.rank; chunk < tile.chunks; chunk += tile.ctas)
        tile.fold_groups(of_chunk(chunk), tile.chunk_sums + chunk * tile.tile, add);
    tile.meet();
}

// value(at) of the thread's column, computed once in a CTA.
template <class Value>
__device__ __forceinline__ A column_value(const Tile& tile, Value value) {
#pragma unroll 1
    for (int at = threadIdx.x; at < tile.tile; at += blockDim.x) tile.partial[at] = value(at);
    __syncthreads();
    return tile.partial[tile.left];
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
        share_chunks(tile, [&](int chunk) { return tile.sum_elements(chunk); });
        write_columns(tile, first, arrays.out,
                      [&](int at) { return tile.sum_of_chunks(at) / static_cast<A>(p.divisor); });
    }
};

struct Variance {
    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
        share_chunks(tile, [&](int chunk) { return tile.sum_elements(chunk); });
        const A mean = column_value(tile, [&](int at) { return tile.sum_of_chunks(at) / static_cast<A>(p.n); });
        tile.meet();  // every CTA has read what the next sums overwrite
        share_chunks(tile, [&](int chunk) {
            return tile.sum_terms<8>(chunk, [&](int i, A& lane) {
                const A y = tile.read(i) - mean;
                lane += y * y;
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
    static constexpr int STEPS = sizeof(A) == 8 ? 1 : 8;  // at a time; there are 64 registers a thread

    static __device__ __forceinline__ void run(const Tile& tile, const Reduction& p, long long first,
                                               const Arrays& arrays) {
        const WeightTerms<ELEMENT, A, CENTRED> term(p, tile.column, arrays.grad, arrays.mean, arrays.rstd);
        share_chunks(tile, [&](int chunk) {
            return tile.sum_terms<STEPS>(chunk, [&](int i, A& lane) { lane += term(i, tile.read(i)); });
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

        A maximum = lowest<A>();  // it is exact, so its order is free
        tile.for_elements([&](int i) { maximum = larger_nan(maximum, tile.read(i)); });
        tile.fold_groups(maximum, tile.maxima + tile.rank * tile.tile, [](A a, A b) { return larger_nan(a, b); });
        tile.meet();
        maximum = maximum_of(tile, tile.left);

        A count = 0;  // exact, and so is their sum: a column has at most 2^16 elements
        share_chunks(tile, [&](int chunk) {
            return tile.sum_terms<2>(
                chunk, [&](int i, A& lane) { add_term(tile.read(i), maximum, is_precise, lane, count); });
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
                const A m = maximum_of(tile, at);
                return m - m != 0 && m == m ? m : m + normaliser_of(at);
            });
            return;
        }
        const A normaliser = column_value(tile, normaliser_of);
        const long long start = p.row_offset<OF_OUT>(min(tile.column, p.rows - 1));
        tile.for_elements([&](int i) {
            const A v = softmax_element(tile.read(i), maximum, normaliser, FORM == Form::LOG_SOFTMAX, is_precise);
            store(arrays.out, start + i * p.step[OF_OUT], p.out_dtype(), v);
        });
    }

  private:
    static __device__ __forceinline__ A maximum_of(const Tile& tile, int at) {
        A maximum = tile.maxima[at];
        for (int cta = 1; cta < tile.ctas; cta++) maximum = larger_nan(maximum, tile.maxima[cta * tile.tile + at]);
        return maximum;
    }

    template <class F>
    static __device__ __forceinline__ void add_term(F v, F maximum, bool is_precise, F& lane, F& count) {
        if constexpr (is_same<F, float>::value) {
            float error;
            const float t = difference(v, maximum, error);
            if (t > NEAR && t < 0) {
                lane += exponential_near<true>(t, is_precise ? error : 0.0f);
                return;
            }
        }
        unsigned is_maximum = 0;
        lane += counted_exponential(v, maximum, is_precise, is_maximum);
        count += is_maximum;
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
