"""`var` and `std`: one axis, several, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._common import real
from ._reduction import reduce, reduction

_VAR, _STD = reduction("var", "x"), reduction("std", "x")


def var(
    x: Any,
    /,
    axis: int | Sequence[int] | None = None,
    *,
    correction: float = 0,
    dtype: Any = None,
    keepdims: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Variance: the sum of the squares of x - mean(x), divided by the number of elements less `correction`.

    Args:
        x: bfloat16, float16, float32, float64, or integers and bool (computed in float64); any shape and strides.
        axis: an axis, several (reduced as if flattened in C order), () for none (each element alone) or None for all.
        correction: a real number: 0 for the variance of a population, as in NumPy (where it is `ddof`) and the array
            API; 1 for the unbiased estimate from a sample, which is the default of torch.var.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        keepdims: keep the reduced axes with length 1.
        out: array for the result, of its exact shape and dtype, on the device of x, sharing no memory with it.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array in the kind of array that x is, on its device and current stream (0-dimensional where all axes are
        reduced). Where n <= correction the divisor is 0: the variance of no elements is NaN.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, or `out` does not fit.
        TypeError: unsupported dtype, x is no array, or `correction` no real number.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    Two passes, each with the sum tree: section 3 of docs/contract.md.
    """
    return _reduce(_VAR, x, axis, correction, dtype, keepdims, out, backend)


def std(
    x: Any,
    /,
    axis: int | Sequence[int] | None = None,
    *,
    correction: float = 0,
    dtype: Any = None,
    keepdims: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Square root of the variance, taken before the only rounding to the result's dtype.

    Arguments, result and errors are those of `var`.
    """
    return _reduce(_STD, x, axis, correction, dtype, keepdims, out, backend)


def _reduce(
    operation: Any, x: Any, axis: Any, correction: Any, dtype: Any, keepdims: bool, out: Any, backend: str | None
) -> Any:
    correction = real(correction, "correction")
    options = {"dtype": dtype, "out": out, "backend": backend}
    return reduce(operation, (x,), axis, keepdims=bool(keepdims), correction=correction, **options)
