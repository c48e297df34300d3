// out = OPERATION(x, y), element by element; see functions.cuh.
//
// ELEMENT: the dtype of out and of the operands, or any_dtype where they differ. ACCUMULATE: float or double. BINARY:
// whether there are two operands; else y is the first of the two numbers.
#include "functions.cuh"
#include "layout.cuh"
#include "overlap.cuh"

using A = ACCUMULATE;
constexpr int OF_OUT = 0, OF_X = 1, OF_Y = 2, WIDTH = 8;

struct Elements {
    long long count;
    long long dims_count;
    long long is_flat;  // whether all operands lie in the order of out, without gaps
    long long dtype[3];
    Dims<3> dims;
};

// An element of an operand, after the cast to out's dtype.
template <class X, int OPERAND>
__device__ __forceinline__ A load_element(const Elements& p, const void* x, long long index) {
    const A value = Element<X, A>::load(x, index, static_cast<int>(p.dtype[OPERAND]));
    return dtype_code<X>::value < 0 ? round_through(value, static_cast<int>(p.dtype[OF_OUT])) : value;
}

template <class X>
__device__ __forceinline__ void store_element(const Elements& p, void* out, long long index, A value) {
    if constexpr (dtype_code<X>::value < 0) {
        store(out, index, static_cast<int>(p.dtype[OF_OUT]), value);
    } else {
        store(static_cast<X*>(out) + index, value);
    }
}

template <class X>
__device__ __forceinline__ void apply(const Elements& p, A a, A b, void* out, const void* x, const void* y) {
    bool vectors = false;
    if constexpr (dtype_code<X>::value >= 0)
        vectors = p.is_flat && is_vector_aligned(out) && is_vector_aligned(x) && (!BINARY || is_vector_aligned(y));
    const long long groups = (p.count + WIDTH - 1) / WIDTH, threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long group = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x; group < groups;
         group += threads) {
        const long long start = group * WIDTH;
        if constexpr (dtype_code<X>::value >= 0) {
            if (vectors && start + WIDTH <= p.count) {
                A u[WIDTH], v[WIDTH];
                load_8(static_cast<const X*>(x) + start, u);
                if constexpr (BINARY) load_8(static_cast<const X*>(y) + start, v);
#pragma unroll
                for (int i = 0; i < WIDTH; i++) u[i] = OPERATION::of(u[i], BINARY ? v[i] : a, a, b);
                store_8<X>(static_cast<X*>(out) + start, u);
                continue;
            }
        }
#pragma unroll 1
        for (long long index = start; index < min(start + WIDTH, p.count); index++) {
            long long place[3] = {index, index, index};
            if (!p.is_flat) p.dims.offsets(index, 0, static_cast<int>(p.dims_count), place);
            const A u = load_element<X, OF_X>(p, x, place[OF_X]);
            const A v = BINARY ? load_element<X, OF_Y>(p, y, place[OF_Y]) : a;
            store_element<X>(p, out, place[OF_OUT], OPERATION::of(u, v, a, b));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    apply_elementwise(const __grid_constant__ Elements p, double a, double b, void* out, const void* x, const void* y) {
    launch_dependents();
    wait_for_predecessors();
    apply<ELEMENT>(p, static_cast<A>(a), static_cast<A>(b), out, x, y);
}
