"""`rms_norm` over one axis or several, and its backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._common import real
from ._reduction import reduce_rows


def rms_norm(
    x: Any,
    weight: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    eps: float | None = None,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """x / sqrt(mean(x * x) + eps) * weight, the mean over `axis`; every row's bits depend on that row alone.

    Args:
        x: bfloat16, float16, float32, float64, or integers (computed in float64); any shape and strides.
        weight: floating-point, of the lengths of x along the axes, ascending; None multiplies by nothing.
        axis: an axis or several (reduced as if flattened in C order): torch's normalized_shape are the last ones.
        eps: added to the mean square; None is the unit in the last place of 1 in float32 (float64 for float64), as in
            torch.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of x and the result's dtype, sharing no memory with the operands.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of x, in its kind of array, on its device and current stream.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, a weight of another shape or device, or `out` does not fit.
        TypeError: unsupported dtype, an operand that is no array, or an `eps` that is no real number.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    The order of operations is section 5 of docs/contract.md.
    """
    return _forward(("out",), x, weight, axis, eps, dtype, out, backend)


def rms_norm_with_statistics(
    x: Any,
    weight: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    eps: float | None = None,
    dtype: Any = None,
    out: tuple[Any, Any] | None = None,
    backend: str | None = None,
) -> tuple[Any, Any]:
    """`rms_norm`, and what its backward passes need.

    Arguments and errors are those of `rms_norm`; `out` is a tuple of two arrays.

    Returns:
        The result, and rstd = 1 / sqrt(mean(x * x) + eps): of the shape of x with length 1 along the axes, float32
        (float64 where the result is float64).
    """
    return _forward(("out", "rstd"), x, weight, axis, eps, dtype, out, backend)


def rms_norm_backward(
    grad: Any,
    x: Any,
    rstd: Any,
    weight: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Gradient of `rms_norm` with respect to x.

    With h = x * rstd and p = grad * weight it is (p - h * mean(p * h)) * rstd, the mean over `axis`.

    Args:
        grad: gradient with respect to the result; bfloat16, float16, float32 or float64, with any strides.
        x: of the shape of grad.
        rstd: of the shape of x with length 1 along the axes: see `rms_norm_with_statistics`.
        weight: as in the forward pass.
        axis: that of the forward pass.
        dtype: of the result; by default that of x. float16 and bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of x and the result's dtype, sharing no memory with the operands.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of x, in its kind of array, on its device and current stream.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, an operand of another shape or device, or `out` does not fit.
        TypeError: unsupported dtype, or an operand is no array.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    The order of operations is section 6 of docs/contract.md.
    """
    required, optional = {"x": x, "grad": grad, "rstd": rstd}, {"weight": weight}
    return reduce_rows("rms_norm_backward", required, axis, optional=optional, dtype=dtype, out=out, backend=backend)


def rms_norm_weight_backward(
    grad: Any,
    x: Any,
    rstd: Any,
    /,
    axis: int | Sequence[int] = -1,
    *,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Gradient of `rms_norm` with respect to the weight: the sum of grad * (x * rstd) over the other axes than `axis`.

    The rows are added up by the sum tree at their positions in the batch, so rows of zeros at its end change no bit;
    splitting the batch does. Arguments and errors are those of `rms_norm_backward`.

    Returns:
        An array of the lengths of x along the axes, ascending.
    """
    required = {"x": x, "grad": grad, "rstd": rstd}
    return reduce_rows("rms_norm_weight_backward", required, axis, dtype=dtype, out=out, backend=backend)


def _forward(
    results: tuple[str, ...],
    x: Any,
    weight: Any,
    axis: Any,
    eps: float | None,
    dtype: Any,
    out: Any,
    backend: str | None,
) -> Any:
    return reduce_rows(
        "rms_norm",
        {"x": x},
        axis,
        optional={"weight": weight},
        results=results,
        eps=None if eps is None else real(eps, "eps"),
        dtype=dtype,
        out=out,
        backend=backend,
    )
