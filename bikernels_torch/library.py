"""torch.ops.bikernels: the core's operations as PyTorch operators of their own, whether the mode is on or not.

    mm(a, b, *, dtype=None)                        a (M, K), b (K, N)
    bmm(a, b, *, dtype=None)                       a (B, M, K), b (B, K, N)
    addmm(c, a, b, *, beta=1, alpha=1)             c broadcasts to (M, N)
    baddbmm(c, a, b, *, beta=1, alpha=1)           c broadcasts to (B, M, N)
    matmul(a, b)                                   torch.matmul's rules for ranks and batch dimensions
    log_softmax(x, dim, *, dtype=None)             softmax(x, dim, *, dtype=None)
    mean(x, dim=None, keepdim=False, *, dtype=None)   and sum
    rms_norm(x, normalized_shape, weight=None, eps=None)
    _attention(query, key, value, mask, is_causal, scale, enable_gqa)   in compiled graphs, without gradients

Floating-point CPU and CUDA tensors; `dtype` is that of the result, for products that of the operands or float32. They
have gradients and fake kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import bikernels

from . import core
from .operators import attention, norm, reduction
from .operators import matmul as products
from .operators import softmax as softmaxes
from .plans import planned_operator

_library = torch.library.Library("bikernels", "DEF")

Scalar = int | float


def _operator(schema: str, compute: Callable[..., Any], fake: Callable[..., Any], backward: Any, context: Any) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernel = planned_operator(compute)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
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


def _define_gradient(
    schema: str,
    compute: Callable[..., torch.Tensor],
    fake: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
) -> None:
    """An operator that is another's gradient. Its own is that of `formula`: the same, made of PyTorch's operators."""

    def context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
        ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = [next(saved).detach() if other is None else other[0] for other in ctx.others]
            needed = [x.requires_grad_() for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
            found = iter(torch.autograd.grad(formula(*inputs), needed, grad, allow_unused=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad)

    _operator(schema, compute, fake, backward, context)


def _define_softmax(name: str, forward: Callable[..., Any], gradient: Callable[..., Any], formula: Any) -> None:
    def fake(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        _check_reduction(x, dtype)
        rank = max(x.dim(), 1)
        if not -rank <= dim < rank:
            raise IndexError(f"Dimension out of range: dim is {dim}; pass one from {-rank} to {rank - 1}")
        return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def compute(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        out = fake(x, dim, dtype=dtype)
        softmaxes.fill(forward, out, (x,), dim)
        return out

    def context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: torch.Tensor) -> None:
        ctx.dim, ctx.dtype = inputs[1], inputs[0].dtype
        ctx.save_for_backward(output)

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return getattr(torch.ops.bikernels, f"_{name}_backward")(grad, y, ctx.dim, ctx.dtype), None

    schema = f"{name}(Tensor x, int dim, *, ScalarType? dtype=None) -> Tensor"
    _operator(schema, compute, fake, backward, context)

    def fake_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(y.shape, dtype=dtype, device=y.device)

    def compute_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        out = fake_gradient(grad, y, dim, dtype)
        softmaxes.fill(gradient, out, (grad, y), dim)
        return out

    schema = f"_{name}_backward(Tensor grad, Tensor y, int dim, ScalarType dtype) -> Tensor"
    _define_gradient(schema, compute_gradient, fake_gradient, formula)


def _softmax_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    grad, y = (x.to(core.accumulate_dtype(dtype)) for x in (grad, y))
    return (y * (grad - torch.ops.bikernels.sum(grad * y, [dim], True))).to(dtype)


def _log_softmax_gradient(grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    grad, y = (x.to(core.accumulate_dtype(dtype)) for x in (grad, y))
    return (grad - y.exp() * torch.ops.bikernels.sum(grad, [dim], True)).to(dtype)


def _check_reduction(x: torch.Tensor, dtype: torch.dtype | None) -> None:
    if not core.is_readable(x) or (dtype or x.dtype) not in core.FLOATS:
        floats = ", ".join(map(str, core.FLOATS))
        raise TypeError(f"x is {x.dtype} and dtype is {dtype}; the result's dtype must be one of {floats}")


def _define_reduction(name: str, operation: Callable[..., Any], divides: bool) -> None:
    def like(
        x: torch.Tensor, dim: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None
    ) -> tuple[torch.Tensor, tuple[int, ...]]:
        _check_reduction(x, dtype)
        axes = reduction.normalise(x, dim)
        if axes is None:
            raise ValueError(f"dim is {dim}; pass different dimensions of x, which is {_describe(x)}")
        shape = reduction.result_shape(x, axes, keepdim)
        return torch.empty(shape, dtype=dtype or x.dtype, device=x.device), axes

    def fake(
        x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return like(x, dim, keepdim, dtype)[0]

    def compute(
        x: torch.Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        out, axes = like(x, dim, keepdim, dtype)
        reduction.fill(operation, out, x, axes, keepdim)
        return out

    def context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: torch.Tensor) -> None:
        x, dim, keepdim = inputs
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.axes = reduction.normalise(x, dim)
        ctx.keepdim = keepdim

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        count = 1
        for axis in ctx.axes:
            count *= ctx.shape[axis]
            grad = grad if ctx.keepdim else grad.unsqueeze(axis)  # axes ascend
        return (grad / count if divides else grad).expand(ctx.shape).to(ctx.dtype), None, None

    schema = f"{name}(Tensor x, int[]? dim=None, bool keepdim=False, *, ScalarType? dtype=None) -> Tensor"
    _operator(schema, compute, fake, backward, context)


_define_reduction("mean", bikernels.mean, divides=True)
_define_reduction("sum", bikernels.sum, divides=False)
_define_softmax("softmax", bikernels.softmax, bikernels.softmax_backward, _softmax_gradient)
_define_softmax("log_softmax", bikernels.log_softmax, bikernels.log_softmax_backward, _log_softmax_gradient)


# ------------------------------------------------------------------------------------------------------------ rms_norm


def _check_norm(x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None) -> None:
    given = x if weight is None else weight
    if x.dtype not in core.FLOATS or given.dtype not in core.FLOATS or given.device != x.device:
        beside = "" if weight is None else f" and weight is {_describe(weight)}"
        raise TypeError(f"x is {_describe(x)}{beside}; pass floating-point tensors on one device")
    shape = tuple(shape)
    if not shape or x.shape[-len(shape) :] != shape or (weight is not None and weight.shape != shape):
        beside = "" if weight is None else f" and weight has {tuple(weight.shape)}"
        raise ValueError(
            f"normalized_shape is {shape}, x has shape {tuple(x.shape)}{beside}; pass the last dimensions of x, and a "
            "weight of that shape"
        )


def _rms_norm_fake(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_norm(x, normalized_shape, weight)
    return norm.rms_norm_like(x, normalized_shape)


def _rms_norm_compute(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_norm(x, normalized_shape, weight)
    return norm.rms_norm_with_statistics(x, normalized_shape, weight, eps)


def _rms_norm_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.shape, weight, ctx.eps = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    x, weight, rstd = ctx.saved_tensors
    arguments = (grad, x, ctx.shape, rstd, weight, ctx.eps)
    dx = torch.ops.bikernels._rms_norm_backward(*arguments) if ctx.needs_input_grad[0] else None
    dweight = torch.ops.bikernels._rms_norm_weight_backward(*arguments) if ctx.needs_input_grad[2] else None
    return dx, None, dweight, None


def _define_rms_norm_gradient(name: str, of_weight: bool) -> None:
    def fake(
        grad: torch.Tensor,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        rstd: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
    ) -> torch.Tensor:
        like = weight if of_weight and weight is not None else x
        return torch.empty(like.shape, dtype=like.dtype, device=x.device)

    def compute(
        grad: torch.Tensor,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        rstd: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
    ) -> torch.Tensor:
        mask = (not of_weight, of_weight)
        result = norm.rms_norm_gradients(grad, x, normalized_shape, rstd, weight, mask)[int(of_weight)]
        assert result is not None
        return result

    def formula(
        grad: torch.Tensor,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        rstd: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float | None,
    ) -> torch.Tensor:
        dtype, accumulate = x.dtype, core.accumulate_dtype(x.dtype)
        rows = list(range(-len(normalized_shape), 0))
        grad, x = grad.to(accumulate), x.to(accumulate)
        mean = torch.ops.bikernels.mean
        eps = torch.finfo(accumulate).eps if eps is None else eps
        r = (mean(x * x, rows, True) + eps).rsqrt()  # not rstd, through which x has a part in the gradient too
        h = x * r
        if of_weight:
            assert weight is not None
            return torch.ops.bikernels.sum(grad * h, list(range(x.dim() - len(rows)))).to(weight.dtype)
        p = grad if weight is None else grad * weight.to(accumulate)
        return ((p - h * mean(p * h, rows, True)) * r).to(dtype)

    arguments = "Tensor grad, Tensor x, SymInt[] normalized_shape, Tensor rstd, Tensor? weight, float? eps"
    _define_gradient(f"{name}({arguments}) -> Tensor", compute, fake, formula)


def _rms_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    return torch.ops.bikernels._rms_norm(x, normalized_shape, weight, eps)[0]


_operator(
    "_rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float? eps) -> (Tensor, Tensor)",
    _rms_norm_compute,
    _rms_norm_fake,
    _rms_norm_backward,
    _rms_norm_context,
)
_define_rms_norm_gradient("_rms_norm_backward", of_weight=False)
_define_rms_norm_gradient("_rms_norm_weight_backward", of_weight=True)
_library.define("rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor")
_library.impl("rms_norm", _rms_norm, "CompositeImplicitAutograd")


# ----------------------------------------------------------------------------------------------------------- attention


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    def steps() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return attention.attend_few_queries(steps, query, key, value, mask, is_causal, scale, enable_gqa).contiguous()


def _attention_fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


_library.define(
    "_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float? scale, bool enable_gqa) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA"):
    _library.impl("_attention", _attention, _key)
torch.library.register_fake("bikernels::_attention", _attention_fake, lib=_library)
