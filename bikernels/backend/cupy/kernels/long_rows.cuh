// What the kernels of long rows share whose elements are registers' while those of the next row are on their way to shared
// memory: what a thread keeps there, and how the sums of chunks meet.
#pragma once
#include "hopper.cuh"
#include "register_rows.cuh"

static_assert(STEPS * SUM_LANES == SUM_CHUNK, "a warp has a chunk, or all steps of a part of it");
constexpr int SHARE = PARTS > 1 ? 4 : THREAD_LANES;  // of a row's chunks, that a thread adds up at most
static_assert(sizeof(Words) == 16, "of what is copied at a time");

// A thread's elements of a row in shared memory, vectors of a warp side by side. Nobody else reads or writes them.
struct Kept {
    uint4* const at;
    const Place& place;
    const int n;  // elements from where `place` counts
    const bool are_vectors;

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
            at[i * WARP] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    __device__ __forceinline__ void take(int i, Words& to) const {
        load_words(reinterpret_cast<const X*>(at + i * WARP), to);
    }
    __device__ __forceinline__ void take(Words (&to)[VECTORS]) const {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) take(i, to[i]);
    }
};

// Where the sum of a part of a chunk lies, of rows of which a thread adds up 2^bits neighbouring chunks: side by side with
// what the other threads read along with it.
__device__ __forceinline__ int place_of(int chunk, int part, int bits) {
    return ((chunk & ((1 << bits) - 1)) * PARTS + part) * WARP + (chunk >> bits);
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
