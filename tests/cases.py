"""Inputs that reach the corners of the contract, and the judge that compares bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from bikernels import contract, reference
from bikernels.dtypes import NUMPY_DTYPE
from bikernels.specs import A_ROW_FOR_A_ROW

RAGGED = (1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000, 4097)
FLOATS = contract.FLOAT_DTYPES
DISTRIBUTIONS = ("normal", "wide", "cancelling", "subnormal", "special")


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, distribution: str = "normal") -> np.ndarray:
    """Random values of a dtype. "special" mixes in NaN, infinities, zeros of both signs and the largest numbers;
    "balanced" rows are those of whose softmax and log-softmax the last bits show in which order was added.
    """
    x = rng.standard_normal(shape)
    if distribution == "wide":
        x = np.ldexp(x, rng.integers(-12, 12, shape))
    elif distribution == "cancelling":
        half = (shape[-1] + 1) // 2
        x[..., half:] = -x[..., : shape[-1] - half]
    elif distribution == "subnormal":
        low, high = {"bfloat16": (-76, -64), "float16": (-24, -8), "float32": (-80, -60), "float64": (-545, -500)}[
            dtype
        ]
        x = np.ldexp(x, rng.integers(low, high, shape))
    elif distribution == "balanced" and shape[-1] > 1:  # one exponential is as large as the sum of the others
        exponentials, middle = np.exp(x), shape[-1] // 2
        x[..., middle] = np.log(exponentials.sum(-1) - exponentials[..., middle])
        every_other = x.reshape(-1, shape[-1])[::2]
        every_other -= every_other[:, middle, None].copy()  # else logsumexp has the unit of the maximum
    elif distribution == "special":
        largest = float(np.finfo(NUMPY_DTYPE[dtype]).max) if dtype != "bfloat16" else 2.0**127
        values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, largest, -largest, 2.0**-120])
        chosen = rng.random(shape) < 0.02
        x[chosen] = rng.choice(values, int(chosen.sum()))
    with np.errstate(over="ignore", under="ignore"):
        return x.astype(NUMPY_DTYPE[dtype])


def smallest(dtype: str) -> np.longdouble:
    """The smallest subnormal number."""
    return np.longdouble(2.0**-133 if dtype == "bfloat16" else np.finfo(NUMPY_DTYPE[dtype]).smallest_subnormal)


def unit(x: np.ndarray, dtype: str) -> np.ndarray:
    """The place of the last bit that a dtype has at |x|."""
    fraction_bits = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}[dtype]
    return np.maximum(np.ldexp(np.longdouble(1), np.frexp(x)[1] - 1 - fraction_bits), smallest(dtype))


def bits(x: np.ndarray) -> np.ndarray:
    """The bytes of an array as unsigned integers."""
    return np.array(x, order="C").view(f"u{x.itemsize}")


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, message: str = "") -> None:
    """Fail unless dtype, shape and every byte agree; say how many elements differ and show the first."""
    assert actual.dtype == expected.dtype, f"{message}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{message}: shape {actual.shape}, expected {expected.shape}"
    different = bits(actual) != bits(expected)
    if different.any():
        first = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{message}: {int(different.sum())} of {different.size} elements differ, first at {first}: "
            f"{actual[first]!r} (0x{int(bits(actual)[first]):x}), "
            f"expected {expected[first]!r} (0x{int(bits(expected)[first]):x})"
        )


class Case(NamedTuple):
    """One call: an operation of the core, its arrays, its options."""

    name: str
    operation: str
    arrays: tuple[np.ndarray, ...]
    options: dict[str, Any]

    def expected(self) -> np.ndarray:
        """What the reference computes. Reductions take their last axis unless the options name one."""
        options = dict(self.options)
        if self.operation in ("matmul", "addmm"):
            c, a, b = (None, *self.arrays) if self.operation == "matmul" else self.arrays
            return reference.addmm(c, a, b, **options)
        axis, rank = options.pop("axis", -1), self.arrays[0].ndim
        arrays = [np.moveaxis(x, axis, -1) if x.ndim == rank else x for x in self.arrays]  # not a weight or a bias
        result = getattr(reference, self.operation)(*arrays, kept=rank - 1, **options)
        return np.moveaxis(result, -1, axis) if self.operation in A_ROW_FOR_A_ROW else result


def arithmetics(dtype: str) -> list[str]:
    """The classes that cover a dtype."""
    return [name for name, kind in contract.ARITHMETIC.items() if dtype in kind.covers]


def matmul_cases(seed: int = 0) -> Iterator[Case]:
    """Products small enough for the reference, over dtypes, classes, distributions and lengths of K."""
    rng = np.random.default_rng(seed)
    for dtype in FLOATS:
        for arithmetic in arithmetics(dtype):
            options = {"arithmetic": arithmetic}
            for distribution in DISTRIBUTIONS:
                a, b = draw(rng, (5, 100), dtype, distribution), draw(rng, (100, 9), dtype, distribution)
                yield Case(f"{dtype}-{arithmetic}-{distribution}", "matmul", (a, b), options)
            for k in (0, 1, 7, 8, 15, 16, 17, 33):
                a, b = draw(rng, (3, k), dtype, "wide"), draw(rng, (k, 17), dtype, "wide")
                yield Case(f"{dtype}-{arithmetic}-K{k}", "matmul", (a, b), options)
            a, b, c = draw(rng, (7, 40), dtype), draw(rng, (40, 11), dtype), draw(rng, (11,), dtype)
            for alpha, beta in ((1, 1), (-0.7, 0.3), (0, -1), (2.5, 0), (-1, 0)):
                yield Case(
                    f"{dtype}-{arithmetic}-alpha{alpha}-beta{beta}",
                    "addmm",
                    (c, a, b),
                    options | {"alpha": alpha, "beta": beta},
                )
            if dtype in ("bfloat16", "float16"):
                yield Case(f"{dtype}-{arithmetic}-to-float32", "matmul", (a, b), options | {"dtype": "float32"})
    bfloat16 = NUMPY_DTYPE["bfloat16"]  # 2^-149 minus 2^-160, which lies below the last bit that the floor leaves
    a = np.array([[2.0**-75, 2.0**-80]]).astype(bfloat16)
    b = np.array([[2.0**-74], [-(2.0**-80)]]).astype(bfloat16)
    for arithmetic in ("tc16f25", "tc8f24"):
        yield Case(f"bfloat16-{arithmetic}-floor", "matmul", (a, b), {"arithmetic": arithmetic, "dtype": "float32"})
    for dtype, tiny in (("float32", 2.0**-80), ("float64", 2.0**-540)):  # a product that underflows to -0
        a = np.array([[tiny, 0.0]], NUMPY_DTYPE[dtype])
        b = np.array([[-tiny], [0.0]], NUMPY_DTYPE[dtype])
        yield Case(f"{dtype}-underflow", "matmul", (a, b), {})
        yield Case(f"{dtype}-underflow-last", "matmul", (a[:, :1], b[:1]), {})


def long_matmul_cases(seed: int = 1) -> Iterator[Case]:
    """K = 4097, where a wrong order cannot hide."""
    rng = np.random.default_rng(seed)
    for dtype in FLOATS:
        for arithmetic in arithmetics(dtype):
            a, b = draw(rng, (3, 4097), dtype), draw(rng, (4097, 5), dtype)
            yield Case(f"{dtype}-{arithmetic}-K4097", "matmul", (a, b), {"arithmetic": arithmetic})


ROW_LENGTHS = (1, 2, 7, 8, 9, 31, 255, 256, 257, 2047, 2048, 2049, 5000)


SOFTMAXES = ("log_softmax", "softmax", "logsumexp")
SUMS = ("mean", "sum", "var", "std")
NORMS = ("rms_norm", "layer_norm")


def rows_to_reduce(rng: np.random.Generator, operation: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Rows that show the order of a reduction's additions; one each that is special, that has its maximum many times,
    of which much cancels, and that has an element which is zero, or has no part in a softmax. In a softmax, half of one
    is masked; powers of another are subnormal beside some that are 0, and those of one more nearly are.
    """
    count, n = shape
    is_softmax = operation in SOFTMAXES
    x = draw(rng, shape, dtype, "balanced" if is_softmax else "wide")
    if count > 3 and not is_softmax:
        x[1] = draw(rng, (n,), dtype, "cancelling")
    if count > 5 and is_softmax:
        x[1, rng.random(n) < 0.5] = -np.inf
        x[1, n // 3 : n // 2] = -np.inf
        ranges = ((709, 744), (601, 707)) if dtype == "float64" else ((88, 103), (69, 86))
        for row, less in zip(x[2:4], ranges, strict=True):
            lower = rng.random(n)
            lower[row.argmax()] = 1
            row[lower < 0.4] = row.max() - rng.uniform(*less, int((lower < 0.4).sum())).astype(x.dtype)
            row[lower < 0.2] = np.finfo(np.float16).min
    x[count // 2] = draw(rng, (n,), dtype, "special")
    x[0, n // 3] = -np.inf if is_softmax else 0
    if n > 20:
        x[-1, ::7] = 1000
    return x


OF_ONE_ARRAY = ("mean", "log_softmax", "softmax", "sum", "var", "std", "logsumexp", *NORMS)
"""The reductions that x alone is enough for."""


def reduction_cases(seed: int = 2) -> Iterator[Case]:
    """Reductions over dtypes, casts, lengths, distributions and axes."""
    rng = np.random.default_rng(seed)
    for operation in OF_ONE_ARRAY:
        for dtype in FLOATS:
            for n in ROW_LENGTHS:
                yield Case(f"{operation}-{dtype}-n{n}", operation, (draw(rng, (3, n), dtype),), {})
            for distribution in ("wide", "subnormal", "special"):
                x = draw(rng, (40, 70), dtype, distribution)
                yield Case(f"{operation}-{dtype}-{distribution}", operation, (x,), {})
            yield Case(f"{operation}-{dtype}-first-axis", operation, (draw(rng, (300, 13), dtype),), {"axis": 0})
            yield Case(f"{operation}-{dtype}-middle-axis", operation, (draw(rng, (5, 70, 11), dtype),), {"axis": 1})
            for other in FLOATS:
                if other != dtype:
                    x = draw(rng, (4, 300), dtype, "wide")
                    yield Case(f"{operation}-{dtype}-to-{other}", operation, (x,), {"dtype": other})
        for dtype in contract.INTEGER_DTYPES:
            high = 2 if dtype == "bool" else 100
            x = rng.integers(0, high, (3, 300)).astype(dtype)
            yield Case(f"{operation}-{dtype}", operation, (x,), {})
        x = rng.integers(-(2**62), 2**62, (3, 300))
        for other in FLOATS:
            yield Case(f"{operation}-int64-to-{other}", operation, (x,), {"dtype": other})
    for operation in SOFTMAXES:
        for dtype in FLOATS:
            inf = np.inf
            rows = np.array(
                [
                    [-inf, -inf, -inf, -inf],
                    [-inf, 0.0, -inf, 1.0],
                    [inf, 0.0, 1.0, -inf],
                    [0.0, -0.0, 0.0, -0.0],
                    [np.nan, 0.0, 1.0, 2.0],
                    [0.0, -20.0, -30.0, -40.0],
                    [0.0, -80.0, -90.0, -100.0],
                    [5.0, 5.0, -90.0, -700.0],
                ]
            )
            yield Case(f"{operation}-{dtype}-edges", operation, (rows.astype(NUMPY_DTYPE[dtype]),), {})
    for dtype in FLOATS:
        for operation in (*SUMS, "logsumexp"):
            yield Case(f"{operation}-{dtype}-empty", operation, (np.zeros((2, 0), NUMPY_DTYPE[dtype]),), {})
        for operation in (*SUMS, *NORMS):
            x = np.full((2, 5), -0.0, NUMPY_DTYPE[dtype])
            yield Case(f"{operation}-{dtype}-minus-zero", operation, (x,), {})
        if dtype == contract.ACCUMULATE[dtype]:
            for operation in ("std", "logsumexp", "rms_norm"):  # of which few results show a last bit of the sum
                x = draw(rng, (24, 5000), dtype)
                x[:, 0] = 9  # the others' exponentials add up to about 1 of it
                yield Case(f"{operation}-{dtype}-long", operation, (x - x.dtype.type(9),), {})
        for operation in ("var", "std"):
            for correction in (1.0, 0.5, -3.0, 70.0, 1000.0):
                x = draw(rng, (3, 70), dtype, "wide")
                yield Case(f"{operation}-{dtype}-less-{correction}", operation, (x,), {"correction": correction})
            x = (draw(rng, (3, 3000), "float64") + 100).astype(NUMPY_DTYPE[dtype])  # far from 0
            yield Case(f"{operation}-{dtype}-offset", operation, (x,), {"correction": 1.0})


def norm_cases(seed: int = 3) -> Iterator[Case]:
    """Norms with weights and biases, over dtypes, lengths, distributions, eps and axes."""
    rng = np.random.default_rng(seed)
    for operation, operands in (("rms_norm", 1), ("layer_norm", 1), ("layer_norm", 2)):
        for dtype in FLOATS:
            name = f"{operation}-{'weight' if operands == 1 else 'weight-bias'}-{dtype}"

            def affine(n: int, dtype: str = dtype, operands: int = operands) -> tuple[np.ndarray, ...]:
                return tuple(draw(rng, (n,), dtype) for _ in range(operands))

            for n in ROW_LENGTHS:
                yield Case(f"{name}-n{n}", operation, (draw(rng, (3, n), dtype), *affine(n)), {})
            for distribution in ("wide", "subnormal", "special"):
                x = draw(rng, (40, 70), dtype, distribution)
                yield Case(f"{name}-{distribution}", operation, (x, *affine(70)), {})
            for eps in (0.0, 1e-3, 10.0):
                x = np.concatenate([draw(rng, (3, 70), dtype), np.zeros((1, 70), NUMPY_DTYPE[dtype])])
                yield Case(f"{name}-eps{eps}", operation, (x, *affine(70)), {"eps": eps})
            yield Case(f"{name}-first-axis", operation, (draw(rng, (300, 13), dtype), *affine(300)), {"axis": 0})
            yield Case(f"{name}-middle-axis", operation, (draw(rng, (5, 70, 11), dtype), *affine(70)), {"axis": 1})
            for other in FLOATS:
                if other != dtype:
                    x = draw(rng, (4, 300), dtype)
                    yield Case(f"{name}-to-{other}", operation, (x, *affine(300)), {"dtype": other})
                    yield Case(f"{name}-with-{other}", operation, (x, *affine(300, other)), {})


def backward_cases(seed: int = 4) -> Iterator[Case]:
    """Backward passes over dtypes, lengths, distributions and axes."""
    rng = np.random.default_rng(seed)

    def cases(
        name: str, shape: tuple[int, ...], dtype: str, options: dict[str, Any], distribution: str = "normal"
    ) -> Iterator[Case]:
        axis = options.get("axis", -1)
        x, grad = draw(rng, shape, dtype, distribution), draw(rng, shape, dtype)
        weight = draw(rng, (shape[axis],), dtype)
        rows, kept = np.moveaxis(x, axis, -1), x.ndim - 1
        _, mean, rstd = (
            np.expand_dims(one, axis) for one in reference.layer_norm_with_statistics(rows, kept=kept, eps=1e-5)
        )
        root = np.expand_dims(reference.rms_norm_with_statistics(rows, kept=kept)[1], axis)
        for operation in ("softmax", "log_softmax"):
            y = np.moveaxis(getattr(reference, operation)(rows, kept), -1, axis)
            yield Case(f"{operation}_backward-{name}", f"{operation}_backward", (grad, y), options)
        for operation, arrays in (("rms_norm", (grad, x, root)), ("layer_norm", (grad, x, mean, rstd))):
            yield Case(f"{operation}_backward-{name}", f"{operation}_backward", arrays, options)
            with_weight = (*arrays, weight)
            yield Case(f"{operation}_backward-weight-{name}", f"{operation}_backward", with_weight, options)
            yield Case(f"{operation}_weight_backward-{name}", f"{operation}_weight_backward", arrays, options)

    for dtype in FLOATS:
        for n in ROW_LENGTHS:
            yield from cases(f"{dtype}-n{n}", (3, n), dtype, {})
        for rows in (255, 257, 2049, 5000):
            yield from cases(f"{dtype}-{rows}-rows", (rows, 3), dtype, {})
        for distribution in ("wide", "subnormal", "special"):
            yield from cases(f"{dtype}-{distribution}", (40, 70), dtype, {}, distribution)
        yield from cases(f"{dtype}-first-axis", (300, 13), dtype, {"axis": 0})
        yield from cases(f"{dtype}-middle-axis", (5, 70, 11), dtype, {"axis": 1})
        for other in FLOATS:
            if other != dtype:
                yield from cases(f"{dtype}-to-{other}", (4, 300), dtype, {"dtype": other})


def by_name(cases: Iterator[Case]) -> dict[str, Case]:
    """The cases in a dictionary; every name once."""
    result: dict[str, Case] = {}
    for case in cases:
        assert case.name not in result, case.name
        result[case.name] = case
    return result
