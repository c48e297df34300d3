// softmax and log_softmax of few long rows, each spread over many CTAs: one launch per step, a workspace between them.
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double. Workspace arrays are [row] or [row][chunk].
#include "reduction.cuh"

using A = ACCUMULATE;
using Reader = RowReader<ELEMENT, A>;

// Calls work(index, row, chunk) for every chunk of every row, index = row * chunks + chunk; each by one warp of the
// grid.
template <class Work>
__device__ __forceinline__ void for_each_chunk(const Reduction& p, Work work) {
    const long long step = static_cast<long long>(gridDim.x) * (blockDim.x / WARP);
    for (long long index = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
         index < p.rows * p.chunks.number; index += step) {
        long long chunk = index;
        const long long row = p.chunks.divide(chunk);
        work(index, row, chunk);
    }
}

// 1. The maximum of each chunk.
extern "C" __global__ void __launch_bounds__(128, 1)
    chunk_maxima(const __grid_constant__ Reduction p, A* maxima, const void* x) {
    for_each_chunk(p, [&](long long index, long long row, long long chunk) {
        const Reader reader(p, x, p.row_offset<OF_X>(row));
        const long long end = min(p.n, (chunk + 1) * SUM_CHUNK);
        A maximum = lowest<A>();
#pragma unroll 2
        for (long long i = chunk * SUM_CHUNK + lane_id() * THREAD_LANES; i < end; i += SUM_LANES) {
            A v[THREAD_LANES];
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) maximum = larger(maximum, v[j]);
        }
        maximum = max_warp(maximum);
        if (lane_id() == 0) maxima[index] = maximum;
    });
}

// 2. The maximum of each row, by a CTA.
extern "C" __global__ void __launch_bounds__(512, 1) row_maxima(long long chunks, A* maximum, const A* maxima) {
    __shared__ A warp_maximum[WARP];
    const long long row = blockIdx.x;
    A result = lowest<A>();
    for (long long i = threadIdx.x; i < chunks; i += blockDim.x) result = larger(result, maxima[row * chunks + i]);
    result = max_warp(result);
    if (lane_id() == 0) warp_maximum[warp_id()] = result;
    __syncthreads();
    if (warp_id() != 0) return;
    result = max_warp(lane_id() < blockDim.x / WARP ? warp_maximum[lane_id()] : lowest<A>());
    if (lane_id() == 0) maximum[row] = result;
}

// 3. The sum of each chunk's exponentials, and how many of its elements are the maximum.
extern "C" __global__ void __launch_bounds__(128, 1)
    chunk_exponentials(const __grid_constant__ Reduction p, A* sums, unsigned* counts, const A* maximum,
                       const void* x) {
    for_each_chunk(p, [&](long long index, long long row, long long chunk) {
        const Reader reader(p, x, p.row_offset<OF_X>(row));
        const A m = maximum[row];
        unsigned count = 0;
        const A sum = sum_chunk<A, 2>(chunk * SUM_CHUNK, p.n, [&](long long i, A(&v)[THREAD_LANES]) {
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = counted_exponential(v[j], m, p.is_precise(), count);
        });
        count = sum_warp(count);
        if (lane_id() == 0) {
            sums[index] = sum;
            counts[index] = count;
        }
    });
}

// 4. The normaliser of each row, by a CTA. `sums` are the `n` elements of a level of the tree that a CTA can finish.
// Dynamic shared memory: an A per chunk of them.
extern "C" __global__ void __launch_bounds__(512, 1)
    row_normalisers(long long n, long long chunks, long long is_log, A* normaliser, const A* sums,
                    const unsigned* counts) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ unsigned long long total;
    const long long row = blockIdx.x;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    unsigned long long count = 0;
    for (long long i = threadIdx.x; i < chunks; i += blockDim.x) count += counts[row * chunks + i];
    atomicAdd(&total, count);  // of integers: any order gives the same
    const A sum =
        sum_row<A, 2>(n, blockDim.x / WARP, reinterpret_cast<A*>(shared), [&](long long i, A(&v)[THREAD_LANES]) {
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = i + j < n ? sums[row * n + i + j] : A(0);
        });
    __syncthreads();
    if (threadIdx.x == 0) normaliser[row] = softmax_normaliser(static_cast<A>(total), sum, is_log);
}

// 5. The results.
extern "C" __global__ void __launch_bounds__(128, 1)
    write_chunks(const __grid_constant__ Reduction p, void* out, const A* maximum, const A* normaliser, const void* x) {
    for_each_chunk(p, [&](long long index, long long row, long long chunk) {
        const Reader reader(p, x, p.row_offset<OF_X>(row));
        const RowWriter<any_dtype, A> writer(p, out, p.row_offset<OF_OUT>(row));
        const A m = maximum[row], divisor = normaliser[row];
        const long long end = min(p.n, (chunk + 1) * SUM_CHUNK);
#pragma unroll 2
        for (long long i = chunk * SUM_CHUNK + lane_id() * THREAD_LANES; i < end; i += SUM_LANES) {
            A v[THREAD_LANES];
            reader.read(i, lowest<A>(), v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++)
                v[j] = softmax_element(v[j], m, divisor, p.logarithm, p.is_precise());
            writer.write(i, v);
        }
    });
}
