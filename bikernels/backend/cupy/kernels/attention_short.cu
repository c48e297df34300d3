// Attention of few queries to keys that, with their values, fit in a CTA's shared memory: attention.cu's bytes, in the
// order of docs/contract.md, section 11. Here neither memory nor arithmetic bounds the kernel but latency: one round trip
// to memory, the chain over a key's elements, softmax, and the chain over all keys. So everything is copied at once,
// threads meet four times, and the code is short, since no launch finds it in the instruction cache.
//
// ELEMENT: dtype of queries, keys, values and result; it accumulates in float. ROWS: queries of a CTA, which share keys.
// A thread has the keys that are its lane of softmax's tree (sum_tree.cuh), and later a column of the values.
#include "async_copy.cuh"
#include "layout.cuh"
#include "overlap.cuh"
#include "softmax.cuh"

constexpr int MOST_THREADS = SUM_LANES, MOST_WARPS = MOST_THREADS / WARP;  // half of them for at most so many keys
constexpr int VECTOR = 16 / sizeof(ELEMENT);                               // elements in 16 bytes
constexpr int STEP = 8;                                                    // keys that a thread folds at a time

enum Axis { BATCH, HEAD, PLACE };

struct ShortAttention {
    Divisor groups, queries, row_teams;  // heads of keys; queries of a head; CTAs for the queries that share keys
    int sharing;                         // heads of queries for one of keys
    int keys, padded;                    // how many there are; the next multiple of STEP
    int width, columns;                  // elements of a key and of a value
    int key_shift, value_shift;          // by powers of 2, threads for a key's vectors and for a value's
    float query_factor, key_factor;
    long long query_along, out_along;
    long long query[3], key[3], value[3], out[3];  // strides by Axis
};

// Queue copies of rows whose elements are `vectors` vectors; of those from `rows` to `padded`, zeros.
__device__ __forceinline__ void copy_rows(unsigned char* to, const ELEMENT* from, long long step, int rows, int padded,
                                          int pitch, int vectors, int shift) {
    const int part = threadIdx.x & ((1 << shift) - 1), advance = blockDim.x >> shift;
    if (part < vectors) {
        const unsigned shared = shared_address(to) + part * 16;
#pragma unroll 4
        for (int row = threadIdx.x >> shift; row < padded; row += advance)
            copy_vector_async(shared + row * pitch, from + (row < rows ? row * step : 0) + part * VECTOR,
                              row < rows ? 16 : 0);
    }
    commit_copies();
}

// Of unsigned words that are ordered as the floats are, NaNs of softmax (which are positive) above all.
__device__ __forceinline__ unsigned ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 | 0x80000000);
}
__device__ __forceinline__ float of_ordered(unsigned word) {
    return __uint_as_float(word & 0x80000000u ? word ^ 0x80000000u : ~word);
}

// What each warp has found.
struct Scratch {
    alignas(16) unsigned maxima[ROWS][MOST_WARPS];
    alignas(16) float sums[ROWS][MOST_WARPS];
    alignas(16) unsigned counts[ROWS][MOST_WARPS];
};

__device__ __forceinline__ unsigned max_of_warp(unsigned x) {
    unsigned result;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(x));
    return result;
}
__device__ __forceinline__ unsigned sum_of_warp(unsigned x) {
    unsigned result;
    asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(x));
    return result;
}

// STEP factors of a thread's chains.
struct Factors {
    float weight[ROWS][STEP], value[STEP];

    __device__ __forceinline__ void load(const float* weights, int pitch, const ELEMENT* values, int columns) {
#pragma unroll
        for (int i = 0; i < STEP; i++) value[i] = widen(values[i * columns]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < STEP; i += 4) {
                const float4 four = *reinterpret_cast<const float4*>(weights + r * pitch + i);
                weight[r][i] = four.x, weight[r][i + 1] = four.y, weight[r][i + 2] = four.z, weight[r][i + 3] = four.w;
            }
        }
    }
    __device__ __forceinline__ void multiply(float (&acc)[ROWS]) const {
#pragma unroll
        for (int i = 0; i < STEP; i++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) acc[r] = fused(weight[r][i], value[i], acc[r]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    attention(const __grid_constant__ ShortAttention p, ELEMENT* out, const ELEMENT* query, const ELEMENT* key,
              const ELEMENT* value) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ Scratch scratch;
    launch_dependents();  // they wait for this kernel's end
    const int threads = blockDim.x, key_pitch = p.width * sizeof(ELEMENT) + 16;  // so that a warp reads without conflicts
    const int pitch = p.padded + STEP;  // of the weights; also of values there is a step more, which is read in vain
    unsigned char* const keys = memory;
    ELEMENT* const values = reinterpret_cast<ELEMENT*>(keys + p.keys * key_pitch);
    float* const queries = reinterpret_cast<float*>(values + pitch * p.columns);
    float* const weights = queries + ROWS * p.width;

    long long row_team = blockIdx.x, head = p.row_teams.divide(row_team);
    const long long batch = p.groups.divide(head);
    const int first = static_cast<int>(row_team) * ROWS;
    const int rows = min(ROWS, p.sharing * static_cast<int>(p.queries.number) - first);
    const ELEMENT* from[ROWS];
    ELEMENT* to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        long long place = first + min(r, rows - 1);
        const long long member = head * p.sharing + p.queries.divide(place);
        from[r] = query + batch * p.query[BATCH] + member * p.query[HEAD] + place * p.query[PLACE];
        to[r] = out + batch * p.out[BATCH] + member * p.out[HEAD] + place * p.out[PLACE];
    }
    key += batch * p.key[BATCH] + head * p.key[HEAD];
    value += batch * p.value[BATCH] + head * p.value[HEAD];

    wait_for_predecessors();
    copy_rows(keys, key, p.key[PLACE], p.keys, p.keys, key_pitch, p.width / VECTOR, p.key_shift);
    float element[ROWS];
    const auto load_queries = [&](int i) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) element[r] = i < p.width ? widen(from[r][i * p.query_along]) : 0;
    };
    const auto keep_queries = [&](int i) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (i < p.width) queries[r * p.width + i] = element[r] * p.query_factor;
        }
    };
    load_queries(threadIdx.x);
    copy_rows(reinterpret_cast<unsigned char*>(values), value, p.value[PLACE], p.keys, p.padded,
              p.columns * sizeof(ELEMENT), p.columns / VECTOR, p.value_shift);
    keep_queries(threadIdx.x);
    if (p.width > threads) {
        load_queries(threadIdx.x + threads);
        keep_queries(threadIdx.x + threads);
    }
    wait_for_copies<1>();
    __syncthreads();

    // Scores. A thread reads again what it alone has written.
    unsigned most[ROWS] = {};
#pragma unroll 1
    for (int j = threadIdx.x; j < p.keys; j += threads) {
        float score[ROWS] = {};
        const uint4* const vectors = reinterpret_cast<const uint4*>(keys + j * key_pitch);
#pragma unroll 4
        for (int i = 0; i < p.width; i += VECTOR) {
            float x[VECTOR];
            unpack(vectors[i / VECTOR], static_cast<ELEMENT*>(nullptr), x);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) x[v] = x[v] * p.key_factor;
#pragma unroll
            for (int v = 0; v < VECTOR; v += 4) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float4 four = *reinterpret_cast<const float4*>(queries + r * p.width + i + v);
                    score[r] = fused(four.x, x[v], score[r]);
                    score[r] = fused(four.y, x[v + 1], score[r]);
                    score[r] = fused(four.z, x[v + 2], score[r]);
                    score[r] = fused(four.w, x[v + 3], score[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            score[r] = score[r] + 0.0f;
            weights[r * pitch + j] = score[r];
            most[r] = max(most[r], ordered(score[r]));
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        most[r] = max_of_warp(most[r]);
        if (lane_id() == 0) scratch.maxima[r][warp_id()] = most[r];
    }
    __syncthreads();

    // Exponentials, and the sum of those that are not the maximum's.
    float maximum[ROWS], sum[ROWS] = {};
    unsigned count[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const uint4 few = *reinterpret_cast<const uint4*>(scratch.maxima[r]);
        most[r] = max(max(few.x, few.y), max(few.z, few.w));
        if (threads == MOST_THREADS) {
            const uint4 more = *reinterpret_cast<const uint4*>(scratch.maxima[r] + 4);
            most[r] = max(most[r], max(max(more.x, more.y), max(more.z, more.w)));
        }
        maximum[r] = of_ordered(most[r]);
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < p.keys; j += threads) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float x = weights[r * pitch + j], e = exponential_anywhere<true>(x, maximum[r]);
            const bool is_maximum = x - maximum[r] == 0;
            weights[r * pitch + j] = e;
            count[r] += is_maximum;
            sum[r] += is_maximum ? 0.0f : e;
        }
    }
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        count[r] = sum_of_warp(count[r]);
        if (lane_id() == 0) {
            scratch.sums[r][warp_id()] = sum[r];
            scratch.counts[r][warp_id()] = count[r];
        }
    }
    __syncthreads();

    // Weights, and zeros behind them.
    float divisor[ROWS], reciprocal[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float4 few = *reinterpret_cast<const float4*>(scratch.sums[r]);
        const uint4 counts = *reinterpret_cast<const uint4*>(scratch.counts[r]);
        sum[r] = (few.x + few.y) + (few.z + few.w);
        count[r] = counts.x + counts.y + counts.z + counts.w;
        if (threads == MOST_THREADS) {  // else lanes that hold nothing
            const float4 more = *reinterpret_cast<const float4*>(scratch.sums[r] + 4);
            const uint4 others = *reinterpret_cast<const uint4*>(scratch.counts[r] + 4);
            sum[r] = sum[r] + ((more.x + more.y) + (more.z + more.w));
            count[r] += others.x + others.y + others.z + others.w;
        }
        divisor[r] = softmax_normaliser(static_cast<float>(count[r]), sum[r], false);
        reciprocal[r] = 1 / divisor[r];
    }
#pragma unroll 1
    for (int j = threadIdx.x; j < pitch; j += threads) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x = 0;
            if (j < p.keys && maximum[r] != lowest<float>()) {
                x = weights[r * pitch + j];
                x = divisor[r] <= FEW && x > EXP_NEAR ? divide_near(x, divisor[r], reciprocal[r]) : x / divisor[r];
            }
            weights[r * pitch + j] = x;
        }
    }
    wait_for_copies<0>();
    __syncthreads();

    // Results. Past the end weight and value are zero, which changes no bit of what ends with + 0.
#pragma unroll 1
    for (int column = threadIdx.x; column < p.columns; column += threads) {
        float acc[ROWS] = {};
        const ELEMENT* const below = values + column;
        Factors now, next;
        now.load(weights, pitch, below, p.columns);
#pragma unroll 2
        for (int j = 0; j < p.padded; j += STEP) {
            next.load(weights + j + STEP, pitch, below + (j + STEP) * p.columns, p.columns);
            now.multiply(acc);
            now = next;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r < rows) store(to[r] + column * p.out_along, acc[r] + 0.0f);
        }
    }
}
