// Matrix products with wgmma (wgmma.cuh) of operands that the TMA does not take: lines of contiguous elements at any
// address and any distance. (It takes no coordinates within 16 bytes, so maps that begin early do not help.) Two warps
// for each operand copy them, 16 bytes at a time.
//
// Where a line begins within a vector of global memory, 16 bytes of it are made of two vectors there, so that every load
// is aligned. Loads run a batch ahead of the stores that need them.
#include "wgmma.cuh"

constexpr int WARPS = 2;  // for an operand
constexpr int PRODUCER_THREADS = 2 * WARPS * 32;
static_assert(CLUSTER == 1 && CONSUMERS == 1, "the producers need their registers");

struct Copied {
    long long line;      // elements between lines
    long long batch[2];  // along the batch's dimensions
};

// The first `left` elements of a vector, and zeros.
__device__ __forceinline__ uint4 first_of(const uint4& vector, int left) {
    auto kept = [&](unsigned word, int element) {
        return left > element + 1 ? word : left > element ? word & 0xFFFF : 0;
    };
    return make_uint4(kept(vector.x, 0), kept(vector.y, 2), kept(vector.z, 4), kept(vector.w, 6));
}

// A batch of an operand's vectors on their way. A pass is one vector for each of the operand's threads.
template <class Operand>
struct Batch {
    static constexpr int VECTOR = 8;                         // elements
    static constexpr int VECTORS = Operand::WIDTH / VECTOR;  // of a line
    static constexpr int LINES = 32 / VECTORS;               // of a warp's pass
    static constexpr int PASSES = Operand::SLABS * Operand::LINES / (WARPS * LINES);
    static constexpr int SIZE = PASSES < 8 ? PASSES : 8;
    static constexpr int NUMBER = PASSES / SIZE;
    static_assert(PASSES >= 1 && PASSES % SIZE == 0 && Operand::LINES % LINES == 0);
    static_assert(PASSES * WARPS * LINES == Operand::SLABS * Operand::LINES, "every line is copied");

    uint4 low[SIZE], high[SIZE];  // vectors that hold the first and, unless the line is aligned, the last elements
    int left[SIZE];               // elements that exist from the first on
    unsigned skipped[SIZE];       // elements of `low` before the first

    // The line and the slab of a pass, of this thread.
    static __device__ __forceinline__ int slab(int pass) { return line_of_all(pass) / Operand::LINES; }
    static __device__ __forceinline__ int line(int pass) { return line_of_all(pass) % Operand::LINES; }
    static __device__ __forceinline__ int line_of_all(int pass) {
        const int warp = threadIdx.x / 32 % WARPS, lane = threadIdx.x % 32;
        return (pass * WARPS + warp) * LINES + lane / VECTORS;
    }

    // Load a batch of the tile at `row` and `k`; rows x depth elements exist. A vector is read if one of its elements
    // does: memory is allocated in whole vectors.
    __device__ __forceinline__ void load(const Copied& operand, const ELEMENT* matrix, int batch, int row, int k,
                                         int rows, int depth) {
        const int inner_end = Operand::ALONG_K ? depth : rows, outer_end = Operand::ALONG_K ? rows : depth;
        const int inner_begin = Operand::ALONG_K ? k : row, outer_begin = Operand::ALONG_K ? row : k;
        const int first = threadIdx.x % 32 % VECTORS * VECTOR;  // element of the line
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const int pass = batch * SIZE + i;
            const int outer = outer_begin + line(pass), inner = inner_begin + slab(pass) * Operand::WIDTH + first;
            left[i] = outer < outer_end ? inner_end - inner : 0;
            const ELEMENT* source = matrix + outer * operand.line + inner;
            skipped[i] = reinterpret_cast<unsigned long long>(source) / sizeof(ELEMENT) % VECTOR;
            const uint4* vector = reinterpret_cast<const uint4*>(source - skipped[i]);
            low[i] = high[i] = make_uint4(0, 0, 0, 0);
            if (left[i] > 0) low[i] = vector[0];
            if (skipped[i] > 0 && left[i] > VECTOR - static_cast<int>(skipped[i])) high[i] = vector[1];
        }
    }

    // Store a batch into a stage.
    __device__ __forceinline__ void store(unsigned stage, int batch) const {
        constexpr unsigned CHUNKS = Operand::SWIZZLE / 16;
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const int pass = batch * SIZE + i;
            unsigned offset = line(pass) * Operand::WIDTH * 2 + threadIdx.x % 32 % VECTORS * 16;
            if constexpr (CHUNKS > 0) offset ^= (offset >> 7) % CHUNKS << 4;
            const uint4 vector = first_of(shift_words(low[i], high[i], skipped[i] * sizeof(ELEMENT)), left[i]);
            const unsigned to = stage + slab(pass) * Operand::SLAB_BYTES + offset;
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(vector.x), "r"(vector.y),
                         "r"(vector.z), "r"(vector.w)
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
    if (p.early) launch_dependents();  // they start while this kernel ends
}

extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS + PRODUCER_THREADS, 1)
    matmul_wgmma_copy(const __grid_constant__ Copied of_a, const __grid_constant__ Copied of_b,
                      const __grid_constant__ Wgmma p, int depth, void* out, const void* c, const ELEMENT* a,
                      const ELEMENT* b, float alpha, float beta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = shared_address(memory);
    multiply<PRODUCER_THREADS, true>(shared, p, out, c, alpha, beta, [] {}, [&] {
        if (threadIdx.x < CONSUMER_THREADS + WARPS * 32) {
            copy<OperandA>(shared, shared, of_a, a, p.m, depth, p, [](const Tile& tile) { return tile.m; });
        } else {
            copy<OperandB>(shared, shared + B_OFFSET, of_b, b, p.n, depth, p, [](const Tile& tile) { return tile.n; });
        }
    });
}
