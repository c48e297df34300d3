// mean, and sums of chunks, along a strided axis: lanes run over the rows (see columns.cuh).
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double.
#include "columns.cuh"

using A = ACCUMULATE;

// n <= 32 chunks.
extern "C" __global__ void __launch_bounds__(512, 1)
    mean_columns(const __grid_constant__ Reduction p, void* out, const void* x) {
    __shared__ A partial[GROUPS][COLUMNS + 1];
    __shared__ A sums[WARP][COLUMNS + 1];
    for (long long first = static_cast<long long>(blockIdx.x) * COLUMNS; first < p.rows;
         first += static_cast<long long>(gridDim.x) * COLUMNS) {
        const long long row = first + lane_id();
        long long start[2];
        p.row_offsets(min(row, p.rows - 1), start);
        const RowReader<ELEMENT, A> reader(p, x, start[0]);
        sum_columns<A, 2>(p.n, partial, sums, [&](long long i, A(&v)[THREAD_LANES]) { reader.read(i, A(0), v); });
        if (warp_id() == 0 && row < p.rows) {
            store(out, start[1], static_cast<int>(p.out_dtype), sums[0][lane_id()] / static_cast<A>(p.divisor));
        }
        __syncthreads();  // `sums` is free for the next columns
    }
}

// A chunk of 32 rows per CTA: sums[chunk][row], elements of the next level.
extern "C" __global__ void __launch_bounds__(512, 1)
    sum_column_chunks(const __grid_constant__ Reduction p, A* sums, const void* x) {
    __shared__ A partial[GROUPS][COLUMNS + 1];
    __shared__ A chunk_sums[COLUMNS];
    const long long blocks = (p.rows + COLUMNS - 1) / COLUMNS * p.chunks.number;
    for (long long block = blockIdx.x; block < blocks; block += gridDim.x) {
        long long chunk = block;
        const long long row = p.chunks.divide(chunk) * COLUMNS + lane_id();
        const RowReader<ELEMENT, A> reader(p, x, p.row_offset(min(row, p.rows - 1)));
        sum_column_chunk<A, 2>(chunk * SUM_CHUNK, p.n, partial, chunk_sums,
                               [&](long long i, A(&v)[THREAD_LANES]) { reader.read(i, A(0), v); });
        if (warp_id() == 0 && row < p.rows) sums[chunk * p.rows + row] = chunk_sums[lane_id()];
        __syncthreads();
    }
}
