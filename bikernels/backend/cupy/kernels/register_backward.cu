// The gradients with respect to x, of softmax, log_softmax, rms_norm and layer_norm, of rows whose elements lie side by
// side, kept in registers.
//
// OPERATION: see gradients.cuh. ELEMENT, ACCUMULATE, WIDTH, GROUPS, STEPS, SPREAD, LAYOUT: see register_rows.cuh.
// THREADS: of a CTA, at most.
#include "gradients.cuh"

// `rows` rows of n elements, and as many threads as they take. Rows of x (of the softmax family, of the result), out
// and the gradient of the result, and statistics, lie as far apart as the steps say.
extern "C" __global__ void __launch_bounds__(THREADS)
    differentiate_rows(long long rows, long long x_step, long long out_step, long long grad_step, long long mean_step,
                       long long rstd_step, A divisor, int n, int bits, void* out, const void* x, const void* grad,
                       const void* weight, const void* means, const void* rstds) {
    launch_dependents();  // they wait for this kernel's end
    Place place(bits);
    const long long row = min(place.row, rows - 1);
    const bool are_vectors =
        n % WIDTH == 0 && are_vectors_at(address_bits(x, x_step) | address_bits(out, out_step) |
                                         address_bits(grad, grad_step) | address_bits(weight, 0));
    const bool are_single = n == 1;
    if (place.row >= rows) n = 0;

    __shared__ __align__(16) A sums[2][MOST_WARPS];
    clear_absent_warps(sums);
    __shared__ Lanes lanes;
    const X* const from = static_cast<const X*>(x) + row * x_step;
    const X* const from_grad = static_cast<const X*>(grad) + row * grad_step;
    place.shift_to(from);
    prefetch_row(from, place, n);
    prefetch_row(from_grad, place, n);
    wait_for_predecessors();

    if constexpr (!IS_NORM && !SPREAD && STEPS == 1) {
        if (are_single) {  // each thread has a row
            const A y = accumulate<A>(*from), g = accumulate<A>(*from_grad);
            const A sum = A(0) + term(y, g);
            if (n > 0) store(static_cast<X*>(out) + row * out_step, result(y, g, sum, 0, {}));
            return;
        }
    }

    Words raw[VECTORS] = {}, raw_grad[VECTORS] = {};
    load_row(from, place, n, are_vectors, raw);
    load_row(from_grad, place, n, are_vectors, raw_grad);
    constexpr int AT_ONCE = SPREAD && sizeof(X) > 2 ? 4 : 8;  // for more, there are no registers
    Side<IS_NORM, false, AT_ONCE> weights(weight);
    weights.begin(place, n, are_vectors);
    const Statistics statistics(rstds, means, rstd_step, mean_step, row);

    const auto read = [&](int i, A(&h)[WIDTH], A(&p)[WIDTH]) {
        ::read(raw[i], raw_grad[i], weights.at(i, place, n, are_vectors), statistics, h, p);
    };
    A lane[GROUPS][WIDTH] = {}, lane_of_p[GROUPS][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        A h[WIDTH], p[WIDTH];
        read(i, h, p);
        if constexpr (IS_NORM && LAYOUT == Shifted) {
            if (!place.has_all(i, n)) {
                leave_out(place, i, n, h);
                leave_out(place, i, n, p);
            }
        }
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            if (LAYOUT == Shifted || place.has(i, j, n)) lane[i % GROUPS][j] += term(h[j], p[j]);
            if (IS_CENTRED) lane_of_p[i % GROUPS][j] += p[j];
        }
        if (i == 0) {
            take_head(lane, place, lanes.heads[0]);
            if (IS_CENTRED) take_head(lane_of_p, place, lanes.heads[1]);
        }
    }
    A sum = row_sum(lane, place, lanes, 0, sums[0]), of_p = 0;
    if constexpr (IS_NORM) sum = sum / divisor;
    if constexpr (IS_CENTRED) of_p = row_sum(lane_of_p, place, lanes, 1, sums[1]) / divisor;
    forget_widened(raw);
    forget_widened(raw_grad);

    X* const to = static_cast<X*>(out) + row * out_step;
    const bool are_written = LAYOUT == Shifted ? place.behind(to) == 0 : are_vectors;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        A h[WIDTH], p[WIDTH], v[WIDTH];
        read(i, h, p);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) v[j] = result(h[j], p[j], sum, of_p, statistics);
        store_results(to, place, i, n, are_written, v);
    }
}
