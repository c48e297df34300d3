"""Every schedule of every CUDA C++ reduction kernel gives the bytes of the reference. Needs a GPU."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

from bikernels import reference
from bikernels.contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from bikernels.dtypes import NUMPY_DTYPE
from bikernels.specs import REDUCTIONS, Layout, ReductionSpec
from bikernels.views import Device

from .cases import assert_same_bits, draw, rows_to_reduce

pytest.importorskip("cupy", reason='CuPy is not installed; pip install "bikernels[cuda13]"')

from bikernels.backend.cupy import column_schedules, launch, parameters, reduction_operations, reductions, row_schedules
from bikernels.backend.cupy.row_schedules import ANYWHERE, WHOLE_VECTORS, Steps

DTYPES = (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float32"), ("float64", "float64"))
CASTS = (("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float64"))
ROWS = (
    (1, 1),
    (9, 7),
    (70, 24),
    (300, 100),
    (13, 257),
    (13, 512),
    (13, 2048),
    (13, 2049),
    (13, 9001),
    (9, 16384),
    (9, 32000),
    (9, 33_004),
    (7, 152000),
    (6, 262_200),
)
"""Rows and their length. Of odd ones, rows begin anywhere in a vector."""
COLUMNS = ((13, 1), (40, 1), (24, 40), (2056, 8), (64, 300), (72, 2100), (33, 5000), (8, 9001), (16, 66000))
"""Columns and their length. Some are whole vectors side by side and some are not."""
LENGTHS = (0, 1, 2, 8, 9, 100, 256, 257, 2048, 2049, 4096, 16384, 32000, 50257, 151936, 262144, 600_000, 10_000_000)
"""Of rows and columns that schedules are chosen for."""
CORRECTION, EPS = 1.0, 1e-3
NOT_ALIGNED = (ANYWHERE, Steps(1, False))
"""How rows lie that begin anywhere in a vector: all arrays alike, or not."""


class Case(NamedTuple):
    """Rows (the last axis) or columns (the first) of arrays, and what the reference makes of them."""

    operands: dict[str, np.ndarray]
    """By their names in the spec, of two dimensions; of length 1 where they are broadcast."""
    expected: dict[str, np.ndarray]
    """The results, by their names in the spec."""
    in_columns: bool


@functools.cache
def cases(operation: str, dtype: str, out_dtype: str, most: float = np.inf) -> list[Case]:
    """Those of rows and columns that have no more elements than that."""
    return [
        case(rng, operation, rows_to_reduce(rng, operation, shape, dtype), out_dtype, in_columns)
        for in_columns, shapes in ((False, ROWS), (True, COLUMNS))
        for shape in shapes
        for rng in [np.random.default_rng(shape)]
        if shape[0] * shape[1] <= most
    ]


def case(
    rng: np.random.Generator,
    operation: str,
    x: np.ndarray,
    out_dtype: str,
    in_columns: bool,
    grad_rows: int | None = None,
) -> Case:
    """Of this x; the gradient has as many rows as x, or one for all."""
    (count, n), dtype = x.shape, str(x.dtype)
    compute = functools.partial(getattr(reference, operation), dtype=out_dtype)
    grad, weight, bias = (draw(rng, shape, dtype) for shape in ((grad_rows or count, n), (1, n), (1, n)))
    statistics_dtype = NUMPY_DTYPE[ACCUMULATE[out_dtype]]
    if operation in ("var", "std"):
        return Case({"x": x}, {"out": compute(x, 1, correction=CORRECTION)}, in_columns)
    if operation in ("rms_norm", "layer_norm"):
        names = ("out", "rstd") if operation == "rms_norm" else ("out", "mean", "rstd")
        operands = {"weight": weight} if operation == "rms_norm" else {"weight": weight, "bias": bias}
        compute = functools.partial(getattr(reference, f"{operation}_with_statistics"), dtype=out_dtype)
        results = compute(x, *(operand[0] for operand in operands.values()), kept=1, eps=EPS)
        return Case({"x": x} | operands, dict(zip(names, results, strict=True)), in_columns)
    if operation in ("softmax_backward", "log_softmax_backward"):
        return Case({"x": x, "grad": grad}, {"out": compute(np.broadcast_to(grad, x.shape), x, 1)}, in_columns)
    is_of_weight = operation.endswith("weight_backward")
    if operation.endswith("norm_backward") or is_of_weight:
        shape = (1, n) if is_of_weight else (count, 1)
        names = ("rstd",) if operation.startswith("rms") else ("mean", "rstd")
        of_rows = {name: abs(rng.standard_normal(shape)).astype(statistics_dtype) for name in names}
        if is_of_weight:  # the reference has the batch first
            statistics = (of_rows[name].T for name in names)
            expected = compute(np.broadcast_to(grad, x.shape).T, x.T, *statistics, kept=1)
            return Case({"x": x, "grad": grad} | of_rows, {"out": expected}, in_columns)
        expected = compute(grad, x, *of_rows.values(), weight[0], kept=1)
        return Case({"x": x, "grad": grad, "weight": weight} | of_rows, {"out": expected}, in_columns)
    return Case({"x": x}, {"out": compute(x, 1)}, in_columns)


def spec_of(operation: str, shape: tuple[int, ...], arrays: dict[str, Any]) -> ReductionSpec:
    def layout(array: Any) -> Layout:
        steps = [step // array.itemsize for step in array.strides]
        if array.ndim == 1:
            return Layout(str(array.dtype), shape[:1], tuple(steps))
        strides = (step if length > 1 else 0 for step, length in zip(steps, array.shape, strict=True))
        return Layout(str(array.dtype), shape, tuple(strides))

    layouts = {name: layout(array) for name, array in arrays.items()}
    for name in ("mean", "rstd"):  # a result has one dimension, and is broadcast along rows
        if name in layouts and len(layouts[name].shape) == 1:
            layouts[name] = Layout(layouts[name].dtype, shape, (*layouts[name].strides, 0))
    return ReductionSpec(operation, 1, correction=CORRECTION, eps=EPS, **layouts)


def forced(case: Case, operation: str, element: str, out_dtype: str, gpu: launch.GPU) -> Iterator[tuple[str, Any]]:
    """Patches that force each schedule that the case can have, with a name."""
    count, n = case.operands["x"].shape
    accumulate = ACCUMULATE[out_dtype]
    no_registers = {"choose_register_schedule": None}
    elsewhere = no_registers | {
        "choose_ring_schedule": None,
        "choose_long_schedule": None,
        "choose_softmax_schedule": None,
        "choose_tall_schedule": None,
        "choose_spread_schedule": None,
    }
    if case.in_columns and operation in reduction_operations.COLUMN_OPERATIONS:
        vector = reduction_operations.vector_width(element)
        for width in {1, vector if count % vector == 0 else 1}:
            if width > 1:
                for keeps in (False, True) if column_schedules.PASSES[operation] > 1 else (False,):
                    for tiles in column_schedules.tile_schedules(n, element, operation, gpu, keeps):
                        patches = elsewhere | {"choose_tile_schedule": tiles, "splits_columns": False}
                        yield str(tiles), patches | {"choose_columns": column_schedules.TILES}
                    if column_schedules.PASSES[operation] > 1:
                        for tiles in column_schedules.spread_schedules(n, element, operation, gpu, keeps):
                            for most in (1, 2):  # teams, of which each takes tile after tile
                                patches = elsewhere | {
                                    "choose_spread_schedule": tiles,
                                    "choose_columns": column_schedules.TILES,
                                }
                                yield f"{tiles}, {most}", patches | {"teams": functools.partial(min, most)}
                for tall in column_schedules.tall_schedules(n, element, operation, gpu):
                    for most in (1, 2):
                        patches = elsewhere | {"choose_tall_schedule": tall, "choose_columns": column_schedules.TILES}
                        yield f"{tall}, {most}", patches | {"teams": functools.partial(min, most)}
            elif (
                operation in reduction_operations.SINGLE_COLUMN_OPERATIONS
                and reduction_operations.chunks_of(n) <= column_schedules.MAX_COLUMN_CHUNKS
            ):
                for column_schedule in column_schedules.column_schedules(n, gpu):
                    patches = elsewhere | {"choose_column_schedule": column_schedule, "splits_columns": False}
                    yield str(column_schedule), patches | {"choose_columns": column_schedules.SINGLY}
            if operation in reduction_operations.WEIGHT_GRADIENTS and element != parameters.ANY:
                for name, patches in forced_weight_schedules(n, element, width, gpu):
                    yield name, elsewhere | patches
        if n <= SUM_LANES and element != parameters.ANY:
            yield "short", elsewhere | {"choose_columns": column_schedules.SHORT, "splits_columns": False}
            if operation in column_schedules.SHORT_TILE_OPERATIONS and count % vector == 0:
                yield (
                    "short tiles",
                    elsewhere | {"choose_columns": column_schedules.SHORT_TILES, "splits_columns": False},
                )
        if operation in reduction_operations.TERMS and n > SUM_CHUNK:
            yield "chunks", elsewhere | {"splits_columns": lambda name, columns, length, *rest: length == n}
    if not (case.in_columns and operation in reduction_operations.SINGLE_COLUMN_OPERATIONS):
        elsewhere["choose_columns"] = column_schedules.SINGLY
        if operation in row_schedules.REGISTER_OPERATIONS and element in reduction_operations.ELEMENTS:
            # Where the layout does not allow them, another kernel is taken.
            steps = Steps(math.gcd(n, 16)), Steps(math.gcd(n, 16), False)
            found = (row_schedules.register_schedules(operation, n, element, one) for one in steps)
            for register_schedule in dict.fromkeys(itertools.chain(*found)):
                yield str(register_schedule), {"choose_register_schedule": register_schedule}
        has_whole_vectors = n % reduction_operations.vector_width(element) == 0
        for is_narrow in (False, True) if has_whole_vectors else (True,):  # the kernels for any rows take those, too
            found = row_schedules.long_schedules(operation, n, element, is_narrow, gpu)
            for long_schedule in [] if case.in_columns else found:
                for teams in (1, count):  # one that takes row after row, or one for each
                    patches = no_registers | {"choose_long_schedule": long_schedule, "teams": teams}
                    yield f"{long_schedule}, {teams}", patches
        for softmax in [] if case.in_columns else row_schedules.softmax_schedules(operation, n, element, gpu):
            for teams in (1, count):
                yield f"{softmax}, {teams}", no_registers | {"choose_softmax_schedule": softmax, "teams": teams}
        for schedule in row_schedules.row_schedules(n, row_schedules.kept(operation, element, accumulate), gpu):
            yield str(schedule), elsewhere | {"choose_row_schedule": schedule, "splits_rows": False}
        if operation not in reduction_operations.SPLIT:
            yield "streaming", elsewhere | {"choose_row_schedule": None}
        elif n > SUM_CHUNK:
            yield "chunks", elsewhere | {"splits_rows": lambda rows, length, *rest: length == n}
        if not case.in_columns and row_schedules.has_ring_kernel(operation, element, out_dtype):
            for ring_schedule in row_schedules.ring_schedules(operation, n, ITEMSIZE[element], gpu):
                for teams in (1, count):  # one that takes row after row, or one for each
                    yield (
                        f"{ring_schedule}, {teams}",
                        elsewhere | {"choose_ring_schedule": ring_schedule, "teams": teams},
                    )


def forced_weight_schedules(n: int, element: str, width: int, gpu: launch.GPU) -> Iterator[tuple[str, Any]]:
    """Patches that force each schedule of weight_tiles.cu, with a name."""
    for schedule in (
        column_schedules.weight_schedules(n, element, width, gpu) if n <= column_schedules.WEIGHT_ROWS else ()
    ):
        patches = {
            "choose_columns": column_schedules.WEIGHT_TILES,
            "choose_weight_schedule": schedule,
            "splits_columns": False,
        }
        for most in (1, 2) if schedule.streams else (1,):  # CTAs, of which each takes tile after tile
            yield f"{schedule}, {most}", patches | {"teams": functools.partial(min, most)}


def run(backend: Any, operation: str, dtype: str, out_dtype: str) -> int:
    """Compute all cases with all schedules and compare bytes; how many there were."""
    ran, index = 0, backend.xp.cuda.runtime.getDevice()
    accumulate = ACCUMULATE[out_dtype]
    rounds = ITEMSIZE[out_dtype] == 2 and dtype != out_dtype and not operation.endswith("backward")
    element = reduction_operations.element_of(dtype, accumulate, rounds)
    for case in cases(operation, dtype, out_dtype):

        def put(x: np.ndarray, is_transposed: bool = case.in_columns) -> Any:
            return backend.put(x.T).T if is_transposed and x.ndim > 1 else backend.put(x)

        operands = {name: put(operand) for name, operand in case.operands.items()}
        for name, patches in forced(case, operation, element, out_dtype, launch.gpu(index)):
            results = {key: put(np.full_like(expected, 7)) for key, expected in case.expected.items()}
            arrays = operands | results
            launch_with(backend, operation, case, arrays, patches)
            for key, expected in case.expected.items():
                message = f"{key} of {case.operands['x'].shape}, columns {case.in_columns}, {name}"
                assert_same_bits(backend.get(results[key]), expected, message)
            ran += 1
    return ran


def launch_with(backend: Any, operation: str, case: Case, arrays: dict[str, Any], patches: dict[str, Any]) -> None:
    """Compute a case, of which these are the arrays, with functions that choose schedules answering so."""
    spec = spec_of(operation, case.operands["x"].shape, arrays)
    order = ("out", "x", *(side for side in reductions.SIDES if side in arrays))
    answers = {function: _answering(value) for function, value in patches.items()}
    with contextlib.ExitStack() as patched:
        for function, answer in answers.items():
            patched.enter_context(mock.patch.object(module_of(function), function, answer))
        compute = reductions.prepare(spec, Device("cuda", backend.xp.cuda.runtime.getDevice()))
    compute(0, *(arrays[key].data.ptr for key in order))


def module_of(function: str) -> ModuleType:
    """The one that a function which chooses schedules is written in."""
    modules = (reduction_operations, row_schedules, column_schedules)
    return next(one for one in modules if getattr(getattr(one, function, None), "__module__", "") == one.__name__)


def _answering(value: Any) -> Callable[..., Any]:
    return value if callable(value) else lambda *arguments: value


@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES + CASTS)
def test_bytes(backend: Any, operation: str, dtype: str, out_dtype: str) -> None:
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    assert run(backend, operation, dtype, out_dtype) >= 20


@pytest.mark.parametrize("operation", sorted(row_schedules.REGISTER_OPERATIONS))
@pytest.mark.parametrize("dtype", reduction_operations.ELEMENTS)
def test_rows_beside_vectors(backend: Any, operation: str, dtype: str) -> None:
    """Rows in registers whose length and distance are whole vectors, and whose addresses are not."""
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    rng, gpu = np.random.default_rng(9), launch.gpu(backend.xp.cuda.runtime.getDevice())
    for n in (1, 2, 16, 256, 1000, 2048, 16400):
        made = case(rng, operation, draw(rng, (5, n), dtype, "wide"), dtype, False)
        for schedule in schedules_of(operation, n, dtype, (WHOLE_VECTORS, *NOT_ALIGNED)):
            compare_beside_vectors(backend, operation, made, {"choose_register_schedule": schedule}, str(schedule))
    for n, is_narrow in ((8200, False), (8200, True), (8193, True), (10_239, True)):
        made = case(rng, operation, draw(rng, (5, n), dtype, "wide"), dtype, False)
        for long_schedule in row_schedules.long_schedules(operation, n, dtype, is_narrow, gpu):
            patches = {"choose_register_schedule": None, "choose_long_schedule": long_schedule, "teams": 2}
            compare_beside_vectors(backend, operation, made, patches, f"{n}, {long_schedule}")
    for softmax in row_schedules.softmax_schedules(operation, 8200, dtype, gpu):
        made = case(rng, operation, rows_to_reduce(rng, operation, (5, 8200), dtype), dtype, False)
        patches = {"choose_register_schedule": None, "choose_softmax_schedule": softmax, "teams": 2}
        compare_beside_vectors(backend, operation, made, patches, str(softmax))


def schedules_of(operation: str, n: int, dtype: str, steps: tuple[Steps, ...]) -> list[row_schedules.RegisterSchedule]:
    """Those of rows in registers that lie in any of these ways."""
    found = (row_schedules.register_schedules(operation, n, dtype, one) for one in steps)
    return list(dict.fromkeys(itertools.chain(*found)))


@pytest.mark.parametrize("operation", sorted(row_schedules.REGISTER_OPERATIONS))
@pytest.mark.parametrize("dtype", reduction_operations.ELEMENTS)
def test_rows_that_begin_anywhere(backend: Any, operation: str, dtype: str) -> None:
    """Rows in registers of any length, of arrays that begin at one place of a vector or at several."""
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    rng = np.random.default_rng(9)
    starts = ((1,) * 5, (6,) * 5, (0, 1, 2, 3, 4), (5, 5, 0, 7, 2))
    for n in (9, 100, 101, 257, 1001, 1016, 1021, 2047, 5001, 8189):
        made = case(rng, operation, draw(rng, (5, n), dtype, "wide"), dtype, False)
        for schedule in schedules_of(operation, n, dtype, (Steps(math.gcd(n, 16)), *NOT_ALIGNED)):
            for before in starts if n < 2 * SUM_CHUNK else starts[1:3]:
                patches = {"choose_register_schedule": schedule}
                compare_beside_vectors(backend, operation, made, patches, f"{n}, {schedule}, {before}", before)


@pytest.mark.parametrize("operation", sorted(reduction_operations.COLUMN_GRADIENTS))
@pytest.mark.parametrize("dtype", reduction_operations.ELEMENTS)
def test_columns_beside_other_gradients(backend: Any, operation: str, dtype: str) -> None:
    """Gradients and results that do not lie as x does, and statistics with a step."""
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    gpu = launch.gpu(backend.xp.cuda.runtime.getDevice())

    def along_rows(x: np.ndarray) -> Any:
        return backend.put(x)

    def beside_vectors(x: np.ndarray) -> Any:
        return backend.put(place_of(x.T))[:, 1:-7].T if x.ndim > 1 else backend.put(x)

    for n in (200, 2100):
        rng = np.random.default_rng(n)
        ways: dict[str, dict[str, Any]] = {}
        for keeps in (False, True) if column_schedules.PASSES[operation] > 1 else (False,):
            tiles = column_schedules.tile_schedules(n, dtype, operation, gpu, keeps)[0]
            ways[str(tiles)] = {
                "choose_columns": column_schedules.TILES,
                "choose_tile_schedule": tiles,
                "splits_columns": False,
            }
        if n <= SUM_LANES:
            ways["short"] = {"choose_columns": column_schedules.SHORT, "splits_columns": False}
        elif operation in reduction_operations.TERMS:
            ways["chunks"] = {"splits_columns": lambda name, columns, length, *rest, n=n: length == n}
        if n <= column_schedules.WEIGHT_ROWS and operation in reduction_operations.WEIGHT_GRADIENTS:
            width = reduction_operations.vector_width(dtype)
            for name, patches in forced_weight_schedules(n, dtype, width, gpu):
                ways[f"weight tiles, {name}"] = patches
        x = rows_to_reduce(rng, operation, (48, n), dtype)
        of_all = case(rng, operation, x, dtype, True)
        of_one = case(rng, operation, x, dtype, True, 1)
        for made, put in ((of_all, along_rows), (of_all, beside_vectors), (of_one, along_rows)):
            operands = {"x": backend.put(made.operands["x"].T).T, "grad": put(made.operands["grad"])}
            for name in ("mean", "rstd"):
                if name in made.operands:
                    operands[name] = backend.put(np.repeat(made.operands[name], 2, axis=1))[:, ::2]
            for way, patches in ways.items():
                if way.startswith("weight tiles") and put is along_rows:
                    continue  # that kernel reads gradients that lie as x does
                out = put(np.full_like(made.expected["out"], 7))
                launch_with(backend, operation, made, operands | {"out": out}, patches)
                message = f"columns of {n}, {put.__name__}, {way}"
                assert_same_bits(np.ascontiguousarray(backend.get(out)), made.expected["out"], message)


@pytest.mark.parametrize("operation", sorted(reduction_operations.WEIGHT_GRADIENTS))
@pytest.mark.parametrize("dtype", reduction_operations.ELEMENTS)
def test_gradients_of_few_weights(backend: Any, operation: str, dtype: str) -> None:
    """Fewer columns than lie across threads elsewhere, a single one, and those that come in no whole vectors."""
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    gpu = launch.gpu(backend.xp.cuda.runtime.getDevice())
    for columns, n in itertools.product((1, 2, 7, 33), (1, 3, 16, 256, 257, 512)):
        rng = np.random.default_rng((columns, n))
        made = case(rng, operation, rows_to_reduce(rng, operation, (columns, n), dtype), dtype, True)
        operands = {name: backend.put(operand.T).T for name, operand in made.operands.items()}
        for name, patches in (("chosen", {}), *forced_weight_schedules(n, dtype, 1, gpu)):
            out = backend.put(np.full_like(made.expected["out"], 7))
            launch_with(backend, operation, made, operands | {"out": out}, patches)
            assert_same_bits(backend.get(out), made.expected["out"], f"{columns} columns of {n}, {name}")


@pytest.mark.parametrize("dtype", reduction_operations.ELEMENTS)
def test_variances_of_columns_beside_vectors(backend: Any, dtype: str) -> None:
    """Columns that lie side by side, of which the first begins an element behind a vector."""
    if backend.name != "cupy":
        pytest.skip("the schedules are those of the backend 'cupy'")
    rng, gpu, n = np.random.default_rng(9), launch.gpu(backend.xp.cuda.runtime.getDevice()), 2100
    made = case(rng, "var", rows_to_reduce(rng, "var", (48, n), dtype), dtype, True)
    x, expected = backend.put(place_of(made.operands["x"].T))[:, 1:-7].T, made.expected["out"]
    kinds = {
        "choose_tile_schedule": [
            column_schedules.tile_schedules(n, dtype, "var", gpu, keeps)[0] for keeps in (False, True)
        ],
        "choose_spread_schedule": column_schedules.spread_schedules(n, dtype, "var", gpu, True)[:1],
        "choose_tall_schedule": column_schedules.tall_schedules(n, dtype, "var", gpu),
    }
    others = dict.fromkeys(kinds, None) | {"choose_columns": column_schedules.TILES}
    for function, found in kinds.items():
        for schedule in found:
            out = backend.put(np.full_like(expected, 7))
            launch_with(backend, "var", made, {"x": x, "out": out}, others | {function: schedule})
            assert_same_bits(backend.get(out), expected, str(schedule))


def compare_beside_vectors(
    backend: Any,
    operation: str,
    made: Case,
    patches: dict[str, Any],
    message: str,
    starts: Sequence[int] = (1,) * 5,
) -> None:
    """Compute a case whose arrays begin so many elements behind a vector, the first results and then the operands, and
    look at what lies beside the results.
    """
    places = itertools.cycle(starts)
    before = {name: next(places) for name in (*made.expected, *made.operands)}
    ends = {
        name: backend.put(np.zeros(place_of(array, before[name]).shape, array.dtype))
        for name, array in made.expected.items()
    }
    arrays = {name: backend.put(place_of(array, before[name])) for name, array in made.operands.items()} | ends
    arrays = {name: array[..., before[name] : array.shape[-1] - 8 + before[name]] for name, array in arrays.items()}
    launch_with(backend, operation, made, arrays, patches)
    for name, expected in made.expected.items():
        written, first = backend.get(ends[name]), before[name]
        last = written.shape[-1] - 8 + first
        assert_same_bits(np.ascontiguousarray(written[..., first:last]), expected, f"{name}, {message}")
        assert not written[..., :first].any()
        assert not written[..., last:].any()


def place_of(array: np.ndarray, before: int = 1) -> np.ndarray:
    """The array among zeros, of which so many are in front of each row, and eight with those behind."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(before, 8 - before)])


# ------------------------------------------------------------------------------------------------------- without a GPU

H100 = launch.GPU("H100", (9, 0), 132, 232_448, 3.35e6)
A100 = launch.GPU("A100", (8, 0), 108, 166_912, 2.04e6)


@pytest.mark.parametrize("kept", [(), (4096,)])
def test_rows_of_one_element_are_kept_in_registers(kept: tuple[int, ...]) -> None:
    """The spec has no dimension of them left."""
    x = Layout("bfloat16", kept, (1,) * len(kept))
    for operation in ("log_softmax", "softmax", "mean", "var"):
        rows = reductions._rows_of(ReductionSpec(operation, len(kept), x, x))
        assert (rows.n, rows.fits_registers, rows.in_columns) == (1, True, bool(kept))
        shape = rows.number, rows.n, rows.element, rows.steps
        assert row_schedules.choose_register_schedule(operation, *shape, H100) is not None


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_cases_show_the_order(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree in which all elements are moved by a place changes bytes: of rows and of columns, short ones and long."""
    expected, tree_sum = cases(operation, "float32", "float32", MOST), reference.tree_sum
    monkeypatch.setattr(reference, "tree_sum", lambda rows: tree_sum(np.pad(rows, ((0, 0), (1, 0)))))
    noticed = {
        (one.in_columns, one.operands["x"].shape[1] > SUM_CHUNK)
        for one, moved in zip(expected, cases.__wrapped__(operation, "float32", "float32", MOST), strict=True)
        if any(moved.expected[name].tobytes() != result.tobytes() for name, result in one.expected.items())
    }
    assert len(noticed) == 4


MOST = 2**18
"""Elements that the reference computes soon enough."""


@pytest.mark.parametrize("gpu", [H100, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("operation", REDUCTIONS)
@pytest.mark.parametrize("element", [*reduction_operations.ELEMENTS, parameters.ANY])
def test_chosen_schedules_fit(gpu: launch.GPU, operation: str, element: str) -> None:
    accumulate = ACCUMULATE.get(element, "float64")
    of = row_schedules.kept(operation, element, accumulate)
    for rows in (1, 8, 64, 1000, 65536):
        for n in LENGTHS:
            chosen = row_schedules.choose_row_schedule(rows, n, of, gpu)
            if chosen is None:
                assert n * of.element[row_schedules.CTA] > 100_000 or n > 4_000_000
                chosen = row_schedules.streaming_schedule(gpu)
            assert of.bytes(chosen, n) <= gpu.shared_bytes
            assert chosen.ctas == 1 or (gpu is H100 and chosen.team == row_schedules.CLUSTER)
            if chosen.team == row_schedules.LANES:
                assert chosen.lanes * chosen.octets * 8 >= min(n, 256)
            else:
                assert chosen.warps * chosen.ctas * chosen.rounds(n) * SUM_CHUNK >= n
            if element in reduction_operations.ELEMENTS and operation in row_schedules.REGISTER_OPERATIONS:
                for steps in (WHOLE_VECTORS, *NOT_ALIGNED):
                    held = row_schedules.choose_register_schedule(operation, rows, n, element, steps, gpu)
                    is_sum = operation in reduction_operations.SUMS and steps == WHOLE_VECTORS
                    assert (held is not None) == (0 < n <= (16384 if is_sum else 8192)) or (n > 8192 and not is_sum)
                    if held is not None:
                        lanes = held.threads if held.spread else held.lanes
                        beside = held.width - 1 if held.layout == "Shifted" else 0
                        assert lanes * held.width * held.groups * held.steps >= n + beside
                        assert 32 % held.lanes == 0 and held.threads <= 512
                for is_narrow in (False, True):
                    long = row_schedules.choose_long_schedule(operation, rows, n, element, is_narrow, gpu)
                    if long is None:
                        continue
                    parts = row_schedules.long_parts(operation, element)
                    assert gpu is H100 and long.bytes(operation, n, element) <= gpu.shared_bytes
                    assert long.warps <= row_schedules.long_warps(operation, element, is_narrow)
                    assert long.is_narrow == is_narrow and long.threads <= 1024
                    assert long.ctas <= reduction_operations.MOST_CTAS
                    chunks = long.warps // parts * long.ctas
                    assert chunks * SUM_CHUNK >= n and row_schedules.long_bits(n) <= 3 - (parts > 1)
                softmax = row_schedules.choose_softmax_schedule(operation, rows, n, element, gpu)
                if softmax is not None:
                    assert gpu is H100 and ITEMSIZE[element] == 2 and softmax.bytes(operation) <= gpu.shared_bytes
                    assert softmax.threads <= softmax.most_threads and rows * softmax.ctas > 100
                    assert softmax.warps * softmax.ctas * row_schedules.SOFTMAX_CHUNKS * SUM_CHUNK >= n
            is_short = 0 < n <= column_schedules.MAX_TILE_CHUNKS * SUM_CHUNK
            if is_short and element != parameters.ANY and operation in column_schedules.PASSES:
                tiles = column_schedules.choose_tile_schedule(rows, n, element, operation, gpu)
                assert tiles in column_schedules.tile_schedules(n, element, operation, gpu, tiles.keeps)
                assert tiles.ctas <= tiles.parts * reduction_operations.chunks_of(n)
                assert tiles.ctas <= (reduction_operations.MOST_CTAS if gpu is H100 else 1)
                spread = column_schedules.choose_spread_schedule(rows, n, element, operation, gpu)
                if spread is not None:
                    assert spread in column_schedules.spread_schedules(n, element, operation, gpu, spread.keeps)
                    assert spread.ctas <= min(spread.parts * reduction_operations.chunks_of(n), 3 * gpu.multiprocessors)
                    assert spread.bytes(n, ACCUMULATE[element]) <= gpu.shared_bytes
                tall = column_schedules.choose_tall_schedule(rows, n, element, operation, gpu)
                if tall is not None:
                    assert gpu is H100 and tall in column_schedules.tall_schedules(n, element, operation, gpu)
                    assert tall.bytes <= gpu.shared_bytes and tall.ctas <= gpu.multiprocessors
                    assert tall.ctas // tall.parts * SUM_CHUNK >= n
                    assert tall.groups * (column_schedules.TALL_WORD_BYTES // tall.itemsize) >= tall.ctas
            short = column_schedules.short_schedule(rows, n)
            assert short.groups * reduction_operations.GROUP_LANES >= min(n, SUM_LANES)
            assert n > SUM_LANES or short.threads <= column_schedules.SHORT_THREADS
            if 0 < n <= column_schedules.WEIGHT_ROWS and element != parameters.ANY:
                for width in {1, reduction_operations.vector_width(element)}:
                    weight = column_schedules.choose_weight_schedule(rows, n, element, width, gpu)
                    assert weight in column_schedules.weight_schedules(n, element, width, gpu)
                    assert weight.groups * column_schedules.WEIGHT_AT_ONCE >= n and weight.threads % 32 == 0
                    assert weight.streams or weight.bytes(element) <= 48 * 1024
                    assert weight.resident(element, gpu) >= gpu.multiprocessors
            itemsize = ITEMSIZE.get(element, 8)
            shape = rows, n, operation, itemsize
            ring = row_schedules.choose_ring_schedule(*shape, False, gpu) if itemsize <= 4 else None
            if ring is not None:
                assert gpu is H100 and ring.bytes(n, itemsize) <= gpu.shared_bytes
                assert ring.warps * ring.ctas * ring.rounds * SUM_CHUNK >= n
                resident = ring.resident_ctas(operation, n, itemsize)
                assert 0 < ring.threads <= resident * ring.threads <= row_schedules.ring_threads(operation, itemsize)
                assert ring.slots > 1 or ring.ctas == 1 or rows * ring.ctas <= gpu.multiprocessors * resident
            one = column_schedules.choose_column_schedule(rows, n, gpu)
            assert one.groups * 8 >= min(n, SUM_LANES)
            assert one.tile * one.groups == column_schedules.COLUMN_THREADS
            if reduction_operations.chunks_of(n) <= column_schedules.MAX_COLUMN_CHUNKS:
                assert one.bytes(n, accumulate) <= 48 * 1024


def test_few_long_columns_are_spread() -> None:
    few = column_schedules.choose_spread_schedule(16, 262_144, "bfloat16", "var", H100)
    assert few is not None and few.keeps and few.ctas > reduction_operations.MAX_CTAS
    many = column_schedules.choose_spread_schedule(256, 262_144, "float32", "var", H100)
    assert many is not None and not many.keeps  # which read them twice
    for columns, n, operation in ((4096, 262_144, "var"), (16, 2048, "softmax"), (16, 262_144, "mean")):
        assert column_schedules.choose_spread_schedule(columns, n, "bfloat16", operation, H100) is None


def test_long_columns_are_read_once_for_variances() -> None:
    """However many there are, if there is much to read."""
    for element in reduction_operations.ELEMENTS:
        for columns, n in ((65536, 4096), (4096, 16384), (4096, 65536), (256, 262_144)):
            chosen = column_schedules.choose_tall_schedule(columns, n, element, "var", H100)
            assert chosen is not None and chosen.vectors * 16 >= 64
            assert column_schedules.choose_tall_schedule(columns, n, element, "softmax", H100) is None
            assert column_schedules.choose_tall_schedule(columns, n, element, "var", A100) is None
        assert column_schedules.choose_tall_schedule(16, 4096, element, "var", H100) is None
        assert column_schedules.choose_tall_schedule(65536, 1024, element, "var", H100) is None


def test_tall_columns_meet_in_little_memory() -> None:
    """Columns of a view that overlaps itself may be many more than memory holds."""
    dense, overlapping = 2**20, 2**27
    for element in reduction_operations.ELEMENTS:
        assert column_schedules.choose_tall_schedule(dense, 4096, element, "var", H100) is not None
        assert column_schedules.choose_tall_schedule(overlapping, 4096, element, "var", H100) is None


def test_long_rows_go_to_the_ring() -> None:
    chosen = row_schedules.choose_ring_schedule(8192, 32000, "log_softmax", 2, True, H100)
    assert chosen is not None and chosen.slots > 1
    assert row_schedules.choose_ring_schedule(8192, 32000, "log_softmax", 2, True, A100) is None
    kept = row_schedules.choose_ring_schedule(8192, 32000, "softmax", 2, True, H100)
    assert kept is not None and kept.kept_steps * SUM_LANES == SUM_CHUNK
    pair = row_schedules.choose_ring_schedule(64, 151936, "softmax", 2, True, H100)
    assert pair is not None and (pair.ctas, pair.slots) == (2, 1)
    largest = row_schedules.choose_ring_schedule(256, 262_144, "softmax", 4, True, H100)
    assert largest is not None and largest.ctas > launch.PORTABLE_CTAS
    assert row_schedules.choose_ring_schedule(8192, 2048, "log_softmax", 2, True, H100) is None
    assert row_schedules.choose_ring_schedule(4096, 50257, "mean", 2, False, H100) is not None
    assert row_schedules.choose_ring_schedule(4096, 50264, "mean", 2, True, H100) is None
    anywhere = row_schedules.choose_ring_schedule(8192, 50257, "log_softmax", 2, False, H100)
    assert anywhere is not None and (anywhere.ctas, anywhere.slots) == (1, 1)


def test_long_rows_of_softmax_are_read_once() -> None:
    """By as few CTAs as have registers and shared memory for them, if rows are not few."""
    for operation, n, ctas in (("softmax", 50264, 1), ("log_softmax", 65536, 1), ("softmax", 151936, 2)):
        chosen = row_schedules.choose_softmax_schedule(operation, 1024, n, "bfloat16", H100)
        assert chosen is not None and chosen.ctas == ctas
        assert row_schedules.choose_softmax_schedule(operation, 8, n, "bfloat16", H100) is None
        assert row_schedules.choose_softmax_schedule(operation, 1024, n, "bfloat16", A100) is None
        assert not row_schedules.softmax_schedules(operation, n, "float32", H100)


def test_rows_in_registers_are_no_more_than_ctas() -> None:
    """Of a view that overlaps itself, there may be more than a launch has CTAs for; those kernels do not walk on."""
    for operation, n in (("sum", 2049), ("var", 2049), ("logsumexp", 16384)):
        for rows, is_held in ((launch.MAX_GRID, True), (launch.MAX_GRID + 1, False)):
            steps = ANYWHERE if n % 8 else WHOLE_VECTORS
            held = row_schedules.choose_register_schedule(operation, rows, n, "bfloat16", steps, H100)
            assert (held is not None) == is_held


def test_gradients_of_weights_over_few_rows() -> None:
    """They have a kernel of their own, if the gradient of the result lies as x does and columns share statistics."""

    def how(
        n: int, grad: tuple[int, int] | None = None, rstd: tuple[int, int] = (0, 1), columns: int = 4096, step: int = 0
    ) -> tuple[bool, str]:
        """Whether it may, and how columns are taken, the rows of x and the gradient so many elements apart."""
        step = step or columns
        x, shape = Layout("bfloat16", (columns, n), (1, step)), (columns, n)
        sides = {"grad": Layout("bfloat16", shape, grad or (1, step)), "rstd": Layout("float32", shape, rstd)}
        spec = ReductionSpec("rms_norm_weight_backward", 1, x, Layout("bfloat16", shape[:1], (1,)), **sides)
        rows = reductions._rows_of(spec)
        return rows.fits_weight_tiles, reductions._choose_columns(rows, spec.operation)

    weight_tiles = (True, column_schedules.WEIGHT_TILES)
    assert {how(n) for n in (1, 16, 256, 512)} == {weight_tiles}
    assert {how(n, columns=columns) for n in (1, 300) for columns in (1, 2, 7, 1001)} == {weight_tiles}
    assert how(300, columns=4096, step=4099) == weight_tiles
    others = how(513), how(300, (0, 0)), how(300, (512, 1)), how(300, (1, 4100)), how(300, rstd=(4096, 1))
    assert set(others) == {(False, column_schedules.TILES)}


def test_ctas_go_on_to_many_tiles_of_weights() -> None:
    choose = column_schedules.choose_weight_schedule
    assert choose(262_144, 256, "float32", 4, H100).streams
    assert choose(262_144, 256, "float32", 4, A100).streams
    assert not choose(262_144, 256, "float32", 1, H100).streams
    assert not choose(4096, 256, "float32", 4, H100).streams


def test_norms_and_gradients_of_long_rows_are_read_once() -> None:
    """By as few CTAs as fill the GPU, or by many if rows are few."""
    choose, largest = row_schedules.choose_long_schedule, {"rms_norm": "float64", "layer_norm": "float64"}
    for operation in (*largest, *row_schedules.REGISTER_BACKWARD):
        for is_narrow in (False, True):
            many, few = (choose(operation, rows, 65536, "float32", is_narrow, H100) for rows in (4096, 1))
            assert many is not None and few is not None and 1 < many.ctas < few.ctas
        most = choose(operation, 256, 262_144, largest.get(operation, "float32"), False, H100)
        assert most is not None and most.ctas > launch.PORTABLE_CTAS
        assert choose(operation, 4096, 65536, "float32", False, A100) is None


def test_long_rows_that_begin_anywhere_are_read_once() -> None:
    """Those of an odd length, and those that are an odd number of elements apart."""
    for operation in sorted(row_schedules.LONG_OPERATIONS):
        for element in reduction_operations.ELEMENTS:
            for n in (30_522, 50_257):
                chosen = row_schedules.choose_long_schedule(operation, 4096, n, element, True, H100)
                assert chosen is not None and chosen.is_narrow
    for n, step, is_whole in ((50_257, 50_257, False), (50_264, 50_264, True), (50_264, 50_265, False)):
        x = Layout("bfloat16", (4096, n), (step, 1))
        rows = reductions._rows_of(ReductionSpec("var", 1, x, Layout("bfloat16", (4096,), (1,))))
        assert rows.fits_registers and rows.has_whole_vectors == is_whole
