"""Reductions: brings the layout into order, fills the kernels' parameters, and picks kernels and launch shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK
from ...specs import ReductionSpec, contiguous_strides, merge_dimensions
from ...views import Device
from .. import ReductionLaunch
from . import column_schedules, reduction_operations, row_schedules
from .column_schedules import ColumnSchedule, TallSchedule, TileSchedule
from .compile import Kernel
from .launch import (
    ADDRESS,
    FIRST_WITH_CLUSTERS,
    PORTABLE_CTAS,
    Argument,
    Launch,
    gpu,
    load,
    resident_ctas,
    shaped,
    workspace,
)
from .parameters import ANY, DTYPE_CODE, OPERANDS, REDUCTION, divisor, fill_dims
from .reduction_operations import GROUP_LANES
from .row_schedules import LongSchedule, RegisterSchedule, RingSchedule, RowSchedule, SoftmaxSchedule, Steps

SIDES = OPERANDS[2:]
"""Operands that an operation may have beside x and out."""

COLUMN_SIDES = ("grad", "mean", "rstd")
"""Those that kernels for columns take."""

Addresses = tuple[int, ...]
"""Of those of SIDES that are there, in this order."""


class _Operand(NamedTuple):
    """An operand's dtype and its strides along the dimensions `kept` and `row`."""

    dtype: str
    kept: tuple[int, ...]
    row: tuple[int, ...]


class _Rows(NamedTuple):
    """Rows to reduce: their first elements by the `kept` dimensions, their elements by the `row` dimensions."""

    kept: tuple[int, ...]
    row: tuple[int, ...]
    operands: dict[str, _Operand]
    """By their names in OPERANDS."""
    divisor: float
    """Of sums, rounded to the accumulate dtype by the kernels."""
    eps: float
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
    def x(self) -> _Operand:
        return self.operands["x"]

    @property
    def out_dtype(self) -> str:
        return self.operands["out"].dtype

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[self.out_dtype]

    @property
    def element(self) -> str:
        """As what x, and the gradient with it, are read: see reduction_operations.py."""
        differ = "grad" in self.operands and self.operands["grad"].dtype != self.x.dtype
        return reduction_operations.element_of(self.x.dtype, self.accumulate, self.rounds or differ)

    @property
    def lie_side_by_side(self) -> bool:
        """Whether the elements of a row do, in x and out."""
        return len(self.row) == 1 and self.x.row[0] == 1 and self.operands["out"].row[0] in (0, 1)

    @property
    def line_up(self) -> bool:
        """Whether rows begin where a vector does, if the first one does."""
        return all(step % reduction_operations.vector_width(self.element) == 0 for step in self.x.kept)

    @property
    def in_columns(self) -> bool:
        """Whether neighbouring rows lie closer than a row's elements, which are a fixed step apart or single."""
        if len(self.row) != 1 or not self.kept or self.kept[-1] < column_schedules.MIN_COLUMNS:
            return False
        return self.n == 1 or abs(self.x.kept[-1]) < abs(self.x.row[0])

    @property
    def has_accumulated_statistics(self) -> bool:
        """Whether those that there are have the accumulate dtype."""
        return all(self.operands[name].dtype == self.accumulate for name in ("mean", "rstd") if name in self.operands)

    @property
    def fits_registers(self) -> bool:
        """Whether the kernels for rows in registers read and write such a layout."""
        if self.element != self.out_dtype or len(self.row) != 1 or len(self.kept) > 1:
            return False
        sides = [self.operands[name] for name in ("weight", "bias") if name in self.operands]
        if any(one.dtype != self.element or any(one.kept) for one in sides):
            return False
        if not self.has_accumulated_statistics:
            return False
        return self.n == 1 or all(one.row[0] == 1 for one in self._arrays)

    @property
    def has_whole_vectors(self) -> bool:
        """Whether rows are short, or all begin and end where a vector does if the first one begins so."""
        return self.n < GROUP_LANES or self.steps.are_vectors(reduction_operations.vector_width(self.element))

    @property
    def steps(self) -> Steps:
        """How far apart rows are."""
        width = reduction_operations.vector_width(self.element)
        steps = [step for one in self._arrays for step in one.kept]
        of_rows = [self.operands[name] for name in ("x", "grad", "out") if name in self.operands]
        apart = {tuple(step % width for step in one.kept) for one in of_rows if one in self._arrays}
        return Steps(math.gcd(self.n, *steps, width), len(apart) <= 1)

    @property
    def _arrays(self) -> list[_Operand]:
        """The operands that have an element wherever a row of x has one."""
        found = [self.operands[name] for name in ("x", "grad", "weight", "bias") if name in self.operands]
        out = self.operands["out"]
        return found if out.row == (0,) else [*found, out]

    @property
    def width(self) -> int:
        """Columns that a thread takes: those of a vector, if they lie side by side wherever they begin, statistics have
        the accumulate dtype and 32 bits reach them; or 1.
        """
        statistics = [self.operands[name] for name in ("mean", "rstd") if name in self.operands]
        are_near = all(abs(one.row[0]) * self.n < 2**31 for one in statistics)
        if not (self.kept and are_near and self.has_accumulated_statistics):
            return 1
        width = reduction_operations.vector_width(self.element)
        *others, last = self.x.kept
        lines_up = self.kept[-1] % width == 0 and all(step % width == 0 for step in (*others, *self.x.row))
        return width if last == 1 and lines_up else 1

    @property
    def fits_weight_tiles(self) -> bool:
        """Whether weight_tiles.cu reads and writes such a layout: few elements of a column, columns side by side or
        only one, a gradient that lies as x does, statistics that columns share, and all of it where 32 bits reach.
        """
        if "grad" not in self.operands or len(self.row) != 1 or self.element == ANY:
            return False
        arrays = [self.operands[name] for name in ("x", "grad", "out")]
        statistics = [self.operands[name] for name in ("mean", "rstd") if name in self.operands]
        return (
            0 < self.n <= column_schedules.WEIGHT_ROWS
            and self.has_accumulated_statistics
            and all(one.kept in ((), (1,)) for one in arrays)
            and all(one.kept in ((), (0,)) for one in statistics)
            and all(one.row[0] % self.width == 0 for one in arrays[:2])
            and all(abs(one.row[0]) * self.n + self.number < 2**31 for one in (*arrays[:2], *statistics))
        )

    @property
    def max_column_chunks(self) -> int:
        return column_schedules.MAX_COLUMN_CHUNKS if self.width == 1 else column_schedules.MAX_TILE_CHUNKS

    def of_sums(self, kept: tuple[int, ...], step: int) -> _Rows:
        """The next level of the tree: a row's chunk sums, `step` apart, in the accumulate dtype."""
        operands = {"x": _Operand(self.accumulate, kept, (step,)), "out": self.operands["out"]}
        return self._replace(row=(self.chunks,), operands=operands, rounds=False)

    def parameters(self, operation: str) -> Any:
        parameters = np.zeros((), REDUCTION)
        parameters["rows"], parameters["n"] = self.number, self.n
        parameters["divisor"], parameters["eps"] = self.divisor, self.eps
        parameters["chunks"] = divisor(max(1, self.chunks))
        parameters["rounds"] = self.rounds
        parameters["logarithm"] = operation in ("log_softmax", "std")
        parameters["kept"], parameters["count"] = len(self.kept), len(self.kept) + len(self.row)
        nowhere = (0,) * (len(self.kept) + len(self.row))
        strides = []
        for place, name in enumerate(OPERANDS):
            operand = self.operands.get(name)
            strides.append(nowhere if operand is None else operand.kept + operand.row)
            if operand is not None:
                parameters["dtype"][place] = DTYPE_CODE[operand.dtype]
                if len(self.row) == 1:
                    parameters["step"][place] = operand.row[0]
        fill_dims(parameters["dims"], self.kept + self.row, *strides)
        return parameters


def _rows_of(spec: ReductionSpec) -> _Rows:
    """The rows of a spec, in the order in which they lie: which row comes first decides nothing."""
    kept, row = spec.x.shape[: spec.kept], spec.x.shape[spec.kept :] or (1,)
    layouts = {name: layout for name in OPERANDS if (layout := getattr(spec, name)) is not None}
    order = sorted(range(len(kept)), key=lambda axis: -abs(spec.x.strides[axis]))
    kept, merged = merge_dimensions(
        tuple(kept[axis] for axis in order),
        *(tuple(layout.strides[axis] for axis in order) for layout in layouts.values()),
    )
    operands = {
        name: _Operand(layout.dtype, strides, layout.strides[spec.kept :] or (0,) * len(row))
        for (name, layout), strides in zip(layouts.items(), merged, strict=True)
    }
    n = math.prod(row)
    by = {"sum": 1.0, "var": max(0.0, n - spec.correction), "std": max(0.0, n - spec.correction)}
    is_forward = not spec.operation.endswith("backward")
    rounds = is_forward and ITEMSIZE[spec.out.dtype] == 2 and spec.x.dtype != spec.out.dtype
    return _Rows(kept, row, operands, by.get(spec.operation, float(n)), spec.eps, rounds)


Step = Callable[[int, int, int, Addresses, int], None]
"""step(stream, out, x, sides, workspace): queue one kernel; all but the first are addresses."""


class _Plan:
    """The kernels of a reduction, in order, and the workspace between them."""

    def __init__(self, device: Device) -> None:
        self.gpu, self.index = gpu(device.index), device.index
        self.steps: list[Step] = []
        self.alone: Launch | None = None
        """The kernel, where there is one and it takes what the reduction's launch takes."""
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
        cooperative: bool = False,
    ) -> Launch:
        """See `launch.shaped`."""
        function = load(kernel, name, self.index, shared_bytes, cluster)
        overlapping = overlapping and self.gpu.compute_capability >= FIRST_WITH_CLUSTERS
        return shaped(
            function,
            grid,
            block,
            shared_bytes,
            arguments,
            cluster=cluster,
            overlapping=overlapping,
            cooperative=cooperative,
        )

    def launch(self) -> ReductionLaunch:
        """The launch of all of them."""
        if self.alone is not None:
            return self.alone
        steps, size, index = tuple(self.steps), self.bytes, self.index

        def launch(stream: int, out: int, x: int, *sides: int) -> None:
            with cupy.cuda.Device(index), workspace(size, index, stream) as address:
                for step in steps:
                    step(stream, out, x, sides, address)

        return launch


def prepare(spec: ReductionSpec, device: Device) -> ReductionLaunch:
    """See `bikernels.backend.Backend.prepare_reduction`."""
    rows, plan, operation = _rows_of(spec), _Plan(device), spec.operation
    if (held := _choose_registers(plan, rows, operation)) is not None:
        _plan_single(plan, _register_launch(plan, rows, operation, held))
    elif operation in reduction_operations.TERMS and (rows.in_columns or rows.fits_weight_tiles):
        _plan_column_tree(plan, rows, operation)
    elif rows.in_columns and _has_column_kernel(rows, operation):
        if (tall := _choose_tall(plan, rows, operation)) is not None:
            _plan_tall(plan, rows, operation, tall)
        elif (spread := _choose_spread(plan, rows, operation)) is not None:
            _plan_spread_tiles(plan, rows, operation, spread)
        else:
            _plan_single(plan, _column_launch(plan, rows, operation))
    elif (long := _choose_long(plan, rows, operation)) is not None:
        _plan_single(plan, _long_launch(plan, rows, operation, long))
    elif (softmax := _choose_softmax(plan, rows, operation)) is not None:
        _plan_single(plan, _softmax_launch(plan, rows, operation, softmax))
    elif (ring := _choose_ring(plan, rows, operation)) is not None:
        _plan_single(plan, _ring_launch(plan, rows, operation, ring))
    elif operation in reduction_operations.SUMS:
        _plan_row_tree(plan, rows, operation)
    else:
        schedule = _choose_rows(plan, rows, operation)
        if schedule is None and operation in reduction_operations.SPLIT:
            _plan_split_softmax(plan, rows, operation)
        else:
            _plan_single(plan, _row_launch(plan, rows, operation, schedule))
    return plan.launch()


def _plan_single(plan: _Plan, run: Launch) -> None:
    """One kernel, from x to out."""
    plan.alone = run


def _choose_registers(plan: _Plan, rows: _Rows, operation: str) -> RegisterSchedule | None:
    """The schedule that keeps rows in registers; None if the operation or the layout has none, or others are better."""
    if operation not in row_schedules.REGISTER_OPERATIONS or not rows.fits_registers:
        return None
    shape = rows.number, rows.n, rows.element, rows.steps
    return row_schedules.choose_register_schedule(operation, *shape, plan.gpu)


def _choose_long(plan: _Plan, rows: _Rows, operation: str) -> LongSchedule | None:
    """The schedule that reads a long row once; None if the operation or the layout has none."""
    if not rows.fits_registers:
        return None
    shape = rows.number, rows.n, rows.element, not rows.has_whole_vectors
    chosen = row_schedules.choose_long_schedule(operation, *shape, plan.gpu)
    if chosen is not None and chosen.ctas > PORTABLE_CTAS and _resident_long(plan, rows, operation, chosen) == 0:
        return None
    return chosen


def _choose_softmax(plan: _Plan, rows: _Rows, operation: str) -> SoftmaxSchedule | None:
    """The schedule of long_softmax.cu; None if the operation or the layout has none, or others are better."""
    if not (rows.fits_registers and rows.has_whole_vectors):
        return None
    return row_schedules.choose_softmax_schedule(operation, rows.number, rows.n, rows.element, plan.gpu)


def _long_name(operation: str) -> str:
    """Of the function."""
    if operation in row_schedules.REGISTER_BACKWARD:
        return "differentiate_long_rows"
    return "reduce_long_rows" if operation in reduction_operations.VARIANCES else "normalise_long_rows"


def _resident_long(plan: _Plan, rows: _Rows, operation: str, schedule: LongSchedule) -> int:
    """CTAs that the GPU holds at a time."""
    kernel = row_schedules.long_kernel(operation, rows.element, schedule.is_narrow)
    shared_bytes = schedule.bytes(operation, rows.n, rows.element)
    function = load(kernel, _long_name(operation), plan.index, shared_bytes, schedule.ctas)
    return resident_ctas(function, schedule.threads, shared_bytes, schedule.ctas)


def _has_column_kernel(rows: _Rows, operation: str) -> bool:
    """Whether one kernel for columns can compute what is no sum."""
    if operation not in reduction_operations.COLUMN_OPERATIONS or rows.chunks > rows.max_column_chunks:
        return False
    how = _choose_columns(rows, operation)
    return how != column_schedules.SINGLY or operation in reduction_operations.SINGLE_COLUMN_OPERATIONS


def _choose_tall(plan: _Plan, rows: _Rows, operation: str) -> TallSchedule | None:
    """The schedule of tall_variance.cu; None if the operation or the layout has none, or others are better."""
    if _choose_columns(rows, operation) != column_schedules.TILES:
        return None
    chosen = column_schedules.choose_tall_schedule(rows.number, rows.n, rows.element, operation, plan.gpu)
    return None if chosen is None or _resident_tall(plan, rows, chosen) < chosen.ctas else chosen


def _resident_tall(plan: _Plan, rows: _Rows, schedule: TallSchedule) -> int:
    """CTAs that the GPU holds at a time."""
    kernel, shared_bytes = column_schedules.tall_kernel(rows.element), schedule.bytes
    function = load(kernel, "reduce_tall_columns", plan.index, shared_bytes)
    return resident_ctas(function, column_schedules.TALL_THREADS, shared_bytes, 1)


def _choose_columns(rows: _Rows, operation: str) -> str:
    """How columns are taken; see column_schedules.py."""
    return column_schedules.choose_columns(
        operation, rows.number, rows.n, rows.element, rows.width, rows.fits_weight_tiles
    )


def _choose_spread(plan: _Plan, rows: _Rows, operation: str) -> TileSchedule | None:
    """The schedule of column_tiles.cu whose CTAs meet in global memory; None if there is none, or others are better."""
    if _choose_columns(rows, operation) != column_schedules.TILES:
        return None
    chosen = column_schedules.choose_spread_schedule(rows.number, rows.n, rows.element, operation, plan.gpu)
    if chosen is not None and _resident_tiles(plan, rows, operation, chosen, rows.n) < chosen.ctas:
        return None
    return chosen


def _choose_rows(plan: _Plan, rows: _Rows, operation: str) -> RowSchedule | None:
    """The schedule that keeps rows; None if it does not fit or if chunks are to be spread over the GPU."""
    kept = row_schedules.kept(operation, rows.element, rows.accumulate)
    chosen = row_schedules.choose_row_schedule(rows.number, rows.n, kept, plan.gpu)
    may_split = operation in reduction_operations.SPLIT
    return (
        None if may_split and row_schedules.splits_rows(rows.number, rows.n, plan.gpu, chosen is not None) else chosen
    )


def _choose_ring(plan: _Plan, rows: _Rows, operation: str) -> RingSchedule | None:
    """The schedule of rows_ring.cu; None if rows do not lie as it reads them, or others are faster."""
    if not (rows.lie_side_by_side and row_schedules.has_ring_kernel(operation, rows.element, rows.out_dtype)):
        return None
    itemsize = ITEMSIZE[rows.element]
    chosen = row_schedules.choose_ring_schedule(rows.number, rows.n, operation, itemsize, rows.line_up, plan.gpu)
    if chosen is not None and chosen.ctas > PORTABLE_CTAS and _resident_ring(plan, rows, operation, chosen) == 0:
        return None
    return chosen


def _resident_ring(plan: _Plan, rows: _Rows, operation: str, schedule: RingSchedule) -> int:
    """CTAs that the GPU holds at a time."""
    kernel = row_schedules.ring_kernel(operation, rows.element, rows.out_dtype)
    shared_bytes = schedule.bytes(rows.n, ITEMSIZE[rows.element])
    function = load(kernel, "reduce_long_rows", plan.index, shared_bytes, schedule.ctas)
    return resident_ctas(function, schedule.threads, shared_bytes, schedule.ctas)


def _ring_launch(plan: _Plan, rows: _Rows, operation: str, schedule: RingSchedule) -> Launch:
    """A launch of rows_ring.cu, given the addresses of out, x and its sides."""
    kernel = row_schedules.ring_kernel(operation, rows.element, rows.out_dtype)
    resident = _resident_ring(plan, rows, operation, schedule)
    teams = reduction_operations.teams(rows.number, resident // schedule.ctas)
    numbers = (schedule.slots, schedule.rounds, schedule.kept_steps, schedule.ctas, schedule.area_bytes(rows.n))
    return plan.shape(
        kernel,
        "reduce_long_rows",
        teams * schedule.ctas,
        schedule.threads,
        schedule.bytes(rows.n, ITEMSIZE[rows.element]),
        (rows.parameters(operation), *map(np.int32, numbers), *_addresses(rows, ())),
        cluster=schedule.ctas,
        overlapping=True,
    )


_NULL = np.uint64(0)


def _addresses(rows: _Rows, names: Sequence[str] = SIDES) -> tuple[Argument, ...]:
    """The addresses that a kernel takes: of out, of x, and of these sides, which no call gives where they are not."""
    return ADDRESS, ADDRESS, *[ADDRESS if name in rows.operands else _NULL for name in names]


def _row_launch(plan: _Plan, rows: _Rows, operation: str, schedule: RowSchedule | None) -> Launch:
    """A launch of rows.cu, given the addresses of out, x and its sides. Without a schedule, rows are not kept."""
    kept = row_schedules.kept(operation, rows.element, rows.accumulate)
    schedule = schedule or row_schedules.streaming_schedule(plan.gpu)
    of_warp = np.int32(kept.of_warp(schedule, rows.n))
    return plan.shape(
        row_schedules.row_kernel(
            operation, rows.element, rows.out_dtype, schedule.team, schedule.keeps, schedule.octets
        ),
        "reduce_rows",
        -(-rows.number // schedule.rows) * schedule.ctas,
        schedule.warps * 32,
        kept.bytes(schedule, rows.n),
        (rows.parameters(operation), np.int32(schedule.lanes), np.int32(schedule.batch), of_warp, *_addresses(rows)),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _steps(rows: _Rows, *names: str) -> list[np.int64]:
    """From a row to the next of operands that have one dimension of rows; 0 for those that are not there."""
    kept = (rows.operands[name].kept if name in rows.operands else () for name in names)
    return [np.int64(one[0] if one else 0) for one in kept]


def _register_launch(plan: _Plan, rows: _Rows, operation: str, schedule: RegisterSchedule) -> Launch:
    """A launch of a kernel for rows in registers, given the addresses of out, x and its sides."""
    divisor, is_root = np.dtype(rows.accumulate).type(rows.divisor), np.int32(operation == "std")
    shape = np.int32(rows.n), np.int32(schedule.lanes.bit_length() - 1)
    arguments: tuple[Argument, ...]
    if operation in row_schedules.REGISTER_NORMS:
        name, arguments = "normalise_rows", _norm_arguments(rows, (*shape, is_root))
    elif operation in row_schedules.REGISTER_BACKWARD:
        name, arguments = "differentiate_rows", _gradient_arguments(rows, shape)
    else:
        name = "reduce_rows"
        arguments = (*_steps(rows, "x", "out"), divisor, *shape, *_addresses(rows, ()))
    return plan.shape(
        row_schedules.register_kernel(operation, rows.element, schedule),
        name,
        -(-rows.number // schedule.rows),
        schedule.threads,
        0,
        (np.int64(rows.number), *arguments),
        overlapping=True,
    )


def _long_launch(plan: _Plan, rows: _Rows, operation: str, schedule: LongSchedule) -> Launch:
    """A launch of long_variance.cu, long_norms.cu or long_backward.cu, given the addresses of out, x and its sides."""
    resident = _resident_long(plan, rows, operation, schedule)
    divisor = np.dtype(rows.accumulate).type(rows.divisor)
    shape = np.int32(rows.n), np.int32(row_schedules.long_bits(rows.n))
    arguments: tuple[Argument, ...]
    if operation in row_schedules.REGISTER_BACKWARD:
        arguments = _gradient_arguments(rows, shape)
    elif operation in reduction_operations.VARIANCES:
        arguments = (*_steps(rows, "x", "out"), divisor, *shape, np.int32(operation == "std"), *_addresses(rows, ()))
    else:
        arguments = _norm_arguments(rows, (*shape, np.int32(schedule.held)))
    return plan.shape(
        row_schedules.long_kernel(operation, rows.element, schedule.is_narrow),
        _long_name(operation),
        reduction_operations.teams(rows.number, resident // schedule.ctas) * schedule.ctas,
        schedule.threads,
        schedule.bytes(operation, rows.n, rows.element),
        (np.int64(rows.number), *arguments),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _softmax_launch(plan: _Plan, rows: _Rows, operation: str, schedule: SoftmaxSchedule) -> Launch:
    """A launch of long_softmax.cu, given the addresses of out and x."""
    kernel = row_schedules.softmax_kernel(operation, rows.element, schedule.most_threads)
    name, shared_bytes = "exponentiate_long_rows", schedule.bytes(operation)
    function = load(kernel, name, plan.index, shared_bytes, schedule.ctas)
    resident = resident_ctas(function, schedule.threads, shared_bytes, schedule.ctas)
    numbers = map(np.int32, (rows.n, row_schedules.SOFTMAX_AREA_BYTES))
    return plan.shape(
        kernel,
        name,
        reduction_operations.teams(rows.number, resident // schedule.ctas) * schedule.ctas,
        schedule.threads,
        shared_bytes,
        (np.int64(rows.number), *_steps(rows, "x", "out"), *numbers, *_addresses(rows, ())),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _norm_arguments(rows: _Rows, shape: Sequence[np.int32]) -> tuple[Argument, ...]:
    """Those of the kernels for variances and norms of rows that are read once, behind the number of rows."""
    steps, sides = ("x", "out", "mean", "rstd"), ("weight", "bias", "mean", "rstd")
    divisor, eps = (np.dtype(rows.accumulate).type(value) for value in (rows.divisor, rows.eps))
    return (*_steps(rows, *steps), divisor, eps, *shape, *_addresses(rows, sides))


def _gradient_arguments(rows: _Rows, shape: tuple[np.int32, np.int32]) -> tuple[Argument, ...]:
    """Those of the kernels for the gradients of rows that are read once, behind the number of rows."""
    steps, sides = ("x", "out", "grad", "mean", "rstd"), ("grad", "weight", "mean", "rstd")
    divisor = np.dtype(rows.accumulate).type(rows.divisor)
    return (*_steps(rows, *steps), divisor, *shape, *_addresses(rows, sides))


def _column_launch(plan: _Plan, rows: _Rows, operation: str) -> Launch:
    """A launch of a kernel for columns, given the addresses of out, x and its sides."""
    how = _choose_columns(rows, operation)
    if how == column_schedules.SHORT and rows.has_accumulated_statistics:
        return _short_column_launch(plan, rows, operation)
    if how == column_schedules.SHORT_TILES:
        return _short_tile_launch(plan, rows, operation)
    if how == column_schedules.WEIGHT_TILES:
        return _weight_launch(plan, rows, operation)
    if how == column_schedules.TILES:
        return _tile_launch(plan, rows, operation)
    schedule: ColumnSchedule = column_schedules.choose_column_schedule(rows.number, rows.n, plan.gpu)
    return plan.shape(
        column_schedules.column_kernel(operation, rows.element, rows.accumulate, schedule.ctas > 1),
        "reduce_columns",
        -(-rows.number // schedule.tile) * schedule.ctas,
        column_schedules.COLUMN_THREADS,
        schedule.bytes(rows.n, rows.accumulate),
        (rows.parameters(operation), np.int32(schedule.bits), *_addresses(rows)),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _short_column_launch(plan: _Plan, rows: _Rows, operation: str) -> Launch:
    """A launch of short_columns.cu, given the addresses of out, x and its sides."""
    schedule = column_schedules.short_schedule(rows.number, rows.n)
    return plan.shape(
        column_schedules.short_kernel(operation, rows.element, rows.out_dtype),
        "reduce_short_columns",
        -(-rows.number // schedule.columns),
        schedule.threads,
        0,
        (rows.parameters(operation), np.int32(schedule.columns.bit_length() - 1), *_addresses(rows, COLUMN_SIDES)),
        overlapping=True,
    )


def _short_tile_launch(plan: _Plan, rows: _Rows, operation: str) -> Launch:
    """A launch of short_tiles.cu, given the addresses of out and x."""
    vectors = column_schedules.short_tile_vectors(rows.n)
    return plan.shape(
        column_schedules.short_tile_kernel(operation, rows.element, rows.out_dtype),
        "reduce_short_tiles",
        -(-rows.number // (vectors * rows.width)),
        column_schedules.TILE_THREADS,
        0,
        (rows.parameters(operation), np.int32(vectors.bit_length() - 1), ADDRESS, ADDRESS),
        overlapping=True,
    )


def _weight_launch(plan: _Plan, rows: _Rows, operation: str) -> Launch:
    """A launch of weight_tiles.cu, given the addresses of out, x and its sides."""
    schedule = column_schedules.choose_weight_schedule(rows.number, rows.n, rows.element, rows.width, plan.gpu)
    kernel, name = column_schedules.weight_kernel(operation, rows.element, schedule), "sum_weight_tiles"
    shared_bytes, tiles = schedule.bytes(rows.element), -(-rows.number // schedule.tile)
    if schedule.streams:
        function = load(kernel, name, plan.index, shared_bytes)
        tiles = reduction_operations.teams(tiles, resident_ctas(function, schedule.threads, shared_bytes, 1))
    steps = [rows.operands[side].row[0] if side in rows.operands else 0 for side in ("x", *COLUMN_SIDES)]
    numbers = rows.n, rows.number, schedule.across.bit_length() - 1, DTYPE_CODE[rows.out_dtype]
    return plan.shape(
        kernel,
        name,
        tiles,
        schedule.threads,
        shared_bytes,
        (*map(np.int32, (*steps, *numbers)), *_addresses(rows, COLUMN_SIDES)),
        overlapping=True,
    )


def _tile_launch(plan: _Plan, rows: _Rows, operation: str, of_chunks: bool = False) -> Launch:
    """A launch of column_tiles.cu, given the addresses of out, x and its sides. `of_chunks`: of each chunk."""
    times, n = (rows.chunks, SUM_CHUNK) if of_chunks else (1, rows.n)
    shape = rows.number, n, rows.element, operation, plan.gpu, times
    schedule = column_schedules.choose_tile_schedule(*shape)
    if schedule.ctas > PORTABLE_CTAS and _resident_tiles(plan, rows, operation, schedule, n) == 0:
        schedule = column_schedules.choose_tile_schedule(*shape, PORTABLE_CTAS)
    items = -(-rows.number // schedule.tile) * times
    begun = column_schedules.tile_items(schedule, items, plan.gpu)
    goes_on = begun < items or column_schedules.PASSES[operation] > 1
    out_dtype, name = rows.accumulate if of_chunks else rows.out_dtype, "reduce_column_tiles"
    kernel = column_schedules.tile_kernel(operation, rows.element, out_dtype, schedule, of_chunks)
    phase = column_schedules.tile_phase(schedule, items, plan.gpu)
    return plan.shape(
        kernel,
        name,
        begun * schedule.ctas,
        column_schedules.TILE_THREADS,
        schedule.bytes(n, rows.accumulate, goes_on),
        _tile_arguments(rows, operation, schedule, n, goes_on, phase, _NULL),
        cluster=schedule.ctas,
        overlapping=True,
    )


def _resident_tiles(plan: _Plan, rows: _Rows, operation: str, schedule: TileSchedule, n: int) -> int:
    """CTAs that the GPU holds at a time."""
    kernel, cluster = column_schedules.tile_kernel(operation, rows.element, rows.out_dtype, schedule), schedule.ctas
    shared_bytes = schedule.bytes(n, rows.accumulate)
    if schedule.spread:
        cluster = 1
    function = load(kernel, "reduce_column_tiles", plan.index, shared_bytes, cluster)
    return resident_ctas(function, column_schedules.TILE_THREADS, shared_bytes, cluster)


def _tile_arguments(
    rows: _Rows, operation: str, schedule: TileSchedule, n: int, goes_on: bool, phase: int, meeting: Argument
) -> tuple[Argument, ...]:
    """Those of column_tiles.cu."""
    numbers = (*schedule.arguments(n, goes_on), schedule.ctas, phase)
    return rows.parameters(operation), *map(np.int32, numbers), *_addresses(rows, COLUMN_SIDES), meeting


def _plan_spread_tiles(plan: _Plan, rows: _Rows, operation: str, schedule: TileSchedule) -> None:
    """column_tiles.cu with CTAs that meet in the workspace, all on the GPU at once."""
    tiles = -(-rows.number // schedule.tile)
    kernel = column_schedules.tile_kernel(operation, rows.element, rows.out_dtype, schedule)
    shared_bytes = schedule.bytes(rows.n, rows.accumulate)
    resident = _resident_tiles(plan, rows, operation, schedule, rows.n)
    phase = column_schedules.tile_phase(schedule, tiles, plan.gpu)
    run = plan.shape(
        kernel,
        "reduce_column_tiles",
        reduction_operations.teams(tiles, resident // schedule.ctas) * schedule.ctas,
        column_schedules.TILE_THREADS,
        shared_bytes,
        _tile_arguments(rows, operation, schedule, rows.n, True, phase, ADDRESS),
        cooperative=True,
    )
    _plan_meeting(plan, run, tiles * schedule.meeting_bytes(rows.n, operation, rows.accumulate))


def _plan_tall(plan: _Plan, rows: _Rows, operation: str, schedule: TallSchedule) -> None:
    """tall_variance.cu, whose CTAs meet in the workspace, all on the GPU at once."""
    tiles, resident = -(-rows.number // schedule.tile), _resident_tall(plan, rows, schedule)
    teams = reduction_operations.teams(tiles, resident // schedule.ctas)
    numbers = map(np.int32, (*schedule.arguments(), tiles, teams))
    run = plan.shape(
        column_schedules.tall_kernel(rows.element),
        "reduce_tall_columns",
        teams * schedule.ctas,
        column_schedules.TALL_THREADS,
        schedule.bytes,
        (rows.parameters(operation), *numbers, *_addresses(rows, ()), ADDRESS),
        cooperative=True,
    )
    _plan_meeting(plan, run, tiles * schedule.meeting_bytes)


def _plan_meeting(plan: _Plan, run: Launch, zeros: int) -> None:
    """A launch that takes out, x, its sides and, last, where its CTAs meet: so many zeros."""
    meeting = plan.reserve(zeros, "uint8")

    def reduce(stream: int, out: int, x: int, sides: Addresses, workspace: int) -> None:
        cupy.cuda.runtime.memsetAsync(workspace + meeting, 0, zeros, stream)
        run(stream, out, x, *sides, workspace + meeting)

    plan.steps.append(reduce)


# ------------------------------------------------------------------------------------------------- levels of the tree


def _plan_last_level(plan: _Plan, run: Launch, source: int | None) -> None:
    """The result, from x or from the sums at that offset of the workspace."""
    if source is None:
        _plan_single(plan, run)
        return
    offset = source
    plan.steps.append(lambda stream, out, x, sides, workspace: run(stream, out, workspace + offset))


def _plan_row_tree(plan: _Plan, rows: _Rows, operation: str) -> None:
    """Levels through the workspace while rows are to be spread over the GPU, then the result."""
    source: int | None = None
    while (schedule := _choose_rows(plan, rows, operation)) is None:
        source, rows = _plan_row_sums(plan, rows, source)
    _plan_last_level(plan, _row_launch(plan, rows, operation, schedule), source)


def _plan_column_tree(plan: _Plan, rows: _Rows, operation: str) -> None:
    """The same of columns; what is added up is that of the operation at the first level, and then sums."""
    source: int | None = None
    while column_schedules.splits_columns(
        operation, rows.number, rows.n, rows.element, rows.width, plan.gpu, source is None
    ):
        source, rows = _plan_column_sums(plan, rows, operation, source)
        if operation not in reduction_operations.SUMS:
            operation, rows = "sum", rows._replace(divisor=1.0)
    _plan_last_level(plan, _column_launch(plan, rows, operation), source)


def _plan_row_sums(plan: _Plan, rows: _Rows, source: int | None) -> tuple[int, _Rows]:
    """One level: the sums of all chunks, row by row. Returns where they are, and their layout."""
    target = plan.reserve(rows.number * rows.chunks, rows.accumulate)
    grid = -(-rows.number * rows.chunks // 4)
    kernel = row_schedules.chunk_kernel("row_chunks.cu", rows.element, rows.accumulate)
    run = plan.shape(kernel, "sum_chunks", grid, 128, 0, (rows.parameters("sum"), ADDRESS, ADDRESS))

    def sums(stream: int, out: int, x: int, sides: Addresses, workspace: int) -> None:
        run(stream, workspace + target, x if source is None else workspace + source)

    plan.steps.append(sums)
    kept = tuple(step * rows.chunks for step in contiguous_strides(rows.kept))
    return target, rows.of_sums(kept, 1)


def _plan_column_sums(plan: _Plan, rows: _Rows, operation: str, source: int | None) -> tuple[int, _Rows]:
    """One level: the sums of all chunks, chunk by chunk, those of neighbouring rows side by side."""
    target = plan.reserve(rows.number * rows.chunks, rows.accumulate)
    if rows.width > 1:
        run = _tile_launch(plan, rows, operation, of_chunks=True)
    else:
        schedule = column_schedules.column_schedules(rows.n, plan.gpu)[0]
        run = plan.shape(
            column_schedules.column_chunk_kernel(operation, rows.element, rows.accumulate),
            "sum_column_chunks",
            -(-rows.number // schedule.tile) * rows.chunks,
            column_schedules.COLUMN_THREADS,
            schedule.bytes(SUM_CHUNK, rows.accumulate),
            (rows.parameters(operation), np.int32(schedule.bits), *_addresses(rows, COLUMN_SIDES)),
        )

    def sums(stream: int, out: int, x: int, sides: Addresses, workspace: int) -> None:
        if source is None:
            run(stream, workspace + target, x, *sides)
        else:
            run(stream, workspace + target, workspace + source)

    plan.steps.append(sums)
    return target, rows.of_sums(contiguous_strides(rows.kept), rows.number)


# ------------------------------------------------------------------------------------- softmax of few very long rows


def _plan_split_softmax(plan: _Plan, rows: _Rows, operation: str) -> None:
    """The steps of softmax_split_rows.cu."""
    kernel = row_schedules.chunk_kernel("softmax_split_rows.cu", rows.element, rows.accumulate)
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

    def maxima_and_sums(stream: int, out: int, x: int, sides: Addresses, workspace: int) -> None:
        chunk_maxima(stream, workspace + maxima, x)
        row_maxima(stream, workspace + maximum, workspace + maxima)
        chunk_exponentials(stream, workspace + sums, workspace + counts, workspace + maximum, x)

    plan.steps.append(maxima_and_sums)

    level, level_sums = rows.of_sums(tuple(step * rows.chunks for step in contiguous_strides(rows.kept)), 1), sums
    while level.chunks > row_schedules.MAX_ROW_CHUNKS:
        level_sums, level = _plan_row_sums(plan, level, level_sums)
    constants = np.int64(level.n), chunks, np.int64(operation == "log_softmax")
    shared_bytes = -(-level.chunks // GROUP_LANES) * GROUP_LANES * ITEMSIZE[accumulate]  # read in whole groups
    arguments = (*constants, ADDRESS, ADDRESS, ADDRESS)
    row_normalisers = plan.shape(kernel, "row_normalisers", rows.number, 512, shared_bytes, arguments)
    write_chunks = load_for_chunks("write_chunks", 4)
    last_sums = level_sums

    def normalise(stream: int, out: int, x: int, sides: Addresses, workspace: int) -> None:
        row_normalisers(stream, workspace + normaliser, workspace + last_sums, workspace + counts)
        write_chunks(stream, out, workspace + maximum, workspace + normaliser, x)

    plan.steps.append(normalise)
