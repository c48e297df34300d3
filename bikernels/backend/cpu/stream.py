"""Products of few rows: b is read where it lies, once, since packing it would cost more than multiplying it.

A streaming loop takes a panel of a, packed as ever, and b in memory, with its own dtype and strides. Where the elements
of a row of b are neighbours, it takes a few rows at a time and walks along them, the accumulators in the first-level
cache. Where those of a column are, it takes as many columns as a vector has elements and transposes square blocks of
them in registers. Either way an accumulator takes one k after another, as in `fma.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types

from ...contract import ITEMSIZE
from . import fma, vectors
from .compile import address_of, primitive
from .numerics import FLOAT, LLVM_TYPE, VECTOR_BYTES, call_intrinsic, to_accumulate, transposed

ROWS = 16
"""Most rows of a product that is streamed: with more, packing b pays."""

_STEP = 8
"""Elements of K taken at a time along rows of b: the accumulators are loaded and stored once for all of them."""

_ROW_BYTES = 8192
"""Most of a row of b in a piece, where its elements are neighbours: the longer, the better it is fetched ahead."""

_ACCUMULATOR_BYTES = 32768
"""Most that the accumulators of such a piece take, to stay in the first-level cache."""

_AHEAD = 512
"""Bytes to fetch ahead along each column, where its elements are neighbours: these are too many for the processor."""


class Stream(NamedTuple):
    """A streaming loop, and what it takes of b."""

    multiply: int
    """Address of multiply(acc, leading, a, b, stride, depth, columns, width, first): `depth` products are added to
    `columns` columns of a tile, from a panel of a, `width` wide, and from b, whose rows (or columns) lie `stride`
    elements apart. The accumulators begin at +0 if `first`."""
    depth: int
    """`depth` is a multiple of it; `columns` is one of a panel's."""
    columns: int
    """Most columns in a piece."""


def stream(dtype: str, accumulate: str, m: int, b_k: int, b_n: int) -> Stream | None:
    """For a product of m rows in fma32 or fma64 and these strides of b; None where b has to be packed."""
    if m > ROWS or 1 not in (b_k, b_n):
        return None
    size = ITEMSIZE[accumulate]
    panel = fma.panels(accumulate).columns
    if b_n == 1:
        width = 1 << (m - 1).bit_length()
        columns = min(_ROW_BYTES // ITEMSIZE[dtype], _ACCUMULATOR_BYTES // (width * size)) // panel * panel
        return Stream(_address(dtype, accumulate, True), 1, max(panel, columns))
    return Stream(_address(dtype, accumulate, False), VECTOR_BYTES // size, panel)


@functools.cache
def _address(dtype: str, accumulate: str, along_rows: bool) -> int:
    multiply = _along_rows(dtype, accumulate) if along_rows else _along_columns(dtype, accumulate)
    return address_of(multiply, *[types.int64] * 9)


class _Types(NamedTuple):
    """What a tile is made of, as LLVM types: vectors of accumulators, and as many elements of b."""

    name: str
    accumulate: ir.Type
    vector: ir.VectorType
    source: ir.VectorType
    lanes: int
    size: int
    """Bytes of an accumulator."""
    itemsize: int
    """Bytes of an element of b."""

    @classmethod
    def of(cls, context: Any, dtype: Any, kind: Any) -> _Types:
        name, accumulate, size = dtype.literal_value, context.get_value_type(kind.dtype), kind.dtype.bitwidth // 8
        lanes = VECTOR_BYTES // size
        vector, source = ir.VectorType(accumulate, lanes), ir.VectorType(LLVM_TYPE[name], lanes)
        return cls(name, accumulate, vector, source, lanes, size, ITEMSIZE[name])

    def load(self, builder: Any, address: Any) -> Any:
        """A vector of b's elements, as accumulators."""
        loaded = vectors.load(builder, address, 0, self.source, self.itemsize)
        return to_accumulate(builder, self.name, loaded, self.accumulate)

    def multiples(self, builder: Any, stride: Any, size: int, count: int) -> list[Any]:
        """0, 1, ... strides, in bytes."""
        step = builder.mul(stride, ir.Constant(vectors.I64, size))
        return [builder.mul(step, ir.Constant(vectors.I64, i)) for i in range(count)]

    def add(self, builder: Any, sums: list[Any], a: Any, k: int, b_k: Any) -> list[Any]:
        """The accumulators of each row, after the products of row k of b and an element of a's panel."""
        result = []
        for i, total in enumerate(sums):
            a_i = vectors.load_splat(builder, a, (k * len(sums) + i) * self.size, self.vector)
            result.append(call_intrinsic(builder, "fma", a_i, b_k, total))
        return result


def _along_rows(dtype: str, accumulate: str) -> Callable[..., None]:
    dtype, kind, full = str(dtype), FLOAT[accumulate], fma.ROWS
    size, itemsize, lanes = ITEMSIZE[accumulate], ITEMSIZE[dtype], VECTOR_BYTES // ITEMSIZE[accumulate]

    def multiply(acc, leading, a, b, stride, depth, columns, width, first):  # type: ignore[no-untyped-def]
        count, whole, k = columns // lanes, depth - depth % _STEP, 0
        while k < depth:
            steps = _STEP if k < whole else 1
            if width == 1:
                _row_tile(dtype, kind, 1, acc, leading, a, b, stride, steps, count, first)
            elif width == 2:
                _row_tile(dtype, kind, 2, acc, leading, a, b, stride, steps, count, first)
            elif width == 4:
                _row_tile(dtype, kind, 4, acc, leading, a, b, stride, steps, count, first)
            else:
                _row_tile(dtype, kind, full, acc, leading, a, b, stride, steps, count, first)
            a += steps * width * size
            b += steps * stride * itemsize
            k += steps
            first = 0

    return multiply


@primitive
def _row_tile(
    typing_context: Any,
    dtype: Any,
    kind: Any,
    rows: Any,
    acc: Any,
    leading: Any,
    a: Any,
    b: Any,
    stride: Any,
    steps: Any,
    count: Any,
    first: Any,
) -> Any:
    """Add `steps` (1 or _STEP) products to `count` vectors in each row of accumulators."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, _, acc, leading, a, b, stride, steps, count, first = values
        kinds = _Types.of(context, dtype, kind)
        is_first = builder.icmp_signed("!=", first, ir.Constant(vectors.I64, 0))
        zero = vectors.constant(kinds.vector, 0.0)
        places = kinds.multiples(builder, leading, kinds.size, rows.literal_value)
        offsets = kinds.multiples(builder, stride, kinds.itemsize, _STEP)

        def take(depth: int) -> None:
            def body(carried: list[Any]) -> list[Any]:
                acc, b = carried
                sums = [vectors.load(builder, builder.add(acc, place), 0, kinds.vector) for place in places]
                sums = [builder.select(is_first, zero, total) for total in sums]
                for k in range(depth):
                    sums = kinds.add(builder, sums, a, k, kinds.load(builder, builder.add(b, offsets[k])))
                for place, total in zip(places, sums, strict=True):
                    vectors.store(builder, total, builder.add(acc, place))
                b = builder.add(b, ir.Constant(vectors.I64, kinds.lanes * kinds.itemsize))
                return [builder.add(acc, ir.Constant(vectors.I64, VECTOR_BYTES)), b]

            vectors.loop(builder, count, [acc, b], body)

        with builder.if_else(builder.icmp_signed("==", steps, ir.Constant(vectors.I64, _STEP))) as (many, one):
            with many:
                take(_STEP)
            with one:
                take(1)
        return context.get_dummy_value()

    return types.void(dtype, kind, rows, *[types.int64] * 8), codegen


def _along_columns(dtype: str, accumulate: str) -> Callable[..., None]:
    dtype, kind, full = str(dtype), FLOAT[accumulate], fma.ROWS
    size, itemsize, lanes = ITEMSIZE[accumulate], ITEMSIZE[dtype], VECTOR_BYTES // ITEMSIZE[accumulate]

    def multiply(acc, leading, a, b, stride, depth, columns, width, first):  # type: ignore[no-untyped-def]
        for _ in range(0, columns, lanes):
            if width == 1:
                _column_tile(dtype, kind, 1, acc, leading, a, b, stride, depth // lanes, first)
            elif width == 2:
                _column_tile(dtype, kind, 2, acc, leading, a, b, stride, depth // lanes, first)
            elif width == 4:
                _column_tile(dtype, kind, 4, acc, leading, a, b, stride, depth // lanes, first)
            else:
                _column_tile(dtype, kind, full, acc, leading, a, b, stride, depth // lanes, first)
            acc += lanes * size
            b += lanes * stride * itemsize

    return multiply


@primitive
def _column_tile(
    typing_context: Any,
    dtype: Any,
    kind: Any,
    rows: Any,
    acc: Any,
    leading: Any,
    a: Any,
    b: Any,
    stride: Any,
    blocks: Any,
    first: Any,
) -> Any:
    """Add the products of `blocks` square blocks of b to one vector in each row of accumulators."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, _, acc, leading, a, b, stride, blocks, first = values
        kinds, height = _Types.of(context, dtype, kind), rows.literal_value
        is_first = builder.icmp_signed("!=", first, ir.Constant(vectors.I64, 0))
        zero = vectors.constant(kinds.vector, 0.0)
        places = [builder.add(acc, place) for place in kinds.multiples(builder, leading, kinds.size, height)]
        start = [builder.select(is_first, zero, vectors.load(builder, place, 0, kinds.vector)) for place in places]
        offsets = kinds.multiples(builder, stride, kinds.itemsize, kinds.lanes)

        def body(carried: list[Any]) -> list[Any]:
            a, b, *sums = carried
            columns = []
            for offset in offsets:
                column = builder.add(b, offset)
                vectors.prefetch(builder, builder.add(column, ir.Constant(vectors.I64, _AHEAD)))
                columns.append(kinds.load(builder, column))
            for k, b_k in enumerate(transposed(builder, columns)):
                sums = kinds.add(builder, sums, a, k, b_k)
            a = builder.add(a, ir.Constant(vectors.I64, kinds.lanes * height * kinds.size))
            return [a, builder.add(b, ir.Constant(vectors.I64, kinds.lanes * kinds.itemsize)), *sums]

        _, _, *sums = vectors.loop(builder, blocks, [a, b, *start], body)
        for place, total in zip(places, sums, strict=True):
            vectors.store(builder, total, place)
        return context.get_dummy_value()

    return types.void(dtype, kind, rows, *[types.int64] * 7), codegen
