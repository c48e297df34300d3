"""The elementwise functions of the contract (section 10 of docs/contract.md) in plain NumPy, as `reference.py`.

The functions without a public name take arrays of the accumulate dtype, the others arrays as the operations do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import contract, reference
from .dtypes import NUMPY_DTYPE, dtype_name
from .reference import Array, fma

# --------------------------------------------------------------------------------------------- in the accumulate dtype


def _numbers(x: Array) -> tuple[Callable[[float], Any], contract.NormalConstants]:
    """The constructor of numbers of the dtype of x, and its constants."""
    return x.dtype.type, contract.NORMAL[str(x.dtype)]


def _clamp(x: Array, low: float, high: float) -> Array:
    real = x.dtype.type
    x = np.where(x < real(low), real(low), x)  # a NaN fails both comparisons and stays
    return np.where(x > real(high), real(high), x)


def _exp(x: Array) -> Array:
    return reference.exp(x)


def _exp2(x: Array) -> Array:
    ln2 = contract.EXP[str(x.dtype)]
    high, low = x.dtype.type(ln2.ln2_high), x.dtype.type(ln2.ln2_low)
    x = _clamp(x, -contract.EXP2_LARGEST, contract.EXP2_LARGEST)
    t = x * high
    return reference.exp(t, fma(x, high, -t) + x * low)


def _expm1(x: Array) -> Array:
    real = x.dtype.type
    numbers = contract.EXP[str(x.dtype)]
    unsigned = np.dtype(f"u{x.itemsize}")
    info = np.finfo(x.dtype)
    t = _clamp(x, contract.EXPM1_LOWEST, numbers.high)
    z = fma(t, real(numbers.log2e), real(numbers.magic))
    k = z - real(numbers.magic)
    f = fma(k, real(-numbers.ln2_low), fma(k, real(-numbers.ln2_high), t))
    p = fma(f * f, reference._polynomial(numbers.coefficients[2:], f), f)
    bias = unsigned.type(info.maxexp - 1)
    half = ((z.view(unsigned) - bias - unsigned.type(1)) << unsigned.type(info.nmant)).view(x.dtype)  # 2^(k - 1)
    r = fma(half, p, half - real(0.5))
    return np.where(k == 0, p, r + r)


def _log(x: Array) -> Array:
    return reference.log(x)


def _log1p(x: Array) -> Array:
    real = x.dtype.type
    u, error = reference._sum_and_error(np.ones_like(x), x)
    r = reference.log(u) + error / u
    r = np.where((u > 0) & (u < real(np.inf)), r, reference.log(u))
    return np.where(u == 1, x, r)


def _tail(x: Array) -> Array:
    """The probability above |x| of the normal distribution, times exp(x^2 / 2)."""
    real, numbers = _numbers(x)
    a = np.abs(_clamp(x, -contract.NORMAL_LARGEST, contract.NORMAL_LARGEST))
    p = reference._polynomial(numbers.tail, (a - real(4)) / (a + real(4)))
    return p / fma(a, np.full_like(a, 2), np.ones_like(a))


def _gaussian(x: Array) -> Array:
    """exp(-x^2 / 2)."""
    real = x.dtype.type
    x = _clamp(x, -contract.NORMAL_LARGEST, contract.NORMAL_LARGEST)
    square = x * x
    return reference.exp(real(-0.5) * square, real(-0.5) * fma(x, x, -square))


def _erf(x: Array) -> Array:
    real, numbers = _numbers(x)
    near = fma(x, reference._polynomial(numbers.erf, x * x), x)
    a = np.abs(x) * real(numbers.root_two)
    far = np.copysign(real(1) - real(2) * (_gaussian(a) * _tail(a)), x)
    return np.where(np.abs(x) < 1, near, far)


def _probability_below(x: Array) -> Array:
    above = _gaussian(x) * _tail(x)
    return np.where(x < 0, above, x.dtype.type(1) - above)


def _gelu(x: Array) -> Array:
    return x * _probability_below(x)


def _gelu_backward(g: Array, x: Array) -> Array:
    real, numbers = _numbers(x)
    x = _clamp(x, -contract.NORMAL_LARGEST, contract.NORMAL_LARGEST)
    return g * fma(x * real(numbers.density), _gaussian(x), _probability_below(x))


def _sigmoid(x: Array) -> Array:
    one = x.dtype.type(1)
    e = reference.exp(-np.abs(x))
    return np.where(x >= 0, one, e) / (one + e)


def _tanh_form(x: Array) -> Array:
    """What the sigmoid in the tanh form of gelu is taken of."""
    real, numbers = _numbers(x)
    square = x * x
    return x * fma(np.full_like(x, numbers.gelu_cubic), square, np.full_like(x, real(numbers.gelu_slope)))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(_tanh_form(x))


def _gelu_tanh_backward(g: Array, x: Array) -> Array:
    _, numbers = _numbers(x)
    x = _clamp(x, -contract.NORMAL_LARGEST, contract.NORMAL_LARGEST)
    w = _tanh_form(x)
    s = _sigmoid(w)
    slope = fma(np.full_like(x, numbers.gelu_cubic_slope), x * x, np.full_like(x, numbers.gelu_slope))
    return g * (s * fma(x * _sigmoid(-w), slope, np.ones_like(x)))


def _silu(x: Array) -> Array:
    one = x.dtype.type(1)
    e = reference.exp(-np.abs(x))
    return np.where(x >= 0, x, x * e) / (one + e)


def _silu_backward(g: Array, x: Array) -> Array:
    s = _sigmoid(x)
    return g * (s * fma(x, _sigmoid(-x), np.ones_like(x)))


def _sigmoid_backward(g: Array, y: Array) -> Array:
    return (g * (y.dtype.type(1) - y)) * y


def _tanh(x: Array) -> Array:
    e = _expm1(np.minimum(np.abs(x), x.dtype.type(contract.TANH_LARGEST)) * x.dtype.type(2))  # minimum keeps a NaN
    return np.copysign(e / (e + x.dtype.type(2)), x)


def _tanh_backward(g: Array, y: Array) -> Array:
    return g * fma(-y, y, np.ones_like(y))


def _sqrt(x: Array) -> Array:
    return np.sqrt(x)


def _rsqrt(x: Array) -> Array:
    return x.dtype.type(1) / np.sqrt(x)


def _softplus(x: Array, beta: float, threshold: float) -> Array:
    real = x.dtype.type
    z = x * real(beta)
    return np.where(z > real(threshold), x, _log1p(reference.exp(z)) / real(beta))


def _softplus_backward(g: Array, x: Array, beta: float, threshold: float) -> Array:
    real = x.dtype.type
    z = x * real(beta)
    return np.where(z > real(threshold), g, g * _sigmoid(z))


# -------------------------------------------------------------------------------------------------- always in float64


def _reduce_large(x: float) -> tuple[int, float, float]:
    """The quadrant of |x| >= 2^20, and what is left as a sum of two numbers, by integers."""
    significand, exponent = np.frexp(x)
    m, q = int(np.ldexp(significand, 53)), int(exponent) - 53
    table = 0
    for word in contract.CIRCULAR.two_over_pi_words:
        table = table << 64 | word
    bits = 64 * len(contract.CIRCULAR.two_over_pi_words)
    window = table >> (bits - (q + 62) - 192) & (1 << 192) - 1
    product = m * window % (1 << 192)
    fraction = product << 2 & (1 << 192) - 1
    negative = fraction >> 191
    if negative:
        fraction ^= (1 << 192) - 1
    high, middle = fraction >> 128, fraction >> 64 & (1 << 64) - 1
    a = np.ldexp(float(high >> 11 << 11), -64)
    b = np.ldexp(float(high & 2047), -64) + np.ldexp(float(middle >> 11), -117)
    sign = -1.0 if negative else 1.0
    turns = a + b
    rest = b - (turns - a)
    return int(product >> 190) + negative, sign * turns, sign * rest


def _reduced(x: Array) -> tuple[Array, Array, Array]:
    """The quadrant of float64 x, of which the last two bits count, and r + c, what is left."""
    numbers = contract.CIRCULAR
    first, second, third = numbers.half_pi
    z = fma(x, np.full_like(x, numbers.two_over_pi), np.full_like(x, numbers.magic))
    k = z - numbers.magic
    r = fma(-k, np.full_like(x, first), x)
    t = k * second
    e = fma(k, np.full_like(x, second), -t)
    r, error = reference._sum_and_error(r, -t)
    c = fma(-k, np.full_like(x, third), error - e)
    quadrant = z.view(np.int64).copy()
    large = (np.abs(x) >= numbers.small) & np.isfinite(x)
    if large.any():
        turned = [_reduce_large(value) for value in np.abs(x[large]).tolist()]
        q, high, low = (np.array(one) for one in zip(*turned, strict=True))
        sign = np.where(x[large] < 0, -1, 1)
        rest = high * first
        quadrant[large] = q * sign
        r[large] = rest * sign
        c[large] = (fma(high, np.full_like(high, first), -rest) + (high * second + low * first)) * sign
    return quadrant, r, c


def _circular(x: Array, quarter: int) -> Array:
    wide = x.astype(np.float64)
    quadrant, r, c = _reduced(wide)
    quadrant = quadrant + quarter
    z = r * r
    s = r + fma(r * z, reference._polynomial(contract.CIRCULAR.sin, z), fma(np.float64(-0.5) * z, c, c))
    h = 0.5 * z
    w = 1.0 - h
    p = reference._polynomial(contract.CIRCULAR.cos, z)
    k = w + (((1.0 - w) - h) + fma(z * z, p, -(r * c)))
    result = np.where(quadrant & 1, k, s)
    result = np.where(quadrant & 2, -result, result)
    return np.where(np.isfinite(wide), result, np.nan).astype(x.dtype)


def _sin(x: Array) -> Array:
    return np.where(x == 0, x, _circular(x, 0))


def _cos(x: Array) -> Array:
    return _circular(x, 1)


def _pow(x: Array, y: Array) -> Array:
    a, b = x.astype(np.float64), y.astype(np.float64)
    r = reference.exp(b * reference.log(np.abs(a)))
    whole = np.floor(b) == b
    odd = whole & (np.floor(b * 0.5) != b * 0.5)
    negative = np.signbit(a)
    r = np.where(negative & odd, -r, r)
    r = np.where((a < 0) & ~whole & np.isfinite(a), np.nan, r)
    r = np.where(b == 2, a * a, r)
    r = np.where(b == 1, a, r)
    r = np.where((a == -1) & np.isinf(b), 1.0, r)
    return np.where((b == 0) | (a == 1), 1.0, r).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------ as operations


def _function(compute: Callable[..., Array], *arrays: Array, dtype: str | None = None, numbers: Any = ()) -> Array:
    name = dtype or (
        "float64" if dtype_name(arrays[0].dtype) in contract.INTEGER_DTYPES else dtype_name(arrays[0].dtype)
    )
    accumulate = NUMPY_DTYPE[contract.ACCUMULATE[name]]
    shape = np.broadcast_shapes(*(x.shape for x in arrays))
    with np.errstate(all="ignore"):
        wide = [np.ascontiguousarray(reference.cast(x, name).astype(accumulate)) for x in arrays]
        wide = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*wide)]
        return reference.write(compute(*wide, *numbers), name).reshape(shape)


def gelu(x: Array, approximate: str = "none", dtype: str | None = None) -> Array:
    """x times the probability below x of the normal distribution, or its form with tanh."""
    return _function(_gelu if approximate == "none" else _gelu_tanh, x, dtype=dtype)


def gelu_backward(grad: Array, x: Array, approximate: str = "none", dtype: str | None = None) -> Array:
    """The gradient of gelu."""
    return _function(_gelu_backward if approximate == "none" else _gelu_tanh_backward, grad, x, dtype=dtype)


def softplus(x: Array, beta: float = 1.0, threshold: float = 20.0, dtype: str | None = None) -> Array:
    """log(1 + exp(beta x)) / beta."""
    return _function(_softplus, x, dtype=dtype, numbers=(beta, threshold))


def softplus_backward(
    grad: Array, x: Array, beta: float = 1.0, threshold: float = 20.0, dtype: str | None = None
) -> Array:
    """The gradient of softplus."""
    return _function(_softplus_backward, grad, x, dtype=dtype, numbers=(beta, threshold))


exp = functools.partial(_function, _exp)
exp2 = functools.partial(_function, _exp2)
expm1 = functools.partial(_function, _expm1)
log = functools.partial(_function, _log)
log1p = functools.partial(_function, _log1p)
erf = functools.partial(_function, _erf)
sqrt = functools.partial(_function, _sqrt)
rsqrt = functools.partial(_function, _rsqrt)
sigmoid = functools.partial(_function, _sigmoid)
tanh = functools.partial(_function, _tanh)
silu = functools.partial(_function, _silu)
sin = functools.partial(_function, _sin)
cos = functools.partial(_function, _cos)
pow = functools.partial(_function, _pow)  # noqa: A001
sigmoid_backward = functools.partial(_function, _sigmoid_backward)
tanh_backward = functools.partial(_function, _tanh_backward)
silu_backward = functools.partial(_function, _silu_backward)
