"""softmax and log_softmax along any dimension, and their backward forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bikernels

from .. import core
from ..plans import planned, planned_into

Operation = Callable[..., Any]


def fill(operation: Operation, out: torch.Tensor, operands: tuple[torch.Tensor, ...], dim: int) -> None:
    """Write a row of results for each row to out, by the core; 0-dimensional tensors are rows of one element."""
    if out.dim() == 0:
        out, operands = out.view(1), tuple(one.view(1) for one in operands)
    core.along_rows(operation, out, operands, dim)


def _forward(operation: Operation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def accepts(x: torch.Tensor, dim: int, half_to_float: bool) -> bool:
        rank = max(x.dim(), 1)
        # PyTorch knows float16 -> float32 on a GPU only, and says so elsewhere.
        widens = x.is_cuda and x.dtype is torch.float16
        return x.dtype in core.FLOATS and -rank <= dim < rank and (widens or not half_to_float)

    def functional(original: Any, x: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
        if not accepts(x, dim, half_to_float):
            return original(x, dim, half_to_float)
        out = torch.empty(x.shape, dtype=torch.float32 if half_to_float else x.dtype, device=x.device)
        fill(operation, out, (x,), dim)
        return out

    def with_out(original: Any, x: torch.Tensor, dim: int, half_to_float: bool, *, out: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if half_to_float else x.dtype
        if not accepts(x, dim, half_to_float) or out.dtype is not dtype or out.device != x.device:
            return original(x, dim, half_to_float, out=out)
        return core.write(out, tuple(x.shape), (x,), lambda result: fill(operation, result, (x,), dim))

    return planned(functional), planned_into(with_out)


def _backward(operation: Operation, out_name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def accepts(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> bool:
        rank = max(y.dim(), 1)
        return (
            grad.dtype in core.FLOATS
            and grad.dtype is y.dtype
            and (dtype is y.dtype or (dtype is torch.float16 and y.dtype is torch.float32 and y.is_cuda))
            and grad.shape == y.shape
            and grad.device == y.device
            and -rank <= dim < rank
        )

    def functional(original: Any, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        if not accepts(grad, y, dim, dtype):
            return original(grad, y, dim, dtype)
        out = torch.empty(y.shape, dtype=dtype, device=y.device)
        fill(operation, out, (grad, y), dim)
        return out

    def with_out(
        original: Any, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype, **keywords: torch.Tensor
    ) -> torch.Tensor:
        out = keywords[out_name]
        if not accepts(grad, y, dim, dtype) or out.dtype is not dtype or out.device != y.device:
            return original(grad, y, dim, dtype, **keywords)
        return core.write(out, tuple(y.shape), (grad, y), lambda result: fill(operation, result, (grad, y), dim))

    return planned(functional), with_out


_softmax, _softmax_out = _forward(bikernels.softmax)
_log_softmax, _log_softmax_out = _forward(bikernels.log_softmax)
_softmax_backward, _softmax_backward_out = _backward(bikernels.softmax_backward, "grad_input")
_log_softmax_backward, _log_softmax_backward_out = _backward(bikernels.log_softmax_backward, "out")

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
