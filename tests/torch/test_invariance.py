"""The bits of a row do not depend on the batch: single operators and whole models, at every position of many sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bikernels_torch import set_batch_invariant_mode

from .helpers import DTYPES, distinct, same_bits

SIZES = (1, 2, 7, 8, 9)
LARGE = (63, 64, 65)


def random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def batches(row: torch.Tensor, size: int) -> list[tuple[int, torch.Tensor]]:
    """Batches that hold `row` at a position, any or one of three; neighbours are ordinary, NaN, infinite or huge."""
    made = []
    for position in (0, size // 2, size - 1) if size in LARGE else range(size):
        batch = torch.randn((size, *row.shape), dtype=torch.float64).to(row.dtype).to(row.device)
        if position % 3 == 1:
            batch[position - 1] = float("nan")
            batch[(position + 1) % size] = 2.0**15 if row.dtype is torch.float16 else 2.0**120
        if position % 3 == 2:
            batch[position - 1] = float("-inf")
        batch[position] = row
        made.append((position, batch))
    return made


def assert_invariant(call: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor) -> None:
    """`call` maps (batch, ...) to (batch, ...); the needle alone, and at every position of every size."""
    with torch.no_grad(), set_batch_invariant_mode():
        alone = call(row[None])[0]
        for size in (*SIZES, *LARGE):
            for position, batch in batches(row, size):
                result = call(batch)[position]
                assert same_bits(result, alone), f"position {position} of {size}"


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "mm": lambda x, w: x[:, 0] @ w(37, 9),
    "mm transposed": lambda x, w: x[:, 0] @ w(9, 37).T,
    "matmul": lambda x, w: x @ w(37, 9),
    "bmm": lambda x, w: x @ x.mT,
    "einsum": lambda x, w: torch.einsum("bik,nk->bin", x, w(9, 37)),
    "einsum of three": lambda x, w: torch.einsum("bik,kn,nm->bim", x, w(37, 9), w(9, 50)),
    "tensordot": lambda x, w: torch.tensordot(x, w(5, 37, 3), dims=2),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x[:, 0], w(37, 9), w(9, 50), w(50, 3)]),
    "multi_dot, last": lambda x, w: torch.linalg.multi_dot([w(3, 50), w(50, 9), w(9, 37), x[:, 0].T]).T,
    "vecdot": lambda x, w: torch.linalg.vecdot(x, w(37)),
    "bilinear": lambda x, w: F.bilinear(x[:, 0], x[:, 1], w(3, 37, 37), w(3)),
    "matrix power": lambda x, w: torch.linalg.matrix_power(x[:, :, :5], 3),
    "cdist": lambda x, w: torch.cdist(x[:, 0].float(), w(9, 37).float()),
    "cdist in a batch": lambda x, w: torch.cdist(x.float(), w(9, 37).float()),
    "addmv": lambda x, w: torch.addmv(w(1).expand(x.shape[0]), x[:, 0], w(37), beta=0.7, alpha=0.3),
    "addmm in place": lambda x, w: w(9).repeat(x.shape[0], 1).addmm_(x[:, 0], w(37, 9), alpha=0.3),
    "baddbmm out": lambda x, w: torch.baddbmm(w(5, 5), x, x.mT, out=x.new_empty(0)),
    "vector": lambda x, w: x @ w(37),
    "addmm": lambda x, w: torch.addmm(w(9), x[:, 0], w(37, 9), beta=0.7, alpha=0.3),
    "baddbmm": lambda x, w: torch.baddbmm(w(5, 5), x, x.mT, beta=0.7, alpha=0.3),
    "linear": lambda x, w: F.linear(x, w(9, 37), w(9)),
    "linear, sequence first": lambda x, w: F.linear(x.transpose(0, 1), w(9, 37), w(9)).transpose(0, 1),
    "softmax": lambda x, w: x.softmax(-1),
    "softmax over the middle": lambda x, w: x.softmax(1),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "mean": lambda x, w: x.mean(-1),
    "mean over the middle": lambda x, w: x.mean(1),
    "mean over two": lambda x, w: x.mean((1, 2)),
    "sum": lambda x, w: x.sum(-1),
    "sum over two": lambda x, w: x.sum((1, 2)),
    "var": lambda x, w: x.var(-1),
    "std over the middle": lambda x, w: x.std(1, correction=0),
    "var_mean": lambda x, w: torch.stack(torch.var_mean(x, (1, 2)), -1),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "layer_norm over two": lambda x, w: F.layer_norm(x, (5, 37), w(5, 37)),
    "rms_norm over two": lambda x, w: F.rms_norm(x, (5, 37)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "causal attention": lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "masked attention": lambda x, w: F.scaled_dot_product_attention(x, x, x, w(5, 5) > -0.5),
    "grouped attention": lambda x, w: F.scaled_dot_product_attention(
        x[:, None].expand(-1, 4, 5, 37), *[x[:, None].expand(-1, 2, 5, 37)] * 2, scale=0.3, enable_gqa=True
    )[:, 3],
    "biased attention": lambda x, w: F.scaled_dot_product_attention(x, x, x, w(5, 5)),
    "silu": lambda x, w: F.silu(x),
    "add": lambda x, w: torch.add(x, w(37), alpha=0.3),
    "gelu": lambda x, w: F.gelu(x),
    "layer_norm": lambda x, w: F.layer_norm(x, (37,), w(37), w(37)),
    "rms_norm": lambda x, w: F.rms_norm(x, (37,), w(37)),
    "embedding": lambda x, w: F.embedding(x.nan_to_num(0, 0, 0).abs().clamp(max=49).long(), w(50, 9)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, dtype: torch.dtype, device: str) -> None:
    weight = functools.cache(functools.partial(random, dtype=dtype, device=device))
    assert_invariant(lambda x: OPERATORS[name](x, weight), random(5, 37, dtype=dtype, device=device))


def test_linear_would_round_twice() -> None:
    """Why linear is overridden: standard PyTorch adds the bias after the rounding where the input is not contiguous."""
    x, w, b = (random(*shape, dtype=torch.bfloat16, device="cpu") for shape in ((5, 3, 64), (9, 64), (9,)))
    y = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not same_bits(F.linear(x, w, b), F.linear(y, w, b))
    with set_batch_invariant_mode():
        assert same_bits(F.linear(x, w, b), F.linear(y, w, b))


# -------------------------------------------------------------------------------------------------------- whole models


class Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down, self.activation = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 48)
        self.blocks = nn.Sequential(Block(48, 4, nn.GELU()), Block(48, 4, nn.SiLU()), Block(48, 4, nn.GELU("tanh")))
        self.head = nn.Linear(48, 100, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens))).log_softmax(-1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
        return state


def encoder(**options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SequenceFirst(nn.Module):
    """A module that wants (length, batch, width), in a program that holds (batch, length, width)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x.transpose(0, 1)).transpose(0, 1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": Transformer,
    "encoder": encoder,
    "encoder, gelu, norm first": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder, sequence first": lambda: SequenceFirst(nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 3, 40), 2)),
    "mlp": lambda: nn.Sequential(nn.Linear(24, 130), nn.SiLU(), nn.Linear(130, 70), nn.Sigmoid(), nn.Linear(70, 3)),
    "gru cells": Recurrent,
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype, device: str) -> None:
    """Sizes from 1 to 17, every position of some, in eval."""
    model = MODELS[name]().to(device, dtype).eval()

    def inputs(count: int) -> torch.Tensor:
        if name == "transformer":
            return torch.randint(100, (count, 11), device=device)
        return torch.randn(count, 11, 24, device=device).to(dtype)

    needle = inputs(1)[0]
    results = []
    with torch.no_grad(), set_batch_invariant_mode():
        for size in range(1, 18):
            others = inputs(size)
            for position in range(size) if size in (5, 9) else {0, size - 1}:
                batch = others.clone()
                batch[position] = needle
                results.append(model(batch)[position].cpu())
    assert distinct(iter(results)) == 1


def test_the_experiment_notices_a_model_that_varies() -> None:
    """A model that looks at its batch gives more than one result, in the mode too, so the experiment can fail."""

    class Leaky(Transformer):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = super().forward(tokens)
            return x + 1e-6 * x.mean(0, keepdim=True)

    model = Leaky().eval()
    needle, others = torch.randint(100, (11,)), torch.randint(100, (17, 11))
    with torch.no_grad(), set_batch_invariant_mode():
        results = [model(torch.cat([needle[None], others[: size - 1]]))[0] for size in range(1, 18)]
    assert distinct(iter(results)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_respect_to_the_input(dtype: torch.dtype, device: str) -> None:
    """dX of a row does not depend on the batch: products, softmax, log_softmax, attention, pointwise functions."""
    w, v, b = (random(*shape, dtype=dtype, device=device) for shape in ((33, 37), (37, 33), (33,)))

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        y = F.linear(F.silu(F.linear(x, w, b)), v)
        y = y + F.scaled_dot_product_attention(y, y, y)
        y.mul(y.softmax(1)).log_softmax(-1)[..., 3].backward(torch.ones(x.shape[:-1], dtype=dtype, device=device))
        assert x.grad is not None
        return x.grad

    row = random(5, 37, dtype=dtype, device=device)
    with set_batch_invariant_mode():
        alone = gradient(row[None])[0]
        for size in (2, 3, 8):
            for position in range(size):
                batch = random(size, 5, 37, dtype=dtype, device=device)
                batch[position] = row
                assert same_bits(gradient(batch)[position], alone)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_attention_takes_no_fused_kernel(device: str) -> None:
    """Also where the caller asks for one, with and without gradients, and in nn.MultiheadAttention."""
    q = torch.randn(2, 4, 33, 16, device=device)
    attention = nn.MultiheadAttention(16, 4, batch_first=True).to(device).eval()
    choices = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.MATH]
    with set_batch_invariant_mode(), torch.profiler.profile() as profile:
        for choice in choices:
            with torch.nn.attention.sdpa_kernel(choice):
                F.scaled_dot_product_attention(q, q, q)
                F.scaled_dot_product_attention(q.clone().requires_grad_(), q, q).sum().backward()
        attention(q[0], q[0], q[0], need_weights=False)
    ran = {event.key for event in profile.key_averages()}
    assert not {name for name in ran if "flash" in name or "efficient" in name or "_native_multi_head" in name}
    assert "aten::_softmax" in ran
