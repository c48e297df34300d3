// Numbers: the dtypes of the contract, conversions, the canonical NaN, exp and log.
//
// Everything is compiled with --fmad=false and without flush to zero, so +, -, * and / are the IEEE 754 operations and
// only what is written as fma is fused. Macros in capitals come from bikernels/contract.py (see compile.py).
#pragma once

// 16-bit floats are carried as their bits; arithmetic happens in the accumulate dtype.
struct bfloat16 {
    unsigned short bits;
};
struct float16 {
    unsigned short bits;
};
// An element whose dtype is known at run time only (a DTYPE_ code).
struct any_dtype {};

// The code of a dtype; -1 for any_dtype.
template <class X>
struct dtype_code {
    static constexpr int value = -1;
};
template <>
struct dtype_code<bfloat16> {
    static constexpr int value = DTYPE_BFLOAT16;
};
template <>
struct dtype_code<float16> {
    static constexpr int value = DTYPE_FLOAT16;
};
template <>
struct dtype_code<float> {
    static constexpr int value = DTYPE_FLOAT32;
};
template <>
struct dtype_code<double> {
    static constexpr int value = DTYPE_FLOAT64;
};

// ---------------------------------------------------------------------------------------------------------- arithmetic

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double root(double x) { return __dsqrt_rn(x); }

// ------------------------------------------------------------------------------------------------------------ widening

__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ __forceinline__ float widen(float16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// To the accumulate dtype, rounding once where it is narrower.
template <class A, class X>
__device__ __forceinline__ A accumulate(X x) {
    return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A accumulate(bfloat16 x) {
    return widen(x);
}
template <class A>
__device__ __forceinline__ A accumulate(float16 x) {
    return widen(x);
}

// x[index] in the accumulate dtype. `dtype` matters for any_dtype only.
template <class X, class A>
struct Element {
    static __device__ __forceinline__ A load(const void* x, long long index, int) {
        return accumulate<A>(static_cast<const X*>(x)[index]);
    }
};

template <class A>
struct Element<any_dtype, A> {
    static __device__ __forceinline__ A load(const void* x, long long index, int dtype) {
        switch (dtype) {
            case DTYPE_BFLOAT16: return Element<bfloat16, A>::load(x, index, dtype);
            case DTYPE_FLOAT16: return Element<float16, A>::load(x, index, dtype);
            case DTYPE_FLOAT32: return Element<float, A>::load(x, index, dtype);
            case DTYPE_FLOAT64: return Element<double, A>::load(x, index, dtype);
            case DTYPE_BOOL: return static_cast<A>(static_cast<const unsigned char*>(x)[index] != 0);
            case DTYPE_INT8: return Element<signed char, A>::load(x, index, dtype);
            case DTYPE_INT16: return Element<short, A>::load(x, index, dtype);
            case DTYPE_INT32: return Element<int, A>::load(x, index, dtype);
            case DTYPE_INT64: return Element<long long, A>::load(x, index, dtype);
            case DTYPE_UINT8: return Element<unsigned char, A>::load(x, index, dtype);
            case DTYPE_UINT16: return Element<unsigned short, A>::load(x, index, dtype);
            case DTYPE_UINT32: return Element<unsigned int, A>::load(x, index, dtype);
            default: return Element<unsigned long long, A>::load(x, index, dtype);
        }
    }
};

// ----------------------------------------------------------------------------------------------------------- narrowing

__device__ __forceinline__ bfloat16 to_bfloat16(float x) {
    bfloat16 result;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));  // a NaN becomes 0x7fff, the canonical one
#else
    unsigned bits = __float_as_uint(x);
    bits += 0x7FFF + (bits >> 16 & 1);
    result.bits = x == x ? bits >> 16 : NAN_BFLOAT16;
#endif
    return result;
}

__device__ __forceinline__ float16 to_float16(float x) {
    float16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));  // a NaN becomes 0x7fff, the canonical one
    return result;
}

__device__ __forceinline__ unsigned to_float32_bits(float x) { return x == x ? __float_as_uint(x) : NAN_FLOAT32; }

__device__ __forceinline__ unsigned long long to_float64_bits(double x) {
    return x == x ? static_cast<unsigned long long>(__double_as_longlong(x)) : NAN_FLOAT64;
}

static_assert(NAN_BFLOAT16 == 0x7FFF && NAN_FLOAT16 == 0x7FFF, "cvt writes these NaNs");

// Round x to `dtype` and back: what a cast before the operation does.
__device__ __forceinline__ float round_through(float x, int dtype) {
    if (dtype == DTYPE_BFLOAT16) return widen(to_bfloat16(x));
    if (dtype == DTYPE_FLOAT16) return widen(to_float16(x));
    return x;
}

__device__ __forceinline__ double round_through(double x, int) { return x; }  // only float64 accumulates in float64

// *out = x, rounded once, every NaN the canonical one.
__device__ __forceinline__ void store(bfloat16* out, float x) { *out = to_bfloat16(x); }
__device__ __forceinline__ void store(float16* out, float x) { *out = to_float16(x); }
__device__ __forceinline__ void store(float* out, float x) { *out = __uint_as_float(to_float32_bits(x)); }
__device__ __forceinline__ void store(double* out, double x) { *out = __longlong_as_double(to_float64_bits(x)); }

// out[index] = x, for a dtype that is known at run time only.
__device__ __forceinline__ void store(void* out, long long index, int dtype, float x) {
    switch (dtype) {
        case DTYPE_BFLOAT16: store(static_cast<bfloat16*>(out) + index, x); break;
        case DTYPE_FLOAT16: store(static_cast<float16*>(out) + index, x); break;
        case DTYPE_FLOAT32: store(static_cast<float*>(out) + index, x); break;
        default: store(static_cast<double*>(out) + index, static_cast<double>(x));
    }
}

__device__ __forceinline__ void store(void* out, long long index, int, double x) {
    store(static_cast<double*>(out) + index, x);
}

// --------------------------------------------------------------------------------------------------- vectors of 16
// bytes

__device__ __forceinline__ bool is_vector_aligned(const void* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % 16 == 0;
}

// The elements of one 16-byte vector, widened.
__device__ __forceinline__ void unpack(uint4 raw, bfloat16*, float* v) {
    const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(word[i] << 16);
        v[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
    }
}

__device__ __forceinline__ void unpack(uint4 raw, float16*, float* v) {
    const unsigned word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = widen(float16{static_cast<unsigned short>(word[i])});
        v[2 * i + 1] = widen(float16{static_cast<unsigned short>(word[i] >> 16)});
    }
}

__device__ __forceinline__ void unpack(uint4 raw, float*, float* v) {
    v[0] = __uint_as_float(raw.x);
    v[1] = __uint_as_float(raw.y);
    v[2] = __uint_as_float(raw.z);
    v[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ void unpack(uint4 raw, double*, double* v) {
    v[0] = __hiloint2double(raw.y, raw.x);
    v[1] = __hiloint2double(raw.w, raw.z);
}

// The bits of as many values as a vector has.
__device__ __forceinline__ uint4 as_vector(const float* v) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
__device__ __forceinline__ uint4 as_vector(const double* v) {
    return make_uint4(__double2loint(v[0]), __double2hiint(v[0]), __double2loint(v[1]), __double2hiint(v[1]));
}

// Eight values from aligned contiguous memory.
template <class X, class A>
__device__ __forceinline__ void load_8(const X* x, A (&v)[8]) {
    constexpr int VECTOR = 16 / sizeof(X);
#pragma unroll
    for (int i = 0; i < 8 / VECTOR; i++)
        unpack(reinterpret_cast<const uint4*>(x)[i], static_cast<X*>(nullptr), v + i * VECTOR);
}

// The words of 16 bytes from any multiple of 2 bytes on, of two vectors that hold them: `bytes` behind the first one's
// start.
__device__ __forceinline__ uint4 shift_words(uint4 a, uint4 b, unsigned bytes) {
    unsigned w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 6; i++) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; i++) w[i] = bytes & 4 ? w[i + 1] : w[i];
    const unsigned bits = (bytes & 2) * 8;
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// Eight values from contiguous memory that is not aligned. Whole vectors are read, each of which holds at least one of
// the values, so that they lie where those do.
template <class X, class A>
__device__ __forceinline__ void load_8_anywhere(const X* x, A (&v)[8]) {
    constexpr int VECTORS = sizeof(X) / 2, LENGTH = 16 / sizeof(X);
    const unsigned bytes = static_cast<unsigned>(reinterpret_cast<unsigned long long>(x) & 15);
    const uint4* from = reinterpret_cast<const uint4*>(reinterpret_cast<unsigned long long>(x) - bytes);
    uint4 raw[VECTORS + 1];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) raw[i] = from[i];
    raw[VECTORS] = bytes > 0 ? from[VECTORS] : raw[0];
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        unpack(shift_words(raw[i], raw[i + 1], bytes), static_cast<X*>(nullptr), v + i * LENGTH);
}

// The same from index on, for a floating-point dtype that is known at run time only.
template <class X, class W, class A>
__device__ __forceinline__ void load_8_as(const void* x, long long index, A (&v)[8]) {
    W wide[8];
    load_8(static_cast<const X*>(x) + index, wide);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = static_cast<A>(wide[j]);
}
template <class A>
__device__ __forceinline__ void load_8(const void* x, long long index, int dtype, A (&v)[8]) {
    switch (dtype) {
        case DTYPE_BFLOAT16: load_8_as<bfloat16, float>(x, index, v); break;
        case DTYPE_FLOAT16: load_8_as<float16, float>(x, index, v); break;
        case DTYPE_FLOAT32: load_8_as<float, float>(x, index, v); break;
        default: load_8_as<double, double>(x, index, v);
    }
}

__device__ __forceinline__ unsigned pair(unsigned short low, unsigned short high) { return low | (unsigned)high << 16; }

// Eight values as 16-byte vectors, rounded once, every NaN the canonical one.
__device__ __forceinline__ void pack(const float (&v)[8], bfloat16*, uint4 (&raw)[1]) {
    raw[0] = make_uint4(
        pair(to_bfloat16(v[0]).bits, to_bfloat16(v[1]).bits), pair(to_bfloat16(v[2]).bits, to_bfloat16(v[3]).bits),
        pair(to_bfloat16(v[4]).bits, to_bfloat16(v[5]).bits), pair(to_bfloat16(v[6]).bits, to_bfloat16(v[7]).bits));
}

__device__ __forceinline__ void pack(const float (&v)[8], float16*, uint4 (&raw)[1]) {
    raw[0] = make_uint4(
        pair(to_float16(v[0]).bits, to_float16(v[1]).bits), pair(to_float16(v[2]).bits, to_float16(v[3]).bits),
        pair(to_float16(v[4]).bits, to_float16(v[5]).bits), pair(to_float16(v[6]).bits, to_float16(v[7]).bits));
}

__device__ __forceinline__ void pack(const float (&v)[8], float*, uint4 (&raw)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        raw[i] = make_uint4(to_float32_bits(v[4 * i]), to_float32_bits(v[4 * i + 1]), to_float32_bits(v[4 * i + 2]),
                            to_float32_bits(v[4 * i + 3]));
}

__device__ __forceinline__ void pack(const double (&v)[8], double*, uint4 (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const unsigned long long low = to_float64_bits(v[2 * i]), high = to_float64_bits(v[2 * i + 1]);
        raw[i] = make_uint4(static_cast<unsigned>(low), static_cast<unsigned>(low >> 32), static_cast<unsigned>(high),
                            static_cast<unsigned>(high >> 32));
    }
}

// Eight values to aligned contiguous memory; `out` is the first one's address.
template <class X, class A>
__device__ __forceinline__ void store_8(void* out, const A (&v)[8]) {
    uint4 raw[sizeof(X) / 2];
    pack(v, static_cast<X*>(nullptr), raw);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(X) / 2); i++) static_cast<uint4*>(out)[i] = raw[i];
}

// Eight values to contiguous memory that is not aligned, by words as far as possible.
template <class X, class A>
__device__ __forceinline__ void store_8_anywhere(void* out, const A (&v)[8]) {
    uint4 raw[sizeof(X) / 2];
    pack(v, static_cast<X*>(nullptr), raw);
    if constexpr (sizeof(X) == 2) {
        if (reinterpret_cast<unsigned long long>(out) % 4 != 0) {
            unsigned short* const half = static_cast<unsigned short*>(out);
            half[0] = static_cast<unsigned short>(raw[0].x);
            unsigned* const words = reinterpret_cast<unsigned*>(half + 1);
            words[0] = __funnelshift_r(raw[0].x, raw[0].y, 16);
            words[1] = __funnelshift_r(raw[0].y, raw[0].z, 16);
            words[2] = __funnelshift_r(raw[0].z, raw[0].w, 16);
            half[7] = static_cast<unsigned short>(raw[0].w >> 16);
            return;
        }
    }
    unsigned* const words = static_cast<unsigned*>(out);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(X) / 2); i++) {
        words[4 * i] = raw[i].x;
        words[4 * i + 1] = raw[i].y;
        words[4 * i + 2] = raw[i].z;
        words[4 * i + 3] = raw[i].w;
    }
}

__device__ __forceinline__ void store_8(void* out, int dtype, const float (&v)[8]) {
    switch (dtype) {
        case DTYPE_BFLOAT16: store_8<bfloat16>(out, v); break;
        case DTYPE_FLOAT16: store_8<float16>(out, v); break;
        default: store_8<float>(out, v);
    }
}

__device__ __forceinline__ void store_8(void* out, int, const double (&v)[8]) { store_8<double>(out, v); }

__device__ __forceinline__ void store_8_anywhere(void* out, int dtype, const float (&v)[8]) {
    switch (dtype) {
        case DTYPE_BFLOAT16: store_8_anywhere<bfloat16>(out, v); break;
        case DTYPE_FLOAT16: store_8_anywhere<float16>(out, v); break;
        default: store_8_anywhere<float>(out, v);
    }
}

__device__ __forceinline__ void store_8_anywhere(void* out, int, const double (&v)[8]) {
    store_8_anywhere<double>(out, v);
}

// --------------------------------------------------------------------------------------------------------- exp and log

template <int N, class A>
__device__ __forceinline__ A horner(A f, const A (&c)[N]) {
    A p = c[N - 1];
#pragma unroll
    for (int i = N - 2; i >= 0; i--) p = fused(p, f, c[i]);
    return p;
}

// exp(t + d), where d lies below the last bit of t.
__device__ __forceinline__ float exponential(float t, float d) {
    constexpr float c[] = {EXP_FLOAT32_COEFFICIENTS};
    d = t < EXP_FLOAT32_LOW ? 0.0f : d;
    t = t < EXP_FLOAT32_LOW ? EXP_FLOAT32_LOW : t;  // a NaN fails both comparisons and stays
    t = t > EXP_FLOAT32_HIGH ? EXP_FLOAT32_HIGH : t;
    const float z = fused(t, EXP_FLOAT32_LOG2E, EXP_FLOAT32_MAGIC);
    const float k = z - EXP_FLOAT32_MAGIC;
    float f = fused(k, -EXP_FLOAT32_LN2_HIGH, t);
    f = fused(k, -EXP_FLOAT32_LN2_LOW, f) + d;
    const float p = horner(f, c);
    // The low bits of z hold the exponent plus twice the bias. It is applied in two halves, so that only the second
    // product rounds; the shifts by 23 drop the upper bits.
    const unsigned bits = __float_as_uint(z), half = bits >> 1;
    return p * __uint_as_float(half << 23) * __uint_as_float((bits - half) << 23);
}

__device__ __forceinline__ float logarithm(float u) {
    constexpr float c[] = {LOG_FLOAT32_COEFFICIENTS};
    const bool small = u < 0x1p-126f;
    const unsigned bits = __float_as_uint(small ? u * 0x1p23f : u);
    const unsigned above = bits - LOG_FLOAT32_CUT;
    const float e = static_cast<float>((static_cast<int>(above) >> 23) + (small ? -23 : 0));
    const float f = __uint_as_float(bits - (above & 0xFF800000u)) - 1.0f;
    const float s = f * f;
    float r = fused(horner(f, c), s, f);
    r = fused(e, LOG_FLOAT32_LN2_HIGH, r);
    r = u == __uint_as_float(0x7F800000u) ? u : r;
    return u > 0.0f ? r : u == 0.0f ? __uint_as_float(0xFF800000u) : __uint_as_float(NAN_FLOAT32);
}

__device__ __forceinline__ double exponential(double t, double d) {
    constexpr double c[] = {EXP_FLOAT64_COEFFICIENTS};
    d = t < EXP_FLOAT64_LOW ? 0.0 : d;
    t = t < EXP_FLOAT64_LOW ? EXP_FLOAT64_LOW : t;
    t = t > EXP_FLOAT64_HIGH ? EXP_FLOAT64_HIGH : t;
    const double z = fused(t, EXP_FLOAT64_LOG2E, EXP_FLOAT64_MAGIC);
    const double k = z - EXP_FLOAT64_MAGIC;
    double f = fused(k, -EXP_FLOAT64_LN2_HIGH, t);
    f = fused(k, -EXP_FLOAT64_LN2_LOW, f) + d;
    const double p = horner(f, c);
    const unsigned long long bits = __double_as_longlong(z), half = bits >> 1;  // as in float32, with shifts by 52
    return p * __longlong_as_double(half << 52) * __longlong_as_double((bits - half) << 52);
}

__device__ __forceinline__ double logarithm(double u) {
    constexpr double c[] = {LOG_FLOAT64_COEFFICIENTS};
    const bool small = u < 0x1p-1022;
    const unsigned long long bits = __double_as_longlong(small ? u * 0x1p52 : u);
    const unsigned long long above = bits - LOG_FLOAT64_CUT;
    const double e = static_cast<double>((static_cast<long long>(above) >> 52) + (small ? -52 : 0));
    const double f = __longlong_as_double(bits - (above & 0xFFF0000000000000ull)) - 1.0;
    const double s = f * f;
    double w = e * LOG_FLOAT64_LN2_LOW;
    w = fused(horner(f, c), s, w);
    w = f + w;
    double r = fused(e, LOG_FLOAT64_LN2_HIGH, w);
    r = u == __longlong_as_double(0x7FF0000000000000ll) ? u : r;
    return u > 0.0 ? r : u == 0.0 ? __longlong_as_double(0xFFF0000000000000ll) : __longlong_as_double(NAN_FLOAT64);
}
