"""Products as chains of fma in the accumulate dtype: any dtype, any layout, any GPU.

Two kernels: matmul_fma.cu is made for arithmetic, matmul_fma_narrow.cu for few columns, where reading the other operand
takes the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ....contract import ACCUMULATE, ITEMSIZE
from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import gpu
from ..parameters import C_TYPE
from .launch import prepare_tiles
from .problem import BAND, Cycles, Problem, along_k, lies_in_vectors, resident_ctas, tiles_of

NARROW_COMPUTE_CAPABILITY = (8, 0)
"""The least one that has cp.async and the shared memory for `Narrow`."""

ANY_NUMBER = 2**62
"""Of tiles; more than there are."""

SINGLY = 1.3
"""How much longer a `Narrow` tile takes whose elements are copied one by one, an estimate."""

OVERLAPPING_COMPUTE_CAPABILITY = (9, 0)
"""The least one whose launches overlap."""


class CTA(NamedTuple):
    """What a launch needs of a schedule."""

    m: int
    n: int
    threads: int
    shared_bytes: int


class Wide(NamedTuple):
    """A tile and how a CTA goes over it; see matmul_fma.cu."""

    m: int
    n: int
    k: int
    thread_m: int
    thread_n: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""
    cycles: Cycles

    @property
    def function(self) -> str:
        return "matmul_fma"

    @property
    def early(self) -> bool:
        return False

    def resident(self, dtype: str) -> int:
        """Tiles that a multiprocessor takes at once: as many as there are, for all that it matters."""
        return ANY_NUMBER

    def cta(self, dtype: str) -> CTA:
        shared = 2 * (self.m + self.n) * self.k * ITEMSIZE[ACCUMULATE[dtype]]
        return CTA(self.m, self.n, self.m // self.thread_m * (self.n // self.thread_n), shared)

    def kernel(self, dtype: str, a_along_k: bool, b_along_k: bool) -> Kernel:
        return Kernel(
            "matmul_fma.cu",
            (
                *_macros(self, dtype),
                ("CTAS", self.ctas),
                ("A_ALONG_K", int(a_along_k)),
                ("B_ALONG_K", int(b_along_k)),
            ),
        )


class Narrow(NamedTuple):
    """A tile and how a CTA goes over it; see matmul_fma_narrow.cu."""

    m: int
    n: int
    k: int
    thread_m: int
    thread_n: int
    lanes_n: int
    stages: int
    batch: int
    cycles: Cycles

    @property
    def function(self) -> str:
        return "matmul_fma_narrow"

    @property
    def early(self) -> bool:
        """Whether it may start before the kernels before it have ended, as is best where memory limits."""
        return self.n == 2

    def resident(self, dtype: str) -> int:
        """Tiles that a multiprocessor takes at once."""
        return resident_ctas(self.cta(dtype).shared_bytes)

    def cta(self, dtype: str) -> CTA:
        padding = 16 // ITEMSIZE[dtype]  # of a line along k
        shared = self.stages * (self.m + self.n) * (self.k + padding) * ITEMSIZE[dtype]
        return CTA(self.m, self.n, self.m // self.thread_m * (self.n // self.thread_n), shared)

    def kernel(self, dtype: str, a_along_k: bool, b_along_k: bool) -> Kernel:
        """The same one however b is read."""
        return Kernel(
            "matmul_fma_narrow.cu",
            (
                *_macros(self, dtype),
                ("LANES_N", self.lanes_n),
                ("STAGES", self.stages),
                ("BATCH", self.batch),
                ("A_K_CONTIGUOUS", int(a_along_k)),
            ),
        )


Schedule = Wide | Narrow


def _macros(schedule: Schedule, dtype: str) -> tuple[tuple[str, str | int], ...]:
    """Those of both kernels."""
    return (
        ("ELEMENT", C_TYPE[dtype]),
        ("ACCUMULATE", C_TYPE[ACCUMULATE[dtype]]),
        ("TILE_M", schedule.m),
        ("TILE_N", schedule.n),
        ("TILE_K", schedule.k),
        ("THREAD_M", schedule.thread_m),
        ("THREAD_N", schedule.thread_n),
        ("MATMUL_BAND", BAND),
    )


_HALF: tuple[Schedule, ...] = (
    Narrow(32, 2, 128, 1, 1, 1, 8, 2, Cycles(11, 10)),
    Narrow(32, 8, 64, 2, 2, 2, 9, 2, Cycles(20, 16)),
    Narrow(32, 32, 64, 2, 4, 2, 5, 1, Cycles(31, 30)),
    Wide(64, 64, 32, 4, 4, 1, Cycles(69, 62)),
    Wide(128, 128, 16, 8, 8, 1, Cycles(184, 188)),
    Wide(256, 128, 16, 16, 8, 1, Cycles(360, 360)),
)

SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "bfloat16": _HALF,
    "float16": _HALF,
    "float32": (
        Narrow(32, 2, 128, 1, 1, 1, 5, 4, Cycles(10.3, 9)),
        Narrow(32, 4, 128, 1, 1, 2, 5, 4, Cycles(10.6, 10.6)),
        Narrow(32, 8, 128, 2, 1, 2, 4, 4, Cycles(12, 12)),
        Narrow(32, 16, 128, 2, 2, 2, 3, 4, Cycles(16, 16)),
        Narrow(32, 32, 64, 2, 4, 2, 3, 2, Cycles(23.6, 16.5)),
        Narrow(64, 32, 64, 4, 4, 4, 3, 2, Cycles(32.5, 27)),
        Narrow(64, 32, 32, 4, 4, 4, 3, 1, Cycles(33.5, 26)),
        Wide(64, 64, 16, 4, 4, 1, Cycles(69, 62)),
        Wide(128, 64, 32, 8, 4, 1, Cycles(111, 113)),
        Wide(128, 128, 16, 8, 8, 1, Cycles(184, 188)),
        Wide(256, 128, 32, 16, 8, 1, Cycles(343, 343)),
    ),
    "float64": (
        Narrow(32, 2, 64, 1, 1, 1, 5, 4, Cycles(18, 18)),
        Narrow(32, 8, 32, 2, 2, 2, 6, 4, Cycles(35, 35)),
        Wide(64, 64, 8, 4, 4, 1, Cycles(180, 173)),
    ),
}
"""Per dtype of the operands."""


def choose(problem: Problem, multiprocessors: int, compute_capability: tuple[int, int] = (9, 0)) -> Schedule:
    """The schedule that should take the least time; see `prepare`."""
    m, n = max(problem.m, problem.n), min(problem.m, problem.n)
    in_vectors = lies_in_vectors(problem)

    def cycles(schedule: Schedule) -> float:
        tiles = -(-tiles_of(m, n, schedule.m, schedule.n) * problem.matrices // multiprocessors)
        time = schedule.cycles.of(tiles, schedule.resident(problem.dtype))
        return SINGLY * time if isinstance(schedule, Narrow) and not in_vectors else time

    # `Narrow` copies while it multiplies, but would wait for single elements of 2 bytes.
    narrow = compute_capability >= NARROW_COMPUTE_CAPABILITY and (in_vectors or ITEMSIZE[problem.dtype] > 2)
    return min((s for s in SCHEDULES[problem.dtype] if narrow or isinstance(s, Wide)), key=cycles)


def prepare(problem: Problem, schedule: Schedule, index: int) -> MatmulLaunch:
    """A launch with that schedule on device `index`. Tiles are made for a long m."""
    if problem.n > problem.m:
        problem = problem.swap()
    kernel = schedule.kernel(problem.dtype, along_k(problem.a), along_k(problem.b))
    overlapping = schedule.early and gpu(index).compute_capability >= OVERLAPPING_COMPUTE_CAPABILITY
    cta = schedule.cta(problem.dtype)
    return prepare_tiles(problem, kernel, schedule.function, cta, index, overlapping=overlapping)


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    for dtype, schedules in SCHEDULES.items():
        for schedule in schedules:
            if isinstance(schedule, Wide):
                for a_along_k in (True, False):
                    for b_along_k in (True, False):
                        yield schedule.kernel(dtype, a_along_k, b_along_k)
            elif compute_capability >= 80:
                for a_along_k in (True, False):
                    yield schedule.kernel(dtype, a_along_k, True)
