"""torch.compile in the mode: inductor is refused with the remedy; backends that run PyTorch's operators are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bikernels_torch import CompiledInModeError, set_batch_invariant_mode

from .helpers import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler, about itself


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_by_inductor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that inductor has compiled; a stand-in for its code generator, so that no compiler is needed."""

    def compile_fx(graph: Any, inputs: Any, **_: Any) -> Any:
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return torch.compile(lambda a, b: a @ b)


def refused() -> Any:
    return pytest.raises(Exception, match=r'batch-invariant mode is on.*backend="aot_eager"')


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"fullgraph": True, "dynamic": True}])
def test_inductor_is_refused(options: dict[str, Any]) -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    with set_batch_invariant_mode():
        function = torch.compile(lambda a, b: a @ b, **options)
        with refused():
            function(a, b)
        model = torch.compile(torch.nn.Linear(5, 2))
        with refused():
            model(a)


def test_what_inductor_compiled_before_is_refused(compiled_by_inductor: Callable[..., Any]) -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    standard = compiled_by_inductor(a, b)
    with set_batch_invariant_mode():
        with pytest.raises(CompiledInModeError, match="call the model uncompiled"):
            compiled_by_inductor(a, b)
        with set_batch_invariant_mode(False):
            assert same_bits(compiled_by_inductor(a, b), standard)
        with pytest.raises(CompiledInModeError):
            compiled_by_inductor(a, b)
    assert same_bits(compiled_by_inductor(a, b), standard)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_other_backends_compute_as_the_mode(compiler: str) -> None:
    """The same graph runs with and without the overrides; forward and backward.

    Not SiLU or GELU here: PyTorch traces another formula for their gradient than it runs eagerly.
    """
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Sigmoid(), torch.nn.Linear(17, 5))
    compiled = torch.compile(model, backend=compiler)
    x = torch.randn(7, 33)

    def run(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        given = x.clone().requires_grad_()
        y = function(given)
        y.log_softmax(-1)[:, 0].sum().backward()
        return [y, given.grad]

    compiled(x)
    with set_batch_invariant_mode():
        for eager, other in zip(run(model), run(compiled), strict=True):
            assert same_bits(eager, other)
    standard = run(model)
    for eager, other in zip(standard, run(compiled), strict=True):
        torch.testing.assert_close(eager, other)


def test_torch_is_left_as_it_was() -> None:
    wrapper, stance = torch._TorchCompileInductorWrapper.__call__, torch._dynamo.eval_frame._callback_from_stance
    with set_batch_invariant_mode():
        assert torch._TorchCompileInductorWrapper.__call__ is not wrapper
    assert torch._TorchCompileInductorWrapper.__call__ is wrapper
    assert torch._dynamo.eval_frame._callback_from_stance is stance
