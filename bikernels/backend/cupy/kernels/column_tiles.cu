// Reductions along a strided axis, of columns that lie side by side in whole 16-byte vectors: a tile of them per CTA, or
// per cluster (sm_90 on), whose CTAs share its pieces: its chunks, or equal shares of the lanes of each chunk.
//
// A thread has the columns of one vector and some neighbouring lanes of a piece. It copies its elements to shared memory
// (cp.async), where it alone reads them: always some ahead of those that it works on, and all of them are kept where they
// fit. A lane's elements are added one after the other, the lanes by a stack of partial sums, those of the threads by
// shuffles and through shared memory; the pieces are the lowest levels of a tree that chunks continue.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. RESULT: the dtype of softmax's results,
// that of x or the accumulate dtype. PASSES: how often it uses each element.
// DEPTH: groups of copies on their way. THREADS: of a CTA; CTAS: of a multiprocessor. IS_OF_CHUNKS: whether each chunk is
// reduced apart.
#include "hopper.cuh"
#include "softmax.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

// Whether exponentials make up for the rounding of x - maximum.
constexpr bool PRECISE = is_same<RESULT, A>::value;

constexpr int VECTOR = 16, WIDTH = VECTOR / sizeof(X);  // bytes and columns of a thread
constexpr int AT_ONCE = 4;                 // elements of a lane that are one group of copies
constexpr int WARPS = THREADS / WARP;
constexpr int LEVELS = 3;                  // of the tree, in a thread: it has at most 8 lanes of a piece

template <class T>
struct Add {
    __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Larger {
    __device__ __forceinline__ A operator()(A a, A b) const { return larger_nan(a, b); }
};

struct Tile {
    const Reduction& p;
    const void* const all;
    const int bits;               // the logarithm of the vectors of a tile
    const int part_bits;          // the logarithm of the pieces of a chunk
    const int columns;            // of a tile
    const int lanes;              // of a thread
    const int left, below;        // of this thread: its first column in a tile, and its first lane in a piece
    const int chunks, pieces;     // of a column
    const int together;           // elements of a lane in a group
    const int round_bits;         // the logarithm of a lane's groups in a piece
    const int room;               // groups in shared memory
    int rank, ctas;               // of this CTA, of the cluster
    bool is_kept;                 // whether all elements of a tile stay there
    uint4* const slots;             // of this thread; every THREADS of them one more
    A *partial, *sums, *maxima, *values;  // of two folds, every warp; of the pieces; of every CTA; anything
    unsigned* counts;             // of every CTA
    int folds = 0;
    // The item that is reduced, and the next group of it to use.
    long long first;  // column
    int only, n;      // the chunk, or -1; elements of this thread's columns
    int out_place;
    // The item that is copied, and the next group of it.
    long long in_item;
    const X* in_x;
    int in_n;  // -1: none
    int in_pass, in_piece, in_group, in_place;
    bool has_vectors, is_copying;

    static_assert(SUM_CHUNK / SUM_LANES <= 2 * AT_ONCE, "a lane has one group in a piece, or two");

    // `shared` has the bytes of TileSchedule (schedules.py).
    __device__ __forceinline__ Tile(const Reduction& p, int bits, int part_bits, int room, const void* all,
                                    unsigned char* shared)
        : p(p),
          all(all),
          bits(bits),
          part_bits(part_bits),
          columns(WIDTH << bits),
          lanes((SUM_LANES << bits >> part_bits) / THREADS),
          left((threadIdx.x & ((1 << bits) - 1)) * WIDTH),
          below((threadIdx.x >> bits) * lanes),
          chunks(IS_OF_CHUNKS ? 1 : static_cast<int>(chunks_of(p.n))),
          pieces(chunks << part_bits),
          together(static_cast<int>(min(static_cast<long long>(AT_ONCE), (p.n + SUM_LANES - 1) / SUM_LANES))),
          round_bits(p.n > AT_ONCE * SUM_LANES),
          room(room),
          rank(0),
          ctas(1),
          slots(reinterpret_cast<uint4*>(shared) + threadIdx.x) {
#if __CUDA_ARCH__ >= 900
        rank = cluster_rank();
        ctas = cluster_size();
#endif
        is_kept = PASSES > 1 && (pieces + ctas - 1) / ctas * (lanes << round_bits) == room;
        partial = reinterpret_cast<A*>(shared + room * together * THREADS * VECTOR);
        sums = partial + 2 * WARPS * columns;
        maxima = sums + pieces * columns;
        values = maxima + ctas * columns;
        counts = reinterpret_cast<unsigned*>(values + columns);
    }

    __device__ __forceinline__ long long tiles() const { return (p.rows + columns - 1) / columns; }
    // A tile or, if each chunk is reduced apart, a chunk of one.
    __device__ __forceinline__ long long items() const { return IS_OF_CHUNKS ? tiles() * p.chunks.number : tiles(); }

    // The first element of a group of a piece.
    __device__ __forceinline__ int position(int piece, int group) const {
        const int chunk = piece >> part_bits, part = piece - (chunk << part_bits);
        const int lane = group >> round_bits, round = group & ((1 << round_bits) - 1);
        return chunk * SUM_CHUNK + round * AT_ONCE * SUM_LANES + part * (SUM_LANES >> part_bits) + below + lane;
    }

    // Go to an item.
    __device__ __forceinline__ void move(long long item) {
        place(item, first, only, n);
    }

    // ---------------------------------------------------------------------------------------------------------- copies

    // Begin to copy an item, and those that follow it if they are not kept. AHEAD: to the L2 only.
    template <bool AHEAD>
    __device__ __forceinline__ void begin(long long item) {
        out_place = in_pass = in_group = in_place = 0;
        in_piece = rank;
        copy_from(item);
        is_copying = true;
#pragma unroll 1
        for (int group = 0; group < DEPTH; group++) copy_group<AHEAD>();
    }

    // Calls work(i, raw) for the elements of the next group, of which the first is `first`.
    template <bool UNROLLED, class Work>
    __device__ __forceinline__ void use_group(int first, Work work) {
        if (is_copying) wait_for_copies<DEPTH - 1>();
        const uint4* const from = slots + out_place * together * THREADS;
        if (UNROLLED && together == AT_ONCE && first + (AT_ONCE - 1) * SUM_LANES < n) {
            uint4 raw[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) raw[j] = from[j * THREADS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) work(first + j * SUM_LANES, raw[j]);
        } else {
#pragma unroll 1
            for (int j = 0; j < together && first + j * SUM_LANES < n; j++)
                work(first + j * SUM_LANES, from[j * THREADS]);
        }
        out_place = out_place + 1 == room ? 0 : out_place + 1;
        if (is_copying) copy_group<false>();
    }

    // Calls work(i, raw) for all elements of the thread.
    template <bool UNROLLED, class Work>
    __device__ __forceinline__ void for_elements(Work work) {
#pragma unroll 1
        for (int piece = rank; piece < pieces; piece += ctas) {
#pragma unroll 1
            for (int group = 0; group < lanes << round_bits; group++) use_group<UNROLLED>(position(piece, group), work);
        }
        end_pass();
    }

    // The sum of each piece, of what add(i, raw, lane) adds of element i to a lane, to `sums` of every CTA.
    template <bool UNROLLED, class Term>
    __device__ __forceinline__ void sum_pieces(Term add) {
#pragma unroll 1
        for (int piece = rank; piece < pieces; piece += ctas) {
            A sum[WIDTH], waiting[LEVELS][WIDTH];
#pragma unroll 1
            for (int lane = 0; lane < lanes; lane++) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) sum[w] = 0;
#pragma unroll 1
                for (int round = 0; round <= round_bits; round++)
                    use_group<UNROLLED>(position(piece, (lane << round_bits) + round),
                                        [&](int i, uint4 raw) { add(i, raw, sum); });
                push<0>(lane, sum, waiting);
            }
            fold(sum, sums + piece * columns, Add<A>());
        }
        end_pass();
    }

    // ----------------------------------------------------------------------------------------------------------- folds

    // Fold the threads' values, as neighbours, and write them to `array` of every CTA.
    template <class T, class Fold>
    __device__ __forceinline__ void fold(T (&value)[WIDTH], T* array, Fold fold) {
#pragma unroll 1
        for (int mask = 1 << bits; mask < WARP; mask *= 2) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) value[w] = fold(value[w], __shfl_xor_sync(~0u, value[w], mask));
        }
        T* const of_warps = reinterpret_cast<T*>(partial) + (folds++ & 1) * WARPS * columns;
        if (lane_id() >> bits == 0) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) of_warps[warp_id() * columns + left + w] = value[w];
        }
        __syncthreads();
        if (threadIdx.x < columns) {
            share(array + threadIdx.x, fold_warps<WARPS>(of_warps + threadIdx.x, fold));
        }
    }

    // The sum of the pieces, to the first one; all have met.
    __device__ __forceinline__ void fold_pieces() const {
#pragma unroll 1
        for (int apart = 1; apart < pieces; apart *= 2) {
            const int pairs = (pieces - apart + 2 * apart - 1) / (2 * apart);
#pragma unroll 1
            for (int item = threadIdx.x; item < pairs * columns; item += THREADS) {
                const int at = item & (columns - 1), piece = (item >> bits) / WIDTH * 2 * apart;
                sums[piece * columns + at] += sums[(piece + apart) * columns + at];
            }
            __syncthreads();
        }
    }

    // values[at] = value(at) of each column, then of[w] those of the thread's.
    template <class Value>
    __device__ __forceinline__ void column_values(A (&of)[WIDTH], Value value) const {
        if (threadIdx.x < columns) values[threadIdx.x] = value(threadIdx.x);
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WIDTH; w++) of[w] = values[left + w];
    }

    template <class T>
    __device__ __forceinline__ void share(T* at, T value) const {
#if __CUDA_ARCH__ >= 900
        if (ctas > 1) {
            for (int cta = 0; cta < ctas; cta++) store_in_cluster(shared_address(at), cta, value);
            return;
        }
#endif
        *at = value;
    }

    // Wait for all; what they shared before can then be read.
    __device__ __forceinline__ void meet() const { sync_ctas(ctas); }

  private:
    __device__ __forceinline__ void place(long long item, long long& column, int& chunk, int& length) const {
        chunk = -1;
        long long n = p.n;
        if constexpr (IS_OF_CHUNKS) {  // neighbouring CTAs have neighbouring columns
            chunk = static_cast<int>(item / tiles());
            item -= chunk * tiles();
            n = min(n - static_cast<long long>(chunk) * SUM_CHUNK, static_cast<long long>(SUM_CHUNK));
        }
        column = item * columns;
        length = column + left < p.rows ? static_cast<int>(n) : 0;  // a thread's columns are all there, or none
    }

    __device__ __forceinline__ void copy_from(long long item) {
        in_item = item;
        in_n = -1;
        if (item >= items()) return;
        long long column;
        int chunk;
        place(item, column, chunk, in_n);
        in_x = static_cast<const X*>(all) + p.row_offset<OF_X>(min(column + left, p.rows - WIDTH));
        if (chunk > 0) in_x += chunk * SUM_CHUNK * p.step[OF_X];
        has_vectors = is_vector_aligned(in_x);
    }

    template <bool AHEAD>
    __device__ __forceinline__ void copy_group() {
        if (in_n >= 0) {
            const int first = position(in_piece, in_group);
            const long long step = p.step[OF_X];
            uint4* to = slots + in_place * together * THREADS;
            const X* from = in_x + first * step;
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                if (j < together && first + j * SUM_LANES < in_n) {
                    if (AHEAD) {
                        prefetch_line(from + j * SUM_LANES * step);
                    } else if (has_vectors) {
                        copy_vector_async(shared_address(to + j * THREADS), from + j * SUM_LANES * step);
                    } else {
                        X* const one = reinterpret_cast<X*>(to + j * THREADS);
#pragma unroll 1
                        for (int w = 0; w < WIDTH; w++) one[w] = from[j * SUM_LANES * step + w];
                    }
                }
            }
            in_place = in_place + 1 == room ? 0 : in_place + 1;
            if (++in_group == lanes << round_bits) {
                in_group = 0;
                in_piece += ctas;
                if (in_piece >= pieces) next_pass();
            }
        }
        if (!AHEAD) commit_copies();
    }

    // Elements that are not kept are copied once more in each pass, and after the last one those of the next item.
    __device__ __forceinline__ void next_pass() {
        in_piece = rank;
        if (is_kept) {
            in_n = -1;
        } else if (++in_pass == PASSES) {
            in_pass = 0;
            copy_from(in_item + gridDim.x / ctas);
        }
    }

    __device__ __forceinline__ void end_pass() {
        if (is_kept) {
            is_copying = false;
            out_place = 0;
        }
    }

    // Add lane number `lane` to the sums that wait: afterwards `sum` is the last neighbours' sum.
    template <int LEVEL>
    static __device__ __forceinline__ void push(int lane, A (&sum)[WIDTH], A (&waiting)[LEVELS][WIDTH]) {
        if constexpr (LEVEL < LEVELS) {
            if (lane >> LEVEL & 1) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) sum[w] = waiting[LEVEL][w] + sum[w];
                push<LEVEL + 1>(lane, sum, waiting);
            } else {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) waiting[LEVEL][w] = sum[w];
            }
        }
    }

    template <int COUNT, class T, class Fold>
    __device__ __forceinline__ T fold_warps(const T* from, Fold fold) const {
        if constexpr (COUNT == 1) {
            return *from;
        } else {
            return fold(fold_warps<COUNT / 2>(from, fold),
                        fold_warps<COUNT / 2>(from + COUNT / 2 * columns, fold));
        }
    }
};

__device__ __forceinline__ void add_elements(uint4 raw, A (&lane)[WIDTH]) {
    A v[WIDTH];
    unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
    for (int w = 0; w < WIDTH; w++) lane[w] += v[w];
}

// Write result(at) for each column of the tile.
template <class Result>
__device__ __forceinline__ void write_columns(const Tile& tile, void* out, Result result) {
    const Reduction& p = tile.p;
    const int at = threadIdx.x;
    if (tile.rank == 0 && at < tile.columns && tile.first + at < p.rows)
        store(out, p.row_offset<OF_OUT>(tile.first + at), p.out_dtype(), result(at));
}

struct Mean {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<true>([](int, uint4 raw, A(&lane)[WIDTH]) { add_elements(raw, lane); });
        tile.meet();
        tile.fold_pieces();
        write_columns(tile, out, [&](int at) { return tile.sums[at] / static_cast<A>(p.divisor); });
    }
};

// Of one chunk: an element of the tree's next level, sums[chunk][column].
struct ChunkSum {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<true>([](int, uint4 raw, A(&lane)[WIDTH]) { add_elements(raw, lane); });
        tile.meet();
        tile.fold_pieces();
        const int at = threadIdx.x;
        if (tile.rank == 0 && at < tile.columns && tile.first + at < p.rows)
            static_cast<A*>(out)[tile.only * p.rows + tile.first + at] = tile.sums[at];
    }
};

struct Variance {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<true>([](int, uint4 raw, A(&lane)[WIDTH]) { add_elements(raw, lane); });
        tile.meet();
        tile.fold_pieces();
        A mean[WIDTH];
        tile.column_values(mean, [&](int at) { return tile.sums[at] / static_cast<A>(p.n); });
        tile.meet();  // every CTA has read what the next sums overwrite
        tile.sum_pieces<true>([&](int, uint4 raw, A(&lane)[WIDTH]) {
            A v[WIDTH];
            unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                const A y = v[w] - mean[w];
                lane[w] += y * y;
            }
        });
        tile.meet();
        tile.fold_pieces();
        write_columns(tile, out, [&](int at) {
            const A variance = tile.sums[at] / static_cast<A>(p.divisor);
            return p.logarithm ? root(variance) : variance;
        });
    }
};

// --------------------------------------------------------------------------------------------------------- exponentials

// The maxima of the thread's columns; a NaN where there is one.
template <class T>
struct Maxima {
    A maximum[WIDTH];

    __device__ __forceinline__ Maxima() {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) maximum[w] = lowest<A>();
    }
    __device__ __forceinline__ void add(uint4 raw) {
        A v[WIDTH];
        unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) maximum[w] = larger_nan(maximum[w], v[w]);
    }
    __device__ __forceinline__ void get(A (&v)[WIDTH]) const {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) v[w] = maximum[w];
    }
};
#if __CUDA_ARCH__ >= 800
template <class T>
struct PairMaxima {
    uint4 pairs;

    __device__ __forceinline__ PairMaxima(unsigned lowest) : pairs(make_uint4(lowest, lowest, lowest, lowest)) {}
    __device__ __forceinline__ void add(uint4 raw) {
        T* const x = nullptr;
        pairs = make_uint4(max_nan_pair(pairs.x, raw.x, x), max_nan_pair(pairs.y, raw.y, x),
                           max_nan_pair(pairs.z, raw.z, x), max_nan_pair(pairs.w, raw.w, x));
    }
    template <class V>
    __device__ __forceinline__ void get(V (&v)[8]) const {
        unpack(pairs, static_cast<T*>(nullptr), v);
    }
};
template <>
struct Maxima<bfloat16> : PairMaxima<bfloat16> {
    __device__ __forceinline__ Maxima() : PairMaxima(0xFF80FF80u) {}
};
template <>
struct Maxima<float16> : PairMaxima<float16> {
    __device__ __forceinline__ Maxima() : PairMaxima(0xFC00FC00u) {}
};
#endif

// t[w] = x - maximum of the thread's columns, and the errors of these differences. Returns whether all lie near enough
// for exponential_near(); `most` becomes the largest.
template <class T>
__device__ __forceinline__ bool differences(uint4 raw, const T (&maximum)[WIDTH], T (&t)[WIDTH], T (&error)[WIDTH],
                                            T& most) {
    unpack(raw, static_cast<X*>(nullptr), t);
#pragma unroll
    for (int w = 0; w < WIDTH; w++) {
        error[w] = 0;
        t[w] = PRECISE ? difference(t[w], maximum[w], error[w]) : t[w] - maximum[w];
    }
    if constexpr (is_same<T, float>::value) {
        float least = t[0];
        most = t[0];
#pragma unroll
        for (int w = 1; w < WIDTH; w++) {
            least = smaller_nan(least, t[w]);
            most = fmaxf(most, t[w]);
        }
        return least > NEAR;
    } else {
        return false;
    }
}

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

template <Form FORM>
struct SoftmaxFamily {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        A maximum[WIDTH];  // it is exact, so its order is free
        {
            Maxima<X> maxima;
            tile.for_elements<true>([&](int, uint4 raw) { maxima.add(raw); });
            maxima.get(maximum);
        }
        tile.fold(maximum, tile.maxima + tile.rank * tile.columns, Larger());
        if (threadIdx.x < tile.columns) tile.counts[tile.rank * tile.columns + threadIdx.x] = 0;
        tile.meet();
        const auto maximum_of = [&](int at) {
            A m = tile.maxima[at];
            for (int cta = 1; cta < tile.ctas; cta++) m = larger_nan(m, tile.maxima[cta * tile.columns + at]);
            return m;
        };
#pragma unroll
        for (int w = 0; w < WIDTH; w++) maximum[w] = maximum_of(tile.left + w);

        unsigned count[WIDTH / 2] = {};  // of two columns, in 16 bits each: a thread has fewer elements of a column
        tile.sum_pieces<false>([&](int, uint4 raw, A(&lane)[WIDTH]) { add_terms(raw, maximum, lane, count); });
        unsigned* const counts = tile.counts + tile.rank * tile.columns;
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            const unsigned one = count[w / 2] >> w % 2 * 16 & 0xFFFF;
            if (one > 0) atomicAdd(counts + tile.left + w, one);
        }
        if (tile.ctas > 1) {
            __syncthreads();
            if (threadIdx.x < tile.columns) tile.share(counts + threadIdx.x, counts[threadIdx.x]);
        }
        tile.meet();
        tile.fold_pieces();
        const auto normaliser_of = [&](int at) {
            unsigned all = 0;
            for (int cta = 0; cta < tile.ctas; cta++) all += tile.counts[cta * tile.columns + at];
            return softmax_normaliser(static_cast<A>(all), tile.sums[at], FORM != Form::SOFTMAX);
        };
        if constexpr (FORM == Form::LOGSUMEXP) {
            write_columns(tile, out, [&](int at) {
                const A m = maximum_of(at);
                return m - m != 0 && m == m ? m : m + normaliser_of(at);
            });
            return;
        }
        A normaliser[WIDTH];
        tile.column_values(normaliser, normaliser_of);
        write(tile, p, out, maximum, normaliser);
    }

  private:
    static __device__ __forceinline__ void add_terms(uint4 raw, const A (&maximum)[WIDTH], A (&lane)[WIDTH],
                                                     unsigned (&count)[WIDTH / 2]) {
        A t[WIDTH], error[WIDTH], most;
        if (differences(raw, maximum, t, error, most)) {
            if constexpr (is_same<A, float>::value) {
                float e[WIDTH];
#pragma unroll
                for (int w = 0; w < WIDTH; w++) e[w] = exponential_near<PRECISE>(t[w], error[w]);
                if (most == 0) {
#pragma unroll
                    for (int w = 0; w < WIDTH; w++) {
                        count[w / 2] += t[w] == 0 ? 1u << w % 2 * 16 : 0u;
                        e[w] = t[w] == 0 ? 0.0f : e[w];
                    }
                }
#pragma unroll
                for (int w = 0; w < WIDTH; w++) lane[w] += e[w];
            }
            return;
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            count[w / 2] += t[w] == 0 ? 1u << w % 2 * 16 : 0u;
            const A e = exponential(t[w], error[w]);
            lane[w] += t[w] == 0 ? A(0) : e;
        }
    }

    // The results. A column has fewer than FEW elements, so that quotients need no other test than the exponentials.
    static __device__ __forceinline__ void write(Tile& tile, const Reduction& p, void* out,
                                                 const A (&maximum)[WIDTH], const A (&normaliser)[WIDTH]) {
        using R = RESULT;
        const long long start = p.row_offset<OF_OUT>(min(tile.first + tile.left, p.rows - WIDTH)), step = p.step[OF_OUT];
        const long long apart = p.dims.stride[OF_OUT][p.kept - 1];
        R* const to = static_cast<R*>(out) + start;
        const bool has_vectors = apart == 1 && is_vector_aligned(to) && step % WIDTH == 0;
        A reciprocal[WIDTH];
        if (FORM == Form::SOFTMAX) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) reciprocal[w] = A(1) / normaliser[w];
        }
        tile.for_elements<false>([&](int i, uint4 raw) {
            A t[WIDTH];
            if constexpr (FORM == Form::LOG_SOFTMAX) {
                unpack(raw, static_cast<X*>(nullptr), t);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) t[w] = t[w] - maximum[w] - normaliser[w];
            } else {
                A error[WIDTH], most;
                if (differences(raw, maximum, t, error, most)) {
                    if constexpr (is_same<A, float>::value) {
#pragma unroll
                        for (int w = 0; w < WIDTH; w++) {
                            const A exponential = exponential_near<PRECISE>(t[w], error[w]);
                            t[w] = divide_near(exponential, normaliser[w], reciprocal[w]);
                        }
                    }
                } else {
#pragma unroll
                    for (int w = 0; w < WIDTH; w++) t[w] = exponential(t[w], error[w]) / normaliser[w];
                }
            }
            R* const place = to + i * step;
            if (has_vectors) {
                store_columns(place, t);
            } else {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) store(place + w * apart, t[w]);
            }
        });
    }

    template <class R, class T>
    static __device__ __forceinline__ void store_columns(R* to, const T (&v)[8]) {
        store_8<R>(to, v);
    }
    static __device__ __forceinline__ void store_columns(float* to, const float (&v)[4]) {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(to_float32_bits(v[0]), to_float32_bits(v[1]), to_float32_bits(v[2]), to_float32_bits(v[3]));
    }
    static __device__ __forceinline__ void store_columns(double* to, const double (&v)[2]) {
        *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(to_float64_bits(v[0]), to_float64_bits(v[1]));
    }
};

using Softmax = SoftmaxFamily<Form::SOFTMAX>;
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX>;
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP>;

// `bits`, `part_bits`, `room`: see Tile.
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    reduce_column_tiles(const __grid_constant__ Reduction p, int bits, int part_bits, int room, void* out,
                        const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    Tile tile(p, bits, part_bits, room, x, shared);
    long long item = blockIdx.x / tile.ctas;
    tile.begin<true>(item);
    if (tile.ctas > 1) tile.meet();  // no CTA writes to another that has not started
    launch_dependents();             // they wait for this kernel's end
    wait_for_predecessors();
    tile.begin<false>(item);
    while (true) {
        tile.move(item);
        OPERATION::run(tile, p, out);
        item += gridDim.x / tile.ctas;
        if (item >= tile.items()) return;
        tile.meet();  // shared memory is free for the next item
        if (tile.is_kept) tile.begin<false>(item);
    }
}
