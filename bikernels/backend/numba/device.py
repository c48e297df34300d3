"""The vocabulary of the kernels: typed pointers, 16-bit floats as bits, arithmetic that no compiler may fuse.

Rules of this folder: a multiplication or addition of floats is written with the functions of `Operations`, never with
an operator, because Numba and the assembler contract a * b + c into one rounding where they like; device functions are
inlined into the kernels (`device` below), so that a kernel compiles on a machine without a GPU too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cuda as _cuda
from numba import types as _types

from ...contract import ACCUMULATE, CANONICAL_NAN, INTEGER_DTYPES

cuda: Any = _cuda
types: Any = _types
"""Numba without its annotations, which describe it as the Python that a kernel is not run as."""
libdevice, cgutils, intrinsic = cuda.libdevice, cuda.cgutils, cuda.extending.intrinsic

Function = Callable[..., Any]

WARP = 32
ALL_LANES = 0xFFFFFFFF

device = cuda.jit(device=True, inline="always")
"""Decorator of the functions that kernels are made of."""

STORAGE = {
    "bfloat16": types.uint16,
    "float16": types.uint16,
    "float32": types.float32,
    "float64": types.float64,
    "bool": types.uint8,
} | {name: getattr(types, name) for name in INTEGER_DTYPES if name != "bool"}
"""The type under which a kernel sees a dtype's elements in memory."""


class Operations(NamedTuple):
    """Arithmetic in one accumulate dtype; every function rounds once, to nearest even, and keeps subnormals."""

    type: Any
    add: Function
    multiply: Function
    divide: Function
    fma: Function
    """fma(a, b, c) = a * b + c."""
    to_bits: Function
    from_bits: Function


OPERATIONS = {
    "float32": Operations(
        types.float32,
        libdevice.fadd_rn,
        libdevice.fmul_rn,
        libdevice.fdiv_rn,
        libdevice.fmaf_rn,
        libdevice.float_as_int,
        libdevice.int_as_float,
    ),
    "float64": Operations(
        types.float64,
        libdevice.dadd_rn,
        libdevice.dmul_rn,
        libdevice.ddiv_rn,
        libdevice.fma_rn,
        libdevice.double_as_longlong,
        libdevice.longlong_as_double,
    ),
}

# ------------------------------------------------------------------------------------------------------------ memory


@intrinsic
def pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """Global memory at an address, as p[i] of a dtype; i counts elements and may be negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_data_type(signature.return_type.dtype)
        # By way of the global address space, so that loads are global and not generic ones.
        in_global = builder.inttoptr(arguments[0], ir.PointerType(element, addrspace=1))
        return builder.addrspacecast(in_global, ir.PointerType(element))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw(operation, place, arguments[2], "monotonic")

        return array.dtype(array, types.int64, array.dtype), generate

    return atomic


atomic_add = _atomic("add")
"""atomic_add(p, i, value) on int64."""
atomic_max = _atomic("umax")
"""atomic_max(p, i, value) on uint64."""


@device
def offset(index: Any, shape: Any, strides: Any) -> Any:
    """Where element `index`, in C order, of an array lies, in elements from its first. One dimension: no division."""
    place = types.int64(0)
    for i in range(len(shape) - 1):
        d = len(shape) - 1 - i
        outer = index // shape[d]
        place += (index - outer * shape[d]) * strides[d]
        index = outer
    return place + index * strides[0]


# ------------------------------------------------------------------------------------------------------- conversions


def _conversion(instruction: str, constraint: str, result: Any, argument: Any) -> Any:
    @intrinsic
    def convert(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind = ir.FunctionType(context.get_value_type(result), [context.get_value_type(argument)])
            return builder.call(ir.InlineAsm(kind, f"{instruction} $0, $1;", constraint, side_effect=False), arguments)

        return result(argument), generate

    return convert


_float_of_half = _conversion("cvt.f32.f16", "=f,h", types.float32, types.uint16)
_half_of_float = _conversion("cvt.rn.f16.f32", "=h,f", types.uint16, types.float32)


@device
def _float_of_bfloat(bits: Any) -> Any:
    return libdevice.int_as_float(types.int32(types.uint32(bits) << types.uint32(16)))


@device
def _bfloat_of_float(value: Any) -> Any:
    """To nearest even; not for NaN."""
    bits = types.uint32(libdevice.float_as_int(value))
    odd = (bits >> types.uint32(16)) & types.uint32(1)
    return types.uint16((bits + types.uint32(0x7FFF) + odd) >> types.uint32(16))


@functools.cache
def reader(dtype: str, result: str) -> Function:
    """A device function read(p, i): element i of a `dtype` array, cast to `result`, as the accumulate dtype of that."""
    real = OPERATIONS[ACCUMULATE[result]].type

    if dtype in ("bfloat16", "float16"):
        widen = _float_of_bfloat if dtype == "bfloat16" else _float_of_half

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(widen(p[i]))

    elif dtype == "bool":

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(p[i] != 0)

    else:

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(p[i])

    if result == dtype or result not in ("bfloat16", "float16"):
        return exact

    narrow, widen_again = (
        (_bfloat_of_float, _float_of_bfloat) if result == "bfloat16" else (_half_of_float, _float_of_half)
    )

    @device
    def rounded(p: Any, i: Any) -> Any:
        value = exact(p, i)
        if value == value:
            value = widen_again(narrow(value))
        return value

    return rounded


@functools.cache
def writer(dtype: str, accumulate: str) -> Function:
    """A device function write(p, i, value): round a value of the accumulate dtype to `dtype`; NaN is canonical."""
    nan = CANONICAL_NAN[dtype]

    if dtype in ("bfloat16", "float16"):
        narrow = _bfloat_of_float if dtype == "bfloat16" else _half_of_float

        @device
        def write(p: Any, i: Any, value: Any) -> None:
            p[i] = narrow(value) if value == value else types.uint16(nan)

    else:
        target = OPERATIONS[dtype]
        real, from_bits = target.type, target.from_bits
        bits_type = types.int32 if dtype == "float32" else types.int64

        @device
        def write(p: Any, i: Any, value: Any) -> None:
            p[i] = real(value) if value == value else from_bits(bits_type(nan))

    return write


# ------------------------------------------------------------------------------------------------------ tensor cores


def _tensor_core_product(operand: str) -> Any:
    @intrinsic
    def product(
        typing_context: Any, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c0: Any, c1: Any, c2: Any, c3: Any
    ) -> Any:
        word, real = types.uint32, types.float32

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, f = ir.IntType(32), ir.FloatType()
            kind = ir.FunctionType(ir.LiteralStructType([f] * 4), [w] * 6 + [f] * 4)
            text = (
                f"mma.sync.aligned.m16n8k16.row.col.f32.{operand}.{operand}.f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
            )
            # With a side effect, so that no branch is ever put around it: all threads of the warp take part.
            call = builder.call(
                ir.InlineAsm(kind, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=True), arguments
            )
            return context.make_tuple(
                builder, signature.return_type, [builder.extract_value(call, i) for i in range(4)]
            )

        return types.UniTuple(real, 4)(word, word, word, word, word, word, real, real, real, real), generate

    return product


TENSOR_CORE_PRODUCT = {"bfloat16": _tensor_core_product("bf16"), "float16": _tensor_core_product("f16")}
"""product(a0..a3, b0, b1, c0..c3) -> 4 accumulators: a warp's 16x16 times 16x8, two 16-bit elements a word."""


def _matrix_load(option: str) -> Any:
    @intrinsic
    def load(typing_context: Any, shared: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=arguments[0]).data
            place = builder.gep(data, [arguments[1]])
            address = builder.ptrtoint(
                builder.addrspacecast(place, ir.PointerType(ir.IntType(32), addrspace=3)), ir.IntType(64)
            )
            kind = ir.FunctionType(ir.LiteralStructType([ir.IntType(32)] * 4), [ir.IntType(64)])
            text = f"ldmatrix.sync.aligned.m8n8.x4{option}.shared.b16 {{$0,$1,$2,$3}}, [$4];"
            call = builder.call(ir.InlineAsm(kind, text, "=r,=r,=r,=r,l,~{memory}", side_effect=True), [address])
            return context.make_tuple(
                builder, signature.return_type, [builder.extract_value(call, i) for i in range(4)]
            )

        return types.UniTuple(types.uint32, 4)(shared, types.int64), generate

    return load


load_matrices = _matrix_load("")
"""load_matrices(shared, i): four 8x8 matrices of 16-bit elements. Thread 8q + r names the word where row r of matrix q
begins; thread t gets of every matrix one word, the elements 2 (t mod 4) and the next of row t // 4."""
load_matrices_transposed = _matrix_load(".trans")
"""The same of the matrices' transposes."""


# ------------------------------------------------------------------------------------------------------------ host


def int64s(count: int) -> Any:
    """The type of a tuple of `count` int64, for signatures."""
    return types.UniTuple(types.int64, count)


def as_dimensions(*operands: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A shape and strides over it, with at least one dimension."""
    shape, *strides = operands
    return (shape or (1,), *(one or (0,) for one in strides))
