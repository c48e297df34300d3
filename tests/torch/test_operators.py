"""Each operator in the mode: the core's bytes, PyTorch's shapes, dtypes, strides and errors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bikernels
from bikernels_torch import set_batch_invariant_mode
from bikernels_torch.operators import norm

from .helpers import DTYPES, FLOATS, TOLERANCE, layouts, on_numpy, same_bits


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


def check(call: Callable[[], torch.Tensor], expected: torch.Tensor | None = None) -> torch.Tensor:
    """The result in the mode: the expected bytes, and close to standard PyTorch's with its shape, dtype and strides."""
    standard = call()
    with set_batch_invariant_mode():
        result = call()
    assert result.dtype is standard.dtype
    assert result.shape == standard.shape
    assert result.stride() == standard.stride()
    assert result.device == standard.device
    tolerance = TOLERANCE.get(result.dtype, 0)
    torch.testing.assert_close(result, standard, rtol=tolerance, atol=tolerance, equal_nan=True)
    if expected is not None:
        assert same_bits(result, expected)
    return result


# --------------------------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(dtype: torch.dtype, device: str) -> None:
    a, b = random(3, 5, 37, dtype=dtype, device=device), random(3, 37, 6, dtype=dtype, device=device)
    expected = on_numpy(bikernels.matmul, a, b)
    for (_, left), (_, right) in zip(layouts(a), [*layouts(b)][::-1], strict=True):
        check(lambda left=left, right=right: torch.bmm(left, right), expected)
        check(lambda left=left, right=right: left @ right, expected)
        check(lambda left=left, right=right: torch.einsum("bij,bjk->bik", left, right), expected)
        check(lambda left=left, right=right: torch.mm(left[1], right[1]), expected[1])
        check(lambda left=left, right=right: torch.mv(left[1], right[1, :, 2]), expected[1, :, 2])
        check(lambda left=left, right=right: left[1] @ right[1, :, 2], expected[1, :, 2])
        check(lambda left=left, right=right: left[1, 3] @ right[1], expected[1, 3])
        check(lambda left=left, right=right: torch.dot(left[1, 3], right[1, :, 2]), expected[1, 3, 2])
        check(lambda left=left, right=right: torch.vdot(left[1, 3], right[1, :, 2]), expected[1, 3, 2])
        check(lambda left=left, right=right: left @ right[1], on_numpy(bikernels.matmul, a, b[1]))
        check(lambda left=left, right=right: torch.inner(left[1], right[1].mT), expected[1])
        check(lambda left=left, right=right: torch.tensordot(left[1], right[1], dims=1), expected[1])
        check(lambda left=left: torch.mm(left[1], left[1].mT), on_numpy(bikernels.matmul, a[1], a[1].mT))


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.7, 1), (1, -2.5), (0.3, 0.7), (2, 0), (0, 1), (True, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_products(dtype: torch.dtype, alpha: float, beta: float, device: str) -> None:
    a, b = random(3, 5, 37, dtype=dtype, device=device), random(3, 37, 6, dtype=dtype, device=device)
    full, row, one = random(3, 5, 6, dtype=dtype, device=device), random(6, dtype=dtype, device=device), random(1)
    one = one.to(dtype).to(device)
    factors = {"alpha": alpha, "beta": beta}
    for c in (full, row, one, full[:, :, :1], full[:1]):
        check(lambda c=c: torch.baddbmm(c, a, b, **factors), on_numpy(bikernels.addmm, c, a, b, **factors))
    for c in (full[1], row, one, full[1, :, :1]):
        expected = on_numpy(bikernels.addmm, c, a[1], b[1], **factors)
        check(lambda c=c: torch.addmm(c, a[1], b[1], **factors), expected)
    for c in (full[1, :, 0], one):
        expected = on_numpy(bikernels.addmm, c, a[1], b[1, :, 0], **factors)
        check(lambda c=c: torch.addmv(c, a[1], b[1, :, 0], **factors), expected)
    joined = on_numpy(bikernels.addmm, row, a.transpose(0, 1).reshape(5, -1), b.reshape(-1, 6), **factors)
    check(lambda: torch.addbmm(row, a, b, **factors), joined)
    with set_batch_invariant_mode():
        before = torch.addmm(row, a[1], b[1], **factors)
        gelu = F.gelu(before, approximate="none" if device == "cpu" else "tanh")
        assert same_bits(torch._addmm_activation(row, a[1], b[1], **factors), before.relu())
        assert same_bits(torch._addmm_activation(row, a[1], b[1], use_gelu=True, **factors), gelu)


def test_beta_zero_does_not_read_the_addend(device: str) -> None:
    a, b = random(4, 8, device=device), random(8, 3, device=device)
    c = torch.full((4, 3), float("nan"), device=device)
    check(lambda: torch.addmm(c, a, b, beta=0), on_numpy(bikernels.matmul, a, b))


OUT_FORMS: dict[str, Callable[..., Any]] = {
    "mm": lambda c, a, b, **out: torch.mm(a[0], b[0], **out),
    "bmm": lambda c, a, b, **out: torch.bmm(a, b, **out),
    "mv": lambda c, a, b, **out: torch.mv(a[0], b[0, :, 0], **out),
    "dot": lambda c, a, b, **out: torch.dot(a[0, 0], b[0, :, 0], **out),
    "vdot": lambda c, a, b, **out: torch.vdot(a[0, 0], b[0, :, 0], **out),
    "matmul": lambda c, a, b, **out: torch.matmul(a, b[0], **out),
    "addmm": lambda c, a, b, **out: torch.addmm(c[0], a[0], b[0], alpha=0.5, beta=2, **out),
    "baddbmm": lambda c, a, b, **out: torch.baddbmm(c, a, b, alpha=0.5, beta=2, **out),
    "addmv": lambda c, a, b, **out: torch.addmv(c[0, :, 0], a[0], b[0, :, 0], alpha=0.5, beta=2, **out),
    "addbmm": lambda c, a, b, **out: torch.addbmm(c[0], a, b, alpha=0.5, beta=2, **out),
    "_addmm_activation": lambda c, a, b, **out: torch._addmm_activation(c[0], a[0], b[0], **out),
    "linear": lambda c, a, b, **out: torch.ops.aten.linear(a, b[0].mT, c[0, 0], **out),
    "softmax": lambda c, a, b, **out: torch.softmax(a, 1, **out),
    "log_softmax": lambda c, a, b, **out: torch.log_softmax(a, 0, **out),
    "mean": lambda c, a, b, **out: torch.mean(a, (0, 2), **out),
    "mean keepdim": lambda c, a, b, **out: torch.mean(a, -1, True, **out),
    "sum": lambda c, a, b, **out: torch.sum(a, (0, 2), **out),
    "var": lambda c, a, b, **out: torch.var(a, 1, **out),
    "std": lambda c, a, b, **out: torch.std(a, (0, 2), correction=0, keepdim=True, **out),
    "logsumexp": lambda c, a, b, **out: torch.logsumexp(a, (0, 2), **out),
    "_softmax_backward_data": lambda c, a, b, **out: torch.ops.aten._softmax_backward_data(
        a, a.softmax(1), 1, a.dtype, **({"grad_input": out["out"]} if out else {})
    ),
    "_log_softmax_backward_data": lambda c, a, b, **out: torch.ops.aten._log_softmax_backward_data(
        a, a.log_softmax(1), 1, a.dtype, **out
    ),
    "aten softmax": lambda c, a, b, **out: torch.ops.aten.softmax(a, 1, a.dtype, **out),
    "aten mean": lambda c, a, b, **out: torch.ops.aten.mean(a, dtype=a.dtype, **out),
    "aten sum": lambda c, a, b, **out: torch.ops.aten.sum(a, dtype=a.dtype, **out),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OUT_FORMS)
def test_out(name: str, dtype: torch.dtype, device: str) -> None:
    """out= gives the functional form's bytes: exact, strided, empty, and of a wrong shape (resized with a warning)."""
    c, a, b = (random(*shape, dtype=dtype, device=device) for shape in ((2, 5, 7), (2, 5, 33), (2, 33, 7)))
    call = OUT_FORMS[name]
    with set_batch_invariant_mode():
        expected = call(c, a, b)
        for out in (
            torch.empty_like(expected),
            torch.full((*expected.shape, 3), float("nan"), dtype=dtype, device=device)[..., 1],
            torch.empty(expected.shape[::-1], dtype=dtype, device=device).permute(tuple(range(expected.dim())[::-1])),
            torch.empty(0, dtype=dtype, device=device),
        ):
            if name == "matmul" and out.dim() == 3 and not out.mT.is_contiguous() and out.stride(0) < out.stride(2):
                continue  # PyTorch itself refuses
            assert call(c, a, b, out=out) is out
            assert same_bits(out, expected)
        out = torch.empty(3, dtype=dtype, device=device)
        # Through torch.ops the warning goes to stderr.
        warns = not name.startswith(("linear", "_softmax", "_log_softmax", "aten"))
        with pytest.warns(UserWarning, match="was resized") if warns else contextlib.nullcontext():
            call(c, a, b, out=out)
        assert same_bits(out, expected)


@pytest.mark.parametrize("name", ["var_mean", "std_mean"])
def test_out_of_two_results(name: str, device: str) -> None:
    x = random(5, 7, 33, device=device)
    function = getattr(torch.ops.aten, name).correction
    with set_batch_invariant_mode():
        expected = function(x, [0, 2], correction=1)
        outs = [torch.empty(7, 3, device=device)[:, 1] for _ in expected]
        getattr(torch.ops.aten, name).correction_out(x, [0, 2], correction=1, out0=outs[0], out1=outs[1])
    for out, one in zip(outs, expected, strict=True):
        assert same_bits(out, one)


@pytest.mark.parametrize("name", OUT_FORMS)
def test_out_of_the_wrong_dtype(name: str) -> None:
    """The same as in standard PyTorch: an error, or (mean without dtype=) a result of that dtype."""
    c, a, b = random(2, 5, 7), random(2, 5, 33), random(2, 33, 7)

    def attempt() -> str:
        try:
            return str(OUT_FORMS[name](c, a, b, out=torch.empty(0, dtype=torch.float64)).dtype)
        except RuntimeError as error:
            return str(error)

    standard = attempt()
    with set_batch_invariant_mode():
        assert attempt() == standard


def test_in_place(device: str) -> None:
    a, b = random(3, 5, 37, device=device), random(3, 37, 6, device=device)
    c = random(3, 5, 6, device=device)
    for _, given in layouts(c):
        check(lambda given=given: given.clone().baddbmm_(a, b, beta=2, alpha=0.5))
        with set_batch_invariant_mode():
            target = given.clone(memory_format=torch.preserve_format)
            expected = torch.baddbmm(c, a, b, beta=2, alpha=0.5)
            assert target.baddbmm_(a, b, beta=2, alpha=0.5) is target
            assert same_bits(target, expected)
            target = given.clone()
            target[1].addmm_(a[1], b[1], beta=2, alpha=0.5)
            assert same_bits(target[1], expected[1])
            assert same_bits(target[0], given[0])
            target = given[1].clone()
            assert same_bits(target.addbmm_(a, b), torch.addbmm(given[1], a, b))
            target = given[1, :, 0].clone()
            assert same_bits(target.addmv_(a[1], b[1, :, 0]), torch.addmv(given[1, :, 0], a[1], b[1, :, 0]))


def test_in_place_with_itself_as_an_operand(device: str) -> None:
    x = random(6, 6, device=device)
    with set_batch_invariant_mode():
        expected = torch.addmm(x, x, x)
        assert same_bits(x.clone().addmm_(x, x), expected)
        assert same_bits((y := x.clone()).addmm_(y, y), expected)
        assert same_bits(torch.mm(y := x.clone(), x, out=y), torch.mm(x, x))
        assert same_bits(torch.softmax(y := x.clone(), 0, out=y), x.softmax(0))
        wide = torch.zeros(6, 9, device=device)
        wide[:, :6] = x
        assert same_bits(torch.mm(wide[:, :6], x, out=wide[:, 3:]), torch.mm(x, x))


@pytest.mark.parametrize("shapes", [((0, 3), (3, 4)), ((2, 0), (0, 4)), ((2, 3), (3, 0)), ((0, 0), (0, 0))])
def test_empty_products(shapes: Any, device: str) -> None:
    a, b = (random(*shape, device=device) for shape in shapes)
    c = random(shapes[0][0], shapes[1][1], device=device)
    check(lambda: a @ b)
    check(lambda: torch.addmm(c, a, b, beta=0.5))
    check(lambda: torch.bmm(a[None], b[None]))
    check(lambda: torch.baddbmm(c[None], a[None], b[None]))
    check(lambda: torch.bmm(a[None][:0], b[None][:0]))
    check(lambda: F.linear(a, b.mT, torch.ones(b.shape[1], device=device)))


def test_expanded_and_odd_operands(device: str) -> None:
    a, b = random(1, 9, device=device).expand(4, 9), random(9, 1, device=device).expand(9, 5)
    check(lambda: a @ b)
    check(lambda: torch.bmm(a.expand(3, 4, 9), b.expand(3, 9, 5)))
    z = torch.complex(random(4, 9), random(4, 9)).to(device)
    assert z.conj().imag.is_neg()
    check(lambda: z.conj().imag @ b)
    overlapping = torch.as_strided(random(40, device=device), (5, 9), (3, 2))
    check(lambda: overlapping @ b)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (4, 37), (2, 4, 37), (2, 1, 4, 37), (0, 37), (2, 0, 37)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(shape: tuple[int, ...], bias: bool, dtype: torch.dtype, device: str) -> None:
    x, weight = random(*shape, dtype=dtype, device=device), random(6, 37, dtype=dtype, device=device)
    b = random(6, dtype=dtype, device=device) if bias else None
    expected = on_numpy(bikernels.addmm, b, x, weight.mT) if b is not None else on_numpy(bikernels.matmul, x, weight.mT)
    check(lambda: F.linear(x, weight, b), expected)
    if len(shape) == 3:
        y = x.transpose(0, 1)
        with set_batch_invariant_mode():
            assert same_bits(F.linear(y, weight, b).transpose(0, 1).contiguous(), F.linear(x, weight, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_several(dtype: torch.dtype, device: str) -> None:
    """From left to right, whichever order would be the cheapest: here the other one, or a vector first or last."""
    a, b, c, d = (random(*s, dtype=dtype, device=device) / 6 for s in ((40, 5), (5, 41), (41, 3), (3, 7)))
    ab = on_numpy(bikernels.matmul, a, b)
    abc = on_numpy(bikernels.matmul, ab, c)
    chains = [
        ([a, b], ab),
        ([a, b, c], abc),
        ([a, b, c, d], on_numpy(bikernels.matmul, abc, d)),
        ([a[1], b, c], abc[1]),
        ([a, b, c[:, 2]], on_numpy(bikernels.matmul, ab, c[:, 2])),
        ([a[1], b, c[:, 2]], on_numpy(bikernels.matmul, ab[1], c[:, 2])),
    ]
    for chain, expected in chains:
        check(lambda chain=chain: torch.linalg.multi_dot(chain), expected)
        check(lambda chain=chain: torch.linalg.multi_dot(chain, out=torch.empty_like(chain[0][:0])), expected)
    check(lambda: torch.ops.aten.chain_matmul([a, b, c]), abc)
    check(lambda: torch.ops.aten.chain_matmul.out([a, b, c], out=torch.empty_like(abc)), abc)
    check(lambda: torch.einsum("ij,jk,kl->il", a, b, c), abc)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vecdot(dtype: torch.dtype, device: str) -> None:
    x, y = random(3, 5, 37, dtype=dtype, device=device), random(3, 5, 37, dtype=dtype, device=device)
    expected = on_numpy(bikernels.matmul, x[:, :, None], y[..., None])[..., 0, 0]
    check(lambda: torch.linalg.vecdot(x, y), expected)
    check(lambda: torch.linalg.vecdot(x.mT, y.mT, dim=1), expected)
    check(lambda: torch.linalg.vecdot(x.mT, y.mT, dim=-2, out=torch.empty_like(expected)), expected)
    check(lambda: torch.linalg.vecdot(x[1, 2], y[1, 2]), expected[1, 2])
    check(lambda: torch.linalg.vecdot(x[1, 2], y), on_numpy(bikernels.matmul, y, x[1, 2]))
    check(lambda: torch.linalg.vecdot(x[:, :1], y))
    check(lambda: torch.linalg.vecdot(x[:, :0], y[:, :0]))
    check(lambda: torch.linalg.vecdot(x[..., :0], y[..., :0]))


@pytest.mark.skipif(not hasattr(torch, "_foreach_mm"), reason="no _foreach_mm in this PyTorch")
def test_foreach(device: str) -> None:
    a, b = [random(3, k, device=device) for k in (5, 700)], [random(k, 4, device=device) for k in (5, 700)]
    with set_batch_invariant_mode():
        for result, left, right in zip(torch._foreach_mm(a, b), a, b, strict=True):
            assert same_bits(result, on_numpy(bikernels.matmul, left, right))


def test_grouped(device: str) -> None:
    """Groups of rows, of columns, of K, and one product for each matrix."""
    rows, batch = random(40, 64, dtype=torch.bfloat16, device=device), random(3, 64, 48, dtype=torch.bfloat16)
    batch = batch.to(device).mT.contiguous().mT
    ends = [16, 16, 40]
    offsets, spans = torch.tensor(ends, dtype=torch.int32, device=device), [slice(0, 16), slice(16, 16), slice(16, 40)]
    with set_batch_invariant_mode():
        result = torch._grouped_mm(rows, batch, offs=offsets)
        for own, b in zip(spans, batch, strict=True):
            assert same_bits(result[own], rows[own] @ b)
        result = torch._grouped_mm(batch.mT, rows.T, offs=offsets)
        for own, b in zip(spans, batch, strict=True):
            assert same_bits(result[:, own], b.T @ rows.T[:, own])
        result = torch._grouped_mm(rows.T, rows, offs=offsets)
        for own, matrix in zip(spans, result, strict=True):
            assert same_bits(matrix, rows.T[:, own] @ rows[own])
        assert same_bits(torch._grouped_mm(batch.mT, batch), torch.bmm(batch.mT, batch))


def test_cdist(device: str) -> None:
    """From differences whatever the number of rows, unless the caller asks for products."""
    x, y = random(3, 30, 7, device=device), random(3, 40, 7, device=device)
    with set_batch_invariant_mode():
        apart = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        assert same_bits(torch.cdist(x, y), apart)
    check(lambda: torch.cdist(x, y, 1.0))
    torch.testing.assert_close(torch.cdist(x, y), apart, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- attention

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
    "boolean mask": {"attn_mask": lambda q: random(9, 11, device=q.device.type) > 0},
    "boolean mask of each head": {"attn_mask": lambda q: random(2, 4, 9, 11, device=q.device.type) > 0},
    "a row without keys": {"attn_mask": lambda q: torch.arange(9, device=q.device)[:, None].expand(9, 11) > 3},
    "bias": {"attn_mask": lambda q: random(2, 1, 9, 11, device=q.device.type).to(q.dtype)},
    "float32 bias": {"attn_mask": lambda q: random(9, 11, dtype=q.dtype, device=q.device.type).float()},
    "causal, grouped, scaled": {"is_causal": True, "enable_gqa": True, "scale": 2.0},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ATTENTION)
def test_attention(form: str, dtype: torch.dtype, device: str) -> None:
    """Close to PyTorch's; the same bytes whichever kernel is asked for, and for a 3-dimensional head."""
    if form == "float32 bias" and dtype is torch.float64:
        pytest.skip("PyTorch does not take that")
    options = dict(ATTENTION[form])
    heads = 2 if options.get("enable_gqa") else 4
    q = random(2, 4, 9, 16, dtype=dtype, device=device)
    k, v = random(2, heads, 11, 16, dtype=dtype, device=device), random(2, heads, 11, 5, dtype=dtype, device=device)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"](q)

    def attend(backend: Any) -> torch.Tensor:
        torch.manual_seed(3)  # of the dropout
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    math, flash = torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION
    standard = attend(math)
    with set_batch_invariant_mode():
        result = attend(math)
        assert same_bits(attend(flash), result)
        assert same_bits(attend([math, flash]), result)
        if form in ("plain", "causal", "scaled"):
            part = F.scaled_dot_product_attention(q[1, 2:3], k[1, 2:3], v[1, 2:3], **options)
            assert same_bits(part, result[1, 2:3])
    tolerance = TOLERANCE[dtype]
    assert result.dtype is standard.dtype
    torch.testing.assert_close(result, standard, rtol=tolerance, atol=tolerance, equal_nan=True)


# --------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name: str, dtype: torch.dtype, device: str) -> None:
    x = random(3, 7, 300, dtype=dtype, device=device) * 4
    for dim in (0, 1, 2, -1, -3):
        expected = on_numpy(getattr(bikernels, name), x, axis=dim)
        for _, given in layouts(x):
            check(lambda given=given, dim=dim: getattr(torch, name)(given, dim), expected)
    for other in (torch.float32, torch.float64):
        expected = on_numpy(getattr(bikernels, name), x, axis=1, dtype=FLOATS[other])
        check(lambda other=other: getattr(torch, name)(x, 1, dtype=other), expected)
    check(lambda: getattr(torch, name)(torch.tensor(2.5, dtype=dtype, device=device), 0))
    check(lambda: getattr(torch, name)(torch.tensor(2.5, dtype=dtype, device=device), -1))
    check(lambda: getattr(torch, name)(x[:0], 1))
    check(lambda: getattr(torch, name)(x[:, :0], 1))


def test_softmax_of_integers(device: str) -> None:
    check(lambda: torch.softmax(torch.arange(5, device=device), 0, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), (-1, 0), (2, 1, 0), [], None])
@pytest.mark.parametrize("keepdim", [True, False])
def test_mean(dim: Any, keepdim: bool, dtype: torch.dtype, device: str) -> None:
    x = random(3, 7, 300, dtype=dtype, device=device)
    axis = tuple(dim) if isinstance(dim, tuple | list) and dim else None if dim in ([], None) else dim
    for _, given in layouts(x):
        expected = on_numpy(bikernels.mean, given, axis=axis, keepdims=keepdim)
        check(lambda given=given: torch.mean(given, dim, keepdim), expected)
    other = torch.float64 if dtype is torch.float32 else torch.float32
    expected = on_numpy(bikernels.mean, x, axis=axis, keepdims=keepdim, dtype=FLOATS[other])
    check(lambda: torch.mean(x, dim, keepdim, dtype=other), expected)


REDUCTIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., Any], dict[str, Any]]] = {
    "sum": (torch.sum, bikernels.sum, {}),
    "var": (torch.var, bikernels.var, {"correction": 1}),
    "var without correction": (functools.partial(torch.var, correction=0), bikernels.var, {}),
    "std": (torch.std, bikernels.std, {"correction": 1}),
    "biased std": (functools.partial(torch.std, unbiased=False), bikernels.std, {}),
    "logsumexp": (torch.logsumexp, bikernels.logsumexp, {}),
    "var of var_mean": (lambda *x, **o: torch.var_mean(*x, **o)[0], bikernels.var, {"correction": 1}),
    "mean of std_mean": (lambda *x, **o: torch.std_mean(*x, **o)[1], bikernels.mean, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, -1, (0, 1), (-1, 0), (2, 1, 0)])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str, dim: Any, dtype: torch.dtype, device: str) -> None:
    function, core, options = REDUCTIONS[name]
    x = random(3, 7, 300, dtype=dtype, device=device)
    for _, given in layouts(x):
        for keepdim in (True, False):
            expected = on_numpy(core, given, axis=dim, keepdims=keepdim, **options)
            check(lambda given=given, keepdim=keepdim: function(given, dim, keepdim=keepdim), expected)


def test_odd_reductions(device: str) -> None:
    x, one = random(3, 7, device=device), torch.tensor(3.5, device=device)
    check(lambda: x.sum(), on_numpy(bikernels.sum, x))
    check(lambda: x.sum([]), on_numpy(bikernels.sum, x))
    check(lambda: x.sum(dtype=torch.float64), on_numpy(bikernels.sum, x, dtype="float64"))
    check(lambda: x.sum(0, dtype=torch.bfloat16), on_numpy(bikernels.sum, x, axis=0, dtype="bfloat16"))
    check(lambda: x.var(), on_numpy(bikernels.var, x, correction=1))
    check(lambda: x.std(correction=0.5), on_numpy(bikernels.std, x, correction=0.5))
    check(lambda: x.sum_to_size(1, 7), on_numpy(bikernels.sum, x, axis=0, keepdims=True))
    for function in (torch.sum, torch.logsumexp, functools.partial(torch.var, correction=0)):
        check(lambda function=function: function(one, 0))
        check(lambda function=function: function(one, -1, keepdim=True))
    check(lambda: x[:0].sum(1))
    check(lambda: x[:0].logsumexp(1))
    check(lambda: x[:0].sum(0))
    check(lambda: x[:0].logsumexp(0))
    check(lambda: x[:0].sum())
    infinite = torch.tensor([[-torch.inf] * 2, [torch.inf, 1], [torch.nan, torch.inf], [0, -torch.inf]], device=device)
    check(lambda: infinite.logsumexp(1))
    check(lambda: infinite.sum(1))
    check(lambda: infinite.var(1))
    check(lambda: torch.arange(7, device=device).sum(dtype=torch.float32))
    check(lambda: torch.sum(x, dim=0, out=torch.empty(7, dtype=torch.float64, device=device)))
    check(lambda: torch.zeros((2, 3, 4, 5), device=device).to(memory_format=torch.channels_last).sum((1, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("shape", [(300,), (7, 300), (3, 7, 300)])
def test_norms(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    function, core = getattr(F, name), getattr(bikernels, name)
    x = random(3, 7, 300, dtype=dtype, device=device)
    weight, bias = random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device)
    parameters = (weight, bias) if name == "layer_norm" else (weight,)
    options = {"axis": tuple(range(-len(shape), 0)), "eps": 1e-3}
    for _, given in layouts(x):
        expected = on_numpy(core, given, *parameters, **options)
        check(lambda given=given: function(given, shape, *parameters, eps=1e-3), expected)
        check(lambda given=given: function(given, shape, eps=1e-3), on_numpy(core, given, **options))
    options.pop("eps")
    check(lambda: function(x, shape), on_numpy(core, x, **options))
    empty = x[:0] if len(shape) < 3 else x[None, :0].reshape(0, *x.shape)
    check(lambda: function(empty, shape))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_of_a_tensor_made_of_others(name: str, device: str) -> None:
    """DTensor is one of these; each of the others is a shard."""
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    shards = random(3, 8, device=device), random(3, 8, device=device)
    with set_batch_invariant_mode():
        whole = getattr(F, name)(two_tensor.TwoTensor(*shards).requires_grad_(), (8,))
        for shard, one in zip((whole.a, whole.b), shards, strict=True):
            assert same_bits(shard, getattr(F, name)(one, (8,)))
        whole.sum().backward()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_parameters_wider_than_the_input(name: str) -> None:
    """As PyTorch takes them on a CPU."""
    x, weight = random(5, 33, dtype=torch.bfloat16), random(33)
    with pytest.warns(UserWarning, match="Mismatch dtype") if name == "rms_norm" else contextlib.nullcontext():
        standard = getattr(F, name)(x, (33,), weight)
    with set_batch_invariant_mode():
        result = getattr(F, name)(x, (33,), weight)
    assert same_bits(result, on_numpy(getattr(bikernels, name), x, weight))
    torch.testing.assert_close(result, standard)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_layer_norm(dtype: torch.dtype, device: str) -> None:
    """By name: forward, backward with each mask, out."""
    x, grad = random(5, 7, 33, dtype=dtype, device=device), random(5, 7, 33, dtype=dtype, device=device)
    weight, bias = random(33, dtype=dtype, device=device), random(33, dtype=dtype, device=device)
    arguments = (x, [33], weight, bias, 1e-5)
    with set_batch_invariant_mode():
        y, mean, rstd = torch.ops.aten.native_layer_norm(*arguments)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        assert mean.dtype is rstd.dtype is wide
        assert same_bits(mean, x.to(wide).mean(-1, keepdim=True))
        gradients = torch.ops.aten.native_layer_norm_backward(grad, x, [33], mean, rstd, weight, bias, [True] * 3)
        outs = [torch.empty(0, dtype=dtype, device=device) for _ in range(3)]
        torch.ops.aten.native_layer_norm.out(*arguments, out0=outs[0], out1=outs[1], out2=outs[2])
        assert same_bits(outs[0], y)
        assert same_bits(outs[1], mean.to(dtype))
        outs = [torch.empty_like(one) for one in gradients]
        torch.ops.aten.native_layer_norm_backward.out(
            grad, x, [33], mean, rstd, weight, bias, [True] * 3, out0=outs[0], out1=outs[1], out2=outs[2]
        )
        assert all(map(same_bits, outs, gradients))
        for mask in ([True, False, False], [False, True, False], [False, False, True]):
            some = torch.ops.aten.native_layer_norm_backward(grad, x, [33], mean, rstd, weight, bias, mask)
            for one, whole, wanted in zip(some, gradients, mask, strict=True):
                assert same_bits(one, whole) if wanted else one is None
    expected = (
        on_numpy(bikernels.layer_norm_backward, grad, x, mean, rstd, weight),
        on_numpy(bikernels.layer_norm_weight_backward, grad, x, mean, rstd),
        on_numpy(bikernels.sum, grad, axis=(0, 1)),
    )
    for one, wanted in zip(gradients, expected, strict=True):
        assert same_bits(one, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_rms_norm(dtype: torch.dtype, device: str) -> None:
    """What runs on a GPU, where _fused_rms_norm is called by name, is the core on either device."""

    def no_other(*arguments: Any) -> Any:
        raise AssertionError

    x, grad = random(5, 7, 33, dtype=dtype, device=device), random(5, 7, 33, dtype=dtype, device=device)
    weight = random(33, dtype=dtype, device=device)
    y, rstd = norm.fused_rms_norm(no_other, x, [33], weight, None)
    assert same_bits(y, on_numpy(bikernels.rms_norm, x, weight))
    dx, dweight = norm.fused_rms_norm_backward(no_other, grad, x, [33], rstd, weight, [True, True])
    assert same_bits(dx, on_numpy(bikernels.rms_norm_backward, grad, x, rstd, weight))
    assert same_bits(dweight, on_numpy(bikernels.rms_norm_weight_backward, grad, x, rstd))
    assert norm.fused_rms_norm_backward(no_other, grad, x, [33], rstd, None, [True, False])[1] is None
    with set_batch_invariant_mode():
        assert same_bits(F.rms_norm(x, (33,), weight), y)


def test_odd_means(device: str) -> None:
    x = random(3, 7, device=device)
    check(lambda: x.mean(), on_numpy(bikernels.mean, x))
    check(lambda: x.mean(dtype=torch.float64), on_numpy(bikernels.mean, x, dtype="float64"))
    check(lambda: torch.tensor(3.5, device=device).mean(0))
    check(lambda: torch.tensor(3.5, device=device).mean([-1], keepdim=True))
    check(lambda: x[:0].mean())
    check(lambda: x[:0].mean(0))
    check(lambda: x[:0].mean(1))
    check(lambda: torch.arange(7, device=device).mean(dtype=torch.float32))
    check(lambda: (x > 0).mean(0, dtype=torch.float32))
    check(lambda: torch.mean(x, dim=0, dtype=None, out=torch.empty(7, dtype=torch.float64, device=device)))
    check(lambda: torch.zeros((2, 3, 4, 5), device=device).to(memory_format=torch.channels_last).mean((1, 2)))


# ------------------------------------------------------------------------------------------------- what is PyTorch's


PASSED_THROUGH: dict[str, Callable[[], Any]] = {
    "integer mm": lambda: torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2),
    "integer addmm": lambda: torch.addmm(torch.ones(2, 2, dtype=torch.int64), *[torch.ones(2, 2).long()] * 2, alpha=3),
    "integer dot": lambda: torch.dot(torch.arange(4), torch.arange(4)),
    "integer bmm out": lambda: torch.bmm(*[torch.ones(3, 2, 2).int()] * 2, out=torch.empty(3, 2, 2).int()),
    "integer addmv": lambda: torch.addmv(torch.ones(2).int(), torch.ones(2, 3).int(), torch.ones(3).int()),
    "integer multi_dot": lambda: torch.linalg.multi_dot([torch.ones(2, 2).int()] * 3),
    "integer _int_mm": lambda: torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8)] * 2),
    "integer sub": lambda: torch.sub(torch.arange(5), 2, alpha=3),
    "integer addbmm": lambda: torch.addbmm(torch.ones(2, 2).int(), *[torch.ones(3, 2, 2).int()] * 2),
    "complex mm": lambda: torch.ones(2, 3, dtype=torch.complex64) @ torch.full((3, 2), 1j),
    "complex vdot": lambda: torch.vdot(torch.full((3,), 1j), torch.full((3,), 1j)),
    "complex addmm": lambda: torch.addmm(torch.ones(2).cfloat(), *[torch.full((2, 2), 1j)] * 2, alpha=2j),
    "complex bmm": lambda: torch.bmm(*[torch.full((3, 2, 2), 1j)] * 2),
    "complex linear": lambda: F.linear(*[torch.full((2, 2), 1j)] * 2, torch.full((2,), 1j)),
    "complex einsum": lambda: torch.einsum("ij,jk,kl->il", *[torch.full((2, 2), 1j)] * 3),
    "complex multi_dot": lambda: torch.linalg.multi_dot([torch.full((2, 2), 1j)] * 3),
    "complex vecdot": lambda: torch.linalg.vecdot(*[torch.full((3, 2), 1j)] * 2),
    "complex mean": lambda: torch.full((3, 2), 1j).mean(0),
    "complex sum": lambda: torch.full((3, 2), 1j).sum(0),
    "complex var": lambda: torch.full((3, 2), 1j).var(0),
    "complex rms_norm": lambda: F.rms_norm(torch.full((3, 2), 1j), (2,)),
    "integer sum": lambda: torch.arange(5).sum(),
    "bool sum": lambda: (torch.arange(5) > 2).sum(0),
    "sum as integers": lambda: torch.ones(3).sum(dtype=torch.int32),
    "integer logsumexp": lambda: torch.arange(3).logsumexp(0),
    "sparse sum": lambda: torch.eye(3).to_sparse().sum(),
    "meta layer_norm": lambda: F.layer_norm(torch.empty(2, 3, device="meta"), (3,)).shape,
    "meta rms_norm": lambda: F.rms_norm(torch.empty(2, 3, device="meta"), (3,)).shape,
    "nested layer_norm": lambda: F.layer_norm(
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), (3,), torch.ones(3), torch.ones(3)
    ).unbind()[0],
    "complex sigmoid": lambda: torch.full((3, 2), 1j).sigmoid(),
    "sparse mm": lambda: torch.sparse.mm(torch.eye(3).to_sparse(), torch.ones(3, 2)),
    "sparse addmm": lambda: torch.addmm(torch.ones(3, 2), torch.eye(3).to_sparse(), torch.ones(3, 2), alpha=0.5),
    "sparse linear": lambda: F.linear(torch.eye(3).to_sparse(), torch.ones(2, 3)),
    "sparse add": lambda: torch.add(torch.ones(3, 3), torch.eye(3).to_sparse(), alpha=0.5),
    "compressed mm": lambda: torch.eye(3).to_sparse_csr() @ torch.ones(3, 2),
    "compressed mv": lambda: torch.eye(3).to_sparse_csr() @ torch.ones(3),
    "float8 mm": lambda: (torch.ones(2, 3).to(torch.float8_e4m3fn) @ torch.ones(3, 2).to(torch.float8_e4m3fn)).float(),
    "float8 _scaled_mm": lambda: torch._scaled_mm(
        torch.ones(16, 32).to(torch.float8_e4m3fn),
        torch.ones(16, 32).to(torch.float8_e4m3fn).T,
        torch.tensor(0.5),
        torch.tensor(2.0),
        out_dtype=torch.float32,
    ),
    "quantized relu": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).relu().dequantize(),
    "quantized sigmoid": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).sigmoid().dequantize(),
    "zero tensor mm": lambda: torch._efficientzerotensor(2, 3) @ torch.ones(3, 2),
    "sparse softmax": lambda: torch.sparse.softmax(torch.eye(3).to_sparse(), 1).to_dense(),
    "meta mm": lambda: (torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")).shape,
    "meta linear": lambda: F.linear(*[torch.empty(2, 2, device="meta")] * 2, torch.empty(2, device="meta")).shape,
    "meta multi_dot": lambda: torch.linalg.multi_dot([torch.empty(2, 2, device="meta")] * 3).shape,
    "meta vecdot": lambda: torch.linalg.vecdot(*[torch.empty(3, 2, device="meta")] * 2).shape,
    "meta attention": lambda: F.scaled_dot_product_attention(*[torch.empty(1, 2, 4, device="meta")] * 3).shape,
    "meta LSTM": lambda: torch.nn.LSTM(3, 2, device="meta")(torch.empty(4, 1, 3, device="meta"))[0].shape,
    "meta add": lambda: torch.add(torch.empty(2, device="meta"), 1.5, alpha=2).shape,
    "meta softmax": lambda: torch.empty(2, 3, device="meta").softmax(0).shape,
    "integer pow": lambda: torch.pow(torch.arange(5), 2),
    "integer add": lambda: torch.add(torch.arange(5), torch.arange(5), alpha=3),
    "bool add": lambda: torch.add(torch.arange(5), torch.arange(5) > 2, alpha=3),
    "nested linear": lambda: F.linear(
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), torch.ones(2, 3), torch.ones(2)
    ).unbind()[0],
    "nested bmm": lambda: torch.bmm(
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), torch.ones(2, 3, 2)
    ).unbind()[0],
    "nested softmax": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).softmax(-1).unbind()[0],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_passed_through(name: str) -> None:
    standard = PASSED_THROUGH[name]()
    with set_batch_invariant_mode():
        result = PASSED_THROUGH[name]()
    assert torch.equal(result, standard) if isinstance(standard, torch.Tensor) else result == standard


class Logged(torch.Tensor):
    """A wrapper that notes each operator and lets the tensor within compute it."""

    inner: torch.Tensor
    seen: list[str]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Logged:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(operator))
        unwrap = functools.partial(torch.utils._pytree.tree_map_only, cls, lambda x: x.inner)
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, operator(*unwrap(args), **unwrap(kwargs or {})))


def test_subclasses(device: str) -> None:
    """They see PyTorch's operators, and what they hand on of plain tensors is computed as in the mode."""
    a, b = random(5, 700, device=device), random(700, 6, device=device)
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "aten.mm.default": lambda a, b: a @ b,
        "aten.addmm.default": lambda a, b: F.linear(a, b.T, b[0]),
        "aten._softmax.default": lambda a, b: a.softmax(1),
        "aten.mean.dim": lambda a, b: a.mean(1),
        "aten.add.Tensor": lambda a, b: torch.add(a, a, alpha=0.3),
        "aten.sigmoid.default": lambda a, b: a.sigmoid(),
    }
    with set_batch_invariant_mode():
        for name, call in calls.items():
            Logged.seen = []
            result = call(Logged(a), Logged(b))
            assert isinstance(result, Logged)
            assert name in Logged.seen
            assert same_bits(result.inner, call(a, b))


ERRORS: dict[str, Callable[[], Any]] = {
    "mm shapes": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "mm rank": lambda: torch.mm(torch.ones(2, 3), torch.ones(3)),
    "mm dtypes": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2).double()),
    "mm out dtype": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2), out=torch.empty(2, 2).double()),
    "mm out overlap": lambda: torch.mm(torch.ones(2, 3), torch.ones(3, 2), out=torch.empty(1).expand(2, 2)),
    "bmm batches": lambda: torch.bmm(torch.ones(2, 2, 3), torch.ones(3, 3, 2)),
    "matmul scalar": lambda: torch.ones(()) @ torch.ones(3),
    "addmm addend": lambda: torch.addmm(torch.ones(3), torch.ones(2, 3), torch.ones(3, 2)),
    "addmm dtype": lambda: torch.addmm(torch.ones(2).double(), torch.ones(2, 3), torch.ones(3, 2)),
    "addmm complex": lambda: torch.addmm(torch.ones(2), torch.ones(2, 3), torch.ones(3, 2), alpha=1j),
    "addmm_ shape": lambda: torch.ones(1, 2).addmm_(torch.ones(2, 3), torch.ones(3, 2)),
    "addmm_ overlap": lambda: torch.ones(1).expand(2, 2).addmm_(torch.ones(2, 3), torch.ones(3, 2)),
    "addbmm addend": lambda: torch.addbmm(torch.ones(3), torch.ones(2, 2, 3), torch.ones(2, 3, 2)),
    "multi_dot shapes": lambda: torch.linalg.multi_dot([torch.ones(2, 3), torch.ones(3, 2), torch.ones(3, 2)]),
    "multi_dot ranks": lambda: torch.linalg.multi_dot([torch.ones(2, 3), torch.ones(1, 3, 2), torch.ones(2, 2)]),
    "multi_dot one": lambda: torch.linalg.multi_dot([torch.ones(2, 3)]),
    "multi_dot dtypes": lambda: torch.linalg.multi_dot([torch.ones(2, 2), torch.ones(2, 2).double(), torch.ones(2, 2)]),
    "vecdot shapes": lambda: torch.linalg.vecdot(torch.ones(2, 3), torch.ones(2, 4)),
    "vecdot batches": lambda: torch.linalg.vecdot(torch.ones(2, 3), torch.ones(4, 3)),
    "vecdot dim": lambda: torch.linalg.vecdot(torch.ones(2, 3), torch.ones(2, 3), dim=2),
    "vecdot integers": lambda: torch.linalg.vecdot(torch.arange(3), torch.arange(3)),
    "cdist ranks": lambda: torch.cdist(torch.ones(3), torch.ones(2, 3)),
    "grouped_mm offsets": lambda: torch._grouped_mm(*[torch.ones(16, 16).bfloat16()] * 2),
    "add shapes": lambda: torch.add(torch.ones(2), torch.ones(3), alpha=0.5),
    "sub bool": lambda: torch.sub(torch.ones(2) > 0, torch.ones(2), alpha=0.5),
    "add alpha": lambda: torch.add(torch.arange(2), torch.arange(2), alpha=0.5),
    "attention mask dtype": lambda: F.scaled_dot_product_attention(
        *[torch.ones(1, 2, 4)] * 3, torch.ones(2, 2, dtype=torch.int64)
    ),
    "attention rank": lambda: F.scaled_dot_product_attention(*[torch.ones(4)] * 3),
    "dot shapes": lambda: torch.dot(torch.ones(3), torch.ones(4)),
    "linear shapes": lambda: F.linear(torch.ones(2, 3), torch.ones(4, 5), torch.ones(4)),
    "linear bias": lambda: F.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(5)),
    "linear dtypes": lambda: F.linear(torch.ones(2, 3), torch.ones(4, 3).double(), torch.ones(4)),
    "softmax dim": lambda: torch.ones(2, 3).softmax(2),
    "softmax scalar dim": lambda: torch.ones(()).softmax(1),
    "softmax integers": lambda: torch.arange(3).softmax(0),
    "half to float": lambda: torch._softmax(torch.ones(3).half(), 0, True),
    "softmax out dtype": lambda: torch.softmax(torch.ones(3), 0, out=torch.empty(3).double()),
    "mean dim": lambda: torch.ones(2, 3).mean(2),
    "mean dim twice": lambda: torch.ones(2, 3).mean((0, -2)),
    "mean integers": lambda: torch.arange(3).mean(),
    "mean as integers": lambda: torch.ones(3).mean(0, dtype=torch.int32),
    "sum dim": lambda: torch.ones(2, 3).sum(2),
    "sum dim twice": lambda: torch.ones(2, 3).sum((0, -2)),
    "var of integers": lambda: torch.arange(3).var(),
    "var dim": lambda: torch.ones(2, 3).var(2),
    "std out dtype": lambda: torch.std(torch.ones(3), 0, out=torch.empty(()).int()),
    "logsumexp dim": lambda: torch.ones(2, 3).logsumexp(2),
    "layer_norm shape": lambda: F.layer_norm(torch.ones(2, 3), (2,)),
    "layer_norm weight": lambda: F.layer_norm(torch.ones(2, 3), (3,), torch.ones(2)),
    "layer_norm dtypes": lambda: F.layer_norm(torch.ones(2, 3), (3,), torch.ones(3).double()),
    "rms_norm shape": lambda: F.rms_norm(torch.ones(2, 3), (2,)),
    "rms_norm weight": lambda: F.rms_norm(torch.ones(2, 3), (3,), torch.ones(2)),
    "rms_norm no shape": lambda: F.rms_norm(torch.ones(2, 3), ()),
    "mean out dtype": lambda: torch.mean(torch.ones(3), 0, dtype=torch.float32, out=torch.empty(()).double()),
    "attention dtypes": lambda: F.scaled_dot_product_attention(
        *[torch.ones(1, 2, 4)] * 2, torch.ones(1, 2, 4).double()
    ),
    "attention mask": lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 4)] * 3, torch.ones(2, 2), 0.0, True),
    "in-place dtype": lambda: torch.arange(3).sigmoid_(),
    "in-place shape": lambda: torch.ones(1).atan2_(torch.ones(3)),
    "in-place overlap": lambda: torch.ones(1).expand(3).sigmoid_(),
    "requires_grad out": lambda: torch.mm(torch.ones(2, 2).requires_grad_(), torch.ones(2, 2), out=torch.ones(2, 2)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    """PyTorch's own type of error and its own words."""
    with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)) as standard:
        ERRORS[name]()
    with set_batch_invariant_mode(), pytest.raises(standard.type) as result:
        ERRORS[name]()
    assert str(result.value).split("Exception raised")[0] == str(standard.value).split("Exception raised")[0]


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Precision:
    """torch.set_float32_matmul_precision as an attribute."""

    value = property(
        lambda _: torch.get_float32_matmul_precision(), lambda _, name: torch.set_float32_matmul_precision(name)
    )


PERMISSIONS: dict[str, tuple[Any, str, Any]] = {
    "set_float32_matmul_precision": (_Precision(), "value", "medium"),
    "cuda.matmul.fp32_precision": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn.matmul.fp32_precision": (torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "fp32_precision": (torch.backends, "fp32_precision", "tf32"),
    "bf16 reductions": (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "fp16 accumulation": (torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
}
"""Setting -> where it is, its name, and a value that lets PyTorch compute otherwise."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", PERMISSIONS)
def test_settings_of_precision_are_permissions(setting: str, dtype: torch.dtype, device: str) -> None:
    a, b = random(64, 256, dtype=dtype, device=device), random(256, 64, dtype=dtype, device=device)
    expected = on_numpy(bikernels.matmul, a, b)
    with _set(*PERMISSIONS[setting]), set_batch_invariant_mode():
        assert same_bits(a @ b, expected)
        assert same_bits(F.linear(a, b.T), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_products(dtype: torch.dtype) -> None:
    a, b = random(2, 5, 37, dtype=dtype, device="cuda"), random(2, 37, 6, dtype=dtype, device="cuda")
    c = random(2, 5, 6, device="cuda")
    expected = on_numpy(bikernels.matmul, a, b, dtype="float32")
    with set_batch_invariant_mode():
        assert same_bits(torch.bmm(a, b, out_dtype=torch.float32), expected)
        assert same_bits(torch.mm(a[0], b[0], out_dtype=torch.float32), expected[0])
        added = torch.addmm(c[0], a[0], b[0], out_dtype=torch.float32, beta=0.5)
        assert same_bits(added, on_numpy(bikernels.addmm, c[0], a[0], b[0], beta=0.5, dtype="float32"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_half_to_float(name: str) -> None:
    """Forward, and the gradient of float16 from one of float32."""
    x = random(5, 300, dtype=torch.float16, device="cuda").requires_grad_()
    function, backward = getattr(bikernels, name), getattr(bikernels, f"{name}_backward")
    with set_batch_invariant_mode():
        y = getattr(x, name)(1, dtype=torch.float32)
        grad = random(5, 300, device="cuda")
        y.backward(grad)
    assert same_bits(y.detach(), on_numpy(function, x.detach(), axis=1, dtype="float32"))
    assert same_bits(x.grad, on_numpy(backward, grad, y.detach(), axis=1, dtype="float16"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_side_stream() -> None:
    """Results are ready on the stream that is current, and inputs are waited for on it."""
    stream = torch.cuda.Stream()
    a, b = random(512, 512, device="cuda"), random(512, 512, device="cuda")
    with set_batch_invariant_mode():
        expected = a @ b @ b
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            c = a.clone()
            result = c @ b @ b
        stream.synchronize()
    assert same_bits(result, expected)
