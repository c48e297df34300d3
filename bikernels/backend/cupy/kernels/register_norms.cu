// var and std, rms_norm and layer_norm of rows whose elements lie side by side, kept in registers.
//
// OPERATION: see norms.cuh. ELEMENT, ACCUMULATE, WIDTH, GROUPS, STEPS, SPREAD, LAYOUT: see register_rows.cuh. THREADS:
// of a CTA, at most.
#include "norms.cuh"

// Left to itself the compiler takes 64 registers for float64, which are too few on sm_80.
constexpr int LEAST_CTAS = sizeof(A) == 8 ? 1 : 0;

// `rows` rows of n elements, and as many threads as they take. Rows of x and out, and statistics, lie as far apart as
// the steps say.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_CTAS)
    normalise_rows(long long rows, long long x_step, long long out_step, long long mean_step, long long rstd_step,
                   A divisor, A eps, int n, int bits, int is_root, void* out, const void* x, const void* weight,
                   const void* bias, void* means, void* rstds) {
    launch_dependents();  // they wait for this kernel's end
    Place place(bits);
    X* const type = nullptr;
    const bool is_present = place.row < rows;
    const X* const from = static_cast<const X*>(x) + place.row * x_step;
    X* const to = static_cast<X*>(out) + place.row * out_step;
    place.shift_to(from);
    unsigned long long addresses = address_bits(x, x_step);
    if (HAS_SIDES) addresses |= address_bits(out, out_step) | address_bits(weight, 0) | address_bits(bias, 0);
    const bool are_vectors = LAYOUT == Whole ? n % WIDTH == 0 && are_vectors_at(addresses)
                                             : LAYOUT == Narrow || place.behind(to) == 0;
    const A length = static_cast<A>(n);
    if (!is_present) n = 0;

    __shared__ __align__(16) A sums[2][MOST_WARPS];
    __shared__ Lanes lanes;
    clear_absent_warps(sums);
    if constexpr (SPREAD) prefetch_row(from, place, n);
    wait_for_predecessors();

    Words raw[VECTORS] = {};
    load_row(from, place, n, are_vectors, raw);
    Side<HAS_SIDES, false> weights(weight);
    Side<HAS_BIAS, true> biases(bias);
    weights.begin(place, n, are_vectors);
    biases.begin(place, n, are_vectors);

    A mean = 0;
    if constexpr (IS_CENTRED) {
        A lane[GROUPS][WIDTH] = {};
        add_elements(raw, lane, place, lanes.heads[0]);
        mean = row_sum(lane, place, lanes, 0, sums[0]) / length;
        forget_widened(raw);
    }
    A lane[GROUPS][WIDTH] = {};
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if constexpr (IS_CENTRED && LAYOUT == Shifted) {
            A y[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; j++) y[j] = element(raw[i], j, type) - mean;
            if (!place.has_all(i, n)) leave_out(place, i, n, y);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) lane[i % GROUPS][j] += y[j] * y[j];
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const A value = element(raw[i], j, type), y = IS_CENTRED ? value - mean : value;
                if (!IS_CENTRED || place.has(i, j, n)) lane[i % GROUPS][j] += y * y;
            }
        }
        if (i == 0) take_head(lane, place, lanes.heads[0]);
    }
    const A square = row_sum(lane, place, lanes, 0, sums[1]) / divisor;
    forget_widened(raw);

    if constexpr (OPERATION == Variance) {
        if (place.is_first() && is_present) store(to, is_root ? root(square) : square);
    } else {
        const A r = 1 / root(square + eps);
        if (place.is_first() && is_present) {
            if (means != nullptr) store(static_cast<A*>(means) + place.row * mean_step, mean);
            if (rstds != nullptr) store(static_cast<A*>(rstds) + place.row * rstd_step, r);
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            const Words& w = weights.at(i, place, n, are_vectors);
            const Words& b = biases.at(i, place, n, are_vectors);
            A v[WIDTH];
#pragma unroll
            for (int j = 0; j < WIDTH; j++)
                v[j] = result(element(raw[i], j, type), mean, r, element(w, j, type), element(b, j, type));
            store_results(to, place, i, n, are_vectors, v);
        }
    }
}
