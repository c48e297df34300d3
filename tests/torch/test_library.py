"""torch.ops.bikernels: opcheck, gradients, the core's bytes, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bikernels
import bikernels_torch

from .helpers import FLOATS, on_numpy, same_bits

ops = torch.ops.bikernels


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device).requires_grad_(grad)


CALLS: dict[str, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "mm": lambda r: (ops.mm, (r(3, 5), r(5, 4)), {}),
    "mm wider": lambda r: (ops.mm, (r(3, 5), r(5, 4)), {"dtype": torch.float32}),
    "bmm": lambda r: (ops.bmm, (r(2, 3, 5), r(2, 5, 4)), {}),
    "addmm": lambda r: (ops.addmm, (r(4), r(3, 5), r(5, 4)), {"alpha": 0.5, "beta": 2}),
    "baddbmm": lambda r: (ops.baddbmm, (r(2, 1, 4), r(2, 3, 5), r(2, 5, 4)), {"alpha": 0.5}),
    "softmax": lambda r: (ops.softmax, (r(3, 5), 1), {}),
    "softmax wider": lambda r: (ops.softmax, (r(3, 5), 0), {"dtype": torch.float32}),
    "log_softmax": lambda r: (ops.log_softmax, (r(3, 5), -1), {}),
    "mean": lambda r: (ops.mean, (r(3, 5),), {}),
    "mean over dims": lambda r: (ops.mean, (r(3, 5, 2), [0, -1], True), {}),
    "sum": lambda r: (ops.sum, (r(3, 5, 2), [0, -1]), {}),
    "rms_norm": lambda r: (ops.rms_norm, (r(3, 5), [5]), {}),
    "rms_norm with statistics": lambda r: (ops._rms_norm, (r(3, 2, 5), [2, 5], r(2, 5), 1e-3), {}),
    "rms_norm_backward": lambda r: (ops._rms_norm_backward, (r(3, 5), r(3, 5), [5], r(3, 1).detach(), r(5), None), {}),
    "softmax_backward": lambda r: (ops._softmax_backward, (r(3, 5), r(3, 5), 1, torch.float32), {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, dtype: torch.dtype, device: str) -> None:
    for grad in (False, True):
        operator, arguments, options = CALLS[name](
            lambda *shape, grad=grad: random(*shape, dtype=dtype, device=device, grad=grad)
        )
        torch.library.opcheck(operator.default, arguments, options)


@pytest.mark.parametrize("name", [name for name in CALLS if not re.search("wider|statistics|backward", name)])
def test_gradients(name: str, device: str) -> None:
    operator, arguments, options = CALLS[name](
        lambda *shape: random(*shape, dtype=torch.float64, device=device, grad=True)
    )
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    rest = arguments[len(tensors) :]
    assert torch.autograd.gradcheck(lambda *x: operator(*x, *rest, **options), tensors)
    assert torch.autograd.gradgradcheck(lambda *x: operator(*x, *rest, **options), tensors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [[5], [2, 5]])
def test_gradients_of_rms_norm(weighted: bool, shape: list[int], device: str) -> None:
    x, weight = (random(*lengths, dtype=torch.float64, device=device, grad=True) for lengths in ((3, 2, 5), shape))
    inputs = (x, weight) if weighted else (x,)
    for eps in (None, 0.5):

        def call(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = eps) -> torch.Tensor:
            return ops.rms_norm(x, shape, weight, eps)

        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(
    "shapes",
    [((5,), (5,)), ((3, 5), (5,)), ((5,), (5, 4)), ((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((3, 5), (2, 5, 4)),
     ((2, 1, 3, 5), (7, 5, 4)), ((5,), (2, 5, 4)), ((2, 3, 5), (5,)), ((0, 3, 5), (5, 4))],
)  # fmt: skip
def test_matmul(shapes: Any, device: str) -> None:
    a, b = (random(*shape, device=device) for shape in shapes)
    result = ops.matmul(a, b)
    assert same_bits(result, on_numpy(bikernels.matmul, a, b))
    assert result.shape == torch.matmul(a, b).shape
    x, y = (random(*shape, dtype=torch.float64, grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(ops.matmul, (x, y))


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_in_the_mode_and_out_of_it(dtype: torch.dtype, device: str) -> None:
    a, b = random(3, 33, dtype=dtype, device=device), random(33, 4, dtype=dtype, device=device)
    outside = [ops.mm(a, b), ops.softmax(a, 1), ops.log_softmax(a, 0), ops.mean(a, [1])]
    with bikernels_torch.set_batch_invariant_mode():
        inside = [ops.mm(a, b), ops.softmax(a, 1), ops.log_softmax(a, 0), ops.mean(a, [1])]
        overridden = [torch.mm(a, b), a.softmax(1), a.log_softmax(0), a.mean(1)]
    for x, y, z in zip(outside, inside, overridden, strict=True):
        assert same_bits(x, y)
        assert same_bits(x, z)


ERRORS = {
    "a is": lambda: ops.mm(random(2, 3), random(2, 3)),
    "one dtype": lambda: ops.mm(random(2, 3), random(3, 2).double()),
    "floating-point": lambda: ops.mm(torch.arange(6).view(2, 3), torch.arange(6).view(3, 2)),
    "dtype is": lambda: ops.mm(random(2, 3), random(3, 2), dtype=torch.float16),
    "c is": lambda: ops.addmm(random(3), random(2, 3), random(3, 2)),
    "dim is": lambda: ops.mean(random(2, 3), [0, 0]),
    "x is": lambda: ops.mean(torch.arange(3)),
    "Dimension out of range: dim is 2": lambda: ops.softmax(random(2, 3), 2),
    "Dimension out of range: dim is -2": lambda: ops.log_softmax(random(3), -2),
    "at least 1 dimension": lambda: ops.matmul(torch.tensor(1.0), random(3)),
    r"normalized_shape is \(4,\), x has shape \(2, 3\)": lambda: ops.rms_norm(random(2, 3), [4]),
    r"and weight has \(2,\)": lambda: ops.rms_norm(random(2, 3), [3], random(2)),
    "weight is torch.int64": lambda: ops.rms_norm(random(2, 3), [3], torch.arange(3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        ERRORS[message]()
