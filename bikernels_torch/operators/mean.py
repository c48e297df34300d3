"""mean over one dimension, several, or all; the forms without dimensions are made of these by PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import core


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
    """The shape of the mean over `axes`."""
    if keepdim:
        return tuple(1 if i in axes else length for i, length in enumerate(x.shape))
    return tuple(length for i, length in enumerate(x.shape) if i not in axes)


def fill(out: torch.Tensor, x: torch.Tensor, axes: tuple[int, ...], keepdim: bool) -> None:
    """Write the mean of x over `axes` to out."""
    core.mean(out, x, axes if x.dim() else None, keepdim)  # a 0-d tensor may be said to have a dimension 0


def _accepts(x: torch.Tensor, dtype: torch.dtype) -> bool:
    return dtype in core.FLOATS and core.is_readable(x)


def mean(
    original: Any,
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """aten::mean.dim."""
    axes, result = normalise(x, dim), dtype or x.dtype
    if axes is None or not _accepts(x, result):
        return original(x, dim, keepdim, dtype=dtype)
    out = torch.empty(result_shape(x, axes, keepdim), dtype=result, device=x.device)
    fill(out, x, axes, keepdim)
    return out


def mean_out(
    original: Any,
    x: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """aten::mean.out; without dtype= the result is computed in out's."""
    axes, result = normalise(x, dim), dtype or out.dtype
    if axes is None or not _accepts(x, result) or out.dtype is not result or out.device != x.device:
        return original(x, dim, keepdim, dtype=dtype, out=out)
    shape = result_shape(x, axes, keepdim)
    return core.write(out, shape, (x,), lambda target: fill(target, x, axes, keepdim))


OVERRIDES: dict[str, Callable[..., Any]] = {"mean.dim": mean, "mean.out": mean_out}
