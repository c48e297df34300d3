"""Pointwise functions on a CPU: every element has the bits it has alone, wherever it lies, on however many threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bikernels_torch import set_batch_invariant_mode
from bikernels_torch.operators import pointwise

from .helpers import DTYPES, LAYOUTS_OF_ELEMENTS, TOLERANCE, bits, same_bits

aten = torch.ops.aten

COVERED: dict[str, Callable[..., torch.Tensor]] = {
    "add alpha": lambda x, y, z: torch.add(x, y, alpha=0.37),
    "add alpha, a number": lambda x, y, z: torch.add(x, 1.37, alpha=3),
    "add alpha, 0-d": lambda x, y, z: torch.add(x, torch.tensor(1.37, dtype=x.dtype), alpha=0.37),
    "add alpha in place": lambda x, y, z: x.clone().add_(y, alpha=-0.37),
    "add alpha out": lambda x, y, z: torch.add(x, y, alpha=0.37, out=torch.empty_like(x)),
    "sub alpha": lambda x, y, z: torch.sub(x, y, alpha=0.37),
    "sub alpha from a number": lambda x, y, z: torch.rsub(x, 1.37, alpha=0.37),
    "rsub alpha": lambda x, y, z: torch.rsub(x, y, alpha=0.37),
    "addr in place": lambda x, y, z: x.clone()[None].addr_(x.new_tensor([1.3]), y, alpha=0.3)[0],
    "addr": lambda x, y, z: torch.addr(x[None], x.new_tensor([1.3]), y, beta=0.7, alpha=0.3)[0],
    "atan2": lambda x, y, z: torch.atan2(x, y),
    "atanh": lambda x, y, z: torch.atanh(x / 8),
    "celu": lambda x, y, z: F.celu(x, 1.3),
    "cosh": lambda x, y, z: torch.cosh(x),
    "elu": lambda x, y, z: F.elu(x, 1.3),
    "elu_backward": lambda x, y, z: aten.elu_backward(x, 1.3, 1.1, 1.0, False, y),
    "exp2": lambda x, y, z: torch.exp2(x),
    "float_power": lambda x, y, z: torch.float_power(x.abs(), 2.5).to(x.dtype),
    "gelu": lambda x, y, z: F.gelu(x),
    "gelu tanh": lambda x, y, z: F.gelu(x, approximate="tanh"),
    "gelu_backward": lambda x, y, z: aten.gelu_backward(x, y),
    "gelu_backward tanh": lambda x, y, z: aten.gelu_backward(x, y, approximate="tanh"),
    "glu": lambda x, y, z: F.glu(torch.stack([x, y]), 0)[0],
    "hypot": lambda x, y, z: torch.hypot(x, y),
    "logaddexp": lambda x, y, z: torch.logaddexp(x, y),
    "logaddexp2": lambda x, y, z: torch.logaddexp2(x, y),
    "mish": lambda x, y, z: F.mish(x),
    "mish_backward": lambda x, y, z: aten.mish_backward(x, y),
    "pow scalar": lambda x, y, z: torch.pow(x.abs(), 2.5),
    "pow -0.5": lambda x, y, z: torch.pow(x.abs(), -0.5),
    "pow 5": lambda x, y, z: torch.pow(x, 5),
    "pow tensor": lambda x, y, z: torch.pow(x.abs(), y),
    "pow 0-d": lambda x, y, z: torch.pow(x.abs(), torch.tensor(2.5, dtype=x.dtype)),
    "scalar pow": lambda x, y, z: torch.pow(2.3, x),
    "rsqrt": lambda x, y, z: torch.rsqrt(x.abs()),
    "selu": lambda x, y, z: F.selu(x),
    "sigmoid": lambda x, y, z: torch.sigmoid(x),
    "sigmoid in place": lambda x, y, z: x.clone().sigmoid_(),
    "sigmoid out": lambda x, y, z: torch.sigmoid(x, out=torch.empty_like(x)),
    "silu": lambda x, y, z: F.silu(x),
    "silu in place": lambda x, y, z: F.silu(x.clone(), inplace=True),
    "silu_backward": lambda x, y, z: aten.silu_backward(x, y),
    "sinh": lambda x, y, z: torch.sinh(x),
    "softplus": lambda x, y, z: F.softplus(x, 2.0, 5.0),
    "softplus_backward": lambda x, y, z: aten.softplus_backward(x, y, 1.0, 20.0),
    "softshrink": lambda x, y, z: F.softshrink(x, 0.3),
    "i0e": lambda x, y, z: torch.special.i0e(x),
}


def unary(name: str) -> Callable[..., torch.Tensor]:
    function = getattr(torch, name)
    return lambda x, y, z: function(x)


UNARY = (
    "abs", "acos", "asin", "asinh", "atan", "cos", "deg2rad", "digamma", "erf", "erfc", "exp", "expm1", "frac",
    "i0", "lgamma", "log", "log10", "log1p", "log2", "neg", "reciprocal", "relu", "sgn", "sin", "sinc", "sqrt",
    "square", "tan", "tanh",
)  # fmt: skip

ALIKE: dict[str, Callable[..., torch.Tensor]] = {name: unary(name) for name in UNARY} | {
    "add": lambda x, y, z: x + y,
    "addcdiv": lambda x, y, z: torch.addcdiv(x, y, z, value=0.37),
    "addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.37),
    "add scalar": lambda x, y, z: x + 1.37,
    "binary cross-entropy with logits": lambda x, y, z: F.binary_cross_entropy_with_logits(x, y, reduction="none"),
    "div": lambda x, y, z: x / y,
    "hardsigmoid": lambda x, y, z: F.hardsigmoid(x),
    "hardswish": lambda x, y, z: F.hardswish(x),
    "hardtanh": lambda x, y, z: F.hardtanh(x, -0.5, 0.7),
    "hardswish_backward": lambda x, y, z: aten.hardswish_backward(x, y),
    "huber": lambda x, y, z: F.huber_loss(x, y, reduction="none"),
    "leaky_relu": lambda x, y, z: F.leaky_relu(x, 0.03),
    "lerp": lambda x, y, z: torch.lerp(x, y, 0.37),
    "lerp tensor": lambda x, y, z: torch.lerp(x, y, z),
    "log_sigmoid": lambda x, y, z: F.logsigmoid(x),
    "log_sigmoid_backward": lambda x, y, z: aten.log_sigmoid_backward(x, y, aten.log_sigmoid_forward(y)[1]),
    "logit_backward": lambda x, y, z: aten.logit_backward(x, y.abs() / 64),
    "mul": lambda x, y, z: x * y,
    "pow 2": lambda x, y, z: x**2,
    "pow 3": lambda x, y, z: x**3,
    "pow 0.5": lambda x, y, z: x.abs() ** 0.5,
    "prelu": lambda x, y, z: F.prelu(x, x.new_tensor([0.3])),
    "remainder": lambda x, y, z: torch.remainder(x, 0.37),
    "sigmoid_backward": lambda x, y, z: aten.sigmoid_backward(x, y),
    "tanh_backward": lambda x, y, z: aten.tanh_backward(x, y),
    "to bfloat16": lambda x, y, z: x.bfloat16(),
    "to float32": lambda x, y, z: x.float(),
    "where": lambda x, y, z: torch.where(x > 0, x * y, z),
    "xlogy": lambda x, y, z: torch.xlogy(x, y.abs()),
}
"""Operators that PyTorch computes alike everywhere, and that the mode therefore leaves alone."""

SIZES = (2, 7, 9, 15, 17, 31, 33, 63, 65, 96, 127, 129, 257)
COUNT = 270


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    scale = torch.tensor([0.3, 1.0, 6.0]).repeat(COUNT // 3)
    return [(torch.randn(COUNT, dtype=torch.float64) * scale).to(dtype) for _ in range(3)]


def differing(x: torch.Tensor, y: torch.Tensor) -> int:
    return int(((bits(x) != bits(y)) & ~(x.isnan() & y.isnan())).sum())


def placements(call: Callable[..., torch.Tensor], x: list[torch.Tensor]) -> Iterator[tuple[str, int]]:
    """How many elements differ from what they are alone: at every offset of small tensors, strided, in large ones."""
    alone = torch.cat([call(*(part[i : i + 1].clone() for part in x)) for i in range(COUNT)])
    for size in SIZES:
        for start in (0, 3, COUNT - size):
            pieces = [part[start : start + size] for part in x]
            yield f"{size} at {start}", differing(call(*(p.clone() for p in pieces)), alone[start : start + size])
            yield f"{size} at {start}, not aligned", differing(call(*pieces), alone[start : start + size])
    yield "strided", differing(call(*(torch.stack([p, p], 1)[:, 0] for p in x)), alone)
    yield "one strided", differing(call(torch.stack([x[0]] * 2, 1)[:, 0], *x[1:]), alone)
    for repeats in (130, 247):  # beyond the size from which PyTorch uses threads, with shares of any length
        large = [torch.cat([*[p] * repeats, p[:151]]) for p in x]
        yield f"{repeats} times", differing(call(*large), torch.cat([*[alone] * repeats, alone[:151]]))


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COVERED)
@pytest.mark.usefixtures("mode", "_two_threads")
def test_covered(name: str, dtype: torch.dtype) -> None:
    wrong = {place: count for place, count in placements(COVERED[name], operands(dtype)) if count}
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.usefixtures("_two_threads")
def test_alike_without_help(name: str, dtype: torch.dtype) -> None:
    wrong = {place: count for place, count in placements(ALIKE[name], operands(dtype)) if count}
    assert not wrong


@pytest.mark.parametrize("name", ["silu", "gelu", "pow tensor"])
def test_one_thread_or_two(name: str) -> None:
    before = torch.get_num_threads()
    x = [part.repeat(300) for part in operands(torch.float32)]
    try:
        with set_batch_invariant_mode():
            torch.set_num_threads(1)
            one = COVERED[name](*x)
            torch.set_num_threads(2)
            assert same_bits(COVERED[name](*x), one)
    finally:
        torch.set_num_threads(before)


def test_the_test_notices() -> None:
    """Without the mode most of the covered operators fail it, in some dtype."""
    vary = {
        name
        for name, call in COVERED.items()
        if any(count for dtype in DTYPES for _, count in placements(call, operands(dtype)))
    }
    assert vary >= {"silu", "gelu", "sigmoid", "rsqrt", "pow scalar", "softplus", "gelu_backward"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", COVERED)
def test_close_to_standard(name: str, dtype: torch.dtype) -> None:
    x = operands(dtype)
    standard = COVERED[name](*x)
    with set_batch_invariant_mode():
        result = COVERED[name](*x)
    assert result.dtype is standard.dtype
    assert result.shape == standard.shape
    torch.testing.assert_close(result, standard, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)


def test_every_override_is_exercised() -> None:
    """Each operator in the table is one of the tested ones, by the name of its overload or of what calls it."""
    used = set()
    original = {name: pointwise.OVERRIDES[name] for name in pointwise.OVERRIDES}

    def spy(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            used.add(name.split(".")[0].rstrip("_"))
            return original[name](*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in original:
            patch.setitem(pointwise.OVERRIDES, name, spy(name))
        with set_batch_invariant_mode():
            for call in COVERED.values():
                call(*operands(torch.float32))
    assert {name.split(".")[0].rstrip("_") for name in original} == used


@pytest.mark.parametrize("layout", LAYOUTS_OF_ELEMENTS)
def test_layouts(layout: str) -> None:
    """Shape and strides of the result are PyTorch's, for one operand, two, and a broadcast one."""
    x = LAYOUTS_OF_ELEMENTS[layout](torch.randn)
    calls = [
        lambda: F.silu(x),
        lambda: torch.sigmoid(x),
        lambda: torch.pow(x.abs(), x),
        lambda: torch.atan2(x, torch.ones(())),
        lambda: torch.hypot(x, x[:1] if x.dim() else x),
        lambda: torch.sigmoid(x, out=torch.empty(0)),
    ]
    for call in calls:
        standard = call()
        with set_batch_invariant_mode():
            result = call()
        assert result.shape == standard.shape
        assert result.stride() == standard.stride()
        torch.testing.assert_close(result, standard)


def test_mixed_and_integer_dtypes() -> None:
    """The dtype is PyTorch's, and each element's bits are those it has alone."""
    x, half, integers = torch.randn(77), torch.randn(77).half(), torch.arange(77)
    calls: list[Callable[[slice], torch.Tensor]] = [
        lambda s: torch.sigmoid(integers[s]),
        lambda s: torch.exp2(integers[s] / 77),
        lambda s: torch.pow(integers[s], 2.5),
        lambda s: torch.pow(integers[s], half[s].abs()),
        lambda s: torch.pow(half[s].abs(), x[s]),
        lambda s: torch.atan2(half[s], half[s].bfloat16()),
        lambda s: torch.pow(x[s].abs(), torch.tensor(2.5, dtype=torch.float64)),
        lambda s: x[s].abs().pow_(integers[s] / 10),
        lambda s: half[s].abs().pow_(x[s]),
        lambda s: torch.hypot(half[s], x[s]),
        lambda s: torch.sigmoid(half[s], out=torch.empty_like(x[s])),
        lambda s: torch.pow(integers[s], 2),
    ]
    for call in calls:
        standard = call(slice(None))
        with set_batch_invariant_mode():
            result = call(slice(None))
            alone = torch.cat([call(slice(i, i + 1)) for i in range(77)])
        assert result.dtype is standard.dtype
        assert same_bits(result, alone)
        torch.testing.assert_close(result, standard, rtol=2e-3, atol=2e-3)


NUMBERS = (True, 2, 300, -7, 2**40, 2.7, 1e-9, 1e30, 2.7 + 1j)
NUMBER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int64, *DTYPES, torch.complex64)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("shape", [(), (1,), (3, 40)])
@pytest.mark.parametrize("dtype", NUMBER_DTYPES)
def test_sums_with_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A number in a tensor's place has no more say in the mode; without alpha the bytes are PyTorch's, or its words."""
    x = (torch.randn(shape).abs() * 3).to(dtype)
    calls: list[Callable[[Any, dict[str, Any]], torch.Tensor]] = [
        lambda n, alpha: torch.add(x, n, **alpha),
        lambda n, alpha: torch.add(n, x, **alpha),
        lambda n, alpha: torch.add(x, n, out=torch.empty(shape, dtype=torch.float32), **alpha),
        lambda n, alpha: torch.add(n, n, **alpha),
        lambda n, alpha: x.clone().add_(n, **alpha),
        lambda n, alpha: torch.sub(x, n, **alpha),
        lambda n, alpha: torch.rsub(x, n, **alpha),
        lambda n, alpha: x.clone().sub_(n, **alpha),
    ]

    def attempt(call: Callable[..., torch.Tensor], n: Any, alpha: dict[str, Any]) -> torch.Tensor | str:
        try:
            return call(n, alpha)
        except RuntimeError as error:
            return str(error).split("Exception raised")[0]

    cases = list(itertools.product(calls, NUMBERS, ({}, {"alpha": 3}, {"alpha": 0.3})))
    standard = [attempt(*case) for case in cases]
    with set_batch_invariant_mode():
        results = [attempt(*case) for case in cases]
    for (_, _, alpha), result, expected in zip(cases, results, standard, strict=True):
        if isinstance(result, str) or isinstance(expected, str):
            assert result == expected
            continue
        assert result.dtype is expected.dtype
        tolerance = max(TOLERANCE.get(x, 1e-5) for x in (dtype, result.dtype)) if alpha else 0
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=8 * tolerance)  # the terms may cancel


def test_gradients() -> None:
    x = torch.randn(13, dtype=torch.float64, requires_grad=True)
    with set_batch_invariant_mode():
        for call in (
            F.silu,
            F.gelu,
            torch.sigmoid,
            F.softplus,
            F.mish,
            F.elu,
            lambda t: torch.pow(t.abs(), 2.5),
            lambda t: torch.add(t, t * t, alpha=0.3),
        ):
            assert torch.autograd.gradcheck(call, x)
            assert torch.autograd.gradgradcheck(call, x)
