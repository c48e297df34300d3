"""The contract's sum tree, on stretches of rows that lie as `rows.py` says, in the workspace.

Chunk by chunk: the elements are added to their lanes in order, then the lanes as neighbours until one is left. Lanes
that would stay +0 are left out, which changes no bit because no partial sum is ever -0.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ...contract import SUM_CHUNK, SUM_LANES
from . import vectors
from .compile import inner
from .numerics import pointer


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


def fold(builder: Any, parts: list[Any], level: int, pairs: bool = False, whole: bool = False) -> Any:
    """Add lanes as neighbours until one vector is left; `whole`: one sum, which is its first element.

    `level` says at which distance in a vector neighbours lie, as a power of two, modulo the vector's length. Where two
    vectors are merged, the sums of each take the places of one of every two neighbours, so that the next neighbours
    lie at the next distance. With `pairs` the vectors come in pairs whose elements are each other's neighbours.
    """
    count = parts[0].type.count
    bits = count.bit_length() - 1

    def shuffle(a: Any, b: Any, places: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(vectors.I32, count), places))

    def merge(parts: list[Any], ours: list[int]) -> list[Any]:
        """The elements at these places of every two vectors, one behind the other, each plus its neighbour."""
        merged = []
        for a, b in zip(parts[::2], parts[1::2], strict=True):
            own = vectors.opaque(builder, shuffle(a, b, ours))
            merged.append(builder.fadd(own, shuffle(a, b, [place + distance for place in ours])))
        return merged

    def exchange(parts: list[Any]) -> list[Any]:
        """Every second element of one vector for one of the other, each plus its neighbour: two blends, one shuffle."""
        own = [place + (count if place & distance else 0) for place in range(count)]
        opposite = [place + (0 if place & distance else count) for place in range(count)]
        swapped = [place ^ distance for place in range(count)]
        merged = []
        for a, b in zip(parts[::2], parts[1::2], strict=True):
            other = vectors.opaque(builder, shuffle(a, b, opposite))
            merged.append(builder.fadd(shuffle(a, b, own), shuffle(other, other, swapped)))
        return merged

    if pairs:
        parts = [builder.fadd(*parts[i : i + 2]) for i in range(0, len(parts), 2)]
    size = 4 if parts[0].type.element == vectors.F32 else 8
    while len(parts) > 1:
        distance = 1 << level % bits
        if distance * size in (4, 16) and 4 * distance <= count and len(parts) > 2:
            # Two of every four from each vector are one instruction; done twice, all are where they belong.
            ours = [
                block + vector + unit + i
                for block in range(0, count, 4 * distance)
                for vector in (0, count)
                for unit in (0, 2 * distance)
                for i in range(distance)
            ]
            parts = merge(merge(parts, ours), ours)
            level += 2
            continue
        if distance * size == 8 or 2 * distance == count:
            parts = merge(parts, [place + (count - distance if place & distance else 0) for place in range(count)])
        else:
            parts = exchange(parts)
        level += 1
    (total,) = parts
    for _ in range(bits if whole else 0):
        total = builder.fadd(total, shuffle(total, total, [place ^ (1 << level % bits) for place in range(count)]))
        level += 1
    return total
