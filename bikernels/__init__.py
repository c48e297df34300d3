"""Batch-invariant matrix products and reductions: the contract is the order of operations, not the schedule.

The same bits from NumPy arrays on a CPU and from CuPy or Numba arrays on a GPU, whatever the batch size, the layout or
the launch. `bikernels_torch` puts them behind PyTorch's own operators.
"""

from . import contract
from .backend import BackendStatus
from .contract import VERSION as contract_version
from .errors import ArithmeticUnsupportedError, BackendUnavailableError, BikernelsError, OperationUnsupportedError
from .operations._common import prepare
from .operations.elementwise import (
    cos,
    erf,
    exp,
    exp2,
    expm1,
    gelu,
    gelu_backward,
    log,
    log1p,
    pow,  # noqa: A004  (NumPy's name)
    rsqrt,
    sigmoid,
    sigmoid_backward,
    silu,
    silu_backward,
    sin,
    softplus,
    softplus_backward,
    sqrt,
    tanh,
    tanh_backward,
)
from .operations.layer_norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_weight_backward,
    layer_norm_with_statistics,
)
from .operations.logsumexp import logsumexp
from .operations.matmul import addmm, matmul
from .operations.mean import mean
from .operations.rms_norm import rms_norm, rms_norm_backward, rms_norm_weight_backward, rms_norm_with_statistics
from .operations.softmax import log_softmax, log_softmax_backward, softmax, softmax_backward
from .operations.sum import sum  # noqa: A004  (NumPy's name)
from .operations.var import std, var
from .settings import backends, use_arithmetic, use_backend
from .views import Device, View

__version__ = "0.1.0"

__all__ = [
    "ArithmeticUnsupportedError",
    "BackendStatus",
    "BackendUnavailableError",
    "BikernelsError",
    "Device",
    "OperationUnsupportedError",
    "View",
    "__version__",
    "addmm",
    "backends",
    "contract",
    "contract_version",
    "cos",
    "erf",
    "exp",
    "exp2",
    "expm1",
    "gelu",
    "gelu_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_weight_backward",
    "layer_norm_with_statistics",
    "log",
    "log1p",
    "log_softmax",
    "log_softmax_backward",
    "logsumexp",
    "matmul",
    "mean",
    "pow",
    "prepare",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_weight_backward",
    "rms_norm_with_statistics",
    "rsqrt",
    "sigmoid",
    "sigmoid_backward",
    "silu",
    "silu_backward",
    "sin",
    "softmax",
    "softmax_backward",
    "softplus",
    "softplus_backward",
    "sqrt",
    "std",
    "sum",
    "tanh",
    "tanh_backward",
    "use_arithmetic",
    "use_backend",
    "var",
]
