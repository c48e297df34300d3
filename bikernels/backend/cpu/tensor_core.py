"""The inner loop of the tensor-core classes: K in groups, each group one exact sum, truncated.

A group's step is (docs/contract.md): align every exact product and the accumulator to the largest exponent, cut off
what lies `fraction_bits` below it, add exactly, round once toward zero to float32. Two ways compute the same bits:

- the fast way, where every exponent is ordinary: products are exact in float32, the scaling to the common unit is a
  multiplication by a power of two, the cut is the conversion to int32. A group of 16 can reach 2^31 units and a little
  more, so each half of it has a sum of its own; their total is kept modulo 2^32 with its sign beside it.
- the wide way, for any operands (subnormal, huge, infinite, NaN): the same steps in float64, which holds all of them
  exactly, and beside them a plain sum that decides infinities and NaN.

Panels carry each value's exponent beside it and, in the header, their least and largest; a tile takes the fast way if
those and its accumulators allow it. Columns lie in the elements of a vector, so a column's bits depend on no other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ...contract import ARITHMETIC, EXPONENT_MIN
from . import vectors
from .compile import address_of, inner, primitive
from .numerics import VECTOR_BYTES, call_intrinsic, pointer
from .panels import Panels

ROWS = 4
"""Rows of a full tile."""

LANES = VECTOR_BYTES // 4
"""Columns of a tile: one vector of float32."""

_HEADER = 64
_ZERO_EXPONENT = -2000
"""Stands for the exponent of 0: with any other exponent added, it is below every floor."""

_ORDINARY = 60
"""The fast way takes products with exponents from -60 to 60 ..."""
_ORDINARY_ACC = 100
"""... and accumulators that are 0 or have exponents from -100 to 100. A step's result is a multiple of 2^(-60 - 25) or
its accumulator unchanged, so the lower bound lasts; the upper one is far from overflow for any K."""


@functools.cache
def panels(arithmetic: str, dtype: str) -> Panels:
    """How the class wants operands of the dtype, and its inner loop."""
    return Panels(
        multiply=address_of(_multiply(arithmetic), *[types.int64] * 7),
        finish=address_of(_finish(EXPONENT_MIN[dtype]), *[types.int64] * 3),
        rows=ROWS,
        columns=LANES,
        group=ARITHMETIC[arithmetic].group,
        header=_HEADER,
        words=2,
    )


def _finish(least: int) -> Callable[..., None]:
    def finish(panel, depth, width):  # type: ignore[no-untyped-def]
        """Write each value's exponent beside it, and the range of those of values other than 0 into the header."""
        if width == 1:
            _exponents(least, 1, panel, depth)
        elif width == 2:
            _exponents(least, 2, panel, depth)
        elif width == ROWS:
            _exponents(least, ROWS, panel, depth)
        elif width == LANES:
            _exponents(least, LANES, panel, depth)

    return finish


@primitive
def _exponents(typing_context: Any, least: Any, width: Any, panel: Any, depth: Any) -> Any:
    """`_finish` for a panel of this width; `least` is the exponent with which subnormal numbers count."""
    if not isinstance(width, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, panel, depth = values
        lanes = width.literal_value
        i32 = ir.VectorType(vectors.I32, lanes)
        low = vectors.constant(i32, -2 * _ZERO_EXPONENT)
        high = vectors.constant(i32, _ZERO_EXPONENT)

        def body(carried: list[Any]) -> list[Any]:
            place, lowest, highest = carried
            magnitude = builder.and_(vectors.load(builder, place, 0, i32), vectors.constant(i32, 0x7FFFFFFF))
            exponent = builder.sub(builder.lshr(magnitude, vectors.constant(i32, 23)), vectors.constant(i32, 127))
            exponent = vectors.maximum(builder, exponent, vectors.constant(i32, least.literal_value))
            is_zero = builder.icmp_signed("==", magnitude, vectors.constant(i32, 0))
            lowest = vectors.minimum(builder, lowest, builder.select(is_zero, low, exponent))
            exponent = builder.select(is_zero, high, exponent)
            vectors.store(builder, exponent, place, lanes * 4)
            place = builder.add(place, ir.Constant(vectors.I64, lanes * 8))
            return [place, lowest, vectors.maximum(builder, highest, exponent)]

        start = builder.add(panel, ir.Constant(vectors.I64, _HEADER))
        _, lowest, highest = vectors.loop(builder, depth, [start, low, high], body)
        for offset, vector, better in ((0, lowest, vectors.minimum), (4, highest, vectors.maximum)):
            elements = [builder.extract_element(vector, ir.Constant(vectors.I32, i)) for i in range(lanes)]
            vectors.store(builder, functools.reduce(functools.partial(better, builder), elements), panel, offset)
        return context.get_dummy_value()

    return types.void(least, width, types.int64, types.int64), codegen


def _multiply(arithmetic: str) -> Callable[..., None]:
    arithmetic, group = str(arithmetic), ARITHMETIC[arithmetic].group

    def multiply(acc, leading, a, b, depth, width, first):  # type: ignore[no-untyped-def]
        a_range, b_range = pointer(a, np.int32), pointer(b, np.int32)
        finite = max(a_range[1], b_range[1]) < 128  # an infinity counts with 128 and may meet a 0
        ordinary = finite and a_range[0] + b_range[0] >= -_ORDINARY and a_range[1] + b_range[1] <= _ORDINARY
        if ordinary and first == 0:
            ordinary = _ordinary(acc, leading, width)
        a, b, groups = a + _HEADER, b + _HEADER, depth // group
        if not ordinary:
            for i in range(width):
                _wide_row(arithmetic, acc + i * leading * 4, a + i * 4, b, groups, width, first)
        elif width == 1:
            _fast_tile(arithmetic, 1, acc, leading, a, b, groups, first)
        elif width == 2:
            _fast_tile(arithmetic, 2, acc, leading, a, b, groups, first)
        else:
            _fast_tile(arithmetic, ROWS, acc, leading, a, b, groups, first)

    return multiply


@inner
def _ordinary(acc, leading, rows):  # type: ignore[no-untyped-def]
    """Whether the fast way may take these accumulators."""
    outside = np.int32(0)
    for i in range(rows):
        row = pointer(acc + i * leading * 4, np.int32)
        for j in range(LANES):
            magnitude = row[j] & np.int32(0x7FFFFFFF)
            outside |= magnitude != 0 and (
                magnitude < ((127 - _ORDINARY_ACC) << 23) or magnitude >= ((127 + _ORDINARY_ACC) << 23)
            )
    return outside == 0


@primitive
def _fast_tile(
    typing_context: Any,
    arithmetic: Any,
    rows: Any,
    acc: Any,
    leading: Any,
    a: Any,
    b: Any,
    groups: Any,
    first: Any,
) -> Any:
    """Add `groups` groups of products to a tile of accumulators, which begin at +0 if `first`."""
    kind = ARITHMETIC[arithmetic.literal_value]
    height = rows.literal_value
    assert kind.fraction_bits is not None
    fraction_bits: int = kind.fraction_bits

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, acc, leading, a, b, groups, first = values
        f32, i32 = ir.VectorType(vectors.F32, LANES), ir.VectorType(vectors.I32, LANES)
        is_first = builder.icmp_signed("!=", first, ir.Constant(vectors.I64, 0))
        step = builder.mul(leading, ir.Constant(vectors.I64, 4))
        places = [builder.add(acc, builder.mul(step, ir.Constant(vectors.I64, i))) for i in range(height)]
        zero = vectors.constant(f32, 0.0)
        start = [builder.select(is_first, zero, vectors.load(builder, row, 0, f32)) for row in places]
        fraction = vectors.constant(i32, fraction_bits)

        def body(carried: list[Any]) -> list[Any]:
            a, b, *sums = carried
            largest = []
            for i in range(height):
                bits = builder.lshr(builder.bitcast(sums[i], i32), vectors.constant(i32, 23))
                exponent = builder.sub(
                    builder.and_(bits, vectors.constant(i32, 255)), vectors.constant(i32, 127)
                )  # 0 gives -127, below the floor
                largest.append(vectors.maximum(builder, exponent, vectors.constant(i32, -_ORDINARY_ACC)))
            for k in range(kind.group):
                b_exponent = vectors.load(builder, b, (2 * k + 1) * LANES * 4, i32)
                for i in range(height):
                    a_exponent = vectors.load_splat(builder, a, ((2 * k + 1) * height + i) * 4, i32)
                    exponent = builder.add(a_exponent, b_exponent)
                    largest[i] = vectors.maximum(builder, exponent, largest[i])
            scales = [vectors.power_of_two(builder, builder.sub(fraction, e), f32) for e in largest]
            halves = [[builder.fptosi(builder.fmul(x, s), i32) for x, s in zip(sums, scales, strict=True)]]
            halves.append([vectors.constant(i32, 0)] * height)
            for k in range(kind.group):
                totals = halves[2 * k // kind.group]
                b_value = vectors.load(builder, b, 2 * k * LANES * 4, f32)
                for i in range(height):
                    a_value = vectors.load_splat(builder, a, (2 * k * height + i) * 4, f32)
                    product = builder.fmul(builder.fmul(a_value, b_value), scales[i])
                    totals[i] = builder.add(totals[i], builder.fptosi(product, i32))
            for i in range(height):
                unit = vectors.power_of_two(builder, builder.sub(largest[i], fraction), f32)
                sums[i] = builder.fmul(_truncated_sum(builder, halves[0][i], halves[1][i]), unit)
            a = builder.add(a, ir.Constant(vectors.I64, kind.group * height * 8))
            b = builder.add(b, ir.Constant(vectors.I64, kind.group * LANES * 8))
            return [a, b, *sums]

        _, _, *sums = vectors.loop(builder, groups, [a, b, *start], body)
        for row, total in zip(places, sums, strict=True):
            vectors.store(builder, total, row)
        return context.get_dummy_value()

    return types.void(arithmetic, rows, *[types.int64] * 6), codegen


def _truncated_sum(builder: Any, x: Any, y: Any) -> Any:
    """x + y for int32 whose sum has at most 32 bits beside its sign, rounded toward zero to float32; a zero is +0."""
    i32, f32 = x.type, ir.VectorType(vectors.F32, x.type.count)
    one = vectors.constant(i32, 1)
    zero = vectors.constant(i32, 0)
    half_sum = builder.add(builder.ashr(x, one), builder.ashr(y, one))  # at most 1 below half the sum: has its sign
    negative = builder.icmp_signed("<", half_sum, zero)
    total = builder.add(x, y)
    magnitude = builder.select(negative, builder.sub(zero, total), total)
    # With the first bit below the 24 highest cleared, and maybe others below it, rounding to nearest truncates.
    shifted = builder.lshr(magnitude, vectors.constant(i32, 24))
    magnitude = builder.and_(magnitude, builder.xor(shifted, vectors.constant(i32, -1)))
    result = builder.uitofp(magnitude, f32)
    return builder.select(negative, builder.fsub(vectors.constant(f32, 0.0), result), result)


@primitive
def _wide_row(
    typing_context: Any, arithmetic: Any, acc: Any, a: Any, b: Any, groups: Any, width: Any, first: Any
) -> Any:
    """As `_fast_tile`, for one row of a panel that is `width` wide, and any operands."""
    kind = ARITHMETIC[arithmetic.literal_value]
    assert kind.fraction_bits is not None
    fraction_bits: int = kind.fraction_bits

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, acc, a, b, groups, width, first = values
        f32, i32 = ir.VectorType(vectors.F32, LANES), ir.VectorType(vectors.I32, LANES)
        f64, i64 = ir.VectorType(vectors.F64, LANES), ir.VectorType(vectors.I64, LANES)
        is_first = builder.icmp_signed("!=", first, ir.Constant(vectors.I64, 0))
        start = builder.select(is_first, vectors.constant(f32, 0.0), vectors.load(builder, acc, 0, f32))
        fraction = vectors.constant(i64, fraction_bits)
        step = builder.mul(width, ir.Constant(vectors.I64, 8))
        exponents_at = builder.mul(width, ir.Constant(vectors.I64, 4))

        def truncate(value: Any) -> Any:
            return call_intrinsic(builder, "trunc", value)

        def exponent_of(value: Any) -> Any:
            """That of a float64 number, with float32's least exponent for 0 and for what is smaller."""
            bits = builder.lshr(builder.bitcast(value, i64), vectors.constant(i64, 52))
            exponent = builder.sub(builder.and_(bits, vectors.constant(i64, 0x7FF)), vectors.constant(i64, 1023))
            return vectors.maximum(builder, exponent, vectors.constant(i64, EXPONENT_MIN["float32"]))

        def body(carried: list[Any]) -> list[Any]:
            a, b, total = carried
            is_zero = builder.fcmp_ordered("==", total, vectors.constant(f64, 0.0))
            floor = vectors.constant(i64, kind.floor)
            largest = vectors.maximum(builder, builder.select(is_zero, floor, exponent_of(total)), floor)
            special, products = total, []
            for k in range(kind.group):
                row = builder.add(a, builder.mul(step, ir.Constant(vectors.I64, k)))
                exponent = builder.add(
                    vectors.load_splat(builder, builder.add(row, exponents_at), 0, i32),
                    vectors.load(builder, b, (2 * k + 1) * LANES * 4, i32),
                )
                largest = vectors.maximum(builder, builder.sext(exponent, i64), largest)
                a_value = builder.fpext(vectors.load_splat(builder, row, 0, f32), f64)
                b_value = builder.fpext(vectors.load(builder, b, 2 * k * LANES * 4, f32), f64)
                products.append(builder.fmul(a_value, b_value))
                special = builder.fadd(special, products[-1])
            scale = vectors.power_of_two(builder, builder.sub(fraction, largest), f64)
            unit = vectors.power_of_two(builder, builder.sub(largest, fraction), f64)
            total = truncate(builder.fmul(total, scale))
            for product in products:
                total = builder.fadd(total, truncate(builder.fmul(product, scale)))
            total = builder.fmul(total, unit)
            # To float32 toward zero: 23 bits below the exponent, or below that of subnormal numbers.
            exponent = exponent_of(total)
            last = vectors.constant(i64, 23)
            scale = vectors.power_of_two(builder, builder.sub(last, exponent), f64)
            unit = vectors.power_of_two(builder, builder.sub(exponent, last), f64)
            total = builder.fmul(truncate(builder.fmul(total, scale)), unit)
            total = builder.fadd(total, vectors.constant(f64, 0.0))  # a zero is +0
            for sign, predicate in ((1.0, ">="), (-1.0, "<=")):
                beyond = builder.fcmp_ordered(predicate, total, vectors.constant(f64, sign * 2.0**128))
                total = builder.select(beyond, vectors.constant(f64, sign * float("inf")), total)
            difference = builder.fsub(special, special)
            finite = builder.fcmp_ordered("==", difference, vectors.constant(f64, 0.0))
            total = builder.select(finite, total, special)
            a = builder.add(a, builder.mul(step, ir.Constant(vectors.I64, kind.group)))
            b = builder.add(b, ir.Constant(vectors.I64, kind.group * LANES * 8))
            return [a, b, total]

        _, _, total = vectors.loop(builder, groups, [a, b, builder.fpext(start, f64)], body)
        vectors.store(builder, builder.fptrunc(total, f32), acc)
        return context.get_dummy_value()

    return types.void(arithmetic, *[types.int64] * 6), codegen
