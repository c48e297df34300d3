// var and std, rms_norm and layer_norm: what is computed of a vector.
//
// OPERATION: as below. Weight and bias have the dtype of x.
//
// An absent weight counts as 1 and an absent bias as -0, with which products and sums are what they are without.
#pragma once
#include "register_rows.cuh"

enum Operation { Variance, RmsNorm, LayerNorm };

constexpr bool IS_CENTRED = OPERATION != RmsNorm, HAS_SIDES = OPERATION != Variance, HAS_BIAS = OPERATION == LayerNorm;

// The result of a norm, given the row's mean and r, and the element of the weight and the bias.
__device__ __forceinline__ A result(A value, A mean, A r, A w, A b) {
    const A h = (IS_CENTRED ? value - mean : value) * r;
    return HAS_BIAS ? fused(h, w, b) : h * w;
}
