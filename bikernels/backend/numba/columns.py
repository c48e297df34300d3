"""Reductions of rows that lie side by side in memory, called columns here: an axis other than the last is reduced.

Neighbouring columns come in 16-byte vectors, eight of 16 bits or four of float32. A thread has the columns of a vector
and some neighbouring lanes of the sum tree; the next threads have the next vectors, and then the next lanes:

    tile    the columns of a thread block: some vectors side by side
    piece   what it has of a tile at a time: a chunk of the tree, or an equal share of the lanes of each chunk

The blocks of a cluster (compute capability 9.0 on) share a tile's pieces. A thread adds a lane's elements one after
another and its lanes by a stack of sums that wait for their neighbours; shuffles and one exchange in shared memory do
the rest of a piece, whose sum every block of the cluster gets. The sums of the pieces are folded as neighbours, too:
those of the parts of a chunk are its upper levels, those of the chunks the next level of the tree.

A kernel keeps its pieces in shared memory, where a thread copies its elements at once (cp.async) and alone reads them
in every pass, or it reads them anew from global memory in each, some vectors of a thread at a time. The gradients of
weights read a second array, the gradient of the result, in the same way, and the statistics of the elements beside it.
What is computed of an element and of a column is written in `formulas.py`; other layouts are for `reduction.py`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, FLOAT_DTYPES, ITEMSIZE, SUM_CHUNK, SUM_LANES
from ...specs import Layout, ReductionSpec
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
    add_shared,
    arrive_in_cluster,
    begin_in_cluster,
    cluster_number,
    commit_copies,
    copy_async,
    cuda,
    device,
    folded,
    int64s,
    larger,
    larger_pair,
    launch_dependents,
    load_global,
    load_global_words,
    load_words,
    mapped,
    offset,
    pack_words,
    pointer,
    prefetch_line,
    rank_in_cluster,
    shared_access,
    shared_address,
    store_in_cluster,
    store_vector,
    types,
    unpack_words,
    wait_for_copies,
    wait_for_predecessors,
    wait_in_cluster,
    writer,
)
from .formulas import BESIDE, Formula, formula, numbers_of
from .launch import Kernel, Launch, compute_capability, flat, multiprocessors, on
from .vectors import MINUS_INFINITY

MAX_COLUMNS = 2**31 // 8
"""So that they and thread blocks are counted in 32 bits."""
WEIGHT_GRADIENTS = ("rms_norm_weight_backward", "layer_norm_weight_backward")
OPERATIONS_TAKEN = ("sum", "mean", "var", "std", "softmax", "log_softmax", "logsumexp", *WEIGHT_GRADIENTS)

WARPS = 8
THREADS = WARPS * WARP
ROUNDS = SUM_CHUNK // SUM_LANES
"""Elements of a lane in a chunk."""
MAX_PIECES, MAX_PIECE_VECTORS = 128, 512
"""Of a tile, and times its vectors: shared memory has a number for each column of each piece."""
AT_A_TIME = 8
"""Sums of pieces that a thread reads before it adds them."""
KEPT_VECTORS = 16
"""Of a thread, in shared memory."""
BLOCKS = 3
"""Thread blocks that share a multiprocessor."""
SHORT, LONG = 2 * SUM_LANES, 32 * SUM_CHUNK
"""Columns up to which sums are kept, too, and from which on a cluster takes long for them."""
BYTES_PER_US, CLUSTER_US = 3e6, 1.0
"""What a GPU with enough blocks reads, and how much longer blocks of a cluster take, on an H100, roughly."""
WAIT_US, DOUBLE_CLUSTER_US, HALF_LINE = 0.25, 0.3, 4
"""Of gradients of weights over few rows: what a thread waits for each lane, how much longer a cluster of twice the
blocks takes, and vectors of a tile, at least."""


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    operation: str
    out: str
    x: str
    kept_dimensions: int
    at_once: int
    """Vectors that a thread reads from global memory at a time; 0: they are kept in shared memory."""
    in_cluster: bool
    overlaps: bool = False
    """Whether it may be launched before the kernel in front has ended: gradients of weights that read little."""

    @property
    def keeps(self) -> bool:
        return self.at_once == 0

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[self.out]

    @property
    def formula(self) -> Formula:
        return formula(self.operation, self.out)

    @property
    def has_counts(self) -> bool:
        return any(one.counts for one in self.formula.passes)

    @property
    def beside(self) -> tuple[str, ...]:
        """The operands beside x: the gradient of the result, which lies as x does, and numbers of each element that all
        columns share.
        """
        return BESIDE.get(self.operation, ())

    @property
    def width(self) -> int:
        """Columns of a vector."""
        return VECTOR_BYTES // ITEMSIZE[self.x]


def variants() -> Iterator[Variant]:
    """Every operation kept in a cluster, if it can be, and read anew by single blocks; the dtypes in turn."""
    dtypes = itertools.cycle([*((one, one) for one in FLOAT_DTYPES), ("float32", "bfloat16")])
    for operation in OPERATIONS_TAKEN:
        yield Variant(operation, *next(dtypes), 1, _ways(operation)[0], True, operation in WEIGHT_GRADIENTS)
        yield Variant(operation, *next(dtypes), 2, _ways(operation)[-1], False)


def _ways(operation: str) -> tuple[int, ...]:
    """Vectors that an operation may read at a time; see `Variant`."""
    if operation in WEIGHT_GRADIENTS:  # of two arrays
        return (ROUNDS // 2,)
    # Exponentials of more vectors at a time would be much code.
    counts = any(one.counts for one in formula(operation, "float32").passes)
    return (0, ROUNDS // 4) if counts else (0, ROUNDS // 2, ROUNDS)


# ------------------------------------------------------------------------------------------------ parts of the kernels
# A tile, as these functions are given it, is what one thread has of it: (n, step, x, left, below, bits, part_bits,
# lanes, rounds, pieces, rank, blocks, kept). n: elements of its columns, 0 if it has none. x: the address of the first;
# step: bytes from one to the next. left: its first column within the tile; below: its first lane within a piece. bits:
# the logarithm of the vectors side by side; part_bits: that of the parts of a chunk. lanes: of the thread; rounds:
# elements of a lane in a chunk. rank: of this block among the cluster's. kept: the address of the first kept vector.


@device
def _thread() -> Any:
    return types.int32(cuda.threadIdx.x)


@device
def _first(tile: Any, piece: Any) -> Any:
    """The first element of a piece that the thread has."""
    below, part_bits = tile[4], tile[6]
    chunk = types.int32(piece >> part_bits)
    part = types.int32(piece - (chunk << part_bits))
    return types.int32(chunk * SUM_CHUNK + part * (types.int32(SUM_LANES) >> part_bits) + below)


@device
def _meet_in_block() -> None:
    cuda.syncthreads()


@device
def _meet_in_cluster() -> None:
    arrive_in_cluster()
    wait_in_cluster()


@functools.cache
def _share(dtype: str, in_cluster: bool) -> Function:
    """share(address, value, blocks): to this place in the shared memory of all blocks that have the tile."""
    if in_cluster:
        store_there = store_in_cluster(dtype)

        @device
        def share(address: Any, value: Any, blocks: Any) -> None:
            for rank in range(blocks):
                store_there(address, types.uint32(rank), value)

    else:
        store = shared_access(dtype)[1]

        @device
        def share(address: Any, value: Any, blocks: Any) -> None:
            store(address, value)

    return share


def _for_elements(visit: Function) -> Function:
    """for_elements(tile, state, more): state = visit(tile, state, more, i) for the places i of all elements that the
    thread has, of which those from the column's length on do not exist; the last state.
    """

    @device
    def for_elements(tile: Any, state: Any, more: Any) -> Any:
        _, _, _, _, _, _, _, lanes, rounds, pieces, rank, blocks, _ = tile
        piece = rank
        while piece < pieces:
            first = _first(tile, piece)
            lane = types.int32(0)
            while lane < lanes:
                i = types.int32(first + lane)
                done = types.int32(0)
                while done < rounds:
                    state = visit(tile, state, more, i)
                    i = types.int32(i + SUM_LANES)
                    done = types.int32(done + 1)
                lane = types.int32(lane + 1)
            piece = types.int32(piece + blocks)
        return state

    return for_elements


@device
def _copy_element(tile: Any, to: Any, more: Any, i: Any) -> Any:
    """Queue a copy to the place `to`; the next one's."""
    if i < tile[0]:
        copy_async(to, tile[2] + types.int64(i) * tile[1])
    return types.uint32(to + types.uint32(THREADS * VECTOR_BYTES))


@device
def _prefetch_element(tile: Any, state: Any, sides: Any, i: Any) -> Any:
    """Have the L2 fetch a vector of x and of the gradient."""
    if i < tile[0]:
        prefetch_line(tile[2] + types.int64(i) * tile[1])
        prefetch_line(sides[0] + types.int64(i) * sides[1])
    return state


_copy_elements, _prefetch_elements = _for_elements(_copy_element), _for_elements(_prefetch_element)


@device
def _copy(tile: Any) -> None:
    """Queue copies of all elements that the thread has."""
    _copy_elements(tile, tile[12], types.int32(0))
    commit_copies()


def _unrolled(number: int, work: Function) -> Function:
    """work_on_all(words, i, n, a, b, c): work for a lane's next `number` vectors, as far as there are any. Not a loop,
    which the compiler would leave one if the work is much, and the words in local memory.
    """
    j = number - 1
    first, apart = 4 * j, j * SUM_LANES
    before = _unrolled(j, work) if j > 0 else None

    @device
    def last(words: Any, i: Any, n: Any, a: Any, b: Any, c: Any) -> None:
        if types.int32(i + apart) < n:
            four = words[first], words[first + 1], words[first + 2], words[first + 3]
            work(four, types.int32(i + apart), a, b, c)

    if before is None:
        return last

    @device
    def all_of_them(words: Any, i: Any, n: Any, a: Any, b: Any, c: Any) -> None:
        before(words, i, n, a, b, c)
        last(words, i, n, a, b, c)

    return all_of_them


@functools.cache
def _visit(at_once: int, work: Function) -> Function:
    """visit(tile, first, kept, a, b, c): work(words, i, a, b, c) for the elements of a lane, of which `first` is the
    first and lies at `kept` if it is kept. Returns where what is kept goes on.
    """
    if at_once == 0:

        @device
        def visit(tile: Any, first: Any, kept: Any, a: Any, b: Any, c: Any) -> Any:
            n, rounds = tile[0], tile[8]
            i = first
            done = types.int32(0)
            while done < rounds:
                if i < n:
                    work(load_words(kept), i, a, b, c)
                kept = types.uint32(kept + types.uint32(THREADS * VECTOR_BYTES))
                i = types.int32(i + SUM_LANES)
                done = types.int32(done + 1)
            return kept

    else:
        all_words, work_on_all = 4 * at_once, _unrolled(at_once, work)

        @device
        def visit(tile: Any, first: Any, kept: Any, a: Any, b: Any, c: Any) -> Any:
            n, step, x, rounds = tile[0], tile[1], tile[2], tile[8]
            words = cuda.local.array(all_words, types.uint32)
            i = first
            done = types.int32(0)
            while done < rounds:
                address = x + types.int64(i) * step
                for j in range(at_once):
                    one = load_global_words(address, types.uint32(types.int32(i + j * SUM_LANES) < n))
                    address += step * SUM_LANES
                    for k in range(4):
                        words[4 * j + k] = one[k]
                work_on_all(words, i, n, a, b, c)
                i = types.int32(i + at_once * SUM_LANES)
                done = types.int32(done + at_once)
            return kept

    return visit


def _visit_beside(variant: Variant) -> Function:
    """visit(tile, first, kept, lane, sides, unused): add the terms of a lane's elements, of x and what is beside it.
    What does not exist reads as zeros, and so is its term.
    """
    at_once, width, accumulate = variant.at_once, variant.width, variant.accumulate
    real, add = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add
    term, unpack, load_number = variant.formula.passes[0].term, unpack_words(variant.x), load_global(accumulate)
    centred = "mean" in variant.beside
    assert term is not None

    @device
    def words_of(more: Any, j: Any) -> Any:
        first, step, i, n = more
        at = types.int32(i + j * SUM_LANES)
        return load_global_words(first + types.int64(at) * step, types.uint32(at < n))

    @device
    def number_of(more: Any, j: Any) -> Any:
        first, step, i, n = more
        at = types.int32(i + j * SUM_LANES)
        return load_number(first + types.int64(at) * step, types.uint32(at < n))

    @device
    def add_term(state: Any, lane: Any, j: Any, words: Any, grad_words: Any, m: Any, r: Any) -> Any:
        values, gradients = cuda.local.array(width, real), cuda.local.array(width, real)
        unpack(words, values)
        unpack(grad_words, gradients)
        zero = real(0)
        for w in range(width):
            lane[w] = add(lane[w], term(values[w], gradients[w], zero, zero, m, r, zero))
        return state

    all_words, numbers = mapped(words_of, count=at_once), mapped(number_of, count=at_once)
    add_terms = folded(add_term, 4, 4, MEMBER, MEMBER)

    @device
    def visit(tile: Any, first: Any, kept: Any, lane: Any, sides: Any, unused: Any) -> Any:
        n, step, x, rounds = tile[0], tile[1], tile[2], tile[8]
        grad, grad_step, mean, mean_step, rstd, rstd_step = sides
        i = first
        done = types.int32(0)
        while done < rounds:
            words = all_words((x, step, i, n))
            grad_words = all_words((grad, grad_step, i, n))
            r = numbers((rstd, rstd_step, i, n))
            m = numbers((mean, mean_step, i, n)) if centred else r
            add_terms(types.int32(0), lane, words, grad_words, m, r)
            i = types.int32(i + at_once * SUM_LANES)
            done = types.int32(done + at_once)
        return kept

    return visit


def _sides(variant: Variant) -> Function:
    """sides(addresses, place, steps, s): what the first pass is given beside x, or the array s: of the gradient, the
    mean and the reciprocal root the addresses of the first elements of this thread and the bytes to the next; `place`
    is where its columns begin.
    """
    x_bytes, bytes_of_number = ITEMSIZE[variant.x], ITEMSIZE[variant.accumulate]
    if not variant.beside:

        @device
        def sides(addresses: Any, place: Any, steps: Any, s: Any) -> Any:
            return s

    else:
        mean = 3 if "mean" in variant.beside else 2
        rstd = len(variant.beside) + 1

        @device
        def sides(addresses: Any, place: Any, steps: Any, s: Any) -> Any:
            return (
                addresses[2] + place * x_bytes,
                types.int64(types.int32(steps[2] * x_bytes)),
                addresses[mean],
                types.int64(types.int32(steps[mean] * bytes_of_number)),
                addresses[rstd],
                types.int64(types.int32(steps[rstd] * bytes_of_number)),
            )

    return sides


def _overlap(variant: Variant) -> Function:
    """begin(tile, sides): have the L2 fetch all that the thread reads, and wait for the kernels in front."""

    @device
    def nothing(tile: Any, sides: Any) -> None:
        pass

    @device
    def begin(tile: Any, sides: Any) -> None:
        launch_dependents()
        _prefetch_elements(tile, types.int32(0), sides)
        wait_for_predecessors()

    return begin if variant.overlaps else nothing


@functools.cache
def _fold(accumulate: str, width: int, combine: Function, nothing: float) -> Function:
    """fold(values, tile, exchange): what the threads of this block have of each column, as neighbours. Each of the
    tile's first threads gets that of one column. `nothing` changes nothing.
    """
    real, (load, store), size = OPERATIONS[accumulate].type, shared_access(accumulate), ITEMSIZE[accumulate]

    @device
    def fold(values: Any, tile: Any, exchange: Any) -> Any:
        left, bits = tile[3], tile[5]
        thread, columns = _thread(), types.int32(types.int32(width) << bits)
        mask = types.int32(1) << bits
        while mask < WARP:
            for w in range(width):
                values[w] = combine(values[w], cuda.shfl_xor_sync(ALL_LANES, values[w], mask))
            mask = types.int32(mask * 2)
        warp, lane = thread // WARP, thread % WARP
        if lane >> bits == 0:
            to = types.uint32(exchange + types.uint32(types.int32(warp * columns + left) * size))
            for w in range(width):
                store(types.uint32(to + types.uint32(w * size)), values[w])
        cuda.syncthreads()
        of_warps = cuda.local.array(WARPS, real)
        for j in range(WARPS):
            of_warps[j] = real(nothing)
            if thread < columns:
                of_warps[j] = load(types.uint32(exchange + types.uint32(types.int32(j * columns + thread) * size)))
        first = combine(combine(of_warps[0], of_warps[1]), combine(of_warps[2], of_warps[3]))
        return combine(first, combine(combine(of_warps[4], of_warps[5]), combine(of_warps[6], of_warps[7])))

    return fold


@functools.cache
def _fold_pieces(accumulate: str) -> Function:
    """fold_pieces(sums, count, apart): the sum of a column's pieces, as neighbours, of which the first one's lies at
    `sums` and the others so many bytes apart. Several are read at a time, and their sums written in their place.
    """
    real, add, (load, store) = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add, shared_access(accumulate)

    @device
    def fold_pieces(sums: Any, count: Any, apart: Any) -> Any:
        while count > 1:
            group, first = types.int32(0), types.int32(0)
            while first < count:
                of = cuda.local.array(AT_A_TIME, real)
                for j in range(AT_A_TIME):
                    of[j] = real(0)  # which changes no sum
                    if first + j < count:
                        of[j] = load(types.uint32(sums + types.uint32(types.int32(first + j) * apart)))
                lower = add(add(of[0], of[1]), add(of[2], of[3]))
                upper = add(add(of[4], of[5]), add(of[6], of[7]))
                store(types.uint32(sums + types.uint32(group * apart)), add(lower, upper))
                group = types.int32(group + 1)
                first = types.int32(first + AT_A_TIME)
            count = group
        return load(sums)

    return fold_pieces


@functools.cache
def _tell(accumulate: str, width: int) -> Function:
    """tell(value, tile, place, values): from the thread of each column to those that have the column."""
    (load, store), size = shared_access(accumulate), ITEMSIZE[accumulate]

    @device
    def tell(value: Any, tile: Any, place: Any, values: Any) -> None:
        left, thread = tile[3], _thread()
        if thread < types.int32(width) << tile[5]:
            store(types.uint32(place + types.uint32(thread * size)), value)
        cuda.syncthreads()
        for w in range(width):
            values[w] = load(types.uint32(place + types.uint32(types.int32(left + w) * size)))

    return tell


# ------------------------------------------------------------------------------------------------------------- passes


def _maximum(variant: Variant) -> Function:
    """maximum(tile, exchange, place): of each column, for its thread; `place` is where the blocks share theirs."""
    accumulate, width, in_cluster = variant.accumulate, variant.width, variant.in_cluster
    real, larger_of_two, size = OPERATIONS[accumulate].type, larger(accumulate), ITEMSIZE[accumulate]
    unpack, in_pairs = unpack_words(variant.x), ITEMSIZE[variant.x] == 2
    fold, share = _fold(accumulate, width, larger_of_two, -math.inf), _share(accumulate, in_cluster)
    meet, load = _meet_in_cluster if in_cluster else _meet_in_block, shared_access(accumulate)[0]

    if in_pairs:
        lowest, larger_of_pairs = MINUS_INFINITY[variant.x], larger_pair(variant.x)

        @device
        def work(words: Any, i: Any, best: Any, most: Any, unused: Any) -> None:
            for k in range(4):
                best[k] = larger_of_pairs(best[k], words[k])

        @device
        def ended(best: Any, most: Any) -> None:
            unpack((best[0], best[1], best[2], best[3]), most)

    else:
        lowest = 0

        @device
        def work(words: Any, i: Any, best: Any, most: Any, unused: Any) -> None:
            values = cuda.local.array(width, real)
            unpack(words, values)
            for w in range(width):
                most[w] = larger_of_two(most[w], values[w])

        @device
        def ended(best: Any, most: Any) -> None:
            pass

    visit = _visit(variant.at_once, work)

    @device
    def maximum(tile: Any, exchange: Any, place: Any) -> Any:
        _, _, _, _, _, bits, _, lanes, _, pieces, rank, blocks, kept = tile
        best, most = cuda.local.array(4, types.uint32), cuda.local.array(width, real)
        for k in range(4):
            best[k] = types.uint32(lowest)
        for w in range(width):
            most[w] = real(-math.inf)
        piece = rank
        while piece < pieces:
            first = _first(tile, piece)
            lane = types.int32(0)
            while lane < lanes:
                kept = visit(tile, types.int32(first + lane), kept, best, most, 0)
                lane = types.int32(lane + 1)
            piece = types.int32(piece + blocks)
        ended(best, most)
        value = fold(most, tile, exchange)
        thread, columns = _thread(), types.int32(types.int32(width) << bits)
        if not in_cluster:
            return value
        if thread < columns:
            share(types.uint32(place + types.uint32(types.int32(rank * columns + thread) * size)), value, blocks)
        meet()
        value = real(-math.inf)
        if thread < columns:
            for one in range(blocks):
                at = types.uint32(place + types.uint32(types.int32(one * columns + thread) * size))
                value = larger_of_two(value, load(at))
        return value

    return maximum


def _sum(variant: Variant, number: int) -> Function:
    """total(tile, s, exchange, sums, counts): the sum of each column, and how many of its elements were counted, for
    its thread. `sums` and `counts` are where the blocks share theirs; the counts are 0.
    """
    one, accumulate, width, in_cluster = (
        variant.formula.passes[number],
        variant.accumulate,
        variant.width,
        variant.in_cluster,
    )
    real, add, size = OPERATIONS[accumulate].type, OPERATIONS[accumulate].add, ITEMSIZE[accumulate]
    term, has_count, unpack = one.term, one.counts, unpack_words(variant.x)
    fold, share, share_count = (
        _fold(accumulate, width, add, 0.0),
        _share(accumulate, in_cluster),
        _share("uint32", in_cluster),
    )
    meet = _meet_in_cluster if in_cluster else _meet_in_block
    fold_pieces, load_count = _fold_pieces(accumulate), shared_access("uint32")[0]
    assert term is not None

    @device
    def work(words: Any, i: Any, lane: Any, s: Any, count: Any) -> None:
        values = cuda.local.array(width, real)
        unpack(words, values)
        zero = real(0)
        for w in range(width):
            if has_count:
                value, counted = term(values[w], zero, zero, zero, zero, zero, s[w])
                # Of two columns in a word: a thread has fewer elements of a column.
                count[w // 2] = types.uint32(count[w // 2] + (types.uint32(counted) << types.uint32(w % 2 * 16)))
            else:
                value = term(values[w], zero, zero, zero, zero, zero, s[w])
            lane[w] = add(lane[w], value)

    levels, pairs = max_lanes(width).bit_length() - 1, width // 2
    visit = _visit_beside(variant) if variant.beside else _visit(variant.at_once, work)
    push, stack = _push(accumulate, width, 0, levels), levels * width

    @device
    def total(tile: Any, s: Any, exchange: Any, sums: Any, counts: Any) -> Any:
        _, _, _, left, _, bits, _, lanes, _, pieces, rank, blocks, kept = tile
        thread, columns = _thread(), types.int32(types.int32(width) << bits)
        count = cuda.local.array(pairs, types.uint32)
        for w in range(pairs):
            count[w] = types.uint32(0)
        turn = types.int32(0)
        piece = rank
        while piece < pieces:
            first = _first(tile, piece)
            values, waiting = cuda.local.array(width, real), cuda.local.array(stack, real)
            for w in range(stack):
                waiting[w] = real(0)
            lane = types.int32(0)
            while lane < lanes:
                for w in range(width):
                    values[w] = real(0)
                kept = visit(tile, types.int32(first + lane), kept, values, s, count)
                push(lane, values, waiting)
                lane = types.int32(lane + 1)
            # Two exchanges in turn: one is still read while the next piece's sums are written.
            value = fold(values, tile, types.uint32(exchange + types.uint32(turn * (WARPS * columns * size))))
            turn = types.int32(1 - turn)
            if thread < columns:
                share(types.uint32(sums + types.uint32(types.int32(piece * columns + thread) * size)), value, blocks)
            piece = types.int32(piece + blocks)
        if has_count:
            for w in range(width):
                counted = (count[w // 2] >> types.uint32(w % 2 * 16)) & types.uint32(0xFFFF)
                if counted != 0:
                    add_shared(
                        types.uint32(counts + types.uint32(types.int32(rank * columns + left + w) * 4)),
                        types.uint32(counted),
                    )
            if in_cluster:
                cuda.syncthreads()
                if thread < columns:
                    own = types.uint32(counts + types.uint32(types.int32(rank * columns + thread) * 4))
                    share_count(own, load_count(own), blocks)
        meet()
        value, all_counted = real(0), types.int32(0)
        if thread < columns:
            at = types.uint32(sums + types.uint32(thread * size))
            value = fold_pieces(at, pieces, types.int32(columns * size))
            if has_count:
                for one in range(blocks):
                    at = types.uint32(counts + types.uint32(types.int32(one * columns + thread) * 4))
                    all_counted = types.int32(all_counted + types.int32(load_count(at)))
        return value, all_counted

    return total


def _push(accumulate: str, width: int, level: int, levels: int) -> Function:
    """push(lane, sums, waiting): add the sums of lane number `lane`, from this level on, to those that wait for their
    neighbours. Afterwards `sums` is the last neighbours' sum.
    """
    add, first = OPERATIONS[accumulate].add, level * width
    if level == levels:

        @device
        def push(lane: Any, sums: Any, waiting: Any) -> None:
            pass

    else:
        further = _push(accumulate, width, level + 1, levels)

        @device
        def push(lane: Any, sums: Any, waiting: Any) -> None:
            if (lane >> level) & 1:
                for w in range(width):
                    sums[w] = add(waiting[first + w], sums[w])
                further(lane, sums, waiting)
            else:
                for w in range(width):
                    waiting[first + w] = sums[w]

    return push


def _results(variant: Variant) -> Function:
    """write(tile, s, t, out, step): the results of the thread's columns; `step`: bytes between those of neighbours."""
    accumulate, width, element = variant.accumulate, variant.width, variant.formula.element
    real, unpack, pack = OPERATIONS[accumulate].type, unpack_words(variant.x), pack_words(variant.out)
    in_vector = VECTOR_BYTES // ITEMSIZE[variant.out]
    assert element is not None

    @device
    def work(words: Any, i: Any, s: Any, t: Any, to: Any) -> None:
        values = cuda.local.array(width, real)
        unpack(words, values)
        zero = real(0)
        for w in range(width):
            values[w] = element(values[w], zero, zero, zero, zero, zero, s[w], t[w])
        out, step = to
        place = out + types.int64(i) * step
        for w in range(0, width, in_vector):
            a, b, c, d = pack(values, w)
            store_vector(place + w // in_vector * VECTOR_BYTES, a, b, c, d)

    visit = _visit(variant.at_once, work)

    @device
    def write(tile: Any, s: Any, t: Any, out: Any, step: Any) -> None:
        _, _, _, _, _, _, _, lanes, _, pieces, rank, blocks, kept = tile
        piece = rank
        while piece < pieces:
            first = _first(tile, piece)
            lane = types.int32(0)
            while lane < lanes:
                kept = visit(tile, types.int32(first + lane), kept, s, t, (out, step))
                lane = types.int32(lane + 1)
            piece = types.int32(piece + blocks)

    return write


@device
def _no_results(tile: Any, s: Any, t: Any, out: Any, step: Any) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------ kernels


def _step(variant: Variant, number: int) -> Function:
    """step(tile, own, s, numbers, exchange, place, counts): a pass. It returns what it has found of a column, for its
    thread. What the pass before has found is `own`, and `s` that of the columns that the thread reads. `exchange`,
    `place` and `counts`: see `Schedule.shared_bytes`.
    """
    plan, accumulate = variant.formula, variant.accumulate
    real = OPERATIONS[accumulate].type
    if number >= len(plan.passes):

        @device
        def nothing(tile: Any, own: Any, s: Any, numbers: Any, exchange: Any, place: Any, counts: Any) -> Any:
            return own

        return nothing
    one = plan.passes[number]
    if not one.is_sum:
        maximum = _maximum(variant)

        @device
        def first(tile: Any, own: Any, s: Any, numbers: Any, exchange: Any, place: Any, counts: Any) -> Any:
            return maximum(tile, exchange, place)

        return first
    total, end = _sum(variant, number), one.end
    assert end is not None

    @device
    def sums(tile: Any, own: Any, s: Any, numbers: Any, exchange: Any, place: Any, counts: Any) -> Any:
        value, count = total(tile, s, exchange, place, counts)
        return end(value, count, own, real(numbers[number]), real(numbers[2]))

    return sums


@functools.cache
def _place(dimensions: int) -> Function:
    """place(outer, column, shape, strides): where a column begins, of array number `outer` of those side by side."""
    last = dimensions - 1
    if dimensions == 1:

        @device
        def place(outer: Any, column: Any, shape: Any, strides: Any) -> Any:
            return types.int64(column) * strides[0]

    else:

        @device
        def place(outer: Any, column: Any, shape: Any, strides: Any) -> Any:
            of_array = offset(types.int64(outer), shape[:last], strides[:last])
            return of_array + types.int64(column) * strides[last]

    return place


def _reduce(variant: Variant) -> Function:
    """The kernel."""
    plan, accumulate, width = variant.formula, variant.accumulate, variant.width
    real, size = OPERATIONS[accumulate].type, ITEMSIZE[accumulate]
    first, second, tell = _step(variant, 0), _step(variant, 1), _tell(accumulate, width)
    keeps, in_cluster = variant.keeps, variant.in_cluster
    last = 2 if variant.beside else 1  # of out, x and the gradient, what columns have places in
    two, has_counts, writes_rows = len(plan.passes) == 2, variant.has_counts, plan.element is not None
    results = _results(variant) if writes_rows else _no_results
    write_number, storage = writer(variant.out, accumulate), STORAGE[variant.out]
    x_bytes, out_bytes = ITEMSIZE[variant.x], ITEMSIZE[variant.out]
    store_count, wait = shared_access("uint32")[1], wait_for_copies(0)
    sides, begin = _sides(variant), _overlap(variant)
    place_of, has_outer = _place(variant.kept_dimensions), variant.kept_dimensions > 1

    def reduce_columns(addresses: Any, sizes: Any, numbers: Any, kept_shape: Any, kept: Any, step: Any) -> None:
        inner, n, across, bits, part_bits, lanes, rounds, pieces, blocks, kept_vectors = sizes
        bits, part_bits, lanes = types.int32(bits), types.int32(part_bits), types.int32(lanes)
        rounds, pieces, blocks = types.int32(rounds), types.int32(pieces), types.int32(blocks)
        thread, columns = _thread(), types.int32(types.int32(width) << bits)
        item, rank = types.int32(cuda.blockIdx.x), types.int32(0)
        if in_cluster:
            begin_in_cluster()
            item, rank = cluster_number(), rank_in_cluster()
        inner, across = types.int32(inner), types.int32(across)
        outer = types.int32(item // across) if has_outer else types.int32(0)
        # The tile's first column, among those side by side, and the thread's.
        column = types.int32(types.int32(item - outer * across) * columns)
        left = types.int32((thread & ((types.int32(1) << bits) - 1)) * width)
        own_column = min(types.int32(column + left), types.int32(inner - width))
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=VECTOR_BYTES))
        exchange = types.uint32(shared + types.uint32(kept_vectors * (THREADS * VECTOR_BYTES)))
        tile = (
            types.int32(n) if types.int32(column + left) < inner else types.int32(0),
            types.int64(types.int32(step[1] * x_bytes)),
            addresses[1] + place_of(outer, own_column, kept_shape, kept[1]) * x_bytes,
            left,
            types.int32((thread >> bits) * lanes),
            bits,
            part_bits,
            lanes,
            rounds,
            pieces,
            rank,
            blocks,
            types.uint32(shared + types.uint32(thread * VECTOR_BYTES)),
        )
        line = types.int32(columns * size)  # bytes of a number for each column
        shared_sums = types.uint32(exchange + types.uint32(2 * WARPS * line))
        places = max(pieces, blocks)
        shared_sums_next = types.uint32(shared_sums + types.uint32(places * line))
        told = types.uint32(shared_sums_next + types.uint32(places * line if two else 0))
        told_next = types.uint32(told + types.uint32(line))
        counts = types.uint32(told_next + types.uint32(line))
        s, t = cuda.local.array(width, real), cuda.local.array(width, real)
        beside = sides(addresses, place_of(outer, own_column, kept_shape, kept[last]), step, s)
        begin(tile, beside)
        if keeps:
            _copy(tile)
        if has_counts:
            for at in range(thread, types.int32(blocks * columns), THREADS):
                store_count(types.uint32(counts + types.uint32(types.int32(at) * 4)), types.uint32(0))
        for w in range(width):
            s[w] = real(0)
            t[w] = real(0)
        if keeps:
            wait()
        if in_cluster:
            wait_in_cluster()  # no block writes to another that has not begun
        own = first(tile, real(0), beside, numbers, exchange, shared_sums, counts)
        if two:
            tell(own, tile, told, s)
            own = second(tile, own, s, numbers, exchange, shared_sums_next, counts)
        if writes_rows:
            tell(own, tile, told_next, t if two else s)
            out = addresses[0] + place_of(outer, own_column, kept_shape, kept[0]) * out_bytes
            results(tile, s, t, out, types.int64(types.int32(step[0] * out_bytes)))
        elif rank == 0 and thread < columns and types.int32(column + thread) < inner:
            place = place_of(outer, types.int32(column + thread), kept_shape, kept[0])
            write_number(pointer(addresses[0], storage), place, own)

    return reduce_columns


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    kept, operands = int64s(variant.kept_dimensions), 2 + len(variant.beside)
    signature = types.void(
        int64s(operands),  # addresses
        int64s(10),  # see `build`
        types.UniTuple(types.float64, 3),  # what divides the sums of both passes, eps
        kept,  # the columns' shape and strides
        types.UniTuple(kept, 3 if variant.beside else 2),  # of out, x and the gradient
        int64s(operands),  # from an element of a column to the next one
    )
    # So that no register spills; and of those that need few, more have room than their elements in shared memory.
    is_long = variant.at_once == ROUNDS and (variant.width == 8 or len(variant.formula.passes) > 1)
    is_long |= (variant.has_counts and not variant.keeps) or bool(variant.beside)
    is_small = variant.keeps and variant.width < 8 and not variant.in_cluster
    blocks = 2 if is_long or variant.accumulate == "float64" else BLOCKS + is_small
    return Kernel(
        f"columns {variant}",
        lambda: (_reduce(variant), signature),
        THREADS,
        blocks,
        older_blocks=2,
        oldest=FIRST_WITH_CLUSTERS if variant.in_cluster or variant.overlaps else (8, 0),
        overlaps=variant.overlaps,
    )


# ------------------------------------------------------------------------------------------------------------- launch


class Schedule(NamedTuple):
    """How tiles are spread over threads."""

    vectors: int
    """Side by side."""
    parts: int
    """Of a chunk."""
    lanes: int
    """Of a thread."""
    blocks: int
    """That share a tile: a cluster, if there are several."""
    at_once: int
    """See `Variant`."""

    def pieces(self, n: int) -> int:
        """Of a tile."""
        return -(-n // SUM_CHUNK) * self.parts

    def kept_vectors(self, n: int) -> int:
        """Of a thread, in shared memory."""
        return 0 if self.at_once else -(-self.pieces(n) // self.blocks) * self.lanes * rounds_of(n)

    def shared_bytes(self, n: int, operation: str, width: int, itemsize: int) -> int:
        """What is kept; numbers for each column: two exchanges of the warps, of each pass what the blocks share, what
        both passes have ended in; and the blocks' counts.
        """
        passes = len(formula(operation, "float32").passes)
        numbers = 2 * WARPS + passes * max(self.pieces(n), self.blocks) + 2
        line = self.vectors * width
        return self.kept_vectors(n) * THREADS * VECTOR_BYTES + line * (numbers * itemsize + 4 * self.blocks)


def rounds_of(n: int) -> int:
    """Elements of a lane in a chunk."""
    return min(ROUNDS, -(-n // SUM_LANES))


def max_lanes(width: int) -> int:
    """Of a thread that has `width` columns: the sums that wait for their neighbours are in registers."""
    return 4 if width > 4 else 8


def schedules(operation: str, n: int, width: int, clusters: bool) -> Iterator[Schedule]:
    """All for columns of n elements, of which a vector has `width`."""
    for across in (2, 4, 8, 16, 32):
        for part_bits in range(3):
            parts, groups = 1 << part_bits, THREADS // across
            lanes = max(1, min(SUM_LANES, 1 << (n - 1).bit_length()) // parts // groups)
            if lanes > max_lanes(width) or (parts > 1 and lanes * groups * parts != SUM_LANES):
                continue
            pieces = -(-n // SUM_CHUNK) * parts
            if pieces > MAX_PIECES or pieces * across > MAX_PIECE_VECTORS:
                continue
            for blocks in sorted({min(pieces, most) for most in (1, 2, 4, MOST_CTAS)}) if clusters else (1,):
                for at_once in _ways(operation):
                    one = Schedule(across, parts, lanes, blocks, at_once)
                    if one.kept_vectors(n) <= KEPT_VECTORS:
                        yield one


def choose(
    operation: str, arrays: int, n: int, width: int, vectors: int, clusters: bool, multiprocessors: int
) -> Schedule | None:
    """A schedule for so many arrays of columns of n elements, `vectors` vectors side by side; None where there is none,
    or where columns are so few and long that `reduction.py`, which spreads them over all of the GPU, is faster.
    """
    found = list(schedules(operation, n, width, clusters))
    is_short, has_kept = n <= SHORT, any(one.at_once == 0 for one in found)
    has_gradient = operation in WEIGHT_GRADIENTS
    if len(formula(operation, "float32").passes) == 1 and not is_short:
        at_once = ROUNDS // 2  # more take registers that other blocks make more of
    else:
        at_once = 0 if has_kept else max((one.at_once for one in found), default=0)
    # Wide enough for whole lines, and for a thread to have some lanes.
    widest = 4 if at_once == 0 and not is_short else max(8, min(32, 4 * THREADS >> (n - 1).bit_length()))
    # Of two arrays, a block of a multiprocessor has enough on its way.
    enough = 9 * multiprocessors // 10 if has_gradient else 3 * multiprocessors // 2
    us = (2 if has_gradient else 1) * arrays * vectors * n * VECTOR_BYTES / BYTES_PER_US

    def blocks_of(one: Schedule) -> int:
        return arrays * -(-vectors // one.vectors) * one.blocks

    def cost(one: Schedule) -> float:
        detour = abs(math.log2(one.vectors / widest)) + math.log2(one.parts) / 4
        read = us * (1 + detour / 8) * enough / min(blocks_of(one), enough)
        if has_gradient and is_short:
            turns = max(1.0, blocks_of(one) / (2 * multiprocessors))
            waits = -(-one.pieces(n) // one.blocks) * one.lanes
            return read + turns * waits * WAIT_US + math.log2(one.blocks) * DOUBLE_CLUSTER_US
        return read + (CLUSTER_US if one.blocks > 1 else 0)

    narrowest = HALF_LINE if has_gradient else 1
    best = min((one for one in found if one.at_once == at_once and one.vectors >= narrowest), key=cost, default=None)
    return best if best is None or n < LONG or blocks_of(best) >= multiprocessors // 2 else None


def takes(spec: ReductionSpec) -> bool:
    """Whether columns come in vectors, wherever the first is one; and no element is rounded when it is read."""
    x, out, kept = spec.x, spec.out, spec.kept
    if spec.operation not in OPERATIONS_TAKEN or x.dtype not in FLOAT_DTYPES or len(x.shape) != kept + 1 or kept == 0:
        return False
    if out.dtype not in (x.dtype, ACCUMULATE[x.dtype]):
        return False
    width = VECTOR_BYTES // ITEMSIZE[x.dtype]
    layouts = [(x, width)]
    if spec.grad is not None:
        statistics = [one for one in (spec.mean, spec.rstd) if one is not None]
        if spec.grad.dtype != x.dtype or not all(_is_shared(one, ACCUMULATE[x.dtype]) for one in statistics):
            return False
        layouts.append((spec.grad, width))
    if not spec.one_for_a_row:
        layouts.append((out, VECTOR_BYTES // ITEMSIZE[out.dtype]))
    return (
        x.shape[-1] > 1
        and x.shape[kept - 1] % width == 0
        and 0 < math.prod(x.shape[:kept]) < MAX_COLUMNS
        and all(
            one.strides[kept - 1] == 1
            and all(step % whole == 0 for i, step in enumerate(one.strides) if i != kept - 1)
            and abs(one.strides[kept] * ITEMSIZE[one.dtype]) < 2**31
            for one, whole in layouts
        )
    )


def _is_shared(statistic: Layout, dtype: str) -> bool:
    """Whether all columns have the same numbers of this dtype, which 32 bits reach."""
    *kept, step = statistic.strides
    return statistic.dtype == dtype and not any(kept) and abs(step * ITEMSIZE[dtype]) < 2**31


def prepare(spec: ReductionSpec, gpu: Device, otherwise: Callable[[], ReductionLaunch]) -> ReductionLaunch | None:
    """Choose a schedule and build the launch, if there is one; see `build`."""
    x, kept = spec.x, spec.kept
    if not takes(spec) or compute_capability(gpu) < (8, 0):
        return None
    n, inner, width = x.shape[-1], x.shape[kept - 1], VECTOR_BYTES // ITEMSIZE[x.dtype]
    rows = math.prod(x.shape[:kept])
    clusters = compute_capability(gpu) >= FIRST_WITH_CLUSTERS
    plan = choose(spec.operation, rows // inner, n, width, inner // width, clusters, multiprocessors(gpu))
    if plan is None:
        return None
    return build(spec, gpu, plan, otherwise)


def build(
    spec: ReductionSpec, gpu: Device, plan: Schedule, otherwise: Callable[[], ReductionLaunch]
) -> ReductionLaunch:
    """The launch of a schedule; `otherwise` prepares what takes operands that are not aligned to vectors."""
    x, out, kept = spec.x, spec.out, spec.kept
    n, inner, width = x.shape[-1], x.shape[kept - 1], VECTOR_BYTES // ITEMSIZE[x.dtype]
    across = -(-inner // (plan.vectors * width))  # tiles
    tiles, in_cluster = math.prod(x.shape[:kept]) // inner * across, plan.blocks > 1
    overlaps = spec.grad is not None and n <= SHORT and compute_capability(gpu) >= FIRST_WITH_CLUSTERS
    variant = Variant(spec.operation, out.dtype, x.dtype, kept, plan.at_once, in_cluster, overlaps)
    shared_bytes = plan.shared_bytes(n, spec.operation, width, ITEMSIZE[variant.accumulate])
    beside = [layout for name in variant.beside if (layout := getattr(spec, name)) is not None]
    steps = 0 if spec.one_for_a_row else out.strides[kept], *(one.strides[kept] for one in (x, *beside))
    places = [one.strides[:kept] for one in (out, x, *beside[:1])]
    arguments = (
        *(inner, n, across, plan.vectors.bit_length() - 1, plan.parts.bit_length() - 1),
        *(plan.lanes, rounds_of(n), plan.pieces(n), plan.blocks, plan.kept_vectors(n)),
        *flat((*numbers_of(spec, n), x.shape[:kept], *places, steps)),
    )
    with on(gpu):
        aligned = Launch(
            kernel(variant)._replace(shared_bytes=shared_bytes), gpu, (tiles,), plan.blocks if in_cluster else None
        )
    needed = VECTOR_BYTES - 1

    def launch(stream: int, out: int, *others: int) -> None:
        vectors = others[0] | others[1] if beside else others[0]
        if (vectors | (0 if spec.one_for_a_row else out)) & needed:
            otherwise()(stream, out, *others)
            return
        with on(gpu):
            aligned(stream, out, *others, *arguments)

    return launch
