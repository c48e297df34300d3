// Reductions along a strided axis, where neighbouring rows lie side by side, called columns here: a tile of them per
// CTA, or per cluster (sm_90 on), whose CTAs share the work.
//
// A thread sums 8 neighbouring lanes of the tree for WIDE columns, those of one 16-byte vector (or one column). The
// threads of a CTA that have the same columns are its groups of 8 lanes, as many as rows have lanes; they meet in
// shared memory, transposed, so that the upper levels are the same shuffles as in a contiguous row.
#pragma once
#include "hopper.cuh"
#include "reduction.cuh"

constexpr int CHUNK_STEPS = SUM_CHUNK / SUM_LANES;

// X: dtype of x. SPREAD: whether a tile is a cluster's.
template <class X, class A, int WIDE, bool SPREAD>
struct Columns {
    const Reduction& p;
    int n;                  // elements of a column
    const int chunks;       // of a column, at most WARP
    const int bits;         // the logarithm of `groups`
    const int groups;       // at most WARP
    const int tile;         // columns
    const int group, left;  // of this thread: which 8 lanes, and its first column in the tile
    int rank, ctas;         // of this CTA, of the cluster
    // Shared memory (column_bytes in schedules.py), the columns of the tile side by side in each array.
    A* const partial;     // of every group, a column more apart than the tile is wide
    A* const chunk_sums;  // of every chunk
    A* maxima;            // of every CTA
    A* counts;            // of every CTA
    // The tile's place.
    const X* x;
    long long column, start;  // the thread's first column, and where it begins
    bool is_present, vectors;

    __device__ __forceinline__ Columns(const Reduction& p, int bits, unsigned char* shared)
        : p(p),
          n(static_cast<int>(p.n)),
          chunks(static_cast<int>(chunks_of(p.n))),
          bits(bits),
          groups(1 << bits),
          tile((blockDim.x >> bits) * WIDE),
          group(threadIdx.x / (blockDim.x >> bits)),
          left(threadIdx.x % (blockDim.x >> bits) * WIDE),
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
        is_present = column < p.rows;  // with all WIDE columns
        start = p.row_offset<OF_X>(min(column, p.rows - WIDE));
        x = static_cast<const X*>(all);
        vectors = false;
        if constexpr (WIDE > 1) vectors = is_vector_aligned(x + start);
    }

    // Let the columns be one chunk of themselves.
    __device__ __forceinline__ void narrow(long long chunk) {
        n = static_cast<int>(min(p.n - chunk * SUM_CHUNK, static_cast<long long>(SUM_CHUNK)));
        start += chunk * SUM_CHUNK * p.step[OF_X];
    }

    // Element i of the thread's columns.
    __device__ __forceinline__ void read(int i, A (&v)[WIDE]) const {
        const long long offset = start + i * p.step[OF_X];
        if constexpr (WIDE > 1) {
            if (vectors) {
                unpack(*reinterpret_cast<const uint4*>(x + offset), static_cast<X*>(nullptr), v);
            } else {
#pragma unroll
                for (int w = 0; w < WIDE; w++) v[w] = Element<X, A>::load(x, offset + w, 0);
            }
        } else {
            v[0] = Element<X, A>::load(x, offset, static_cast<int>(p.dtype[OF_X]));
        }
        if (is_same<X, any_dtype>::value && p.rounds) {
#pragma unroll
            for (int w = 0; w < WIDE; w++) v[w] = round_through(v[w], p.out_dtype());
        }
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
    __device__ __forceinline__ void sum_elements(int chunk, A (&sum)[WIDE]) const {
        A lane[THREAD_LANES][WIDE] = {};
        const int first = chunk * SUM_CHUNK + group * THREAD_LANES;
        if (is_present) {
#pragma unroll 1
            for (int i = first; i < min(n, first + SUM_CHUNK); i += SUM_LANES) {
                if (WIDE == 1 && i + THREAD_LANES <= n) {
                    A v[THREAD_LANES][WIDE];
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) read(i + j, v[j]);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) lane[j][0] += v[j][0];
                } else {
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) {
                        if (i + j < n) {
                            A v[WIDE];
                            read(i + j, v);
#pragma unroll
                            for (int w = 0; w < WIDE; w++) lane[j][w] += v[w];
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int count = THREAD_LANES / 2; count > 0; count /= 2)
#pragma unroll
            for (int j = 0; j < count; j++)
#pragma unroll
                for (int w = 0; w < WIDE; w++) lane[j][w] = lane[2 * j][w] + lane[2 * j + 1][w];
#pragma unroll
        for (int w = 0; w < WIDE; w++) sum[w] = lane[0][w];
    }

    // The same of add(i, lane), which adds what element i contributes: a lane after the other, which takes fewer
    // registers. UNROLL: elements of a lane on their way, where their dtype is known.
    template <int UNROLL, class Add>
    __device__ __forceinline__ void sum_terms(int chunk, A (&sum)[WIDE], Add add) const {
        A one[WIDE], two[WIDE], four[WIDE];  // sums of as many lanes, which wait for their neighbours'
        const int first = chunk * SUM_CHUNK + group * THREAD_LANES;
#pragma unroll 1
        for (int j = 0; j < THREAD_LANES; j++) {
#pragma unroll
            for (int w = 0; w < WIDE; w++) sum[w] = 0;
            if (is_present) {
#pragma unroll(is_same<X, any_dtype>::value ? 1 : UNROLL)
                for (int i = first + j; i < min(n, first + SUM_CHUNK); i += SUM_LANES) add(i, sum);
            }
#pragma unroll
            for (int w = 0; w < WIDE; w++) {
                if (j % 2 == 0) {
                    one[w] = sum[w];
                } else {
                    sum[w] = one[w] + sum[w];
                    if (j % 4 == 1) {
                        two[w] = sum[w];
                    } else {
                        sum[w] = two[w] + sum[w];
                        if (j == 3) {
                            four[w] = sum[w];
                        } else {
                            sum[w] = four[w] + sum[w];
                        }
                    }
                }
            }
        }
    }

    // Fold the groups' values with a symmetric function, as neighbours, and write them to `array` of every CTA.
    template <class Fold>
    __device__ __forceinline__ void fold_groups(const A (&value)[WIDE], A* array, Fold fold) const {
#pragma unroll
        for (int w = 0; w < WIDE; w++) partial[group * (tile + 1) + left + w] = value[w];
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
template <class X, class A, int WIDE, bool CENTRED>
struct WeightTerms {
    const Reduction& p;
    const X* const grad;
    const void* const mean;
    const void* const rstd;
    long long start;
    bool vectors;

    __device__ __forceinline__ WeightTerms(const Reduction& p, long long column, const void* grad, const void* mean,
                                           const void* rstd)
        : p(p), grad(static_cast<const X*>(grad)), mean(mean), rstd(rstd) {
        start = p.row_offset<OF_GRAD>(min(column, p.rows - WIDE));
        vectors = false;
        if constexpr (WIDE > 1)
            vectors = p.dims.stride[OF_GRAD][p.kept - 1] == 1 && p.step[OF_GRAD] % WIDE == 0 &&
                      is_vector_aligned(this->grad + start);
    }

    // Add those of element i, of which x is given, to `lane`.
    __device__ __forceinline__ void add(int i, const A (&x)[WIDE], A (&lane)[WIDE]) const {
        A g[WIDE];
        const long long offset = start + i * p.step[OF_GRAD];
        const long long step = p.kept > 0 ? p.dims.stride[OF_GRAD][p.kept - 1] : 0;
        if constexpr (WIDE > 1) {
            if (vectors) {
                unpack(*reinterpret_cast<const uint4*>(grad + offset), static_cast<X*>(nullptr), g);
            } else {
#pragma unroll
                for (int w = 0; w < WIDE; w++) g[w] = Element<X, A>::load(grad, offset + w * step, 0);
            }
        } else {
            g[0] = Element<X, A>::load(grad, offset, static_cast<int>(p.dtype[OF_GRAD]));
        }
        const A r = statistic<OF_RSTD>(rstd, i), m = CENTRED ? statistic<OF_MEAN>(mean, i) : A(0);
#pragma unroll
        for (int w = 0; w < WIDE; w++) lane[w] += g[w] * ((CENTRED ? x[w] - m : x[w]) * r);
    }

  private:
    template <int OPERAND>
    __device__ __forceinline__ A statistic(const void* of, int i) const {
        return Element<any_dtype, A>::load(of, i * p.step[OPERAND], static_cast<int>(p.dtype[OPERAND]));
    }
};

// Writes WIDE columns side by side.
template <class A, int WIDE>
struct ColumnWriter {
    const Reduction& p;
    void* const out;
    long long start;
    int size;
    bool vectors;

    __device__ __forceinline__ ColumnWriter(const Reduction& p, void* out, long long start)
        : p(p),
          out(out),
          start(start),
          size(p.out_dtype() == DTYPE_FLOAT64   ? 8
               : p.out_dtype() == DTYPE_FLOAT32 ? 4
                                                : 2) {
        vectors = WIDE * size % 16 == 0 && p.dims.stride[OF_OUT][p.kept - 1] == 1 &&
                  is_vector_aligned(static_cast<char*>(out) + start * size);
    }

    __device__ __forceinline__ void write(int i, const A (&v)[WIDE]) const {
        const long long offset = start + i * p.step[OF_OUT];
        if constexpr (WIDE > 1) {
            if (vectors && p.step[OF_OUT] * size % 16 == 0) {
                store_vectors(static_cast<char*>(out) + offset * size, v);
                return;
            }
        }
        const long long step = p.dims.stride[OF_OUT][p.kept - 1];
#pragma unroll
        for (int w = 0; w < WIDE; w++) store(out, offset + w * step, p.out_dtype(), v[w]);
    }

  private:
    __device__ __forceinline__ void store_vectors(void* at, const float (&v)[8]) const {
        store_8(at, p.out_dtype(), v);
    }
    __device__ __forceinline__ void store_vectors(void* at, const float (&v)[4]) const {  // of float32
        *static_cast<uint4*>(at) =
            make_uint4(to_float32_bits(v[0]), to_float32_bits(v[1]), to_float32_bits(v[2]), to_float32_bits(v[3]));
    }
    __device__ __forceinline__ void store_vectors(void* at, const double (&v)[2]) const {
        *static_cast<ulonglong2*>(at) = make_ulonglong2(to_float64_bits(v[0]), to_float64_bits(v[1]));
    }
};
