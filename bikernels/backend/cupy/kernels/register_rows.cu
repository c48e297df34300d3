// Sums, softmax and log_softmax of rows whose elements lie side by side, kept in registers: short rows, and few rows.
//
// OPERATION: as below; a mean by any divisor. ELEMENT: dtype of x and of the result. ACCUMULATE: float or double. A
// thread has vectors of WIDTH elements, each of other lanes of the tree than its neighbours', in STEPS times 256
// elements GROUPS of them. SPREAD: whether a row is a CTA's, of which 8 / WIDTH warps share a chunk; else 2^bits
// threads of a warp have a row. THREADS: of a CTA, at most.
//
// One form of exp serves every t <= 0, so that no thread has to wait for another's branch.
#include "overlap.cuh"
#include "softmax.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

enum Operation { Mean, Softmax, LogSoftmax };

constexpr bool IS_SUM = OPERATION == Mean, IS_LOG = OPERATION == LogSoftmax, IS_PRECISE = sizeof(X) == sizeof(A);
constexpr int VECTORS = STEPS * GROUPS, WORDS = WIDTH * static_cast<int>(sizeof(X)) / 4;
constexpr int MOST_WARPS = 16;
using Words = unsigned[WORDS];

// --------------------------------------------------------------------------------------------------- reading, writing

// Word number `word` of a vector of elements that are not there: -inf, or 0 in a sum.
template <class T>
__device__ __forceinline__ constexpr unsigned absent_word(int word) {
    if (IS_SUM) return 0;
    if (is_same<T, bfloat16>::value) return 0xFF80FF80u;
    if (is_same<T, float16>::value) return 0xFC00FC00u;
    if (is_same<T, float>::value) return 0xFF800000u;
    return word % 2 ? 0xFFF00000u : 0;
}

__device__ __forceinline__ void load_words(const X* from, Words& to) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            const uint4 raw = reinterpret_cast<const uint4*>(from)[i];
            to[4 * i] = raw.x;
            to[4 * i + 1] = raw.y;
            to[4 * i + 2] = raw.z;
            to[4 * i + 3] = raw.w;
        }
    } else if constexpr (WORDS == 2) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
        to[0] = raw.x;
        to[1] = raw.y;
    } else {
        to[0] = *reinterpret_cast<const unsigned*>(from);
    }
}

__device__ __forceinline__ void store_words(X* to, const Words& from) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++)
            reinterpret_cast<uint4*>(to)[i] =
                make_uint4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
    } else if constexpr (WORDS == 2) {
        *reinterpret_cast<uint2*>(to) = make_uint2(from[0], from[1]);
    } else {
        *reinterpret_cast<unsigned*>(to) = from[0];
    }
}

// The same an element at a time, those before `present`.
__device__ __forceinline__ void load_singly(const X* from, int present, Words& to) {
    if constexpr (sizeof(X) == 2) {
        const unsigned short* const half = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            if (2 * i < present) to[i] = (to[i] & 0xFFFF0000u) | half[2 * i];
            if (2 * i + 1 < present) to[i] = (to[i] & 0xFFFFu) | static_cast<unsigned>(half[2 * i + 1]) << 16;
        }
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            if (i * 4 < present * static_cast<int>(sizeof(X))) to[i] = reinterpret_cast<const unsigned*>(from)[i];
    }
}

__device__ __forceinline__ void store_singly(X* to, int present, const Words& from) {
    if constexpr (sizeof(X) == 2) {
        unsigned short* const half = reinterpret_cast<unsigned short*>(to);
#pragma unroll
        for (int j = 0; j < WIDTH; j++)
            if (j < present) half[j] = static_cast<unsigned short>(from[j / 2] >> j % 2 * 16);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            if (i * 4 < present * static_cast<int>(sizeof(X))) reinterpret_cast<unsigned*>(to)[i] = from[i];
    }
}

// Element j of a vector.
template <class T>
__device__ __forceinline__ A element(const Words& words, int j, T* type) {
    float low, high;
    unpair(words[j / 2], type, low, high);
    return j % 2 ? high : low;
}
__device__ __forceinline__ A element(const Words& words, int j, float*) { return __uint_as_float(words[j]); }
__device__ __forceinline__ A element(const Words& words, int j, double*) {
    return __hiloint2double(words[2 * j + 1], words[2 * j]);
}

// Word i of a vector of results, rounded once.
__device__ __forceinline__ unsigned word_of(const float (&v)[WIDTH], int i, bfloat16*) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
    return word;
}
__device__ __forceinline__ unsigned word_of(const float (&v)[WIDTH], int i, float16*) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
    return word;
}
__device__ __forceinline__ unsigned word_of(const float (&v)[WIDTH], int i, float*) { return __float_as_uint(v[i]); }
__device__ __forceinline__ unsigned word_of(const double (&v)[WIDTH], int i, double*) {
    return i % 2 ? __double2hiint(v[i / 2]) : __double2loint(v[i / 2]);
}

// -------------------------------------------------------------------------------------------------------------- folds

// The fold of v as neighbours.
template <int N, class V, class Combine>
__device__ __forceinline__ V fold(const V (&v)[N], Combine combine) {
    if constexpr (N == 1) {
        return v[0];
    } else {
        V pairs[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++) pairs[i] = combine(v[2 * i], v[2 * i + 1]);
        return fold(pairs, combine);
    }
}

// Over the threads of a warp that have a row, in each of them.
template <class V, class Combine>
__device__ __forceinline__ V fold_lanes(V value, int lanes, Combine combine) {
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2)
        if (SPREAD || STEPS > 1 || mask < lanes) value = combine(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}

// What warps share; the places of those that are not there hold what changes nothing.
struct __align__(16) Shared {
    A maxima[MOST_WARPS];
    A sums[MOST_WARPS];
    unsigned counts[MOST_WARPS];
};

// Over the warps of a row, in each thread.
template <class V, class Combine>
__device__ __forceinline__ V fold_warps(const V (&values)[MOST_WARPS], Combine combine) {
    V v[MOST_WARPS];
#pragma unroll
    for (int i = 0; i < MOST_WARPS; i++) v[i] = values[i];
    return fold(v, combine);
}

template <class V>
struct Plus {
    __device__ __forceinline__ V operator()(V a, V b) const { return a + b; }
};
struct Larger {
    __device__ __forceinline__ A operator()(A a, A b) const { return larger_nan(a, b); }
};

// The sum of a row, and of its threads' counts, in each thread.
__device__ __forceinline__ A sum_of(const A (&lane)[GROUPS][WIDTH], unsigned& count, int lanes, Shared& shared,
                                    int warp) {
    constexpr bool IS_WARP = SPREAD || STEPS > 1, COUNTS = !IS_SUM;
    A sums[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) sums[g] = fold(lane[g], Plus<A>());
    if constexpr (COUNTS && IS_WARP) count = __reduce_add_sync(~0u, count);
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) {
        if (IS_WARP || mask < lanes) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) sums[g] += __shfl_xor_sync(~0u, sums[g], mask);
            if constexpr (COUNTS && !IS_WARP) count += __shfl_xor_sync(~0u, count, mask);
        }
    }
    const A sum = fold(sums, Plus<A>());
    if constexpr (!SPREAD) return sum;
    if (lane_id() == 0) {
        shared.sums[warp] = sum;
        shared.counts[warp] = count;
    }
    __syncthreads();
    if constexpr (COUNTS) count = fold_warps(shared.counts, Plus<unsigned>());
    return fold_warps(shared.sums, Plus<A>());
}

// The maximum of a thread; a NaN if there is one.
template <class T>
__device__ __forceinline__ A thread_maximum(const Words (&raw)[VECTORS], T* type) {
    if constexpr (sizeof(T) == 2) {
        unsigned pairs[VECTORS * WORDS];
#pragma unroll
        for (int i = 0; i < VECTORS * WORDS; i++) pairs[i] = raw[i / WORDS][i % WORDS];
        float low, high;
        unpair(fold(pairs, [=](unsigned a, unsigned b) { return max_nan_pair(a, b, type); }), type, low, high);
        return larger_nan(low, high);
    } else {
        A v[VECTORS * WIDTH];
#pragma unroll
        for (int i = 0; i < VECTORS * WIDTH; i++) v[i] = element(raw[i / WIDTH], i % WIDTH, type);
        return fold(v, Larger());
    }
}

// -------------------------------------------------------------------------------------------------------------- kernel

// `rows` rows of n elements, `x_step` and `out_step` elements apart, and as many threads as they take.
extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_rows(long long rows, long long x_step, long long out_step, A divisor, int n, int bits, void* out,
                const void* x) {
    launch_dependents();  // they wait for this kernel's end
    const int lanes = 1 << bits;
    long long row = blockIdx.x;
    int first = 0;  // position of the thread's first element
    int group = 0;  // from one of its vectors to the next within 256 elements
    const int warp = warp_id();
    if constexpr (SPREAD) {
        constexpr int PARTS = THREAD_LANES / WIDTH;
        first = warp / PARTS * SUM_CHUNK + (warp % PARTS * WARP + lane_id()) * WIDTH;
    } else {
        row = (row * blockDim.x + threadIdx.x) >> bits;
        first = (threadIdx.x & (lanes - 1)) * WIDTH;
        group = lanes * WIDTH;
    }
    X* const type = nullptr;
    const bool is_present = row < rows;
    const X* const from = static_cast<const X*>(x) + row * x_step;
    X* const to = static_cast<X*>(out) + row * out_step;
    constexpr unsigned long long BYTES = sizeof(Words) < 16 ? sizeof(Words) : 16;
    unsigned long long addresses = reinterpret_cast<unsigned long long>(x) | x_step * sizeof(X);
    if (!IS_SUM) addresses |= reinterpret_cast<unsigned long long>(out) | out_step * sizeof(X);
    const bool are_vectors = n % WIDTH == 0 && addresses % BYTES == 0;
    wait_for_predecessors();

    if constexpr (!IS_SUM && !SPREAD && STEPS == 1) {
        if (n == 1) {
            if (is_present) {
                const A value = accumulate<A>(*from), zero = value - value;  // a NaN, if it is not finite
                store(to, IS_LOG ? zero : 1 + zero);
            }
            return;
        }
    }
    if (!is_present) n = 0;

    const auto position = [&](int i) { return first + i / GROUPS * SUM_LANES + i % GROUPS * group; };
    Words raw[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int word = 0; word < WORDS; word++) raw[i][word] = absent_word<X>(word);
    }
    if (are_vectors) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (position(i) < n) load_words(from + position(i), raw[i]);
    } else {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) load_singly(from + position(i), n - position(i), raw[i]);
    }

    __shared__ Shared shared;
    if constexpr (SPREAD) {
        if (threadIdx.x < MOST_WARPS && threadIdx.x >= blockDim.x / WARP) {
            shared.maxima[threadIdx.x] = lowest<A>();
            shared.sums[threadIdx.x] = 0;
            shared.counts[threadIdx.x] = 0;
        }
    }
    A lane[GROUPS][WIDTH] = {};
    if constexpr (IS_SUM) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) lane[i % GROUPS][j] += element(raw[i], j, type);
        unsigned none = 0;
        const A sum = sum_of(lane, none, lanes, shared, warp);
        if (first == 0 && is_present) store(to, sum / divisor);
        return;
    }

    A maximum = fold_lanes(thread_maximum(raw, type), lanes, Larger());
    if constexpr (SPREAD) {
        if (lane_id() == 0) shared.maxima[warp] = maximum;
        __syncthreads();
        maximum = fold_warps(shared.maxima, Larger());
    }

    A v[VECTORS][WIDTH];  // x - maximum, or exponentials
    A least = 0;
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            A error = 0;
            const A value = element(raw[i], j, type);
            const A t = IS_PRECISE ? difference(value, maximum, error) : value - maximum;
            const A power = exponential_below<IS_PRECISE>(t, error);
            count += is_zero(t);
            lane[i % GROUPS][j] += is_zero(t) ? A(0) : power;
            v[i][j] = IS_LOG ? t : power;
            if (!IS_LOG && position(i) < n) least = smaller(least, t);
        }
    }
    const A sum = sum_of(lane, count, lanes, shared, warp);
    const bool is_nan = !(maximum - maximum == 0);  // and so is all of the row
    const A normaliser = is_nan ? nan_of(A(0)) : normaliser_of(count, sum, IS_LOG);

    if constexpr (IS_LOG) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[i][j] = v[i][j] - normaliser;
    } else {
        const A reciprocal = 1 / normaliser;
        if (least > near_of(A(0))) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
#pragma unroll
                for (int j = 0; j < WIDTH; j++) v[i][j] = divide_near(v[i][j], normaliser, reciprocal);
        } else {
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
#pragma unroll
                for (int j = 0; j < WIDTH; j++) v[i][j] = divide_anywhere(v[i][j], normaliser);
        }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if constexpr (sizeof(X) > 2) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[i][j] = is_nan ? nan_of(A(0)) : v[i][j];
        }
        Words words;
#pragma unroll
        for (int word = 0; word < WORDS; word++) words[word] = word_of(v[i], word, type);
        if (!are_vectors)
            store_singly(to + position(i), n - position(i), words);
        else if (position(i) < n)
            store_words(to + position(i), words);
    }
}
