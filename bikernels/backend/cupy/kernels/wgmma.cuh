// Products of bfloat16 and float16 with wgmma m64nNk16 and a float32 accumulator (sm_90a), but for how the operands come
// to shared memory: matmul_wgmma.cu and matmul_wgmma_copy.cu have producers and kernels.
//
// The order that the contract fixes: K is folded into one accumulator, in order, in groups of 16, starting at +0.
// Whatever lies past the end of K is zeros in shared memory, and groups of zeros leave an accumulator as it is.
//
// CONSUMERS warpgroups share the rows of a tile of a; further warps are producers, which keep STAGES tiles in flight. A
// tile of a with fewer than 64 rows leaves the rest of the instruction's rows unused: they read what lies behind in shared
// memory and are not written. CTAs of a cluster lie CLUSTER_M x CLUSTER_N. A tile that is walked along K in shared memory
// lies in slabs of 64 elements of K (128 bytes) times its rows, else in slabs of up to 64 of its rows times TILE_K.
//
// ELEMENT: bfloat16 or float16. TILE_M, TILE_N, TILE_K: of a CTA. A_K_CONTIGUOUS, B_K_CONTIGUOUS: how the operands lie in
// global memory. CTAS: that a multiprocessor holds. PRODUCER_REGISTERS: of a producer's thread, beside two consumers.
#pragma once
#define WGMMA_N TILE_N
#include "hopper.cuh"

constexpr int GROUP_K = 16;
constexpr int SLAB_K = 64;
constexpr int CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int CONSUMER_THREADS = 128 * CONSUMERS;
// Of a thread: a CTA of two consumers starts with 168 for each of three warpgroups, and PRODUCER_REGISTERS of them stay.
constexpr int CONSUMER_REGISTERS = (3 * 168 - PRODUCER_REGISTERS) / 2;
constexpr int BLOCKS = TILE_M > 64 * CONSUMERS ? TILE_M / (64 * CONSUMERS) : 1;  // of 64 rows, of a warpgroup

static_assert(sizeof(ELEMENT) == 2 && GROUP_K % TENSOR_CORE_GROUP == 0);
static_assert(TILE_K % SLAB_K == 0 && CONSUMERS <= 2 && PRODUCER_REGISTERS % 8 == 0 && CONSUMER_REGISTERS % 8 == 0);
static_assert(TILE_M % 8 == 0 && (TILE_M == 64 * CONSUMERS * BLOCKS || (CONSUMERS == 1 && TILE_M < 64)));

struct Wgmma {
    long long c_stride[2], out_stride[2];  // along m, along n
    long long c_batch[2], out_batch[2];    // along the batch's dimensions
    unsigned m, n, steps;                  // steps: tiles of K
    unsigned last_m, last_n;               // where a tile may begin at the latest
    unsigned tiles_m, tiles_n;             // in clusters
    unsigned tiles;                        // of all matrices
    unsigned band;                         // clusters along m that are walked before the next along n
    unsigned batch;                        // length of the batch's last dimension
    unsigned addend, c_dtype, out_dtype;
    unsigned vectors;  // the dimension along which 16 bytes of out can be written at once
    unsigned early;    // whether the next kernel may start while this one computes
};

enum { VECTORS_NONE, VECTORS_ALONG_N, VECTORS_ALONG_M };

// ---------------------------------------------------------------------------------------------------------- operands

__host__ __device__ constexpr int widest_slab(int rows) {
    return rows % 64 == 0 ? 64 : rows % 32 == 0 ? 32 : rows % 16 == 0 ? 16 : 8;
}

// ROWS x TILE_K elements of an operand in shared memory: slabs of lines of WIDTH elements, swizzled as wgmma reads them.
template <int ROWS, bool K_CONTIGUOUS>
struct Operand {
    static constexpr bool ALONG_K = K_CONTIGUOUS;
    static constexpr int BYTES = ROWS * TILE_K * 2;
    static constexpr int WIDTH = K_CONTIGUOUS ? SLAB_K : widest_slab(ROWS);  // of a slab, in elements
    static constexpr int SLABS = K_CONTIGUOUS ? TILE_K / WIDTH : ROWS / WIDTH;
    static constexpr int LINES = K_CONTIGUOUS ? ROWS : TILE_K;  // of a slab
    static constexpr int SLAB_BYTES = LINES * WIDTH * 2;
    static constexpr int SWIZZLE = WIDTH == 8 ? 0 : WIDTH * 2;

    // Of the first group of K and the first 64 rows of a tile.
    static __device__ __forceinline__ MatrixDescriptor descriptor(unsigned tile) {
        if constexpr (K_CONTIGUOUS) {
            return MatrixDescriptor(tile, 16, ROWS == 8 ? 0 : 1024, 128);
        } else {
            constexpr int NEXT = SLABS == 1 ? 0 : SLAB_BYTES, EIGHT = 8 * WIDTH * 2;
            return MatrixDescriptor(tile, SWIZZLE ? NEXT : EIGHT, SWIZZLE ? EIGHT : NEXT, SWIZZLE);
        }
    }

    // How much further, in bytes, group `group` of the 64 rows `block` lies.
    static constexpr __device__ __forceinline__ int offset(int block, int group) {
        constexpr int SLAB_GROUPS = SLAB_K / GROUP_K;
        return K_CONTIGUOUS
                   ? group / SLAB_GROUPS * SLAB_BYTES + block * (64 * 128) + group % SLAB_GROUPS * (GROUP_K * 2)
                   : block * 64 / WIDTH * SLAB_BYTES + group * (GROUP_K * WIDTH * 2);
    }
};

using OperandA = Operand<TILE_M, A_K_CONTIGUOUS>;
using OperandB = Operand<TILE_N, B_K_CONTIGUOUS>;

// Shared memory: all stages of a, all stages of b, a pair of barriers for each stage.
constexpr int B_OFFSET = STAGES * OperandA::BYTES;
constexpr int BARRIER_OFFSET = B_OFFSET + STAGES * OperandB::BYTES;
// What the instruction's unused rows read on: 64 lines along K, else the slabs that are missing to 64 rows, if there are
// several.
constexpr int BEHIND = A_K_CONTIGUOUS ? 64 * 128
                       : OperandA::SLABS == 1 ? 0
                                              : (64 / OperandA::WIDTH - OperandA::SLABS) * OperandA::SLAB_BYTES;
static_assert(TILE_M >= 64 || STAGES * OperandB::BYTES >= BEHIND);

__device__ __forceinline__ unsigned full_barrier(unsigned shared, int stage) {
    return shared + BARRIER_OFFSET + stage * 16;
}
__device__ __forceinline__ unsigned empty_barrier(unsigned shared, int stage) {
    return shared + BARRIER_OFFSET + stage * 16 + 8;
}

// The ring of stages, as the producer and the consumers each walk it.
struct Ring {
    int stage = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Where the tile of this CTA lies. The last one along a dimension begins early enough to lie within the matrix, if that is
// as long as a tile, and computes once more what its neighbour does: the TMA takes longer for lines that do not exist.
struct Tile {
    int m, n, batch[2];

    __device__ __forceinline__ Tile(const Wgmma& p, unsigned index, unsigned rank) {
        const unsigned of_matrix = p.tiles_m * p.tiles_n, matrix = index / of_matrix;
        index -= matrix * of_matrix;
        const unsigned of_band = p.band * p.tiles_n, band = index / of_band;
        index -= band * of_band;
        const unsigned height = min(p.band, p.tiles_m - band * p.band);
        m = min(((band * p.band + index % height) * CLUSTER_M + rank % CLUSTER_M) * TILE_M, p.last_m);
        n = min((index / height * CLUSTER_N + rank / CLUSTER_M) * TILE_N, p.last_n);
        batch[0] = matrix / p.batch;
        batch[1] = matrix % p.batch;
    }
};

// ----------------------------------------------------------------------------------------------------------- epilogue

__device__ __forceinline__ unsigned pack(bfloat16, float low, float high) {
    unsigned packed;  // a NaN becomes 0x7fff, the canonical one
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ unsigned pack(float16, float low, float high) {
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Word i of lane q of every four lanes becomes word q of lane i.
__device__ __forceinline__ void transpose_quad(unsigned (&word)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const unsigned received = __shfl_xor_sync(~0u, odd ? word[i] : word[i + 1], 1);
        (odd ? word[i] : word[i + 1]) = received;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const unsigned received = __shfl_xor_sync(~0u, upper ? word[i] : word[i + 2], 2);
        (upper ? word[i] : word[i + 2]) = received;
    }
}

// Call `use` with a value of the C++ type of a dtype that an addend or an output of these products can have.
template <class Use>
__device__ __forceinline__ void with_type(unsigned dtype, Use use) {
    if (dtype == DTYPE_FLOAT32) {
        use(float{});
    } else if (dtype == DTYPE_FLOAT64) {
        use(double{});
    } else {
        use(ELEMENT{});
    }
}

// *out = x, rounded once, a NaN as the canonical one.
__device__ __forceinline__ void put(bfloat16* out, float x) { *out = to_bfloat16(x); }
__device__ __forceinline__ void put(float16* out, float x) { *out = to_float16(x); }
__device__ __forceinline__ void put(float* out, float x) { *reinterpret_cast<unsigned*>(out) = to_float32_bits(x); }
__device__ __forceinline__ void put(double* out, float x) {
    *reinterpret_cast<unsigned long long*>(out) = to_float64_bits(x);
}

// The transpose of 8 x 8 elements, of which each lane has two neighbours of row lane / 4.
__device__ __forceinline__ unsigned transpose_block(unsigned word) {
    unsigned transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}

// Writes the 64 x TILE_N block of a warpgroup. Accumulator 4 i + 2 h + e of a thread is row lane / 4 + 8 h of the warp's
// 16, column 8 i + 2 (lane % 4) + e.
__device__ __forceinline__ void write_block(const Wgmma& p, void* out, const void* c, float alpha, float beta,
                                            const Tile& tile, int block, float (&acc)[TILE_N / 2]) {
    constexpr int OCTETS = TILE_N / 8;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int first = block * 64 + warp * 16;
    if (first >= TILE_M) return;
    const unsigned vectors = is_vector_aligned(out) ? p.vectors : VECTORS_NONE;
    const int column = lane % 4 * 2;

    if (alpha != 1) {
#pragma unroll
        for (int i = 0; i < TILE_N / 2; i++) acc[i] = alpha * acc[i];
    }
    // Visit the elements of a thread's row h that exist, with their distance in columns from the thread's first. `begin`
    // makes of where that lies what visits then share.
    auto each = [&](int h, auto begin, auto visit) {
        const int row = first + lane / 4 + 8 * h;
        const long long m = tile.m + row;
        const int left = row < TILE_M && m < p.m ? static_cast<int>(p.n) - tile.n - column : 0;
        const auto line = begin(m, tile.n + column);
#pragma unroll
        for (int i = 0; i < OCTETS; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (8 * i + e < left) visit(line, acc[4 * i + 2 * h + e], 8 * i + e);
            }
        }
    };
    if (p.addend) {
        with_type(p.c_dtype, [&](auto type) {
            using Type = decltype(type);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                each(
                    h,
                    [&](long long m, int n) {
                        return static_cast<const Type*>(c) + tile.batch[0] * p.c_batch[0] +
                               tile.batch[1] * p.c_batch[1] + m * p.c_stride[0] + n * p.c_stride[1];
                    },
                    [&](const Type* line, float& t, int n) {
                        t = fused(beta, accumulate<float>(line[n * p.c_stride[1]]), t);
                    });
            }
        });
    }
    auto word_of = [&](int octet, int h) {
        return pack(ELEMENT{}, acc[4 * octet + 2 * h], acc[4 * octet + 2 * h + 1]);
    };
    const long long of_batch = tile.batch[0] * p.out_batch[0] + tile.batch[1] * p.out_batch[1];
    // Where a vector that begins at this row and column is to be written, if it exists.
    auto place = [&](int row, int n) -> ELEMENT* {
        const long long m = tile.m + row;
        if (row >= TILE_M || m >= p.m || tile.n + n >= p.n) return nullptr;
        return static_cast<ELEMENT*>(out) + of_batch + m * p.out_stride[0] + (tile.n + n) * p.out_stride[1];
    };
    auto write_vector = [](ELEMENT* to, const unsigned (&word)[4]) {
        if (to) *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    };
    auto write_word = [](ELEMENT* to, unsigned word) {
        if (to) *reinterpret_cast<unsigned*>(to) = word;
    };
    unsigned word[4];
    if (vectors == VECTORS_ALONG_N) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first + lane / 4 + 8 * h;
#pragma unroll
            for (int i = 0; i + 4 <= OCTETS; i += 4) {
#pragma unroll
                for (int j = 0; j < 4; j++) word[j] = word_of(i + j, h);
                transpose_quad(word);
                write_vector(place(row, 8 * (i + lane % 4)), word);
            }
#pragma unroll
            for (int i = OCTETS / 4 * 4; i < OCTETS; i++) write_word(place(row, 8 * i + column), word_of(i, h));
        }
    } else if (vectors == VECTORS_ALONG_M) {
        // Two lanes of a quad write the 16 rows of a column.
#pragma unroll
        for (int i = 0; i + 2 <= OCTETS; i += 2) {
#pragma unroll
            for (int j = 0; j < 4; j++) word[j] = transpose_block(word_of(i + j / 2, j % 2));
            transpose_quad(word);
            write_vector(place(first + lane % 2 * 8, 8 * (i + lane % 4 / 2) + lane / 4), word);
        }
        if constexpr (OCTETS % 2) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                write_word(place(first + 8 * h + column, 8 * (OCTETS - 1) + lane / 4),
                           transpose_block(word_of(OCTETS - 1, h)));
        }
    } else {
        with_type(p.out_dtype, [&](auto type) {
            using Type = decltype(type);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                each(
                    h,
                    [&](long long m, int n) {
                        return static_cast<Type*>(out) + of_batch + m * p.out_stride[0] + n * p.out_stride[1];
                    },
                    [&](Type* line, float& t, int n) { put(line + n * p.out_stride[1], t); });
            }
        });
    }
}

// ----------------------------------------------------------------------------------------------------------- consumers

// WRITTEN: whether threads wrote the stages, and not the TMA.
template <bool WRITTEN>
__device__ __forceinline__ void consume(unsigned shared, const Wgmma& p, void* out, const void* c, float alpha,
                                        float beta) {
    const unsigned rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
    auto release = [&](int stage) {
        if constexpr (CLUSTER > 1) {
            if (lane < CLUSTER) arrive_in_cluster(empty_barrier(shared, stage), lane);
        } else {
            if (lane == 0) arrive(empty_barrier(shared, stage));
        }
    };

    MatrixDescriptor first_a = OperandA::descriptor(shared), first_b = OperandB::descriptor(shared + B_OFFSET);
    first_a.low += OperandA::offset(warpgroup * BLOCKS, 0) / 16;

    Ring ring;
    for (unsigned index = blockIdx.x / CLUSTER; index < p.tiles; index += gridDim.x / CLUSTER) {
        float acc[BLOCKS][TILE_N / 2];
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
            for (int i = 0; i < TILE_N / 2; i++) acc[block][i] = 0;
        }
        int previous = -1;
#pragma unroll 1
        for (int step = 0; step < p.steps; step++, ring.advance()) {
            wait_barrier(full_barrier(shared, ring.stage), ring.parity);
            if constexpr (WRITTEN) fence_written();
            MatrixDescriptor a = first_a, b = first_b;
            a.low += ring.stage * (OperandA::BYTES / 16);
            b.low += ring.stage * (OperandB::BYTES / 16);
            a.low = __shfl_sync(~0u, a.low, 0);
            b.low = __shfl_sync(~0u, b.low, 0);
            wgmma_fence();
#pragma unroll
            for (int group = 0; group < TILE_K / GROUP_K; group++) {
#pragma unroll
                for (int block = 0; block < BLOCKS; block++) {
                    MatrixDescriptor block_a = a, all_b = b;
                    block_a.low += OperandA::offset(block, group) / 16;
                    all_b.low += OperandB::offset(0, group) / 16;
                    wgmma(acc[block], block_a, all_b);
                }
            }
            wgmma_commit();
            wgmma_wait<1>();  // the previous stage has been read
            if (previous >= 0) release(previous);
            previous = ring.stage;
        }
        wgmma_wait<0>();
        release(previous);
        const Tile tile(p, index, rank);
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            write_block(p, out, c, alpha, beta, tile, warpgroup * BLOCKS + block, acc[block]);
    }
}

// -------------------------------------------------------------------------------------------------------------- kernel

// What every kernel does: `prepare` runs in the consumers while kernels before this one end, `produce` in the threads
// behind the consumers'. Each stage waits for FULL_ARRIVALS of the producers, and with several consumers registers move
// from the producers to them.
//
// CTAs of a cluster set up their barriers without waiting for one another: a consumer waits before it first arrives at
// another CTA's barrier, and a producer's second round of stages waits for arrivals of all consumers.
template <int FULL_ARRIVALS, bool WRITTEN, class Prepare, class Produce>
__device__ __forceinline__ void multiply(unsigned shared, const Wgmma& p, void* out, const void* c, float alpha,
                                         float beta, Prepare prepare, Produce produce) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(full_barrier(shared, stage), FULL_ARRIVALS);
            init_barrier(empty_barrier(shared, stage), CONSUMERS * 4 * CLUSTER);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) arrive_at_cluster();
    if (threadIdx.x < CONSUMER_THREADS) prepare();
    wait_for_predecessors();

    if (threadIdx.x >= CONSUMER_THREADS) {
        if constexpr (CONSUMERS > 1) give_registers<PRODUCER_REGISTERS>();
        produce();
        if constexpr (CLUSTER > 1) wait_for_cluster();
    } else {
        if constexpr (CONSUMERS > 1) take_registers<CONSUMER_REGISTERS>();
        if constexpr (CLUSTER > 1) wait_for_cluster();
        consume<WRITTEN>(shared, p, out, c, alpha, beta);
    }
    if constexpr (CLUSTER > 1) {
        sync_cluster();  // no CTA leaves while another may still write to its shared memory
    }
}
