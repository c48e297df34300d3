"""scaled_dot_product_attention: the path made of products and a softmax, never a fused kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


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
    tensors = (query, key, value)
    if (
        query.device.type not in ("cpu", "cuda")
        or any(t.is_nested or t.dim() < 2 or t.dtype is not query.dtype or t.device != query.device for t in tensors)
        or (attn_mask is not None and (is_causal or attn_mask.dtype not in (torch.bool, torch.float32, query.dtype)))
    ):
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return original(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        zero, masked = (torch.full((), v, dtype=query.dtype, device=query.device) for v in (0.0, float("-inf")))
        attn_mask = torch.where(attn_mask, zero, masked)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    return out


OVERRIDES: dict[str, Callable[..., Any]] = {"scaled_dot_product_attention": scaled_dot_product_attention}


def avoid_fused_layers() -> Callable[[], None]:
    """Let nn.MultiheadAttention and nn.TransformerEncoderLayer run operator by operator, also in eval.

    The returned function puts the switch back where it was.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)
