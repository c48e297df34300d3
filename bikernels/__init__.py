"""Batch-invariant matrix products and reductions: the contract is the order of operations, not the schedule.

The same bits from NumPy arrays on a CPU and from CuPy or Numba arrays on a GPU, whatever the batch size, the layout or
the launch. `bikernels_torch` puts them behind PyTorch's own operators.
"""

from . import contract
from .backend import BackendStatus
from .contract import VERSION as contract_version
from .errors import ArithmeticUnsupportedError, BackendUnavailableError, BikernelsError
from .operations.matmul import addmm, matmul
from .operations.mean import mean
from .operations.softmax import log_softmax, softmax
from .settings import backends, use_arithmetic, use_backend
from .views import Device, View

__version__ = "0.1.0"

__all__ = [
    "ArithmeticUnsupportedError",
    "BackendStatus",
    "BackendUnavailableError",
    "BikernelsError",
    "Device",
    "View",
    "__version__",
    "addmm",
    "backends",
    "contract",
    "contract_version",
    "log_softmax",
    "matmul",
    "mean",
    "softmax",
    "use_arithmetic",
    "use_backend",
]
