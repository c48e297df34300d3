"""`log_softmax` and `softmax`: one kernel family."""

from __future__ import annotations

from typing import Any

from ._reduction import as_index, reduce, reduction

_LOG_SOFTMAX, _SOFTMAX = reduction("log_softmax"), reduction("softmax")


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
    return reduce(_LOG_SOFTMAX, x, as_index(axis, "one integer"), dtype=dtype, keepdims=True, out=out, backend=backend)


def softmax(x: Any, /, axis: int = -1, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """exp(x) normalised to sum to 1 along an axis; every row's bits depend on that row alone.

    Arguments, result and errors are those of `log_softmax`. The result is exp(x - m) / (c + r).
    """
    return reduce(_SOFTMAX, x, as_index(axis, "one integer"), dtype=dtype, keepdims=True, out=out, backend=backend)
