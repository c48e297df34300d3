// Reductions along a strided axis, where neighbouring rows lie side by side, called columns here: a tile of them per
// CTA, or per cluster (sm_90 on), whose CTAs share the work.
//
// A thread sums 8 neighbouring lanes of the tree for one column. The threads of a CTA that have the same column are its
// groups of 8 lanes, as many as rows have lanes; they meet in shared memory, transposed, so that the upper levels are
// the same shuffles as in a contiguous row.
#pragma once
#include "hopper.cuh"
#include "reduction.cuh"

constexpr int CHUNK_STEPS = SUM_CHUNK / SUM_LANES;

// X: dtype of x. SPREAD: whether a tile is a cluster's.
template <class X, class A, bool SPREAD>
struct Columns {
    const Reduction& p;
    int n;                  // elements of a column
    const int chunks;       // of a column, at most WARP
    const int bits;         // the logarithm of `groups`
    const int groups;       // at most WARP
    const int tile;         // columns
    const int group, left;  // of this thread: which 8 lanes, and its column in the tile
    int rank, ctas;         // of this CTA, of the cluster
    // Shared memory (ColumnSchedule.bytes in column_schedules.py), the columns of the tile side by side in each array.
    A* const partial;     // of every group, a column more apart than the tile is wide
    A* const chunk_sums;  // of every chunk
    A* maxima;            // of every CTA
    A* counts;            // of every CTA
    // The tile's place.
    const X* x;
    long long column, start;  // the thread's column, and where it begins
    bool is_present;

    __device__ __forceinline__ Columns(const Reduction& p, int bits, unsigned char* shared)
        : p(p),
          n(static_cast<int>(p.n)),
          chunks(static_cast<int>(chunks_of(p.n))),
          bits(bits),
          groups(1 << bits),
          tile(blockDim.x >> bits),
          group(threadIdx.x / tile),
          left(threadIdx.x % tile),
          rank(0),
          ctas(1),
          partial(reinterpret_cast<A*>(shared)),
          chunk_sums(partial + groups * (tile + 1)) {
        if constexpr (SPREAD) {
            rank = cluster_rank();
            ctas = cluster_size();
        }
        maxima = chunk_sums + chunks * tile;
        counts = maxima + ctas * tile;
    }

    // Go to the tile that begins at column `first`.
    __device__ __forceinline__ void move(long long first, const void* all) {
        column = first + left;
        is_present = column < p.rows;
        start = p.row_offset<OF_X>(min(column, p.rows - 1));
        x = static_cast<const X*>(all);
    }

    // Let the column be one chunk of itself.
    __device__ __forceinline__ void narrow(long long chunk) {
        n = static_cast<int>(min(p.n - chunk * SUM_CHUNK, static_cast<long long>(SUM_CHUNK)));
        start += chunk * SUM_CHUNK * p.step[OF_X];
    }

    // Element i of the thread's column.
    __device__ __forceinline__ A read(int i) const {
        const A v = Element<X, A>::load(x, start + i * p.step[OF_X], static_cast<int>(p.dtype[OF_X]));
        return is_same<X, any_dtype>::value && p.rounds ? round_through(v, p.out_dtype()) : v;
    }

    // Calls work(i) for the elements that are this thread's where their order is free.
    template <class Work>
    __device__ __forceinline__ void for_elements(Work work) const {
        if (!is_present) return;
#pragma unroll 4
        for (int i = rank * groups + group; i < n; i += ctas * groups) work(i);
    }

    // The sum of the thread's lanes of a chunk, of the elements as they are: all lanes at once, so that many reads are
    // on their way.
    __device__ __forceinline__ A sum_elements(int chunk) const {
        A lane[THREAD_LANES] = {};
        const int first = chunk * SUM_CHUNK + group * THREAD_LANES;
        if (is_present) {
#pragma unroll 1
            for (int i = first; i < min(n, first + SUM_CHUNK); i += SUM_LANES) {
                if (i + THREAD_LANES <= n) {
                    A v[THREAD_LANES];
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) v[j] = read(i + j);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) lane[j] += v[j];
                } else {
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++)
                        if (i + j < n) lane[j] += read(i + j);
                }
            }
        }
        return fold_thread_lanes(lane);
    }

    // The same of add(i, lane), which adds what element i contributes: a lane after the other, which takes fewer
    // registers. UNROLL: elements of a lane on their way, where their dtype is known.
    template <int UNROLL, class Add>
    __device__ __forceinline__ A sum_terms(int chunk, Add add) const {
        A sum, one, two, four;  // sums of as many lanes, which wait for their neighbours'
        const int first = chunk * SUM_CHUNK + group * THREAD_LANES;
#pragma unroll 1
        for (int j = 0; j < THREAD_LANES; j++) {
            sum = 0;
            if (is_present) {
#pragma unroll(is_same<X, any_dtype>::value ? 1 : UNROLL)
                for (int i = first + j; i < min(n, first + SUM_CHUNK); i += SUM_LANES) add(i, sum);
            }
            if (j % 2 == 0) {
                one = sum;
            } else {
                sum = one + sum;
                if (j % 4 == 1) {
                    two = sum;
                } else {
                    sum = two + sum;
                    if (j == 3) {
                        four = sum;
                    } else {
                        sum = four + sum;
                    }
                }
            }
        }
        return sum;
    }

    // Fold the groups' values with a symmetric function, as neighbours, and write them to `array` of every CTA.
    template <class Fold>
    __device__ __forceinline__ void fold_groups(A value, A* array, Fold fold) const {
        partial[group * (tile + 1) + left] = value;
        __syncthreads();
#pragma unroll 1
        for (int item = threadIdx.x; item < tile * groups; item += blockDim.x) {
            const int at = item >> bits, from = item & (groups - 1);
            A folded = partial[from * (tile + 1) + at];
            for (int mask = 1; mask < groups; mask *= 2) folded = fold(folded, __shfl_xor_sync(~0u, folded, mask));
            if (from == 0) share(array + at, folded);
        }
        __syncthreads();  // `partial` is free
    }

    __device__ __forceinline__ void share(A* at, A value) const {
        if constexpr (SPREAD) {
            for (int cta = 0; cta < ctas; cta++) store_in_cluster(shared_address(at), cta, value);
        } else {
            *at = value;
        }
    }

    // Wait for all; what they shared before can then be read.
    __device__ __forceinline__ void meet() const {
        if constexpr (SPREAD) {
            sync_cluster();
        } else {
            __syncthreads();
        }
    }

    // The tree over the sums of COUNT chunks of a column; chunks that are not there would add +0.
    template <int COUNT = WARP>
    __device__ __forceinline__ A sum_of_chunks(int at, int first = 0) const {
        if constexpr (COUNT == 1) {
            return chunk_sums[first * tile + at];
        } else {
            const A left = sum_of_chunks<COUNT / 2>(at, first);
            if (first + COUNT / 2 >= chunks) return left;
            return left + sum_of_chunks<COUNT / 2>(at, first + COUNT / 2);
        }
    }
};

// What the rows of a batch contribute to the gradient of a norm's weight: g * h, h = (x - mean) * rstd, without the
// mean in rms_norm. A column has the elements of the batch at one place of the normalised axes.
template <class X, class A, bool CENTRED>
struct WeightTerms {
    const Reduction& p;
    const X* const grad;
    const void* const mean;
    const void* const rstd;
    const long long start;

    __device__ __forceinline__ WeightTerms(const Reduction& p, long long column, const void* grad, const void* mean,
                                           const void* rstd)
        : p(p),
          grad(static_cast<const X*>(grad)),
          mean(mean),
          rstd(rstd),
          start(p.row_offset<OF_GRAD>(min(column, p.rows - 1))) {}

    // That of element i, of which x is given.
    __device__ __forceinline__ A operator()(int i, A x) const {
        const A g = Element<X, A>::load(grad, start + i * p.step[OF_GRAD], static_cast<int>(p.dtype[OF_GRAD]));
        const A r = statistic<OF_RSTD>(rstd, i), m = CENTRED ? statistic<OF_MEAN>(mean, i) : A(0);
        return g * ((CENTRED ? x - m : x) * r);
    }

  private:
    template <int OPERAND>
    __device__ __forceinline__ A statistic(const void* of, int i) const {
        return Element<any_dtype, A>::load(of, i * p.step[OPERAND], static_cast<int>(p.dtype[OPERAND]));
    }
};
