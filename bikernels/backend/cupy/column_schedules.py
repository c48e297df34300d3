"""What decides the speed of reductions of columns and no bit: launch shapes, and which kernel takes which columns.

Columns are rows that are neighbours in memory, along a strided axis. Everything here may change freely; the results
stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from .compile import Kernel
from .launch import FIRST_WITH_CLUSTERS, GPU
from .parameters import ANY, C_TYPE, c_type
from .reduction_operations import (
    COLUMN_GRADIENTS,
    CTA_BYTES,
    EXPONENTIALS,
    GROUP_LANES,
    MAX_CTAS,
    MOST_CTAS,
    OPERATIONS,
    RING_CAPABILITY,
    SOFTMAX_GRADIENTS,
    SUMS,
    TERMS,
    VARIANCES,
    WEIGHT_GRADIENTS,
    ceil_div,
    chunks_of,
    cluster_sizes,
    vector_width,
)

MAX_COLUMN_CHUNKS, MAX_TILE_CHUNKS = 32, 256
"""Chunks of a column (columns.cuh, column_tiles.cu): their sums, in shared memory, are one chunk of the next level."""

MIN_COLUMNS = 8
"""Neighbouring rows from which on threads lie across rows."""

# -------------------------------------------------------------------------------------------------------------- columns

COLUMN_THREADS = 1024
"""Of a CTA of columns.cu: 32 columns side by side or more, for every group of lanes."""


class ColumnSchedule(NamedTuple):
    """How threads share columns (columns.cuh)."""

    groups: int
    """Threads that share a column in a CTA."""
    ctas: int
    """That share a tile."""

    @property
    def bits(self) -> int:
        return self.groups.bit_length() - 1

    @property
    def tile(self) -> int:
        """Columns."""
        return COLUMN_THREADS // self.groups

    def bytes(self, n: int, accumulate: str) -> int:
        """Of shared memory: partial sums, the chunks' sums, maxima and counts of each CTA."""
        elements = self.groups * (self.tile + 1) + (max(1, chunks_of(n)) + 2 * self.ctas) * self.tile
        return elements * ITEMSIZE[accumulate]


def column_schedules(n: int, device: GPU) -> list[ColumnSchedule]:
    """The schedules for columns of n elements, the fewest CTAs first."""
    lanes = min(max(n, 1), SUM_LANES)
    groups = 1 << max(0, -(-lanes // GROUP_LANES) - 1).bit_length()
    most = MAX_CTAS if device.compute_capability >= FIRST_WITH_CLUSTERS else 1
    return [ColumnSchedule(groups, ctas) for ctas in (1, 2, 4, 8) if ctas <= min(most, max(1, chunks_of(n)))]


def choose_column_schedule(columns: int, n: int, device: GPU) -> ColumnSchedule:
    """The fewest CTAs of which there are two for every multiprocessor."""
    found = column_schedules(n, device)
    for one in found:
        if -(-columns // one.tile) * one.ctas >= 2 * device.multiprocessors:
            return one
    return found[-1]


def splits_columns(operation: str, columns: int, n: int, element: str, width: int, device: GPU, first: bool) -> bool:
    """Whether a sum along a strided axis is spread over CTAs, a chunk each; `first`: not yet, at the first level."""
    chunks = chunks_of(n)
    if width > 1:
        is_faster = first and chunks > 1 and _is_faster_by_chunks(operation, columns, n, element, device)
        return chunks > MAX_TILE_CHUNKS or is_faster
    if chunks > MAX_COLUMN_CHUNKS:
        return True
    most = column_schedules(n, device)[-1]
    return first and chunks > most.ctas and -(-columns // most.tile) * most.ctas < device.multiprocessors


# ----------------------------------------------------------------------------------------------------- tiles of columns

PASSES = {
    "sum": 1,
    "mean": 1,
    "var": 2,
    "std": 2,
    "logsumexp": 2,
    "softmax": 3,
    "log_softmax": 3,
    "softmax_backward": 2,
    "log_softmax_backward": 2,
    "rms_norm_weight_backward": 1,
    "layer_norm_weight_backward": 1,
}
"""How often column_tiles.cu uses each element, except that the first pass of log_softmax_backward uses no x."""

TILE_THREADS = 256
"""Of a CTA."""

AT_ONCE, DEPTH = 4, 6
"""Elements of a lane that are one group of copies, and groups that are on their way, of an array."""


def arrays_of(operation: str) -> int:
    """Arrays of which column_tiles.cu reads all elements: x, and the gradient of the result."""
    return 2 if operation in COLUMN_GRADIENTS else 1


def _is_faster_by_chunks(operation: str, columns: int, n: int, element: str, device: GPU) -> bool:
    """Whether two kernels, the first of which has a chunk for each CTA, are estimated to be faster than one."""
    size, chunks = columns * n * ITEMSIZE[element] * arrays_of(operation), chunks_of(n)
    if size < MOST_BYTES:
        return chunks > 2 * MAX_CTAS and ceil_div(columns, vector_width(element)) * MAX_CTAS < device.multiprocessors

    def us(length: int, times: int) -> float:
        one = choose_tile_schedule(columns, length, element, operation, device, times)
        return size / (device.bytes_per_us * _reading_speed(one, columns, length, times, device))

    return us(SUM_CHUNK, chunks) + SECOND_KERNEL_US < us(n, 1)


class TileSchedule(NamedTuple):
    """How threads share columns that come in vectors (column_tiles.cu)."""

    width: int
    """Columns of a thread: those of a vector."""
    vectors: int
    """Side by side: threads of a tile."""
    parts: int
    """Of a chunk: each has as many of its lanes."""
    ctas: int
    """That share a tile: a cluster, or a team that meets in global memory."""
    keeps: bool
    """Whether elements are read once, if an operation has several passes."""
    spread: bool = False
    """Whether the CTAs are no cluster."""
    arrays: int = 1
    """That are read."""

    @property
    def tile(self) -> int:
        """Columns."""
        return self.vectors * self.width

    @property
    def levels(self) -> int:
        """Of the tree, that a thread adds: more take registers, of which three CTAs have few."""
        return (1 if self.width == 8 else 2) if self.keeps else 3

    @property
    def depth(self) -> int:
        """Groups that are on their way, if they are not kept."""
        return DEPTH // self.arrays

    @property
    def lanes(self) -> int:
        """Of a thread."""
        return SUM_LANES * self.vectors // (self.parts * TILE_THREADS)

    @property
    def is_possible(self) -> bool:
        lanes_of_tile = self.lanes * self.parts * TILE_THREADS
        return lanes_of_tile == SUM_LANES * self.vectors and 1 <= self.lanes <= 1 << self.levels

    def arguments(self, n: int, goes_on: bool = True) -> tuple[int, int, int]:
        """Of the kernel, besides its operands."""
        return self.vectors.bit_length() - 1, self.parts.bit_length() - 1, self.room(n, goes_on)

    def room(self, n: int, goes_on: bool = True) -> int:
        """Groups of a thread's elements that shared memory holds; `goes_on`: to other passes or tiles, copied ahead."""
        rounds = SUM_CHUNK // SUM_LANES // AT_ONCE if n > AT_ONCE * SUM_LANES else 1
        groups = ceil_div(chunks_of(n) * self.parts, self.ctas) * self.lanes * rounds
        return groups if self.keeps else self.depth if goes_on else min(self.depth, groups)

    def bytes(self, n: int, accumulate: str, goes_on: bool = True) -> int:
        """Of shared memory: elements, two times the sums of each warp, those of pieces, maxima, values, counts."""
        elements = self.room(n, goes_on) * min(AT_ONCE, ceil_div(n, SUM_LANES)) * self.arrays * TILE_THREADS * 16
        ctas = 1 if self.spread else self.ctas
        pieces = chunks_of(n) * self.parts
        sums = 2 * (ceil_div(pieces, 8) if self.spread else pieces)  # of two passes
        values = 2 * TILE_THREADS // 32 + sums + ctas + 1
        return elements + self.tile * (values * ITEMSIZE[accumulate] + ctas * 4)

    def resident(self, n: int, element: str, operation: str, device: GPU) -> int:
        """CTAs that the GPU holds, at least."""
        bytes_ = self.bytes(n, ACCUMULATE[element]) + CTA_BYTES
        ctas = min(tile_ctas(operation, element, self.keeps, self.spread), (device.shared_bytes + CTA_BYTES) // bytes_)
        return ctas * device.multiprocessors

    def meeting_bytes(self, n: int, operation: str, accumulate: str) -> int:
        """Of global memory, where a team meets, for each tile: sums of two passes; or maxima, sums and counts."""
        pieces = chunks_of(n) * self.parts
        return self.tile * (2 * pieces if operation in VARIANCES else pieces + 2 * self.ctas) * ITEMSIZE[accumulate]


def tile_ctas(operation: str, element: str, keeps: bool, spread: bool) -> int:
    """CTAs whose registers a multiprocessor has, as far as nothing else limits them."""
    if keeps:
        return 2 if element == "float64" and operation in EXPONENTIALS else KEEPING_CTAS
    return 3 if PASSES[operation] == 3 and element == "float32" and not spread else 2


def tile_schedules(n: int, element: str, operation: str, device: GPU, keeps: bool) -> list[TileSchedule]:
    """The schedules for columns of n elements, which they keep or not, as far as they fit."""
    found = []
    width = vector_width(element)
    sizes = cluster_sizes(device)
    if keeps and device.compute_capability == RING_CAPABILITY:
        sizes = (*sizes, MOST_CTAS)
    for vectors in (16, 8, 4, 2, 1):
        for ctas in sizes:
            parts = 1
            one = TileSchedule(width, vectors, parts, ctas, keeps, False, arrays_of(operation))
            while chunks_of(n) * parts < ctas or SUM_LANES * vectors > TILE_THREADS * parts << one.levels:
                parts *= 2
            one = one._replace(parts=parts)
            if one.is_possible and one.bytes(n, ACCUMULATE[element]) <= device.shared_bytes:
                found.append(one)
    return found


def spread_schedules(n: int, element: str, operation: str, device: GPU, keeps: bool) -> list[TileSchedule]:
    """The schedules of teams that meet in global memory, for columns of n elements."""
    found: list[TileSchedule] = []
    for vectors in (16, 8, 4, 2, 1):
        for parts in (1, 2, 4, 8):
            pieces = chunks_of(n) * parts
            for rounds in (1, 2, 4):
                team = ceil_div(pieces, rounds)
                one = TileSchedule(vector_width(element), vectors, parts, team, keeps, True, arrays_of(operation))
                is_new = team > 1 and (not found or one != found[-1])
                if is_new and one.is_possible and 0 < team <= one.resident(n, element, operation, device):
                    found.append(one)
    return found


def choose_spread_schedule(columns: int, n: int, element: str, operation: str, device: GPU) -> TileSchedule | None:
    """A schedule of teams that meet in global memory; None if there is none, or clusters do as well.

    Of few columns, what a multiprocessor has to read decides, and how often teams meet. Of many that no cluster keeps,
    the widest tiles of which the GPU keeps several, one for each CTA of a multiprocessor, and of which a CTA has not
    many sums to read.
    """
    across, passes = columns * ITEMSIZE[element], PASSES[operation]
    if passes == 1 or chunks_of(n) <= MAX_CTAS:
        return None
    if ceil_div(across, PREFERRED_BYTES_ACROSS // 2) * MAX_CTAS >= device.multiprocessors:
        if operation in SOFTMAX_GRADIENTS:
            return None
        for one in spread_schedules(n, element, operation, device, True):
            sums = one.tile * one.parts * chunks_of(n)
            is_wide = PREFERRED_BYTES_ACROSS // 2 <= one.vectors * 16 <= PREFERRED_BYTES_ACROSS
            holds_several = one.resident(n, element, operation, device) == KEEPING_CTAS * device.multiprocessors
            is_much = ceil_div(columns, one.tile) * one.ctas >= 2 * KEEPING_CTAS * device.multiprocessors
            fits_once = holds_several and one.ctas <= device.multiprocessors
            if is_wide and is_much and fits_once and one.ctas > MOST_CTAS and sums <= MAX_TEAM_SUMS:
                return one
        return None
    row = max(16, next_power_of_two(across))

    def us(one: TileSchedule) -> float:
        tiles, pieces = ceil_div(columns, one.tile), chunks_of(n) * one.parts
        teams = min(tiles, one.resident(n, element, operation, device) // one.ctas)
        turns = ceil_div(tiles, teams)
        of_cta = turns * ceil_div(pieces, one.ctas) * (one.arrays * one.vectors * 16 * SUM_CHUNK // one.parts)
        of_multiprocessor = of_cta * ceil_div(teams * one.ctas, device.multiprocessors)
        speed = 1.0 if one.vectors * 16 == row else OF_WIDTH[one.vectors]
        read = of_multiprocessor * device.multiprocessors / (device.bytes_per_us * speed)
        return read * (1 if one.keeps else passes) + MEETING_US * turns + pieces * PIECE_US

    found = [
        one
        for keeps in (True, False)
        for one in spread_schedules(n, element, operation, device, keeps)
        if one.vectors * 16 <= min(row, PREFERRED_BYTES_ACROSS)
    ]
    return min(found, key=us, default=None)


def choose_tile_schedule(
    columns: int, n: int, element: str, operation: str, device: GPU, times: int = 1, most_ctas: int = MOST_CTAS
) -> TileSchedule:
    """A schedule that fits; `times`: how often there are as many columns.

    Sums are as `_reading_speed` has it. Columns that are read again are kept, if tiles that are wide enough fit,
    several to a multiprocessor; of such schedules, the one with as few CTAs as fill the GPU. Else variances of much, if
    pairs of CTAs fill the GPU, are as `_read_twice` has it, and two passes over columns that fill the GPU without
    clusters read them twice. Gradients of softmax, of which a tile has twice the bytes, are kept several to a
    multiprocessor, in the widest tiles that small clusters can share, or read twice. `most_ctas`: of a cluster.
    """
    size = columns * n * ITEMSIZE[element] * arrays_of(operation) * times
    row = max(16, next_power_of_two(columns * ITEMSIZE[element]))
    streaming = [one for one in tile_schedules(n, element, operation, device, False) if one.vectors * 16 <= row]
    if PASSES[operation] == 1:
        read = size / device.bytes_per_us

        def us(one: TileSchedule) -> float:
            return read / _reading_speed(one, columns, n, times, device) + (CLUSTER_US if one.ctas > 1 else 0)

        return min(streaming, key=us)
    wide = min(PREFERRED_BYTES_ACROSS // 2, row)
    if size < MOST_BYTES:
        most_ctas = min(most_ctas, MAX_CTAS)
    narrowest = wide if size >= MOST_BYTES else min(32, row)
    keeping = [
        one
        for one in tile_schedules(n, element, operation, device, True)
        if narrowest <= one.vectors * 16 <= min(PREFERRED_BYTES_ACROSS, row) and one.ctas <= most_ctas
    ]

    def order(one: TileSchedule) -> tuple[int, ...]:
        """The best first."""
        ctas, across = ceil_div(columns, one.tile) * one.ctas * times, one.vectors * 16
        missing, few = (max(0, enough * device.multiprocessors // 10 - ctas) for enough in (9, 19))
        if one.keeps and one.arrays > 1:
            return missing, int(across < wide), 0 if across == PREFERRED_BYTES_ACROSS and one.ctas <= 4 else one.ctas
        if one.keeps:
            return missing, int(across < wide), one.ctas, few, -one.vectors
        return few, *((-one.vectors, one.ctas) if size >= MOST_BYTES else (one.ctas, -one.vectors))

    def kept(ctas: int) -> TileSchedule | None:
        """The best of which a multiprocessor holds so many CTAs."""
        most = (device.shared_bytes + CTA_BYTES) // ctas - CTA_BYTES
        found = (one for one in keeping if one.bytes(n, ACCUMULATE[element]) <= most)
        return min(found, key=order, default=None)

    across, many = columns * ITEMSIZE[element], kept(KEEPING_CTAS)
    if operation in SOFTMAX_GRADIENTS:
        # The second time, what has stayed in the L2 is quick; log_softmax reads only half of it twice.
        is_quick = operation == "log_softmax_backward" and MANY_BYTES < size <= L2_BYTES
        if many is not None and not is_quick:
            return many
        return max(streaming, key=lambda one: _reading_speed(one, columns, n, times, device))
    in_pairs = operation in VARIANCES and size >= MOST_BYTES and across >= PAIRS_ACROSS * device.multiprocessors
    if many is not None and not (in_pairs and size <= L2_BYTES):
        return many
    if in_pairs:
        return _read_twice(streaming, columns, n, device)
    if PASSES[operation] == 2 and across >= PREFERRED_BYTES_ACROSS * 4 * device.multiprocessors:
        return next(one for one in streaming if one.vectors * 16 <= PREFERRED_BYTES_ACROSS and one.ctas == 1)
    narrow = (one for one in streaming if one.vectors * 16 <= PREFERRED_BYTES_ACROSS)
    return kept(2) or kept(1) or min(narrow, key=order)


def _read_twice(streaming: list[TileSchedule], columns: int, n: int, device: GPU) -> TileSchedule:
    """Of columns of which there is much: the second time from the L2, if all that is being read has room there and the
    CTAs do not go on for so long that they part; else what reads fastest.
    """
    for one in sorted(streaming, key=lambda one: (one.ctas, -one.vectors)):
        tiles = ceil_div(columns, one.tile)
        at_once = min(tiles, STREAMING_CTAS * device.multiprocessors // one.ctas)
        fits = at_once * one.vectors * 16 * n <= L2_BYTES and tiles <= L2_ROUNDS * at_once
        if fits and at_once * one.ctas >= device.multiprocessors and one.ctas <= 2 and one.vectors >= 4:
            return one
    return max(streaming, key=lambda one: _reading_speed(one, columns, n, 1, device))


def _reading_speed(one: TileSchedule, columns: int, n: int, times: int, device: GPU) -> float:
    """Relative to the fastest: the share of multiprocessors that have work to the end, and what an H200 has shown.

    Of two arrays an H100 has shown that half of the multiprocessors, a long tile each, read all that memory gives.
    """
    ctas = ceil_div(columns, one.tile) * one.ctas * times
    is_alone = ctas <= device.multiprocessors
    if is_alone and one.arrays > 1 and n >= SUM_CHUNK:
        share = ctas / device.multiprocessors
        of_cluster = {1: 0.96, 2: 1.0, 4: 0.97 if share < 0.75 else 0.85, 8: 0.95}[one.ctas]
        return min(1.0, OF_WIDTH[one.vectors]) * of_cluster * min(1.0, 2.5 * share) * share**0.02
    of_cluster = {1: 1.0, 2: 0.93, 4: 0.72, 8: 0.6}[one.ctas]
    places = device.multiprocessors * (1 if is_alone else STREAMING_CTAS)
    return OF_WIDTH[one.vectors] * of_cluster * (0.9 if is_alone else 1.0) * ctas / (ceil_div(ctas, places) * places)


def tile_items(one: TileSchedule, items: int, device: GPU) -> int:
    """Items that are begun at once: CTAs that keep nothing go on to others, and copy ahead."""
    return items if one.keeps else min(items, max(1, STREAMING_CTAS * device.multiprocessors // one.ctas))


def tile_phase(one: TileSchedule, items: int, device: GPU) -> int:
    """CTAs that begin to read at the same time, one of each multiprocessor, if tiles are kept and many; or 0: all."""
    is_much = one.keeps and items * one.ctas >= 2 * KEEPING_CTAS * device.multiprocessors
    return device.multiprocessors // one.ctas * one.ctas if is_much else 0


OF_WIDTH = {16: 1.06, 8: 1.0, 4: 0.85, 2: 0.7, 1: 0.5}
"""How fast tiles of so many vectors are read, relative to those of 8."""

MAX_TEAM_SUMS = 4096
"""That a CTA reads where a team meets, if columns are many."""

CLUSTER_US, MEETING_US, PIECE_US = 0.5, 10, 0.01
"""That a cluster takes to begin and to meet, and a team anywhere on the GPU; and that each of its pieces does."""

STREAMING_CTAS, KEEPING_CTAS = 2, 3
"""Of a multiprocessor."""

PREFERRED_BYTES_ACROSS = 128
"""Of a tile, of every element."""

PAIRS_ACROSS = 60
"""Of an element of all columns, for each multiprocessor: from which on pairs of CTAs with such tiles fill the GPU."""

L2_BYTES, L2_ROUNDS = 36 * 2**20, 8
"""Of what CTAs read, that the L2 keeps for them, and tiles that they read one after the other meanwhile."""

MANY_BYTES, MOST_BYTES = 2**22, 2**25
"""From which on there is much to read, and so much that it does not stay in the L2."""

SECOND_KERNEL_US = 8
"""That the next level of a tree costs: two launches, of which the first one has to end."""

# -------------------------------------------------------------------------------------------- variances of tall columns

TALL_THREADS, TALL_LANES, TALL_PLACES = 512, 2, 3
"""Of a CTA; lanes of a thread (tall_variance.cu), and those that it has in shared memory."""

TALL_COLUMNS = SUM_CHUNK // 2
"""Elements, up to which other kernels are faster: a chunk would be filled by half."""

TALL_WORD_BYTES = 32
"""Of a column's sums, that a thread reads at once where a team meets."""

MOST_MEETING_BYTES = 2**30
"""Where all teams meet: much more than arrays need whose columns do not overlap, and little enough for the kernel to
count columns and words in 32 bits."""


class TallSchedule(NamedTuple):
    """How CTAs share long columns whose variance tall_variance.cu computes."""

    element: str
    vectors: int
    """Side by side: threads of a tile."""
    ctas: int
    """Of a tile, each with a chunk of it or a part of one."""

    @property
    def tile(self) -> int:
        """Columns."""
        return self.vectors * vector_width(self.element)

    @property
    def itemsize(self) -> int:
        """Of the accumulate dtype."""
        return ITEMSIZE[ACCUMULATE[self.element]]

    @property
    def parts(self) -> int:
        """Of a chunk."""
        return SUM_LANES * self.vectors // (TALL_THREADS * TALL_LANES)

    @property
    def groups(self) -> int:
        """Threads that read the words of a column."""
        return next_power_of_two(ceil_div(self.ctas, TALL_WORD_BYTES // self.itemsize))

    def arguments(self) -> tuple[int, ...]:
        """Of the kernel, besides its operands."""
        return *(number.bit_length() - 1 for number in (self.vectors, self.parts, self.groups)), self.ctas

    @property
    def bytes(self) -> int:
        """Of shared memory: elements, two times the sums of each warp, and those of columns."""
        elements = TALL_PLACES * SUM_CHUNK // SUM_LANES * TALL_THREADS * 16
        return elements + (2 * TALL_THREADS // 32 + 1) * self.tile * self.itemsize

    @property
    def meeting_bytes(self) -> int:
        """Of global memory, where a team meets, for each tile."""
        return 2 * self.tile * self.groups * TALL_WORD_BYTES


def tall_schedules(n: int, element: str, operation: str, device: GPU) -> list[TallSchedule]:
    """The schedules of tall_variance.cu for columns of n elements, the widest tiles first."""
    found = list[TallSchedule]()
    if operation not in VARIANCES or device.compute_capability < FIRST_WITH_CLUSTERS:
        return found
    for vectors in (16, 8, 4):
        one = TallSchedule(element, vectors, 0)
        one = one._replace(ctas=chunks_of(n) * one.parts)
        fits = one.bytes <= device.shared_bytes and one.tile * one.groups <= TALL_THREADS
        if 0 < one.ctas <= device.multiprocessors and one.groups <= 32 and fits:
            found.append(one)
    return found


def choose_tall_schedule(columns: int, n: int, element: str, operation: str, device: GPU) -> TallSchedule | None:
    """The schedule of tall_variance.cu for much to be read, of columns that are not short; None if there is none.

    Tiles of two lines of the L2 if few CTAs share them, else of one, else of half a line.
    """
    if columns * n * ITEMSIZE[element] < MOST_BYTES or n <= TALL_COLUMNS:
        return None
    found = tall_schedules(n, element, operation, device)
    best = next((one for one in found if one.vectors * 16 <= PREFERRED_BYTES_ACROSS or one.ctas <= MAX_CTAS), None)
    return None if best is None or best.meeting_bytes * ceil_div(columns, best.tile) > MOST_MEETING_BYTES else best


# -------------------------------------------------------------------------------------------------------- short columns

SHORT_THREADS = 512
"""Of a CTA, at most, where columns are short (short_columns.cu)."""


class ShortSchedule(NamedTuple):
    """How threads share columns of at most SUM_LANES elements (short_columns.cu)."""

    groups: int
    """Threads of a column."""
    columns: int
    """Of a CTA."""

    @property
    def threads(self) -> int:
        return self.groups * self.columns


def short_schedule(columns: int, n: int) -> ShortSchedule:
    """The schedule for columns of n elements."""
    groups = next_power_of_two(ceil_div(max(n, 1), GROUP_LANES))
    return ShortSchedule(groups, min(max(32, 256 // groups), SHORT_THREADS // groups, next_power_of_two(columns)))


# ----------------------------------------------------------------------------------- gradients of weights over few rows

WEIGHT_ROWS = 2 * SUM_LANES
"""Of a batch that has few, at most (weight_tiles.cu)."""

WEIGHT_AT_ONCE = 4
"""Elements of a thread, each of another lane or, of more than SUM_LANES, two of each lane."""

WEIGHT_THREADS = 1024
"""Of a CTA, at most."""

FEW_LINES = 32
"""Of an element of all columns."""

MANY_TILES = 1.5
"""For each CTA that the GPU holds, from which on CTAs go on from tile to tile: beginning anew costs more of them."""


class WeightSchedule(NamedTuple):
    """How threads share columns of at most WEIGHT_ROWS elements (weight_tiles.cu)."""

    width: int
    """Columns of a thread: those of a vector, or 1."""
    across: int
    """Threads of a tile side by side."""
    groups: int
    """Threads that have the same columns."""
    streams: bool = False
    """Whether CTAs take tile after tile."""

    @property
    def tile(self) -> int:
        """Columns."""
        return self.across * self.width

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.across * self.groups

    def bytes(self, element: str) -> int:
        """Of shared memory: sums of each warp, where there are several; two tiles of them and a tile's elements."""
        warps = self.threads // 32
        sums = warps * self.tile * ITEMSIZE[ACCUMULATE[element]] if warps > 1 else 0
        return 2 * (sums + WEIGHT_AT_ONCE * self.threads * 16) if self.streams else sums

    def resident(self, element: str, device: GPU) -> int:
        """CTAs that the GPU holds, at least."""
        by_memory = (device.shared_bytes + CTA_BYTES) // (self.bytes(element) + CTA_BYTES)
        return min(WEIGHT_THREADS // self.threads, by_memory) * device.multiprocessors


def weight_schedules(n: int, element: str, width: int, device: GPU) -> list[WeightSchedule]:
    """The schedules for columns of n elements of which a thread has so many, the narrowest tiles first."""
    groups = next_power_of_two(ceil_div(n, WEIGHT_AT_ONCE))
    found = [
        WeightSchedule(width, across, groups, streams)
        for streams in ((False, True) if width > 1 else (False,))
        for across in (1, 2, 4, 8, 16, 32)
    ]
    return [one for one in found if 32 <= one.threads <= WEIGHT_THREADS and one.bytes(element) <= device.shared_bytes]


def choose_weight_schedule(columns: int, n: int, element: str, width: int, device: GPU) -> WeightSchedule:
    """Tiles of whole lines, of two where CTAs go on, or half as wide where that leaves few; of single columns, as many
    as a warp has.
    """
    found, whole = weight_schedules(n, element, width, device), PREFERRED_BYTES_ACROSS // 16
    for one in found:
        many = MANY_TILES * one.resident(element, device)
        if one.streams and one.across == 2 * whole and ceil_div(columns, one.tile) >= many:
            return one
    if width == 1:
        wanted = min(32, next_power_of_two(columns))
    else:
        wanted = whole if columns * ITEMSIZE[element] >= FEW_LINES * PREFERRED_BYTES_ACROSS else whole // 2
    return min((one for one in found if not one.streams), key=lambda one: abs(one.across - wanted))


# ------------------------------------------------------------------------------------------------ how columns are taken

SINGLY, TILES, SHORT, SHORT_TILES, WEIGHT_TILES = "SINGLY", "TILES", "SHORT", "SHORT_TILES", "WEIGHT_TILES"
"""How columns are taken: by columns.cu, column_tiles.cu, short_columns.cu, short_tiles.cu, weight_tiles.cu."""

SHORT_COLUMNS = 32
"""Elements, up to which columns are a few threads' each, however many there are."""

SHORT_TILE_OPERATIONS = SUMS | VARIANCES
"""Those that short_tiles.cu has."""


def choose_columns(operation: str, columns: int, n: int, element: str, width: int, fits_weight_tiles: bool) -> str:
    """How columns are taken by operations that have a choice: a few threads' each are quick, but read by elements."""
    if element == ANY:
        return SINGLY
    size = columns * n * ITEMSIZE[element]
    if operation in WEIGHT_GRADIENTS and fits_weight_tiles and (n <= SUM_LANES or size < MOST_BYTES):
        return WEIGHT_TILES
    is_little = n <= SHORT_COLUMNS or size <= MANY_BYTES
    if operation in COLUMN_GRADIENTS:
        is_little &= n <= 2 * SHORT_COLUMNS
    if n <= SUM_LANES and (width == 1 or is_little):
        return SHORT
    if width == 1:
        return SINGLY
    return SHORT_TILES if n <= SUM_LANES and operation in SHORT_TILE_OPERATIONS else TILES


def short_tile_vectors(n: int) -> int:
    """Side by side: of a tile of short_tiles.cu, at most 32."""
    return TILE_THREADS // max(TILE_THREADS // 32, next_power_of_two(ceil_div(max(n, 1), GROUP_LANES)))


def next_power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


# -------------------------------------------------------------------------------------------------------------- kernels


def column_kernel(operation: str, element: str, accumulate: str, in_cluster: bool) -> Kernel:
    """The kernel of columns.cu."""
    return Kernel(
        "columns.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("IN_CLUSTER", str(in_cluster).lower()),
            *_column_macros(element, accumulate),
        ),
    )


def tile_kernel(
    operation: str, element: str, out_dtype: str, schedule: TileSchedule, of_chunks: bool = False
) -> Kernel:
    """The kernel of column_tiles.cu; `of_chunks`: each chunk is summed apart."""
    return Kernel(
        "column_tiles.cu",
        (
            *_typed_macros(operation, element, out_dtype),
            ("PASSES", PASSES[operation]),
            ("SUMS", 2 if operation in VARIANCES else 1),
            ("GRAD", str(operation in COLUMN_GRADIENTS).lower()),
            ("X_FROM", int(operation == "log_softmax_backward")),
            ("IS_OF_CHUNKS", str(of_chunks).lower()),
            ("KEPT", str(schedule.keeps).lower()),
            ("SPREAD", str(schedule.spread).lower()),
            ("DEPTH", schedule.depth),
            ("LEVELS", schedule.levels),
            ("THREADS", TILE_THREADS),
            ("CTAS", tile_ctas(operation, element, schedule.keeps, schedule.spread)),
        ),
    )


def tall_kernel(element: str) -> Kernel:
    """The kernel of tall_variance.cu."""
    accumulate = C_TYPE[ACCUMULATE[element]]
    macros = (("ELEMENT", c_type(element)), ("ACCUMULATE", accumulate), ("THREADS", TALL_THREADS))
    return Kernel("tall_variance.cu", macros)


def short_kernel(operation: str, element: str, out_dtype: str) -> Kernel:
    """The kernel of short_columns.cu."""
    return Kernel("short_columns.cu", (*_typed_macros(operation, element, out_dtype), ("THREADS", SHORT_THREADS)))


def short_tile_kernel(operation: str, element: str, out_dtype: str) -> Kernel:
    """The kernel of short_tiles.cu."""
    macros = (one for one in _typed_macros(operation, element, out_dtype) if one[0] != "RESULT")
    return Kernel("short_tiles.cu", (*macros, ("THREADS", TILE_THREADS)))


def _typed_macros(operation: str, element: str, out_dtype: str) -> tuple[tuple[str, str | int], ...]:
    accumulate = ACCUMULATE[element]
    return (
        ("OPERATION", OPERATIONS[operation]),
        ("ELEMENT", c_type(element)),
        ("ACCUMULATE", C_TYPE[accumulate]),
        ("RESULT", C_TYPE[out_dtype if operation in EXPONENTIALS else accumulate]),
    )


def weight_kernel(operation: str, element: str, schedule: WeightSchedule) -> Kernel:
    """The kernel of weight_tiles.cu."""
    return Kernel(
        "weight_tiles.cu",
        (
            *(one for one in _typed_macros(operation, element, element) if one[0] != "RESULT"),
            ("COLUMNS", schedule.width),
            ("AT_ONCE", WEIGHT_AT_ONCE),
            ("STREAMED", str(schedule.streams).lower()),
            ("THREADS", WEIGHT_THREADS),
        ),
    )


def column_chunk_kernel(operation: str, element: str, accumulate: str) -> Kernel:
    """The kernel of column_chunks.cu."""
    return Kernel("column_chunks.cu", (("TERMS", TERMS[operation]), *_column_macros(element, accumulate)))


def _column_macros(element: str, accumulate: str) -> tuple[tuple[str, str | int], ...]:
    return (
        ("ELEMENT", c_type(element)),
        ("ACCUMULATE", C_TYPE[accumulate]),
        ("THREADS", COLUMN_THREADS),
    )
