"""The reductions made of sums: mean and its like, the norms, and the backward passes.

Per row at most two sums, each over terms of the elements (`formulas.py`) by the sum tree, and each ending in a scalar
on which the terms of the next one may depend; then, of some, a row of results.

Rows that can be read where they lie are computed there (`direct.py`), the others here. A piece of the work is a group
of rows, with all passes. Where there are too few groups to go round, each pass is shared out by chunks, and between the
passes the chunks' sums are gathered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...contract import ACCUMULATE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .. import ReductionLaunch
from . import direct, threads
from .compile import inner, invoke, kernel
from .elementary import sqrt
from .formulas import RECIPROCAL_ROOT, ROOT, TOTAL, Formula, formula, loop
from .numerics import FLOAT, pointer, take
from .rows import (
    BIAS,
    GRAD,
    MEAN,
    OPERANDS,
    OUT,
    RSTD,
    WEIGHT,
    Rows,
    X,
    describe,
    read_stretch,
    repeat_scalars,
    write_scalars,
    write_stretch,
)
from .sum_tree import sum_chunk, sum_tree

_NANOSECONDS_PER_PASS = 0.3
"""A rough cost of an element, by which `threads.run` judges whether another thread pays."""

_SUMS = 2
"""The most a formula has."""

_PASS_FIELDS = 6
_READS, _LOOP, _END, _DIVISOR, _EPS, _SCALAR = range(_PASS_FIELDS)
"""Of a pass: the operands that it reads, a bit for each; its loop; what the sum ends in, with the number that divides
it and eps as the bits of float64; and the operand to which that is written, -1 for none."""


class Passes(NamedTuple):
    """What is done with each group of rows, as integers."""

    sums: int
    writes: int
    """Whether a row is written after the sums."""
    read_once: int
    """Operands, a bit for each, that are the same for every group and are read before the first."""
    slots: int
    """Address of the place in the workspace of each operand's chunk, counted in chunks, int64."""
    fields: int
    """Address of each pass's `_PASS_FIELDS`, int64: the sums, then the row of results."""


# A group's state is, one after another, each sum's partial sums: `width` for each of the chunks. The first of them
# become the rows' scalars. The workspace is: for each sum a block of SUM_LANES * width values in which the scalars are
# repeated, lanes for the tree, and chunks: the terms or results, then the operands'.


@inner
def _sums(g, number):  # type: ignore[no-untyped-def]
    return number * g.chunks * g.width * g.itemsize


@inner
def _repeated(g, workspace, number):  # type: ignore[no-untyped-def]
    return workspace + number * SUM_LANES * g.width * g.itemsize


@inner
def _lanes(g, workspace):  # type: ignore[no-untyped-def]
    return _repeated(g, workspace, _SUMS)


@inner
def _chunk(g, workspace, slot):  # type: ignore[no-untyped-def]
    return _repeated(g, workspace, _SUMS + 2) + slot * SUM_CHUNK * g.width * g.itemsize


@inner
def _operand(g, p, workspace, operand):  # type: ignore[no-untyped-def]
    return _chunk(g, workspace, pointer(p.slots, np.int64)[operand])


@inner
def _field(p, number, field):  # type: ignore[no-untyped-def]
    return pointer(p.fields, np.int64)[_PASS_FIELDS * number + field]


@inner
def _length(g, chunk):  # type: ignore[no-untyped-def]
    return min(g.n - chunk * SUM_CHUNK, SUM_CHUNK)


@kernel
def _groups(kind, g, p, addresses, state, workspace, counter):  # type: ignore[no-untyped-def]
    """Take whole groups; `state` and `workspace` are this thread's own."""
    _read(g, p, p.read_once, addresses, 0, 0, workspace)
    while True:
        group = take(counter)
        if group >= g.groups:
            return
        for number in range(p.sums):
            for chunk in range(g.chunks):
                _sum(kind, g, p, number, addresses, group, chunk, state, workspace)
            _finish(kind, g, p, number, addresses, group, state, workspace)
        if p.writes:
            for chunk in range(g.chunks):
                _write(kind, g, p, addresses, group, chunk, state, workspace)


@kernel
def _chunks(kind, g, p, number, addresses, state, workspace, counter):  # type: ignore[no-untyped-def]
    """Take chunks of any group, for one pass; `state` holds that of all groups."""
    while True:
        piece = take(counter)
        if piece >= g.groups * g.chunks:
            return
        group, chunk = piece // g.chunks, piece % g.chunks
        own = state + _sums(g, group * p.sums)
        if number < p.sums:
            _sum(kind, g, p, number, addresses, group, chunk, own, workspace)
        else:
            _write(kind, g, p, addresses, group, chunk, own, workspace)


@kernel
def _finish_pass(kind, g, p, number, addresses, state, workspace):  # type: ignore[no-untyped-def]
    """What follows a sum, for all groups."""
    for group in range(g.groups):
        _finish(kind, g, p, number, addresses, group, state + _sums(g, group * p.sums), workspace)


@inner
def _read(g, p, operands, addresses, group, chunk, workspace):  # type: ignore[no-untyped-def]
    for operand in range(len(OPERANDS)):
        if operands >> operand & 1:
            address = pointer(addresses, np.int64)[operand]
            target = _operand(g, p, workspace, operand)
            read_stretch(g, operand, address, group, chunk * SUM_CHUNK, _length(g, chunk), target)


@inner
def _compute(kind, g, p, number, chunk, state, workspace):  # type: ignore[no-untyped-def]
    """A pass's loop over a chunk of the operands, to the first chunk of the workspace."""
    for earlier in range(min(number, p.sums)):
        repeat_scalars(kind, g, state + _sums(g, earlier), _repeated(g, workspace, earlier))
    x, grad = _operand(g, p, workspace, X), _operand(g, p, workspace, GRAD)
    weight, bias = _operand(g, p, workspace, WEIGHT), _operand(g, p, workspace, BIAS)
    mean, rstd = _operand(g, p, workspace, MEAN), _operand(g, p, workspace, RSTD)
    target, first, second = _chunk(g, workspace, 0), _repeated(g, workspace, 0), _repeated(g, workspace, 1)
    length = _length(g, chunk)
    for block in range(0, length, SUM_LANES):
        count = min(length - block, SUM_LANES) * g.width
        start = block * g.width * g.itemsize
        invoke(
            _field(p, number, _LOOP),
            (
                target + start,
                x + start,
                grad + start,
                weight + start,
                bias + start,
                mean + start,
                rstd + start,
                first,
                second,
                count,
            ),
        )


@inner
def _sum(kind, g, p, number, addresses, group, chunk, state, workspace):  # type: ignore[no-untyped-def]
    _read(g, p, _field(p, number, _READS), addresses, group, chunk, workspace)
    terms = _operand(g, p, workspace, X)
    if _field(p, number, _LOOP) != 0:
        _compute(kind, g, p, number, chunk, state, workspace)
        terms = _chunk(g, workspace, 0)
    target = state + _sums(g, number) + chunk * g.width * g.itemsize
    sum_chunk(kind, g.itemsize, terms, _length(g, chunk), g.width, _lanes(g, workspace), target)


@inner
def _finish(kind, g, p, number, addresses, group, state, workspace):  # type: ignore[no-untyped-def]
    sums = state + _sums(g, number)
    sum_tree(kind, g.itemsize, sums, g.chunks, g.width, _lanes(g, workspace))
    end, scalar = _field(p, number, _END), _field(p, number, _SCALAR)
    numbers = pointer(p.fields, np.float64)
    divisor, eps = kind(numbers[_PASS_FIELDS * number + _DIVISOR]), kind(numbers[_PASS_FIELDS * number + _EPS])
    total = pointer(sums, kind)
    for c in range(g.width):
        value = total[c]
        if end != TOTAL:
            value /= divisor
        if end == ROOT:
            value = sqrt(value)
        elif end == RECIPROCAL_ROOT:
            value = kind(1) / sqrt(value + eps)
        total[c] = value
    if scalar >= 0:
        write_scalars(g, scalar, pointer(addresses, np.int64)[scalar], group, sums)


@inner
def _write(kind, g, p, addresses, group, chunk, state, workspace):  # type: ignore[no-untyped-def]
    _read(g, p, _field(p, p.sums, _READS), addresses, group, chunk, workspace)
    _compute(kind, g, p, p.sums, chunk, state, workspace)
    first, out = chunk * SUM_CHUNK, pointer(addresses, np.int64)[OUT]
    write_stretch(g, OUT, out, group, first, _length(g, chunk), _chunk(g, workspace, 0))


def _passes(spec: ReductionSpec, g: Rows, plan: Formula) -> tuple[Passes, tuple[np.ndarray[Any, Any], ...]]:
    """The passes of a reduction, and the tables to which they point."""
    accumulate = ACCUMULATE[spec.out.dtype]
    present = [
        name for name in OPERANDS if name == "x" or name in {*plan.reads, *(r for s in plan.sums for r in s.reads)}
    ]
    slots = np.array([1 + present.index(name if name in present else "x") for name in OPERANDS], np.int64)
    fields = np.zeros((len(plan.sums) + 1, _PASS_FIELDS), np.int64)
    read_once = 0
    if g.chunks == 1:
        for name in ("weight", "bias"):
            layout = getattr(spec, name)
            if name in present and not any(layout.strides[: spec.kept]):
                read_once |= 1 << OPERANDS.index(name)
    have = read_once

    def reads(names: tuple[str, ...]) -> int:
        nonlocal have
        wanted = sum(1 << OPERANDS.index(name) for name in names) & ~have
        if g.chunks == 1:  # the workspace still holds what an earlier pass has read
            have |= wanted
        return wanted

    for i, (one, scalar) in enumerate(zip(plan.sums, plan.scalars, strict=True)):
        fields[i, _READS] = reads(one.reads)
        if one.term is not None:
            fields[i, _LOOP] = loop(one.term, accumulate)
        fields[i, _END] = one.end
        fields[i, _DIVISOR] = np.float64(one.divisor(g.n, spec.correction)).view(np.int64)
        fields[i, _EPS] = np.float64(spec.eps).view(np.int64)
        written = scalar != "" and getattr(spec, scalar) is not None
        fields[i, _SCALAR] = OPERANDS.index(scalar) if written else -1
    if plan.element is not None:
        fields[-1, _READS] = reads(plan.reads)
        fields[-1, _LOOP] = loop(plan.element, accumulate)
    writes = int(plan.element is not None)
    passes = Passes(len(plan.sums), writes, read_once, slots.ctypes.data, fields.ctypes.data)
    return passes, (slots, fields)


def prepare(spec: ReductionSpec) -> ReductionLaunch:
    """The launch for a reduction made of sums."""
    plan = formula(spec.operation, spec.weight is not None, spec.bias is not None)
    launch_direct = direct.prepare(spec, plan)
    if launch_direct is not None:
        return launch_direct
    g, tables = describe(spec)
    in_rows = g.chunks == 1 or g.groups >= threads.FEW * threads.limit()
    p, pass_tables = _passes(spec, g, plan)
    kind = FLOAT[ACCUMULATE[spec.out.dtype]]
    number = p.sums + p.writes
    chunks = 1 + int(pass_tables[0].max())
    state_bytes = p.sums * g.chunks * g.width * g.itemsize
    workspace_bytes = ((_SUMS + 2) * SUM_LANES + chunks * SUM_CHUNK) * g.width * g.itemsize
    cost = g.groups * g.width * max(g.n, SUM_LANES) * _NANOSECONDS_PER_PASS * number
    places = [i for i, name in enumerate(OPERANDS) if getattr(spec, name) is not None]

    def launch(stream: int, *given: int, keep: object = (tables, pass_tables)) -> None:  # the kernels read the tables
        table = np.zeros(len(OPERANDS) + number, np.int64)  # addresses, then a counter for each pass
        for place, address in zip(places, given, strict=True):
            table[place] = address
        addresses = table.ctypes.data
        counter = addresses + len(OPERANDS) * table.itemsize

        if in_rows:

            def work() -> None:
                memory = np.empty(workspace_bytes + state_bytes, np.uint8)
                workspace = memory.ctypes.data
                _groups(kind, g, p, addresses, workspace + workspace_bytes, workspace, counter)

            threads.run(work, g.groups, cost)
            return

        state = np.empty(g.groups * state_bytes, np.uint8)
        for step in range(number):

            def work_on_chunks(step: int = step) -> None:
                memory = np.empty(workspace_bytes, np.uint8)
                _chunks(kind, g, p, step, addresses, state.ctypes.data, memory.ctypes.data, counter + 8 * step)

            def finish(step: int = step) -> None:
                memory = np.empty(workspace_bytes, np.uint8)
                _finish_pass(kind, g, p, step, addresses, state.ctypes.data, memory.ctypes.data)

            threads.run(work_on_chunks, g.groups * g.chunks, cost / number)
            if step < p.sums:
                threads.run(finish, 1, 0)

    return launch
