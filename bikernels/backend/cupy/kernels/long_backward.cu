// The gradients with respect to x, of softmax, log_softmax, rms_norm and layer_norm, of rows longer than a CTA's registers,
// whose elements lie side by side, read once (sm_90 on). A chunk of the tree is that of PARTS warps and a row a cluster's,
// whose CTAs take row after row: each thread copies its elements of the next row to the places in shared memory from which it
// has taken those of this one, the gradient to registers before the warps meet, x when it is used for the last time.
//
// OPERATION: see gradients.cuh. ELEMENT, ACCUMULATE, WIDTH, GROUPS: see register_rows.cuh, with STEPS of a chunk and SPREAD.
// THREADS: of a CTA, at most.
#include "gradients.cuh"
#include "long_rows.cuh"

static_assert(SPREAD, "the chunks of a CTA lie side by side");

// `rows` rows of n elements, at most 32 << bits chunks, by clusters of several CTAs. Rows of x (of the softmax family, of the
// result), out and the gradient of the result, and statistics, lie as far apart as the steps say.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    differentiate_long_rows(long long rows, long long x_step, long long out_step, long long grad_step, long long mean_step,
                            long long rstd_step, A divisor, int n, int bits, void* out, const void* x, const void* grad,
                            const void* weight, const void* means, const void* rstds) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ unsigned long long barriers[2];
    launch_dependents();  // they wait for this kernel's end
    const int ctas = cluster_size(), warps = blockDim.x / WARP, chunks = (n + SUM_CHUNK - 1) / SUM_CHUNK;
    const int begin = cluster_rank() * warps / PARTS * SUM_CHUNK;  // from where `place` counts
    const int chunk = begin / SUM_CHUNK + warp_id() / PARTS;       // that the warp has, or a part of it
    const Place place(5);
    // Whether rows do, or at least the weight, where rows begin anywhere.
    const unsigned long long of_rows = address_bits(x, x_step) | address_bits(out, out_step) | address_bits(grad, grad_step);
    const bool are_vectors = are_vectors_at((IS_IMAGE ? 0 : of_rows) | address_bits(weight, 0));
    unsigned char* const own = shared + warp_id() * 2 * Rows::BYTES;
    Rows kept_grad(own, place, n - begin, are_vectors);
    Rows kept(reinterpret_cast<unsigned char*>(kept_grad.behind() - lane_id()), place, n - begin, are_vectors);
    kept.clear_with(kept_grad);

    // The sums of all parts of chunks, of two rows in turn, in every CTA that has a chunk: while some warps read those of a
    // row, others send the next. A barrier counts their bytes; who waits for it finds them.
    const int places = WARP * PARTS << bits, senders = chunks * PARTS;
    A* const sums = reinterpret_cast<A*>(shared + warps * 2 * Rows::BYTES);
    for (int i = threadIdx.x; i < 2 * SUMS * places; i += blockDim.x) sums[i] = 0;
    const auto sums_of = [&](int turn, int which) { return sums + (turn % 2 * SUMS + which) * places; };
    const auto barrier_of = [&](int turn) { return shared_address(barriers + turn % 2); };
    const auto share = [&](int turn, int which, A sum) {
        A* const to = sums_of(turn, which) + place_of(chunk, warp_id() % PARTS, bits);
        if (lane_id() * warps < senders) send_sum(shared_address(to), lane_id(), sum, barrier_of(turn));
    };
    init_barriers(barriers);
    arrive_at_cluster();

    const int teams = gridDim.x / ctas, first = blockIdx.x / ctas;
    const auto row_at = [&](int turn) { return first + static_cast<long long>(turn) * teams; };
    const X* const from = static_cast<const X*>(x) + begin;
    const X* const from_grad = static_cast<const X*>(grad) + begin;
    const auto statistics_of = [&](int turn) {
        return Statistics(rstds, means, rstd_step, mean_step, min(row_at(turn), rows - 1));
    };
    Side<IS_NORM, false> weights(weight == nullptr ? nullptr : static_cast<const X*>(weight) + begin);

    prefetch_row(from_grad + first * grad_step, place, kept.n);
    prefetch_row(from + first * x_step, place, kept.n);
    wait_for_predecessors();
    kept_grad.copy(from_grad + first * grad_step);
    kept.copy(from + first * x_step);
    Statistics next = statistics_of(0);
    wait_for_cluster();  // all CTAs have started
    if (chunk * SUM_CHUNK >= n) return;
#pragma unroll 1
    for (int turn = 0; row_at(turn) < rows; turn++) {
        const long long next_row = row_at(turn + 1);
        const bool is_last = next_row >= rows;
        Words raw_grad[VECTORS];
        wait_for_copies<0>();
        kept_grad.settle();
        kept_grad.take(raw_grad);
        kept_grad.release();
        if (!is_last) kept_grad.copy(from_grad + next_row * grad_step);
        kept.begin_use(is_last, from + next_row * x_step);
        const Statistics statistics = next;
        next = statistics_of(turn + 1);

        const auto read = [&](int i, const Words& raw, A(&h)[WIDTH], A(&p)[WIDTH]) {
            ::read(raw, raw_grad[i], weights.at(i, place, kept.n, are_vectors), statistics, h, p);
        };
        A lane[GROUPS][WIDTH] = {}, lane_of_p[GROUPS][WIDTH] = {};
        kept.find_end();
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            Words raw;
            kept.use(i, raw);
            A h[WIDTH], p[WIDTH];
            read(i, raw, h, p);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const bool is_present = kept.has(i, j) || (IS_IMAGE && !IS_NORM);  // of softmax, what is absent adds 0
                if (is_present) lane[i % GROUPS][j] += term(h[j], p[j]);
                // So is p, but beside an odd number of weights may be anything.
                if (IS_CENTRED && (is_present || !IS_IMAGE)) lane_of_p[i % GROUPS][j] += p[j];
            }
        }
        if (threadIdx.x == 0) arrive_and_expect(barrier_of(turn), senders * SUMS * static_cast<int>(sizeof(A)));
        share(turn, 0, sum_groups(lane, place));
        if (IS_CENTRED) share(turn, 1, sum_groups(lane_of_p, place));
        forget_widened(raw_grad);
        kept.forget_used();
        if constexpr (IS_IMAGE && !IS_NORM && sizeof(X) == 2) {
            const unsigned zero = n >> 31;
            hide(raw_grad, zero);
            kept.hide_used(zero);
        }
        wait_barrier(barrier_of(turn), turn / 2 & 1);
        A sum = sum_chunks(sums_of(turn, 0), bits), of_p = 0;
        if constexpr (IS_NORM) sum = sum / divisor;
        if constexpr (IS_CENTRED) of_p = sum_chunks(sums_of(turn, 1), bits) / divisor;

        X* const to = static_cast<X*>(out) + row_at(turn) * out_step + begin;
        const X* const next_from = from + next_row * x_step;
        Results results(to, place, kept.n, are_vectors);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            Words raw;
            kept.use_last(i, raw, is_last, next_from);
            A h[WIDTH], p[WIDTH], v[WIDTH];
            read(i, raw, h, p);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) v[j] = result(h[j], p[j], sum, of_p, statistics);
            results.store(i, v);
        }
        kept.end_use(is_last, next_from);
    }
}
