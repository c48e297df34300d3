"""The elementwise functions: every backend's bytes against the reference, and how far that is from the truth."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels import contract, reference, reference_elementwise
from bikernels.dtypes import NUMPY_DTYPE
from bikernels.specs import ELEMENTWISE

from .cases import FLOATS, assert_same_bits, bits, draw, smallest, unit
from .elementwise import FUNCTIONS, IN_FLOAT64, LONG, is_backward, operands, public_name


def expected(name: str, *arrays: np.ndarray, **options: Any) -> np.ndarray:
    return getattr(reference_elementwise, public_name(name))(*arrays, **FUNCTIONS[name].options, **options)


@functools.cache
def of_operands(name: str, dtype: str) -> np.ndarray:
    return expected(name, *operands(name, dtype))


def test_every_function_is_tested() -> None:
    assert set(FUNCTIONS) == set(ELEMENTWISE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_reference(backend: Any, name: str, dtype: str) -> None:
    """Of every number of 16 bits, and of those of others that reach the corners."""
    skip_without(backend, name)
    result = backend.call(public_name(name), *operands(name, dtype), **FUNCTIONS[name].options)
    assert_same_bits(result, of_operands(name, dtype), name)


def skip_without(backend: Any, name: str) -> None:
    from bikernels.backend import get

    if name not in get(backend.name).elementwise:
        pytest.skip(f"backend {backend.name!r} does not have {name}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["silu", "pow", "gelu_backward"])
def test_layouts(backend: Any, name: str, dtype: str, rng: np.random.Generator) -> None:
    """Any strides, at any place, in place, beside a broadcast operand, to and from other dtypes."""
    skip_without(backend, name)
    function = getattr(bikernels, public_name(name))
    two = name == "pow" or is_backward(name)
    for shape in ((), (1,), (3000,), (7, 13, 5), (2, 0, 3)):
        arrays = tuple(np.abs(draw(rng, shape, dtype)) for _ in range(1 + two))
        whole = expected(name, *arrays)
        for layout, view in backend.layouts(arrays[-1]):
            moved = (*map(backend.put, arrays[:-1]), view)
            assert_same_bits(backend.get(function(*moved, backend=backend.name)), whole, f"{shape} {layout}")
            if whole.size and layout != "contiguous":
                out = function(*moved, out=view, backend=backend.name)
                assert out is view
                assert_same_bits(np.array(backend.get(view)), whole, f"{shape} {layout} in place")
        for other in FLOATS:
            cast = expected(name, *arrays, dtype=other)
            assert_same_bits(backend.call(public_name(name), *arrays, dtype=other), cast, f"{dtype} to {other}")
    if two:
        x, y = draw(rng, (4, 1, 6), dtype), draw(rng, (5, 1), dtype)
        assert_same_bits(backend.call(public_name(name), x, y), expected(name, x, y), "broadcast")


def test_a_number_as_exponent_and_integers(backend: Any, rng: np.random.Generator) -> None:
    skip_without(backend, "pow")
    x = np.abs(draw(rng, (300,), "float32"))
    for y in (2, 2.5, -0.5, 0):
        result = backend.get(bikernels.pow(backend.put(x), y, backend=backend.name))
        assert_same_bits(result, expected("pow", x, np.full_like(x, y)))
    whole = np.arange(-5, 40)
    assert_same_bits(backend.call("tanh", whole), expected("tanh", whole))


def test_an_element_has_the_same_bits_everywhere(rng: np.random.Generator) -> None:
    """Alone, at any offset and in any length: vectors of elements and what is left of them."""
    x = draw(rng, (270,), "float32")
    for name in FUNCTIONS:
        if name == "pow" or is_backward(name):
            continue
        function = functools.partial(getattr(bikernels, public_name(name)), **FUNCTIONS[name].options)
        alone = np.concatenate([function(x[i : i + 1]) for i in range(x.size)])
        for start, length in ((0, 270), (1, 7), (3, 16), (5, 33), (0, 129), (13, 257)):
            assert_same_bits(function(x[start : start + length]), alone[start : start + length], name)
        assert_same_bits(function(np.tile(x, 1000))[-270:], alone, name)


# ----------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.skipif(np.finfo(LONG).nmant < 60, reason="longdouble is float64 here")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name: str, dtype: str) -> None:
    """Of every number of 16 bits; the reference's bytes are those of the backends."""
    function, arrays = FUNCTIONS[name], operands(name, dtype)
    accumulate = contract.ACCUMULATE[dtype]
    with np.errstate(all="ignore"):
        wide = [x.astype(LONG) for x in arrays]
        of = wide[1:] if is_backward(name) else wide
        exact = function.exact(*of)
        bound = function.bound if isinstance(function.bound, int | float) else function.bound(*of)
        size = exact
        if is_backward(name):
            exact, size = exact * wide[0], wide[0] * 1.2
            least = {"sigmoid_backward": 0, "tanh_backward": -1}.get(name)
            if least is not None:  # of a result
                exact = np.where((wide[1] >= least) & (wide[1] <= 1), exact, np.nan)
        computed = unit(size, "float64" if name in IN_FLOAT64 else accumulate) * bound
        if function.tiny:
            computed += np.abs(wide[0]) * smallest(accumulate)
        if dtype != accumulate or name in IN_FLOAT64:
            computed += unit(exact, dtype) * 0.501
        rounded = exact.astype(NUMPY_DTYPE[accumulate]).astype(NUMPY_DTYPE[dtype])
        result = of_operands(name, dtype)
        comparable = np.isfinite(exact) & np.isfinite(rounded.astype(LONG))
        error = np.abs(result.astype(LONG) - exact)
        wrong = np.flatnonzero(comparable & ~(error <= computed))
    assert comparable.sum() > 500
    assert not wrong.size, [(*(x[i] for x in arrays), result[i], exact[i], error[i] / computed[i]) for i in wrong[:3]]
    assert error[comparable].max() > 0 or name.startswith("sigmoid_b")


@pytest.mark.skipif(np.finfo(LONG).nmant < 60, reason="longdouble is float64 here")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not is_backward(name)])
def test_zeros_infinities_and_nan(name: str) -> None:
    """Where the true value is one of them, the result is, with its sign; expm1(-0) alone is +0."""
    arrays = operands(name, "float64")
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name].exact(*(x.astype(LONG) for x in arrays))
    special = (exact == 0) | ~np.isfinite(exact)
    if name in ("expm1", "softplus"):
        special &= arrays[0] != 0
    if name == "gelu_tanh":
        special &= np.abs(arrays[0]) < 1e100  # its cube is not infinite in longdouble
    result, exact = of_operands(name, "float64")[special], exact[special].astype(np.float64)
    assert np.array_equal(result, exact, equal_nan=True)
    known = ~np.isnan(exact)
    assert np.array_equal(np.signbit(result[known]), np.signbit(exact[known]))


def test_squares_and_powers_of_two_are_exact(rng: np.random.Generator) -> None:
    for dtype in FLOATS:
        x = draw(rng, (2000,), dtype, "wide")
        wide = x.astype(NUMPY_DTYPE[contract.ACCUMULATE[dtype]])
        with np.errstate(all="ignore"):
            assert_same_bits(bikernels.pow(x, 2), reference.write(wide * wide, dtype))
        assert_same_bits(bikernels.pow(x, 1), x)
    for dtype, least in (("float32", -149), ("float64", -1074)):
        k = np.arange(least, 100).astype(NUMPY_DTYPE[dtype])
        assert_same_bits(bikernels.exp2(k), np.ldexp(NUMPY_DTYPE[dtype].type(1), k.astype(int)))


# ------------------------------------------------------------------------------------------------- the suite can fail


@pytest.mark.parametrize(
    ("table", "field", "name"),
    [
        ("NORMAL", "tail", "gelu"),
        ("NORMAL", "erf", "erf"),
        ("NORMAL", "gelu_cubic", "gelu_tanh"),
        ("NORMAL", "density", "gelu_backward"),
        ("CIRCULAR", "sin", "sin"),
        ("CIRCULAR", "cos", "cos"),
        ("CIRCULAR", "two_over_pi_words", "sin"),
        ("EXP", "ln2_high", "tanh"),
    ],
)
def test_another_constant_is_noticed(table: str, field: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = "float64"
    before = of_operands(name, dtype)

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            place = 3 if isinstance(value[0], int) else 0
            return (*value[:place], moved(value[place]), *value[place + 1 :])
        return value ^ 1 << 40 if isinstance(value, int) else float(np.nextafter(value, np.inf))

    numbers = getattr(contract, table)
    if table == "CIRCULAR":
        monkeypatch.setattr(contract, table, numbers._replace(**{field: moved(getattr(numbers, field))}))
    else:
        monkeypatch.setitem(numbers, dtype, numbers[dtype]._replace(**{field: moved(getattr(numbers[dtype], field))}))
    assert (bits(expected(name, *operands(name, dtype))) != bits(before)).any()


# ------------------------------------------------------------------------------------------------------------- errors


def test_errors_name_the_argument() -> None:
    x = np.ones((3, 4), np.float32)
    with pytest.raises(TypeError, match="x is float32 and y is float64; cast them to one dtype"):
        bikernels.pow(x, x.astype(np.float64))
    with pytest.raises(ValueError, match=r"grad has shape \(3, 4\) and x has \(3,\)"):
        bikernels.silu_backward(x, x[:, 0])
    with pytest.raises(ValueError, match="approximate is 'fast'; pass 'none' or 'tanh'"):
        bikernels.gelu(x, approximate="fast")
    with pytest.raises(TypeError, match="beta is 'a'; pass a real number"):
        bikernels.softplus(x, beta="a")
    with pytest.raises(TypeError, match="grad is int64; cast it"):
        bikernels.silu_backward(x.astype(int), x)
    with pytest.raises(ValueError, match=r"out shares memory with x.*only x itself"):
        bikernels.exp(x[:, :3], out=x[:, 1:])
    with pytest.raises(TypeError, match="dtype complex64 is not supported"):
        bikernels.exp(x.astype(np.complex64))


def test_a_function_that_the_backend_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from bikernels.backend import get

    monkeypatch.setattr(get("cpu"), "elementwise", frozenset(), raising=False)
    with pytest.raises(bikernels.OperationUnsupportedError, match="tanh cannot be computed by backend 'cpu'"):
        bikernels.tanh(np.ones((2, 3, 23)))
