"""Reductions of rows that are read and written where they lie: one function for a whole formula, in LLVM instructions.

Rows whose elements lie side by side are computed one after another, and vectors run along the row (`_AlongRows`). Rows
that lie side by side themselves are computed together, and vectors run across them (`_AcrossRows`). `_drive` takes
groups of rows and hands them to the function; rows that lie otherwise go through a workspace (`sums.py`, `softmax.py`).

A function is called as f(static, starts, scratch, rows): `static` is the address of the numbers of a spec (`_static`),
`starts` that of the operands' addresses for the first of so many rows, and `scratch` is memory of the thread's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .. import ReductionLaunch
from . import pool, threads, vectors
from .compile import address_of, emitted, inner, invoke, kernel
from .elementary import NEAR, Real, emit_exp_below, emit_exp_near, emit_log, root
from .formulas import RECIPROCAL_ROOT, ROOT, TOTAL, Formula, Sum, formula
from .numerics import (
    FLOAT,
    LLVM_TYPE,
    VECTOR_BYTES,
    call_intrinsic,
    from_accumulate,
    in_low_bits,
    pointer,
    take,
    to_accumulate,
)
from .rows import INNER, OPERANDS, ROW, SIZE, Rows, Table, describe, group_rows, group_start, rounds
from .sum_tree import fold, sum_tree
from .vectors import I32, I64

_N, _ALONG, _ACROSS = 0, 1, 1 + len(OPERANDS)
_NUMBERS = _ACROSS + len(OPERANDS)
_UPPER, _IN_ORDER = _NUMBERS + 4, _NUMBERS + 5
_STATIC = _IN_ORDER + 1
"""The static numbers, int64: elements in a row; of each operand the bytes from element to element, and from row to row;
of each sum its divisor and eps, as the bits of float64; the address of the upper levels of the tree; and whether chunks
are better read in the order in which they lie."""

_VECTORS = 8
"""Accumulators of a sum: enough to hide the latency of an addition."""

_KEPT = 1 << 18
"""Exponentials of a row that softmax keeps, at most; of longer ones it computes them twice."""

_AT_A_TIME = 1 << 15
"""Elements of the rows that a thread takes at a time, where taking one would cost as much as computing it."""

_AHEAD, _LINE = 8192, 64
"""Bytes: how far ahead elements are fetched, and of a cache line."""

_CACHED = 1 << 25
"""Bytes of rows of which no more are expected to be in a cache."""

_LEAST, _FEW_ROWS, _MOST_ACROSS = 48, 256, 1 << 19
"""Elements of a row from which vectors along it pay, unless the rows are so few that any time is short; and up to which
rows are computed side by side."""


class Kind(NamedTuple):
    """What a function depends on."""

    operation: str
    across: int
    """Vectors of rows that are computed together; 0: vectors run along a row."""
    dtypes: tuple[str | None, ...]
    """Of each of OPERANDS."""
    spread: tuple[bool, ...]
    """Of each operand whether one element serves all of a vector."""
    plan: Formula | None
    """None for the softmaxes."""
    keeps: bool
    """Whether softmax keeps the exponentials."""

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[str(self.dtypes[0])]


# -------------------------------------------------------------------------------------------------------- the functions


class _Code:
    """The function of a kind, while it is emitted."""

    def __init__(self, kind: Kind, builder: Any, *arguments: Any) -> None:
        self.kind, self.plan, self.builder = kind, kind.plan, builder
        self.static, self.starts, self.scratch, self.rows = arguments
        self.size = ITEMSIZE[kind.accumulate]
        self.real = LLVM_TYPE[kind.accumulate]
        self.word = I32 if self.size == 4 else I64
        self.count = VECTOR_BYTES // self.size
        self.vector = ir.VectorType(self.real, self.count)
        self.n = self.number(_N)
        self.along = {name: self.number(_ALONG + i) for i, name in enumerate(OPERANDS)}
        for i, name in enumerate(OPERANDS):
            if not kind.across:  # constants, so that addresses are computed at no cost
                self.along[name] = I64(0 if kind.spread[i] else self.itemsize(name))

    def number(self, place: int, kind: ir.Type = I64) -> Any:
        """Of the static numbers."""
        return vectors.load(self.builder, self.static, 8 * place, kind, align=8)

    def start(self, name: str) -> Any:
        """Where an operand of the first row begins."""
        return vectors.load(self.builder, self.starts, 8 * OPERANDS.index(name), I64, align=8)

    def dtype(self, name: str) -> str | None:
        """Of an operand; None if it is not there."""
        return self.kind.dtypes[OPERANDS.index(name)]

    def itemsize(self, name: str) -> int:
        dtype = self.dtype(name)
        return ITEMSIZE[dtype] if dtype else 0

    def spread(self, name: str) -> bool:
        """Whether one element of an operand serves all of a vector."""
        return self.kind.spread[OPERANDS.index(name)]

    def present(self) -> list[str]:
        return [name for name in OPERANDS if self.dtype(name)]

    def at(self, bases: dict[str, Any], i: Any) -> dict[str, Any]:
        """The addresses of element i, from those of the first."""
        b = self.builder
        return {name: b.add(base, b.mul(i, self.along[name])) for name, base in bases.items()}

    # Vectors of a stretch of bfloat16 come in pairs: the elements with even places, then those with odd ones. Both are
    # had from 32-bit words, without a shuffle, and a lane's neighbour in the tree lies opposite.

    def in_pairs(self, *names: str) -> bool:
        """Whether the vectors of these operands are to be read and written as pairs."""
        dtypes = {self.dtype(name) for name in names if not self.spread(name)}
        return dtypes == {"bfloat16"} and self.real == ir.FloatType() and self.kind.across != 1

    def read(self, name: str, address: Any, number: int, pairs: bool) -> list[Any]:
        """`number` vectors of an operand; one scalar if that is 0."""
        b, dtype = self.builder, str(self.dtype(name))
        size = ITEMSIZE[dtype]
        if number == 0 or self.spread(name):
            value = to_accumulate(b, dtype, vectors.load(b, address, 0, LLVM_TYPE[dtype], align=size), self.real)
            return [value] if number == 0 else [vectors.splat(b, value, self.count)] * number
        result = []
        if pairs:
            words = ir.VectorType(I32, self.count)
            for i in range(number // 2):
                word = vectors.load(b, address, i * VECTOR_BYTES, words, align=2)
                even = b.shl(word, vectors.constant(words, 16))
                odd = b.and_(word, vectors.constant(words, 0xFFFF0000))
                result += [b.bitcast(even, self.vector), b.bitcast(odd, self.vector)]
            return result
        stored = ir.VectorType(LLVM_TYPE[dtype], self.count)
        for i in range(number):
            value = vectors.load(b, address, i * self.count * size, stored, align=size)
            result.append(to_accumulate(b, dtype, value, self.real))
        return result

    def write(self, name: str, address: Any, values: list[Any], pairs: bool) -> None:
        """The reverse of `read`, with one rounding."""
        b, dtype = self.builder, str(self.dtype(name))
        size = ITEMSIZE[dtype]
        if pairs:
            for i in range(0, len(values), 2):
                even, odd = (in_low_bits(b, dtype, value) for value in values[i : i + 2])
                word = b.or_(even, b.shl(odd, vectors.constant(odd.type, 16)))
                b.store(word, vectors.place(b, address, i // 2 * VECTOR_BYTES, word.type), align=2)
            return
        for i, value in enumerate(values):
            bits = from_accumulate(b, dtype, value)
            b.store(bits, vectors.place(b, address, i * self.count * size, bits.type), align=size)

    def evaluate(
        self, element: Any, reads: tuple[str, ...], where: dict[str, Any], number: int, pairs: bool, scalars: list[Any]
    ) -> list[Any]:
        """An element function's values at these addresses: `number` vectors, or a scalar if that is 0."""
        b, wanted = self.builder, max(number, 1)
        operands: dict[str, list[Any]] = {}
        for name in ("x", "grad", "weight", "bias", "mean", "rstd"):
            given = self.read(name, where[name], number, pairs) if name in reads else [None] * wanted
            operands[name] = [None if one is None else Real(b, one) for one in given]
        rows = [self.of_rows(scalar, number) for scalar in scalars] + [[None] * wanted] * (2 - len(scalars))
        if element is None:
            return [one.value for one in operands["x"]]
        return [
            element(*(operands[name][i] for name in operands), *(row[i] for row in rows)).value for i in range(wanted)
        ]

    def of_rows(self, scalar: Any, number: int) -> list[Real]:
        """The rows' scalar beside each of `number` vectors."""
        raise NotImplementedError

    def end(self, one: Sum, place: int, total: Any) -> Any:
        """What a sum ends in."""
        b = self.builder

        def given(number: int) -> Real:
            value = self.number(_NUMBERS + number, ir.DoubleType())
            value = value if self.real == ir.DoubleType() else b.fptrunc(value, self.real)
            return Real(b, vectors.splat(b, value, self.count) if isinstance(total.type, ir.VectorType) else value)

        result = Real(b, total)
        if one.end != TOTAL:
            result = result / given(2 * place)
        if one.end == ROOT:
            result = root(result)
        elif one.end == RECIPROCAL_ROOT:
            result = Real(b, vectors.constant(total.type, 1.0)) / root(result + given(2 * place + 1))
        return result.value

    # ------------------------------------------------------------------------------------------------ the softmaxes

    def exponentials(self, xs: list[Any], m: list[Any], near: bool, counts: list[Any]) -> tuple[list[Any], list[Any]]:
        """exp(x - m) of vectors or scalars, and those with 0 in the place of the maximum's terms, which are counted."""
        b, terms, kept = self.builder, [], []
        precise = self.dtype("out") == self.kind.accumulate
        for i, x in enumerate(xs):
            t, d = b.fsub(x, m[i]), None
            if precise:
                back = b.fsub(t, x)
                d = b.fadd(b.fsub(x, b.fsub(t, back)), b.fsub(b.fneg(m[i]), back))
            value = (emit_exp_near if near else emit_exp_below)(b, t, d)
            zero = vectors.constant(value.type, 0.0)
            is_most = b.fcmp_ordered("==", t, zero)
            j = i % len(counts)
            counts[j] = b.sub(counts[j], b.sext(is_most, counts[j].type))
            kept.append(value)
            terms.append(b.select(is_most, zero, value))
        return kept, terms

    def logarithm(self, ones: Any, rest: Any) -> tuple[Any, Any]:
        """u, the sum of the exponentials, and its logarithm, compensated for the error of the sum."""
        b = self.builder
        u = b.fadd(ones, rest)
        back = b.fsub(u, ones)
        e = b.fadd(b.fsub(ones, b.fsub(u, back)), b.fsub(rest, back))
        return u, b.fadd(emit_log(b, u), b.fdiv(e, u))

    def log_of_sum(self, m: Any, logarithm: Any) -> Any:
        """logsumexp: an infinite maximum itself."""
        b = self.builder
        infinite = b.fcmp_ordered("==", call_intrinsic(b, "fabs", m), vectors.constant(m.type, float("inf")))
        return b.select(infinite, m, b.fadd(m, logarithm))

    def extremes(self, most: list[Any], least: list[Any], nan: list[Any], xs: list[Any]) -> list[Any]:
        """The larger and the smaller of each, and a NaN wherever one has been seen."""
        b = self.builder
        for i, x in enumerate(xs):
            most[i] = b.select(b.fcmp_ordered(">", x, most[i]), x, most[i])
            least[i] = b.select(b.fcmp_ordered("<", x, least[i]), x, least[i])
        for i in range(0, len(xs), 2):
            seen = b.fcmp_unordered("uno", xs[i], xs[min(i + 1, len(xs) - 1)])
            j = i // 2 % len(nan)
            nan[j] = b.or_(nan[j], b.sext(seen, nan[j].type))
        return [*most, *least, *nan]


class _AlongRows(_Code):
    """Rows one after another.

    Some lanes of the tree at a time are summed in registers and folded there; the elements of the last lanes that do
    not fill a vector in every round are summed apart. Sums of several chunks end in the upper levels of `_upper`.
    """

    def emit(self) -> None:
        b = self.builder
        names = self.present()
        steps = [self.number(_ACROSS + OPERANDS.index(name)) for name in names]
        self.lanes = vectors.memory(b, 2 * SUM_LANES * 8)
        self.folded = vectors.memory(b, SUM_LANES * 8)
        self.rest = vectors.memory(b, SUM_LANES * 8)

        def row(_: Any, starts: list[Any]) -> list[Any]:
            bases = dict(zip(names, starts, strict=True))
            if self.plan is None:
                self.softmax(bases)
            else:
                self.sums(bases, self.plan)
            return [b.add(start, step) for start, step in zip(starts, steps, strict=True)]

        starts, first = [self.start(name) for name in names], I64(0)
        if self.is_short():
            first, starts = self.short_rows(names, starts, steps)
        vectors.for_range(b, first, self.rows, 1, starts, row)

    def is_short(self) -> bool:
        """Whether a plan is so little code, the sum of x, that it is written again for rows of whole rounds."""
        is_sum = self.plan is not None and self.plan.element is None and [one.term for one in self.plan.sums] == [None]
        return is_sum and self.dtype("x") in ("bfloat16", "float32")

    def short_rows(self, names: list[str], starts: list[Any], steps: list[Any]) -> tuple[Any, list[Any]]:
        """Sum rows of one chunk and whole rounds, as many at a time as a vector has elements; where to go on.

        The last folds and what the sum ends in are then the same instructions for all of them.
        """
        assert self.plan is not None
        b, (one,), pairs = self.builder, self.plan.sums, self.in_pairs("x")
        reads, level = names.index("x"), 0
        is_short = b.icmp_signed("==", b.and_(self.n, I64(SUM_LANES - 1)), I64(0))
        is_short = b.and_(is_short, b.icmp_unsigned("<=", b.sub(self.n, I64(1)), I64(SUM_CHUNK - 1)))
        done = b.select(is_short, b.and_(self.rows, I64(-self.count)), I64(0))

        def block(n: Any, starts: list[Any]) -> list[Any]:
            def row(i: Any, carried: list[Any]) -> list[Any]:
                nonlocal level
                (x,) = carried

                def terms(i: Any, number: int, pairs: bool, carried: list[Any]) -> list[Any]:
                    return self.read("x", self.at({"x": x}, i)["x"], number, pairs)

                def fetch(i: Any) -> None:
                    self.prefetch(("x",), self.at({"x": x}, i), _VECTORS)

                part, level = self._whole_lanes(terms, pairs, _VECTORS, fetch, I64(0), n)
                vectors.store(b, part, b.add(self.folded, b.mul(i, I64(VECTOR_BYTES))))
                return [b.add(x, steps[reads])]

            vectors.for_range(b, I64(0), I64(self.count), 1, [starts[reads]], row)
            parts = [vectors.load(b, self.folded, i * VECTOR_BYTES, self.vector) for i in range(self.count)]
            total = b.fadd(fold(b, parts, level), vectors.constant(self.vector, 0.0))
            bits = from_accumulate(b, str(self.dtype("out")), self.end(one, 0, total))
            out, step = starts[names.index("out")], steps[names.index("out")]
            places = range(self.count.bit_length() - 1)
            for i in range(self.count):  # the bits of a row's number say where each merge has put it
                place = sum((i >> bit & 1) << (level + bit) % len(places) for bit in places)
                element = b.extract_element(bits, I32(place))
                b.store(element, vectors.place(b, out, 0, element.type), align=self.itemsize("out"))
                out = b.add(out, step)
            return [b.add(start, b.mul(step, I64(self.count))) for start, step in zip(starts, steps, strict=True)]

        def blocks(n: Any) -> list[Any]:
            return vectors.for_range(b, I64(0), done, self.count, starts, lambda _, starts: block(n, starts))

        # A row of one round is so short that nothing of a loop should be in it.
        one_round = b.icmp_signed("==", self.n, I64(SUM_LANES))
        return done, vectors.either(b, one_round, lambda: blocks(I64(SUM_LANES)), lambda: blocks(self.n))

    def sums(self, bases: dict[str, Any], plan: Formula) -> None:
        scalars: list[Any] = []
        for place, (one, name) in enumerate(zip(plan.sums, plan.scalars, strict=True)):
            pairs = self.in_pairs(*one.reads)

            def terms(i: Any, number: int, pairs: bool, carried: list[Any], one: Sum = one) -> list[Any]:
                return self.evaluate(one.term, one.reads, self.at(bases, i), number, pairs, scalars)

            def fetch(i: Any, one: Sum = one) -> None:
                self.prefetch(one.reads, self.at(bases, i), _VECTORS)

            total, _ = self.sum(terms, pairs, [], _VECTORS, fetch)
            scalars.append(self.end(one, place, total))
            if name and self.dtype(name):
                self.write(name, bases[name], [scalars[-1]], False)
        if plan.element is not None:

            def results(i: Any, number: int, pairs: bool) -> list[Any]:
                return self.evaluate(plan.element, plan.reads, self.at(bases, i), number, pairs, scalars)

            self.write_row(bases["out"], results, self.in_pairs("out", *plan.reads))

    def prefetch(self, reads: tuple[str, ...], where: dict[str, Any], number: int) -> None:
        """Fetch what will be read soon."""
        b = self.builder
        for name in reads:
            if not self.spread(name):
                for line in range(0, number * self.count * self.itemsize(name), _LINE):
                    vectors.prefetch(b, b.add(where[name], I64(_AHEAD + line)))

    def of_rows(self, scalar: Any, number: int) -> list[Real]:
        value = scalar if number == 0 else vectors.splat(self.builder, scalar, self.count)
        return [Real(self.builder, value)] * max(number, 1)

    def write_row(self, out: Any, results: Callable[..., list[Any]], pairs: bool) -> None:
        b, itemsize, wide = self.builder, I64(self.itemsize("out")), 4
        bulk = b.and_(self.n, I64(-wide * self.count))
        whole = b.and_(self.n, I64(-self.count))

        def writer(number: int, pairs: bool) -> Callable[[Any, list[Any]], list[Any]]:
            def body(i: Any, carried: list[Any]) -> list[Any]:
                self.write("out", b.add(out, b.mul(i, itemsize)), results(i, number, pairs), pairs)
                return []

            return body

        vectors.for_range(b, I64(0), bulk, wide * self.count, [], writer(wide, pairs))
        vectors.for_range(b, bulk, whole, self.count, [], writer(1, False))
        vectors.for_range(b, whole, self.n, 1, [], writer(0, False))

    def sum(
        self,
        terms: Callable[..., list[Any]],
        pairs: bool,
        carried: list[Any],
        group: int,
        fetch: Callable[[Any], None] | None = None,
    ) -> tuple[Any, list[Any]]:
        """The tree's sum of terms(i, number, pairs, carried), which may change the carried values in their list.

        A group of lanes jumps from line to line, which the processor foresees late: before each jump, `fetch` is given
        a place in the row that runs from one end to the other.
        """
        b, has_formula = self.builder, self.plan is not None

        def chunk(first: Any, carried: list[Any]) -> list[Any]:
            length = vectors.minimum(b, b.sub(self.n, first), I64(SUM_CHUNK))

            def any_chunk() -> list[Any]:
                loop = self.is_short() or not has_formula  # so as to have less code
                total, values = self._chunk(terms, pairs, carried, group, fetch, loop, first, length)
                return [total, *values]

            if has_formula:  # chunks of whole rounds, which are most, have code of their own
                is_whole = b.icmp_signed("==", b.and_(length, I64(SUM_LANES - 1)), I64(0))
                is_whole = b.and_(is_whole, b.icmp_signed(">", length, I64(0)))

                def whole_chunk() -> list[Any]:
                    return [self._whole_chunk(terms, pairs, group, fetch, first, length)]

                (total,) = vectors.either(b, is_whole, whole_chunk, any_chunk)
            else:
                total, *carried = any_chunk()
            b.store(total, vectors.place(b, self._sums(first), 0, self.real))
            return carried

        carried = vectors.for_range(b, I64(0), vectors.maximum(b, self.n, I64(1)), SUM_CHUNK, carried, chunk)

        one_chunk = vectors.load(b, self.scratch, 0, self.real)
        (total,) = vectors.when(b, b.icmp_signed(">", self.n, I64(SUM_CHUNK)), [one_chunk], self._upper_levels)
        return total, carried

    def _upper_levels(self) -> list[Any]:
        """The sum of the chunks' sums."""
        b = self.builder
        chunks = b.sdiv(b.add(self.n, I64(SUM_CHUNK - 1)), I64(SUM_CHUNK))

        def in_a_vector() -> list[Any]:
            words = ir.VectorType(self.word, self.count)
            number = vectors.splat(b, b.trunc(chunks, self.word), self.count)
            is_there = b.icmp_signed("<", ir.Constant(words, list(range(self.count))), number)
            sums = vectors.load(b, self.scratch, 0, self.vector)
            sums = b.select(is_there, sums, vectors.constant(self.vector, 0.0))
            return [b.extract_element(fold(b, [sums], 0, whole=True), I32(0))]

        def in_memory() -> list[Any]:
            function = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
            b.call(b.inttoptr(self.number(_UPPER), function.as_pointer()), [self.scratch, chunks, self.lanes])
            return [vectors.load(b, self.scratch, 0, self.real)]

        return vectors.either(b, b.icmp_signed("<=", chunks, I64(self.count)), in_a_vector, in_memory)

    def _sums(self, first: Any) -> Any:
        b = self.builder
        return b.add(self.scratch, b.mul(b.sdiv(first, I64(SUM_CHUNK)), I64(self.size)))

    def _chunk(
        self,
        terms: Callable[..., list[Any]],
        pairs: bool,
        carried: list[Any],
        group: int,
        fetch: Callable[[Any], None] | None,
        loop: bool,
        first: Any,
        length: Any,
    ) -> tuple[Any, list[Any]]:
        b, lanes = self.builder, group * self.count
        groups = SUM_LANES // lanes
        zero = vectors.constant(self.vector, 0.0)
        rounds, over = b.sdiv(length, I64(SUM_LANES)), b.srem(length, I64(SUM_LANES))
        part = b.and_(over, I64(lanes - 1))
        part_lane = b.sub(over, part)
        has_part = b.icmp_signed("!=", part, I64(0))

        def sum_part() -> list[Any]:
            for i in range(group):
                vectors.store(b, zero, self.rest, i * VECTOR_BYTES)
            start = b.sub(b.add(first, length), part)

            def body(number: int) -> Callable[[Any, list[Any]], list[Any]]:
                def step(i: Any, carried: list[Any]) -> list[Any]:
                    (term,) = terms(b.add(start, i), number, False, carried)
                    vectors.store(b, term, b.add(self.rest, b.mul(i, I64(self.size))))
                    return carried

                return step

            whole = b.and_(part, I64(-self.count))
            values = vectors.for_range(b, I64(0), whole, self.count, list(carried), body(1))
            return vectors.for_range(b, whole, part, 1, values, body(0))

        carried = vectors.when(b, has_part, carried, sum_part)

        def sum_group(lane: Any, carried: list[Any]) -> tuple[Any, list[Any]]:
            is_whole = b.icmp_signed("<=", b.add(lane, I64(lanes)), over)
            start = b.add(first, lane)

            in_order = b.add(first, b.mul(lane, rounds))

            def add(i: Any, values: list[Any]) -> list[Any]:
                sums, carried = values[:group], values[group:]
                if fetch is not None:
                    fetch(b.add(in_order, b.sdiv(b.sub(i, start), I64(groups))))
                new = terms(i, group, pairs, carried)
                return [b.fadd(old, term) for old, term in zip(sums, new, strict=True)] + carried

            end = b.add(start, b.mul(b.add(rounds, b.zext(is_whole, I64)), I64(SUM_LANES)))
            values = vectors.for_range(b, start, end, SUM_LANES, [zero] * group + carried, add)

            def add_part() -> list[Any]:
                more = self._plain(self.rest, group, pairs)
                return [b.fadd(old, one) for old, one in zip(values[:group], more, strict=True)] + values[group:]

            is_part = b.and_(has_part, b.icmp_signed("==", lane, part_lane))
            values = vectors.when(b, is_part, values, add_part)
            return fold(b, values[:group], 0, pairs), values[group:]

        parts = []
        if loop:

            def one_group(lane: Any, carried: list[Any]) -> list[Any]:
                total, carried = sum_group(lane, carried)
                place = b.mul(b.sdiv(lane, I64(lanes)), I64(VECTOR_BYTES))
                vectors.store(b, total, b.add(self.folded, place))
                return carried

            carried = vectors.for_range(b, I64(0), I64(SUM_LANES), lanes, carried, one_group)
            parts = [vectors.load(b, self.folded, i * VECTOR_BYTES, self.vector) for i in range(groups)]
        else:
            for i in range(groups):
                total, carried = sum_group(I64(i * lanes), carried)
                parts.append(total)
        levels = (group // 2 if pairs else group).bit_length() - 1
        return b.extract_element(fold(b, parts, levels, whole=True), I32(0)), carried

    def _whole_chunk(
        self, terms: Callable[..., list[Any]], pairs: bool, group: int, fetch: Any, first: Any, length: Any
    ) -> Any:
        """`_chunk` of whole rounds. Lanes start at their first term; a sum of zeros is made +0 at the end instead."""
        part, level = self._whole_lanes(terms, pairs, group, fetch, first, length)
        total = self.builder.extract_element(fold(self.builder, [part], level, whole=True), I32(0))
        return self.builder.fadd(total, ir.Constant(self.real, 0.0))

    def _whole_lanes(
        self, terms: Callable[..., list[Any]], pairs: bool, group: int, fetch: Any, first: Any, length: Any
    ) -> tuple[Any, int]:
        """The lanes folded into one vector, and the level of its next fold."""
        b = self.builder

        levels = (group // 2 if pairs else group).bit_length() - 1
        level = levels + (SUM_LANES // (group * self.count)).bit_length() - 1

        def in_blocks() -> list[Any]:
            return [fold(b, self._lanes_in_blocks(terms, pairs, group, fetch, first, length), levels)]

        def in_order() -> list[Any]:
            lanes = self._lanes_in_order(terms, pairs, group, first, length)
            return [fold(b, [fold(b, sums, 0, pairs) for sums in lanes], levels)]

        as_fast_in_blocks = VECTOR_BYTES == 64 or self.dtype("x") != "float32" or isinstance(length, ir.Constant)
        if as_fast_in_blocks or not self.is_short():
            return in_blocks()[0], level
        is_in_order = b.icmp_signed("!=", self.number(_IN_ORDER), I64(0))
        return vectors.either(b, is_in_order, in_order, in_blocks)[0], level

    def _lanes_in_order(
        self, terms: Callable[..., list[Any]], pairs: bool, group: int, first: Any, length: Any
    ) -> list[list[Any]]:
        """The lanes, in groups, of a chunk that is read from one end to the other; they are kept in memory."""
        b, lanes, groups = self.builder, group * self.count, range(SUM_LANES // (group * self.count))
        vector_of = [[(j * group + i) * VECTOR_BYTES for i in range(group)] for j in groups]

        def keep(j: int, sums: list[Any]) -> None:
            for place, one in zip(vector_of[j], sums, strict=True):
                vectors.store(b, one, self.lanes, place)

        def kept(j: int) -> list[Any]:
            return [vectors.load(b, self.lanes, place, self.vector) for place in vector_of[j]]

        for j in groups:
            keep(j, terms(b.add(first, I64(j * lanes)), group, pairs, []))

        def add(i: Any, _: list[Any]) -> list[Any]:
            for j in groups:
                new = terms(b.add(i, I64(j * lanes)), group, pairs, [])
                keep(j, [b.fadd(old, term) for old, term in zip(kept(j), new, strict=True)])
            return []

        vectors.for_range(b, b.add(first, I64(SUM_LANES)), b.add(first, length), SUM_LANES, [], add)
        return [kept(j) for j in groups]

    def _lanes_in_blocks(
        self, terms: Callable[..., list[Any]], pairs: bool, group: int, fetch: Any, first: Any, length: Any
    ) -> list[Any]:
        """The lanes, in groups, of which each is summed in registers and folded into one vector."""
        b, lanes = self.builder, group * self.count
        rounds, end, result = b.sdiv(length, I64(SUM_LANES)), b.add(first, length), []
        for lane in range(0, SUM_LANES, lanes):
            start = b.add(first, I64(lane))
            in_order = b.add(first, b.mul(rounds, I64(lane)))

            def add(i: Any, sums: list[Any], start: Any = start, in_order: Any = in_order) -> list[Any]:
                fetch(b.add(in_order, b.sdiv(b.sub(i, start), I64(SUM_LANES // lanes))))
                new = terms(i, group, pairs, [])
                return [b.fadd(old, term) for old, term in zip(sums, new, strict=True)]

            fetch(in_order)
            sums = vectors.for_range(
                b, b.add(start, I64(SUM_LANES)), end, SUM_LANES, terms(start, group, pairs, []), add
            )
            result.append(fold(b, sums, 0, pairs))
        return result

    def _plain(self, address: Any, number: int, pairs: bool) -> list[Any]:
        """Vectors of the accumulate dtype, in the order of `read`."""
        b = self.builder
        loaded = [vectors.load(b, address, i * VECTOR_BYTES, self.vector) for i in range(number)]
        if not pairs:
            return loaded
        result = []
        for i in range(0, number, 2):
            for parity in (0, 1):
                places = ir.Constant(ir.VectorType(I32, self.count), list(range(parity, 2 * self.count, 2)))
                result.append(b.shuffle_vector(loaded[i], loaded[i + 1], places))
        return result

    # ---------------------------------------------------------------------------------------------------------------

    def softmax(self, bases: dict[str, Any]) -> None:
        b, operation = self.builder, self.kind.operation
        pairs = self.in_pairs("x", "out")
        m, least = self._extremes(bases["x"], pairs)
        near = vectors.constant(self.real, NEAR[self.kind.accumulate])
        is_near = b.fcmp_ordered(">", b.fsub(least, m), near)
        words = ir.VectorType(self.word, self.count)
        start = [vectors.constant(words, 0), self.word(0)]
        room = b.mul(b.sdiv(b.add(self.n, I64(SUM_CHUNK)), I64(SUM_CHUNK)), I64(8))
        kept_at = b.and_(b.add(b.add(self.scratch, room), I64(63)), I64(-64))

        def summed(near: bool) -> list[Any]:
            def terms(i: Any, number: int, pairs: bool, carried: list[Any]) -> list[Any]:
                xs = self.read("x", self.at(bases, i)["x"], number, pairs)
                place = 0 if number else 1
                counts = [carried[place]]
                m_here = [one.value for one in self.of_rows(m, number)]
                kept, new = self.exponentials(xs, m_here, near and number > 0, counts)
                carried[place] = counts[0]
                if self.kind.keeps:
                    target = b.add(kept_at, b.mul(i, I64(self.size)))
                    for j, one in enumerate(kept):
                        vectors.store(b, one, target, j * VECTOR_BYTES)
                return new

            total, counts = self.sum(terms, pairs, list(start), _VECTORS // 2)
            return [total, *counts]

        total, counts, more = vectors.either(b, is_near, lambda: summed(True), lambda: summed(False))
        number = b.sext(more, I64)
        for i in range(self.count):
            number = b.add(number, b.sext(b.extract_element(counts, I32(i)), I64))
        u, logarithm = self.logarithm(b.sitofp(number, self.real), total)
        if operation == "logsumexp":
            self.write("out", bases["out"], [self.log_of_sum(m, logarithm)], False)
            return

        def one_result(i: Any, number: int, pairs: bool) -> list[Any]:
            m_here, u_here, log_here = (
                [one.value for one in self.of_rows(scalar, number)] for scalar in (m, u, logarithm)
            )
            if operation == "softmax":
                if self.kind.keeps:
                    place = b.add(kept_at, b.mul(i, I64(self.size)))
                    kind = self.vector if number else self.real
                    kept = [vectors.load(b, place, j * VECTOR_BYTES, kind) for j in range(max(number, 1))]
                else:
                    xs = self.read("x", self.at(bases, i)["x"], number, pairs)
                    kept, _ = self.exponentials(xs, m_here, False, [self._no_counts(number)])
                return [b.fdiv(one, divisor) for one, divisor in zip(kept, u_here, strict=True)]
            xs = self.read("x", self.at(bases, i)["x"], number, pairs)
            return [b.fsub(b.fsub(x, m_here[j]), log_here[j]) for j, x in enumerate(xs)]

        self.write_row(bases["out"], one_result, self.in_pairs("x", "out"))

    def _no_counts(self, number: int) -> Any:
        return vectors.constant(ir.VectorType(self.word, self.count), 0) if number else self.word(0)

    def _extremes(self, x: Any, pairs: bool) -> tuple[Any, Any]:
        """The maximum and the minimum of a row; a maximum of NaN if there is one, and then any minimum."""
        b, wide = self.builder, 4
        words = ir.VectorType(self.word, self.count)
        infinity = float("inf")
        size = I64(self.itemsize("x"))

        def body(number: int, pairs: bool) -> Callable[[Any, list[Any]], list[Any]]:
            def step(i: Any, carried: list[Any]) -> list[Any]:
                xs = self.read("x", b.add(x, b.mul(i, size)), number, pairs)
                number_or_one = max(number, 1)
                most, least = carried[:number_or_one], carried[number_or_one : 2 * number_or_one]
                return self.extremes(most, least, carried[2 * number_or_one :], xs)

            return step

        bulk, whole = b.and_(self.n, I64(-wide * self.count)), b.and_(self.n, I64(-self.count))
        high, low = vectors.constant(self.vector, infinity), vectors.constant(self.vector, -infinity)
        none = vectors.constant(words, 0)
        values = vectors.for_range(
            b, I64(0), bulk, wide * self.count, [low] * wide + [high] * wide + [none] * 2, body(wide, pairs)
        )
        most, least, nan = values[:wide], values[wide : 2 * wide], b.or_(values[-1], values[-2])
        while len(most) > 1:
            most = [self._most(*most[i : i + 2]) for i in range(0, len(most), 2)]
            least = [self._least(*least[i : i + 2]) for i in range(0, len(least), 2)]
        most_1, least_1, nan = vectors.for_range(b, bulk, whole, self.count, [most[0], least[0], nan], body(1, False))
        half = self.count // 2
        while half:
            order = ir.Constant(ir.VectorType(I32, self.count), [i ^ half for i in range(self.count)])
            most_1 = self._most(most_1, b.shuffle_vector(most_1, most_1, order))
            least_1 = self._least(least_1, b.shuffle_vector(least_1, least_1, order))
            nan = b.or_(nan, b.shuffle_vector(nan, nan, order))
            half //= 2
        scalars = [b.extract_element(one, I32(0)) for one in (most_1, least_1, nan)]
        most_0, least_0, seen = vectors.for_range(b, whole, self.n, 1, scalars, body(0, False))
        nan_value = ir.Constant(self.real, float("nan"))
        return b.select(b.icmp_signed("!=", seen, self.word(0)), nan_value, most_0), least_0

    def _most(self, a: Any, c: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", a, c), a, c)

    def _least(self, a: Any, c: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered("<", a, c), a, c)


class _AcrossRows(_Code):
    """Rows side by side, some vectors of them at a time; those left over together with rows that were done before."""

    def emit(self) -> None:
        b, number = self.builder, self.kind.across
        names = self.present()
        width = number * self.count
        levels = 2 * (SUM_LANES.bit_length())
        self.block = number * VECTOR_BYTES
        self.lanes = vectors.memory(b, levels // 2 * self.block)
        self.chunks = vectors.memory(b, levels // 2 * self.block)
        self.counts = vectors.memory(b, self.block)

        def block(first: Any, _: list[Any]) -> list[Any]:
            first = vectors.minimum(b, first, b.sub(self.rows, I64(width)))
            bases = {}
            for name in names:
                step = 0 if self.spread(name) else self.itemsize(name)
                bases[name] = b.add(self.start(name), b.mul(first, I64(step)))
            if self.plan is None:
                self.softmax(bases)
            else:
                self.sums(bases, self.plan)
            return []

        vectors.for_range(b, I64(0), self.rows, width, [], block)

    def sums(self, bases: dict[str, Any], plan: Formula) -> None:
        number = self.kind.across
        scalars: list[Any] = []
        needed = {name for one in plan.sums for name in one.reads} | set(plan.reads)
        written = [name for name in ("out", *plan.scalars) if name and self.dtype(name)]
        pairs = self.in_pairs(*needed, *written)
        for place, (one, name) in enumerate(zip(plan.sums, plan.scalars, strict=True)):

            def terms(i: Any, one: Sum = one) -> list[Any]:
                return self.evaluate(one.term, one.reads, self.at(bases, i), number, pairs, scalars)

            scalars.append([self.end(one, place, total) for total in self.sum(terms)])
            if name and self.dtype(name):
                self.write(name, bases[name], scalars[-1], pairs)
        if plan.element is not None:

            def results(i: Any, _: list[Any]) -> list[Any]:
                where = self.at(bases, i)
                values = self.evaluate(plan.element, plan.reads, where, number, pairs, scalars)
                self.write("out", where["out"], values, pairs)
                return []

            vectors.for_range(self.builder, I64(0), self.n, 1, [], results)

    def of_rows(self, scalar: Any, number: int) -> list[Real]:
        return [Real(self.builder, one) for one in scalar]

    def sum(self, terms: Callable[[Any], list[Any]]) -> list[Any]:
        """The tree's sums: lane after lane, each added to its neighbour as soon as both are there (`_push`)."""
        b, number = self.builder, self.kind.across
        zeros = [vectors.constant(self.vector, 0.0)] * number

        def chunk(first: Any, _: list[Any]) -> list[Any]:
            length = vectors.minimum(b, b.sub(self.n, first), I64(SUM_CHUNK))
            end = b.add(first, length)

            def lane(place: Any, _: list[Any]) -> list[Any]:
                def add(i: Any, sums: list[Any]) -> list[Any]:
                    return [b.fadd(old, term) for old, term in zip(sums, terms(i), strict=True)]

                total = vectors.for_range(b, b.add(first, place), end, SUM_LANES, zeros, add)
                self._push(self.lanes, place, total)
                return []

            used = vectors.minimum(b, length, I64(SUM_LANES))
            vectors.for_range(b, I64(0), used, 1, [], lane)
            self._push(self.chunks, b.sdiv(first, I64(SUM_CHUNK)), self._pop(self.lanes, used))
            return []

        vectors.for_range(b, I64(0), self.n, SUM_CHUNK, [], chunk)
        chunks = b.sdiv(b.add(self.n, I64(SUM_CHUNK - 1)), I64(SUM_CHUNK))
        return self._pop(self.chunks, chunks)

    def _level(self, stack: Any, level: Any) -> list[Any]:
        b = self.builder
        place = b.add(stack, b.mul(level, I64(self.block)))
        return [vectors.load(b, place, j * VECTOR_BYTES, self.vector) for j in range(self.kind.across)]

    def _push(self, stack: Any, index: Any, sums: list[Any]) -> None:
        """Add sums of place `index` to those of the neighbours that wait on the stack, and let the result wait."""
        b = self.builder
        trailing = b.cttz(b.not_(index), ir.Constant(ir.IntType(1), 0))

        def up(level: Any, sums: list[Any]) -> list[Any]:
            return [b.fadd(old, new) for old, new in zip(self._level(stack, level), sums, strict=True)]

        sums = vectors.for_range(b, I64(0), trailing, 1, sums, up)
        place = b.add(stack, b.mul(trailing, I64(self.block)))
        for j, one in enumerate(sums):
            vectors.store(b, one, place, j * VECTOR_BYTES)

    def _pop(self, stack: Any, count: Any) -> list[Any]:
        """The sum of what waits on the stack after `count` places; neighbours that are not there count as +0."""
        b = self.builder
        zeros = [vectors.constant(self.vector, 0.0)] * self.kind.across

        def up(level: Any, sums: list[Any]) -> list[Any]:
            waits = b.icmp_signed("!=", b.and_(b.lshr(count, level), I64(1)), I64(0))

            def add() -> list[Any]:
                return [b.fadd(old, new) for old, new in zip(self._level(stack, level), sums, strict=True)]

            return vectors.when(b, waits, sums, add)

        return vectors.for_range(b, I64(0), I64(SUM_LANES.bit_length()), 1, zeros, up)

    def softmax(self, bases: dict[str, Any]) -> None:
        b, number, operation = self.builder, self.kind.across, self.kind.operation
        pairs = self.in_pairs("x", "out")
        words = ir.VectorType(self.word, self.count)
        infinity, none = float("inf"), vectors.constant(words, 0)

        def xs(i: Any) -> list[Any]:
            return self.read("x", self.at(bases, i)["x"], number, pairs)

        def extremes(i: Any, carried: list[Any]) -> list[Any]:
            most, least, nan = carried[:number], carried[number : 2 * number], carried[2 * number :]
            values = xs(i)
            for j, x in enumerate(values):
                most[j] = b.select(b.fcmp_ordered(">", x, most[j]), x, most[j])
                least[j] = b.select(b.fcmp_ordered("<", x, least[j]), x, least[j])
                nan[j] = b.or_(nan[j], b.sext(b.fcmp_unordered("uno", x, x), words))
            return [*most, *least, *nan]

        start = [vectors.constant(self.vector, -infinity)] * number + [vectors.constant(self.vector, infinity)] * number
        values = vectors.for_range(b, I64(0), self.n, 1, start + [none] * number, extremes)
        most, least, nan = values[:number], values[number : 2 * number], values[2 * number :]
        not_a_number = vectors.constant(self.vector, float("nan"))
        m = [b.select(b.icmp_signed("!=", n, none), not_a_number, one) for n, one in zip(nan, most, strict=True)]
        near = vectors.constant(self.vector, NEAR[self.kind.accumulate])
        all_near = None
        for one, low in zip(m, least, strict=True):
            here = b.fcmp_ordered(">", b.fsub(low, one), near)
            all_near = here if all_near is None else b.and_(all_near, here)
        mask = b.bitcast(b.sext(all_near, words), ir.IntType(8 * VECTOR_BYTES))
        is_near = b.icmp_signed("==", mask, ir.Constant(mask.type, -1))

        def sums(near: bool) -> list[Any]:
            for j in range(number):
                vectors.store(b, none, self.counts, j * VECTOR_BYTES)

            def terms(i: Any) -> list[Any]:
                counts = [vectors.load(b, self.counts, j * VECTOR_BYTES, words) for j in range(number)]
                _, new = self.exponentials(xs(i), m, near, counts)
                for j, one in enumerate(counts):
                    vectors.store(b, one, self.counts, j * VECTOR_BYTES)
                return new

            return self.sum(terms)

        rest = self._either(is_near, sums)
        counts = [vectors.load(b, self.counts, j * VECTOR_BYTES, words) for j in range(number)]
        u, logarithms = [], []
        for count, more in zip(counts, rest, strict=True):
            total, logarithm = self.logarithm(b.sitofp(count, self.vector), more)
            u.append(total)
            logarithms.append(logarithm)
        if operation == "logsumexp":
            results = [self.log_of_sum(*one) for one in zip(m, logarithms, strict=True)]
            self.write("out", bases["out"], results, pairs)
            return

        def write(near: bool) -> list[Any]:
            def results(i: Any, _: list[Any]) -> list[Any]:
                if operation == "softmax":
                    kept, _ = self.exponentials(xs(i), m, near, [none] * number)
                    values = [b.fdiv(one, divisor) for one, divisor in zip(kept, u, strict=True)]
                else:
                    values = [b.fsub(b.fsub(x, m[j]), logarithms[j]) for j, x in enumerate(xs(i))]
                self.write("out", self.at(bases, i)["out"], values, pairs)
                return []

            vectors.for_range(b, I64(0), self.n, 1, [], results)
            return []

        if operation == "softmax":
            self._either(is_near, write)
        else:
            write(False)

    def _either(self, is_near: Any, emit: Callable[[bool], list[Any]]) -> list[Any]:
        """What emit(True) gives where the condition holds, else emit(False)."""
        return vectors.either(self.builder, is_near, lambda: emit(True), lambda: emit(False))


# -------------------------------------------------------------------------------------------------------- the launches


@functools.cache
def _function(kind: Kind) -> int:
    """The address of a kind's function."""
    code = _AcrossRows if kind.across else _AlongRows

    def emit(builder: Any, *arguments: Any) -> None:
        code(kind, builder, *arguments).emit()

    return emitted(emit, 4, f"{kind._replace(plan=None)}")


@functools.cache
def _upper(accumulate: str) -> int:
    """The address of the upper levels of the tree of one row: upper(sums, length, lanes)."""
    kind, size = FLOAT[accumulate], ITEMSIZE[accumulate]

    def upper(sums, length, lanes):  # type: ignore[no-untyped-def]
        sum_tree(kind, size, sums, length, 1, lanes)

    return address_of(upper, *[types.int64] * 3, name=f"upper {accumulate}")


def _drive(call, number):  # type: ignore[no-untyped-def]
    """Take groups of rows, by the numbers of a call: those of a stretch of the rows, then those that others have left.

    So a thread reads on from group to group, and has the same rows at every call with the same arrays.
    """
    c = pointer(call, np.int64)
    r = pointer(c[_RECORD], np.int64)
    t = pointer(r[_ROWS], np.int64)
    g = Rows(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11])
    most = c[_MOST_THREADS]
    thread = take(call + 8 * _THREADS)
    if thread >= most:
        return
    scratch = call + 8 * (_TAKEN + _in_lines(most)) + thread * r[_SCRATCH_BYTES]
    starts = pointer(scratch, np.int64)
    for i in range(most):
        stretch = (number + i) % most
        end = _stretch_end(g, stretch, most)
        while c[_TAKEN + stretch] < end:
            group = take(call + 8 * (_TAKEN + stretch))
            if group >= end:
                break
            for operand in range(len(OPERANDS)):
                starts[operand] = group_start(g, group, operand, c[_ADDRESSES + operand])
            invoke(r[_FUNCTION], (r[_NUMBERS_OF], scratch, scratch + 64, group_rows(g, group)))


@inner
def _stretch_end(g, stretch, stretches):  # type: ignore[no-untyped-def]
    return g.groups * (stretch + 1) // stretches


@inner
def _in_lines(words):  # type: ignore[no-untyped-def]
    """So many words, and others up to the end of a cache line."""
    return (words + _LINE // 8 - 1) // (_LINE // 8) * (_LINE // 8)


@functools.cache
def _driver() -> int:
    """The address of `_drive`."""
    return address_of(_drive, types.int64, types.int64)


@kernel
def _launch(record, driver, pool_address, threads_of_call, call, *addresses):  # type: ignore[no-untyped-def]
    """Compute what a record says of the operands at these addresses; False if that is left to threads of Python.

    `call` is memory for the numbers of the call, which are then there, and for its threads.
    """
    c, r = pointer(call, np.int64), pointer(record, np.int64)
    groups = pointer(r[_ROWS], np.int64)[_GROUPS]
    c[_RECORD], c[_MOST_THREADS], c[_THREADS] = record, threads_of_call, 0
    for i in range(len(addresses)):
        c[_ADDRESSES + r[_PLACES + i]] = addresses[i]
    for i in range(threads_of_call):
        c[_TAKEN + i] = groups * i // threads_of_call
    if threads_of_call > 1 and pool_address == 0:
        return False
    return pool.run(pool_address, threads_of_call - 1, driver, call)


def prepare(spec: ReductionSpec, plan: Formula | None) -> ReductionLaunch | None:
    """The launch of a reduction whose rows can be read and written where they lie; else None.

    Args:
        spec: the reduction.
        plan: its formula; None for the softmaxes.
    """
    if len(spec.x.shape) > spec.kept + 1 or rounds(spec):
        return None
    g, (_, places) = describe(spec, 1)
    layouts = dict(zip(OPERANDS, (getattr(spec, name) for name in OPERANDS), strict=True))
    present = [name for name in OPERANDS if layouts[name] is not None]
    from_row = {name: int(places[i, ROW]) for i, name in enumerate(OPERANDS)}
    from_element = {name: int(places[i, INNER]) for i, name in enumerate(OPERANDS)}
    accumulate = ACCUMULATE[spec.out.dtype]
    count = VECTOR_BYTES // ITEMSIZE[accumulate]
    of_rows = {"mean", "rstd"} | ({"out"} if spec.one_for_a_row else set())
    enough = threads.FEW * threads.limit()
    if (g.n >= _LEAST or g.groups <= _FEW_ROWS) and all(
        from_element[name] == (name not in of_rows) for name in present
    ):
        across, spread = 0, [name in of_rows for name in OPERANDS]
        width = max(1, min(_AT_A_TIME // max(g.n, 1), g.groups // enough))
    elif (
        count <= g.neighbours
        and g.n <= _MOST_ACROSS
        and all(from_row[name] == 1 for name in present if name in ("x", "out", "grad"))
        and all(from_row[name] in (0, 1) for name in present)
    ):
        across = min(_VECTORS, 1 << (g.neighbours // count).bit_length() - 1)
        spread = [from_row[name] == 0 for name in OPERANDS]
        blocks = g.groups // (across * count)
        width = across * count * max(1, min(_AT_A_TIME // (across * count * max(g.n, 1)), blocks // enough))
    else:
        return None
    g, (dimensions, places) = describe(spec, width)
    if g.chunks > 1 and threads.FEW * g.groups <= threads.limit():
        return None  # so that the threads share the chunks of a row
    operation = spec.operation
    if operation == "sum":  # a mean that is divided by 1
        operation, plan = "mean", formula("mean", False, False)
    kind = Kind(
        operation,
        across,
        tuple(None if layouts[name] is None else layouts[name].dtype for name in OPERANDS),
        tuple(spread),
        plan,
        spec.operation == "softmax" and not across and g.n <= _KEPT,
    )
    static = np.zeros(_STATIC, np.int64)
    static[_N] = g.n
    static[_ALONG : _ALONG + len(OPERANDS)] = places[:, INNER] * places[:, SIZE]
    static[_ACROSS : _ACROSS + len(OPERANDS)] = places[:, ROW] * places[:, SIZE]
    for i, one in enumerate(plan.sums if plan else ()):
        numbers = one.divisor(g.n, spec.correction) if spec.operation != "sum" else 1.0, spec.eps
        static[_NUMBERS + 2 * i : _NUMBERS + 2 * i + 2] = np.array(numbers, np.float64).view(np.int64)
    static[_UPPER] = _upper(accumulate) if g.chunks > 1 and not across else 0
    static[_IN_ORDER] = g.n > SUM_LANES and g.groups * g.width * g.n * ITEMSIZE[spec.x.dtype] > _CACHED
    passes = _SOFTMAX_PASSES if plan is None else len(plan.sums) + (plan.element is not None)
    cost = g.groups * g.width * max(g.n, 1) * _NANOSECONDS_PER_PASS * passes
    room = 0 if across else 8 * g.chunks + (g.n * ITEMSIZE[accumulate] if kind.keeps else 0)
    room = -(-(_SPARE + room) // _LINE) * _LINE
    numbers_of_rows = np.array(g, np.int64)
    record = np.zeros(_PLACES + len(OPERANDS), np.int64)
    record[_FUNCTION], record[_NUMBERS_OF] = _function(kind), static.ctypes.data
    record[_ROWS], record[_SCRATCH_BYTES] = numbers_of_rows.ctypes.data, room
    record[_PLACES : _PLACES + len(present)] = [OPERANDS.index(name) for name in present]
    return _launcher(record, g.groups, cost, (dimensions, places, static, numbers_of_rows))


def _launcher(record: Table, groups: int, cost: float, tables: tuple[Table, ...]) -> ReductionLaunch:
    """The launch of a record; `tables` are what it points to."""
    driver, address, room = _driver(), record.ctypes.data, int(record[_SCRATCH_BYTES])
    useful, head = threads.useful(groups, cost), 8 * (_TAKEN + _LINE // 8)
    alone = head + 8 + room

    def launch_alone(stream: int, *given: int, keep: object = (record, tables)) -> None:
        _launch(address, driver, 0, 1, threads.scratch(alone), *given)

    if useful == 1:
        return launch_alone

    def launch(stream: int, *given: int, keep: object = (record, tables)) -> None:  # compiled code reads them
        most = min(useful, threads.limit())
        call = threads.scratch(head + most * (8 + room))
        if not _launch(address, driver, threads.native_pool(most), most, call, *given):
            threads.run_compiled(driver, call, most, cost)

    return launch


_FUNCTION, _NUMBERS_OF, _ROWS, _SCRATCH_BYTES, _PLACES = range(5)
"""The numbers of a record: the addresses of the function, of the static numbers and of the rows'; the bytes of memory
for each thread; and the places in OPERANDS of those that a launch is given."""

_THREADS, _RECORD, _MOST_THREADS, _ADDRESSES, _TAKEN = 0, 8, 9, 10, 24
"""The numbers of a call: threads that have come; the address of its record; how many threads may come; the addresses of
the operands; and of each thread's stretch of groups, the next one to be taken. The memory of the threads follows."""

_GROUPS = Rows._fields.index("groups")

_SPARE = 256
"""Bytes of a thread's memory for addresses, and between what lies there."""

_NANOSECONDS_PER_PASS, _SOFTMAX_PASSES = 0.1, 8
"""A rough cost of an element, by which `threads.run` judges whether another thread pays."""
