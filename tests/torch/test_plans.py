"""The second call of a kind follows a plan: whenever it may, never when it may not, and with the bytes of the first."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bikernels
from bikernels_torch import core, plans, set_batch_invariant_mode

from .helpers import same_bits

Call = Callable[[], Any]


class Calls:
    """How often an override has gone the ordinary way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        monkeypatch.setattr(core, "_call", self._counted(core._call))

    def _counted(self, call: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any, **kwargs: Any) -> None:
            self.number += 1
            call(*args, **kwargs)

        return counted

    def of(self, call: Call) -> tuple[int, Any]:
        """How many there are in a call, and its results."""
        before = self.number
        results = call()
        return self.number - before, results


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    plans.forget()
    yield Calls(monkeypatch)
    plans.forget()


def tensors(results: Any) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same(results: Any, expected: Any) -> None:
    for one, other in zip(tensors(results), tensors(expected), strict=True):
        assert same_bits(one, other)
        assert one.stride() == other.stride()
        assert one.device == other.device


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


# --------------------------------------------------------------------------------------------------- what is planned

OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "mm": lambda x, y, w: torch.mm(x, y.T),
    "addmm": lambda x, y, w: torch.addmm(y[:, 0], x, y.T, alpha=0.5, beta=-0.25),
    "bmm": lambda x, y, w: torch.bmm(x[None], y.T[None]),
    "mv": lambda x, y, w: torch.mv(x, w),
    "softmax": lambda x, y, w: torch.softmax(x, 0),
    "log_softmax": lambda x, y, w: torch.log_softmax(x, -1),
    "softmax backward": lambda x, y, w: torch._softmax_backward_data(x, y, -1, x.dtype),
    "mean": lambda x, y, w: torch.mean(x, (0, 1), keepdim=True),
    "sum": lambda x, y, w: torch.sum(x, 0, dtype=torch.float64),
    "var_mean": lambda x, y, w: torch.var_mean(x, 1, correction=0),
    "logsumexp": lambda x, y, w: torch.logsumexp(x, 1),
    "layer_norm": lambda x, y, w: torch.native_layer_norm(x, (7,), w, None, 1e-5),
    "layer_norm in one call": lambda x, y, w: F.layer_norm(x, (7,), w, w + 1),
    "bikernels.mm": lambda x, y, w: torch.ops.bikernels.mm(x, y.T),
    "bikernels.rms_norm": lambda x, y, w: torch.ops.bikernels.rms_norm(x, [7], w),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.usefixtures("mode")
def test_the_second_call_only_launches(name: str, device: str, calls: Calls) -> None:
    first, second = ((draw(5, 7, device=device), draw(5, 7, device=device), draw(7, device=device)) for _ in range(2))
    call = OPERATORS[name]
    with torch.inference_mode():
        count, results = calls.of(lambda: call(*first))
        assert count > 0
        count, again = calls.of(lambda: call(*first))
        assert count == 0
        assert_same(again, results)
        count, others = calls.of(lambda: call(*second))
        assert count == 0
        plans.forget()
        assert_same(others, call(*second))


INTO: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "mm": (lambda out, x, y: torch.mm(x, y, out=out), (6, 6)),
    "addmm": (lambda out, x, y: torch.addmm(y[0], x, y, alpha=0.5, out=out), (6, 6)),
    "addmm_": (lambda out, x, y: out.addmm_(x, y, beta=0.25), (6, 6)),
    "log_softmax": (lambda out, x, y: torch.log_softmax(x, -1, out=out), (6, 6)),
    "mean": (lambda out, x, y: torch.mean(x, 1, out=out), (6,)),
    "var": (lambda out, x, y: torch.var(x, 1, out=out), (6,)),
}


@pytest.mark.parametrize("name", INTO)
@pytest.mark.usefixtures("mode")
def test_results_in_a_tensor_of_the_caller_s(name: str, device: str, calls: Calls) -> None:
    call, shape = INTO[name]
    with torch.inference_mode():
        for strided in (False, True):
            of_five = [draw(6, 12, device=device) for _ in range(5)]
            first, second, third, fourth, place = [one[:, ::2] if strided else one[:, :6] for one in of_five]
            out = place if len(shape) == 2 else place[0]
            expected, others = call(out.clone(), first.clone(), second.clone()), third.clone()
            initial = out.clone()
            run = functools.partial(call, out, first, second)
            assert calls.of(run)[0] > 0
            assert_values(out, expected)
            out.copy_(initial)
            count, result = calls.of(run)
            assert count == 0
            assert result is out
            assert_values(out, expected)
            out.copy_(initial)
            call(out, third, fourth)
            plans.forget()
            assert_values(call(initial.clone(), others, fourth.clone()), out)


def assert_values(one: torch.Tensor, other: torch.Tensor) -> None:
    assert same_bits(one.contiguous(), other.contiguous())


@pytest.mark.usefixtures("mode")
def test_results_that_share_memory_with_an_operand(device: str, calls: Calls) -> None:
    with torch.inference_mode():
        memory, out = draw(3, 6, 6, device=device), draw(6, 6, device=device)
        x, y, _ = memory
        torch.mm(x, y, out=out)
        assert calls.of(lambda: torch.mm(x, y, out=out))[0] == 0
        flat = memory.view(-1)
        for begin in (0, 1, 35, 36, 71):
            inside = flat[begin : begin + 36].view(6, 6)
            expected, before = torch.mm(x.clone(), y.clone()), memory.clone()
            assert calls.of(functools.partial(torch.mm, x, y, out=inside))[0] > 0
            assert_values(inside, expected)
            memory.copy_(before)
        row = draw(6, device=device).expand(6, 6)
        with pytest.raises(RuntimeError):
            torch.mm(x, y, out=row)


@pytest.mark.usefixtures("mode")
def test_results_are_new_tensors_of_autograd_s_own(device: str, calls: Calls) -> None:
    x, y = draw(3, 4, device=device).requires_grad_(), draw(4, 5, device=device)
    found = []
    for _ in range(2):
        out = torch.mm(x, y)
        assert out.requires_grad
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        found.append((out.detach(), gradient))
        assert not out.is_inference()
        out.add_(1)  # nobody else's
    assert_same(found[0][1], found[1][1])
    assert found[0][0].data_ptr() != found[1][0].data_ptr()
    with torch.inference_mode():
        assert torch.mm(x, y).is_inference()


# ----------------------------------------------------------------------------------------------- what a plan is kept by


def variants(device: str) -> dict[str, Call]:
    """Calls of three operators, each of which differs from the first of its kind in one thing that matters."""
    x, y, c, w = (draw(*shape, device=device) for shape in ((6, 6), (6, 6), (6, 6), (6,)))
    wide = draw(6, 12, device=device)
    zero, none = torch.zeros(2, 6, 6, device=device)
    arithmetic = bikernels.use_arithmetic("tc16f25" if device == "cpu" else "fma32")
    half = [one.bfloat16() for one in (x, y)]

    def within(context: Any, call: Call) -> Call:
        def run() -> Any:
            with context:
                return call()

        return run

    return {
        "mm": lambda: torch.mm(x, y),
        "mm, transposed": lambda: torch.mm(x.T, y),
        "mm, other transposed": lambda: torch.mm(x, y.T),
        "mm, sliced": lambda: torch.mm(wide[:, ::2], y),
        "mm, fewer rows": lambda: torch.mm(x[:3], y),
        "mm, float64": lambda: torch.mm(x.double(), y.double()),
        "mm, bfloat16": lambda: torch.mm(*half),
        "mm, bfloat16 in another class": within(arithmetic, lambda: torch.mm(*half)),
        "addmm": lambda: torch.addmm(none, zero, y),
        "addmm, alpha": lambda: torch.addmm(none, zero, y, alpha=2.0),
        "addmm, alpha 0": lambda: torch.addmm(none, zero, y, alpha=0.0, beta=1.5),
        "addmm, alpha -0": lambda: torch.addmm(none, zero, y, alpha=-0.0, beta=1.5),
        "addmm, beta": lambda: torch.addmm(c, x, y, beta=2),
        "addmm, no beta": lambda: torch.addmm(c, x, y, beta=0),
        "addmm, broadcast": lambda: torch.addmm(w, x, y),
        "mean": lambda: torch.mean(x, 1),
        "mean, other dimension": lambda: torch.mean(x, 0),
        "mean, both": lambda: torch.mean(x, (0, 1)),
        "mean, kept": lambda: torch.mean(x, 1, keepdim=True),
        "mean, dtype": lambda: torch.mean(x, 1, dtype=torch.float64),
        "layer_norm": lambda: F.layer_norm(x, (6,)),
        "layer_norm, weight": lambda: F.layer_norm(x, (6,), w),
        "layer_norm, bias": lambda: F.layer_norm(x, (6,), None, w),
        "layer_norm, eps": lambda: F.layer_norm(x, (6,), eps=1e-3),
        "layer_norm, two dimensions": lambda: F.layer_norm(x, (6, 6)),
    }


@pytest.mark.usefixtures("mode")
def test_a_plan_is_kept_by_all_that_matters(device: str, calls: Calls) -> None:
    with torch.inference_mode():
        every = variants(device)
        expected = {}
        for name, call in every.items():
            plans.forget()
            expected[name] = call()
        plans.forget()
        for name, call in every.items():
            assert calls.of(call)[0] > 0, name
        for name, call in every.items():
            count, results = calls.of(call)
            assert count == 0, name
            assert_same(results, expected[name])


def test_a_plan_is_kept_by_the_settings_of_the_mode(device: str, calls: Calls) -> None:
    x, y = (draw(*shape, device=device, dtype=torch.bfloat16) for shape in ((32, 4096), (4096, 32)))
    classes = ("fma32", "tc16f25")
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the GPU has another class of tensor cores")
    found = {}
    for name in classes:
        with bikernels.use_arithmetic(name), set_batch_invariant_mode():
            found[name] = torch.mm(x, y)
    assert not torch.equal(found["fma32"], found["tc16f25"])
    for name in (*classes, *classes):
        decision = set_batch_invariant_mode()
        with bikernels.use_arithmetic(name):
            decision.__enter__()
        try:  # the class is now the mode's, and no context's
            assert_same(torch.mm(x, y), found[name])
        finally:
            decision.__exit__()


def test_keys(device: str) -> None:
    x, y = draw(4, 4, device=device), draw(4, 4, device=device)
    different = [
        (x,), (x.T,), (x[:2],), (x.double(),), (x, y), (x, None), (x, 0.0), (x, -0.0), (x, 1.5), (x, [0]), (x, [0, 1]),
        (x, 0), (x, 1), (x, torch.float64), (x, (4,), None, 1e-5), (x, (4,), y, 1e-5),
    ]  # fmt: skip
    keys = [plans._key(arguments, {}) for arguments in different]
    keys += [plans._key((x,), {"alpha": alpha}) for alpha in (0.0, -0.0, 2)]
    with bikernels.use_arithmetic("fma32"):
        keys.append(plans._key((x,), {}))
    with bikernels.use_backend("cpu"):
        keys.append(plans._key((x,), {}))
    assert len(set(keys)) == len(keys)
    assert plans._key((x, y), {}) == plans._key((y, x.clone()), {})
    assert plans._key((x, 1 + 0j), {}) is None


@pytest.mark.usefixtures("mode")
def test_one_tensor_in_two_places(device: str, calls: Calls) -> None:
    x, y = draw(6, 6, device=device), draw(6, 6, device=device)
    with torch.inference_mode():
        square = torch.mm(x, x)
        product = torch.mm(x, y)
        assert_same(product, torch.mm(x, y))
        assert_same(torch.mm(x, x), square)
        plans.forget()
        assert_same(torch.mm(x, y), product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("mode")
def test_addresses_are_any(dtype: torch.dtype, device: str, calls: Calls) -> None:
    memory = draw(3 * 64 * 64 + 9, device=device, dtype=dtype)
    found = []
    with torch.inference_mode():
        for shift in (0, 1, 3, 8):
            x = memory[shift : shift + 64 * 64].view(64, 64)
            y = memory[64 * 64 + shift : 2 * 64 * 64 + shift].view(64, 64)
            first, results = calls.of(lambda x=x, y=y: (torch.mm(x, y), torch.log_softmax(x, 1), torch.mean(y, 0)))  # type: ignore[misc]
            assert (first > 0) == (shift == 0)
            found.append((x, y, results))
        plans.forget()
        for x, y, results in found:
            expected = torch.mm(x.clone(), y.clone()), torch.log_softmax(x.clone(), 1), torch.mean(y.clone(), 0)
            assert_same(results, expected)


@pytest.mark.usefixtures("mode")
def test_errors_are_pytorch_s(device: str, calls: Calls) -> None:
    x = draw(4, 4, device=device)
    torch.mm(x, x.clone())
    torch.addmm(x[0], x, x.clone())
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(x, x[:3])
    with pytest.raises(RuntimeError):
        torch.mm(x, x.double())
    with pytest.raises(IndexError):
        torch.mean(x, 2)


# ---------------------------------------------------------------------------------------------------- how many, of what


@pytest.mark.usefixtures("mode")
def test_plans_are_few(device: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LIMIT", 3)
    x = draw(10, 4, device=device)
    with torch.inference_mode():
        for rows in range(1, 10):
            torch.mm(x[:rows], x.T)
            assert max(map(len, plans._plans)) <= 3
        assert calls.of(lambda: torch.mm(x[:9], x.T))[0] == 0


@pytest.mark.usefixtures("mode")
def test_plans_keep_no_tensors(device: str, calls: Calls) -> None:
    def operands() -> tuple[torch.Tensor, torch.Tensor]:
        return draw(4, 4, device=device), draw(4, 4, device=device)

    x, y = operands()
    references = [weakref.ref(each) for each in (x, y, torch.mm(x, y), *torch.var_mean(x, 1))]
    del x, y
    gc.collect()
    assert [reference() for reference in references] == [None] * 5
    assert calls.of(lambda: torch.mm(*operands()))[0] == 0


@pytest.mark.usefixtures("mode")
def test_threads(device: str, calls: Calls) -> None:
    def operands(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(33, 40, generator=generator).to(device), torch.randn(40, 33, generator=generator).to(device)

    expected = [torch.mm(*operands(seed)) for seed in range(6)]
    plans.forget()

    def work(seed: int) -> None:
        stream = torch.cuda.Stream() if device == "cuda" else None
        with torch.cuda.stream(stream), torch.inference_mode():
            x, y = operands(seed)
            for _ in range(50):
                assert_same(torch.mm(x, y), expected[seed])

    with ThreadPoolExecutor(max_workers=6) as pool:
        list(pool.map(work, range(6)))


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("mode")
def test_capture(calls: Calls) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    x, y = draw(16, 64, device="cuda", dtype=torch.bfloat16), draw(64, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        return torch.log_softmax(torch.mm(x, y), -1)

    with torch.inference_mode():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            number, out = calls.of(step)
        assert number == 0
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert_same(out, step())


@pytest.mark.gpu
@pytest.mark.usefixtures("mode")
def test_streams(calls: Calls) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    with torch.inference_mode():
        x, y = (draw(512, 512, device="cuda") for _ in range(2))
        expected = x.clone()
        for _ in range(20):
            expected = torch.mm(expected, y)
        torch.cuda.synchronize()
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # a launch on another stream would read what is not there yet
                chain = x.clone()
                for _ in range(20):
                    chain = torch.mm(chain, y)
            stream.synchronize()
            assert_same(chain, expected)
