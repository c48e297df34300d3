"""Each operator in the mode: the core's bytes, PyTorch's shapes, dtypes, strides and errors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bikernels
from bikernels_torch import set_batch_invariant_mode

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
    "_softmax_backward_data": lambda c, a, b, **out: torch.ops.aten._softmax_backward_data(
        a, a.softmax(1), 1, a.dtype, **({"grad_input": out["out"]} if out else {})
    ),
    "_log_softmax_backward_data": lambda c, a, b, **out: torch.ops.aten._log_softmax_backward_data(
        a, a.log_softmax(1), 1, a.dtype, **out
    ),
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
        warns = not name.startswith(("linear", "_softmax", "_log_softmax"))
        with pytest.warns(UserWarning, match="was resized") if warns else contextlib.nullcontext():
            call(c, a, b, out=out)
        assert same_bits(out, expected)


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
    "integer addbmm": lambda: torch.addbmm(torch.ones(2, 2).int(), *[torch.ones(3, 2, 2).int()] * 2),
    "complex mm": lambda: torch.ones(2, 3, dtype=torch.complex64) @ torch.full((3, 2), 1j),
    "complex vdot": lambda: torch.vdot(torch.full((3,), 1j), torch.full((3,), 1j)),
    "complex mean": lambda: torch.full((3, 2), 1j).mean(0),
    "complex sigmoid": lambda: torch.full((3, 2), 1j).sigmoid(),
    "sparse mm": lambda: torch.sparse.mm(torch.eye(3).to_sparse(), torch.ones(3, 2)),
    "sparse softmax": lambda: torch.sparse.softmax(torch.eye(3).to_sparse(), 1).to_dense(),
    "meta mm": lambda: (torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")).shape,
    "meta softmax": lambda: torch.empty(2, 3, device="meta").softmax(0).shape,
    "integer pow": lambda: torch.pow(torch.arange(5), 2),
    "integer add": lambda: torch.add(torch.arange(5), torch.arange(5), alpha=3),
    "bool add": lambda: torch.add(torch.arange(5), torch.arange(5) > 2, alpha=3),
    "nested softmax": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]).softmax(-1).unbind()[0],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", PASSED_THROUGH)
def test_passed_through(name: str) -> None:
    standard = PASSED_THROUGH[name]()
    with set_batch_invariant_mode():
        result = PASSED_THROUGH[name]()
    assert torch.equal(result, standard) if isinstance(standard, torch.Tensor) else result == standard


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


def test_tf32_is_a_permission(device: str) -> None:
    a, b = random(64, 256, device=device), random(256, 64, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with set_batch_invariant_mode():
            assert same_bits(a @ b, on_numpy(bikernels.matmul, a, b))
    finally:
        torch.set_float32_matmul_precision(before)


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
def test_half_to_float() -> None:
    x = random(5, 300, dtype=torch.float16, device="cuda")
    with set_batch_invariant_mode():
        assert same_bits(x.softmax(1, dtype=torch.float32), on_numpy(bikernels.softmax, x, axis=1, dtype="float32"))


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
