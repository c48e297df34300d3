"""`mean`: one axis, several, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._reduction import reduce, reduction

_MEAN = reduction("mean", "x")


def mean(
    x: Any,
    /,
    axis: int | Sequence[int] | None = None,
    *,
    dtype: Any = None,
    keepdims: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Arithmetic mean whose bits depend on nothing but the elements averaged and their number.

    Args:
        x: bfloat16, float16, float32, float64, or integers and bool (averaged in float64); any shape and strides.
        axis: an axis, several (averaged as if flattened in C order), () for none (each element alone) or None for all.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 add up in float32 and are rounded once.
        keepdims: keep the averaged axes with length 1.
        out: array for the result, of its exact shape and dtype, on the device of x, sharing no memory with it.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array in the kind of array that x is, on its device and current stream (0-dimensional for a full mean). The
        mean of no elements is NaN.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, or `out` does not fit.
        TypeError: unsupported dtype, or x is no array.
        BackendUnavailableError: `backend` cannot run here.

    The sum tree is section 3 of docs/contract.md; the sum is divided by the number of elements, rounded once.
    """
    return reduce(_MEAN, (x,), axis, dtype=dtype, keepdims=bool(keepdims), out=out, backend=backend)
