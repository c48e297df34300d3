// var and std of rows longer than a CTA's registers, whose elements lie side by side, read once (sm_90 on). A chunk of
// the tree is a warp's, or SPREAD over as many as have registers for it; a row is a CTA's or a cluster's, and CTAs take row
// after row: each thread copies its elements of the next row to shared memory, from which it has taken those of this one to
// registers, while the warps meet.
//
// ELEMENT, ACCUMULATE, WIDTH, GROUPS, SPREAD: see register_rows.cuh, with STEPS of a chunk. THREADS: of a CTA, at most.
#include "long_rows.cuh"

// `rows` rows of n elements, at most 32 << bits chunks, `x_step` and `out_step` elements apart.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_long_rows(long long rows, long long x_step, long long out_step, A divisor, int n, int bits, int is_root, void* out,
                     const void* x) {
    extern __shared__ __align__(16) unsigned char shared[];
    launch_dependents();  // they wait for this kernel's end
    const int ctas = cluster_size(), warps = blockDim.x / WARP;
    // Asked when needed: there are few registers to remember anything.
    const auto chunk = [=] { return static_cast<int>(cluster_rank() * warps + warp_id()) / PARTS; };
    const int begin = (SPREAD ? cluster_rank() * warps / PARTS : chunk()) * SUM_CHUNK;  // from where `place` counts
    const Place place(5);
    // Two sums of each chunk, of two rows in turn, in every CTA: while some read those of a row, others share the next.
    const int places = WARP * PARTS << bits;
    A* const sums = reinterpret_cast<A*>(shared + warps * Rows::BYTES);
    const auto sums_of = [&](int turn, int which) { return sums + (turn % 2 * 2 + which) * places; };
    for (int i = threadIdx.x; i < 4 * places; i += blockDim.x) sums[i] = 0;
    arrive_at_cluster();
    Rows kept(shared + warp_id() * Rows::BYTES, place, n - begin, are_vectors_at(address_bits(x, x_step)));
    const auto share = [&](A* to, A sum) {
        if (chunk() * SUM_CHUNK < n && lane_id() < cluster_size())
            store_in_cluster(shared_address(to + place_of(chunk(), warp_id() % PARTS, bits)), lane_id(), sum);
    };
    kept.clear();

    const int teams = gridDim.x / ctas, first = blockIdx.x / ctas;
    const auto row_at = [&](int turn) { return first + static_cast<long long>(turn) * teams; };
    const X* const from = static_cast<const X*>(x) + begin;
    const A length = static_cast<A>(n);
    X* const type = nullptr;
    const auto write = [&](int turn) {
        if (warp_id() > 0 || cluster_rank() > 0) return;
        const A result = sum_chunks(sums_of(turn, 1), bits) / divisor;
        if (lane_id() == 0) store(static_cast<X*>(out) + row_at(turn) * out_step, is_root ? root(result) : result);
    };

    wait_for_predecessors();
    if (first < rows) kept.copy(from + first * x_step);
    wait_for_cluster();  // all CTAs have started
#pragma unroll 1
    for (int turn = 0; row_at(turn) < rows; turn++) {
        Words raw[VECTORS];
        wait_for_copies<0>();
        kept.settle();
        kept.take(raw);
        kept.release();
        A lane[GROUPS][WIDTH] = {};
        add_elements(raw, lane);
        const bool is_last = row_at(turn + 1) >= rows;
        if (!is_last) kept.copy(from + row_at(turn + 1) * x_step);
        share(sums_of(turn, 0), sum_groups(lane, place));
        sync_cluster();
        const A mean = sum_chunks(sums_of(turn, 0), bits) / length;

        A squares[GROUPS][WIDTH] = {};
        kept.find_end();
        const auto add_squares = [&](bool has_all) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    const A y = element(raw[i], j, type) - mean;
                    if (has_all || kept.has(i, j)) squares[i % GROUPS][j] += y * y;  // of an absent element, the square is 0
                }
            }
        };
        if (kept.is_full())
            add_squares(true);
        else
            add_squares(false);
        share(sums_of(turn, 1), sum_groups(squares, place));
        if (turn > 0) write(turn - 1);  // only now, when the row's elements no longer take registers
        if (is_last) {
            sync_cluster();
            write(turn);
        }
    }
}
