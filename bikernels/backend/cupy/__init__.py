"""CUDA C++ kernels, compiled with NVRTC at first use and launched on CuPy's devices and streams.

`kernels/` is the CUDA C++; `matmul/`, `reductions.py`, `elementwise.py` and `attention.py` turn a spec into launches;
`row_schedules.py` and `column_schedules.py` choose how reductions share the work; `compile.py` compiles and caches;
`launch.py` loads and launches, through the driver (`driver.py`).
Nothing of CUDA is imported before a launch is prepared.
"""

from __future__ import annotations

import ctypes
import importlib.util

from ... import contract
from ...specs import ELEMENTWISE, REDUCTIONS, AttentionSpec, ElementwiseSpec, MatmulSpec, ReductionSpec
from ...views import Device
from .. import AttentionLaunch, ElementwiseLaunch, MatmulLaunch, ReductionLaunch
from . import driver

_MODULES = ("cupy", "cuda.core", "cuda.bindings", "cuda.pathfinder")
_INSTALL = 'pip install "bikernels[cuda13]"'


class CupyBackend:
    """The backend protocol; see `bikernels.backend.Backend`."""

    name = "cupy"
    device_type = "cuda"
    reductions = frozenset(REDUCTIONS)
    elementwise = frozenset(ELEMENTWISE)

    def unavailable(self) -> str | None:
        missing = [module for module in _MODULES if not _exists(module)]
        if missing:
            return f"{', '.join(missing)} cannot be imported; {_INSTALL}"
        return _driver_missing() or _compiler_missing()

    def devices(self) -> list[Device]:
        import cupy

        return [Device("cuda", index) for index in range(cupy.cuda.runtime.getDeviceCount())]

    def native_arithmetic(self, dtype: str, device: Device) -> str:
        return contract.native_arithmetic(dtype, _compute_capability(device))

    def computes(self, arithmetic: str, device: Device) -> bool:
        if contract.ARITHMETIC[arithmetic].is_tensor_core:
            return arithmetic == contract.tensor_core_arithmetic(_compute_capability(device))
        return True

    def prepare_matmul(self, spec: MatmulSpec, device: Device) -> MatmulLaunch:
        from . import matmul

        return matmul.prepare(spec, device)

    def prepare_reduction(self, spec: ReductionSpec, device: Device) -> ReductionLaunch:
        from . import reductions

        return reductions.prepare(spec, device)

    def prepare_elementwise(self, spec: ElementwiseSpec, device: Device) -> ElementwiseLaunch:
        from . import elementwise

        return elementwise.prepare(spec, device)

    def prepare_attention(self, spec: AttentionSpec, device: Device) -> AttentionLaunch | None:
        from . import attention

        return attention.prepare(spec, device)


def _compute_capability(device: Device) -> tuple[int, int]:
    from .launch import gpu

    return gpu(device.index).compute_capability


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent does not exist
        return False


def _driver_missing() -> str | None:
    """Ask the driver itself, which is quicker than importing CuPy."""
    try:
        library = driver.library()
    except OSError:
        return "there is no NVIDIA driver; install one (CUDA 13 needs 580 or newer)"
    count = ctypes.c_int(0)
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def _compiler_missing() -> str | None:
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError:
        return f"NVRTC, CUDA's run-time compiler, is not installed; {_INSTALL}"
    return None


backend = CupyBackend()
