// Sums of chunks along a strided axis, elements of the tree's next level: sums[chunk][column].
//
// TERMS: of what, a number below. ELEMENT: the dtype of x; ACCUMULATE: float or double. THREADS: of a CTA, at most.
#include "columns.cuh"

using A = ACCUMULATE;
constexpr int ELEMENTS = 0, RMS_NORM_WEIGHT = 1, LAYER_NORM_WEIGHT = 2;

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS > 0 ? 512 / THREADS : 1)
    sum_column_chunks(const __grid_constant__ Reduction p, int bits, A* sums, const void* x, const void* grad,
                      const void* mean, const void* rstd) {
    extern __shared__ __align__(16) unsigned char shared[];
    Columns<ELEMENT, A, false> tile(p, bits, shared);
    const long long blocks = (p.rows + tile.tile - 1) / tile.tile * p.chunks.number;
    for (long long block = blockIdx.x; block < blocks; block += gridDim.x) {
        long long chunk = block;
        const long long first = p.chunks.divide(chunk) * tile.tile;
        tile.move(first, x);
        tile.narrow(chunk);
        A sum;
        if constexpr (TERMS == ELEMENTS) {
            sum = tile.sum_elements(0);
        } else {
            const WeightTerms<ELEMENT, A, TERMS == LAYER_NORM_WEIGHT> term(p, tile.column, grad, mean, rstd);
            const int before = static_cast<int>(chunk * SUM_CHUNK);
            sum = tile.sum_terms<8>(0, [&](int i, A& lane) { lane += term(before + i, tile.read(i)); });
        }
        tile.fold_groups(sum, tile.chunk_sums, [](A a, A b) { return a + b; });
        for (int at = threadIdx.x; at < tile.tile && first + at < p.rows; at += blockDim.x)
            sums[chunk * p.rows + first + at] = tile.chunk_sums[at];
        __syncthreads();
    }
}
