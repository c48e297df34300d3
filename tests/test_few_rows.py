"""Products of few rows, which a backend may compute in a way of its own, in bytes against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels import reference

from .cases import FLOATS, assert_same_bits, draw


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("n", "k", "distribution"),
    [(64, 256, "normal"), (70, 300, "special"), (33, 17, "subnormal"), (129, 7, "wide"), (4, 40, "normal")],
)
def test_every_count_and_layout(
    backend: Any, dtype: str, n: int, k: int, distribution: str, rng: np.random.Generator
) -> None:
    a, b, c = (draw(rng, shape, dtype, distribution) for shape in ((17, k), (k, n), (17, n)))
    arithmetic = backend.arithmetic[dtype]
    expected = reference.matmul(a, b, arithmetic=arithmetic)
    expected_sum = reference.addmm(c, a, b, -0.7, 0.3, arithmetic=arithmetic)
    layouts = list(backend.layouts(b))
    for m in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17):
        rows, addend = backend.put(a[:m]), backend.put(c[:m])
        for name, view in layouts:
            message = f"{m} rows, b {name}"
            actual = bikernels.matmul(rows, view, backend=backend.name)
            assert_same_bits(backend.get(actual), expected[:m], message)
            actual = bikernels.addmm(addend, rows, view, alpha=-0.7, beta=0.3, backend=backend.name)
            assert_same_bits(backend.get(actual), expected_sum[:m], message)


@pytest.mark.parametrize("dtype", FLOATS)
def test_few_columns(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    """The product transposed: few columns and many rows."""
    a, b = draw(rng, (70, 300), dtype), draw(rng, (300, 17), dtype)
    expected = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
    for n in (1, 2, 7, 16, 17):
        for name, view in backend.layouts(a):
            actual = bikernels.matmul(view, backend.put(b[:, :n]), backend=backend.name)
            assert_same_bits(backend.get(actual), expected[:, :n], f"{n} columns, a {name}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_batch(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    a, b = draw(rng, (3, 2, 40), dtype), draw(rng, (3, 40, 66), dtype)
    expected = np.stack(
        [reference.matmul(x, y, arithmetic=backend.arithmetic[dtype]) for x, y in zip(a, b, strict=True)]
    )
    for name, view in backend.layouts(b):
        actual = bikernels.matmul(backend.put(a), view, backend=backend.name)
        assert_same_bits(backend.get(actual), expected, name)
