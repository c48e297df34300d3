"""`sum`: one axis, several, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._reduction import reduce, reduction

_SUM = reduction("sum", "x")


def sum(  # noqa: A001  (NumPy's name)
    x: Any,
    /,
    axis: int | Sequence[int] | None = None,
    *,
    dtype: Any = None,
    keepdims: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Sum whose bits depend on nothing but the elements added up and their places; trailing zeros change none.

    Args:
        x: bfloat16, float16, float32, float64, or integers and bool (added up in float64); any shape and strides.
        axis: an axis, several (added up as if flattened in C order), () for none (each element alone) or None for all.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 add up in float32 and are rounded once.
        keepdims: keep the reduced axes with length 1.
        out: array for the result, of its exact shape and dtype, on the device of x, sharing no memory with it.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array in the kind of array that x is, on its device and current stream (0-dimensional for a full sum). The
        sum of no elements, and of zeros of whatever sign, is +0.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, or `out` does not fit.
        TypeError: unsupported dtype, or x is no array.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    The sum tree is section 3 of docs/contract.md.
    """
    return reduce(_SUM, (x,), axis, dtype=dtype, keepdims=bool(keepdims), out=out, backend=backend)
