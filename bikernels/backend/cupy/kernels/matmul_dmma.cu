// Matrix products of float64 on tensor cores (sm_80 on). What an instruction computes of its steps of k is the
// contract's chain: acc = fma(a_k, b_k, acc) for k in order, every step correctly rounded.
//
// TILE_M, TILE_N, TILE_K: of a CTA. WARPS_M, WARPS_N: how its warps divide it. STAGES: tiles of K in shared memory.
// CTAS: that a multiprocessor should hold. A_K_CONTIGUOUS, B_K_CONTIGUOUS: how an operand lies in shared memory; in
// global memory it may lie in any way. MMA_K: 8 or 16.
#include "matmul_tile.cuh"

constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int BLOCKS_M = WARP_M / 16, BLOCKS_N = WARP_N / 8;  // accumulators of a warp, 16 x 8
constexpr int GROUPS = TILE_K / MMA_K;                        // instructions along k of a step

static_assert(WARP_M % 16 == 0 && WARP_N % 8 == 0 && TILE_K % MMA_K == 0);
static_assert(GROUPS % 2 == 0, "fragments alternate between two buffers");
static_assert(STAGES >= 2, "copies go to the stage of the step before");

// Lines are padded by 32 bytes: the 4 x 4 elements that half a warp reads at once then lie in different banks.
using LayoutA = TileLayout<TILE_M, TILE_K, A_K_CONTIGUOUS, 4>;
using LayoutB = TileLayout<TILE_N, TILE_K, B_K_CONTIGUOUS, 4>;
constexpr int STAGE_ELEMENTS = LayoutA::ELEMENTS + LayoutB::ELEMENTS;

// The parts of a 16 x MMA_K block of a and of an MMA_K x 8 block of b that a thread holds: of row lane / 4 (and of a,
// the eighth below it), every fourth element along k from lane % 4 on.
constexpr int PARTS_A = MMA_K / 2, PARTS_B = MMA_K / 4;

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mma(double (&acc)[4], const double (&a)[4], const double (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(acc[0]), "+d"(acc[1]), "+d"(acc[2]), "+d"(acc[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
}

__device__ __forceinline__ void mma(double (&acc)[4], const double (&a)[8], const double (&b)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
        "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
        : "+d"(acc[0]), "+d"(acc[1]), "+d"(acc[2]), "+d"(acc[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b[0]), "d"(b[1]),
          "d"(b[2]), "d"(b[3]));
}
#else
__device__ __forceinline__ void mma(double (&acc)[4], const double (&a)[PARTS_A], const double (&b)[PARTS_B]) {
#pragma unroll
    for (int part = 0; part < PARTS_A; part++)
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(acc[part % 2 * 2]), "+d"(acc[part % 2 * 2 + 1])
                     : "d"(a[part]), "d"(b[part / 2]));
}
#endif

// Accumulators that do not leave in pairs pass through shared memory.
constexpr int OUT_PITCH = TILE_N + 2;
static_assert(TILE_M * OUT_PITCH <= STAGES * STAGE_ELEMENTS);

// Dynamic shared memory: STAGES times (a tile of a, a tile of b).
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    matmul_dmma(const __grid_constant__ Matmul p, void* out, const void* c, const double* a_all, const double* b_all,
                double alpha, double beta) {
    extern __shared__ __align__(128) unsigned char shared[];
    const unsigned shared_base = shared_address(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, column = lane % 4;
    const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    const double* ring = reinterpret_cast<const double*>(shared);
    const double* thread_a = ring + LayoutA::offset(warp_m + line, column);
    const double* thread_b = ring + LayoutA::ELEMENTS + LayoutB::offset(warp_n + line, column);
    const int steps = static_cast<int>((p.k + TILE_K - 1) / TILE_K);

    for (long long index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const TilePosition tile = tile_position<TILE_M, TILE_N>(p, index);
        TileSource<double, LayoutA, THREADS> a(a_all + tile.a, p.a_stride, p.a_along_k, tile.m, p.m);
        TileSource<double, LayoutB, THREADS> b(b_all + tile.b, p.b_stride, p.b_along_k, tile.n, p.n);
        // Every step commits one group of copies, past the end an empty one, so that waiting counts the same
        // throughout.
        auto copy = [&](int step, int stage) {
            if (step < steps) {
                const int k_left = left_of(static_cast<long long>(step) * TILE_K, p.k, TILE_K);
                const unsigned to = shared_base + stage * STAGE_ELEMENTS * static_cast<int>(sizeof(double));
                a.copy(to, k_left);
                b.copy(to + LayoutA::ELEMENTS * static_cast<int>(sizeof(double)), k_left);
            }
            commit_copies();
        };
        auto next_of = [](int stage) { return stage + 1 == STAGES ? 0 : stage + 1; };

        double acc[BLOCKS_M][BLOCKS_N][4] = {};
        double a_part[2][BLOCKS_M][PARTS_A], b_part[2][BLOCKS_N][PARTS_B];
        auto load = [&](int buffer, int stage, int group) {
            const double *from_a = thread_a + stage * STAGE_ELEMENTS, *from_b = thread_b + stage * STAGE_ELEMENTS;
#pragma unroll
            for (int i = 0; i < BLOCKS_M; i++) {
#pragma unroll
                for (int part = 0; part < PARTS_A; part++)
                    a_part[buffer][i][part] =
                        from_a[LayoutA::offset(i * 16 + part % 2 * 8, group * MMA_K + part / 2 * 4)];
            }
#pragma unroll
            for (int j = 0; j < BLOCKS_N; j++) {
#pragma unroll
                for (int part = 0; part < PARTS_B; part++)
                    b_part[buffer][j][part] = from_b[LayoutB::offset(j * 8, group * MMA_K + part * 4)];
            }
        };
        auto arrive = [] {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
        };

#pragma unroll 1
        for (int step = 0; step < STAGES - 1; step++) copy(step, step);
        arrive();
        load(0, 0, 0);

        int stage = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            copy(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);  // all warps are done with the step before
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                if (group == GROUPS - 1) {
                    arrive();
                    stage = next_of(stage);
                }
                load((group + 1) % 2, stage, (group + 1) % GROUPS);
#pragma unroll
                for (int i = 0; i < BLOCKS_M; i++) {
#pragma unroll
                    for (int j = 0; j < BLOCKS_N; j++) mma(acc[i][j], a_part[group % 2][i], b_part[group % 2][j]);
                }
            }
        }
        wait_for_copies<0>();
        __syncthreads();  // all warps are done with the stages

        const Epilogue<double> epilogue{p, out, c, alpha, beta};
        double* matrix = static_cast<double*>(out) + tile.out;
        if (p.addend == 0 && p.out_stride[1] == 1 && p.out_stride[0] % 2 == 0 && is_vector_aligned(matrix)) {
            // Pairs along n, straight from the accumulators: four threads fill whole sectors.
#pragma unroll
            for (int i = 0; i < BLOCKS_M; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const long long m = tile.m + warp_m + i * 16 + half * 8 + line;
#pragma unroll
                    for (int j = 0; j < BLOCKS_N; j++) {
                        const long long n = tile.n + warp_n + j * 8 + column * 2;
                        double x = acc[i][j][2 * half] + 0.0, y = acc[i][j][2 * half + 1] + 0.0;
                        if (alpha != 1) x = alpha * x, y = alpha * y;
                        const unsigned long long x_bits = to_float64_bits(x), y_bits = to_float64_bits(y);
                        unsigned long long* to =
                            reinterpret_cast<unsigned long long*>(matrix) + m * p.out_stride[0] + n;
                        if (m >= p.m) continue;
                        if (n + 1 < p.n) *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(x_bits, y_bits);
                        if (n + 1 == p.n) *to = x_bits;
                    }
                }
            }
        } else {
            double* staged = reinterpret_cast<double*>(shared);
#pragma unroll
            for (int i = 0; i < BLOCKS_M; i++) {
#pragma unroll
                for (int j = 0; j < BLOCKS_N; j++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int m = warp_m + i * 16 + half * 8 + line, n = warp_n + j * 8 + column * 2;
                        *reinterpret_cast<double2*>(staged + m * OUT_PITCH + n) =
                            make_double2(acc[i][j][2 * half] + 0.0, acc[i][j][2 * half + 1] + 0.0);
                    }
                }
            }
            __syncthreads();
            const bool along_n = llabs(p.out_stride[1]) <= llabs(p.out_stride[0]);
            const int m_left = left_of(tile.m, p.m, TILE_M), n_left = left_of(tile.n, p.n, TILE_N);
#pragma unroll 4
            for (int i = threadIdx.x; i < TILE_M * TILE_N; i += THREADS) {
                const int m = along_n ? i / TILE_N : i % TILE_M, n = along_n ? i % TILE_N : i / TILE_M;
                if (m < m_left && n < n_left) epilogue.write(tile, tile.m + m, tile.n + n, staged[m * OUT_PITCH + n]);
            }
            __syncthreads();  // shared memory is free for the next tile
        }
    }
}
