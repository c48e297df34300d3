// What the kernels of long rows share whose elements are registers' while those of the next row are on their way to shared
// memory: what a thread keeps there, and how the sums of chunks meet.
#pragma once
#include "hopper.cuh"
#include "register_rows.cuh"

static_assert(STEPS * SUM_LANES == SUM_CHUNK, "a warp has a chunk, or all steps of a part of it");
constexpr int SHARE = PARTS > 1 ? 4 : THREAD_LANES;  // of a row's chunks, that a thread adds up at most
// Whether rows begin anywhere in a 16-byte vector: what a warp has is then copied in whole vectors, and read in narrow ones.
constexpr bool IS_IMAGE = sizeof(Words) < 16;
static_assert(IS_IMAGE ? IS_NARROW || WIDTH == 1 : sizeof(Words) == 16, "of what is copied at a time, or of a word");

template <int WORDS>
struct VectorOf {
    using Type = uint4;
};
template <>
struct VectorOf<2> {
    using Type = uint2;
};
template <>
struct VectorOf<1> {
    using Type = unsigned;
};
using Vector = VectorOf<WORDS>::Type;

// Begin to copy a vector.
__device__ __forceinline__ void copy_words(unsigned shared, const X* from) {
    if constexpr (IS_IMAGE)
        copy_words_async<sizeof(Words)>(shared, from);
    else
        copy_vector_async(shared, from);
}

// A thread's elements of a row in shared memory, vectors of a warp side by side. Nobody else reads or writes them.
struct Kept {
    static constexpr int BYTES = SUM_CHUNK / PARTS * sizeof(X);  // of a warp

    Vector* const at;
    const Place& place;
    const int n;  // elements from where `place` counts
    const bool are_vectors;

    __device__ __forceinline__ Kept(unsigned char* own, const Place& place, int n, bool are_vectors)
        : at(reinterpret_cast<Vector*>(own) + lane_id()), place(place), n(n), are_vectors(are_vectors) {}

    // Where what lies behind the warp's has a place for vectors of the thread.
    __device__ __forceinline__ Vector* behind() const { return at + BYTES / 16; }

    // Elements that are not there are zeros. Vectors hold none but those, so that they stay.
    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (place(i) >= n) at[i * WARP] = Vector{};
    }
    __device__ __forceinline__ void clear_with(const Kept& other) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            if (place(i) >= n) at[i * WARP] = other.at[i * WARP] = Vector{};
    }

    // Begin to copy a row; `from`: where `place` counts from.
    __device__ __forceinline__ void copy(const X* from) const {
        if (are_vectors) {
#pragma unroll 4
            for (int i = 0; i < VECTORS; i++) copy_vector(from, i);
            commit_copies();
        } else {
            copy_singly(from);
        }
    }
    __device__ __forceinline__ void copy_vector(const X* from, int i) const {
        if (place(i) < n) copy_vector_async(shared_address(at + i * WARP), from + place(i));
    }
    __device__ __forceinline__ void copy_singly(const X* from) const {
        int end = n;
        asm volatile("" : "+r"(end));  // computed here: there is no register to have n - place(0) ready
#pragma unroll 1
        for (int i = 0; i < VECTORS; i++) {
            Words words = {};
            load_singly(from + place(i), end - place(i), words);
            store_words(reinterpret_cast<X*>(at + i * WARP), words);
        }
    }

    // Before a row is taken, and before the next one is copied.
    __device__ __forceinline__ void settle() const {}
    __device__ __forceinline__ void release() const {}

    __device__ __forceinline__ void take(int i, Words& to) const {
        load_words(reinterpret_cast<const X*>(at + i * WARP), to);
    }
    __device__ __forceinline__ void take(Words (&to)[VECTORS]) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) take(i, to[i]);
    }

    // A row that stays here until it is used for the last time, vector after vector, and the `next` one, unless `is_last`.
    __device__ __forceinline__ void begin_use(bool is_last, const X* next) const {}
    __device__ __forceinline__ void use(int i, Words& to) const { take(i, to); }
    __device__ __forceinline__ void forget_used() const {}
    __device__ __forceinline__ void hide_used(unsigned zero) const {}
    __device__ __forceinline__ void use_last(int i, Words& to, bool is_last, const X* next) const {
        take(i, to);
        if (are_vectors && !is_last) copy_vector(next, i);
    }
    __device__ __forceinline__ void end_use(bool is_last, const X* next) const {
        commit_copies();
        if (!are_vectors && !is_last) copy_singly(next);
    }

    // Whether the row has the thread's element j of vector i, after `find_end`.
    __device__ __forceinline__ void find_end() const {}
    static constexpr bool is_full() { return false; }  // or is it
    __device__ __forceinline__ bool has(int i, int) const { return place(i) < n; }
};

// What `forget` asks for, where the assembler sees that this changes nothing. `zero`: 0, which it does not know.
__device__ __forceinline__ void hide(Words (&raw)[VECTORS], unsigned zero) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
#pragma unroll
        for (int word = 0; word < WORDS; word++) raw[i][word] ^= zero;
}

// What a warp has of a row in shared memory, wherever that begins: the 16-byte vectors that hold it, each of which holds at
// least one byte of the row, so that it lies where that does. Threads copy vectors side by side, and read each other's. Of
// warps that share a chunk each has a part of every step.
struct Image {
    static constexpr int SEGMENTS = PARTS > 1 ? STEPS : 1, LENGTH = SUM_CHUNK / PARTS / SEGMENTS;  // in elements
    static constexpr int SIZE = sizeof(X), PITCH = LENGTH * SIZE + 16, BYTES = SEGMENTS * PITCH;
    static constexpr int AT_ONCE = WARP * 16, ROUNDS = LENGTH * SIZE / AT_ONCE, VECTORS_OF_THREAD = SEGMENTS * ROUNDS;
    static_assert(LENGTH * SIZE % AT_ONCE == 0 && SEGMENTS < WARP, "each thread copies as many vectors, or one more");

    unsigned char* const at;
    const Place& place;
    const int n;          // elements from where `place` counts
    const int first;      // position of the warp's first one
    unsigned shift;       // bytes of a vector in front of the row that was copied
    int end;              // of the row, from the thread's first element on
    Words used[VECTORS];  // see begin_use
    static constexpr bool TAKES_USED = SIZE < 8;

    __device__ __forceinline__ Image(unsigned char* own, const Place& place, int n, bool)
        : at(own), place(place), n(n), first(place.first - lane_id() * WIDTH), shift(0), end(0) {}

    __device__ __forceinline__ Vector* behind() const { return reinterpret_cast<Vector*>(at + BYTES) + lane_id(); }

    // Where the vectors lie that a warp copies at a time, in bytes: here, and in the row.
    static __device__ __forceinline__ int place_of(int i) { return i / ROUNDS * PITCH + i % ROUNDS * AT_ONCE; }
    static __device__ __forceinline__ int offset_of(int i) {
        return i / ROUNDS * (SUM_LANES * SIZE) + i % ROUNDS * AT_ONCE;
    }

    // Elements that the row has of the warp's, or more, as if there were no other warp.
    __device__ __forceinline__ int left() const { return n - first; }
    __device__ __forceinline__ bool is_full() const { return left() >= (SEGMENTS - 1) * SUM_LANES + LENGTH; }

    // Elements that are not there are zeros: see `settle`.
    __device__ __forceinline__ void clear() const {
        if (is_full()) return;
#pragma unroll 1
        for (int i = lane_id() * 16; i < BYTES; i += AT_ONCE)
            *reinterpret_cast<uint4*>(at + i) = make_uint4(0, 0, 0, 0);
        __syncwarp();
    }
    __device__ __forceinline__ void clear_with(const Image& other) const {
        clear();
        other.clear();
    }

    // Begin to copy a row; `from`: where `place` counts from.
    __device__ __forceinline__ void copy(const X* from) {
        const unsigned long long address = reinterpret_cast<unsigned long long>(from + first);
        shift = static_cast<unsigned>(address) % 16;
        const unsigned char* const whole = reinterpret_cast<const unsigned char*>(address - shift) + lane_id() * 16;
        const unsigned to = shared_address(at) + lane_id() * 16;
        const int end = left() * SIZE + static_cast<int>(shift) - lane_id() * 16;
        if (is_full()) {
#pragma unroll
            for (int i = 0; i < VECTORS_OF_THREAD; i++) copy_vector_async(to + place_of(i), whole + offset_of(i));
        } else {
#pragma unroll 1
            for (int i = 0; i < VECTORS_OF_THREAD; i++)
                if (offset_of(i) < end) copy_vector_async(to + place_of(i), whole + offset_of(i));
        }
        if (shift > 0 && lane_id() < SEGMENTS) {  // what the shift leaves of a segment
            const int last = lane_id() * (SUM_LANES * SIZE - 16) + LENGTH * SIZE;
            if (last < end) copy_vector_async(to + lane_id() * (PITCH - 16) + LENGTH * SIZE, whole + last);
        }
        commit_copies();
    }

    // Once the copies that a thread waits for have come, those of others, too. What the last vector holds behind the row,
    // and what the one of another row did, which began elsewhere, are zeros then.
    __device__ __forceinline__ void settle() const {
        __syncwarp();
        if (is_full()) return;
#pragma unroll 1
        for (int i = 0; i < SEGMENTS; i++) {
            const int end = max(left() - i * SUM_LANES, 0) + lane_id();
            X* const row = reinterpret_cast<X*>(at + i * PITCH + shift);
            if (end < LENGTH && lane_id() < 32 / SIZE) row[end] = X{};
        }
        __syncwarp();
    }
    // Before the next row is copied: nobody reads this one any more.
    __device__ __forceinline__ void release() const { __syncwarp(); }

    // Where the words of the thread's vectors are, or the first of two that have half of one.
    __device__ __forceinline__ const unsigned char* whole_words() const {
        return at + (shift & ~3u) + lane_id() * sizeof(Words);
    }
    static __device__ __forceinline__ int offset_in(int i) {
        constexpr int OF_SEGMENT = VECTORS / SEGMENTS;
        return i / OF_SEGMENT * PITCH + i % OF_SEGMENT * WARP * static_cast<int>(sizeof(Words));
    }
    __device__ __forceinline__ void take(Words (&to)[VECTORS]) const {
        const unsigned char* const from = whole_words();
        if (sizeof(X) == 2 && shift % 4 > 0) {  // two halves of words
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                const unsigned* const words = reinterpret_cast<const unsigned*>(from + offset_in(i));
                to[i][0] = __funnelshift_r(words[0], words[1], 16);
            }
        } else {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) load_words(reinterpret_cast<const X*>(from + offset_in(i)), to[i]);
        }
    }

    // Nobody knows when others have used a vector: each thread takes what it uses to registers, as far as there are any.
    __device__ __forceinline__ void begin_use(bool is_last, const X* next) {
        settle();
        if constexpr (TAKES_USED) {
            take(used);
            release();
            if (!is_last) copy(next);
        }
    }
    __device__ __forceinline__ void use(int i, Words& to) const {
        if constexpr (TAKES_USED) {
#pragma unroll
            for (int word = 0; word < WORDS; word++) to[word] = used[i][word];
        } else {
            load_words(reinterpret_cast<const X*>(whole_words() + offset_in(i)), to);
        }
    }
    __device__ __forceinline__ void use_last(int i, Words& to, bool, const X*) const { use(i, to); }
    __device__ __forceinline__ void end_use(bool is_last, const X* next) {
        if constexpr (!TAKES_USED) {
            release();
            if (!is_last) copy(next);
        }
    }
    __device__ __forceinline__ void forget_used() {
        if constexpr (TAKES_USED) forget(used);
    }
    __device__ __forceinline__ void hide_used(unsigned zero) { hide(used, zero); }

    __device__ __forceinline__ void find_end() {
        end = n - place.first;
        asm volatile("" : "+r"(end));  // there are no registers to have the answers ready
    }
    __device__ __forceinline__ bool has(int i, int j) const { return place(i) - place.first + j < end; }
};

template <bool IS_IMAGE>
struct RowsOf {
    using Type = Kept;
};
template <>
struct RowsOf<true> {
    using Type = Image;
};
using Rows = RowsOf<IS_IMAGE>::Type;

// Writes what a warp has of a row of results, vector after vector, from the first one on; of 16 bits in whole words, where
// the row begins with half a word, too, but for the ends of what the warp has.
struct Results {
    X* const to;  // where `place` counts from
    const Place& place;
    const int n;
    const bool are_vectors;
    const bool has_half;  // what is in front of the first whole word
    X* const whole;       // where a thread's first element would be in it
    int end;              // position of the row's end from that element
    unsigned before;      // the word of the vector before

    __device__ __forceinline__ Results(X* to, const Place& place, int n, bool are_vectors)
        : to(to),
          place(place),
          n(n),
          are_vectors(are_vectors),
          has_half(reinterpret_cast<unsigned long long>(to) % 4 > 0),
          whole(to + place.first - (has_half ? 1 : 0)),
          end(n - place.first),
          before(0) {
        if constexpr (IS_IMAGE) asm volatile("" : "+r"(end));  // see Image::find_end
    }

    __device__ __forceinline__ void store(int i, A (&v)[WIDTH]) {
        X* const type = nullptr;
        if constexpr (!IS_IMAGE) {
            store_results(to, place(i), n, are_vectors, v);
        } else if constexpr (sizeof(X) == 2) {
            store_word(i, word_of(v, 0, type));
        } else {
            v[0] = v[0] == v[0] ? v[0] : nan_of(A(0));
            Words words;
#pragma unroll
            for (int word = 0; word < WORDS; word++) words[word] = word_of(v, word, type);
            const int position = place(i) - place.first;
            if (position < end) store_words(whole + position, words);
        }
    }

    // A word of two elements.
    __device__ __forceinline__ void store_word(int i, unsigned word) {
        const int position = place(i) - place.first, last = WARP - 1;
        unsigned short* const to = reinterpret_cast<unsigned short*>(whole + position);
        int is_split = has_half;
        asm volatile("" : "+r"(is_split));  // vector by vector: there are no registers for all words before they are written
        if (!is_split) {
            if (position + 1 < end)
                *reinterpret_cast<unsigned*>(to) = word;
            else if (position < end)
                *to = static_cast<unsigned short>(word);
            return;
        }
        const unsigned previous = __shfl_sync(~0u, lane_id() == last ? before : word, (lane_id() + last) % WARP);
        before = word;
        if (i > 0 || lane_id() > 0) {
            if (position < end)
                *reinterpret_cast<unsigned*>(to) = __funnelshift_r(previous, word, 16);
            else if (position == end)
                *to = static_cast<unsigned short>(previous >> 16);
        } else if (position < end) {
            to[1] = static_cast<unsigned short>(word);
        }
        if (i == VECTORS - 1 && lane_id() == last && position + 1 < end) to[2] = static_cast<unsigned short>(word >> 16);
    }
};

// The sum of a warp's elements, in each thread. Of many groups of lanes, threads add up different ones as soon as they can.
__device__ __forceinline__ A sum_groups(const A (&lane)[GROUPS][WIDTH], const Place& place) {
    if constexpr (!IS_IMAGE) return warp_sum(lane, place);
    A sums[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) sums[g] = fold(lane[g], Plus<A>());
#pragma unroll
    for (int mask = 1; mask < GROUPS; mask *= 2) {
        const int count = GROUPS / 2 / mask;
        const bool has_upper = lane_id() & mask;
#pragma unroll
        for (int g = 0; g < count; g++) {
            const A other = __shfl_xor_sync(~0u, has_upper ? sums[g] : sums[g + count], mask);
            sums[g] = (has_upper ? sums[g + count] : sums[g]) + other;
        }
    }
#pragma unroll
    for (int mask = GROUPS; mask < WARP; mask *= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], mask);
#pragma unroll
    for (int mask = GROUPS / 2; mask > 0; mask /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], mask);
    return sums[0];
}

// Where the sum of a part of a chunk lies, of rows of which a thread adds up 2^bits neighbouring chunks: side by side with
// what the other threads read along with it.
__device__ __forceinline__ int place_of(int chunk, int part, int bits) {
    return ((chunk & ((1 << bits) - 1)) * PARTS + part) * WARP + (chunk >> bits);
}

// By the first two threads of a CTA. Each has such an address: compute-sanitizer overlooks who takes part.
__device__ __forceinline__ void init_barriers(const unsigned long long* barriers) {
    unsigned barrier = shared_address(barriers + threadIdx.x % 2);
    asm volatile("" : "+r"(barrier));
    if (threadIdx.x < 2) init_barrier(barrier, 1);
    fence_barrier_init();
}

// Write a sum to what lies at that address in CTA `rank` of the cluster, and count its bytes at the barrier there.
__device__ __forceinline__ void send_sum(unsigned shared, unsigned rank, float sum, unsigned barrier) {
    send_in_cluster(shared, rank, __float_as_uint(sum), barrier);
}
__device__ __forceinline__ void send_sum(unsigned shared, unsigned rank, double sum, unsigned barrier) {
    send_in_cluster(shared, rank, make_uint2(__double2loint(sum), __double2hiint(sum)), barrier);
}

// The sum of chunks' sums, of which those that are not there are 0, in each thread of a warp.
__device__ __forceinline__ A sum_chunks(const A* sums, int bits) {
    A v[SHARE] = {};
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        if (i >> bits == 0) {
            A parts[PARTS];
#pragma unroll
            for (int j = 0; j < PARTS; j++) parts[j] = sums[(i * PARTS + j) * WARP + lane_id()];
            v[i] = fold(parts, Plus<A>());
        }
    }
    return sum_warp(fold(v, Plus<A>()));
}
