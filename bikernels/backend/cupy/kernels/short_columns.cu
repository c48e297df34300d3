// Reductions along a strided axis of at most SUM_LANES elements: a thread has up to eight neighbours of one column, each
// alone in its lane of the tree, in registers.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. RESULT: the dtype of softmax's results,
// that of x or the accumulate dtype. THREADS: of a CTA, at most.
#include "overlap.cuh"
#include "softmax.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

// Whether exponentials make up for the rounding of x - maximum.
constexpr bool PRECISE = is_same<RESULT, A>::value;

struct Arrays {
    void* out;
    const void* x;
    const void* grad;
    const void* mean;
    const void* rstd;
};

struct Column {
    const Reduction& p;
    const int n, bits, groups;  // elements; the logarithm of the CTA's columns; threads of a column
    const int at, begin;        // of this thread: its column in the CTA, and its first element
    long long number;           // its column
    bool is_present;
    A v[THREAD_LANES];          // its elements

    // Elements behind the end become `absent`.
    __device__ __forceinline__ Column(const Reduction& p, int bits, const void* x, A absent)
        : p(p),
          n(static_cast<int>(p.n)),
          bits(bits),
          groups(blockDim.x >> bits),
          at(threadIdx.x & ((1 << bits) - 1)),
          begin((threadIdx.x >> bits) * THREAD_LANES) {
        const long long wanted = (static_cast<long long>(blockIdx.x) << bits) + at;
        is_present = wanted < p.rows;
        number = min(wanted, p.rows - 1);
        read<OF_X>(x, absent, v);
    }

    // The thread's elements of an operand that has the dtype of x.
    template <int OPERAND>
    __device__ __forceinline__ void read(const void* operand, A absent, A (&v)[THREAD_LANES]) const {
        const long long step = p.step[OPERAND];
        const X* const from = static_cast<const X*>(operand) + p.row_offset<OPERAND>(number) + begin * step;
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) v[j] = begin + j < n ? accumulate<A>(from[j * step]) : absent;
    }

    // Write a value for the other threads of the column to read.
    template <class T>
    __device__ __forceinline__ void put(T* values, T value) const {
        if (groups > 1) values[threadIdx.x] = value;
    }
    __device__ __forceinline__ void meet() const {
        if (groups > 1) __syncthreads();
    }

    // Fold the values of the column's threads, as neighbours, of which this thread's is `value`.
    template <class T, class Fold>
    __device__ __forceinline__ T fold(const T* values, T value, T absent, Fold fold) const {
        if (groups == 1) return value;
        const auto eight = [&](int first) {
            T of[8];
#pragma unroll
            for (int i = 0; i < 8; i++) of[i] = first + i < groups ? values[(first + i << bits) + at] : absent;
#pragma unroll
            for (int count = 4; count > 0; count /= 2) {
#pragma unroll
                for (int i = 0; i < count; i++) of[i] = fold(of[2 * i], of[2 * i + 1]);
            }
            return of[0];
        };
        T folded = eight(0);
        if (groups > 8) folded = fold(folded, eight(8));
        if (groups > 16) {
            const T next = eight(16);
            folded = fold(folded, fold(next, eight(24)));
        }
        return folded;
    }

    // The column's sum of the threads' lanes; `values` is no longer read by anyone.
    __device__ __forceinline__ A sum(A* values, const A (&term)[THREAD_LANES]) const {
        A lane[THREAD_LANES];
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) lane[j] = A(0) + term[j];
        const A mine = fold_thread_lanes(lane);
        put(values, mine);
        meet();
        return fold(values, mine, A(0), [](A a, A b) { return a + b; });
    }

    __device__ __forceinline__ void write_one(void* out, A result) const {
        if (is_present && begin == 0) store(out, p.row_offset<OF_OUT>(number), p.out_dtype(), result);
    }
};

struct Mean {
    static __device__ __forceinline__ void run(const Reduction& p, int bits, const Arrays& arrays) {
        __shared__ A sums[THREADS];
        const Column column(p, bits, arrays.x, A(0));
        column.write_one(arrays.out, column.sum(sums, column.v) / static_cast<A>(p.divisor));
    }
};

struct Variance {
    static __device__ __forceinline__ void run(const Reduction& p, int bits, const Arrays& arrays) {
        __shared__ A sums[2][THREADS];
        Column column(p, bits, arrays.x, A(0));
        const A mean = column.sum(sums[0], column.v) / static_cast<A>(p.n);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            const A y = column.v[j] - mean;
            column.v[j] = column.begin + j < column.n ? y * y : A(0);
        }
        const A variance = column.sum(sums[1], column.v) / static_cast<A>(p.divisor);
        column.write_one(arrays.out, p.logarithm ? root(variance) : variance);
    }
};

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

template <Form FORM>
struct SoftmaxFamily {
    static __device__ __forceinline__ void run(const Reduction& p, int bits, const Arrays& arrays) {
        __shared__ A maxima[THREADS], sums[THREADS];
        __shared__ unsigned counts[THREADS];
        Column column(p, bits, arrays.x, lowest<A>());
        A(&v)[THREAD_LANES] = column.v;
        A maximum = v[0];
#pragma unroll
        for (int j = 1; j < THREAD_LANES; j++) maximum = larger_nan(maximum, v[j]);
        column.put(maxima, maximum);
        column.meet();
        maximum = column.fold(maxima, maximum, lowest<A>(), [](A a, A b) { return larger_nan(a, b); });

        A terms[THREAD_LANES], exponential[THREAD_LANES];
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) terms[j] = v[j];
        unsigned count = 0;
        exponentials<PRECISE, A>(nullptr, terms, maximum, count, exponential);
        column.put(counts, count);
        const A sum = column.sum(sums, terms);
        count = column.fold(counts, count, 0u, [](unsigned a, unsigned b) { return a + b; });
        const A normaliser = softmax_normaliser(static_cast<A>(count), sum, FORM != Form::SOFTMAX);

        if constexpr (FORM == Form::LOGSUMEXP) {
            const bool is_infinite = maximum - maximum != 0 && maximum == maximum;
            column.write_one(arrays.out, is_infinite ? maximum : maximum + normaliser);
        } else {
            if constexpr (FORM == Form::LOG_SOFTMAX) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] - maximum - normaliser;
            } else {
                divide(exponential, normaliser, A(1) / normaliser, true);  // by less than FEW
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = exponential[j];
            }
            const long long step = p.step[OF_OUT];
            RESULT* const to =
                static_cast<RESULT*>(arrays.out) + p.row_offset<OF_OUT>(column.number) + column.begin * step;
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++)
                if (column.is_present && column.begin + j < column.n) store(to + j * step, v[j]);
        }
    }
};

// The gradient of x, where that is given as y, from that of the result.
template <bool IS_LOG>
struct SoftmaxFamilyBackward {
    static __device__ __forceinline__ void run(const Reduction& p, int bits, const Arrays& arrays) {
        __shared__ A sums[THREADS];
        const Column column(p, bits, arrays.x, A(0));
        const A(&y)[THREAD_LANES] = column.v;
        A g[THREAD_LANES], terms[THREAD_LANES];
        column.read<OF_GRAD>(arrays.grad, A(0), g);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) terms[j] = IS_LOG || column.begin + j >= column.n ? g[j] : g[j] * y[j];
        const A sum = column.sum(sums, terms);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            const A result = IS_LOG ? fused(-exponential(y[j], A(0)), sum, g[j]) : y[j] * (g[j] - sum);
            if (column.is_present && column.begin + j < column.n) {
                const long long at = p.row_offset<OF_OUT>(column.number) + (column.begin + j) * p.step[OF_OUT];
                store(arrays.out, at, p.out_dtype(), result);
            }
        }
    }
};

using SoftmaxBackward = SoftmaxFamilyBackward<false>;
using LogSoftmaxBackward = SoftmaxFamilyBackward<true>;

// The gradient of a norm's weight (column_tiles.cu).
template <bool CENTRED>
struct WeightBackward {
    static __device__ __forceinline__ void run(const Reduction& p, int bits, const Arrays& arrays) {
        __shared__ A sums[THREADS];
        const Column column(p, bits, arrays.x, A(0));
        const A* const mean = static_cast<const A*>(arrays.mean) + column.begin * p.step[OF_MEAN];
        const A* const rstd = static_cast<const A*>(arrays.rstd) + column.begin * p.step[OF_RSTD];
        A g[THREAD_LANES], terms[THREAD_LANES];
        column.read<OF_GRAD>(arrays.grad, A(0), g);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            terms[j] = 0;
            if (column.begin + j < column.n) {
                const A r = rstd[j * p.step[OF_RSTD]], m = CENTRED ? mean[j * p.step[OF_MEAN]] : A(0);
                terms[j] = g[j] * ((CENTRED ? column.v[j] - m : column.v[j]) * r);
            }
        }
        column.write_one(arrays.out, column.sum(sums, terms));
    }
};

using RmsNormWeightBackward = WeightBackward<false>;
using LayerNormWeightBackward = WeightBackward<true>;

using Softmax = SoftmaxFamily<Form::SOFTMAX>;
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX>;
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP>;

// `bits`: the logarithm of the columns of a CTA.
extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_short_columns(const __grid_constant__ Reduction p, int bits, void* out, const void* x, const void* grad,
                         const void* mean, const void* rstd) {
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();
    OPERATION::run(p, bits, Arrays{out, x, grad, mean, rstd});
}
