// Where elements lie: any number of dimensions, any strides, 64-bit offsets. Kernels take these structs by value as
// __grid_constant__ parameters, so that indexing them at run time reads the constant bank and no local memory.
#pragma once

// Division of 0 … 2^63-1 by a fixed number, as a multiplication (Granlund and Montgomery 1994): parameters.py says how
// `multiplier` and `shift` are found.
struct Divisor {
    long long number;
    unsigned long long multiplier;
    long long shift;

    // The quotient; `index` becomes the remainder.
    __device__ __forceinline__ long long divide(long long& index) const {
        const unsigned long long n = index;
        const long long quotient = static_cast<long long>((__umul64hi(n, multiplier) + n) >> shift);
        index -= quotient * number;
        return quotient;
    }
};

// Dimensions that OPERANDS operands walk together, the last one fastest. Strides count elements.
template <int OPERANDS>
struct Dims {
    Divisor length[MAX_DIMS];
    long long stride[OPERANDS][MAX_DIMS];

    // The offset of each operand at flat position `index` of the dimensions begin … end-1.
    __device__ __forceinline__ void offsets(long long index, int begin, int end, long long (&offset)[OPERANDS]) const {
#pragma unroll
        for (int operand = 0; operand < OPERANDS; operand++) offset[operand] = 0;
#pragma unroll 1
        for (int d = end - 1; d >= begin; d--) {
            long long position = index;
            index = length[d].divide(position);
#pragma unroll
            for (int operand = 0; operand < OPERANDS; operand++) offset[operand] += position * stride[operand][d];
        }
    }

    // The offset of one operand.
    template <int OPERAND>
    __device__ __forceinline__ long long offset(long long index, int begin, int end) const {
        long long result = 0;
#pragma unroll 1
        for (int d = end - 1; d >= begin; d--) {
            long long position = index;
            index = length[d].divide(position);
            result += position * stride[OPERAND][d];
        }
        return result;
    }
};
