"""Scalars, addresses and conversions: the operations of which every kernel of this backend is made.

All of them are LLVM operations that IEEE 754 rounds correctly (never fastmath), or operations on bits. The conversions
are written once for scalars and vectors alike, so that a loop over them vectorises and `transpose` can use them too.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ...contract import CANONICAL_NAN, ITEMSIZE
from .compile import inner, primitive
from .vectors import constant, element_of, like

# ------------------------------------------------------------------------------------------------------- the machine


def _vector_bytes() -> int:
    features = llvm.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx") else 16


VECTOR_BYTES = _vector_bytes()
"""Of one vector register."""

VECTOR_REGISTERS = 16 if llvm.get_process_triple().startswith(("x86_64", "i686")) and VECTOR_BYTES < 64 else 32

TRANSPOSE = 8
"""Rows and columns of the block that `transpose` moves."""

# ------------------------------------------------------------------------------------- LLVM, for scalars and vectors

LLVM_TYPE = {
    "bfloat16": ir.IntType(16),
    "float16": ir.IntType(16),
    "float32": ir.FloatType(),
    "float64": ir.DoubleType(),
    "bool": ir.IntType(8),
} | {f"{sign}int{bits}": ir.IntType(bits) for sign in ("", "u") for bits in (8, 16, 32, 64)}


def call_intrinsic(builder: Any, name: str, *values: Any) -> Any:
    """Call LLVM's intrinsic `name` of operands of one type, e.g. fma."""
    kind = values[0].type
    element = element_of(kind)
    suffix = {ir.FloatType(): "f32", ir.DoubleType(): "f64"}.get(element) or f"i{element.width}"
    if isinstance(kind, ir.VectorType):
        suffix = f"v{kind.count}{suffix}"
    signature = ir.FunctionType(kind, [kind] * len(values))
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}.{suffix}")
    return builder.call(function, values)


def to_accumulate(builder: Any, dtype: str, value: Any, accumulate: ir.Type) -> Any:
    """A value as it lies in memory, to float32 or float64; one rounding where it does not fit."""
    target = like(value.type, accumulate)
    if dtype in ("bfloat16", "float16"):
        value = _widen_16(builder, dtype, value)
        return value if accumulate == ir.FloatType() else builder.fpext(value, target)
    if dtype == "bool":
        value = builder.icmp_unsigned("!=", value, constant(value.type, 0))
        return builder.uitofp(value, target)
    if dtype.startswith("int"):
        return builder.sitofp(value, target)
    if dtype.startswith("uint"):
        return builder.uitofp(value, target)
    if value.type == target:
        return value
    return builder.fpext(value, target) if dtype == "float32" else builder.fptrunc(value, target)


def _widen_16(builder: Any, dtype: str, value: Any) -> Any:
    """Bits of a bfloat16 or float16 to float32, exactly."""
    i32, f32 = like(value.type, ir.IntType(32)), like(value.type, ir.FloatType())
    bits = builder.zext(value, i32)
    if dtype == "bfloat16":
        return builder.bitcast(builder.shl(bits, constant(i32, 16)), f32)
    sign = builder.shl(builder.and_(bits, constant(i32, 0x8000)), constant(i32, 16))
    shifted = builder.shl(builder.and_(bits, constant(i32, 0x7FFF)), constant(i32, 13))
    # The exponent is 112 too small now; the product is exact, and makes subnormal numbers normal ones.
    scaled = builder.fmul(builder.bitcast(shifted, f32), constant(f32, 2.0**112))
    special = builder.icmp_unsigned(">=", shifted, constant(i32, 0x7C00 << 13))
    magnitude = builder.select(special, builder.or_(shifted, constant(i32, 0x7F800000)), builder.bitcast(scaled, i32))
    return builder.bitcast(builder.or_(magnitude, sign), f32)


def from_accumulate(builder: Any, dtype: str, value: Any) -> Any:
    """float32 or float64 to the bits of a dtype, rounded to nearest even; every NaN becomes the canonical one."""
    if dtype in ("bfloat16", "float16"):
        return builder.trunc(in_low_bits(builder, dtype, value), like(value.type, ir.IntType(16)))
    nan = builder.fcmp_unordered("uno", value, value)
    target = like(value.type, LLVM_TYPE[dtype])
    if value.type != target:
        value = builder.fpext(value, target) if dtype == "float64" else builder.fptrunc(value, target)
    result = builder.bitcast(value, like(value.type, ir.IntType(32 if dtype == "float32" else 64)))
    return builder.select(nan, constant(result.type, CANONICAL_NAN[dtype]), result)


def in_low_bits(builder: Any, dtype: str, value: Any) -> Any:
    """As `from_accumulate`, of float32 to bfloat16 or float16, in the lower halves of 32-bit integers."""
    assert element_of(value.type) == ir.FloatType()
    bits = builder.bitcast(value, like(value.type, ir.IntType(32)))
    narrow = _to_bfloat16(builder, bits) if dtype == "bfloat16" else _to_float16(builder, bits)
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(nan, constant(narrow.type, CANONICAL_NAN[dtype]), narrow)


def _to_bfloat16(builder: Any, bits: Any) -> Any:
    i32 = bits.type
    odd = builder.and_(builder.lshr(bits, constant(i32, 16)), constant(i32, 1))
    return builder.lshr(builder.add(builder.add(bits, constant(i32, 0x7FFF)), odd), constant(i32, 16))


def _to_float16(builder: Any, bits: Any) -> Any:
    i32, f32 = bits.type, like(bits.type, ir.FloatType())
    sign = builder.and_(builder.lshr(bits, constant(i32, 16)), constant(i32, 0x8000))
    magnitude = builder.and_(bits, constant(i32, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(i32, 13)), constant(i32, 1))
    rebiased = builder.add(builder.add(magnitude, constant(i32, 0x0FFF - (112 << 23) & 0xFFFFFFFF)), odd)
    normal = builder.lshr(rebiased, constant(i32, 13))
    # Below 2^-14 the last place is 2^-24: adding 0.5 rounds to it, to nearest even.
    half = constant(f32, 0.5)
    aligned = builder.bitcast(builder.fadd(builder.bitcast(magnitude, f32), half), i32)
    subnormal = builder.sub(aligned, builder.bitcast(half, i32))
    small = builder.icmp_unsigned("<", magnitude, constant(i32, (127 - 14) << 23))
    large = builder.icmp_unsigned(">=", magnitude, constant(i32, (127 + 16) << 23))
    result = builder.select(small, subnormal, builder.select(large, constant(i32, 0x7C00), normal))
    return builder.or_(result, sign)


# --------------------------------------------------------------------------------------------- intrinsics for kernels


@primitive
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding; all three float32 or all three float64."""
    if not (a == b == c and isinstance(a, types.Float)):
        return None  # mixed types would hide a promotion

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return call_intrinsic(builder, "fma", *values)

    return a(a, a, a), codegen


@primitive
def pointer(typing_context: Any, address: Any, kind: Any) -> Any:
    """The address as a pointer to elements of `kind`, a NumPy scalar type; it can be indexed."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), codegen


@primitive
def load(typing_context: Any, dtype: Any, kind: Any, address: Any, index: Any) -> Any:
    """Element `index` of an array of `dtype` (a literal), converted to `kind` (np.float32 or np.float64)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = dtype.literal_value
        base = builder.inttoptr(values[2], LLVM_TYPE[name].as_pointer())
        value = builder.load(builder.gep(base, [values[3]]))
        return to_accumulate(builder, name, value, context.get_value_type(kind.dtype))

    return kind.dtype(dtype, kind, types.int64, types.int64), codegen


@primitive
def store(typing_context: Any, dtype: Any, address: Any, index: Any, value: Any) -> Any:
    """Round `value` (float32 or float64) to `dtype` (a literal) and write it as element `index` of an array."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = from_accumulate(builder, dtype.literal_value, values[3])
        builder.store(bits, builder.gep(builder.inttoptr(values[1], bits.type.as_pointer()), [values[2]]))
        return context.get_dummy_value()

    return types.void(dtype, types.int64, types.int64, value), codegen


@primitive
def rounded(typing_context: Any, dtype: Any, value: Any) -> Any:
    """`value` (float32) rounded to bfloat16 or float16 (a literal), as float32."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = from_accumulate(builder, dtype.literal_value, values[1])
        return to_accumulate(builder, dtype.literal_value, bits, values[1].type)

    return value(dtype, value), codegen


@primitive
def transpose(
    typing_context: Any, dtype: Any, kind: Any, target: Any, target_stride: Any, source: Any, source_stride: Any
) -> Any:
    """Read a square block of elements of `dtype`, convert it to `kind` and write it.

    Its side is TRANSPOSE. In the source, rows are neighbours and columns lie `source_stride` elements apart; in the
    target, columns are neighbours and rows lie `target_stride` elements apart.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = dtype.literal_value
        _, _, target, target_stride, source, source_stride = values
        accumulate = context.get_value_type(kind.dtype)
        size = TRANSPOSE
        loaded = ir.VectorType(LLVM_TYPE[name], size)
        start = builder.inttoptr(source, LLVM_TYPE[name].as_pointer())
        vectors = []
        for i in range(size):
            place = builder.gep(start, [builder.mul(source_stride, ir.Constant(ir.IntType(64), i))])
            vector = builder.load(builder.bitcast(place, loaded.as_pointer()), align=ITEMSIZE[name])
            vectors.append(to_accumulate(builder, name, vector, accumulate))
        for vector, i in zip(transposed(builder, vectors), range(size), strict=True):
            place = builder.gep(
                builder.inttoptr(target, accumulate.as_pointer()),
                [builder.mul(target_stride, ir.Constant(ir.IntType(64), i))],
            )
            builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(dtype, kind, types.int64, types.int64, types.int64, types.int64), codegen


def transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """The columns of a square block whose rows are the vectors: exchange halves, then quarters, and so on."""
    size = len(vectors)
    step = size // 2
    index = ir.VectorType(ir.IntType(32), size)
    while step:
        result = list(vectors)
        low = [j if not j & step else j - step + size for j in range(size)]
        high = [j + step if not j & step else j + size for j in range(size)]
        for i in range(size):
            if not i & step:
                pair = vectors[i], vectors[i + step]
                result[i] = builder.shuffle_vector(*pair, ir.Constant(index, low))
                result[i + step] = builder.shuffle_vector(*pair, ir.Constant(index, high))
        vectors, step = result, step // 2
    return vectors


@inner
def offset(table, columns, first, end, index, column):  # type: ignore[no-untyped-def]
    """Elements to position `index`, in C order, of dimensions `first` to `end`.

    The table has `columns` int64 for each dimension: its length, and strides, of which `column` says which.
    """
    place, total = pointer(table, np.int64), 0
    for dimension in range(end - 1, first - 1, -1):
        length = place[columns * dimension]
        total += (index % length) * place[columns * dimension + column]
        index //= length
    return total


@primitive
def take(typing_context: Any, counter: Any) -> Any:
    """The next piece of work: add 1 to the int64 at this address, atomically, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


FLOAT = {"float32": np.float32, "float64": np.float64}
"""The accumulate dtypes, as kernels name them."""
