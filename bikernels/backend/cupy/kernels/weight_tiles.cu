// The gradient of a norm's weight over few rows of a batch (at most 2 * SUM_LANES), of columns that lie side by side in
// whole 16-byte vectors: of each column the sum of g * h, h = (x - mean) * rstd, without the mean in rms_norm.
//
// A thread has the columns of one vector and some neighbouring lanes of the tree, AT_ONCE elements in all, and reads all
// of them before it uses the first. So little is read that what stands around it decides: parameters are the few numbers
// that such a layout has, what is read is brought to the L2 while the kernel before still runs, and of two threads that
// fold the same columns each goes on with half of them.
//
// OPERATION: a struct below. ELEMENT: the dtype of x and of the gradient; ACCUMULATE: float or double, and the dtype of
// the statistics. AT_ONCE: elements of a thread, of each array. THREADS: of a CTA, at most.
#include "column_vectors.cuh"
#include "overlap.cuh"
#include "reduction.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

constexpr int WIDTH = 16 / sizeof(X);  // columns of a thread
static_assert(AT_ONCE == 4, "sums of two levels wait");

struct Array {
    const void* first;
    int step;  // elements from row to row
};
struct Arrays {
    Array x, grad, mean, rstd;
};

template <bool CENTRED>
struct WeightBackward {
    // sum[w] becomes that of the thread's lanes, each of up to ROUNDS elements; its columns begin at `column`. `group`: of
    // how many threads the lanes are that lie in front; `n`: rows. One that is not there reads as zeros, whose product is
    // +0.
    template <int ROUNDS>
    static __device__ __forceinline__ void sum_lanes(const Arrays& arrays, int n, int group, int column,
                                                     A (&sum)[WIDTH]) {
        constexpr int LANES = AT_ONCE / ROUNDS;
        const int begin = group * LANES, left = n - begin;
        const int x_step = arrays.x.step, grad_step = arrays.grad.step;
        const int mean_step = arrays.mean.step, rstd_step = arrays.rstd.step;
        const X* const x = static_cast<const X*>(arrays.x.first) + (begin * x_step + column);
        const X* const grad = static_cast<const X*>(arrays.grad.first) + (begin * grad_step + column);
        const A* const mean = static_cast<const A*>(arrays.mean.first) + begin * mean_step;
        const A* const rstd = static_cast<const A*>(arrays.rstd.first) + begin * rstd_step;
        const bool has_vectors = is_vector_aligned(x) && is_vector_aligned(grad);
        const auto row = [](int i) { return i / ROUNDS + i % ROUNDS * SUM_LANES; };
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (row(i) < left) {
                prefetch_line(x + row(i) * x_step);
                prefetch_line(grad + row(i) * grad_step);
            }
        }
        wait_for_predecessors();

        uint4 raw_x[AT_ONCE], raw_grad[AT_ONCE];
        A m[AT_ONCE], r[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            raw_x[i] = raw_grad[i] = make_uint4(0, 0, 0, 0);
            m[i] = r[i] = 0;
        }
        if (has_vectors) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (row(i) < left) {
                    raw_x[i] = *reinterpret_cast<const uint4*>(x + row(i) * x_step);
                    raw_grad[i] = *reinterpret_cast<const uint4*>(grad + row(i) * grad_step);
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (row(i) < left) {
                    raw_x[i] = gathered(x + row(i) * x_step);
                    raw_grad[i] = gathered(grad + row(i) * grad_step);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (row(i) < left) {
                if (CENTRED) m[i] = mean[row(i) * mean_step];
                r[i] = rstd[row(i) * rstd_step];
            }
        }
        A waiting[2][WIDTH];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (i % ROUNDS == 0) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) sum[w] = 0;
            }
            A v[WIDTH], g[WIDTH];
            unpack(raw_x[i], static_cast<X*>(nullptr), v);
            unpack(raw_grad[i], static_cast<X*>(nullptr), g);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) sum[w] += g[w] * ((CENTRED ? v[w] - m[i] : v[w]) * r[i]);
            if (i % ROUNDS == ROUNDS - 1) push(i / ROUNDS, sum, waiting);
        }
    }
};

using RmsNormWeightBackward = WeightBackward<false>;
using LayerNormWeightBackward = WeightBackward<true>;

// Fold, as neighbours, the sums of the threads of a warp that have the same columns: those that differ in `mask` and the
// bits above. As long as a thread has several columns, it keeps half of them, and who it folds with the others. Returns
// how many it has then: sum[0], ..., from column `first` on.
template <int COUNT>
__device__ __forceinline__ int fold_threads(A (&sum)[WIDTH], int mask, int& first) {
    if constexpr (COUNT == 1) {
#pragma unroll 1
        for (; mask < WARP; mask *= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], mask);
        return 1;
    } else {
        constexpr int HALF = COUNT / 2;
        if (mask >= WARP) return COUNT;
        const bool is_upper = lane_id() & mask;
#pragma unroll
        for (int w = 0; w < HALF; w++) {
            const A other = __shfl_xor_sync(~0u, is_upper ? sum[w] : sum[w + HALF], mask);
            sum[w] = (is_upper ? sum[w + HALF] : sum[w]) + other;
        }
        if (is_upper) first += HALF;
        return fold_threads<HALF>(sum, 2 * mask, first);
    }
}

// The sum of `count` neighbours, at most eight, that lie `apart`.
__device__ __forceinline__ A fold_eight(const A* from, int count, int apart) {
    A of[THREAD_LANES];
#pragma unroll
    for (int i = 0; i < THREAD_LANES; i++) of[i] = i < count ? from[i * apart] : A(0);
    return fold_thread_lanes(of);
}

// Steps: elements from row to row. `n`: rows; `bits`: the logarithm of the vectors of a CTA, at most WARP.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_weight_tiles(int x_step, int grad_step, int mean_step, int rstd_step, int n, int columns, int bits,
                     int out_dtype, void* out, const void* x, const void* grad, const void* mean, const void* rstd) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* const sums = reinterpret_cast<A*>(shared);  // of every warp
    launch_dependents();                           // they wait for this kernel's end
    const int tile = WIDTH << bits, first_of_tile = blockIdx.x * tile;
    const int left = (threadIdx.x & ((1 << bits) - 1)) * WIDTH, group = threadIdx.x >> bits;
    const bool is_present = first_of_tile + left < columns;  // with all its columns
    const Arrays arrays{{x, x_step}, {grad, grad_step}, {mean, mean_step}, {rstd, rstd_step}};
    const int rows = is_present ? n : 0, column = min(first_of_tile + left, columns - WIDTH);
    A sum[WIDTH];
    if (n <= SUM_LANES) {
        OPERATION::sum_lanes<1>(arrays, rows, group, column, sum);
    } else {
        OPERATION::sum_lanes<2>(arrays, rows, group, column, sum);
    }
    int first = left;
    const int count = fold_threads<WIDTH>(sum, 1 << bits, first);
    // Of threads that have the same sums, the first.
    const bool is_first = tile >= WARP || (lane_id() & (WARP - tile)) == 0;
    const int warps = blockDim.x / WARP;
    if (warps == 1) {
#pragma unroll
        for (int w = 0; w < WIDTH; w++)
            if (w < count && is_first && is_present) store(out, first_of_tile + first + w, out_dtype, sum[w]);
        return;
    }
#pragma unroll
    for (int w = 0; w < WIDTH; w++)
        if (w < count && is_first) sums[warp_id() * tile + first + w] = sum[w];
    __syncthreads();
    for (int at = threadIdx.x; at < tile && first_of_tile + at < columns; at += blockDim.x) {
        A folded = fold_eight(sums + at, warps, tile);
        if (warps > 8) folded += fold_eight(sums + 8 * tile + at, warps - 8, tile);
        if (warps > 16) {
            const A next = fold_eight(sums + 16 * tile + at, warps - 16, tile);
            folded += next + fold_eight(sums + 24 * tile + at, warps - 24, tile);
        }
        store(out, first_of_tile + at, out_dtype, folded);
    }
}
