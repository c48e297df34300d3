// The gradient of a norm's weight over few rows of a batch (at most 2 * SUM_LANES), of columns that lie side by side: of
// each column the sum of g * h, h = (x - mean) * rstd, without the mean in rms_norm.
//
// A thread has the columns of one 16-byte vector, or a single column, and some neighbouring lanes of the tree, AT_ONCE
// elements in all. Where little is read, what stands around it decides: a thread reads all of its elements to registers
// before it uses the first, parameters are the few numbers that such a layout has, what is read is brought to the L2
// while the kernel before still runs, and of two threads that fold the same columns each goes on with half of them.
// Where tiles are many (STREAMED), CTAs stay and take tile after tile: a thread copies its elements to shared memory
// (cp.async), where it alone reads them, and at once begins to copy those of the next tile to the same places, so that
// something is always on its way; the statistics, which all tiles share, stay in registers.
//
// OPERATION: a struct below. ELEMENT: the dtype of x and of the gradient; ACCUMULATE: float or double, and the dtype of
// the statistics. COLUMNS: of a thread, those of a vector or 1. AT_ONCE: elements of a thread, of each array. STREAMED:
// see above; columns come in vectors then. THREADS: of a CTA, at most.
#include "async_copy.cuh"
#include "column_vectors.cuh"
#include "overlap.cuh"
#include "reduction.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

constexpr int WIDTH = COLUMNS;
constexpr int VECTOR = 16, ARRAYS = 2;  // bytes; x and the gradient
static_assert(AT_ONCE == 4, "sums of two levels wait");
static_assert(WIDTH * sizeof(X) == VECTOR || (WIDTH == 1 && !STREAMED), "vectors, or single columns");

struct RmsNormWeightBackward {
    static constexpr bool CENTRED = false;
};
struct LayerNormWeightBackward {
    static constexpr bool CENTRED = true;
};
constexpr bool CENTRED = OPERATION::CENTRED;

// The elements of a thread's columns in a row: how they are read, and what they are.
template <bool IS_VECTOR>
struct Elements {
    using Raw = uint4;
    static __device__ __forceinline__ Raw read(const X* from, bool has_vectors) {
        return has_vectors ? *reinterpret_cast<const uint4*>(from) : gathered(from);
    }
    static __device__ __forceinline__ void widen_to(A* v, Raw raw) { unpack(raw, static_cast<X*>(nullptr), v); }
};
template <>
struct Elements<false> {
    using Raw = X;
    static __device__ __forceinline__ Raw read(const X* from, bool) { return *from; }
    static __device__ __forceinline__ void widen_to(A* v, Raw raw) { *v = accumulate<A>(raw); }
};
using Row = Elements<(WIDTH > 1)>;
using Raw = Row::Raw;

struct Array {
    const void* first;
    int step;  // elements from row to row
};
struct Arrays {
    Array x, grad, mean, rstd;
};

// What a thread reads: AT_ONCE elements of its columns, in neighbouring lanes of up to ROUNDS elements each. One that is
// not there is a zero, whose product is +0.
template <int ROUNDS>
struct Part {
    const int left;  // rows from the thread's first one on
    const int x_step, grad_step, mean_step, rstd_step;
    const X *const x, *const grad;  // of column `column`, in the first row
    const A *const mean, *const rstd;
    const bool has_vectors;

    // `group`: of how many threads the lanes are that lie in front; `n`: rows.
    __device__ __forceinline__ Part(const Arrays& arrays, int n, int group, int column)
        : left(n - first(group)),
          x_step(arrays.x.step),
          grad_step(arrays.grad.step),
          mean_step(arrays.mean.step),
          rstd_step(arrays.rstd.step),
          x(static_cast<const X*>(arrays.x.first) + (first(group) * x_step + column)),
          grad(static_cast<const X*>(arrays.grad.first) + (first(group) * grad_step + column)),
          mean(static_cast<const A*>(arrays.mean.first) + first(group) * mean_step),
          rstd(static_cast<const A*>(arrays.rstd.first) + first(group) * rstd_step),
          has_vectors(WIDTH > 1 && is_vector_aligned(x) && is_vector_aligned(grad)) {}

    static __device__ __forceinline__ int first(int group) { return group * (AT_ONCE / ROUNDS); }
    // From the thread's first row to that of its element i.
    static __device__ __forceinline__ int row(int i) { return i / ROUNDS + i % ROUNDS * SUM_LANES; }
    __device__ __forceinline__ bool has(int i) const { return row(i) < left; }

    __device__ __forceinline__ void prefetch() const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (has(i)) {
                prefetch_line(x + row(i) * x_step);
                prefetch_line(grad + row(i) * grad_step);
            }
        }
    }

    __device__ __forceinline__ void read_statistics(A (&m)[AT_ONCE], A (&r)[AT_ONCE]) const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            m[i] = r[i] = 0;
            if (has(i)) {
                if (CENTRED) m[i] = mean[row(i) * mean_step];
                r[i] = rstd[row(i) * rstd_step];
            }
        }
    }

    // Add element i to its lane; sum[w] becomes that of the thread's lanes with the last one.
    static __device__ __forceinline__ void add(int i, Raw raw_x, Raw raw_grad, A m, A r, A (&sum)[WIDTH],
                                               A (&waiting)[2][WIDTH]) {
        if (i % ROUNDS == 0) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) sum[w] = 0;
        }
        A v[WIDTH], g[WIDTH];
        Row::widen_to(v, raw_x);
        Row::widen_to(g, raw_grad);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) sum[w] += g[w] * ((CENTRED ? v[w] - m : v[w]) * r);
        if (i % ROUNDS == ROUNDS - 1) push(i / ROUNDS, sum, waiting);
    }

    // sum[w] becomes that of the thread's lanes, read all at once.
    __device__ __forceinline__ void read_and_sum(A (&sum)[WIDTH]) const {
        prefetch();
        wait_for_predecessors();
        Raw raw_x[AT_ONCE], raw_grad[AT_ONCE];
        A m[AT_ONCE], r[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) raw_x[i] = raw_grad[i] = Raw{};
        const auto read = [&](bool has_vectors) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (has(i)) {
                    raw_x[i] = Row::read(x + row(i) * x_step, has_vectors);
                    raw_grad[i] = Row::read(grad + row(i) * grad_step, has_vectors);
                }
            }
        };
        if (WIDTH == 1 || has_vectors) {
            read(true);
        } else {
            read(false);
        }
        read_statistics(m, r);
        A waiting[2][WIDTH];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) add(i, raw_x[i], raw_grad[i], m[i], r[i], sum, waiting);
    }

    // Begin to copy element i of a vector that lies `right` columns to the right.
    __device__ __forceinline__ void copy(int i, int right, uint4* x_slot, uint4* grad_slot) const {
        if (!has(i)) return;
        const X *const from = x + (row(i) * x_step + right), *const from_grad = grad + (row(i) * grad_step + right);
        if (has_vectors) {
            copy_vector_async(shared_address(x_slot), from);
            copy_vector_async(shared_address(grad_slot), from_grad);
        } else {
            *x_slot = gathered(from);
            *grad_slot = gathered(from_grad);
        }
    }
};

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

// Write the sums of a tile's columns, from column `first_of_tile` on; `sum`: those of this thread's lanes, from column
// `left` of the tile on. `bits`: the logarithm of the threads side by side; `sums`: shared memory for those of every warp.
__device__ __forceinline__ void fold_tile(A (&sum)[WIDTH], int left, int bits, int first_of_tile, int columns, A* sums,
                                          void* out, int out_dtype) {
    const int tile = WIDTH << bits, warps = blockDim.x / WARP;
    int first = left;
    const int count = fold_threads<WIDTH>(sum, 1 << bits, first);
    // Of threads that have the same sums, the first.
    const bool is_first = tile >= WARP || (lane_id() & (WARP - tile)) == 0;
    if (warps == 1) {
#pragma unroll
        for (int w = 0; w < WIDTH; w++)
            if (w < count && is_first && first_of_tile + left < columns)
                store(out, first_of_tile + first + w, out_dtype, sum[w]);
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

// Sum tile after tile. `shared` has room for two vectors of each element of a thread, and for two tiles' sums of the
// warps: one's may be read while the next one's are written, and a barrier lies between every second.
template <int ROUNDS>
__device__ __forceinline__ void stream(const Arrays& arrays, int n, int columns, int bits, int out_dtype, void* out,
                                       unsigned char* shared) {
    const int tile = WIDTH << bits, tiles = (columns - 1) / tile + 1, threads = blockDim.x;
    const int left = (threadIdx.x & ((1 << bits) - 1)) * WIDTH;
    // A vector behind the last column is read as the last one is, and not written.
    const auto column_of = [&](int number) { return min(number * tile + left, columns - WIDTH); };
    const int first_column = column_of(blockIdx.x);
    const Part<ROUNDS> part(arrays, n, threadIdx.x >> bits, first_column);
    uint4* const slots = reinterpret_cast<uint4*>(shared) + threadIdx.x;
    A* sums = reinterpret_cast<A*>(shared + ARRAYS * AT_ONCE * threads * VECTOR);
    A* other_sums = sums + threads / WARP * tile;
    const auto copy = [&](int i, int right) {
        part.copy(i, right, slots + ARRAYS * i * threads, slots + (ARRAYS * i + 1) * threads);
        commit_copies();
    };
    part.prefetch();
    wait_for_predecessors();
#pragma unroll
    for (int i = 0; i < ARRAYS * AT_ONCE; i++)
        if (!part.has(i / ARRAYS)) slots[i * threads] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) copy(i, 0);
    A m[AT_ONCE], r[AT_ONCE];
    part.read_statistics(m, r);
#pragma unroll 1
    for (int number = blockIdx.x; number < tiles;) {
        const int next = number + static_cast<int>(gridDim.x);
        const bool goes_on = next < tiles;
        const int right = goes_on ? column_of(next) - first_column : 0;
        if (!goes_on) launch_dependents();  // they wait for this kernel's end
        A sum[WIDTH], waiting[2][WIDTH];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            wait_for_copies<AT_ONCE - 1>();
            const uint4 raw_x = slots[ARRAYS * i * threads], raw_grad = slots[(ARRAYS * i + 1) * threads];
            if (goes_on) {
                copy(i, right);
            } else {
                commit_copies();
            }
            part.add(i, raw_x, raw_grad, m[i], r[i], sum, waiting);
        }
        fold_tile(sum, left, bits, number * tile, columns, sums, out, out_dtype);
        A* const others = other_sums;
        other_sums = sums;
        sums = others;
        number = next;
    }
}

// Steps: elements from row to row. `n`: rows; `bits`: the logarithm of the threads of a CTA side by side, at most WARP.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_weight_tiles(int x_step, int grad_step, int mean_step, int rstd_step, int n, int columns, int bits,
                     int out_dtype, void* out, const void* x, const void* grad, const void* mean, const void* rstd) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Arrays arrays{{x, x_step}, {grad, grad_step}, {mean, mean_step}, {rstd, rstd_step}};
    if constexpr (STREAMED) {
        if (n <= SUM_LANES) {
            stream<1>(arrays, n, columns, bits, out_dtype, out, shared);
        } else {
            stream<2>(arrays, n, columns, bits, out_dtype, out, shared);
        }
    } else {
        launch_dependents();  // they wait for this kernel's end
        const int first_of_tile = blockIdx.x * (WIDTH << bits);
        const int left = (threadIdx.x & ((1 << bits) - 1)) * WIDTH, group = threadIdx.x >> bits;
        const int rows = first_of_tile + left < columns ? n : 0, column = min(first_of_tile + left, columns - WIDTH);
        A sum[WIDTH];
        if (n <= SUM_LANES) {
            Part<1>(arrays, rows, group, column).read_and_sum(sum);
        } else {
            Part<2>(arrays, rows, group, column).read_and_sum(sum);
        }
        fold_tile(sum, left, bits, first_of_tile, columns, reinterpret_cast<A*>(shared), out, out_dtype);
    }
}
