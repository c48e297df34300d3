"""`matmul` and `addmm` on every backend, in bytes against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels import contract, reference
from bikernels.dtypes import NUMPY_DTYPE

from .cases import FLOATS, Case, assert_same_bits, by_name, draw, long_matmul_cases, matmul_cases

CASES = by_name(matmul_cases()) | by_name(long_matmul_cases())


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(backend: Any, name: str) -> None:
    case: Case = CASES[name]
    arithmetic = case.options.get("arithmetic", "fma32")
    if not backend.can_compute(arithmetic):
        pytest.skip(f"the device does not compute {arithmetic}")
    assert_same_bits(backend.call(case.operation, *case.arrays, **case.options), case.expected(), name)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (64, 64, 64), (65, 63, 129), (1, 300, 70), (300, 1, 70)])
def test_shapes(backend: Any, dtype: str, shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    m, n, k = shape
    a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
    expected = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
    assert_same_bits(backend.call("matmul", a, b), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_layouts(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    a, b = draw(rng, (33, 47), dtype), draw(rng, (47, 29), dtype)
    expected = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
    left, right = list(backend.layouts(a)), list(backend.layouts(b))
    for name, view in left:
        assert_same_bits(backend.get(bikernels.matmul(view, right[0][1], backend=backend.name)), expected, f"a {name}")
    for name, view in right:
        assert_same_bits(backend.get(bikernels.matmul(left[0][1], view, backend=backend.name)), expected, f"b {name}")
    for (name, x), (_, y) in zip(left, right, strict=True):
        assert_same_bits(backend.get(bikernels.matmul(x, y, backend=backend.name)), expected, f"both {name}")


@pytest.mark.parametrize("dtype", FLOATS)
def test_broadcast_operands(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    row, column = draw(rng, (1, 47), dtype), draw(rng, (47, 1), dtype)
    a, b = np.broadcast_to(row, (33, 47)), np.broadcast_to(column, (47, 29))
    expected = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
    on_device = (
        backend.xp.broadcast_to(backend.put(row), a.shape),
        backend.xp.broadcast_to(backend.put(column), b.shape),
    )
    assert_same_bits(backend.get(bikernels.matmul(*on_device, backend=backend.name)), expected)


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((5,), (5,)),
        ((5,), (5, 3)),
        ((4, 5), (5,)),
        ((2, 4, 5), (5,)),
        ((5,), (2, 5, 3)),
        ((2, 4, 5), (5, 3)),
        ((2, 1, 4, 5), (3, 5, 3)),
        ((2, 3, 4, 5), (2, 3, 5, 3)),
        ((1, 4, 5), (0, 5, 3)),
        ((0, 5), (5, 3)),
        ((4, 0), (0, 3)),
        ((2, 1, 2, 1, 4, 5), (1, 3, 1, 2, 5, 3)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numpy_s_shape_rules(
    backend: Any, dtype: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    a, b = draw(rng, a_shape, dtype), draw(rng, b_shape, dtype)
    shape = np.matmul(np.zeros(a_shape), np.zeros(b_shape)).shape
    actual = backend.call("matmul", a, b)
    assert actual.shape == shape
    a2 = a[None, :] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    batch = np.broadcast_shapes(a2.shape[:-2], b2.shape[:-2])
    a2, b2 = np.broadcast_to(a2, batch + a2.shape[-2:]), np.broadcast_to(b2, batch + b2.shape[-2:])
    expected = np.empty((*batch, a2.shape[-2], b2.shape[-1]), NUMPY_DTYPE[dtype])
    for index in np.ndindex(batch):
        expected[index] = reference.matmul(a2[index], b2[index], arithmetic=backend.arithmetic[dtype])
    assert_same_bits(actual, expected.reshape(shape))


def test_batches_with_strides_of_an_attention(backend: Any, rng: np.random.Generator) -> None:
    q, k = draw(rng, (2, 7, 3, 16), "bfloat16"), draw(rng, (2, 9, 3, 16), "bfloat16")  # batch, length, heads, depth
    q_device, k_device = backend.put(q).transpose(0, 2, 1, 3), backend.put(k).transpose(0, 2, 3, 1)
    actual = backend.get(bikernels.matmul(q_device, k_device, backend=backend.name))
    for i, h in np.ndindex(2, 3):
        expected = reference.matmul(q[i, :, h], k[i, :, h].T, arithmetic=backend.arithmetic["bfloat16"])
        assert_same_bits(actual[i, h], expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("c_shape", [(6, 5), (5,), (1, 5), (6, 1), (1, 1), ()])
def test_addend_broadcasts(backend: Any, dtype: str, c_shape: tuple[int, ...], rng: np.random.Generator) -> None:
    c, a, b = draw(rng, c_shape, dtype), draw(rng, (6, 20), dtype), draw(rng, (20, 5), dtype)
    expected = reference.addmm(c, a, b, 0.5, -1.5, arithmetic=backend.arithmetic[dtype])
    assert_same_bits(backend.call("addmm", c, a, b, alpha=0.5, beta=-1.5), expected)


def test_wider_addend_and_result(backend: Any, rng: np.random.Generator) -> None:
    a, b = draw(rng, (6, 20), "float16"), draw(rng, (20, 5), "float16")
    for c_dtype in ("float16", "float32"):
        c = draw(rng, (6, 5), c_dtype)
        expected = reference.addmm(c, a, b, dtype="float32", arithmetic=backend.arithmetic["float16"])
        assert_same_bits(backend.call("addmm", c, a, b, dtype="float32"), expected)


def test_beta_zero_does_not_read_the_addend(backend: Any, rng: np.random.Generator) -> None:
    a, b = draw(rng, (6, 20), "float32"), draw(rng, (20, 5), "float32")
    c = np.full((6, 5), np.nan, np.float32)
    expected = reference.matmul(a, b)
    assert_same_bits(backend.call("addmm", c, a, b, beta=0), expected)
    assert_same_bits(backend.call("addmm", c, a, b, beta=1e-60), expected, "beta rounds to 0 in float32")


@pytest.mark.parametrize("dtype", FLOATS)
def test_out(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    c, a, b = draw(rng, (6, 5), dtype), draw(rng, (6, 20), dtype), draw(rng, (20, 5), dtype)
    product = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
    a_device, b_device = backend.put(a), backend.put(b)
    out = backend.put(np.full((5, 12), np.nan, NUMPY_DTYPE[dtype])).T[::2]  # strided and reversed in order
    assert bikernels.matmul(a_device, b_device, out=out, backend=backend.name) is out
    assert_same_bits(backend.get(out), product)
    in_place = backend.put(c)
    assert bikernels.addmm(in_place, a_device, b_device, out=in_place, backend=backend.name) is in_place
    assert_same_bits(backend.get(in_place), reference.addmm(c, a, b, arithmetic=backend.arithmetic[dtype]))


def test_what_surrounds_out_is_left_alone(backend: Any, rng: np.random.Generator) -> None:
    for dtype in FLOATS:
        a, b = draw(rng, (17, 20), dtype), draw(rng, (20, 19), dtype)
        around = np.full((19, 23), 7, NUMPY_DTYPE[dtype])
        memory = backend.put(around)
        bikernels.matmul(backend.put(a), backend.put(b), out=memory[1:-1, 2:-2], backend=backend.name)
        around[1:-1, 2:-2] = reference.matmul(a, b, arithmetic=backend.arithmetic[dtype])
        assert_same_bits(backend.get(memory), around)


def test_portable_class_is_the_same_on_every_backend(backend: Any, rng: np.random.Generator) -> None:
    for dtype in FLOATS:
        a, b = draw(rng, (9, 50), dtype), draw(rng, (50, 9), dtype)
        with bikernels.use_arithmetic(contract.PORTABLE_ARITHMETIC[dtype]):
            assert_same_bits(backend.call("matmul", a, b), reference.matmul(a, b))
