"""The inner loop of the classes fma32 and fma64: acc = fma(a_k, b_k, acc) for one k after another.

A tile of ROWS rows of a few vectors of accumulators stays in registers while k runs: per k, the vectors of a row of b's
panel are loaded once, an element of each row of a is spread over a vector, and every accumulator takes one fma. Nothing
in it depends on how many rows or columns of the tile are real, so neither do the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from . import vectors
from .compile import address_of, primitive
from .numerics import FLOAT, VECTOR_BYTES, VECTOR_REGISTERS, call_intrinsic
from .panels import Panels

ROWS = 8 if VECTOR_REGISTERS == 32 else 4
"""Rows of a full tile."""

_VECTORS = 2 if VECTOR_REGISTERS == 32 else 3
"""Vectors in a row of a tile: the registers hold the tile, and it has enough chains to hide the latency of an fma."""


@functools.cache
def panels(accumulate: str) -> Panels:
    """How fma32 (accumulate float32) or fma64 (float64) wants its operands, and its inner loop."""
    itemsize = 4 if accumulate == "float32" else 8
    return Panels(
        multiply=address_of(_multiply(accumulate), *[types.int64] * 7),
        finish=0,
        rows=ROWS,
        columns=_VECTORS * VECTOR_BYTES // itemsize,
        group=1,
        header=0,
        words=1,
    )


def _multiply(accumulate: str) -> Callable[..., None]:
    kind = FLOAT[accumulate]

    def multiply(acc, leading, a, b, depth, width, first):  # type: ignore[no-untyped-def]
        if width == 1:
            _tile(kind, 1, acc, leading, a, b, depth, first)
        elif width == 2:
            _tile(kind, 2, acc, leading, a, b, depth, first)
        elif width == 4:
            _tile(kind, 4, acc, leading, a, b, depth, first)
        else:
            _tile(kind, ROWS, acc, leading, a, b, depth, first)

    return multiply


@primitive
def _tile(
    typing_context: Any, kind: Any, rows: Any, acc: Any, leading: Any, a: Any, b: Any, depth: Any, first: Any
) -> Any:
    """Add `depth` products to a tile of accumulators, which begin at +0 if `first`."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, _, acc, leading, a, b, depth, first = values
        height = rows.literal_value
        itemsize = kind.dtype.bitwidth // 8
        vector = ir.VectorType(context.get_value_type(kind.dtype), VECTOR_BYTES // itemsize)
        is_first = builder.icmp_signed("!=", first, ir.Constant(vectors.I64, 0))
        zero = vectors.constant(vector, 0.0)
        step = builder.mul(leading, ir.Constant(vectors.I64, itemsize))
        places = [builder.add(acc, builder.mul(step, ir.Constant(vectors.I64, i))) for i in range(height)]
        start = [
            builder.select(is_first, zero, vectors.load(builder, row, v * VECTOR_BYTES, vector))
            for row in places
            for v in range(_VECTORS)
        ]

        def body(carried: list[Any]) -> list[Any]:
            a, b, *sums = carried
            b_row = [vectors.load(builder, b, v * VECTOR_BYTES, vector) for v in range(_VECTORS)]
            for i in range(height):
                a_i = vectors.load_splat(builder, a, i * itemsize, vector)
                for v in range(_VECTORS):
                    sums[i * _VECTORS + v] = call_intrinsic(builder, "fma", a_i, b_row[v], sums[i * _VECTORS + v])
            a = builder.add(a, ir.Constant(vectors.I64, height * itemsize))
            b = builder.add(b, ir.Constant(vectors.I64, _VECTORS * VECTOR_BYTES))
            return [a, b, *sums]

        _, _, *sums = vectors.loop(builder, depth, [a, b, *start], body)
        for i in range(height):
            for v in range(_VECTORS):
                vectors.store(builder, sums[i * _VECTORS + v], places[i], v * VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(kind, rows, *[types.int64] * 6), codegen
