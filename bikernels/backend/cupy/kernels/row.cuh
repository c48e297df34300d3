// A row of a team. Either it is read once and kept in shared memory, each thread the elements that it will use itself:
// 8 neighbours of every 256 of a chunk (see sum_tree.cuh). No thread reads what another has written, so nothing has to
// be waited for but the thread's own copies. Or, where it is too long, it is read anew whenever it is used.
#pragma once
#include "team.cuh"

template <bool CONDITION, class T, class U>
struct either {
    using type = T;
};
template <class T, class U>
struct either<false, T, U> {
    using type = U;
};

constexpr int CHUNK_STEPS = SUM_CHUNK / SUM_LANES;

// The eight elements of a thread in one of its steps.
struct Octet {
    uint4* kept;
};

// X: dtype of the row; R: of the result. OPERANDS_KEPT: x, or x and grad; 0 where elements are not kept. The 16-byte
// vectors of a warp lie side by side, so that shared memory is read without conflicts. PER_STEP: in a step, of a
// thread; with several, the team is so many times smaller than a warp, and the warp has as many rows at a time.
// RESULTS_KEPT: whether results in the accumulate dtype may take the place of x.
template <int KIND, class X, class R, class A, int OPERANDS_KEPT, bool RESULTS_KEPT, int PER_STEP>
struct Row {
    static constexpr bool IS_KEPT = OPERANDS_KEPT > 0;
    using Stored = typename either<is_same<X, any_dtype>::value || !IS_KEPT, A, X>::type;
    using Index = typename either<IS_KEPT, int, long long>::type;
    static constexpr int VECTORS = sizeof(Stored) / 2;
    static constexpr int PLANES = RESULTS_KEPT ? sizeof(A) / 2 : OPERANDS_KEPT * VECTORS;

    const Reduction& p;
    const Team<KIND, A>& team;
    const long long number;
    const bool is_present;  // false for a thread without a row
    const Index n;          // 0 without one
    const RowReader<X, A> x;
    const int position;  // of the thread's first element in a chunk
    uint4* const kept;

    // `shared`: of the warp, PLANES * 512 bytes for every 256 of its elements.
    __device__ __forceinline__ Row(const Reduction& p, const Team<KIND, A>& team, long long row, const void* x,
                                   uint4* shared)
        : p(p),
          team(team),
          number(min(row, p.rows - 1)),
          is_present(row < p.rows),
          n(is_present ? static_cast<Index>(p.n) : 0),
          x(p, x, p.row_offset<OF_X>(number)),
          position((KIND == LANES ? lane_id() & (team.lanes - 1) : lane_id()) * THREAD_LANES),
          kept(shared + lane_id()) {}

    __device__ __forceinline__ RowWriter<R, A> writer(void* out) const {
        return RowWriter<R, A>(p, out, p.row_offset<OF_OUT>(number));
    }

    // Calls work(i, octet) for the thread's elements i … i+7 of each step of a chunk, those of its octet number `which`
    // of a step, as far as they begin before the row's end. `round`: how many chunks the warp has had before.
    template <class Work>
    __device__ __forceinline__ void for_steps(int chunk, int round, int which, Work work) const {
#pragma unroll 2
        for (int step = 0; step < CHUNK_STEPS; step++) {
            const Index i =
                static_cast<Index>(chunk) * SUM_CHUNK + step * SUM_LANES + which * (SUM_LANES / PER_STEP) + position;
            if (i >= n) break;
            work(i, Octet{kept + ((round * CHUNK_STEPS + step) * PER_STEP + which) * PLANES * WARP});
        }
    }

    // Calls work(chunk, round) for each of the warp's chunks from `first` to before `end`.
    template <class Work>
    __device__ __forceinline__ void for_chunks(int first, int end, Work work) const {
        int round = 0;
        for (int chunk = first + team.warp; chunk < end; chunk += team.warps, round++) work(chunk, round);
    }

    // Calls work(i, octet) for all elements of the thread.
    template <class Work>
    __device__ __forceinline__ void for_octets(Work work) const {
        for_chunks(0, team.chunks, [&](int chunk, int round) {
#pragma unroll 1
            for (int which = 0; which < PER_STEP; which++) for_steps(chunk, round, which, work);
        });
    }

    // Begin to read the row, and the gradient if it is kept as well. Elements behind its end become `absent`.
    __device__ __forceinline__ void load(const void* grad, A absent) const {
        if constexpr (IS_KEPT) {
            for_octets([&](int i, Octet octet) { load(x, octet.kept, i, absent); });
            if constexpr (OPERANDS_KEPT > 1) {
                const RowReader<X, A, OF_GRAD> reader(p, grad, p.row_offset<OF_GRAD>(number));
                for_octets([&](int i, Octet octet) { load(reader, octet.kept + VECTORS * WARP, i, A(0)); });
            }
        }
    }

    // Eight elements of x, also as they are kept; those that are not there are `absent`, if `load` was given that.
    __device__ __forceinline__ void read_x(Index i, Octet octet, A absent, uint4 (&raw)[VECTORS],
                                           A (&v)[THREAD_LANES]) const {
        if constexpr (IS_KEPT) {
            read_kept(octet.kept, raw, v);
        } else {
            x.read(i, absent, v);
        }
    }
    __device__ __forceinline__ void read_x(Index i, Octet octet, A (&v)[THREAD_LANES]) const {
        uint4 raw[VECTORS];
        read_x(i, octet, A(0), raw, v);
    }
    __device__ __forceinline__ void read_grad(const void* grad, Index i, Octet octet, A (&v)[THREAD_LANES]) const {
        if constexpr (IS_KEPT) {
            uint4 raw[VECTORS];
            read_kept(octet.kept + VECTORS * WARP, raw, v);
        } else {
            const RowReader<X, A, OF_GRAD> reader(p, grad, p.row_offset<OF_GRAD>(number));
            reader.read(i, A(0), v);
        }
    }

    // Keep eight results in place of x, and read them again.
    __device__ __forceinline__ void keep_results(Octet octet, const A (&v)[THREAD_LANES]) const {
        static_assert(RESULTS_KEPT);
#pragma unroll
        for (int vector = 0; vector < PLANES; vector++)
            octet.kept[vector * WARP] = as_vector(v + vector * (THREAD_LANES / PLANES));
    }
    __device__ __forceinline__ void read_results(Octet octet, A (&v)[THREAD_LANES]) const {
#pragma unroll
        for (int vector = 0; vector < PLANES; vector++)
            unpack(octet.kept[vector * WARP], static_cast<A*>(nullptr), v + vector * (THREAD_LANES / PLANES));
    }

    // The tree over term(i, octet, v), which writes eight elements of it to v; what it writes for those that are not
    // there is left out. `which` array of the team is used. Before the team meets, share() may share other things.
    template <class Term>
    __device__ __forceinline__ A sum(int which, Term term) const {
        return sum(which, term, [] {});
    }
    template <class Term, class Share>
    __device__ __forceinline__ A sum(int which, Term term, Share share) const {
        if constexpr (IS_KEPT) {
            const A sum = sum_chunks(0, team.chunks, which, term);
            share();
            if constexpr (KIND == LANES) return sum;
            team.meet();
            return sum_shared(team.sums(which), team.chunks);
        } else {
            if (team.chunks <= SUM_CHUNK) {
                sum_chunks(0, team.chunks, which, term);
                share();
                team.meet();
                return sum_shared(team.sums(which), team.chunks);
            }
            int group = 0;
            for (int first = 0; first < team.chunks; first += SUM_CHUNK, group++) {
                const int end = min(team.chunks, first + SUM_CHUNK);
                sum_chunks(first, end, group & 1, term);
                team.meet();
                const A sum = sum_shared(team.sums(group & 1), end - first);
                if (threadIdx.x == 0) team.upper[group] = sum;
            }
            share();
            team.meet();  // and every CTA has read what the next sum overwrites
            const A sum = sum_shared(team.upper, group);
            __syncthreads();
            return sum;
        }
    }

  private:
    template <class Term>
    __device__ __forceinline__ A sum_chunks(int first, int end, int which, Term term) const {
        A sum = 0;
        for_chunks(first, end, [&](int chunk, int round) {
            A octet_sum[PER_STEP];
#pragma unroll
            for (int i = 0; i < PER_STEP; i++) octet_sum[i] = team.sum_in_warp(sum_steps(chunk, round, i, term));
#pragma unroll
            for (int count = PER_STEP / 2; count > 0; count /= 2)
#pragma unroll
                for (int i = 0; i < count; i++) octet_sum[i] = octet_sum[2 * i] + octet_sum[2 * i + 1];
            sum = octet_sum[0];
            team.share(team.sums(which), chunk - first, sum);
        });
        return sum;
    }

    template <class Term>
    __device__ __forceinline__ A sum_steps(int chunk, int round, int which, Term term) const {
        A lane[THREAD_LANES] = {};
        for_steps(chunk, round, which, [&](Index i, Octet octet) {
            A v[THREAD_LANES];
            term(i, octet, v);
            if (i + THREAD_LANES <= n) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) lane[j] += v[j];
            } else {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) lane[j] += i + j < n ? v[j] : A(0);
            }
        });
        return fold_thread_lanes(lane);
    }

    template <class Reader>
    __device__ __forceinline__ void load(const Reader& reader, uint4* to, int i, A absent) const {
#if __CUDA_ARCH__ >= 800
        if constexpr (Reader::HAS_DTYPE) {
            if (reader.vectors && i + THREAD_LANES <= n) {
                const X* from = static_cast<const X*>(reader.x) + reader.start + i;
#pragma unroll
                for (int vector = 0; vector < VECTORS; vector++)
                    copy_vector_async(shared_address(to + vector * WARP),
                                      reinterpret_cast<const uint4*>(from) + vector);
                return;
            }
        }
#endif
        A v[THREAD_LANES];
        uint4 raw[VECTORS];
        reader.read(i, absent, v);
        pack(v, static_cast<Stored*>(nullptr), raw);
#pragma unroll
        for (int vector = 0; vector < VECTORS; vector++) to[vector * WARP] = raw[vector];
    }

    __device__ __forceinline__ void read_kept(const uint4* from, uint4 (&raw)[VECTORS], A (&v)[THREAD_LANES]) const {
#pragma unroll
        for (int vector = 0; vector < VECTORS; vector++) {
            raw[vector] = from[vector * WARP];
            unpack(raw[vector], static_cast<Stored*>(nullptr), v + vector * (THREAD_LANES / VECTORS));
        }
    }
};

// Wait for what `load` has begun.
__device__ __forceinline__ void wait_for_rows() {
#if __CUDA_ARCH__ >= 800
    commit_copies();
    wait_for_copies<0>();
#endif
}

// Reads a row of an operand beside x, whose dtype is known at run time only, in the accumulate dtype.
template <class A, int OPERAND>
struct SideReader {
    const Reduction& p;
    const void* const data;
    const int dtype;
    const long long start;
    bool vectors;

    __device__ __forceinline__ SideReader(const Reduction& p, const void* data, long long row)
        : p(p), data(data), dtype(static_cast<int>(p.dtype[OPERAND])), start(p.row_offset<OPERAND>(row)) {
        const int size = dtype == DTYPE_FLOAT64 ? 8 : dtype == DTYPE_FLOAT32 ? 4 : 2;
        vectors =
            p.has_step() && p.step[OPERAND] == 1 && is_vector_aligned(static_cast<const char*>(data) + start * size);
    }

    // Whether `read_vector` may be used: every read is of 8 elements of that dtype, side by side.
    __device__ __forceinline__ bool has_vectors_of(int code) const {
        return vectors && dtype == code && p.n % THREAD_LANES == 0;
    }
    template <class X>
    __device__ __forceinline__ void read_vector(long long i, A (&v)[THREAD_LANES]) const {
        load_8(static_cast<const X*>(data) + start + i, v);
    }

    // Whether the operation has this operand.
    __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }

    // Elements i … i+7, those before n.
    __device__ __forceinline__ void read(long long i, A (&v)[THREAD_LANES]) const {
        if (vectors && i + THREAD_LANES <= p.n) {
            load_8(data, start + i, dtype, v);
            return;
        }
#pragma unroll 1
        for (int j = 0; j < THREAD_LANES; j++) {  // a queue, as in RowReader::read
            A value = 0;
            if (i + j < p.n) value = load(i + j);
#pragma unroll
            for (int k = 0; k < THREAD_LANES - 1; k++) v[k] = v[k + 1];
            v[THREAD_LANES - 1] = value;
        }
    }

    // The same for all elements of the row.
    __device__ __forceinline__ A read_one() const { return Element<any_dtype, A>::load(data, start, dtype); }

  private:
    __device__ __forceinline__ A load(long long i) const {
        const long long offset = p.has_step() ? i * p.step[OPERAND] : p.dims.offset<OPERAND>(i, p.kept, p.count);
        return Element<any_dtype, A>::load(data, start + offset, dtype);
    }
};
