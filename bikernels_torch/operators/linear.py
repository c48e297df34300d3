"""linear: always one product with the bias in its epilogue.

PyTorch adds the bias inside the product or after it, with one rounding or two, depending on the input's rank and on
whether it is contiguous; a batch of one is contiguous more often than a batch of many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import core


def _accepts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether PyTorch would go one of those two ways."""
    return (
        bias is not None
        and bias.dim() == 1
        and weight.dim() == 2
        and x.dim() > 0
        and x.dtype in core.FLOATS
        and x.device.type in ("cpu", "cuda")
        and all(t.layout is torch.strided and not t.is_nested for t in (x, weight, bias))
    )


def linear(original: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias for x (..., K), weight (N, K), bias (N,)."""
    if not _accepts(x, weight, bias):
        return original(x, weight, bias)
    assert bias is not None
    if x.dim() == 2:
        return torch.addmm(bias, x, weight.t())
    rows = x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    return torch.addmm(bias, rows, weight.t()).view(*x.shape[:-1], weight.shape[0])


def linear_out(
    original: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor
) -> torch.Tensor:
    """As `linear`, into out."""
    if not _accepts(x, weight, bias) or out.dtype is not x.dtype:
        return original(x, weight, bias, out=out)
    return core.store(out, torch.nn.functional.linear(x, weight, bias))


OVERRIDES: dict[str, Callable[..., Any]] = {"linear": linear}
OUT_OVERRIDES: dict[str, Callable[..., Any]] = {"linear.out": linear_out}
