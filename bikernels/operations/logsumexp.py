"""`logsumexp`: one axis, several, or all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._reduction import reduce, reduction

_LOGSUMEXP = reduction("logsumexp", "x")


def logsumexp(
    x: Any,
    /,
    axis: int | Sequence[int] | None = None,
    *,
    dtype: Any = None,
    keepdims: bool = False,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Logarithm of the sum of the exponentials; appending -inf to a row changes no bit.

    Args:
        x: bfloat16, float16, float32, float64, or integers and bool (computed in float64); any shape and strides.
        axis: an axis, several (reduced as if flattened in C order), () for none (each element alone) or None for all.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        keepdims: keep the reduced axes with length 1.
        out: array for the result, of its exact shape and dtype, on the device of x, sharing no memory with it.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array in the kind of array that x is, on its device and current stream (0-dimensional where all axes are
        reduced). Of no elements, and of -inf only, it is -inf; +inf among finite elements gives +inf.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, or `out` does not fit.
        TypeError: unsupported dtype, or x is no array.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    With m, c and r as in `log_softmax` the result is m + log(c + r): section 4 of docs/contract.md.
    """
    return reduce(_LOGSUMEXP, (x,), axis, dtype=dtype, keepdims=bool(keepdims), out=out, backend=backend)
