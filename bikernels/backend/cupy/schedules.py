"""What decides the speed of reductions and no bit: launch shapes, and which kernel takes which layout.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from .compile import Kernel
from .launch import GPU
from .parameters import C_TYPE

FIRST_WITH_CLUSTERS = (9, 0)
"""The first compute capability that has clusters and launches that overlap."""

MAX_ROW_CHUNKS = SUM_CHUNK
"""Chunks of a row that one CTA may sum: their sums are one chunk of the next level."""

MAX_TEAM_CHUNKS = SUM_LANES
"""Chunks of a row of a team: their sums are a chunk with one element a lane (team.cuh)."""

MAX_COLUMN_CHUNKS = 32
"""Chunks of a column: their sums are a warp's (columns.cuh)."""

MIN_COLUMNS = 8
"""Neighbouring rows from which on threads lie across rows."""

GROUP_LANES = 8
"""Neighbouring lanes of the tree that a thread sums."""

ANY = "any"
"""In place of a dtype: read as whatever it is, an element at a time."""

ELEMENTS = ("bfloat16", "float16", "float32", "float64")

OPERATIONS = {"mean": "Mean", "log_softmax": "LogSoftmax", "softmax": "Softmax"}
"""The operations, and the structs in rows.cu and columns.cu that compute them."""

# --------------------------------------------------------------------------------------------------------------- rows

LANES, CTA, CLUSTER = "LANES", "CTA", "CLUSTER"

CTA_WARPS = 4
"""Of a CTA, where a row is a warp's or part of one's."""
MAX_WARPS = 16
"""Of a CTA."""
MAX_CTAS = 8
"""Of a cluster, on every GPU that has clusters."""
MAX_ROUNDS = 4
"""Chunks that a warp keeps: a bit for each of its steps (rows.cu)."""
PREFERRED_WARPS = 10
"""Of a CTA: with more, a multiprocessor holds too few CTAs for one to read while another computes."""


class RowSchedule(NamedTuple):
    """How threads share a row (team.cuh)."""

    team: str
    lanes: int
    """Of a warp: 32 unless the team is smaller."""
    warps: int
    """Of a CTA."""
    ctas: int
    """Of a team."""

    @property
    def rows(self) -> int:
        """Of a CTA, or of a cluster."""
        return self.warps * 32 // self.lanes if self.team == LANES else 1

    def rounds(self, n: int) -> int:
        """Chunks of a warp."""
        return 1 if self.team == LANES else max(1, -(-chunks_of(n) // (self.warps * self.ctas)))


class Kept(NamedTuple):
    """Bytes of shared memory that a row takes."""

    element: int
    """For each element."""
    accumulate: int
    """Of a partial sum."""

    def of_warp(self, schedule: RowSchedule, n: int) -> int:
        """For the elements of a warp, in steps of SUM_LANES of them."""
        elements = -(-n // SUM_LANES) * SUM_LANES if schedule.team == LANES else schedule.rounds(n) * SUM_CHUNK
        return elements * self.element

    def bytes(self, schedule: RowSchedule, n: int) -> int:
        """Of a CTA. Behind the elements, where there are several warps: an array of the warps' maxima, two of chunks'
        sums, one of counts.
        """
        exchanged = 0
        if schedule.team != LANES:
            exchanged = max(schedule.warps * schedule.ctas, chunks_of(n)) * (3 * self.accumulate + 4)
        return schedule.warps * self.of_warp(schedule, n) + exchanged


def chunks_of(n: int) -> int:
    """Chunks of a row of n elements."""
    return -(-n // SUM_CHUNK)


def kept(operation: str, element: str, accumulate: str) -> Kept:
    """What an operation keeps of rows; those that are read as ANY are kept in the accumulate dtype."""
    stored = ITEMSIZE[accumulate if element == ANY else element]
    element_bytes = {"mean": 0, "log_softmax": stored}.get(operation, ITEMSIZE[accumulate])
    return Kept(element_bytes, ITEMSIZE[accumulate])


def row_schedules(n: int, of: Kept, device: GPU) -> list[RowSchedule]:
    """The schedules for rows of n elements that fit, the fewest CTAs first."""
    if n <= SUM_CHUNK:
        lanes = min(32, 1 << max(0, -(-n // GROUP_LANES) - 1).bit_length())
        return [RowSchedule(LANES, lanes, CTA_WARPS, 1)]
    chunks, found = chunks_of(n), []
    most = MAX_CTAS if device.compute_capability >= FIRST_WITH_CLUSTERS else 1
    for ctas in (1, 2, 4, 8):
        if ctas > most or ctas > chunks or chunks > MAX_TEAM_CHUNKS:
            continue
        for warps in {min(MAX_WARPS, -(-chunks // ctas)), max(1, -(-chunks // (2 * ctas)))}:
            schedule = RowSchedule(CTA if ctas == 1 else CLUSTER, 32, warps, ctas)
            rounds_fit = schedule.rounds(n) <= MAX_ROUNDS or of.element == 0
            if warps <= MAX_WARPS and rounds_fit and of.bytes(schedule, n) <= device.shared_bytes:
                found.append(schedule)
    return sorted(found, key=lambda one: (one.ctas, one.rounds(n), one.warps))


def choose_row_schedule(rows: int, n: int, of: Kept, device: GPU) -> RowSchedule | None:
    """The fewest CTAs that fill the GPU, with few warps each; None if no schedule fits."""
    found = row_schedules(n, of, device)
    fewest = [one for one in found if one.rounds(n) == min(other.rounds(n) for other in found)]
    for one in fewest:
        if one.warps <= PREFERRED_WARPS and rows * one.ctas >= one.rows * device.multiprocessors:
            return one
    return fewest[-1] if fewest else None


def splits_rows(rows: int, n: int, device: GPU, fits: bool) -> bool:
    """Whether rows are spread over the GPU chunk by chunk: none of `row_schedules` fits, or too few CTAs would work."""
    if not fits:
        return True
    if device.compute_capability >= FIRST_WITH_CLUSTERS:
        return chunks_of(n) > MAX_CTAS * MAX_WARPS and rows * MAX_CTAS * 2 < device.multiprocessors
    return chunks_of(n) >= 32 and rows < device.multiprocessors


# ------------------------------------------------------------------------------------------------------------ columns


class ColumnSchedule(NamedTuple):
    """How threads share columns (columns.cuh)."""

    width: int
    """Columns of a thread: those of a 16-byte vector, or 1."""
    groups: int
    """Threads that share a column in a CTA."""
    ctas: int
    """That share a tile."""

    @property
    def threads(self) -> int:
        return column_threads(self.width)

    @property
    def bits(self) -> int:
        return self.groups.bit_length() - 1

    @property
    def tile(self) -> int:
        """Columns."""
        return self.threads // self.groups * self.width

    def bytes(self, n: int, accumulate: str) -> int:
        """Of shared memory: partial sums, the chunks' sums, maxima and counts of each CTA."""
        elements = self.groups * (self.tile + 1) + (max(1, chunks_of(n)) + 2 * self.ctas) * self.tile
        return elements * ITEMSIZE[accumulate]


def column_threads(width: int) -> int:
    """Of a CTA: 32 columns side by side or more, for every group of lanes."""
    return 256 if width > 1 else 1024


def vector_width(element: str) -> int:
    """Columns of a 16-byte vector."""
    return 1 if element == ANY else 16 // ITEMSIZE[element]


def column_schedules(n: int, width: int, device: GPU) -> list[ColumnSchedule]:
    """The schedules for columns of n elements, of which a thread takes `width`, the fewest CTAs first."""
    lanes = min(max(n, 1), SUM_LANES)
    groups = 1 << max(0, -(-lanes // GROUP_LANES) - 1).bit_length()
    most = MAX_CTAS if device.compute_capability >= FIRST_WITH_CLUSTERS else 1
    return [ColumnSchedule(width, groups, ctas) for ctas in (1, 2, 4, 8) if ctas <= min(most, max(1, chunks_of(n)))]


def choose_column_schedule(columns: int, n: int, width: int, device: GPU) -> ColumnSchedule:
    """The fewest CTAs of which there are two for every multiprocessor."""
    found = column_schedules(n, width, device)
    for one in found:
        if -(-columns // one.tile) * one.ctas >= 2 * device.multiprocessors:
            return one
    return found[-1]


def splits_columns(columns: int, n: int, width: int, device: GPU, first: bool) -> bool:
    """Whether a sum along a strided axis is spread over CTAs, a chunk each; `first`: not yet, at the first level."""
    chunks = chunks_of(n)
    if chunks > MAX_COLUMN_CHUNKS:
        return True
    most = column_schedules(n, width, device)[-1]
    return first and chunks > most.ctas and -(-columns // most.tile) * most.ctas < device.multiprocessors


# ------------------------------------------------------------------------------------------------------------ kernels


def element_of(x_dtype: str, accumulate: str, rounds: bool) -> str:
    """As what x is read: its dtype, if that accumulates so and is not rounded first; else ANY."""
    return x_dtype if x_dtype in ELEMENTS and ACCUMULATE[x_dtype] == accumulate and not rounds else ANY


def _c_type(element: str) -> str:
    return "any_dtype" if element == ANY else C_TYPE[element]


def chunk_kernel(source: str, element: str, accumulate: str) -> Kernel:
    """A kernel of row_chunks.cu or softmax_split_rows.cu."""
    return Kernel(source, (("ELEMENT", _c_type(element)), ("ACCUMULATE", C_TYPE[accumulate])))


def row_kernel(operation: str, element: str, out_dtype: str, team: str) -> Kernel:
    """The kernel of rows.cu."""
    return Kernel(
        "rows.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("ELEMENT", _c_type(element)),
            ("RESULT", "any_dtype" if operation == "mean" else C_TYPE[out_dtype]),
            ("ACCUMULATE", C_TYPE[ACCUMULATE[out_dtype]]),
            ("TEAM", team),
            ("THREADS", MAX_WARPS * 32),
        ),
    )


def column_kernel(operation: str, element: str, accumulate: str, width: int, in_cluster: bool) -> Kernel:
    """The kernel of columns.cu."""
    return Kernel(
        "columns.cu",
        (
            ("OPERATION", OPERATIONS[operation]),
            ("IN_CLUSTER", str(in_cluster).lower()),
            *_column_macros(element, accumulate, width),
        ),
    )


def column_chunk_kernel(element: str, accumulate: str, width: int) -> Kernel:
    """The kernel of column_chunks.cu."""
    return Kernel("column_chunks.cu", _column_macros(element, accumulate, width))


def _column_macros(element: str, accumulate: str, width: int) -> tuple[tuple[str, str | int], ...]:
    return (
        ("ELEMENT", _c_type(element)),
        ("ACCUMULATE", C_TYPE[accumulate]),
        ("WIDTH", width),
        ("THREADS", column_threads(width)),
    )


def reduction_kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel of the reductions that can be launched on a GPU of this compute capability (90 for 9.0)."""
    has_clusters = compute_capability >= 10 * FIRST_WITH_CLUSTERS[0]
    found: dict[Kernel, None] = {}
    for element, accumulate in (*ACCUMULATE.items(), (ANY, "float32"), (ANY, "float64")):
        for source in ("row_chunks.cu", "softmax_split_rows.cu"):
            found[chunk_kernel(source, element, accumulate)] = None
        for width in {1, vector_width(element)}:
            found[column_chunk_kernel(element, accumulate, width)] = None
            for operation in OPERATIONS:
                for in_cluster in (False, True) if has_clusters else (False,):
                    found[column_kernel(operation, element, accumulate, width, in_cluster)] = None
        for operation in OPERATIONS:
            for out_dtype in ELEMENTS:
                if ACCUMULATE[out_dtype] == accumulate and element in (ANY, out_dtype, *_widened_to(out_dtype)):
                    for team in (LANES, CTA, CLUSTER) if has_clusters else (LANES, CTA):
                        found[row_kernel(operation, element, out_dtype, team)] = None
    yield from found


def _widened_to(out_dtype: str) -> tuple[str, ...]:
    return ("bfloat16", "float16") if out_dtype == "float32" else ()
