"""The contract's sum tree, on stretches of rows that lie as `rows.py` says, in the workspace.

Chunk by chunk: the elements are added to their lanes in order, then the lanes as neighbours until one is left. Lanes
that would stay +0 are left out, which changes no bit because no partial sum is ever -0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ...contract import SUM_CHUNK, SUM_LANES
from . import vectors
from .compile import inner, primitive
from .numerics import VECTOR_BYTES, pointer


@inner
def sum_chunk(kind, size, values, length, width, lanes, target):  # type: ignore[no-untyped-def]
    """The sums of up to SUM_CHUNK elements of `width` rows, written to `target`.

    `lanes` has room for 3 / 2 * SUM_LANES * width values.
    """
    source = pointer(values, kind)
    lane = pointer(lanes, kind)
    zero = kind(0)
    active = 1
    while active < length and active < SUM_LANES:
        active *= 2
    filled = min(length, SUM_LANES) * width
    for i in range(filled):
        lane[i] = zero + source[i]
    for i in range(filled, active * width):
        lane[i] = zero
    for first in range(SUM_LANES, length, SUM_LANES):
        for i in range(min(length - first, SUM_LANES) * width):
            lane[i] += source[first * width + i]
    other = pointer(lanes + SUM_LANES * width * size, kind)
    while active > 1:
        active //= 2
        if width == 1:
            for j in range(active):
                other[j] = lane[2 * j] + lane[2 * j + 1]
        else:
            for j in range(active):
                for c in range(width):
                    other[j * width + c] = lane[2 * j * width + c] + lane[(2 * j + 1) * width + c]
        lane, other = other, lane
    result = pointer(target, kind)
    for c in range(width):
        result[c] = lane[c]


@inner
def sum_tree(kind, size, sums, length, width, lanes):  # type: ignore[no-untyped-def]
    """The sums of the chunks' sums, in place: the result of each row is in the first `width` places."""
    while length > 1:
        for first in range(0, length, SUM_CHUNK):
            source, target = sums + first * width * size, sums + first // SUM_CHUNK * width * size
            sum_chunk(kind, size, source, min(length - first, SUM_CHUNK), width, lanes, target)
        length = (length + SUM_CHUNK - 1) // SUM_CHUNK


@primitive
def fold_lanes(typing_context: Any, kind: Any, lanes: Any) -> Any:
    """The sum of SUM_LANES lanes at this address, as neighbours, in registers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        element, count = context.get_value_type(kind.dtype), 8 * VECTOR_BYTES // kind.dtype.bitwidth
        vector = ir.VectorType(element, count)

        def add_neighbours(a: Any, b: Any, length: int) -> Any:
            pairs = []
            for first in (0, 1):
                places = ir.Constant(ir.VectorType(vectors.I32, length), list(range(first, 2 * length, 2)))
                pairs.append(builder.shuffle_vector(a, b, places))
            return builder.fadd(*pairs)

        def fold(first: int, number: int) -> Any:  # depth first, which takes few registers
            if number == 1:
                return vectors.load(builder, values[1], first * VECTOR_BYTES, vector)
            return add_neighbours(fold(first, number // 2), fold(first + number // 2, number // 2), count)

        total, length = fold(0, SUM_LANES // count), count // 2
        while length:
            total, length = add_neighbours(total, total, length), length // 2
        return builder.extract_element(total, ir.Constant(vectors.I32, 0))

    return kind.dtype(kind, types.int64), codegen
