// mean, and sums of chunks, of rows whose elements a thread reads 8 at a time.
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double.
#include "reduction.cuh"

using A = ACCUMULATE;
using Reader = RowReader<ELEMENT, A>;
constexpr int LOADS = sizeof(A) == 8 ? 1 : 4;  // of 8 elements, in flight

// A row per team of `warps` warps. One warp: n <= SUM_CHUNK, and a CTA holds several teams. More: the team is the CTA,
// n <= SUM_CHUNK^2, and dynamic shared memory holds an A per chunk.
extern "C" __global__ void __launch_bounds__(512, 1)
    mean_rows(const __grid_constant__ Reduction p, int warps, void* out, const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* sums = reinterpret_cast<A*>(shared);
    const int teams = blockDim.x / WARP / warps;
    const int team = warp_id() / warps;

    for (long long row = static_cast<long long>(blockIdx.x) * teams + team; row < p.rows;
         row += static_cast<long long>(gridDim.x) * teams) {
        long long start[2];
        p.row_offsets(row, start);
        const Reader reader(p, x, start[0]);
        const A sum =
            sum_row<A, LOADS>(p.n, warps, sums, [&](long long i, A(&v)[THREAD_LANES]) { reader.read(i, A(0), v); });
        if (threadIdx.x % (warps * WARP) == 0)
            store(out, start[1], static_cast<int>(p.out_dtype), sum / static_cast<A>(p.divisor));
        if (warps > 1) __syncthreads();  // `sums` is free for the next row
    }
}

// A chunk per warp: sums[row][chunk], elements of the next level.
extern "C" __global__ void __launch_bounds__(128, 1)
    sum_chunks(const __grid_constant__ Reduction p, A* sums, const void* x) {
    const long long step = static_cast<long long>(gridDim.x) * (blockDim.x / WARP);
    for (long long i = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
         i < p.rows * p.chunks.number; i += step) {
        long long chunk = i;
        const long long row = p.chunks.divide(chunk);
        const Reader reader(p, x, p.row_offset(row));
        const A sum = sum_chunk<A, LOADS>(chunk * SUM_CHUNK, p.n,
                                          [&](long long i, A(&v)[THREAD_LANES]) { reader.read(i, A(0), v); });
        if (lane_id() == 0) sums[i] = sum;
    }
}
