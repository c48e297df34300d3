"""How far results lie from the exact ones: bounds that follow from the arithmetic, never a loose tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bikernels import contract, reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, arithmetics, draw, smallest, unit

UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [17, 1000])
def test_products_componentwise(dtype: str, k: int, rng: np.random.Generator) -> None:
    """|computed - exact| <= (steps + 1) u |A||B|, and one rounding of the result."""
    a, b = draw(rng, (8, k), dtype), draw(rng, (k, 8), dtype)
    wide_a, wide_b = a.astype(np.longdouble), b.astype(np.longdouble)
    exact, magnitude = wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)
    for arithmetic in arithmetics(dtype):
        kind = contract.ARITHMETIC[arithmetic]
        steps = -(-k // kind.group)
        # A tensor core truncates: one unit in the last place a step, and one of each operand aligned away.
        u = UNIT["float64"] if dtype == "float64" else UNIT["float32"] * (2 if kind.is_tensor_core else 1)
        error = np.abs(reference.matmul(a, b, arithmetic=arithmetic) - exact)
        assert (error <= (steps + 1) * 1.01 * u * magnitude + UNIT[dtype] * np.abs(exact) * 1.01).all(), arithmetic
        assert error.max() > 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [100, 3000, 30_000])
def test_mean_within_the_depth_of_its_tree(dtype: str, n: int, rng: np.random.Generator) -> None:
    x = draw(rng, (4, n), dtype)
    exact = x.astype(np.longdouble).mean(1)
    depth = 16 if n <= 2048 else 32
    u = UNIT[contract.ACCUMULATE[dtype]]
    bound = (depth + 2) * u * np.abs(x.astype(np.longdouble)).mean(1) + UNIT[dtype] * np.abs(exact)
    assert (np.abs(reference.mean(x, 1).astype(np.longdouble) - exact) <= 1.01 * bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [100, 3000, 30_000])
def test_sum_within_the_depth_of_its_tree(dtype: str, n: int, rng: np.random.Generator) -> None:
    x = draw(rng, (4, n), dtype)
    wide = x.astype(np.longdouble)
    depth = 16 if n <= 2048 else 32
    bound = depth * UNIT[contract.ACCUMULATE[dtype]] * np.abs(wide).sum(1) + UNIT[dtype] * np.abs(wide.sum(1))
    assert (np.abs(reference.sum(x, 1).astype(np.longdouble) - wide.sum(1)) <= 1.01 * bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_var_and_std(backend: Any, dtype: str, offset: float, rng: np.random.Generator) -> None:
    """Two passes: what the mean of n elements is off by, squared, and the depth of the second tree."""
    x = (draw(rng, (8, 3000), "float64") + offset).astype(NUMPY_DTYPE[dtype])
    wide = x.astype(np.longdouble)
    exact = wide.var(1, ddof=1)
    u = UNIT[contract.ACCUMULATE[dtype]]
    of_mean = 34 * u * np.abs(wide).mean(1)  # depth, division
    bound = (
        (32 + 4) * u * exact + 2 * of_mean * np.abs(wide - wide.mean(1, keepdims=True)).mean(1) * u * 34 + of_mean**2
    )
    actual = backend.call("var", x, axis=-1, correction=1).astype(np.longdouble)
    assert (np.abs(actual - exact) <= 1.01 * (bound + UNIT[dtype] * exact)).all()
    actual = backend.call("std", x, axis=-1, correction=1).astype(np.longdouble)
    assert (np.abs(actual - np.sqrt(exact)) <= 1.01 * (bound / np.sqrt(exact) + 2 * UNIT[dtype] * np.sqrt(exact))).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    """Within (depth + a few) u of the size of what is added, and one rounding of the result."""
    n, eps = 1000, 1e-3
    x, weight, bias = draw(rng, (8, n), dtype), draw(rng, (n,), dtype), draw(rng, (n,), dtype)
    wide, w, b = (one.astype(np.longdouble) for one in (x, weight, bias))
    u = UNIT[contract.ACCUMULATE[dtype]]
    tiny = smallest(dtype)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + np.longdouble(eps)) * w
    actual = backend.call("rms_norm", x, weight, eps=eps).astype(np.longdouble)
    assert (np.abs(actual - exact) <= ((16 / 2 + 6) * u + 1.01 * UNIT[dtype]) * np.abs(exact) + tiny).all()
    deviation = wide - wide.mean(1, keepdims=True)
    r = 1 / np.sqrt((deviation**2).mean(1, keepdims=True) + np.longdouble(eps))
    exact = deviation * r * w + b
    size = (np.abs(deviation) + np.abs(wide).mean(1, keepdims=True)) * r * np.abs(w) + np.abs(b)
    actual = backend.call("layer_norm", x, weight, bias, eps=eps).astype(np.longdouble)
    assert (np.abs(actual - exact) <= (16 + 8) * u * size + 1.01 * UNIT[dtype] * np.abs(exact) + tiny).all()


@pytest.mark.parametrize("operation", ["softmax", "log_softmax", "rms_norm", "layer_norm"])
def test_backward_is_the_derivative(backend: Any, operation: str, rng: np.random.Generator) -> None:
    """In float64, against differences of the forward pass."""
    x, grad, weight, bias = (draw(rng, shape, "float64") for shape in ((5, 30), (5, 30), (30,), (30,)))
    norm = operation.endswith("norm")
    extra = {"softmax": (), "log_softmax": (), "rms_norm": (weight,), "layer_norm": (weight, bias)}[operation]

    def loss(x: np.ndarray, *extra: np.ndarray) -> float:
        return float((backend.call(operation, x, *extra) * grad).sum())

    def differences(arguments: list[np.ndarray], which: int) -> np.ndarray:
        result, step = np.zeros(arguments[which].shape), 1e-6
        for index in np.ndindex(result.shape):
            values = []
            for sign in (1, -1):
                moved = [one.copy() for one in arguments]
                moved[which][index] += sign * step
                values.append(loss(*moved))
            result[index] = (values[0] - values[1]) / (2 * step)
        return result

    if norm:
        statistics = [one[:, None] for one in getattr(reference, f"{operation}_with_statistics")(x, kept=1)[1:]]
        actual = backend.call(f"{operation}_backward", grad, x, *statistics, weight)
        actual_weight = backend.call(f"{operation}_weight_backward", grad, x, *statistics)
        assert np.allclose(actual_weight, differences([x, *extra], 1), rtol=1e-6, atol=1e-7)
    else:
        actual = backend.call(f"{operation}_backward", grad, backend.call(operation, x))
    assert np.allclose(actual, differences([x, *extra], 0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_softmax_family(backend: Any, dtype: str, scale: float, rng: np.random.Generator) -> None:
    x = (draw(rng, (16, 1000), "float64") * scale).astype(NUMPY_DTYPE[dtype])
    wide = x.astype(np.longdouble)
    t = wide - wide.max(1, keepdims=True)
    total = np.exp(t).sum(1, keepdims=True)
    is_wide = dtype == contract.ACCUMULATE[dtype]
    softmax = backend.call("softmax", x).astype(np.longdouble)
    exact = np.exp(t) / total
    assert (np.abs(softmax - exact) <= (4 if is_wide else 1) * unit(exact, dtype)).all()
    log_softmax = backend.call("log_softmax", x).astype(np.longdouble)
    exact = t - np.log(total)
    assert (np.abs(log_softmax - exact) <= (2 if is_wide else 1) * of_one_or_more(exact, dtype)).all()
    logsumexp = backend.call("logsumexp", x, axis=-1).astype(np.longdouble)
    exact = (wide.max(1, keepdims=True) + np.log(total))[:, 0]
    assert (np.abs(logsumexp - exact) <= (1.5 if is_wide else 1) * of_one_or_more(exact, dtype)).all()


def of_one_or_more(exact: np.ndarray, dtype: str) -> np.ndarray:
    """The unit in the last place of max(1, |exact|)."""
    return unit(np.maximum(1, np.abs(exact)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_log_softmax_of_a_confident_row_keeps_its_relative_accuracy(backend: Any, dtype: str) -> None:
    """The first element is -log(1 + r) with r far below the unit of 1."""
    for others in (-5.0, -20.0, -40.0, -80.0):
        x = np.array([[0.0, others, others - 1]], NUMPY_DTYPE[dtype])
        wide = x.astype(np.longdouble)
        exact = -np.log1p(np.exp(wide[0, 1]) + np.exp(wide[0, 2]))
        actual = np.longdouble(backend.call("log_softmax", x)[0, 0])
        assert abs(actual - exact) <= 8 * UNIT[dtype] * abs(exact)
        assert actual < 0
