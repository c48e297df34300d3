// Matrix products with wgmma (wgmma.cuh) of operands that the TMA brings: aligned to 16 bytes, in lines of contiguous
// elements.
//
// Two threads are producers, of one operand each. CTAs of a cluster in a line share a tile, of which each loads a part for
// all of them. Of an operand with fewer rows than a tile, only those that exist are brought: the TMA takes as long for
// others, and rows of garbage meet no row of the result.
//
// While the kernels before this one end, the consumers bring the first lines of one operand to the L2.
#include "wgmma.cuh"

constexpr int PRODUCER_THREADS = CONSUMERS > 1 ? 128 : 64;  // setmaxnreg takes whole warpgroups

template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};

struct Brought {
    unsigned batch[2];  // whether the operand moves along the batch's dimensions
    unsigned bytes;     // that arrive in a stage
};

// The operand whose first lines are brought to the L2 early.
struct Ahead {
    long long line;        // elements between lines
    unsigned rows, depth;  // of the matrix, depth along K
    unsigned steps;        // tiles of K, none if 0
    unsigned is_b;
};

template <class Operand, int ROWS>
__device__ __forceinline__ void prefetch(const Ahead& ahead, const ELEMENT* matrix, int row) {
    constexpr int VECTOR = 64;  // elements of 128 bytes
    const int depth = ahead.steps * TILE_K;
    const int inner = Operand::ALONG_K ? depth : ROWS, outer = Operand::ALONG_K ? ROWS : depth;
    const int inner_end = Operand::ALONG_K ? ahead.depth : ahead.rows;
    const int outer_end = Operand::ALONG_K ? ahead.rows : ahead.depth;
    const int vectors = (inner + VECTOR - 1) / VECTOR;
    for (int i = threadIdx.x; i < outer * vectors; i += CONSUMER_THREADS) {
        const int x = (Operand::ALONG_K ? 0 : row) + i % vectors * VECTOR;
        const int y = (Operand::ALONG_K ? row : 0) + i / vectors;
        if (x < inner_end && y < outer_end) prefetch_line(matrix + y * ahead.line + x);
    }
}

// Brings all tiles of one operand: `first` is its first stage in shared memory, `line` the row of a tile, `mask` the CTAs
// that share its tiles and `sharer` this one's place among these SHARERS.
template <class Operand, int SHARERS, class Line>
__device__ __forceinline__ void bring(unsigned shared, unsigned first, const TensorMap& map, const Brought& operand,
                                      const Wgmma& p, unsigned rank, int sharer, unsigned short mask, Line line) {
    constexpr int PART = Operand::LINES / SHARERS;
    constexpr int BOX = PART < 256 ? PART : 256;  // lines that the TMA takes at once
    static_assert(Operand::LINES % SHARERS == 0 && PART % 8 == 0 && PART % BOX == 0);

    Ring ring;
    bool alone = SHARERS > 1;  // in the first round the others may not have set up their barriers yet
    for (unsigned index = blockIdx.x / CLUSTER; index < p.tiles; index += gridDim.x / CLUSTER) {
        const Tile tile(p, index, rank);
        const int row = line(tile);
        const int batch0 = tile.batch[0] * operand.batch[0], batch1 = tile.batch[1] * operand.batch[1];
#pragma unroll 1
        for (int step = 0; step < p.steps; step++, ring.advance()) {
            wait_barrier(empty_barrier(shared, ring.stage), ring.parity ^ 1);
            const unsigned full = full_barrier(shared, ring.stage);
            arrive_and_expect(full, operand.bytes);
            const unsigned stage = first + ring.stage * Operand::BYTES;
            const int k = step * TILE_K;
            auto load_part = [&](int part, auto multicast) {
#pragma unroll
                for (int slab = 0; slab < Operand::SLABS; slab++) {
#pragma unroll
                    for (int begin = 0; begin < PART; begin += BOX) {
                        const int inner = slab * Operand::WIDTH, outer = part * PART + begin;
                        const Coordinates c = Operand::ALONG_K ? Coordinates{k + inner, row + outer, batch0, batch1}
                                                               : Coordinates{row + inner, k + outer, batch0, batch1};
                        load_box<decltype(multicast)::value>(
                            stage + slab * Operand::SLAB_BYTES + outer * Operand::WIDTH * 2, map, c, full, mask);
                    }
                }
            };
            if (alone) {
#pragma unroll 1
                for (int part = 0; part < SHARERS; part++) load_part(part, Constant<false>{});
                alone = ring.stage + 1 < STAGES;
            } else {
                load_part(sharer, Constant<(SHARERS > 1)>{});
            }
        }
    }
    if (p.early) launch_dependents();  // they start while this kernel ends
}

extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS + PRODUCER_THREADS, CTAS)
    matmul_wgmma(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                 const __grid_constant__ Brought of_a, const __grid_constant__ Brought of_b,
                 const __grid_constant__ Ahead ahead, const __grid_constant__ Wgmma p, void* out, const void* c,
                 const ELEMENT* a, const ELEMENT* b, float alpha, float beta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = shared_address(memory);
    if (threadIdx.x == 0) {
        prefetch_descriptor(a_map);
        prefetch_descriptor(b_map);
    }
    const unsigned rank = CLUSTER > 1 ? cluster_rank() : 0;
    auto prepare = [&] {
        if (ahead.steps == 0) return;
        const Tile tile(p, blockIdx.x / CLUSTER, rank);
        if (ahead.is_b) {
            prefetch<OperandB, TILE_N>(ahead, b, tile.n);
        } else {
            prefetch<OperandA, TILE_M>(ahead, a, tile.m);
        }
    };
    multiply<2, false>(shared, p, out, c, alpha, beta, prepare, [&] {
        const int rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
        unsigned short mask = 0;
        if (threadIdx.x == CONSUMER_THREADS) {
#pragma unroll
            for (int i = 0; i < CLUSTER_N; i++) mask |= 1 << (i * CLUSTER_M + rank_m);
            bring<OperandA, CLUSTER_N>(shared, shared, a_map, of_a, p, rank, rank_n, mask,
                                       [](const Tile& tile) { return tile.m; });
        } else if (threadIdx.x == CONSUMER_THREADS + 32) {
#pragma unroll
            for (int i = 0; i < CLUSTER_M; i++) mask |= 1 << (rank_n * CLUSTER_M + i);
            bring<OperandB, CLUSTER_M>(shared, shared + B_OFFSET, b_map, of_b, p, rank, rank_m, mask,
                                       [](const Tile& tile) { return tile.n; });
        }
    });
}
