// Matrix products with wgmma (wgmma.cuh) of operands that the TMA brings: aligned to 16 bytes, in lines of contiguous
// elements.
//
// Two threads are producers, of one operand each. CTAs of a cluster in a line share a tile, of which each loads a part for
// all of them. Of an operand with fewer rows than a tile, only those that exist are brought: the TMA takes as long for
// others, and rows of garbage meet no row of the result.
//
// The TMA asks for addresses and distances of whole vectors (16 bytes). Of an operand that does not lie so, every eighth
// line does but for where it begins in a vector: it is brought as 8 PARTS, whose maps begin up to a vector early, by as
// many elements as the coordinates are moved. Rows then lie part by part in shared memory, as wgmma.cuh knows; lines of K
// are brought one by one, each to its place.
//
// While the kernels before this one end, the consumers bring the first lines of one operand to the L2.
#include "wgmma.cuh"

constexpr int PRODUCER_THREADS = CONSUMERS > 1 ? 128 : 64;  // setmaxnreg takes whole warpgroups

template <bool VALUE>
struct Constant {
    static constexpr bool value = VALUE;
};

struct Brought {
    long long line;     // elements between lines
    unsigned batch[2];  // whether the operand moves along the batch's dimensions
    unsigned bytes;     // that arrive in a stage
};

// An operand's tensor maps: of all lines, or of every eighth line each.
template <int PARTS>
struct Maps {
    TensorMap part[PARTS];

    __device__ __forceinline__ void prefetch() const {
#pragma unroll
        for (int i = 0; i < PARTS; i++) prefetch_descriptor(part[i]);
    }
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
template <class Operand, int PARTS, int SHARERS, class Line>
__device__ __forceinline__ void bring(unsigned shared, unsigned first, const Maps<PARTS>& maps, const ELEMENT* matrix,
                                      const Brought& operand, const Wgmma& p, unsigned rank, int sharer,
                                      unsigned short mask, Line line) {
    static_assert(PARTS == 1 || (SHARERS == 1 && Operand::WIDTH == 64));
    constexpr int SHARE = Operand::LINES / SHARERS;
    constexpr int BOX = SHARE < 256 ? SHARE : 256;  // lines that the TMA takes at once
    static_assert(Operand::LINES % SHARERS == 0 && SHARE % 8 == 0 && SHARE % BOX == 0);
    constexpr int LINE_BYTES = Operand::WIDTH * 2;

    // Elements of a vector before the first line, and before the next one where that begins a vector.
    const int before = reinterpret_cast<unsigned long long>(matrix) / sizeof(ELEMENT) % PARTS;
    const int shift = operand.line % PARTS;
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
            // Of slab `slab`, lines from `outer` on to line `to` of shared memory.
            auto load = [&](int slab, int to, const TensorMap& map, int begin, int outer, auto multicast) {
                const int inner = slab * Operand::WIDTH + begin + (Operand::ALONG_K ? k : row);
                load_box<decltype(multicast)::value>(stage + slab * Operand::SLAB_BYTES + to * LINE_BYTES, map,
                                                     {inner, outer, batch0, batch1}, full, mask);
            };
            const int first_line = Operand::ALONG_K ? row : k;
            auto load_share = [&](int share, auto multicast) {
#pragma unroll
                for (int slab = 0; slab < Operand::SLABS; slab++) {
#pragma unroll
                    for (int begin = 0; begin < SHARE; begin += BOX) {
                        const int at = share * SHARE + begin;
                        load(slab, at, maps.part[0], 0, first_line + at, multicast);
                    }
                }
            };
            if constexpr (PARTS > 1) {
#pragma unroll
                for (int slab = 0; slab < Operand::SLABS; slab++) {
#pragma unroll 1
                    for (int at = 0; at < (Operand::ALONG_K ? 1 : Operand::LINES / PARTS); at++) {
#pragma unroll
                        for (int part = 0; part < PARTS; part++) {
                            const int to = Operand::ALONG_K ? part * (Operand::LINES / PARTS) : at * PARTS + part;
                            load(slab, to, maps.part[part], (before + part * shift) % PARTS, first_line / PARTS + at,
                                 Constant<false>{});
                        }
                    }
                }
            } else if (alone) {
#pragma unroll 1
                for (int share = 0; share < SHARERS; share++) load_share(share, Constant<false>{});
                alone = ring.stage + 1 < STAGES;
            } else {
                load_share(sharer, Constant<(SHARERS > 1)>{});
            }
        }
    }
    if (p.early) launch_dependents();  // they start while this kernel ends
}

extern "C" __global__ void __launch_bounds__(CONSUMER_THREADS + PRODUCER_THREADS, CTAS)
    matmul_wgmma(const __grid_constant__ Maps<A_PARTS> a_maps, const __grid_constant__ Maps<B_PARTS> b_maps,
                 const __grid_constant__ Brought of_a, const __grid_constant__ Brought of_b,
                 const __grid_constant__ Ahead ahead, const __grid_constant__ Wgmma p, void* out, const void* c,
                 const ELEMENT* a, const ELEMENT* b, float alpha, float beta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const unsigned shared = shared_address(memory);
    if (threadIdx.x == 0) {
        a_maps.prefetch();
        b_maps.prefetch();
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
    multiply(shared, p, out, c, alpha, beta, prepare, [&] {
        const int rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
        unsigned short mask = 0;
        if (threadIdx.x == CONSUMER_THREADS) {
#pragma unroll
            for (int i = 0; i < CLUSTER_N; i++) mask |= 1 << (i * CLUSTER_M + rank_m);
            bring<OperandA, A_PARTS, CLUSTER_N>(shared, shared, a_maps, a, of_a, p, rank, rank_n, mask,
                                                [](const Tile& tile) { return tile.m; });
        } else if (threadIdx.x == CONSUMER_THREADS + 32) {
#pragma unroll
            for (int i = 0; i < CLUSTER_M; i++) mask |= 1 << (rank_n * CLUSTER_M + i);
            bring<OperandB, B_PARTS, CLUSTER_M>(shared, shared + B_OFFSET, b_maps, b, of_b, p, rank, rank_m, mask,
                                                [](const Tile& tile) { return tile.n; });
        }
    });
}
