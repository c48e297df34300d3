"""Reductions of rows: mean, sum, softmax and log_softmax.

The contract's sum tree fits a warp: of a chunk's 256 lanes every thread has 8. Neighbours are added between threads by
shuffles and within a thread in registers. A thread block is 16 warps and works in one of three modes, which decide
speed only; a kernel is compiled for one:

    ROWS     16 rows, one per warp; many short rows
    BLOCK    one row, its chunks dealt to the warps; longer rows
    COLUMNS  16 rows that lie side by side in memory; of 32 threads that read one row each has 8 neighbouring lanes of
             the tree, and neighbouring threads read neighbouring rows; then the block transposes, and warp w goes on
             with row w

Few long rows are split over many blocks: the partial results go through a workspace in global memory, and the stages
become launches. The maximum and the number of elements equal to it are exact, so their partials meet in atomics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, FLOAT_DTYPES, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from ...views import Device
from .. import ReductionLaunch
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
from .functions import exp as exp_of
from .functions import log as log_of
from .launch import Kernel, Launch, Workspace, flat, grid_of, multiprocessors, on

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


class Variant(NamedTuple):
    """What a kernel is compiled for: elements of dtype x are cast to dtype `cast` first and end as dtype out."""

    stage: str
    x: str
    cast: str
    out: str
    kept_dimensions: int
    row_dimensions: int
    mode: str


WHOLE = ("mean", "softmax", "log_softmax")
SPLIT = ("maximum", "sums", "exp_sums", "softmax_end", "log_softmax_end")
"""Stages that do a whole row, and the launches of a row that is split."""


def variants() -> Iterator[Variant]:
    """Every stage for every result dtype; every dtype of x and general layouts once."""
    for stage in WHOLE + SPLIT:
        modes = MODES if stage in WHOLE else (BLOCK, COLUMNS)
        for dtype in FLOAT_DTYPES:
            # The 16-bit dtypes are float32 but for how they are read and written.
            for mode in modes if ITEMSIZE[dtype] >= 4 else (BLOCK,):
                yield Variant(stage, dtype, dtype, dtype, 1, 1, mode)
        yield Variant(stage, "int64", "bfloat16", "bfloat16", 2, 2, BLOCK)
    for x in STORAGE:
        if x not in FLOAT_DTYPES:
            yield Variant("mean", x, "float64", "float64", 1, 1, BLOCK)


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
    """Of integers."""
    return a + b


@functools.cache
def _chunk_sum(accumulate: str, term: Function, mode: str) -> Function:
    """chunk_sum(..., chunk, n, exchange): the tree's sum of a chunk of term(...) and how many of its terms were ties.
    The sum is that of the row that the warp answers for, the ties are those that this thread saw.
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
    def chunk_sum(x: Any, place: Any, shape: Any, strides: Any, maximum: Any, chunk: Any, n: Any, exchange: Any) -> Any:
        lanes = cuda.local.array(THREAD_LANES, real)
        for q in range(THREAD_LANES):
            lanes[q] = real(0)
        # What counts within the chunk is 32 bits wide and takes half the registers.
        begin = types.int64(chunk) * SUM_CHUNK
        length = types.int32(min(n - begin, SUM_CHUNK))
        i = types.int32(_member() * THREAD_LANES if mode == COLUMNS else _lane())
        ties = types.int32(0)
        for _ in range(0, length, SUM_LANES):
            for q in range(THREAD_LANES):
                value, tie = term(x, place, shape, strides, maximum, begin + min(types.int32(i + q * step), length - 1))
                if i + q * step < length:
                    lanes[q] = add(lanes[q], value)
                    ties = types.int32(ties + tie)
            i = types.int32(i + SUM_LANES)
        if mode == COLUMNS:
            exchange[_member(), _column()] = fold_thread(lanes)
            cuda.syncthreads()
            value = exchange[_lane(), _warp()]
            cuda.syncthreads()
            return fold_warp(value), ties
        for q in range(THREAD_LANES):
            lanes[q] = fold_warp(lanes[q])
        return fold_thread(lanes), ties

    return chunk_sum


@functools.cache
def _plain(read: Function) -> Function:
    """The term of a mean: the element."""

    @device
    def term(x: Any, place: Any, shape: Any, strides: Any, maximum: Any, i: Any) -> Any:
        return read(x, place + offset(i, shape, strides)), 0

    return term


@functools.cache
def _exponential(accumulate: str, precise: bool) -> Function:
    """exponential(x, maximum, t): exp(x - maximum), given t, the rounded difference, whose error `precise` makes up."""
    real, add, exp = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add, exp_of(accumulate)

    @device
    def exponential(x: Any, maximum: Any, t: Any) -> Any:
        if not precise:
            return exp(t, real(0))
        shadow = add(t, -x)
        return exp(t, add(add(x, -add(t, -shadow)), add(-maximum, -shadow)))  # the error, exactly

    return exponential


@functools.cache
def _counted(read: Function, accumulate: str, precise: bool) -> Function:
    """The term of a softmax: exp of what the element is below the maximum; ties with it are counted instead."""
    real, add = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add
    exponential = _exponential(accumulate, precise)

    @device
    def term(x: Any, place: Any, shape: Any, strides: Any, maximum: Any, i: Any) -> Any:
        value = read(x, place + offset(i, shape, strides))
        t = add(value, -maximum)
        return (real(0), 1) if t == real(0) else (exponential(value, maximum, t), 0)

    return term


@functools.cache
def _table_sum(accumulate: str) -> Function:
    """table_sum(table, place, count): the tree's sum of up to SUM_CHUNK values, by one warp."""

    @device
    def term(x: Any, place: Any, shape: Any, strides: Any, maximum: Any, i: Any) -> Any:
        return x[place + i], 0

    chunk_sum = _chunk_sum(accumulate, term, ROWS)

    @device
    def table_sum(table: Any, place: Any, count: Any) -> Any:
        total, _ = chunk_sum(table, place, 0, 0, 0, types.int64(0), count, 0)
        return total

    return table_sum


@functools.cache
def _normaliser(accumulate: str, logarithm: bool) -> Function:
    """normaliser(ties, rest): what `_result` needs of the denominator, ties + rest."""
    operations = OPERATIONS[accumulate]
    real, add, divide, log = operations.type, operations.add, operations.divide, log_of(accumulate)

    @device
    def normaliser(ties: Any, rest: Any) -> Any:
        count = real(ties)
        total = add(count, rest)
        if not logarithm:
            return total
        shadow = add(total, -count)
        error = add(add(count, -add(total, -shadow)), add(rest, -shadow))  # of the addition, exactly
        return add(log(total), divide(error, total))

    return normaliser


@functools.cache
def _result(accumulate: str, logarithm: bool, precise: bool) -> Function:
    """result(x, maximum, normaliser): of an element."""
    add, divide, exponential = (
        OPERATIONS[accumulate].add,
        OPERATIONS[accumulate].divide,
        _exponential(accumulate, precise),
    )

    @device
    def result(x: Any, maximum: Any, normaliser: Any) -> Any:
        t = add(x, -maximum)
        return add(t, -normaliser) if logarithm else divide(exponential(x, maximum, t), normaliser)

    return result


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


# ------------------------------------------------------------------------------------------------------------ kernels


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    body = {"mean": _mean, "maximum": _maximum, "sums": _sums, "exp_sums": _sums}.get(variant.stage)
    if body is None:
        body = _softmax_end if variant.stage.endswith("_end") else _softmax
    kept, row = int64s(variant.kept_dimensions), int64s(variant.row_dimensions)
    signature = types.void(
        *[types.int64] * 5,  # addresses: out, x, keys, ties, sums
        *[types.int64] * 3,  # rows, elements of a row, what a mean divides by or the number of sums
        *[kept] * 3,  # the rows' shape and strides: x, out
        *[row] * 3,  # a row's shape and strides: x, out
        *[types.int64] * 2,  # parts of a row, chunks of a part
    )
    # So that no register spills: float64 and general layouts need more than a half of the multiprocessor's.
    small = ACCUMULATE[variant.cast] == "float32" and variant.kept_dimensions == variant.row_dimensions == 1
    return Kernel(str(variant), lambda: (body(variant), signature), THREADS, BLOCKS if small else 1)


def _mean(variant: Variant) -> Function:
    """A whole row: its chunks, the chunk of its chunk sums, the division."""
    accumulate = ACCUMULATE[variant.cast]
    real, divide = OPERATIONS[accumulate].type, OPERATIONS[accumulate].divide
    read, write = reader(variant.x, variant.cast), writer(variant.out, accumulate)
    chunk_sum, table_sum = _chunk_sum(accumulate, _plain(read), variant.mode), _table_sum(accumulate)
    task, chunk_walk = _task(variant.mode), _chunk_walk(variant.mode)
    storage, storage_out = STORAGE[variant.x], STORAGE[variant.out]

    def mean(
        out_address: Any, x_address: Any, keys_address: Any, ties_address: Any, sums_address: Any,
        rows: Any, n: Any, count: Any, kept_shape: Any, x_kept: Any, out_kept: Any,
        row_shape: Any, x_row: Any, out_row: Any, parts: Any, part_chunks: Any,
    ) -> None:  # fmt: skip
        x, out = pointer(x_address, storage), pointer(out_address, storage_out)
        exchange = cuda.shared.array(EXCHANGE, real)
        sums = cuda.shared.array(TABLE, real)
        row, answers, writes, _ = task(rows, parts)
        place = offset(min(row, rows - 1), kept_shape, x_kept)
        first, step, table = chunk_walk()

        chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK
        for chunk in range(first, types.int32(chunks), step):
            value, _ = chunk_sum(x, place, row_shape, x_row, real(0), chunk, n, exchange)
            if _lane() == 0:
                sums[table + chunk] = value
        cuda.syncthreads()
        total = table_sum(sums, table, chunks)
        if writes:
            write(out, offset(answers, kept_shape, out_kept), divide(total, real(count)))

    return mean


def _softmax(variant: Variant) -> Function:
    """A whole row: its maximum, the sum of its exponentials, its results; x is read three times."""
    accumulate, logarithm = ACCUMULATE[variant.cast], variant.stage == "log_softmax"
    real, precise = OPERATIONS[accumulate].type, variant.cast == accumulate
    read, write = reader(variant.x, variant.cast), writer(variant.out, accumulate)
    mode = variant.mode
    chunk_sum, table_sum = _chunk_sum(accumulate, _counted(read, accumulate, precise), mode), _table_sum(accumulate)
    task, walk, chunk_walk, tell = _task(mode), _walk(mode), _chunk_walk(mode), _tell(mode)
    team_maximum, team_count = _team(_larger, mode), _team(_plus, mode)
    normaliser, result = _normaliser(accumulate, logarithm), _result(accumulate, logarithm, precise)
    storage, storage_out = STORAGE[variant.x], STORAGE[variant.out]

    def softmax(
        out_address: Any, x_address: Any, keys_address: Any, ties_address: Any, sums_address: Any,
        rows: Any, n: Any, count: Any, kept_shape: Any, x_kept: Any, out_kept: Any,
        row_shape: Any, x_row: Any, out_row: Any, parts: Any, part_chunks: Any,
    ) -> None:  # fmt: skip
        x, out = pointer(x_address, storage), pointer(out_address, storage_out)
        exchange = cuda.shared.array(EXCHANGE, real)
        ties_exchange = cuda.shared.array(EXCHANGE, types.int64)
        sums = cuda.shared.array(TABLE, real)
        row, _, _, _ = task(rows, parts)
        place = offset(min(row, rows - 1), kept_shape, x_kept)
        start, stride = walk()
        first, step, table = chunk_walk()

        maximum = real(-math.inf)
        for i in range(start, n, stride):
            maximum = _larger(read(x, place + offset(i, row_shape, x_row)), maximum)
        maximum = tell(team_maximum(maximum, exchange), exchange)

        ties = types.int64(0)
        chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK
        for chunk in range(first, types.int32(chunks), step):
            value, seen = chunk_sum(x, place, row_shape, x_row, maximum, chunk, n, exchange)
            ties += seen
            if _lane() == 0:
                sums[table + chunk] = value
        cuda.syncthreads()
        rest = table_sum(sums, table, chunks)
        ties = team_count(ties, ties_exchange)
        denominator = tell(normaliser(ties, rest), exchange)

        if row < rows:
            out_place = offset(row, kept_shape, out_kept)
            for i in range(start, n, stride):
                value = read(x, place + offset(i, row_shape, x_row))
                write(out, out_place + offset(i, row_shape, out_row), result(value, maximum, denominator))

    return softmax


def _maximum(variant: Variant) -> Function:
    """Of a part of a row."""
    accumulate = ACCUMULATE[variant.cast]
    real, read, storage = OPERATIONS[accumulate].type, reader(variant.x, variant.cast), STORAGE[variant.x]
    task, walk, team_maximum = _task(variant.mode), _walk(variant.mode), _team(_larger, variant.mode)

    def maximum_of_part(
        out_address: Any, x_address: Any, keys_address: Any, ties_address: Any, sums_address: Any,
        rows: Any, n: Any, count: Any, kept_shape: Any, x_kept: Any, out_kept: Any,
        row_shape: Any, x_row: Any, out_row: Any, parts: Any, part_chunks: Any,
    ) -> None:  # fmt: skip
        x, keys = pointer(x_address, storage), pointer(keys_address, types.uint64)
        exchange = cuda.shared.array(EXCHANGE, real)
        row, answers, writes, part = task(rows, parts)
        row = min(row, rows - 1)
        place = offset(row, kept_shape, x_kept)
        start, stride = walk()
        begin = part * part_chunks * SUM_CHUNK
        value = real(-math.inf)
        for i in range(begin + start, min(n, begin + part_chunks * SUM_CHUNK), stride):
            value = _larger(read(x, place + offset(i, row_shape, x_row)), value)
        value = team_maximum(value, exchange)
        if writes:
            atomic_max(keys, answers, _key(value))

    return maximum_of_part


def _sums(variant: Variant) -> Function:
    """The chunk sums of a part of a row, of its elements ("sums") or of their exponentials ("exp_sums")."""
    accumulate, exponentials = ACCUMULATE[variant.cast], variant.stage == "exp_sums"
    real, read, storage = OPERATIONS[accumulate].type, reader(variant.x, variant.cast), STORAGE[variant.x]
    term = _counted(read, accumulate, variant.cast == accumulate) if exponentials else _plain(read)
    chunk_sum, chunk_walk = _chunk_sum(accumulate, term, variant.mode), _chunk_walk(variant.mode)
    task, team_count = _task(variant.mode), _team(_plus, variant.mode)

    def sums_of_part(
        out_address: Any, x_address: Any, keys_address: Any, ties_address: Any, sums_address: Any,
        rows: Any, n: Any, count: Any, kept_shape: Any, x_kept: Any, out_kept: Any,
        row_shape: Any, x_row: Any, out_row: Any, parts: Any, part_chunks: Any,
    ) -> None:  # fmt: skip
        x, sums = pointer(x_address, storage), pointer(sums_address, real)
        keys, all_ties = pointer(keys_address, types.uint64), pointer(ties_address, types.int64)
        exchange = cuda.shared.array(EXCHANGE, real)
        ties_exchange = cuda.shared.array(EXCHANGE, types.int64)
        row, answers, writes, part = task(rows, parts)
        row = min(row, rows - 1)
        place = offset(row, kept_shape, x_kept)
        first, step, _ = chunk_walk()
        maximum = real(_value_of_key(keys[row])) if exponentials else real(0)
        chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK
        ties = types.int64(0)
        begin = part * part_chunks
        for chunk in range(begin + first, min(chunks, begin + part_chunks), step):
            value, seen = chunk_sum(x, place, row_shape, x_row, maximum, chunk, n, exchange)
            ties += seen
            if _lane() == 0 and answers < rows:
                sums[answers * chunks + chunk] = value
        if exponentials:
            ties = team_count(ties, ties_exchange)
            if writes:
                atomic_add(all_ties, answers, ties)

    return sums_of_part


def _softmax_end(variant: Variant) -> Function:
    """The results of a part of a row, from the row's maximum, ties and at most SUM_CHUNK sums."""
    accumulate, logarithm = ACCUMULATE[variant.cast], variant.stage == "log_softmax_end"
    real = OPERATIONS[accumulate].type
    read, write = reader(variant.x, variant.cast), writer(variant.out, accumulate)
    table_sum, normaliser = _table_sum(accumulate), _normaliser(accumulate, logarithm)
    result = _result(accumulate, logarithm, variant.cast == accumulate)
    task, walk, tell = _task(variant.mode), _walk(variant.mode), _tell(variant.mode)
    storage, storage_out = STORAGE[variant.x], STORAGE[variant.out]

    def softmax_of_part(
        out_address: Any, x_address: Any, keys_address: Any, ties_address: Any, sums_address: Any,
        rows: Any, n: Any, count: Any, kept_shape: Any, x_kept: Any, out_kept: Any,
        row_shape: Any, x_row: Any, out_row: Any, parts: Any, part_chunks: Any,
    ) -> None:  # fmt: skip
        x, out = pointer(x_address, storage), pointer(out_address, storage_out)
        keys, all_ties = pointer(keys_address, types.uint64), pointer(ties_address, types.int64)
        sums = pointer(sums_address, real)
        exchange = cuda.shared.array(EXCHANGE, real)
        row, answers, _, part = task(rows, parts)
        read_row = min(row, rows - 1)
        place = offset(read_row, kept_shape, x_kept)
        start, stride = walk()
        begin = part * part_chunks * SUM_CHUNK
        maximum = real(_value_of_key(keys[read_row]))
        answered = min(answers, rows - 1)
        rest = table_sum(sums, answered * count, count)
        denominator = tell(normaliser(all_ties[answered], rest), exchange)
        if row < rows:
            out_place = offset(row, kept_shape, out_kept)
            for i in range(begin + start, min(n, begin + part_chunks * SUM_CHUNK), stride):
                value = read(x, place + offset(i, row_shape, x_row))
                write(out, out_place + offset(i, row_shape, out_row), result(value, maximum, denominator))

    return softmax_of_part


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


class _Rows(NamedTuple):
    """The rows' shape and strides, then a row's, as the kernels take them."""

    kept_shape: tuple[int, ...]
    x_kept: tuple[int, ...]
    out_kept: tuple[int, ...]
    row_shape: tuple[int, ...]
    x_row: tuple[int, ...]
    out_row: tuple[int, ...]


class Step(NamedTuple):
    """One launch and those of its arguments that the spec decides."""

    launch: Launch
    layout: tuple[int, ...]


def prepare(spec: ReductionSpec, gpu: Device) -> ReductionLaunch:
    """Choose a schedule and build the launches."""
    kept, x, out = spec.kept, spec.x, spec.out
    outer = as_dimensions(x.shape[:kept], x.strides[:kept], out.strides[:kept])
    is_sum = spec.operation in ("mean", "sum")
    whole_stage = "mean" if is_sum else spec.operation  # a sum is a mean that divides by 1
    out_row = (0,) * len(x.shape[kept:]) if is_sum else out.strides[kept:]
    layout = _Rows(*outer, *as_dimensions(x.shape[kept:], x.strides[kept:], out_row))
    rows, n = math.prod(layout.kept_shape), math.prod(layout.row_shape)
    divisor = 1 if spec.operation == "sum" else n
    near, far = abs(layout.x_kept[-1]), abs(layout.x_row[-1])
    by_columns = layout.kept_shape[-1] > 1 and layout.row_shape[-1] > 1 and 0 < near < far
    fill = BLOCKS * multiprocessors(gpu)
    plan = schedule(rows, n, by_columns, fill)

    def step(
        stage: str, plan: Schedule = plan, layout: _Rows = layout, dtype: str = x.dtype, cast: str = out.dtype
    ) -> Step:
        variant = Variant(stage, dtype, cast, out.dtype, len(layout.kept_shape), len(layout.row_shape), plan.mode)
        return Step(Launch(kernel(variant), gpu, plan.grid), flat((*layout, plan.parts, plan.part_chunks)))

    if plan.parts == 1:
        with on(gpu):
            whole = step(whole_stage)

        def launch(stream: int, out: int, x: int, *_: int) -> None:
            with on(gpu):
                whole.launch(stream, out, x, 0, 0, 0, rows, n, divisor, *whole.layout)

        return launch

    accumulate = ACCUMULATE[out.dtype]
    itemsize = ITEMSIZE[accumulate]
    counts = [-(-n // SUM_CHUNK)]
    with on(gpu):
        maximum = None if is_sum else step("maximum")
        first = step("sums" if is_sum else "exp_sums")
        levels = []
        while counts[-1] > SUM_CHUNK:  # the chunk sums become the elements of the next level
            level = schedule(rows, counts[-1], False, fill)
            sums_layout = _Rows((rows,), (counts[-1],), (0,), (counts[-1],), (1,), (0,))
            levels.append(step("sums", level, sums_layout, accumulate, accumulate))
            counts.append(-(-counts[-1] // SUM_CHUNK))
        count = counts[-1]
        if is_sum:
            shape = layout.kept_shape
            strides = tuple(math.prod(shape[i + 1 :]) * count for i in range(len(shape)))
            sums_layout = _Rows(shape, strides, layout.out_kept, (count,), (1,), (0,))
            last = step("mean", schedule(rows, count, False, 0), sums_layout, accumulate, accumulate)
        else:
            last = step(spec.operation + "_end")

    def launch_split(stream: int, out: int, x: int, *_: int) -> None:
        with on(gpu), Workspace(gpu, stream, 16 * rows, itemsize * rows * sum(counts)) as (keys, sums):
            ties = keys + 8 * rows
            if maximum is not None:
                maximum.launch(stream, 0, x, keys, ties, 0, rows, n, 0, *maximum.layout)
            first.launch(stream, 0, x, keys, ties, sums, rows, n, 0, *first.layout)
            for level, length in zip(levels, counts, strict=False):
                below, sums = sums, sums + itemsize * rows * length
                level.launch(stream, 0, below, keys, ties, sums, rows, length, 0, *level.layout)
            if is_sum:
                last.launch(stream, out, sums, keys, ties, 0, rows, count, divisor, *last.layout)
            else:
                last.launch(stream, out, x, keys, ties, sums, rows, n, count, *last.layout)

    return launch_split
