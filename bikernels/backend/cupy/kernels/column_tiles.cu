// Reductions along a strided axis, of columns that lie side by side in whole 16-byte vectors: a tile of them per CTA, or
// per team of CTAs, which share its pieces: its chunks, or equal shares of the lanes of each chunk. A team is a cluster
// (sm_90 on), or as many CTAs as there are pieces, anywhere on the GPU, which meet in global memory.
//
// A thread has the columns of one vector and some neighbouring lanes of a piece. It copies its elements to shared memory
// (cp.async), where it alone reads them: all at once, if they are kept there, or always some ahead of those that it works
// on. A lane's elements are added one after the other, the lanes by a stack of partial sums, those of the threads by
// shuffles and through shared memory; the pieces are the lowest levels of a tree that chunks continue.
//
// Backward passes have a second array, the gradient of the result, which lies beside x in shared memory.
//
// OPERATION: a struct below. ELEMENT: the dtype of x; ACCUMULATE: float or double. RESULT: the dtype of softmax's results,
// that of x or the accumulate dtype. PASSES: how often it uses each element; SUMS: how many of them are sums. GRAD:
// whether there is a gradient, which has the dtype of x; X_FROM: the first pass that uses x. KEPT: whether shared
// memory holds all of a tile from its first pass to its last. SPREAD: whether a team meets in global memory; all teams
// are on the GPU at once then. DEPTH: groups of copies on their way, if they are not kept. LEVELS: of the tree, in a
// thread: it has at most 2^LEVELS lanes of a piece. THREADS: of a CTA; CTAS: of a multiprocessor. IS_OF_CHUNKS: whether
// each chunk is reduced apart.
#include "column_vectors.cuh"
#include "hopper.cuh"
#include "meeting.cuh"
#include "softmax.cuh"

using X = ELEMENT;
using A = ACCUMULATE;

// Whether exponentials make up for the rounding of x - maximum.
constexpr bool PRECISE = is_same<RESULT, A>::value;

constexpr int VECTOR = 16, WIDTH = VECTOR / sizeof(X);  // bytes and columns of a thread
constexpr int ARRAYS = GRAD ? 2 : 1;       // of which each element has a vector
constexpr int AT_ONCE = 4;                 // elements of a lane that are one group of copies
constexpr int WARPS = THREADS / WARP;
constexpr int FEW_CTAS = 512;              // of a launch: they all begin at once
constexpr int BYTES_OF_A_CYCLE = 13;       // that a multiprocessor reads if all do, roughly

struct Larger {
    __device__ __forceinline__ A operator()(A a, A b) const { return larger_nan(a, b); }
};

// From a column to its neighbour.
template <int OPERAND>
__device__ __forceinline__ long long apart_of(const Reduction& p) {
    return p.dims.stride[OPERAND][p.kept - 1];
}

// The operands beside x.
struct Sides {
    const void* grad;
    const void* mean;
    const void* rstd;
};

// What stands beside the elements of a group, where nothing does.
struct Nothing {};
__device__ __forceinline__ Nothing nothing_beside(int) { return {}; }

struct Tile {
    const Reduction& p;
    const void* const all;
    const Sides& sides;
    Word* const meeting;          // of teams that meet in global memory
    const int bits;               // the logarithm of the vectors of a tile
    const int part_bits;          // the logarithm of the pieces of a chunk
    const int columns;            // of a tile
    const int lanes;              // of a thread
    const int left, below;        // of this thread: its first column in a tile, and its first lane in a piece
    const int chunks, pieces;     // of a column
    const int together;           // elements of a lane in a group
    const int round_bits;         // the logarithm of a lane's groups in a piece
    const int room;               // groups in shared memory
    int rank, ctas;               // of this CTA, of the team
    uint4* const slots;             // of this thread; every THREADS of them one more
    // Of two folds, every warp; of the pieces, in two passes; of every CTA; anything.
    A *partial, *sums, *other_sums, *maxima, *values;
    unsigned* counts;             // of every CTA
    int folds = 0;
    // The item that is reduced, and the next group of it to use.
    long long first;  // column
    int only, n;      // the chunk, or -1; elements of this thread's columns
    int out_place;
    Word* words;  // of a team that meets in global memory: what it shares next of the item
    // The item that is copied, and the next group of it.
    long long in_item;
    const X* in_x;
    const X* in_grad;
    int in_n;  // -1: none
    int in_pass, in_piece, in_group, in_place;
    bool has_vectors, grad_has_vectors;

    static constexpr int EIGHT = 8;  // sums that a thread folds at once
    static_assert(SUM_CHUNK / SUM_LANES <= 2 * AT_ONCE, "a lane has one group in a piece, or two");

    // `shared` has the bytes of TileSchedule (column_schedules.py).
    __device__ __forceinline__ Tile(const Reduction& p, int bits, int part_bits, int room, int team, const void* all,
                                    const Sides& sides, void* meeting, unsigned char* shared)
        : p(p),
          all(all),
          sides(sides),
          meeting(static_cast<Word*>(meeting)),
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
        if constexpr (SPREAD) {
            rank = blockIdx.x % team;
            ctas = team;
        } else {
#if __CUDA_ARCH__ >= 900
            rank = cluster_rank();
            ctas = cluster_size();
#endif
        }
        partial = reinterpret_cast<A*>(shared + room * together * ARRAYS * THREADS * VECTOR);
        sums = partial + 2 * WARPS * columns;
        const int of_sums = (SPREAD ? (pieces + EIGHT - 1) / EIGHT : pieces) * columns;
        other_sums = sums + (SUMS > 1 || SPREAD ? of_sums : 0);
        maxima = other_sums + of_sums;
        values = maxima + (SPREAD ? 1 : ctas) * columns;
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
        if constexpr (SPREAD) {
            const int places = PASSES == SUMS ? SUMS * pieces : 2 * ctas + pieces;  // of variances, or exponentials
            words = meeting + item * places * columns;
        }
    }

    // ---------------------------------------------------------------------------------------------------------- copies

    // Begin to copy an item, and those that follow it if they are not kept. AHEAD: to the L2 only, and more of it where
    // long tiles leave some multiprocessors without one, so that few CTAs keep the memory busy while they begin.
    template <bool AHEAD>
    __device__ __forceinline__ void begin(long long item) {
        out_place = in_pass = in_group = in_place = 0;
        in_piece = rank;
        copy_from(item);
        const bool are_few = GRAD && gridDim.x <= FEW_CTAS / 4 && p.n > SUM_CHUNK;
        const int groups = KEPT ? room : AHEAD && are_few ? 2 * DEPTH : DEPTH;
#pragma unroll 1
        for (int group = 0; group < groups; group++) {
            copy_group<AHEAD>();
            if (!AHEAD) commit_copies();
        }
    }

    // Before the last pass over what is kept: of many CTAs, the last ones let the next kernel begin.
    __device__ __forceinline__ void before_last_pass() const {
        if (KEPT && gridDim.x > FEW_CTAS) launch_dependents();
    }

    // Wait for a group that is kept, which so many others have followed.
    static __device__ __forceinline__ void await_kept(int later) {
        switch (min(later, 5)) {
            case 0: return wait_for_copies<0>();
            case 1: return wait_for_copies<1>();
            case 2: return wait_for_copies<2>();
            case 3: return wait_for_copies<3>();
            case 4: return wait_for_copies<4>();
            default: return wait_for_copies<5>();
        }
    }

    // Calls work(i, beside(i), vector, gradient) for the elements of the next group, of which the first is `first`;
    // what stands beside elements may be read before the group is there. Without a gradient the vector is given twice.
    template <bool UNROLLED, bool FIRST_PASS, class Beside, class Work>
    __device__ __forceinline__ void use_group(int first, Beside beside, Work work) {
        uint4* const from = slots + out_place * together * ARRAYS * THREADS;
        if (UNROLLED && together == AT_ONCE && first + (AT_ONCE - 1) * SUM_LANES < n) {
            decltype(beside(0)) others[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) others[j] = beside(first + j * SUM_LANES);
            await_group<FIRST_PASS>();
            uint4 raw[AT_ONCE * ARRAYS];
#pragma unroll
            for (int j = 0; j < AT_ONCE * ARRAYS; j++) raw[j] = from[j * THREADS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
                work(first + j * SUM_LANES, others[j], raw[j * ARRAYS], raw[j * ARRAYS + ARRAYS - 1]);
        } else {
            await_group<FIRST_PASS>();
#pragma unroll 1
            for (int j = 0; j < together && first + j * SUM_LANES < n; j++) {
                const int i = first + j * SUM_LANES;
                uint4* const at = from + j * ARRAYS * THREADS;
                work(i, beside(i), at[0], at[(ARRAYS - 1) * THREADS]);
            }
        }
        out_place = out_place + 1 == room ? 0 : out_place + 1;
        if constexpr (!KEPT) {
            copy_group<false>();
            commit_copies();
        }
    }

    // Calls work(i, vector, gradient) for all elements of the thread.
    template <bool UNROLLED, bool FIRST_PASS, class Work>
    __device__ __forceinline__ void for_elements(Work work) {
#pragma unroll 1
        for (int piece = rank; piece < pieces; piece += ctas) {
#pragma unroll 1
            for (int group = 0; group < lanes << round_bits; group++)
                use_group<UNROLLED, FIRST_PASS>(
                    position(piece, group), nothing_beside,
                    [&](int i, Nothing, uint4& raw, uint4& grad) { work(i, raw, grad); });
        }
        end_pass();
    }

    // Share the sum of each piece, of what add(i, vector, gradient, lane) adds of element i to a lane.
    template <bool UNROLLED, bool FIRST_PASS, class Term>
    __device__ __forceinline__ void sum_pieces(Term add) {
        sum_pieces<UNROLLED, FIRST_PASS>(
            nothing_beside, [&](int i, Nothing, uint4& raw, uint4& grad, A(&lane)[WIDTH]) { add(i, raw, grad, lane); });
    }

    // The same of add(i, beside(i), vector, gradient, lane).
    template <bool UNROLLED, bool FIRST_PASS, class Beside, class Term>
    __device__ __forceinline__ void sum_pieces(Beside beside, Term add) {
#pragma unroll 1
        for (int piece = rank; piece < pieces; piece += ctas) {
            A sum[WIDTH], waiting[LEVELS][WIDTH];
#pragma unroll 1
            for (int lane = 0; lane < lanes; lane++) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) sum[w] = 0;
#pragma unroll 1
                for (int round = 0; round <= round_bits; round++)
                    use_group<UNROLLED, FIRST_PASS>(
                        position(piece, (lane << round_bits) + round), beside,
                        [&](int i, const auto& other, uint4& raw, uint4& grad) { add(i, other, raw, grad, sum); });
                push(lane, sum, waiting);
            }
            const A of_piece = fold(sum, Add<A>());
            if (threadIdx.x < columns) {
                if constexpr (SPREAD) {
                    show(piece, of_piece);
                } else {
                    share(sums + piece * columns + threadIdx.x, of_piece);
                }
            }
        }
        end_pass();
    }

    // ----------------------------------------------------------------------------------------------------------- folds

    // Fold the threads' values, as neighbours: each of the first threads gets that of one column.
    template <class T, class Fold>
    __device__ __forceinline__ T fold(T (&value)[WIDTH], Fold fold) {
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
        return threadIdx.x < columns ? fold_warps<WARPS>(of_warps + threadIdx.x, columns, fold) : T(0);
    }

    // sums[at] becomes the sum of all pieces of each column. FOR_ALL: in every CTA; else in the first, and the others get
    // false.
    template <bool FOR_ALL>
    __device__ __forceinline__ bool collect() {
        if (!SPREAD) sync_ctas(ctas);
        if (!FOR_ALL && rank > 0) return false;
        if constexpr (SPREAD) {
            collect_words(pieces, sums, Add<A>(), A(0));
        } else {
            fold_arrays(pieces, sums, Add<A>());
        }
        return true;
    }

    // Let the next sums have a place of their own; some CTAs may still be reading these.
    __device__ __forceinline__ void turn() {
        A* const others = other_sums;
        other_sums = sums;
        sums = others;
    }

    // values[at] = value(at) of each column, then of[w] those of the thread's.
    template <class Value>
    __device__ __forceinline__ void column_values(A (&of)[WIDTH], Value value) const {
        if (threadIdx.x < columns) values[threadIdx.x] = value(threadIdx.x);
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WIDTH; w++) of[w] = values[left + w];
    }

    // Share the maximum of column threadIdx.x; then maximum_of(at) is that of each column.
    __device__ __forceinline__ void share_maximum(A maximum) {
        if constexpr (SPREAD) {
            if (threadIdx.x < columns) show(rank, maximum);
            collect_words(ctas, sums, Larger(), lowest<A>());
            if (threadIdx.x < columns) maxima[threadIdx.x] = sums[threadIdx.x];
            __syncthreads();
        } else {
            if (threadIdx.x < columns) share(maxima + rank * columns + threadIdx.x, maximum);
            sync_ctas(ctas);
        }
    }
    __device__ __forceinline__ A maximum_of(int at) const {
        A maximum = maxima[at];
        if (SPREAD) return maximum;
        for (int cta = 1; cta < ctas; cta++) maximum = larger_nan(maximum, maxima[cta * columns + at]);
        return maximum;
    }

    // What this CTA counts of each column. They are shared before the sums are collected; then count_of(at) is that of
    // each column, of CTAs that have collected the counts, too.
    __device__ __forceinline__ unsigned* own_counts() const { return counts + (SPREAD ? 0 : rank * columns); }
    __device__ __forceinline__ void share_counts() const {
        if (!SPREAD && ctas == 1) return;
        __syncthreads();
        if (threadIdx.x >= columns) return;
        const unsigned own = own_counts()[threadIdx.x];
        if constexpr (SPREAD) {
            show(pieces + rank, own);
        } else {
            share(own_counts() + threadIdx.x, own);
        }
    }
    __device__ __forceinline__ void collect_counts() {
        if constexpr (SPREAD) {
            unsigned* const all = reinterpret_cast<unsigned*>(other_sums);
            collect_words(ctas, all, Add<unsigned>(), 0u);
            if (threadIdx.x < columns) counts[threadIdx.x] = all[threadIdx.x];
            __syncthreads();
        }
    }
    __device__ __forceinline__ unsigned count_of(int at) const {
        if (SPREAD) return counts[at];
        unsigned all = 0;
        for (int cta = 0; cta < ctas; cta++) all += counts[cta * columns + at];
        return all;
    }

    // No CTA of a cluster writes to another that has not started.
    __device__ __forceinline__ void arrive_at_start() const {
#if __CUDA_ARCH__ >= 900
        if (!SPREAD && ctas > 1) arrive_at_cluster();
#endif
    }
    __device__ __forceinline__ void await_start() const {
#if __CUDA_ARCH__ >= 900
        if (!SPREAD && ctas > 1) wait_for_cluster();
#endif
    }

    // Between items: shared memory is free.
    __device__ __forceinline__ void part() const {
        if constexpr (SPREAD) {
            __syncthreads();
        } else {
            sync_ctas(ctas);
        }
    }

  private:
    // Wait for the next group.
    template <bool FIRST_PASS>
    __device__ __forceinline__ void await_group() const {
        if constexpr (!KEPT) {
            wait_for_copies<DEPTH - 1>();
        } else if (FIRST_PASS) {
            await_kept(room - 1 - out_place);
        }
    }

    // Fold `count` numbers of each column that the team shares, to array[at]; `nothing` changes no number.
    template <class T, class Fold>
    __device__ __forceinline__ void collect_words(int count, T* array, Fold fold, T nothing) {
        const int groups = (count + EIGHT - 1) / EIGHT;
#pragma unroll 1
        for (int item = threadIdx.x; item < groups * columns; item += THREADS) {
            const int at = item & (columns - 1), first = (item >> bits) / WIDTH * EIGHT;
            Word read[EIGHT];
            bool are_there;
            do {
                are_there = true;
#pragma unroll
                for (int j = 0; j < EIGHT; j++) {
                    read[j] = 1;
                    if (first + j < count) read[j] = seen(words + (first + j) * columns + at);
                    are_there &= read[j] != 0;
                }
            } while (!are_there);
            T of[EIGHT];
#pragma unroll
            for (int j = 0; j < EIGHT; j++) {
                of_word(read[j], of[j]);
                if (first + j >= count) of[j] = nothing;
            }
#pragma unroll
            for (int half = EIGHT / 2; half > 0; half /= 2) {
#pragma unroll
                for (int j = 0; j < half; j++) of[j] = fold(of[2 * j], of[2 * j + 1]);
            }
            array[item] = of[0];
        }
        __syncthreads();
        fold_arrays(groups, array, fold);
        words += count * columns;  // what is shared next
    }

    // Let the team see a number of column threadIdx.x.
    template <class T>
    __device__ __forceinline__ void show(int place, T number) const {
        *const_cast<volatile Word*>(words + place * columns + threadIdx.x) = word_of(number);
    }
    static __device__ __forceinline__ Word seen(const Word* word) { return *const_cast<const volatile Word*>(word); }

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

    // Fold `count` arrays of a number for each column, as neighbours, to the first one.
    template <class T, class Fold>
    __device__ __forceinline__ void fold_arrays(int count, T* array, Fold fold) const {
#pragma unroll 1
        for (int apart = 1; apart < count; apart *= 2) {
            const int pairs = (count - apart + 2 * apart - 1) / (2 * apart);
#pragma unroll 1
            for (int item = threadIdx.x; item < pairs * columns; item += THREADS) {
                const int at = item & (columns - 1), first = (item >> bits) / WIDTH * 2 * apart;
                T& left = array[first * columns + at];
                left = fold(left, array[(first + apart) * columns + at]);
            }
            __syncthreads();
        }
    }

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
        if constexpr (GRAD) {
            in_grad = static_cast<const X*>(sides.grad) + p.row_offset<OF_GRAD>(min(column + left, p.rows - WIDTH));
            if (chunk > 0) in_grad += chunk * SUM_CHUNK * p.step[OF_GRAD];
            grad_has_vectors = apart_of<OF_GRAD>(p) == 1 && p.step[OF_GRAD] % WIDTH == 0 && is_vector_aligned(in_grad);
        }
    }

    template <bool AHEAD>
    __device__ __forceinline__ void copy_group() {
        if (in_n < 0) return;
        const int first = position(in_piece, in_group);
        uint4* const to = slots + in_place * together * ARRAYS * THREADS;
        if (KEPT || in_pass >= X_FROM) copy_elements<AHEAD>(to, in_x, p.step[OF_X], 1, has_vectors, first);
        if constexpr (GRAD)
            copy_elements<AHEAD>(to + THREADS, in_grad, p.step[OF_GRAD], apart_of<OF_GRAD>(p), grad_has_vectors, first);
        in_place = in_place + 1 == room ? 0 : in_place + 1;
        if (++in_group == lanes << round_bits) {
            in_group = 0;
            in_piece += ctas;
            if (in_piece >= pieces) next_pass();
        }
    }

    // Those of an array, of which columns lie `apart`: 1, or they are no vectors.
    template <bool AHEAD>
    __device__ __forceinline__ void copy_elements(uint4* to, const X* all, long long step, long long apart,
                                                  bool are_vectors, int first) const {
        const X* from = all + first * step;
        if (!AHEAD && are_vectors && together == AT_ONCE && first + (AT_ONCE - 1) * SUM_LANES < in_n) {
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                copy_vector_async(shared_address(to + j * ARRAYS * THREADS), from);
                from += SUM_LANES * step;
            }
            return;
        }
#pragma unroll 1
        for (int j = 0; j < together && first + j * SUM_LANES < in_n; j++) {
            uint4* const there = to + j * ARRAYS * THREADS;
            if (AHEAD) {
                prefetch_line(from);
            } else if (are_vectors) {
                copy_vector_async(shared_address(there), from);
            } else {
                X* const one = reinterpret_cast<X*>(there);
#pragma unroll 1
                for (int w = 0; w < WIDTH; w++) one[w] = from[w * apart];
            }
            from += SUM_LANES * step;
        }
    }

    // Elements that are not kept are copied once more in each pass, and after the last one those of the next item.
    __device__ __forceinline__ void next_pass() {
        in_piece = rank;
        if constexpr (KEPT) {
            in_n = -1;
        } else if (++in_pass == PASSES) {
            in_pass = 0;
            copy_from(in_item + gridDim.x / ctas);
            if (in_n < 0) launch_dependents();  // which bring what they begin with to the L2
        }
    }

    __device__ __forceinline__ void end_pass() {
        if constexpr (KEPT) out_place = 0;
    }
};

__device__ __forceinline__ void add_elements(uint4 raw, A (&lane)[WIDTH]) {
    A v[WIDTH];
    unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
    for (int w = 0; w < WIDTH; w++) lane[w] += v[w];
}

// Write result(at) for each column of the tile, by one CTA.
template <class Result>
__device__ __forceinline__ void write_columns(const Tile& tile, void* out, Result result) {
    const Reduction& p = tile.p;
    const int at = threadIdx.x;
    if (at < tile.columns && tile.first + at < p.rows)
        store(out, p.row_offset<OF_OUT>(tile.first + at), p.out_dtype(), result(at));
}

// Write what is a sum, of which result(sum) is made; or, of one chunk, elements of the tree's next level,
// sums[chunk][column].
template <class Result>
__device__ __forceinline__ void write_sums(const Tile& tile, void* out, Result result) {
    if constexpr (IS_OF_CHUNKS) {
        const int at = threadIdx.x;
        if (at < tile.columns && tile.first + at < tile.p.rows)
            static_cast<A*>(out)[tile.only * tile.p.rows + tile.first + at] = tile.sums[at];
    } else {
        write_columns(tile, out, [&](int at) { return result(tile.sums[at]); });
    }
}

struct Mean {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<true, true>([](int, uint4 raw, uint4, A(&lane)[WIDTH]) { add_elements(raw, lane); });
        if (tile.collect<false>()) write_sums(tile, out, [&](A sum) { return sum / static_cast<A>(p.divisor); });
    }
};

// The gradient of a norm's weight: of the rows of a batch g * h, h = (x - mean) * rstd, without the mean in rms_norm. A
// column has the elements of the batch at one place of the normalised axes.
template <bool CENTRED>
struct WeightBackward {
    struct Statistics {
        A mean, rstd;
    };

    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        const int before = IS_OF_CHUNKS ? tile.only * SUM_CHUNK : 0;
        const int mean_step = static_cast<int>(p.step[OF_MEAN]), rstd_step = static_cast<int>(p.step[OF_RSTD]);
        const A* const mean = static_cast<const A*>(tile.sides.mean) + before * mean_step;
        const A* const rstd = static_cast<const A*>(tile.sides.rstd) + before * rstd_step;
        tile.sum_pieces<true, true>(
            [&](int i) {
                return Statistics{CENTRED ? __ldg(mean + i * mean_step) : A(0), __ldg(rstd + i * rstd_step)};
            },
            [&](int, const Statistics& of_row, uint4 raw, uint4 raw_grad, A(&lane)[WIDTH]) {
                A x[WIDTH], g[WIDTH];
                unpack(raw, static_cast<X*>(nullptr), x);
                unpack(raw_grad, static_cast<X*>(nullptr), g);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) lane[w] += g[w] * ((CENTRED ? x[w] - of_row.mean : x[w]) * of_row.rstd);
            });
        if (tile.collect<false>()) write_sums(tile, out, [](A sum) { return sum; });
    }
};

using RmsNormWeightBackward = WeightBackward<false>;
using LayerNormWeightBackward = WeightBackward<true>;

__device__ __forceinline__ uint4 packed(const float (&v)[4]) {
    return make_uint4(to_float32_bits(v[0]), to_float32_bits(v[1]), to_float32_bits(v[2]), to_float32_bits(v[3]));
}
__device__ __forceinline__ uint4 packed(const double (&v)[2]) {
    union {
        unsigned long long bits[2];
        uint4 raw;
    } all;
    all.bits[0] = to_float64_bits(v[0]);
    all.bits[1] = to_float64_bits(v[1]);
    return all.raw;
}

template <class R, class T>
__device__ __forceinline__ void store_columns(R* to, const T (&v)[8]) {
    store_8<R>(to, v);
}
__device__ __forceinline__ void store_columns(float* to, const float (&v)[4]) {
    *reinterpret_cast<uint4*>(to) = packed(v);
}
__device__ __forceinline__ void store_columns(double* to, const double (&v)[2]) {
    *reinterpret_cast<uint4*>(to) = packed(v);
}

struct Variance {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<true, true>([](int, uint4 raw, uint4, A(&lane)[WIDTH]) { add_elements(raw, lane); });
        tile.collect<true>();
        A mean[WIDTH];
        tile.column_values(mean, [&](int at) { return tile.sums[at] / static_cast<A>(p.n); });
        tile.turn();
        tile.before_last_pass();
        tile.sum_pieces<true, false>([&](int, uint4 raw, uint4, A(&lane)[WIDTH]) {
            A v[WIDTH];
            unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                const A y = v[w] - mean[w];
                lane[w] += y * y;
            }
        });
        if (!tile.collect<false>()) return;
        write_columns(tile, out, [&](int at) {
            const A variance = tile.sums[at] / static_cast<A>(p.divisor);
            return p.logarithm ? root(variance) : variance;
        });
    }
};

// --------------------------------------------------------------------------------------------------------- exponentials

// The largest elements of the thread's columns, a NaN where there is one, and the smallest, of float; a NaN is overlooked.
template <class T>
struct Extremes {
    A largest[WIDTH], smallest[WIDTH];

    __device__ __forceinline__ Extremes() {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            largest[w] = lowest<A>();
            smallest[w] = -lowest<A>();
        }
    }
    __device__ __forceinline__ void add(uint4 raw) {
        A v[WIDTH];
        unpack(raw, static_cast<X*>(nullptr), v);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            largest[w] = larger_nan(largest[w], v[w]);
            if constexpr (is_same<A, float>::value) smallest[w] = fminf(smallest[w], v[w]);
        }
    }
    __device__ __forceinline__ void get_largest(A (&v)[WIDTH]) const {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) v[w] = largest[w];
    }
    __device__ __forceinline__ void get_smallest(A (&v)[WIDTH]) const {
#pragma unroll
        for (int w = 0; w < WIDTH; w++) v[w] = smallest[w];
    }
};
#if __CUDA_ARCH__ >= 800
template <class T>
struct PairExtremes {
    uint4 largest, smallest;

    __device__ __forceinline__ PairExtremes(unsigned low, unsigned high)
        : largest(make_uint4(low, low, low, low)), smallest(make_uint4(high, high, high, high)) {}
    __device__ __forceinline__ void add(uint4 raw) {
        T* const x = nullptr;
        largest = make_uint4(max_nan_pair(largest.x, raw.x, x), max_nan_pair(largest.y, raw.y, x),
                             max_nan_pair(largest.z, raw.z, x), max_nan_pair(largest.w, raw.w, x));
        smallest = make_uint4(min_pair(smallest.x, raw.x, x), min_pair(smallest.y, raw.y, x),
                              min_pair(smallest.z, raw.z, x), min_pair(smallest.w, raw.w, x));
    }
    template <class V>
    __device__ __forceinline__ void get_largest(V (&v)[8]) const {
        unpack(largest, static_cast<T*>(nullptr), v);
    }
    template <class V>
    __device__ __forceinline__ void get_smallest(V (&v)[8]) const {
        unpack(smallest, static_cast<T*>(nullptr), v);
    }
};
template <>
struct Extremes<bfloat16> : PairExtremes<bfloat16> {
    __device__ __forceinline__ Extremes() : PairExtremes(0xFF80FF80u, 0x7F807F80u) {}
};
template <>
struct Extremes<float16> : PairExtremes<float16> {
    __device__ __forceinline__ Extremes() : PairExtremes(0xFC00FC00u, 0x7C007C00u) {}
};
#endif

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

// Where the elements of a warp lie: near enough to their maxima for exponential_near(), and whether some are the maximum.
enum class Where { BELOW, AT_MAXIMUM, ANYWHERE };

template <Form FORM>
struct SoftmaxFamily {
    // Exponentials that have room in the place of elements are kept there.
    static constexpr bool KEEPS_EXPONENTIALS = KEPT && FORM == Form::SOFTMAX && is_same<X, A>::value;

    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        A maximum[WIDTH];  // it is exact, so its order is free
        Where where;
        {
            Extremes<X> extremes;
            tile.for_elements<true, true>([&](int, uint4 raw, uint4) { extremes.add(raw); });
            A own[WIDTH];
            extremes.get_largest(own);
            if (threadIdx.x < tile.columns) tile.own_counts()[threadIdx.x] = 0;
            tile.share_maximum(tile.fold(own, Larger()));
            tile.column_values(maximum, [&](int at) { return tile.maximum_of(at); });
            where = find(extremes, maximum);
        }

        unsigned count[WIDTH / 2] = {};  // of two columns, in 16 bits each: a thread has fewer elements of a column
        if (FORM == Form::LOGSUMEXP) tile.before_last_pass();
        tile.sum_pieces<false, false>(
            [&](int, uint4& raw, uint4, A(&lane)[WIDTH]) { add_terms(raw, maximum, where, lane, count); });
        if (where != Where::BELOW) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                const unsigned one = count[w / 2] >> w % 2 * 16 & 0xFFFF;
                if (one > 0) atomicAdd(tile.own_counts() + tile.left + w, one);
            }
        }
        tile.share_counts();
        if (!tile.collect<FORM != Form::LOGSUMEXP>()) return;
        tile.collect_counts();
        const auto normaliser_of = [&](int at) {
            return softmax_normaliser(static_cast<A>(tile.count_of(at)), tile.sums[at], FORM != Form::SOFTMAX);
        };
        if constexpr (FORM == Form::LOGSUMEXP) {
            write_columns(tile, out, [&](int at) {
                const A m = tile.maximum_of(at);
                return m - m != 0 && m == m ? m : m + normaliser_of(at);
            });
        } else {
            A normaliser[WIDTH];
            tile.column_values(normaliser, normaliser_of);
            // Rarely needed for results of 16 bits: they stay in shared memory.
            if constexpr (FORM == Form::SOFTMAX && sizeof(RESULT) == 2) {
                write(tile, p, out, maximum, normaliser, tile.values + tile.left, where);
            } else {
                write(tile, p, out, maximum, normaliser, normaliser, where);
            }
        }
    }

  private:
    static __device__ __forceinline__ Where find(const Extremes<X>& extremes, const A (&maximum)[WIDTH]) {
        if constexpr (is_same<A, float>::value) {
            A own[WIDTH], smallest[WIDTH];
            extremes.get_largest(own);
            extremes.get_smallest(smallest);
            bool are_near = true, has_maximum = false;
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                are_near &= smallest[w] - maximum[w] > NEAR;
                has_maximum |= own[w] == maximum[w];
            }
            if (__all_sync(~0u, are_near)) return __any_sync(~0u, has_maximum) ? Where::AT_MAXIMUM : Where::BELOW;
        }
        return Where::ANYWHERE;
    }

    // t[w] = x - maximum of the thread's columns, and the errors of these differences.
    static __device__ __forceinline__ void differences(uint4 raw, const A (&maximum)[WIDTH], A (&t)[WIDTH],
                                                       A (&error)[WIDTH]) {
        unpack(raw, static_cast<X*>(nullptr), t);
#pragma unroll
        for (int w = 0; w < WIDTH; w++) {
            error[w] = 0;
            t[w] = PRECISE ? difference(t[w], maximum[w], error[w]) : t[w] - maximum[w];
        }
    }

    // e[w] = the exponentials of the thread's columns.
    static __device__ __forceinline__ void exponentials_of(const A (&t)[WIDTH], const A (&error)[WIDTH], Where where,
                                                           A (&e)[WIDTH]) {
        if constexpr (is_same<A, float>::value) {
            if (where != Where::ANYWHERE) {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) e[w] = exponential_near<PRECISE>(t[w], error[w]);
                return;
            }
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++) e[w] = exponential(t[w], error[w]);
    }

    static __device__ __forceinline__ void add_terms(uint4& raw, const A (&maximum)[WIDTH], Where where,
                                                     A (&lane)[WIDTH], unsigned (&count)[WIDTH / 2]) {
        A t[WIDTH], error[WIDTH], e[WIDTH];
        differences(raw, maximum, t, error);
        exponentials_of(t, error, where, e);
        if constexpr (KEEPS_EXPONENTIALS) {
            union {
                A e[WIDTH];
                uint4 raw;
            } kept;
#pragma unroll
            for (int w = 0; w < WIDTH; w++) kept.e[w] = e[w];
            raw = kept.raw;
        }
        bool has_maximum = where == Where::ANYWHERE;
        if (where == Where::AT_MAXIMUM) {
            A most = t[0];
#pragma unroll
            for (int w = 1; w < WIDTH; w++) most = larger_nan(most, t[w]);
            has_maximum = most == 0;
        }
        if (has_maximum) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) {
                count[w / 2] += t[w] == 0 ? 1u << w % 2 * 16 : 0u;
                e[w] = t[w] == 0 ? A(0) : e[w];
            }
        }
#pragma unroll
        for (int w = 0; w < WIDTH; w++) lane[w] += e[w];
    }

    // The results. A column has fewer than FEW elements, so that quotients need no other test than the exponentials.
    // `normaliser` at first, and `divisor` to the end, are what exponentials are divided by.
    template <class Divisors>
    static __device__ __forceinline__ void write(Tile& tile, const Reduction& p, void* out,
                                                 const A (&maximum)[WIDTH], const A (&normaliser)[WIDTH],
                                                 const Divisors& divisor, Where where) {
        using R = RESULT;
        const long long start = p.row_offset<OF_OUT>(min(tile.first + tile.left, p.rows - WIDTH)), step = p.step[OF_OUT];
        const long long apart = apart_of<OF_OUT>(p);
        R* const to = static_cast<R*>(out) + start;
        const bool has_vectors = apart == 1 && is_vector_aligned(to) && step % WIDTH == 0;
        A reciprocal[WIDTH];
        if (FORM == Form::SOFTMAX) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) reciprocal[w] = A(1) / normaliser[w];
        }
        tile.before_last_pass();
        tile.for_elements<false, false>([&](int i, uint4 raw, uint4) {
            A t[WIDTH];
            if constexpr (FORM == Form::LOG_SOFTMAX) {
                unpack(raw, static_cast<X*>(nullptr), t);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) t[w] = t[w] - maximum[w] - normaliser[w];
            } else {
                A e[WIDTH];
                if constexpr (KEEPS_EXPONENTIALS) {
                    unpack(raw, static_cast<X*>(nullptr), e);
                } else {
                    A error[WIDTH];
                    differences(raw, maximum, t, error);
                    exponentials_of(t, error, where, e);
                }
                divide(e, divisor, reciprocal, where, t);
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

    template <class T, class Divisors>
    static __device__ __forceinline__ void divide(const T (&e)[WIDTH], const Divisors& divisor,
                                                  const T (&reciprocal)[WIDTH], Where where, T (&quotient)[WIDTH]) {
        if (where == Where::ANYWHERE) {
#pragma unroll
            for (int w = 0; w < WIDTH; w++) quotient[w] = e[w] / divisor[w];
            return;
        }
#if __CUDA_ARCH__ >= 800
        if constexpr (sizeof(RESULT) == 2) {
            T product[WIDTH];
#pragma unroll
            for (int w = 0; w < WIDTH; w++) product[w] = e[w] * reciprocal[w];
            if (round_as_quotients(product, quotient, 1.0f, static_cast<RESULT*>(nullptr))) return;
        }
#endif
#pragma unroll
        for (int w = 0; w < WIDTH; w++) quotient[w] = divide_near(e[w], divisor[w], reciprocal[w]);
    }
};

// The gradient of x, where that is given as y, from that of the result.
template <bool IS_LOG>
struct SoftmaxFamilyBackward {
    static __device__ __forceinline__ void run(Tile& tile, const Reduction& p, void* out) {
        tile.sum_pieces<!KEPT, true>([](int, uint4 raw, uint4 raw_grad, A(&lane)[WIDTH]) {
            A y[WIDTH], g[WIDTH];
            unpack(raw, static_cast<X*>(nullptr), y);
            unpack(raw_grad, static_cast<X*>(nullptr), g);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) lane[w] += IS_LOG ? g[w] : g[w] * y[w];
        });
        tile.collect<true>();
        A sum[WIDTH];
        tile.column_values(sum, [&](int at) { return tile.sums[at]; });

        const int dtype = p.out_dtype(), size = dtype == DTYPE_FLOAT64 ? 8 : dtype == DTYPE_FLOAT32 ? 4 : 2;
        const long long start = p.row_offset<OF_OUT>(min(tile.first + tile.left, p.rows - WIDTH));
        const long long step = p.step[OF_OUT], apart = apart_of<OF_OUT>(p);
        const bool has_vectors = p.dtype[OF_OUT] == p.dtype[OF_X] && apart == 1 && step % WIDTH == 0 &&
                                 is_vector_aligned(static_cast<char*>(out) + start * size);
        tile.before_last_pass();
        tile.for_elements<false, false>([&](int i, uint4 raw, uint4 raw_grad) {
            A y[WIDTH], g[WIDTH];
            unpack(raw, static_cast<X*>(nullptr), y);
            unpack(raw_grad, static_cast<X*>(nullptr), g);
#pragma unroll
            for (int w = 0; w < WIDTH; w++)
                g[w] = IS_LOG ? fused(-exponential(y[w], A(0)), sum[w], g[w]) : y[w] * (g[w] - sum[w]);
            if (has_vectors) {
                store_columns(static_cast<X*>(out) + start + i * step, g);
            } else {
#pragma unroll
                for (int w = 0; w < WIDTH; w++) store(out, start + i * step + w * apart, dtype, g[w]);
            }
        });
    }
};

using SoftmaxBackward = SoftmaxFamilyBackward<false>;
using LogSoftmaxBackward = SoftmaxFamilyBackward<true>;

using Softmax = SoftmaxFamily<Form::SOFTMAX>;
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX>;
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP>;

// `bits`, `part_bits`, `room`: see Tile. `team`: CTAs of a tile, if they meet in global memory, which is `meeting`.
// `phase`: how many CTAs begin at the same time, or 0: all.
extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    reduce_column_tiles(const __grid_constant__ Reduction p, int bits, int part_bits, int room, int team, int phase,
                        void* out, const void* x, const void* grad, const void* mean, const void* rstd, void* meeting) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Sides sides{grad, mean, rstd};
    Tile tile(p, bits, part_bits, room, team, x, sides, meeting, shared);
    tile.arrive_at_start();
    long long item = blockIdx.x / tile.ctas;
    const bool is_ahead = gridDim.x <= FEW_CTAS;  // of more, most begin when the kernel before has ended
    if (is_ahead) {
        tile.begin<true>(item);
        tile.await_start();
    }
    wait_for_predecessors();
    if (KEPT && phase > 0 && blockIdx.x < CTAS * phase) {
        // Of the first CTAs of a multiprocessor, one reads while another computes, and then it stays so.
        const long long start = clock64();
        const int cycles = blockIdx.x / phase * (room * tile.together * ARRAYS * THREADS * VECTOR / BYTES_OF_A_CYCLE);
        while (clock64() - start < cycles) continue;
    }
    tile.begin<false>(item);
    if (!is_ahead) {
        tile.await_start();
    } else if (KEPT) {
        launch_dependents();
    }
    while (true) {
        tile.move(item);
        OPERATION::run(tile, p, out);
        item += gridDim.x / tile.ctas;
        if (item >= tile.items()) return;
        tile.part();
        if (KEPT) tile.begin<false>(item);
    }
}
