"""Every schedule of every CUDA C++ reduction kernel gives the bytes of the reference. Needs a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from bikernels import reference
from bikernels.contract import ACCUMULATE
from bikernels.specs import Layout, ReductionSpec
from bikernels.views import Device, View

from .cases import assert_same_bits, draw

pytest.importorskip("cupy", reason='CuPy is not installed; pip install "bikernels[cuda13]"')

from bikernels.backend.cupy import launch, reductions, schedules

OPERATIONS = ("mean", "log_softmax", "softmax")
DTYPES = (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("float64", "float64"))
CASTS = (("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float64"))
ROWS = ((1, 1), (9, 7), (70, 24), (5, 100), (3, 257), (6, 2048), (4, 2049), (3, 9000), (2, 33000), (2, 152000))
"""Rows and their length."""
COLUMNS = ((13, 1), (24, 40), (2056, 8), (64, 300), (72, 2100), (33, 5000), (8, 9001), (16, 66000))
"""Columns and their length. Some are whole vectors side by side and some are not."""


class Case(NamedTuple):
    """Rows (the last axis) or columns (the first) of an array, and what the reference makes of them."""

    x: np.ndarray
    expected: np.ndarray
    in_columns: bool


@functools.cache
def cases(operation: str, dtype: str, out_dtype: str) -> list[Case]:
    rng, made = np.random.default_rng(9), []
    for in_columns, shapes in ((False, ROWS), (True, COLUMNS)):
        for count, n in shapes:
            x = draw(rng, (count, n), dtype, "wide")
            x[count // 2] = draw(rng, (n,), dtype, "special")
            x[0, n // 3] = -np.inf
            if n > 20:
                x[-1, ::7] = x[-1].max()
            if in_columns:
                x = np.asfortranarray(x)
            made.append(Case(x, getattr(reference, operation)(x, 1, out_dtype), in_columns))
    return made


def spec_of(operation: str, case: Case, x: Any, out: Any) -> ReductionSpec:
    def layout(array: Any) -> Layout:
        return Layout(str(array.dtype), array.shape, tuple(step // array.itemsize for step in array.strides))

    return ReductionSpec(operation, 1, layout(x), layout(out))


def view(array: Any) -> View:
    strides = tuple(step // array.itemsize for step in array.strides)
    return View(array.data.ptr, str(array.dtype), array.shape, strides, Device("cuda", array.device.id), owner=array)


def forced(case: Case, operation: str, element: str, accumulate: str, gpu: launch.GPU) -> Iterator[tuple[str, Any]]:
    """Patches that force each schedule that the case can have, with a name."""
    count, n = case.x.shape
    if case.in_columns:
        vector = schedules.vector_width(element)
        for width in {1, vector if count % vector == 0 else 1}:
            if n <= schedules.MAX_COLUMN_CHUNKS * schedules.SUM_CHUNK:
                for schedule in schedules.column_schedules(n, width, gpu):
                    yield str(schedule), {"choose_column_schedule": schedule, "splits_columns": False}
        if operation == "mean" and n > schedules.SUM_CHUNK:
            yield "chunks", {"splits_columns": lambda columns, length, *rest: length == n}
    else:
        for schedule in schedules.row_schedules(n, schedules.kept(operation, element, accumulate), gpu):
            yield str(schedule), {"choose_row_schedule": schedule, "splits_rows": False}
        if n > schedules.SUM_CHUNK:
            yield "chunks", {"splits_rows": lambda rows, length, *rest: length == n}


def run(backend: Any, operation: str, dtype: str, out_dtype: str) -> int:
    """Compute all cases with all schedules and compare bytes; how many there were."""
    ran, index = 0, backend.xp.cuda.runtime.getDevice()
    accumulate = ACCUMULATE[out_dtype]
    rounds = out_dtype in ("bfloat16", "float16") and dtype != out_dtype
    element = schedules.element_of(dtype, accumulate, rounds)
    for case in cases(operation, dtype, out_dtype):
        x = backend.put(case.x.T).T if case.in_columns else backend.put(case.x)
        for name, patches in forced(case, operation, element, accumulate, launch.gpu(index)):
            poison = np.full_like(case.expected, 7)
            is_transposed = case.in_columns and poison.ndim > 1
            out = backend.put(poison.T).T if is_transposed else backend.put(poison)
            with mock.patch.multiple(
                schedules,
                **{
                    function: value if callable(value) else functools.partial(_answer, value)
                    for function, value in patches.items()
                },
            ):
                reductions.prepare(spec_of(operation, case, x, out), Device("cuda", index))(view(out), view(x))
            assert_same_bits(backend.get(out), case.expected, f"{case.x.shape}, columns {case.in_columns}, {name}")
            ran += 1
    return ran


def _answer(value: Any, *arguments: Any) -> Any:
    return value


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES + CASTS)
def test_bytes(backend: Any, operation: str, dtype: str, out_dtype: str) -> None:
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    assert run(backend, operation, dtype, out_dtype) >= 20


# ------------------------------------------------------------------------------------------------------- without a GPU

H100 = launch.GPU("H100", (9, 0), 132, 232_448)
A100 = launch.GPU("A100", (8, 0), 108, 166_912)


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("element", [*schedules.ELEMENTS, schedules.ANY])
def test_chosen_schedules_fit(gpu: launch.GPU, operation: str, element: str) -> None:
    accumulate = ACCUMULATE.get(element, "float64")
    of = schedules.kept(operation, element, accumulate)
    for rows in (1, 8, 64, 1000, 65536):
        for n in (0, 1, 2, 8, 9, 100, 256, 257, 2048, 2049, 4096, 32000, 50257, 151936, 262144, 600_000):
            chosen = schedules.choose_row_schedule(rows, n, of, gpu)
            if chosen is None:
                assert n > 32 * schedules.SUM_CHUNK or gpu is A100
                continue
            assert of.bytes(chosen, n) <= gpu.shared_bytes
            assert chosen.ctas == 1 or (gpu is H100 and chosen.team == schedules.CLUSTER)
            threads = chosen.lanes if chosen.team == schedules.LANES else 32 * chosen.warps * chosen.ctas
            assert threads * chosen.rounds(n) * 64 >= n or chosen.lanes * 8 >= n
            for width in {1, schedules.vector_width(element)}:
                one = schedules.choose_column_schedule(rows, n, width, gpu)
                assert one.groups * 8 >= min(n, schedules.SUM_LANES)
                assert one.threads % one.groups == 0
                if schedules.chunks_of(n) <= schedules.MAX_COLUMN_CHUNKS:
                    assert one.bytes(n, accumulate) <= 48 * 1024
