"""The names of other batch-invariant modules, computed by bikernels: change an import, or call `install_as`.

The names and signatures are those of `batch_invariant_ops` (Thinking Machines), of vLLM's
`vllm.model_executor.determinism.batch_invariant` (earlier `layers.batch_invariant`) and of SGLang's
`sglang.srt.batch_invariant_ops`. Where they differ the more general one holds: any dimension instead of the last one,
fp64 beside fp32, bf16 and fp16, CPU beside CUDA. Unlike theirs every function has a gradient.

The functions compute like this whether the mode is on or not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from . import mode
from .mode import disable_batch_invariant_mode, is_batch_invariant_mode_enabled, set_batch_invariant_mode
from .operators.attention import AttentionBlockSize, get_batch_invariant_attention_block_size

__all__ = [
    "AttentionBlockSize",
    "addmm_batch_invariant",
    "addmm_out_batch_invariant",
    "bmm_batch_invariant",
    "bmm_out_batch_invariant",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "get_batch_invariant_attention_block_size",
    "install_as",
    "is_batch_invariant_mode_enabled",
    "linear_batch_invariant",
    "log_softmax",
    "matmul_batch_invariant",
    "matmul_persistent",
    "mean_batch_invariant",
    "mean_dim",
    "mm_batch_invariant",
    "mm_out_batch_invariant",
    "rms_norm",
    "rms_norm_batch_invariant",
    "set_batch_invariant_mode",
    "softmax",
    "softmax_batch_invariant",
]

_ops = torch.ops.bikernels


def install_as(name: str = "batch_invariant_ops") -> None:
    """Let `import name` find this module, in this process; call it before anything imports `name`.

    Args:
        name: `batch_invariant_ops`, or another module's dotted name.

    Raises:
        RuntimeError: another module of that name has been imported, and its functions are in use.
    """
    module = sys.modules[__name__]
    parent, _, last = name.rpartition(".")
    for alias in (name, f"{name}.{last}"):  # batch_invariant_ops.batch_invariant_ops is where the names are defined
        present = sys.modules.get(alias, module)
        being_imported = getattr(getattr(present, "__spec__", None), "_initializing", False)
        if present is not module and not being_imported:
            raise RuntimeError(f"{alias} has already been imported from {present!r}; call install_as({name!r}) before")
    for alias in (name, f"{name}.{last}"):
        sys.modules[alias] = module
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)


def __getattr__(name: str) -> Any:
    if name == "_batch_invariant_MODE":
        return is_batch_invariant_mode_enabled()
    if name == "_batch_invariant_LIB":
        return mode._overrides._library
    if name == "batch_invariant_ops":
        return sys.modules[__name__]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Switch the mode on until `disable_batch_invariant_mode`; `enable_bmm` is accepted, bmm is always covered."""
    mode.enable_batch_invariant_mode()


# ----------------------------------------------------------------------------------------------------- matrix products


def matmul_persistent(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b + bias for a (M, K), b (K, N), bias (N,), rounded once to a's dtype."""
    return _ops.mm(a, b) if bias is None else _ops.addmm(bias, a, b)


def mm_batch_invariant(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """aten::mm; as `matmul_persistent` with a bias."""
    return matmul_persistent(a, b, bias)


def mm_out_batch_invariant(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """aten::mm.out."""
    return _into(out, _ops.mm(a, b))


def addmm_batch_invariant(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """aten::addmm: beta * bias + alpha * (a @ b), rounded once."""
    return _ops.addmm(bias, a, b, beta=beta, alpha=alpha)


def addmm_out_batch_invariant(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1, out: torch.Tensor
) -> torch.Tensor:
    """aten::addmm.out."""
    return _into(out, _ops.addmm(bias, a, b, beta=beta, alpha=alpha))


def bmm_batch_invariant(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """aten::bmm for a (B, M, K), b (B, K, N)."""
    return _into(out, _ops.bmm(a, b))


def bmm_out_batch_invariant(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """aten::bmm.out."""
    return _into(out, _ops.bmm(a, b))


def matmul_batch_invariant(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """aten::matmul, for all ranks from 1."""
    return _into(out, _ops.matmul(a, b))


def linear_batch_invariant(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """aten::linear for input (..., K), weight (N, K), bias (N,): the bias is added before the only rounding."""
    if bias is None:
        return _ops.matmul(input, weight.t())
    rows = input.reshape(-1, input.shape[-1])
    return _ops.addmm(bias, rows, weight.t()).view(*input.shape[:-1], weight.shape[0])


def _into(out: torch.Tensor | None, result: torch.Tensor) -> torch.Tensor:
    if out is None:
        return result
    if out.shape != result.shape or out.dtype is not result.dtype or out.device != result.device:
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)} on {out.device}; pass {result.dtype} of shape "
            f"{tuple(result.shape)} on {result.device}"
        )
    return out.copy_(result)


# ---------------------------------------------------------------------------------------------------------- reductions


def softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:  # noqa: A002
    """torch.softmax along one dimension, in input's dtype."""
    return _ops.softmax(input, dim)


def softmax_batch_invariant(
    input: torch.Tensor,  # noqa: A002
    dim: int,
    half_to_float: bool | torch.dtype | None = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """aten::_softmax and aten::softmax.int, of which the third argument is a flag and a dtype: the result's."""
    if isinstance(half_to_float, torch.dtype):
        dtype = half_to_float
    return _ops.softmax(input, dim, dtype=torch.float32 if half_to_float is True else dtype)


def log_softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:  # noqa: A002
    """torch.log_softmax along one dimension, in input's dtype."""
    return _ops.log_softmax(input, dim)


def _log_softmax_batch_invariant(input: torch.Tensor, dim: int, _half_to_float: bool) -> torch.Tensor:  # noqa: A002
    """aten::_log_softmax."""
    return _ops.log_softmax(input, dim, dtype=torch.float32 if _half_to_float else None)


def mean_dim(
    input: torch.Tensor,  # noqa: A002
    dim: int,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The mean over one dimension; integers are averaged in float32 unless `dtype` says otherwise."""
    return mean_batch_invariant(input, [dim], keepdim, dtype or (None if input.is_floating_point() else torch.float32))


def mean_batch_invariant(
    input: torch.Tensor,  # noqa: A002
    dim: Sequence[int],
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """aten::mean.dim: over several dimensions as over one, [] means all; the result has `dtype`, else input's."""
    return _ops.mean(input, list(dim), keepdim, dtype=dtype)


def rms_norm(input: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:  # noqa: A002
    """Input (..., n) divided by its root mean square along the last dimension, times weight (n,).

    As `torch.nn.functional.rms_norm` in the mode: in float32 (float64 for float64), rounded once to input's dtype.
    """
    if weight is not None and weight.shape != input.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass one of the shape {tuple(input.shape[-1:])}")
    return _ops.rms_norm(input, input.shape[-1:], weight, eps)


def rms_norm_batch_invariant(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As `rms_norm`. With a residual, as vLLM does it in place: residual += input, input = rms_norm(residual); both."""
    if residual is None:
        return rms_norm(input, weight, eps)
    if residual.shape != input.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; pass one of the shape {tuple(input.shape)}")
    residual.add_(input)
    return input.copy_(rms_norm(residual, weight, eps)), residual
