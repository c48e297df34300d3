"""softmax and log_softmax along any dimension, and their backward forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import core

Compute = Callable[[torch.Tensor, torch.Tensor, int], None]


def row_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum along a dimension, kept with length 1: the core's mean, in which the sum tree is, times the length."""
    return torch.ops.bikernels.mean(x, (dim,), True) * x.shape[dim]


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def fill(compute: Compute, out: torch.Tensor, x: torch.Tensor, dim: int) -> None:
    """Let `compute` fill out; a 0-dimensional tensor is a row of one element."""
    if x.dim() == 0:
        out, x = out.view(1), x.view(1)
    compute(out, x, dim)


def _forward(compute: Compute) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def accepts(x: torch.Tensor, dim: int, half_to_float: bool) -> bool:
        rank = max(x.dim(), 1)
        # PyTorch knows float16 -> float32 on a GPU only, and says so elsewhere.
        widens = x.is_cuda and x.dtype is torch.float16
        return x.dtype in core.FLOATS and -rank <= dim < rank and (widens or not half_to_float)

    def functional(original: Any, x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        if not accepts(x, dim, half_to_float):
            return original(x, dim, half_to_float)
        out = torch.empty(x.shape, dtype=torch.float32 if half_to_float else x.dtype, device=x.device)
        fill(compute, out, x, dim)
        return out

    def with_out(original: Any, x: torch.Tensor, dim: int, half_to_float: bool, *, out: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if half_to_float else x.dtype
        if not accepts(x, dim, half_to_float) or out.dtype is not dtype or out.device != x.device:
            return original(x, dim, half_to_float, out=out)
        return core.write(out, tuple(x.shape), (x,), lambda result: fill(compute, result, x, dim))

    return functional, with_out


def softmax_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """y * (grad - sum(grad * y)), in the accumulate dtype, rounded once to `dtype`."""
    accumulate = _accumulate(grad.dtype)
    grad, y = grad.to(accumulate), y.to(accumulate)
    product = grad * y
    return (product - y * row_sum(product, dim)).to(dtype)


def log_softmax_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """grad - exp(y) * sum(grad), in the accumulate dtype, rounded once to `dtype`."""
    accumulate = _accumulate(grad.dtype)
    grad, y = grad.to(accumulate), y.to(accumulate)
    return (grad - y.exp() * row_sum(grad, dim)).to(dtype)


def _backward(gradient: Callable[..., torch.Tensor], out_name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def accepts(grad: torch.Tensor, y: torch.Tensor, dim: int) -> bool:
        return grad.dtype in core.FLOATS and grad.dtype is y.dtype and grad.shape == y.shape and grad.dim() > 0

    def functional(original: Any, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        if not accepts(grad, y, dim):
            return original(grad, y, dim, dtype)
        return gradient(grad, y, dim, dtype)

    def with_out(
        original: Any, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype, **keywords: torch.Tensor
    ) -> torch.Tensor:
        out = keywords[out_name]
        if not accepts(grad, y, dim) or out.dtype is not dtype:
            return original(grad, y, dim, dtype, **keywords)
        return core.store(out, gradient(grad, y, dim, dtype))

    return functional, with_out


_softmax, _softmax_out = _forward(core.softmax)
_log_softmax, _log_softmax_out = _forward(core.log_softmax)
_softmax_backward, _softmax_backward_out = _backward(softmax_gradient, "grad_input")
_log_softmax_backward, _log_softmax_backward_out = _backward(log_softmax_gradient, "out")

OVERRIDES: dict[str, Callable[..., Any]] = {
    "_softmax": _softmax,
    "_softmax.out": _softmax_out,
    "_log_softmax": _log_softmax,
    "_log_softmax.out": _log_softmax_out,
    "_softmax_backward_data": _softmax_backward,
    "_softmax_backward_data.out": _softmax_backward_out,
    "_log_softmax_backward_data": _log_softmax_backward,
    "_log_softmax_backward_data.out": _log_softmax_backward_out,
}
