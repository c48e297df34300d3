// softmax and log_softmax, a row per warp or per CTA. A short row stays in registers; another is read three times, for
// the maximum, the sum and the results.
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double.
#include "reduction.cuh"

using A = ACCUMULATE;

// Teams as in mean_rows. Dynamic shared memory, where warps > 1: an A per chunk.
extern "C" __global__ void __launch_bounds__(512, 1)
    softmax_rows(const __grid_constant__ Reduction p, int warps, void* out, const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* sums = reinterpret_cast<A*>(shared);
    __shared__ A warp_maximum[WARP];
    __shared__ unsigned long long warp_count[WARP];

    const int teams = blockDim.x / WARP / warps;
    const int team = warp_id() / warps;
    const int warp = warp_id() % warps;
    const long long thread_first = (static_cast<long long>(warp) * WARP + lane_id()) * THREAD_LANES;
    const long long thread_step = static_cast<long long>(warps) * WARP * THREAD_LANES;

    for (long long row = static_cast<long long>(blockIdx.x) * teams + team; row < p.rows;
         row += static_cast<long long>(gridDim.x) * teams) {
        long long start[2];
        p.row_offsets(row, start);
        const RowReader<ELEMENT, A> reader(p, x, start[0]);
        const RowWriter<A> writer(p, out, start[1]);

        // The maximum is exact, so its order is free.
        A maximum = lowest<A>();
#pragma unroll 2
        for (long long i = thread_first; i < p.n; i += thread_step) {
            A v[THREAD_LANES];
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) maximum = larger(maximum, v[j]);
        }
        maximum = max_warp(maximum);
        if (warps > 1) {
            if (lane_id() == 0) warp_maximum[warp] = maximum;
            __syncthreads();
            maximum = max_warp(lane_id() < warps ? warp_maximum[lane_id()] : lowest<A>());
        }

        unsigned thread_count = 0;
        const A sum = sum_row<A, 2>(p.n, warps, sums, [&](long long i, A(&v)[THREAD_LANES]) {
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++)
                v[j] = counted_exponential(v[j], maximum, p.is_precise(), thread_count);
        });
        unsigned long long count = sum_warp(thread_count);
        if (warps > 1) {
            if (lane_id() == 0) warp_count[warp] = count;
            __syncthreads();
            count = 0;
            for (int i = 0; i < warps; i++) count += warp_count[i];
        }
        const A normaliser = softmax_normaliser(static_cast<A>(count), sum, p.logarithm);

#pragma unroll 2
        for (long long i = thread_first; i < p.n; i += thread_step) {
            A v[THREAD_LANES];
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++)
                v[j] = softmax_element(v[j], maximum, normaliser, p.logarithm, p.is_precise());
            writer.write(i, v);
        }
        if (warps > 1) __syncthreads();  // shared memory is free for the next row
    }
}

// A row per warp, n <= SHORT_ROW: a thread keeps its elements.
extern "C" __global__ void __launch_bounds__(128, 1)
    softmax_short_rows(const __grid_constant__ Reduction p, void* out, const void* x) {
    constexpr int STEPS = SHORT_ROW / SUM_LANES;
    static_assert(SHORT_ROW % SUM_LANES == 0 && SHORT_ROW <= SUM_CHUNK);
    const int warps = blockDim.x / WARP;
    const int thread_first = lane_id() * THREAD_LANES;

    for (long long row = static_cast<long long>(blockIdx.x) * warps + warp_id(); row < p.rows;
         row += static_cast<long long>(gridDim.x) * warps) {
        long long start[2];
        p.row_offsets(row, start);
        const RowReader<ELEMENT, A> reader(p, x, start[0]);
        const RowWriter<A> writer(p, out, start[1]);

        A v[STEPS][THREAD_LANES];
        A maximum = lowest<A>();
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int i = step * SUM_LANES + thread_first;
            if (i < p.n) {
                reader.read(i, lowest<A>(), v[step]);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) maximum = larger(maximum, v[step][j]);
            }
        }
        maximum = max_warp(maximum);

        A lane[THREAD_LANES] = {};
        unsigned count = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step * SUM_LANES + thread_first < p.n) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++)
                    lane[j] += counted_exponential(v[step][j], maximum, p.is_precise(), count);
            }
        }
        const A sum = sum_warp(fold_thread_lanes(lane));
        const A normaliser = softmax_normaliser(static_cast<A>(sum_warp(count)), sum, p.logarithm);

#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const int i = step * SUM_LANES + thread_first;
            if (i < p.n) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++)
                    v[step][j] = softmax_element(v[step][j], maximum, normaliser, p.logarithm, p.is_precise());
                writer.write(i, v[step]);
            }
        }
    }
}
