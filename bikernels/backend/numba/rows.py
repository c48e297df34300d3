"""Reductions of rows whose elements lie side by side: read once, kept in registers.

A chunk of the sum tree is one warp's, or is shared by 2 or 4 (`parts`), which have neighbouring lanes of it; a row is
that of some warps of a thread block, or of a cluster. A thread has 8 lanes of a chunk, or 4 or 2, in vectors of 16
bytes if the layout allows them: it loads all of its elements at once, adds those of a lane in order and folds its
lanes; shuffles fold those of the warp. Warps leave what they have found in shared memory (in that of every block of a
cluster), meet at a barrier, and each folds all of it by itself: the sums of a chunk's parts are neighbours in the tree
as chunks are, so that the upper levels are one fold.

Rows that begin anywhere have vectors of one element, neighbours' side by side; the rest is the same. Several short rows
share a warp, each with some neighbouring threads of it (`span`). Elements that a row does not have are loaded as what
changes no result, or masked. `sum` and `mean` keep nothing, so a warp may have chunk after chunk (`streams`).

What an operation computes is its formula. `plan` says which rows come here; others are for `columns.py` and
`reduction.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ...contract import ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import REDUCTIONS, ReductionSpec
from ...views import Device
from .. import ReductionLaunch
from .device import (
    ALL_LANES,
    FIRST_WITH_CLUSTERS,
    MEMBER,
    MOST_CTAS,
    OPERATIONS,
    STORAGE,
    VECTOR_BYTES,
    WARP,
    Function,
    arrive_in_cluster,
    begin_in_cluster,
    begin_sending,
    cuda,
    device,
    folded,
    instruction,
    int64s,
    larger,
    launch_dependents,
    mapped,
    pointer,
    prefetch_line,
    scanned,
    send_in_cluster,
    shared_address,
    store_in_cluster,
    types,
    wait_for_bytes,
    wait_for_predecessors,
    wait_in_cluster,
    writer,
)
from .formulas import BESIDE, NEAR, OPERANDS, Formula, Pass, formula, numbers_of
from .launch import Kernel, Launch, clusters_at_once, compute_capability, multiprocessors, on
from .quotients import NEAR_POWER_BITS, bounds, exact_quotients, quotients_near, rounded_quotients
from .vectors import (
    ACCUMULATED,
    DTYPES,
    MINUS_INFINITY,
    Vectors,
    extreme_of,
    forget_widened,
    narrower,
    vectors_of,
    widener,
)

ROW_OPERATIONS = tuple(name for name in REDUCTIONS if not name.endswith("weight_backward"))

LANES = SUM_LANES // WARP
"""Of the sum tree, that a thread has if a chunk is its warp's."""
SHORT_LANES, FEWER_SHORT_LANES = 32, 16
"""The same where several short rows share a warp, and what a row costs beside its elements: of 16-bit vectors; else."""
STEPS = SUM_CHUNK // SUM_LANES
"""Elements of a lane in a chunk."""
HELD = 32
"""Registers for a thread's elements; so the threads of a multiprocessor have as many bytes on their way as it needs."""
PLACES = SUM_LANES
"""For sums of chunks, where warps have chunk after chunk."""


def _short_lanes(dtype: str, width: int) -> int:
    """Lanes of a thread where several rows share a warp."""
    return SHORT_LANES if ITEMSIZE[dtype] == 2 and width > 1 else FEWER_SHORT_LANES


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    operation: str
    dtype: str
    """Of out, x and all operands but statistics."""
    operands: tuple[str, ...]
    """out, x, then those of the others that are there, in the order of the spec."""
    width: int
    """Elements of a vector: neighbouring lanes of the tree."""
    parts: int
    """Warps that share a chunk."""
    steps: int
    """Elements that a lane has, at most."""
    warps: int
    """Of a row, in a thread block."""
    rows: int
    """Of a thread block."""
    ctas: int
    """Thread blocks of a row, a cluster if there are several."""
    streams: bool = False
    """Whether warps have chunk after chunk."""
    span: int = WARP
    """Threads of a row in a warp: fewer of short rows, of which a thread then has more elements."""
    overlaps: bool = False
    """Whether it may be launched before the kernel in front has ended."""
    ahead: int = 0
    """Rows from one to that which it has the L2 fetch, as about so many are begun at a time; 0: it does not."""
    few: bool = False
    """Whether rows are so few that a thread may have many registers."""
    early: bool = False
    """Whether the next kernel may be launched at once, and the L2 fetches this one's rows before it may read them."""

    @property
    def formula(self) -> Formula:
        return formula(self.operation, self.dtype, "weight" in self.operands, "bias" in self.operands)

    @property
    def lanes(self) -> int:
        """Of a thread."""
        return LANES // self.parts if self.span == WARP else _short_lanes(self.dtype, self.width)

    @property
    def team(self) -> int:
        """Warps of a row."""
        return self.warps * self.ctas

    @property
    def threads(self) -> int:
        """Of a thread block."""
        return self.span * self.warps * self.rows

    @property
    def places(self) -> int:
        """For what the warps of a row leave."""
        return PLACES if self.streams else 1 << (self.team - 1).bit_length()


def _vectors(variant: Variant, absent: int = 0) -> Vectors:
    return vectors_of(variant.dtype, variant.width, variant.lanes, variant.span, absent)


# -------------------------------------------------------------------------------------------------------------- folds

_larger = larger(ACCUMULATED)
_add = OPERATIONS[ACCUMULATED].add


@device
def _plus(a: Any, b: Any) -> Any:
    return types.int32(a + b)


@functools.cache
def _fold(combine: Function, count: int) -> Function:
    """fold(values): of `count` neighbours, a power of two."""

    @device
    def pair(more: Any, i: Any, values: Any) -> Any:
        return combine(values[0], values[1])

    pairs = mapped(pair, 2)

    @device
    def first(values: Any) -> Any:
        return values[0]

    if count == 1:
        return first
    rest = _fold(combine, count // 2)

    @device
    def fold(values: Any) -> Any:
        return rest(pairs(0, values))

    return fold


@functools.cache
def _shuffle(combine: Function, lanes: int) -> Function:
    """shuffle(value): over neighbours, as many as `lanes`, in each of them."""
    exchanges = lanes.bit_length() - 1

    @device
    def shuffle(value: Any) -> Any:
        for d in range(exchanges):
            value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, 1 << d))
        return value

    return shuffle


@functools.cache
def _warp_sum(width: int, lanes: int, span: int) -> Function:
    """warp_sum(values): of the lanes of a row's threads, in each of them."""
    fold, shuffle, fold_groups = _fold(_add, width), _shuffle(_add, span), _fold(_add, lanes // width)

    @device
    def group(more: Any, g: Any, values: Any) -> Any:
        return shuffle(fold(values))

    groups = mapped(group, width)

    @device
    def warp_sum(values: Any) -> Any:
        return fold_groups(groups(0, values))

    return warp_sum


_add_warp = instruction("redux.sync.add.s32 $0, $1, 0xffffffff;", ["=r", "r"], types.int32, types.int32)
"""The sum of a warp's counts."""


# ------------------------------------------------------------------------------------------------- warps of one row


class Meeting(NamedTuple):
    """How the warps of a row share what each has found."""

    begin: Function
    """begin(thread, barriers): to be called first of all."""
    ready: Function
    """ready(): once all blocks of the row have begun, so that something can be left with them."""
    leave: Function
    """leave(table, row, place, lane, value, barrier): for the warps of the row, at a place that no other warp has."""
    leave_count: Function
    """The same of a whole number."""
    meet: Function
    """meet(barrier): what has been left can be read."""


@functools.cache
def _meeting(ctas: int, places: int, first_bytes: int, second_bytes: int) -> Meeting:
    """Where a row is a cluster's, its warps send what they leave to all blocks, whose barriers, one for each time that
    they meet, count so many bytes: a barrier of the cluster would wait for all that threads have written.
    """
    begin, send, send_count = (
        begin_sending(first_bytes, second_bytes),
        send_in_cluster(ACCUMULATED),
        send_in_cluster("int32"),
    )

    @device
    def nothing() -> None:
        pass

    @device
    def no_beginning(thread: Any, barriers: Any) -> None:
        pass

    @device
    def leave(table: Any, row: Any, place: Any, lane: Any, value: Any, barrier: Any) -> None:
        if lane == 0:
            table[row * places + place] = value

    @device
    def leave_in_cluster(table: Any, row: Any, place: Any, lane: Any, value: Any, barrier: Any) -> None:
        if lane < ctas:
            send(types.uint32(shared_address(table) + 4 * place), types.uint32(lane), value, barrier)

    @device
    def leave_count_in_cluster(table: Any, row: Any, place: Any, lane: Any, value: Any, barrier: Any) -> None:
        if lane < ctas:
            send_count(types.uint32(shared_address(table) + 4 * place), types.uint32(lane), value, barrier)

    @device
    def meet(barrier: Any) -> None:
        cuda.syncthreads()

    if ctas > 1:
        return Meeting(begin, wait_in_cluster, leave_in_cluster, leave_count_in_cluster, wait_for_bytes)
    return Meeting(no_beginning, nothing, leave, leave, meet)


def _meeting_of(variant: Variant) -> Meeting:
    first, second = (4 * variant.team * (1 + one.counts) for one in (*variant.formula.passes, Pass(None, ()))[:2])
    return _meeting(variant.ctas, variant.places, first, second)


class StreamMeeting(NamedTuple):
    """The same where warps leave as many values as they have chunks."""

    begin: Function
    ready: Function
    leave: Function
    meet: Function


@functools.cache
def _stream_meeting(ctas: int, places: int) -> StreamMeeting:
    to_cluster = store_in_cluster(ACCUMULATED)

    @device
    def nothing() -> None:
        pass

    @device
    def leave(table: Any, row: Any, place: Any, lane: Any, value: Any) -> None:
        if lane == 0:
            table[row * places + place] = value

    @device
    def leave_in_cluster(table: Any, row: Any, place: Any, lane: Any, value: Any) -> None:
        if lane < ctas:
            to_cluster(types.uint32(shared_address(table) + 4 * place), types.uint32(lane), value)

    @device
    def meet() -> None:
        cuda.syncthreads()

    @device
    def meet_in_cluster() -> None:
        arrive_in_cluster()
        wait_in_cluster()

    if ctas > 1:
        return StreamMeeting(begin_in_cluster, wait_in_cluster, leave_in_cluster, meet_in_cluster)
    return StreamMeeting(nothing, nothing, leave, meet)


@functools.cache
def _table_fold(combine: Function, places: int) -> Function:
    """fold(table, row, lane, count, absent): of the first `count` places of a row, in each thread of a warp."""
    each = max(1, places // WARP)
    fold, shuffle = _fold(combine, each), _shuffle(combine, min(places, WARP))

    @device
    def read(more: Any, i: Any) -> Any:
        table, begin, place, count, absent = more
        value = table[begin + place + i]
        return value if place + i < count else absent

    reads = mapped(read, count=each)

    @device
    def table_fold(table: Any, row: Any, lane: Any, count: Any, absent: Any) -> Any:
        place = types.int32((lane & types.int32(min(places, WARP) - 1)) * types.int32(each))
        return shuffle(fold(reads((table, types.int32(row * types.int32(places)), place, count, absent))))

    return table_fold


# ------------------------------------------------------------------------------------------------------------- passes
# `where`: the table of floats and that of counts, the row's number in the block, the thread's lane, the place of the
# warp in the row and the number of warps of the row, `left`: elements from the thread's first one on, the barriers.
# `beside`: addresses of the thread's first elements of weight and bias, then the row's mean and rstd. `sides`: words of
# grad, weight and bias, or those of x in place of what is not there or read later.


def _exchange(variant: Variant, number: int, combine: Function, neutral: float) -> Function:
    """exchange(where, table, value): combine what the warps of a row have found in a pass, in each thread."""
    if variant.team == 1:

        @device
        def alone(where: Any, table: Any, value: Any) -> Any:
            return value

        return alone
    meeting = _meeting_of(variant)
    leave, meet, table_fold = meeting.leave, meeting.meet, _table_fold(combine, variant.places)

    @device
    def exchange(where: Any, table: Any, value: Any) -> Any:
        _, row, lane, place, count, _, barriers = where
        barrier = types.uint32(barriers + types.uint32(8 * number))
        leave(table, row, place, lane, value, barrier)
        meet(barrier)
        return table_fold(table, row, lane, count, types.float32(neutral))

    return exchange


def _exchange_with_count(variant: Variant, number: int) -> Function:
    """exchange(where, table, value, count): the sums of both."""
    if variant.team == 1:

        @device
        def alone(where: Any, table: Any, value: Any, count: Any) -> Any:
            return value, count

        return alone
    meeting = _meeting_of(variant)
    leave, leave_count, meet = meeting.leave, meeting.leave_count, meeting.meet
    sums, counts = _table_fold(_add, variant.places), _table_fold(_plus, variant.places)

    @device
    def exchange(where: Any, table: Any, value: Any, count: Any) -> Any:
        count_table, row, lane, place, team, _, barriers = where
        barrier = types.uint32(barriers + types.uint32(8 * number))
        leave(table, row, place, lane, value, barrier)
        leave_count(count_table, row, place, lane, count, barrier)
        meet(barrier)
        total = sums(table, row, lane, team, types.float32(0))
        return total, counts(count_table, row, lane, team, types.int32(0))

    return exchange


ABSENT_TERMS_ARE_ZERO = ("sum", "mean", "softmax", "log_softmax", "logsumexp", "rms_norm", "softmax_backward",
                         "log_softmax_backward")  # fmt: skip
"""The operations whose terms of elements that are not there are 0, as these are loaded; of others but in the last pass.
"""


def _absent(variant: Variant) -> int:
    return MINUS_INFINITY[variant.dtype] if variant.formula.passes[0].term is None else 0


EARLY_HELD = 16
"""Words of a thread: of so few elements, weight and bias are read while x is on its way."""


def _are_early(variant: Variant) -> bool:
    return variant.span == WARP and variant.steps * _vectors(variant).words <= EARLY_HELD


def _elements(variant: Variant, names: tuple[str, ...]) -> tuple[Function, Function]:
    """widen(more, words), and beside_of(x, grads, weights, biases, beside, left, i): the elements of grad, weight and
    bias, given their words, or those of x in place of one that is not among `names`.
    """
    widen, load, are_late = widener(variant.dtype), _vectors(variant).load, not _are_early(variant)
    has_grad, has_weight, has_bias = (name in names for name in ("grad", "weight", "bias"))

    @device
    def beside_of(x: Any, grads: Any, weights: Any, biases: Any, beside: Any, left: Any, i: Any) -> Any:
        weight_at, bias_at, _, _ = beside
        g = w = b = x
        if has_grad:
            g = widen(0, grads)
        if has_weight:
            if are_late:
                weights = load((weight_at, left), i)
            w = widen(0, weights)
        if has_bias:
            if are_late:
                biases = load((bias_at, left), i)
            b = widen(0, biases)
        return g, w, b

    return widen, beside_of


def _lane_sums(variant: Variant, one: Pass, masked: bool) -> Function:
    """lane_sums(lanes, (beside, left, s), xs, grads, weights, biases): add the terms of some steps to the lanes; if
    `masked`, those of elements that are there.
    """
    widen, beside_of = _elements(variant, one.reads)
    words, term = _vectors(variant).words, one.term
    group, width = variant.span * variant.width, variant.width
    assert term is not None

    @device
    def add_term(more: Any, j: Any, lane: Any, x: Any, g: Any, w: Any) -> Any:
        i, left, m, r, s = more
        value = term(x, g, w, x, m, r, s)
        if masked and left <= i * types.int32(SUM_LANES) + j // width * group:
            value = types.float32(0)
        return _add(lane, value)

    add_terms = mapped(add_term, MEMBER, MEMBER, MEMBER, MEMBER)

    @device
    def add_step(lanes: Any, more: Any, i: Any, xs: Any, grads: Any, weights: Any, biases: Any) -> Any:
        beside, left, s = more
        _, _, m, r = beside
        x = widen(0, xs)
        g, w, _ = beside_of(x, grads, weights, biases, beside, left, i)
        return add_terms((i, left, m, r, s), lanes, x, g, w)

    return folded(add_step, words, words, words, words)


def _all_lane_sums(variant: Variant, number: int) -> Function:
    """As `_lane_sums`, of all that a thread has: masked only where an element is not there and its term is not 0."""
    passes = variant.formula.passes
    unmasked = _lane_sums(variant, passes[number], False)
    if variant.operation in ABSENT_TERMS_ARE_ZERO or number + 1 < len(passes):
        return unmasked
    masked = _lane_sums(variant, passes[number], True)
    vectors = variant.lanes // variant.width
    reach = (variant.steps - 1) * SUM_LANES + (vectors - 1) * variant.span * variant.width + variant.width

    @device
    def lane_sums(lanes: Any, more: Any, xs: Any, grads: Any, weights: Any, biases: Any) -> Any:
        _, left, _ = more
        if left >= reach:
            return unmasked(lanes, more, xs, grads, weights, biases)
        return masked(lanes, more, xs, grads, weights, biases)

    return lane_sums


def _no_step(variant: Variant) -> Function:
    @device
    def step(xs: Any, sides: Any, beside: Any, where: Any, table: Any, numbers: Any, before: Any) -> Any:
        return before[0], types.float32(0), xs

    return step


def _zeros(count: int) -> Function:
    @device
    def zero(more: Any, i: Any) -> Any:
        return types.float32(0)

    return mapped(zero, count=count)


def _step(variant: Variant, number: int) -> Function:
    """step(xs, sides, beside, where, table, numbers, before): what a pass finds, in each thread; what it knows of the
    elements that it is about, of a maximum that of the warp, of exponentials the least x - s of the thread; and what is
    kept of the elements. `before`: the first two of the pass before.
    """
    passes = variant.formula.passes
    if number >= len(passes):
        return _no_step(variant)
    one = passes[number]
    if not one.is_sum:
        maximum, shuffle = extreme_of(variant.dtype, "max.NaN", -math.inf), _shuffle(_larger, variant.span)
        exchange = _exchange(variant, number, _larger, -math.inf)

        @device
        def find_maximum(xs: Any, sides: Any, beside: Any, where: Any, table: Any, numbers: Any, before: Any) -> Any:
            of_warp = shuffle(maximum(xs))
            return exchange(where, table, of_warp), of_warp, xs

        return find_maximum
    if one.power is not None:
        return _step_of_powers(variant, number)
    lane_sums, warp_sum = _all_lane_sums(variant, number), _warp_sum(variant.width, variant.lanes, variant.span)
    zeros, end, exchange = _zeros(variant.lanes), one.end, _exchange(variant, number, _add, 0.0)
    assert end is not None and not one.counts

    @device
    def find_sum(xs: Any, sides: Any, beside: Any, where: Any, table: Any, numbers: Any, before: Any) -> Any:
        grads, weights, biases = sides
        total = exchange(
            where, table, warp_sum(lane_sums(zeros(0), (beside, where[5], before[0]), xs, grads, weights, biases))
        )
        value = end(total, types.int32(0), before[0], types.float32(numbers[number]), types.float32(numbers[2]))
        return value, types.float32(0), xs

    return find_sum


def _keeps_powers(variant: Variant) -> bool:
    """Whether exponentials are kept in place of the elements."""
    if not variant.formula.divides:
        return False
    held = variant.steps * _vectors(variant).words
    return ITEMSIZE[variant.dtype] == 4 or held <= MOST_PAIRS


MOST_PAIRS = 16
"""Words of a thread's elements of 16 bits: of no more, exponentials, which are twice as many, are kept."""


def _step_of_powers(variant: Variant, number: int) -> Function:
    """As `_step`, of the sum of exponentials."""
    one, dtype = variant.formula.passes[number], variant.dtype
    power, near_power, end, words = one.power, one.near_power, one.end, _vectors(variant).words
    assert power is not None and near_power is not None and end is not None
    widen, least, lanes = widener(dtype), extreme_of(dtype, "min", math.inf), variant.lanes
    zeros, exchange = _zeros(lanes), _exchange_with_count(variant, number)
    fold, groups = _fold(_add, variant.width), variant.lanes // variant.width
    shuffle, fold_groups = _shuffle(_add, variant.span), _fold(_add, groups)
    count_warp = _add_warp if variant.span == WARP else _shuffle(_plus, variant.span)
    to_bits = OPERATIONS[ACCUMULATED].to_bits
    keeps, is_precise = _keeps_powers(variant), dtype == ACCUMULATED
    # A second form makes rows of a thread block slower where a warp does little else, in 16 bits.
    has_plain = variant.team > 1 and (variant.formula.divides or variant.ctas > 1 or is_precise)
    one_by_one = has_plain and not (variant.few and ITEMSIZE[dtype] == 2)  # what is rare then

    @device
    def power_of(s: Any, i: Any, x: Any) -> Any:
        return power(x, s)

    @device
    def near_power_of(s: Any, i: Any, x: Any) -> Any:
        return near_power(x, s)

    @device
    def add_term(s: Any, i: Any, lane: Any, x: Any, value: Any) -> Any:
        return _add(lane, types.float32(0) if _add(x, -s) == types.float32(0) else value)

    @device
    def add_plain_term(more: Any, i: Any, lane: Any, value: Any) -> Any:
        return _add(lane, value)

    @device
    def add_count(count: Any, s: Any, i: Any, x: Any) -> Any:
        return types.int32(count + (1 if _add(x, -s) == types.float32(0) else 0))

    @device
    def smaller_power(smallest: Any, more: Any, i: Any, value: Any) -> Any:
        return min(smallest, types.uint32(types.uint32(to_bits(value)) - types.uint32(1)))  # a 0 is overlooked

    @device
    def near_if(smallest: Any) -> Any:
        return types.float32(NEAR) if smallest >= types.uint32(NEAR_POWER_BITS - 1) else types.float32(-math.inf)

    powers, near_powers = mapped(power_of, MEMBER), mapped(near_power_of, MEMBER)
    least_power = folded(smaller_power, MEMBER)
    add_terms, add_plain_terms = mapped(add_term, MEMBER, MEMBER, MEMBER), mapped(add_plain_term, MEMBER, MEMBER)
    add_counts = folded(add_count, MEMBER)

    @device
    def fold_lanes(more: Any, g: Any, values: Any) -> Any:
        return fold(values)

    @device
    def shuffle_one(more: Any, g: Any, value: Any) -> Any:
        return shuffle(value)

    folds, shuffles = mapped(fold_lanes, variant.width), mapped(shuffle_one, MEMBER)

    @device
    def add_step(state: Any, more: Any, i: Any, xs: Any) -> Any:
        (sums, count, smallest), (s, left) = state, more
        x = widen(0, xs)
        if one_by_one and left <= i * types.int32(SUM_LANES):  # steps that overlap would take registers
            return (sums, count, smallest), x
        values = powers(s, x)
        return (add_terms(s, sums, x, values), add_counts(count, s, x), least_power(smallest, 0, values)), values

    @device
    def add_plain_step(sums: Any, s: Any, i: Any, xs: Any) -> Any:
        values = near_powers(s, widen(0, xs))
        return add_plain_terms(0, sums, values), values

    add_steps, add_plain_steps = scanned(add_step, words), scanned(add_plain_step, words)

    @device
    def general(more: Any, xs: Any) -> Any:
        (sums, count, smallest), kept = add_steps((zeros(0), types.int32(0), types.uint32(0xFFFFFFFF)), more, xs)
        if keeps:
            return folds(0, sums), count, kept, near_if(smallest)
        return folds(0, sums), count, xs, near_if(smallest)

    @device
    def plain(s: Any, xs: Any, least_t: Any) -> Any:
        sums, kept = add_plain_steps(zeros(0), s, xs)
        if keeps:
            return folds(0, sums), types.int32(0), kept, least_t
        return folds(0, sums), types.int32(0), xs, least_t

    @device
    def find_sum(xs: Any, sides: Any, beside: Any, where: Any, table: Any, numbers: Any, before: Any) -> Any:
        s, most = before
        is_plain, least_t = False, types.float32(0)
        if has_plain:
            smallest = least(xs)
            least_t = _add(smallest, -s)
            is_plain = least_t > types.float32(NEAR)
            if is_precise:
                is_plain = is_plain & (smallest >= -s)
            is_plain = cuda.all_sync(ALL_LANES, is_plain) and most != s
        if is_plain:
            sums, count, kept, known = plain(s, xs, least_t)
        else:
            sums, count, kept, known = general((s, where[5]), xs)
        total, count = exchange(where, table, fold_groups(shuffles(0, sums)), count_warp(count))
        value = end(total, count, s, types.float32(numbers[number]), types.float32(numbers[2]))
        return value, known, kept

    return find_sum


# ------------------------------------------------------------------------------------------------------------ results


@device
def _no_row(address: Any, xs: Any, sides: Any, beside: Any, left: Any, s: Any, t: Any, known: Any, source: Any) -> None:
    pass


def _row_writer(variant: Variant) -> Function:
    """write_row(address, xs, sides, beside, left, s, t, known, source): the results of a thread's elements. `xs`: what
    is kept of them; `known`: what the last pass knows of them; `source`: the address of the first.
    """
    plan, vectors = variant.formula, _vectors(variant)
    if plan.element is None:
        return _no_row
    if plan.divides:
        return _kept_quotient_writer(variant) if _keeps_powers(variant) else _quotient_writer(variant)
    element, store, narrow = plan.element, vectors.store, narrower(variant.dtype)
    widen, beside_of = _elements(variant, plan.reads)

    @device
    def result(more: Any, j: Any, x: Any, g: Any, w: Any, b: Any) -> Any:
        m, r, s, t = more
        return element(x, g, w, b, m, r, s, t)

    results = mapped(result, MEMBER, MEMBER, MEMBER, MEMBER)

    @device
    def write_step(state: Any, more: Any, i: Any, xs: Any, grads: Any, weights: Any, biases: Any) -> Any:
        address, beside, left, s, t = more
        x = widen(0, xs)
        _, _, m, r = beside
        g, w, b = beside_of(x, grads, weights, biases, beside, left, i)
        store(address, left, i, narrow(0, results((m, r, s, t), x, g, w, b)))
        return state

    write_steps = folded(write_step, *[vectors.words] * 4)

    @device
    def write_row(
        address: Any, xs: Any, sides: Any, beside: Any, left: Any, s: Any, t: Any, known: Any, source: Any
    ) -> None:
        grads, weights, biases = sides
        write_steps(types.int32(0), (address, beside, left, s, t), xs, grads, weights, biases)

    return write_row


def _kept_quotient_writer(variant: Variant) -> Function:
    """As `_row_writer`, of powers by their sum."""
    store, one_by = _vectors(variant).store, OPERATIONS[ACCUMULATED].divide
    near, write_exactly = quotients_near(variant.dtype, variant.overlaps), _exact_quotient_writer(variant)
    all_steps = (1 << variant.steps) - 1

    @device
    def write_step(state: Any, more: Any, i: Any, powers: Any) -> Any:
        address, left, t, reciprocal = more
        store(address, left, i, near(powers, t, reciprocal))
        return state

    write_steps = folded(write_step, variant.lanes)

    @device
    def write_row(
        address: Any, powers: Any, sides: Any, beside: Any, left: Any, s: Any, t: Any, known: Any, source: Any
    ) -> None:
        reciprocal = one_by(types.float32(1), t)
        if known >= types.float32(NEAR) and t == t:
            write_steps(types.int32(0), (address, left, t, reciprocal), powers)
        else:
            write_exactly(types.uint32(all_steps), address, left, s, t, reciprocal, source)

    return write_row


def _quotient_writer(variant: Variant) -> Function:
    """As `_row_writer`, of powers by their sum that are computed again: by the hardware, and in the steps in which it
    is not sure to what that rounds, as the contract says.
    """
    vectors, one_by = _vectors(variant), OPERATIONS[ACCUMULATED].divide
    store, rounded, write_exactly = vectors.store, rounded_quotients(variant.dtype), _exact_quotient_writer(variant)

    @device
    def write_step(unsure: Any, more: Any, i: Any, words: Any) -> Any:
        address, left, s, both, is_near = more
        results, difference = rounded(words, s, both)
        is_sure = is_near and difference == types.uint32(0)
        store(address, left if is_sure else types.int32(-(2**31)), i, results)
        return types.uint32(unsure | (types.uint32(0) if is_sure else types.uint32(1) << types.uint32(i)))

    write_steps = folded(write_step, vectors.words)

    @device
    def write_row(
        address: Any, xs: Any, sides: Any, beside: Any, left: Any, s: Any, t: Any, known: Any, source: Any
    ) -> None:
        reciprocal = one_by(types.float32(1), t)
        more = address, left, s, bounds(reciprocal, known), known >= types.float32(NEAR)
        unsure = write_steps(types.uint32(0), more, xs)
        write_exactly(unsure, address, left, s, t, reciprocal, source)

    return write_row


def _exact_quotient_writer(variant: Variant) -> Function:
    """write_exactly(steps, address, left, s, t, reciprocal, source): the results of the steps whose bits are set, of
    elements that are read again, as those of a thread have no numbers by which a loop could name them.
    """
    vectors, power = _vectors(variant), variant.formula.passes[-1].power
    assert power is not None
    load, store, exact = vectors.load, vectors.store, exact_quotients(variant.dtype, power)

    @device
    def write_exactly(steps: Any, address: Any, left: Any, s: Any, t: Any, reciprocal: Any, source: Any) -> None:
        while steps != types.uint32(0):
            i = types.int32(cuda.ffs(types.int32(steps)) - 1)
            steps = types.uint32(steps & types.uint32(steps - types.uint32(1)))
            store(address, left, i, exact(load((source, left), i), s, t, reciprocal))

    return write_exactly


def _number_writer(variant: Variant, written: str) -> Function:
    """write_number(addresses, strides, row, value): what a pass has found, to the operand that it belongs to."""
    if written not in variant.operands:

        @device
        def nothing(addresses: Any, strides: Any, row: Any, value: Any) -> None:
            pass

        return nothing
    place, dtype = variant.operands.index(written), variant.dtype if written == "out" else ACCUMULATED
    storage, write = STORAGE[dtype], writer(dtype, ACCUMULATED)

    @device
    def write_number(addresses: Any, strides: Any, row: Any, value: Any) -> None:
        write(pointer(addresses[place], storage), row * strides[place], value)

    return write_number


# ------------------------------------------------------------------------------------------------------------ kernels


def _beside(variant: Variant) -> Function:
    """beside(addresses, strides, row, start): see the passes; 0 where there is no such operand."""
    weight, bias, mean, rstd = (
        variant.operands.index(name) if name in variant.operands else -1 for name in OPERANDS[2:]
    )
    itemsize, is_read = ITEMSIZE[variant.dtype], variant.operation.endswith("backward")
    real = STORAGE[ACCUMULATED]

    @device
    def beside(addresses: Any, strides: Any, row: Any, start: Any) -> Any:
        weight_at = bias_at = types.int64(0)
        m = r = types.float32(0)
        if weight >= 0:
            weight_at = addresses[weight] + start * itemsize
        if bias >= 0:
            bias_at = addresses[bias] + start * itemsize
        if is_read and mean >= 0:
            m = pointer(addresses[mean], real)[row * strides[mean]]
        if is_read and rstd >= 0:
            r = pointer(addresses[rstd], real)[row * strides[rstd]]
        return weight_at, bias_at, m, r

    return beside


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    operands = len(variant.operands)
    signature = types.void(
        int64s(operands),  # addresses
        int64s(operands),  # from row to row, in elements
        int64s(2),  # rows, elements of a row
        types.UniTuple(types.float64, 3),  # what divides the sums of both passes, eps
    )
    body = _stream if variant.streams else _reduce
    return Kernel(
        f"rows {variant}",
        lambda: (body(variant), signature),
        variant.threads,
        max(1, _threads_of_a_multiprocessor(variant) // variant.threads),
        older_blocks=max(1, LEAST_THREADS // variant.threads),
        oldest=FIRST_WITH_CLUSTERS if variant.overlaps or variant.ctas > 1 else FIRST,
        cluster=variant.ctas,
        overlaps=variant.overlaps,
    )


MOST_THREADS, MORE_THREADS, MANY_THREADS, LEAST_THREADS = 1024, 768, 640, 512
"""Of a multiprocessor: 64, 80, 96 and 128 registers for each."""


def _threads_of_a_multiprocessor(variant: Variant) -> int:
    """How many should fit, which bounds the registers of each: the more it keeps, the fewer, so that none spills."""
    if "grad" in variant.operands:
        return LEAST_THREADS
    held = variant.steps * _vectors(variant).words
    if held > HELD or variant.few:
        return MANY_THREADS
    sides = sum(name in variant.operands for name in ("weight", "bias")) if _are_early(variant) else 0
    return MORE_THREADS if variant.lanes > LANES or held * (1 + sides) > HELD else MOST_THREADS


def _overlap(variant: Variant) -> tuple[Function, Function]:
    """`launch_dependents` and `wait_for_predecessors`, where kernels overlap."""

    @device
    def nothing() -> None:
        pass

    return (launch_dependents, wait_for_predecessors) if variant.overlaps else (nothing, nothing)


def _place(variant: Variant) -> Function:
    """place(rows): the row that a thread reads and whether there is one to answer for, its number in the block, the
    thread's lane, the place of its warp in the row.
    """
    span, warps, ctas, rows_of_block = variant.span, variant.warps, variant.ctas, variant.rows

    @device
    def place(rows: Any) -> Any:
        thread = types.uint32(cuda.threadIdx.x)
        lane, warp = types.int32(thread % types.uint32(span)), types.uint32(thread // types.uint32(span))
        number = types.uint32(warp // types.uint32(warps))
        member = types.uint32(warp - types.uint32(number * types.uint32(warps)))
        block = types.uint32(cuda.blockIdx.x)
        team = types.uint32(block // types.uint32(ctas))
        rank = types.uint32(block - types.uint32(team * types.uint32(ctas)))
        row = types.int64(team) * rows_of_block + types.int64(number)
        mine = types.int32(rank * types.uint32(warps) + member)
        return min(row, rows - 1), row < rows, types.int32(number), lane, mine

    return place


LINE = 128
"""Bytes that the L2 fetches at a time."""


def _prefetch(variant: Variant, ahead: int | None) -> Function:
    """prefetch(x, step, row, (rows, n), thread): have the L2 fetch the row `ahead` of this one, by all its threads."""
    itemsize, threads = ITEMSIZE[variant.dtype], variant.team * WARP
    lines = -(-STEPS * SUM_LANES * itemsize // (WARP * LINE * variant.parts))

    @device
    def nothing(x: Any, step: Any, row: Any, sizes: Any, thread: Any) -> None:
        pass

    @device
    def prefetch(x: Any, step: Any, row: Any, sizes: Any, thread: Any) -> None:
        later = row + types.int64(ahead)
        if later < sizes[0]:
            for i in range(lines):
                at = types.int32(types.int32(thread + types.int32(i * threads)) * types.int32(LINE))
                if at < types.int32(sizes[1]) * types.int32(itemsize):
                    prefetch_line(x + later * step * types.int64(itemsize) + types.int64(at))

    return nothing if ahead is None else prefetch


def _reduce(variant: Variant) -> Function:
    """All passes over a row that is kept in registers, then the results."""
    plan, operands = variant.formula, variant.operands
    place, beside_row = _place(variant), _beside(variant)
    parts, width, team = variant.parts, variant.width, variant.team
    places, itemsize = variant.places * variant.rows, ITEMSIZE[variant.dtype]
    load = mapped(_vectors(variant, _absent(variant)).load, count=variant.steps)
    load_side = mapped(_vectors(variant).load, count=variant.steps)
    grad = operands.index("grad") if "grad" in operands else -1
    reads_weight, reads_bias = (name in operands and _are_early(variant) for name in ("weight", "bias"))
    first, second = _step(variant, 0), _step(variant, 1)
    write_row = _row_writer(variant)
    write_first, write_second = (_number_writer(variant, one.written) for one in (*plan.passes, Pass(None, ()))[:2])
    meeting, is_cluster = _meeting_of(variant), variant.ctas > 1
    begin, ready = meeting.begin, meeting.ready
    launch_dependents, wait_for_predecessors = _overlap(variant)
    early, fetch = variant.early, _prefetch(variant, 0 if variant.early else None)
    prefetch = _prefetch(variant, variant.ahead or None)

    @device
    def remember(more: Any, kept: Any) -> Any:
        return kept

    forget = remember if _keeps_powers(variant) else forget_widened

    def reduce(addresses: Any, strides: Any, sizes: Any, numbers: Any) -> None:
        barriers = types.uint32(0)
        if is_cluster:
            barriers = shared_address(cuda.shared.array(2, types.uint64))
        begin(types.uint32(cuda.threadIdx.x), barriers)
        tables = cuda.shared.array(places, types.float32), cuda.shared.array(places, types.float32)
        counts = cuda.shared.array(places, types.int32)
        row, is_there, number, lane, mine = place(sizes[0])
        chunk = mine // types.int32(parts)
        part = types.int32(mine - types.int32(chunk * types.int32(parts)))
        start = types.int32(
            chunk * types.int32(SUM_CHUNK) + part * types.int32(SUM_LANES // parts) + lane * types.int32(width)
        )
        left = types.int32(types.int32(sizes[1]) - start)
        if early:
            launch_dependents()
            fetch(addresses[1], strides[1], row, sizes, types.int32(mine * types.int32(WARP) + lane))
        wait_for_predecessors()
        xs = load((addresses[1] + (row * strides[1] + start) * itemsize, left))
        grads = weights = biases = xs
        if grad >= 0:
            grads = load_side((addresses[grad] + (row * strides[grad] + start) * itemsize, left))
        prefetch(addresses[1], strides[1], row, sizes, types.int32(mine * types.int32(WARP) + lane))
        beside = beside_row(addresses, strides, row, start)
        if reads_weight:
            weights = load_side((beside[0], left))
        if reads_bias:
            biases = load_side((beside[1], left))
        sides = grads, weights, biases
        where = counts, number, lane, mine, types.int32(team), left, barriers
        ready()
        s, known, _ = first(xs, sides, beside, where, tables[0], numbers, (types.float32(0), types.float32(0)))
        t, known, kept = second(forget_widened(0, xs), sides, beside, where, tables[1], numbers, (s, known))
        if not early:
            launch_dependents()  # not before: those that wait for this kernel would crowd some multiprocessors
        # The same to all but the assembler, which would keep what was compared for the loads in registers.
        left_again = cuda.shfl_sync(ALL_LANES, left, types.int32(cuda.laneid))
        if is_there:
            if mine == 0 and lane == 0:
                write_first(addresses, strides, row, s)
                write_second(addresses, strides, row, t)
            out = addresses[0] + (row * strides[0] + start) * itemsize
            source = addresses[1] + (row * strides[1] + start) * itemsize
            write_row(out, forget(0, kept), sides, beside, left_again, s, t, known, source)

    return reduce


def _stream(variant: Variant) -> Function:
    """A sum over rows of which a warp has chunk after chunk."""
    one, place, team = variant.formula.passes[0], _place(variant), variant.team
    places, width, itemsize = variant.places * variant.rows, variant.width, ITEMSIZE[variant.dtype]
    load, zeros = mapped(_vectors(variant).load, count=variant.steps), _zeros(LANES)
    lane_sums, warp_sum = _lane_sums(variant, one, False), _warp_sum(width, LANES, WARP)
    table_sum, loads, part = _table_fold(_add, variant.places), STEPS // variant.steps, variant.steps * SUM_LANES
    begin, ready, leave, meet = _stream_meeting(variant.ctas, variant.places)
    launch_dependents, wait_for_predecessors = _overlap(variant)
    end, write = one.end, _number_writer(variant, one.written)
    assert end is not None

    def stream(addresses: Any, strides: Any, sizes: Any, numbers: Any) -> None:
        launch_dependents()
        begin()
        table = cuda.shared.array(places, types.float32)
        n = types.int32(sizes[1])
        row, is_there, number, lane, mine = place(sizes[0])
        chunks = types.int32((n + types.int32(SUM_CHUNK - 1)) // types.int32(SUM_CHUNK))
        beside = types.int64(0), types.int64(0), types.float32(0), types.float32(0)
        x = addresses[1] + row * strides[1] * itemsize
        wait_for_predecessors()
        ready()
        for chunk in range(mine, chunks, types.int32(team)):
            start = types.int32(chunk * types.int32(SUM_CHUNK) + lane * types.int32(width))
            lanes = zeros(0)
            for i in range(loads):
                at = types.int32(start + types.int32(i) * types.int32(part))
                left = types.int32(n - at)
                xs = load((x + at * types.int64(itemsize), left))
                lanes = lane_sums(lanes, (beside, left, types.float32(0)), xs, xs, xs, xs)
            leave(table, number, chunk, lane, warp_sum(lanes))
        meet()
        total = table_sum(table, number, lane, chunks, types.float32(0))
        total = end(total, types.int32(0), types.float32(0), types.float32(numbers[0]), types.float32(numbers[2]))
        if is_there and mine == 0 and lane == 0:
            write(addresses, strides, row, total)

    return stream


# --------------------------------------------------------------------------------------------------------------- plans

FIRST = (8, 0)
"""The first compute capability that has the instructions."""
MOST_PARTS = 4
WARPS, MOST_WARPS = 4, 20
"""Of a thread block: several rows make up the first; the second is what it can have."""
PREFERRED_WARPS, CLUSTER_WARPS = 16, 5
"""Of a thread block that has a row, at most if there could be more of them; of one of several, if those are enough."""
FEW_CHUNKS = 4
"""Of 16-bit rows whose results are quotients, which take more instructions: those have two warps each, at least."""
LONG_CHUNKS, MANY_HELD = 9, 64
"""From so many chunks on, a thread has so many registers' worth of elements, so that fewer warps meet."""
LARGE_CTAS = 2 * MOST_CTAS
"""Of a cluster, where a GPU has such."""
DIVIDED_CHUNKS, DIVIDED_WARPS, DIVIDED_SOFTMAX_WARPS = 8, 3, 13
"""Rows of so many chunks have a cluster each and two warps to a chunk, if a multiprocessor then has no more warps."""
EARLY_SHARE = 4
"""Rows that have no more than one multiprocessor in so many are fetched early: else it takes longer."""
BUSY_WARPS = 8
"""Of a multiprocessor: rows that have fewer are divided among more."""
ROUNDS = 4
"""Chunks of a warp that has several, if rows are many."""


class Plan(NamedTuple):
    """How a spec comes here."""

    variant: Variant
    grid: int
    """Thread blocks, or clusters."""
    arguments: tuple[int | float, ...]
    """Those of a launch that follow the addresses."""
    vectors: tuple[int, ...]
    """Places of the operands whose addresses have to be multiples of `alignment`."""
    alignment: int


def prepare(spec: ReductionSpec, gpu: Device, otherwise: Callable[[], ReductionLaunch]) -> ReductionLaunch | None:
    """The launch, if there is a plan; `otherwise` prepares what takes operands that are aligned for no other plan."""
    chosen = _plan_for(spec, gpu)
    if chosen is None:
        return None
    run, vectors, alignment = _launch(chosen, gpu), chosen.vectors, chosen.alignment
    if alignment == ITEMSIZE[spec.out.dtype]:
        return run

    @functools.cache
    def unaligned() -> ReductionLaunch:
        other = _plan_for(spec, gpu, aligned=False)
        return otherwise() if other is None else _launch(other, gpu)

    def launch(stream: int, *addresses: int) -> None:
        is_aligned = not any(addresses[place] % alignment for place in vectors)
        (run if is_aligned else unaligned())(stream, *addresses)

    return launch


def _plan_for(spec: ReductionSpec, gpu: Device, aligned: bool = True) -> Plan | None:
    """The plan, for clusters that the GPU holds."""
    given = spec, compute_capability(gpu), multiprocessors(gpu), aligned
    chosen = plan(*given)
    if chosen is None or holds(chosen.variant, chosen.grid, gpu):
        return chosen
    return plan(*given, large_clusters=False)


def holds(variant: Variant, clusters: int, gpu: Device) -> bool:
    """Whether a GPU holds so many of its clusters at a time, asked of those that not every GPU has."""
    if variant.ctas <= MOST_CTAS:
        return True
    with on(gpu):
        return clusters_at_once(kernel(variant), gpu) >= clusters


def _launch(chosen: Plan, gpu: Device) -> ReductionLaunch:
    variant, arguments = chosen.variant, chosen.arguments
    with on(gpu):
        run = Launch(kernel(variant), gpu, (chosen.grid,), variant.ctas if variant.ctas > 1 else None)

    def launch(stream: int, *addresses: int) -> None:
        with on(gpu):
            run(stream, *addresses, *arguments)

    return launch


def plan(
    spec: ReductionSpec,
    capability: tuple[int, int],
    processors: int,
    aligned: bool = True,
    large_clusters: bool = True,
) -> Plan | None:
    """The plan for a GPU of that compute capability and so many multiprocessors, for addresses that are aligned as far
    as vectors need it, or not at all; None: not for here. `large_clusters`: see `choose`.
    """
    layouts = {name: layout for name in ("out", *OPERANDS) if (layout := getattr(spec, name)) is not None}
    kept, shape, dtype = spec.kept, spec.x.shape, spec.out.dtype
    rows, n = math.prod(shape[:kept]), math.prod(shape[kept:])
    if capability < FIRST or spec.operation not in ROW_OPERATIONS or dtype not in DTYPES:
        return None
    if not (0 < rows < 2**31 and 1 < n < 2**31 and kept <= 1 and len(shape) == kept + 1):
        return None
    steps, vectors = [], []
    for place, (name, layout) in enumerate(layouts.items()):
        is_number = name in ("mean", "rstd") or (name == "out" and spec.one_for_a_row)
        if layout.dtype != (ACCUMULATED if name in ("mean", "rstd") else dtype):
            return None
        if not is_number:
            if layout.strides[kept] != 1:
                return None
            vectors.append(place)
        elif layout.strides[kept:] not in ((), (0,)):
            return None
        steps.append(layout.strides[0] if kept else 0)
    width = VECTOR_BYTES // ITEMSIZE[dtype] if aligned else 1
    while any(number % width for number in (n, *(steps[place] for place in vectors))):
        width //= 2
    has_clusters = capability >= FIRST_WITH_CLUSTERS
    variant = choose(spec.operation, dtype, tuple(layouts), rows, n, width, processors, has_clusters, large_clusters)
    if variant is None:
        return None
    arguments = (*steps, rows, n, *numbers_of(spec, n))
    return Plan(variant, -(-rows // variant.rows), arguments, tuple(vectors), variant.width * ITEMSIZE[dtype])


def choose(
    operation: str,
    dtype: str,
    operands: tuple[str, ...],
    rows: int,
    n: int,
    width: int,
    multiprocessors: int,
    has_clusters: bool,
    large_clusters: bool = True,
) -> Variant | None:
    """The variant for rows of n elements, in vectors of `width`; None if a row does not fit. `large_clusters`: whether
    the GPU may have clusters of LARGE_CTAS.
    """
    chunks = -(-n // SUM_CHUNK)
    steps = STEPS if chunks > 1 else 1 << (-(-n // SUM_LANES) - 1).bit_length()
    registers = LANES * ITEMSIZE[dtype] // 4 * (1 + ("grad" in operands))  # for a step
    busy = BUSY_WARPS * multiprocessors
    one = Variant(operation, dtype, operands, width, 1, steps, 1, 1, 1, overlaps=has_clusters)
    if n <= SUM_LANES and "grad" not in operands:
        span = 1 << (-(-n // _short_lanes(dtype, width)) - 1).bit_length()
        if rows * span >= busy * WARP:
            return one._replace(span=span, rows=WARPS * WARP // span)
    most_ctas = MOST_CTAS if has_clusters else 1
    if operation in ("sum", "mean") and chunks > 1:
        if chunks > PLACES:
            return None
        warps = min(-(-chunks // ROUNDS), PREFERRED_WARPS)
        ctas = 1
        if rows * warps < busy:
            warps = min(chunks, PREFERRED_WARPS)
            while rows * warps * ctas < busy and ctas < most_ctas and warps * ctas < chunks:
                ctas *= 2
            warps = min(warps, -(-chunks // ctas))
        return _in_blocks(
            one._replace(steps=min(STEPS, HELD // registers), streams=True), rows, warps, ctas, multiprocessors
        )
    if has_clusters and chunks >= DIVIDED_CHUNKS and "grad" not in operands:
        is_softmax = formula(operation, dtype).passes[0].term is None
        most = DIVIDED_SOFTMAX_WARPS if is_softmax else DIVIDED_WARPS
        ctas = LARGE_CTAS if large_clusters and chunks > LARGE_CTAS else MOST_CTAS
        warps = -(-2 * chunks // ctas)
        if rows * 2 * chunks <= most * multiprocessors and warps <= MOST_WARPS:
            is_early = EARLY_SHARE * rows * ctas <= multiprocessors
            width = min(width, LANES // 2)
            return one._replace(parts=2, width=width, warps=warps, ctas=ctas, few=True, early=is_early)
    parts, most = 1, HELD
    if "grad" in operands:
        most = HELD // 2 if width == 1 else HELD  # single elements take more registers
    elif chunks >= LONG_CHUNKS and has_clusters:
        most = MANY_HELD
    while parts < MOST_PARTS and steps * registers // parts > most:
        parts *= 2
    while parts < MOST_PARTS and rows * chunks * parts < busy and 2 * parts * chunks <= PREFERRED_WARPS:
        parts *= 2
    if ITEMSIZE[dtype] == 2 and formula(operation, dtype).divides and chunks <= FEW_CHUNKS:
        parts = max(parts, 2)
    warps = chunks * parts
    ctas = min(most_ctas, -(-warps // CLUSTER_WARPS)) if warps > PREFERRED_WARPS else 1
    warps = -(-warps // ctas)
    is_light = has_clusters and steps * registers // parts <= HELD
    if warps > (MOST_WARPS if is_light else PREFERRED_WARPS):
        return None
    ahead = multiprocessors * 9 // (10 * ctas)
    if ctas > 1 and rows > 2 * ahead and "grad" not in operands:
        one = one._replace(ahead=ahead)
    one = one._replace(parts=parts, width=min(width, LANES // parts))
    return _in_blocks(one, rows, warps, ctas, multiprocessors)


def _in_blocks(variant: Variant, rows: int, warps: int, ctas: int, multiprocessors: int) -> Variant:
    """The variant with so many warps and thread blocks of a row, and as many rows in a block as are worth it."""
    of_block = max(1, WARPS // warps) if ctas == 1 else 1
    if rows < of_block * multiprocessors:
        of_block = 1
    return variant._replace(warps=warps, rows=of_block, ctas=ctas)


EXAMPLES = ((2**16, 256, True), (2**16, 256, False), (2**13, 4096, True), (64, 8192, True), (1, 151936, True),
            (64, 151936, True), (2**12, 50257, True), (2**12, 25001, False))  # fmt: skip
"""Rows, their length, whether the GPU has clusters: a share of a warp, warps of a block, a large cluster, one,
rows that begin anywhere."""


def variants() -> Iterator[Variant]:
    """What EXAMPLES become on a large GPU, for every operation; float16 is bfloat16 but for how it is widened."""
    for operation in ROW_OPERATIONS:
        operands = ("out", "x", *BESIDE.get(operation, ()))
        for dtype in DTYPES:
            for rows, n, has_clusters in EXAMPLES if dtype != "float16" else EXAMPLES[:1]:
                width = VECTOR_BYTES // ITEMSIZE[dtype] if n % 2 == 0 else 1
                variant = choose(operation, dtype, operands, rows, n, width, 132, has_clusters)
                if variant is not None:
                    yield variant
