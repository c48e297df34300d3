"""Matrix products: one module for each kernel, which says what it takes and has its schedules.

`choice.py` picks among those of wgmma.py, from tables of measurements and a model.
"""

from __future__ import annotations

from collections.abc import Iterator

from ....contract import ARITHMETIC
from ....specs import MatmulSpec
from ....views import Device
from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import gpu
from . import choice, dmma, fma, mma, wgmma, wgmma_copy
from .problem import Problem


def prepare(spec: MatmulSpec, device: Device) -> MatmulLaunch:
    """See `bikernels.backend.Backend.prepare_matmul`."""
    problem, index = Problem.of(spec), device.index
    properties = gpu(index)

    if not ARITHMETIC[spec.arithmetic].is_tensor_core:
        if problem.dtype == "float64" and properties.compute_capability in dmma.COMPUTE_CAPABILITIES:
            return dmma.prepare(problem, dmma.choose(problem, properties.multiprocessors), index)
        chosen = fma.choose(problem, properties.multiprocessors, properties.compute_capability)
        return fma.prepare(problem, chosen, index)

    def any_address() -> MatmulLaunch:
        if hopper and wgmma_copy.takes(problem):
            return wgmma_copy.prepare(problem, wgmma_copy.choose(problem, properties.multiprocessors), index)
        return mma.prepare(problem, mma.choose(problem, properties.multiprocessors), index)

    hopper = properties.compute_capability == wgmma.COMPUTE_CAPABILITY
    if hopper and wgmma.takes(problem):
        return wgmma.prepare(problem, choice.choose(problem, properties), index, any_address)
    return any_address()


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    for family in (wgmma, wgmma_copy, mma, dmma, fma):
        yield from family.kernels(compute_capability)
