"""Products of float64 on tensor cores (matmul_dmma.cu), whose instructions compute the chain of fma64: any layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ... import MatmulLaunch
from ..compile import Kernel
from .launch import prepare_tiles
from .problem import BAND, Cycles, Problem, along_k, resident_ctas, tiles_of

COMPUTE_CAPABILITIES = ((9, 0),)
"""GPUs whose instructions have been compared with the chain, in every bit. Others take `fma`."""

_PADDING = 4
"""Elements by which a line in shared memory is longer."""


class Schedule(NamedTuple):
    """A tile and how a CTA goes over it; see matmul_dmma.cu."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""
    mma_k: int
    cycles: Cycles

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """Of the layout that takes most."""
        a = max(self.m * (self.k + _PADDING), self.k * (self.m + _PADDING))
        b = max(self.n * (self.k + _PADDING), self.k * (self.n + _PADDING))
        return self.stages * (a + b) * 8

    def kernel(self, a_k_contiguous: bool, b_k_contiguous: bool) -> Kernel:
        return Kernel(
            "matmul_dmma.cu",
            (
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("WARPS_M", self.warps_m),
                ("WARPS_N", self.warps_n),
                ("STAGES", self.stages),
                ("CTAS", self.ctas),
                ("A_K_CONTIGUOUS", int(a_k_contiguous)),
                ("B_K_CONTIGUOUS", int(b_k_contiguous)),
                ("MMA_K", self.mma_k),
                ("MATMUL_BAND", BAND),
            ),
        )


SCHEDULES = (
    Schedule(32, 8, 64, 2, 1, 4, 1, 16, Cycles(17, 16)),
    Schedule(32, 16, 64, 2, 2, 4, 1, 16, Cycles(18.5, 14)),
    Schedule(32, 32, 32, 2, 2, 3, 1, 16, Cycles(22, 17)),
    Schedule(64, 32, 32, 2, 2, 3, 1, 16, Cycles(32.5, 26)),
    Schedule(64, 64, 32, 2, 2, 3, 1, 16, Cycles(57, 43)),
    Schedule(128, 64, 16, 2, 2, 3, 2, 8, Cycles(103, 74)),
)


def choose(problem: Problem, multiprocessors: int) -> Schedule:
    """The schedule that should take the least time; see `prepare`."""
    m, n = max(problem.m, problem.n), min(problem.m, problem.n)

    def cycles(schedule: Schedule) -> float:
        tiles = -(-tiles_of(m, n, schedule.m, schedule.n) * problem.matrices // multiprocessors)
        return schedule.cycles.of(tiles, resident_ctas(schedule.shared_bytes))

    return min(SCHEDULES, key=cycles)


def prepare(problem: Problem, schedule: Schedule, index: int) -> MatmulLaunch:
    """A launch with that schedule on device `index`. Tiles are made for a long m."""
    if problem.n > problem.m:
        problem = problem.swap()
    kernel = schedule.kernel(along_k(problem.a), _b_k_contiguous(schedule, along_k(problem.b)))
    return prepare_tiles(problem, kernel, "matmul_dmma", schedule, index)


def _b_k_contiguous(schedule: Schedule, along_k: bool) -> bool:
    """Narrow tiles keep b along k in shared memory, however it is read: there is little of it."""
    return along_k or schedule.n < 64


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0), or could be."""
    if compute_capability < 80:
        return
    for schedule in SCHEDULES:
        for a_k_contiguous in (True, False):
            for b_k_contiguous in (True, False):
                if b_k_contiguous == _b_k_contiguous(schedule, b_k_contiguous):
                    yield schedule.kernel(a_k_contiguous, b_k_contiguous)
