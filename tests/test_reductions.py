"""`mean`, `softmax` and `log_softmax` on every backend, in bytes against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, assert_same_bits, by_name, draw, reduction_cases

CASES = by_name(reduction_cases())
OPERATIONS = ("mean", "log_softmax", "softmax")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(backend: Any, name: str) -> None:
    case = CASES[name]
    options = {"axis": -1} | case.options
    assert_same_bits(backend.call(case.operation, *case.arrays, **options), case.expected(), name)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(37, 300), (5, 7, 40), (2, 4500), ()])
def test_layouts(backend: Any, operation: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = draw(rng, shape, dtype)
    for axis in range(x.ndim):
        kept = x.ndim - 1
        expected = getattr(reference, operation)(np.moveaxis(x, axis, -1), kept)
        if operation != "mean":
            expected = np.moveaxis(expected, -1, axis)
        for name, view in backend.layouts(x):
            actual = getattr(bikernels, operation)(view, axis=axis, backend=backend.name)
            assert_same_bits(backend.get(actual), expected, f"axis {axis}, {name}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axes", [None, (), (0,), (1,), (0, 1), (0, 2), (1, 3), (-1, 0), (0, 1, 2, 3)])
def test_mean_of_several_axes(backend: Any, dtype: str, axes: tuple[int, ...] | None, rng: np.random.Generator) -> None:
    x = draw(rng, (3, 5, 70, 4), dtype)
    reduced = tuple(range(4)) if axes is None else tuple(sorted(axis % 4 for axis in axes))
    kept = tuple(axis for axis in range(4) if axis not in reduced)
    expected = reference.mean(np.ascontiguousarray(x.transpose(kept + reduced)), len(kept))
    for name, view in backend.layouts(x):
        actual = backend.get(bikernels.mean(view, axis=axes, backend=backend.name))
        assert_same_bits(actual, expected, name)
        kept_dims = backend.get(bikernels.mean(view, axis=axes, keepdims=True, backend=backend.name))
        assert kept_dims.shape == tuple(1 if axis in reduced else x.shape[axis] for axis in range(4))
        assert_same_bits(kept_dims.reshape(expected.shape), expected, name)


def test_many_dimensions_that_do_not_merge(backend: Any, rng: np.random.Generator) -> None:
    x = draw(rng, (2, 3, 2, 3, 2, 3, 2, 3, 2, 3), "float32")
    reduced = (0, 2, 4, 6, 8)
    expected = reference.mean(np.ascontiguousarray(x.transpose((1, 3, 5, 7, 9, *reduced))), 5)
    assert_same_bits(backend.call("mean", x, axis=reduced), expected)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n", [32_768, 151_936, 600_000])
def test_long_rows(backend: Any, operation: str, dtype: str, n: int, rng: np.random.Generator) -> None:
    x = draw(rng, (2, n), dtype)
    assert_same_bits(backend.call(operation, x, axis=-1), getattr(reference, operation)(x, 1))
    assert_same_bits(backend.call(operation, x[:1], axis=-1), getattr(reference, operation)(x[:1], 1))


def test_mean_of_more_than_2_to_the_24_elements(backend: Any) -> None:
    n = 2**24 + 3  # not a float32: the divisor is rounded
    x = np.broadcast_to(np.float32(1.25), (n,))
    on_device = backend.xp.broadcast_to(backend.put(np.float32(1.25).reshape(())), (n,))
    actual = backend.get(bikernels.mean(on_device, backend=backend.name))
    assert_same_bits(actual, reference.mean(np.ascontiguousarray(x)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 2)])
def test_empty(backend: Any, operation: str, shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        x = np.zeros(shape, np.float32)
        actual = backend.call(operation, x, axis=axis)
        with np.errstate(invalid="ignore"):
            expected = np.zeros(shape).sum(axis) * np.nan if operation == "mean" else x
        assert actual.shape == expected.shape
        assert np.isnan(actual).all() if shape[axis] == 0 and operation == "mean" else actual.size == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_out(backend: Any, operation: str, rng: np.random.Generator) -> None:
    for dtype in FLOATS:
        x = draw(rng, (6, 50), dtype)
        expected = getattr(reference, operation)(x, 1)
        memory = backend.put(np.full((*expected.shape[::-1], 2), np.nan, NUMPY_DTYPE[dtype]))
        out = memory[..., 0].T
        assert getattr(bikernels, operation)(backend.put(x), axis=-1, out=out, backend=backend.name) is out
        assert_same_bits(backend.get(out), expected)
        assert np.isnan(backend.get(memory)[..., 1].astype(np.float64)).all()


@pytest.mark.parametrize("operation", ["log_softmax", "softmax"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_on_the_right_with_minus_infinity_changes_nothing(
    backend: Any, operation: str, dtype: str, rng: np.random.Generator
) -> None:
    x = draw(rng, (3, 300), dtype)
    expected = backend.call(operation, x)
    for padding in (1, 20, 3000):
        padded = np.concatenate([x, np.full((3, padding), -np.inf, x.dtype)], 1)
        assert_same_bits(backend.call(operation, padded)[:, :300], expected, f"{padding} masked positions")
