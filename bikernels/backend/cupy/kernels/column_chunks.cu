// Sums of chunks along a strided axis, elements of the tree's next level: sums[chunk][column].
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double. WIDTH: columns of a thread. THREADS: of a CTA, at most.
#include "columns.cuh"

using A = ACCUMULATE;

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS > 0 ? 512 / THREADS : 1)
    sum_column_chunks(const __grid_constant__ Reduction p, int bits, A* sums, const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    Columns<ELEMENT, A, WIDTH, false> tile(p, bits, shared);
    const long long blocks = (p.rows + tile.tile - 1) / tile.tile * p.chunks.number;
    for (long long block = blockIdx.x; block < blocks; block += gridDim.x) {
        long long chunk = block;
        const long long first = p.chunks.divide(chunk) * tile.tile;
        tile.move(first, x);
        tile.narrow(chunk);
        A sum[WIDTH];
        tile.sum_elements(0, sum);
        tile.fold_groups(sum, tile.chunk_sums, [](A a, A b) { return a + b; });
        for (int at = threadIdx.x; at < tile.tile && first + at < p.rows; at += blockDim.x)
            sums[chunk * p.rows + first + at] = tile.chunk_sums[at];
        __syncthreads();
    }
}
