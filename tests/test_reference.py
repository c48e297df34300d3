"""The reference itself: its fma against the C library's, its sum tree against the words of the contract."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

import numpy as np
import pytest

from bikernels import contract, reference

from .cases import assert_same_bits


def libm_fma(dtype: type) -> object:
    library = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    function, kind = (library.fmaf, ctypes.c_float) if dtype is np.float32 else (library.fma, ctypes.c_double)
    function.restype, function.argtypes = kind, [kind] * 3
    return function


@pytest.mark.skipif(sys.platform == "win32", reason="the C library's fma is not correctly rounded there")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("distribution", ["bits", "cancelling", "underflow"])
def test_fma_is_the_c_library_s(dtype: type, distribution: str, rng: np.random.Generator) -> None:
    n, small = 20_000, dtype is np.float32
    unsigned = np.uint32 if small else np.uint64
    if distribution == "bits":
        a, b, c = (rng.integers(0, np.iinfo(unsigned).max, n, dtype=unsigned).view(dtype) for _ in range(3))
    elif distribution == "cancelling":
        a, b = (rng.standard_normal(n).astype(dtype) for _ in range(2))
        c = (-(a * b) * (1 + rng.integers(-3, 4, n) * np.finfo(dtype).eps)).astype(dtype)
    else:
        e = -70 if small else -530
        a, b = (np.ldexp(rng.standard_normal(n), e + rng.integers(-8, 8, n)).astype(dtype) for _ in range(2))
        c = np.ldexp(rng.standard_normal(n), 2 * e + rng.integers(-8, 30, n)).astype(dtype)
    a[:6], b[:6] = 0.75 * np.finfo(dtype).max, 3.0  # a product that overflows before it meets c
    c[:6] = [-np.inf, np.inf, np.nan, -np.finfo(dtype).max, 0.0, 1.0]
    a[6:12] = [np.inf, -np.inf, np.inf, np.inf, 1.0, 0.0]
    b[6:12] = [1.5, 1.5, 0.0, -np.inf, 1.0, np.inf]
    c[6:12] = [1.0, np.inf, 1.0, np.inf, -np.inf, 1.0]
    function = libm_fma(dtype)
    expected = np.array([function(*triple) for triple in zip(a, b, c, strict=True)], dtype)  # type: ignore[operator]
    actual = reference.fma(a, b, c)
    nan = np.isnan(expected)
    assert (np.isnan(actual) == nan).all()
    assert_same_bits(actual[~nan], expected[~nan])


def sum_in_words(row: np.ndarray) -> np.floating:
    """The tree, spelled out for one row."""
    partials = []
    for start in range(0, max(len(row), 1), contract.SUM_CHUNK):
        lanes = [row.dtype.type(0)] * contract.SUM_LANES
        for i, x in enumerate(row[start : start + contract.SUM_CHUNK]):
            lanes[i % contract.SUM_LANES] = lanes[i % contract.SUM_LANES] + x
        while len(lanes) > 1:
            lanes = [lanes[2 * j] + lanes[2 * j + 1] for j in range(len(lanes) // 2)]
        partials.append(lanes[0])
    return partials[0] if len(partials) == 1 else sum_in_words(np.array(partials, row.dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257, 2047, 2048, 2049, 10_000])
def test_sum_tree_is_the_contract_s_words(dtype: type, n: int, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((2, n)).astype(dtype)
    assert_same_bits(reference.tree_sum(rows), np.array([sum_in_words(row) for row in rows], dtype))


@pytest.mark.parametrize("n", [1, 100, 256, 2000, 2048, 5000])
def test_sum_tree_does_not_see_trailing_zeros(n: int, rng: np.random.Generator) -> None:
    rows = rng.standard_normal((3, n)).astype(np.float32)
    expected = reference.tree_sum(rows)
    for zeros in (1, 255, 3000, 600_000):
        padded = np.concatenate([rows, np.zeros((3, zeros), np.float32)], 1)
        assert_same_bits(reference.tree_sum(padded), expected, f"{zeros} zeros")
