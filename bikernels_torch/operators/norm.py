"""layer_norm and rms_norm over the last dimensions, and their backward forms.

The statistics of the rows are in the accumulate dtype always; PyTorch rounds layer_norm's to bfloat16 or float16 on a
CPU and not on a GPU, so that its gradients there are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import bikernels

from .. import core, dispatch
from ..plans import planned

Affine = torch.Tensor | None


def _rows(x: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a row's statistics."""
    return (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))


def _axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def fits(x: torch.Tensor, shape: Sequence[int], *parameters: Affine) -> bool:
    """Whether rows of x, and weight and bias, have this shape, in dtypes and on a device that the core takes together.

    On a CPU parameters may be float32 beside bfloat16 and float16, as PyTorch's layer_norm has it.
    """
    given = [one for one in parameters if one is not None]
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    dtypes = (x.dtype, torch.float32) if narrow else (x.dtype,)
    return (
        x.dtype in core.FLOATS
        and 0 < len(shape) <= x.dim()
        and tuple(x.shape[-len(shape) :]) == tuple(shape)
        and all(one.shape == tuple(shape) and one.device == x.device for one in given)
        and all(one.dtype is given[0].dtype for one in given)
        and (not given or given[0].dtype in dtypes)
    )


# ---------------------------------------------------------------------------------------------------------- layer_norm


def _layer_norm_like(x: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty tensors for the result and the statistics."""
    out, rstd = rms_norm_like(x, shape)
    return out, torch.empty_like(rstd), rstd


def native_layer_norm(
    original: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine, bias: Affine, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """aten::native_layer_norm: the result, and each row's mean and rstd."""
    if not fits(x, normalized_shape, weight, bias):
        return original(x, normalized_shape, weight, bias, eps)
    results = _layer_norm_like(x, normalized_shape)
    operands = (x, weight, bias)
    core.normalise(bikernels.layer_norm_with_statistics, results, operands, _axes(normalized_shape), eps)
    return results


def layer_norm(
    original: Any,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Affine = None,
    bias: Affine = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """aten::layer_norm, which is native_layer_norm wherever somebody may look on."""
    if dispatch.autograd_is_idle(x, weight, bias):
        return layer_norm_without_autograd(original, x, normalized_shape, weight, bias, eps, cudnn_enable)
    return original(x, normalized_shape, weight, bias, eps, cudnn_enable)


@planned
def layer_norm_without_autograd(
    original: Any,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Affine = None,
    bias: Affine = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """The same as one call of the core, without the statistics."""
    if not fits(x, normalized_shape, weight, bias):
        return original(x, normalized_shape, weight, bias, eps, cudnn_enable)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    core.normalise(bikernels.layer_norm, (out,), (x, weight, bias), _axes(normalized_shape), eps)
    return out


def native_layer_norm_out(
    original: Any,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Affine,
    bias: Affine,
    eps: float,
    *,
    out0: torch.Tensor,
    out1: torch.Tensor,
    out2: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """aten::native_layer_norm.out; the statistics in the dtypes of the tensors given."""
    outs = (out0, out1, out2)
    if not fits(x, normalized_shape, weight, bias) or out0.dtype is not x.dtype:
        return original(x, normalized_shape, weight, bias, eps, out0=out0, out1=out1, out2=out2)
    results = native_layer_norm(original, x, normalized_shape, weight, bias, eps)
    return tuple(core.store(out, result.to(out.dtype)) for out, result in zip(outs, results, strict=True))


def fake_native_layer_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine, bias: Affine, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `native_layer_norm` gives, without elements."""
    if not fits(x, normalized_shape, weight, bias):
        return torch.ops.aten.native_layer_norm(x, normalized_shape, weight, bias, eps)
    return _layer_norm_like(x, normalized_shape)


def native_layer_norm_backward(
    original: Any,
    grad: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: Affine,
    bias: Affine,
    output_mask: Sequence[bool],
) -> tuple[Affine, Affine, Affine]:
    """aten::native_layer_norm_backward: the gradients of x, weight and bias that the mask asks for."""
    statistics = (mean, rstd)
    needed = [not wanted or one is not None for wanted, one in zip(output_mask[1:], (weight, bias), strict=True)]
    if not (fits(x, normalized_shape, weight, bias) and _match(grad, x, normalized_shape, statistics) and all(needed)):
        return original(grad, x, normalized_shape, mean, rstd, weight, bias, output_mask)
    wanted = [one if wanted else None for one, wanted in zip((x, weight, bias), output_mask, strict=True)]
    dx, dweight = _gradients("layer_norm", grad, x, normalized_shape, statistics, weight, wanted[:2])
    dbias = None
    if wanted[2] is not None:
        dbias = torch.empty_like(wanted[2], memory_format=torch.contiguous_format)
        batch = tuple(range(x.dim() - len(normalized_shape)))
        core.reduce(bikernels.sum, dbias, grad, batch, False)
    return dx, dweight, dbias


# ------------------------------------------------------------------------------------------------------------ rms_norm


def rms_norm_with_statistics(
    x: torch.Tensor, shape: Sequence[int], weight: Affine, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and each row's rstd."""
    results = rms_norm_like(x, shape)
    core.normalise(bikernels.rms_norm_with_statistics, results, (x, weight), _axes(shape), eps)
    return results


def rms_norm_like(x: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors for the result and the statistic."""
    rstd = torch.empty(_rows(x, shape), dtype=core.accumulate_dtype(x.dtype), device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), rstd


def rms_norm_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    rstd: torch.Tensor,
    weight: Affine,
    mask: Sequence[bool],
) -> tuple[Affine, Affine]:
    """The gradients of x and weight that the mask asks for."""
    wanted = [one if wanted else None for one, wanted in zip((x, weight), mask, strict=True)]
    return _gradients("rms_norm", grad, x, shape, (rstd,), weight, wanted)


def fused_rms_norm(
    original: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """aten::_fused_rms_norm."""
    if not fits(x, normalized_shape, weight):
        return original(x, normalized_shape, weight, eps)
    return rms_norm_with_statistics(x, normalized_shape, weight, eps)


def fused_rms_norm_backward(
    original: Any,
    grad: torch.Tensor,
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    rstd: torch.Tensor,
    weight: Affine,
    output_mask: Sequence[bool],
) -> tuple[Affine, Affine]:
    """aten::_fused_rms_norm_backward."""
    if not (fits(x, normalized_shape, weight) and _match(grad, x, normalized_shape, (rstd,))):
        return original(grad, x, normalized_shape, rstd, weight, output_mask)
    return rms_norm_gradients(grad, x, normalized_shape, rstd, weight, output_mask)


def rms_norm(
    original: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine = None, eps: float | None = None
) -> torch.Tensor:
    """aten::rms_norm: one operator with a gradient of its own, where PyTorch has one on a GPU and several on a CPU.

    torch.func's transforms and forward-mode derivatives take those several, which are row by row in the mode too.
    """
    if dispatch.autograd_is_idle(x, weight):
        return rms_norm_without_autograd(original, x, normalized_shape, weight, eps)
    return _composed_rms_norm(original, x, normalized_shape, weight, eps)


def _composed_rms_norm(
    original: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine, eps: float | None
) -> torch.Tensor:
    if (
        x.device.type not in ("cpu", "cuda")
        or not _is_plain(x, weight)
        or not fits(x, normalized_shape, weight)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return original(x, normalized_shape, weight, eps)
    return torch.ops.bikernels.rms_norm(x, normalized_shape, weight, eps)


@planned
def rms_norm_without_autograd(
    original: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: Affine = None, eps: float | None = None
) -> torch.Tensor:
    """The same as one call of the core, without the statistics."""
    if not fits(x, normalized_shape, weight):
        return _composed_rms_norm(original, x, normalized_shape, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    core.normalise(bikernels.rms_norm, (out,), (x, weight), _axes(normalized_shape), eps)
    return out


def _is_plain(*tensors: Affine) -> bool:
    """Whether all are dense; a tensor made of others, such as DTensor, is taken apart by PyTorch's own operators."""
    given = [one for one in tensors if one is not None]
    return all(
        one.layout is torch.strided and not one.is_nested and not is_traceable_wrapper_subclass(one) for one in given
    )


# ----------------------------------------------------------------------------------------------------------- gradients


def _match(grad: torch.Tensor, x: torch.Tensor, shape: Sequence[int], statistics: tuple[torch.Tensor, ...]) -> bool:
    rows = _rows(x, shape)
    return (
        grad.shape == x.shape
        and grad.dtype in core.FLOATS
        and grad.device == x.device
        and all(one.dtype in core.FLOATS and one.shape == rows and one.device == x.device for one in statistics)
    )


def _gradients(
    name: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    statistics: tuple[torch.Tensor, ...],
    weight: Affine,
    wanted: Sequence[Affine],
) -> tuple[Affine, Affine]:
    """The gradients of x and weight, where `wanted` has a tensor, in its dtype."""
    results: list[Affine] = []
    operations = (f"{name}_backward", f"{name}_weight_backward")
    operands = ((grad, x, *statistics, weight), (grad, x, *statistics))
    for like, operation, arrays in zip(wanted, operations, operands, strict=True):
        result = None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if result is not None:
            core.differentiate(getattr(bikernels, operation), result, arrays, _axes(shape))
        results.append(result)
    return results[0], results[1]


OVERRIDES: dict[str, Callable[..., Any]] = {
    "native_layer_norm": planned(native_layer_norm),
    "native_layer_norm.out": native_layer_norm_out,
    "native_layer_norm_backward": planned(native_layer_norm_backward),
}
CUDA_OVERRIDES: dict[str, Callable[..., Any]] = {
    "_fused_rms_norm": planned(fused_rms_norm),
    "_fused_rms_norm_backward": planned(fused_rms_norm_backward),
}
COMPOSITE_OVERRIDES: dict[str, Callable[..., Any]] = {"layer_norm": layer_norm, "rms_norm": rms_norm}
BELOW_AUTOGRAD: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm_without_autograd,
    "rms_norm": rms_norm_without_autograd,
}
FAKES: dict[str, Callable[..., Any]] = {"native_layer_norm": fake_native_layer_norm}
