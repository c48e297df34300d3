// The exponentials of softmax, eight at a time (docs/contract.md, sections 4 and 5).
//
// Where t = x - maximum lies in (NEAR, 0], exp needs neither the comparisons for the ends of its range nor two factors
// for its power of two, so eight of them are tested at once. Another form, of few instructions more, serves every t <= 0. All
// give the numbers of numerics.cuh's exp, which is taken where that is rare.
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

// ---------------------------------------------------------------------------------------------- one form for all t <= 0

// P * 2^k is computed as P * 2^(k + SHIFT), which is normal, and a product with 2^-SHIFT, which rounds what is not.
constexpr int SHIFT_FLOAT32 = 64, SHIFT_FLOAT64 = 512;
constexpr double EXP_FLOAT64_SHIFTED = 0x1.8p52 + SHIFT_FLOAT64;
static_assert(EXP_FLOAT64_MAGIC == 0x1.8p52 + 2046, "an even number more, so that ties are rounded alike");

// exponential(t, d) for t <= 0; anything if t is a NaN.
template <bool PRECISE>
__device__ __forceinline__ float exponential_below(float t, float d) {
    constexpr float c[] = {EXP_FLOAT32_COEFFICIENTS};
    const float z = fused(t, EXP_FLOAT32_LOG2E, EXP_MAGIC + SHIFT_FLOAT32);
    const float k = z - (EXP_MAGIC + SHIFT_FLOAT32);
    float f = fused(k, -EXP_FLOAT32_LN2_HIGH, t);
    f = fused(k, -EXP_FLOAT32_LN2_LOW, f);
    if constexpr (PRECISE) f = f + d;
    const float power = __uint_as_float(__float_as_uint(horner(f, c)) + (__float_as_uint(z) << 23)) * 0x1p-64f;
    return t < EXP_FLOAT32_LOW ? 0.0f : power;
}
template <bool PRECISE>
__device__ __forceinline__ double exponential_below(double t, double d) {
    constexpr double c[] = {EXP_FLOAT64_COEFFICIENTS};
    const double z = fused(t, EXP_FLOAT64_LOG2E, EXP_FLOAT64_SHIFTED);
    const double k = z - EXP_FLOAT64_SHIFTED;
    double f = fused(k, -EXP_FLOAT64_LN2_HIGH, t);
    f = fused(k, -EXP_FLOAT64_LN2_LOW, f) + d;
    const double p = horner(f, c);
    const double power = __hiloint2double(__double2hiint(p) + (__double2loint(z) << 20), __double2loint(p)) * 0x1p-512;
    // By the upper words, since the sign is known; the power of a t that has LOW's is 0 anyway.
    const unsigned upper = __double2hiint(t), lowest = __double2hiint(EXP_FLOAT64_LOW);
    return upper > lowest ? 0.0 : power;
}

__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return b < a ? b : a; }
__device__ __forceinline__ float nan_of(float) { return __uint_as_float(NAN_FLOAT32); }
__device__ __forceinline__ double nan_of(double) { return __longlong_as_double(NAN_FLOAT64); }

__device__ __forceinline__ bool is_zero(float t) { return t == 0; }
__device__ __forceinline__ bool is_zero(double t) {
    return ((__double2hiint(t) & 0x7FFFFFFF) | __double2loint(t)) == 0;
}

// log(u) for u >= 1, below 2^20 times that.
__device__ __forceinline__ float logarithm_above(float u) {
    constexpr float c[] = {LOG_FLOAT32_COEFFICIENTS};
    const unsigned bits = __float_as_uint(u), above = bits - LOG_FLOAT32_CUT;
    const float e = __uint_as_float(0x4B000000u | above >> 23) - 0x1p23f;  // a conversion takes longer
    const float f = __uint_as_float(bits - (above & 0xFF800000u)) - 1.0f;
    const float s = f * f;
    return fused(e, LOG_FLOAT32_LN2_HIGH, fused(horner(f, c), s, f));
}
__device__ __forceinline__ double logarithm_above(double u) {
    constexpr double c[] = {LOG_FLOAT64_COEFFICIENTS};
    const unsigned long long bits = __double_as_longlong(u), above = bits - LOG_FLOAT64_CUT;
    const double e = __longlong_as_double(0x4330000000000000ull | above >> 52) - 0x1p52;
    const double f = __longlong_as_double(bits - (above & 0xFFF0000000000000ull)) - 1.0;
    const double s = f * f;
    const double w = f + fused(horner(f, c), s, e * LOG_FLOAT64_LN2_LOW);
    return fused(e, LOG_FLOAT64_LN2_HIGH, w);
}

// softmax_normaliser of a row that is finite and not longer than 2^20.
template <class A>
__device__ __forceinline__ A normaliser_of(unsigned number, A sum, bool is_log) {
    const A count = static_cast<A>(static_cast<int>(number));
    const A u = count + sum;
    const A b = u - count;
    const A error = (count - (u - b)) + (sum - b);
    if (!is_log) return u;
    const A quotient = (error == 0 ? u : error) / u;  // a division of 0 takes longer
    return logarithm_above(u) + (error == 0 ? A(0) : quotient);
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
__device__ __forceinline__ float smaller_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a != a || a < b ? a : b;
#endif
}

// Numbers in the order of these integers, a NaN above all.
__device__ __forceinline__ int ordered_bits(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}
__device__ __forceinline__ float of_ordered_bits(int x) { return __int_as_float(x ^ (x >> 31 & 0x7FFFFFFF)); }

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

// The minimum, of numbers only: a NaN is overlooked.
template <class X>
struct Minimum {
    float minimum = -lowest<float>();

    __device__ __forceinline__ void add(const uint4*, const float (&v)[8]) {
#pragma unroll
        for (int j = 0; j < 8; j++) minimum = fminf(minimum, v[j]);
    }
    __device__ __forceinline__ float value() const { return minimum; }
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
struct PairMinimum {
    unsigned pair;

    __device__ __forceinline__ PairMinimum(unsigned highest) : pair(highest) {}
    __device__ __forceinline__ void add(const uint4* raw, const float (&)[8]) {
        X* const x = nullptr;
        pair = min_pair(pair, min_pair(min_pair(raw->x, raw->y, x), min_pair(raw->z, raw->w, x), x), x);
    }
    __device__ __forceinline__ float value() const {
        float low, high;
        unpair(pair, static_cast<X*>(nullptr), low, high);
        return fminf(low, high);
    }
};
template <>
struct Minimum<bfloat16> : PairMinimum<bfloat16> {
    __device__ __forceinline__ Minimum() : PairMinimum(0x7F807F80u) {}
};
template <>
struct Minimum<float16> : PairMinimum<float16> {
    __device__ __forceinline__ Minimum() : PairMinimum(0x7C007C00u) {}
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

// `exponentials` of any eight elements. If the maximum is no number, the first term is a NaN, and so is the sum that all are
// divided by; the others, and `all`, may be anything.
template <bool PRECISE>
__device__ __forceinline__ void exponentials_anywhere(float (&v)[8], float maximum, unsigned& count, float (&all)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float error = 0;
        const float t = PRECISE ? difference(v[j], maximum, error) : v[j] - maximum;
        all[j] = exponential_below<PRECISE>(t, error);
        count += t == 0;
        v[j] = t == 0 ? 0.0f : all[j];
    }
    v[0] += maximum - maximum;
}

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
        exponentials_anywhere<PRECISE>(v, maximum, count, all);
    } else {  // the form for every t takes registers that float64 does not have
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const bool is_maximum = v[j] - maximum == 0;
            count += is_maximum;
            all[j] = exponential_anywhere<PRECISE>(v[j], maximum);
            v[j] = is_maximum ? A(0) : all[j];
        }
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

__device__ __forceinline__ double divide_near(double a, double divisor, double reciprocal) {
    double q = a * reciprocal;
    q = fused(fused(-divisor, q, a), reciprocal, q);
    return fused(fused(-divisor, q, a), reciprocal, q);
}
template <class A>
__device__ __forceinline__ A divide_anywhere(A a, A divisor) {
    const A quotient = (a == 0 ? A(1) : a) / divisor;  // a division of 0 takes longer
    return a == 0 ? a * divisor : quotient;  // NaN, if that is one
}

// Powers in the order of these integers, but 0, that of what is masked, above all. From SURE on, divide_near is right.
__device__ __forceinline__ unsigned order_of_power(float power) { return __float_as_uint(power) - 1; }
constexpr unsigned SURE = 0x0E800000;  // EXP_NEAR

__device__ __forceinline__ bool are_sure(const float (&power)[8]) {
    float least = power[0];
#pragma unroll
    for (int j = 1; j < 8; j++) least = fminf(least, power[j]);
    if (least > EXP_NEAR) return true;
    unsigned order = ~0u;
#pragma unroll
    for (int j = 0; j < 8; j++) order = min(order, order_of_power(power[j]));
    return order >= SURE;
}

// Divides eight exponentials; `is_few`: divisor <= FEW.
template <class A>
__device__ __forceinline__ void divide(A (&v)[8], A divisor, A reciprocal, bool is_few) {
    if constexpr (is_same<A, float>::value) {
        if (is_few && are_sure(v)) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = divide_near(v[j], divisor, reciprocal);
            return;
        }
#pragma unroll 1
        for (int j = 0; j < 8; j++) {  // a queue, so that the division's code exists once
            const A quotient = divide_anywhere(v[0], divisor);
#pragma unroll
            for (int k = 0; k < 7; k++) v[k] = v[k + 1];
            v[7] = quotient;
        }
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = v[j] / divisor;
    }
}

// v becomes softmax of eight elements that are near, by a divisor <= FEW.
template <bool PRECISE>
__device__ __forceinline__ void quotients_near(float (&v)[8], float maximum, float divisor, float reciprocal) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float error = 0;
        const float t = PRECISE ? difference(v[j], maximum, error) : v[j] - maximum;
        v[j] = divide_near(exponential_near<PRECISE>(t, error), divisor, reciprocal);
    }
}
// The same of any eight elements; `is_few`: divisor <= FEW. X: as they are stored.
template <bool PRECISE, class X, class A>
__device__ __forceinline__ void quotients(const uint4* raw, A (&v)[8], A maximum, A divisor, A reciprocal,
                                          bool is_few) {
    if constexpr (is_same<A, float>::value) {
        float most;
        if (is_few && are_near(raw, v, maximum, most, static_cast<X*>(nullptr)))
            return quotients_near<PRECISE>(v, maximum, divisor, reciprocal);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = exponential_anywhere<PRECISE>(v[j], maximum);
    divide(v, divisor, reciprocal, is_few);
}

// ---------------------------------------------------------------------------------------------------- rounded quotients

#if __CUDA_ARCH__ >= 800
// Two values, rounded once, in a word; a NaN is the canonical one.
__device__ __forceinline__ unsigned packed_pair(float low, float high, bfloat16*) {
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
__device__ __forceinline__ unsigned packed_pair(float low, float high, float16*) {
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

__device__ __forceinline__ float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The bounds of the reciprocal for `round_powers`, where no t is below `least_t`, which has to be NEAR at least, but those
// whose power is 0.
struct Bounds {
    float least, most;

    // In units of 2^-24: exp by the hardware's power of two is within 4 and its argument's rounding, 1.24 for each unit of t;
    // the contract's exp within 2; the reciprocal, the quotient, each product and each bound here within 1.
    __device__ __forceinline__ Bounds(float reciprocal, float least_t) {
        const float slack = fused(-least_t, 0x1.4p-24f, 0x1p-20f);
        least = reciprocal * (1 - slack);
        most = reciprocal * (1 + slack);
    }
};

// Softmax of eight elements for a result of 16 bits: v becomes numbers that round to R as the quotients do, `words` what they
// round to; false if that is not sure, and v is unchanged. Whatever lies between two numbers that round to the same rounds to
// it too.
template <class R>
__device__ __forceinline__ bool round_powers(float (&v)[8], float maximum, const Bounds& bounds, unsigned (&words)[4], R* r) {
    float low[8];
    unsigned differ = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float even = power_of_two((v[2 * i] - maximum) * EXP_FLOAT32_LOG2E);
        const float odd = power_of_two((v[2 * i + 1] - maximum) * EXP_FLOAT32_LOG2E);
        low[2 * i] = even * bounds.least;
        low[2 * i + 1] = odd * bounds.least;
        words[i] = packed_pair(low[2 * i], low[2 * i + 1], r);
        differ |= words[i] ^ packed_pair(even * bounds.most, odd * bounds.most, r);
    }
    if (differ != 0) return false;
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = low[j];
    return true;
}

// v becomes numbers that round to R as the quotients of exponentials do; false if that is not sure. None of these is
// subnormal, and the reciprocal of the divisor is correctly rounded, so that a product with it is within three units in
// the last place of the quotient. Whatever lies between two numbers that round to the same rounds to it too.
template <int COUNT, class R>
__device__ __forceinline__ bool round_as_quotients(const float (&e)[COUNT], float (&v)[COUNT], float reciprocal, R* r) {
    constexpr float SLACK = 0x1.8p-22f;
    const float least = reciprocal * (1 - SLACK), most = reciprocal * (1 + SLACK);
    unsigned differ = 0;
#pragma unroll
    for (int j = 0; j < COUNT; j += 2) {
        v[j] = e[j] * least;
        v[j + 1] = e[j + 1] * least;
        differ |= packed_pair(v[j], v[j + 1], r) ^ packed_pair(e[j] * most, e[j + 1] * most, r);
    }
    return differ == 0;
}
#if __CUDA_ARCH__ >= 900
// A bfloat16 is the upper half of a float32: the lower half tells how far a number is from the middle between two.
template <int COUNT>
__device__ __forceinline__ bool round_as_quotients(const float (&e)[COUNT], float (&v)[COUNT], float reciprocal,
                                                   bfloat16*) {
    constexpr unsigned REACH = 3, MIDDLE = 0x8000;
    unsigned least = ~0u;  // of the lower halves, counted from MIDDLE - REACH on
#pragma unroll
    for (int j = 0; j < COUNT; j += 2) {
        v[j] = e[j] * reciprocal;
        v[j + 1] = e[j + 1] * reciprocal;
        const unsigned halves = __byte_perm(__float_as_uint(v[j]), __float_as_uint(v[j + 1]), 0x5410);
        least = __viaddmin_u16x2(halves, (MIDDLE + REACH) * 0x10001u, least);
    }
    return min(least & 0xFFFF, least >> 16) > 2 * REACH;
}
#endif
#endif

// v becomes numbers that round to R as the quotients of exponentials do, none of which is subnormal.
template <int COUNT, class A, class R>
__device__ __forceinline__ void divide_for(const A (&e)[COUNT], A (&v)[COUNT], A divisor, A reciprocal, R* r) {
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(R) == 2)
        if (round_as_quotients(e, v, reciprocal, r)) return;
#endif
#pragma unroll
    for (int j = 0; j < COUNT; j++) v[j] = divide_near(e[j], divisor, reciprocal);
}
