// Matrix products by fused multiply-adds with few columns: one chain per output element, k = 0, 1, …, K-1, every step
// correctly rounded (sm_80 on). Here the time goes into reading a, so what counts is how much of it is on its way.
//
// ELEMENT: the operands' dtype; ACCUMULATE: float or double. TILE_M, TILE_N, TILE_K: of a CTA. THREAD_M, THREAD_N:
// output elements of a thread. LANES_N: how many of the 32 threads of a warp lie side by side along n. STAGES: tiles of
// K in shared memory. BATCH: groups of GROUP steps of k whose factors a thread loads at once, a batch ahead of their
// use. A_K_CONTIGUOUS: how a lies in shared memory (b lies along k); in global memory both may lie in any way.
#include "matmul_tile.cuh"
#include "overlap.cuh"

using A = ACCUMULATE;
constexpr int LANES_M = 32 / LANES_N;
constexpr int WARP_M = LANES_M * THREAD_M, WARP_N = LANES_N * THREAD_N;
constexpr int WARPS_N = TILE_N / WARP_N;
constexpr int THREADS = TILE_M / WARP_M * WARPS_N * 32;
constexpr int GROUP = 16 / sizeof(ELEMENT);  // elements in 16 bytes
constexpr int BATCHES = TILE_K / (GROUP * BATCH);

static_assert(TILE_M % WARP_M == 0 && TILE_N % WARP_N == 0);
static_assert(LANES_N == 1 || LANES_N == 2 || LANES_N == 4);
static_assert(TILE_K % (GROUP * BATCH) == 0 && BATCHES % 2 == 0, "factors alternate between two buffers");
static_assert(STAGES >= 3, "copies go to the stage of the step before");

using LayoutA = TileLayout<TILE_M, TILE_K, A_K_CONTIGUOUS, A_K_CONTIGUOUS ? GROUP : 0>;
using LayoutB = TileLayout<TILE_N, TILE_K, true, GROUP>;
constexpr int STAGE_ELEMENTS = LayoutA::ELEMENTS + LayoutB::ELEMENTS;

// A thread's COUNT rows (or columns) of a warp's share, of which LANES lie side by side: how they are spread so that a
// warp reads shared memory without conflicts, and the load of a batch of them.
template <class Layout, int COUNT, int LANES>
struct Fragment {
    static constexpr int RUN = Layout::K_CONTIGUOUS ? 1 : COUNT < GROUP ? COUNT : GROUP;
    static_assert(COUNT % RUN == 0);
    ELEMENT element[BATCH * GROUP][COUNT];

    static __device__ __forceinline__ constexpr int position(int lane, int i) {
        return i / RUN * (LANES * RUN) + lane * RUN + i % RUN;
    }

    // `tile` is the address of the thread's first row.
    __device__ __forceinline__ void load(const ELEMENT* tile, int batch) {
        struct alignas(16) Steps {
            ELEMENT element[GROUP];
        };
        struct alignas(RUN * sizeof(ELEMENT)) Neighbours {
            ELEMENT element[RUN];
        };
#pragma unroll
        for (int i = 0; i < COUNT; i += RUN) {
            const ELEMENT* from = tile + Layout::offset(i * LANES, batch * BATCH * GROUP);
            if constexpr (Layout::K_CONTIGUOUS) {
#pragma unroll
                for (int group = 0; group < BATCH; group++) {
                    const Steps steps = reinterpret_cast<const Steps*>(from)[group];
#pragma unroll
                    for (int k = 0; k < GROUP; k++) element[group * GROUP + k][i] = steps.element[k];
                }
            } else {
#pragma unroll
                for (int k = 0; k < BATCH * GROUP; k++) {
                    const Neighbours neighbours = *reinterpret_cast<const Neighbours*>(from + k * Layout::PITCH);
#pragma unroll
                    for (int j = 0; j < RUN; j++) element[k][i + j] = neighbours.element[j];
                }
            }
        }
    }
};

using FragmentA = Fragment<LayoutA, THREAD_M, LANES_M>;
using FragmentB = Fragment<LayoutB, THREAD_N, LANES_N>;

// Accumulators pass through shared memory on their way out.
constexpr int OUT_PITCH = TILE_N + 1;
static_assert(TILE_M * OUT_PITCH * sizeof(A) <= STAGES * STAGE_ELEMENTS * sizeof(ELEMENT));

// Dynamic shared memory: STAGES times (a tile of a, a tile of b).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    matmul_fma_narrow(const __grid_constant__ Matmul p, void* out, const void* c, const ELEMENT* a_all,
                      const ELEMENT* b_all, A alpha, A beta) {
    extern __shared__ __align__(128) unsigned char shared[];
    const unsigned shared_base = shared_address(shared);
    // Half a warp's loads of 16 bytes are one access if neighbours, or next neighbours, read the same: threads side by
    // side along n differ in bits 0 and 4 of their numbers, those along m in the others.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_n = LANES_N == 1 ? 0 : LANES_N == 2 ? lane % 2 : lane % 2 + lane / 16 * 2;
    const int lane_m = LANES_N == 1 ? lane : LANES_N == 2 ? lane / 2 : lane / 2 % 8;
    const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    const ELEMENT* ring = reinterpret_cast<const ELEMENT*>(shared);
    const ELEMENT* thread_a = ring + LayoutA::offset(warp_m + FragmentA::position(lane_m, 0), 0);
    const ELEMENT* thread_b = ring + LayoutA::ELEMENTS + LayoutB::offset(warp_n + FragmentB::position(lane_n, 0), 0);
    const int steps = static_cast<int>((p.k + TILE_K - 1) / TILE_K);
    wait_for_predecessors();

    for (long long index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const TilePosition tile = tile_position<TILE_M, TILE_N>(p, index);
        TileSource<ELEMENT, LayoutA, THREADS> a(a_all + tile.a, p.a_stride, p.a_along_k, tile.m, p.m);
        TileSource<ELEMENT, LayoutB, THREADS> b(b_all + tile.b, p.b_stride, p.b_along_k, tile.n, p.n);
        // Every step commits one group of copies, past the end an empty one, so that waiting counts the same
        // throughout.
        auto copy = [&](int step, int stage) {
            if (step < steps) {
                const int k_left = left_of(static_cast<long long>(step) * TILE_K, p.k, TILE_K);
                const unsigned to = shared_base + stage * STAGE_ELEMENTS * static_cast<int>(sizeof(ELEMENT));
                a.copy(to, k_left);
                b.copy(to + LayoutA::ELEMENTS * static_cast<int>(sizeof(ELEMENT)), k_left);
            }
            commit_copies();
        };
        auto arrive = [] {
            wait_for_copies<STAGES - 2>();
            __syncthreads();
        };
        auto next_of = [](int stage) { return stage + 1 == STAGES ? 0 : stage + 1; };

        A acc[THREAD_M][THREAD_N] = {};
        FragmentA fragment_a[2];
        FragmentB fragment_b[2];
        auto load = [&](int buffer, int stage, int batch) {
            fragment_a[buffer].load(thread_a + stage * STAGE_ELEMENTS, batch);
            fragment_b[buffer].load(thread_b + stage * STAGE_ELEMENTS, batch);
        };

#pragma unroll 1
        for (int step = 0; step < STAGES - 1; step++) copy(step, step);
        arrive();
        load(0, 0, 0);

        // Past the end both operands are zero: fma(0, 0, acc) is acc, or +0 for an acc of -0, which ends as +0 anyway.
        int stage = 0;
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            copy(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);  // all threads are done with the step before
#pragma unroll
            for (int batch = 0; batch < BATCHES; batch++) {
                if (batch == BATCHES - 1) {
                    arrive();
                    stage = next_of(stage);
                }
                load((batch + 1) % 2, stage, (batch + 1) % BATCHES);
#pragma unroll
                for (int k = 0; k < BATCH * GROUP; k++) {
                    A factor_a[THREAD_M], factor_b[THREAD_N];
#pragma unroll
                    for (int i = 0; i < THREAD_M; i++) factor_a[i] = accumulate<A>(fragment_a[batch % 2].element[k][i]);
#pragma unroll
                    for (int j = 0; j < THREAD_N; j++) factor_b[j] = accumulate<A>(fragment_b[batch % 2].element[k][j]);
#pragma unroll
                    for (int i = 0; i < THREAD_M; i++) {
#pragma unroll
                        for (int j = 0; j < THREAD_N; j++) acc[i][j] = fused(factor_a[i], factor_b[j], acc[i][j]);
                    }
                }
            }
        }
        launch_dependents();  // they start while this kernel ends
        wait_for_copies<0>();
        __syncthreads();  // all threads are done with the stages

        A* staged = reinterpret_cast<A*>(shared);
#pragma unroll
        for (int i = 0; i < THREAD_M; i++) {
#pragma unroll
            for (int j = 0; j < THREAD_N; j++)
                staged[(warp_m + FragmentA::position(lane_m, i)) * OUT_PITCH + warp_n +
                       FragmentB::position(lane_n, j)] = acc[i][j] + A(0);
        }
        __syncthreads();
        const Epilogue<A> epilogue{p, out, c, alpha, beta};
        const bool along_n = llabs(p.out_stride[1]) <= llabs(p.out_stride[0]);
        const int m_left = left_of(tile.m, p.m, TILE_M), n_left = left_of(tile.n, p.n, TILE_N);
#pragma unroll 1
        for (int i = threadIdx.x; i < TILE_M * TILE_N; i += THREADS) {
            const int m = along_n ? i / TILE_N : i % TILE_M, n = along_n ? i % TILE_N : i / TILE_M;
            if (m < m_left && n < n_left) epilogue.write(tile, tile.m + m, tile.n + n, staged[m * OUT_PITCH + n]);
        }
        __syncthreads();  // shared memory is free for the next tile
    }
}
