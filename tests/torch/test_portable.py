"""`portable=True`: pointwise functions are the core's on every device, and arithmetic rounds alike on all of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bikernels
from bikernels.specs import ELEMENTWISE
from bikernels_torch import UncoveredOperatorError, overrides, set_batch_invariant_mode
from bikernels_torch.auditing import kinds
from bikernels_torch.auditing.kinds import Kind
from bikernels_torch.operators import portable

from .helpers import DTYPES, LAYOUTS_OF_ELEMENTS, from_numpy, same_bits, to_numpy

aten = torch.ops.aten


@pytest.fixture
def portable_mode() -> Iterator[None]:
    with set_batch_invariant_mode(portable=True):
        yield


class Call:
    """A function as PyTorch and as the core have it, of x and, where it has two operands, y."""

    def __init__(self, of_torch: Callable[..., torch.Tensor], of_core: Callable[..., np.ndarray], two: bool = False):
        self.of_torch, self.of_core, self.two = of_torch, of_core, two


TANH = {"approximate": "tanh"}
CALLS = {name: Call(getattr(torch, name), getattr(bikernels, name)) for name in (
    "exp", "exp2", "expm1", "log", "log1p", "erf", "sqrt", "rsqrt", "sigmoid", "tanh", "sin", "cos",
)} | {
    "silu": Call(F.silu, bikernels.silu),
    "gelu": Call(F.gelu, bikernels.gelu),
    "gelu_tanh": Call(functools.partial(F.gelu, **TANH), functools.partial(bikernels.gelu, **TANH)),
    "softplus": Call(lambda x: F.softplus(x, 1.25, 7.0), functools.partial(bikernels.softplus, beta=1.25, threshold=7)),
    "pow": Call(torch.pow, bikernels.pow, two=True),
    "sigmoid_backward": Call(aten.sigmoid_backward, bikernels.sigmoid_backward, two=True),
    "tanh_backward": Call(aten.tanh_backward, bikernels.tanh_backward, two=True),
    "silu_backward": Call(aten.silu_backward, bikernels.silu_backward, two=True),
    "gelu_backward": Call(aten.gelu_backward, bikernels.gelu_backward, two=True),
    "gelu_tanh_backward": Call(
        functools.partial(aten.gelu_backward, **TANH), functools.partial(bikernels.gelu_backward, **TANH), two=True
    ),
    "softplus_backward": Call(
        lambda g, x: aten.softplus_backward(g, x, 1.25, 7.0),
        functools.partial(bikernels.softplus_backward, beta=1.25, threshold=7),
        two=True,
    ),
}  # fmt: skip


def numbers(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Every number of a dtype of 16 bits, in an order of its own; of others close, wide and special ones."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.bfloat16, torch.float16):
        order = torch.randperm(1 << 16, generator=generator) if seed else torch.arange(1 << 16)
        return (order - (1 << 15)).to(torch.int16).view(dtype)
    x = torch.randn(6000, generator=generator, dtype=torch.float64)
    scales = torch.tensor([0.01, 1.0, 10.0, 1e5]).repeat_interleave(1500)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, 1e30]
    return torch.cat([x * scales, torch.tensor(special, dtype=torch.float64)]).to(dtype)


def operands(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    return [numbers(dtype, seed) for seed in range(1 + call.two)]


def same_on_cpu(call: Callable[..., torch.Tensor], device: str, *arrays: torch.Tensor) -> bool:
    """Whether a device gives the bits of a CPU; which NaN it is does not matter where PyTorch writes it."""
    here, there = call(*arrays), call(*(x.to(device) for x in arrays)).cpu()
    nan = here.isnan() if here.is_floating_point() else torch.zeros_like(here, dtype=torch.bool)
    here, there = (torch.where(nan & one.isnan(), torch.zeros_like(one), one) for one in (here, there))
    return same_bits(here, there)


def test_every_function_of_the_core_is_called() -> None:
    assert set(CALLS) == set(ELEMENTWISE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("portable_mode")
def test_is_the_core(name: str, dtype: torch.dtype, device: str) -> None:
    """Byte for byte what a CPU computes of the same numbers, on a CPU and on a GPU."""
    call = CALLS[name]
    arrays = operands(call, dtype)
    expected = from_numpy(call.of_core(*map(to_numpy, arrays)))
    assert same_bits(call.of_torch(*(x.to(device) for x in arrays)).cpu(), expected)


# ----------------------------------------------------------------------------------------------------------- arithmetic

ROUNDED_ONCE: dict[str, Callable[..., torch.Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "reciprocal": lambda x, y: torch.reciprocal(x),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clamp": lambda x, y: x.clamp(-0.7, 0.3),
    "leaky_relu": lambda x, y: F.leaky_relu(x, 0.25),
    "where": lambda x, y: torch.where(x > y, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, torch.finfo(x.dtype).min),
    "square": lambda x, y: x.square(),
    "to bfloat16": lambda x, y: x.bfloat16(),
    "to float16": lambda x, y: x.half(),
    "to float32": lambda x, y: x.float(),
    "to float64": lambda x, y: x.double(),
    "round": lambda x, y: x.round(),
    "float32 and its own": lambda x, y: x.float() * y,
}
"""What PyTorch computes in a portable mode: one rounding, or none."""

TAKEN_APART: dict[str, Callable[..., torch.Tensor]] = {
    "add a number": lambda x, y: x + 0.1,
    "sub a number": lambda x, y: x - 0.3,
    "a number less": lambda x, y: 1.7 - x,
    "mul a number": lambda x, y: x * 0.0883,
    "div a number": lambda x, y: x / 3,
    "div in place": lambda x, y: x.clone().div_(0.7),
    "div of integers": lambda x, y: torch.arange(-500, 500, device=x.device) / 7,
    "a number divided": lambda x, y: 3.0 / x,
    "mul 0-d": lambda x, y: x * torch.tensor(0.1, dtype=torch.float64),
    "mul 0-d of the device": lambda x, y: x * torch.tensor(0.1, device=x.device),
    "div 0-d of the device": lambda x, y: x / torch.tensor(0.7, dtype=x.dtype, device=x.device),
    "mul out": lambda x, y: torch.mul(x, 0.1, out=torch.empty_like(x)),
    "add alpha": lambda x, y: torch.add(x, y, alpha=0.37),
    "sub alpha in place": lambda x, y: x.clone().sub_(y, alpha=0.37),
    "rsub alpha": lambda x, y: torch.rsub(x, y, alpha=0.37),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=0.37),
    "addcmul in place": lambda x, y: x.clone().addcmul_(y, y),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, x, value=0.37),
    "lerp": lambda x, y: torch.lerp(x, y, 0.37),
    "lerp tensor": lambda x, y: torch.lerp(x, y, y),
    "relu": lambda x, y: F.relu(x),
    "relu_": lambda x, y: F.relu(x.clone(), inplace=True),
    "pow 0.5": lambda x, y: x.abs() ** 0.5,
    "pow -0.5": lambda x, y: x.abs() ** -0.5,
    "pow -1": lambda x, y: x**-1,
    "pow 2": lambda x, y: x**2,
    "pow 3": lambda x, y: x**3,
    "pow of a number": lambda x, y: 10000.0**x,
    "pow of a number, integers": lambda x, y: 10000.0 ** (torch.arange(0, 128, 2, device=x.device) / 128),
    "pow in place": lambda x, y: x.abs().pow_(1.5),
}
"""Where PyTorch's own code for a CPU and for a GPU may round otherwise."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ROUNDED_ONCE, *TAKEN_APART])
@pytest.mark.usefixtures("portable_mode")
def test_arithmetic_is_alike_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    x, y = numbers(dtype), numbers(dtype, 1)
    assert same_on_cpu((ROUNDED_ONCE | TAKEN_APART)[name], "cuda", x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("portable_mode")
def test_each_step_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    """In NumPy, in the accumulate dtype: a number has its accuracy, a quotient is one, nothing is contracted."""
    x, y = (one[one.isfinite()][:5000] for one in (numbers(dtype), numbers(dtype, 1)))
    wide = np.float64 if dtype is torch.float64 else np.float32
    a, b = (to_numpy(one).astype(wide) for one in (x, y))
    third, scale = wide(0.37), wide(0.0883)
    with np.errstate(all="ignore"):
        cases = {
            "x * 0.0883": (x.to(device) * 0.0883, a * scale),
            "x + 0.37": (x.to(device) + 0.37, a + third),
            "0.37 - x": (0.37 - x.to(device), third - a),
            "x / 0.37": (x.to(device) / 0.37, a / third),
            "alpha": (torch.add(x.to(device), y.to(device), alpha=0.37), a + b * third),
            "addcmul": (torch.addcmul(x.to(device), x.to(device), y.to(device), value=0.37), a + (a * third) * b),
            "square": (x.to(device) ** 2, a * a),
            "root": (x.to(device).abs() ** 0.5, np.sqrt(np.abs(a))),
            "relu": (F.relu(x.to(device)), np.where(a <= 0, wide(0), a)),
        }
        for name, (result, expected) in cases.items():
            assert result.dtype is dtype, name
            rounded = from_numpy(expected).to(dtype)
            keep = ~rounded.isnan()
            assert same_bits(result.cpu()[keep], rounded[keep]), name


def test_without_it_numbers_are_rounded(device: str) -> None:
    """The test above notices: in half precision PyTorch's CPU rounds the number, its GPU multiplies by 1 / 3."""
    x = numbers(torch.bfloat16).to(device)
    with set_batch_invariant_mode():
        plain = x + 0.37, torch.linspace(1, 2, 5000, device=device) / 3
    with set_batch_invariant_mode(portable=True):
        portable_ones = x + 0.37, torch.linspace(1, 2, 5000, device=device) / 3
    assert not all(map(same_bits, plain, portable_ones))


# ------------------------------------------------------------------------------------------------- forms and layouts

FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unary": torch.exp,
    "in place": lambda x: x.clone().sigmoid_(),
    "out": lambda x: torch.tanh(x, out=torch.empty(0)),
    "out of another dtype": lambda x: torch.tanh(x, out=torch.empty(x.shape, dtype=torch.float64)),
    "out itself": lambda x: (lambda y: torch.sin(y, out=y))(x.clone()),
    "gelu_": lambda x: aten.gelu_(x.clone(), approximate="tanh"),
    "broadcast": lambda x: torch.pow(x, x[:1] if x.dim() else x),
    "transposed operand": lambda x: torch.pow(x, x.flip(-1).mT.contiguous().mT if x.dim() > 1 else x),
    "0-d exponent": lambda x: torch.pow(x, torch.tensor(2.5)),
    "0-d base": lambda x: torch.pow(torch.tensor(2.5), x),
    "integers": lambda x: torch.exp((x * 5).long()),
    "mixed": lambda x: torch.pow(x.half(), x),
    "mixed gradient": lambda x: aten.silu_backward(x, x.half()),
    "grad_input": lambda x: aten.tanh_backward.grad_input(x, x, grad_input=torch.empty(0)),
    "bool": lambda x: torch.sigmoid(x > 0.5),
    "complex": lambda x: torch.exp(x.to(torch.complex64)),
    "number": lambda x: x.bfloat16() * 0.3,
    "addcmul": lambda x: torch.addcmul(x, x[:1] if x.dim() else x, x, value=0.3),
    "lerp out": lambda x: torch.lerp(x, x, 0.3, out=torch.empty(0)),
    "power of integers": lambda x: torch.pow((x * 5).long(), 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_ELEMENTS)
def test_forms_and_layouts(layout: str, form: str) -> None:
    """Dtype, shape and strides are PyTorch's, and the values close to its."""
    x = LAYOUTS_OF_ELEMENTS[layout](torch.rand)
    standard = FORMS[form](x)
    with set_batch_invariant_mode(portable=True):
        result = FORMS[form](x)
    assert (result.dtype, result.shape) == (standard.dtype, standard.shape)
    assert result.stride() == standard.stride()
    torch.testing.assert_close(result, standard, rtol=1e-2, atol=1e-2)


def test_errors_are_pytorch_s() -> None:
    x = torch.rand(3, 4)
    calls: list[Callable[[], Any]] = [
        lambda: torch.arange(3).exp_(),
        lambda: torch.exp(x, out=torch.empty(3, 4, dtype=torch.int32)),
        lambda: torch.pow(x, torch.rand(5)),
        lambda: x[:1].expand(3, 4).sigmoid_(),
        lambda: torch.arange(3).div_(0.5),
        lambda: x[0].add_(x, alpha=2),
        lambda: F.gelu(x, approximate="fast"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError):
            call()
        with set_batch_invariant_mode(portable=True), pytest.raises((RuntimeError, ValueError)):
            call()


def test_gradients(device: str) -> None:
    """Against differences, in float64; and in float32 the same bits on every device."""
    x = torch.rand(4, dtype=torch.float64, device=device, requires_grad=True)
    functions = [torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p, torch.erf, torch.rsqrt, torch.sigmoid]
    functions += [torch.tanh, torch.sin, torch.cos, F.silu, F.gelu, functools.partial(F.gelu, **TANH), F.softplus]
    functions += [
        lambda x: x**2.5,
        lambda x: 2.5**x,
        lambda x: x**x,
        lambda x: x / 3,
        lambda x: torch.lerp(x, 2 * x, 0.3),
    ]
    with set_batch_invariant_mode(portable=True):
        for function in functions:
            assert torch.autograd.gradcheck(function, x)

        def gradient(function: Callable[..., torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(function(y).sum(), y)[0]

        for function in functions:
            here = torch.linspace(0.1, 3, 1000, requires_grad=True)
            there = torch.linspace(0.1, 3, 1000).to(device).requires_grad_()
            assert same_bits(gradient(function, here), gradient(function, there).cpu())


# ------------------------------------------------------------------------------------------------------------ the mode


def test_it_is_as_the_newest_decision_says() -> None:
    x = torch.linspace(-4, 4, 1001)
    core = from_numpy(bikernels.tanh(x.numpy()))
    standard = torch.tanh(x)
    assert not same_bits(core, standard)
    with set_batch_invariant_mode():
        with set_batch_invariant_mode(portable=True):
            assert same_bits(torch.tanh(x), core)
            with set_batch_invariant_mode():
                assert same_bits(torch.tanh(x), standard)
            with set_batch_invariant_mode(False):
                assert same_bits(torch.tanh(x), standard)
            assert same_bits(torch.tanh(x), core)
        assert same_bits(torch.tanh(x), standard)

    @set_batch_invariant_mode(portable=True)
    def decorated() -> torch.Tensor:
        return torch.tanh(x)

    assert same_bits(decorated(), core)
    assert same_bits(torch.tanh(x), standard)


def test_strict_and_portable() -> None:
    x = torch.rand(5, 7)
    for outer in ({}, {"strict": True}, {"portable": True}):
        with set_batch_invariant_mode(**outer), set_batch_invariant_mode(strict=True, portable=True):
            assert same_bits(F.silu(x), from_numpy(bikernels.silu(x.numpy())))
            with pytest.raises(UncoveredOperatorError):
                x.cumsum(0)
    assert x.cumsum(0).shape == x.shape


def test_arguments() -> None:
    with pytest.raises(TypeError, match="portable is 1; pass True or False"):
        set_batch_invariant_mode(portable=1)
    with pytest.raises(ValueError, match="portable=True with enabled=False"):
        set_batch_invariant_mode(False, portable=True)


def test_every_override_exists() -> None:
    """A name that no version of PyTorch has would never be replaced."""
    missing = [name for name in portable.OVERRIDES if not torch._C._dispatch_has_kernel(f"aten::{name}")]
    assert not missing


# --------------------------------------------------------------------------------------------------------------- models

VOCABULARY = 97


def language_model(architecture: str, dtype: torch.dtype) -> torch.nn.Module:
    """A small model with random weights; made in the mode, since a CPU's own functions make its frequencies."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    config = getattr(transformers, f"{architecture}Config")(**sizes, **heads)
    config.head_dim = 16
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Operators(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.add(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["Qwen3", "Llama"])
@pytest.mark.usefixtures("portable_mode")
def test_a_model_is_made_of_portable_operators(architecture: str) -> None:
    """Each operator that runs is the core's, moves or compares values, or rounds once."""
    model = language_model(architecture, torch.bfloat16)
    with torch.no_grad(), Operators() as operators:
        model(torch.arange(30)[None])
    assert len(operators.ran) > 20
    core = {**overrides.KERNELS, **overrides.PORTABLE_KERNELS}
    rest = {
        operator._name
        for operator in operators.ran
        if operator._name.removeprefix("aten::") not in core
        and kinds.kind_of(operator) is not Kind.EXACT
        and not kinds.is_composite(operator, "cpu")
    }
    assert rest <= {f"aten::{name}" for name in ("neg", "reciprocal", "arange")}
    assert {"aten::cos", "aten::silu", "aten::rsqrt"} <= {operator._name for operator in operators.ran}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ["Qwen3", "Llama"])
def test_a_model_has_the_same_logits_on_a_gpu_and_on_a_cpu(architecture: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    tokens = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(2))
    classes = {"fma32", bikernels.backends()["cupy"].arithmetic["bfloat16"]}
    for arithmetic in sorted(classes if dtype is not torch.float32 else {"fma32"}):
        with bikernels.use_arithmetic(arithmetic), set_batch_invariant_mode(portable=True), torch.inference_mode():
            model = language_model(architecture, dtype)
            here = model(tokens).logits
            there = model.cuda()(tokens.cuda()).logits.cpu()
        assert here.isfinite().all()
        assert same_bits(here, there), arithmetic
