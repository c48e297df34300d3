"""Tensor-core classes against published results of GPUs (`vectors/README.md`), in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bikernels import contract, reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import assert_same_bits, bits
from .vectors import GPUS, NAMES, load

SETS = [(arithmetic, gpu, dtype) for arithmetic, gpus in GPUS.items() for gpu in gpus for dtype in NAMES]


@pytest.mark.parametrize(("arithmetic", "gpu", "dtype"), SETS)
def test_reference(arithmetic: str, gpu: str, dtype: str) -> None:
    vectors = load(gpu, dtype)
    result = reference.matmul(*vectors.operands(), arithmetic=arithmetic, dtype="float32")
    assert_same_bits(result.diagonal(), vectors.d, f"{gpu}, {dtype}")


@pytest.mark.parametrize(("arithmetic", "gpu", "dtype"), SETS)
def test_backend(backend: Any, arithmetic: str, gpu: str, dtype: str) -> None:
    if not backend.can_compute(arithmetic):
        pytest.skip("the device does not compute this class")
    vectors = load(gpu, dtype)
    result = backend.call("matmul", *vectors.operands(), arithmetic=arithmetic, dtype="float32")
    assert_same_bits(result.diagonal(), vectors.d, f"{gpu}, {dtype}")


@pytest.mark.parametrize(("arithmetic", "gpu", "dtype"), SETS)
@pytest.mark.parametrize("change", ["a bit fewer", "a bit more", "half the group"])
def test_vectors_tell_classes_apart(
    arithmetic: str, gpu: str, dtype: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of fraction bits, or a smaller group, gives other bytes."""
    kind = contract.ARITHMETIC[arithmetic]
    assert kind.fraction_bits is not None
    other = {
        "a bit fewer": kind._replace(fraction_bits=kind.fraction_bits - 1),
        "a bit more": kind._replace(fraction_bits=kind.fraction_bits + 1),
        "half the group": kind._replace(group=kind.group // 2),
    }[change]
    monkeypatch.setitem(contract.ARITHMETIC, arithmetic, other)
    vectors = load(gpu, dtype)
    result = reference.matmul(*vectors.operands(), arithmetic=arithmetic, dtype="float32").diagonal()
    assert np.count_nonzero(bits(result) != bits(vectors.d)) > 2


@pytest.mark.parametrize(("arithmetic", "last"), [("tc16f25", -158), ("tc8f24", -156)])
def test_floor(backend: Any, arithmetic: str, last: int) -> None:
    """The least bit that counts beside the smallest float32: what the vectors, of ordinary magnitude, do not reach."""
    if not backend.can_compute(arithmetic):
        pytest.skip("the device does not compute this class")
    dtype = NUMPY_DTYPE["bfloat16"]
    for exponent, expected in ((last, 0.0), (last - 1, 2.0**-149)):
        a, b = np.array([[2.0**-75, 2.0**-79]], dtype), np.array([[2.0**-74], [-(2.0 ** (exponent + 79))]], dtype)
        expected_array = np.array([[expected]], np.float32)
        assert_same_bits(reference.matmul(a, b, arithmetic=arithmetic, dtype="float32"), expected_array)
        assert_same_bits(backend.call("matmul", a, b, arithmetic=arithmetic, dtype="float32"), expected_array)
