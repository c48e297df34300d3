"""Every schedule of every CUDA C++ product kernel gives the bytes of the CPU backend. Needs a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

import bikernels
from bikernels.backend import MatmulLaunch
from bikernels.contract import PORTABLE_ARITHMETIC
from bikernels.specs import MatmulSpec
from bikernels.views import Device, View

from .cases import assert_same_bits, draw

pytest.importorskip("cupy", reason='CuPy is not installed; pip install "bikernels[cuda13]"')

from bikernels.backend.cupy import launch
from bikernels.backend.cupy.matmul import dmma, fma, mma, wgmma, wgmma_copy
from bikernels.backend.cupy.matmul.problem import Problem, along_k

HALF = ("bfloat16", "float16")


class Forced(NamedTuple):
    """A schedule to be used whatever the product."""

    family: Any
    schedule: Any
    dtype: str
    swap: bool = False
    early: bool = True

    @property
    def arithmetic(self) -> str:
        return "tc16f25" if self.family in (mma, wgmma, wgmma_copy) else PORTABLE_ARITHMETIC[self.dtype]

    def __str__(self) -> str:
        name = self.family.__name__.rpartition(".")[-1]
        values = [str(value) for value in self.schedule if isinstance(value, int)]
        flags = ["swapped"] * self.swap + ["late"] * (not self.early)
        return "-".join([name, self.dtype, *values, *flags])

    @property
    def takes_all_layouts(self) -> bool:
        return self.family is not wgmma or self.schedule.takes(b_k_contiguous=False)

    def takes(self, problem: Problem) -> bool:
        if self.family is wgmma and not self.schedule.takes(along_k(problem.a if self.swap else problem.b)):
            return False
        return self.family not in (wgmma, wgmma_copy) or self.family.takes(problem)

    def prepare(self, problem: Problem, index: int) -> MatmulLaunch:
        if self.family is wgmma:
            choice = wgmma.Choice(self.schedule, self.swap, self.early, band=2)
            return wgmma.prepare(problem, choice, index, refuse)
        return self.family.prepare(problem, self.schedule, index)


def refuse() -> MatmulLaunch:
    raise AssertionError("the operands are aligned")


def forced() -> Iterator[Forced]:
    for dtype in HALF:
        for schedule in wgmma.SCHEDULES:
            yield Forced(wgmma, schedule, dtype)
            yield Forced(wgmma, schedule, dtype, swap=True, early=False)
        for copying in wgmma_copy.SCHEDULES:
            yield Forced(wgmma_copy, copying, dtype)
        for portable in mma.SCHEDULES:
            yield Forced(mma, portable, dtype)
    for dtype, schedules in fma.SCHEDULES.items():
        for simt in schedules:
            yield Forced(fma, simt, dtype)
    for tensor in dmma.SCHEDULES:
        yield Forced(dmma, tensor, "float64")


class Product(NamedTuple):
    """Operands and what the CPU makes of them."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray | None
    expected: np.ndarray


ALPHA, BETA = -0.5, 1.25
SHAPES = (((), 72, 40, 200), ((), 264, 272, 1032), ((), 8, 264, 4104), ((), 150, 77, 67), ((3, 2), 72, 80, 136))
"""Batch, m, n, k. Some are whole vectors along every dimension, which the TMA asks for; none is whole tiles."""


@functools.cache
def products(dtype: str, arithmetic: str, shapes: tuple[Any, ...] = SHAPES) -> list[Product]:
    rng = np.random.default_rng(5)
    made = []
    for batch, m, n, k in shapes:
        a, b = draw(rng, (*batch, m, k), dtype, "wide"), draw(rng, (*batch[1:], k, n), dtype, "wide")
        a[..., 3, :] = draw(rng, (*batch, k), dtype, "special")
        b[..., 5] = draw(rng, (*batch[1:], k), dtype, "subnormal")
        b = np.broadcast_to(b, (*batch, k, n))
        made.append(Product(a, b, None, bikernels.matmul(a, b, backend="cpu", arithmetic=arithmetic)))
        c = np.broadcast_to(draw(rng, (n,), dtype), (*batch, m, n))
        options: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "backend": "cpu", "arithmetic": arithmetic}
        for result in (dtype, "float32") if dtype in HALF else (dtype,):
            made.append(Product(a, b, c, bikernels.addmm(c, a, b, dtype=result, **options)))
    return made


def view(array: Any, dtype: str) -> View:
    strides = tuple(step // array.itemsize for step in array.strides)
    return View(array.data.ptr, dtype, array.shape, strides, Device("cuda", array.device.id), owner=array)


def as_it_is(backend: Any, x: np.ndarray) -> Any:
    """A C-contiguous copy."""
    return backend.put(x)


def transposed(backend: Any, x: np.ndarray) -> Any:
    """The same values, the last two axes the other way round in memory."""
    return backend.put(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)


def in_mid_word(backend: Any, x: np.ndarray) -> Any:
    """The same values, rows that begin at odd elements, every other one in the middle of a word."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 2 + x.shape[-1] % 2 + 1), np.nan, x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return backend.put(wide)[..., 1 : 1 + x.shape[-1]]


def columns_in_mid_word(backend: Any, x: np.ndarray) -> Any:
    """The same of the transpose."""
    return in_mid_word(backend, np.swapaxes(x, -1, -2)).swapaxes(-1, -2)


def padded(backend: Any, x: np.ndarray) -> Any:
    """The same values, lines that are whole vectors apart and NaN between them."""
    length = x.shape[-1]
    wide = np.full((*x.shape[:-1], -(-length // 8) * 8 + 8), np.nan, x.dtype)
    wide[..., :length] = x
    return backend.put(wide)[..., :length]


def padded_columns(backend: Any, x: np.ndarray) -> Any:
    """The same of the transpose."""
    return padded(backend, np.swapaxes(x, -1, -2)).swapaxes(-1, -2)


def shared_by_the_batch(backend: Any, x: np.ndarray) -> Any:
    """The same values, once for all matrices along the first axis of the batch, where they are the same."""
    return backend.xp.broadcast_to(backend.put(x[0]), x.shape) if x.ndim > 2 else backend.put(x)


def heads_between(backend: Any, x: np.ndarray) -> Any:
    """The same values, two batch axes that lie around the rows in memory, as attention has them."""
    return backend.put(x.swapaxes(-2, -3)).swapaxes(-2, -3) if x.ndim > 2 else backend.put(x)


def layouts() -> Iterator[tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]:
    """How a, b and the result may lie, as functions of the backend and an array."""
    for put_a, put_b in (
        (as_it_is, transposed),
        (as_it_is, as_it_is),
        (transposed, transposed),
        (transposed, as_it_is),
        (heads_between, heads_between),
        (in_mid_word, columns_in_mid_word),
        (columns_in_mid_word, in_mid_word),
        (padded, padded_columns),
        (padded_columns, padded),
        (heads_between, shared_by_the_batch),
    ):
        for put_out in (as_it_is, transposed):
            yield put_a, put_b, put_out


def run(backend: Any, case: Forced, product: Product) -> int:
    """Compute a product in all layouts that the schedule takes, and compare bytes; how many there were."""
    a, b, c, expected = product
    index, ran = backend.xp.cuda.runtime.getDevice(), 0
    for put_a, put_b, put_out in layouts():
        out = put_out(backend, np.zeros_like(expected))
        moved = put_a(backend, a), put_b(backend, b), None if c is None else backend.put(c)
        x, y, w = (None if array is None else view(array, case.dtype) for array in moved)
        z = view(out, str(expected.dtype))
        of_a, of_b, of_c, of_out = (None if one is None else one.description.layout for one in (x, y, w, z))
        problem = Problem.of(MatmulSpec(case.arithmetic, of_a, of_b, of_c, of_out))
        if not case.takes(problem):
            continue
        addend = () if w is None else (w.pointer, ALPHA, BETA)
        case.prepare(problem, index)(z.stream, z.pointer, x.pointer, y.pointer, *addend)
        names = f"{a.shape} @ {b.shape}, {put_a.__name__} {put_b.__name__} {put_out.__name__}, addend {c is not None}"
        assert_same_bits(backend.get(out), expected, names)
        ran += 1
    return ran


@pytest.mark.parametrize("case", list(forced()), ids=str)
def test_bytes(backend: Any, case: Forced) -> None:
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    if not backend.can_compute(case.arithmetic):
        pytest.skip(f"this GPU does not compute {case.arithmetic}")
    ran = sum(run(backend, case, product) for product in products(case.dtype, case.arithmetic))
    assert ran >= (40 if case.takes_all_layouts else 15)  # some layouts are not for every kernel


@pytest.mark.parametrize("case", [case for case in forced() if case.family in (wgmma, wgmma_copy)], ids=str)
def test_ctas_that_compute_many_tiles(backend: Any, case: Forced) -> None:
    """A GPU of two multiprocessors has few CTAs."""
    if backend.name != "cupy" or not backend.can_compute(case.arithmetic):
        pytest.skip("needs the backend 'cupy' and a Hopper GPU")
    small = launch.gpu(backend.xp.cuda.runtime.getDevice())._replace(multiprocessors=2)
    with mock.patch.object(case.family, "gpu", return_value=small):
        for product in products(case.dtype, case.arithmetic)[3:6]:
            assert run(backend, case, product) >= 6


def test_products_in_place_one_after_the_other(backend: Any) -> None:
    """Launches overlap, and each reads what the one before wrote; tiles share sectors of the memory."""
    if backend.name == "cpu":
        pytest.skip("launches overlap on GPUs")
    rng = np.random.default_rng(7)
    x, w, c = (backend.put(draw(rng, shape, "bfloat16")) for shape in ((40, 136), (136, 1000), (40, 1000)))
    results = []
    for synchronous in (True, False):
        out = c.copy()
        for _ in range(50):
            bikernels.addmm(out, x, w, alpha=0.01, beta=0.875, out=out, backend=backend.name)
            if synchronous:
                backend.xp.cuda.runtime.deviceSynchronize()
        results.append(backend.get(out))
    assert_same_bits(results[1], results[0])


def test_repeated_copies(backend: Any) -> None:
    """Threads fill shared memory and tensor cores read it: 200 times the same bytes."""
    if backend.name != "cupy" or not backend.can_compute("tc16f25"):
        pytest.skip("needs the backend 'cupy' and a Hopper GPU")
    rng = np.random.default_rng(8)
    for m, n, k in ((257, 263, 4099), (5, 4097, 2051)):
        a, b = draw(rng, (m, k), "bfloat16"), draw(rng, (k, n), "bfloat16")
        expected = bikernels.matmul(a, b, backend="cpu", arithmetic="tc16f25")
        on_gpu = backend.put(a), backend.put(b)
        results = [bikernels.matmul(*on_gpu, backend="cupy") for _ in range(200)]
        for number, result in enumerate(results):
            assert_same_bits(backend.get(result), expected, f"launch {number}")


def test_operands_that_the_tma_does_not_take_as_they_are(backend: Any) -> None:
    """Unaligned addresses are found at the launch, other layouts before; both have a kernel."""
    if backend.name != "cupy" or not backend.can_compute("tc16f25"):
        pytest.skip("needs the backend 'cupy' and a Hopper GPU")
    rng = np.random.default_rng(6)
    whole, b = draw(rng, (64, 80), "bfloat16"), draw(rng, (72, 40), "bfloat16")
    on_gpu, other = backend.put(whole), transposed(backend, b)
    apart = backend.put(whole[:, :75])
    taken = {}
    for name, array, slices in (
        ("unaligned", on_gpu, np.s_[:, 1:73]),
        ("odd rows", on_gpu, np.s_[:, :72]),
        ("every other", on_gpu, np.s_[::2, :72]),
        ("lines 75 elements apart", apart, np.s_[:, :72]),
        ("few such lines", apart, np.s_[:5, :72]),
        ("reversed", on_gpu, np.s_[::-1, :72]),
    ):
        expected = bikernels.matmul(whole[slices], b, backend="cpu", arithmetic="tc16f25")
        actual = bikernels.matmul(array[slices], other, backend="cupy")
        assert_same_bits(backend.get(actual), expected, name)
        of_a, of_b, of_out = (view(each, "bfloat16").description.layout for each in (array[slices], other, actual))
        taken[name] = wgmma.takes(Problem.of(MatmulSpec("tc16f25", of_a, of_b, None, of_out)))
    assert taken == {
        "unaligned": True,
        "odd rows": True,
        "every other": True,
        "lines 75 elements apart": False,
        "few such lines": False,
        "reversed": False,
    }
