// var and std of rows longer than a CTA's registers, whose elements lie side by side, read once (sm_90 on). A chunk of
// the tree is a warp's, a row is a CTA's or a cluster's, and CTAs take row after row: each thread copies its elements
// of the next row to shared memory, from which it has taken those of this one to registers, while the warps meet.
//
// ELEMENT, ACCUMULATE, WIDTH, GROUPS: see register_rows.cuh, with STEPS of a chunk and without SPREAD. THREADS: of a
// CTA, at most.
#include "hopper.cuh"
#include "register_rows.cuh"

static_assert(!SPREAD && STEPS * SUM_LANES == SUM_CHUNK, "a chunk is a warp's");
constexpr int PLACES = SUM_LANES;  // for the sums of a row's chunks: one for each lane of the next level
static_assert(sizeof(Words) == 16, "of what is copied at a time");

// A thread's elements of a row in shared memory, vectors of a warp side by side. Nobody else reads or writes them.
struct Kept {
    uint4* const at;
    const Place& place;
    const int n;  // elements from the thread's chunk on
    const bool are_vectors;

    // Begin to copy a row, of which `from` is the beginning of the thread's chunk.
    __device__ __forceinline__ void copy(const X* from) const {
        if (are_vectors) {
#pragma unroll 4
            for (int i = 0; i < VECTORS; i++)
                if (place(i) < n) copy_vector_async(shared_address(at + i * WARP), from + place(i));
            commit_copies();
        } else {
#pragma unroll 1
            for (int i = 0; i < VECTORS; i++) {
                Words words = {};
                load_singly(from + place(i), n - place(i), words);
                at[i * WARP] = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

    __device__ __forceinline__ void take(Words (&to)[VECTORS]) const {
        wait_for_copies<0>();
#pragma unroll
        for (int i = 0; i < VECTORS; i++) load_words(reinterpret_cast<const X*>(at + i * WARP), to[i]);
    }
};

// The sum of chunks' sums, of which those that are not there are 0, in each thread of a warp.
__device__ __forceinline__ A sum_chunks(const A* sums) {
    A v[THREAD_LANES];
#pragma unroll
    for (int i = 0; i < THREAD_LANES; i++) v[i] = sums[lane_id() * THREAD_LANES + i];
    return sum_warp(fold(v, Plus<A>()));
}

// `rows` rows of n elements, `x_step` and `out_step` elements apart.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_long_rows(long long rows, long long x_step, long long out_step, A divisor, int n, int is_root, void* out,
                     const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    launch_dependents();  // they wait for this kernel's end
    const int ctas = cluster_size(), warps = blockDim.x / WARP;
    const int chunk = cluster_rank() * warps + warp_id();
    const Place place(5);
    // Two sums of each chunk, of two rows in turn, in every CTA: while some read those of a row, others share the next.
    A* const sums = reinterpret_cast<A*>(shared + warps * SUM_CHUNK * sizeof(X));
    const auto sums_of = [&](int turn, int which) { return sums + (turn % 2 * 2 + which) * PLACES; };
    for (int i = threadIdx.x; i < 4 * PLACES; i += blockDim.x) sums[i] = 0;
    arrive_at_cluster();
    const Kept kept{reinterpret_cast<uint4*>(shared + warp_id() * SUM_CHUNK * sizeof(X)) + lane_id(), place,
                    n - chunk * SUM_CHUNK, are_vectors_at(address_bits(x, x_step))};
    const auto share = [&](A* to, A sum) {
        if (kept.n > 0 && lane_id() < ctas) store_in_cluster(shared_address(to + chunk), lane_id(), sum);
    };
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        if (place(i) >= kept.n) kept.at[i * WARP] = make_uint4(0, 0, 0, 0);

    const long long teams = gridDim.x / ctas, first = blockIdx.x / ctas;
    const X* const from = static_cast<const X*>(x) + chunk * SUM_CHUNK;
    const A length = static_cast<A>(n);
    X* const type = nullptr;
    const auto write = [&](long long row, int turn) {
        if (chunk > 0) return;
        const A result = sum_chunks(sums_of(turn, 1)) / divisor;
        if (lane_id() == 0) store(static_cast<X*>(out) + row * out_step, is_root ? root(result) : result);
    };

    wait_for_predecessors();
    if (first < rows) kept.copy(from + first * x_step);
    wait_for_cluster();  // all CTAs have started
    int turn = 0;
    for (long long row = first; row < rows; row += teams, turn++) {
        Words raw[VECTORS];
        kept.take(raw);
        A lane[GROUPS][WIDTH] = {};
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int j = 0; j < WIDTH; j++) lane[i % GROUPS][j] += element(raw[i], j, type);
        if (row + teams < rows) kept.copy(from + (row + teams) * x_step);
        share(sums_of(turn, 0), warp_sum(lane, place));
        sync_cluster();
        const A mean = sum_chunks(sums_of(turn, 0)) / length;
        if (turn > 0) write(row - teams, turn - 1);

        A squares[GROUPS][WIDTH] = {};
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const A y = element(raw[i], j, type) - mean;
                if (place(i) < kept.n) squares[i % GROUPS][j] += y * y;  // of an absent element, the square is 0
            }
        }
        share(sums_of(turn, 1), warp_sum(squares, place));
        if (row + teams >= rows) {
            sync_cluster();
            write(row, turn);
        }
    }
}
