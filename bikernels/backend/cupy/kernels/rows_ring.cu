// Reductions of long rows whose elements lie side by side. The warps of a CTA, or of the CTAs of a cluster, take row after
// row, and while they work on one, the next are on their way: each warp copies its own chunks of them to shared memory, to
// the slots of a ring (sm_90 on).
//
// OPERATION: a struct below. ELEMENT, RESULT: dtypes of x and of the result. THREADS: of a CTA, at most.
#include "exchange.cuh"
#include "softmax.cuh"

using A = float;
using Elements = A[THREAD_LANES];
constexpr int SIZE = sizeof(ELEMENT);
constexpr bool IS_PRECISE = sizeof(RESULT) == 4;

// A thread owns neighbouring lanes of the tree, as many as a vector of 16 bytes has results, in one group or in two. So
// every load and store of a warp is of bytes that lie side by side.
constexpr int LENGTH = 16 / sizeof(RESULT);
constexpr int GROUPS = THREAD_LANES / LENGTH;
constexpr int GROUP = SUM_LANES / GROUPS;
static_assert(sizeof(RESULT) >= SIZE, "a vector of elements is 16 bytes at most");

constexpr int STEPS = SUM_CHUNK / SUM_LANES;
constexpr int SLOT = SUM_CHUNK * SIZE + 32;  // of a chunk that begins anywhere in a vector
constexpr int VECTORS = SIZE / 2;
constexpr int MOST_WARPS = 160;        // of a team
constexpr int STEP_BYTES = WARP * 16;  // of what a warp keeps of a step beside its elements

// PLAIN, below: of rows a step apart that all begin where a 16-byte vector does, in x and out, of which a warp has one
// chunk. Then most of what has to be asked elsewhere is known to the compiler.
template <int OPERAND, bool PLAIN>
__device__ __forceinline__ long long start_of_row(const Reduction& p, long long row) {
    return PLAIN || p.kept == 1 ? row * p.dims.stride[OPERAND][0] : p.row_offset<OPERAND>(row);
}

// Elements between a vector and what is read from it.
template <bool PLAIN>
struct Phase {
    int phase;

    Phase() = default;
    __device__ __forceinline__ explicit Phase(int phase) : phase(phase) {}
};
template <>
struct Phase<true> {
    static constexpr int phase = 0;

    Phase() = default;
    __device__ __forceinline__ explicit Phase(int) {}
};

// ----------------------------------------------------------------------------------------------------------------- row

// A chunk in shared memory. Positions count from a vector on, `phase` elements before the chunk's first one.
template <bool PLAIN>
struct Chunk : Phase<PLAIN> {
    using Phase<PLAIN>::phase;

    unsigned char* kept;
    unsigned char* beside;  // of 16-bit elements, where half of the exponentials are kept
    int kept_steps;         // of which they are
    int number;
    int end;  // position of the row's end

    __device__ __forceinline__ Chunk(unsigned char* kept, unsigned char* beside, int kept_steps, int number, int phase,
                                     int end)
        : Phase<PLAIN>(phase), kept(kept), beside(beside), kept_steps(kept_steps), number(number), end(end) {}

    __device__ __forceinline__ bool is_last() const { return end <= SUM_CHUNK + phase; }
    // Whether all steps are known to be whole.
    __device__ __forceinline__ bool is_full() const { return PLAIN && end >= SUM_CHUNK; }

    static __device__ __forceinline__ int position(int step, int j) {
        return step * SUM_LANES + j / LENGTH * GROUP + lane_id() * LENGTH + j % LENGTH;
    }

    // Which of the thread's elements of a step lie in positions from `begin` to before `end`, as bits.
    static __device__ __forceinline__ unsigned present(int step, int begin, int end) {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            const int i = position(step, j);
            bits |= (i >= begin && i < end) << j;
        }
        return bits;
    }

    // Those of step number step + i, where i is known to the compiler.
    __device__ __forceinline__ void read(int step, int i, uint4 (&raw)[VECTORS], Elements& v) const {
        const unsigned char* const from = kept + position(step, 0) * SIZE + i * (SUM_LANES * SIZE);
        if constexpr (LENGTH * SIZE == 16) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) raw[g] = *reinterpret_cast<const uint4*>(from + g * GROUP * SIZE);
        } else {
            const uint2 low = *reinterpret_cast<const uint2*>(from);
            const uint2 high = *reinterpret_cast<const uint2*>(from + GROUP * SIZE);
            raw[0] = make_uint4(low.x, low.y, high.x, high.y);
        }
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
            unpack(raw[k], static_cast<ELEMENT*>(nullptr), v + k * (THREAD_LANES / VECTORS));
    }
    __device__ __forceinline__ void read(int step, int i, Elements& v) const {
        uint4 raw[VECTORS];
        read(step, i, raw, v);
    }
    __device__ __forceinline__ A read_one(int position) const {
        return widen(reinterpret_cast<const ELEMENT*>(kept)[position]);
    }

    // Keep eight values in place of as many elements, and beside them what has no room there.
    __device__ __forceinline__ void keep(int step, int i, const Elements& v) const {
        unsigned char* const to = kept + position(step, 0) * SIZE + i * (SUM_LANES * SIZE);
        if constexpr (SIZE == sizeof(A)) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                *reinterpret_cast<uint4*>(to + g * GROUP * SIZE) = as_vector(v + g * LENGTH);
        } else if (step + i < kept_steps) {
            const uint4 first = as_vector(v);
            if constexpr (LENGTH * SIZE == 16) {
                *reinterpret_cast<uint4*>(to) = first;
            } else {
                *reinterpret_cast<uint2*>(to) = make_uint2(first.x, first.y);
                *reinterpret_cast<uint2*>(to + GROUP * SIZE) = make_uint2(first.z, first.w);
            }
            *reinterpret_cast<uint4*>(beside + step * STEP_BYTES + lane_id() * 16 + i * STEP_BYTES) = as_vector(v + 4);
        }
    }
    // Whether that is so of a step, and what was kept.
    __device__ __forceinline__ bool has_kept(int step) const { return SIZE == sizeof(A) || step < kept_steps; }
    __device__ __forceinline__ void read_kept(int step, int i, Elements& v) const {
        if constexpr (SIZE == sizeof(A)) {
            read(step, i, v);
        } else {
            const unsigned char* const from = kept + position(step, 0) * SIZE + i * (SUM_LANES * SIZE);
            uint4 first;
            if constexpr (LENGTH * SIZE == 16) {
                first = *reinterpret_cast<const uint4*>(from);
            } else {
                const uint2 low = *reinterpret_cast<const uint2*>(from);
                const uint2 high = *reinterpret_cast<const uint2*>(from + GROUP * SIZE);
                first = make_uint4(low.x, low.y, high.x, high.y);
            }
            unpack(first, static_cast<A*>(nullptr), v);
            const unsigned char* const other = beside + step * STEP_BYTES + lane_id() * 16 + i * STEP_BYTES;
            unpack(*reinterpret_cast<const uint4*>(other), static_cast<A*>(nullptr), v + 4);
        }
    }

    // Calls work(step, i) for the steps step + i from `step` to before `end`.
    template <int UNROLL, class Work>
    static __device__ __forceinline__ void for_range(int step, int end, Work work) {
#pragma unroll 1
        for (; step + UNROLL <= end; step += UNROLL) {
#pragma unroll
            for (int i = 0; i < UNROLL; i++) work(step, i);
        }
#pragma unroll 1
        for (; step < end; step++) work(step, 0);
    }

    // Calls on_whole(step, i) for the steps step + i before `whole`, on_edge(step) for those from there to before `steps`
    // and for the first one if it is an edge.
    template <int UNROLL, class Whole, class Edge>
    __device__ __forceinline__ void for_steps(bool first_is_edge, int whole, int steps, Whole on_whole,
                                              Edge on_edge) const {
        for_steps<UNROLL, UNROLL>(first_is_edge, 0, whole, steps, Nothing{}, on_whole, on_edge);
    }
    // With on_simple in place of on_whole for the first `simple` steps.
    struct Nothing {};
    template <int UNROLL, int UNROLL_WHOLE, class Simple, class Whole, class Edge>
    __device__ __forceinline__ void for_steps(bool first_is_edge, int simple, int whole, int steps, Simple on_simple,
                                              Whole on_whole, Edge on_edge) const {
        int step = 0;
        simple = min(simple, whole);
#pragma unroll 1
        while (step < steps) {
            if (step >= whole || (step == 0 && first_is_edge)) {
                on_edge(step);
                step++;
                continue;
            }
            if constexpr (!is_same<Simple, Nothing>::value) {
                if (step < simple) {
                    for_range<UNROLL>(step, simple, on_simple);
                    step = simple;
                    continue;
                }
            }
            for_range<UNROLL_WHOLE>(step, whole, on_whole);
            step = whole;
        }
    }

    // Whether the thread's element j of the first step lies before the chunk.
    __device__ __forceinline__ bool is_before(int j) const { return lane_id() == 0 && j < phase; }
    __device__ __forceinline__ int whole_steps() const { return min(STEPS, end / SUM_LANES); }
    __device__ __forceinline__ int steps() const { return min(STEPS, (end + SUM_LANES - 1) / SUM_LANES); }

    // The tree over a chunk. on_simple(step, i, v), on_careful(step, v) and on_edge(step, present, v) write the terms of a
    // step to v, one(position) returns that of one element. `care`: which whole steps, as bits, need more than on_simple
    // does. It knows nothing of elements before the chunk either.
    template <class Simple, class Careful, class Edge, class One>
    __device__ __forceinline__ A sum(unsigned care, Simple on_simple, Careful on_careful, Edge on_edge, One one) const {
        return sum(care, false, on_simple, on_simple, on_careful, on_edge, one);
    }
    // With on_simplest(step, i, v) in place of on_simple, `is_simplest`.
    template <class Simplest, class Simple, class Careful, class Edge, class One>
    __device__ __forceinline__ A sum(unsigned care, bool is_simplest, Simplest on_simplest, Simple on_simple,
                                     Careful on_careful, Edge on_edge, One one) const {
        Elements lane = {};
        const int whole = whole_steps();
        care |= phase > 0;
        int step = 0;
#pragma unroll 1
        while (step < whole) {
            const unsigned later = care >> step;
            if (later & 1) {
                Elements v;
                on_careful(step, v);
                if (step == 0) {
#pragma unroll
                    for (int j = 0; j < LENGTH - 1; j++) v[j] = is_before(j) ? A(0) : v[j];
                }
                add(lane, v);
                step++;
            } else {
                const int next = later != 0 ? min(whole, step + __ffs(later) - 1) : whole;
                const auto run = [&](auto on_steps) {
                    for_range<2>(step, next, [&](int step, int i) {
                        Elements v;
                        on_steps(step, i, v);
                        add(lane, v);
                    });
                };
                if constexpr (is_same<Simplest, Simple>::value) {
                    run(on_simple);
                } else if (is_simplest) {
                    run(on_simplest);
                } else {
                    run(on_simple);
                }
                step = next;
            }
        }
#pragma unroll 1
        for (step = whole; step < steps(); step++) {
            Elements v;
            on_edge(step, present(step, phase, end), v);
            add(lane, v);
        }
        if (phase > 0) {
            // The chunk's last elements lie in the vector behind its last step. They go to the lanes that the first
            // thread began to add up in its second step.
            A last = 0;
            if (lane_id() < phase && SUM_CHUNK + lane_id() < end) last = one(SUM_CHUNK + lane_id());
#pragma unroll
            for (int j = 0; j < LENGTH - 1; j++) {
                const A v = __shfl_sync(~0u, last, j);
                lane[j] += lane_id() == 0 ? v : A(0);
            }
        }
        return fold(lane);
    }

    // The same over a chunk that is full: term(step, i, v) writes the terms of all steps but the last, last_term(v) those.
    template <class Term, class Last>
    static __device__ __forceinline__ A sum_full(Term term, Last last_term) {
        Elements lane = {};
        for_range<2>(0, STEPS - 2, [&](int step, int i) {
            Elements v;
            term(step, i, v);
            add(lane, v);
        });
        Elements v, last;
        term(STEPS - 2, 0, v);
        last_term(last);
        add(lane, v);
        add(lane, last);
        return fold_from<0>(lane);
    }

  private:
    static __device__ __forceinline__ void add(Elements& lane, const Elements& v) {
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) lane[j] += v[j];
    }

    // The neighbours' sum of the lanes of all threads, in every thread. In position 0 is lane -phase.
    __device__ __forceinline__ A fold(Elements& lane) const {
        if constexpr (PLAIN) return fold_from<0>(lane);
        switch (phase) {
            case 0: return fold_from<0>(lane);
            case 1: return fold_from<1>(lane);
            case 2: return fold_from<2>(lane);
            case 3: return fold_from<3>(lane);
            case 4: return fold_from<4 % LENGTH>(lane);
            case 5: return fold_from<5 % LENGTH>(lane);
            case 6: return fold_from<6 % LENGTH>(lane);
            default: return fold_from<7 % LENGTH>(lane);
        }
    }
    template <int PHASE>
    static __device__ __forceinline__ A fold_from(const Elements& lane) {
        Elements own;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int j = 0; j < LENGTH; j++) {
                const int from = j + PHASE;
                if (from < LENGTH) {
                    own[g * LENGTH + j] = lane[g * LENGTH + from];
                } else {  // of the next thread; behind the last one is the first one's next group
                    const A next = lane[(g + 1) % GROUPS * LENGTH + from - LENGTH];
                    const A given = lane_id() == 0 ? next : lane[g * LENGTH + from - LENGTH];
                    own[g * LENGTH + j] = __shfl_sync(~0u, given, lane_id() + 1);
                }
            }
        }
        A sum[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
#pragma unroll
            for (int count = LENGTH / 2; count > 0; count /= 2) {
#pragma unroll
                for (int j = 0; j < count; j++)
                    own[g * LENGTH + j] = own[g * LENGTH + 2 * j] + own[g * LENGTH + 2 * j + 1];
            }
            sum[g] = sum_warp(own[g * LENGTH]);
        }
        if constexpr (GROUPS == 2) return sum[0] + sum[1];
        return sum[0];
    }
};

// Where a row lies, and what a warp has of it.
template <bool PLAIN>
struct Place : Phase<PLAIN> {
    long long number;
    unsigned long long x;  // address of its first element
    unsigned turn;         // its first exchange
    unsigned char* slot;   // of the warp, `rounds` chunks

    Place() = default;
    __device__ __forceinline__ Place(const Reduction& p, long long number, const void* x, unsigned turn,
                                     unsigned char* slot)
        : Place(number,
                reinterpret_cast<unsigned long long>(static_cast<const ELEMENT*>(x) +
                                                     start_of_row<OF_X, PLAIN>(p, number)),
                turn, slot) {}

  private:
    __device__ __forceinline__ Place(long long number, unsigned long long x, unsigned turn, unsigned char* slot)
        : Phase<PLAIN>(static_cast<int>(x / SIZE % LENGTH)), number(number), x(x), turn(turn), slot(slot) {}
};

template <bool PLAIN>
struct Row : Place<PLAIN> {
    using Place<PLAIN>::number, Place<PLAIN>::x, Place<PLAIN>::slot, Phase<PLAIN>::phase;
    using Chunk = ::Chunk<PLAIN>;

    const Reduction& p;
    const Team& team;
    unsigned char* const beside;
    const int rounds, kept_steps, chunks;

    __device__ __forceinline__ Row(const Place<PLAIN>& place, const Reduction& p, const Team& team,
                                   unsigned char* beside, int rounds, int kept_steps, int chunks)
        : Place<PLAIN>(place),
          p(p),
          team(team),
          beside(beside),
          rounds(rounds),
          kept_steps(kept_steps),
          chunks(chunks) {}

    __device__ __forceinline__ int chunk(int round) const {
        return (round * team.warps + warp_id()) * team.ctas + team.rank;
    }
    // Bytes by which vectors of elements, of 8 bytes, may lie behind a multiple of 16.
    __device__ __forceinline__ unsigned skipped() const { return PLAIN ? 0 : (x - phase * SIZE) % 16; }

    // By one thread: begin to copy one of the warp's chunks, with the whole vectors that hold it, if the warp has it.
    // `is_alone`: the team has no other row, and few rows are all that there is: what has been read leaves its place in
    // the L2 to results.
    __device__ __forceinline__ void load(int round, unsigned barrier, bool is_alone) const {
        if (chunk(round) >= chunks) return;
        const Source source = source_of(round);
        copy_bulk(shared_address(slot) + round * SLOT, source.first, source.bytes, barrier, is_alone);
        arrive_and_expect(barrier, source.bytes);
    }
    // By one thread: have the L2 fetch it.
    __device__ __forceinline__ void prefetch(int round) const {
        if (chunk(round) >= chunks) return;
        const Source source = source_of(round);
        prefetch_bulk(source.first, source.bytes);
    }

    // Calls work(chunk, round) for each of the warp's chunks.
    template <class Work>
    __device__ __forceinline__ void for_chunks(Work work) const {
#pragma unroll 1
        for (int round = 0; round < rounds && chunk(round) < chunks; round++) {
            const int c = chunk(round);
            work(Chunk{slot + round * SLOT + skipped(), beside + round * kept_steps * STEP_BYTES, kept_steps, c, phase,
                       static_cast<int>(p.n) + phase - c * SUM_CHUNK},
                 round);
        }
    }

    template <int OPERAND>
    __device__ __forceinline__ long long start() const {
        return start_of_row<OPERAND, PLAIN>(p, number);
    }
    // Of the threads that have the same results, the one that writes them.
    __device__ __forceinline__ bool is_writer() const { return threadIdx.x == 0 && team.rank == 0; }
    __device__ __forceinline__ void write_one(void* out, A v) const {
        if (is_writer()) store(static_cast<RESULT*>(out) + start<OF_OUT>(), v);
    }

    // Writes the row, and calls done(round) after each chunk. compute(chunk, step, i, v) puts the results of a step to v,
    // one(chunk, position) returns one.
    template <int UNROLL, class Compute, class One, class Done>
    __device__ __forceinline__ void write(void* out, Compute compute, One one, Done done) const {
        const auto full = [&](const Chunk& c, auto put) {
            Chunk::template for_range<UNROLL>(0, STEPS, [&](int step, int i) {
                Elements v;
                compute(c, step, i, v);
                put(step, i, v);
            });
        };
        write<UNROLL, UNROLL>(out, 0, typename Chunk::Nothing{}, compute, one, true, full, done);
    }
    // With simply(chunk, step, i, v) for a chunk's first `simple` steps that are whole; full(chunk, put) calls
    // put(step, i, v) for all steps of a chunk that is full, where that `is_known`.
    template <int UNROLL, int UNROLL_WHOLE, class Simply, class Compute, class One, class Full, class Done>
    __device__ __forceinline__ void write(void* out, int simple, Simply simply, Compute compute, One one, bool is_known,
                                          Full full, Done done) const {
        RESULT* const begin = static_cast<RESULT*>(out) + start<OF_OUT>() - phase;
        const bool is_aligned = PLAIN || is_vector_aligned(begin);
        for_chunks([&](const Chunk& c, int round) {
            RESULT* const to = begin + c.number * SUM_CHUNK;
            if (c.is_full() && is_known) {
                full(c, [&](int step, int i, const Elements& v) { write_vectors(to, step, i, v); });
                done(round);
                return;
            }
            const auto to_whole = [&](auto put) {
                return [&, put](int step, int i) {
                    Elements v;
                    put(c, step, i, v);
                    write_vectors(to, step, i, v);
                };
            };
            const auto on_edge = [&](int step) {
                const unsigned present = Chunk::present(step, c.number == 0 ? phase : 0, c.end);
                Elements v;
                compute(c, step, 0, v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++)
                    if (present >> j & 1) store(to + Chunk::position(step, j), v[j]);
            };
            const bool first_is_edge = c.number == 0 && phase > 0;
            const int whole = is_aligned ? c.whole_steps() : 0;
            if constexpr (is_same<Simply, typename Chunk::Nothing>::value) {
                c.template for_steps<UNROLL>(first_is_edge, whole, c.steps(), to_whole(compute), on_edge);
            } else {
                c.template for_steps<UNROLL, UNROLL_WHOLE>(first_is_edge, simple, whole, c.steps(), to_whole(simply),
                                                           to_whole(compute), on_edge);
            }
            if (c.is_last() && SUM_CHUNK + lane_id() < c.end)
                store(to + SUM_CHUNK + lane_id(), one(c, SUM_CHUNK + lane_id()));
            done(round);
        });
    }

  private:
    // What is copied of a chunk.
    struct Source {
        const void* first;
        unsigned bytes;
    };
    __device__ __forceinline__ Source source_of(int round) const {
        const unsigned long long begin = x - phase * SIZE - skipped();
        const unsigned row_bytes = skipped() + (phase + static_cast<int>(p.n)) * SIZE;
        const unsigned from = chunk(round) * (SUM_CHUNK * SIZE);
        const unsigned chunk_bytes = SUM_CHUNK * SIZE + skipped() + phase * SIZE;
        return {reinterpret_cast<const void*>(begin + from), (min(chunk_bytes, row_bytes - from) + 15) / 16 * 16};
    }
    // Those of step number step + i of a chunk.
    static __device__ __forceinline__ void write_vectors(RESULT* chunk, int step, int i, const Elements& v) {
        const unsigned offset = Chunk::position(step, 0) * static_cast<unsigned>(sizeof(RESULT));
        unsigned char* const to = reinterpret_cast<unsigned char*>(chunk) + offset;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            *reinterpret_cast<uint4*>(to + (i * SUM_LANES + g * GROUP) * sizeof(RESULT)) =
                packed(v + g * LENGTH, static_cast<RESULT*>(nullptr));
    }
    // Results of arithmetic: a NaN is the canonical one already.
    static __device__ __forceinline__ uint4 packed(const A* v, float*) { return as_vector(v); }
    template <class R>
    static __device__ __forceinline__ uint4 packed(const A* v, R* r) {
        return make_uint4(packed_pair(v[0], v[1], r), packed_pair(v[2], v[3], r), packed_pair(v[4], v[5], r),
                          packed_pair(v[6], v[7], r));
    }
};

// What the warps share of each chunk lies where the threads that add neighbours read side by side: a thread has `share`
// neighbouring chunks, and its next one lies behind those of all threads.
__device__ __forceinline__ int bits_of_share(int chunks) { return chunks <= WARP ? 0 : chunks <= 4 * WARP ? 2 : 3; }
__device__ __forceinline__ int place_of_chunk(int chunk, int chunks) {
    const int bits = bits_of_share(chunks);
    return (chunk & ((1 << bits) - 1)) * WARP + (chunk >> bits);
}

// Of a row or a part of it, in every thread.
struct Total {
    A sum;
    unsigned count;
};
__device__ __forceinline__ Total total_in(float sum) { return {sum, 0}; }
__device__ __forceinline__ Total total_in(uint2 pair) { return {__uint_as_float(pair.x), pair.y}; }

template <int SHARE, class V>
__device__ __forceinline__ Total total_of_shares(const V* values, int chunks) {
    A lane[SHARE];
    unsigned count = 0;
#pragma unroll
    for (int j = 0; j < SHARE; j++) {
        const bool is_chunk = lane_id() * SHARE + j < chunks;
        const Total one = total_in(is_chunk ? values[j * WARP + lane_id()] : V{});
        lane[j] = one.sum;
        count += one.count;
    }
#pragma unroll
    for (int width = SHARE / 2; width > 0; width /= 2) {
#pragma unroll
        for (int j = 0; j < width; j++) lane[j] = lane[2 * j] + lane[2 * j + 1];
    }
    return {sum_warp(lane[0]), __reduce_add_sync(~0u, count)};
}
template <class V>
__device__ __forceinline__ Total total_of_chunks(const V* values, int chunks) {
    switch (bits_of_share(chunks)) {
        case 0: return total_of_shares<1>(values, chunks);
        case 2: return total_of_shares<4>(values, chunks);
        default: return total_of_shares<8>(values, chunks);
    }
}

// ---------------------------------------------------------------------------------------------------------------- sums

// An operation has three parts, so that the next row's begin can come before a row's end: what the warps exchange is then
// on its way.
template <bool PLAIN>
struct Mean {
    static_assert(!PLAIN, "left to rows.cu");
    static constexpr bool HAS_PLAIN = false, WRITES_ROWS = false, WRITES_SLOTS = false;
    static constexpr int EXCHANGES = 1;
    using Row = ::Row<PLAIN>;

    __device__ __forceinline__ void begin(const Row& row, unsigned loaded, int parity) {
        row.for_chunks([&](const Chunk<PLAIN>& c, int round) {
            wait_barrier(loaded + round * 8, parity);
            const auto elements = [&](int step, int i, Elements& v) { c.read(step, i, v); };
            const auto of_edge = [&](int step, unsigned present, Elements& v) {
                c.read(step, 0, v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = present >> j & 1 ? v[j] : A(0);
            };
            const auto one = [&](int position) { return c.read_one(position); };
            const auto first = [&](int step, Elements& v) { c.read(step, 0, v); };
            const A sum = c.sum(0, elements, first, of_edge, one);
            row.team.share(row.turn, place_of_chunk(c.number, row.chunks), __float_as_uint(sum));
        });
        row.team.arrived(row.turn, row.chunks * 4);
    }
    __device__ __forceinline__ void middle(const Row& row) {}
    template <class Done>
    __device__ __forceinline__ void end(const Row& row, void* out, Done done) {
        const A sum = total_of_chunks(row.team.template meet<A>(row.turn), row.chunks).sum;
        row.write_one(out, sum / static_cast<A>(row.p.divisor));
        row.for_chunks([&](const Chunk<PLAIN>&, int round) { done(round); });
    }
};

// ------------------------------------------------------------------------------------------------------------- softmax

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

template <Form FORM, bool PLAIN>
struct SoftmaxFamily {
    // Exponentials take the place of the elements; those that are not kept are computed twice. Of a full chunk of 16-bit
    // elements, those of the last step stay in registers.
    static constexpr bool WRITES_SLOTS = FORM == Form::SOFTMAX, HAS_PLAIN = true, WRITES_ROWS = FORM != Form::LOGSUMEXP;
    static constexpr bool KEEPS_ALL = WRITES_SLOTS && SIZE == sizeof(A);
    static constexpr bool KEEPS_LAST = WRITES_SLOTS && !KEEPS_ALL;
    static constexpr int EXCHANGES = 2;
    using Row = ::Row<PLAIN>;
    using Chunk = ::Chunk<PLAIN>;

    A maximum;
    A least;           // of the thread's elements; then a bound of t, but where the power is 0; -inf if there is none
    int most_of_warp;  // as an ordered integer
    bool is_known;  // whether the warp's chunk is full and computed without care
    Elements last;

    __device__ __forceinline__ void begin(const Row& row, unsigned loaded, int parity) {
        Maximum<ELEMENT, A> most_of_vectors;
        Minimum<ELEMENT> least_of_vectors;
        A most = lowest<A>();
        least = -most;
        const auto add = [&](A x) {
            most = larger_nan(most, x);
            least = fminf(least, x);
        };
        row.for_chunks([&](const Chunk& c, int round) {
            wait_barrier(loaded + round * 8, parity);
            const auto whole = [&](int step, int i) {
                uint4 raw[VECTORS];
                Elements v;
                c.read(step, i, raw, v);
                most_of_vectors.add(raw, v);
                least_of_vectors.add(raw, v);
            };
            if (c.is_full()) {
                Chunk::template for_range<4>(0, STEPS, whole);
                return;
            }
            c.template for_steps<4>(
                c.number == 0 && c.phase > 0, c.whole_steps(), c.steps(), whole,
                [&](int step) {
                    const unsigned present = Chunk::present(step, c.number == 0 ? c.phase : 0, c.end);
                    Elements v;
                    c.read(step, 0, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++)
                        if (present >> j & 1) add(v[j]);
                });
            if (c.is_last() && SUM_CHUNK + lane_id() < c.end) add(c.read_one(SUM_CHUNK + lane_id()));
        });
        most = larger_nan(most, most_of_vectors.value());
        least = fminf(least, least_of_vectors.value());
        most_of_warp = __reduce_max_sync(~0u, ordered_bits(most));
        const Team& team = row.team;
        team.share(row.turn, team.rank * team.warps + warp_id(), static_cast<unsigned>(most_of_warp));
        team.arrived(row.turn, team.warps * team.ctas * 4);
    }

    __device__ __forceinline__ void middle(const Row& row) {
        const int* const maxima = row.team.template meet<int>(row.turn);
        int most_of_row = ordered_bits(lowest<A>());
#pragma unroll
        for (int i = lane_id(); i < MOST_WARPS; i += WARP)
            if (i < row.team.warps * row.team.ctas) most_of_row = max(most_of_row, maxima[i]);
        maximum = of_ordered_bits(__reduce_max_sync(~0u, most_of_row));

        const bool has_maximum = of_ordered_bits(most_of_warp) == maximum;
        const bool are_smaller = !IS_PRECISE || __all_sync(~0u, least >= -maximum);
        least -= maximum;
        const bool are_near = __all_sync(~0u, least > NEAR);
        is_known = false;
        unsigned least_order = ~0u;  // of powers, where they are not all near
        const auto share = [&](const Chunk& c, A sum, unsigned count) {
            const uint2 pair = make_uint2(__float_as_uint(sum), count);
            row.team.share(row.turn + 1, place_of_chunk(c.number, row.chunks), pair);
        };
        row.for_chunks([&](const Chunk& c, int) {
            unsigned count = 0, care = 0;
            if (has_maximum) {
                Chunk::template for_range<4>(0, c.whole_steps(), [&](int step, int i) {
                    uint4 raw[VECTORS];
                    Elements v;
                    c.read(step, i, raw, v);
                    care |= __any_sync(~0u, may_have(maximum, raw, v, static_cast<ELEMENT*>(nullptr))) << (step + i);
                });
            }
            const auto compute = [&](auto error_of, int step, int i, Elements& t, Elements& v) {
                c.read(step, i, v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) {
                    const A x = v[j];
                    t[j] = x - maximum;
                    v[j] = exponential_near<IS_PRECISE>(t[j], error_of(x, t[j]));
                }
            };
            const auto near = [&](auto error_of, int step, int i, Elements& t, Elements& v) {
                compute(error_of, step, i, t, v);
                if constexpr (WRITES_SLOTS) c.keep(step, i, v);
            };
            const auto error_of_any = [&](A x, A) {
                A error = 0;
                if constexpr (IS_PRECISE) difference(x, maximum, error);
                return error;
            };
            const auto anywhere = [&](int step, int i, Elements& t, Elements& v) {
                if (IS_PRECISE && are_near) return near(error_of_any, step, i, t, v);
                c.read(step, i, v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) {
                    A error = 0;
                    t[j] = IS_PRECISE ? difference(v[j], maximum, error) : v[j] - maximum;
                    v[j] = exponential_below<IS_PRECISE>(t[j], error);
                }
                if constexpr (WRITES_SLOTS) {
                    c.keep(step, i, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) least_order = min(least_order, order_of_power(v[j]));
                }
            };
            // Where no element is larger in magnitude than the maximum, the difference's error is that of Dekker's sum.
            const auto error_of_smaller = [&](A x, A t) { return IS_PRECISE ? x - (t + maximum) : A(0); };
            const auto smaller = [&](int step, int i, Elements& v) {
                Elements t;
                near(error_of_smaller, step, i, t, v);
            };
            if (c.is_full() && are_near && care == 0 && are_smaller) {
                is_known = true;
                const auto on_last_step = [&](Elements& v) {
                    Elements t;
                    if constexpr (KEEPS_LAST) {
                        compute(error_of_smaller, STEPS - 1, 0, t, v);
#pragma unroll
                        for (int j = 0; j < THREAD_LANES; j++) last[j] = v[j];
                    } else {
                        near(error_of_smaller, STEPS - 1, 0, t, v);
                    }
                };
                share(c, Chunk::sum_full(smaller, on_last_step), 0);
                return;
            }
            const A sum = c.sum(
                care, are_near && are_smaller, smaller,
                [&](int step, int i, Elements& v) {
                    Elements t;
                    anywhere(step, i, t, v);
                },
                [&](int step, Elements& v) {
                    Elements t;
                    anywhere(step, 0, t, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) {
                        count += t[j] == 0 && !(step == 0 && c.is_before(j));
                        v[j] = t[j] == 0 ? A(0) : v[j];
                    }
                },
                [&](int step, unsigned present, Elements& v) {
                    Elements all;
                    c.read(step, 0, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) {
                        const bool is_present = present >> j & 1, is_maximum = v[j] - maximum == 0;
                        all[j] = exponential_anywhere<IS_PRECISE>(v[j], maximum);
                        count += is_present && is_maximum;
                        v[j] = is_present && !is_maximum ? all[j] : A(0);
                        // Of all: this warp also writes some that another one adds, and what is not there is rarely unsure.
                        least_order = min(least_order, order_of_power(all[j]));
                    }
                    if constexpr (WRITES_SLOTS) c.keep(step, 0, all);
                },
                [&](int position) {
                    const A x = c.read_one(position);
                    const bool is_maximum = x - maximum == 0;
                    const A all = exponential_anywhere<IS_PRECISE>(x, maximum);
                    if constexpr (KEEPS_ALL) reinterpret_cast<A*>(c.kept)[position] = all;
                    least_order = min(least_order, order_of_power(all));
                    count += is_maximum;
                    return is_maximum ? A(0) : all;
                });
            share(c, sum, __reduce_add_sync(~0u, count));
        });
        row.team.arrived(row.turn + 1, row.chunks * 8);
        if (!are_near) least = __all_sync(~0u, least_order >= SURE) ? NEAR : lowest<A>();
    }

    template <class Done>
    __device__ __forceinline__ void end(const Row& row, void* out, Done done) {
        const Total total = total_of_chunks(row.team.template meet<uint2>(row.turn + 1), row.chunks);
        // Where the maximum is no number, neither is the result (but for that of logsumexp).
        const A normaliser = maximum - maximum == 0 ? normaliser_of(total.count, total.sum, FORM != Form::SOFTMAX)
                                                    : __uint_as_float(NAN_FLOAT32);

        if constexpr (FORM == Form::LOGSUMEXP) {
            const bool is_infinite = maximum - maximum != 0 && maximum == maximum;
            row.write_one(out, is_infinite ? maximum : maximum + normaliser);
            row.for_chunks([&](const Chunk&, int round) { done(round); });
        } else if constexpr (FORM == Form::LOG_SOFTMAX) {
            const auto result = [&](A x) { return x - maximum - normaliser; };
            row.template write<4>(
                out,
                [&](const Chunk& c, int step, int i, Elements& v) {
                    c.read(step, i, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) v[j] = result(v[j]);
                },
                [&](const Chunk& c, int position) { return result(c.read_one(position)); }, done);
        } else {
            const A reciprocal = 1 / normaliser;
            const bool is_few = normaliser <= FEW, is_simple = is_few && least >= NEAR;
            const auto divide_kept = [&](const Chunk& c, int step, int i, Elements& v) {
                Elements kept;
                c.read_kept(step, i, kept);
                divide_for(kept, v, normaliser, reciprocal, static_cast<RESULT*>(nullptr));
            };
            row.template write<2, 1>(
                out, !is_simple ? 0 : KEEPS_ALL ? STEPS : row.kept_steps,
                divide_kept,
                [&](const Chunk& c, int step, int i, Elements& v) {
                    if (c.has_kept(step + i)) {
                        c.read_kept(step, i, v);
                    } else {
                        c.read(step, i, v);
                        if (is_simple && round_for(v, reciprocal)) return;
#pragma unroll
                        for (int j = 0; j < THREAD_LANES; j++) v[j] = exponential_anywhere<IS_PRECISE>(v[j], maximum);
                    }
                    divide(v, normaliser, reciprocal, is_few);
                },
                [&](const Chunk& c, int position) {
                    const A x = c.read_one(position);
                    return (KEEPS_ALL ? x : exponential_anywhere<IS_PRECISE>(x, maximum)) / normaliser;
                },
                is_known,  // and few: rows are shorter than FEW
                [&](const Chunk& c, auto put) {
                    const int kept = KEEPS_ALL ? STEPS : min(row.kept_steps, STEPS - 1);
                    Chunk::template for_range<2>(0, kept, [&](int step, int i) {
                        Elements v;
                        divide_kept(c, step, i, v);
                        put(step, i, v);
                    });
                    if constexpr (KEEPS_LAST) {
#pragma unroll 1
                        for (int step = kept; step < STEPS - 1; step++) {
                            Elements v;
                            c.read(step, 0, v);
                            if (!round_for(v, reciprocal)) quotients_near<IS_PRECISE>(v, maximum, normaliser, reciprocal);
                            put(step, 0, v);
                        }
                        Elements v;
                        divide_for(last, v, normaliser, reciprocal, static_cast<RESULT*>(nullptr));
                        put(STEPS - 1, 0, v);
                    }
                },
                done);
        }
    }

  private:
    // Softmax of eight elements of 16 bits: whether it is sure to what they round.
    __device__ __forceinline__ bool round_for(Elements& v, A reciprocal) const {
        unsigned words[THREAD_LANES / 2];
        if constexpr (IS_PRECISE)
            return false;
        else
            return round_powers(v, maximum, Bounds(reciprocal, least), words, static_cast<RESULT*>(nullptr));
    }
    // Whether one of eight elements may be the maximum; what lies before the row may be anything.
    static __device__ __forceinline__ bool may_have(A maximum, const uint4*, const Elements& v, float*) {
        A most = v[0];
#pragma unroll
        for (int j = 1; j < THREAD_LANES; j++) most = fmaxf(most, v[j]);
        return most >= maximum;
    }
    template <class X>
    static __device__ __forceinline__ bool may_have(A maximum, const uint4* raw, const Elements&, X* x) {
        float low, high;
        unpair(max_pair(max_pair(raw->x, raw->y, x), max_pair(raw->z, raw->w, x), x), x, low, high);
        return fmaxf(low, high) >= maximum;
    }
};

template <bool PLAIN>
using Softmax = SoftmaxFamily<Form::SOFTMAX, PLAIN>;
template <bool PLAIN>
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX, PLAIN>;
template <bool PLAIN>
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP, PLAIN>;

// -------------------------------------------------------------------------------------------------------------- kernel

// What a launch gives; its dynamic shared memory: of every warp `slots` times `rounds` chunks, and beside them what it keeps
// of `kept_steps` steps of each chunk; a barrier for each area of the exchange, and for each chunk that a warp has room
// for; the areas. See RingSchedule in row_schedules.py.
struct Launch {
    const Reduction& p;
    const Team& team;
    int slots, rounds, kept_steps, chunks;
    unsigned char* own;  // of the warp
    unsigned loaded;     // its barriers
    void* out;
    const void* x;
};

template <bool PLAIN>
__device__ __forceinline__ void take_rows(const Launch& a) {
    using Operation = OPERATION<PLAIN>;
    // Row number `index` of the team's.
    const long long teams = gridDim.x / a.team.ctas, first = blockIdx.x / a.team.ctas;
    const int rounds = PLAIN ? 1 : a.rounds;
    const auto place_of = [&](int index, int slot) {
        return Place<PLAIN>(a.p, first + index * teams, a.x, index * Operation::EXCHANGES, a.own + slot * (rounds * SLOT));
    };
    const auto row_at = [&](const Place<PLAIN>& place) {
        return Row<PLAIN>(place, a.p, a.team, a.own + a.slots * (rounds * SLOT), rounds, a.kept_steps, a.chunks);
    };
    const auto loaded_of = [&](int slot) { return a.loaded + slot * rounds * 8; };
    const int rows = first < a.p.rows ? static_cast<int>((a.p.rows - 1 - first) / teams) + 1 : 0;
    if (lane_id() == 0) {
        for (int i = 0; i < min(a.slots, rows); i++)
            for (int round = 0; round < rounds; round++) row_at(place_of(i, i)).prefetch(round);
    }
    wait_for_predecessors();
    if (lane_id() == 0) {
        for (int i = 0; i < min(a.slots, rows); i++)
            for (int round = 0; round < rounds; round++)
                row_at(place_of(i, i)).load(round, loaded_of(i) + round * 8, a.slots == 1 && rows == 1);
    }
    __syncwarp();

    Operation operation, next;
    Place<PLAIN> place, next_place;
    int slot = 0, next_slot = 0, parity = 0;
    const auto begin_next = [&](int index) {
        if (index + 1 == rows) return;
        next_place = place_of(index + 1, next_slot);
        next.begin(row_at(next_place), loaded_of(next_slot), parity);
        if (++next_slot == a.slots) {
            next_slot = 0;
            parity ^= 1;
        }
    };
    const auto end = [&](int index) {
        if (index < 0) return;
        operation.end(row_at(place), a.out, [&](int round) {
            if constexpr (Operation::WRITES_SLOTS) fence_written();
            __syncwarp();
            if (lane_id() == 0 && index + a.slots < rows)
                row_at(place_of(index + a.slots, slot)).load(round, loaded_of(slot) + round * 8, false);
        });
        if (++slot == a.slots) slot = 0;
    };
#pragma unroll 1
    for (int index = -1; index < rows; index++) {
        if (index >= 0) operation.middle(row_at(place));
        if constexpr (PLAIN) {
            begin_next(index);
            end(index);
        } else {
            const bool is_ahead = a.slots > 1;  // with one slot, a row ends before the next one begins
#pragma unroll 1
            for (int i = 0; i < 2; i++) {  // so that the code of both exists once
                if ((i == 0) == is_ahead) {
                    begin_next(index);
                } else {
                    end(index);
                }
            }
        }
        operation = next;
        place = next_place;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_long_rows(const __grid_constant__ Reduction p, int slots, int rounds, int kept_steps, int ctas,
                     int area_bytes, void* out, const void* x) {
    extern __shared__ __align__(128) unsigned char shared[];
    launch_dependents();  // they wait for this kernel's end
    const int warps = blockDim.x / WARP;
    const int own_bytes = slots * (rounds * SLOT) + rounds * kept_steps * STEP_BYTES, chunk_slots = slots * rounds;
    unsigned char* const own = shared + warp_id() * own_bytes;
    unsigned char* const behind = shared + warps * own_bytes;
    const unsigned barriers = shared_address(behind);
    const unsigned loaded = barriers + (AREAS + warp_id() * chunk_slots) * 8;
    const Team team{warps, ctas, ctas > 1 ? static_cast<int>(cluster_rank()) : 0, behind + (AREAS + warps * chunk_slots) * 8,
                    area_bytes, barriers};

    if (threadIdx.x < AREAS) init_barrier(barriers + threadIdx.x * 8, warps * ARRIVING);
    if (lane_id() < chunk_slots) init_barrier(loaded + lane_id() * 8, 1);
    fence_barrier_init();
    if (ctas > 1) {
        sync_cluster();
    } else {
        __syncthreads();
    }

    const Launch launch{p, team, slots, rounds, kept_steps, static_cast<int>(chunks_of(p.n)), own, loaded, out, x};
    if constexpr (OPERATION<false>::HAS_PLAIN) {
        unsigned long long addresses = reinterpret_cast<unsigned long long>(x) | p.dims.stride[OF_X][0] * SIZE;
        if (OPERATION<false>::WRITES_ROWS)
            addresses |= reinterpret_cast<unsigned long long>(out) | p.dims.stride[OF_OUT][0] * sizeof(RESULT);
        const bool are_many = p.rows * ctas > gridDim.x;  // of one row, code that is longer is not worth being fetched
        if (rounds == 1 && slots > 1 && are_many && p.kept == 1 && addresses % 16 == 0) {
            take_rows<true>(launch);
            return;
        }
    }
    take_rows<false>(launch);
}
