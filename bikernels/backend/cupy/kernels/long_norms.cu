// rms_norm and layer_norm of rows longer than a CTA's registers, whose elements lie side by side, read once (sm_90 on).
// A chunk of the tree is that of PARTS warps and a row a cluster's, whose CTAs take row after row: each thread takes
// its elements from shared memory to registers and at once begins to copy those of the next row to the same places, so
// that the memory is busy while warps meet, compute and write.
//
// OPERATION: see norms.cuh. ELEMENT, ACCUMULATE, WIDTH, GROUPS: see register_rows.cuh, with STEPS of a chunk and
// SPREAD. THREADS: of a CTA, at most.
#include "long_rows.cuh"
#include "norms.cuh"

static_assert(SPREAD, "the chunks of a CTA lie side by side");
static_assert(HAS_SIDES, "variances have long_variance.cu");
constexpr int SIDES = HAS_BIAS ? 2 : 1;
constexpr int SHORTER = 16 / sizeof(Words);  // than 16 bytes, so many times, vectors are
// Vectors of weight and bias that are read at a time; of narrow ones of both, for which there are fewer registers, half.
constexpr int AHEAD = (IS_IMAGE && HAS_BIAS ? 1 : 2) * SHORTER;

// `rows` rows of n elements, at most 32 << bits chunks, by clusters of several CTAs. Rows of x and out, and statistics,
// lie as far apart as the steps say. `held`: of 16 bytes of the weight and of the bias, how many a thread keeps in shared
// memory, if it reads vectors; a multiple of 2.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    normalise_long_rows(long long rows, long long x_step, long long out_step, long long mean_step, long long rstd_step,
                        A divisor, A eps, int n, int bits, int held, void* out, const void* x, const void* weight,
                        const void* bias, void* means, void* rstds) {
    extern __shared__ __align__(16) unsigned char shared[];
    launch_dependents();  // they wait for this kernel's end
    const int ctas = cluster_size(), warps = blockDim.x / WARP, chunks = (n + SUM_CHUNK - 1) / SUM_CHUNK;
    const int begin = cluster_rank() * warps / PARTS * SUM_CHUNK;  // from where `place` counts
    // The chunk that the warp has, or a part of it. Asked when needed: there are few registers to remember anything.
    const auto chunk = [=] { return static_cast<int>(cluster_rank() * warps + warp_id()) / PARTS; };
    const Place place(5);
    // Of weight and bias only, where rows begin anywhere.
    const unsigned long long of_rows = IS_IMAGE ? 0 : address_bits(x, x_step) | address_bits(out, out_step);
    const bool are_vectors = are_vectors_at(of_rows | address_bits(weight, 0) | address_bits(bias, 0));
    if (!are_vectors) held = 0;
    held *= SHORTER;
    const int warp_bytes = Rows::BYTES + SIDES * held * WARP * sizeof(Words);
    Rows kept(shared + warp_id() * warp_bytes, place, n - begin, are_vectors);
    kept.clear();

    // The sums of all parts of chunks, of two exchanges in turn, in every CTA that has a chunk. A barrier counts their
    // bytes; who waits for it finds them. A warp sends its sum of an exchange when it has read those of the one before,
    // and goes on when all have sent theirs: nobody then needs what the next exchange overwrites.
    const int places = WARP * PARTS << bits, senders = chunks * PARTS;
    A* const sums = reinterpret_cast<A*>(shared + warps * warp_bytes);
    unsigned long long* const barriers = reinterpret_cast<unsigned long long*>(sums + 2 * places);
    for (int i = threadIdx.x; i < 2 * places; i += blockDim.x) sums[i] = 0;
    int exchange = 0;
    const auto add_up = [&](A sum) {
        A* const all = sums + (exchange & 1) * places;
        const unsigned barrier = shared_address(barriers + (exchange & 1));
        if (threadIdx.x == 0) arrive_and_expect(barrier, senders * static_cast<int>(sizeof(A)));
        A* const to = all + place_of(chunk(), warp_id() % PARTS, bits);
        if (lane_id() * warps < senders) send_sum(shared_address(to), lane_id(), sum, barrier);
        wait_barrier(barrier, exchange++ >> 1 & 1);
        return sum_chunks(all, bits);
    };
    init_barriers(barriers);
    arrive_at_cluster();

    const int teams = gridDim.x / ctas;
    long long row = blockIdx.x / ctas;
    const X* const from = static_cast<const X*>(x) + begin;
    X* const type = nullptr;
    const Side<true, false> weights(weight == nullptr ? nullptr : static_cast<const X*>(weight) + begin);
    const Side<HAS_BIAS, true> biases(bias == nullptr ? nullptr : static_cast<const X*>(bias) + begin);

    prefetch_row(from + row * x_step, place, kept.n);
    wait_for_predecessors();
    kept.copy(from + row * x_step);
    Vector* const sides = kept.behind();
    const auto hold = [&](const auto& side, Vector* to) {
#pragma unroll 1
        for (int i = 0; i < held; i++, to += SIDES * WARP) {
            if (side.data != nullptr) {
                if (place(i) < kept.n) copy_words(shared_address(to), side.data + place(i));
            } else {
                Words words;
                side.read(place(i), kept.n, are_vectors, words);
                store_words(reinterpret_cast<X*>(to), words);
            }
        }
    };
    hold(weights, sides);
    if constexpr (HAS_BIAS) hold(biases, sides + WARP);
    commit_copies();
    wait_for_cluster();  // all CTAs have started
    if (chunk() * SUM_CHUNK >= n) return;
#pragma unroll 1
    for (; row < rows; row += teams) {
        Words raw[VECTORS];
        wait_for_copies<0>();
        kept.settle();
        kept.take(raw);
        kept.release();
        if (row + teams < rows) kept.copy(from + (row + teams) * x_step);
        int end = kept.n;
        asm volatile("" : "+r"(end));  // asked anew which vectors there are: see `chunk`

        A mean = 0;
        if constexpr (IS_CENTRED) {
            A lane[GROUPS][WIDTH] = {};
            add_elements(raw, lane);
            forget(raw);
            mean = add_up(sum_groups(lane, place)) / divisor;
        }
        kept.find_end();
        A squares[GROUPS][WIDTH] = {};
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const A value = element(raw[i], j, type), y = IS_CENTRED ? value - mean : value;
                if (!IS_CENTRED || (IS_IMAGE ? kept.has(i, j) : place(i) < end))
                    squares[i % GROUPS][j] += y * y;  // of an absent element: 0
            }
        }
        forget(raw);
        const A r = 1 / root(add_up(sum_groups(squares, place)) / divisor + eps);
        if (begin + threadIdx.x == 0) {
            if (means != nullptr) store(static_cast<A*>(means) + row * mean_step, mean);
            if (rstds != nullptr) store(static_cast<A*>(rstds) + row * rstd_step, r);
        }

        X* const to = static_cast<X*>(out) + row * out_step + begin;
        Results results(to, place, end, are_vectors);
#pragma unroll
        for (int first = 0; first < VECTORS; first += AHEAD) {
            Words w[AHEAD], b[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (first < held) {
                    const Vector* const at = sides + (first + i) * SIDES * WARP;
                    load_words(reinterpret_cast<const X*>(at), w[i]);
                    if (HAS_BIAS) load_words(reinterpret_cast<const X*>(at + WARP), b[i]);
                } else {
                    weights.read(place(first + i), end, are_vectors, w[i]);
                    if (HAS_BIAS) biases.read(place(first + i), end, are_vectors, b[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                A v[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    const A value = element(raw[first + i], j, type);
                    v[j] = result(value, mean, r, element(w[i], j, type), element(b[i], j, type));
                }
                results.store(first + i, v);
            }
        }
    }
}
