"""Products of bfloat16 and float16 with wgmma (matmul_wgmma_copy.cu): Hopper, lines of contiguous elements anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import ADDRESS, FLOAT32, gpu, load, shaped
from . import wgmma
from .problem import BAND, Problem, along_k, by_size
from .wgmma import Schedule

PRODUCERS = 128
"""Threads."""

COPIED = np.dtype([("line", "i8"), ("batch", "i8", (2,))])
"""The struct `Copied` of matmul_wgmma_copy.cu."""

SCHEDULES = (
    Schedule(64, 8, 128, 8),
    Schedule(64, 16, 64, 12),
    Schedule(64, 64, 64, 12),
    Schedule(128, 128, 64, 6),
)
"""In ascending size."""


def takes(problem: Problem) -> bool:
    """Whether both operands have a dimension of neighbouring elements."""
    return wgmma.fits(problem) and 1 in problem.a and 1 in problem.b


def choose(problem: Problem, multiprocessors: int) -> Schedule:
    """The schedule for a product; see `prepare`."""
    return by_size(SCHEDULES, problem, multiprocessors)


def prepare(problem: Problem, schedule: Schedule, index: int) -> MatmulLaunch:
    """A launch with that schedule on device `index`. Tiles are made for a long m."""
    if problem.n > problem.m:
        problem = problem.swap()
    along = along_k(problem.a), along_k(problem.b)
    kernel = schedule.kernel("matmul_wgmma_copy.cu", problem.dtype, *along)
    shared_parameters, tiles = wgmma.parameters(problem, schedule, early=True, band=BAND)
    of_a = _copied(problem.a, problem.batch_a, along[0])
    of_b = _copied(problem.b, problem.batch_b, along[1])
    function = load(kernel, "matmul_wgmma_copy", index, schedule.shared_bytes)
    run = shaped(
        function,
        schedule.grid(tiles, gpu(index).multiprocessors),
        128 * schedule.consumers + PRODUCERS,
        schedule.shared_bytes,
        (
            of_a,
            of_b,
            shared_parameters,
            np.int32(problem.k),
            ADDRESS,
            ADDRESS,
            ADDRESS,
            ADDRESS,
            FLOAT32,
            FLOAT32,
        ),
        overlapping=True,
    )
    swapped = problem.swapped

    def launch(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        if swapped:
            a, b = b, a
        run(stream, out, c, a, b, alpha, beta)

    return launch


def _copied(strides: tuple[int, int], batch: tuple[int, ...], k_contiguous: bool) -> Any:
    copied = np.zeros((), COPIED)
    mn, k = strides
    copied["line"], copied["batch"] = mn if k_contiguous else k, wgmma.last_two(batch)
    return copied


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    return wgmma.instances(compute_capability, "matmul_wgmma_copy.cu", SCHEDULES)
