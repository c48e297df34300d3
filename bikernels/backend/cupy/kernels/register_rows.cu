// Sums and the softmax family of rows whose elements lie side by side, kept in registers: short rows, and few rows.
//
// OPERATION: as below; a mean by any divisor. ELEMENT, ACCUMULATE, WIDTH, GROUPS, STEPS, SPREAD, LAYOUT: see
// register_rows.cuh. THREADS: of a CTA, at most.
//
// One form of exp serves every t <= 0, so that no thread has to wait for another's branch; a warp of a row that is a CTA's
// may have a shorter one where all of its t are near.
#include "register_rows.cuh"

enum Operation { Mean, Softmax, LogSoftmax, LogSumExp };

constexpr bool IS_SUM = OPERATION == Mean, IS_LOG = OPERATION == LogSoftmax, IS_PRECISE = sizeof(X) == sizeof(A);
constexpr bool IS_ALONE = IS_SUM || OPERATION == LogSumExp;  // one result of a row
// Results are computed of packed elements, in half the registers; softmax then computes powers again, eight at a time.
constexpr bool RECOMPUTED = sizeof(X) == 2 && VECTORS * WORDS > 16 && (IS_LOG || (OPERATION == Softmax && LAYOUT == Whole));
constexpr bool KEEPS_POWERS = OPERATION == Softmax && !RECOMPUTED;
// Whether a warp may be plain (see the kernel). A second form made log_softmax slower where rows begin anywhere, unless it
// keeps packed elements.
constexpr bool HAS_PLAIN = SPREAD && !IS_SUM && sizeof(A) == 4 && (LAYOUT == Whole || !IS_LOG || RECOMPUTED);

// Word number `word` of a vector of elements that are not there: -inf, or 0 in a sum.
template <class T>
__device__ __forceinline__ constexpr unsigned absent_word(int word) {
    if (IS_SUM) return 0;
    if (is_same<T, bfloat16>::value) return 0xFF80FF80u;
    if (is_same<T, float16>::value) return 0xFC00FC00u;
    if (is_same<T, float>::value) return 0xFF800000u;
    return word % 2 ? 0xFFF00000u : 0;
}

// Over the threads of a warp that have a row, in each of them.
template <class V, class Combine>
__device__ __forceinline__ V fold_lanes(V value, int lanes, Combine combine) {
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2)
        if (IS_WARP || mask < lanes) value = combine(value, __shfl_xor_sync(~0u, value, mask));
    return value;
}

// What warps share; the places of those that are not there hold what changes nothing.
struct __align__(16) Shared {
    A maxima[MOST_WARPS];
    A sums[MOST_WARPS];
    unsigned counts[MOST_WARPS];
};

// The larger of two, a NaN if there is one; the smaller, a NaN overlooked. Of numbers, and of two pairs of 16 bits.
struct Larger {
    __device__ __forceinline__ A operator()(A a, A b) const { return larger_nan(a, b); }
    template <class T>
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b, T* type) const {
        return max_nan_pair(a, b, type);
    }
};
struct Smaller {
    __device__ __forceinline__ A operator()(A a, A b) const { return smaller(a, b); }
    template <class T>
    __device__ __forceinline__ unsigned operator()(unsigned a, unsigned b, T* type) const {
        return min_pair(a, b, type);
    }
};

// The largest or smallest of a thread's elements.
template <class T, class Combine>
__device__ __forceinline__ A thread_extreme(const Words (&raw)[VECTORS], T* type, Combine combine) {
    if constexpr (sizeof(T) == 2) {
        unsigned pairs[VECTORS * WORDS];
#pragma unroll
        for (int i = 0; i < VECTORS * WORDS; i++) pairs[i] = raw[i / WORDS][i % WORDS];
        float low, high;
        unpair(fold(pairs, [=](unsigned a, unsigned b) { return combine(a, b, type); }), type, low, high);
        return combine(low, high);
    } else {
        A v[VECTORS * WIDTH];
#pragma unroll
        for (int i = 0; i < VECTORS * WIDTH; i++) v[i] = element(raw[i / WIDTH], i % WIDTH, type);
        return fold(v, combine);
    }
}

// Divides exponentials of float64, which are of a t above -600 if their upper words are larger than this: to keep the
// least t of all takes registers that there are not.
constexpr bool IS_DOUBLE = sizeof(A) == 8;
constexpr int NEAR_UPPER = 158 << 20;  // of 2^-865
template <class V>
__device__ __forceinline__ void divide_powers(V (&power)[WIDTH], V divisor, V reciprocal) {
    int least = 0x7FFFFFFF;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) least = min(least, __double2hiint(power[j]));
    if (least > NEAR_UPPER) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) power[j] = divide_near(power[j], divisor, reciprocal);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) power[j] = divide_anywhere(power[j], divisor);
    }
}

// Add the exponentials of a thread's elements, but for those of the maximum, which are counted, to their lanes; v becomes
// x - maximum in log_softmax, else the exponentials; least_order the least order_of_power. IS_PLAIN: of a warp that is_plain
// (see the kernel), whose powers divide_near is right for.
template <bool IS_PLAIN>
__device__ __forceinline__ void exponentiate(const Words (&raw)[VECTORS], const Place& place, A maximum,
                                             A (&v)[VECTORS][WIDTH], A (&lane)[GROUPS][WIDTH], A (&heads)[TEAMS][WIDTH],
                                             unsigned& least_order, unsigned& count) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            A error = 0, power;
            const A value = element(raw[i], j, static_cast<X*>(nullptr));
            const A t = IS_PRECISE ? difference(value, maximum, error) : value - maximum;
            const bool is_maximum = !IS_PLAIN && is_zero(t);
            if constexpr (IS_PLAIN && !IS_DOUBLE)
                power = exponential_near<IS_PRECISE>(t, error);
            else
                power = exponential_below<IS_PRECISE>(t, error);
            count += is_maximum;
            lane[i % GROUPS][j] += is_maximum ? A(0) : power;
            v[i][j] = IS_LOG ? t : power;
            if constexpr (!IS_PLAIN && !IS_LOG && !IS_DOUBLE) least_order = min(least_order, order_of_power(power));
        }
        if (i == 0) take_head(lane, place, heads);
    }
}

// Softmax of a thread's vectors of EIGHT elements, of which no t is below `least`, but where the power is 0. Where it is not
// sure to what the quotients of a vector round, they are computed last.
template <int EIGHT>
__device__ __forceinline__ void write_powers(const Words (&raw)[VECTORS], const Place& place, int n, bool are_vectors,
                                             A maximum, A normaliser, A least, const X* from, X* to) {
    if constexpr (EIGHT == 8) {
        X* const type = nullptr;
        const A reciprocal = 1 / normaliser;
        const Bounds bounds(reciprocal, least);
        unsigned unsure = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            A v[EIGHT];
            unsigned words[EIGHT / 2];
#pragma unroll
            for (int j = 0; j < EIGHT; j++) v[j] = element(raw[i], j, type);
            if (round_powers(v, maximum, bounds, words, type) && least >= NEAR)
                store_vector(to, place, i, n, are_vectors, words);
            else if (place(i) < n)
                unsure |= 1u << i;
        }
#pragma unroll 1
        for (; unsure != 0; unsure &= unsure - 1) {
            const int i = __ffs(unsure) - 1;
            unsigned words[EIGHT / 2];
            if (are_vectors)
                load_words(from + place(i), words);
            else
                load_singly(from + place(i), n - place(i), words);
            const uint4 vector = make_uint4(words[0], words[1], words[2], words[3]);
            A v[EIGHT];
#pragma unroll
            for (int j = 0; j < EIGHT; j++) v[j] = element(words, j, type);
            quotients<false, X>(&vector, v, maximum, normaliser, reciprocal, true);
            round_results(v, words);
            store_vector(to, place, i, n, are_vectors, words);
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- kernel

// Left to itself the compiler takes fewer registers than some narrow rows need, and more than leave room for two CTAs of
// softmax that computes powers again.
constexpr int LEAST_CTAS = RECOMPUTED && !IS_LOG ? 2 : LAYOUT == Narrow && (RECOMPUTED || (IS_SUM && IS_DOUBLE)) ? 1 : 0;

// `rows` rows of n elements, `x_step` and `out_step` elements apart, and as many threads as they take.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_CTAS)
    reduce_rows(long long rows, long long x_step, long long out_step, A divisor, int n, int bits, void* out,
                const void* x) {
    launch_dependents();  // they wait for this kernel's end
    Place place(bits);
    const int lanes = place.lanes, warp = place.warp;
    const long long row = place.row;
    X* const type = nullptr;
    const bool is_present = SPREAD || row < rows;
    const X* const from = static_cast<const X*>(x) + row * x_step;
    X* const to = static_cast<X*>(out) + row * out_step;
    place.shift_to(from);
    const auto may_be_vectors = [&](int n) {
        if (LAYOUT != Whole) return LAYOUT == Narrow || place.behind(to) == 0;
        return n % WIDTH == 0 && are_vectors_at(address_bits(x, x_step) | (IS_ALONE ? 0 : address_bits(out, out_step)));
    };
    const bool are_vectors = may_be_vectors(n);
    if constexpr (SPREAD) prefetch_row(from, place, n);
    wait_for_predecessors();

    if constexpr (!IS_SUM && !SPREAD && STEPS == 1) {
        if (n == 1) {
            if (is_present) {
                const A value = accumulate<A>(*from), zero = value - value;  // a NaN, if it is not finite
                store(to, OPERATION == LogSumExp ? value + A(0) : IS_LOG ? zero : 1 + zero);
            }
            return;
        }
    }
    if (!is_present) n = 0;

    Words raw[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int word = 0; word < WORDS; word++) raw[i][word] = absent_word<X>(word);
    }
    load_row(from, place, n, are_vectors, raw, absent_word<X>(0));

    __shared__ Shared shared;
    __shared__ Lanes lanes_of_teams;
    if constexpr (SPREAD) {
        if (threadIdx.x < MOST_WARPS && threadIdx.x >= blockDim.x / WARP) {
            shared.maxima[threadIdx.x] = lowest<A>();
            shared.sums[threadIdx.x] = 0;
            shared.counts[threadIdx.x] = 0;
        }
    }
    A lane[GROUPS][WIDTH] = {};
    if constexpr (IS_SUM) {
        add_elements(raw, lane, place, lanes_of_teams.heads[0]);
        const A sum = row_sum(lane, place, lanes_of_teams, 0, shared.sums);
        if (place.is_first() && is_present) store(to, sum / divisor);
        return;
    }

    A maximum = fold_lanes(thread_extreme(raw, type, Larger()), lanes, Larger());
    // Whether the warp has as many elements as it can have, all near the maximum, and none is it, as most have in long rows.
    bool is_plain = false;
    A least = lowest<A>();  // a bound of the thread's t, but where the power is 0
    if constexpr (SPREAD) {
        const A most_of_warp = maximum;
        if (lane_id() == 0) shared.maxima[warp] = maximum;
        __syncthreads();
        maximum = fold_warps(shared.maxima, Larger());
        if constexpr (HAS_PLAIN) {
            least = thread_extreme(raw, type, Smaller()) - maximum;
            is_plain = __all_sync(~0u, least > NEAR) && most_of_warp != maximum;
        }
    }

    if constexpr (RECOMPUTED) forget_widened(raw);
    A v[VECTORS][WIDTH];  // x - maximum, unless that is RECOMPUTED, or exponentials
    unsigned least_order = ~0u, count = 0;
    if (is_plain) {
        exponentiate<true>(raw, place, maximum, v, lane, lanes_of_teams.heads[0], least_order, count);
    } else {
        exponentiate<false>(raw, place, maximum, v, lane, lanes_of_teams.heads[0], least_order, count);
        if (!(least > NEAR)) least = least_order >= SURE ? A(NEAR) : lowest<A>();
    }
    const A sum = row_sum(lane, place, lanes_of_teams, shared.sums, count, shared.counts);
    if constexpr (IS_ALONE) {
        const bool is_infinite = maximum - maximum != 0 && maximum == maximum;
        if (place.is_first() && is_present)
            store(to, is_infinite ? maximum : maximum + normaliser_of(count, sum, true));
        return;
    }
    if constexpr (RECOMPUTED) forget_widened(raw);
    const bool is_nan = !(maximum - maximum == 0);  // and so is all of the row
    const A normaliser = is_nan ? nan_of(A(0)) : normaliser_of(count, sum, IS_LOG);

    if constexpr (IS_LOG) {
#pragma unroll
        for (int i = 0; i < VECTORS && !RECOMPUTED; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[i][j] = v[i][j] - normaliser;
    } else if constexpr (KEEPS_POWERS) {
        constexpr int AT_ONCE = sizeof(X) == 2 ? 8 : WIDTH;
        const A reciprocal = 1 / normaliser;
        if constexpr (IS_DOUBLE) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
                if (place(i) < n) divide_powers(v[i], normaliser, reciprocal);
        } else if (least >= NEAR) {
#pragma unroll
            for (int i = 0; i < VECTORS * WIDTH; i += AT_ONCE) {
                A some[AT_ONCE], results[AT_ONCE];
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) some[j] = v[(i + j) / WIDTH][(i + j) % WIDTH];
                divide_for(some, results, normaliser, reciprocal, type);
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) v[(i + j) / WIDTH][(i + j) % WIDTH] = results[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
#pragma unroll
                for (int j = 0; j < WIDTH; j++) v[i][j] = divide_anywhere(v[i][j], normaliser);
        }
    }
    if constexpr (RECOMPUTED && !IS_LOG) {
        write_powers<WIDTH>(raw, place, n, are_vectors, maximum, normaliser, least, from, to);
        return;
    }
    bool are_written = are_vectors;
    if constexpr (IS_DOUBLE) {  // asked again: there is no register to remember it
        int again = n;
        asm volatile("" : "+r"(again));
        are_written = may_be_vectors(again);
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if constexpr (RECOMPUTED) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[i][j] = element(raw[i], j, type) - maximum - normaliser;
        }
        if constexpr (sizeof(X) > 2) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[i][j] = is_nan ? nan_of(A(0)) : v[i][j];
        }
        Words words;
#pragma unroll
        for (int word = 0; word < WORDS; word++) words[word] = word_of(v[i], word, type);
        store_vector(to, place, i, n, are_written, words);
    }
}
