"""The launch that the kernels with the struct `Matmul` share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ....views import View
from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import Stream, load, on_device, shaped
from ..parameters import by_value
from .problem import Problem, parameters

_SCALAR = {"float32": np.float32, "float64": np.float64}


class Tile(Protocol):
    """What a launch needs of a schedule."""

    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...


def prepare_tiles(problem: Problem, kernel: Kernel, name: str, tile: Tile, index: int) -> MatmulLaunch:
    """A launch of function `name`, a CTA for each tile, on device `index`."""
    struct, tiles = parameters(problem, tile.m, tile.n)
    arguments = by_value(struct)
    function = load(kernel, name, index, tile.shared_bytes)
    run = shaped(function, tiles, tile.threads, tile.shared_bytes)
    scalar = _SCALAR[problem.accumulate]
    swapped = problem.swapped

    def launch(out: View, c: View | None, a: View, b: View, alpha: float, beta: float) -> None:
        if swapped:
            a, b = b, a
        c_pointer = 0 if c is None else c.pointer
        run(Stream(out.stream), arguments, out.pointer, c_pointer, a.pointer, b.pointer, scalar(alpha), scalar(beta))

    return on_device(index, launch)
