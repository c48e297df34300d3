// Matrix products of bfloat16 and float16 on tensor cores, mma.sync m16n8k16 with a float32 accumulator (sm_80 on).
//
// The order that the contract fixes: K is folded into one accumulator, in order, in groups of 16 (which an sm_8x tensor
// core splits into two groups of 8), starting at +0. The last group is padded with zeros in both operands, and whole
// groups of zeros leave an accumulator as it is. So no warp shares an output element with another, and every loop over
// k is sequential.
//
// ELEMENT: bfloat16 or float16. TILE_M, TILE_N, TILE_K: of a CTA. WARPS_M, WARPS_N: how its warps divide it. STAGES:
// tiles of K in flight. CTAS: that a multiprocessor should hold. A_K_CONTIGUOUS, B_K_CONTIGUOUS: how an operand lies in
// shared memory; in global memory it may lie in any way, but only one that lies likewise, aligned to 16 bytes, is
// copied in vectors.
#include "async_copy.cuh"
#include "matmul.cuh"

constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int GROUP_K = 16;
constexpr int VECTOR = 8;  // elements in 16 bytes

static_assert(sizeof(ELEMENT) == 2);
static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "fragments are loaded 16 x 16");
static_assert(TILE_K % GROUP_K == 0 && GROUP_K % TENSOR_CORE_GROUP == 0,
              "a step of an instruction is whole groups of the contract");
static_assert(STAGES >= 2);

// ----------------------------------------------------------------------------------------------------------
// instructions

template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(unsigned (&matrix)[4], unsigned shared) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(shared)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                     : "r"(shared)
                     : "memory");
    }
}

// One group of 16 (sm_8x: two of 8) into a 16 x 8 accumulator.
#define MMA(type)                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type            \
                 ".f32 "                                                           \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma(bfloat16, float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("bf16");
}
__device__ __forceinline__ void mma(float16, float (&acc)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MMA("f16");
}

// ------------------------------------------------------------------------------------------------- tiles in shared
// memory

// An MN x K tile of an operand. The contiguous dimension is cut into slabs of 128 bytes at most; within a slab, the
// vectors of a line are permuted so that the 8 lines that one ldmatrix reads fall into different banks.
template <int MN, bool K_CONTIGUOUS>
struct Tile {
    static constexpr int INNER = K_CONTIGUOUS ? TILE_K : MN;
    static constexpr int OUTER = K_CONTIGUOUS ? MN : TILE_K;
    static constexpr int SLAB = INNER < 64 ? INNER : 64;
    static constexpr int LINE = SLAB / VECTOR;  // vectors in a line of a slab
    static constexpr int VECTORS = MN * TILE_K / VECTOR;
    static constexpr int BYTES = VECTORS * 16;
    static_assert(INNER % SLAB == 0 && (SLAB & (SLAB - 1)) == 0);
    static_assert(VECTORS % THREADS == 0, "every thread copies as many vectors");

    // In bytes, of the vector that holds `inner` of line `outer`.
    static __device__ __forceinline__ int vector_offset(int inner, int outer) {
        const int line = inner / SLAB * OUTER + outer;
        const int swizzle = outer / (8 / LINE) % LINE;
        return (line * LINE + ((inner % SLAB / VECTOR) ^ swizzle)) * 16;
    }

    // Queue the copy of a tile that begins at `source` and of which mn_left x k_left exists. The rest becomes zeros.
    static __device__ __forceinline__ void copy_vectors(unsigned shared, const ELEMENT* source,
                                                        const long long (&stride)[2], int mn_left, int k_left) {
        constexpr int LINE_THREADS = INNER / VECTOR, LINES = THREADS / LINE_THREADS;  // a pass of all threads
        static_assert(THREADS % LINE_THREADS == 0 && OUTER % LINES == 0);
        const int inner = threadIdx.x % LINE_THREADS * VECTOR, first = threadIdx.x / LINE_THREADS;
        const int inner_left = (K_CONTIGUOUS ? k_left : mn_left) - inner, outer_left = K_CONTIGUOUS ? mn_left : k_left;
        const int bytes = max(0, min(inner_left, VECTOR)) * static_cast<int>(sizeof(ELEMENT));
        const long long line = stride[K_CONTIGUOUS ? 0 : 1];
        const ELEMENT* vector = source + first * line + inner;
#pragma unroll
        for (int outer = first; outer < first + OUTER; outer += LINES, vector += LINES * line) {
            const bool exists = outer < outer_left && bytes > 0;
            copy_vector_async(shared + vector_offset(inner, outer), exists ? vector : source, exists ? bytes : 0);
        }
    }

    // The same for any strides and alignment, an element at a time, through registers.
    static __device__ __forceinline__ void copy_elements(unsigned char* shared, const ELEMENT* source,
                                                         const long long (&stride)[2], int mn_left, int k_left) {
#pragma unroll 4
        for (int i = threadIdx.x; i < MN * TILE_K; i += THREADS) {
            const int inner = i % INNER, outer = i / INNER;
            const int mn = K_CONTIGUOUS ? outer : inner, k = K_CONTIGUOUS ? inner : outer;
            ELEMENT value = {0};
            if (mn < mn_left && k < k_left) value = source[mn * stride[0] + k * stride[1]];
            *reinterpret_cast<ELEMENT*>(shared + vector_offset(inner, outer) + inner % VECTOR * sizeof(ELEMENT)) =
                value;
        }
    }

    // The 16 x 16 fragment at (mn, k): 8 x 8 matrices (0, 0), (8, 0), (0, 8), (8, 8), as mma wants them of either
    // operand.
    static __device__ __forceinline__ void load_fragment(unsigned (&fragment)[4], unsigned shared, int mn, int k) {
        const int matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
        mn += matrix % 2 * 8;
        k += matrix / 2 * 8;
        load_matrices<!K_CONTIGUOUS>(
            fragment, shared + (K_CONTIGUOUS ? vector_offset(k, mn + line) : vector_offset(mn, k + line)));
    }

    static __device__ __forceinline__ bool has_vectors(const ELEMENT* operand, const long long (&stride)[2]) {
        return stride[K_CONTIGUOUS ? 1 : 0] == 1 && stride[K_CONTIGUOUS ? 0 : 1] % VECTOR == 0 &&
               is_vector_aligned(operand);
    }
};

using TileA = Tile<TILE_M, A_K_CONTIGUOUS>;
using TileB = Tile<TILE_N, B_K_CONTIGUOUS>;
constexpr int STAGE_BYTES = TileA::BYTES + TileB::BYTES;

// ----------------------------------------------------------------------------------------------------------------
// kernel

// Accumulators pass through shared memory on their way out, in lines padded against bank conflicts.
constexpr int OUT_PITCH = TILE_N + 8;
static_assert(TILE_M * OUT_PITCH * sizeof(float) <= STAGES * STAGE_BYTES);

// Dynamic shared memory: STAGES times (a tile of a, a tile of b).
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    matmul_mma(const __grid_constant__ Matmul p, void* out, const void* c, const ELEMENT* a_all, const ELEMENT* b_all,
               float alpha, float beta) {
    extern __shared__ __align__(128) unsigned char shared[];
    const unsigned shared_base = shared_address(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    const int steps = static_cast<int>((p.k + TILE_K - 1) / TILE_K);

    for (long long index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const TilePosition tile = tile_position<TILE_M, TILE_N>(p, index);
        const int m_left = left_of(tile.m, p.m, TILE_M), n_left = left_of(tile.n, p.n, TILE_N);
        const bool a_vectors = TileA::has_vectors(a_all + tile.a, p.a_stride),
                   b_vectors = TileB::has_vectors(b_all + tile.b, p.b_stride);
        const ELEMENT* a = a_all + tile.a + tile.m * p.a_stride[0];
        const ELEMENT* b = b_all + tile.b + tile.n * p.b_stride[0];

        float acc[WARP_M / 16][WARP_N / 8][4] = {};
        // The first STAGES - 1 rounds only copy. Every round commits one group, past the end an empty one, so that
        // waiting counts the same throughout.
#pragma unroll 1
        for (int step = 1 - STAGES; step < steps; step++) {
            if (step >= 0) {
                wait_for_copies<STAGES - 2>();
                __syncthreads();  // this step's tiles are there, and all warps are done with the stage that is filled
                                  // next
            }
            const int next = step + STAGES - 1;
            if (next < steps) {
                const int stage = next % STAGES * STAGE_BYTES;
                const int k_left = left_of(static_cast<long long>(next) * TILE_K, p.k, TILE_K);
                if (a_vectors) {
                    TileA::copy_vectors(shared_base + stage, a, p.a_stride, m_left, k_left);
                } else {
                    TileA::copy_elements(shared + stage, a, p.a_stride, m_left, k_left);
                }
                if (b_vectors) {
                    TileB::copy_vectors(shared_base + stage + TileA::BYTES, b, p.b_stride, n_left, k_left);
                } else {
                    TileB::copy_elements(shared + stage + TileA::BYTES, b, p.b_stride, n_left, k_left);
                }
                a += TILE_K * p.a_stride[1];
                b += TILE_K * p.b_stride[1];
            }
            commit_copies();
            if (step < 0) continue;

            const unsigned tile_a = shared_base + step % STAGES * STAGE_BYTES, tile_b = tile_a + TileA::BYTES;
            // Fragments are loaded a group ahead of the instructions that use them.
            unsigned fragment_a[2][WARP_M / 16][4], fragment_b[2][WARP_N / 16][4];
            auto load_fragments = [&](int group) {
#pragma unroll
                for (int i = 0; i < WARP_M / 16; i++)
                    TileA::load_fragment(fragment_a[group % 2][i], tile_a, warp_m + i * 16, group * GROUP_K);
#pragma unroll
                for (int j = 0; j < WARP_N / 16; j++)
                    TileB::load_fragment(fragment_b[group % 2][j], tile_b, warp_n + j * 16, group * GROUP_K);
            };
            load_fragments(0);
#pragma unroll
            for (int group = 0; group < TILE_K / GROUP_K; group++) {
                if (group + 1 < TILE_K / GROUP_K) load_fragments(group + 1);
#pragma unroll
                for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
                    for (int j = 0; j < WARP_N / 8; j++) {
                        const unsigned (&b_pair)[4] = fragment_b[group % 2][j / 2];
                        mma(ELEMENT{}, acc[i][j], fragment_a[group % 2][i], b_pair[j % 2], b_pair[2 + j % 2]);
                    }
                }
            }
        }
        wait_for_copies<0>();
        __syncthreads();  // all warps are done with the stages

        float* staged = reinterpret_cast<float*>(shared);
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
            for (int j = 0; j < WARP_N / 8; j++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int m = warp_m + i * 16 + half * 8 + lane / 4, n = warp_n + j * 8 + lane % 4 * 2;
                    *reinterpret_cast<float2*>(staged + m * OUT_PITCH + n) =
                        make_float2(acc[i][j][2 * half], acc[i][j][2 * half + 1]);
                }
            }
        }
        __syncthreads();
        const Epilogue<float> epilogue{p, out, c, alpha, beta};
        const bool along_n = llabs(p.out_stride[1]) <= llabs(p.out_stride[0]);
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE_M * TILE_N; i += THREADS) {
            const int m = along_n ? i / TILE_N : i % TILE_M, n = along_n ? i % TILE_N : i / TILE_M;
            if (m < m_left && n < n_left) epilogue.write(tile, tile.m + m, tile.n + n, staged[m * OUT_PITCH + n]);
        }
        __syncthreads();  // shared memory is free for the next tile
    }
}
