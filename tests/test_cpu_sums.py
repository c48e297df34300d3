"""How the CPU backend takes the rows of sums, which decides no bit: their order, threads, and how many at a time."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from llvmlite import ir

import bikernels
from bikernels import reference
from bikernels.backend.cpu import direct, sum_tree, threads, vectors
from bikernels.backend.cpu.compile import emitted
from bikernels.backend.cpu.numerics import LLVM_TYPE, VECTOR_BYTES
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


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("vector_bytes", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folds_of_vectors_of_every_length(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str, vector_bytes: int, pairs: bool
) -> None:
    monkeypatch.setattr(vectors, "opaque", lambda builder, value: value)  # of a vector that this machine may not have
    count = vector_bytes // np.dtype(dtype).itemsize
    vector = ir.VectorType(LLVM_TYPE[dtype], count)
    for number in (2, 4, 8, 32):

        def emit(builder: Any, source: Any, target: Any, *_: Any, number: int = number) -> None:
            parts = [vectors.load(builder, source, i * vector_bytes, vector) for i in range(number)]
            level = 0
            if number == 32:  # in two steps, of eight vectors first
                level = 2 if pairs else 3
                parts = [sum_tree.fold(builder, parts[i : i + 8], 0, pairs) for i in range(0, number, 8)]
            total = sum_tree.fold(builder, parts, level, pairs and number < 32, whole=True)
            builder.store(
                builder.extract_element(total, vectors.I32(0)), vectors.place(builder, target, 0, vector.element)
            )

        address = emitted(emit, 4, f"test of fold: {dtype} {vector_bytes} {pairs} {number}")
        lanes = rng.standard_normal(number * count).astype(dtype)
        parts = lanes.reshape(-1, count, 2).swapaxes(1, 2) if pairs else lanes  # in pairs, those with even places first
        source, out = np.ascontiguousarray(parts), np.empty(1, dtype)
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)(source.ctypes.data, out.ctypes.data, 0, 0)
        while len(lanes) > 1:
            lanes = lanes[::2] + lanes[1::2]
        assert_same_bits(out, lanes)


@pytest.mark.parametrize("operation", ["sum", "var", "layer_norm"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_zeros_of_either_sign(rng: np.random.Generator, operation: str, dtype: str) -> None:
    """Where lanes begin with their first element, a sum of -0 is +0 all the same."""
    for n in (256, 768, 2048, 6144, 2048 * 17):
        x = draw(rng, (11, n), dtype)
        x[:9] *= np.asarray(-0.0, x.dtype)
        x[3] = np.asarray(-0.0, x.dtype)
        assert_same_bits(getattr(bikernels, operation)(x, axis=-1), getattr(reference, operation)(x, kept=1))
