"""What decides the speed of reductions of rows and no bit: launch shapes, and which kernel takes which rows.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from .compile import Kernel
from .launch import FIRST_WITH_CLUSTERS, GPU, MAX_GRID
from .parameters import ANY, C_TYPE, c_type
from .reduction_operations import (
    CTA_BYTES,
    ELEMENTS,
    EXPONENTIALS,
    GROUP_LANES,
    MAX_CTAS,
    MOST_CTAS,
    OPERATIONS,
    RING_CAPABILITY,
    SOFTMAX_GRADIENTS,
    SUMS,
    VARIANCES,
    ceil_div,
    chunks_of,
    cluster_sizes,
    vector_width,
)

MAX_ROW_CHUNKS = SUM_CHUNK
"""Chunks of a row that one CTA may sum: their sums are one chunk of the next level."""

# ----------------------------------------------------------------------------------------------------------------- rows

LANES, CTA, CLUSTER = "LANES", "CTA", "CLUSTER"

CTA_WARPS = 4
"""Of a CTA, where a row is a warp's or part of one's."""

OCTETS, MANY_OCTETS = 4, (64, 512)
"""Of a thread, where rows are longer than the first and not longer than the second: what a row costs beside its
elements is then shared by four of them."""

BATCHES = (8, 4, 2, 1)
"""How many rows such a team begins to read at a time."""

BATCH_BYTES = 4096
"""That a warp reads at a time, if it has several rows."""

MAX_WARPS = 16
"""Of a CTA."""

STREAMING_WARPS = 8
"""Of a CTA, where rows are not kept, which takes more registers."""

PREFERRED_WARPS, PREFERRED_BYTES = 8, 48 * 1024
"""Of a CTA, at most: of larger ones a multiprocessor holds too few for one to read while another computes."""

ROUNDS = 8
"""Chunks of a warp, at most, where there is a choice."""


class RowSchedule(NamedTuple):
    """How threads share rows (team.cuh)."""

    team: str
    lanes: int
    """Of a warp: 32 unless the team is smaller."""
    warps: int
    """Of a CTA."""
    ctas: int
    """Of a team."""
    batch: int = 1
    """Rows of a team, where it is a warp or less."""
    keeps: bool = True
    """Whether a row is read once."""
    octets: int = 1
    """Of 8 elements, that a thread has of every 256 (row.cuh)."""

    @property
    def rows(self) -> int:
        """Of a CTA, or of a cluster."""
        return self.warps * 32 // self.lanes * self.batch if self.team == LANES else 1

    def rounds(self, n: int) -> int:
        """Chunks of a warp."""
        return 1 if self.team == LANES else max(1, -(-chunks_of(n) // (self.warps * self.ctas)))


class Kept(NamedTuple):
    """Bytes of shared memory that a row takes."""

    element: dict[str, int]
    """For each element, by the kind of team."""
    accumulate: int
    """Of a partial sum."""

    def of_warp(self, schedule: RowSchedule, n: int) -> int:
        """For the elements of a warp that belong to one row of each team, in steps of SUM_LANES of them."""
        element = self.element[schedule.team]
        if schedule.team == LANES:
            return -(-n // SUM_LANES) * SUM_LANES * schedule.octets * element
        return schedule.rounds(n) * SUM_CHUNK * element if schedule.keeps else 0

    def bytes(self, schedule: RowSchedule, n: int) -> int:
        """Of a CTA. Behind the elements, where there are several warps: an array of the warps' maxima, two of chunks'
        sums, one of those sums' sums, one of counts.
        """
        exchanged, chunks = 0, chunks_of(n)
        if schedule.team != LANES:
            places = max(schedule.warps * schedule.ctas, min(chunks, SUM_CHUNK))
            exchanged = places * (3 * self.accumulate + 4) + chunks_of(chunks) * self.accumulate
        return schedule.warps * schedule.batch * self.of_warp(schedule, n) + exchanged


def kept(operation: str, element: str, accumulate: str) -> Kept:
    """What an operation keeps of rows; those that are read as ANY are kept in the accumulate dtype."""
    stored = ITEMSIZE[accumulate if element == ANY else element]
    if operation.endswith("backward"):
        stored *= 2
    results = ITEMSIZE[accumulate] if operation == "softmax" else stored
    of_team = {LANES: results, CTA: results, CLUSTER: stored}
    if operation in SUMS:
        of_team |= {CTA: 0, CLUSTER: 0}
    return Kept(of_team, ITEMSIZE[accumulate])


def row_schedules(n: int, of: Kept, device: GPU) -> list[RowSchedule]:
    """The schedules for rows of n elements that fit and keep them; of long rows, the fewest CTAs first."""
    if n <= SUM_CHUNK:
        lanes = min(32, 1 << max(0, -(-n // GROUP_LANES) - 1).bit_length())
        shorts = [RowSchedule(LANES, lanes, CTA_WARPS, 1, batch) for batch in BATCHES]
        if MANY_OCTETS[0] < n <= MANY_OCTETS[1]:
            shorts = [one._replace(lanes=32 // OCTETS, octets=OCTETS) for one in shorts] + shorts
        return [one for one in shorts if one.batch == 1 or one.batch * of.of_warp(one, n) <= BATCH_BYTES]
    chunks = chunks_of(n)
    found: dict[RowSchedule, None] = {}
    for ctas in cluster_sizes(device):
        for rounds in (1, 2, 4, ROUNDS) if of.element[CTA] else (1, 2, 4, ROUNDS, -(-chunks // (ctas * MAX_WARPS))):
            warps = -(-chunks // (ctas * rounds))
            schedule = RowSchedule(CTA if ctas == 1 else CLUSTER, 32, warps, ctas)
            fits = of.bytes(schedule, n) <= device.shared_bytes and chunks <= SUM_CHUNK
            if ctas <= chunks and warps <= MAX_WARPS and fits:
                found[schedule] = None
    return list(found)


def streaming_schedule(device: GPU) -> RowSchedule:
    """The schedule that reads a row anew whenever it is used."""
    ctas = cluster_sizes(device)[-1]
    return RowSchedule(CTA if ctas == 1 else CLUSTER, 32, STREAMING_WARPS, ctas, keeps=False)


def choose_row_schedule(rows: int, n: int, of: Kept, device: GPU) -> RowSchedule | None:
    """A schedule that keeps rows; None if none fits.

    Where rows fill the GPU, warps have several chunks each if those take little memory, since a CTA of few warps that
    live long reads better. Of schedules alike, the one of the fewest CTAs that are small enough.
    """
    found = row_schedules(n, of, device)
    if not found:
        return None
    if n <= SUM_CHUNK:
        return next((one for one in found if rows >= 2 * device.multiprocessors * one.rows), found[-1])
    chunks = chunks_of(n)
    element = of.element[CLUSTER]
    wanted = 4 if element == 0 else 2 if element <= 2 else 1
    while wanted > 1 and (chunks < 2 * wanted or rows * chunks < 16 * device.multiprocessors * wanted):
        wanted //= 2
    closest = min(abs(one.rounds(n) - wanted) for one in found)
    alike = [one for one in found if abs(one.rounds(n) - wanted) == closest]
    for one in alike:
        is_small = one.warps <= PREFERRED_WARPS and of.bytes(one, n) <= PREFERRED_BYTES
        if is_small and rows * one.ctas >= device.multiprocessors:
            return one
    return alike[-1]


def splits_rows(rows: int, n: int, device: GPU, fits: bool) -> bool:
    """Whether rows are spread over the GPU chunk by chunk: no schedule fits, or too few CTAs would work."""
    if not fits:
        return True
    if device.compute_capability >= FIRST_WITH_CLUSTERS:
        return chunks_of(n) > MAX_CTAS * MAX_WARPS and rows * MAX_CTAS * 2 < device.multiprocessors
    return chunks_of(n) >= 32 and rows < device.multiprocessors


# ---------------------------------------------------------------------------------------------------- rows in registers

REGISTER_NORMS = VARIANCES | {"rms_norm", "layer_norm"}
"""Those that register_norms.cu has."""

REGISTER_BACKWARD = frozenset(("softmax_backward", "log_softmax_backward", "rms_norm_backward", "layer_norm_backward"))
"""Those that register_backward.cu has."""

NORM_GRADIENTS = REGISTER_BACKWARD - SOFTMAX_GRADIENTS
"""With respect to x."""

REGISTER_OPERATIONS = SUMS | EXPONENTIALS | REGISTER_NORMS | REGISTER_BACKWARD
"""All of them, and those that register_rows.cu has."""

FIRST_WITH_PAIRS = (8, 0)
"""The first compute capability that has all the instructions it uses."""

MANY_ELEMENTS = {"bfloat16": 32, "float16": 32, "float32": 16, "float64": 16}
"""Of a thread, where many rows are short: what a row costs beside its elements is then shared by several."""

WARP_STEPS, CTA_STEPS = 4, SUM_CHUNK // SUM_LANES
"""Of 256 elements, that a thread has of a row, at most."""

CTA_THREADS = 512
"""Of a CTA that has one row, at most."""

LONG_ROW = 8 * SUM_CHUNK

LONGEST_BESIDE_WORDS = 4 * SUM_CHUNK
"""Elements of gradients of 16 bits that begin anywhere and are not shifted, at most: longer ones are read once, too."""

NEARLY_LONG, NEARLY_LONG_ANYWHERE = EXPONENTIALS, EXPONENTIALS | SUMS
"""Operations of which longer rows, twice as long at most, may be a CTA's, and those of which rows that begin anywhere
may: see `choose_register_schedule`. Not of float64.
"""

THREADS_OF_A_MULTIPROCESSOR = 2048


class RegisterSchedule(NamedTuple):
    """How threads share rows that they keep in registers (register_rows.cuh)."""

    width: int
    """Elements of a thread's vectors, each of another lane of the tree."""
    groups: int
    """Vectors that a thread has of every 256 elements."""
    steps: int
    """Of 256 elements, at most."""
    spread: bool
    """Whether a row is a CTA's."""
    lanes: int
    """Threads of a row in a warp."""
    threads: int
    """Of a CTA."""
    layout: str = "Whole"
    """Of rows."""

    @property
    def rows(self) -> int:
        """Of a CTA."""
        return 1 if self.spread else self.threads // self.lanes

    def narrowed(self, width: int) -> RegisterSchedule:
        """With as many elements of a thread, in such vectors."""
        return self._replace(width=width, groups=self.width * self.groups // width)


class Steps(NamedTuple):
    """How far apart rows are, of all arrays that have elements of them."""

    multiple: int
    """Elements, of which all distances and the length are multiples: a power of two."""
    are_alike: bool = True
    """Whether row by row all arrays begin at one place of a vector, if the first rows do."""

    def are_vectors(self, width: int) -> bool:
        return self.multiple % width == 0


WHOLE_VECTORS, ANYWHERE = Steps(16), Steps(1)


def register_schedules(operation: str, n: int, element: str, steps: Steps) -> list[RegisterSchedule]:
    """The schedules for rows of n elements, if their layout allows any; the fewest threads of a row first."""
    vector, is_sum, is_double = vector_width(element), operation in SUMS, element == "float64"
    is_aligned = n < GROUP_LANES or steps.are_vectors(vector)
    is_shifted = n > SUM_LANES and steps.are_alike and not is_aligned and not is_double
    if operation in NORM_GRADIENTS and n > SUM_CHUNK * (4 if element == "float32" else 1):
        is_shifted = False  # which is slower, with as many registers as it takes
    length = n + vector - 1 if is_shifted else n  # what vectors hold that hold a row
    found = []
    if n <= SUM_LANES:
        vectors = 1 << (-(-n // vector) - 1).bit_length()
        for elements in (MANY_ELEMENTS[element], GROUP_LANES):
            groups = elements // vector
            is_many = elements > GROUP_LANES
            is_near = steps.are_vectors(max(2, two_words(element)))
            if is_many and (operation in REGISTER_BACKWARD or vectors < 4 * groups or not is_near):
                continue  # a row costs too little, or neighbours would read too far apart
            found.append(RegisterSchedule(vector, groups, 1, False, max(1, vectors // groups), CTA_WARPS * 32))
    elif length <= WARP_STEPS * SUM_LANES:
        has_three_arrays = operation in NORM_GRADIENTS
        # Of a double a warp could keep few rows, and computes long; of three arrays, a thread has much.
        is_much = (is_double and not is_sum) or (has_three_arrays and element == "float32" and n > 2 * SUM_LANES)
        if not is_much:
            groups = GROUP_LANES // vector
            found.append(RegisterSchedule(vector, groups, WARP_STEPS, False, 32, CTA_WARPS * 32))
        if is_much or has_three_arrays:
            found.append(RegisterSchedule(2, 1, WARP_STEPS, True, 32, SUM_LANES // 2))
    elif length <= _longest(operation, element, is_aligned, is_shifted):
        if is_sum and length <= SUM_CHUNK and not is_double:
            groups = GROUP_LANES // vector
            found.append(RegisterSchedule(vector, groups, CTA_STEPS, False, 32, CTA_WARPS * 32))
        for width, groups in _spread_vectors(operation, length, element, is_aligned):
            threads = chunks_of(length) * SUM_LANES // (width * groups)
            if threads <= CTA_THREADS:
                found.append(RegisterSchedule(width, groups, CTA_STEPS, True, 32, threads))
    if is_shifted and not found:
        return register_schedules(operation, n, element, steps._replace(are_alike=False))
    return [_of_rows(one, n, element, steps, is_shifted) for one in found]


def word_width(element: str) -> int:
    """Elements of a word, or one."""
    return max(1, 4 // ITEMSIZE[element])


def two_words(element: str) -> int:
    """Elements of them."""
    return 8 // ITEMSIZE[element]


def _of_rows(one: RegisterSchedule, n: int, element: str, steps: Steps, is_shifted: bool) -> RegisterSchedule:
    """A schedule in the vectors that such rows have. Rows shorter than an octet may have a part of one."""
    if n < GROUP_LANES or steps.are_vectors(one.width):
        return one
    if is_shifted:
        return one._replace(layout="Shifted")
    if n <= SUM_LANES and 1 < two_words(element) < one.width and steps.are_vectors(two_words(element)):
        return one.narrowed(two_words(element))
    return one.narrowed(word_width(element))._replace(layout="Narrow")


def _longest(operation: str, element: str, is_aligned: bool, is_shifted: bool) -> int:
    """Elements of a row, at most, whatever there are registers for."""
    if not (is_aligned or is_shifted) and operation in REGISTER_BACKWARD and ITEMSIZE[element] == 2:
        return LONGEST_BESIDE_WORDS
    return LONG_ROW if operation in SUMS and is_aligned else 2 * LONG_ROW


def _spread_vectors(operation: str, n: int, element: str, is_aligned: bool) -> list[tuple[int, int]]:
    """The widths and groups of vectors where a row is a CTA's, of as many elements as a thread has registers for, the
    most first.
    """
    if _is_nearly_long(operation, n, element, is_aligned):
        return [(vector_width(element), GROUP_LANES // vector_width(element))]
    return [(width, 1) for width in _spread_widths(operation, n, element)]


def _is_nearly_long(operation: str, n: int, element: str, is_aligned: bool) -> bool:
    """Whether a thread has 8 elements of 256."""
    is_such = operation in (NEARLY_LONG if is_aligned else NEARLY_LONG_ANYWHERE)
    return n > LONG_ROW and is_such and element != "float64"


def _spread_widths(operation: str, n: int, element: str) -> tuple[int, ...]:
    """Elements of a thread in 256, in one vector."""
    if element == "float64":
        return (4, 2) if operation in EXPONENTIALS | SUMS and n > SUM_CHUNK * 4 else (2,)
    if operation in REGISTER_BACKWARD:  # which has more operands
        if operation in SOFTMAX_GRADIENTS and ITEMSIZE[element] == 2 and n <= SUM_CHUNK * 2:
            return (4, 2)
        return (4,) if ITEMSIZE[element] == 2 or n > SUM_CHUNK * 4 else (2,)
    if operation in REGISTER_NORMS | SUMS and ITEMSIZE[element] == 2:
        return (8, 2) if n <= SUM_CHUNK * 4 else (8,)
    return (4, 2)


def choose_register_schedule(
    operation: str, rows: int, n: int, element: str, steps: Steps, device: GPU
) -> RegisterSchedule | None:
    """The schedule of the fewest threads of a row that fill the GPU (of gradients, and short rows in parts of vectors,
    half of it or less), else of the most; None for long rows, and for more rows than a launch has CTAs for. Of rows
    nearly as long, only as many as nearly fill the GPU if they are aligned, and of those that begin anywhere few, those
    of which the ring is slower, and where there is none.
    """
    if device.compute_capability < FIRST_WITH_PAIRS or n == 0:
        return None
    if operation in REGISTER_NORMS and element == "float32" and are_few(rows, n, device):
        steps = steps._replace(are_alike=False)  # single elements take less time than to move sums of lanes
    found = register_schedules(operation, n, element, steps)
    found = [one for one in found if ceil_div(rows, one.rows) <= MAX_GRID]
    is_aligned = steps.are_vectors(vector_width(element))
    is_nearly_long = _is_nearly_long(operation, n, element, is_aligned)
    if is_nearly_long:
        if is_aligned:  # a cluster has more of few rows on its way
            is_slower = rows < NEARLY_ALL * device.multiprocessors
        else:
            has_ring = device.compute_capability == RING_CAPABILITY and not are_few(rows, n, device)
            is_slower = has_ring and (operation == "softmax" or (operation == "log_softmax" and ITEMSIZE[element] > 2))
        return None if is_slower or not found else found[-1]
    enough = THREADS_OF_A_MULTIPROCESSOR * device.multiprocessors
    if operation in REGISTER_BACKWARD or (n <= SUM_LANES and not is_aligned):
        enough //= 2
    if operation in NORM_GRADIENTS and ITEMSIZE[element] == 2:
        enough //= 2
    for one in found:
        if rows * one.threads >= enough * one.rows:
            return one
    return found[-1] if found else None


# ----------------------------------------------------------------------------------------- long rows that are read once

LONG_OPERATIONS = REGISTER_NORMS | REGISTER_BACKWARD
"""Those that have such kernels: long_variance.cu, long_norms.cu and long_backward.cu."""


def long_parts(operation: str, element: str) -> int:
    """Warps that share a chunk: of a whole one, a thread may have more elements than registers."""
    if operation not in VARIANCES:
        return GROUP_LANES // vector_width(element)
    return 4 if element == "float64" else 1


def long_warps(operation: str, element: str, is_narrow: bool) -> int:
    """Of a CTA, at most: for as many there are registers."""
    if operation in REGISTER_BACKWARD:
        return 16
    if operation in VARIANCES and element != "float64":
        return 20
    if ITEMSIZE[element] == 2:
        return 24
    return 28 if is_narrow else 32


LONG_SIDES = {"rms_norm": 1, "layer_norm": 2}
"""Operands that rows share, of which something is kept in shared memory."""


def is_always_reading(operation: str) -> bool:
    """Whether the next row is on its way all the time that a CTA has one. Sums are then sent, as only clusters can."""
    return operation not in VARIANCES


class LongSchedule(NamedTuple):
    """How CTAs share long rows that are read once."""

    warps: int
    """Of a CTA, with a chunk each or a part of it."""
    ctas: int
    """Of a row."""
    held: int = 0
    """Vectors that a thread keeps in shared memory of what rows share: of norms, of the weight and of the bias."""
    is_narrow: bool = False
    """Whether rows begin anywhere in a vector: they are copied as the vectors that hold them, and read in words."""

    @property
    def threads(self) -> int:
        return self.warps * 32

    def bytes(self, operation: str, n: int, element: str) -> int:
        """Of shared memory: elements, what is held, and room for four times the chunks' sums, or twice and barriers."""
        parts, sums = long_parts(operation, element), 32 << long_bits(n)
        arrays = 2 if operation in REGISTER_BACKWARD else 1
        of_warp = SUM_CHUNK // parts * ITEMSIZE[element]
        if self.is_narrow:  # a vector more, of each step where warps share a chunk
            of_warp += 16 * (CTA_STEPS if parts > 1 else 1)
        elements = arrays * self.warps * of_warp
        elements += LONG_SIDES.get(operation, 0) * self.held * self.threads * 16
        return elements + 4 * parts * sums * ITEMSIZE[ACCUMULATE[element]]


def long_bits(n: int) -> int:
    """A thread adds up the sums of 2^bits chunks."""
    return (ceil_div(chunks_of(n), 32) - 1).bit_length()


def long_schedules(operation: str, n: int, element: str, is_narrow: bool, device: GPU) -> list[LongSchedule]:
    """The schedules for rows of n elements, if there are any; the fewest CTAs first, of those alike first the one that
    holds the most. `is_narrow`: see LongSchedule.
    """
    chunks, parts, found = chunks_of(n), long_parts(operation, element), list[LongSchedule]()
    has_kernel = operation in LONG_OPERATIONS and element in ELEMENTS
    most = SUM_LANES if parts == 1 else SUM_LANES // 2  # chunks of which a warp adds up the sums
    if not has_kernel or not 2 <= chunks <= most or device.compute_capability < FIRST_WITH_CLUSTERS:
        return found
    for ctas in (*cluster_sizes(device), MOST_CTAS):
        one = LongSchedule(ceil_div(chunks, ctas) * parts, ctas, is_narrow=is_narrow)
        fits = ctas <= chunks and one.warps <= long_warps(operation, element, is_narrow)
        fits = fits and (ctas > 1 or not is_always_reading(operation))
        if fits and (ctas <= MAX_CTAS or not found):
            several = [one._replace(held=held) for held in range(CTA_STEPS, 0, -2) if operation in LONG_SIDES] + [one]
            several = [each for each in several if each.bytes(operation, n, element) <= device.shared_bytes]
            found += several[:1] + several[1:][-1:]
    return found


def choose_long_schedule(
    operation: str, rows: int, n: int, element: str, is_narrow: bool, device: GPU
) -> LongSchedule | None:
    """The fewest CTAs of a row, if they always read; else one, or the fewest of which a multiprocessor holds two, so
    that one reads while another waits. The most where rows are few. None if there is no schedule.
    """
    found = long_schedules(operation, n, element, is_narrow, device)
    for one in found:
        is_small = one.ctas == 1 or one.warps <= long_warps(operation, element, is_narrow) // 2
        if rows * one.ctas >= device.multiprocessors and (is_small or is_always_reading(operation)):
            return one
    return found[-1] if found else None


# ------------------------------------------------------------------------------------ long rows of softmax, read once

EXCHANGE_AREAS = 4
"""For what warps exchange, here and in a ring (exchange.cuh)."""

LONG_SOFTMAX = frozenset(("softmax", "log_softmax"))
"""Those that long_softmax.cu has, of elements of 16 bits."""

SOFTMAX_CHUNKS = 2
"""Of a warp."""

SOFTMAX_VECTORS = SOFTMAX_CHUNKS * SUM_CHUNK // SUM_LANES
"""Of a thread."""

SOFTMAX_HELD, SOFTMAX_ASIDE = 14, 3
"""Of these vectors, in registers; and that softmax may put aside."""

SOFTMAX_THREADS = (512, 608)
"""Of a CTA, at most, that kernels are compiled for."""

MAX_SOFTMAX_TEAM = 64
"""Warps of a team: each thread of a warp reads what two of them share."""

SOFTMAX_AREA_BYTES = 8 * MAX_SOFTMAX_TEAM
"""What they exchange at a time."""

WELL_SHARED, NEARLY_ALL = 0.85, 0.9
"""Of what the schedulers of a multiprocessor could do, what they do where warps are not as many on each; and of
multiprocessors.
"""


class SoftmaxSchedule(NamedTuple):
    """How CTAs share long rows of softmax that are read once."""

    warps: int
    """Of a CTA, with two chunks each."""
    ctas: int
    """Of a row."""

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def most_threads(self) -> int:
        """That the kernel is compiled for."""
        return min(most for most in SOFTMAX_THREADS if self.threads <= most)

    def bytes(self, operation: str) -> int:
        """Of shared memory: vectors, those that are not in registers of two rows, and what the warps exchange."""
        vectors = 2 * SOFTMAX_VECTORS - SOFTMAX_HELD + (SOFTMAX_ASIDE if operation == "softmax" else 0)
        return vectors * self.threads * 16 + EXCHANGE_AREAS * (8 + SOFTMAX_AREA_BYTES)


def softmax_schedules(operation: str, n: int, element: str, device: GPU) -> list[SoftmaxSchedule]:
    """The schedules of long_softmax.cu for rows of n elements, the fewest CTAs first."""
    chunks, has_kernel = chunks_of(n), operation in LONG_SOFTMAX and element in ELEMENTS and ITEMSIZE[element] == 2
    if not has_kernel or chunks < SOFTMAX_CHUNKS or device.compute_capability < FIRST_WITH_CLUSTERS:
        return []
    found = []
    for ctas in cluster_sizes(device):
        one = SoftmaxSchedule(ceil_div(chunks, ctas * SOFTMAX_CHUNKS), ctas)
        fits = one.threads <= max(SOFTMAX_THREADS) and one.warps * ctas <= MAX_SOFTMAX_TEAM
        if fits and ctas * SOFTMAX_CHUNKS <= chunks and one.bytes(operation) <= device.shared_bytes:
            found.append(one)
    return found


def choose_softmax_schedule(operation: str, rows: int, n: int, element: str, device: GPU) -> SoftmaxSchedule | None:
    """The fewest CTAs of a row, if those of all rows keep the GPU busy and have many warps; of log_softmax, for which
    other kernels do little more, if each scheduler has nearly as many. None elsewhere.
    """
    found = softmax_schedules(operation, n, element, device)
    if not found:
        return None
    one, schedulers = found[0], 4
    shared = chunks_of(n) / (one.ctas * SOFTMAX_CHUNKS * ceil_div(one.warps, schedulers) * schedulers)
    are_many = one.warps > 3 * schedulers and rows * one.ctas >= NEARLY_ALL * device.multiprocessors
    return one if are_many and (operation == "softmax" or shared >= WELL_SHARED) else None


# ------------------------------------------------------------------------------------------------------- rows in a ring

RING_OPERATIONS = SUMS | EXPONENTIALS

MAX_RING_CHUNKS = 256
"""Of a row: what a warp sums at once."""

MAX_RING_WARPS = 20
"""Of a CTA."""

MAX_RING_TEAM = 160
"""Warps of a team."""

MULTIPROCESSOR_BYTES = 228 * 1024
"""Shared memory of a multiprocessor."""


class RingSchedule(NamedTuple):
    """How the warps of rows_ring.cu share rows."""

    warps: int
    """Of a CTA."""
    ctas: int
    """Of a cluster."""
    rounds: int
    """Chunks of a warp."""
    slots: int
    """Rows that a warp keeps; with one, chunk by chunk the next one takes its place."""
    kept_steps: int = 0
    """Of a chunk of 16-bit elements, whose exponentials are kept: half of them in place of the elements."""

    @property
    def threads(self) -> int:
        return self.warps * 32

    def area_bytes(self, n: int) -> int:
        """What the warps exchange at a time: 8 bytes for each chunk or 4 for each warp. Of more chunks than a warp has
        threads, each thread reads 4 or 8.
        """
        chunks = chunks_of(n)
        places = chunks if chunks <= 32 else 128 if chunks <= 128 else 256
        return -(-max(8 * places, 4 * self.warps * self.ctas) // 16) * 16

    def bytes(self, n: int, itemsize: int) -> int:
        """Of shared memory: the chunks, each in as many bytes as it needs wherever it begins in a vector, exponentials,
        the barriers, what is exchanged.
        """
        of_slot = self.rounds * (SUM_CHUNK * itemsize + 32 + 8)
        of_kept = self.rounds * self.kept_steps * SUM_LANES * 2
        return self.warps * (self.slots * of_slot + of_kept) + EXCHANGE_AREAS * (8 + self.area_bytes(n))

    def resident_ctas(self, operation: str, n: int, itemsize: int) -> int:
        """Of a multiprocessor, as many as its shared memory and its registers hold."""
        ctas = MULTIPROCESSOR_BYTES // (self.bytes(n, itemsize) + CTA_BYTES)
        return min(ctas, ring_threads(operation, itemsize) // self.threads)


def ring_threads(operation: str, itemsize: int) -> int:
    """Threads of a multiprocessor for which there are registers: as many as there is shared memory for, at most."""
    if itemsize == 2:
        return 640 if operation == "softmax" else 896
    return 512


def has_ring_kernel(operation: str, element: str, out_dtype: str) -> bool:
    """Whether rows_ring.cu computes this."""
    is_single = ACCUMULATE[out_dtype] == "float32" and element in (out_dtype, *widened_to(out_dtype))
    return operation in RING_OPERATIONS and is_single


def ring_schedules(operation: str, n: int, itemsize: int, device: GPU) -> list[RingSchedule]:
    """The schedules of rows_ring.cu for rows of n elements, the fewest CTAs first; of those alike, first the one that
    keeps the most exponentials and then the one that keeps the fewest.
    """
    chunks = chunks_of(n)
    if device.compute_capability != RING_CAPABILITY or not 1 < chunks <= MAX_RING_CHUNKS:
        return []
    found: dict[RingSchedule, None] = {}
    for ctas in (*cluster_sizes(device), MOST_CTAS):
        if ctas > MAX_CTAS and found:
            break
        for rounds, slots in ((1, 2), (2, 2), (1, 3), (2, 1)):
            one = RingSchedule(-(-chunks // (ctas * rounds)), ctas, rounds, slots)
            alike = [one]
            if operation == "softmax" and itemsize == 2:
                alike = [one._replace(kept_steps=steps) for steps in range(SUM_CHUNK // SUM_LANES, 0, -1)]
            alike = [one for one in alike if one.bytes(n, itemsize) <= device.shared_bytes]
            fits = one.warps <= MAX_RING_WARPS and one.threads <= ring_threads(operation, itemsize)
            fits = fits and one.warps * ctas <= MAX_RING_TEAM
            if ctas * 2 <= chunks and fits and (slots > 1 or ctas <= 2):  # pairs leave no multiprocessor idle
                found |= dict.fromkeys(alike[:1] + alike[-1:])
    return list(found)


FEW_CHUNKS = 2 * LONG_ROW // SUM_CHUNK + 1
"""Of few rows that begin anywhere, from which on the ring takes them: registers do not hold them."""


def are_few(rows: int, n: int, device: GPU) -> bool:
    """Whether rows have hardly more chunks than multiprocessors have schedulers."""
    return rows * chunks_of(n) < 4 * device.multiprocessors


def choose_ring_schedule(
    rows: int, n: int, operation: str, itemsize: int, line_up: bool, device: GPU
) -> RingSchedule | None:
    """The schedule for rows that lie side by side; None where they are left to rows.cu. `line_up`: whether rows begin
    where a vector does.

    A chunk for each warp and the next row's on its way; the fewest CTAs of which a multiprocessor holds nearly as many
    warps with a chunk as of any. Where that is a pair, and rows of 16 bits begin anywhere: one CTA, two chunks for each
    warp, and the next row's each on its way to where this row's was. Of few rows, of which the GPU holds all at a time:
    a CTA or two for each, if that is a CTA for every second multiprocessor; else the most. If it does not hold them,
    and pairs of multiprocessors are not many more than rows: such a pair for each row, without a next one.
    """
    chunks = chunks_of(n)
    is_elsewhere = operation in SUMS if line_up else are_few(rows, n, device) and chunks < FEW_CHUNKS
    if is_elsewhere:
        return None
    if operation == "softmax" and itemsize == 2 and line_up and chunks <= 8:
        return None  # of shorter rows, other kernels have more on their way
    found: dict[tuple[int, int], RingSchedule] = {}  # by CTAs and slots
    for one in ring_schedules(operation, n, itemsize, device):
        if (one.rounds, one.slots) in ((1, 2), (2, 1)):
            found.setdefault((one.ctas, one.slots), one)

    def working(one: RingSchedule) -> float:
        return one.resident_ctas(operation, n, itemsize) * chunks / one.ctas

    def hold_all(one: RingSchedule) -> bool:
        return rows * one.ctas <= device.multiprocessors * one.resident_ctas(operation, n, itemsize)

    double = [one for one in found.values() if one.slots == 2]
    if not double:
        return None
    most = max(map(working, double))
    first = next(one for one in double if working(one) >= 0.85 * most)
    if rows * first.ctas >= 2 * device.multiprocessors * first.resident_ctas(operation, n, itemsize):
        return found.get((1, 1), first) if first.ctas == 2 and itemsize == 2 and not line_up else first
    for one in double:
        fills_half = 2 * rows * one.ctas >= NEARLY_ALL * device.multiprocessors
        if operation in EXPONENTIALS and one.ctas <= 2 and hold_all(one) and fills_half:
            return one
    if (holding := next(filter(hold_all, reversed(double)), None)) is not None:
        return holding
    single = found.get((2, 1))
    return single if single and device.multiprocessors < 4 * rows <= 2 * device.multiprocessors else double[-1]


# -------------------------------------------------------------------------------------------------------------- kernels


def chunk_kernel(source: str, element: str, accumulate: str) -> Kernel:
    """A kernel of row_chunks.cu or softmax_split_rows.cu."""
    return Kernel(source, (("ELEMENT", c_type(element)), ("ACCUMULATE", C_TYPE[accumulate])))


def row_kernel(operation: str, element: str, out_dtype: str, team: str, keeps: bool = True, octets: int = 1) -> Kernel:
    """The kernel of rows.cu."""
    return Kernel(
        "rows.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("ELEMENT", c_type(element)),
            ("RESULT", C_TYPE[out_dtype] if operation in EXPONENTIALS else "any_dtype"),
            ("ACCUMULATE", C_TYPE[ACCUMULATE[out_dtype]]),
            ("TEAM", team),
            ("KEPT", str(keeps).lower()),
            ("OCTETS", octets),
            ("THREADS", (CTA_WARPS if team == LANES else MAX_WARPS if keeps else STREAMING_WARPS) * 32),
        ),
    )


def register_kernel(operation: str, element: str, schedule: RegisterSchedule) -> Kernel:
    """The kernel of register_norms.cu, register_backward.cu or register_rows.cu."""
    is_backward = operation in REGISTER_BACKWARD
    source = f"register_{'norms' if operation in REGISTER_NORMS else 'backward' if is_backward else 'rows'}.cu"
    most = schedule._replace(threads=CTA_THREADS if schedule.spread else CTA_WARPS * 32)
    return Kernel(source, _register_macros(operation, element, most))


def _register_macros(operation: str, element: str, schedule: RegisterSchedule) -> tuple[tuple[str, str | int], ...]:
    return (
        ("OPERATION", OPERATIONS[operation]),
        ("ELEMENT", c_type(element)),
        ("ACCUMULATE", C_TYPE[ACCUMULATE[element]]),
        ("WIDTH", schedule.width),
        ("GROUPS", schedule.groups),
        ("STEPS", schedule.steps),
        ("SPREAD", str(schedule.spread).lower()),
        ("LAYOUT", schedule.layout),
        ("THREADS", schedule.threads),
    )


def long_kernel(operation: str, element: str, is_narrow: bool) -> Kernel:
    """The kernel of long_variance.cu, long_norms.cu or long_backward.cu; `is_narrow`: see LongSchedule."""
    width, parts = vector_width(element), long_parts(operation, element)
    is_spread = parts > 1 or operation not in VARIANCES
    threads = long_warps(operation, element, is_narrow) * 32
    schedule = RegisterSchedule(width, GROUP_LANES // (width * parts), CTA_STEPS, is_spread, 32, threads)
    schedule = schedule.narrowed(word_width(element)) if is_narrow else schedule
    name = "backward" if operation in REGISTER_BACKWARD else "variance" if operation in VARIANCES else "norms"
    return Kernel(f"long_{name}.cu", _register_macros(operation, element, schedule))


def softmax_kernel(operation: str, element: str, most_threads: int) -> Kernel:
    """The kernel of long_softmax.cu."""
    return Kernel(
        "long_softmax.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("ELEMENT", c_type(element)),
            ("HELD", SOFTMAX_HELD),
            ("ASIDE", SOFTMAX_ASIDE if operation == "softmax" else 0),
            ("THREADS", most_threads),
        ),
    )


def ring_kernel(operation: str, element: str, out_dtype: str) -> Kernel:
    """The kernel of rows_ring.cu."""
    return Kernel(
        "rows_ring.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("ELEMENT", c_type(element)),
            ("RESULT", C_TYPE[out_dtype]),
            ("THREADS", ring_threads(operation, ITEMSIZE[element])),
        ),
    )


def widened_to(out_dtype: str) -> tuple[str, ...]:
    """The dtypes that a result of this dtype may have been widened from."""
    return ("bfloat16", "float16") if out_dtype == "float32" else ()
