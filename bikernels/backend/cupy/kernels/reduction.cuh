// What the reduction kernels share: their parameters, and how the elements of a row are read and written.
#pragma once
#include "layout.cuh"
#include "numerics.cuh"
#include "sum_tree.cuh"

// The operands of a reduction, in the order of its strides and dtypes. Those that an operation does not have are not
// read.
constexpr int OF_X = 0, OF_OUT = 1, OF_GRAD = 2, OF_WEIGHT = 3, OF_BIAS = 4, OF_MEAN = 5, OF_RSTD = 6, OPERANDS = 7;

struct Reduction {
    long long rows;
    long long n;          // elements of a row
    Divisor chunks;       // of a row
    double divisor, eps;  // of the sums of mean, var and the norms; rounded to the accumulate dtype here
    long long rounds;     // whether x, of any_dtype, is rounded to out's dtype first (elsewhere that cast is exact)
    long long logarithm;  // log_softmax instead of softmax, std instead of var
    long long kept;       // dims[0 … kept-1] are those of the rows' first elements
    long long count;      // dims[kept … count-1] are those of the elements of a row
    long long dtype[OPERANDS];
    long long step[OPERANDS];  // the only stride of a row's elements, where it has one dimension
    Dims<OPERANDS> dims;

    // Whether exponentials make up for the rounding of x - maximum: where the result is as precise as the arithmetic.
    __device__ __forceinline__ bool is_precise() const {
        return out_dtype() == DTYPE_FLOAT32 || out_dtype() == DTYPE_FLOAT64;
    }
    __device__ __forceinline__ bool has_step() const { return count - kept <= 1; }
    __device__ __forceinline__ int out_dtype() const { return static_cast<int>(dtype[OF_OUT]); }
    // Where a row of an operand begins.
    template <int OPERAND>
    __device__ __forceinline__ long long row_offset(long long row) const {
        return dims.offset<OPERAND>(row, 0, kept);
    }
};

template <class T, class U>
struct is_same {
    static constexpr bool value = false;
};
template <class T>
struct is_same<T, T> {
    static constexpr bool value = true;
};

// Reads one row of an operand in the accumulate dtype, x after the cast to the result's dtype.
template <class X, class A, int OPERAND = OF_X>
struct RowReader {
    static constexpr bool HAS_DTYPE = !is_same<X, any_dtype>::value;

    const Reduction& p;
    const void* x;
    long long start;     // offset of the row's first element
    bool is_contiguous;  // whether elements lie side by side
    bool vectors;        // and begin where a vector may

    __device__ __forceinline__ RowReader(const Reduction& p, const void* x, long long start)
        : p(p), x(x), start(start), is_contiguous(p.has_step() && p.step[OPERAND] == 1), vectors(false) {
        if constexpr (HAS_DTYPE) vectors = is_contiguous && is_vector_aligned(static_cast<const X*>(x) + start);
    }

    // Elements i … i+7; `absent` from n on.
    __device__ __forceinline__ void read(long long i, A absent, A (&v)[THREAD_LANES]) const {
        if constexpr (HAS_DTYPE) {
            if (vectors && i + THREAD_LANES <= p.n) {
                load_8(static_cast<const X*>(x) + start + i, v);
                return;
            }
            if (is_contiguous && i + THREAD_LANES <= p.n) {
                load_8_anywhere(static_cast<const X*>(x) + start + i, v);
                return;
            }
            if (p.has_step()) {
                const int present = static_cast<int>(min(p.n - i, static_cast<long long>(THREAD_LANES)));
                const long long first = start + i * p.step[OPERAND];
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++)
                    v[j] = j < present ? Element<X, A>::load(x, first + j * p.step[OPERAND], 0) : absent;
                return;
            }
        }
        // One element at a time, so that its code exists once: v is a queue, because registers have no run-time index.
#pragma unroll 1
        for (int j = 0; j < THREAD_LANES; j++) {
            A value = absent;
            if (i + j < p.n) {
                const long long offset = p.dims.template offset<OPERAND>(i + j, p.kept, p.count);
                value = Element<X, A>::load(x, start + offset, static_cast<int>(p.dtype[OPERAND]));
            }
#pragma unroll
            for (int k = 0; k < THREAD_LANES - 1; k++) v[k] = v[k + 1];
            v[THREAD_LANES - 1] = value;
        }
        if (!HAS_DTYPE && OPERAND == OF_X && p.rounds) {
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = round_through(v[j], p.out_dtype());
        }
    }

    // The sum of 8 neighbouring lanes of a chunk, of which `first` is the position of the first element, with 128 bytes
    // of a thread on their way.
    __device__ __forceinline__ A sum_lanes(long long first, long long n) const {
        if constexpr (HAS_DTYPE) {
            constexpr int VECTORS = sizeof(X) / 2, AT_ONCE = 8 / VECTORS;
            if (vectors && first + SUM_CHUNK - SUM_LANES + THREAD_LANES <= n) {
                A lane[THREAD_LANES] = {};
#pragma unroll 1
                for (int step = 0; step < SUM_CHUNK / SUM_LANES; step += AT_ONCE) {
                    uint4 raw[AT_ONCE][VECTORS];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        const X* from = static_cast<const X*>(x) + start + first + (step + i) * SUM_LANES;
#pragma unroll
                        for (int j = 0; j < VECTORS; j++) raw[i][j] = reinterpret_cast<const uint4*>(from)[j];
                    }
#pragma unroll
                    for (int i = 0; i < AT_ONCE; i++) {
                        A v[THREAD_LANES];
#pragma unroll
                        for (int j = 0; j < VECTORS; j++)
                            unpack(raw[i][j], static_cast<X*>(nullptr), v + j * (THREAD_LANES / VECTORS));
#pragma unroll
                        for (int j = 0; j < THREAD_LANES; j++) lane[j] += v[j];
                    }
                }
                return fold_thread_lanes(lane);
            }
        }
        return sum_thread_lanes<A, 4>(first, n, [&](long long i, A(&v)[THREAD_LANES]) { read(i, A(0), v); });
    }
};

// Writes one row of out, R: its dtype (or any_dtype).
template <class R, class A>
struct RowWriter {
    static constexpr bool HAS_DTYPE = !is_same<R, any_dtype>::value;

    const Reduction& p;
    void* out;
    long long start;
    bool is_contiguous, vectors;  // as in RowReader

    __device__ __forceinline__ RowWriter(const Reduction& p, void* out, long long start)
        : p(p), out(out), start(start), is_contiguous(p.has_step() && p.step[OF_OUT] == 1) {
        vectors = is_contiguous && is_vector_aligned(address(0));
    }

    // Elements i … i+7, those before n.
    __device__ __forceinline__ void write(long long i, A (&v)[THREAD_LANES]) const {
        if (is_contiguous && i + THREAD_LANES <= p.n) {
            if constexpr (HAS_DTYPE) {
                vectors ? store_8<R>(address(i), v) : store_8_anywhere<R>(address(i), v);
            } else {
                vectors ? store_8(address(i), p.out_dtype(), v) : store_8_anywhere(address(i), p.out_dtype(), v);
            }
            return;
        }
#pragma unroll 1
        for (int j = 0; j < THREAD_LANES && i + j < p.n; j++) {  // a queue, as in RowReader::read
            const long long offset =
                p.has_step() ? (i + j) * p.step[OF_OUT] : p.dims.template offset<OF_OUT>(i + j, p.kept, p.count);
            store_at(start + offset, v[0]);
#pragma unroll
            for (int k = 0; k < THREAD_LANES - 1; k++) v[k] = v[k + 1];
        }
    }

    // The only element of a row.
    __device__ __forceinline__ void write_one(A v) const { store_at(start, v); }

  private:
    __device__ __forceinline__ void store_at(long long offset, A v) const {
        if constexpr (HAS_DTYPE) {
            store(static_cast<R*>(out) + offset, v);
        } else {
            store(out, offset, p.out_dtype(), v);
        }
    }
    __device__ __forceinline__ void* address(long long i) const {
        int size = p.out_dtype() == DTYPE_FLOAT64 ? 8 : p.out_dtype() == DTYPE_FLOAT32 ? 4 : 2;
        if constexpr (HAS_DTYPE) size = sizeof(R);
        return static_cast<char*>(out) + (start + i) * size;
    }
};

// --------------------------------------------------------------------------------------------- maximum, exponentials

template <class A>
__device__ __forceinline__ A lowest();
template <>
__device__ __forceinline__ float lowest<float>() {
    return __uint_as_float(0xFF800000u);
}
template <>
__device__ __forceinline__ double lowest<double>() {
    return __longlong_as_double(0xFFF0000000000000ll);
}

// The larger of two; a NaN if there is one.
template <class A>
__device__ __forceinline__ A larger(A a, A b) {
    return b > a || b != b ? b : a;
}

template <class A>
__device__ __forceinline__ A max_warp(A maximum) {
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) maximum = larger(maximum, __shfl_xor_sync(~0u, maximum, mask));
    return maximum;
}

// exp(x - maximum), given t, the rounded difference.
template <class A>
__device__ __forceinline__ A exponential_of(A x, A maximum, A t, bool is_precise) {
    const A b = t - x;
    const A error = (x - (t - b)) + (-maximum - b);  // of that difference, exactly
    return exponential(t, is_precise ? error : A(0));
}

// A term of softmax's sum: exp(x - maximum), but +0 and one more in `count` where x is the maximum. An absent element,
// read as -inf, gives +0.
template <class A>
__device__ __forceinline__ A counted_exponential(A x, A maximum, bool is_precise, unsigned& count) {
    const A t = x - maximum;
    count += t == 0;
    return t == 0 ? A(0) : exponential_of(x, maximum, t, is_precise);
}

// What the elements of a row are divided by (softmax) or what is subtracted from them (log_softmax).
template <class A>
__device__ __forceinline__ A softmax_normaliser(A count, A sum, bool is_log) {
    const A u = count + sum;
    const A b = u - count;
    const A error = (count - (u - b)) + (sum - b);  // of that addition, exactly
    return is_log ? logarithm(u) + error / u : u;
}

// One result.
template <class A>
__device__ __forceinline__ A softmax_element(A x, A maximum, A normaliser, bool is_log, bool is_precise) {
    const A t = x - maximum;
    return is_log ? t - normaliser : exponential_of(x, maximum, t, is_precise) / normaliser;
}
