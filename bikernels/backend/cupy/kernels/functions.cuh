// The elementwise functions of the contract (docs/contract.md, section 10): structs with one static function `of` of
// an element of each operand and two numbers. Those of one operand leave y alone.
#pragma once
#include "numerics.cuh"

// ------------------------------------------------------------------------------------------- constants of both dtypes

template <class A>
struct Normal;
template <>
struct Normal<float> {
    static constexpr float root_two = NORMAL_FLOAT32_ROOT_TWO, density = NORMAL_FLOAT32_DENSITY;
    static constexpr float slope = NORMAL_FLOAT32_GELU_SLOPE, cubic = NORMAL_FLOAT32_GELU_CUBIC;
    static constexpr float cubic_slope = NORMAL_FLOAT32_GELU_CUBIC_SLOPE;
    static __device__ __forceinline__ float tail(float u) {
        constexpr float c[] = {NORMAL_FLOAT32_TAIL};
        return horner(u, c);
    }
    static __device__ __forceinline__ float erf(float z) {
        constexpr float c[] = {NORMAL_FLOAT32_ERF};
        return horner(z, c);
    }
};
template <>
struct Normal<double> {
    static constexpr double root_two = NORMAL_FLOAT64_ROOT_TWO, density = NORMAL_FLOAT64_DENSITY;
    static constexpr double slope = NORMAL_FLOAT64_GELU_SLOPE, cubic = NORMAL_FLOAT64_GELU_CUBIC;
    static constexpr double cubic_slope = NORMAL_FLOAT64_GELU_CUBIC_SLOPE;
    static __device__ __forceinline__ double tail(double u) {
        constexpr double c[] = {NORMAL_FLOAT64_TAIL};
        return horner(u, c);
    }
    static __device__ __forceinline__ double erf(double z) {
        constexpr double c[] = {NORMAL_FLOAT64_ERF};
        return horner(z, c);
    }
};

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }
__device__ __forceinline__ bool has_sign(float x) { return static_cast<int>(__float_as_uint(x)) < 0; }
__device__ __forceinline__ bool has_sign(double x) { return __double_as_longlong(x) < 0; }

template <class A>
__device__ __forceinline__ A clamp(A x, A low, A high) {
    x = x < low ? low : x;  // a NaN fails both comparisons and stays
    return x > high ? high : x;
}

template <class A>
__device__ __forceinline__ A infinity() {
    return static_cast<A>(__uint_as_float(0x7F800000u));
}

// ----------------------------------------------------------------------------------------------- exponentials and logs

struct Exp {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return exponential(x, A(0));
    }
};

struct Exp2 {
    static __device__ __forceinline__ float of(float x, float, float, float) {
        return run(x, EXP_FLOAT32_LN2_HIGH, EXP_FLOAT32_LN2_LOW);
    }
    static __device__ __forceinline__ double of(double x, double, double, double) {
        return run(x, EXP_FLOAT64_LN2_HIGH, EXP_FLOAT64_LN2_LOW);
    }

  private:
    template <class A>
    static __device__ __forceinline__ A run(A x, A high, A low) {
        x = clamp(x, A(-EXP2_LARGEST), A(EXP2_LARGEST));
        const A t = x * high;
        return exponential(t, fused(x, high, -t) + x * low);
    }
};

struct Expm1 {
    static __device__ __forceinline__ float of(float x, float, float, float) {
        constexpr float all[] = {EXP_FLOAT32_COEFFICIENTS};
        const float t = clamp(x, static_cast<float>(EXPM1_LOWEST), EXP_FLOAT32_HIGH);
        const float z = fused(t, EXP_FLOAT32_LOG2E, EXP_FLOAT32_MAGIC);
        const float k = z - EXP_FLOAT32_MAGIC;
        const float f = fused(k, -EXP_FLOAT32_LN2_LOW, fused(k, -EXP_FLOAT32_LN2_HIGH, t));
        const unsigned half = (__float_as_uint(z) - 127u - 1u) << 23;  // 2^(k - 1)
        return finish(k, f, from_second(f, all), __uint_as_float(half));
    }
    static __device__ __forceinline__ double of(double x, double, double, double) {
        constexpr double all[] = {EXP_FLOAT64_COEFFICIENTS};
        const double t = clamp(x, static_cast<double>(EXPM1_LOWEST), EXP_FLOAT64_HIGH);
        const double z = fused(t, EXP_FLOAT64_LOG2E, EXP_FLOAT64_MAGIC);
        const double k = z - EXP_FLOAT64_MAGIC;
        const double f = fused(k, -EXP_FLOAT64_LN2_LOW, fused(k, -EXP_FLOAT64_LN2_HIGH, t));
        const unsigned long long bits = __double_as_longlong(z);
        return finish(k, f, from_second(f, all), __longlong_as_double((bits - 1023ull - 1ull) << 52));
    }

  private:
    // The polynomial of f^2, f^3, … divided by f^2.
    template <int N, class A>
    static __device__ __forceinline__ A from_second(A f, const A (&c)[N]) {
        A p = c[N - 1];
#pragma unroll
        for (int i = N - 2; i >= 2; i--) p = fused(p, f, c[i]);
        return p;
    }
    template <class A>
    static __device__ __forceinline__ A finish(A k, A f, A q, A half) {
        const A p = fused(f * f, q, f);
        const A r = fused(half, p, half - A(0.5));
        return k == 0 ? p : r + r;
    }
};

struct Log {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return logarithm(x);
    }
};

struct Log1p {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        const A u = A(1) + x, t = u - A(1);
        const A error = (A(1) - (u - t)) + (x - t);
        A r = logarithm(u);
        r = u > 0 && u < infinity<A>() ? r + error / u : r;
        return u == 1 ? x : r;
    }
};

struct Softplus {
    template <class A>
    static __device__ __forceinline__ A of(A x, A y, A beta, A threshold) {
        const A z = x * beta;
        return z > threshold ? x : Log1p::of(exponential(z, A(0)), y, beta, threshold) / beta;
    }
};

struct Sqrt {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return root(x);
    }
};

struct Rsqrt {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return A(1) / root(x);
    }
};

// ------------------------------------------------------------------------------------------------------------ sigmoids

struct Sigmoid {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        const A e = exponential(-magnitude(x), A(0));
        return (x >= 0 ? A(1) : e) / (A(1) + e);
    }
};

struct Silu {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        const A e = exponential(-magnitude(x), A(0));
        return (x >= 0 ? x : x * e) / (A(1) + e);
    }
};

struct Tanh {
    template <class A>
    static __device__ __forceinline__ A of(A x, A y, A a, A b) {
        const A z = magnitude(x);
        const A e = Expm1::of((z > A(TANH_LARGEST) ? A(TANH_LARGEST) : z) * A(2), y, a, b);
        const A r = e / (e + A(2));
        return has_sign(x) ? -r : r;
    }
};

struct SigmoidBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A y, A, A) {
        return (g * (A(1) - y)) * y;
    }
};

struct TanhBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A y, A, A) {
        return g * fused(-y, y, A(1));
    }
};

struct SiluBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A x, A a, A b) {
        const A s = Sigmoid::of(x, x, a, b);
        return g * (s * fused(x, Sigmoid::of(-x, x, a, b), A(1)));
    }
};

struct SoftplusBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A x, A beta, A threshold) {
        const A z = x * beta;
        return z > threshold ? g : g * Sigmoid::of(z, x, beta, threshold);
    }
};

// ------------------------------------------------------------------------------------------------- normal distribution

// The probability above |x|, times exp(x^2 / 2).
template <class A>
__device__ __forceinline__ A normal_tail(A x) {
    const A a = magnitude(clamp(x, A(-NORMAL_LARGEST), A(NORMAL_LARGEST)));
    return Normal<A>::tail((a - A(4)) / (a + A(4))) / fused(a, A(2), A(1));
}

// exp(-x^2 / 2)
template <class A>
__device__ __forceinline__ A gaussian(A x) {
    x = clamp(x, A(-NORMAL_LARGEST), A(NORMAL_LARGEST));
    const A square = x * x;
    return exponential(A(-0.5) * square, A(-0.5) * fused(x, x, -square));
}

// The probability below x, from exp(-x^2 / 2).
template <class A>
__device__ __forceinline__ A probability_below(A x, A e) {
    const A above = e * normal_tail(x);
    return x < 0 ? above : A(1) - above;
}

struct Erf {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        const A near = fused(x, Normal<A>::erf(x * x), x);
        const A z = magnitude(x) * Normal<A>::root_two;
        const A far = A(1) - A(2) * (gaussian(z) * normal_tail(z));
        return magnitude(x) < 1 ? near : x < 0 ? -far : far;
    }
};

struct Gelu {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return x * probability_below(x, gaussian(x));
    }
};

struct GeluBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A x, A, A) {
        x = clamp(x, A(-NORMAL_LARGEST), A(NORMAL_LARGEST));
        const A e = gaussian(x);
        return g * fused(x * Normal<A>::density, e, probability_below(x, e));
    }
};

struct GeluTanh {
    template <class A>
    static __device__ __forceinline__ A of(A x, A y, A a, A b) {
        return x * Sigmoid::of(x * fused(Normal<A>::cubic, x * x, Normal<A>::slope), y, a, b);
    }
};

struct GeluTanhBackward {
    template <class A>
    static __device__ __forceinline__ A of(A g, A x, A a, A b) {
        x = clamp(x, A(-NORMAL_LARGEST), A(NORMAL_LARGEST));
        const A square = x * x;
        const A w = x * fused(Normal<A>::cubic, square, Normal<A>::slope);
        const A s = Sigmoid::of(w, x, a, b);
        const A slope = fused(Normal<A>::cubic_slope, square, Normal<A>::slope);
        return g * (s * fused(x * Sigmoid::of(-w, x, a, b), slope, A(1)));
    }
};

// -------------------------------------------------------------------------------------------------- always in float64

// An argument as quadrant * pi / 2 + r + c.
struct Angle {
    long long quadrant;
    double r, c;
};

// Of |x| < CIRCULAR_SMALL.
__device__ __forceinline__ Angle reduce_small(double x) {
    constexpr double half_pi[] = {CIRCULAR_HALF_PI};
    const double z = fused(x, CIRCULAR_TWO_OVER_PI, CIRCULAR_MAGIC);
    const double k = z - CIRCULAR_MAGIC;
    const double s = fused(-k, half_pi[0], x);
    const double t = k * half_pi[1];
    const double e = fused(k, half_pi[1], -t);
    const double r = s - t, b = r - s;
    const double error = (s - (r - b)) + (-t - b);
    return {__double_as_longlong(z), r, fused(-k, half_pi[2], error - e)};
}

__constant__ const unsigned long long two_over_pi[] = {CIRCULAR_TWO_OVER_PI_WORDS};

// Of other finite x, by integers.
__device__ __noinline__ Angle reduce_large(double x) {
    constexpr double half_pi[] = {CIRCULAR_HALF_PI};
    const unsigned long long bits = __double_as_longlong(magnitude(x));
    const unsigned long long significand = (bits & 0xFFFFFFFFFFFFFull) | 1ull << 52;
    const int place = static_cast<int>(bits >> 52) - 1075 + 62;
    const int word = place >> 6, shift = place & 63, back = 63 - shift;
    unsigned long long w[3];
#pragma unroll
    for (int i = 0; i < 3; i++) w[i] = two_over_pi[word + i] << shift | (two_over_pi[word + i + 1] >> 1) >> back;
    const unsigned long long p0 = significand * w[2];
    const unsigned long long h0 = __umul64hi(significand, w[2]);
    const unsigned long long p1 = h0 + significand * w[1];
    const unsigned long long p2 = __umul64hi(significand, w[1]) + significand * w[0] + (p1 < h0 ? 1 : 0);
    unsigned long long high = p2 << 2 | p1 >> 62, middle = p1 << 2 | p0 >> 62;
    const unsigned long long negative = high >> 63;
    if (negative) {
        high = ~high;
        middle = ~middle;
    }
    const double a = static_cast<double>(static_cast<long long>(high >> 11)) * 0x1p-53;
    const double b = static_cast<double>(static_cast<long long>(high & 2047)) * 0x1p-64 +
                     static_cast<double>(static_cast<long long>(middle >> 11)) * 0x1p-117;
    const double turns = a + b, rest = b - (turns - a);
    double r = turns * half_pi[0];
    double c = fused(turns, half_pi[0], -r) + (turns * half_pi[1] + rest * half_pi[0]);
    if (negative) {
        r = -r;
        c = -c;
    }
    const long long quadrant = static_cast<long long>((p2 >> 62) + negative);
    return x < 0 ? Angle{-quadrant, -r, -c} : Angle{quadrant, r, c};
}

// sin(x + quarter * pi / 2)
__device__ __forceinline__ double circular(double x, int quarter) {
    constexpr double of_sin[] = {CIRCULAR_SIN}, of_cos[] = {CIRCULAR_COS};
    if (!(magnitude(x) < infinity<double>())) return __longlong_as_double(NAN_FLOAT64);
    const Angle angle = magnitude(x) < CIRCULAR_SMALL ? reduce_small(x) : reduce_large(x);
    const long long quadrant = angle.quadrant + quarter;
    const double r = angle.r, c = angle.c, z = r * r;
    const double s = r + fused(r * z, horner(z, of_sin), fused(-0.5 * z, c, c));
    const double h = 0.5 * z, w = 1.0 - h;
    const double k = w + (((1.0 - w) - h) + fused(z * z, horner(z, of_cos), -(r * c)));
    const double result = quadrant & 1 ? k : s;
    return quadrant & 2 ? -result : result;
}

struct Sin {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return x == 0 ? x : static_cast<A>(circular(x, 0));
    }
};

struct Cos {
    template <class A>
    static __device__ __forceinline__ A of(A x, A, A, A) {
        return static_cast<A>(circular(x, 1));
    }
};

struct Pow {
    template <class A>
    static __device__ __forceinline__ A of(A x, A y, A, A) {
        return static_cast<A>(run(x, y));
    }

  private:
    static __device__ __forceinline__ double run(double x, double y) {
        double r = exponential(y * logarithm(magnitude(x)), 0.0);
        const bool whole = floor(y) == y;
        if (has_sign(x) && whole && floor(y * 0.5) != y * 0.5) r = -r;
        if (x < 0 && x > -infinity<double>() && !whole) r = __longlong_as_double(NAN_FLOAT64);
        r = y == 2 ? x * x : r;
        r = y == 1 ? x : r;
        r = x == -1 && magnitude(y) == infinity<double>() ? 1.0 : r;
        return y == 0 || x == 1 ? 1.0 : r;
    }
};
