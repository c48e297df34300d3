// Matrix products with wgmma (wgmma.cuh) of operands that the TMA does not take: lines of contiguous elements at any
// address and any distance. Two warps for each operand copy them, a word at a time.
//
// A word in shared memory holds two elements. Where a line begins in the middle of a word of global memory, it is made of
// two words there, so that every load is aligned. Loads run a batch ahead of the stores that need them.
#include "wgmma.cuh"

constexpr int WARPS = 2;  // for an operand
constexpr int PRODUCER_THREADS = 2 * WARPS * 32;
static_assert(CLUSTER == 1 && CONSUMERS == 1, "the producers need their registers");

struct Copied {
    long long line;      // elements between lines
    long long batch[2];  // along the batch's dimensions
};

// A batch of an operand's words on their way. A pass is one word for each of the operand's threads.
template <class Operand>
struct Batch {
    static constexpr int WORDS = Operand::WIDTH / 2;  // of a line
    static constexpr int LINES = 32 / WORDS;          // of a warp's pass
    static constexpr int PASSES = Operand::SLABS * Operand::LINES / (WARPS * LINES);
    static constexpr int SIZE = PASSES < 32 ? PASSES : 32;
    static constexpr int NUMBER = PASSES / SIZE;
    static_assert(PASSES >= 1 && PASSES % SIZE == 0 && Operand::LINES % LINES == 0);
    static_assert(PASSES * WARPS * LINES == Operand::SLABS * Operand::LINES, "every line is copied");

    unsigned low[SIZE], high[SIZE];  // words that hold the first and, in a line that begins in mid-word, the second
    unsigned odd;                      // a bit for each pass: whether its line does

    // The line and the slab of a pass, of this thread.
    static __device__ __forceinline__ int slab(int pass) { return line_of_all(pass) / Operand::LINES; }
    static __device__ __forceinline__ int line(int pass) { return line_of_all(pass) % Operand::LINES; }
    static __device__ __forceinline__ int line_of_all(int pass) {
        const int warp = threadIdx.x / 32 % WARPS, lane = threadIdx.x % 32;
        return (pass * WARPS + warp) * LINES + lane / WORDS;
    }

    // Load a batch of the tile at `row` and `k`; rows x depth elements exist.
    __device__ __forceinline__ void load(const Copied& operand, const ELEMENT* matrix, int batch, int row, int k,
                                         int rows, int depth) {
        const int inner_end = Operand::ALONG_K ? depth : rows, outer_end = Operand::ALONG_K ? rows : depth;
        const int inner_begin = Operand::ALONG_K ? k : row, outer_begin = Operand::ALONG_K ? row : k;
        const int first = threadIdx.x % 32 % WORDS * 2;  // element of the line
        odd = 0;
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const int pass = batch * SIZE + i;
            const int outer = outer_begin + line(pass), inner = inner_begin + slab(pass) * Operand::WIDTH;
            const int left = outer < outer_end ? inner_end - inner - first : 0;  // elements from `first` on
            const ELEMENT* source = matrix + outer * operand.line + inner + first;
            const bool shifted = reinterpret_cast<unsigned long long>(source) % 4 != 0;
            const unsigned* word = reinterpret_cast<const unsigned*>(source - shifted);
            low[i] = high[i] = 0;
            // A word whose other half does not exist is not read: it might lie outside of what is allocated.
            if (shifted ? left > 0 : left > 1) {
                low[i] = word[0];
            } else if (left > 0) {
                low[i] = source[0].bits;
            }
            if (shifted && left > 2) {
                high[i] = word[1];
            } else if (shifted && left > 1) {
                high[i] = source[1].bits;
            }
            odd |= static_cast<unsigned>(shifted) << i;
        }
    }

    // Store a batch into a stage.
    __device__ __forceinline__ void store(unsigned stage, int batch) const {
        constexpr unsigned CHUNKS = Operand::SWIZZLE / 16;
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const int pass = batch * SIZE + i;
            unsigned offset = line(pass) * Operand::WIDTH * 2 + threadIdx.x % 32 % WORDS * 4;
            if constexpr (CHUNKS > 0) offset ^= (offset >> 7) % CHUNKS << 4;
            const unsigned word = __funnelshift_r(low[i], high[i], (odd >> i & 1) * 16);
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(stage + slab(pass) * Operand::SLAB_BYTES + offset), "r"(word)
                         : "memory");
        }
    }
};

// A place in the walk over all tiles and steps of K.
struct Cursor {
    unsigned index, step;
    Tile tile;

    __device__ __forceinline__ explicit Cursor(const Wgmma& p) : index(blockIdx.x), step(0), tile(p, index, 0) {}

    __device__ __forceinline__ void advance(const Wgmma& p) {
        if (++step == p.steps) {
            step = 0;
            index += gridDim.x;
            tile = Tile(p, index, 0);
        }
    }
};

// Copies all tiles of one operand: `first` is its first stage in shared memory, `row` the row of a tile, of `rows`.
template <class Operand, class Row>
__device__ __forceinline__ void copy(unsigned shared, unsigned first, const Copied& operand, const ELEMENT* pointer,
                                     int rows, int depth, const Wgmma& p, Row row) {
    using Words = Batch<Operand>;
    auto load = [&](Words& words, const Cursor& at, int batch) {
        const ELEMENT* matrix = pointer + at.tile.batch[0] * operand.batch[0] + at.tile.batch[1] * operand.batch[1];
        words.load(operand, matrix, batch, row(at.tile), at.step * TILE_K, rows, depth);
    };
    Ring ring;
    Cursor at(p);
    Words words[2];
    load(words[0], at, 0);
#pragma unroll 1
    while (at.index < p.tiles) {
        Cursor next = at;
        next.advance(p);
#pragma unroll
        for (int batch = 0; batch < Words::NUMBER; batch++) {
            if (batch + 1 < Words::NUMBER) {
                load(words[(batch + 1) % 2], at, batch + 1);
            } else if (next.index < p.tiles) {
                load(words[(batch + 1) % 2], next, 0);
            }
            if (batch == 0) wait_barrier(empty_barrier(shared, ring.stage), ring.parity ^ 1);
            words[batch % 2].store(first + ring.stage * Operand::BYTES, batch);
        }
        if constexpr (Words::NUMBER % 2) words[0] = words[1];
        arrive(full_barrier(shared, ring.stage));
        ring.advance();
        at = next;
    }
    launch_dependents();  // they start while this kernel ends
}

extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS + PRODUCER_THREADS, 1)
    matmul_wgmma_copy(const __grid_constant__ Copied of_a, const __grid_constant__ Copied of_b,
                      const __grid_constant__ Wgmma p, int depth, void* out, const void* c, const ELEMENT* a,
                      const ELEMENT* b, float alpha, float beta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = shared_address(memory);
    multiply<PRODUCER_THREADS, 0, 0, true>(shared, p, out, c, alpha, beta, [&] {
        if (threadIdx.x < CONSUMER_THREADS + WARPS * 32) {
            copy<OperandA>(shared, shared, of_a, a, p.m, depth, p, [](const Tile& tile) { return tile.m; });
        } else {
            copy<OperandB>(shared, shared + B_OFFSET, of_b, b, p.n, depth, p, [](const Tile& tile) { return tile.n; });
        }
    });
}
