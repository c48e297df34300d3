"""Matrix products: the driver around the inner loops of `fma.py` and `tensor_core.py`.

The product is cut into pieces that threads take one by one: a block of rows of a times a block of columns of b, over
the whole of K. First the rows of a are packed into panels (see `panels.py`), all of them, in parallel. Then each piece
walks K in stretches of DEPTH: it packs its block of b for the stretch into panels that fit the second-level cache, and
lets the inner loop run over every pair of panels, the accumulators waiting in memory between stretches, unrounded. At
the end of K come the epilogue and the one rounding to the result. K is never split, and no element sees more than its
own row and column, so neither the cuts nor the threads decide any bit.

Packing b pays only where enough rows of a use it; a product of few rows reads b where it lies (see `stream.py`).

A product with few columns and more rows is computed transposed: the inner loop's vectors run along the columns. That
changes no bit either, since a product of two numbers does not depend on their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ...contract import ACCUMULATE, ARITHMETIC, ITEMSIZE
from ...specs import Layout, MatmulSpec
from .. import MatmulLaunch
from . import fma, tensor_core, threads
from .compile import address_of, inner, invoke, kernel
from .convert import reader, writer
from .numerics import FLOAT, offset, pointer, take
from .numerics import fma as fused
from .panels import Panels
from .stream import Stream, stream

DEPTH = 256
"""Elements of K in a stretch: a panel of b for it, and one of a, fit the first-level cache together."""

_COLUMNS = 256
"""Most columns of b in a piece: its panels for a stretch fill about a quarter of the second-level cache."""

_ROWS = 1024
"""Most rows of a in a piece, so that packing b again for each block of rows costs little."""

_PACKED_BYTES = 64 << 20
"""About how much of a is packed at a time; a product with more of it is computed in several rounds."""

_STRIP = 8
"""Rows that the epilogue takes at a time."""

_STEP = 16
"""Elements of K to pack at a time where neighbours in memory have the same k: stretches of few rows, the longer."""

_PAGE = 4096


class Geometry(NamedTuple):
    """What the kernels need to know of a product, as integers; strides count elements."""

    m: int
    n: int
    k: int
    a_m: int
    a_k: int
    b_k: int
    b_n: int
    c_m: int
    c_n: int
    out_m: int
    out_n: int
    itemsize: int
    """Of an element of a and b."""
    c_itemsize: int
    out_itemsize: int
    accumulate_itemsize: int
    dimensions: int
    """Of the batch."""
    batch: int
    """Address of (length, a's, b's, c's, out's stride) for each of the batch dimensions, int64."""
    block_rows: int
    """Rows of a piece, a multiple of a panel's."""
    block_columns: int
    panel_rows: int
    panel_columns: int
    group: int
    header: int
    words: int
    read: int
    """Address of the reader of a's and b's dtype."""
    read_c: int
    write: int
    multiply: int
    finish: int
    epilogue: int
    stream: int
    """Address of the loop that reads b where it lies (see `stream.py`); 0: b is packed."""
    stream_depth: int


# ----------------------------------------------------------------------------------------------------------- kernels


@inner
def _ceil(x, y):  # type: ignore[no-untyped-def]
    return (x + y - 1) // y


@inner
def _offset(g, index, operand):  # type: ignore[no-untyped-def]
    """Elements from the start of an operand to its matrix number `index` of the batch."""
    return offset(g.batch, 5, 0, g.dimensions, index, operand)


@inner
def _panel_bytes(g, width):  # type: ignore[no-untyped-def]
    return g.header + DEPTH * width * g.words * g.accumulate_itemsize


@inner
def _packed_bytes(g):  # type: ignore[no-untyped-def]
    """Of one block of rows of a."""
    return max(1, _ceil(g.k, DEPTH)) * (g.block_rows // g.panel_rows) * _panel_bytes(g, g.panel_rows)


@inner
def _width(rows, full):  # type: ignore[no-untyped-def]
    """Of the panel of a that holds this many rows."""
    width = 1
    while width < rows and width < full:
        width *= 2
    return width


@inner
def _pack(g, target, panel_bytes, width, source, k_stride, stride, depth, count):  # type: ignore[no-untyped-def]
    """Pack `count` rows of a, or columns of b, into panels of this width; their depth, a multiple of the group."""
    rounded = _ceil(depth, g.group) * g.group
    leading = width * g.words
    for j in range(0, count, width):
        if count - j < width or depth < rounded:
            values = pointer(target + j // width * panel_bytes + g.header, np.int32)
            for i in range(rounded * leading * g.accumulate_itemsize // 4):
                values[i] = 0
    step = _STEP if stride == 1 else max(1, depth)
    for k in range(0, depth, step):
        for j in range(0, count, width):
            place = target + j // width * panel_bytes + g.header + k * leading * g.accumulate_itemsize
            start = source + (k * k_stride + j * stride) * g.itemsize
            rows, columns = min(depth - k, step), min(count - j, width)
            invoke(g.read, (place, leading, start, k_stride, stride, rows, columns))
    if g.finish != 0:
        for j in range(0, count, width):
            invoke(g.finish, (target + j // width * panel_bytes, rounded, width))
    return rounded


@kernel
def _pack_rows(g, a, first, blocks, packed, counter):  # type: ignore[no-untyped-def]
    """Pack blocks of rows of a; a piece is one panel's rows, for all of K."""
    row_blocks = _ceil(g.m, g.block_rows)
    panels = g.block_rows // g.panel_rows
    panel_bytes = _panel_bytes(g, g.panel_rows)
    while True:
        piece = take(counter)
        if piece >= blocks * panels:
            return
        block, panel = piece // panels, piece % panels
        matrix, row_block = (first + block) // row_blocks, (first + block) % row_blocks
        row = row_block * g.block_rows + panel * g.panel_rows
        count = min(g.m - row, g.panel_rows)
        if count <= 0:
            continue
        width = _width(count, g.panel_rows)
        source = a + (_offset(g, matrix, 1) + row * g.a_m) * g.itemsize
        target = packed + block * _packed_bytes(g) + panel * panel_bytes
        for k in range(0, g.k, DEPTH):
            depth = min(g.k - k, DEPTH)
            _pack(g, target, panel_bytes, width, source + k * g.a_k * g.itemsize, g.a_k, g.a_m, depth, count)
            target += panels * panel_bytes


@inner
def _multiply_packed(g, acc, a_panel, workspace, b, skip, depth, rows, columns, first):  # type: ignore[no-untyped-def]
    """Pack a block of b, without its first `skip` rows, and multiply it by all panels of a."""
    b_bytes = _panel_bytes(g, g.panel_columns)
    first = np.int64(first != 0 and skip == 0)
    rest = b + skip * g.b_k * g.itemsize
    rounded = _pack(g, workspace, b_bytes, g.panel_columns, rest, g.b_k, g.b_n, depth - skip, columns)
    for i in range(0, rows, g.panel_rows):
        width = _width(rows - i, g.panel_rows)
        a_place = a_panel + i // g.panel_rows * _panel_bytes(g, g.panel_rows) + skip * width * g.accumulate_itemsize
        for j in range(0, columns, g.panel_columns):
            tile = acc + (i * g.block_columns + j) * g.accumulate_itemsize
            b_place = workspace + j // g.panel_columns * b_bytes
            invoke(g.multiply, (tile, g.block_columns, a_place, b_place, rounded, width, first))


@inner
def _multiply_streamed(g, acc, a_panel, workspace, b, depth, rows, columns, first):  # type: ignore[no-untyped-def]
    """Multiply a block of b, where it lies, by all panels of a; what the streaming loop does not take is packed."""
    streamed_depth = depth - depth % g.stream_depth
    streamed = columns - columns % g.panel_columns
    for i in range(0, rows, g.panel_rows):
        width = _width(rows - i, g.panel_rows)
        a_place = a_panel + i // g.panel_rows * _panel_bytes(g, g.panel_rows)
        tile = acc + i * g.block_columns * g.accumulate_itemsize
        stride = g.b_k if g.b_n == 1 else g.b_n
        invoke(g.stream, (tile, g.block_columns, a_place, b, stride, streamed_depth, streamed, width, first))
    if streamed_depth < depth:
        _multiply_packed(g, acc, a_panel, workspace, b, streamed_depth, depth, rows, streamed, first)
    if streamed < columns:
        acc += streamed * g.accumulate_itemsize
        b += streamed * g.b_n * g.itemsize
        _multiply_packed(g, acc, a_panel, workspace, b, 0, depth, rows, columns - streamed, first)


@kernel
def _compute(g, a, b, c, out, alpha, beta, start, blocks, packed, workspace, counter):  # type: ignore[no-untyped-def]
    """Compute pieces of the result, from rows of a that `_pack_rows` has packed.

    The workspace holds the panels of b, the accumulators and a strip of c.
    """
    row_blocks, column_blocks = _ceil(g.m, g.block_rows), _ceil(g.n, g.block_columns)
    size = g.accumulate_itemsize
    a_panels = g.block_rows // g.panel_rows
    a_bytes, b_bytes = _panel_bytes(g, g.panel_rows), _panel_bytes(g, g.panel_columns)
    acc = workspace + g.block_columns // g.panel_columns * b_bytes
    leading = g.block_columns
    addend = acc + g.block_rows * leading * size
    while True:
        piece = take(counter)
        if piece >= blocks * column_blocks:
            return
        block, column = piece // column_blocks, piece % column_blocks * g.block_columns
        matrix, row = (start + block) // row_blocks, (start + block) % row_blocks * g.block_rows
        rows, columns = min(g.m - row, g.block_rows), min(g.n - column, g.block_columns)
        b_source = b + (_offset(g, matrix, 2) + column * g.b_n) * g.itemsize
        a_panel = packed + block * _packed_bytes(g)

        for k in range(0, max(1, g.k), DEPTH):
            depth, source = min(g.k - k, DEPTH), b_source + k * g.b_k * g.itemsize
            first = np.int64(k == 0)
            if g.stream != 0:
                _multiply_streamed(g, acc, a_panel, workspace, source, depth, rows, columns, first)
            else:
                _multiply_packed(g, acc, a_panel, workspace, source, 0, depth, rows, columns, first)
            a_panel += a_panels * a_bytes

        out_at = _offset(g, matrix, 4) + row * g.out_m + column * g.out_n
        c_at = _offset(g, matrix, 3) + row * g.c_m + column * g.c_n
        for i in range(0, rows, _STRIP):
            strip = min(rows - i, _STRIP)
            values = acc + i * leading * size
            if c != 0:
                source = c + (c_at + i * g.c_m) * g.c_itemsize
                invoke(g.read_c, (addend, leading, source, g.c_m, g.c_n, strip, columns))
            invoke(g.epilogue, (values, addend if c != 0 else 0, leading, strip, columns, alpha, beta))
            target = out + (out_at + i * g.out_m) * g.out_itemsize
            invoke(g.write, (target, g.out_m, g.out_n, values, leading, strip, columns))


def _epilogue(accumulate: str) -> Callable[..., None]:
    kind: Any = FLOAT[accumulate]
    size = ITEMSIZE[accumulate]

    def epilogue(acc, addend, leading, rows, columns, alpha, beta):  # type: ignore[no-untyped-def]
        scale, factor, zero, one = kind(alpha), kind(beta), kind(0), kind(1)
        for i in range(rows):
            t = pointer(acc + i * leading * size, kind)
            c = pointer(addend + i * leading * size, kind)
            for j in range(columns):
                t[j] += zero  # an underflow to -0 becomes +0
            if scale != one:
                for j in range(columns):
                    t[j] *= scale
            if addend != 0:
                for j in range(columns):
                    t[j] = fused(factor, c[j], t[j])

    return epilogue


@functools.cache
def _epilogue_address(accumulate: str) -> int:
    return address_of(_epilogue(accumulate), *[types.int64] * 5, types.float64, types.float64)


# ------------------------------------------------------------------------------------------------------------ driver


def prepare(spec: MatmulSpec) -> MatmulLaunch:
    """The launch for a product."""
    m, n, _ = spec.mnk
    panels = _panels(spec)
    if n < min(m, panels.columns):
        launch = _launch(_transposed(spec), panels)

        def swap(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
            launch(stream, out, b, a, c, alpha, beta)

        return swap
    return _launch(spec, panels)


def _panels(spec: MatmulSpec) -> Panels:
    if ARITHMETIC[spec.arithmetic].is_tensor_core:
        return tensor_core.panels(spec.arithmetic, spec.a.dtype)
    return fma.panels(ACCUMULATE[spec.a.dtype])


def _stream(spec: MatmulSpec) -> Stream | None:
    m, _, k = spec.mnk
    if ARITHMETIC[spec.arithmetic].is_tensor_core or k == 0:
        return None
    return stream(spec.a.dtype, ACCUMULATE[spec.a.dtype], m, *spec.b.strides[-2:])


def _transposed(spec: MatmulSpec) -> MatmulSpec:
    def swap(layout: Layout) -> Layout:
        *batch, rows, columns = range(len(layout.shape))
        order = (*batch, columns, rows)
        return Layout(layout.dtype, tuple(layout.shape[i] for i in order), tuple(layout.strides[i] for i in order))

    return spec._replace(a=swap(spec.b), b=swap(spec.a), c=None if spec.c is None else swap(spec.c), out=swap(spec.out))


def _launch(spec: MatmulSpec, panels: Panels) -> MatmulLaunch:
    m, n, k = spec.mnk
    accumulate = ACCUMULATE[spec.a.dtype]
    size = ITEMSIZE[accumulate]
    c = spec.c or spec.out
    batch = 1
    for length in spec.batch:
        batch *= length
    table = np.array(
        [spec.batch, *(layout.strides[:-2] for layout in (spec.a, spec.b, c, spec.out))], np.int64
    ).T.copy()
    streaming = _stream(spec)
    most_columns, pieces = (streaming.columns, _STREAMED_PIECES) if streaming else (_COLUMNS, _PIECES)
    block_rows, block_columns = _blocks(m, n, batch, panels, most_columns, pieces * threads.limit())
    g = Geometry(
        m=m,
        n=n,
        k=k,
        a_m=spec.a.strides[-2],
        a_k=spec.a.strides[-1],
        b_k=spec.b.strides[-2],
        b_n=spec.b.strides[-1],
        c_m=c.strides[-2],
        c_n=c.strides[-1],
        out_m=spec.out.strides[-2],
        out_n=spec.out.strides[-1],
        itemsize=ITEMSIZE[spec.a.dtype],
        c_itemsize=ITEMSIZE[c.dtype],
        out_itemsize=ITEMSIZE[spec.out.dtype],
        accumulate_itemsize=size,
        dimensions=len(spec.batch),
        batch=table.ctypes.data,
        block_rows=block_rows,
        block_columns=block_columns,
        panel_rows=panels.rows,
        panel_columns=panels.columns,
        group=panels.group,
        header=panels.header,
        words=panels.words,
        read=reader(spec.a.dtype, accumulate),
        read_c=reader(spec.c.dtype, accumulate) if spec.c else 0,
        write=writer(accumulate, spec.out.dtype),
        multiply=panels.multiply,
        finish=panels.finish,
        epilogue=_epilogue_address(accumulate),
        stream=streaming.multiply if streaming else 0,
        stream_depth=streaming.depth if streaming else 0,
    )
    column_panels = block_columns // panels.columns
    row_panels = block_rows // panels.rows
    a_panel, b_panel = (panels.header + DEPTH * width * panels.words * size for width in (panels.rows, panels.columns))
    workspace_bytes = column_panels * b_panel + (block_rows + _STRIP) * block_columns * size
    packed_bytes = max(1, -(-k // DEPTH)) * row_panels * a_panel
    blocks = batch * -(-m // block_rows)
    column_blocks = -(-n // block_columns)
    round_blocks = max(1, min(blocks, _PACKED_BYTES // packed_bytes))
    packing_cost = block_rows * k * _NANOSECONDS_PER_PACKED
    block_cost = block_rows * n * k * panels.words * _NANOSECONDS_PER_PRODUCT + n * k * _NANOSECONDS_PER_PACKED

    def launch(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        assert table.ctypes.data == g.batch  # the kernels read it
        packed = _aligned(round_blocks * packed_bytes)
        for first in range(0, blocks, round_blocks):
            count = min(blocks - first, round_blocks)
            counters = np.zeros(2, np.int64)
            counter = counters.ctypes.data

            def pack(first: int = first, count: int = count, counter: int = counter) -> None:
                _pack_rows(g, a, first, count, packed.ctypes.data, counter)

            def compute(first: int = first, count: int = count, counter: int = counter + 8) -> None:
                workspace = _aligned(workspace_bytes)
                _compute(
                    g,
                    a,
                    b,
                    c,
                    out,
                    float(alpha),
                    float(beta),
                    first,
                    count,
                    packed.ctypes.data,
                    workspace.ctypes.data,
                    counter,
                )

            threads.run(pack, count * row_panels, count * packing_cost)
            threads.run(compute, count * column_blocks, count * block_cost)

    return launch


_NANOSECONDS_PER_PRODUCT = 1 / 40
_NANOSECONDS_PER_PACKED = 0.4
"""Rough costs, by which `threads.run` judges whether another thread pays."""


def _aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Uninitialised memory that begins where a page does."""
    memory = np.empty(size + _PAGE, np.uint8)
    return memory[-memory.ctypes.data % _PAGE :]


def _blocks(m: int, n: int, batch: int, panels: Panels, most_columns: int, wanted: int) -> tuple[int, int]:
    """Rows and columns of a piece: large enough to pay for the packing, small enough for as many pieces as wanted."""

    def fit(length: int, most: int, step: int) -> int:
        """Cut into equal parts of at most `most`, each a multiple of `step`."""
        parts = max(1, -(-length // most))
        return -(-length // (parts * step)) * step

    rows, columns = fit(m, _ROWS, panels.rows), fit(n, most_columns, panels.columns)
    while batch * -(-m // rows) * -(-n // columns) < wanted and max(rows, columns) > _LEAST_PIECE:
        if columns * 2 > rows and columns > panels.columns:
            columns = fit(n, columns // 2, panels.columns)
        elif rows > panels.rows:
            rows = fit(m, rows // 2, panels.rows)
        else:
            break
    return rows, columns


_PIECES = 4
"""Wanted for each thread, so that none waits long for the last one."""
_STREAMED_PIECES = 2
"""The same where b is streamed: long rows of b are read faster."""
_LEAST_PIECE = 64
