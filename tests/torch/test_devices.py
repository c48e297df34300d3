"""Tensors of two GPUs: each computes on its own, whichever is current; eager, compiled, captured, trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from bikernels_torch import set_batch_invariant_mode

from .helpers import same_bits

WIDTH, HEADS = 64, 4
BOTH = list(itertools.product(range(2), repeat=2))
"""The current device, and that of the tensors."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("two_gpus", "mode"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of PyTorch's compiler, about itself
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture
def two_gpus() -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are fewer than two GPUs")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(torch.nn.Module):
    """Attention, norms, products, a softmax and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = torch.nn.LayerNorm(WIDTH), torch.nn.RMSNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:-1], HEADS, WIDTH // HEADS)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        return self.rms(x).log_softmax(-1) + x.mean(1, keepdim=True)


def model_and_input() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Block().bfloat16(), torch.randn(3, 11, WIDTH, dtype=torch.bfloat16)


def test_products_and_reductions() -> None:
    """With plans, which a tensor's address decides on."""
    torch.manual_seed(0)
    on_cpu = torch.randn(40, 40), torch.randn(40, 40)
    with torch.inference_mode():
        expected = None
        for current, home in BOTH:
            with torch.cuda.device(current):
                x, y = (each.to(f"cuda:{home}") for each in on_cpu)
                for _ in range(3):
                    out = torch.log_softmax(torch.mm(x, y), -1)
                    assert out.device == x.device
                    assert torch.cuda.current_device() == current
                    expected = out.cpu() if expected is None else expected
                    assert same_bits(out.cpu(), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_model(compiled: bool) -> None:
    model, x = model_and_input()
    expected = None
    for current, home in BOTH:
        there, given = copy.deepcopy(model).to(f"cuda:{home}"), x.to(f"cuda:{home}")
        if compiled:
            torch._dynamo.reset()
            there = torch.compile(there, fullgraph=True)
        with torch.cuda.device(current), torch.no_grad():
            for _ in range(2):
                out = there(given)
                assert out.device == given.device
                expected = out.cpu() if expected is None else expected
                assert same_bits(out.cpu(), expected), (current, home)
            for row in range(len(x)):
                assert same_bits(there(given[row : row + 1]).cpu(), expected[row : row + 1]), (current, home, row)


def test_training() -> None:
    model, x = model_and_input()
    expected = None
    for current, home in BOTH:
        there, given = copy.deepcopy(model).to(f"cuda:{home}"), x.to(f"cuda:{home}").requires_grad_()
        with torch.cuda.device(current):
            out = there(given)
            gradients = torch.autograd.grad(out.float().square().sum(), [given, *there.parameters()])
        found = [each.cpu() for each in (out, *gradients)]
        expected = found if expected is None else expected
        for one, other in zip(found, expected, strict=True):
            assert same_bits(one, other), (current, home)


def test_captured() -> None:
    model, x = model_and_input()
    expected = None
    for home in range(2):
        there, given = copy.deepcopy(model).to(f"cuda:{home}"), x.to(f"cuda:{home}")
        with torch.cuda.device(home), torch.no_grad():
            expected = there(given).cpu() if expected is None else expected
            there(given)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = there(given)
        graph.replay()
        torch.cuda.synchronize(home)
        assert same_bits(out.cpu(), expected), home


def test_threads() -> None:
    """A thread for each device, as `torch.nn.DataParallel` has them."""
    model, x = model_and_input()
    with torch.no_grad():
        expected = copy.deepcopy(model).to("cuda:0")(x.to("cuda:0")).cpu()

    def work(home: int) -> None:
        there, given = copy.deepcopy(model).to(f"cuda:{home}"), x.to(f"cuda:{home}")
        with torch.no_grad(), set_batch_invariant_mode():
            for _ in range(30):
                assert same_bits(there(given).cpu(), expected), home

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(work, (0, 1, 0, 1)))
    with torch.no_grad():
        parallel = torch.nn.DataParallel(copy.deepcopy(model).to("cuda:0"), [0, 1])
        assert same_bits(parallel(x.to("cuda:0")).cpu(), expected)
