// Matrix products by fused multiply-adds: one chain per output element, k = 0, 1, …, K-1, every step correctly rounded.
//
// ELEMENT: the operands' dtype; ACCUMULATE: float or double. TILE_M, TILE_N, TILE_K: of a CTA. THREAD_M, THREAD_N:
// output elements of a thread. CTAS: that a multiprocessor should hold. Two tiles of K are kept: while one is
// multiplied, the next travels through registers.
#include "matmul.cuh"

using A = ACCUMULATE;
constexpr int THREADS_M = TILE_M / THREAD_M, THREADS_N = TILE_N / THREAD_N;
constexpr int THREADS = THREADS_M * THREADS_N;
constexpr int VECTOR = 16 / sizeof(ELEMENT);   // elements in 16 bytes
constexpr int SHARED_VECTOR = 16 / sizeof(A);  // accumulate-dtype elements in 16 bytes

static_assert(TILE_M % THREAD_M == 0 && TILE_N % THREAD_N == 0 && TILE_K % VECTOR == 0);

// Where a thread's i-th row (or column) lies: runs of up to 16 bytes, spread over the tile so that a warp reads whole
// lines.
template <int TILE, int COUNT>
struct Share {
    static constexpr int RUN = COUNT < SHARED_VECTOR ? COUNT : SHARED_VECTOR;
    static_assert(COUNT % RUN == 0);
    static __device__ __forceinline__ int position(int thread, int i) {
        return i / RUN * (TILE / (COUNT / RUN)) + thread * RUN + i % RUN;
    }
};

// A TILE_K x MN tile in shared memory, widened, its lines padded by 16 bytes; and its part in a thread's registers.
template <int MN>
struct Operand {
    static constexpr int PITCH = MN + SHARED_VECTOR;
    static constexpr int ELEMENTS = MN * TILE_K;
    static constexpr int THREAD_VECTORS = (ELEMENTS / VECTOR + THREADS - 1) / THREADS;
    static_assert(MN % VECTOR == 0 && ELEMENTS % THREADS == 0);

    const ELEMENT* source;  // of the next tile
    const long long (&stride)[2];
    int mn_left;
    bool along_k;         // the threads walk along k, else along m or n
    bool vectors;         // where whole tiles are left
    bool loaded_vectors;  // how `value` was filled
    A value[THREAD_VECTORS * VECTOR];

    __device__ __forceinline__ Operand(const ELEMENT* matrix, const long long (&stride)[2], bool along_k, long long mn,
                                       long long mn_end)
        : source(matrix + mn * stride[0]),
          stride(stride),
          mn_left(left_of(mn, mn_end, MN)),
          along_k(along_k),
          loaded_vectors(false) {
        vectors = mn_left == MN && is_vector_aligned(matrix) && stride[along_k ? 1 : 0] == 1 &&
                  stride[along_k ? 0 : 1] % VECTOR == 0;
    }

    // The threads walk the tile, WIDTH elements each, in passes that lie a fixed step apart.
    template <int WIDTH>
    struct Walk {
        int mn, k, mn_step, k_step;

        __device__ __forceinline__ explicit Walk(bool along_k) {
            static_assert(THREADS * WIDTH % TILE_K == 0 && THREADS * WIDTH % MN == 0);
            const int first = threadIdx.x * WIDTH;
            mn = along_k ? first / TILE_K : first % MN;
            k = along_k ? first % TILE_K : first / MN;
            mn_step = along_k ? THREADS * WIDTH / TILE_K : 0;
            k_step = along_k ? 0 : THREADS * WIDTH / MN;
        }
    };

    // Global memory to registers, zeros outside the operand: whole tiles of aligned operands in vectors.
    __device__ __forceinline__ void load(int k_left) {
        loaded_vectors = vectors && k_left == TILE_K;
        if (loaded_vectors) {
            const Walk<VECTOR> walk(along_k);
            const ELEMENT* address = source + walk.mn * stride[0] + walk.k * stride[1];
            const long long step = walk.mn_step * stride[0] + walk.k_step * stride[1];
#pragma unroll
            for (int v = 0; v < THREAD_VECTORS; v++, address += step) {
                if (is_busy(v))
                    unpack(*reinterpret_cast<const uint4*>(address), static_cast<ELEMENT*>(nullptr),
                           value + v * VECTOR);
            }
        } else {
            const Walk<1> walk(along_k);
            const ELEMENT* address = source + walk.mn * stride[0] + walk.k * stride[1];
            const long long step = walk.mn_step * stride[0] + walk.k_step * stride[1];
#pragma unroll
            for (int e = 0; e < ELEMENTS / THREADS; e++, address += step) {
                const bool exists = walk.mn + e * walk.mn_step < mn_left && walk.k + e * walk.k_step < k_left;
                value[e] = exists ? accumulate<A>(*address) : A(0);
            }
        }
        source += TILE_K * stride[1];
    }

    // Registers to shared memory.
    __device__ __forceinline__ void store(A* shared) const {
        if (loaded_vectors) {
            const Walk<VECTOR> walk(along_k);
            A* address = shared + walk.k * PITCH + walk.mn;
            const int step = along_k ? PITCH : 1;
#pragma unroll
            for (int v = 0; v < THREAD_VECTORS; v++, address += walk.k_step * PITCH + walk.mn_step) {
                if (is_busy(v)) {
#pragma unroll
                    for (int j = 0; j < VECTOR; j++) address[j * step] = value[v * VECTOR + j];
                }
            }
        } else {
            const Walk<1> walk(along_k);
            A* address = shared + walk.k * PITCH + walk.mn;
#pragma unroll
            for (int e = 0; e < ELEMENTS / THREADS; e++, address += walk.k_step * PITCH + walk.mn_step)
                *address = value[e];
        }
    }

  private:
    // Whether this thread has a vector in pass v: a small tile has fewer vectors than there are threads.
    static __device__ __forceinline__ bool is_busy(int v) {
        return ELEMENTS / VECTOR % THREADS == 0 || threadIdx.x + v * THREADS < ELEMENTS / VECTOR;
    }
};

using OperandA = Operand<TILE_M>;
using OperandB = Operand<TILE_N>;

// Accumulators pass through shared memory on their way out, THREADS_M rows at a time.
constexpr int OUT_PITCH = TILE_N + 1;

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    matmul_fma(const __grid_constant__ Matmul p, void* out, const void* c, const ELEMENT* a_all, const ELEMENT* b_all,
               A alpha, A beta) {
    __shared__ __align__(16) A tile_a[2][TILE_K * OperandA::PITCH];
    __shared__ __align__(16) A tile_b[2][TILE_K * OperandB::PITCH];
    A* staged = tile_a[0];
    static_assert(sizeof(tile_a) >= THREADS_M * OUT_PITCH * sizeof(A));
    const int thread_m = threadIdx.x / THREADS_N, thread_n = threadIdx.x % THREADS_N;
    using ShareM = Share<TILE_M, THREAD_M>;
    using ShareN = Share<TILE_N, THREAD_N>;

    for (long long index = blockIdx.x; index < p.tiles; index += gridDim.x) {
        const TilePosition tile = tile_position<TILE_M, TILE_N>(p, index);
        OperandA a(a_all + tile.a, p.a_stride, p.a_along_k, tile.m, p.m);
        OperandB b(b_all + tile.b, p.b_stride, p.b_along_k, tile.n, p.n);

        A acc[THREAD_M][THREAD_N] = {};
        // Each round multiplies the tiles of the one before, except the first, while its own are on their way.
        int stage = 0;
#pragma unroll 1
        for (long long k_first = 0; k_first < p.k + TILE_K; k_first += TILE_K, stage ^= 1) {
            const int k_left = left_of(k_first, p.k, TILE_K);
            if (k_left > 0) {
                a.load(k_left);
                b.load(k_left);
            }
            if (k_first > 0) {
                // Past the end both operands are zero: fma(0, 0, acc) is acc, or +0 for an acc of -0, which ends as +0
                // anyway.
#pragma unroll 8
                for (int k = 0; k < TILE_K; k++) {
                    A fragment_a[THREAD_M], fragment_b[THREAD_N];
#pragma unroll
                    for (int i = 0; i < THREAD_M; i++)
                        fragment_a[i] = tile_a[stage][k * OperandA::PITCH + ShareM::position(thread_m, i)];
#pragma unroll
                    for (int j = 0; j < THREAD_N; j++)
                        fragment_b[j] = tile_b[stage][k * OperandB::PITCH + ShareN::position(thread_n, j)];
#pragma unroll
                    for (int i = 0; i < THREAD_M; i++) {
#pragma unroll
                        for (int j = 0; j < THREAD_N; j++) acc[i][j] = fused(fragment_a[i], fragment_b[j], acc[i][j]);
                    }
                }
            }
            if (k_left > 0) {
                // The other stage was last read before the previous barrier.
                a.store(tile_a[stage ^ 1]);
                b.store(tile_b[stage ^ 1]);
            }
            __syncthreads();
        }

        const Epilogue<A> epilogue{p, out, c, alpha, beta};
        const bool along_n = llabs(p.out_stride[1]) <= llabs(p.out_stride[0]);
        const int n_left = left_of(tile.n, p.n, TILE_N);
#pragma unroll
        for (int row = 0; row < THREAD_M; row++) {
#pragma unroll
            for (int j = 0; j < THREAD_N; j++)
                staged[thread_m * OUT_PITCH + ShareN::position(thread_n, j)] = acc[row][j] + A(0);
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < THREADS_M * TILE_N; i += THREADS) {
                const int line = along_n ? i / TILE_N : i % THREADS_M, n = along_n ? i % TILE_N : i / THREADS_M;
                const long long m = tile.m + ShareM::position(line, row);
                if (m < p.m && n < n_left) epilogue.write(tile, m, tile.n + n, staged[line * OUT_PITCH + n]);
            }
            __syncthreads();
        }
    }
}
