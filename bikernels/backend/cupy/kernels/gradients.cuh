// The gradients with respect to x, of softmax, log_softmax, rms_norm and layer_norm: what is computed of a vector.
//
// OPERATION: as below. The gradient of the result and the weight have the dtype of x (of the softmax family, of the result).
#pragma once
#include "register_rows.cuh"

enum Operation { SoftmaxBackward, LogSoftmaxBackward, RmsNormBackward, LayerNormBackward };

constexpr bool IS_CENTRED = OPERATION == LayerNormBackward, IS_NORM = OPERATION == RmsNormBackward || IS_CENTRED;
constexpr int SUMS = IS_CENTRED ? 2 : 1;  // of a row

// The statistics of a row, of a norm.
struct Statistics {
    A r = 0, m = 0;

    Statistics() = default;
    __device__ __forceinline__ Statistics(const void* rstds, const void* means, long long rstd_step, long long mean_step,
                                          long long row) {
        if constexpr (IS_NORM) r = static_cast<const A*>(rstds)[row * rstd_step];
        if constexpr (IS_CENTRED) m = static_cast<const A*>(means)[row * mean_step];
    }
};

// h and p of a norm, or y and the gradient; w: of the weight.
__device__ __forceinline__ void read(const Words& x, const Words& grad, const Words& w, const Statistics& s, A (&h)[WIDTH],
                                     A (&p)[WIDTH]) {
    X* const type = nullptr;
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        const A value = element(x, j, type), g = element(grad, j, type);
        h[j] = IS_NORM ? (IS_CENTRED ? value - s.m : value) * s.r : value;
        p[j] = IS_NORM ? g * element(w, j, type) : g;
    }
}

// What is added up, and the result, given that sum (of a norm, the mean) and that of p.
__device__ __forceinline__ A term(A h, A p) { return OPERATION == LogSoftmaxBackward ? p : p * h; }
__device__ __forceinline__ A result(A h, A p, A sum, A of_p, const Statistics& s) {
    if (OPERATION == SoftmaxBackward) return h * (p - sum);
    if (OPERATION == LogSoftmaxBackward) return fused(-exponential(h, A(0)), sum, p);
    return fused(-h, sum, IS_CENTRED ? p - of_p : p) * s.r;
}
