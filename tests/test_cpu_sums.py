"""How the CPU backend takes the rows of sums, which decides no bit: their order, threads, and how many at a time."""

from __future__ import annotations

import numpy as np
import pytest

import bikernels
from bikernels import reference
from bikernels.backend.cpu import direct, threads
from bikernels.backend.cpu.numerics import VECTOR_BYTES
from bikernels.operations import _common

from .cases import assert_same_bits, draw


@pytest.fixture
def prepared_anew(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """For what a preparation depends on."""
    monkeypatch.setattr(_common, "_plan", _common._plan.__wrapped__)
    return monkeypatch


@pytest.mark.parametrize("shape", [(19, 512), (9, 2048), (5, 4096), (3, 10241), (2, 3, 7000)], ids=str)
def test_chunks_in_order(rng: np.random.Generator, prepared_anew: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    x = draw(rng, shape, "float32", "wide")
    x[0] = -0.0
    in_blocks = bikernels.sum(x, axis=-1)
    prepared_anew.setattr(direct, "_CACHED", 0)
    assert_same_bits(bikernels.sum(x, axis=-1), in_blocks)
    assert_same_bits(in_blocks, reference.sum(x, kept=x.ndim - 1))


def test_every_row_whatever_the_threads(rng: np.random.Generator, prepared_anew: pytest.MonkeyPatch) -> None:
    prepared_anew.setattr(threads, "_WORTH_A_NATIVE_THREAD", 1.0)
    prepared_anew.setattr(direct, "_AT_A_TIME", 1)  # a row in a group
    for rows in (2, 3, 7, 50):
        x = draw(rng, (rows, 600), "float32")
        expected = reference.sum(x, kept=1)
        for most in (1, 2, 3, 5):
            prepared_anew.setattr(threads, "limit", lambda most=most: most)
            assert_same_bits(bikernels.sum(x, axis=1), expected)


@pytest.mark.parametrize("vectors", [2, 5])
def test_few_rows_side_by_side(rng: np.random.Generator, vectors: int) -> None:
    x = draw(rng, (50, 40, vectors * VECTOR_BYTES // 4 + 1), "float32", "wide")
    assert_same_bits(bikernels.sum(x, axis=1), reference.sum(np.moveaxis(x, 1, -1), kept=2))
