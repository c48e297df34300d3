"""Products as chains of fma in the accumulate dtype (matmul_fma.cu): any dtype, any layout, any GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ....contract import ACCUMULATE
from ... import MatmulLaunch
from ..compile import Kernel
from ..parameters import C_TYPE
from .launch import prepare_tiles
from .problem import BAND, Problem, tiles_of


class Schedule(NamedTuple):
    """A tile and how a CTA goes over it; see matmul_fma.cu."""

    m: int
    n: int
    k: int
    thread_m: int
    thread_n: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""

    @property
    def threads(self) -> int:
        return self.m // self.thread_m * (self.n // self.thread_n)

    @property
    def shared_bytes(self) -> int:
        return 0  # static

    def kernel(self, dtype: str) -> Kernel:
        return Kernel(
            "matmul_fma.cu",
            (
                ("ELEMENT", C_TYPE[dtype]),
                ("ACCUMULATE", C_TYPE[ACCUMULATE[dtype]]),
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("THREAD_M", self.thread_m),
                ("THREAD_N", self.thread_n),
                ("CTAS", self.ctas),
                ("MATMUL_BAND", BAND),
            ),
        )


SCHEDULES = {
    "float32": (Schedule(32, 8, 64, 2, 1, 3), Schedule(64, 64, 16, 4, 4, 3), Schedule(128, 128, 16, 8, 8, 1)),
    "float64": (Schedule(32, 8, 32, 2, 1, 4), Schedule(64, 64, 16, 4, 4, 2)),
}
"""Per accumulate dtype: one for narrow products, then for wide ones in ascending size."""


def choose(problem: Problem, multiprocessors: int) -> Schedule:
    """The schedule for a product; see `prepare`."""
    m, n = max(problem.m, problem.n), min(problem.m, problem.n)
    narrow, *wide = SCHEDULES[problem.accumulate]
    if n <= 2 * narrow.n:
        return narrow
    for schedule in reversed(wide):
        if tiles_of(m, n, schedule.m, schedule.n) * problem.matrices >= multiprocessors:
            return schedule
    return wide[0]


def prepare(problem: Problem, schedule: Schedule, index: int) -> MatmulLaunch:
    """A launch with that schedule on device `index`. Tiles are made for a long m."""
    if problem.n > problem.m:
        problem = problem.swap()
    return prepare_tiles(problem, schedule.kernel(problem.dtype), "matmul_fma", schedule, index)


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    for dtype, accumulate in ACCUMULATE.items():
        if dtype in C_TYPE:
            for schedule in SCHEDULES[accumulate]:
                yield schedule.kernel(dtype)
