"""A decoder like Qwen3 with random weights, of which a benchmark times the step that adds a token to every sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Sizes(NamedTuple):
    """Of a model, and of the batch that it decodes."""

    layers: int = 32
    width: int = 1024
    heads: int = 16
    kv_heads: int = 8
    head: int = 64
    mlp: int = 3072
    vocabulary: int = 32000
    batch: int = 8
    context: int = 128


class _Attention(nn.Module):
    """Grouped-query attention over keys and values of earlier tokens, of which the last place is the new one's."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q = nn.Linear(sizes.width, sizes.heads * sizes.head, bias=False)
        self.k, self.v = (nn.Linear(sizes.width, sizes.kv_heads * sizes.head, bias=False) for _ in range(2))
        self.o = nn.Linear(sizes.heads * sizes.head, sizes.width, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(sizes.head, eps=1e-6), nn.RMSNorm(sizes.head, eps=1e-6)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(sizes.batch, sizes.kv_heads, sizes.context, sizes.head))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.sizes.head)
        q = _rotate(self.q_norm(self.q(x).view(shape)).transpose(1, 2), cos, sin)
        k = _rotate(self.k_norm(self.k(x).view(shape)).transpose(1, 2), cos, sin)
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = self.v(x).view(shape).transpose(1, 2)
        out = functional.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class _Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.before, self.after = nn.RMSNorm(sizes.width, eps=1e-6), nn.RMSNorm(sizes.width, eps=1e-6)
        self.attention = _Attention(sizes)
        self.gate, self.up = (nn.Linear(sizes.width, sizes.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.mlp, sizes.width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x), cos, sin)
        h = self.after(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """The model, and the batch's state."""

    cos: torch.Tensor
    sin: torch.Tensor
    tokens: torch.Tensor

    def __init__(self, sizes: Sizes, device: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(_Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        frequencies = 1e6 ** -(torch.arange(0, sizes.head, 2) / sizes.head)
        angles = (sizes.context - 1) * torch.cat((frequencies, frequencies))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("tokens", torch.randint(sizes.vocabulary, (sizes.batch, 1)))
        self.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()

    def step(self) -> torch.Tensor:
        """The log-probabilities of the next token of every sequence."""
        x = self.embedding(self.tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return torch.log_softmax(self.head(self.norm(x)), dim=-1)
