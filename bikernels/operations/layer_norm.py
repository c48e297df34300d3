"""`layer_norm` over one axis or several, and its backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._common import real
from ._reduction import reduce_rows


def layer_norm(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    eps: float = 1e-5,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, mean and variance over `axis`.

    Every row's bits depend on that row alone.

    Args:
        x: bfloat16, float16, float32, float64, or integers (computed in float64); any shape and strides.
        weight: floating-point, of the lengths of x along the axes, ascending; None multiplies by nothing.
        bias: as `weight`; None adds nothing.
        axis: an axis or several (reduced as if flattened in C order): torch's normalized_shape are the last ones.
        eps: added to the variance, which is that of a population (without correction).
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of x and the result's dtype, sharing no memory with the operands.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of x, in its kind of array, on its device and current stream.

    Raises:
        numpy.exceptions.AxisError: no such axis (a ValueError and an IndexError).
        ValueError: an axis named twice, a weight or bias of another shape or device, or `out` does not fit.
        TypeError: unsupported dtype, an operand that is no array, or an `eps` that is no real number.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this operation.

    The order of operations is section 5 of docs/contract.md.
    """
    return _forward(("out",), x, weight, bias, axis, eps, dtype, out, backend)


def layer_norm_with_statistics(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    eps: float = 1e-5,
    dtype: Any = None,
    out: tuple[Any, Any, Any] | None = None,
    backend: str | None = None,
) -> tuple[Any, Any, Any]:
    """`layer_norm`, and what its backward passes need.

    Arguments and errors are those of `layer_norm`; `out` is a tuple of three arrays.

    Returns:
        The result, mean(x) and rstd = 1 / sqrt(var(x) + eps): the latter of the shape of x with length 1 along the
        axes, float32 (float64 where the result is float64).
    """
    return _forward(("out", "mean", "rstd"), x, weight, bias, axis, eps, dtype, out, backend)


def layer_norm_backward(
    grad: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any = None,
    /,
    axis: int | Sequence[int] = -1,
    *,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Gradient of `layer_norm` with respect to x.

    With h = (x - mean) * rstd and p = grad * weight it is (p - mean(p) - h * mean(p * h)) * rstd, the means of p and
    p * h over `axis`.

    Args:
        grad: gradient with respect to the result; bfloat16, float16, float32 or float64, with any strides.
        x: of the shape of grad.
        mean, rstd: of the shape of x with length 1 along the axes: see `layer_norm_with_statistics`.
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
    required, optional = {"x": x, "grad": grad, "mean": mean, "rstd": rstd}, {"weight": weight}
    name = "layer_norm_backward"
    return reduce_rows(name, required, axis, optional=optional, dtype=dtype, out=out, backend=backend)


def layer_norm_weight_backward(
    grad: Any,
    x: Any,
    mean: Any,
    rstd: Any,
    /,
    axis: int | Sequence[int] = -1,
    *,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Gradient of `layer_norm` with respect to the weight: the sum of grad * ((x - mean) * rstd) over the other axes.

    The rows are added up by the sum tree at their positions in the batch, so rows of zeros at its end change no bit;
    splitting the batch does. The gradient with respect to the bias is `sum(grad)` over these axes. Arguments and errors
    are those of `layer_norm_backward`.

    Returns:
        An array of the lengths of x along the axes, ascending.
    """
    required = {"x": x, "grad": grad, "mean": mean, "rstd": rstd}
    return reduce_rows("layer_norm_weight_backward", required, axis, dtype=dtype, out=out, backend=backend)


def _forward(
    results: tuple[str, ...],
    x: Any,
    weight: Any,
    bias: Any,
    axis: Any,
    eps: float,
    dtype: Any,
    out: Any,
    backend: str | None,
) -> Any:
    return reduce_rows(
        "layer_norm",
        {"x": x},
        axis,
        optional={"weight": weight, "bias": bias},
        results=results,
        eps=real(eps, "eps"),
        dtype=dtype,
        out=out,
        backend=backend,
    )
