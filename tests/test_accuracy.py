"""How far results lie from the exact ones: bounds that follow from the arithmetic, never a loose tolerance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bikernels import contract, reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, arithmetics, draw

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
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_softmax_family(backend: Any, dtype: str, scale: float, rng: np.random.Generator) -> None:
    x = (draw(rng, (16, 1000), "float64") * scale).astype(NUMPY_DTYPE[dtype])
    wide = x.astype(np.longdouble)
    t = wide - wide.max(1, keepdims=True)
    total = np.exp(t).sum(1, keepdims=True)
    ulp = 2 * UNIT[dtype]
    softmax = backend.call("softmax", x).astype(np.longdouble)
    exact = np.exp(t) / total
    tiny = np.longdouble(np.finfo(NUMPY_DTYPE[dtype]).smallest_subnormal) if dtype != "bfloat16" else 2.0**-133
    assert (np.abs(softmax - exact) <= 4 * ulp * exact + tiny).all()
    log_softmax = backend.call("log_softmax", x).astype(np.longdouble)
    exact = t - np.log(total)
    assert (np.abs(log_softmax - exact) <= 2 * ulp * np.maximum(1, np.abs(exact))).all()


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
