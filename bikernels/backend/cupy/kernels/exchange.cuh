// How the warps of a CTA, or of the CTAs of a cluster, exchange what each knows of a row (sm_90 on).
//
// ARRIVING: threads of a warp that arrive at the team's barriers for it: 1; all for a tool that does not see what one thread
// does for others.
#pragma once
#include "hopper.cuh"
#include "sum_tree.cuh"

#ifndef ARRIVING
#define ARRIVING 1
#endif

// The warps that share a row. What they exchange goes to one of several areas of the shared memory of every CTA in turn,
// each with a barrier that counts its CTA's warps and, in a cluster, bytes. A warp may share the next values before it has
// read these, but not those after: when it shares what goes to an area again, all have read what was there.
constexpr int AREAS = 4;

struct Team {
    int warps, ctas, rank;  // of the CTA; of the cluster; of this CTA in it
    unsigned char* areas;
    int area_bytes;
    unsigned barriers;

    __device__ __forceinline__ unsigned barrier(unsigned turn) const { return barriers + turn % AREAS * 8; }
    template <class V>
    __device__ __forceinline__ V* area(unsigned turn) const {
        return reinterpret_cast<V*>(areas + turn % AREAS * area_bytes);
    }

    // Write a warp's value to `place` of exchange number `turn`.
    template <class V>
    __device__ __forceinline__ void share(unsigned turn, int place, V value) const {
        V* const to = area<V>(turn) + place;
        if (ctas == 1) {
            if (lane_id() == 0) *to = value;
        } else if (lane_id() < ctas) {
            send_in_cluster(shared_address(to), lane_id(), value, barrier(turn));
        }
    }
    // Say that the warp has shared its values, of all the warps' `bytes`, and read those of the exchange before.
    __device__ __forceinline__ void arrived(unsigned turn, int bytes) const {
        __syncwarp();  // one thread arrives for what all have read
        if (ctas > 1 && threadIdx.x == 0) {
            arrive_and_expect(barrier(turn), bytes);
        } else if (lane_id() < ARRIVING) {
            arrive(barrier(turn));
        }
    }
    // Wait until all have.
    template <class V>
    __device__ __forceinline__ const V* meet(unsigned turn) const {
        wait_barrier(barrier(turn), turn / AREAS & 1);
        return area<V>(turn);
    }
};
