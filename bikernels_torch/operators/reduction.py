"""mean, sum, var, std and logsumexp over one dimension, several, or all.

The forms without dimensions, and those with `unbiased`, are made of these by PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import bikernels

from .. import core
from ..plans import planned, planned_into


def normalise(x: torch.Tensor, dim: Sequence[int] | None) -> tuple[int, ...] | None:
    """The dimensions counted from 0, ascending (None or [] means all); None where PyTorch raises."""
    rank = max(x.dim(), 1)
    if not dim:
        return tuple(range(x.dim()))
    if any(not -rank <= one < rank for one in dim):
        return None
    axes = tuple(sorted({one % rank for one in dim}))
    return axes if len(axes) == len(dim) else None


def result_shape(x: torch.Tensor, axes: tuple[int, ...], keepdim: bool) -> tuple[int, ...]:
    """The shape of a reduction over `axes`."""
    if keepdim:
        return tuple(1 if i in axes else length for i, length in enumerate(x.shape))
    return tuple(length for i, length in enumerate(x.shape) if i not in axes)


def fill(
    operation: Callable[..., Any],
    out: torch.Tensor,
    x: torch.Tensor,
    axes: tuple[int, ...],
    keepdim: bool,
    **options: Any,
) -> None:
    """Write the core's reduction of x over `axes` to out."""
    axis = axes if x.dim() else None  # a 0-d tensor may be said to have a dimension 0
    core.reduce(operation, out, x, axis, keepdim, **options)


def _reduced(
    operation: Callable[..., Any],
    x: torch.Tensor,
    axes: tuple[int, ...],
    keepdim: bool,
    dtype: torch.dtype,
    **options: Any,
) -> torch.Tensor:
    out = torch.empty(result_shape(x, axes, keepdim), dtype=dtype, device=x.device)
    fill(operation, out, x, axes, keepdim, **options)
    return out


def _write(
    operation: Callable[..., Any],
    out: torch.Tensor,
    x: torch.Tensor,
    axes: tuple[int, ...],
    keepdim: bool,
    **options: Any,
) -> torch.Tensor:
    def compute(target: torch.Tensor) -> None:
        fill(operation, target, x, axes, keepdim, **options)

    return core.write(out, result_shape(x, axes, keepdim), (x,), compute)


# ----------------------------------------------------------------------------------------------------------- mean, sum


def _accepts(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return dtype in core.FLOATS and core.is_readable(x)


def _with_dtype(operation: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """aten's form with dim and dtype, and its out form, which without dtype= computes in the dtype of out."""

    def functional(
        original: Any,
        x: torch.Tensor,
        dim: Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        axes, result = normalise(x, dim), dtype or x.dtype  # of integers PyTorch's sum is an integer
        if axes is None or not _accepts(x, result):
            return original(x, dim, keepdim, dtype=dtype)
        return _reduced(operation, x, axes, keepdim, result)

    def with_out(
        original: Any,
        x: torch.Tensor,
        dim: Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        axes, result = normalise(x, dim), dtype or out.dtype
        if axes is None or not _accepts(x, result) or out.dtype is not result or out.device != x.device:
            return original(x, dim, keepdim, dtype=dtype, out=out)
        return _write(operation, out, x, axes, keepdim)

    return planned(functional), planned_into(with_out)


# ------------------------------------------------------------------------------------------------------------ var, std


def _of_sample(operation: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """aten's var.correction or std.correction, its out form, and the form that gives the mean too."""

    def prepare(x: torch.Tensor, dim: Sequence[int] | None, correction: Any) -> tuple[tuple[int, ...] | None, float]:
        axes = normalise(x, dim) if x.dtype in core.FLOATS else None
        return axes, 1.0 if correction is None else correction

    def functional(
        original: Any,
        x: torch.Tensor,
        dim: Sequence[int] | None = None,
        *,
        correction: Any = None,
        keepdim: bool = False,
    ) -> torch.Tensor:
        axes, less = prepare(x, dim, correction)
        if axes is None:
            return original(x, dim, correction=correction, keepdim=keepdim)
        return _reduced(operation, x, axes, keepdim, x.dtype, correction=less)

    def with_out(
        original: Any,
        x: torch.Tensor,
        dim: Sequence[int] | None = None,
        *,
        correction: Any = None,
        keepdim: bool = False,
        out: torch.Tensor,
    ) -> torch.Tensor:
        axes, less = prepare(x, dim, correction)
        if axes is None or out.dtype is not x.dtype or out.device != x.device:
            return original(x, dim, correction=correction, keepdim=keepdim, out=out)
        return _write(operation, out, x, axes, keepdim, correction=less)

    def with_mean(
        original: Any,
        x: torch.Tensor,
        dim: Sequence[int] | None = None,
        *,
        correction: Any = None,
        keepdim: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        axes, less = prepare(x, dim, correction)
        if axes is None:
            return original(x, dim, correction=correction, keepdim=keepdim)
        reduced = functools.partial(_reduced, x=x, axes=axes, keepdim=keepdim, dtype=x.dtype)
        return reduced(operation, correction=less), reduced(bikernels.mean)

    return planned(functional), planned_into(with_out), planned(with_mean)


# ----------------------------------------------------------------------------------------------------------- logsumexp


def logsumexp(original: Any, x: torch.Tensor, dim: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """aten::logsumexp."""
    axes = normalise(x, dim) if x.dtype in core.FLOATS and dim else None  # no dimensions mean none here
    if axes is None:
        return original(x, dim, keepdim)
    return _reduced(bikernels.logsumexp, x, axes, keepdim, x.dtype)


def logsumexp_out(
    original: Any, x: torch.Tensor, dim: Sequence[int], keepdim: bool = False, *, out: torch.Tensor
) -> torch.Tensor:
    """aten::logsumexp.out."""
    axes = normalise(x, dim) if x.dtype in core.FLOATS and dim else None
    if axes is None or out.dtype is not x.dtype or out.device != x.device:
        return original(x, dim, keepdim, out=out)
    return _write(bikernels.logsumexp, out, x, axes, keepdim)


_mean, _mean_out = _with_dtype(bikernels.mean)
_sum, _sum_out = _with_dtype(bikernels.sum)
_var, _var_out, _var_mean = _of_sample(bikernels.var)
_std, _std_out, _std_mean = _of_sample(bikernels.std)

OVERRIDES: dict[str, Callable[..., Any]] = {
    "mean.dim": _mean,
    "mean.out": _mean_out,
    "sum.dim_IntList": _sum,
    "sum.IntList_out": _sum_out,
    "var.correction": _var,
    "var.correction_out": _var_out,
    "var_mean.correction": _var_mean,
    "std.correction": _std,
    "std.correction_out": _std_out,
    "std_mean.correction": _std_mean,
    "logsumexp": planned(logsumexp),
    "logsumexp.out": planned_into(logsumexp_out),
}
