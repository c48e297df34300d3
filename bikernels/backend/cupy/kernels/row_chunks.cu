// Sums of chunks, elements of the tree's next level: sums[row][chunk].
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double.
#include "reduction.cuh"

using A = ACCUMULATE;
using Reader = RowReader<ELEMENT, A>;

// A chunk per warp.
extern "C" __global__ void __launch_bounds__(128, 1)
    sum_chunks(const __grid_constant__ Reduction p, A* sums, const void* x) {
    const long long step = static_cast<long long>(gridDim.x) * (blockDim.x / WARP);
    for (long long i = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
         i < p.rows * p.chunks.number; i += step) {
        long long chunk = i;
        const long long row = p.chunks.divide(chunk);
        const Reader reader(p, x, p.row_offset<OF_X>(row));
        const A sum = sum_warp(reader.sum_lanes(chunk * SUM_CHUNK + lane_id() * THREAD_LANES, p.n));
        if (lane_id() == 0) sums[i] = sum;
    }
}
