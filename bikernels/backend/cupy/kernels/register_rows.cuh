// Rows whose elements lie side by side, kept in registers: which elements a thread has, how it reads and writes them,
// and how their sums meet.
//
// ELEMENT: dtype of x and of the result. ACCUMULATE: float or double. A thread has vectors of WIDTH elements, each of
// other lanes of the tree than its neighbours', in STEPS times 256 elements GROUPS of them. SPREAD: whether a row is a
// CTA's, of which PARTS warps share a chunk; else 2^bits threads of a warp have a row. LAYOUT: of rows, see below.
#pragma once
#include "overlap.cuh"
#include "softmax.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

constexpr int VECTORS = STEPS * GROUPS, WORDS = WIDTH * static_cast<int>(sizeof(X)) / 4;
constexpr int PARTS = SPREAD ? THREAD_LANES / (WIDTH * GROUPS) : 1;
constexpr int MOST_WARPS = 16;
constexpr bool IS_WARP = SPREAD || STEPS > 1;  // whether a row has all threads of its warps
constexpr bool IS_NARROW = WORDS == 1;         // whether rows of any length may end within such a vector
using Words = unsigned[WORDS];

// Whole: rows begin and end where a vector does; if they do not, elements are read and written one by one. Narrow: they
// begin anywhere, and a vector is a word or an element. Shifted: they begin anywhere and are read as the vectors that
// hold them, `shift` elements behind the start of the first one, and a thread has the lanes of the tree that lie in its
// vectors. Sums of lanes, not elements, are then moved to where the tree has them.
enum Layout { Whole, Narrow, Shifted };
constexpr bool IS_FIXED = IS_WARP && LAYOUT != Whole;  // the compiler knows how many threads of a warp have a row

// A thread's place in its row.
struct Place {
    int lanes;  // threads of the row in a warp
    int warp;   // of the CTA
    long long row;
    int first;  // position of the thread's first element
    int group;  // from one of its vectors to the next within 256 elements
    int shift = 0;

    __device__ __forceinline__ Place(int bits)
        : lanes(IS_FIXED ? WARP : 1 << bits), warp(warp_id()), row(blockIdx.x), group(0) {
        if constexpr (IS_FIXED) bits = 5;
        if constexpr (SPREAD) {
            first = warp / PARTS * SUM_CHUNK + warp % PARTS * (SUM_LANES / PARTS) + lane_id() * WIDTH;
            group = WARP * WIDTH;
        } else {
            row = (row * blockDim.x + threadIdx.x) >> bits;
            first = (threadIdx.x & (lanes - 1)) * WIDTH;
            group = lanes * WIDTH;
        }
    }

    // Of the first element of vector i.
    __device__ __forceinline__ int operator()(int i) const {
        return first + i / GROUPS * SUM_LANES + i % GROUPS * group;
    }

    // Whether a row of n elements has element j of vector i. Of longer rows, only narrow vectors are asked for parts.
    __device__ __forceinline__ bool has(int i, int j, int n) const {
        if constexpr (LAYOUT == Shifted) return static_cast<unsigned>((*this)(i) + j) < static_cast<unsigned>(n);
        return (*this)(i) + (IS_WARP && !IS_NARROW ? 0 : j) < n;
    }
    // Whether it has all of shifted vector i.
    __device__ __forceinline__ bool has_all(int i, int n) const {
        return (i > 0 || first >= 0) && (*this)(i) + WIDTH <= n;
    }

    // Whether the thread has the row's first element.
    __device__ __forceinline__ bool is_first() const { return first + shift == 0; }

    // Of vectors of an array whose rows begin at `row`: elements from the start of one to where `first` lies.
    __device__ __forceinline__ int behind(const X* row) const {
        return static_cast<int>(reinterpret_cast<unsigned long long>(row) / sizeof(X) - shift) & (WIDTH - 1);
    }
    __device__ __forceinline__ void shift_to(const X* row) {
        if constexpr (LAYOUT == Shifted) {
            shift = behind(row);
            first -= shift;
        }
    }
};

// --------------------------------------------------------------------------------------------------- reading, writing

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

// Whether a row begins with half a word.
__device__ __forceinline__ bool begins_halfway(const X* row) {
    return sizeof(X) == 2 && reinterpret_cast<unsigned long long>(row) % 4 != 0;
}

// A vector of a word or an element, those elements before `present`. Of 16 bits, the words that hold it are read.
__device__ __forceinline__ void load_narrow(const X* from, bool is_halfway, int present, Words& to) {
    if constexpr (sizeof(X) == 2) {
        const unsigned* const words = reinterpret_cast<const unsigned*>(from - is_halfway);
        unsigned next = to[0];
        if (present > 0) to[0] = words[0];
        if (is_halfway && present > 1) next = words[1];
        to[0] = __byte_perm(to[0], next, is_halfway ? 0x5432 : present > 1 ? 0x3210 : 0x7610);
    } else {
        if (present > 0) load_words(from, to);
    }
}

// Write vector i of a row that begins at `row`; all threads of a warp do. Where a row begins with half a word, a word
// is a thread's second element and the next thread's first.
__device__ __forceinline__ void store_narrow(X* row, bool is_halfway, const Place& place, int i, int n,
                                             const Words& from) {
    X* const to = row + place(i);
    const int present = n - place(i);
    if constexpr (sizeof(X) == 2) {
        const int lane = threadIdx.x & (place.lanes - 1);
        const unsigned next = __shfl_down_sync(~0u, from[0], 1);
        unsigned short* const half = reinterpret_cast<unsigned short*>(to);
        const bool is_word = is_halfway ? present > 2 && lane != place.lanes - 1 : present > 1;
        if (is_word)
            *reinterpret_cast<unsigned*>(half + is_halfway) = __byte_perm(from[0], next, is_halfway ? 0x5432 : 0x3210);
        if (is_halfway ? lane == 0 && present > 0 : present == 1) half[0] = static_cast<unsigned short>(from[0]);
        if (is_halfway && !is_word && present > 1) half[1] = static_cast<unsigned short>(from[0] >> 16);
    } else {
        if (present > 0) store_words(to, from);
    }
}

// A vector of elements of two vectors, `behind` the start of the first.
__device__ __forceinline__ void put_together(const Words& a, const Words& b, int behind, Words& to) {
    constexpr int OF_WORD = 4 / sizeof(X) > 0 ? 4 / sizeof(X) : 1;
    unsigned w[2 * WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        w[i] = a[i];
        w[i + WORDS] = b[i];
    }
#pragma unroll
    for (int step = WORDS / 2; step > 0; step /= 2) {
        const bool is_moved = behind & step * OF_WORD;
#pragma unroll
        for (int i = 0; i < 2 * WORDS - step; i++) w[i] = is_moved ? w[i + step] : w[i];
    }
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = OF_WORD == 1 ? w[i] : __funnelshift_r(w[i], w[i + 1], behind % 2 * 16);
}

// A vector that begins at `from`, `behind` the start of one in memory, and at `position` of a row of n elements, put
// together of those that have one of the row; what the row does not have is anything.
__device__ __forceinline__ void load_between(const X* from, int behind, int position, int n, Words& to) {
    Words a, b;
#pragma unroll
    for (int i = 0; i < WORDS; i++) a[i] = b[i] = to[i];
    const int begin = position - behind;
    if (max(begin, 0) < n && begin + WIDTH > 0) load_words(from - behind, a);
    if (behind > 0 && max(begin + WIDTH, 0) < n) load_words(from - behind + WIDTH, b);
    put_together(a, b, behind, to);
}

// Elements of shifted vector i that are not the row's become those of the word `absent`.
__device__ __forceinline__ void mask(const Place& place, int i, int n, unsigned absent, Words& to) {
    constexpr int OF_WORD = 4 / sizeof(X) > 0 ? 4 / sizeof(X) : 1;
#pragma unroll
    for (int word = 0; word < WORDS; word++) {
        const bool has_low = place.has(i, word * OF_WORD, n), has_high = place.has(i, word * OF_WORD + 1, n);
        if constexpr (OF_WORD == 2)
            to[word] = __byte_perm(to[word], absent, (has_low ? 0x10 : 0x54) | (has_high ? 0x3200 : 0x7600));
        else
            to[word] = has_low ? to[word] : absent;
    }
}

// The same of values, which become 0.
__device__ __forceinline__ void leave_out(const Place& place, int i, int n, A (&v)[WIDTH]) {
#pragma unroll
    for (int j = 0; j < WIDTH; j++) v[j] = place.has(i, j, n) ? v[j] : A(0);
}

// All vectors of a thread in a row of n elements that begins at `from`; those that are not there stay as they are, and
// elements that are not become those of the word `absent`.
__device__ __forceinline__ void load_row(const X* from, const Place& place, int n, bool are_vectors,
                                         Words (&to)[VECTORS], unsigned absent = 0) {
    if constexpr (LAYOUT == Narrow) {
        const bool is_halfway = begins_halfway(from);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) load_narrow(from + place(i), is_halfway, n - place(i), to[i]);
    } else if constexpr (LAYOUT == Shifted) {
        const int behind = place.behind(from);
        if (behind == 0) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++)
                if (max(place(i), 0) < n) load_words(from + place(i), to[i]);
        } else {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                load_between(from + place(i), behind, place(i), n, to[i]);
                asm volatile("" ::: "memory");  // one at a time: for all of them there are no registers
            }
        }
    } else if (are_vectors) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (place(i) < n) load_words(from + place(i), to[i]);
    } else {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) load_singly(from + place(i), n - place(i), to[i]);
    }
    if constexpr (LAYOUT == Shifted) {  // when all loads have begun
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (!place.has_all(i, n)) mask(place, i, n, absent, to[i]);
    }
}

// Have the L2 fetch a row while the kernels before this one end; allowed before they have, see overlap.cuh. Of a grid of
// which the GPU holds a part at a time, rows are soon read anyway.
constexpr unsigned THREADS_AT_ONCE = 1 << 17;
__device__ __forceinline__ void prefetch_row(const X* from, const Place& place, int n) {
#if __CUDA_ARCH__ >= 900
    if (gridDim.x > THREADS_AT_ONCE / blockDim.x) return;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (place(i) < n && (place(i) + place.shift) * sizeof(X) % 128 == 0) prefetch_line(from + place(i));
#endif
}

__device__ __forceinline__ void store_vector(X* to, int position, int n, bool are_vectors, const Words& from) {
    if (!are_vectors)
        store_singly(to + position, n - position, from);
    else if (position < n)
        store_words(to + position, from);
}

// Vector i of a row. `are_vectors`: of a shifted one, whether it begins where that of x does.
__device__ __forceinline__ void store_vector(X* row, const Place& place, int i, int n, bool are_vectors,
                                             const Words& from) {
    X* const to = row + place(i);
    if constexpr (LAYOUT == Narrow) {
        store_narrow(row, begins_halfway(row), place, i, n, from);
    } else if constexpr (LAYOUT == Shifted) {
        if (are_vectors && place.has_all(i, n)) {
            store_words(to, from);
        } else if (place(i) < n) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                if (!place.has(i, j, n)) continue;
                if constexpr (sizeof(X) == 2)
                    reinterpret_cast<unsigned short*>(to)[j] = static_cast<unsigned short>(from[j / 2] >> j % 2 * 16);
                else
                    reinterpret_cast<unsigned*>(to)[j] = from[j];
            }
        }
    } else {
        store_vector(row, place(i), n, are_vectors, from);
    }
}

// Where the rows of an array begin, `step` elements apart: the bits of several, combined, tell whether vectors may.
__device__ __forceinline__ unsigned long long address_bits(const void* data, long long step) {
    return reinterpret_cast<unsigned long long>(data) | step * sizeof(X);
}
__device__ __forceinline__ bool are_vectors_at(unsigned long long addresses) {
    constexpr unsigned long long BYTES = sizeof(Words) < 16 ? sizeof(Words) : 16;
    return addresses % BYTES == 0;
}

// Element j of a vector, in the accumulate dtype.
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

// A vector of results, rounded once.
__device__ __forceinline__ void round_results(A (&v)[WIDTH], Words& words) {
    if constexpr (sizeof(X) > 2) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) v[j] = v[j] == v[j] ? v[j] : nan_of(A(0));
    }
#pragma unroll
    for (int word = 0; word < WORDS; word++) words[word] = word_of(v, word, static_cast<X*>(nullptr));
}

// Write it, those that the row has.
__device__ __forceinline__ void store_results(X* to, int position, int n, bool are_vectors, A (&v)[WIDTH]) {
    Words words;
    round_results(v, words);
    store_vector(to, position, n, are_vectors, words);
}
__device__ __forceinline__ void store_results(X* row, const Place& place, int i, int n, bool are_vectors,
                                              A (&v)[WIDTH]) {
    Words words;
    round_results(v, words);
    store_vector(row, place, i, n, are_vectors, words);
}

// Let the compiler read elements again, instead of keeping in registers what it has computed of them.
__device__ __forceinline__ void forget(Words (&raw)[VECTORS]) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
#pragma unroll
        for (int word = 0; word < WORDS; word++) asm("" : "+r"(raw[i][word]));
}

// The same of 16-bit elements, which widened take twice as many.
__device__ __forceinline__ void forget_widened(Words (&raw)[VECTORS]) {
    if constexpr (sizeof(X) == 2 && VECTORS * WORDS > 16) forget(raw);
}

// ----------------------------------------------------------------------------------------------------- weight and bias

// The words of a vector of elements that are all 1, or all -0.
template <class T>
__device__ __forceinline__ constexpr unsigned word_of_ones(int word) {
    if (is_same<T, bfloat16>::value) return 0x3F803F80u;
    if (is_same<T, float16>::value) return 0x3C003C00u;
    if (is_same<T, float>::value) return 0x3F800000u;
    return word % 2 ? 0x3FF00000u : 0;
}
template <class T>
__device__ __forceinline__ constexpr unsigned word_of_minus_zeros(int word) {
    if (sizeof(T) == 2) return 0x80008000u;
    return sizeof(T) == 4 || word % 2 ? 0x80000000u : 0;
}

// A weight or a bias, if it EXISTS in the operation: a thread's elements of it, which are 1 or -0 if the call has none.
// Few are read while x is on its way; for many there are no registers, nor is there need: while a CTA waits for them,
// others read and write. Of rows that begin anywhere several are read AT_ONCE, since no load may pass a store.
template <bool EXISTS, bool IS_BIAS, int WORDS_AT_ONCE = 8>
struct Side {
    static constexpr bool IS_EARLY = VECTORS * WORDS <= 16;
    static constexpr int MOST = LAYOUT == Narrow && !SPREAD ? 16 : WORDS_AT_ONCE / WORDS;
    static constexpr int MANY = VECTORS < MOST ? VECTORS : MOST;
    static constexpr int AT_ONCE = LAYOUT == Whole ? 1 : MANY;

    const X* const data;
    Words held[!EXISTS ? 1 : IS_EARLY ? VECTORS : AT_ONCE];

    __device__ __forceinline__ explicit Side(const void* data) : data(static_cast<const X*>(data)) {}

    __device__ __forceinline__ void begin(const Place& place, int n, bool are_vectors) {
        if constexpr (EXISTS && IS_EARLY) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) read(place, i, n, are_vectors, held[i]);
        }
    }

    // Vector i, after `begin`.
    __device__ __forceinline__ const Words& at(int i, const Place& place, int n, bool are_vectors) {
        if constexpr (EXISTS && !IS_EARLY && LAYOUT == Whole) {
            read(place(i), n, are_vectors, held[0]);
        } else if constexpr (EXISTS && !IS_EARLY) {
            if (i % AT_ONCE == 0) {
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) read(place, i + k, n, are_vectors, held[k]);
            }
        }
        return held[!EXISTS ? 0 : IS_EARLY ? i : i % AT_ONCE];
    }

    __device__ __forceinline__ void read(const Place& place, int i, int n, bool are_vectors, Words& to) const {
        if constexpr (LAYOUT == Whole) {
            read(place(i), n, are_vectors, to);
        } else {
            const int present = data == nullptr ? 0 : n;
            fill(to);
            if constexpr (LAYOUT == Narrow)
                load_narrow(data + place(i), begins_halfway(data), present - place(i), to);
            else
                load_between(data + place(i), place.behind(data), place(i), present, to);
        }
    }

    __device__ __forceinline__ void read(int position, int n, bool are_vectors, Words& to) const {
        fill(to);
        if (data == nullptr) return;
        if (!are_vectors)
            load_singly(data + position, n - position, to);
        else if (position < n)
            load_words(data + position, to);
    }

    __device__ __forceinline__ static void fill(Words& to) {
#pragma unroll
        for (int word = 0; word < WORDS; word++)
            to[word] = IS_BIAS ? word_of_minus_zeros<X>(word) : word_of_ones<X>(word);
    }
};

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

// Where the sums of a shifted row's lanes are moved: those of each warp that has a row, or each chunk of a CTA's. The
// first elements that a chunk's first thread has are the last ones of the chunk before: of these, the heads.
constexpr int TEAMS = LAYOUT != Shifted ? 1 : SPREAD ? MOST_WARPS / PARTS : THREADS / WARP;
struct Lanes {
    A sums[TEAMS][WIDTH][SUM_LANES / WIDTH];  // side by side what a warp has at a time
    A heads[2][TEAMS][WIDTH];                 // of two sums at a time
};

// Call once the terms of vector 0, and no others, have been added.
__device__ __forceinline__ void take_head(A (&lane)[GROUPS][WIDTH], const Place& place, A (&heads)[TEAMS][WIDTH]) {
    if constexpr (LAYOUT == Shifted && SPREAD) {
        const int chunk = place.warp / PARTS;
        if (chunk == 0 || place.warp % PARTS > 0 || lane_id() > 0) return;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const bool is_before = j < place.shift;
            heads[chunk - 1][(j - place.shift) & (WIDTH - 1)] = is_before ? lane[0][j] : A(0);
            lane[0][j] = is_before ? A(0) : lane[0][j];
        }
    }
}

__device__ __forceinline__ void move_lanes(A (&lane)[GROUPS][WIDTH], const Place& place, Lanes& lanes,
                                           const A (&heads)[TEAMS][WIDTH]) {
    if constexpr (LAYOUT == Shifted) {
        if (place.shift == 0) return;
        constexpr int VECTORS_OF_LANES = SUM_LANES / WIDTH, OF_WARP = GROUPS * WARP;
        const int team = place.warp / PARTS, part = SPREAD ? place.warp % PARTS : 0, own = part * OF_WARP + lane_id();
        A(&there)[WIDTH][VECTORS_OF_LANES] = lanes.sums[team];
        if constexpr (!SPREAD) __syncwarp();  // who still reads the last ones
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) there[j][own + g * WARP] = lane[g][j];
        if constexpr (SPREAD)
            __syncthreads();
        else
            __syncwarp();
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int here = own + g * WARP, next = (here + 1) % VECTORS_OF_LANES;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const int from = j + place.shift;
                lane[g][j] = from < WIDTH ? there[from][here] : there[from - WIDTH][next];
            }
        }
        if constexpr (SPREAD) {
            const bool is_last = part == PARTS - 1 && lane_id() == WARP - 1;
            if (is_last && place.warp + 1 < blockDim.x / WARP) {
#pragma unroll
                for (int j = 0; j < WIDTH; j++) lane[GROUPS - 1][j] += heads[team][j];
            }
        }
    }
}

// Add a thread's elements to their lanes.
__device__ __forceinline__ void add_elements(const Words (&raw)[VECTORS], A (&lane)[GROUPS][WIDTH]) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
#pragma unroll
        for (int j = 0; j < WIDTH; j++) lane[i % GROUPS][j] += element(raw[i], j, static_cast<X*>(nullptr));
}

__device__ __forceinline__ void add_elements(const Words (&raw)[VECTORS], A (&lane)[GROUPS][WIDTH], const Place& place,
                                             A (&heads)[TEAMS][WIDTH]) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) lane[i % GROUPS][j] += element(raw[i], j, static_cast<X*>(nullptr));
        if (i == 0) take_head(lane, place, heads);
    }
}

// The sum of a row's elements in a warp and, if it COUNTS, of its threads' counts, in each thread.
template <bool COUNTS>
__device__ __forceinline__ A warp_sum(const A (&lane)[GROUPS][WIDTH], const Place& place, unsigned& count) {
    A sums[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) sums[g] = fold(lane[g], Plus<A>());
    if constexpr (COUNTS && IS_WARP) count = __reduce_add_sync(~0u, count);
#pragma unroll
    for (int mask = 1; mask < WARP; mask *= 2) {
        if (IS_WARP || mask < place.lanes) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) sums[g] += __shfl_xor_sync(~0u, sums[g], mask);
            if constexpr (COUNTS && !IS_WARP) count += __shfl_xor_sync(~0u, count, mask);
        }
    }
    return fold(sums, Plus<A>());
}
__device__ __forceinline__ A warp_sum(const A (&lane)[GROUPS][WIDTH], const Place& place) {
    unsigned none = 0;
    return warp_sum<false>(lane, place, none);
}

// The same of a row. If it is a CTA's, warps meet at `sums` and `counts`; where there is no warp, 0 stands there.
__device__ __forceinline__ A row_sum(A (&lane)[GROUPS][WIDTH], const Place& place, Lanes& lanes, A (&sums)[MOST_WARPS],
                                     unsigned& count, unsigned (&counts)[MOST_WARPS]) {
    move_lanes(lane, place, lanes, lanes.heads[0]);
    const A sum = warp_sum<true>(lane, place, count);
    if constexpr (!SPREAD) return sum;
    if (lane_id() == 0) {
        sums[place.warp] = sum;
        counts[place.warp] = count;
    }
    __syncthreads();
    count = fold_warps(counts, Plus<unsigned>());
    return fold_warps(sums, Plus<A>());
}
__device__ __forceinline__ A row_sum(A (&lane)[GROUPS][WIDTH], const Place& place, Lanes& lanes, int which,
                                     A (&sums)[MOST_WARPS]) {
    move_lanes(lane, place, lanes, lanes.heads[which]);
    const A sum = warp_sum(lane, place);
    if constexpr (!SPREAD) return sum;
    if (lane_id() == 0) sums[place.warp] = sum;
    __syncthreads();
    return fold_warps(sums, Plus<A>());
}

// The places of warps that a CTA does not have hold 0, once its threads have met.
__device__ __forceinline__ void clear_absent_warps(A (&sums)[2][MOST_WARPS]) {
    if constexpr (SPREAD) {
        if (threadIdx.x < MOST_WARPS && threadIdx.x >= blockDim.x / WARP)
            sums[0][threadIdx.x] = sums[1][threadIdx.x] = 0;
    }
}
