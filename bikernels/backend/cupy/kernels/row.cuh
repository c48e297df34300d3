// A row that a team reads once and keeps in shared memory, each thread the elements that it will use itself: 8 neighbours
// of every 256 of a chunk (see sum_tree.cuh). No thread reads what another has written, so nothing has to be waited for
// but the thread's own copies.
#pragma once
#include "team.cuh"

template <class X, class A>
struct stored_type {
    using type = X;
};
template <class A>
struct stored_type<any_dtype, A> {
    using type = A;
};

constexpr int CHUNK_STEPS = SUM_CHUNK / SUM_LANES;

// X: dtype of the row; R: of the result (or any_dtype). PLANES: 16-byte vectors kept for 8 elements; those of a warp lie
// side by side, so that shared memory is read without conflicts.
template <int KIND, class X, class R, class A, int PLANES>
struct Row {
    using Stored = typename stored_type<X, A>::type;
    static constexpr int VECTORS = sizeof(Stored) / 2;
    static_assert(PLANES >= VECTORS);

    const Team<KIND, A>& team;
    const RowReader<X, A> reader;
    const RowWriter<R, A> writer;
    const bool is_present;  // false for a thread without a row
    const int n;            // 0 without one
    const int position;     // of the thread's first element in a chunk
    uint4* const kept;

    // `shared`: of the warp, PLANES * 512 bytes for every 256 of its elements.
    __device__ __forceinline__ Row(const Team<KIND, A>& team, const Reduction& p, void* out, const void* x,
                                   const long long (&start)[2], bool is_present, uint4* shared)
        : team(team),
          reader(p, x, start[0]),
          writer(p, out, start[1]),
          is_present(is_present),
          n(is_present ? static_cast<int>(p.n) : 0),
          position((KIND == LANES ? lane_id() & (team.lanes - 1) : lane_id()) * THREAD_LANES),
          kept(shared + lane_id()) {}

    // Calls work(i, vectors, step) for the thread's elements i … i+7 of a chunk, for all that begin before the row's end.
    template <class Work>
    __device__ __forceinline__ void for_chunk(int chunk, uint4* vectors, Work work) const {
#pragma unroll 2
        for (int step = 0; step < CHUNK_STEPS; step++) {
            const int i = chunk * SUM_CHUNK + step * SUM_LANES + position;
            if (i >= n) break;
            work(i, vectors + step * PLANES * WARP, step);
        }
    }

    // Calls work(chunk, vectors, round) for each of the warp's chunks.
    template <class Work>
    __device__ __forceinline__ void for_chunks(Work work) const {
        int round = 0;
        for (int chunk = team.warp; chunk < team.chunks; chunk += team.warps, round++)
            work(chunk, kept + round * CHUNK_STEPS * PLANES * WARP, round);
    }

    // Read the row. Elements behind its end become `absent`.
    __device__ __forceinline__ void load(A absent) const {
        for_chunks([&](int chunk, uint4* vectors, int) {
            for_chunk(chunk, vectors, [&](int i, uint4* to, int) {
#if __CUDA_ARCH__ >= 800
                if constexpr (RowReader<X, A>::HAS_DTYPE) {
                    if (reader.vectors && i + THREAD_LANES <= n && !reader.p.rounds) {
                        const X* from = static_cast<const X*>(reader.x) + reader.start + i;
#pragma unroll
                        for (int plane = 0; plane < VECTORS; plane++)
                            copy_vector_async(shared_address(to + plane * WARP), reinterpret_cast<const uint4*>(from) + plane);
                        return;
                    }
                }
#endif
                A v[THREAD_LANES];
                reader.read(i, absent, v);
                keep(to, v);
            });
        });
#if __CUDA_ARCH__ >= 800
        if constexpr (RowReader<X, A>::HAS_DTYPE) {
            commit_copies();
            wait_for_copies<0>();
        }
#endif
    }

    // Eight elements as they are kept.
    __device__ __forceinline__ void raw(const uint4* vectors, uint4 (&words)[VECTORS]) const {
#pragma unroll
        for (int plane = 0; plane < VECTORS; plane++) words[plane] = vectors[plane * WARP];
    }

    __device__ __forceinline__ void values(const uint4 (&words)[VECTORS], A (&v)[THREAD_LANES]) const {
#pragma unroll
        for (int plane = 0; plane < VECTORS; plane++)
            unpack(words[plane], static_cast<Stored*>(nullptr), v + plane * (THREAD_LANES / VECTORS));
    }

  private:
    __device__ __forceinline__ void keep(uint4* vectors, const A (&v)[THREAD_LANES]) const {
        uint4 words[VECTORS];
        pack(v, static_cast<Stored*>(nullptr), words);
#pragma unroll
        for (int plane = 0; plane < VECTORS; plane++) vectors[plane * WARP] = words[plane];
    }
};
