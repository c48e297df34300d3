"""scaled_dot_product_attention: products and a softmax in one order, never PyTorch's fused kernels.

The order is that of PyTorch's path made of products and a softmax (docs/contract.md, section 11). Where nothing follows
what attention is made of, few queries on a GPU are one kernel of the core, with the bits of that path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import compiled, core, dispatch
from ..plans import planned


class AttentionBlockSize(NamedTuple):
    """Rows of queries and of keys that an attention kernel takes at a time."""

    block_m: int
    block_n: int


def get_batch_invariant_attention_block_size() -> AttentionBlockSize:
    """A fixed block size for programs that bring an attention kernel of their own (FlexAttention, for one)."""
    return AttentionBlockSize(block_m=16, block_n=16)


def scaled_dot_product_attention(
    original: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Softmax(query @ key.T * scale + mask) @ value, whatever the choice of `torch.nn.attention.sdpa_kernel`."""
    steps = functools.partial(
        _in_steps, original, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    if query.is_cuda and dropout_p == 0 and query.dim() == 4 and query.shape[2] <= FEW_QUERIES:
        if dispatch.autograd_is_idle(query, key, value, attn_mask):
            return attend_few_queries(steps, query, key, value, attn_mask, is_causal, scale, enable_gqa)
        if compiled.is_tracing() and _may_be_one_operator(query, key, value, attn_mask, is_causal, enable_gqa):
            return torch.ops.bikernels._attention(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    return steps()


def _may_be_one_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
) -> bool:
    """Whether a graph without gradients has these operands, which PyTorch would take."""
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    followed = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    return (
        not followed and _is_batch_of_heads(query, key, value, enable_gqa) and _takes_mask(query, key, mask, is_causal)
    )


def attend_few_queries(
    steps: Callable[[], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """One kernel, where the backend has it for these operands; else `steps`, which also raises all errors."""
    in_float32 = not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    return _of_few_queries(steps, query, key, value, mask, is_causal, scale, enable_gqa, in_float32)


FEW_QUERIES = 16
"""More are worth the tiles of products."""


@planned
def _of_few_queries(
    steps: Callable[[], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    in_float32: bool,
) -> torch.Tensor:
    """`attend_few_queries`, with what decides besides about a plan."""
    if not (
        in_float32 and _is_batch_of_heads(query, key, value, enable_gqa) and _takes_mask(query, key, mask, is_causal)
    ):
        return steps()
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    out = query.new_empty((*query.shape[:3], value.shape[3]))
    root = math.sqrt(abs(scale) if scale is not None else 1.0 / math.sqrt(query.shape[3]))
    factors = math.copysign(root, scale or 1.0), root
    return out if core.attend(out, query, key, value, mask, is_causal, factors) else steps()


def _takes_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool) -> bool:
    """Whether PyTorch adds the mask, if there is one, to the scores."""
    if mask is None:
        return True
    shape = (*query.shape[:3], key.shape[2])
    return (
        not is_causal
        and mask.device == query.device
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and mask.dim() <= 4
        and all(n in (1, wanted) for n, wanted in zip(reversed(mask.shape), reversed(shape), strict=False))
    )


def _in_steps(
    original: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Products and a softmax."""
    tensors = (query, key, value)
    if (
        query.device.type not in ("cpu", "cuda")
        or any(t.is_nested or t.dim() < 2 or t.dtype is not query.dtype or t.device != query.device for t in tensors)
        or (attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, torch.float32, query.dtype)))
    ):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if (
        attn_mask is None
        and not is_causal
        and dropout_p == 0
        and (scale is None or scale > 0)
        and dispatch.autograd_is_idle(*tensors)
        and _is_batch_of_heads(query, key, value, enable_gqa)
    ):
        return _attend(query, key, value, scale)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero, masked = (torch.full((), v, dtype=query.dtype, device=query.device) for v in (0.0, float("-inf")))
        attn_mask = torch.where(attn_mask, zero, masked)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out


def _is_batch_of_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> bool:
    """Whether these are (B, heads, L, D), (B, groups, S, D) and (B, groups, S, E), with elements."""
    if not query.dim() == key.dim() == value.dim() == 4 or query.dtype not in core.FLOATS:
        return False
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    return (
        key.dtype is value.dtype is query.dtype
        and key.device == value.device == query.device
        and key.shape[0] == batch
        and key.shape[3] == width
        and key.shape[:3] == value.shape[:3]
        and min(query.numel(), key.numel(), value.numel()) > 0
        and (heads == groups or (enable_gqa and heads % groups == 0))
    )


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
    """PyTorch's path in fewer steps, with its bits: heads that share keys are rows of one product."""
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    wide = core.accumulate_dtype(query.dtype)
    if torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        wide = query.dtype
    factor = math.sqrt(scale or 1.0 / math.sqrt(width))
    rows = _scaled(query, factor, wide).reshape(batch * groups, heads // groups * length, width)
    columns = _scaled(key, factor, wide).flatten(0, 1).mT
    scores = torch.bmm(rows, columns)
    weights = torch.softmax(scores, -1)
    weights.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0)  # PyTorch's _safe_softmax
    out = torch.bmm(weights, value.to(wide).flatten(0, 1))
    return out.view(batch, heads, length, -1).to(query.dtype)


def _scaled(x: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype) * factor, in one step where x is narrower: PyTorch converts while it multiplies by a tensor."""
    if x.dtype is dtype:
        return x * factor
    constant = _constant(factor, dtype, x.device)
    return x.to(dtype) * factor if constant is None else x * constant


_constants: dict[tuple[float, torch.dtype, torch.device], torch.Tensor] = {}
_MOST_CONSTANTS = 64
"""They stay for good, since a CUDA graph may hold their addresses."""


def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """A tensor of one element with one dimension (without it would have no say in a result's dtype), ready for every
    stream; None where there are too many, or while a graph is captured, which would delay it.
    """
    key = value, dtype, device
    found = _constants.get(key)
    if found is None and len(_constants) < _MOST_CONSTANTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        with torch.inference_mode(False):
            found = torch.tensor([value], dtype=dtype, device=device)  # waits for the copy
        found = _constants.setdefault(key, found)  # another thread's, if it was quicker
    return found


OVERRIDES: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}


def avoid_fused_layers() -> Callable[[], None]:
    """Let nn.MultiheadAttention and nn.TransformerEncoderLayer run operator by operator, also in eval.

    The returned function puts the switch back where it was.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)
