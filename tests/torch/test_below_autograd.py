"""Composites that are kernels of their own where autograd is idle: the bytes of what they are else made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bikernels_torch import set_batch_invariant_mode

from .helpers import DTYPES, same_bits


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    x, w, b = (draw(*shape, device=device, dtype=dtype) for shape in ((4, 3, 16), (8, 16), (8,)))
    scale = draw(16, device=device, dtype=dtype)
    q = draw(2, 5, 4, 16, device=device, dtype=dtype).transpose(1, 2)
    k, v = draw(2, 2, 9, 16, device=device, dtype=dtype), draw(2, 9, 2, 24, device=device, dtype=dtype).transpose(1, 2)
    return {
        "linear": lambda: F.linear(x, w),
        "linear, bias": lambda: F.linear(x, w, b),
        "linear, a vector": lambda: F.linear(x[0, 0], w, b),
        "linear, not contiguous": lambda: F.linear(x.transpose(0, 1), w, b),
        "linear, no rows": lambda: F.linear(x[:0], w, b),
        "rms_norm": lambda: F.rms_norm(x, (16,), scale),
        "rms_norm, two dimensions": lambda: F.rms_norm(x, (3, 16), eps=1e-3),
        "layer_norm": lambda: F.layer_norm(x, (16,), scale, scale),
        "layer_norm, two dimensions": lambda: F.layer_norm(x, (3, 16), eps=1e-3),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q),
        "attention, grouped": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "attention, scale": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3),
        "attention, causal": lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("mode")
def test_bytes(dtype: torch.dtype, device: str) -> None:
    for name, call in calls(device, dtype).items():
        expected = call()
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for _ in range(2):  # the second follows a plan
                    result = call()
                    assert same_bits(result, expected), name
                    assert result.stride() == expected.stride(), name
                    assert not result.requires_grad


@pytest.mark.usefixtures("mode")
def test_gradients_are_followed(device: str) -> None:
    x, w = draw(4, 16, device=device), draw(8, 16, device=device).requires_grad_()
    with torch.no_grad():
        F.linear(x, w)
    (gradient,) = torch.autograd.grad(F.linear(x, w).sum(), w)
    assert same_bits(gradient, torch.mm(torch.ones(8, 4, device=device), x))
    with torch.inference_mode():
        inference = draw(4, 16, device=device)
    assert F.linear(inference.clone(), w).requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.usefixtures("mode")
def test_transforms(device: str) -> None:
    x, w = draw(4, 3, 16, device=device), draw(8, 16, device=device)
    with torch.no_grad():
        assert same_bits(torch.func.vmap(lambda row: F.linear(row, w))(x), F.linear(x, w))
        _, tangent = torch.func.jvp(lambda x: F.linear(x, w), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), w))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.usefixtures("mode")
def test_traces_keep_the_operators(context: Any, device: str) -> None:
    x, w, scale = draw(4, 16, device=device), draw(8, 16, device=device), draw(8, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(F.linear(x, w), (8,), scale)

    with context():
        function(x)
        traced = torch.jit.trace(function, x)
        assert same_bits(traced(x + 1), function(x + 1))


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("mode")
def test_who_looks_on_sees_what_they_are_made_of(device: str) -> None:
    x, w, b = draw(4, 3, 16, device=device), draw(8, 16, device=device), draw(8, device=device)
    with torch.no_grad(), Seen() as seen:
        F.layer_norm(F.linear(x, w, b), (8,))
    assert {"aten::addmm", "aten::native_layer_norm"} <= seen.names
    assert "aten::linear" not in seen.names


def test_errors_are_pytorch_s(device: str) -> None:
    x, w = draw(4, 16, device=device), draw(8, 16, device=device)
    bad: dict[str, Callable[[], Any]] = {
        "width": lambda: F.linear(x[:, :3], w),
        "dtype": lambda: F.linear(x, w.double()),
        "bias": lambda: F.linear(x, w, w[0, :5]),
        "normalized_shape": lambda: F.rms_norm(x, (8,)),
        "normalized_shape of layer_norm": lambda: F.layer_norm(x, (8,)),
        "heads": lambda: F.scaled_dot_product_attention(x[None, None], w.expand(1, 3, 8, 16), w.expand(1, 2, 8, 16)),
    }
    with torch.inference_mode():
        for name, call in bad.items():
            with pytest.raises(RuntimeError) as standard:
                call()
            with set_batch_invariant_mode(), pytest.raises(standard.type) as result:
                call()
            assert str(result.value).split("\n")[0] == str(standard.value).split("\n")[0], name
        integers = torch.ones(4, 16, dtype=torch.int64)
        with set_batch_invariant_mode():
            assert (F.linear(integers, integers) == 16).all()


def test_the_operators_return(device: str) -> None:
    """Outside of the mode composites are composites again."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = ("aten::linear", "aten::layer_norm", "aten::rms_norm")
    before = [has_kernel(name, "CPU") for name in names]
    with set_batch_invariant_mode():
        assert all(has_kernel(name, "CPU") for name in names)
    assert [has_kernel(name, "CPU") for name in names] == before
    x = draw(4, 16, device=device).requires_grad_()
    F.linear(x, draw(8, 16, device=device)).sum().backward()
    assert x.grad is not None
