// Matrix products by fused multiply-adds: one chain per output element, k = 0, 1, …, K-1, every step correctly rounded.
//
// ELEMENT: the operands' dtype; ACCUMULATE: float or double. TILE_M, TILE_N, TILE_K: of a CTA. THREAD_M, THREAD_N:
// output elements of a thread. CTAS: that a multiprocessor should hold. A_ALONG_K, B_ALONG_K: the direction in which an
// operand is read; it may lie in any way. Two tiles of K are kept in shared memory, widened and with lines along m (or
// n), so that the factors of one step lie in registers of both banks; the next one travels through registers, where
// operands that lie along k are transposed.
#include "matmul.cuh"

using A = ACCUMULATE;
constexpr int LANES_M = 8, LANES_N = 4;  // a warp's threads
constexpr int WARP_M = LANES_M * THREAD_M, WARP_N = LANES_N * THREAD_N;
constexpr int WARPS_N = TILE_N / WARP_N;
constexpr int THREADS = TILE_M / WARP_M * WARPS_N * 32;
constexpr int RUN = 16 / sizeof(A);           // accumulate-dtype elements in 16 bytes
constexpr int VECTOR = 16 / sizeof(ELEMENT);  // elements in 16 bytes

static_assert(TILE_M % WARP_M == 0 && TILE_N % WARP_N == 0 && TILE_K % 2 == 0);

struct alignas(16) Run {
    A element[RUN];
};

// Where an element of an MN x TILE_K tile lies in shared memory. Neighbours along m (or n) stay together in blocks of
// BLOCK, which are exchanged from one run of steps to the next: then threads that hold vectors along k, of several rows
// and several runs, write to different banks.
template <int MN>
struct Swizzled {
    static constexpr int RUNS = TILE_K / RUN, BLOCK = RUNS >= 32 / RUN ? RUN : 32 / RUNS;
    static_assert(MN % (BLOCK * RUNS) == 0);
    static __device__ __forceinline__ constexpr int exchange(int k) { return k / RUN * BLOCK; }
    static __device__ __forceinline__ constexpr int offset(int mn, int k) { return k * MN + (mn ^ exchange(k)); }
};

// The tiles of one operand, and a thread's part of the next one in registers: vectors along k, or along m (or n).
template <int MN, bool ALONG_K>
struct Operand {
    static constexpr int LINE = (ALONG_K ? TILE_K : MN) / VECTOR;  // vectors
    static constexpr int STEP = THREADS / LINE;                    // lines from one pass to the next
    static constexpr int PASSES = MN * TILE_K / VECTOR / THREADS;
    static_assert((ALONG_K ? TILE_K : MN) % VECTOR == 0 && THREADS % LINE == 0);
    static_assert(PASSES * VECTOR * THREADS == MN * TILE_K);

    const ELEMENT* source;  // of the thread's first vector of the next tile
    const long long (&stride)[2];
    int mn_left;  // of the tile
    bool whole;   // only k may end within the tile, and vectors are aligned
    uint4 raw[PASSES];

    __device__ __forceinline__ Operand(const ELEMENT* matrix, const long long (&stride)[2], long long tile,
                                       long long mn_end)
        : source(matrix + (tile + first_mn()) * stride[0] + first_k() * stride[1]),
          stride(stride),
          mn_left(left_of(tile, mn_end, MN)) {
        whole = mn_left == MN && stride[ALONG_K ? 1 : 0] == 1 && stride[ALONG_K ? 0 : 1] % VECTOR == 0 &&
                is_vector_aligned(matrix);
    }

    // Global memory to registers, zeros outside the operand.
    __device__ __forceinline__ void load(int k_left) {
        const long long step = STEP * stride[ALONG_K ? 0 : 1];
        const ELEMENT* address = source;
        if (__builtin_expect(whole && k_left == TILE_K, 1)) {
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++, address += step)
                raw[pass] = *reinterpret_cast<const uint4*>(address);
        } else {
            const int mn = mn_left - first_mn(), k = k_left - first_k();
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++, address += step) {
                const int vector_left = ALONG_K ? k : mn, lines_left = (ALONG_K ? mn : k) - pass * STEP;
                unsigned word[4] = {0, 0, 0, 0};
#pragma unroll
                for (int i = 0; i < VECTOR; i++) {
                    if (i < vector_left && lines_left > 0) put(word, i, address[i * stride[ALONG_K ? 1 : 0]]);
                }
                raw[pass] = make_uint4(word[0], word[1], word[2], word[3]);
            }
        }
        source += TILE_K * stride[1];
    }

    // Registers to shared memory.
    __device__ __forceinline__ void store(A* tile) const {
        using Place = Swizzled<MN>;
        const int mn = first_mn(), k = first_k();
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            A value[VECTOR];
            unpack(raw[pass], static_cast<ELEMENT*>(nullptr), value);
#pragma unroll
            for (int run = 0; run < VECTOR; run += RUN) {
                if constexpr (ALONG_K) {
                    static_assert(PASSES == 1 || STEP % (Place::BLOCK * Place::RUNS) == 0);
                    A* to = tile + Place::offset(mn, k + run) + pass * STEP;
#pragma unroll
                    for (int i = 0; i < RUN; i++) to[i * MN] = value[run + i];
                } else {
                    Run neighbours;
#pragma unroll
                    for (int i = 0; i < RUN; i++) neighbours.element[i] = value[run + i];
                    *reinterpret_cast<Run*>(tile + Place::offset(mn + run, k + pass * STEP)) = neighbours;
                }
            }
        }
    }

  private:
    static __device__ __forceinline__ int first_mn() {
        return ALONG_K ? threadIdx.x / LINE : threadIdx.x % LINE * VECTOR;
    }
    static __device__ __forceinline__ int first_k() {
        return ALONG_K ? threadIdx.x % LINE * VECTOR : threadIdx.x / LINE;
    }

    // Element i of a vector of zeros.
    template <class X>
    static __device__ __forceinline__ void put(unsigned (&word)[4], int i, X x) {
        if constexpr (sizeof(X) == 2) {
            word[i / 2] |= static_cast<unsigned>(x.bits) << i % 2 * 16;
        } else {
            memcpy(&word[i * sizeof(X) / 4], &x, sizeof(X));
        }
    }
};

using OperandA = Operand<TILE_M, A_ALONG_K>;
using OperandB = Operand<TILE_N, B_ALONG_K>;

// A thread's COUNT rows (or columns): runs of 16 bytes, spread over the warp's share so that a warp reads whole lines.
template <int COUNT, int LANES>
struct Share {
    static_assert(COUNT % RUN == 0);
    static __device__ __forceinline__ constexpr int position(int lane, int i) {
        return i / RUN * (LANES * RUN) + lane * RUN + i % RUN;
    }
};
using ShareM = Share<THREAD_M, LANES_M>;
using ShareN = Share<THREAD_N, LANES_N>;

// The factors of one step, from the tile's line of that step. `first` is the thread's first row, of which the bits that
// tell its runs apart are zero; `exchange` is known to the compiler.
template <int COUNT, int LANES>
__device__ __forceinline__ void load_factors(A (&factor)[COUNT], const A* line, int first, int exchange) {
    constexpr int STEP = LANES * RUN, RUNS = COUNT / RUN, RUN_BITS = (RUNS - 1) * STEP;
    static_assert((RUNS & (RUNS - 1)) == 0);
    const A* base = line + (first ^ (exchange & ~RUN_BITS));
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        const Run neighbours = *reinterpret_cast<const Run*>(base + (run * STEP ^ (exchange & RUN_BITS)));
#pragma unroll
        for (int i = 0; i < RUN; i++) factor[run * RUN + i] = neighbours.element[i];
    }
}

constexpr int STAGE_ELEMENTS = (TILE_M + TILE_N) * TILE_K;

// Accumulators pass through shared memory on their way out, OUT_COUNT rows of every thread at a time.
constexpr int OUT_PITCH = TILE_N + RUN;
__device__ constexpr int rows_that_fit(int count) {
    return TILE_M / THREAD_M * count * OUT_PITCH <= 2 * STAGE_ELEMENTS ? count : rows_that_fit(count / 2);
}
constexpr int OUT_COUNT = rows_that_fit(THREAD_M);
constexpr int OUT_ROWS = TILE_M / THREAD_M * OUT_COUNT;
static_assert(OUT_COUNT >= 1);

// Dynamic shared memory: twice (a tile of a, a tile of b).
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    matmul_fma(const __grid_constant__ Matmul p, void* out, const void* c, const ELEMENT* a_all, const ELEMENT* b_all,
               A alpha, A beta) {
    extern __shared__ __align__(128) unsigned char shared[];
    A* const tiles = reinterpret_cast<A*>(shared);
    // Half a warp's loads of 16 bytes are one access if neighbours, or next neighbours, read the same: threads side by
    // side along n differ in bits 0 and 4 of their numbers, those along m in the others.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_n = lane % 2 + lane / 16 * 2, lane_m = lane / 2 % 8;
    const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    const int first_m = warp_m + ShareM::position(lane_m, 0), first_n = warp_n + ShareN::position(lane_n, 0);

    for (long long index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const TilePosition tile = tile_position<TILE_M, TILE_N>(p, index);
        OperandA a(a_all + tile.a, p.a_stride, tile.m, p.m);
        OperandB b(b_all + tile.b, p.b_stride, tile.n, p.n);
        auto load = [&](long long k) {
            const int k_left = left_of(k, p.k, TILE_K);
            if (k_left > 0) {
                a.load(k_left);
                b.load(k_left);
            }
        };
        auto store = [&](int stage) {
            a.store(tiles + stage * STAGE_ELEMENTS);
            b.store(tiles + stage * STAGE_ELEMENTS + TILE_M * TILE_K);
        };

        A acc[THREAD_M][THREAD_N] = {};
        A factor_a[2][THREAD_M], factor_b[2][THREAD_N];
        auto load_step = [&](int stage, int k) {
            const A* line = tiles + stage * STAGE_ELEMENTS;
            load_factors<THREAD_M, LANES_M>(factor_a[k % 2], line + k * TILE_M, first_m,
                                            Swizzled<TILE_M>::exchange(k));
            load_factors<THREAD_N, LANES_N>(factor_b[k % 2], line + TILE_M * TILE_K + k * TILE_N, first_n,
                                            Swizzled<TILE_N>::exchange(k));
        };

        if (p.k > 0) {
            load(0);
            store(0);
            load(TILE_K);
            __syncthreads();
            load_step(0, 0);
        }
        // Past the end both operands are zero: fma(0, 0, acc) is acc, or +0 for an acc of -0, which ends as +0 anyway.
        int stage = 0;
#pragma unroll 1
        for (long long first = 0; first < p.k; first += TILE_K) {
#pragma unroll
            for (int k = 0; k < TILE_K; k++) {
                if (k == TILE_K - 2) store(stage ^ 1);  // last read before the last barrier
                if (k == TILE_K - 1) {
                    __syncthreads();
                    stage ^= 1;
                    load(first + 2 * TILE_K);
                }
                load_step(stage, (k + 1) % TILE_K);
                // To and fro, so that one of two factors stays.
#pragma unroll
                for (int i = 0; i < THREAD_M; i++) {
#pragma unroll
                    for (int there = 0; there < THREAD_N; there++) {
                        const int j = i % 2 == 0 ? there : THREAD_N - 1 - there;
                        acc[i][j] = fused(factor_a[k % 2][i], factor_b[k % 2][j], acc[i][j]);
                    }
                }
            }
        }
        __syncthreads();  // all threads are done with the tiles

        const Epilogue<A> epilogue{p, out, c, alpha, beta};
        const bool along_n = llabs(p.out_stride[1]) <= llabs(p.out_stride[0]);
        const int n_left = left_of(tile.n, p.n, TILE_N);
#pragma unroll
        for (int row = 0; row < THREAD_M; row += OUT_COUNT) {
            const int thread_row = (warp / WARPS_N * LANES_M + lane_m) * OUT_COUNT;
#pragma unroll
            for (int i = 0; i < OUT_COUNT; i++) {
#pragma unroll
                for (int j = 0; j < THREAD_N; j++)
                    tiles[(thread_row + i) * OUT_PITCH + warp_n + ShareN::position(lane_n, j)] = acc[row + i][j] + A(0);
            }
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < OUT_ROWS * TILE_N; i += THREADS) {
                const int line = along_n ? i / TILE_N : i % OUT_ROWS, n = along_n ? i % TILE_N : i / OUT_ROWS;
                const int thread = line / OUT_COUNT;
                const long long m =
                    tile.m + thread / LANES_M * WARP_M + ShareM::position(thread % LANES_M, row + line % OUT_COUNT);
                if (m < p.m && n < n_left) epilogue.write(tile, m, tile.n + n, tiles[line * OUT_PITCH + n]);
            }
            __syncthreads();
        }
    }
}
