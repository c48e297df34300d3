// Reductions of rows, each by a team of threads that reads it once and keeps it in shared memory.
//
// OPERATION: a struct below. ELEMENT, RESULT: dtypes of x and of the result (or any_dtype); ACCUMULATE: float or double.
// TEAM: a kind of team. THREADS: of a CTA, at most.
#include "row.cuh"
#include "softmax.cuh"

using A = ACCUMULATE;
using Stored = stored_type<ELEMENT, A>::type;
constexpr bool IS_PRECISE = !is_same<RESULT, bfloat16>::value && !is_same<RESULT, float16>::value;

struct Mean {
    static constexpr int PLANES = 0;  // nothing is kept

    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Reduction& p, int turn) {
        A sum = 0;
        row.for_chunks([&](int chunk, uint4*, int) {
            sum = row.team.sum_in_warp(row.reader.sum_lanes(chunk * SUM_CHUNK + row.position, row.n));
            row.team.share(row.team.sums(turn), chunk, sum);
        });
        if constexpr (TEAM != LANES) {
            row.team.meet();
            if (row.team.warp > 0) return;
            sum = row.team.sum_of_chunks(turn);
        }
        if (row.position == 0 && row.is_present) row.writer.write_one(sum / static_cast<A>(p.divisor));
    }
};

template <bool LOGARITHM>
struct SoftmaxFamily {
    // A division takes the exponentials, which are kept where the elements were; a logarithm the elements.
    static constexpr int PLANES = (LOGARITHM ? sizeof(Stored) : sizeof(A)) / 2;

    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Reduction& p, int) {
        constexpr int VECTORS = R::VECTORS;
        const auto& team = row.team;
        row.load(lowest<A>());

        Maximum<Stored, A> thread_maximum;  // it is exact, so its order is free
        row.for_chunks([&](int chunk, uint4* vectors, int) {
            row.for_chunk(chunk, vectors, [&](int, uint4* at, int) {
                uint4 raw[VECTORS];
                A v[THREAD_LANES];
                row.raw(at, raw);
                row.values(raw, v);
                thread_maximum.add(raw, v);
            });
        });
        const A maximum = team.team_max(team.max_in_warp(thread_maximum.value()));

        A sum = 0;
        unsigned count = 0, near = 0;
        row.for_chunks([&](int chunk, uint4* vectors, int round) {
            A lane[THREAD_LANES] = {};
            row.for_chunk(chunk, vectors, [&](int, uint4* at, int step) {
                uint4 raw[VECTORS];
                A v[THREAD_LANES];
                row.raw(at, raw);
                row.values(raw, v);
                const bool are_near = add_exponentials<IS_PRECISE, Stored>(raw, v, maximum, lane, count);
                if constexpr (!LOGARITHM) {
                    near |= static_cast<unsigned>(are_near) << (round * CHUNK_STEPS + step);
                    keep(at, v);
                }
            });
            sum = team.sum_in_warp(fold_thread_lanes(lane));
            team.share(team.sums(0), chunk, sum);
        });
        count = team.count_in_warp(count);
        if constexpr (TEAM != LANES) {
            team.share(team.counts, team.warp, count);
            team.meet();
            sum = team.sum_of_chunks(0);
            count = team.sum_of_counts();
        }
        const A normaliser = softmax_normaliser(static_cast<A>(count), sum, LOGARITHM);

        if constexpr (LOGARITHM) {
            row.for_chunks([&](int chunk, uint4* vectors, int) {
                row.for_chunk(chunk, vectors, [&](int i, uint4* at, int) {
                    uint4 raw[VECTORS];
                    A v[THREAD_LANES];
                    row.raw(at, raw);
                    row.values(raw, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] - maximum - normaliser;
                    row.writer.write(i, v);
                });
            });
        } else {
            const A reciprocal = 1 / normaliser;
            if (!(normaliser <= FEW)) near = 0;
            row.for_chunks([&](int chunk, uint4* vectors, int round) {
                row.for_chunk(chunk, vectors, [&](int i, uint4* at, int step) {
                    A v[THREAD_LANES];
                    kept(at, v);
                    bool is_near = false;
                    if constexpr (is_same<A, float>::value) {
                        is_near = near >> (round * CHUNK_STEPS + step) & 1;
                        if (is_near) {
#pragma unroll
                            for (int j = 0; j < THREAD_LANES; j++) v[j] = divide_near(v[j], normaliser, reciprocal);
                        }
                    }
                    if (!is_near) {
#pragma unroll
                        for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] / normaliser;
                    }
                    row.writer.write(i, v);
                });
            });
        }
    }

  private:
    static __device__ __forceinline__ void keep(uint4* at, const float (&v)[THREAD_LANES]) {
#pragma unroll
        for (int plane = 0; plane < 2; plane++)
            at[plane * WARP] = make_uint4(__float_as_uint(v[4 * plane]), __float_as_uint(v[4 * plane + 1]),
                                          __float_as_uint(v[4 * plane + 2]), __float_as_uint(v[4 * plane + 3]));
    }
    static __device__ __forceinline__ void keep(uint4* at, const double (&v)[THREAD_LANES]) {
        uint4 raw[4];
        pack(v, static_cast<double*>(nullptr), raw);
#pragma unroll
        for (int plane = 0; plane < 4; plane++) at[plane * WARP] = raw[plane];
    }
    static __device__ __forceinline__ void kept(const uint4* at, A (&v)[THREAD_LANES]) {
        constexpr int VECTORS = sizeof(A) / 2;
#pragma unroll
        for (int plane = 0; plane < VECTORS; plane++)
            unpack(at[plane * WARP], static_cast<A*>(nullptr), v + plane * (THREAD_LANES / VECTORS));
    }
};

using LogSoftmax = SoftmaxFamily<true>;
using Softmax = SoftmaxFamily<false>;

// `lanes`: threads of a row, where TEAM is LANES. `kept`: bytes of dynamic shared memory for the elements of a warp; what
// the team exchanges follows behind those of all warps.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_rows(const __grid_constant__ Reduction p, int lanes, int kept, void* out, const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int warps = blockDim.x / WARP;
    const Team<TEAM, A> team(lanes, p.n, shared + warps * kept);
    uint4* const of_warp = reinterpret_cast<uint4*>(shared + warp_id() * kept);
    constexpr int PLANES = OPERATION::PLANES > 0 ? OPERATION::PLANES : sizeof(Stored) / 2;

    team.start();
#if __CUDA_ARCH__ >= 900
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();
#endif
    const int rows = TEAM == LANES ? WARP / lanes : 1;  // of a warp
    const int own = TEAM == LANES ? lane_id() / lanes : 0;
    const long long team_number = TEAM == LANES ? static_cast<long long>(blockIdx.x) * warps + warp_id() : blockIdx.x / team.ctas;
    const long long teams = TEAM == LANES ? static_cast<long long>(gridDim.x) * warps : gridDim.x / team.ctas;
    int turn = 0;
    for (long long first = team_number * rows; first < p.rows; first += teams * rows, turn ^= 1) {
        const long long row = first + own;
        long long start[2];
        p.row_offsets(min(row, p.rows - 1), start);
        const Row<TEAM, ELEMENT, RESULT, A, PLANES> r(team, p, out, x, start, row < p.rows, of_warp);
        OPERATION::run(r, p, turn);
    }
}
