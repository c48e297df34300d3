// softmax and log_softmax of rows of 16 bits that are longer than a CTA's registers, whose elements lie side by side, read
// once (sm_90 on). A warp has two neighbouring chunks, and a row is a CTA's or a cluster's, whose CTAs take row after row.
// Of a row that a thread works on, it holds HELD vectors in registers, whose places in shared memory are the next row's at
// once; the others have two places, for rows in turn. The next row's maximum is found before this row ends, so that nobody
// waits for what the warps exchange.
//
// OPERATION: as below. ELEMENT: dtype of x and of the result. HELD: as above. ASIDE: vectors of a thread that may be put
// aside. THREADS: of a CTA, at most.
#include "exchange.cuh"
#include "softmax.cuh"

enum Operation { Softmax, LogSoftmax };

using X = ELEMENT;
using A = float;
using Elements = A[THREAD_LANES];
constexpr bool IS_LOG = OPERATION == LogSoftmax;
constexpr int CHUNKS = 2, STEPS = SUM_CHUNK / SUM_LANES, VECTORS = CHUNKS * STEPS;
constexpr int PLACES = HELD + 2 * (VECTORS - HELD);  // of vectors
constexpr int WARP_BYTES = (PLACES + ASIDE) * WARP * 16;
constexpr unsigned ALL_HELD = (1u << HELD) - 1;
constexpr int SHARE = 2;  // of the warps' sums, that a thread adds up
static_assert(sizeof(X) * THREAD_LANES == 16, "a thread's elements of a step are a vector");

// The words of two elements that are -inf.
template <class T>
__device__ __forceinline__ constexpr unsigned absent_word() {
    return is_same<T, bfloat16>::value ? 0xFF80FF80u : 0xFC00FC00u;
}

__device__ __forceinline__ uint4 load_singly(const X* from) {
    const unsigned short* const halves = reinterpret_cast<const unsigned short*>(from);
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = halves[2 * i] | static_cast<unsigned>(halves[2 * i + 1]) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// `rows` rows of n elements, `x_step` and `out_step` elements apart. Behind what the warps keep, shared memory has a barrier
// and `area_bytes` for each area of the exchange.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    exponentiate_long_rows(long long rows, long long x_step, long long out_step, int n, int area_bytes, void* out,
                           const void* x) {
    extern __shared__ __align__(128) unsigned char shared[];
    launch_dependents();  // they wait for this kernel's end
    // What follows is asked when needed: there are few registers to remember anything.
    const auto opaque = [] {
        int zero = 0;
        asm volatile("" : "+r"(zero));
        return zero;
    };
    const auto team = [&] {
        const int ctas = cluster_size(), warps = blockDim.x / WARP;
        unsigned char* const behind = shared + (warps * WARP_BYTES + opaque());
        return Team{warps, ctas, ctas > 1 ? static_cast<int>(cluster_rank()) : 0, behind + AREAS * 8, area_bytes,
                    shared_address(behind)};
    };
    const auto number_of = [](const Team& team) { return team.rank * team.warps + warp_id(); };  // of the warp
    const auto members_of = [](const Team& team) { return team.warps * team.ctas; };
    const auto first_of = [&](const Team& team) {
        return number_of(team) * (CHUNKS * SUM_CHUNK) + lane_id() * THREAD_LANES;  // the thread's first element
    };
    const auto left_of = [&](const Team& team) { return n - number_of(team) * (CHUNKS * SUM_CHUNK); };  // to the warp
    if (threadIdx.x < AREAS) init_barrier(team().barrier(threadIdx.x), team().warps * ARRIVING);
    fence_barrier_init();

    uint4* const kept = reinterpret_cast<uint4*>(shared + warp_id() * WARP_BYTES) + lane_id();
    const auto has = [](int left, int i) {
        return left >= CHUNKS * SUM_CHUNK || i * SUM_LANES + lane_id() * THREAD_LANES < left;
    };
    // Where vector i lies, of the row of that number.
    const auto place = [&](int index, int i) { return kept + (i < HELD ? i : i + index % 2 * (VECTORS - HELD)) * WARP; };
    const int left_at_first = left_of(team());
#pragma unroll 1
    for (int i = 0; i < PLACES; i++)
        if (!has(left_at_first, i < VECTORS ? i : i - (VECTORS - HELD)))
            kept[i * WARP] = make_uint4(absent_word<X>(), absent_word<X>(), absent_word<X>(), absent_word<X>());

    const int teams = gridDim.x / cluster_size(), first_row = blockIdx.x / cluster_size();
    const auto row_at = [&](int index) { return first_row + static_cast<long long>(index + opaque()) * teams; };
    const auto begin_of = [&](auto* array, int index, long long step) {
        return array + row_at(index) * step + first_of(team());
    };
    const auto are_vectors = [&] {
        const unsigned long long addresses = reinterpret_cast<unsigned long long>(x) | reinterpret_cast<unsigned long long>(out);
        return addresses % 16 == 0;
    };
    // Begin to copy the vectors from `begin` to before `end`, if there is such a row.
    const auto copy = [&](int index, int begin, int end) {
        if (row_at(index) < rows) {
            const X* const from = begin_of(static_cast<const X*>(x), index, x_step);
            const int left = left_of(team());
            if (are_vectors()) {
#pragma unroll
                for (int i = begin; i < end; i++)
                    if (has(left, i)) copy_vector_async(shared_address(place(index, i)), from + i * SUM_LANES);
            } else {
#pragma unroll 1
                for (int i = begin; i < end; i++)
                    if (has(left, i)) *place(index, i) = load_singly(from + i * SUM_LANES);
            }
        }
        commit_copies();
    };
    sync_ctas(cluster_size());
    if (lane_id() == 0 && left_at_first > 0 && are_vectors())
        prefetch_bulk(begin_of(static_cast<const X*>(x), 0, x_step), min(left_at_first, CHUNKS * SUM_CHUNK) * sizeof(X));
    wait_for_predecessors();
    copy(0, 0, VECTORS);
    copy(1, HELD, VECTORS);

    int most_of_warp;
    A least;
    const auto find_maximum = [&](int index) {
        Maximum<X, A> most;
        Minimum<X> least_of_thread;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const uint4 raw = *place(index, i);
            Elements none;
            most.add(&raw, none);
            least_of_thread.add(&raw, none);
        }
        least = least_of_thread.value();
        most_of_warp = __reduce_max_sync(~0u, ordered_bits(most.value()));
        const Team all = team();
        all.share(2 * index, number_of(all), static_cast<unsigned>(most_of_warp));
        all.arrived(2 * index, members_of(all) * 4);
    };
    wait_for_copies<1>();
    find_maximum(0);
#pragma unroll 1
    for (int index = 0;; index++) {
        A maximum;
        {
            const Team all = team();
            const int* const maxima = all.meet<int>(2 * index);
            int most_of_row = ordered_bits(lowest<A>());
#pragma unroll
            for (int i = 0; i < SHARE; i++)
                if (i * WARP + lane_id() < members_of(all)) most_of_row = max(most_of_row, maxima[i * WARP + lane_id()]);
            maximum = of_ordered_bits(__reduce_max_sync(~0u, most_of_row));
        }
        A least_t = least - maximum;
        const bool are_near = __all_sync(~0u, least_t > NEAR);
        const int left = left_of(team());
        const bool is_plain = left >= CHUNKS * SUM_CHUNK && are_near && of_ordered_bits(most_of_warp) != maximum;

        A sum = 0;
        unsigned count = 0;
        X* const type = nullptr;
        if (!is_plain) {
            A sums[CHUNKS] = {};
            unsigned least_order = ~0u;
            const int steps = (left + SUM_LANES - 1) / SUM_LANES;
#pragma unroll 1
            for (int c = 0; c < CHUNKS; c++) {
                Elements lane = {};
#pragma unroll 1
                for (int step = c * STEPS; step < min((c + 1) * STEPS, steps); step++) {
                    const uint4 raw = *place(index, step);
                    Elements v;
                    unpack(raw, type, v);
                    Elements all;
                    exponentials_anywhere<false>(v, maximum, count, all);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) {
                        lane[j] += v[j];
                        least_order = min(least_order, order_of_power(all[j]));
                    }
                }
                sums[0] = sums[1];
                sums[1] = sum_warp(fold_thread_lanes(lane));
            }
            sum = sums[0] + sums[1];
            count = __reduce_add_sync(~0u, count);
            if (!are_near) least_t = least_order >= SURE ? NEAR : lowest<A>();
        }

        uint4 held[HELD];
#pragma unroll
        for (int i = 0; i < HELD; i++) held[i] = kept[i * WARP];
        copy(index + 1, 0, HELD);
        const auto vector = [&](int i) { return i < HELD ? held[i] : *place(index, i); };
        if (is_plain) {
            A sums[CHUNKS];
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                Elements lane = {};
#pragma unroll
                for (int i = c * STEPS; i < (c + 1) * STEPS; i++) {
                    Elements v;
                    unpack(vector(i), type, v);
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) lane[j] += exponential_near<false>(v[j] - maximum, A(0));
                }
                sums[c] = fold_thread_lanes(lane);
            }
#pragma unroll
            for (int mask = 1; mask < WARP; mask *= 2) {
#pragma unroll
                for (int c = 0; c < CHUNKS; c++) sums[c] += __shfl_xor_sync(~0u, sums[c], mask);
            }
            sum = sums[0] + sums[1];
        }
        {
            // A thread adds neighbours; what it reads lies side by side with what others read.
            const Team all = team();
            const int number = number_of(all);
            all.share(2 * index + 1, number % SHARE * WARP + number / SHARE, make_uint2(__float_as_uint(sum), count));
            all.arrived(2 * index + 1, members_of(all) * 8);
        }
#pragma unroll
        for (int i = 0; i < HELD; i++)
            asm volatile("" : "+r"(held[i].x), "+r"(held[i].y), "+r"(held[i].z), "+r"(held[i].w)::"memory");

        const bool is_last = row_at(index + 1) >= rows;
        if (!is_last) {
            wait_for_copies<0>();
            find_maximum(index + 1);
        }
        A normaliser;
        {
            const Team all = team();
            const uint2* const pairs = all.meet<uint2>(2 * index + 1);
            A of_thread[SHARE];
            count = 0;
#pragma unroll
            for (int i = 0; i < SHARE; i++) {
                const uint2 pair =
                    lane_id() * SHARE + i < members_of(all) ? pairs[i * WARP + lane_id()] : make_uint2(0, 0);
                of_thread[i] = __uint_as_float(pair.x);
                count += pair.y;
            }
            sum = sum_warp(of_thread[0] + of_thread[1]);
            count = __reduce_add_sync(~0u, count);
            // Where the maximum is no number, neither is the result.
            normaliser = maximum - maximum == 0 ? normaliser_of(count, sum, IS_LOG) : __uint_as_float(NAN_FLOAT32);
        }

        // Where it is not sure to what the quotients of a vector round, they are computed below.
        const auto reciprocal_of = [](A divisor) { return IS_LOG ? A(0) : 1 / divisor; };
        const bool is_few = normaliser <= FEW, is_simple = is_few && least_t >= NEAR;
        const Bounds bounds(reciprocal_of(normaliser), least_t);
        unsigned unsure = 0;
        const auto put = [&](X* to, int i, const unsigned (&words)[4]) {
            if (are_vectors()) {
                *reinterpret_cast<uint4*>(to + i * SUM_LANES) = make_uint4(words[0], words[1], words[2], words[3]);
            } else {
                unsigned short* const halves = reinterpret_cast<unsigned short*>(to + i * SUM_LANES);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) halves[j] = static_cast<unsigned short>(words[j / 2] >> j % 2 * 16);
            }
        };
        const auto pack = [=](const Elements& v, unsigned (&words)[4]) {
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = packed_pair(v[2 * i], v[2 * i + 1], type);
        };
        const auto write = [&](int begin, int end) {
            X* const to = begin_of(static_cast<X*>(out), index, out_step);
            const int left = left_of(team());
#pragma unroll
            for (int i = begin; i < end; i++) {
                if (!has(left, i)) continue;
                Elements v;
                unsigned words[4];
                unpack(vector(i), type, v);
                if constexpr (IS_LOG) {
#pragma unroll
                    for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] - maximum - normaliser;
                    pack(v, words);
                    put(to, i, words);
                } else {
                    if (round_powers(v, maximum, bounds, words, type) && is_simple) {
                        put(to, i, words);
                    } else {
                        const int aside = __popc(unsure & ALL_HELD);
                        if (i < HELD && aside < ASIDE) kept[(PLACES + aside) * WARP] = held[i];
                        unsure |= 1u << i;
                    }
                }
            }
        };
        write(HELD, VECTORS);
        if constexpr (IS_LOG) copy(index + 2, HELD, VECTORS);
        write(0, HELD);
        if constexpr (!IS_LOG) {
            if (__any_sync(~0u, unsure != 0)) {
                const X* const from = begin_of(static_cast<const X*>(x), index, x_step);
                X* const to = begin_of(static_cast<X*>(out), index, out_step);
                asm volatile("" : "+f"(normaliser));
                const A reciprocal = reciprocal_of(normaliser);
#pragma unroll 1
                for (int aside = 0; unsure != 0; unsure &= unsure - 1, aside++) {
                    const int i = __ffs(unsure) - 1;
                    const uint4 raw = i >= HELD       ? *place(index, i)
                                      : aside < ASIDE ? kept[(PLACES + aside) * WARP]
                                                      : load_singly(from + i * SUM_LANES);
                    Elements v;
                    unsigned words[4];
                    unpack(raw, type, v);
                    quotients<false, X>(&raw, v, maximum, normaliser, reciprocal, normaliser <= FEW);
                    pack(v, words);
                    put(to, i, words);
                }
            }
            copy(index + 2, HELD, VECTORS);
        }
        if (is_last) return;
    }
}
