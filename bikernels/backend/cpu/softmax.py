"""softmax, log_softmax and logsumexp: the exact maximum, the sum tree of the exponentials, then the results.

Per row, with m the maximum and t = x - m: c counts the elements with t = 0, r is the tree sum of exp(t) over the
others, u = c + r and e the error of that addition. softmax is exp(t) / u, log_softmax is t - (log(u) + e / u) and
logsumexp m + (log(u) + e / u). Where the result is as precise as the arithmetic (`precise`), exp(t) makes up for the
rounding of t.

A piece of the work is a group of rows, with all passes. Where there are too few groups to go round, each pass is
shared out by chunks, and between the passes the chunks' maxima and sums are gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .. import ReductionLaunch
from . import threads
from .compile import address_of, inner, invoke, kernel
from .elementary import NEAR, exp, exp_near, log
from .numerics import FLOAT, load, pointer, store, take
from .rows import (
    OUT,
    X,
    describe,
    lies_side_by_side,
    read_stretch,
    repeat_scalars,
    row_start,
    rows_at_a_time,
    write_scalars,
    write_stretch,
)
from .sum_tree import fold_lanes, sum_chunk, sum_tree

_NANOSECONDS_PER_ELEMENT = 1.0
"""A rough cost, by which `threads.run` judges whether another thread pays."""

_MAXIMUM, _SUM, _WRITE = 0, 1, 2
"""The passes; logsumexp has nothing left to do after the second."""

OPERATIONS = ("softmax", "log_softmax", "logsumexp")
_SOFTMAX, _LOG_SOFTMAX, _LOGSUMEXP = range(3)


# A group's state is, one after another: each chunk's maxima, each chunk's sums, each chunk's counts (int64), `width` of
# each. The first maxima become the rows' m, the first sums become u (softmax), log(u) + e / u
# (log_softmax) or the result (logsumexp).


@inner
def _state_bytes(g):  # type: ignore[no-untyped-def]
    return g.chunks * g.width * (2 * g.itemsize + 8)


# The workspace is: two blocks of SUM_LANES * width values in which a row's m and divisor are repeated, lanes for the
# tree (which counts use too), and two chunks: of x, and of what is computed from it.


@kernel
def _groups(kind, operation, precise, g, x, out, state, workspace, counter):  # type: ignore[no-untyped-def]
    """Take whole groups; `state` and `workspace` are this thread's own."""
    while True:
        group = take(counter)
        if group >= g.groups:
            return
        for chunk in range(g.chunks):
            _maximum(kind, g, x, group, chunk, state, workspace)
        _finish_maximum(kind, g, state)
        for chunk in range(g.chunks):
            _sum(kind, precise, g, x, group, chunk, state, workspace)
        _finish_sum(kind, operation, g, out, group, state, workspace)
        if operation != _LOGSUMEXP:
            for chunk in range(g.chunks):
                _write(kind, operation, precise, g, x, out, group, chunk, state, workspace)


@kernel
def _rows(kind, operation, loops, step, g, x, out, itemsize, state, workspace, counter):  # type: ignore[no-untyped-def]
    """Take `step` whole rows, which lie side by side, and read them where they lie (`_loops`)."""
    maxima, sums, exponentials = state, state + g.chunks * g.itemsize, _chunk(g, workspace, 0)
    counts = sums + g.chunks * g.itemsize
    maximum_of, sum_of, write = loops
    while True:
        first = take(counter) * step
        if first >= g.groups:
            return
        for row in range(first, min(first + step, g.groups)):
            source = row_start(g, X, x, row)
            invoke(maximum_of, (maxima, _lanes(g, workspace), source, g.n))
            maximum = np.float64(pointer(maxima, kind)[0])
            least = np.float64(pointer(_lanes(g, workspace), kind)[0])
            for chunk in range(g.chunks):
                place = chunk * SUM_CHUNK
                invoke(
                    sum_of,
                    (
                        sums + chunk * g.itemsize,
                        counts + 8 * chunk,
                        _lanes(g, workspace),
                        exponentials + place * g.itemsize,
                        source + place * itemsize,
                        maximum,
                        least,
                        _length(g, chunk),
                    ),
                )
            _finish_sum(kind, operation, g, out, row, state, workspace)
            if operation != _LOGSUMEXP:
                divisor = np.float64(pointer(sums, kind)[0])
                invoke(write, (row_start(g, OUT, out, row), source, exponentials, maximum, divisor, g.n))


@kernel
def _chunks(kind, operation, precise, step, g, x, out, state, workspace, counter):  # type: ignore[no-untyped-def]
    """Take chunks of any group, for one pass; `state` holds that of all groups."""
    while True:
        piece = take(counter)
        if piece >= g.groups * g.chunks:
            return
        group, chunk = piece // g.chunks, piece % g.chunks
        own = state + group * _state_bytes(g)
        if step == _MAXIMUM:
            _maximum(kind, g, x, group, chunk, own, workspace)
        elif step == _SUM:
            _sum(kind, precise, g, x, group, chunk, own, workspace)
        else:
            _write(kind, operation, precise, g, x, out, group, chunk, own, workspace)


@kernel
def _finish_pass(kind, operation, step, g, out, state, workspace):  # type: ignore[no-untyped-def]
    """What follows a pass, for all groups."""
    for group in range(g.groups):
        own = state + group * _state_bytes(g)
        if step == _MAXIMUM:
            _finish_maximum(kind, g, own)
        else:
            _finish_sum(kind, operation, g, out, group, own, workspace)


@inner
def _repeated(g, workspace, which):  # type: ignore[no-untyped-def]
    return workspace + which * SUM_LANES * g.width * g.itemsize


@inner
def _lanes(g, workspace):  # type: ignore[no-untyped-def]
    return _repeated(g, workspace, 2)


@inner
def _chunk(g, workspace, which):  # type: ignore[no-untyped-def]
    return _repeated(g, workspace, 4) + which * SUM_CHUNK * g.width * g.itemsize


@inner
def _length(g, chunk):  # type: ignore[no-untyped-def]
    return min(g.n - chunk * SUM_CHUNK, SUM_CHUNK)


@inner
def _error(kind, precise, x, maximum, t):  # type: ignore[no-untyped-def]
    """What exp makes up for of the rounding of t = x - maximum."""
    b = t - x
    error = (x - (t - b)) + (-maximum - b)
    return error if precise else kind(0)


@inner
def _exponential(kind, precise, x, maximum, t):  # type: ignore[no-untyped-def]
    """exp(x - maximum), given t, the rounded difference."""
    return exp(t, _error(kind, precise, x, maximum, t))


@inner
def _larger(x, y):  # type: ignore[no-untyped-def]
    """The maximum of x and y, NaN if either is."""
    return y if y > x or y != y else x


@inner
def _maximum(kind, g, x, group, chunk, state, workspace):  # type: ignore[no-untyped-def]
    length, target = _length(g, chunk), _chunk(g, workspace, 0)
    read_stretch(g, X, x, group, chunk * SUM_CHUNK, length, target)
    values, lanes = pointer(target, kind), pointer(_lanes(g, workspace), kind)
    active = 1
    while active < min(length, SUM_LANES):
        active *= 2
    for i in range(active * g.width):
        lanes[i] = kind(-np.inf)
    for first in range(0, length, active):
        for i in range(min(length - first, active) * g.width):
            lanes[i] = _larger(lanes[i], values[first * g.width + i])
    while active > 1:
        active //= 2
        for i in range(active * g.width):
            lanes[i] = _larger(lanes[i], lanes[active * g.width + i])
    result = pointer(state + chunk * g.width * g.itemsize, kind)
    for c in range(g.width):
        result[c] = lanes[c]


@inner
def _finish_maximum(kind, g, state):  # type: ignore[no-untyped-def]
    maxima = pointer(state, kind)
    for chunk in range(1, g.chunks):
        for c in range(g.width):
            maxima[c] = _larger(maxima[c], maxima[chunk * g.width + c])


@inner
def _sum(kind, precise, g, x, group, chunk, state, workspace):  # type: ignore[no-untyped-def]
    length, source, target = _length(g, chunk), _chunk(g, workspace, 0), _chunk(g, workspace, 1)
    if g.chunks > 1:
        read_stretch(g, X, x, group, chunk * SUM_CHUNK, length, source)
    repeat_scalars(kind, g, state, _repeated(g, workspace, 0))
    maximum = pointer(_repeated(g, workspace, 0), kind)
    values, terms = pointer(source, kind), pointer(target, kind)
    equal = pointer(_lanes(g, workspace), np.int32)
    used = min(length, SUM_LANES)
    for i in range(used * g.width):
        equal[i] = 0
    for first in range(0, length, SUM_LANES):
        start = first * g.width
        for i in range(min(length - first, SUM_LANES) * g.width):
            t = values[start + i] - maximum[i]
            is_zero = t == kind(0)
            term = _exponential(kind, precise, values[start + i], maximum[i], t)
            terms[start + i] = kind(0) if is_zero else term
            equal[i] += np.int32(is_zero)
    sums = state + g.chunks * g.width * g.itemsize
    counts = pointer(sums + g.chunks * g.width * g.itemsize, np.int64)
    for c in range(g.width):
        count = np.int64(0)
        for i in range(used):
            count += equal[i * g.width + c]
        counts[chunk * g.width + c] = count
    sum_chunk(kind, g.itemsize, target, length, g.width, _lanes(g, workspace), sums + chunk * g.width * g.itemsize)


@inner
def _finish_sum(kind, operation, g, out, group, state, workspace):  # type: ignore[no-untyped-def]
    sums = state + g.chunks * g.width * g.itemsize
    counts = pointer(sums + g.chunks * g.width * g.itemsize, np.int64)
    sum_tree(kind, g.itemsize, sums, g.chunks, g.width, _lanes(g, workspace))
    maxima, result = pointer(state, kind), pointer(sums, kind)
    for c in range(g.width):
        count = np.int64(0)
        for chunk in range(g.chunks):
            count += counts[chunk * g.width + c]
        ones, rest = kind(count), result[c]
        u = ones + rest
        b = u - ones
        e = (ones - (u - b)) + (rest - b)
        if operation == _SOFTMAX:
            result[c] = u
        else:
            result[c] = log(u) + e / u
        if operation == _LOGSUMEXP:
            m = maxima[c]
            result[c] = m if np.isinf(m) else m + result[c]
    if operation == _LOGSUMEXP:
        write_scalars(g, OUT, out, group, sums)


@inner
def _write(kind, operation, precise, g, x, out, group, chunk, state, workspace):  # type: ignore[no-untyped-def]
    first, length = chunk * SUM_CHUNK, _length(g, chunk)
    source, target = _chunk(g, workspace, 0), _chunk(g, workspace, 1)
    if g.chunks > 1:
        read_stretch(g, X, x, group, first, length, source)
    repeat_scalars(kind, g, state, _repeated(g, workspace, 0))
    repeat_scalars(kind, g, state + g.chunks * g.width * g.itemsize, _repeated(g, workspace, 1))
    maximum, divisor = pointer(_repeated(g, workspace, 0), kind), pointer(_repeated(g, workspace, 1), kind)
    values, results = pointer(source, kind), pointer(target, kind)
    for block in range(0, length, SUM_LANES):
        start = block * g.width
        count = min(length - block, SUM_LANES) * g.width
        if operation == _LOG_SOFTMAX:
            for i in range(count):
                results[start + i] = values[start + i] - maximum[i] - divisor[i]
        elif g.chunks == 1:  # the exponentials still lie there, but for those of the maximum, which are 1
            for i in range(count):
                is_zero = values[start + i] - maximum[i] == kind(0)
                results[start + i] = (kind(1) if is_zero else results[start + i]) / divisor[i]
        else:
            for i in range(count):
                t = values[start + i] - maximum[i]
                results[start + i] = _exponential(kind, precise, values[start + i], maximum[i], t) / divisor[i]
    write_stretch(g, OUT, out, group, first, length, target)


# ------------------------------------------------------------------------------------------ rows that lie side by side

_MAXIMUM_LANES = 64
"""Of a maximum, whose order decides nothing: enough for the vectors on their way."""


@functools.cache
def _loops(operation: str, dtype: str, out: str) -> tuple[int, int, int]:
    """Addresses of the loops over a row of `dtype` that becomes one of `out`.

    maximum(target, lanes, x, length); the first lane gets the minimum, or anything beside a NaN
    sum(target, count, lanes, exponentials, x, maximum, minimum, length): of a chunk; softmax keeps the exponentials
    write(target, x, exponentials, maximum, divisor, length)
    """
    integer, real = types.int64, types.float64
    accumulate = ACCUMULATE[out]
    keeps, precise = operation == "softmax", out == accumulate
    return (
        address_of(_maximum_loop(dtype, accumulate), *[integer] * 4),
        address_of(_sum_loop(dtype, accumulate, precise, keeps), *[integer] * 5, real, real, integer),
        address_of(_write_loop(operation, dtype, accumulate, out), *[integer] * 3, real, real, integer),
    )


def _maximum_loop(dtype: str, accumulate: str) -> Callable[..., None]:
    dtype, size = str(dtype), ITEMSIZE[accumulate]
    kind: Any = FLOAT[accumulate]
    lowest, count = kind(-np.inf), _MAXIMUM_LANES

    def maximum(target, lanes, x, length):  # type: ignore[no-untyped-def]
        most, least = pointer(lanes, kind), pointer(lanes + count * size, kind)
        for i in range(count):
            most[i], least[i] = lowest, -lowest
        whole = length - length % SUM_LANES
        for first in range(0, whole, SUM_LANES):
            for i in range(count):
                larger, smaller = most[i], least[i]
                for k in range(SUM_LANES // count):
                    value = load(dtype, kind, x, first + k * count + i)
                    larger, smaller = _larger(larger, value), value if value < smaller else smaller
                most[i], least[i] = larger, smaller
        for first in range(whole, length, count):
            for i in range(min(length - first, count)):
                value = load(dtype, kind, x, first + i)
                most[i], least[i] = _larger(most[i], value), value if value < least[i] else least[i]
        half = count // 2
        while half > 4:
            for i in range(half):
                most[i] = _larger(most[i], most[half + i])
                least[i] = least[half + i] if least[half + i] < least[i] else least[i]
            half //= 2
        larger, smaller = most[0], least[0]
        for i in range(1, 2 * half):
            larger, smaller = _larger(larger, most[i]), min(smaller, least[i])
        pointer(target, kind)[0] = larger
        most[0] = smaller

    return maximum


def _sum_loop(dtype: str, accumulate: str, precise: bool, keeps: bool) -> Callable[..., None]:
    dtype, zero = str(dtype), FLOAT[accumulate](0)
    kind: Any = FLOAT[accumulate]
    near, size, itemsize = kind(NEAR[accumulate]), ITEMSIZE[accumulate], ITEMSIZE[dtype]

    @inner
    def take(x, kept, lane, m, is_near, length):  # type: ignore[no-untyped-def]
        equal = np.int32(0)
        for i in range(length):
            value = load(dtype, kind, x, i)
            t = value - m
            d = _error(kind, precise, value, m, t)
            term = exp_near(t, d) if is_near else exp(t, d)
            if keeps:
                kept[i] = term
            equal += np.int32(t == zero)
            lane[i] += zero if t == zero else term
        return equal

    def sum_exponentials(target, count, lanes, exponentials, x, maximum, minimum, length):  # type: ignore[no-untyped-def]
        lane, m, equal = pointer(lanes, kind), kind(maximum), 0
        is_near = kind(minimum) - m > near
        for i in range(SUM_LANES):
            lane[i] = zero
        for first in range(0, length, SUM_LANES):
            number = min(length - first, SUM_LANES)
            kept, source = pointer(exponentials + first * size, kind), x + first * itemsize
            if is_near:
                equal += take(source, kept, lane, m, True, number)
            else:
                equal += take(source, kept, lane, m, False, number)
        pointer(count, np.int64)[0] = equal
        pointer(target, kind)[0] = fold_lanes(kind, lanes)

    return sum_exponentials


def _write_loop(operation: str, dtype: str, accumulate: str, out: str) -> Callable[..., None]:
    dtype, out, kind = str(dtype), str(out), FLOAT[accumulate]
    is_logarithm = operation == "log_softmax"

    def write(target, x, exponentials, maximum, divisor, length):  # type: ignore[no-untyped-def]
        kept, m, d = pointer(exponentials, kind), kind(maximum), kind(divisor)
        for i in range(length):
            if is_logarithm:
                store(out, target, i, load(dtype, kind, x, i) - m - d)
            else:
                store(out, target, i, kept[i] / d)

    return write


_KEPT = 1 << 18
"""Exponentials that are kept, at most."""


def prepare(spec: ReductionSpec) -> ReductionLaunch:
    """The launch for a softmax, log_softmax or logsumexp."""
    g, tables = describe(spec)
    kind = FLOAT[ACCUMULATE[spec.out.dtype]]
    operation = OPERATIONS.index(spec.operation)
    precise = spec.out.dtype == ACCUMULATE[spec.out.dtype]
    state_bytes = g.chunks * g.width * (2 * g.itemsize + 8)
    workspace_bytes = (4 * SUM_LANES + 2 * SUM_CHUNK) * g.width * g.itemsize
    cost = g.groups * g.width * max(g.n, SUM_LANES) * _NANOSECONDS_PER_ELEMENT
    in_rows = g.chunks == 1 or g.groups >= threads.FEW * threads.limit()
    if in_rows and lies_side_by_side(spec) and g.n <= _KEPT:
        loops, step = _loops(spec.operation, spec.x.dtype, spec.out.dtype), rows_at_a_time(g)
        itemsize, row_bytes = ITEMSIZE[spec.x.dtype], (4 * SUM_LANES + g.n) * g.itemsize

        def launch_rows(stream: int, out: int, x: int, *_: int, keep: object = tables) -> None:
            counters = np.zeros(1, np.int64)

            def work_on_rows() -> None:
                memory = np.empty(row_bytes + state_bytes, np.uint8)
                workspace = memory.ctypes.data
                state, counter = workspace + row_bytes, counters.ctypes.data
                _rows(kind, operation, loops, step, g, x, out, itemsize, state, workspace, counter)

            threads.run(work_on_rows, -(-g.groups // step), cost)

        return launch_rows

    def launch(stream: int, out: int, x: int, *_: int, keep: object = tables) -> None:  # the kernels read the tables
        counters = np.zeros(3, np.int64)
        counter = counters.ctypes.data

        if in_rows:

            def work() -> None:
                memory = np.empty(workspace_bytes + state_bytes, np.uint8)
                workspace = memory.ctypes.data
                _groups(
                    kind,
                    operation,
                    precise,
                    g,
                    x,
                    out,
                    workspace + workspace_bytes,
                    workspace,
                    counter,
                )

            threads.run(work, g.groups, cost)
            return

        state = np.empty(g.groups * state_bytes, np.uint8)

        for step in (_MAXIMUM, _SUM) if operation == _LOGSUMEXP else (_MAXIMUM, _SUM, _WRITE):

            def finish(step: int = step) -> None:
                memory = np.empty(workspace_bytes, np.uint8)
                _finish_pass(kind, operation, step, g, out, state.ctypes.data, memory.ctypes.data)

            def work_on_chunks(step: int = step) -> None:
                memory = np.empty(workspace_bytes, np.uint8)
                _chunks(
                    kind,
                    operation,
                    precise,
                    step,
                    g,
                    x,
                    out,
                    state.ctypes.data,
                    memory.ctypes.data,
                    counter + 8 * step,
                )

            threads.run(work_on_chunks, g.groups * g.chunks, cost / 3)
            if step != _WRITE:
                threads.run(finish, 1, 0)

    return launch
