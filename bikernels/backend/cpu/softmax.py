"""softmax, log_softmax and logsumexp: the exact maximum, the sum tree of the exponentials, then the results.

Per row, with m the maximum and t = x - m: c counts the elements with t = 0, r is the tree sum of exp(t) over the
others, u = c + r and e the error of that addition. softmax is exp(t) / u, log_softmax is t - (log(u) + e / u) and
logsumexp m + (log(u) + e / u). Where the result is as precise as the arithmetic (`precise`), exp(t) makes up for the
rounding of t.

Rows that can be read where they lie are computed there (`direct.py`), the others here. A piece of the work is a group
of rows, with all passes. Where there are too few groups to go round, each pass is shared out by chunks, and between the
passes the chunks' maxima and sums are gathered.
"""

from __future__ import annotations

import numpy as np

from ...contract import ACCUMULATE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .. import ReductionLaunch
from . import direct, threads
from .compile import inner, kernel
from .elementary import exp, log
from .numerics import FLOAT, pointer, take
from .rows import (
    OUT,
    X,
    describe,
    read_stretch,
    repeat_scalars,
    write_scalars,
    write_stretch,
)
from .sum_tree import sum_chunk, sum_tree

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


def prepare(spec: ReductionSpec) -> ReductionLaunch:
    """The launch for a softmax, log_softmax or logsumexp."""
    launch_direct = direct.prepare(spec, None)
    if launch_direct is not None:
        return launch_direct
    g, tables = describe(spec)
    kind = FLOAT[ACCUMULATE[spec.out.dtype]]
    operation = OPERATIONS.index(spec.operation)
    precise = spec.out.dtype == ACCUMULATE[spec.out.dtype]
    state_bytes = g.chunks * g.width * (2 * g.itemsize + 8)
    workspace_bytes = (4 * SUM_LANES + 2 * SUM_CHUNK) * g.width * g.itemsize
    cost = g.groups * g.width * max(g.n, SUM_LANES) * _NANOSECONDS_PER_ELEMENT
    in_rows = g.chunks == 1 or g.groups >= threads.FEW * threads.limit()

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
