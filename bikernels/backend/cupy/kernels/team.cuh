// The threads that share a row, and how they meet: neighbouring lanes of a warp, the warps of a CTA, or those of the CTAs
// of a cluster (sm_90 on). A row of a team has at most SUM_LANES chunks, so that their sums are one chunk of the next
// level with an element a lane.
#pragma once
#include "hopper.cuh"
#include "reduction.cuh"

constexpr int LANES = 0, CTA = 1, CLUSTER = 2;  // kinds of team

// The sum of n <= SUM_LANES elements in shared memory, by a warp; in every thread.
template <class A>
__device__ __forceinline__ A sum_few(const A* x, int n) {
    A lane[THREAD_LANES];
    const int first = lane_id() * THREAD_LANES;
#pragma unroll
    for (int j = 0; j < THREAD_LANES; j++) lane[j] = first + j < n ? x[first + j] : A(0);
    return sum_warp(fold_thread_lanes(lane));
}

template <int KIND, class A>
struct Team {
    int lanes;        // threads of a row in a warp
    int warp, warps;  // of this thread, and of the team
    int ctas;
    int chunks;  // of the row
    // Shared memory of every CTA, where there are several warps: a value from each warp, or for each chunk.
    A* maxima;
    A* chunk_sums;  // two arrays: two sums of a row, or of two rows one after the other, need no barrier between them
    unsigned* counts;
    int places;  // of an array

    // Dynamic shared memory from `shared` on: see exchange_bytes in schedules.py.
    __device__ __forceinline__ Team(int lanes, long long n, unsigned char* shared)
        : lanes(lanes), warp(0), warps(1), ctas(1), chunks(static_cast<int>(chunks_of(n))) {
        if constexpr (KIND != LANES) {
            const int of_cta = blockDim.x / WARP;
            warp = warp_id();
            if constexpr (KIND == CLUSTER) {
                ctas = cluster_size();
                warp += cluster_rank() * of_cta;
            }
            warps = ctas * of_cta;
            places = max(warps, chunks);
            maxima = reinterpret_cast<A*>(shared);
            chunk_sums = maxima + places;
            counts = reinterpret_cast<unsigned*>(chunk_sums + 2 * places);
        }
    }

    // Before anything else: no CTA writes to another that has not started.
    __device__ __forceinline__ void start() const {
        if constexpr (KIND == CLUSTER) sync_cluster();
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
    __device__ __forceinline__ A sum_in_warp(A sum) const {
        if constexpr (KIND != LANES) return sum_warp(sum);
        for (int mask = 1; mask < lanes; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
        return sum;
    }
    __device__ __forceinline__ unsigned count_in_warp(unsigned count) const {
        if constexpr (KIND != LANES) return sum_warp(count);
        for (int mask = 1; mask < lanes; mask *= 2) count += __shfl_xor_sync(~0u, count, mask);
        return count;
    }
    __device__ __forceinline__ A max_in_warp(A maximum) const {
        if constexpr (KIND != LANES) return max_warp(maximum);
        for (int mask = 1; mask < lanes; mask *= 2) maximum = larger(maximum, __shfl_xor_sync(~0u, maximum, mask));
        return maximum;
    }

    // The maximum over the team, of its warps' ones.
    __device__ __forceinline__ A team_max(A of_warp) const {
        if constexpr (KIND == LANES) return of_warp;
        share(maxima, warp, of_warp);
        meet();
        A maximum = lowest<A>();
        for (int i = lane_id(); i < warps; i += WARP) maximum = larger(maximum, maxima[i]);
        return max_warp(maximum);
    }

    // The tree over the chunks' sums, and the sum of the warps' counts, after they were shared and the team has met.
    __device__ __forceinline__ A sum_of_chunks(int which) const { return sum_few(sums(which), chunks); }
    __device__ __forceinline__ unsigned sum_of_counts() const {
        unsigned count = 0;
        for (int i = lane_id(); i < warps; i += WARP) count += counts[i];
        return sum_warp(count);
    }
};
