"""linear: always one product with the bias in its epilogue.

PyTorch adds the bias inside the product or after it, with one rounding or two, depending on the input's rank and on
whether it is contiguous; a batch of one is contiguous more often than a batch of many.

Where autograd does not follow, linear is a kernel of its own, so that it costs the host one call of an operator, not
four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import core, dispatch
from ..plans import planned
from .matmul import accepts, product, product_shape


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
    if dispatch.autograd_is_idle(x, weight, bias):
        return without_autograd(original, x, weight, bias)
    return _composed(original, x, weight, bias)


def _composed(original: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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


@planned
def without_autograd(
    original: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same as one call of the core."""
    if x.numel() == 0 or x.dim() == 0 or weight.dim() != 2:
        return _composed(original, x, weight, bias)
    rows, columns = x.reshape(-1, x.shape[-1]), weight.t()
    shape = product_shape(rows, columns, 2, 2)
    if shape is None or (bias is not None and bias.dim() != 1) or not accepts(bias, shape, rows, x.dtype, 1, 1):
        return _composed(original, x, weight, bias)
    out = torch.empty((*x.shape[:-1], shape[1]), dtype=x.dtype, device=x.device)
    product(bias, rows, columns, out.view(shape), 1, 1)
    return out


OVERRIDES: dict[str, Callable[..., Any]] = {"linear": linear}
BELOW_AUTOGRAD: dict[str, Callable[..., Any]] = {"linear": without_autograd}
OUT_OVERRIDES: dict[str, Callable[..., Any]] = {"linear.out": linear_out}
