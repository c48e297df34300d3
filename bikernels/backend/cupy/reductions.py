"""Reductions: brings the layout into order, fills the kernels' parameters, and picks kernels and launch shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK
from ...specs import ReductionSpec, contiguous_strides, merge_dimensions
from ...views import Device, View
from .. import ReductionLaunch
from . import schedules
from .compile import Kernel
from .launch import ADDRESS, Argument, Launch, gpu, load, shaped, workspace
from .parameters import DTYPE_CODE, REDUCTION, divisor, fill_dims
from .schedules import ColumnSchedule, RowSchedule


class _Rows(NamedTuple):
    """Rows to reduce: their first elements by the `kept` dimensions, their elements by the `row` dimensions."""

    kept: tuple[int, ...]
    row: tuple[int, ...]
    x_dtype: str
    out_dtype: str
    x: tuple[tuple[int, ...], tuple[int, ...]]
    """Strides along kept and row."""
    out: tuple[tuple[int, ...], tuple[int, ...]]
    divisor: int
    """Of a mean: the length of the rows that the caller gave."""
    rounds: bool
    """Whether x has to be rounded to the result's dtype first, where reading it to the accumulate dtype does not."""

    @property
    def number(self) -> int:
        return math.prod(self.kept)

    @property
    def n(self) -> int:
        return math.prod(self.row)

    @property
    def chunks(self) -> int:
        return -(-self.n // SUM_CHUNK)

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[self.out_dtype]

    @property
    def element(self) -> str:
        """As what x is read: see schedules.py."""
        return schedules.element_of(self.x_dtype, self.accumulate, self.rounds)

    @property
    def in_columns(self) -> bool:
        """Whether neighbouring rows lie closer than a row's elements, which then lie a fixed step apart."""
        if len(self.row) != 1 or not self.kept or self.kept[-1] < schedules.MIN_COLUMNS:
            return False
        return abs(self.x[0][-1]) < abs(self.x[1][0])

    @property
    def width(self) -> int:
        """Columns that a thread takes: those of a vector, if they lie side by side wherever they begin, or 1."""
        width = schedules.vector_width(self.element)
        *others, last = self.x[0]
        lines_up = self.kept[-1] % width == 0 and all(step % width == 0 for step in (*others, *self.x[1]))
        return width if last == 1 and lines_up else 1

    def of_sums(self, kept: tuple[int, ...], step: int) -> _Rows:
        """The next level of the tree: a row's chunk sums, `step` apart, in the accumulate dtype."""
        return self._replace(row=(self.chunks,), x_dtype=self.accumulate, x=(kept, (step,)), rounds=False)

    def parameters(self, operation: str) -> Any:
        parameters = np.zeros((), REDUCTION)
        parameters["rows"], parameters["n"], parameters["divisor"] = self.number, self.n, self.divisor
        parameters["chunks"] = divisor(max(1, self.chunks))
        parameters["x_dtype"], parameters["out_dtype"] = DTYPE_CODE[self.x_dtype], DTYPE_CODE[self.out_dtype]
        parameters["rounds"] = self.rounds
        parameters["logarithm"] = operation == "log_softmax"
        parameters["kept"], parameters["count"] = len(self.kept), len(self.kept) + len(self.row)
        if len(self.row) == 1:
            parameters["x_step"], parameters["out_step"] = self.x[1][0], self.out[1][0]
        fill_dims(parameters["dims"], self.kept + self.row, self.x[0] + self.x[1], self.out[0] + self.out[1])
        return parameters


def _rows_of(spec: ReductionSpec) -> _Rows:
    """The rows of a spec, in the order in which they lie: which row comes first decides nothing."""
    kept, row = spec.x.shape[: spec.kept], spec.x.shape[spec.kept :]
    x_kept, x_row = spec.x.strides[: spec.kept], spec.x.strides[spec.kept :]
    out_kept = spec.out.strides[: spec.kept]
    out_row = spec.out.strides[spec.kept :] or (0,) * len(row)
    order = sorted(range(len(kept)), key=lambda axis: -abs(x_kept[axis]))
    kept, (x_kept, out_kept) = merge_dimensions(*(tuple(v[axis] for axis in order) for v in (kept, x_kept, out_kept)))
    rounds = ITEMSIZE[spec.out.dtype] == 2 and spec.x.dtype != spec.out.dtype
    return _Rows(kept, row, spec.x.dtype, spec.out.dtype, (x_kept, x_row), (out_kept, out_row), math.prod(row), rounds)


Step = Callable[[int, int, int, int], None]
"""step(stream, out, x, workspace): queue one kernel; the last three are addresses."""


class _Plan:
    """The kernels of a reduction, in order, and the workspace between them."""

    def __init__(self, device: Device) -> None:
        self.gpu, self.index = gpu(device.index), device.index
        self.steps: list[Step] = []
        self.bytes = 0

    def reserve(self, elements: int, dtype: str) -> int:
        """Place an array in the workspace; its offset, in bytes."""
        offset = self.bytes
        self.bytes += -(-elements * ITEMSIZE[dtype] // 256) * 256
        return offset

    def shape(
        self,
        kernel: Kernel,
        name: str,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        cluster: int = 1,
        overlapping: bool = False,
    ) -> Launch:
        """See `launch.shaped`."""
        function = load(kernel, name, self.index, shared_bytes)
        overlapping = overlapping and self.gpu.compute_capability >= schedules.FIRST_WITH_CLUSTERS
        return shaped(function, grid, block, shared_bytes, arguments, cluster=cluster, overlapping=overlapping)

    def launch(self) -> ReductionLaunch:
        steps, size, index = tuple(self.steps), self.bytes, self.index

        def launch(out: View, x: View) -> None:
            (step,) = steps
            step(out.stream, out.pointer, x.pointer, 0)

        def launch_with_workspace(out: View, x: View) -> None:
            stream = out.stream
            with cupy.cuda.Device(index), workspace(size, index, stream) as address:
                for step in steps:
                    step(stream, out.pointer, x.pointer, address)

        return launch_with_workspace if size else launch


def prepare(spec: ReductionSpec, device: Device) -> ReductionLaunch:
    """See `bikernels.backend.Backend.prepare_reduction`."""
    rows, plan = _rows_of(spec), _Plan(device)
    if spec.operation == "mean":
        _plan_mean(plan, rows)
    else:
        _plan_softmax(plan, rows, spec.operation)
    return plan.launch()


def _plan_mean(plan: _Plan, rows: _Rows) -> None:
    """Levels of the tree through the workspace while rows are to be spread over the GPU, then the mean."""
    source: int | None = None  # the workspace offset of what is summed; None: x
    if rows.in_columns:
        while schedules.splits_columns(rows.number, rows.n, rows.width, plan.gpu, source is None):
            source, rows = _plan_column_sums(plan, rows, source)
        run = column_launch(plan, rows, "mean", choose_columns(plan, rows))
    else:
        while (schedule := _choose_rows(plan, rows, "mean")) is None:
            source, rows = _plan_row_sums(plan, rows, source)
        run = row_launch(plan, rows, "mean", schedule)

    def mean(stream: int, out: int, x: int, workspace: int) -> None:
        run(stream, out, x if source is None else workspace + source)

    plan.steps.append(mean)


def _choose_rows(plan: _Plan, rows: _Rows, operation: str) -> RowSchedule | None:
    """The schedule of a team for each row; None if chunks are to be spread over the GPU."""
    kept = schedules.kept(operation, rows.element, rows.accumulate)
    chosen = schedules.choose_row_schedule(rows.number, rows.n, kept, plan.gpu)
    return None if schedules.splits_rows(rows.number, rows.n, plan.gpu, chosen is not None) else chosen


def choose_columns(plan: _Plan, rows: _Rows) -> ColumnSchedule:
    """The schedule for rows side by side."""
    return schedules.choose_column_schedule(rows.number, rows.n, rows.width, plan.gpu)


def row_launch(plan: _Plan, rows: _Rows, operation: str, schedule: RowSchedule) -> Launch:
    """A launch of rows.cu, called with the addresses of out and x."""
    kept = schedules.kept(operation, rows.element, rows.accumulate)
    return plan.shape(
        schedules.row_kernel(operation, rows.element, rows.out_dtype, schedule.team),
        "reduce_rows",
        -(-rows.number // schedule.rows) * schedule.ctas,
        schedule.warps * 32,
        kept.bytes(schedule, rows.n),
        (
            rows.parameters(operation),
            np.int32(schedule.lanes),
            np.int32(kept.of_warp(schedule, rows.n)),
            ADDRESS,
            ADDRESS,
        ),
        cluster=schedule.ctas,
        overlapping=True,
    )


def column_launch(plan: _Plan, rows: _Rows, operation: str, schedule: ColumnSchedule) -> Launch:
    """A launch of columns.cu, called with the addresses of out and x."""
    return plan.shape(
        schedules.column_kernel(operation, rows.element, rows.accumulate, schedule.width, schedule.ctas > 1),
        "reduce_columns",
        -(-rows.number // schedule.tile) * schedule.ctas,
        schedule.threads,
        schedule.bytes(rows.n, rows.accumulate),
        (rows.parameters(operation), np.int32(schedule.bits), ADDRESS, ADDRESS),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _plan_row_sums(plan: _Plan, rows: _Rows, source: int | None) -> tuple[int, _Rows]:
    """One level: the sums of all chunks, row by row. Returns where they are, and their layout."""
    target = plan.reserve(rows.number * rows.chunks, rows.accumulate)
    grid = -(-rows.number * rows.chunks // 4)
    kernel = schedules.chunk_kernel("row_chunks.cu", rows.element, rows.accumulate)
    run = plan.shape(kernel, "sum_chunks", grid, 128, 0, (rows.parameters("mean"), ADDRESS, ADDRESS))

    def sums(stream: int, out: int, x: int, workspace: int) -> None:
        run(stream, workspace + target, x if source is None else workspace + source)

    plan.steps.append(sums)
    kept = tuple(step * rows.chunks for step in contiguous_strides(rows.kept))
    return target, rows.of_sums(kept, 1)


def _plan_column_sums(plan: _Plan, rows: _Rows, source: int | None) -> tuple[int, _Rows]:
    """One level: the sums of all chunks, chunk by chunk, those of neighbouring rows side by side."""
    target = plan.reserve(rows.number * rows.chunks, rows.accumulate)
    schedule = schedules.column_schedules(rows.n, rows.width, plan.gpu)[0]
    run = plan.shape(
        schedules.column_chunk_kernel(rows.element, rows.accumulate, schedule.width),
        "sum_column_chunks",
        -(-rows.number // schedule.tile) * rows.chunks,
        schedule.threads,
        schedule.bytes(SUM_CHUNK, rows.accumulate),
        (rows.parameters("mean"), np.int32(schedule.bits), ADDRESS, ADDRESS),
    )

    def sums(stream: int, out: int, x: int, workspace: int) -> None:
        run(stream, workspace + target, x if source is None else workspace + source)

    plan.steps.append(sums)
    return target, rows.of_sums(contiguous_strides(rows.kept), rows.number)


def _plan_softmax(plan: _Plan, rows: _Rows, operation: str) -> None:
    if rows.in_columns and rows.chunks <= schedules.MAX_COLUMN_CHUNKS:
        run = column_launch(plan, rows, operation, choose_columns(plan, rows))
    elif (schedule := _choose_rows(plan, rows, operation)) is not None:
        run = row_launch(plan, rows, operation, schedule)
    else:
        _plan_split_softmax(plan, rows, operation)
        return

    def softmax(stream: int, out: int, x: int, workspace: int) -> None:
        run(stream, out, x)

    plan.steps.append(softmax)


def _plan_split_softmax(plan: _Plan, rows: _Rows, operation: str) -> None:
    """The steps of softmax_split_rows.cu."""
    kernel = schedules.chunk_kernel("softmax_split_rows.cu", rows.element, rows.accumulate)
    accumulate, parameters = rows.accumulate, rows.parameters(operation)
    all_chunks = rows.number * rows.chunks
    maxima = sums = plan.reserve(all_chunks, accumulate)  # the maxima have been read when the sums are written
    counts = plan.reserve(all_chunks, "uint32")
    maximum, normaliser = plan.reserve(rows.number, accumulate), plan.reserve(rows.number, accumulate)
    grid, chunks = -(-all_chunks // 4), np.int64(rows.chunks)

    def load_for_chunks(name: str, addresses: int) -> Launch:
        return plan.shape(kernel, name, grid, 128, 0, (parameters, *(ADDRESS,) * addresses))

    chunk_maxima = load_for_chunks("chunk_maxima", 2)
    row_maxima = plan.shape(kernel, "row_maxima", rows.number, 512, 0, (chunks, ADDRESS, ADDRESS))
    chunk_exponentials = load_for_chunks("chunk_exponentials", 4)

    def maxima_and_sums(stream: int, out: int, x: int, workspace: int) -> None:
        chunk_maxima(stream, workspace + maxima, x)
        row_maxima(stream, workspace + maximum, workspace + maxima)
        chunk_exponentials(stream, workspace + sums, workspace + counts, workspace + maximum, x)

    plan.steps.append(maxima_and_sums)

    level, level_sums = rows.of_sums(tuple(step * rows.chunks for step in contiguous_strides(rows.kept)), 1), sums
    while level.chunks > schedules.MAX_ROW_CHUNKS:
        level_sums, level = _plan_row_sums(plan, level, level_sums)
    constants = np.int64(level.n), chunks, np.int64(operation == "log_softmax")
    shared_bytes = level.chunks * ITEMSIZE[accumulate]
    arguments = (*constants, ADDRESS, ADDRESS, ADDRESS)
    row_normalisers = plan.shape(kernel, "row_normalisers", rows.number, 512, shared_bytes, arguments)
    write_chunks = load_for_chunks("write_chunks", 4)
    last_sums = level_sums

    def normalise(stream: int, out: int, x: int, workspace: int) -> None:
        row_normalisers(stream, workspace + normaliser, workspace + last_sums, workspace + counts)
        write_chunks(stream, out, workspace + maximum, workspace + normaliser, x)

    plan.steps.append(normalise)
