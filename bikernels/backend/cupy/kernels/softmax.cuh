// The exponentials of softmax, eight at a time (docs/contract.md, sections 4 and 5).
//
// Where t = x - maximum lies in (NEAR, 0], exp needs neither the comparisons for the ends of its range nor two factors
// for its power of two, so eight of them are tested at once. Elsewhere (-inf, NaN, float64) it is numerics.cuh's exp.
// Both are the same operations on the same numbers.
#pragma once
#include "reduction.cuh"

constexpr float NEAR =
    -68.0f;  // exp(NEAR) * 2^-24 / FEW is not yet subnormal, so that quotients can be corrected by fma
constexpr float FEW = 0x1p24f, EXP_NEAR = 0x1p-98f;

constexpr float EXP_MAGIC = 0x1.8p23f;
static_assert(EXP_FLOAT32_MAGIC == EXP_MAGIC + 254.0f,
              "the bias that exponential() needs and exponential_near() does not");

// exponential(t, d) for NEAR < t <= 0.
template <bool PRECISE>
__device__ __forceinline__ float exponential_near(float t, float d) {
    constexpr float c[] = {EXP_FLOAT32_COEFFICIENTS};
    const float z = fused(t, EXP_FLOAT32_LOG2E, EXP_MAGIC);
    const float k = z - EXP_MAGIC;
    float f = fused(k, -EXP_FLOAT32_LN2_HIGH, t);
    f = fused(k, -EXP_FLOAT32_LN2_LOW, f);
    if constexpr (PRECISE) f = f + d;
    return __uint_as_float(__float_as_uint(horner(f, c)) + (__float_as_uint(z) << 23));  // times 2^k
}

// x - maximum, and its rounding error.
template <class A>
__device__ __forceinline__ A difference(A x, A maximum, A& error) {
    const A t = x - maximum;
    const A b = t - x;
    error = (x - (t - b)) + (-maximum - b);
    return t;
}

template <bool PRECISE, class A>
__device__ __forceinline__ A exponential_anywhere(A x, A maximum) {
    A error = 0;
    const A t = PRECISE ? difference(x, maximum, error) : x - maximum;
    return exponential(t, error);
}

// ------------------------------------------------------------------------------------------------ smallest and largest

#if __CUDA_ARCH__ >= 800
#define PAIR_FUNCTION(name, instruction)                                 \
    __device__ __forceinline__ unsigned name(unsigned a, unsigned b) {   \
        unsigned result;                                                 \
        asm(instruction " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b)); \
        return result;                                                   \
    }
// Of two 16-bit floats in a word; "nan": a NaN if there is one, else the other.
PAIR_FUNCTION(max_nan_bf16x2, "max.NaN.bf16x2")
PAIR_FUNCTION(max_bf16x2, "max.bf16x2")
PAIR_FUNCTION(min_bf16x2, "min.bf16x2")
PAIR_FUNCTION(max_nan_f16x2, "max.NaN.f16x2")
PAIR_FUNCTION(max_f16x2, "max.f16x2")
PAIR_FUNCTION(min_f16x2, "min.f16x2")

__device__ __forceinline__ unsigned max_nan_pair(unsigned a, unsigned b, bfloat16*) { return max_nan_bf16x2(a, b); }
__device__ __forceinline__ unsigned max_pair(unsigned a, unsigned b, bfloat16*) { return max_bf16x2(a, b); }
__device__ __forceinline__ unsigned min_pair(unsigned a, unsigned b, bfloat16*) { return min_bf16x2(a, b); }
__device__ __forceinline__ unsigned max_nan_pair(unsigned a, unsigned b, float16*) { return max_nan_f16x2(a, b); }
__device__ __forceinline__ unsigned max_pair(unsigned a, unsigned b, float16*) { return max_f16x2(a, b); }
__device__ __forceinline__ unsigned min_pair(unsigned a, unsigned b, float16*) { return min_f16x2(a, b); }

// The two of a word.
__device__ __forceinline__ void unpair(unsigned word, bfloat16*, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
}
__device__ __forceinline__ void unpair(unsigned word, float16*, float& low, float& high) {
    low = widen(float16{static_cast<unsigned short>(word)});
    high = widen(float16{static_cast<unsigned short>(word >> 16)});
}
#endif

__device__ __forceinline__ float larger_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return larger(a, b);
#endif
}
__device__ __forceinline__ double larger_nan(double a, double b) { return larger(a, b); }

// The maximum of elements that come eight at a time; a NaN if there is one. X: as they are stored.
template <class X, class A>
struct Maximum {
    A maximum = lowest<A>();

    __device__ __forceinline__ void add(const uint4*, const A (&v)[8]) {
#pragma unroll
        for (int j = 0; j < 8; j++) maximum = larger_nan(maximum, v[j]);
    }
    __device__ __forceinline__ A value() const { return maximum; }
};

// Whether all of eight lie above maximum + NEAR; false if the maximum is a NaN. An element that is a NaN makes it one,
// so that here it may be overlooked. `most` becomes the largest of them.
template <class X>
__device__ __forceinline__ bool are_near(const uint4*, const float (&v)[8], float maximum, float& most, X*) {
    float least = v[0];
    most = v[0];
#pragma unroll
    for (int j = 1; j < 8; j++) {
        least = fminf(least, v[j]);
        most = fmaxf(most, v[j]);
    }
    return least - maximum > NEAR;
}

#if __CUDA_ARCH__ >= 800
template <class X>
struct PairMaximum {
    unsigned pair;

    __device__ __forceinline__ PairMaximum(unsigned lowest) : pair(lowest) {}
    __device__ __forceinline__ void add(const uint4* raw, const float (&)[8]) {
        X* const x = nullptr;
        const unsigned a = max_nan_pair(raw->x, raw->y, x), b = max_nan_pair(raw->z, raw->w, x);
        pair = max_nan_pair(pair, max_nan_pair(a, b, x), x);
    }
    __device__ __forceinline__ float value() const {
        float low, high;
        unpair(pair, static_cast<X*>(nullptr), low, high);
        return larger_nan(low, high);
    }
};
template <>
struct Maximum<bfloat16, float> : PairMaximum<bfloat16> {
    __device__ __forceinline__ Maximum() : PairMaximum(0xFF80FF80u) {}
};
template <>
struct Maximum<float16, float> : PairMaximum<float16> {
    __device__ __forceinline__ Maximum() : PairMaximum(0xFC00FC00u) {}
};

template <class X>
__device__ __forceinline__ bool are_pairs_near(uint4 raw, float maximum, float& most, X* x) {
    float least, least_high, most_high;
    unpair(min_pair(min_pair(raw.x, raw.y, x), min_pair(raw.z, raw.w, x), x), x, least, least_high);
    unpair(max_pair(max_pair(raw.x, raw.y, x), max_pair(raw.z, raw.w, x), x), x, most, most_high);
    most = fmaxf(most, most_high);
    return fminf(least, least_high) - maximum > NEAR;
}
__device__ __forceinline__ bool are_near(const uint4* raw, const float (&)[8], float maximum, float& most,
                                         bfloat16* x) {
    return are_pairs_near(*raw, maximum, most, x);
}
__device__ __forceinline__ bool are_near(const uint4* raw, const float (&)[8], float maximum, float& most, float16* x) {
    return are_pairs_near(*raw, maximum, most, x);
}
#endif

// --------------------------------------------------------------------------------------------------------------- terms

// v becomes the terms of eight elements in softmax's sum; those that are the maximum are counted. `all` becomes the
// exponentials, of which the terms lack those of the maximum. X: as they are stored.
template <bool PRECISE, class X, class A>
__device__ __forceinline__ void exponentials(const uint4* raw, A (&v)[8], A maximum, unsigned& count, A (&all)[8]) {
    if constexpr (is_same<A, float>::value) {
        float most;
        if (are_near(raw, v, maximum, most, static_cast<X*>(nullptr))) {
            float t[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float error = 0;
                t[j] = PRECISE ? difference(v[j], maximum, error) : v[j] - maximum;
                v[j] = all[j] = exponential_near<PRECISE>(t[j], error);
            }
            if (most == maximum) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    count += t[j] == 0;
                    v[j] = t[j] == 0 ? 0.0f : v[j];
                }
            }
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const bool is_maximum = v[j] - maximum == 0;
        count += is_maximum;
        all[j] = exponential_anywhere<PRECISE>(v[j], maximum);
        v[j] = is_maximum ? A(0) : all[j];
    }
}
template <bool PRECISE, class X, class A>
__device__ __forceinline__ void exponentials(const uint4* raw, A (&v)[8], A maximum, unsigned& count) {
    A all[8];
    exponentials<PRECISE, X>(raw, v, maximum, count, all);
}

// Divides by one divisor, given its correctly rounded reciprocal, where nothing is subnormal: the first quotient is
// within two units in the last place, its correction within one, and that one's is the correctly rounded quotient
// (Markstein 1990).
__device__ __forceinline__ float divide_near(float a, float divisor, float reciprocal) {
    float q = a * reciprocal;
    q = fused(fused(-divisor, q, a), reciprocal, q);
    return fused(fused(-divisor, q, a), reciprocal, q);
}

// Divides eight exponentials; `is_few`: divisor <= FEW.
template <class A>
__device__ __forceinline__ void divide(A (&v)[8], A divisor, A reciprocal, bool is_few) {
    if constexpr (is_same<A, float>::value) {
        float least = v[0];
#pragma unroll
        for (int j = 1; j < 8; j++) least = fminf(least, v[j]);
        if (is_few && least > EXP_NEAR) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = divide_near(v[j], divisor, reciprocal);
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = v[j] / divisor;
}

// v becomes softmax of eight elements; `is_few`: divisor <= FEW.
template <bool PRECISE, class X, class A>
__device__ __forceinline__ void quotients(const uint4* raw, A (&v)[8], A maximum, A divisor, A reciprocal,
                                          bool is_few) {
    if constexpr (is_same<A, float>::value) {
        float most;
        if (is_few && are_near(raw, v, maximum, most, static_cast<X*>(nullptr))) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float error = 0;
                const float t = PRECISE ? difference(v[j], maximum, error) : v[j] - maximum;
                v[j] = divide_near(exponential_near<PRECISE>(t, error), divisor, reciprocal);
            }
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = exponential_anywhere<PRECISE>(v[j], maximum) / divisor;
}
