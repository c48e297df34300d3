"""Matrix products: one module for each kernel, which says what it takes and picks its schedule."""

from __future__ import annotations

from collections.abc import Iterator

from ....contract import ARITHMETIC
from ....specs import MatmulSpec
from ....views import Device
from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import gpu
from . import fma, mma
from .problem import Problem


def prepare(spec: MatmulSpec, device: Device) -> MatmulLaunch:
    """See `bikernels.backend.Backend.prepare_matmul`."""
    problem = Problem.of(spec)
    family = mma if ARITHMETIC[spec.arithmetic].is_tensor_core else fma
    return family.prepare(problem, family.choose(problem, gpu(device.index).multiprocessors), device.index)


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    for family in (mma, fma):
        yield from family.kernels(compute_capability)
