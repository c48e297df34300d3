"""Matrix products: mm, bmm, mv, dot, their adding forms, and all of these with `out=` and in place.

`torch.matmul`, `einsum`, `tensordot` and `nn.Bilinear` are made of them by PyTorch, whatever the ranks; the products of
several matrices, and those that PyTorch sometimes computes otherwise, are made of them here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import core
from ..plans import planned, planned_into

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

    forms: dict[str, Callable[..., Any]] = {name: planned(functional), f"{name}.out": planned_into(with_out)}
    if addend:
        forms[f"{name}_"] = planned_into(in_place)
    if a_rank == b_rank > 1:
        forms[f"{name}.dtype"] = planned(wider)
        forms[f"{name}.dtype_out"] = planned_into(wider_out)
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


# -------------------------------------------------------------------------------------------- products of many matrices


def multi_dot(original: Any, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """((t0 @ t1) @ t2) @ ...: PyTorch takes the cheapest order, which follows from the sizes, the batch's too."""
    if len(tensors) < 3 or any(t.dtype not in core.FLOATS for t in tensors) or not _chains(tensors):
        return original(tensors)
    return functools.reduce(torch.matmul, tensors)


def multi_dot_out(original: Any, tensors: Sequence[torch.Tensor], *, out: torch.Tensor) -> torch.Tensor:
    """As `multi_dot`, into out."""
    if len(tensors) < 3 or out.dtype is not tensors[0].dtype or out.device != tensors[0].device:
        return original(tensors, out=out)
    return core.store(out, torch.linalg.multi_dot([*tensors]))


def _chains(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch would compute: matrices whose sizes agree, of one dtype and device; vectors at the ends only."""
    first, *middle, last = tensors
    if any(t.dim() != 2 for t in middle) or first.dim() not in (1, 2) or last.dim() not in (1, 2):
        return False
    return all(
        a.shape[-1] == b.shape[0] and a.dtype is b.dtype and a.device == b.device
        for a, b in itertools.pairwise(tensors)
    )


def vecdot(original: Any, x: torch.Tensor, y: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
    """The dot products along a dimension: PyTorch multiplies element by element and sums, or calls vdot."""
    if not _pairs(x, y, dim):
        return original(x, y, dim=dim)
    x, y = (t.movedim(dim, -1) for t in torch.broadcast_tensors(x, y))
    return (x.unsqueeze(-2) @ y.unsqueeze(-1)).squeeze((-2, -1))


def vecdot_out(original: Any, x: torch.Tensor, y: torch.Tensor, *, dim: int = -1, out: torch.Tensor) -> torch.Tensor:
    """As `vecdot`, into out."""
    if not _pairs(x, y, dim) or out.dtype is not x.dtype or out.device != x.device:
        return original(x, y, dim=dim, out=out)
    return core.store(out, torch.linalg.vecdot(x, y, dim=dim))


def _pairs(x: torch.Tensor, y: torch.Tensor, dim: int) -> bool:
    """Whether PyTorch would compute the dot products of x and y along dim."""
    if x.dtype not in core.FLOATS or x.dtype is not y.dtype or x.device != y.device or min(x.dim(), y.dim()) == 0:
        return False
    if not all(-t.dim() <= dim < t.dim() and t.shape[dim] == x.shape[dim] for t in (x, y)):
        return False
    try:
        torch.broadcast_shapes(x.shape, y.shape)
    except RuntimeError:
        return False
    return True


def cdist(original: Any, x: torch.Tensor, y: torch.Tensor, p: float = 2.0, mode: int | None = None) -> torch.Tensor:
    """Distances from differences, unless the caller asks for a product; left to itself PyTorch counts the rows."""
    never = 2
    return original(x, y, p, mode or never)


def foreach_mm(original: Any, left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One mm for each pair."""
    if len(left) != len(right) or not left:
        return original(left, right)
    return [torch.mm(a, b) for a, b in zip(left, right, strict=True)]


_grouped_on_cpu = torch.library.get_kernel("aten::_grouped_mm", "CPU")


def grouped_mm(_: Any, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """One mm for each group: what PyTorch does on a CPU, after it has checked the operands, for any device.

    On a GPU it waits for the offsets, so it cannot be captured in a CUDA graph.
    """
    return _grouped_on_cpu.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments, **keywords)


def contract_left_to_right() -> Callable[[], None]:
    """Let einsum of three operands or more go from left to right: opt_einsum's order follows from the sizes.

    The returned function puts the switch back where it was.
    """
    before = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False

    def restore() -> None:
        torch.backends.opt_einsum.enabled = before

    return restore


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
    "_foreach_mm": foreach_mm,
    "_grouped_mm": grouped_mm,
}
"""Overload of aten -> override. Where PyTorch has no such overload there is nothing to replace."""

COMPOSITE_OVERRIDES: dict[str, Callable[..., Any]] = {
    "linalg_multi_dot": multi_dot,
    "linalg_multi_dot.out": multi_dot_out,
    "chain_matmul": multi_dot,
    "chain_matmul.out": multi_dot_out,
    "linalg_vecdot": vecdot,
    "linalg_vecdot.out": vecdot_out,
    "cdist": cdist,
}
