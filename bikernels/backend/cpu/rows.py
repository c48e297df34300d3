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
from ...specs import Layout, ReductionSpec
from . import threads
from .compile import inner, invoke
from .convert import reader, rounder, writer
from .numerics import offset, pointer

_WIDTH, _WIDE = 16, 64
"""Rows in a group of several; of rows that lie closer than their elements up to so many, so that each stretch of memory
that is read is long."""

_SHORT = SUM_LANES
"""Rows shorter than this are taken in groups."""

OUT, X, GRAD, WEIGHT, BIAS, MEAN, RSTD = range(7)
"""The operands by their places in the tables: those of `ReductionSpec`, whether there or not."""

OPERANDS = ("out", "x", "grad", "weight", "bias", "mean", "rstd")

_FIELDS = 6
ROW, INNER, SIZE, _READ, _ROUND, _WRITE = range(_FIELDS)
"""Of an operand: its strides, in elements, from row to row of a group and along the last dimension of a row; and
addresses of functions, 0 for what is not done with it."""

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
    blocks: int
    """Groups along that dimension."""
    groups: int
    """In all."""
    kept: int
    """Other kept dimensions."""
    inner: int
    """Length of the last dimension of a row."""
    outer: int
    """Other dimensions of a row."""
    dimensions: int
    """Address of each of the `kept`, then of the `outer` dimensions, int64: its length, and the operands' strides."""
    operands: int
    """Address of each operand's `_FIELDS`, int64."""
    itemsize: int
    """Of the accumulate dtype."""


def rounds(spec: ReductionSpec) -> bool:
    """Whether x has to be rounded to the result's dtype, which is narrower than that of the arithmetic."""
    return spec.grad is None and spec.x.dtype != spec.out.dtype and spec.out.dtype != ACCUMULATE[spec.out.dtype]


def describe(spec: ReductionSpec, width: int = 0) -> tuple[Rows, tuple[Table, Table]]:
    """The rows of a reduction, and the tables to which they point.

    Args:
        spec: the reduction.
        width: that of the groups, which are then not moved to a workspace; 0: one that suits a workspace.
    """
    kept, shape = spec.kept, spec.x.shape
    accumulate = ACCUMULATE[spec.out.dtype]
    layouts: list[Layout | None] = [getattr(spec, name) for name in OPERANDS]
    strides = [(0,) * len(shape) if one is None else one.strides for one in layouts]
    if spec.one_for_a_row:
        strides[OUT] += (0,) * (len(shape) - kept)
    dimensions = list(zip(shape, *strides, strict=True))
    nothing = (0,) * len(OPERANDS)
    kept_dimensions, row = dimensions[:kept] or [(1, *nothing)], dimensions[kept:] or [(1, *nothing)]
    n = 1
    for length, *_ in row:
        n *= length
    # Group rows along the dimension in which they are closest.
    x = 1 + X
    closest = min(range(len(kept_dimensions)), key=lambda i: (abs(kept_dimensions[i][x]) or 1 << 62, -i))
    neighbours, *rows_apart = kept_dimensions.pop(closest)
    inner_length, *elements_apart = row[-1]
    others = 1
    for length, *_ in kept_dimensions:
        others *= length
    moves, lies_across = width == 0, 0 < abs(rows_apart[X]) < abs(elements_apart[X])
    width = width or 1
    if moves and neighbours > 1 and (n < _SHORT or lies_across):
        width = _WIDTH
        enough = threads.FEW * threads.limit()
        while lies_across and width < min(_WIDE, neighbours) and others * (neighbours // (2 * width)) >= enough:
            width *= 2
    blocks = -(-neighbours // width)
    tables = (
        np.array(kept_dimensions + row[:-1], np.int64).reshape(-1, 1 + len(OPERANDS)),
        np.zeros((len(OPERANDS), _FIELDS), np.int64),
    )
    for i, (name, layout) in enumerate(zip(OPERANDS, layouts, strict=True)):
        if layout is None:
            continue
        if not moves:
            tables[1][i, :3] = rows_apart[i], elements_apart[i], ITEMSIZE[layout.dtype]
            continue
        is_read = name != "out" and not (name in ("mean", "rstd") and spec.grad is None)
        tables[1][i] = (
            rows_apart[i],
            elements_apart[i],
            ITEMSIZE[layout.dtype],
            reader(layout.dtype, accumulate) if is_read else 0,
            rounder(spec.out.dtype) if name == "x" and rounds(spec) else 0,
            0 if is_read else writer(accumulate, layout.dtype),
        )
    rows = Rows(
        n=n,
        chunks=max(1, -(-n // SUM_CHUNK)),
        width=width,
        neighbours=neighbours,
        blocks=blocks,
        groups=blocks * others,
        kept=len(kept_dimensions),
        inner=inner_length,
        outer=len(row) - 1,
        dimensions=tables[0].ctypes.data,
        operands=tables[1].ctypes.data,
        itemsize=ITEMSIZE[accumulate],
    )
    return rows, tables


@inner
def _field(g, operand, field):  # type: ignore[no-untyped-def]
    return pointer(g.operands, np.int64)[_FIELDS * operand + field]


@inner
def _offset(g, index, first, dimensions, operand):  # type: ignore[no-untyped-def]
    """Elements to position `index`, in C order, of the table's dimensions from `first` on."""
    return offset(g.dimensions, 1 + len(OPERANDS), first, first + dimensions, index, 1 + operand)


@inner
def group_start(g, group, operand, address):  # type: ignore[no-untyped-def]
    """Where the first row of a group begins."""
    if g.kept == 0:
        place = group * g.width * _field(g, operand, ROW)
    else:
        outer, block = group // g.blocks, group % g.blocks
        place = _offset(g, outer, 0, g.kept, operand) + block * g.width * _field(g, operand, ROW)
    return address + place * _field(g, operand, SIZE)


@inner
def group_rows(g, group):  # type: ignore[no-untyped-def]
    """Rows in a group."""
    return min(g.width, g.neighbours - group % g.blocks * g.width)


@inner
def read_stretch(g, operand, address, group, first, length, target):  # type: ignore[no-untyped-def]
    """Elements first ... first + length - 1 of the rows of a group, in the accumulate dtype, to `target`."""
    start, columns = group_start(g, group, operand, address), group_rows(g, group)
    row, step, itemsize = _field(g, operand, ROW), _field(g, operand, INNER), _field(g, operand, SIZE)
    done = 0
    while done < length:
        position = (first + done) % g.inner
        run = min(length - done, g.inner - position)
        place = _offset(g, (first + done) // g.inner, g.kept, g.outer, operand) + position * step
        source = start + place * itemsize
        invoke(
            _field(g, operand, _READ), (target + done * g.width * g.itemsize, g.width, source, step, row, run, columns)
        )
        done += run
    if _field(g, operand, _ROUND) != 0:
        invoke(_field(g, operand, _ROUND), (target, length * g.width))


@inner
def write_stretch(g, operand, address, group, first, length, source):  # type: ignore[no-untyped-def]
    """The reverse of `read_stretch`; NaNs become canonical."""
    start, columns = group_start(g, group, operand, address), group_rows(g, group)
    row, step, itemsize = _field(g, operand, ROW), _field(g, operand, INNER), _field(g, operand, SIZE)
    done = 0
    while done < length:
        position = (first + done) % g.inner
        run = min(length - done, g.inner - position)
        place = _offset(g, (first + done) // g.inner, g.kept, g.outer, operand) + position * step
        target = start + place * itemsize
        invoke(
            _field(g, operand, _WRITE), (target, step, row, source + done * g.width * g.itemsize, g.width, run, columns)
        )
        done += run


@inner
def write_scalars(g, operand, address, group, values):  # type: ignore[no-untyped-def]
    """One element for each row of a group; NaNs become canonical."""
    target = group_start(g, group, operand, address)
    row = _field(g, operand, ROW)
    invoke(_field(g, operand, _WRITE), (target, 0, row, values, g.width, 1, group_rows(g, group)))


@inner
def repeat_scalars(kind, g, values, target):  # type: ignore[no-untyped-def]
    """One value for each row of a group, once for each lane of the sum tree that is used."""
    value, place = pointer(values, kind), pointer(target, kind)
    for i in range(min(g.n, SUM_LANES)):
        for c in range(g.width):
            place[i * g.width + c] = value[c]
