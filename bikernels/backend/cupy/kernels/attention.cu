// Attention of few queries: products with all keys, softmax, and products with all values in one kernel, in the order
// of docs/contract.md, section 11. What bounds it is the reading of keys and values, and the chain over all keys that
// every element of the result is, one fused multiply-add after the other.
//
// ELEMENT: dtype of queries, keys, values and result; it accumulates in float. ROWS: queries of a team, those of all
// heads that share keys among them, so that what is read of keys and values serves all of them. A team is a CTA or a
// cluster (sm_90 on): each CTA has the scores of some keys, and later the results of some columns of the values. Of
// every SUM_LANES keys a CTA has neighbours, so that its lanes of softmax's tree are its own (sum_tree.cuh).
#include "hopper.cuh"
#include "layout.cuh"
#include "overlap.cuh"
#include "softmax.cuh"

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int STAGES = 4;  // of a ring that keys or values are copied to
constexpr int SIZE = sizeof(ELEMENT);
constexpr int VECTOR = 16 / SIZE;                 // elements in 16 bytes
constexpr int PARTS = 4, DEPTH = PARTS * VECTOR;  // vectors, and elements, that a stage has of every thread's key
constexpr int KEY_PITCH = PARTS * 16 + 16;        // in bytes; a warp reads without conflicts
constexpr int MOST_KEYS = 256;                    // of which a stage has values
constexpr int PADDING = 4;                        // between rows of weights, also against conflicts

enum Axis { BATCH, HEAD, PLACE, ALONG };

struct Attention {
    long long keys, width, columns;      // of a head: its length, elements of a key, and of a value
    Divisor groups, queries, row_teams;  // heads of keys; queries of a head; teams for the queries that share keys
    long long sharing;                   // heads of queries for one of keys
    long long slice;                     // columns of a CTA, a power of 2 from 16 on
    long long tile;                      // keys of which a stage has values, a power of 2
    long long stage_bytes;
    long long is_apart;  // whether values have a ring of their own, and are copied from the beginning
    long long is_causal;
    long long mask_dtype;  // -1 without a mask
    double query_factor, key_factor;
    long long query[4], key[4], value[4], out[4], mask[4];  // strides by Axis; of the mask PLACE is the query's
};

// What a thread knows of its team.
struct Team {
    int ctas, rank;
    int group_shift;  // keys of this CTA among SUM_LANES, as a power of 2
    int batch, head;  // head of keys
    int first, rows;  // of the queries that share keys: the first of the team, and how many it has

    __device__ __forceinline__ explicit Team(const Attention& p) : ctas(1), rank(0) {
#if __CUDA_ARCH__ >= 900
        ctas = cluster_size();
        rank = cluster_rank();
#endif
        group_shift = __ffs(SUM_LANES / ctas) - 1;
        long long row_team = blockIdx.x / ctas, group = p.row_teams.divide(row_team);
        batch = static_cast<int>(p.groups.divide(group));
        head = static_cast<int>(group);
        first = static_cast<int>(row_team) * ROWS;
        rows = min(ROWS, static_cast<int>(p.sharing * p.queries.number) - first);
    }

    // All threads have written what others will read.
    __device__ __forceinline__ void meet() const { sync_ctas(ctas); }

    template <class T>
    __device__ __forceinline__ void publish(T* place, int to, T value) const {
#if __CUDA_ARCH__ >= 900
        if (ctas > 1) {
            store_in_cluster(shared_address(place), to, value);
            return;
        }
#endif
        *place = value;
    }

    // The key that is number `own` of this CTA's, and how many of the first `keys` it has.
    __device__ __forceinline__ int key(int own) const {
        const int within = own & ((1 << group_shift) - 1);
        return (own >> group_shift) * SUM_LANES + (rank << group_shift) + within;
    }
    __device__ __forceinline__ int own_of(int keys) const {
        const int group = 1 << group_shift;
        return keys / SUM_LANES * group + max(0, min(group, keys % SUM_LANES - rank * group));
    }
    // Where a query's elements begin.
    __device__ __forceinline__ long long offset(const Attention& p, const long long (&stride)[4], int row) const {
        long long place = first + row;
        const long long member = p.queries.divide(place);
        return batch * stride[BATCH] + (head * p.sharing + member) * stride[HEAD] + place * stride[PLACE];
    }
};

// Dynamic shared memory, the same in every CTA of a team: `Plan.shared_bytes` of attention.py.
struct Shared {
    unsigned char* ring;
    unsigned char* values;  // the ring of values
    float* queries;         // [ROWS][padded]
    int padded;
    float* weights;  // [ROWS][pitch]: of this CTA's keys scores, then exponentials, then weights
    int pitch;
    float* others;      // [2][ROWS][tile + PADDING]: weights of a tile, from the CTAs that have them
    float* maxima;      // [ctas * WARPS][ROWS]
    float* sums;        // [ROWS][chunks][ctas]
    unsigned* counts;   // likewise
    float* maximum;     // [ROWS]
    float* divisor;     // [ROWS]
    float* reciprocal;  // [ROWS], of the divisor

    __device__ __forceinline__ Shared(const Attention& p, const Team& team, unsigned char* shared) {
        const int groups = static_cast<int>((p.keys + SUM_LANES - 1) / SUM_LANES);
        const int places = ROWS * static_cast<int>(chunks_of(p.keys)) * team.ctas;
        padded = static_cast<int>((p.width + DEPTH - 1) / DEPTH) * DEPTH;
        pitch = (groups << team.group_shift) + PADDING;
        ring = shared;
        values = shared + (p.is_apart ? STAGES * p.stage_bytes : 0);
        queries = reinterpret_cast<float*>(values + STAGES * p.stage_bytes);
        weights = queries + ROWS * padded;
        others = weights + ROWS * pitch;
        maxima = others + (team.ctas > 1 ? 2 * ROWS * (p.tile + PADDING) : 0);
        sums = maxima + team.ctas * WARPS * ROWS;
        counts = reinterpret_cast<unsigned*>(sums + places);
        maximum = reinterpret_cast<float*>(counts + places);
        divisor = maximum + ROWS;
        reciprocal = divisor + ROWS;
    }
};

__device__ __forceinline__ int quads_of(int elements) { return (elements + 3) / 4; }

// Rows of keys or of values, copied to shared memory by vectors if they lie so; what is not there becomes zero.
struct Source {
    const ELEMENT* data;
    long long step, along;
    int keys, length;
    bool vectors;

    __device__ __forceinline__ Source(const ELEMENT* all, const Team& team, const long long (&stride)[4],
                                      long long keys, long long length)
        : data(all + team.batch * stride[BATCH] + team.head * stride[HEAD]),
          step(stride[PLACE]),
          along(stride[ALONG]),
          keys(static_cast<int>(keys)),
          length(static_cast<int>(length)) {
        vectors = along == 1 && step % VECTOR == 0 && is_vector_aligned(data);
    }

    // How many of the VECTOR elements from `first` on there are.
    __device__ __forceinline__ int present(int first) const { return max(0, min(VECTOR, length - first)); }
    // The first `present` elements of VECTOR, and zeros.
    template <bool VECTORS>
    __device__ __forceinline__ void copy(unsigned char* to, const ELEMENT* from, int present) const {
        if constexpr (VECTORS) {
            copy_vector_async(shared_address(to), present > 0 ? from : data, present * SIZE);
        } else {
#pragma unroll 1
            for (int i = 0; i < VECTOR; i++)
                reinterpret_cast<ELEMENT*>(to)[i] = i < present ? from[i * along] : ELEMENT{};
        }
    }
};

// What the mask adds to a score: 0 or -inf of a boolean one.
__device__ __forceinline__ float addend(const Attention& p, const Team& team, const void* mask, int row, int key) {
    if (p.is_causal) return key <= (team.first + row) % p.queries.number ? 0.0f : lowest<float>();
    const long long offset = team.offset(p, p.mask, row) + key * p.mask[ALONG];
    const int dtype = static_cast<int>(p.mask_dtype);
    if (dtype == DTYPE_BOOL) return static_cast<const unsigned char*>(mask)[offset] ? 0.0f : lowest<float>();
    if (dtype == DTYPE_FLOAT32) return static_cast<const float*>(mask)[offset];
    return Element<ELEMENT, float>::load(mask, offset, 0);
}

// ---------------------------------------------------------------------------------------------------------- 1. scores

// The team's queries times their factor, zeros where there is none.
__device__ __forceinline__ void write_queries(const Attention& p, const Team& team, const Shared& shared,
                                              const ELEMENT* query) {
    const float factor = static_cast<float>(p.query_factor);
#pragma unroll 1
    for (int i = threadIdx.x; i < shared.padded; i += THREADS) {
        float x[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            x[r] = 0;
            if (r < team.rows && i < p.width) x[r] = widen(query[team.offset(p, p.query, r) + i * p.query[ALONG]]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) shared.queries[r * shared.padded + i] = x[r] * factor;
    }
}

// Copies of this CTA's keys: of a tile of THREADS keys a stage has DEPTH elements each.
struct Keys {
    const Attention& p;
    const Team& team;
    const Shared& shared;
    const Source source;
    const int own, segments, steps;
    int tile, segment;           // of the next copy
    const ELEMENT* from[PARTS];  // where the keys of the tile begin of which this thread copies a part; null of none

    __device__ __forceinline__ Keys(const Attention& p, const Team& team, const Shared& shared, const ELEMENT* all)
        : p(p),
          team(team),
          shared(shared),
          source(all, team, p.key, p.keys, p.width),
          own(team.own_of(source.keys)),
          segments(shared.padded / DEPTH),
          steps((own + THREADS - 1) / THREADS * segments),
          tile(0),
          segment(0) {}

    __device__ __forceinline__ void copy(int step) {
        if (step < steps) {
            unsigned char* const stage = shared.ring + step % STAGES * p.stage_bytes;
            const int place = threadIdx.x / PARTS, first = segment * DEPTH + threadIdx.x % PARTS * VECTOR;
            if (segment == 0) {
#pragma unroll
                for (int i = 0; i < PARTS; i++) {
                    const int number = tile * THREADS + place + i * (THREADS / PARTS);
                    from[i] = number < own ? source.data + team.key(number) * source.step : nullptr;
                }
            }
            unsigned char* const to = stage + place * KEY_PITCH + threadIdx.x % PARTS * 16;
            source.vectors ? copy_to<true>(to, first) : copy_to<false>(to, first);
            if (++segment == segments) segment = 0, tile++;
        }
        commit_copies();  // past the end an empty group, so that waiting counts the same throughout
    }

  private:
    template <bool VECTORS>
    __device__ __forceinline__ void copy_to(unsigned char* to, int first) const {
        const int present = source.present(first);
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            source.copy<VECTORS>(to + i * (THREADS / PARTS) * KEY_PITCH, from[i] + first * source.along,
                                 from[i] != nullptr ? present : 0);
    }
};

// Fold a stage into the scores of this thread's key.
__device__ __forceinline__ void fold_keys(const unsigned char* stage, const float* query, int padded, float factor,
                                          float (&score)[ROWS]) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float key[VECTOR];
        const uint4* const from = reinterpret_cast<const uint4*>(stage + threadIdx.x * KEY_PITCH);
        unpack(from[part], static_cast<ELEMENT*>(nullptr), key);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) key[i] = key[i] * factor;
#pragma unroll
        for (int i = 0; i < VECTOR; i += 4) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 four = *reinterpret_cast<const float4*>(query + r * padded + part * VECTOR + i);
                score[r] = fused(four.x, key[i], score[r]);
                score[r] = fused(four.y, key[i + 1], score[r]);
                score[r] = fused(four.z, key[i + 2], score[r]);
                score[r] = fused(four.w, key[i + 3], score[r]);
            }
        }
    }
}

// The scores of this CTA's keys, -inf of those that are not there, and this warp's maximum of each row for the team.
__device__ __forceinline__ void write_scores(const Attention& p, const Team& team, const Shared& shared, Keys& keys,
                                             const void* mask) {
    const float factor = static_cast<float>(p.key_factor);
    const int places = shared.pitch - PADDING;
    float score[ROWS] = {};
    int number = threadIdx.x, segment = 0;
#pragma unroll 1
    for (int step = 0; step < keys.steps; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        keys.copy(step + STAGES - 1);
        fold_keys(shared.ring + step % STAGES * p.stage_bytes, shared.queries + segment * DEPTH, shared.padded, factor,
                  score);
        if (++segment < keys.segments) continue;
        segment = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (number < keys.own) shared.weights[r * shared.pitch + number] = score[r] + 0.0f;
            score[r] = 0;
        }
        number += THREADS;
    }
    // From here on a thread has the places that it has written, and those behind the end.
    if (p.is_causal || p.mask_dtype >= 0) {
#pragma unroll 1
        for (int r = 0; r < team.rows; r++) {
            float* const row = shared.weights + r * shared.pitch;
#pragma unroll 1
            for (int i = threadIdx.x; i < keys.own; i += THREADS)
                row[i] = row[i] + addend(p, team, mask, r, team.key(i));
        }
    }
    float maximum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) maximum[r] = lowest<float>();
#pragma unroll 2
    for (int i = threadIdx.x; i < keys.own; i += THREADS) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) maximum[r] = larger_nan(maximum[r], shared.weights[r * shared.pitch + i]);
    }
    const int end = quads_of(keys.own) * 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < places; i += THREADS) {
        if (i < keys.own) continue;
#pragma unroll
        for (int r = 0; r < ROWS; r++) shared.weights[r * shared.pitch + i] = i < end ? lowest<float>() : 0.0f;
    }
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            maximum[r] = larger_nan(maximum[r], __shfl_xor_sync(~0u, maximum[r], distance));
    }
#if __CUDA_ARCH__ >= 900
    if (team.ctas > 1) wait_for_cluster();  // the others have started
#endif
    if (lane_id() < team.ctas) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            team.publish(shared.maxima + (team.rank * WARPS + warp_id()) * ROWS + r, lane_id(), maximum[r]);
    }
}

// --------------------------------------------------------------------------------------------------------- 2. softmax

// The lanes of this CTA in one chunk's tree, whose terms are the exponentials; a negative one stands for a term of the
// maximum, which is counted. LANES: of a thread.
template <int LANES>
__device__ __forceinline__ float sum_own_lanes(const float* row, int chunk, int groups, unsigned& count) {
    struct alignas(LANES * 4 < 16 ? LANES * 4 : 16) Neighbours {
        float x[LANES];
    };
    float lane[LANES] = {};
#pragma unroll
    for (int step = 0; step < SUM_CHUNK / SUM_LANES; step++) {
        const int group = chunk * (SUM_CHUNK / SUM_LANES) + step;
        if (group < groups) {
            const Neighbours terms = reinterpret_cast<const Neighbours*>(row)[group * WARP + lane_id()];
#pragma unroll
            for (int j = 0; j < LANES; j++) {
                const bool is_maximum = terms.x[j] < 0;
                count += is_maximum;
                lane[j] += is_maximum ? 0.0f : terms.x[j];
            }
        }
    }
#pragma unroll
    for (int n = LANES / 2; n > 0; n /= 2) {
#pragma unroll
        for (int j = 0; j < n; j++) lane[j] = lane[2 * j] + lane[2 * j + 1];
    }
    return sum_warp(lane[0]);
}

// Calls work(row, weights) for four neighbouring places at a time of the first `quads` of every row.
template <class Work>
__device__ __forceinline__ void for_quads(const Team& team, const Shared& shared, int quads, Work work) {
#pragma unroll 1
    for (int i = threadIdx.x; i < team.rows * quads; i += THREADS) {
        int row = 0;
#pragma unroll
        for (int r = 1; r < ROWS; r++) row += i >= r * quads;
        float4* const place = reinterpret_cast<float4*>(shared.weights + row * shared.pitch) + (i - row * quads);
        const float4 four = *place;
        float x[4] = {four.x, four.y, four.z, four.w};
        work(row, x);
        *place = make_float4(x[0], x[1], x[2], x[3]);
    }
}

// Scores become weights. Between the steps the team meets.
__device__ __forceinline__ void write_weights(const Attention& p, const Team& team, const Shared& shared, int own) {
    const int chunks = static_cast<int>(chunks_of(p.keys)), quads = quads_of(own);
    const int groups = (shared.pitch - PADDING) >> team.group_shift;
    const int all_warps = team.ctas * WARPS;  // at most as many as a warp has threads
    team.meet();
    for (int r = warp_id(); r < team.rows; r += WARPS) {
        const float maximum = max_warp(lane_id() < all_warps ? shared.maxima[lane_id() * ROWS + r] : lowest<float>());
        if (lane_id() == 0) shared.maximum[r] = maximum;
    }
    __syncthreads();

    for_quads(team, shared, quads, [&](int row, float(&x)[4]) {
        const float maximum = shared.maximum[row];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float e = exponential_anywhere<true>(x[j], maximum);
            x[j] = x[j] - maximum == 0 ? -e : e;
        }
    });
    __syncthreads();

    for (int task = warp_id(); task < team.rows * chunks; task += WARPS) {
        const int row = task / chunks, chunk = task - row * chunks;
        const float* const terms = shared.weights + row * shared.pitch;
        unsigned count = 0;
        float sum;
        switch (team.ctas) {
            case 1: sum = sum_own_lanes<8>(terms, chunk, groups, count); break;
            case 2: sum = sum_own_lanes<4>(terms, chunk, groups, count); break;
            case 4: sum = sum_own_lanes<2>(terms, chunk, groups, count); break;
            default: sum = sum_own_lanes<1>(terms, chunk, groups, count);
        }
        count = sum_warp(count);
        if (lane_id() < team.ctas) {
            team.publish(shared.sums + task * team.ctas + team.rank, lane_id(), sum);
            team.publish(shared.counts + task * team.ctas + team.rank, lane_id(), count);
        }
    }
    team.meet();
    // The sum of a chunk, from those of its CTAs' lanes.
    const auto sum_of_chunk = [&](int number, unsigned& count) {
        float part[THREAD_LANES];
#pragma unroll
        for (int i = 0; i < THREAD_LANES; i++) {
            part[i] = i < team.ctas ? shared.sums[number * team.ctas + i] : 0.0f;
            count += i < team.ctas ? shared.counts[number * team.ctas + i] : 0;
        }
        return fold_thread_lanes(part);
    };
    for (int r = warp_id(); r < team.rows; r += WARPS) {
        unsigned count = 0;
        float sum;
        if (chunks == 1) {
            sum = sum_of_chunk(r, count);
        } else {
            sum = sum_chunk<float, 1>(0, chunks, [&](long long first, float(&v)[THREAD_LANES]) {
#pragma unroll 1
                for (int j = 0; j < THREAD_LANES; j++) {  // v is a queue, because registers have no run-time index
                    const int chunk = static_cast<int>(first) + j;
                    const float next = chunk < chunks ? sum_of_chunk(r * chunks + chunk, count) : 0.0f;
#pragma unroll
                    for (int k = 0; k < THREAD_LANES - 1; k++) v[k] = v[k + 1];
                    v[THREAD_LANES - 1] = next;
                }
            });
            count = sum_warp(count);
        }
        const float divisor = softmax_normaliser(static_cast<float>(count), sum, false);
        if (lane_id() == 0) {
            shared.divisor[r] = divisor;
            shared.reciprocal[r] = 1 / divisor;
        }
    }
    __syncthreads();

    for_quads(team, shared, quads, [&](int row, float(&x)[4]) {
        const float divisor = shared.divisor[row], reciprocal = shared.reciprocal[row];
        const bool is_masked = shared.maximum[row] == lowest<float>();
        float least = fabsf(x[0]);
#pragma unroll
        for (int j = 0; j < 4; j++) x[j] = fabsf(x[j]), least = fminf(least, x[j]);
        if (divisor <= FEW && least > EXP_NEAR) {
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = divide_near(x[j], divisor, reciprocal);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = is_masked ? 0.0f : x[j] / divisor;
        }
    });
    team.meet();
}

// ---------------------------------------------------------------------------------------------------------- 3. values

// Factors of a few steps of a thread's chains, of FOLD_ROWS rows and COLUMNS columns of a slice.
template <int SLICE, int FOLD_ROWS, int COLUMNS>
struct Factors {
    static constexpr int STEPS = FOLD_ROWS > 2 ? 4 : 8;
    struct alignas(COLUMNS * SIZE) Neighbours {
        ELEMENT x[COLUMNS];
    };
    float4 weight[FOLD_ROWS][STEPS / 4];
    Neighbours value[STEPS];

    __device__ __forceinline__ void load(const float* weights, int pitch, const ELEMENT* values, int first) {
#pragma unroll
        for (int r = 0; r < FOLD_ROWS; r++) {
#pragma unroll
            for (int i = 0; i < STEPS / 4; i++)
                weight[r][i] = *reinterpret_cast<const float4*>(weights + r * pitch + first + 4 * i);
        }
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            value[i] = reinterpret_cast<const Neighbours*>(values + first * SLICE)[i * (SLICE / COLUMNS)];
    }

    __device__ __forceinline__ void multiply(float (&acc)[FOLD_ROWS][COLUMNS]) const {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
#pragma unroll
            for (int r = 0; r < FOLD_ROWS; r++) {
                const float4 four = weight[r][i / 4];
                const float w = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) acc[r][c] = fused(w, widen(value[i].x[c]), acc[r][c]);
            }
        }
    }
};

__device__ __forceinline__ float4 load_in_cluster(unsigned shared, unsigned rank) {
    float4 v;
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
        "}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(shared), "r"(rank)
        : "memory");
    return v;
}

// Copies of values, a tile of keys at a time.
struct Values {
    const Attention& p;
    const Shared& shared;
    const Source source;
    const int first_column, tile, tiles, vectors_shift;

    __device__ __forceinline__ Values(const Attention& p, const Team& team, const Shared& shared, const ELEMENT* all)
        : p(p),
          shared(shared),
          source(all, team, p.value, p.keys, p.columns),
          first_column(team.rank * static_cast<int>(p.slice)),
          tile(static_cast<int>(p.tile)),
          tiles((source.keys + tile - 1) >> (__ffs(tile) - 1)),
          vectors_shift(__ffs(static_cast<int>(p.slice) / VECTOR) - 1) {}

    __device__ __forceinline__ void copy(int number) const {
        if (number < tiles) {
            unsigned char* const stage = shared.values + number % STAGES * p.stage_bytes;
            source.vectors ? copy_to<true>(stage, number) : copy_to<false>(stage, number);
        }
        commit_copies();
    }
    __device__ __forceinline__ void copy_first() const {
#pragma unroll 1
        for (int number = 0; number < STAGES - 1; number++) copy(number);
    }

  private:
    template <bool VECTORS>
    __device__ __forceinline__ void copy_to(unsigned char* stage, int number) const {
        // A thread copies the same columns of all its keys.
        const int column = first_column + (threadIdx.x & ((1 << vectors_shift) - 1)) * VECTOR;
        const int present = source.present(column), advance = THREADS >> vectors_shift;
        int key = number * tile + (threadIdx.x >> vectors_shift);
        const ELEMENT* from = source.data + key * source.step + column * source.along;
#pragma unroll(VECTORS ? 4 : 1)
        for (int i = threadIdx.x; i < tile << vectors_shift; i += THREADS) {
            source.copy<VECTORS>(stage + i * 16, from, key < source.keys ? present : 0);
            key += advance;
            from += advance * source.step;
        }
    }
};

// The results of this CTA's columns.
template <int SLICE>
__device__ __forceinline__ void fold_values(const Attention& p, const Team& team, const Shared& shared,
                                            const Values& values, ELEMENT* out) {
    constexpr int CHAINS = ROWS * SLICE > THREADS ? ROWS * SLICE / THREADS : 1;  // of a thread
    constexpr int COLUMNS = CHAINS > 1 ? 2 : 1, FOLD_ROWS = CHAINS / COLUMNS;
    constexpr int QUADS = ROWS > 2 ? ROWS / 2 : 1;  // of the weights of a tile, for a thread to bring
    static_assert(QUADS * THREADS * 4 >= ROWS * MOST_KEYS);
    using F = Factors<SLICE, FOLD_ROWS, COLUMNS>;
    const int tile = values.tile;
    const int column = threadIdx.x % (SLICE / COLUMNS) * COLUMNS, row = threadIdx.x / (SLICE / COLUMNS) * FOLD_ROWS;
    const bool has_chains = row < team.rows && values.first_column + column < p.columns;
    const int others_pitch = tile + PADDING, quad_shift = __ffs(tile / 4) - 1;

    float4 brought[QUADS];
    const auto bring = [&](int number) {
#if __CUDA_ARCH__ >= 900
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int index = threadIdx.x + i * THREADS, r = index >> quad_shift;
            if (r >= team.rows || number >= values.tiles) continue;
            const unsigned key = number * tile + (index & ((1 << quad_shift) - 1)) * 4;
            const unsigned place = (key / SUM_LANES << team.group_shift) + (key & ((1 << team.group_shift) - 1));
            brought[i] = load_in_cluster(shared_address(shared.weights + r * shared.pitch + place),
                                         key % SUM_LANES >> team.group_shift);
        }
#endif
    };
    const auto keep = [&](int number) {
#pragma unroll
        for (int i = 0; i < QUADS; i++) {
            const int index = threadIdx.x + i * THREADS, r = index >> quad_shift;
            if (r >= team.rows || number >= values.tiles) continue;
            const int quad = index & ((1 << quad_shift) - 1);
            float* const to = shared.others + (number % 2 * ROWS + r) * others_pitch + quad * 4;
            *reinterpret_cast<float4*>(to) = brought[i];
        }
    };
    if (team.ctas > 1) {
        bring(0);
        keep(0);
    }

    float acc[FOLD_ROWS][COLUMNS] = {};
#pragma unroll 1
    for (int number = 0; number < values.tiles; number++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        if (team.ctas > 1) bring(number + 1);
        values.copy(number + STAGES - 1);
        if (has_chains) {
            const int pitch = team.ctas > 1 ? others_pitch : shared.pitch;
            const float* const weights = team.ctas > 1 ? shared.others + (number % 2 * ROWS + row) * pitch
                                                       : shared.weights + row * pitch + number * tile;
            const ELEMENT* const from =
                reinterpret_cast<const ELEMENT*>(shared.values + number % STAGES * p.stage_bytes) + column;
            // Past the end weight and value are zero, which changes no bit of what ends with + 0.
            const int end = min(tile, static_cast<int>(p.keys) - number * tile);
            F even, odd;
            even.load(weights, pitch, from, 0);
#pragma unroll 1
            for (int i = 0; i < end; i += 2 * F::STEPS) {
                odd.load(weights, pitch, from, i + F::STEPS);
                even.multiply(acc);
                if (i + 2 * F::STEPS < end) even.load(weights, pitch, from, i + 2 * F::STEPS);
                odd.multiply(acc);
            }
        }
        if (team.ctas > 1) keep(number + 1);
    }
    if (!has_chains) return;
#pragma unroll
    for (int r = 0; r < FOLD_ROWS; r++) {
        if (row + r >= team.rows) break;
        ELEMENT* const to = out + team.offset(p, p.out, row + r);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int place = values.first_column + column + c;
            if (place < p.columns) store(to + place * p.out[ALONG], acc[r][c] + 0.0f);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- kernel

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    attention(const __grid_constant__ Attention p, ELEMENT* out, const ELEMENT* query, const ELEMENT* key,
              const ELEMENT* value, const void* mask) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Team team(p);
    const Shared shared(p, team, memory);
#if __CUDA_ARCH__ >= 900
    if (team.ctas > 1) arrive_at_cluster();
#endif
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();

    Keys keys(p, team, shared, key);
    const Values values(p, team, shared, value);
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; step++) keys.copy(step);
    if (p.is_apart) values.copy_first();
    write_queries(p, team, shared, query);
    write_scores(p, team, shared, keys, mask);
    if (!p.is_apart) {
        __syncthreads();  // all have read the last keys
        values.copy_first();
    }
    write_weights(p, team, shared, keys.own);

    switch (p.slice) {
        case 16: fold_values<16>(p, team, shared, values, out); break;
        case 32: fold_values<32>(p, team, shared, values, out); break;
        case 64: fold_values<64>(p, team, shared, values, out); break;
        case 128: fold_values<128>(p, team, shared, values, out); break;
        default: fold_values<256>(p, team, shared, values, out);
    }
#if __CUDA_ARCH__ >= 900
    if (team.ctas > 1) sync_cluster();  // the others have read this CTA's weights
#endif
}
