"""Products of bfloat16 and float16 with mma.sync (matmul_mma.cu): any layout, any GPU from sm_80 on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ....contract import ARITHMETIC
from ... import MatmulLaunch
from ..compile import Kernel
from ..parameters import C_TYPE
from .launch import prepare_tiles
from .problem import BAND, Problem, along_k, by_size


class Schedule(NamedTuple):
    """A tile and how a CTA goes over it; see matmul_mma.cu."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.m + self.n) * self.k * 2

    def kernel(self, dtype: str, a_k_contiguous: bool, b_k_contiguous: bool) -> Kernel:
        return Kernel(
            "matmul_mma.cu",
            (
                ("ELEMENT", C_TYPE[dtype]),
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("WARPS_M", self.warps_m),
                ("WARPS_N", self.warps_n),
                ("STAGES", self.stages),
                ("CTAS", self.ctas),
                ("A_K_CONTIGUOUS", int(a_k_contiguous)),
                ("B_K_CONTIGUOUS", int(b_k_contiguous)),
                ("MATMUL_BAND", BAND),
            ),
        )


SCHEDULES = (
    Schedule(32, 16, 128, 2, 1, 6, 3),
    Schedule(64, 32, 128, 4, 1, 4, 2),
    Schedule(32, 64, 128, 2, 2, 4, 2),
    Schedule(64, 64, 128, 2, 2, 3, 2),
    Schedule(128, 128, 64, 2, 2, 3, 2),
)
"""Ascending in n, the last two for products that are large in both directions."""


def choose(problem: Problem, multiprocessors: int) -> Schedule:
    """The schedule for a product; see `prepare`."""
    return by_size(SCHEDULES, problem, multiprocessors)


def prepare(problem: Problem, schedule: Schedule, index: int) -> MatmulLaunch:
    """A launch with that schedule on device `index`. Tiles are made for a long m."""
    if problem.n > problem.m:
        problem = problem.swap()
    kernel = schedule.kernel(problem.dtype, along_k(problem.a), along_k(problem.b))
    return prepare_tiles(problem, kernel, "matmul_mma", schedule, index)


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    if compute_capability < 80:
        return
    for dtype in sorted({dtype for kind in ARITHMETIC.values() if kind.is_tensor_core for dtype in kind.covers}):
        for schedule in SCHEDULES:
            for a_k_contiguous in (True, False):
                for b_k_contiguous in (True, False):
                    yield schedule.kernel(dtype, a_k_contiguous, b_k_contiguous)
