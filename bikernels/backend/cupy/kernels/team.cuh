// The threads that share a row, and how they meet: neighbouring lanes of a warp, the warps of a CTA, or those of the
// CTAs of a cluster (sm_90 on).
#pragma once
#include "hopper.cuh"
#include "reduction.cuh"

constexpr int LANES = 0, CTA = 1, CLUSTER = 2;  // kinds of team

// The sum of n <= SUM_CHUNK elements in shared memory, by a warp; in every thread.
template <class A>
__device__ __forceinline__ A sum_shared(const A* x, int n) {
    return sum_chunk<A, 1>(0, n, [&](long long first, A(&v)[THREAD_LANES]) {
        const int i = static_cast<int>(first);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) v[j] = i + j < n ? x[i + j] : A(0);
    });
}

template <int KIND, class A>
struct Team {
    const int lanes;   // threads of a row in a warp
    const int chunks;  // of the row
    int warp, warps;   // of this thread, and of the team
    int ctas;
    // Shared memory of every CTA, where there are several warps: a value from each warp or for each of up to SUM_CHUNK
    // chunks, and their sums.
    A* maxima;
    A* chunk_sums;  // two arrays: two sums of a row need no barrier between them
    A* upper;
    unsigned* counts;
    int places;  // of an array but `upper`

    // Dynamic shared memory from `shared` on: see Kept.bytes in row_schedules.py.
    __device__ __forceinline__ Team(int lanes, long long n, unsigned char* shared)
        : lanes(lanes), chunks(static_cast<int>(chunks_of(n))), warp(0), warps(1), ctas(1) {
        if constexpr (KIND != LANES) {
            const int of_cta = blockDim.x / WARP;
            warp = warp_id();
            if constexpr (KIND == CLUSTER) {
                ctas = cluster_size();
                warp += cluster_rank() * of_cta;
            }
            warps = ctas * of_cta;
            places = max(warps, min(chunks, SUM_CHUNK));
            maxima = reinterpret_cast<A*>(shared);
            chunk_sums = maxima + places;
            upper = chunk_sums + 2 * places;
            counts = reinterpret_cast<unsigned*>(upper + (chunks + SUM_CHUNK - 1) / SUM_CHUNK);
        }
    }

    // Say that this CTA has started, and wait for the others: none writes to another that has not.
    __device__ __forceinline__ void say_started() const {
        if constexpr (KIND == CLUSTER) arrive_at_cluster();
    }
    __device__ __forceinline__ void wait_for_start() const {
        if constexpr (KIND == CLUSTER) wait_for_cluster();
    }

    // Wait for all; what they shared before can then be read.
    __device__ __forceinline__ void meet() const {
        if constexpr (KIND == CTA) __syncthreads();
        if constexpr (KIND == CLUSTER) sync_cluster();
    }

    __device__ __forceinline__ A* sums(int which) const { return chunk_sums + which * places; }

    // Write a warp's value at `place` of one of the arrays, in every CTA.
    template <class V>
    __device__ __forceinline__ void share(V* array, int place, V value) const {
        if constexpr (KIND == CTA) {
            if (lane_id() == 0) array[place] = value;
        }
        if constexpr (KIND == CLUSTER) {
            if (lane_id() < ctas) store_in_cluster(shared_address(array + place), lane_id(), value);
        }
    }

    // Folds over the threads of a row that are in one warp; in each of them.
    template <class V>
    __device__ __forceinline__ V sum_in_warp(V sum) const {
        if constexpr (KIND != LANES) return sum_warp(sum);
        for (int mask = 1; mask < lanes; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
        return sum;
    }
    __device__ __forceinline__ A max_in_warp(A maximum) const {
        if constexpr (KIND != LANES) return max_warp(maximum);
        for (int mask = 1; mask < lanes; mask *= 2) maximum = larger(maximum, __shfl_xor_sync(~0u, maximum, mask));
        return maximum;
    }

    // The maximum over the team, of its warps' ones.
    __device__ __forceinline__ A max_of_warps(A of_warp) const {
        if constexpr (KIND == LANES) return of_warp;
        share(maxima, warp, of_warp);
        meet();
        A maximum = lowest<A>();
        for (int i = lane_id(); i < warps; i += WARP) maximum = larger(maximum, maxima[i]);
        return max_warp(maximum);
    }

    // The sum of the warps' counts, after they were shared and the team has met.
    __device__ __forceinline__ unsigned sum_of_counts() const {
        unsigned count = 0;
        for (int i = lane_id(); i < warps; i += WARP) count += counts[i];
        return sum_warp(count);
    }
};
