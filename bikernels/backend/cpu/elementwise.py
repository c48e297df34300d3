"""Elementwise functions: blocks of the operands are read to the accumulate dtype, computed, and written.

A piece of the work is a block along the last dimension. Where an element lies in it decides no bit: every function
(`functions.py`) is a sequence of operations on one value, which vector instructions round alike.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numba import types

from ...contract import ACCUMULATE, ITEMSIZE
from ...specs import ElementwiseSpec
from .. import ElementwiseLaunch
from . import threads
from .compile import address_of, inner, invoke, kernel
from .convert import reader, rounder, writer
from .functions import function
from .numerics import FLOAT, offset, pointer, take

_BLOCK = 1024
"""Elements that are computed together, so that they stay in the cache."""

_NANOSECONDS = 3.0
"""A rough cost of an element, by which `threads.run` judges whether another thread pays."""

OUT, X, Y = range(3)
_FIELDS = 4
_STEP, _ITEMSIZE, _MOVE, _ROUND = range(_FIELDS)
"""Of an operand: its stride, in elements, along the last dimension; and addresses of functions, 0 for what is not done
with it."""


class Elements(NamedTuple):
    """Where the operands lie, as integers; strides count elements."""

    inner: int
    """Length of the last dimension."""
    blocks: int
    """Along it."""
    pieces: int
    outer: int
    """Other dimensions."""
    dimensions: int
    """Address of each of these, int64: its length, and the operands' strides."""
    operands: int
    """Address of each operand's `_FIELDS`, int64."""
    loop: int
    itemsize: int
    """Of the accumulate dtype."""


@inner
def _place(g, operand, row):  # type: ignore[no-untyped-def]
    """Elements to the first one of a row, the index of the other dimensions in C order."""
    return offset(g.dimensions, 4, 0, g.outer, row, 1 + operand)


@inner
def _read(g, operand, address, row, first, length, target):  # type: ignore[no-untyped-def]
    field = pointer(g.operands + operand * _FIELDS * 8, np.int64)
    source = address + (_place(g, operand, row) + first * field[_STEP]) * field[_ITEMSIZE]
    invoke(field[_MOVE], (target, length, source, 0, field[_STEP], 1, length))
    if field[_ROUND] != 0:
        invoke(field[_ROUND], (target, length))


@kernel
def _pieces(kind, g, out, x, y, a, b, workspace, counter):  # type: ignore[no-untyped-def]
    size = _BLOCK * g.itemsize
    second = workspace + size
    if y == 0:
        place = pointer(second, kind)
        for i in range(_BLOCK):
            place[i] = kind(a)
    while True:
        piece = take(counter)
        if piece >= g.pieces:
            return
        row, first = piece // g.blocks, piece % g.blocks * _BLOCK
        length = min(g.inner - first, _BLOCK)
        _read(g, X, x, row, first, length, workspace)
        if y != 0:
            _read(g, Y, y, row, first, length, second)
        invoke(g.loop, (workspace, second, a, b, length))
        field = pointer(g.operands, np.int64)
        target = out + (_place(g, OUT, row) + first * field[_STEP]) * field[_ITEMSIZE]
        invoke(field[_MOVE], (target, 0, field[_STEP], workspace, length, 1, length))


@functools.cache
def _loop(name: str, accumulate: str) -> int:
    """The address of a function's loop over `count` elements: loop(x, y, a, b, count), where x becomes the result."""
    element, kind = function(name, accumulate), FLOAT[accumulate]

    def loop(x, y, a, b, count):  # type: ignore[no-untyped-def]
        xs, ys, s, t = pointer(x, kind), pointer(y, kind), kind(a), kind(b)
        for i in range(count):
            xs[i] = element(xs[i], ys[i], s, t)

    arguments = (types.int64, types.int64, types.float64, types.float64, types.int64)
    return address_of(loop, *arguments, name=f"{name} {accumulate}")


def prepare(spec: ElementwiseSpec) -> ElementwiseLaunch:
    """The launch for an elementwise function."""
    accumulate = ACCUMULATE[spec.out.dtype]
    shape = spec.out.shape or (1,)
    layouts = [spec.out, spec.x, spec.y or spec.x]
    strides = [layout.strides or (0,) for layout in layouts]
    dimensions = np.array([(n, *steps) for n, *steps in zip(shape, *strides, strict=True)], np.int64)
    operands = np.zeros((len(layouts), _FIELDS), np.int64)
    rounds = ITEMSIZE[spec.out.dtype] == 2
    for i, (layout, steps) in enumerate(zip(layouts, strides, strict=True)):
        move = reader(layout.dtype, accumulate) if i else writer(accumulate, layout.dtype)
        rounding = rounder(spec.out.dtype) if i and rounds and layout.dtype != spec.out.dtype else 0
        operands[i] = steps[-1], ITEMSIZE[layout.dtype], move, rounding
    blocks = -(-shape[-1] // _BLOCK)
    rows = int(np.prod(shape[:-1], dtype=np.int64))
    g = Elements(
        inner=shape[-1],
        blocks=blocks,
        pieces=rows * blocks,
        outer=len(shape) - 1,
        dimensions=dimensions.ctypes.data,
        operands=operands.ctypes.data,
        loop=_loop(spec.operation, accumulate),
        itemsize=ITEMSIZE[accumulate],
    )
    kind, cost = FLOAT[accumulate], rows * shape[-1] * _NANOSECONDS

    def launch(stream: int, out: int, x: int, y: int = 0, a: float = 0.0, b: float = 0.0) -> None:
        assert (dimensions.ctypes.data, operands.ctypes.data) == (g.dimensions, g.operands)  # the kernel reads them
        counter = np.zeros(1, np.int64)

        def work() -> None:
            memory = np.empty(2 * _BLOCK * g.itemsize, np.uint8)
            _pieces(kind, g, out, x, y, a, b, memory.ctypes.data, counter.ctypes.data)

        threads.run(work, g.pieces, cost)

    return launch
