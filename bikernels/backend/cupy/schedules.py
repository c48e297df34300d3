"""What decides the speed of reductions and no bit: launch shapes, and which kernel takes which layout.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from .compile import Kernel
from .launch import GPU, PORTABLE_CTAS
from .parameters import C_TYPE

FIRST_WITH_CLUSTERS = (9, 0)
"""The first compute capability that has clusters and launches that overlap."""

MAX_ROW_CHUNKS = SUM_CHUNK
"""Chunks of a row that one CTA may sum: their sums are one chunk of the next level."""

MAX_COLUMN_CHUNKS, MAX_TILE_CHUNKS = 32, 256
"""Chunks of a column (columns.cuh, column_tiles.cu): their sums, in shared memory, are one chunk of the next level."""

MIN_COLUMNS = 8
"""Neighbouring rows from which on threads lie across rows."""

GROUP_LANES = 8
"""Neighbouring lanes of the tree that a thread sums."""

ANY = "any"
"""In place of a dtype: read as whatever it is, an element at a time."""

ELEMENTS = ("bfloat16", "float16", "float32", "float64")

OPERATIONS = {
    "sum": "Mean",  # by 1
    "mean": "Mean",
    "var": "Variance",
    "std": "Variance",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "logsumexp": "LogSumExp",
    "softmax_backward": "SoftmaxBackward",
    "log_softmax_backward": "LogSoftmaxBackward",
    "rms_norm": "RmsNorm",
    "layer_norm": "LayerNorm",
    "rms_norm_backward": "RmsNormBackward",
    "layer_norm_backward": "LayerNormBackward",
    "rms_norm_weight_backward": "RmsNormWeightBackward",
    "layer_norm_weight_backward": "LayerNormWeightBackward",
}
"""The operations, and the structs in rows.cu and columns.cu that compute them."""

COLUMN_OPERATIONS = frozenset(
    {
        *("sum", "mean", "var", "std", "softmax", "log_softmax", "logsumexp"),
        *("softmax_backward", "log_softmax_backward", "rms_norm_weight_backward", "layer_norm_weight_backward"),
    }
)
"""Those that have kernels for columns."""

SUMS = frozenset(("sum", "mean"))
VARIANCES = frozenset(("var", "std"))
TERMS = {"sum": 0, "mean": 0, "rms_norm_weight_backward": 1, "layer_norm_weight_backward": 2}
"""The operations that are a sum along a column, and of what (column_chunks.cu)."""

WEIGHT_GRADIENTS = frozenset(TERMS) - SUMS
SOFTMAX_GRADIENTS = frozenset(("softmax_backward", "log_softmax_backward"))
COLUMN_GRADIENTS = WEIGHT_GRADIENTS | SOFTMAX_GRADIENTS
"""Which read the gradient of the result beside x."""

SINGLE_COLUMN_OPERATIONS = COLUMN_OPERATIONS - SOFTMAX_GRADIENTS
"""Those that columns.cu has."""

EXPONENTIALS = frozenset(("softmax", "log_softmax", "logsumexp"))
"""Their kernels differ by the result's dtype."""

SPLIT = SUMS | {"softmax", "log_softmax"}
"""Operations that may be spread over the GPU chunk by chunk."""

# --------------------------------------------------------------------------------------------------------------- rows

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
MAX_CTAS, MOST_CTAS = PORTABLE_CTAS, 16
"""Of a cluster; the second, where it can be had, of rows that fit no other."""
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


def chunks_of(n: int) -> int:
    """Chunks of a row of n elements."""
    return -(-n // SUM_CHUNK)


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
    for ctas in _cluster_sizes(device):
        for rounds in (1, 2, 4, ROUNDS) if of.element[CTA] else (1, 2, 4, ROUNDS, -(-chunks // (ctas * MAX_WARPS))):
            warps = -(-chunks // (ctas * rounds))
            schedule = RowSchedule(CTA if ctas == 1 else CLUSTER, 32, warps, ctas)
            fits = of.bytes(schedule, n) <= device.shared_bytes and chunks <= SUM_CHUNK
            if ctas <= chunks and warps <= MAX_WARPS and fits:
                found[schedule] = None
    return list(found)


def streaming_schedule(device: GPU) -> RowSchedule:
    """The schedule that reads a row anew whenever it is used."""
    ctas = _cluster_sizes(device)[-1]
    return RowSchedule(CTA if ctas == 1 else CLUSTER, 32, STREAMING_WARPS, ctas, keeps=False)


def _cluster_sizes(device: GPU) -> tuple[int, ...]:
    return (1, 2, 4, MAX_CTAS) if device.compute_capability >= FIRST_WITH_CLUSTERS else (1,)


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


# --------------------------------------------------------------------------------------------------- rows in registers

REGISTER_NORMS = VARIANCES | {"rms_norm", "layer_norm"}
"""Those that register_norms.cu has."""
REGISTER_BACKWARD = frozenset(("softmax_backward", "log_softmax_backward", "rms_norm_backward", "layer_norm_backward"))
"""Those that register_backward.cu has."""
REGISTER_OPERATIONS = SUMS | {"softmax", "log_softmax"} | REGISTER_NORMS | REGISTER_BACKWARD
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
NEARLY_LONG = {("log_softmax", element) for element in ("bfloat16", "float16", "float32")} | {("softmax", "float32")}
"""Operations and dtypes of which longer rows, twice as long at most, are a CTA's where they are many."""
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

    @property
    def rows(self) -> int:
        """Of a CTA."""
        return 1 if self.spread else self.threads // self.lanes


def register_schedules(operation: str, n: int, element: str) -> list[RegisterSchedule]:
    """The schedules for rows of n elements, if their layout allows any; the fewest threads of a row first."""
    vector, is_sum, is_double = vector_width(element), operation in SUMS, element == "float64"
    found = []
    if n <= SUM_LANES:
        vectors = 1 << (-(-n // vector) - 1).bit_length()
        for elements in (MANY_ELEMENTS[element], GROUP_LANES):
            groups = elements // vector
            is_many = elements > GROUP_LANES
            if is_many and (operation in REGISTER_BACKWARD or vectors < 4 * groups):
                continue  # a row costs too little, or neighbours would read too far apart
            found.append(RegisterSchedule(vector, groups, 1, False, max(1, vectors // groups), CTA_WARPS * 32))
    elif n <= WARP_STEPS * SUM_LANES:
        if is_double and not is_sum:  # of which a warp could keep few rows, and computes long
            found.append(RegisterSchedule(2, 1, WARP_STEPS, True, 32, SUM_LANES // 2))
        else:
            groups = GROUP_LANES // vector
            found.append(RegisterSchedule(vector, groups, WARP_STEPS, False, 32, CTA_WARPS * 32))
    elif not is_sum:
        for width, groups in _spread_vectors(operation, n, element):
            threads = chunks_of(n) * SUM_LANES // (width * groups)
            if threads <= CTA_THREADS:
                found.append(RegisterSchedule(width, groups, CTA_STEPS, True, 32, threads))
    return found


def _spread_vectors(operation: str, n: int, element: str) -> list[tuple[int, int]]:
    """The widths and groups of vectors where a row is a CTA's, of as many elements as a thread has registers for, the
    most first.
    """
    if _is_nearly_long(operation, n, element):
        return [(vector_width(element), GROUP_LANES // vector_width(element))]
    return [(width, 1) for width in _spread_widths(operation, n, element)]


def _is_nearly_long(operation: str, n: int, element: str) -> bool:
    """Whether a thread has 8 elements of 256; of softmax of 16 bits, exponentials would take twice the registers."""
    return n > LONG_ROW and (operation, element) in NEARLY_LONG


def _spread_widths(operation: str, n: int, element: str) -> tuple[int, ...]:
    """Elements of a thread in 256, in one vector."""
    if element == "float64":
        return (4, 2) if operation in EXPONENTIALS and n > SUM_CHUNK * 4 else (2,)
    if operation in REGISTER_BACKWARD:  # which has more operands
        if operation in SOFTMAX_GRADIENTS and ITEMSIZE[element] == 2 and n <= SUM_CHUNK * 2:
            return (4, 2)
        return (4,) if ITEMSIZE[element] == 2 or n > SUM_CHUNK * 4 else (2,)
    if operation in REGISTER_NORMS and ITEMSIZE[element] == 2:
        return (8, 2) if n <= SUM_CHUNK * 4 else (8,)
    return (4, 2)


def choose_register_schedule(operation: str, rows: int, n: int, element: str, device: GPU) -> RegisterSchedule | None:
    """The schedule of the fewest threads of a row that fill the GPU (of gradients, half of it), else of the most; None
    for long rows, and for few of those that are nearly as long.
    """
    if device.compute_capability < FIRST_WITH_PAIRS or n == 0:
        return None
    found = register_schedules(operation, n, element)
    enough = THREADS_OF_A_MULTIPROCESSOR * device.multiprocessors // (2 if operation in REGISTER_BACKWARD else 1)
    for one in found:
        if rows * one.threads >= enough * one.rows:
            return one
    if not found or _is_nearly_long(operation, n, element):  # of few such rows, a cluster has more on its way
        return None
    return found[-1]


# ----------------------------------------------------------------------------------------- long rows that are read once

LONG_OPERATIONS = VARIANCES | REGISTER_BACKWARD
"""Those that have such kernels: long_variance.cu and long_backward.cu."""


def long_parts(operation: str, element: str) -> int:
    """Warps that share a chunk: of a whole one, a thread may have more elements than registers."""
    if operation in REGISTER_BACKWARD:
        return GROUP_LANES // vector_width(element)
    return 4 if element == "float64" else 1


def long_warps(operation: str, element: str) -> int:
    """Of a CTA, at most: for as many there are registers."""
    if operation in REGISTER_BACKWARD:
        return 16
    return 32 if element == "float64" else 20


class LongSchedule(NamedTuple):
    """How CTAs share long rows that are read once."""

    warps: int
    """Of a CTA, with a chunk each or a part of it."""
    ctas: int
    """Of a row."""

    @property
    def threads(self) -> int:
        return self.warps * 32

    def bytes(self, operation: str, n: int, element: str) -> int:
        """Of shared memory: elements, and four times the chunks' sums."""
        parts, sums = long_parts(operation, element), 32 << long_bits(n)
        arrays = 2 if operation in REGISTER_BACKWARD else 1
        elements = arrays * self.warps * SUM_CHUNK // parts * ITEMSIZE[element]
        return elements + 4 * parts * sums * ITEMSIZE[ACCUMULATE[element]]


def long_bits(n: int) -> int:
    """A thread adds up the sums of 2^bits chunks."""
    return (_ceil(chunks_of(n), 32) - 1).bit_length()


def long_schedules(operation: str, n: int, element: str, device: GPU) -> list[LongSchedule]:
    """The schedules for rows of n elements, if there are any; the fewest CTAs first."""
    chunks, parts, found = chunks_of(n), long_parts(operation, element), list[LongSchedule]()
    has_kernel = operation in LONG_OPERATIONS and element in ELEMENTS
    most = SUM_LANES if parts == 1 else SUM_LANES // 2  # chunks of which a warp adds up the sums
    if not has_kernel or not 2 <= chunks <= most or device.compute_capability < FIRST_WITH_CLUSTERS:
        return found
    for ctas in (*_cluster_sizes(device), MOST_CTAS):
        one = LongSchedule(_ceil(chunks, ctas) * parts, ctas)
        is_held = one.warps <= long_warps(operation, element)
        fits = is_held and one.bytes(operation, n, element) <= device.shared_bytes
        fits = fits and (ctas > 1 or operation in VARIANCES)  # which send their sums as only clusters can
        if ctas <= chunks and fits and (ctas <= MAX_CTAS or not found):
            found.append(one)
    return found


def choose_long_schedule(operation: str, rows: int, n: int, element: str, device: GPU) -> LongSchedule | None:
    """A CTA for each row, else the fewest of which a multiprocessor holds two, so that one reads while another waits
    (of gradients, which always read: the fewest); the most where rows are few. None if there is no schedule.
    """
    found, is_gradient = long_schedules(operation, n, element, device), operation in REGISTER_BACKWARD
    for one in found:
        is_small = one.ctas == 1 or one.warps <= long_warps(operation, element) // 2
        if rows * one.ctas >= device.multiprocessors and (is_gradient or is_small):
            return one
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------------------ rows in a ring

RING_CAPABILITY = (9, 0)
"""The compute capability that rows_ring.cu is for."""
RING_OPERATIONS = SUMS | EXPONENTIALS
MAX_RING_CHUNKS = 256
"""Of a row: what a warp sums at once."""
MAX_RING_WARPS = 20
"""Of a CTA."""
RING_AREAS = 4
"""For what the warps exchange."""
MAX_RING_TEAM = 160
"""Warps of a team."""
MULTIPROCESSOR_BYTES, CTA_BYTES = 228 * 1024, 1024
"""Shared memory of a multiprocessor, and what the system takes of it for each CTA."""


class RingSchedule(NamedTuple):
    """How the warps of rows_ring.cu share rows."""

    warps: int
    """Of a CTA."""
    ctas: int
    """Of a cluster."""
    rounds: int
    """Chunks of a warp."""
    slots: int
    """Rows that a warp keeps; with one, a team has one row."""
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
        of_slot = self.rounds * (SUM_CHUNK * itemsize + 32) + 8
        of_kept = self.rounds * self.kept_steps * SUM_LANES * 2
        return self.warps * (self.slots * of_slot + of_kept) + RING_AREAS * (8 + self.area_bytes(n))

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
    is_single = ACCUMULATE[out_dtype] == "float32" and element in (out_dtype, *_widened_to(out_dtype))
    return operation in RING_OPERATIONS and is_single


def ring_schedules(operation: str, n: int, itemsize: int, device: GPU) -> list[RingSchedule]:
    """The schedules of rows_ring.cu for rows of n elements, the fewest CTAs first; of those alike, first the one that
    keeps the most exponentials and then the one that keeps the fewest.
    """
    chunks = chunks_of(n)
    if device.compute_capability != RING_CAPABILITY or not 1 < chunks <= MAX_RING_CHUNKS:
        return []
    found: dict[RingSchedule, None] = {}
    for ctas in (*_cluster_sizes(device), MOST_CTAS):
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
            if ctas * 2 <= chunks and fits and (slots > 1 or ctas == 2):  # pairs leave no multiprocessor idle
                found |= dict.fromkeys(alike[:1] + alike[-1:])
    return list(found)


def choose_ring_schedule(
    rows: int, n: int, operation: str, itemsize: int, line_up: bool, device: GPU
) -> RingSchedule | None:
    """The schedule for rows that lie side by side; None where they are left to rows.cu. `line_up`: whether rows begin
    where a vector does.

    A chunk for each warp and the next row's on its way; the fewest CTAs of which a multiprocessor holds nearly as many
    warps with a chunk as of any. Of few rows, the most CTAs of which the GPU holds those of all rows at a time. If that
    is none, and pairs of multiprocessors are not many more than rows: such a pair for each row, without a next one.
    """
    chunks = chunks_of(n)
    is_few = rows * chunks < 4 * device.multiprocessors
    if (is_few and chunks < 64) or (operation in SUMS and line_up):
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
        return first
    if (holding := next(filter(hold_all, reversed(double)), None)) is not None:
        return holding
    single = found.get((2, 1))
    return single if single and device.multiprocessors < 4 * rows <= 2 * device.multiprocessors else double[-1]


def teams(rows: int, resident: int) -> int:
    """How many teams take the rows; `resident`: how many work at a time."""
    return min(rows, resident)


# ------------------------------------------------------------------------------------------------------------ columns


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


def vector_width(element: str) -> int:
    """Columns of a 16-byte vector."""
    return 1 if element == ANY else 16 // ITEMSIZE[element]


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
        return chunks > 2 * MAX_CTAS and _ceil(columns, vector_width(element)) * MAX_CTAS < device.multiprocessors

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
        groups = _ceil(chunks_of(n) * self.parts, self.ctas) * self.lanes * rounds
        return groups if self.keeps else self.depth if goes_on else min(self.depth, groups)

    def bytes(self, n: int, accumulate: str, goes_on: bool = True) -> int:
        """Of shared memory: elements, two times the sums of each warp, those of pieces, maxima, values, counts."""
        elements = self.room(n, goes_on) * min(AT_ONCE, _ceil(n, SUM_LANES)) * self.arrays * TILE_THREADS * 16
        ctas = 1 if self.spread else self.ctas
        pieces = chunks_of(n) * self.parts
        sums = 2 * (_ceil(pieces, 8) if self.spread else pieces)  # of two passes
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
    sizes = _cluster_sizes(device)
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
                team = _ceil(pieces, rounds)
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
    if _ceil(across, PREFERRED_BYTES_ACROSS // 2) * MAX_CTAS >= device.multiprocessors:
        if operation in SOFTMAX_GRADIENTS:
            return None
        for one in spread_schedules(n, element, operation, device, True):
            sums = one.tile * one.parts * chunks_of(n)
            is_wide = PREFERRED_BYTES_ACROSS // 2 <= one.vectors * 16 <= PREFERRED_BYTES_ACROSS
            holds_several = one.resident(n, element, operation, device) == KEEPING_CTAS * device.multiprocessors
            is_much = _ceil(columns, one.tile) * one.ctas >= 2 * KEEPING_CTAS * device.multiprocessors
            fits_once = holds_several and one.ctas <= device.multiprocessors
            if is_wide and is_much and fits_once and one.ctas > MOST_CTAS and sums <= MAX_TEAM_SUMS:
                return one
        return None
    row = max(16, _power_of_two(across))

    def us(one: TileSchedule) -> float:
        tiles, pieces = _ceil(columns, one.tile), chunks_of(n) * one.parts
        teams = min(tiles, one.resident(n, element, operation, device) // one.ctas)
        turns = _ceil(tiles, teams)
        of_cta = turns * _ceil(pieces, one.ctas) * (one.arrays * one.vectors * 16 * SUM_CHUNK // one.parts)
        of_multiprocessor = of_cta * _ceil(teams * one.ctas, device.multiprocessors)
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
    row = max(16, _power_of_two(columns * ITEMSIZE[element]))
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
        ctas, across = _ceil(columns, one.tile) * one.ctas * times, one.vectors * 16
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
        tiles = _ceil(columns, one.tile)
        at_once = min(tiles, STREAMING_CTAS * device.multiprocessors // one.ctas)
        fits = at_once * one.vectors * 16 * n <= L2_BYTES and tiles <= L2_ROUNDS * at_once
        if fits and at_once * one.ctas >= device.multiprocessors and one.ctas <= 2 and one.vectors >= 4:
            return one
    return max(streaming, key=lambda one: _reading_speed(one, columns, n, 1, device))


def _reading_speed(one: TileSchedule, columns: int, n: int, times: int, device: GPU) -> float:
    """Relative to the fastest: the share of multiprocessors that have work to the end, and what an H200 has shown.

    Of two arrays an H100 has shown that half of the multiprocessors, a long tile each, read all that memory gives.
    """
    ctas = _ceil(columns, one.tile) * one.ctas * times
    is_alone = ctas <= device.multiprocessors
    if is_alone and one.arrays > 1 and n >= SUM_CHUNK:
        share = ctas / device.multiprocessors
        of_cluster = {1: 0.96, 2: 1.0, 4: 0.97 if share < 0.75 else 0.85, 8: 0.95}[one.ctas]
        return min(1.0, OF_WIDTH[one.vectors]) * of_cluster * min(1.0, 2.5 * share) * share**0.02
    of_cluster = {1: 1.0, 2: 0.93, 4: 0.72, 8: 0.6}[one.ctas]
    places = device.multiprocessors * (1 if is_alone else STREAMING_CTAS)
    return OF_WIDTH[one.vectors] * of_cluster * (0.9 if is_alone else 1.0) * ctas / (_ceil(ctas, places) * places)


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

# ------------------------------------------------------------------------------------------- variances of tall columns

TALL_THREADS, TALL_LANES, TALL_PLACES = 512, 2, 3
"""Of a CTA; lanes of a thread (tall_variance.cu), and those that it has in shared memory."""
TALL_COLUMNS = SUM_CHUNK // 2
"""Elements, up to which other kernels are faster: a chunk would be filled by half."""
TALL_WORD_BYTES = 32
"""Of a column's sums, that a thread reads at once where a team meets."""


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
        return _power_of_two(_ceil(self.ctas, TALL_WORD_BYTES // self.itemsize))

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
    return next((one for one in found if one.vectors * 16 <= PREFERRED_BYTES_ACROSS or one.ctas <= MAX_CTAS), None)


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
    groups = _power_of_two(_ceil(max(n, 1), GROUP_LANES))
    return ShortSchedule(groups, min(max(32, 256 // groups), SHORT_THREADS // groups, _power_of_two(columns)))


WEIGHT_ROWS = 2 * SUM_LANES
"""Of a batch that has few, at most (weight_tiles.cu)."""
WEIGHT_AT_ONCE = 4
"""Elements of a thread, each of another lane or, of more than SUM_LANES, two of each lane."""
WEIGHT_THREADS = 1024
"""Of a CTA, at most."""


class WeightSchedule(NamedTuple):
    """How threads share columns of at most WEIGHT_ROWS elements (weight_tiles.cu)."""

    vectors: int
    """Side by side: threads of a tile."""
    groups: int
    """Threads that have the same columns."""

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return self.vectors * self.groups

    def bytes(self, element: str) -> int:
        """Of shared memory: sums of each warp, where there are several."""
        warps = self.threads // 32
        return warps * self.vectors * 16 * ITEMSIZE[ACCUMULATE[element]] // ITEMSIZE[element] if warps > 1 else 0


def weight_schedules(n: int) -> list[WeightSchedule]:
    """The schedules for columns of n elements, the narrowest tiles first."""
    groups = _power_of_two(_ceil(n, WEIGHT_AT_ONCE))
    found = (WeightSchedule(vectors, groups) for vectors in (1, 2, 4, 8, 16, 32))
    return [one for one in found if 32 <= one.threads <= WEIGHT_THREADS]


def choose_weight_schedule(columns: int, n: int, element: str) -> WeightSchedule:
    """Tiles of whole lines, or half as wide where that leaves few."""
    whole = PREFERRED_BYTES_ACROSS // 16
    wanted = whole if columns * ITEMSIZE[element] >= FEW_LINES * PREFERRED_BYTES_ACROSS else whole // 2
    return min(weight_schedules(n), key=lambda one: abs(one.vectors - wanted))


FEW_LINES = 32
"""Of an element of all columns."""

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
    return TILE_THREADS // max(TILE_THREADS // 32, _power_of_two(_ceil(max(n, 1), GROUP_LANES)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


# ------------------------------------------------------------------------------------------------------------ kernels


def element_of(x_dtype: str, accumulate: str, rounds: bool) -> str:
    """As what x is read: its dtype, if that accumulates so and is not rounded first; else ANY."""
    return x_dtype if x_dtype in ELEMENTS and ACCUMULATE[x_dtype] == accumulate and not rounds else ANY


def c_type(element: str) -> str:
    """The type in CUDA C++ of a dtype, or of ANY."""
    return "any_dtype" if element == ANY else C_TYPE[element]


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
        ("THREADS", schedule.threads),
    )


def long_kernel(operation: str, element: str) -> Kernel:
    """The kernel of long_variance.cu or long_backward.cu."""
    width, is_backward = vector_width(element), operation in REGISTER_BACKWARD
    is_spread = is_backward or long_parts(operation, element) > 1
    groups = 1 if is_spread else GROUP_LANES // width
    threads = long_warps(operation, element) * 32
    schedule = RegisterSchedule(width, groups, CTA_STEPS, is_spread, 32, threads)
    source = f"long_{'backward' if is_backward else 'variance'}.cu"
    return Kernel(source, _register_macros(operation, element, schedule))


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


def weight_kernel(operation: str, element: str) -> Kernel:
    """The kernel of weight_tiles.cu."""
    return Kernel(
        "weight_tiles.cu",
        (
            *(one for one in _typed_macros(operation, element, element) if one[0] != "RESULT"),
            ("AT_ONCE", WEIGHT_AT_ONCE),
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


def reduction_kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel of the reductions that can be launched on a GPU of this compute capability (90 for 9.0)."""
    has_clusters = compute_capability >= 10 * FIRST_WITH_CLUSTERS[0]
    found: dict[Kernel, None] = {}
    for element, accumulate in (*ACCUMULATE.items(), (ANY, "float32"), (ANY, "float64")):
        for source in ("row_chunks.cu", "softmax_split_rows.cu"):
            found[chunk_kernel(source, element, accumulate)] = None
        for operation in TERMS:
            found[column_chunk_kernel(operation, element, accumulate)] = None
        for operation in filter(SINGLE_COLUMN_OPERATIONS.__contains__, OPERATIONS):
            for in_cluster in (False, True) if has_clusters else (False,):
                found[column_kernel(operation, element, accumulate, in_cluster)] = None
        for operation in filter(REGISTER_OPERATIONS.__contains__, OPERATIONS):
            lengths = (1, SUM_LANES, WARP_STEPS * SUM_LANES, SUM_CHUNK, LONG_ROW, 2 * LONG_ROW)
            for n in lengths if element in ELEMENTS else ():
                for schedule in register_schedules(operation, n, element):
                    found[register_kernel(operation, element, schedule)] = None
        if has_clusters and element in ELEMENTS:
            for operation in filter(("var", *REGISTER_BACKWARD).__contains__, OPERATIONS):
                found[long_kernel(operation, element)] = None
            found[tall_kernel(element)] = None
        if element != ANY:
            for operation in filter(COLUMN_OPERATIONS.__contains__, OPERATIONS):
                one = TileSchedule(vector_width(element), 1, 1, 1, False, False, arrays_of(operation))
                ways = [one._replace(keeps=keeps, spread=spread) for keeps in (False, True) for spread in (False, True)]
                if operation in TERMS:
                    found[tile_kernel(operation, element, accumulate, one, of_chunks=True)] = None
                for out_dtype in (element, accumulate):
                    for way in ways if PASSES[operation] > 1 else ways[:1]:
                        found[tile_kernel(operation, element, out_dtype, way)] = None
                    found[short_kernel(operation, element, out_dtype)] = None
                if operation in WEIGHT_GRADIENTS:
                    found[weight_kernel(operation, element)] = None
                if operation in SHORT_TILE_OPERATIONS:
                    found[short_tile_kernel(operation, element, accumulate)] = None
        for operation in OPERATIONS:
            for out_dtype in ELEMENTS:
                if compute_capability == 90 and has_ring_kernel(operation, element, out_dtype):
                    found[ring_kernel(operation, element, out_dtype)] = None
                if ACCUMULATE[out_dtype] == accumulate and element in (ANY, out_dtype, *_widened_to(out_dtype)):
                    for team in (LANES, CTA, CLUSTER) if has_clusters else (LANES, CTA):
                        found[row_kernel(operation, element, out_dtype, team)] = None
                    found[row_kernel(operation, element, out_dtype, LANES, octets=OCTETS)] = None
                    if operation not in SPLIT:
                        team = CLUSTER if has_clusters else CTA
                        found[row_kernel(operation, element, out_dtype, team, keeps=False)] = None
    yield from found


def _widened_to(out_dtype: str) -> tuple[str, ...]:
    return ("bfloat16", "float16") if out_dtype == "float32" else ()
