"""`log_softmax` and `softmax`, one kernel family, and their backward passes."""

from __future__ import annotations

from typing import Any

from ._reduction import as_index, reduce, reduction

_LOG_SOFTMAX, _SOFTMAX = reduction("log_softmax", "x"), reduction("softmax", "x")
_LOG_SOFTMAX_BACKWARD = reduction("log_softmax_backward", "y", "grad")
_SOFTMAX_BACKWARD = reduction("softmax_backward", "y", "grad")

_AXIS = "one integer"


def log_softmax(x: Any, /, axis: int = -1, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Logarithm of the softmax along an axis; every row's bits depend on that row alone.

    Args:
        x: bfloat16, float16, float32, float64, or integers (computed in float64); any shape and strides.
        axis: the axis along which the exponentials sum to 1.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of x and the result's dtype, on its device, sharing no memory with it.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of x, in its kind of array, on its device and current stream.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: `out` does not fit.
        TypeError: unsupported dtype, or x is no array.
        BackendUnavailableError: `backend` cannot run here.

    With m the row's maximum, c the number of elements equal to it and r the sum of exp(x - m) over the others, the
    result is (x - m) - log(c + r), the logarithm compensated for the rounding of c + r: section 4 of
    docs/contract.md.
    """
    return reduce(_LOG_SOFTMAX, (x,), as_index(axis, _AXIS), dtype=dtype, out=out, backend=backend)


def softmax(x: Any, /, axis: int = -1, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """exp(x) normalised to sum to 1 along an axis; every row's bits depend on that row alone.

    Arguments, result and errors are those of `log_softmax`. The result is exp(x - m) / (c + r).
    """
    return reduce(_SOFTMAX, (x,), as_index(axis, _AXIS), dtype=dtype, out=out, backend=backend)


def log_softmax_backward(
    grad: Any, y: Any, /, axis: int = -1, *, dtype: Any = None, out: Any = None, backend: str | None = None
) -> Any:
    """Gradient of `log_softmax` with respect to x: grad - exp(y) * sum(grad), the sum along the axis.

    Args:
        grad: gradient with respect to the result y; bfloat16, float16, float32 or float64, with any strides.
        y: the result of `log_softmax`, of the shape of grad, in any of these dtypes.
        axis: that of the forward pass.
        dtype: of the result; by default that of y. float16 and bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of y and the result's dtype, sharing no memory with the operands.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of y, in its kind of array, on its device and current stream.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: the shapes or devices differ, or `out` does not fit.
        TypeError: unsupported dtype, or an operand is no array.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    The order of operations is section 6 of docs/contract.md.
    """
    return reduce(_LOG_SOFTMAX_BACKWARD, (y, grad), as_index(axis, _AXIS), dtype=dtype, out=out, backend=backend)


def softmax_backward(
    grad: Any, y: Any, /, axis: int = -1, *, dtype: Any = None, out: Any = None, backend: str | None = None
) -> Any:
    """Gradient of `softmax` with respect to x: y * (grad - sum(grad * y)), the sum along the axis.

    Arguments, result and errors are those of `log_softmax_backward`, with y the result of `softmax`.
    """
    return reduce(_SOFTMAX_BACKWARD, (y, grad), as_index(axis, _AXIS), dtype=dtype, out=out, backend=backend)
