// var and std along a strided axis of long columns that lie side by side in whole 16-byte vectors, read once. A tile of
// columns is shared by a team of CTAs, each of which has a chunk of it or an equal share of a chunk's lanes, and takes
// tile after tile. Teams meet in global memory (meeting.cuh); all are on the GPU at once, a CTA to a multiprocessor.
//
// A thread has the columns of one vector and two neighbouring lanes of the tree. It copies its elements (cp.async) to
// shared memory, where it alone reads them, and which holds three such lanes: two of a tile, and one of the next that is
// on its way. When it has added up a tile, it squares the elements of the tile before, which wait in registers and whose
// mean has arrived meanwhile; then those of this tile take their place, and the next ones are copied to where they were.
// So nobody waits for a mean, and reading never stops.
//
// ELEMENT: the dtype of x; ACCUMULATE: float or double. THREADS: of a CTA.
#include "async_copy.cuh"
#include "column_vectors.cuh"
#include "meeting.cuh"
#include "reduction.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

constexpr int VECTOR = 16, WIDTH = VECTOR / sizeof(X);  // bytes and columns of a thread
constexpr int ROUNDS = SUM_CHUNK / SUM_LANES;           // vectors of a lane
constexpr int HALF = ROUNDS / 2;                        // that arrive together
constexpr int LANES = 2, PLACES = 3;                    // of a thread; and for lanes in its shared memory
constexpr int LINE_BITS = 3;                            // the logarithm of the vectors in a line of the L2
constexpr int WARPS = THREADS / WARP;
constexpr int WORDS = 32 / sizeof(A);                   // that a thread reads at once

__device__ __forceinline__ void read_words(const unsigned* from, unsigned (&to)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[i]), "=r"(to[i + 1]), "=r"(to[i + 2]), "=r"(to[i + 3])
                     : "l"(from + i)
                     : "memory");
}
__device__ __forceinline__ void read_words(const unsigned long long* from, unsigned long long (&to)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 2)
        asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(to[i]), "=l"(to[i + 1])
                     : "l"(from + i)
                     : "memory");
}

// Copy a vector. Whole lines are fetched to the L2, which keeps them as what is not read again, or as what is: of tiles
// of half a line, with the next one, if that is not read at the same time.
template <bool IS_READ_AGAIN>
__device__ __forceinline__ void copy_vector(uint4* to, const X* from) {
    unsigned long long policy;
    if constexpr (IS_READ_AGAIN) {
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    } else {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "l"(policy)
                 : "memory");
}

struct Team {
    const Reduction& p;
    const X* const x;
    Word* const meeting;
    const int bits, part_bits, group_bits;  // logarithms: of a tile's vectors, of a chunk's parts, of a column's WORDS
    const int ctas;                         // of the team
    const int tiles, teams;                 // in all
    unsigned char* const shared;            // its bytes, and the numbers above: TallSchedule (column_schedules.py)
    const int rank;                         // of this CTA
    const int first;                        // of this thread: its first element
    int place = 0;                          // in shared memory, where the tile that has not been taken begins
    const X* from;                          // this thread's first element of the tile that is copied

    __device__ __forceinline__ Team(const Reduction& p, int bits, int part_bits, int group_bits, int ctas, int tiles,
                                    int teams, const void* x, void* meeting, unsigned char* shared)
        : p(p),
          x(static_cast<const X*>(x)),
          meeting(static_cast<Word*>(meeting)),
          bits(bits),
          part_bits(part_bits),
          group_bits(group_bits),
          ctas(ctas),
          tiles(tiles),
          teams(teams),
          shared(shared),
          rank(blockIdx.x % ctas),
          first((rank >> part_bits) * SUM_CHUNK + (rank & ((1 << part_bits) - 1)) * (SUM_LANES >> part_bits) +
                (threadIdx.x >> bits) * LANES) {}

    __device__ __forceinline__ int columns() const { return WIDTH << bits; }
    __device__ __forceinline__ int rows() const { return static_cast<int>(p.rows); }
    // The first of this thread's columns in a tile.
    __device__ __forceinline__ int left() const { return (threadIdx.x & ((1 << bits) - 1)) * WIDTH; }
    // Vectors of a lane. Computed when needed, as there are few registers to remember anything.
    __device__ __forceinline__ int rounds(int lane) const {
        int begin = first + lane;
        asm volatile("" : "+r"(begin));
        return min(max(static_cast<int>(p.n) - begin + SUM_LANES - 1, 0) / SUM_LANES, ROUNDS);
    }
    __device__ __forceinline__ uint4* slots(int place) const {
        return reinterpret_cast<uint4*>(shared) + threadIdx.x + place * ROUNDS * THREADS;
    }
    static __device__ __forceinline__ int next(int place) { return place + 1 == PLACES ? 0 : place + 1; }

    // What the team shares of a tile: first the elements' sums (0), then those of squares (1), of each column those of
    // all pieces side by side.
    __device__ __forceinline__ Word* words(int tile, int which) const {
        return meeting + (tile * 2 + which) * (columns() * WORDS << group_bits);
    }
    // Of a fold, every warp: two folds have different places unless all threads have met between them; of the columns.
    __device__ __forceinline__ A* partial(int fold) const {
        return reinterpret_cast<A*>(shared + PLACES * ROUNDS * THREADS * VECTOR) + fold * WARPS * columns();
    }
    __device__ __forceinline__ A* values() const { return partial(2); }

    // Begin to copy a lane of a tile to a place, in two groups of copies.
    template <int LANE>
    __device__ __forceinline__ void copy(int tile, int place) {
        if (tile < tiles) {
            const int column = tile * columns() + left();
            if (LANE == 0) from = x + p.row_offset<OF_X>(min(column, rows() - WIDTH)) + first * p.step[OF_X];
            const int number = column < rows() ? rounds(LANE) : 0;
            const X* at = from + LANE * p.step[OF_X];
            uint4* const to = slots(place);
            if (is_vector_aligned(at)) {
                if (bits < LINE_BITS && teams == 1 && tile % 2 == 0 && tile + 1 < tiles) {
                    copy_vectors<true>(to, at, number);
                } else {
                    copy_vectors<false>(to, at, number);
                }
                return;
            }
#pragma unroll 1
            for (int j = 0; j < ROUNDS; j++) {
                X* const one = reinterpret_cast<X*>(to + j * THREADS);
#pragma unroll 1
                for (int w = 0; w < WIDTH; w++) one[w] = j < number ? at[w] : X();
                at += SUM_LANES * p.step[OF_X];
            }
        }
        commit_copies();
        commit_copies();
    }

    // The sum of a lane at a place, for each of the thread's columns; PENDING groups of copies have followed its first.
    template <int PENDING>
    __device__ __forceinline__ void add(int place, A (&lane)[WIDTH]) const {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) lane[w] = 0;
        add_half<PENDING>(slots(place), lane);
        add_half<PENDING - 1>(slots(place) + HALF * THREADS, lane);
    }

    // That of the squares of a lane's elements.
    template <int LANE>
    __device__ __forceinline__ void add_squares(const uint4 (&raw)[ROUNDS], const A (&mean)[WIDTH],
                                                A (&lane)[WIDTH]) const {
        const int present = rounds(LANE);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) lane[w] = 0;
#pragma unroll
        for (int j = 0; j < ROUNDS; j++) {
            A v[WIDTH];
            unpack(raw[j], static_cast<X*>(nullptr), v);
            if (j < present) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) {
                    const A y = v[w] - mean[w];
                    lane[w] += y * y;
                }
            }
        }
    }

    // Take a lane to registers, and begin to copy that of a later tile to its place.
    template <int LANE>
    __device__ __forceinline__ void take(int later, uint4 (&raw)[ROUNDS]) {
        const uint4* const at = slots(place);
#pragma unroll
        for (int j = 0; j < ROUNDS; j++) raw[j] = at[j * THREADS];
        copy<LANE>(later, place);
        place = next(place);
    }

    // Share the sums of the threads' lanes, of which there are two neighbours.
    __device__ __forceinline__ void share(int tile, int which, int fold, A (&lane)[WIDTH],
                                          const A (&neighbour)[WIDTH]) const {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) lane[w] += neighbour[w];
#pragma unroll 1
        for (int mask = 1 << bits; mask < WARP; mask *= 2) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) lane[w] += __shfl_xor_sync(~0u, lane[w], mask);
        }
        A* const of_warps = partial(fold);
        if (lane_id() >> bits == 0) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) of_warps[warp_id() * columns() + left() + w] = lane[w];
        }
        __syncthreads();
        if (threadIdx.x < columns()) {
            Word* const to = words(tile, which) + (threadIdx.x * WORDS << group_bits) + rank;
            *const_cast<volatile Word*>(to) = word_of(fold_warps<WARPS>(of_warps + threadIdx.x, columns(), Add<A>()));
        }
    }

    // Read unit number `unit` of a tile, WORDS of a column, if it has so many.
    __device__ __forceinline__ void read(int tile, int which, int unit, Word (&to)[WORDS]) const {
        if (unit < columns() << group_bits) read_words(words(tile, which) + unit * WORDS, to);
    }

    // The sum of a column, in each thread that has read a unit of it, once all words are there.
    __device__ __forceinline__ A sum(int tile, int which, int unit, Word (&word)[WORDS]) const {
        A of[WORDS] = {};
        if (unit < columns() << group_bits) {
            const int here = ctas - (unit & ((1 << group_bits) - 1)) * WORDS;
            const auto are_there = [&] {
                bool all = true;
#pragma unroll
                for (int j = 0; j < WORDS; j++) all &= j >= here || word[j] != 0;
                return all;
            };
            while (!are_there()) read(tile, which, unit, word);
#pragma unroll
            for (int j = 0; j < WORDS; j++)
                if (j < here) of_word(word[j], of[j]);
        }
#pragma unroll
        for (int half = WORDS / 2; half > 0; half /= 2) {
#pragma unroll
            for (int j = 0; j < half; j++) of[j] = of[2 * j] + of[2 * j + 1];
        }
#pragma unroll 1
        for (int mask = 1; mask < 1 << group_bits; mask *= 2) of[0] += __shfl_xor_sync(~0u, of[0], mask);
        return of[0];
    }

    // The mean of each of the thread's columns.
    __device__ __forceinline__ void means(int tile, Word (&word)[WORDS], A (&mean)[WIDTH]) const {
        const A of_column = sum(tile, 0, threadIdx.x, word);
        const int column = threadIdx.x >> group_bits;
        if (column < columns() && column << group_bits == threadIdx.x)
            values()[column] = of_column / static_cast<A>(p.n);
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WIDTH; w++) mean[w] = values()[left() + w];
    }

    // Write the results of all the team's tiles, of which `begin` is the first, each thread some.
    __device__ __forceinline__ void write(int begin, void* out) const {
        const int units = columns() << group_bits;
        const long long all = static_cast<long long>((tiles - begin + teams - 1) / teams) * units;
#pragma unroll 1
        for (long long first = static_cast<long long>(rank) * THREADS; first < all; first += ctas * THREADS) {
            const long long one = first + threadIdx.x;
            const int tile = begin + static_cast<int>(one / units) * teams;
            const int unit = one < all ? static_cast<int>(one % units) : units;
            Word word[WORDS] = {};
            const A total = sum(tile, 1, unit, word);
            const int column = tile * columns() + (unit >> group_bits);
            if (unit < units && (unit & ((1 << group_bits) - 1)) == 0 && column < rows()) {
                const A variance = total / static_cast<A>(p.divisor);
                store(out, p.row_offset<OF_OUT>(column), p.out_dtype(), p.logarithm ? root(variance) : variance);
            }
        }
    }

  private:
    template <bool ARE_READ_AGAIN>
    __device__ __forceinline__ void copy_vectors(uint4* to, const X* from, int number) const {
#pragma unroll
        for (int j = 0; j < ROUNDS; j++) {
            if (j < number) {
                copy_vector<ARE_READ_AGAIN>(to + j * THREADS, from);
            } else {
                to[j * THREADS] = make_uint4(0, 0, 0, 0);
            }
            from += SUM_LANES * p.step[OF_X];
            if (j == HALF - 1) commit_copies();
        }
        commit_copies();
    }

    template <int PENDING>
    static __device__ __forceinline__ void add_half(const uint4* at, A (&lane)[WIDTH]) {
        wait_for_copies<PENDING>();
#pragma unroll
        for (int j = 0; j < HALF; j++) {
            A v[WIDTH];
            unpack(at[j * THREADS], static_cast<X*>(nullptr), v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) lane[w] += v[w];
        }
    }
};

// `bits`, `part_bits`, `group_bits`, `ctas`, `tiles`, `teams`: see Team. `meeting`: zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_tall_columns(const __grid_constant__ Reduction p, int bits, int part_bits, int group_bits, int ctas, int tiles,
                        int teams, void* out, const void* x, void* meeting) {
    extern __shared__ __align__(16) unsigned char shared[];
    Team team(p, bits, part_bits, group_bits, ctas, tiles, teams, x, meeting, shared);
    const int begin = blockIdx.x / ctas;
    team.copy<0>(begin, 0);
    team.copy<1>(begin, 1);
    team.copy<0>(begin + teams, 2);
    uint4 raw[LANES][ROUNDS];
#pragma unroll 1
    for (int tile = begin;; tile += teams) {
        const bool goes_on = tile < tiles, has_before = tile > begin;
        const int before = tile - teams;
        A sum[WIDTH], other[WIDTH], mean[WIDTH];
        Word word[WORDS];
        if (goes_on) {
            team.add<5>(team.place, sum);
            if (has_before) team.read(before, 0, threadIdx.x, word);  // early: they take a while
            team.add<3>(Team::next(team.place), other);
        } else {
            team.read(before, 0, threadIdx.x, word);
        }
        if (goes_on) team.share(tile, 0, has_before ? 0 : 1, sum, other);
        if (has_before) {
            team.means(before, word, mean);
            team.add_squares<0>(raw[0], mean, sum);
        }
        if (goes_on) team.take<1>(tile + teams, raw[0]);
        if (has_before) team.add_squares<1>(raw[1], mean, other);
        if (goes_on) team.take<0>(tile + 2 * teams, raw[1]);
        if (has_before) team.share(before, 1, 1, sum, other);
        if (!goes_on) break;
    }
    team.write(begin, out);
}
