"""Matrix products: mm, bmm, mv, dot, their adding forms, and all of these with `out=` and in place.

`torch.matmul`, `einsum` and `tensordot` are made of them, whatever the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import core

Shape = tuple[int, ...]


def product_shape(a: torch.Tensor, b: torch.Tensor, a_rank: int, b_rank: int) -> Shape | None:
    """The shape of a @ b, or None where PyTorch computes it (other dtypes) or raises (what does not match)."""
    if a.dtype not in core.FLOATS or a.dtype is not b.dtype or a.device != b.device:
        return None
    if a.dim() != a_rank or b.dim() != b_rank:
        return None
    k_of_b = b_rank - 1 if b_rank == 1 else b_rank - 2
    if a.shape[-1] != b.shape[k_of_b] or (a_rank == 3 and a.shape[0] != b.shape[0]):
        return None
    return (*a.shape[:-1], *b.shape[k_of_b + 1 :])


def product(c: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, alpha: Any, beta: Any) -> None:
    """out = beta * c + alpha * (a @ b)."""
    if c is None:
        core.matmul(out, a, b)
    else:
        core.addmm(out, c, a, b, alpha, beta)


def accepts(c: torch.Tensor | None, shape: Shape, a: torch.Tensor, dtype: torch.dtype, alpha: Any, beta: Any) -> bool:
    """Whether the addend and the factors are such that PyTorch would compute."""
    if c is None:
        return True
    if (c.dtype is not a.dtype and c.dtype is not dtype) or c.device != a.device:
        return False
    if isinstance(alpha, complex) or isinstance(beta, complex):
        return False
    if c.shape == shape:
        return True
    missing = len(shape) - c.dim()
    return missing >= 0 and all(have in (1, want) for have, want in zip(c.shape, shape[missing:], strict=True))


def _forms(name: str, a_rank: int, b_rank: int, *, addend: bool = False) -> dict[str, Callable[..., Any]]:
    """The overrides of one operator: functional, with out=, in place, and with a wider dtype of the result."""

    def run(
        original: Callable[..., Any],
        operands: tuple[torch.Tensor, ...],
        factors: dict[str, Any],
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        c = operands[0] if addend else None
        a, b = operands[-2:]
        wanted = dtype or a.dtype
        alpha, beta = factors.get("alpha", 1), factors.get("beta", 1)
        shape = product_shape(a, b, a_rank, b_rank)
        if (
            shape is None
            or wanted not in (a.dtype, torch.float32)
            or not accepts(c, shape, a, wanted, alpha, beta)
            or (out is not None and (out.dtype is not wanted or out.device != a.device))
            or (in_place and out is not None and out.shape != shape)
        ):
            arguments = operands if dtype is None else (*operands, dtype)
            if out is not None and not in_place:
                factors = {**factors, "out": out}
            return original(*arguments, **factors)
        if out is None:
            out = torch.empty(shape, dtype=wanted, device=a.device)
            product(c, a, b, out, alpha, beta)
            return out
        others = (a, b) if c is None or c is out else (c, a, b)
        return core.write(out, shape, others, lambda result: product(c, a, b, result, alpha, beta))

    def functional(original: Any, *operands: torch.Tensor, **factors: Any) -> torch.Tensor:
        return run(original, operands, factors)

    def with_out(original: Any, *operands: torch.Tensor, out: torch.Tensor, **factors: Any) -> torch.Tensor:
        return run(original, operands, factors, out=out)

    def in_place(original: Any, *operands: torch.Tensor, **factors: Any) -> torch.Tensor:
        return run(original, operands, factors, out=operands[0], in_place=True)

    def wider(original: Any, *operands: Any, **factors: Any) -> torch.Tensor:
        return run(original, operands[:-1], factors, operands[-1])

    def wider_out(original: Any, *operands: Any, out: torch.Tensor, **factors: Any) -> torch.Tensor:
        return run(original, operands[:-1], factors, operands[-1], out)

    forms: dict[str, Callable[..., Any]] = {name: functional, f"{name}.out": with_out}
    if addend:
        forms[f"{name}_"] = in_place
    if a_rank == b_rank > 1:
        forms[f"{name}.dtype"] = wider
        forms[f"{name}.dtype_out"] = wider_out
    return forms


# ------------------------------------------------------------------------------------ products that are made of addmm


def _joined(batch1: torch.Tensor, batch2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of one product whose K runs over all the batch's products, one after the other."""
    batch, m, k = batch1.shape
    return batch1.permute(1, 0, 2).reshape(m, batch * k), batch2.reshape(batch * k, batch2.shape[2])


def _joins(out: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor) -> bool:
    return product_shape(batch1, batch2, 3, 3) is not None and out.dtype is batch1.dtype


def addbmm(original: Any, c: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **factors: Any) -> torch.Tensor:
    """beta * c + alpha * (sum over the batch of batch1[i] @ batch2[i]), as one fold."""
    if not _joins(factors.get("out", c), batch1, batch2):
        return original(c, batch1, batch2, **factors)
    return torch.addmm(c, *_joined(batch1, batch2), **factors)


def addbmm_(original: Any, c: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **factors: Any) -> torch.Tensor:
    """As addbmm, into c."""
    if not _joins(c, batch1, batch2):
        return original(c, batch1, batch2, **factors)
    return c.addmm_(*_joined(batch1, batch2), **factors)


def addmm_activation(
    _: Any, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, use_gelu: bool = False, **rest: Any
) -> torch.Tensor:
    """relu or gelu of addmm, which knows what is PyTorch's to compute."""
    out = torch.addmm(c, a, b, **rest)
    if not use_gelu:
        return out.relu_()
    return torch.ops.aten.gelu_(out, approximate="tanh" if out.is_cuda else "none")


OVERRIDES: dict[str, Callable[..., Any]] = {
    **_forms("mm", 2, 2),
    **_forms("bmm", 3, 3),
    **_forms("mv", 2, 1),
    **_forms("dot", 1, 1),
    **_forms("vdot", 1, 1),
    **_forms("addmm", 2, 2, addend=True),
    **_forms("baddbmm", 3, 3, addend=True),
    **_forms("addmv", 2, 1, addend=True),
    "addbmm": addbmm,
    "addbmm.out": addbmm,
    "addbmm_": addbmm_,
    "_addmm_activation": addmm_activation,
    "_addmm_activation.out": addmm_activation,
}
"""Overload of aten -> override. Where PyTorch has no such overload there is nothing to replace."""
