// Tiles of an operand on their way from global to shared memory with cp.async (sm_80 on).
#pragma once
#include "async_copy.cuh"
#include "matmul.cuh"

// One element, or a zero. Those of 2 bytes, which cp.async does not copy, are waited for.
template <class X>
__device__ __forceinline__ void copy_element_async(unsigned shared, const X* global, bool exists) {
    if constexpr (sizeof(X) == 2) {
        unsigned short bits = 0;
        if (exists) bits = *reinterpret_cast<const unsigned short*>(global);
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(bits) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global),
                     "n"(static_cast<int>(sizeof(X))), "r"(exists ? static_cast<int>(sizeof(X)) : 0)
                     : "memory");
    }
}

// x, of which the compiler does not know that it is the same in every round of a loop: what is computed from it is then
// computed where it is used, and occupies no registers meanwhile.
__device__ __forceinline__ int computed_anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
__device__ __forceinline__ long long computed_anew(long long x) {
    asm volatile("" : "+l"(x));
    return x;
}

// Where an MN x K tile lies in shared memory: lines along k, or along m (or n), each padded by PAD elements.
template <int MN_, int K_, bool K_CONTIGUOUS_, int PAD>
struct TileLayout {
    static constexpr int MN = MN_, K = K_;
    static constexpr bool K_CONTIGUOUS = K_CONTIGUOUS_;
    static constexpr int INNER = K_CONTIGUOUS ? K : MN, OUTER = K_CONTIGUOUS ? MN : K;
    static constexpr int PITCH = INNER + PAD;
    static constexpr int ELEMENTS = OUTER * PITCH;

    static __device__ __forceinline__ constexpr int offset(int mn, int k) {
        return K_CONTIGUOUS ? mn * PITCH + k : k * PITCH + mn;
    }
};

// How a group of walkers covers a grid: each begins at (fast, slow), makes FAST_COUNT steps of FAST_STEP, and repeats
// them SLOW_COUNT times, SLOW_STEP further each.
template <int FAST, int SLOW, int WALKERS>
struct Walk {
    static constexpr int SIDE_BY_SIDE = FAST < WALKERS ? FAST : WALKERS;
    static constexpr int FAST_STEP = SIDE_BY_SIDE, FAST_COUNT = FAST / SIDE_BY_SIDE;
    static constexpr int SLOW_STEP = WALKERS / SIDE_BY_SIDE, SLOW_COUNT = (SLOW + SLOW_STEP - 1) / SLOW_STEP;
    static constexpr bool EVEN = SLOW % SLOW_STEP == 0;  // else the last round is not for all of them
    static_assert(FAST % SIDE_BY_SIDE == 0 && WALKERS % SIDE_BY_SIDE == 0);

    static __device__ __forceinline__ int fast(int walker) { return walker % SIDE_BY_SIDE; }
    static __device__ __forceinline__ int slow(int walker) { return walker / SIDE_BY_SIDE; }
};

// The tiles of one operand along k, one after the other.
template <class X, class Layout, int THREADS>
struct TileSource {
    static constexpr int MN = Layout::MN, K = Layout::K;
    static constexpr int INNER = Layout::INNER, OUTER = Layout::OUTER;
    static constexpr int BYTES = sizeof(X), VECTOR = 16 / BYTES;  // elements in 16 bytes
    static_assert(INNER % VECTOR == 0 && Layout::PITCH % VECTOR == 0);

    const X* source;  // of the next tile; all tiles are aligned as the first one, or the matrix, is
    const long long (&stride)[2];
    const long long& along_k;  // the direction in which global memory is read
    int mn_left;

    __device__ __forceinline__ TileSource(const X* matrix, const long long (&stride)[2], const long long& along_k,
                                          long long mn, long long mn_end)
        : source(matrix + mn * stride[0]), stride(stride), along_k(along_k), mn_left(left_of(mn, mn_end, MN)) {}

    // Queue the copy of the next tile, of which k_left steps exist; what does not exist becomes zeros.
    __device__ __forceinline__ void copy(unsigned shared, int k_left) {
        const int inner_left = Layout::K_CONTIGUOUS ? k_left : mn_left;
        const int outer_left = Layout::K_CONTIGUOUS ? mn_left : k_left;
        // What does not change is not kept: registers are scarcer than instructions.
        if (inner_stride() == 1 && outer_stride() % VECTOR == 0 && is_vector_aligned(source)) {
            copy_vectors(shared, inner_left, outer_left);
        } else if ((along_k != 0) == Layout::K_CONTIGUOUS) {
            copy_elements<true, 1, 1>(shared, inner_left, outer_left);
        } else {
            // Of a warp, neighbours read 32 bytes of a line of global memory and the others write to other banks.
            copy_elements<false, 4, (OUTER < 8 ? OUTER : 8)>(shared, inner_left, outer_left);
        }
        source += K * stride[1];
    }

  private:
    __device__ __forceinline__ long long inner_stride() const { return stride[Layout::K_CONTIGUOUS ? 1 : 0]; }
    __device__ __forceinline__ long long outer_stride() const { return stride[Layout::K_CONTIGUOUS ? 0 : 1]; }

    __device__ __forceinline__ void copy_vectors(unsigned shared, int inner_left, int outer_left) const {
        using Vectors = Walk<INNER / VECTOR, OUTER, THREADS>;
        const int first_inner = Vectors::fast(threadIdx.x) * VECTOR, first_outer = Vectors::slow(threadIdx.x);
        const X* line = source + first_outer * outer_stride() + first_inner;
        const long long step = Vectors::SLOW_STEP * outer_stride();
        const bool whole = inner_left == INNER && outer_left == OUTER;
        shared += (first_outer * Layout::PITCH + first_inner) * BYTES;
#pragma unroll
        for (int fast = 0; fast < Vectors::FAST_COUNT; fast++) {
            const int inner = fast * Vectors::FAST_STEP * VECTOR;
            const X* vector = line + inner;
            const unsigned to = shared + inner * BYTES;
            if (Vectors::EVEN && whole) {
#pragma unroll
                for (int slow = 0; slow < Vectors::SLOW_COUNT; slow++, vector += step)
                    copy_vector_async(to + slow * Vectors::SLOW_STEP * Layout::PITCH * BYTES, vector);
            } else {
                const int bytes = max(0, min(inner_left - first_inner - inner, VECTOR)) * BYTES;
#pragma unroll 1
                for (int slow = 0; slow < Vectors::SLOW_COUNT; slow++, vector += step) {
                    const int outer = slow * Vectors::SLOW_STEP;
                    if (Vectors::EVEN || first_outer + outer < OUTER)
                        copy_vector_async(to + outer * Layout::PITCH * BYTES, vector,
                                          first_outer + outer < outer_left ? bytes : 0);
                }
            }
        }
    }

    // Blocks of BLOCK_INNER x BLOCK_OUTER elements: their threads, and then the blocks, go along the lines of shared
    // memory, or across them.
    template <bool ALONG, int BLOCK_INNER, int BLOCK_OUTER>
    __device__ __forceinline__ void copy_elements(unsigned shared, int inner_left, int outer_left) const {
        constexpr int BLOCK = BLOCK_INNER * BLOCK_OUTER;
        constexpr int FAST_BLOCK = ALONG ? BLOCK_INNER : BLOCK_OUTER, SLOW_BLOCK = BLOCK / FAST_BLOCK;
        constexpr int FAST = ALONG ? INNER : OUTER, SLOW = ALONG ? OUTER : INNER;
        using Blocks = Walk<FAST / FAST_BLOCK, SLOW / SLOW_BLOCK, THREADS / BLOCK>;
        static_assert(THREADS % BLOCK == 0);
        const int thread = computed_anew(static_cast<int>(threadIdx.x));
        const int within = thread % BLOCK, walker = thread / BLOCK;
        const int first_fast = Blocks::fast(walker) * FAST_BLOCK + within % FAST_BLOCK;
        const int first_slow = Blocks::slow(walker) * SLOW_BLOCK + within / FAST_BLOCK;
        const int fast_left = (ALONG ? inner_left : outer_left) - first_fast;
        const int slow_left = (ALONG ? outer_left : inner_left) - first_slow;
        constexpr int FAST_PITCH = ALONG ? 1 : Layout::PITCH, SLOW_PITCH = ALONG ? Layout::PITCH : 1;
        constexpr int FAST_STEP = Blocks::FAST_STEP * FAST_BLOCK, SLOW_STEP = Blocks::SLOW_STEP * SLOW_BLOCK;
        const long long fast_stride = computed_anew(ALONG ? inner_stride() : outer_stride());
        const long long slow_stride = computed_anew(ALONG ? outer_stride() : inner_stride());
        const X* line = source + first_fast * fast_stride + first_slow * slow_stride;
        shared += (first_fast * FAST_PITCH + first_slow * SLOW_PITCH) * BYTES;
#pragma unroll
        for (int fast = 0; fast < Blocks::FAST_COUNT; fast++, line += FAST_STEP * fast_stride) {
            const X* element = line;
#pragma unroll 4
            for (int slow = 0; slow < Blocks::SLOW_COUNT; slow++, element += SLOW_STEP * slow_stride) {
                if (Blocks::EVEN || first_slow + slow * SLOW_STEP < SLOW)
                    copy_element_async(shared + (fast * FAST_STEP * FAST_PITCH + slow * SLOW_STEP * SLOW_PITCH) * BYTES,
                                       element, fast * FAST_STEP < fast_left && slow * SLOW_STEP < slow_left);
            }
        }
    }
};
