"""Gradients in the mode: correct to the second order; dX does not depend on the batch, dW not on the schedule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numba
import pytest
import torch
import torch.nn.functional as F

import bikernels
from bikernels_torch import set_batch_invariant_mode

from .helpers import DTYPES, from_numpy, layouts, on_numpy, same_bits, to_numpy

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double precision")

DIFFERENTIABLE: dict[str, Callable[..., torch.Tensor]] = {
    "mm": lambda a, b, c: torch.mm(a[0], b[0]),
    "bmm": lambda a, b, c: torch.bmm(a, b),
    "mv": lambda a, b, c: torch.mv(a[0], b[0, :, 0]),
    "dot": lambda a, b, c: torch.dot(a[0, 0], b[0, :, 0]),
    "vdot": lambda a, b, c: torch.vdot(a[0, 0], b[0, :, 0]),
    "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0], alpha=0.3, beta=0.7),
    "addmm, a row": lambda a, b, c: torch.addmm(c[0, 0], a[0], b[0], beta=-1.5),
    "addmm, nothing added": lambda a, b, c: torch.addmm(c[0], a[0], b[0], beta=0),
    "addmm in place": lambda a, b, c: c[0].clone().addmm_(a[0], b[0], alpha=0.3),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, alpha=0.3, beta=0.7),
    "baddbmm in place": lambda a, b, c: c.clone().baddbmm_(a, b, beta=0.7),
    "addbmm": lambda a, b, c: torch.addbmm(c[0], a, b, alpha=0.3, beta=0.7),
    "addbmm in place": lambda a, b, c: c[0].clone().addbmm_(a, b),
    "addmv": lambda a, b, c: torch.addmv(c[0, :, 0], a[0], b[0, :, 0], alpha=0.3, beta=0.7),
    "addmv in place": lambda a, b, c: c[0, :, 0].clone().addmv_(a[0], b[0, :, 0]),
    "addr": lambda a, b, c: torch.addr(c[0], a[0, :, 0], b[0, 0], alpha=0.3, beta=0.7),
    "matmul": lambda a, b, c: a @ b[0],
    "matmul of vectors": lambda a, b, c: a[0, 0] @ b,
    "linear": lambda a, b, c: F.linear(a, b[0].mT, c[0, 0]),
    "linear, no bias": lambda a, b, c: F.linear(a, b[0].mT),
    "bilinear": lambda a, b, c: F.bilinear(a[0], c[0], torch.einsum("bij,bkl->kjl", a, c), c[0, 0, :3]),
    "einsum of two": lambda a, b, c: torch.einsum("bij,bjk->ki", a, b),
    "einsum of three": lambda a, b, c: torch.einsum("bij,bjk,bik->bk", a, b, c),
    "tensordot": lambda a, b, c: torch.tensordot(a, b, dims=([0, 2], [0, 1])),
    "inner": lambda a, b, c: torch.inner(a, b[0, :, 0]),
    "multi_dot": lambda a, b, c: torch.linalg.multi_dot([a[0], b[0], c[0].mT, a[1]]),
    "vecdot": lambda a, b, c: torch.linalg.vecdot(a @ b, c),
    "matrix_power": lambda a, b, c: torch.linalg.matrix_power(a @ b @ c.mT, 2),
    "softmax": lambda a, b, c: a.softmax(1) * a,
    "log_softmax": lambda a, b, c: a.log_softmax(-1) * a,
    "mean": lambda a, b, c: a.mean((0, 2)) * b.mean() + c.mean(0, keepdim=True).sum(),
    "sum": lambda a, b, c: a.sum((0, 2)) * b.sum() + c.sum(0, keepdim=True, dtype=torch.float64).mean(),
    "var": lambda a, b, c: a.var((0, 2)) * b.std(1, correction=0).sum() + torch.var_mean(c)[0],
    "logsumexp": lambda a, b, c: a.logsumexp((0, 2)) * a[0, 0, 0],
    "layer_norm": lambda a, b, c: F.layer_norm(a, (5,), b[0, :, 0], b[1, :, 0], eps=0.1),
    "layer_norm, two dimensions": lambda a, b, c: F.layer_norm(c, (3, 4), a[0, :, :4], eps=0.1),
    "rms_norm": lambda a, b, c: F.rms_norm(a, (5,), b[0, :, 0], eps=0.1),
    "rms_norm, two dimensions": lambda a, b, c: F.rms_norm(c, (3, 4), a[0, :, :4]),
    "rms_norm, no weight": lambda a, b, c: F.rms_norm(c, (4,)),
    "attention": lambda a, b, c: F.scaled_dot_product_attention(a, b.mT, c[:, :1].expand(2, 4, 4)),
    "attention, causal, scaled": lambda a, b, c: F.scaled_dot_product_attention(a, a, a, is_causal=True, scale=0.3),
    "attention, grouped": lambda a, b, c: F.scaled_dot_product_attention(a[None], *[a[None, :1]] * 2, enable_gqa=True),
    "attention, bias": lambda a, b, c: F.scaled_dot_product_attention(a, b.mT, b.mT, c),
    "attention, mask": lambda a, b, c: F.scaled_dot_product_attention(a, b.mT, b.mT, c > -0.5),
    "add": lambda a, b, c: torch.add(a @ b, c, alpha=0.3),
    "sub": lambda a, b, c: torch.sub(c, 2.5, alpha=0.3) * torch.rsub(c, 1.5, alpha=3),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, device: str) -> None:
    """First and second derivatives, in float64, against differences."""
    shapes = (2, 3, 5), (2, 5, 4), (2, 3, 4)
    operands = tuple(torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes)
    with set_batch_invariant_mode():
        assert torch.autograd.gradcheck(DIFFERENTIABLE[name], operands)
        assert torch.autograd.gradgradcheck(DIFFERENTIABLE[name], operands)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_transforms_of_norms(name: str, device: str) -> None:
    """torch.func and forward-mode derivatives."""
    x, weight = (torch.randn(*s, dtype=torch.float64, device=device) for s in ((4, 8), (8,)))

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (getattr(F, name)(x, (8,), weight) * torch.arange(8, device=device)).sum()

    def results() -> list[torch.Tensor]:
        with torch.autograd.forward_ad.dual_level():
            dual = loss(torch.autograd.forward_ad.make_dual(x, weight.expand(4, 8)), weight)
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        return [
            torch.func.grad(loss)(x, weight),
            torch.func.vmap(torch.func.grad(loss), (0, None))(x, weight),
            torch.func.vmap(loss, (0, None))(x, weight),
            torch.func.hessian(loss)(x, weight),
            tangent,
        ]

    standard = results()
    with set_batch_invariant_mode():
        actual = results()
        x.requires_grad_()
        (eager,) = torch.autograd.grad(loss(x, weight), x)
    assert torch.allclose(eager, actual[0])
    for one, other in zip(actual, standard, strict=True):
        assert torch.allclose(one, other)


def test_cdist(device: str) -> None:
    x, y = (torch.randn(n, 3, dtype=torch.float64, device=device, requires_grad=True) for n in (27, 4))
    with set_batch_invariant_mode():
        assert torch.autograd.gradcheck(torch.cdist, (x, y), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype: torch.dtype, device: str) -> None:
    """Each group's gradients have the bytes of its own product's."""
    rows, batch = torch.randn(40, 64, device=device).to(dtype), torch.randn(3, 64, 48, device=device).to(dtype)
    ends = [16, 24, 40]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    seed = torch.randn(40, 48, device=device).to(dtype)

    def gradients(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        a, b = rows.clone().requires_grad_(), batch.clone().requires_grad_()
        return torch.autograd.grad(call(a, b), (a, b), seed)

    def each(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a[start:end] @ b[i] for i, (start, end) in enumerate(itertools.pairwise([0, *ends]))])

    with set_batch_invariant_mode():
        for one, other in zip(
            gradients(lambda a, b: torch._grouped_mm(a, b, offs=offsets)), gradients(each), strict=True
        ):
            assert same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "softmax", "log_softmax"])
def test_gradients_are_the_core_s(name: str, dtype: torch.dtype, device: str) -> None:
    """Of a norm those of weight and bias too: the batch by the sum tree, so rows of zeros at its end change nothing."""
    x, seed = (torch.randn(300, 37).to(device, dtype) for _ in range(2))
    weight, bias = (torch.randn(37).to(device, dtype) for _ in range(2))
    parameters = {"layer_norm": (weight, bias), "rms_norm": (weight,)}.get(name, ())

    def gradients(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [one.clone().requires_grad_() for one in (x, *parameters)]
        call = functools.partial(getattr(F, name), leaves[0])
        y = call((37,), *leaves[1:]) if parameters else call(-1)
        return torch.autograd.grad(y, leaves, seed)

    with set_batch_invariant_mode():
        actual = gradients(x, seed)
        zeros = torch.zeros(70, 37).to(device, dtype)
        padded = gradients(torch.cat([x, torch.randn_like(zeros)]), torch.cat([seed, zeros]))
        y = getattr(F, name)(x, -1) if not parameters else None
    assert same_bits(padded[0][:300], actual[0])
    for one, other in zip(padded[1:], actual[1:], strict=True):
        assert same_bits(one, other)
    if y is not None:
        expected = [on_numpy(getattr(bikernels, f"{name}_backward"), seed, y)]
    else:
        operands = [to_numpy(one) for one in (x, *parameters)]
        statistics = [from_numpy(one) for one in getattr(bikernels, f"{name}_with_statistics")(*operands)[1:]]
        expected = [
            on_numpy(getattr(bikernels, f"{name}_backward"), seed, x, *statistics, weight),
            on_numpy(getattr(bikernels, f"{name}_weight_backward"), seed, x, *statistics),
            on_numpy(bikernels.sum, seed, axis=0),
        ]
    for one, wanted in zip(actual, expected, strict=False):
        assert same_bits(one, wanted)


# ----------------------------------------------------------------------------------------------------- dX, row by row

ROWS: dict[str, Callable[[torch.Tensor, Callable[..., torch.Tensor]], torch.Tensor]] = {
    "mm": lambda x, w: x[:, 0] @ w(37, 9),
    "matmul": lambda x, w: x @ w(37, 9),
    "bmm": lambda x, w: x @ x.mT,
    "mv": lambda x, w: x[:, 0] @ w(37),
    "addmm": lambda x, w: torch.addmm(w(9), x[:, 0], w(37, 9), beta=0.7, alpha=0.3),
    "baddbmm": lambda x, w: torch.baddbmm(w(5, 5), x, x.mT, beta=0.7, alpha=0.3),
    "linear": lambda x, w: F.linear(x, w(9, 37), w(9)),
    "bilinear": lambda x, w: F.bilinear(x, x, w(3, 37, 37), w(3)),
    "einsum": lambda x, w: torch.einsum("bik,nk,nm->bim", x, w(9, 37), w(9, 4)),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x[:, 0], w(37, 9), w(9, 30), w(30, 2)]),
    "vecdot": lambda x, w: torch.linalg.vecdot(x, w(37)),
    "softmax": lambda x, w: x.softmax(1),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "mean": lambda x, w: x.mean((1, 2)),
    "sum": lambda x, w: x.sum((1, 2)),
    "var": lambda x, w: x.var((1, 2)),
    "logsumexp": lambda x, w: x.logsumexp(1),
    "layer_norm": lambda x, w: F.layer_norm(x, (37,), w(37), w(37)),
    "rms_norm": lambda x, w: F.rms_norm(x, (37,), w(37)),
    "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "add": lambda x, w: torch.add(x, w(37), alpha=0.3),
}
SIZES = (2, 7, 8, 9, 63, 64, 65)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_gradient_of_a_row(name: str, dtype: torch.dtype, device: str) -> None:
    """dX of a row, given dY of that row, whatever rows are beside it."""
    weights: dict[tuple[int, ...], torch.Tensor] = {}

    def weight(*shape: int) -> torch.Tensor:
        if shape not in weights:
            weights[shape] = torch.randn(shape).to(device, dtype)
        return weights[shape]

    def gradient(x: torch.Tensor, seed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = x.clone().requires_grad_()
        y = ROWS[name](x, weight)
        return torch.autograd.grad(y, x, seed(y))[0]

    row = torch.randn(5, 37).to(device, dtype)
    own: list[torch.Tensor] = []

    def first(y: torch.Tensor) -> torch.Tensor:
        own.append(torch.randn(y.shape[1:]).to(device, dtype))
        return own[0][None]

    with set_batch_invariant_mode():
        alone = gradient(row[None], first)[0]
        for size in SIZES:
            for position in {0, size // 2, size - 1}:
                batch = torch.randn(size, 5, 37).to(device, dtype)
                batch[position] = row
                batch[position - 1, 0] = float("nan")

                def seed(y: torch.Tensor, position: int = position) -> torch.Tensor:
                    given = torch.randn(y.shape).to(device, dtype)
                    given[position] = own[0]
                    return given

                if position != (position - 1) % size:
                    assert same_bits(gradient(batch, seed)[position], alone), f"position {position} of {size}"


# -------------------------------------------------------------------------------- dW, a fold over the rows of the batch


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_weight(dtype: torch.dtype, device: str) -> None:
    """The core's product of x.T and dY, however many threads compute it and however x and dY lie in memory."""
    x, w = torch.randn(130, 67).to(device, dtype), torch.randn(37, 67).to(device, dtype)
    seed = torch.randn(130, 37).to(device, dtype)
    expected = on_numpy(bikernels.matmul, seed.T, x)
    threads = numba.get_num_threads(), torch.get_num_threads()
    try:
        for count in {1, *threads}:
            numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
            torch.set_num_threads(count)
            for (_, given), (_, upstream) in itertools.product(layouts(x), layouts(seed)):
                weight = w.clone().requires_grad_()
                with set_batch_invariant_mode():
                    F.linear(given, weight).backward(upstream)
                assert weight.grad is not None
                assert same_bits(weight.grad, expected)
    finally:
        numba.set_num_threads(threads[0])
        torch.set_num_threads(threads[1])


def test_gradient_of_a_weight_depends_on_the_batch() -> None:
    """It is a sum over the rows: what the docs do not promise does not hold, whatever the rows' shape it does."""
    x, w = torch.randn(64, 67), torch.randn(37, 67)

    def gradient(*parts: torch.Tensor) -> Any:
        weight = w.clone().requires_grad_()
        for part in parts:
            F.linear(part, weight).square().sum().backward()
        return weight.grad

    with set_batch_invariant_mode():
        assert not same_bits(gradient(x), gradient(*x.split(8)))
        assert same_bits(gradient(x), gradient(x.view(4, 16, 67)))
        assert same_bits(gradient(x), gradient(x.view(4, 1, 16, 67)))
