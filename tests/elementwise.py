"""The elementwise functions for tests: how each is called, inputs that reach its corners, and exact values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bikernels.dtypes import NUMPY_DTYPE

LONG = np.longdouble
PI = LONG(math.pi) + LONG(1.2246467991473532e-16)
BETA, THRESHOLD = 1.25, 7.0

# --------------------------------------------------------------------------------------- exact values, in longdouble


def _scaled_erfc(a: Any) -> Any:
    """erfc(a) exp(a^2) for a >= 2, by Laplace's continued fraction."""
    fraction = np.zeros_like(a)
    for n in range(200, 0, -1):
        fraction = LONG(n) / 2 / (a + fraction)
    return 1 / (a + fraction) / np.sqrt(PI)


def _erf_near(x: Any) -> Any:
    """erf(x) for |x| <= 2, by a series of terms of one sign."""
    total = term = x
    for n in range(1, 70):
        term = term * (2 * x * x) / (2 * n + 1)
        total = total + term
    return total * np.exp(-x * x) * 2 / np.sqrt(PI)


def _erf(x: Any) -> Any:
    far = np.abs(x) > 2
    a = np.where(far, np.abs(x), LONG(2))
    return np.where(far, np.copysign(1 - _scaled_erfc(a) * np.exp(-a * a), x), _erf_near(np.where(far, LONG(0), x)))


def _below(x: Any) -> Any:
    """The probability below x of the normal distribution."""
    z = x / np.sqrt(LONG(2))
    far = np.abs(z) > 2
    tail = _scaled_erfc(np.where(far, np.abs(z), LONG(2))) * np.exp(-x * x / 2) / 2
    return np.where(far, np.where(x < 0, tail, 1 - tail), (1 + _erf_near(np.where(far, LONG(0), z))) / 2)


def _sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _tanh_form(x: Any) -> Any:
    return 2 * np.sqrt(2 / PI) * (x + LONG("0.044715") * x**3)


def _softplus(x: Any) -> Any:
    z = x * LONG(BETA)
    return np.where(z > THRESHOLD, x, np.log1p(np.exp(np.minimum(z, THRESHOLD))) / LONG(BETA))


def _silu_slope(x: Any) -> Any:
    return _sigmoid(x) * (1 + x * _sigmoid(-x))


def _gelu_slope(x: Any) -> Any:
    return _below(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * PI)


def _gelu_tanh_slope(x: Any) -> Any:
    w, slope = _tanh_form(x), 2 * np.sqrt(2 / PI) * (1 + 3 * LONG("0.044715") * x * x)
    return _sigmoid(w) * (1 + x * _sigmoid(-w) * slope)


# ------------------------------------------------------------------------------------------------------ the functions


class Function(NamedTuple):
    """A function of the core, by its name in `specs.ELEMENTWISE`."""

    options: dict[str, Any]
    exact: Callable[..., Any]
    """Of longdouble operands; of a backward form the slope at the second one."""
    bound: float | Callable[..., Any]
    """Units in the last place of the accumulate dtype by which the result may be off before it is rounded to its dtype;
    of a backward form those of the gradient. docs/contract.md states them."""
    tiny: bool = False
    """Whether another |x| of the smallest numbers come on top, of the product of x and a subnormal number."""


_SOFTPLUS = {"beta": BETA, "threshold": THRESHOLD}
_TANH = {"approximate": "tanh"}

FUNCTIONS = {
    "exp": Function({}, np.exp, 0.9),
    "exp2": Function({}, np.exp2, 1.1),
    "expm1": Function({}, np.expm1, 2),
    "log": Function({}, np.log, 0.9),
    "log1p": Function({}, np.log1p, 1.5),
    "erf": Function({}, _erf, 1.5),
    "sqrt": Function({}, np.sqrt, 0.5),
    "rsqrt": Function({}, lambda x: 1 / np.sqrt(x), 1.5),
    "sigmoid": Function({}, _sigmoid, 2.5),
    "tanh": Function({}, np.tanh, 3),
    "silu": Function({}, lambda x: x * _sigmoid(x), 3.5, tiny=True),
    "gelu": Function({}, lambda x: x * _below(x), 8, tiny=True),
    "gelu_tanh": Function(
        _TANH, lambda x: x * _sigmoid(_tanh_form(x)), lambda x: 4 + np.maximum(0, -2.5 * _tanh_form(x)), tiny=True
    ),
    "softplus": Function(_SOFTPLUS, _softplus, lambda x: 3 + np.abs(x * LONG(BETA))),
    "sin": Function({}, np.sin, 1),
    "cos": Function({}, np.cos, 1),
    "pow": Function({}, np.power, lambda x, y: 1 + 2.75 * np.nan_to_num(np.abs(y * np.log(np.abs(x))))),
    "sigmoid_backward": Function({}, lambda y: (1 - y) * y, 1),
    "tanh_backward": Function({}, lambda y: 1 - y * y, 1.5),
    "silu_backward": Function({}, _silu_slope, 5),
    "gelu_backward": Function({}, _gelu_slope, 5),
    "gelu_tanh_backward": Function(_TANH, _gelu_tanh_slope, 8),
    "softplus_backward": Function(
        _SOFTPLUS, lambda x: np.where(x * LONG(BETA) > THRESHOLD, 1, _sigmoid(x * LONG(BETA))), 3
    ),
}

IN_FLOAT64 = ("sin", "cos", "pow")
"""Computed in float64 for every dtype, so that the only error of a narrower result is that of its rounding."""


def public_name(name: str) -> str:
    return name.replace("gelu_tanh", "gelu")


def is_backward(name: str) -> bool:
    return name.endswith("backward")


# -------------------------------------------------------------------------------------------------------- the inputs

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 2.0, -2.0, 0.5, 3.0, -3.0, 1.5, 1e-40, -1e-40, 3e38,
           -3e38, 88.8, -88.8, -104.0, 1e5, 2.0**20, -(2.0**20), 2.0**24, 2.0**52, 1e300)  # fmt: skip


def operands(name: str, dtype: str, seed: int = 11) -> tuple[np.ndarray, ...]:
    """Operands of a function: of 16 bits every number is there, of others those that are special, close, wide, far."""
    rng = np.random.default_rng(seed)
    if NUMPY_DTYPE[dtype].itemsize == 2:
        x = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_DTYPE[dtype])
    else:
        largest = 127 if dtype == "float32" else 1020
        parts = (
            np.repeat(SPECIAL, len(SPECIAL)),
            *(rng.uniform(-reach, reach, 1000) for reach in (1, 6, 30, 110)),
            rng.standard_normal(500) * 1e5,
            np.ldexp(rng.standard_normal(1000), rng.integers(-largest - 20, largest, 1000)),
            np.arange(1, 200) * (math.pi / 2),
        )
        with np.errstate(all="ignore"):
            x = np.concatenate(parts).astype(NUMPY_DTYPE[dtype])
    if name != "pow" and not is_backward(name):
        return (x,)
    y = rng.standard_normal(x.size) * 3
    y[::3] = np.round(y[::3])
    y[: len(SPECIAL) ** 2] = np.tile(SPECIAL, len(SPECIAL))
    with np.errstate(all="ignore"):
        y = y.astype(NUMPY_DTYPE[dtype])
    return (x, y) if name == "pow" else (y, x)
