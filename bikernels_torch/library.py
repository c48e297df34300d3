"""torch.ops.bikernels: the core's operations as PyTorch operators of their own, whether the mode is on or not.

    mm(a, b, *, dtype=None)                        a (M, K), b (K, N)
    bmm(a, b, *, dtype=None)                       a (B, M, K), b (B, K, N)
    addmm(c, a, b, *, beta=1, alpha=1)             c broadcasts to (M, N)
    baddbmm(c, a, b, *, beta=1, alpha=1)           c broadcasts to (B, M, N)
    matmul(a, b)                                   torch.matmul's rules for ranks and batch dimensions
    log_softmax(x, dim, *, dtype=None)             softmax(x, dim, *, dtype=None)
    mean(x, dim=None, keepdim=False, *, dtype=None)

Floating-point CPU and CUDA tensors; `dtype` is that of the result, for products that of the operands or float32. They
have gradients and fake kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import core
from .operators import matmul as products
from .operators import mean as means
from .operators import softmax as softmaxes

_library = torch.library.Library("bikernels", "DEF")

Scalar = int | float


def _operator(
    schema: str, compute: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor], backward: Any, context: Any
) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, compute, key)
    torch.library.register_fake(f"bikernels::{name}", fake, lib=_library)
    torch.library.register_autograd(f"bikernels::{name}", backward, setup_context=context, lib=_library)


# ----------------------------------------------------------------------------------------------------- matrix products


def _product_like(
    rank: int, c: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None
) -> torch.Tensor:
    """An empty tensor for the product; raises where the operands do not fit."""
    shape = products.product_shape(a, b, rank, rank)
    if shape is None:
        raise ValueError(
            f"a is {_describe(a)} and b is {_describe(b)}; pass {rank}-dimensional floating-point tensors of one "
            "dtype, on one device, whose shapes match as in torch.matmul"
        )
    if dtype not in (None, a.dtype, torch.float32):
        raise TypeError(f"dtype is {dtype}; the result of a product of {a.dtype} may be {a.dtype} or torch.float32")
    out = a.new_empty(shape, dtype=dtype)
    if c is not None and not products.accepts(c, shape, a, out.dtype, 1, 1):
        raise ValueError(f"c is {_describe(c)}; pass {a.dtype} on {a.device}, of a shape that broadcasts to {shape}")
    return out


def _describe(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"


def _define_product(name: str, rank: int) -> None:
    def compute(a: torch.Tensor, b: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        out = _product_like(rank, None, a, b, dtype)
        core.matmul(out, a, b)
        return out

    def fake(a: torch.Tensor, b: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return _product_like(rank, None, a, b, dtype)

    def context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        return _product_gradients(ctx.needs_input_grad, grad.to(a.dtype), a, b, getattr(torch.ops.bikernels, name))

    _operator(f"{name}(Tensor a, Tensor b, *, ScalarType? dtype=None) -> Tensor", compute, fake, backward, context)


def _define_sum_of_product(name: str, rank: int, product: str) -> None:
    def compute(
        c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Scalar = 1, alpha: Scalar = 1
    ) -> torch.Tensor:
        out = _product_like(rank, c, a, b, None)
        core.addmm(out, c, a, b, alpha, beta)
        return out

    def fake(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Scalar = 1, alpha: Scalar = 1) -> torch.Tensor:
        return _product_like(rank, c, a, b, None)

    def context(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: torch.Tensor) -> None:
        c, a, b = inputs
        ctx.save_for_backward(a, b)
        ctx.shape = c.shape
        ctx.alpha, ctx.beta = keyword_only_inputs["alpha"], keyword_only_inputs["beta"]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        c_grad = (grad * ctx.beta).sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None
        operator = getattr(torch.ops.bikernels, product)
        return c_grad, *_product_gradients(ctx.needs_input_grad[1:], grad * ctx.alpha, a, b, operator)

    schema = f"{name}(Tensor c, Tensor a, Tensor b, *, Scalar beta=1, Scalar alpha=1) -> Tensor"
    _operator(schema, compute, fake, backward, context)


def _product_gradients(
    needed: Sequence[bool], grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, product: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (product(grad, b.mT) if needed[0] else None, product(a.mT, grad) if needed[1] else None)


_define_product("mm", 2)
_define_product("bmm", 3)
_define_sum_of_product("addmm", 2, "mm")
_define_sum_of_product("baddbmm", 3, "bmm")


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.matmul's rules, made of mm and bmm."""
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"a is {_describe(a)} and b is {_describe(b)}; pass tensors of at least 1 dimension")
    rows = a.unsqueeze(0) if a.dim() == 1 else a
    columns = b.unsqueeze(1) if b.dim() == 1 else b
    if rows.dim() == 2 and columns.dim() == 2:
        out = torch.ops.bikernels.mm(rows, columns)
    else:
        batch = torch.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
        # reshape, and so a copy, only where the batch dimensions do not lie behind one another
        left, right = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (rows, columns))
        out = torch.ops.bikernels.bmm(left, right).view(*batch, rows.shape[-2], columns.shape[-1])
    if b.dim() == 1:
        out = out.squeeze(-1)
    return out.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else out


_library.define("matmul(Tensor a, Tensor b) -> Tensor")
_library.impl("matmul", _matmul, "CompositeImplicitAutograd")


# ---------------------------------------------------------------------------------------------------------- reductions


def _define_softmax(name: str, run: softmaxes.Compute, gradient: Callable[..., torch.Tensor]) -> None:
    def fake(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        _check_reduction(x, dtype)
        rank = max(x.dim(), 1)
        if not -rank <= dim < rank:
            raise IndexError(f"Dimension out of range: dim is {dim}; pass one from {-rank} to {rank - 1}")
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def compute(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        out = fake(x, dim, dtype=dtype)
        softmaxes.fill(run, out, x, dim)
        return out

    def context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: torch.Tensor) -> None:
        ctx.dim, ctx.dtype = inputs[1], inputs[0].dtype
        ctx.save_for_backward(output)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return gradient(grad, y, ctx.dim, ctx.dtype), None

    schema = f"{name}(Tensor x, int dim, *, ScalarType? dtype=None) -> Tensor"
    _operator(schema, compute, fake, backward, context)


def _check_reduction(x: torch.Tensor, dtype: torch.dtype | None) -> None:
    if not core.is_readable(x) or (dtype or x.dtype) not in core.FLOATS:
        floats = ", ".join(map(str, core.FLOATS))
        raise TypeError(f"x is {x.dtype} and dtype is {dtype}; the result's dtype must be one of {floats}")


def _mean_like(
    x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    _check_reduction(x, dtype)
    axes = means.normalise(x, dim)
    if axes is None:
        raise ValueError(f"dim is {dim}; pass different dimensions of x, which is {_describe(x)}")
    return torch.empty(means.result_shape(x, axes, keepdim), dtype=dtype or x.dtype, device=x.device), axes


def _mean_fake(
    x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _mean_like(x, dim, keepdim, dtype)[0]


def _mean(
    x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    out, axes = _mean_like(x, dim, keepdim, dtype)
    means.fill(out, x, axes, keepdim)
    return out


def _mean_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: torch.Tensor) -> None:
    x, dim, keepdim = inputs
    ctx.shape, ctx.dtype = x.shape, x.dtype
    ctx.axes = means.normalise(x, dim)
    ctx.keepdim = keepdim


def _mean_backward(ctx: Any, grad: torch.Tensor) -> Any:
    count = 1
    for axis in ctx.axes:
        count *= ctx.shape[axis]
        grad = grad if ctx.keepdim else grad.unsqueeze(axis)  # axes ascend
    return (grad / count).expand(ctx.shape).to(ctx.dtype), None, None


_define_softmax("softmax", core.softmax, softmaxes.softmax_gradient)
_define_softmax("log_softmax", core.log_softmax, softmaxes.log_softmax_gradient)
_operator(
    "mean(Tensor x, int[]? dim=None, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor",
    _mean,
    _mean_fake,
    _mean_backward,
    _mean_context,
)
