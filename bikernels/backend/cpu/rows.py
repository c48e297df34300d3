"""What the reductions share: how rows lie in memory, and how a stretch of them is read and written.

Rows are taken in groups of `width` neighbours along one kept dimension, and a stretch of a group lies in the workspace
with element i of every row side by side. The loops then run over the stretch as if it were flat: with width 1 the
vectors run along the row, otherwise across the rows, which suits rows whose neighbours in memory belong to other rows,
and short ones. An element meets the same operations in the same order either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .compile import inner, invoke
from .convert import reader, rounder, writer
from .numerics import pointer

_WIDTH = 16
"""Rows in a group of several."""

_SHORT = SUM_LANES
"""Rows shorter than this are taken in groups."""

Table = np.ndarray[Any, np.dtype[np.int64]]


class Rows(NamedTuple):
    """A reduction's rows, as integers; strides count elements."""

    n: int
    """Elements in a row."""
    chunks: int
    """Of SUM_CHUNK elements."""
    width: int
    neighbours: int
    """Rows along the dimension in which they are grouped."""
    x_row: int
    out_row: int
    groups: int
    """In all."""
    kept: int
    """Other kept dimensions."""
    inner: int
    """Length of the last dimension of a row."""
    x_inner: int
    out_inner: int
    outer: int
    """Other dimensions of a row."""
    table: int
    """Address of (length, x's stride, out's stride) of each of the `kept`, then of the `outer` dimensions, int64."""
    x_itemsize: int
    out_itemsize: int
    itemsize: int
    """Of the accumulate dtype."""
    read: int
    round: int
    """Address of the rounding to the result's dtype, or 0 where x is exact in it."""
    write: int


def describe(spec: ReductionSpec) -> tuple[Rows, Table]:
    """The rows of a reduction, and the table to which `Rows.table` points."""
    kept = spec.kept
    accumulate = ACCUMULATE[spec.out.dtype]
    out_strides = spec.out.strides + (0,) * (len(spec.x.shape) - len(spec.out.strides))
    dimensions = list(zip(spec.x.shape, spec.x.strides, out_strides, strict=True))
    kept_dimensions, row = dimensions[:kept] or [(1, 0, 0)], dimensions[kept:] or [(1, 1, 1)]
    n = 1
    for length, _, _ in row:
        n *= length
    inner_length, x_inner, out_inner = row[-1]
    # Group rows along the dimension in which they are closest.
    closest = min(range(len(kept_dimensions)), key=lambda i: (abs(kept_dimensions[i][1]) or 1 << 62, -i))
    neighbours, x_row, out_row = kept_dimensions.pop(closest)
    width = _WIDTH if neighbours > 1 and (n < _SHORT or 0 < abs(x_row) < abs(x_inner)) else 1
    groups = -(-neighbours // width)
    for length, _, _ in kept_dimensions:
        groups *= length
    table = np.array(kept_dimensions + row[:-1], np.int64).reshape(-1, 3)
    exact = spec.x.dtype == spec.out.dtype or spec.out.dtype == accumulate
    rows = Rows(
        n=n,
        chunks=max(1, -(-n // SUM_CHUNK)),
        width=width,
        neighbours=neighbours,
        x_row=x_row,
        out_row=out_row,
        groups=groups,
        kept=len(kept_dimensions),
        inner=inner_length,
        x_inner=x_inner,
        out_inner=out_inner,
        outer=len(row) - 1,
        table=table.ctypes.data,
        x_itemsize=ITEMSIZE[spec.x.dtype],
        out_itemsize=ITEMSIZE[spec.out.dtype],
        itemsize=ITEMSIZE[accumulate],
        read=reader(spec.x.dtype, accumulate),
        round=0 if exact else rounder(spec.out.dtype),
        write=writer(accumulate, spec.out.dtype),
    )
    return rows, table


@inner
def offset(table, index, first, dimensions, operand):  # type: ignore[no-untyped-def]
    """Elements to position `index`, in C order, of the table's dimensions from `first` on; operand 1 is x, 2 is out."""
    place = pointer(table, np.int64)
    total = 0
    for dimension in range(first + dimensions - 1, first - 1, -1):
        length = place[3 * dimension]
        total += (index % length) * place[3 * dimension + operand]
        index //= length
    return total


@inner
def group_start(g, group, operand):  # type: ignore[no-untyped-def]
    """Elements to the first row of a group."""
    blocks = (g.neighbours + g.width - 1) // g.width
    stride = g.x_row if operand == 1 else g.out_row
    return offset(g.table, group // blocks, 0, g.kept, operand) + group % blocks * g.width * stride


@inner
def group_rows(g, group):  # type: ignore[no-untyped-def]
    """Rows in a group."""
    blocks = (g.neighbours + g.width - 1) // g.width
    return min(g.width, g.neighbours - group % blocks * g.width)


@inner
def read_stretch(g, x, group, first, length, target):  # type: ignore[no-untyped-def]
    """Elements first ... first + length - 1 of the rows of a group, in the accumulate dtype, to `target`."""
    start, columns = group_start(g, group, 1), group_rows(g, group)
    done = 0
    while done < length:
        position = (first + done) % g.inner
        run = min(length - done, g.inner - position)
        place = start + offset(g.table, (first + done) // g.inner, g.kept, g.outer, 1) + position * g.x_inner
        source = x + place * g.x_itemsize
        invoke(g.read, (target + done * g.width * g.itemsize, g.width, source, g.x_inner, g.x_row, run, columns))
        done += run
    if g.round != 0:
        invoke(g.round, (target, length * g.width))


@inner
def write_stretch(g, out, group, first, length, source):  # type: ignore[no-untyped-def]
    """The reverse of `read_stretch`, to out; NaNs become canonical."""
    start, columns = group_start(g, group, 2), group_rows(g, group)
    done = 0
    while done < length:
        position = (first + done) % g.inner
        run = min(length - done, g.inner - position)
        place = start + offset(g.table, (first + done) // g.inner, g.kept, g.outer, 2) + position * g.out_inner
        target = out + place * g.out_itemsize
        invoke(g.write, (target, g.out_inner, g.out_row, source + done * g.width * g.itemsize, g.width, run, columns))
        done += run
