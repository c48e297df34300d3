"""The reductions, the norms and the backward passes on every backend, in bytes against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import (
    FLOATS,
    NORMS,
    OF_ONE_ARRAY,
    SOFTMAXES,
    SUMS,
    assert_same_bits,
    backward_cases,
    by_name,
    draw,
    norm_cases,
    reduction_cases,
)

CASES = by_name(itertools.chain(reduction_cases(), norm_cases(), backward_cases()))
WRITE_ROWS = ("log_softmax", "softmax", "rms_norm", "layer_norm")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(backend: Any, name: str) -> None:
    case = CASES[name]
    options = {"axis": -1} | case.options
    assert_same_bits(backend.call(case.operation, *case.arrays, **options), case.expected(), name)


@pytest.mark.parametrize("operation", OF_ONE_ARRAY)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(37, 300), (5, 7, 40), (2, 4500)])
def test_layouts(backend: Any, operation: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = draw(rng, shape, dtype)
    for axis in range(x.ndim):
        kept = x.ndim - 1
        expected = getattr(reference, operation)(np.moveaxis(x, axis, -1), kept=kept)
        if operation in WRITE_ROWS:
            expected = np.moveaxis(expected, -1, axis)
        for name, view in backend.layouts(x):
            actual = getattr(bikernels, operation)(view, axis=axis, backend=backend.name)
            assert_same_bits(backend.get(actual), expected, f"axis {axis}, {name}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_array_without_axes_is_a_row_of_one(backend: Any, dtype: str) -> None:
    x = np.array(-1.25, NUMPY_DTYPE[dtype])
    for operation in OF_ONE_ARRAY:
        if operation in ("softmax", "log_softmax"):
            with pytest.raises(np.exceptions.AxisError):
                backend.call(operation, x, axis=0)
        else:
            axes = () if operation in NORMS else None
            expected = getattr(reference, operation)(x[None], kept=0).reshape(())
            assert_same_bits(backend.call(operation, x, axis=axes), expected, operation)


AXES = (None, (), (0,), (1,), (0, 1), (0, 2), (1, 3), (-1, 0), (0, 1, 2, 3))


def reduced_and_kept(axes: tuple[int, ...] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    reduced = tuple(range(4)) if axes is None else tuple(sorted(axis % 4 for axis in axes))
    return reduced, tuple(axis for axis in range(4) if axis not in reduced)


@pytest.mark.parametrize("operation", [*SUMS, "logsumexp"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axes", AXES)
def test_several_axes(
    backend: Any, operation: str, dtype: str, axes: tuple[int, ...] | None, rng: np.random.Generator
) -> None:
    x = draw(rng, (3, 5, 70, 4), dtype)
    reduced, kept = reduced_and_kept(axes)
    expected = getattr(reference, operation)(np.ascontiguousarray(x.transpose(kept + reduced)), len(kept))
    function = getattr(bikernels, operation)
    for name, view in backend.layouts(x):
        actual = backend.get(function(view, axis=axes, backend=backend.name))
        assert_same_bits(actual, expected, name)
        kept_dims = backend.get(function(view, axis=axes, keepdims=True, backend=backend.name))
        assert kept_dims.shape == tuple(1 if axis in reduced else x.shape[axis] for axis in range(4))
        assert_same_bits(kept_dims.reshape(expected.shape), expected, name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axes", AXES[1:])
def test_norms_of_several_axes(backend: Any, dtype: str, axes: tuple[int, ...], rng: np.random.Generator) -> None:
    """Forward with statistics, and backward, with every operand in every layout."""
    shape = (3, 5, 70, 4)
    reduced, kept = reduced_and_kept(axes)
    x, grad = draw(rng, shape, dtype), draw(rng, shape, dtype)
    weight, bias = (draw(rng, tuple(shape[axis] for axis in reduced), dtype) for _ in range(2))
    rows, grad_rows = (np.ascontiguousarray(one.transpose(kept + reduced)) for one in (x, grad))
    number = len(kept)
    options = {"axis": axes, "backend": backend.name}

    def check(actual: Any, expected: np.ndarray, name: str) -> None:
        actual = backend.get(actual)
        if actual.ndim == 4:
            actual = np.ascontiguousarray(actual.transpose(kept + reduced))
        assert_same_bits(actual.reshape(expected.shape), expected, name)

    def all_layouts(*arrays: np.ndarray) -> Iterator[tuple[Any, ...]]:
        """Each operand in each of its layouts, beside others in other ones."""
        layouts = [[*backend.layouts(one)] for one in arrays]
        for i in range(max(map(len, layouts))):
            views = [of_one[(i + j) % len(of_one)] for j, of_one in enumerate(layouts)]
            yield ", ".join(name for name, _ in views), *(view for _, view in views)

    wanted, mean, rstd = reference.layer_norm_with_statistics(rows, weight, bias, number)
    wanted_rms, root = reference.rms_norm_with_statistics(rows, weight, number)
    for name, x_view, grad_view, weight_view, bias_view in all_layouts(x, grad, weight, bias):
        y, m, r = bikernels.layer_norm_with_statistics(x_view, weight_view, bias_view, **options)
        assert m.shape == r.shape == tuple(1 if axis in reduced else length for axis, length in enumerate(shape))
        for actual, expected in ((y, wanted), (m, mean), (r, rstd)):
            check(actual, expected, name)
        check(
            bikernels.layer_norm_backward(grad_view, x_view, m, r, weight_view, **options),
            reference.layer_norm_backward(grad_rows, rows, mean, rstd, weight, number),
            name,
        )
        dw = bikernels.layer_norm_weight_backward(grad_view, x_view, m, r, **options)
        assert dw.shape == weight.shape
        expected = reference.layer_norm_weight_backward(grad_rows, rows, mean, rstd, number)
        assert_same_bits(backend.get(dw), expected, name)
        y, r = bikernels.rms_norm_with_statistics(x_view, weight_view, **options)
        check(y, wanted_rms, name)
        check(r, root, name)
        check(
            bikernels.rms_norm_backward(grad_view, x_view, r, weight_view, **options),
            reference.rms_norm_backward(grad_rows, rows, root, weight, number),
            name,
        )
        dw = bikernels.rms_norm_weight_backward(grad_view, x_view, r, **options)
        assert_same_bits(backend.get(dw), reference.rms_norm_weight_backward(grad_rows, rows, root, number), name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_with_a_bias_and_no_weight(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    x, bias = draw(rng, (7, 300), dtype), draw(rng, (300,), dtype)
    assert_same_bits(backend.call("layer_norm", x, None, bias), reference.layer_norm(x, None, bias, 1))


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm"])
def test_statistics_of_rows_without_elements(backend: Any, operation: str) -> None:
    x = backend.put(np.zeros((3, 0), np.float32))
    y, *statistics = getattr(bikernels, f"{operation}_with_statistics")(x, backend=backend.name)
    assert y.shape == (3, 0)
    for one in statistics:
        assert one.shape == (3, 1)
        assert np.isnan(backend.get(one)).all()


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm"])
def test_gradient_of_a_weight_without_rows_is_zero(backend: Any, operation: str) -> None:
    x, statistic = np.zeros((0, 5), np.float32), np.zeros((0, 1), np.float32)
    statistics = (statistic,) if operation == "rms_norm" else (statistic, statistic)
    actual = backend.call(f"{operation}_weight_backward", x, x, *statistics)
    assert_same_bits(actual, np.zeros(5, np.float32))


def test_many_dimensions_that_do_not_merge(backend: Any, rng: np.random.Generator) -> None:
    x = draw(rng, (2, 3, 2, 3, 2, 3, 2, 3, 2, 3), "float32")
    reduced = (0, 2, 4, 6, 8)
    expected = reference.mean(np.ascontiguousarray(x.transpose((1, 3, 5, 7, 9, *reduced))), 5)
    assert_same_bits(backend.call("mean", x, axis=reduced), expected)


@pytest.mark.parametrize("operation", OF_ONE_ARRAY)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n", [32_768, 151_936, 600_000])
def test_long_rows(backend: Any, operation: str, dtype: str, n: int, rng: np.random.Generator) -> None:
    x = draw(rng, (2, n), dtype)
    assert_same_bits(backend.call(operation, x, axis=-1), getattr(reference, operation)(x, kept=1))
    assert_same_bits(backend.call(operation, x[:1], axis=-1), getattr(reference, operation)(x[:1], kept=1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backward_of_long_rows_and_of_long_batches(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    for shape in ((2, 32_768), (32_768, 2)):
        x, grad, weight = draw(rng, shape, dtype), draw(rng, shape, dtype), draw(rng, shape[1:], dtype)
        _, m, r = reference.layer_norm_with_statistics(x, kept=1)
        arrays = (grad, x, m[:, None], r[:, None])
        expected = reference.layer_norm_backward(grad, x, m, r, weight, 1)
        assert_same_bits(backend.call("layer_norm_backward", *arrays, weight), expected)
        expected = reference.layer_norm_weight_backward(grad, x, m, r, 1)
        assert_same_bits(backend.call("layer_norm_weight_backward", *arrays), expected)
        expected = reference.softmax_backward(grad, x, 1)
        assert_same_bits(backend.call("softmax_backward", grad, x), expected)


@pytest.mark.parametrize(("operation", "options"), [("mean", {}), ("var", {"correction": -2.0})])
def test_more_than_2_to_the_24_elements(backend: Any, operation: str, options: dict[str, Any]) -> None:
    n = 2**24 + 3  # neither it nor n + 2 is a float32: the divisor is rounded once, which these elements show
    x = np.broadcast_to(np.float32(1.28125), (n,))
    on_device = backend.xp.broadcast_to(backend.put(np.float32(1.28125).reshape(())), (n,))
    actual = backend.get(getattr(bikernels, operation)(on_device, backend=backend.name, **options))
    assert_same_bits(actual, getattr(reference, operation)(np.ascontiguousarray(x), **options))


@pytest.mark.parametrize("operation", OF_ONE_ARRAY)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 0, 2)])
def test_empty(backend: Any, operation: str, shape: tuple[int, ...]) -> None:
    of_nothing = {"sum": 0.0, "logsumexp": -np.inf}.get(operation, np.nan)
    for axis in range(len(shape)):
        x = np.zeros(shape, np.float32)
        actual = backend.call(operation, x, axis=axis)
        expected = x if operation in WRITE_ROWS else np.full(np.zeros(shape).sum(axis).shape, of_nothing, np.float32)
        assert actual.shape == expected.shape
        assert np.array_equal(actual, expected, equal_nan=True)


@pytest.mark.parametrize("operation", OF_ONE_ARRAY)
def test_out(backend: Any, operation: str, rng: np.random.Generator) -> None:
    for dtype in FLOATS:
        x = draw(rng, (6, 50), dtype)
        expected = getattr(reference, operation)(x, kept=1)
        memory = backend.put(np.full((*expected.shape[::-1], 2), np.nan, NUMPY_DTYPE[dtype]))
        out = memory[..., 0].T
        assert getattr(bikernels, operation)(backend.put(x), axis=-1, out=out, backend=backend.name) is out
        assert_same_bits(backend.get(out), expected)
        assert np.isnan(backend.get(memory)[..., 1].astype(np.float64)).all()


def test_out_of_several_results(backend: Any, rng: np.random.Generator) -> None:
    x = draw(rng, (6, 50), "bfloat16")
    expected = reference.layer_norm_with_statistics(x, kept=1)
    memory = [backend.put(np.full((*shape, 2), np.nan, dtype)) for shape, dtype in (
        ((6, 50), x.dtype), ((6, 1), np.float32), ((6, 1), np.float32))]  # fmt: skip
    out = tuple(one[..., 0] for one in memory)
    assert bikernels.layer_norm_with_statistics(backend.put(x), out=out, backend=backend.name) is out
    for one, whole, wanted in zip(out, memory, expected, strict=True):
        assert_same_bits(backend.get(one).reshape(wanted.shape), wanted)
        assert np.isnan(backend.get(whole)[..., 1].astype(np.float64)).all()


@pytest.mark.parametrize("operation", SOFTMAXES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_on_the_right_with_minus_infinity_changes_nothing(
    backend: Any, operation: str, dtype: str, rng: np.random.Generator
) -> None:
    x = draw(rng, (3, 300), dtype)
    expected = backend.call(operation, x, axis=-1)
    for padding in (1, 20, 3000):
        padded = np.concatenate([x, np.full((3, padding), -np.inf, x.dtype)], 1)
        actual = backend.call(operation, padded, axis=-1)
        actual = actual[:, :300] if operation in WRITE_ROWS else actual
        assert_same_bits(actual, expected, f"{padding} masked positions")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 300, 2048, 5000])
def test_trailing_zeros_change_no_sum(backend: Any, dtype: str, n: int, rng: np.random.Generator) -> None:
    x = draw(rng, (3, n), dtype, "wide")
    expected = backend.call("sum", x, axis=-1)
    for zeros in (1, 20, 3000, 600_000):
        padded = np.concatenate([x, np.zeros((3, zeros), x.dtype)], 1)
        assert_same_bits(backend.call("sum", padded, axis=-1), expected, f"{zeros} zeros")
    moved = np.concatenate([np.zeros((3, 1), x.dtype), x], 1)
    if dtype == "float32" and n > 2:  # zeros in front move positions, and may change bits
        with pytest.raises(AssertionError):
            assert_same_bits(backend.call("sum", moved, axis=-1), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm"])
def test_trailing_rows_of_zeros_change_no_gradient_of_a_weight(
    backend: Any, operation: str, dtype: str, rng: np.random.Generator
) -> None:
    x, grad, root = draw(rng, (300, 70), dtype), draw(rng, (300, 70), dtype), draw(rng, (300, 1), "float32")
    for rows in (1, 20, 3000):
        x_padded = np.concatenate([x, draw(rng, (rows, 70), dtype)])
        grad_padded = np.concatenate([grad, np.zeros((rows, 70), x.dtype)])
        root_padded = np.concatenate([root, np.ones((rows, 1), np.float32)])
        repeat = 1 if operation == "rms_norm" else 2
        expected = backend.call(f"{operation}_weight_backward", grad, x, *[root] * repeat)
        actual = backend.call(f"{operation}_weight_backward", grad_padded, x_padded, *[root_padded] * repeat)
        assert_same_bits(actual, expected, f"{rows} rows")
