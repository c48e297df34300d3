"""LSTM, GRU and RNN layers in the mode: PyTorch's results, made of covered products; batch-invariant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bikernels_torch import set_batch_invariant_mode
from bikernels_torch.operators import recurrent

from .helpers import TOLERANCE, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": functools.partial(nn.LSTM, 13, 7),
    "LSTM, deep": functools.partial(nn.LSTM, 13, 7, 3, bidirectional=True, batch_first=True),
    "LSTM, projected": functools.partial(nn.LSTM, 13, 7, 2, proj_size=3, bidirectional=True),
    "LSTM, no bias": functools.partial(nn.LSTM, 13, 7, 2, bias=False, proj_size=3),
    "GRU": functools.partial(nn.GRU, 13, 7),
    "GRU, deep": functools.partial(nn.GRU, 13, 7, 3, bidirectional=True, batch_first=True),
    "GRU, no bias": functools.partial(nn.GRU, 13, 7, 2, bias=False),
    "tanh": functools.partial(nn.RNN, 13, 7, 2, bidirectional=True),
    "relu": functools.partial(nn.RNN, 13, 7, 2, nonlinearity="relu", batch_first=True),
}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU PyTorch itself makes GRU and RNN of covered operators; here the mode makes them too."""
    monkeypatch.setattr(recurrent, "is_fused", lambda name, x: True)


@pytest.fixture(autouse=True)
def _without_cudnn() -> Iterator[None]:
    """PyTorch's own layers are those to compare with: cuDNN's round to TF32, and have no gradient in eval."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def flat(results: Any) -> Iterator[torch.Tensor]:
    for one in results:
        if isinstance(one, PackedSequence):
            yield one.data
        elif isinstance(one, torch.Tensor):
            yield one
        else:
            yield from flat(one)


def assert_close(left: Any, right: Any, dtype: torch.dtype) -> None:
    for x, y in zip(flat(left), flat(right), strict=True):
        assert x.dtype is y.dtype
        torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_as_pytorch(name: str, dtype: torch.dtype, device: str) -> None:
    """Padded, packed (also unsorted), one sequence without a batch, with and without a first state."""
    layer = LAYERS[name]().to(device, dtype)
    x = torch.randn(4, 6, 13).to(device, dtype)
    first = layer.batch_first
    sorted_lengths, lengths = ([6, 3, 3, 1], [1, 6, 3, 6]) if first else ([4, 4, 2, 1, 1, 1], [1, 3, 2, 4, 4, 2])
    packed = pack_padded_sequence(x, sorted_lengths, first), pack_padded_sequence(x, lengths, first, False)
    for given in (x, x[:1], x[0], *packed):
        standard = layer(given)
        with set_batch_invariant_mode():
            result = layer(given)
            again = layer(given, None)
            state = tuple(s * 2 for s in result[1]) if isinstance(result[1], tuple) else result[1] * 2
            continued = layer(given, state)
        assert_close(result, standard, dtype)
        assert all(same_bits(x, y) for x, y in zip(flat(result), flat(again), strict=True))
        assert_close(continued, layer(given, state), dtype)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "tanh", "relu"])
def test_bits_of_the_cells(name: str, device: str) -> None:
    """A layer's bits are those of PyTorch's cell in a loop, in the mode; on a GPU its pointwise part is fused."""
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(name, functools.partial(nn.RNN, nonlinearity=name))
    one = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}.get(name, functools.partial(nn.RNNCell, nonlinearity=name))
    layer, cell = kind(13, 7).to(device), one(13, 7).to(device)
    for own, other in zip(cell.parameters(), layer.parameters(), strict=True):
        own.data.copy_(other.data)
    x = torch.randn(4, 6, 13, device=device)
    with torch.no_grad(), set_batch_invariant_mode():
        output, _ = layer(x)
        state = None
        for step in range(4):
            state = cell(x[step], state)
            expected = state[0] if name == "LSTM" else state
            if device == "cpu" or name in ("tanh", "relu"):
                assert same_bits(output[step], expected)
            else:
                assert_close([output[step]], [expected], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_invariance(name: str, dtype: torch.dtype, device: str) -> None:
    layer = LAYERS[name]().to(device, dtype)
    needle = torch.randn(5, 13).to(device, dtype)
    turn = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
    with torch.no_grad(), set_batch_invariant_mode():
        alone = turn(layer(turn(needle[None]))[0])[0]
        for size in (2, 7, 8, 9, 63, 64, 65):
            batch = torch.randn(size, 5, 13).to(device, dtype)
            position = size * 2 // 3
            batch[position] = needle
            if position:
                batch[position - 1] = float("nan")
            assert same_bits(turn(layer(turn(batch))[0])[position], alone)


def test_dropout_and_gradients(device: str) -> None:
    """In training, with the same draws, the gradients are those of PyTorch."""
    layer = nn.LSTM(13, 7, 2, dropout=0.5).to(device)
    x = torch.randn(4, 6, 13, device=device)

    def run(train: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        layer.train(train)
        layer.zero_grad()
        y = layer(x)[0]
        y.square().sum().backward()
        return [y, *(p.grad.clone() for p in layer.parameters())]

    for train in (False, True):
        with set_batch_invariant_mode():
            first, again = run(train), run(train)
        assert all(same_bits(x, y) for x, y in zip(first, again, strict=True))
        if not train or device == "cpu":  # a GPU draws otherwise
            assert_close(first, run(train), torch.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name: str, device: str) -> None:
    layer = LAYERS[name]().to(device, torch.float64)
    x = torch.randn(3, 2, 13, dtype=torch.float64, device=device, requires_grad=True)
    with set_batch_invariant_mode():
        assert torch.autograd.gradcheck(lambda x, *_: layer(x)[0], (x, *layer.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x, *_: layer(x)[0], (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_autocast(kind: type[nn.Module], device: str) -> None:
    """The dtypes of PyTorch's fused operators."""
    layer, x = kind(13, 7).to(device), torch.randn(4, 6, 13, device=device)
    with torch.autocast(device, torch.bfloat16), set_batch_invariant_mode():
        for result in flat(layer(x)):
            assert result.dtype is torch.bfloat16


ERRORS: dict[str, Callable[[], Any]] = {
    "width": lambda: nn.LSTM(13, 7)(torch.randn(4, 6, 12)),
    "dtype": lambda: nn.LSTM(13, 7)(torch.randn(4, 6, 13).double()),
    "state": lambda: nn.LSTM(13, 7)(torch.randn(4, 6, 13), (torch.randn(1, 5, 7), torch.randn(1, 6, 7))),
    "no steps": lambda: nn.GRU(13, 7)(torch.randn(0, 6, 13)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError)) as standard:
        ERRORS[name]()
    with set_batch_invariant_mode(), pytest.raises(standard.type) as result:
        ERRORS[name]()
    assert str(result.value).split("Exception raised")[0] == str(standard.value).split("Exception raised")[0]
