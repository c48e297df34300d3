"""The mean: the sum tree of a row, divided by its length.

A piece of the work is a group of rows. Where there are too few groups to go round it is a chunk of a group: the chunks'
sums are gathered, and added up when all are there.
"""

from __future__ import annotations

import numpy as np

from ...contract import ACCUMULATE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from ...views import View
from .. import ReductionLaunch
from . import threads
from .compile import inner, invoke, kernel
from .numerics import FLOAT, pointer, take
from .rows import Table, describe, group_rows, group_start, read_stretch
from .sum_tree import sum_chunk, sum_tree

_NANOSECONDS_PER_ELEMENT = 0.3
"""A rough cost, by which `threads.run` judges whether another thread pays."""


@kernel
def _mean_of_groups(kind, g, x, out, sums, workspace, counter):  # type: ignore[no-untyped-def]
    """Take whole groups; `sums` and `workspace` are this thread's own."""
    while True:
        group = take(counter)
        if group >= g.groups:
            return
        for chunk in range(g.chunks):
            _sum_chunk(kind, g, x, group, chunk, sums + chunk * g.width * g.itemsize, workspace)
        _finish(kind, g, out, group, sums, workspace)


@kernel
def _sum_chunks(kind, g, x, sums, workspace, counter):  # type: ignore[no-untyped-def]
    """Take chunks of any group; `sums` has room for the sums of all."""
    while True:
        piece = take(counter)
        if piece >= g.groups * g.chunks:
            return
        target = sums + piece * g.width * g.itemsize
        _sum_chunk(kind, g, x, piece // g.chunks, piece % g.chunks, target, workspace)


@kernel
def _finish_groups(kind, g, out, sums, workspace):  # type: ignore[no-untyped-def]
    for group in range(g.groups):
        _finish(kind, g, out, group, sums + group * g.chunks * g.width * g.itemsize, workspace)


@inner
def _sum_chunk(kind, g, x, group, chunk, target, workspace):  # type: ignore[no-untyped-def]
    first = chunk * SUM_CHUNK
    length = min(g.n - first, SUM_CHUNK)
    values = workspace + 2 * SUM_LANES * g.width * g.itemsize
    read_stretch(g, x, group, first, length, values)
    sum_chunk(kind, g.itemsize, values, length, g.width, workspace, target)


@inner
def _finish(kind, g, out, group, sums, workspace):  # type: ignore[no-untyped-def]
    sum_tree(kind, g.itemsize, sums, g.chunks, g.width, workspace)
    total, n = pointer(sums, kind), kind(g.n)
    for c in range(g.width):
        total[c] /= n
    target = out + group_start(g, group, 2) * g.out_itemsize
    invoke(g.write, (target, 0, g.out_row, sums, g.width, 1, group_rows(g, group)))


def prepare(spec: ReductionSpec) -> ReductionLaunch:
    """The launch for a mean."""
    g, table = describe(spec)
    kind = FLOAT[ACCUMULATE[spec.out.dtype]]
    sums_bytes = g.chunks * g.width * g.itemsize
    workspace_bytes = (2 * SUM_LANES + SUM_CHUNK) * g.width * g.itemsize
    cost = g.groups * g.width * max(g.n, SUM_LANES) * _NANOSECONDS_PER_ELEMENT

    def launch(out: View, x: View, table: Table = table) -> None:  # keeps the table alive
        counter = np.zeros(1, np.int64)

        if g.chunks == 1 or g.groups >= threads.FEW * threads.limit():

            def work() -> None:
                memory = np.empty(workspace_bytes + sums_bytes, np.uint8)
                workspace = memory.ctypes.data
                _mean_of_groups(
                    kind, g, x.pointer, out.pointer, workspace + workspace_bytes, workspace, counter.ctypes.data
                )

            threads.run(work, g.groups, cost)
            return

        sums = np.empty(g.groups * sums_bytes, np.uint8)

        def work_on_chunks() -> None:
            memory = np.empty(workspace_bytes, np.uint8)
            _sum_chunks(kind, g, x.pointer, sums.ctypes.data, memory.ctypes.data, counter.ctypes.data)

        threads.run(work_on_chunks, g.groups * g.chunks, cost)

        def finish() -> None:
            memory = np.empty(workspace_bytes, np.uint8)
            _finish_groups(kind, g, out.pointer, sums.ctypes.data, memory.ctypes.data)

        threads.run(finish, 1, 0)

    return launch
