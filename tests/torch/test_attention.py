"""Attention of few queries as one kernel: the bytes of the steps that it stands for (docs/contract.md, section 11)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bikernels.specs import AttentionSpec, Layout, contiguous_strides
from bikernels_torch import core, plans, set_batch_invariant_mode

from .helpers import distinct, same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Draw = Callable[..., torch.Tensor]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each attention that is asked of the core, whether it has been one kernel."""
    answers: list[bool] = []
    attend = core.attend

    def count(*arguments: Any) -> bool:
        answers.append(attend(*arguments))
        return answers[-1]

    monkeypatch.setattr(core, "attend", count)
    yield answers
    plans.forget()


def check(kernels: list[bool], *operands: torch.Tensor, **options: Any) -> torch.Tensor:
    """The result without autograd, of a first call and of its plan, against the steps that autograd follows."""
    plans.forget()
    with set_batch_invariant_mode():
        expected = F.scaled_dot_product_attention(*operands, **options)
        with torch.no_grad():
            asked = len(kernels)
            for _ in range(2):
                result = F.scaled_dot_product_attention(*operands, **options)
                assert same_bits(result, expected)
                assert result.stride() == expected.stride()
    calls = 1 if len({*map(id, operands)}) == 3 else 2  # a plan does not ask the core; a tensor in two places has none
    assert kernels[asked:] == [True] * (calls if operands[0].is_cuda else 0)
    return result


def drawing(dtype: torch.dtype, device: str) -> Draw:
    return lambda *shape: torch.randn(shape, device=device).to(dtype)


# batch, heads, heads of keys, queries, keys, elements of a key, elements of a value
SIZES: dict[str, tuple[int, ...]] = {
    "decode": (3, 4, 2, 1, 128, 64, 64),
    "one key": (2, 2, 2, 1, 1, 64, 64),
    "ragged": (2, 6, 2, 1, 255, 80, 96),
    "one head of keys": (1, 8, 1, 1, 2049, 128, 128),
    "many queries": (1, 4, 2, 16, 515, 33, 7),
    "long": (1, 4, 1, 2, 9000, 32, 256),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, dtype: torch.dtype, device: str, kernels: list[bool]) -> None:
    batch, heads, groups, queries, keys, width, columns = SIZES[size]
    if device == "cpu" and keys > 128:
        pytest.skip("the steps on both sides")
    draw = drawing(dtype, device)
    q, k, v = draw(batch, heads, queries, width), draw(batch, groups, keys, width), draw(batch, groups, keys, columns)
    result = check(kernels, q, k, v, enable_gqa=True)
    assert same_bits(check(kernels, q[-1:], k[-1:], v[-1:], enable_gqa=True), result[-1:])
    k[0, :, keys // 2] = float("nan")  # of another request
    v[0] = float("inf")
    if batch > 1:
        assert same_bits(check(kernels, q, k, v, enable_gqa=True)[1:], result[1:])


FORMS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "scale": lambda draw: {"scale": 0.3},
    "negative scale": lambda draw: {"scale": -0.7},
    "scale of zero": lambda draw: {"scale": 0.0},
    "causal": lambda draw: {"is_causal": True},
    "boolean mask": lambda draw: {"attn_mask": draw(2, 1, 3, 300) > 0},
    "boolean mask of keys": lambda draw: {"attn_mask": draw(300) > 0},
    "queries without keys": lambda draw: {"attn_mask": (draw(3, 1) * 0 + torch.arange(3)[:, None].to(draw(1))) > 0},
    "bias": lambda draw: {"attn_mask": draw(2, 4, 3, 300)},
    "float32 bias": lambda draw: {"attn_mask": draw(3, 300).float()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, device: str, kernels: list[bool]) -> None:
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        draw = drawing(dtype, device)
        q, k, v = draw(2, 4, 3, 64), draw(2, 2, 300, 64), draw(2, 2, 300, 40)
        check(kernels, q, k, v, enable_gqa=True, **FORMS[form](draw))


LAYOUTS: dict[str, Callable[[Draw], tuple[torch.Tensor, ...]]] = {
    "heads between": lambda draw: tuple(draw(2, n, 4, 64).transpose(1, 2) for n in (2, 300, 300)),
    "of one product": lambda draw: draw(2, 9, 3, 4, 64).transpose(1, 3).unbind(2),
    "unaligned": lambda draw: tuple(draw(2, 4, n, 67)[..., 1:-2] for n in (2, 300, 300)),
    "begins unaligned": lambda draw: tuple(draw(2, 4, n, 72)[..., 3:67] for n in (2, 300, 300)),
    "transposed": lambda draw: tuple(draw(2, 4, 64, n).mT for n in (2, 300, 300)),
    "expanded": lambda draw: (draw(2, 4, 2, 64), *[draw(1, 1, 300, 64).expand(2, 4, 300, 64) for _ in range(2)]),
    "one tensor": lambda draw: (draw(2, 4, 9, 64),) * 3,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str, kernels: list[bool]) -> None:
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        check(kernels, *LAYOUTS[layout](drawing(dtype, device)))


VALUES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "NaN in a key": lambda q, k, v: k[:, :, 7].fill_(float("nan")),
    "infinite value": lambda q, k, v: v[:, :, 7].fill_(float("inf")),
    "one key decides": lambda q, k, v: k[:, :, 7].fill_(1e4),
    "equal scores": lambda q, k, v: k.fill_(0.5),
    "subnormal values": lambda q, k, v: v.mul_(1e-20).mul_(1e-20),
    "scores of -inf": lambda q, k, v: (q.abs_().fill_(float("-inf")), k.abs_().add_(1)),
    "scores of inf": lambda q, k, v: (q.abs_().fill_(float("inf")), k[:, :, :3].abs_().add_(1)),
}


@pytest.mark.parametrize("values", VALUES)
def test_values(values: str, device: str, kernels: list[bool]) -> None:
    for dtype in DTYPES if device == "cuda" else DTYPES[:1]:
        draw = drawing(dtype, device)
        q, k, v = draw(2, 4, 1, 32), draw(2, 2, 70, 32), draw(2, 2, 70, 32)
        VALUES[values](q, k, v)
        check(kernels, q, k, v, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_teams(dtype: torch.dtype, kernels: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every team computes the same bytes."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    from bikernels.backend.cupy import attention
    from bikernels.backend.cupy.launch import gpu

    draw = drawing(dtype, "cuda")
    q, k, v = draw(2, 8, 2, 128), draw(2, 2, 4500, 128), draw(2, 2, 4500, 128)
    check(kernels, q, k, v, enable_gqa=True)
    results = []
    for rows in attention.ROWS:
        for ctas in attention.CTAS if gpu(0).compute_capability >= (9, 0) else (1,):
            plan = functools.partial(attention._plan, rows=rows, ctas=ctas, teams=2 * 2 * 8 // rows)
            monkeypatch.setattr(attention, "choose", lambda spec, gpu, plan=plan: plan(spec, properties=gpu))
            plans.forget()
            core._attention_launch.cache_clear()
            results.append(check(kernels, q, k, v, enable_gqa=True))
    assert distinct(iter(results)) == 1
    core._attention_launch.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_chains(dtype: torch.dtype, kernels: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of queries in a CTA, or a team, computes the same bytes."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    from bikernels.backend.cupy import attention

    draw = drawing(dtype, "cuda")
    for keys in (1, 128, 131, 515):
        q, k, v = draw(2, 6, 2, 48), draw(2, 2, keys, 48), draw(2, 2, keys, 24)
        k[0, 1, keys // 2] = float("nan")
        v[1, 0, keys // 2] = float("inf")
        results = []
        for rows in (None, *attention.ROWS):
            plan = None if rows is None else functools.partial(attention.short_plan, rows=rows)
            monkeypatch.setattr(attention, "choose_short", lambda spec, gpu, plan=plan: plan and plan(spec))
            core._attention_launch.cache_clear()
            results.append(check(kernels, q, k, v, enable_gqa=True))
        assert distinct(iter(results)) == 1
    core._attention_launch.cache_clear()


@pytest.mark.gpu
def test_graph(kernels: list[bool]) -> None:
    """Captured, also where the capture is the first call with these operands."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    draw = drawing(torch.bfloat16, "cuda")
    operands = draw(2, 4, 1, 64), draw(2, 2, 300, 64), draw(2, 2, 300, 64)
    check(kernels, *[x.clone() for x in operands], enable_gqa=True)
    plans.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), set_batch_invariant_mode():
        with torch.cuda.graph(graph):
            result = F.scaled_dot_product_attention(*operands, enable_gqa=True)
        for x in operands:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert same_bits(result, F.scaled_dot_product_attention(*operands, enable_gqa=True))


def test_operator(device: str) -> None:
    draw = drawing(torch.bfloat16, device)
    operands = draw(2, 4, 1, 64), draw(2, 2, 9, 64), draw(2, 2, 9, 24)
    for mask, is_causal in ((None, True), (draw(9) > 0, False)):
        arguments = (*operands, mask, is_causal, 0.3, True)
        with set_batch_invariant_mode():
            expected = F.scaled_dot_product_attention(*operands, mask, 0.0, is_causal, scale=0.3, enable_gqa=True)
            assert same_bits(torch.ops.bikernels._attention(*arguments), expected)
            torch.library.opcheck(torch.ops.bikernels._attention.default, arguments)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool, kernels: list[bool]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    draw = drawing(torch.bfloat16, "cuda")
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v, enable_gqa=True), fullgraph=True, dynamic=dynamic
    )
    for batch, keys in ((2, 300), (3, 301)):
        operands = draw(batch, 4, 1, 64), draw(batch, 2, keys, 64), draw(batch, 2, keys, 64)
        with set_batch_invariant_mode():
            expected = F.scaled_dot_product_attention(operands[0] * 2, *operands[1:], enable_gqa=True)
            with torch.no_grad():
                asked = len(kernels)
                assert same_bits(function(*operands), expected)
                assert kernels[asked:] == [True]
            followed = [x.clone().requires_grad_() for x in operands]
            assert same_bits(function(*followed), expected)
            assert function(*followed).requires_grad


# ---------------------------------------------------------------------------------------------- without a GPU: the plan


def spec(heads: int, groups: int, queries: int, keys: int, width: int, batch: int = 1) -> AttentionSpec:
    def layout(*shape: int) -> Layout:
        return Layout("bfloat16", shape, contiguous_strides(shape))

    q, k = layout(batch, heads, queries, width), layout(batch, groups, keys, width)
    return AttentionSpec(q, k, k, q, None, False, 0.5, 0.5)


def test_choice() -> None:
    pytest.importorskip("cupy", reason="needs the cuda13 extra")
    from bikernels.backend.cupy import attention
    from bikernels.backend.cupy.launch import GPU

    hopper = GPU("", (9, 0), 132, 232448, 4e6)
    ampere = hopper._replace(compute_capability=(8, 0), multiprocessors=108, shared_bytes=166912)
    chosen = attention.choose(spec(32, 8, 1, 4096, 128), hopper)
    assert chosen is not None
    assert chosen.rows == 4
    assert chosen.ctas > 1
    assert chosen.grid == chosen.teams * chosen.ctas
    for properties in (hopper, ampere):
        for heads, groups, queries, width in ((32, 8, 1, 128), (4, 4, 1, 32), (8, 1, 16, 256), (5, 5, 3, 65)):
            for keys in (1, 255, 4097, 32768):
                for batch in (1, 64):
                    one = spec(heads, groups, queries, keys, width, batch)
                    assert attention.takes(one)
                    plan = attention.choose(one, properties)
                    if plan is None:
                        assert properties is ampere
                        assert keys == 32768
                        continue
                    assert plan.shared_bytes <= properties.shared_bytes
                    assert plan.ctas == 1 or properties is hopper
                    assert plan.rows * plan.row_teams >= heads // groups * queries > plan.rows * (plan.row_teams - 1)
                    assert plan.slice * plan.ctas >= width
                    assert plan.tile * plan.slice * 2 <= plan.stage_bytes
    assert attention.choose(spec(1, 1, 1, 10_000_000, 64), hopper) is None
    assert not attention.takes(spec(1, 1, 17, 64, 64))
    assert not attention.takes(spec(1, 1, 1, 64, 257))
