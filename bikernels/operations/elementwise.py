"""The elementwise functions: transcendental ones whose bits are the same on every device, and gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..errors import OperationUnsupportedError
from ..settings import choose_backend, current_backend
from ..specs import ElementwiseSpec, Layout, merge_dimensions
from ..views import Device
from ._common import Launch, Operation, Result, floating, is_integer, real, result_dtype, run


class _Settings(NamedTuple):
    """What decides about a call besides the layouts of its operands."""

    dtype: str | None
    backend: str | None
    context_backend: str | None
    """Part of a plan's key: the context may change between calls."""


@functools.cache
def _operation(name: str, *operands: str) -> Operation:
    """The function of that name (see `ElementwiseSpec`) of operands by the names of their arguments."""
    return Operation(operands, functools.partial(_result, name, operands), in_place=operands[-1])


def _apply(
    name: str, operands: dict[str, Any], numbers: tuple[float, ...] = (), *, dtype: Any, out: Any, backend: str | None
) -> Any:
    settings = _Settings(result_dtype(dtype), backend, None if backend else current_backend())
    return run(_operation(name, *operands), tuple(operands.values()), settings, out, *numbers)


def _result(name: str, names: tuple[str, ...], device: Device, x: Layout, *rest: Any) -> Result:
    y: Layout | None = rest[0] if len(names) > 1 else None
    settings = _Settings(*rest[len(names) - 1 :])
    floating(x.dtype, names[0], or_integer=y is None or name == "pow")
    dtype, shape = settings.dtype or ("float64" if is_integer(x.dtype) else x.dtype), x.shape
    if y is not None:
        floating(y.dtype, names[1], or_integer=name == "pow")
        if settings.dtype is None and x.dtype != y.dtype:
            raise TypeError(
                f"{names[0]} is {x.dtype} and {names[1]} is {y.dtype}; cast them to one dtype, or pass dtype="
            )
        try:
            shape = np.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            raise ValueError(
                f"{names[0]} has shape {x.shape} and {names[1]} has {y.shape}; pass arrays that broadcast"
            ) from None
    backend = choose_backend(settings.backend, device)
    if name not in backend.elementwise:
        raise OperationUnsupportedError(
            f"{name} cannot be computed by backend {backend.name!r}; "
            f"pass CUDA arrays with backend='cupy', or NumPy arrays"
        )
    given = [_broadcast(layout, shape) for layout in (x, y) if layout is not None]
    dtypes = [dtype, x.dtype] + ([] if y is None else [y.dtype])

    def prepare(out_strides: tuple[int, ...]) -> Launch:
        every = (out_strides, *given)
        # An element's place decides no bit, so the dimensions may be walked in any order: the closest elements last.
        order = sorted(range(len(shape)), key=lambda axis: -abs(out_strides[axis]))
        merged, strides = merge_dimensions(
            tuple(shape[axis] for axis in order), *(tuple(own[axis] for axis in order) for own in every)
        )
        layouts = [Layout(one, merged, own) for one, own in zip(dtypes, strides, strict=True)]
        launch = backend.prepare_elementwise(ElementwiseSpec(name, *layouts), device)
        if y is not None:
            return launch
        return lambda stream, out, x, *numbers: launch(stream, out, x, 0, *numbers)

    return Result(dtype, shape, prepare)


def _broadcast(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides along the dimensions of `shape`, to which the layout broadcasts."""
    missing = len(shape) - len(layout.shape)
    own = zip(layout.shape, layout.strides, shape[missing:], strict=True)
    return (0,) * missing + tuple(0 if length != target else stride for length, stride, target in own)


def exp(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """e to the power x; every element has the same bits on every device, wherever it lies.

    Args:
        x: bfloat16, float16, float32, float64, or integers (computed in float64); any shape and strides.
        dtype: x is cast to it first, and the result has it; by default that of x (float64 for integers). float16 and
            bfloat16 compute in float32 and are rounded once.
        out: array for the result, of the shape of x and the result's dtype, on its device; x itself, or one that
            shares no memory with it.
        backend: "cpu" or "cupy"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.

    Returns:
        An array of the shape of x, in its kind of array, on its device and current stream.

    Raises:
        ValueError: `out` does not fit.
        TypeError: unsupported dtype, or x is no array.
        BackendUnavailableError: `backend` cannot run here.
        OperationUnsupportedError: the backend does not have this function.

    The sequence of operations is in section 7 of docs/contract.md, that of the other functions in section 10.
    """
    return _apply("exp", {"x": x}, dtype=dtype, out=out, backend=backend)


def exp2(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """2 to the power x.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("exp2", {"x": x}, dtype=dtype, out=out, backend=backend)


def expm1(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """exp(x) - 1, accurate also close to 0.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("expm1", {"x": x}, dtype=dtype, out=out, backend=backend)


def log(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Natural logarithm of x.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("log", {"x": x}, dtype=dtype, out=out, backend=backend)


def log1p(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """log(1 + x), accurate also close to 0.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("log1p", {"x": x}, dtype=dtype, out=out, backend=backend)


def erf(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """The error function.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("erf", {"x": x}, dtype=dtype, out=out, backend=backend)


def sqrt(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """The square root of x, correctly rounded.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("sqrt", {"x": x}, dtype=dtype, out=out, backend=backend)


def rsqrt(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """1 / sqrt(x), of two correctly rounded operations.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("rsqrt", {"x": x}, dtype=dtype, out=out, backend=backend)


def sigmoid(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """1 / (1 + exp(-x)).

    Arguments, result and errors are those of `exp`.
    """
    return _apply("sigmoid", {"x": x}, dtype=dtype, out=out, backend=backend)


def tanh(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """The hyperbolic tangent.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("tanh", {"x": x}, dtype=dtype, out=out, backend=backend)


def silu(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """x * sigmoid(x).

    Arguments, result and errors are those of `exp`.
    """
    return _apply("silu", {"x": x}, dtype=dtype, out=out, backend=backend)


def _gelu_form(approximate: str, name: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; pass 'none' or 'tanh'")
    return name if approximate == "none" else f"gelu_tanh{name.removeprefix('gelu')}"


def gelu(
    x: Any, /, *, approximate: str = "none", dtype: Any = None, out: Any = None, backend: str | None = None
) -> Any:
    """x times the probability that a normal variable is less than x: x * (1 + erf(x / sqrt(2))) / 2.

    Args:
        x, dtype, out, backend: as in `exp`.
        approximate: "tanh" for x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2 instead.

    Result and errors are those of `exp`; ValueError for another `approximate`.
    """
    return _apply(_gelu_form(approximate, "gelu"), {"x": x}, dtype=dtype, out=out, backend=backend)


def softplus(
    x: Any,
    /,
    *,
    beta: float = 1.0,
    threshold: float = 20.0,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """log(1 + exp(beta * x)) / beta, and x where beta * x exceeds the threshold.

    Args:
        x, dtype, out, backend: as in `exp`.
        beta, threshold: real numbers, rounded once to the accumulate dtype.

    Result and errors are those of `exp`.
    """
    return _apply(
        "softplus", {"x": x}, (real(beta, "beta"), real(threshold, "threshold")), dtype=dtype, out=out, backend=backend
    )


def sin(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Sine of x in radians, of any size.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("sin", {"x": x}, dtype=dtype, out=out, backend=backend)


def cos(x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Cosine of x in radians, of any size.

    Arguments, result and errors are those of `exp`.
    """
    return _apply("cos", {"x": x}, dtype=dtype, out=out, backend=backend)


def pow(  # noqa: A001  (NumPy's name)
    x: Any, y: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None
) -> Any:
    """x to the power y, with the values at zeros, infinities and NaN of IEEE 754's pow.

    Args:
        x: as in `exp`.
        y: an array that broadcasts with x, of its dtype (any, if `dtype` is given), or a real number.
        dtype: both are cast to it first; by default that of x.
        out: of the shape that x and y broadcast to; it may be y itself, or x itself if y is a number.
        backend: as in `exp`.

    Result and errors are those of `exp`; ValueError if the shapes do not broadcast, TypeError if the dtypes differ.

    x^1 and x^2 are exact products, rounded once.
    """
    if isinstance(y, int | float):
        return _apply("pow", {"x": x}, (real(y, "y"),), dtype=dtype, out=out, backend=backend)
    return _apply("pow", {"x": x, "y": y}, dtype=dtype, out=out, backend=backend)


def sigmoid_backward(grad: Any, y: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Gradient of `sigmoid` with respect to x: grad * (1 - y) * y.

    Args:
        grad: gradient with respect to the result y; bfloat16, float16, float32 or float64, with any strides.
        y: the result of `sigmoid`, of the dtype of grad (any, if `dtype` is given), which broadcasts with it.
        dtype: both are cast to it first, and the result has it; by default that of grad.
        out: array for the result, of its shape and dtype; y itself, or one that shares no memory with the operands.
        backend: as in `exp`.

    Result and errors are those of `exp`; ValueError if the shapes do not broadcast, TypeError if the dtypes differ.
    """
    return _apply("sigmoid_backward", {"grad": grad, "y": y}, dtype=dtype, out=out, backend=backend)


def tanh_backward(grad: Any, y: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Gradient of `tanh` with respect to x: grad * (1 - y^2).

    Arguments, result and errors are those of `sigmoid_backward`, with y the result of `tanh`.
    """
    return _apply("tanh_backward", {"grad": grad, "y": y}, dtype=dtype, out=out, backend=backend)


def silu_backward(grad: Any, x: Any, /, *, dtype: Any = None, out: Any = None, backend: str | None = None) -> Any:
    """Gradient of `silu` with respect to x, with s = sigmoid(x): grad * s * (1 + x * (1 - s)).

    Arguments, result and errors are those of `sigmoid_backward`, with x in the place of y.
    """
    return _apply("silu_backward", {"grad": grad, "x": x}, dtype=dtype, out=out, backend=backend)


def gelu_backward(
    grad: Any, x: Any, /, *, approximate: str = "none", dtype: Any = None, out: Any = None, backend: str | None = None
) -> Any:
    """Gradient of `gelu` with respect to x: grad * (P(x) + x * p(x)), with the normal distribution's P and density p.

    Arguments, result and errors are those of `sigmoid_backward`, with x in the place of y, and
    `approximate` as in `gelu`.
    """
    return _apply(
        _gelu_form(approximate, "gelu_backward"), {"grad": grad, "x": x}, dtype=dtype, out=out, backend=backend
    )


def softplus_backward(
    grad: Any,
    x: Any,
    /,
    *,
    beta: float = 1.0,
    threshold: float = 20.0,
    dtype: Any = None,
    out: Any = None,
    backend: str | None = None,
) -> Any:
    """Gradient of `softplus` with respect to x: grad * sigmoid(beta * x), or grad if beta * x > threshold.

    Arguments, result and errors are those of `sigmoid_backward`, with x in the place of y, and
    `beta` and `threshold` as in `softplus`.
    """
    return _apply(
        "softplus_backward",
        {"grad": grad, "x": x},
        (real(beta, "beta"), real(threshold, "threshold")),
        dtype=dtype,
        out=out,
        backend=backend,
    )
