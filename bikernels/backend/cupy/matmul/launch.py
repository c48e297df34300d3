"""The launch that the kernels with the struct `Matmul` share."""

from __future__ import annotations

from typing import Protocol

from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import ADDRESS, SCALAR, load, shaped
from .problem import Problem, Tile, parameters


class Shape(Tile, Protocol):
    """What a launch needs of a schedule."""

    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...


def prepare_tiles(
    problem: Problem, kernel: Kernel, name: str, tile: Shape, index: int, *, overlapping: bool = False
) -> MatmulLaunch:
    """A launch of function `name`, a CTA for each tile, on device `index`. For `overlapping` see `shaped`."""
    struct, tiles = parameters(problem, tile.m, tile.n)
    scalar = SCALAR[problem.accumulate]
    arguments = (struct, ADDRESS, ADDRESS, ADDRESS, ADDRESS, scalar, scalar)
    function = load(kernel, name, index, tile.shared_bytes)
    run = shaped(function, tiles, tile.threads, tile.shared_bytes, arguments, overlapping=overlapping)
    swapped = problem.swapped

    def launch(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        if swapped:
            a, b = b, a
        run(stream, out, c, a, b, alpha, beta)

    return launch
