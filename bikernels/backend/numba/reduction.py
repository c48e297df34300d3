"""Reductions of rows: what `formulas.py` describes, by one kernel that takes all layouts and dtypes. `rows.py` and
`columns.py` have faster ones of some.

The contract's sum tree fits a warp: of a chunk's 256 lanes every thread has 8. Neighbours are added between threads by
shuffles and within a thread in registers. A thread block is 16 warps and works in one of three modes, which decide
speed only; a kernel is compiled for one:

    ROWS     16 rows, one per warp; many short rows
    BLOCK    one row, its chunks dealt to the warps; longer rows
    COLUMNS  16 rows that lie side by side in memory; of 32 threads that read one row each has 8 neighbouring lanes of
             the tree, and neighbouring threads read neighbouring rows; then the block transposes, and warp w goes on
             with row w

A kernel does the passes of a formula one after another, then writes. Few long rows are split over many blocks: each
pass becomes a launch of its own, its partial results go through a workspace in global memory, and every launch begins
with recalling what the passes before have found. The maximum and the number of elements equal to it are exact, so their
partials meet in atomics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, FLOAT_DTYPES, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import ONE_FOR_A_ROW, REDUCTIONS, ReductionSpec
from ...views import Device
from .. import ReductionLaunch
from .columns import prepare as prepare_columns
from .device import (
    ALL_LANES,
    OPERATIONS,
    STORAGE,
    WARP,
    Function,
    as_dimensions,
    atomic_add,
    atomic_max,
    cuda,
    device,
    int64s,
    offset,
    pointer,
    reader,
    types,
    writer,
)
from .formulas import BESIDE, OPERANDS, Formula, Pass, formula, numbers_of
from .launch import Kernel, Launch, Workspace, flat, grid_of, multiprocessors, on
from .rows import prepare as prepare_rows

ROWS, BLOCK, COLUMNS = MODES = ("rows", "block", "columns")

WARPS = 16
THREADS = WARPS * WARP
BLOCKS = 2
"""Thread blocks that keep a multiprocessor busy."""
THREAD_LANES = SUM_LANES // WARP
"""Lanes of the sum tree that one thread has."""
assert THREAD_LANES == 8
TABLE = SUM_CHUNK
"""Chunk sums that a block keeps in shared memory: the next level's chunk, or a part of one for each of its rows."""
EXCHANGE = (WARP, WARPS + 1)
"""A value of every thread, in COLUMNS that of (`_member`, `_column`); read along either without bank conflicts."""
ROW_TABLE = TABLE // WARPS


WHOLE, PASSES, END = "whole", ("pass 0", "pass 1"), "end"
"""Stages: all of a row; and the launches of a row that is split: its passes, then what is written."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    stage: str
    operation: str
    operands: tuple[tuple[str, str], ...]
    """Names and dtypes: out, x, then those of the others that are there, in the order of the spec."""
    kept_dimensions: int
    row_dimensions: int
    mode: str

    @property
    def out(self) -> str:
        return self.operands[0][1]

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[self.out]

    @property
    def formula(self) -> Formula:
        names = dict(self.operands)
        return formula(self.operation, self.out, "weight" in names, "bias" in names)


def _modes(stage: str, operation: str) -> tuple[str, ...]:
    """The modes in which a stage is launched."""
    if stage == WHOLE:
        return MODES
    return (ROWS,) if stage == END and operation in ONE_FOR_A_ROW else (BLOCK, COLUMNS)


def variants() -> Iterator[Variant]:
    """Every stage of every operation for every result dtype and mode; every dtype of x and general layouts once."""
    for operation in REDUCTIONS:
        beside = BESIDE.get(operation, ())
        passes = len(formula(operation, "float32").passes)
        for stage in (WHOLE, *PASSES[:passes], END):
            modes = _modes(stage, operation)
            for dtype in FLOAT_DTYPES:
                of = {"out": dtype, "x": dtype} | dict.fromkeys(beside, dtype)
                of |= {name: ACCUMULATE[dtype] for name in ("mean", "rstd") if name in of}
                # The 16-bit dtypes are float32 but for how they are read and written.
                for mode in modes if ITEMSIZE[dtype] >= 4 else modes[:1]:
                    yield Variant(stage, operation, tuple(of.items()), 1, 1, mode)
        mixed = {"out": "bfloat16", "x": "int64"} | dict.fromkeys(beside, "float16")
        yield Variant(WHOLE, operation, tuple(mixed.items()), 2, 2, BLOCK)
    for x in STORAGE:
        if x not in FLOAT_DTYPES:
            yield Variant(WHOLE, "mean", (("out", "float64"), ("x", x)), 1, 1, BLOCK)


# ------------------------------------------------------------------------------------------------ parts of the kernels


@device
def _warp() -> Any:
    return types.int64(cuda.threadIdx.x) // WARP


@device
def _lane() -> Any:
    return types.int64(cuda.threadIdx.x) % WARP


@device
def _column() -> Any:
    """In COLUMNS, which of the block's rows a thread reads."""
    return types.int64(cuda.threadIdx.x) % WARPS


@device
def _member() -> Any:
    """In COLUMNS, which of the WARP threads that read one row this is."""
    return types.int64(cuda.threadIdx.x) // WARPS


@functools.cache
def _task(mode: str) -> Function:
    """task(rows, parts): what a thread does, of (rows in blocks) times (parts of a row). The row that it reads and the
    row that its warp answers for (perhaps rows that do not exist), whether it is the thread that writes that, its part.
    """

    @device
    def task(rows: Any, parts: Any) -> Any:
        block = types.int64(cuda.blockIdx.y) * cuda.gridDim.x + cuda.blockIdx.x
        group = block // parts
        warp, lane = _warp(), _lane()
        reads = answers = group
        if mode != BLOCK:
            answers = group * WARPS + warp
            reads = group * WARPS + _column() if mode == COLUMNS else answers
        writes = lane == 0 and (mode != BLOCK or warp == 0) and answers < rows
        return reads, answers, writes, block - group * parts

    return task


@functools.cache
def _walk(mode: str) -> Function:
    """walk(): the first element of its row that a thread reads where order does not matter, and its step."""

    @device
    def walk() -> Any:
        if mode == BLOCK:
            return types.int64(cuda.threadIdx.x), THREADS
        return (_member(), WARP) if mode == COLUMNS else (_lane(), WARP)

    return walk


@functools.cache
def _chunk_walk(mode: str) -> Function:
    """walk(): the first chunk of its row that a warp sums, its step, and where the sums of the row lie in the table."""

    @device
    def walk() -> Any:
        if mode == BLOCK:
            return types.int32(_warp()), types.int32(WARPS), types.int64(0)
        return types.int32(0), types.int32(1), _warp() * ROW_TABLE

    return walk


@functools.cache
def _team(combine: Function, mode: str) -> Function:
    """team(value, exchange): combine the values of all threads that read a row, for the warps that answer for it. Every
    thread of the block takes part; `exchange` is shared memory of the shape EXCHANGE.
    """
    warps_in_bits = WARPS.bit_length() - 1

    @device
    def team(value: Any, exchange: Any) -> Any:
        warp, lane = _warp(), _lane()
        if mode == COLUMNS:
            exchange[_member(), _column()] = value
            cuda.syncthreads()
            value = exchange[lane, warp]
            cuda.syncthreads()
        for d in range(5):
            value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, 1 << d))
        if mode == BLOCK:
            exchange[warp, 0] = value
            cuda.syncthreads()
            value = exchange[lane % WARPS, 0]
            cuda.syncthreads()
            for d in range(warps_in_bits):
                value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, 1 << d))
        return value

    return team


@functools.cache
def _tell(mode: str) -> Function:
    """tell(value, exchange): from the warps that answer for a row to the threads that read it."""

    @device
    def tell(value: Any, exchange: Any) -> Any:
        if mode == COLUMNS:
            exchange[_warp(), 0] = value
            cuda.syncthreads()
            value = exchange[_column(), 0]
            cuda.syncthreads()
        return value

    return tell


@device
def _larger(a: Any, b: Any) -> Any:
    """The larger; NaN if either is."""
    return a if a > b or a != a else b


@device
def _plus(a: Any, b: Any) -> Any:
    """Of counts."""
    return a + b


@functools.cache
def _chunk_sum(accumulate: str, term: Function, mode: str) -> Function:
    """chunk_sum(source, shape, strides, s, chunk, n, exchange): the tree's sum of a chunk of term(source, shape,
    strides, s, i), and how many of its elements were counted. The sum is that of the row that the warp answers for, the
    count that of what this thread saw.
    """
    real, add = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add
    # A thread has the lanes t, t + 32, t + 64, ... of the tree, or 8t, 8t + 1, 8t + 2, ...
    step = 1 if mode == COLUMNS else WARP

    @device
    def fold_thread(v: Any) -> Any:
        return add(add(add(v[0], v[1]), add(v[2], v[3])), add(add(v[4], v[5]), add(v[6], v[7])))

    @device
    def fold_warp(value: Any) -> Any:
        for d in range(5):
            value = add(value, cuda.shfl_xor_sync(ALL_LANES, value, 1 << d))
        return value

    @device
    def chunk_sum(source: Any, shape: Any, strides: Any, s: Any, chunk: Any, n: Any, exchange: Any) -> Any:
        lanes = cuda.local.array(THREAD_LANES, real)
        for q in range(THREAD_LANES):
            lanes[q] = real(0)
        # What counts within the chunk is 32 bits wide and takes half the registers.
        begin = types.int64(chunk) * SUM_CHUNK
        length = types.int32(min(n - begin, SUM_CHUNK))
        i = types.int32(_member() * THREAD_LANES if mode == COLUMNS else _lane())
        count = types.int32(0)
        for _ in range(0, length, SUM_LANES):
            for q in range(THREAD_LANES):
                value, counted = term(source, shape, strides, s, begin + min(types.int32(i + q * step), length - 1))
                if i + q * step < length:
                    lanes[q] = add(lanes[q], value)
                    count = types.int32(count + counted)
            i = types.int32(i + SUM_LANES)
        if mode == COLUMNS:
            exchange[_member(), _column()] = fold_thread(lanes)
            cuda.syncthreads()
            value = exchange[_lane(), _warp()]
            cuda.syncthreads()
            return fold_warp(value), count
        for q in range(THREAD_LANES):
            lanes[q] = fold_warp(lanes[q])
        return fold_thread(lanes), count

    return chunk_sum


@functools.cache
def _table_sum(accumulate: str) -> Function:
    """table_sum(table, place, count): the tree's sum of up to SUM_CHUNK values, by one warp."""

    @device
    def term(source: Any, shape: Any, strides: Any, s: Any, i: Any) -> Any:
        return source[0][source[1] + i], 0

    chunk_sum = _chunk_sum(accumulate, term, ROWS)

    @device
    def table_sum(table: Any, place: Any, count: Any) -> Any:
        total, _ = chunk_sum((table, place), 0, 0, 0, types.int64(0), count, 0)
        return total

    return table_sum


# Ordered as the values are, with NaN above all, so that an atomic maximum of integers finds the maximum of floats.
_to_bits, _from_bits = OPERATIONS["float64"].to_bits, OPERATIONS["float64"].from_bits
_SIGN = 1 << 63
_NAN_KEY = (1 << 64) - 1


@device
def _key(value: Any) -> Any:
    bits = types.uint64(_to_bits(types.float64(value)))
    if value != value:
        return types.uint64(_NAN_KEY)
    return ~bits if bits >= types.uint64(_SIGN) else bits | types.uint64(_SIGN)


@device
def _value_of_key(key: Any) -> Any:
    bits = key ^ types.uint64(_SIGN) if key >= types.uint64(_SIGN) else ~key
    return _from_bits(types.int64(bits))


# ----------------------------------------------------------------------------------------------------------- operands


@device
def _nothing(source: Any, shape: Any, strides: Any, i: Any) -> Any:
    """In place of an operand that is not there."""
    return 0


@functools.cache
def _read(place: int, dtype: str, result: str) -> Function:
    """read(source, shape, strides, i): element i of a row of the operand in this place, cast to `result`."""
    read, storage = reader(dtype, result), STORAGE[dtype]

    @device
    def read_element(source: Any, shape: Any, strides: Any, i: Any) -> Any:
        return read(pointer(source[place], storage), offset(i, shape, strides[place]))

    return read_element


def _readers(variant: Variant, names: tuple[str, ...]) -> list[Function]:
    """The readers of OPERANDS, of which only these names are read: x of a forward operation as the result's dtype."""
    found = []
    places = {name: (place, dtype) for place, (name, dtype) in enumerate(variant.operands)}
    for name in OPERANDS:
        if name not in names:
            found.append(_nothing)
            continue
        is_rounded = name == "x" and not variant.operation.endswith("backward")
        found.append(_read(*places[name], variant.out if is_rounded else variant.accumulate))
    return found


def _elements(variant: Variant, names: tuple[str, ...]) -> Function:
    """elements(source, shape, strides, i): element i of every operand as the accumulate dtype, 0 of those not named."""
    x, grad, weight, bias, mean, rstd = _readers(variant, names)
    real = OPERATIONS[variant.accumulate].type

    @device
    def elements(source: Any, shape: Any, strides: Any, i: Any) -> Any:
        return (
            real(x(source, shape, strides, i)),
            real(grad(source, shape, strides, i)),
            real(weight(source, shape, strides, i)),
            real(bias(source, shape, strides, i)),
            real(mean(source, shape, strides, i)),
            real(rstd(source, shape, strides, i)),
        )

    return elements


def _term(variant: Variant, one: Pass) -> Function:
    """The term of a pass, as `_chunk_sum` calls it."""
    elements, term, counts = _elements(variant, one.reads), one.term, one.counts
    assert term is not None

    @device
    def value(source: Any, shape: Any, strides: Any, s: Any, i: Any) -> Any:
        return term(*elements(source, shape, strides, i), s)

    @device
    def uncounted(source: Any, shape: Any, strides: Any, s: Any, i: Any) -> Any:
        return value(source, shape, strides, s, i), 0

    return value if counts else uncounted


@functools.cache
def _starts(itemsizes: tuple[int, ...]) -> Function:
    """starts(addresses, shape, strides, row): the address of a row's first element, of each operand."""
    place, itemsize = len(itemsizes) - 1, itemsizes[-1]

    @device
    def last(addresses: Any, shape: Any, strides: Any, row: Any) -> Any:
        return (addresses[place] + itemsize * offset(row, shape, strides[place]),)

    if place == 0:
        return last
    others = _starts(itemsizes[:-1])

    @device
    def starts(addresses: Any, shape: Any, strides: Any, row: Any) -> Any:
        return others(addresses, shape, strides, row) + last(addresses, shape, strides, row)

    return starts


# ------------------------------------------------------------------------------------------------------------- passes
# A step is step(source, shape, strides, where, workspace, numbers, scratch, own, s): it is given what the step before
# has found, and returns what it finds itself, each for the row that the warp answers for and for the row that the
# thread reads. `where` is n, the number of rows, the row that is read and the one that is answered for (ones that
# exist), the part of a row and its chunks, the number of sums of a row. `numbers`: divisors of both passes, eps.
# `scratch`: shared memory, `exchange` (of floats, of counts) and a table of sums.


@functools.cache
def _no_step() -> Function:
    @device
    def step(
        source: Any, shape: Any, strides: Any, where: Any, workspace: Any, numbers: Any, scratch: Any, own: Any, s: Any
    ) -> Any:
        return own, s

    return step


def _maximum(variant: Variant) -> Function:
    """The step that finds a row's maximum."""
    real, mode = OPERATIONS[variant.accumulate].type, variant.mode
    read = _readers(variant, ("x",))[0]
    walk, team, tell = _walk(mode), _team(_larger, mode), _tell(mode)

    @device
    def step(
        source: Any, shape: Any, strides: Any, where: Any, workspace: Any, numbers: Any, scratch: Any, own: Any, s: Any
    ) -> Any:
        n, _, _, _, part, part_chunks, _ = where
        exchange, _, _ = scratch
        start, stride = walk()
        begin = part * part_chunks * SUM_CHUNK
        value = real(-math.inf)
        for i in range(begin + start, min(n, begin + part_chunks * SUM_CHUNK), stride):
            value = _larger(read(source, shape, strides, i), value)
        value = team(value, exchange)
        return value, tell(value, exchange)

    return step


def _whole_sum(variant: Variant, number: int) -> Function:
    """The step that sums a whole row, and ends that."""
    one, accumulate, mode = variant.formula.passes[number], variant.accumulate, variant.mode
    real, end, counts = OPERATIONS[accumulate].type, one.end, one.counts
    chunk_sum, table_sum = _chunk_sum(accumulate, _term(variant, one), mode), _table_sum(accumulate)
    chunk_walk, team, tell = _chunk_walk(mode), _team(_plus, mode), _tell(mode)
    assert end is not None

    @device
    def step(
        source: Any, shape: Any, strides: Any, where: Any, workspace: Any, numbers: Any, scratch: Any, own: Any, s: Any
    ) -> Any:
        n = where[0]
        exchange, count_exchange, table = scratch
        first, step, place = chunk_walk()
        count = types.int64(0)
        chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK
        for chunk in range(first, types.int32(chunks), step):
            value, counted = chunk_sum(source, shape, strides, s, chunk, n, exchange)
            count += counted
            if _lane() == 0:
                table[place + chunk] = value
        cuda.syncthreads()
        total = table_sum(table, place, chunks)
        cuda.syncthreads()  # the table is free for the next step
        if counts:
            count = team(count, count_exchange)
        own = end(total, count, own, real(numbers[number]), real(numbers[2]))
        return own, tell(own, exchange)

    return step


def _recall(variant: Variant, number: int) -> Function:
    """The step that reads from the workspace what the launches of a pass have found."""
    one, accumulate = variant.formula.passes[number], variant.accumulate
    real, end = OPERATIONS[accumulate].type, one.end
    table_sum, tell = _table_sum(accumulate), _tell(variant.mode)
    if end is None:
        return _recall_maximum(real)

    @device
    def ended(
        source: Any, shape: Any, strides: Any, where: Any, workspace: Any, numbers: Any, scratch: Any, own: Any, s: Any
    ) -> Any:
        _, _, _, answered, _, _, sums = where
        total = table_sum(pointer(workspace[2 + number], real), answered * sums, sums)
        count = pointer(workspace[1], types.int64)[answered]
        own = end(total, count, own, real(numbers[number]), real(numbers[2]))
        return own, tell(own, scratch[0])

    return ended


@functools.cache
def _recall_maximum(real: Any) -> Function:
    @device
    def maximum(
        source: Any, shape: Any, strides: Any, where: Any, workspace: Any, numbers: Any, scratch: Any, own: Any, s: Any
    ) -> Any:
        _, _, read, answered, _, _, _ = where
        keys = pointer(workspace[0], types.uint64)
        return real(_value_of_key(keys[answered])), real(_value_of_key(keys[read]))

    return maximum


# ------------------------------------------------------------------------------------------------------------ kernels


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    operands = len(variant.operands)
    kept, row = int64s(variant.kept_dimensions), int64s(variant.row_dimensions)
    signature = types.void(
        int64s(operands),  # addresses
        int64s(4),  # the workspace: addresses of keys, counts, and of the sums of both passes
        int64s(5),  # rows, elements of a row, parts of a row, chunks of a part, sums of a row
        types.UniTuple(types.float64, 3),  # what divides the sums of both passes, eps
        kept,  # the rows' shape and strides
        types.UniTuple(kept, operands),
        row,  # a row's shape and strides
        types.UniTuple(row, operands),
    )
    # So that no register spills: float64, general layouts and many operands take more than half of a multiprocessor's.
    is_small = variant.accumulate == "float32" and variant.kept_dimensions == variant.row_dimensions == 1
    blocks = BLOCKS if is_small and operands < 4 else 1
    is_tight = operands == 3 or any(one.counts for one in variant.formula.passes)
    body = _pass if variant.stage in PASSES else _write
    return Kernel(
        str(variant), lambda: (body(variant), signature), THREADS, blocks, older_blocks=1 if is_tight else None
    )


def _steps(variant: Variant, number: int) -> tuple[Function, Function]:
    """The steps of the first passes; of a whole row they are done here, of others recalled."""
    steps = []
    for i, one in enumerate(variant.formula.passes[:number]):
        if variant.stage != WHOLE:
            steps.append(_recall(variant, i))
        else:
            steps.append(_whole_sum(variant, i) if one.is_sum else _maximum(variant))
    first, second, *_ = *steps, _no_step(), _no_step()
    return first, second


def _begin(variant: Variant) -> Function:
    """begin(addresses, sizes, kept_shape, kept): what a thread has to do, of all steps."""
    task, starts = _task(variant.mode), _starts(tuple(ITEMSIZE[dtype] for _, dtype in variant.operands))

    @device
    def begin(addresses: Any, sizes: Any, kept_shape: Any, kept: Any) -> Any:
        rows, n, parts, part_chunks, sums = sizes
        row, answers, writes, part = task(rows, parts)
        read = min(row, rows - 1)
        where = (n, rows, read, min(answers, rows - 1), part, part_chunks, sums)
        return starts(addresses, kept_shape, kept, read), where, row < rows, answers < rows, writes

    return begin


def _write(variant: Variant) -> Function:
    """All passes, or what they have found, then the results."""
    plan, accumulate = variant.formula, variant.accumulate
    real, begin = OPERATIONS[accumulate].type, _begin(variant)
    first, second = _steps(variant, len(plan.passes))
    names = [name for name, _ in variant.operands]
    write_row = _row_writer(variant) if plan.element is not None else _no_row
    write_first, write_second = (
        _number_writer(variant, names.index(one.written)) if one.written in names else _no_number
        for one in (*plan.passes, Pass(None, ()))[:2]
    )

    def write(
        addresses: Any, workspace: Any, sizes: Any, numbers: Any, kept_shape: Any, kept: Any, row_shape: Any, row: Any
    ) -> None:
        scratch = (
            cuda.shared.array(EXCHANGE, real),
            cuda.shared.array(EXCHANGE, types.int64),
            cuda.shared.array(TABLE, real),
        )
        source, where, is_read, _, writes = begin(addresses, sizes, kept_shape, kept)
        own_s, s = first(source, row_shape, row, where, workspace, numbers, scratch, real(0), real(0))
        own_t, t = second(source, row_shape, row, where, workspace, numbers, scratch, own_s, s)
        if writes and where[4] == 0:
            write_first(addresses, kept_shape, kept, where[3], own_s)
            write_second(addresses, kept_shape, kept, where[3], own_t)
        if is_read:
            write_row(source, row_shape, row, where, s, t)

    return write


@device
def _no_row(source: Any, shape: Any, strides: Any, where: Any, s: Any, t: Any) -> None:
    pass


def _row_writer(variant: Variant) -> Function:
    """write_row(source, shape, strides, where, s, t): a part of a row of results."""
    plan, walk = variant.formula, _walk(variant.mode)
    element, storage, write = plan.element, STORAGE[variant.out], writer(variant.out, variant.accumulate)
    elements = _elements(variant, plan.reads)
    assert element is not None

    @device
    def write_row(source: Any, shape: Any, strides: Any, where: Any, s: Any, t: Any) -> None:
        n, _, _, _, part, part_chunks, _ = where
        out = pointer(source[0], storage)
        start, stride = walk()
        begin = part * part_chunks * SUM_CHUNK
        for i in range(begin + start, min(n, begin + part_chunks * SUM_CHUNK), stride):
            write(out, offset(i, shape, strides[0]), element(*elements(source, shape, strides, i), s, t))

    return write_row


@device
def _no_number(addresses: Any, shape: Any, strides: Any, row: Any, value: Any) -> None:
    pass


def _number_writer(variant: Variant, place: int) -> Function:
    """write_number(addresses, shape, strides, row, value): to the operand in this place."""
    dtype = variant.operands[place][1]
    storage, write = STORAGE[dtype], writer(dtype, variant.accumulate)

    @device
    def write_number(addresses: Any, shape: Any, strides: Any, row: Any, value: Any) -> None:
        write(pointer(addresses[place], storage), offset(row, shape, strides[place]), value)

    return write_number


def _pass(variant: Variant) -> Function:
    """A part of a row's last pass but those that are recalled: its maximum, or its chunks' sums."""
    number = PASSES.index(variant.stage)
    one, accumulate, mode = variant.formula.passes[number], variant.accumulate, variant.mode
    real, counts, begin = OPERATIONS[accumulate].type, one.counts, _begin(variant)
    first, _ = _steps(variant, number)
    if not one.is_sum:
        return _maximum_of_part(variant)
    chunk_sum, chunk_walk = _chunk_sum(accumulate, _term(variant, one), mode), _chunk_walk(mode)
    team = _team(_plus, mode)

    def sums_of_part(
        addresses: Any, workspace: Any, sizes: Any, numbers: Any, kept_shape: Any, kept: Any, row_shape: Any, row: Any
    ) -> None:
        exchange = cuda.shared.array(EXCHANGE, real)
        count_exchange = cuda.shared.array(EXCHANGE, types.int64)
        scratch = (exchange, count_exchange, 0)
        source, where, _, is_answered, writes = begin(addresses, sizes, kept_shape, kept)
        _, s = first(source, row_shape, row, where, workspace, numbers, scratch, real(0), real(0))
        n, _, _, answered, part, part_chunks, _ = where
        sums, counted_before = pointer(workspace[2 + number], real), pointer(workspace[1], types.int64)
        start, step, _ = chunk_walk()
        chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK
        count = types.int64(0)
        before = part * part_chunks
        for chunk in range(before + start, min(chunks, before + part_chunks), step):
            value, counted = chunk_sum(source, row_shape, row, s, chunk, n, exchange)
            count += counted
            if _lane() == 0 and is_answered:
                sums[answered * chunks + chunk] = value
        if counts:
            count = team(count, count_exchange)
            if writes:
                atomic_add(counted_before, answered, count)

    return sums_of_part


def _maximum_of_part(variant: Variant) -> Function:
    real, begin, maximum = OPERATIONS[variant.accumulate].type, _begin(variant), _maximum(variant)

    def maximum_of_part(
        addresses: Any, workspace: Any, sizes: Any, numbers: Any, kept_shape: Any, kept: Any, row_shape: Any, row: Any
    ) -> None:
        scratch = (cuda.shared.array(EXCHANGE, real), 0, 0)
        source, where, _, _, writes = begin(addresses, sizes, kept_shape, kept)
        value, _ = maximum(source, row_shape, row, where, workspace, numbers, scratch, real(0), real(0))
        if writes:
            atomic_max(pointer(workspace[0], types.uint64), where[3], _key(value))

    return maximum_of_part


# ------------------------------------------------------------------------------------------------------------- launch


class Schedule(NamedTuple):
    """How the rows are spread over thread blocks."""

    mode: str
    parts: int
    """Of a row, one thread block each; 1: whole rows."""
    part_chunks: int
    grid: tuple[int, int]


def schedule(rows: int, n: int, by_columns: bool, fill: int) -> Schedule:
    """A schedule for `rows` rows of n elements on a GPU that `fill` thread blocks keep busy."""
    chunks = -(-n // SUM_CHUNK)
    if by_columns:
        mode, most = COLUMNS, ROW_TABLE
    elif chunks <= 1 or (rows >= WARPS * fill and chunks <= ROW_TABLE):
        mode, most = ROWS, ROW_TABLE
    else:
        mode, most = BLOCK, TABLE
    groups = rows if mode == BLOCK else -(-rows // WARPS)
    worth = 2 * WARPS if mode == BLOCK else 2  # chunks that pay for a block of their own
    parts = min(-(-2 * fill // groups), -(-chunks // worth)) if groups < fill else 1
    if chunks > most:
        parts = max(parts, 2)
    part_chunks = max(1, -(-chunks // max(parts, 1)))
    parts = max(1, -(-chunks // part_chunks))
    return Schedule(mode, parts, part_chunks, grid_of(groups * parts))


class _Step(NamedTuple):
    """One launch and those of its arguments that the spec decides."""

    launch: Launch
    sizes: tuple[int, ...]
    layout: tuple[int | float, ...]

    def __call__(self, stream: int, addresses: tuple[int, ...], workspace: tuple[int, ...] = (0, 0, 0, 0)) -> None:
        self.launch(stream, *addresses, *workspace, *self.sizes, *self.layout)


def prepare(spec: ReductionSpec, gpu: Device) -> ReductionLaunch:
    """Choose kernels: of rows whose elements lie side by side, of rows that do themselves, or those of this file."""
    general = functools.cache(functools.partial(prepare_general, spec, gpu))
    return prepare_rows(spec, gpu, general) or prepare_columns(spec, gpu, general) or general()


def prepare_general(spec: ReductionSpec, gpu: Device) -> ReductionLaunch:
    """Choose a schedule of these kernels and build the launches."""
    layouts = {name: layout for name in ("out", *OPERANDS) if (layout := getattr(spec, name)) is not None}
    operands, kept, shape = tuple((name, one.dtype) for name, one in layouts.items()), spec.kept, spec.x.shape
    kept_shape, *kept_strides = as_dimensions(shape[:kept], *(one.strides[:kept] for one in layouts.values()))
    nowhere = (0,) * (len(shape) - kept)
    row_shape, *row_strides = as_dimensions(shape[kept:], *(one.strides[kept:] or nowhere for one in layouts.values()))
    rows, n = math.prod(kept_shape), math.prod(row_shape)
    numbers = numbers_of(spec, n)
    x = list(layouts).index("x")
    near, far = abs(kept_strides[x][-1]), abs(row_strides[x][-1])
    by_columns = kept_shape[-1] > 1 and row_shape[-1] > 1 and 0 < near < far
    fill = BLOCKS * multiprocessors(gpu)
    plan = schedule(rows, n, by_columns, fill)
    layout = flat((*numbers, kept_shape, *kept_strides, row_shape, *row_strides))

    def step(stage: str, plan: Schedule, sums: int = 0) -> _Step:
        variant = Variant(stage, spec.operation, operands, len(kept_shape), len(row_shape), plan.mode)
        sizes = (rows, n, plan.parts, plan.part_chunks, sums)
        return _Step(Launch(kernel(variant), gpu, plan.grid), sizes, layout)

    if plan.parts == 1:
        with on(gpu):
            whole = step(WHOLE, plan)

        def launch(stream: int, out: int, *others: int) -> None:
            with on(gpu):
                whole(stream, (out, *others))

        return launch

    accumulate = ACCUMULATE[spec.out.dtype]
    itemsize, passes = ITEMSIZE[accumulate], formula(spec.operation, spec.out.dtype).passes
    counts = [-(-n // SUM_CHUNK)]
    with on(gpu):
        levels = []
        while counts[-1] > SUM_CHUNK:  # the chunk sums become the elements of the next level
            levels.append(_sums_of_sums(rows, counts[-1], accumulate, gpu, fill))
            counts.append(-(-counts[-1] // SUM_CHUNK))
        steps = [step(stage, plan, counts[-1]) for stage, _ in zip(PASSES, passes, strict=False)]
        if spec.one_for_a_row:
            plan = Schedule(ROWS, 1, plan.part_chunks, grid_of(-(-rows // WARPS)))
        end = step(END, plan, counts[-1])
    bytes_of_pass = itemsize * rows * sum(counts)

    def launch_split(stream: int, out: int, *others: int) -> None:
        addresses = (out, *others)
        with on(gpu), Workspace(gpu, stream, 16 * rows, len(PASSES) * bytes_of_pass) as (keys, first):
            last = [first + bytes_of_pass * (i + 1) - itemsize * rows * counts[-1] for i in range(len(PASSES))]
            found = (keys, keys + 8 * rows, *last)  # of each pass, the sums of the last level
            for i, (run, one) in enumerate(zip(steps, passes, strict=True)):
                sums = first + bytes_of_pass * i
                run(stream, addresses, (*found[:2], *(sums,) * 2) if i == 0 else (*found[:3], sums))
                for level, length in zip(levels if one.is_sum else (), counts, strict=False):
                    below, sums = sums, sums + itemsize * rows * length
                    level(stream, (0, below), (0, 0, sums, 0))
            end(stream, addresses, found)

    return launch_split


def _sums_of_sums(rows: int, n: int, accumulate: str, gpu: Device, fill: int) -> _Step:
    """A level of the tree: the chunks' sums of n sums of each row."""
    plan = schedule(rows, n, False, fill)
    variant = Variant(PASSES[0], "sum", (("out", accumulate), ("x", accumulate)), 1, 1, plan.mode)
    layout = flat((1.0, 1.0, 0.0, (rows,), (0,), (n,), (n,), (0,), (1,)))
    return _Step(Launch(kernel(variant), gpu, plan.grid), (rows, n, plan.parts, plan.part_chunks, 0), layout)
