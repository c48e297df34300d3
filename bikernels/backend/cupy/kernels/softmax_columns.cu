// softmax and log_softmax along a strided axis: lanes run over the rows (see columns.cuh). n <= 32 chunks.
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double.
#include "columns.cuh"

using A = ACCUMULATE;

extern "C" __global__ void __launch_bounds__(512, 1)
    softmax_columns(const __grid_constant__ Reduction p, void* out, const void* x) {
    __shared__ A partial[GROUPS][COLUMNS + 1];
    __shared__ A sums[WARP][COLUMNS + 1];
    __shared__ unsigned counts[COLUMNS];
    const int warps = blockDim.x / WARP;

    for (long long first = static_cast<long long>(blockIdx.x) * COLUMNS; first < p.rows;
         first += static_cast<long long>(gridDim.x) * COLUMNS) {
        const long long row = first + lane_id();
        long long start[2];
        p.row_offsets(min(row, p.rows - 1), start);
        const RowReader<ELEMENT, A> reader(p, x, start[0]);

        A maximum = lowest<A>();
#pragma unroll 1
        for (long long i = warp_id() * THREAD_LANES; i < p.n; i += warps * THREAD_LANES) {
            A v[THREAD_LANES];
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) maximum = larger(maximum, v[j]);
        }
        partial[warp_id()][lane_id()] = maximum;
        if (warp_id() == 0) counts[lane_id()] = 0;
        __syncthreads();
        maximum = partial[0][lane_id()];
        for (int i = 1; i < warps; i++) maximum = larger(maximum, partial[i][lane_id()]);
        __syncthreads();  // `partial` is free for the sums

        unsigned count = 0;
        sum_columns<A, 2>(p.n, partial, sums, [&](long long i, A(&v)[THREAD_LANES]) {
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = counted_exponential(v[j], maximum, p.is_precise(), count);
        });
        atomicAdd(&counts[lane_id()], count);  // of integers: any order gives the same
        __syncthreads();
        const A normaliser = softmax_normaliser(static_cast<A>(counts[lane_id()]), sums[0][lane_id()], p.logarithm);

        if (row < p.rows) {
            const RowWriter<A> writer(p, out, start[1]);
#pragma unroll 1
            for (long long i = warp_id() * THREAD_LANES; i < p.n; i += warps * THREAD_LANES) {
                A v[THREAD_LANES];
                reader.read(i, lowest<A>(), v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++)
                    v[j] = softmax_element(v[j], maximum, normaliser, p.logarithm, p.is_precise());
                writer.write(i, v);
            }
        }
        __syncthreads();  // shared memory is free for the next columns
    }
}
