"""torch.compile in the mode: the bytes of eager mode, and never a graph that was compiled for the other state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bikernels_torch import CompiledInModeError, compiled, set_batch_invariant_mode

from .helpers import same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of PyTorch's compiler, about itself
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor without its code generator, which takes seconds: graphs are traced and decomposed, then interpreted."""

    def compile_fx_inner(graph: Any, _: Any, **__: Any) -> Any:
        def run(inputs: list[Any]) -> Any:
            return torch.fx.Interpreter(graph).run(*inputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_fx_inner)


class Block(torch.nn.Module):
    """A layer of a transformer with both kinds of norm, a gate, and what else models are made of."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.rms = torch.nn.LayerNorm(width), torch.nn.RMSNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = (torch.nn.Linear(*io) for io in ((width, 33), (width, 33), (33, width)))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))
        y = self.rms(x)
        x = x + self.down(F.silu(self.gate(y)) * F.gelu(self.up(y), approximate="tanh"))
        return x.log_softmax(-1) + x.mean(-1, keepdim=True) * torch.sigmoid(x) - (x * x).var(-1, keepdim=True) / 3


def training_step(model: Callable[..., Any], x: torch.Tensor, parameters: Any, *rest: Any) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = model(x, *rest)
    return [y, *torch.autograd.grad((y * y).sum(), [x, *parameters])]


def assert_same(expected: Any, actual: Any) -> None:
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual, strict=True):
        assert same_bits(one, other)


# --------------------------------------------------------------------------------------------------- the bytes of eager


class Small(torch.nn.Module):
    """Little code to generate, of every kind: fused, not fused, reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = torch.nn.Linear(24, 17), torch.nn.LayerNorm(17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.up(x))
        return (y * F.silu(y) + y).softmax(-1)


@pytest.mark.usefixtures("mode")
def test_training_and_inference(device: str) -> None:
    model = Small().to(device, torch.bfloat16)
    function = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 24).to(device, torch.bfloat16)
    assert_same(training_step(model, x, model.parameters()), training_step(function, x, model.parameters()))
    with torch.inference_mode():
        assert same_bits(function(x), model(x))


class Reductions(torch.nn.Module):
    """Every reduction, of operands that do not lie in order; parameters of a dtype of their own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.rms = torch.nn.LayerNorm(24, dtype=dtype), torch.nn.RMSNorm(24, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x.transpose(0, 1)).transpose(0, 1) + self.rms(x.flip(-1))
        variance, mean = torch.var_mean(y, -1, keepdim=True)
        return y * y.std(0) + variance * mean + x.logsumexp(1, keepdim=True) - x.sum((0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_parameters", [None, torch.float32])
@pytest.mark.usefixtures("mode", "without_code")
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_reductions_and_norms(dtype: torch.dtype, of_parameters: torch.dtype | None, device: str) -> None:
    if device == "cuda" and of_parameters not in (None, dtype):
        pytest.skip("PyTorch refuses it on a GPU")
    model = Reductions(of_parameters or dtype).to(device)
    function = torch.compile(model, fullgraph=True)
    x = torch.randn(3, 5, 24).to(device, dtype)
    assert_same(training_step(model, x, model.parameters()), training_step(function, x, model.parameters()))


class Gated(torch.nn.Module):
    """What a compiler might fuse: transcendental functions, numbers, a norm, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = F.silu(self.linear(y)) * torch.sigmoid(y / 3) + F.gelu(y, approximate="tanh") * 0.1
        return torch.cos(y) * y - torch.sin(y).exp() + (1.0 - y).tanh()


def check_portable(device: str) -> None:
    """The bytes of eager mode, also of a function that was compiled for the mode without portable functions."""
    model = Gated().to(device)
    function = torch.compile(model, fullgraph=True)
    x = torch.randn(7, 24, device=device)
    with set_batch_invariant_mode():
        plain = training_step(function, x, model.parameters())
    with set_batch_invariant_mode(portable=True):
        expected = training_step(model, x, model.parameters())
        assert_same(expected, training_step(function, x, model.parameters()))
        assert not all(map(same_bits, expected, plain))
        model.bfloat16()
        x = x.bfloat16()
        assert_same(training_step(model, x, model.parameters()), training_step(function, x, model.parameters()))


@pytest.mark.usefixtures("without_code")
def test_portable(device: str) -> None:
    check_portable(device)


@pytest.mark.gpu
def test_portable_with_code() -> None:
    """What inductor fuses is the same in the mode, so the code that it makes for a CPU is tested above."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    check_portable("cuda")


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"mode": "max-autotune", "dynamic": True}])
@pytest.mark.usefixtures("mode")
def test_modes_of_compilation(options: dict[str, Any], device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 7), torch.nn.Softmax(-1)).to(device)
    function = torch.compile(model, fullgraph=True, **options)
    with torch.no_grad():
        for batch in (2, 9):
            x = torch.randn(batch, 24, device=device)
            assert same_bits(function(x).clone(), model(x))
            assert same_bits(function(x[:1].clone()).clone(), model(x)[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.usefixtures("mode", "without_code")
def test_transformer(dtype: torch.dtype, dynamic: bool | None, device: str) -> None:
    model = Block().to(device, dtype)
    function = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for batch, length in ((2, 5), (1, 9)):
        x = torch.randn(batch, length, 24).to(device, dtype)
        mask = torch.rand(length, length, device=device) > 0.3
        assert_same(
            training_step(model, x, model.parameters(), mask), training_step(function, x, model.parameters(), mask)
        )
        with torch.no_grad():
            assert same_bits(function(x, mask), model(x, mask))


def in_place(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x.clone()
    y.mul_(2).add_(1, alpha=3).sigmoid_()
    product = torch.empty(9, 9, device=x.device, dtype=x.dtype)
    torch.mm(y, y, out=product)
    return product.t().softmax(0).t().mean(0), y.addmm_(x, x), torch.einsum("ij,kj->ik", x, x)


def numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x * 0.1 - 2, 0.3) / 3 + torch.full_like(x, 0.7) + x**2.5 + x.to(torch.int32) + (2 - x) / x


def dropout(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.4) + torch.rand_like(x)


def pooled(x: torch.Tensor) -> torch.Tensor:
    image = x.view(1, 1, 9, 9)
    return F.avg_pool2d(F.conv2d(image, image[..., :3, :3]).relu(), 2).amax(-1) + F.embedding(x[0].long() % 3, x)[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [in_place, numbers, dropout, pooled])
@pytest.mark.usefixtures("mode", "without_code")
def test_other_operators(function: Callable[..., Any], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(9, 9).to(device, dtype)
    results = []
    for run in (function, torch.compile(function, fullgraph=True)):
        torch.manual_seed(3)
        results.append(run(x))
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in results), strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("mode")
def test_what_is_fused(dtype: torch.dtype, device: str) -> None:
    """Sums, products, casts and constants are inductor's own code, and still round like eager mode."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        wide = (x * y + x - y).to(torch.float32)
        return torch.where(x > y, (wide * wide + wide).to(dtype), -x) * y + torch.full_like(x, 0.1)

    x, y = torch.randn(2, 1009).to(device, dtype).unbind()
    assert same_bits(torch.compile(function)(x, y), function(x, y))
    targets = traced_targets(function, x, y)
    assert not any("bikernels_eager::mul" in target for target in targets) or compiled._VERSION < (2, 13)


def traced_targets(function: Callable[..., Any], *inputs: torch.Tensor) -> list[str]:
    """The operators of a function's graph as inductor gets it."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(function, compiled._decompositions(), tracing_mode="fake")(
        *inputs
    )
    return [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


@pytest.mark.usefixtures("mode")
def test_what_is_not() -> None:
    targets = traced_targets(lambda x: (x @ x).softmax(-1).sum() + F.silu(x).exp().mean(), torch.randn(3, 3))
    for name in ("mm", "_softmax", "sum", "silu", "exp"):
        assert f"bikernels_eager::{name}" in targets


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_other_backends_compute_as_the_mode(compiler: str) -> None:
    """Backends that run PyTorch's operators; forward and backward.

    Not SiLU here: before 2.13 PyTorch traces another formula for its gradient than it runs eagerly.
    """
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Sigmoid(), torch.nn.Linear(17, 5))
    function = torch.compile(model, backend=compiler)
    x = torch.randn(7, 33)
    standard = training_step(model, x, model.parameters())
    for _ in range(2):
        for expected, actual in zip(standard, training_step(function, x, model.parameters()), strict=True):
            torch.testing.assert_close(expected, actual)
        with set_batch_invariant_mode():
            assert_same(training_step(model, x, model.parameters()), training_step(function, x, model.parameters()))


# ------------------------------------------------------------------------------------------------------ the other state


def test_gradients_after_inference_in_the_mode() -> None:
    """The kernels that composites have beside them in the mode are not looked for when they are gone."""
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.RMSNorm(17))
    x = torch.randn(7, 33)
    with set_batch_invariant_mode(), torch.inference_mode():
        torch.compile(model, backend="aot_eager")(x)
    torch._dynamo.reset()
    function = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        training_step(model, x, model.parameters()), training_step(function, x, model.parameters())
    )


def test_each_state_has_its_own_graphs() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(33, 17), torch.nn.Softmax(-1))
    function = torch.compile(model)
    x = torch.randn(7, 33)
    standard = function(x)
    for _ in range(2):
        with set_batch_invariant_mode():
            assert same_bits(function(x), model(x))
            with set_batch_invariant_mode(False):
                assert same_bits(function(x), standard)
            assert same_bits(function(x), model(x))
        assert same_bits(function(x), standard)
    with torch._dynamo.config.patch(error_on_recompile=True), set_batch_invariant_mode():
        assert same_bits(function(x), model(x))  # both graphs are still there


def test_backward_in_the_other_state_is_refused() -> None:
    function = torch.compile(torch.nn.Linear(5, 2))
    x = torch.randn(3, 5, requires_grad=True)
    standard = function(x).sum()
    with set_batch_invariant_mode():
        with pytest.raises(CompiledInModeError, match=r"is on, and a graph .* compiled while it was off"):
            standard.backward(retain_graph=True)
        invariant = function(x).sum()
    with pytest.raises(CompiledInModeError, match=r"is off, and a graph .* compiled while it was on"):
        invariant.backward(retain_graph=True)
    standard.backward()
    with set_batch_invariant_mode():
        invariant.backward()


@pytest.mark.usefixtures("without_code")
def test_switching_within_a_compiled_function() -> None:
    """It is refused or computed right, never computed wrong."""
    x = torch.randn(33, 33)
    inner = torch.compile(lambda x: x.softmax(-1) @ x)

    @torch.compile
    def outer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with set_batch_invariant_mode():
            return x @ x, inner(x)

    with set_batch_invariant_mode():
        expected = x @ x, x.softmax(-1) @ x
    refused = ""
    actual = expected
    try:
        actual = outer(x)
    except Exception as error:  # noqa: BLE001  (dynamo wraps it)
        refused = str(error)
    assert_same(expected, actual)
    assert not refused or "batch-invariant mode is on" in refused


@pytest.mark.usefixtures("mode")
def test_inductor_called_directly_is_refused() -> None:
    from torch._inductor.compile_fx import compile_fx

    with pytest.raises(CompiledInModeError, match="inductor was called in a way"):
        compile_fx(torch.fx.symbolic_trace(torch.nn.Linear(5, 2)), [torch.randn(3, 5)])


@pytest.mark.usefixtures("mode")
def test_flex_attention_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 128, 16)
    with pytest.raises(Exception, match=r"batch-invariant mode is on.*flex_attention.*Call the model uncompiled"):
        torch.compile(flex_attention)(q, q, q)


def test_torch_is_left_as_it_was() -> None:
    import torch._inductor.compile_fx as inductor
    from torch._dynamo import eval_frame
    from torch._inductor.output_code import CompiledFxGraph

    def parts() -> tuple[Any, ...]:
        return eval_frame._callback_from_stance, inductor.compile_fx, CompiledFxGraph.__call__

    before = parts()
    with set_batch_invariant_mode():
        assert all(one is not other for one, other in zip(before, parts(), strict=True))
    assert all(one is other for one, other in zip(before, parts(), strict=True))


def test_dynamo_imported_in_the_mode() -> None:
    """Nothing of the compiler is imported by the mode itself, and what is imported later is patched then."""
    import subprocess
    import sys

    program = """
import sys, torch
from bikernels_torch import set_batch_invariant_mode
with set_batch_invariant_mode():
    assert "torch._dynamo" not in sys.modules
    from torch._dynamo import eval_frame
    from torch._inductor import compile_fx
    inside = eval_frame._callback_from_stance, compile_fx.compile_fx
outside = eval_frame._callback_from_stance, compile_fx.compile_fx
assert all(x.__wrapped__ is y for x, y in zip(inside, outside))
with set_batch_invariant_mode():
    pass
assert not any("bikernels" in type(finder).__module__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", program], check=True)
