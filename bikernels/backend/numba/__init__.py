"""Numba CUDA: every kernel is Python, to be read and changed.

matmul.py, reduction.py, rows.py and columns.py (reductions of rows whose elements lie side by side, and of rows that do
themselves) hold the kernels and how they are launched, formulas.py what the reductions compute; device.py is the
vocabulary that they are written in, functions.py its exp and log, vectors.py and quotients.py what a thread does with
the elements of a row, products.py the instructions that multiply tiles, schedules.py the tiles, launch.py the host's
side. inspection.py shows what the compiler makes of them.
"""

from __future__ import annotations

import importlib
import importlib.util

from ...contract import PORTABLE_ARITHMETIC, native_arithmetic, tensor_core_arithmetic
from ...errors import BackendUnavailableError
from ...specs import REDUCTIONS, AttentionSpec, ElementwiseSpec, MatmulSpec, ReductionSpec
from ...views import Device
from .. import ElementwiseLaunch, MatmulLaunch, ReductionLaunch

_MATMUL_CAPABILITY = (8, 0)
"""Has the asynchronous copies that the products' kernels are made of."""

_REMEDY = 'pip install "bikernels[cuda13]"'


def _text(compute_capability: tuple[int, int]) -> str:
    return ".".join(map(str, compute_capability))


class NumbaBackend:
    """The kernels of this package, on CUDA GPUs."""

    name = "numba"
    device_type = "cuda"
    reductions = frozenset(REDUCTIONS)
    elementwise: frozenset[str] = frozenset()

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("numba_cuda") is None:
            return f"the package numba-cuda is not installed; {_REMEDY}"
        try:
            cuda = importlib.import_module("numba.cuda")
        except (ImportError, AttributeError, OSError) as error:  # AttributeError: NumPy is too new for it
            return f"numba-cuda cannot be imported ({type(error).__name__}: {error}); {_REMEDY}"
        if not cuda.is_available():
            reason = " ".join(str(cuda.cuda_error() or "no device").split())
            return f"Numba finds no CUDA GPU ({reason}); install an NVIDIA driver"
        return None

    def devices(self) -> list[Device]:
        cuda = importlib.import_module("numba.cuda")
        return [Device("cuda", index) for index in range(len(cuda.gpus))]

    def native_arithmetic(self, dtype: str, device: Device) -> str:
        from .launch import compute_capability

        return native_arithmetic(dtype, compute_capability(device))

    def computes(self, arithmetic: str, device: Device) -> bool:
        from .launch import compute_capability

        of_tensor_cores = tensor_core_arithmetic(compute_capability(device))
        return arithmetic in PORTABLE_ARITHMETIC.values() or arithmetic == of_tensor_cores

    def prepare_matmul(self, spec: MatmulSpec, device: Device) -> MatmulLaunch:
        from .launch import compute_capability
        from .matmul import prepare

        if compute_capability(device) < _MATMUL_CAPABILITY:
            raise BackendUnavailableError(
                f"backend 'numba' multiplies on GPUs of compute capability {_text(_MATMUL_CAPABILITY)} or newer and "
                f"{device} has {_text(compute_capability(device))}; use backend='cupy'"
            )
        return prepare(spec, device)

    def prepare_reduction(self, spec: ReductionSpec, device: Device) -> ReductionLaunch:
        from .reduction import prepare

        return prepare(spec, device)

    def prepare_elementwise(self, spec: ElementwiseSpec, device: Device) -> ElementwiseLaunch:
        raise NotImplementedError(spec.operation)  # not in `elementwise`

    def prepare_attention(self, spec: AttentionSpec, device: Device) -> None:
        return None


backend = NumbaBackend()
