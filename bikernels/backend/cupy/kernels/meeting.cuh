// What CTAs that meet in global memory share, one word for each number. A word is 0 until it has been written, so that
// who reads it knows; it is the complement of the number's bits, of which no number has only ones.
#pragma once
#include "numerics.cuh"

template <class T>
struct WordOf {
    using Type = unsigned;
};
template <>
struct WordOf<double> {
    using Type = unsigned long long;
};
using Word = WordOf<ACCUMULATE>::Type;

__device__ __forceinline__ Word word_of(float x) { return ~to_float32_bits(x); }
__device__ __forceinline__ Word word_of(double x) { return ~to_float64_bits(x); }
__device__ __forceinline__ Word word_of(unsigned x) { return ~static_cast<Word>(x); }
__device__ __forceinline__ void of_word(Word word, float& x) { x = __uint_as_float(~word); }
__device__ __forceinline__ void of_word(Word word, double& x) { x = __longlong_as_double(~word); }
__device__ __forceinline__ void of_word(Word word, unsigned& x) { x = ~word; }
