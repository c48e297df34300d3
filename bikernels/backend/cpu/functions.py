"""The elementwise functions of the contract (docs/contract.md, section 10), for one value in float32 or float64.

`function` has them by their names in `specs.ELEMENTWISE`: each takes x, the second operand (anything if it has none),
and two numbers. sin, cos and pow compute in float64 whatever they are given.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from ... import contract
from .compile import inner, primitive
from .elementary import exp, fma, log, sqrt
from .numerics import FLOAT
from .vectors import F32, F64, I32, I64

# ------------------------------------------------------------------------------------------------------------- bits


@primitive
def _bits(typing_context: Any, x: Any) -> Any:
    """The bits of a float as a signed integer of its size."""
    integer = types.int32 if x == types.float32 else types.int64

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], I32 if integer == types.int32 else I64)

    return integer(x), codegen


@primitive
def _from_bits(typing_context: Any, x: Any) -> Any:
    """The float that has the bits of a signed integer."""
    real = types.float32 if x == types.int32 else types.float64

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], F32 if real == types.float32 else F64)

    return real(x), codegen


@primitive
def _high_product(typing_context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of a product of two uint64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        from llvmlite import ir

        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(value, wide) for value in values))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), I64)

    return types.uint64(types.uint64, types.uint64), codegen


# -------------------------------------------------------------------------------------------- in the accumulate dtype


@functools.cache
def _polynomial(accumulate: str, coefficients: tuple[float, ...]) -> Any:
    real = FLOAT[accumulate]
    reversed_coefficients = tuple(real(c) for c in coefficients[::-1])

    @inner
    def polynomial(x):  # type: ignore[no-untyped-def]
        p = reversed_coefficients[0]
        for i in range(1, len(reversed_coefficients)):
            p = fma(p, x, reversed_coefficients[i])
        return p

    return polynomial


@functools.cache
def _functions(accumulate: str) -> dict[str, Any]:
    real: Any = FLOAT[accumulate]
    numbers, of_exp = contract.NORMAL[accumulate], contract.EXP[accumulate]
    zero, half, one, two, four = (real(number) for number in (0, 0.5, 1, 2, 4))
    infinity = real(np.inf)
    word, fraction = (np.int32, 23) if real is np.float32 else (np.int64, 52)
    bias = word(np.finfo(real).maxexp - 1)
    log2e, magic = real(of_exp.log2e), real(of_exp.magic)
    ln2_high, ln2_low = real(of_exp.ln2_high), real(of_exp.ln2_low)
    expm1_low, exp_high = real(contract.EXPM1_LOWEST), real(of_exp.high)
    exp2_largest, tanh_largest = real(contract.EXP2_LARGEST), real(contract.TANH_LARGEST)
    normal_largest = real(contract.NORMAL_LARGEST)
    root_two, density = real(numbers.root_two), real(numbers.density)
    slope, cubic, cubic_slope = (
        real(numbers.gelu_slope),
        real(numbers.gelu_cubic),
        real(numbers.gelu_cubic_slope),
    )
    of_expm1 = _polynomial(accumulate, of_exp.coefficients[2:])
    of_tail, of_erf = _polynomial(accumulate, numbers.tail), _polynomial(accumulate, numbers.erf)

    @inner
    def clamp(x, low, high):  # type: ignore[no-untyped-def]
        x = low if x < low else x  # a NaN fails both comparisons and stays
        return high if x > high else x

    @inner
    def exp_(x, y, a, b):  # type: ignore[no-untyped-def]
        return exp(x, zero)

    @inner
    def exp2(x, y, a, b):  # type: ignore[no-untyped-def]
        x = clamp(x, -exp2_largest, exp2_largest)
        t = x * ln2_high
        return exp(t, fma(x, ln2_high, -t) + x * ln2_low)

    @inner
    def expm1(x, y, a, b):  # type: ignore[no-untyped-def]
        t = clamp(x, expm1_low, exp_high)
        z = fma(t, log2e, magic)
        k = z - magic
        f = fma(k, -ln2_low, fma(k, -ln2_high, t))
        p = fma(f * f, of_expm1(f), f)
        # The low bits of z are k + 2 * bias; those of 2^(k - 1) are k - 1 + bias, shifted.
        power = _from_bits(word((_bits(z) - bias - word(1)) << word(fraction)))
        r = fma(power, p, power - half)
        return p if k == zero else r + r

    @inner
    def log_(x, y, a, b):  # type: ignore[no-untyped-def]
        return log(x)

    @inner
    def log1p(x, y, a, b):  # type: ignore[no-untyped-def]
        u = one + x
        t = u - one
        error = (one - (u - t)) + (x - t)
        r = log(u)
        r = r + error / u if (u > zero) and (u < infinity) else r
        return x if u == one else r

    @inner
    def tail(x):  # type: ignore[no-untyped-def]
        a = abs(clamp(x, -normal_largest, normal_largest))
        return of_tail((a - four) / (a + four)) / fma(a, two, one)

    @inner
    def gaussian(x):  # type: ignore[no-untyped-def]
        x = clamp(x, -normal_largest, normal_largest)
        square = x * x
        return exp(-half * square, -half * fma(x, x, -square))

    @inner
    def erf(x, y, a, b):  # type: ignore[no-untyped-def]
        near = fma(x, of_erf(x * x), x)
        z = abs(x) * root_two
        far = one - two * (gaussian(z) * tail(z))
        return near if abs(x) < one else (-far if x < zero else far)

    @inner
    def below(x, e):  # type: ignore[no-untyped-def]
        above = e * tail(x)
        return above if x < zero else one - above

    @inner
    def gelu(x, y, a, b):  # type: ignore[no-untyped-def]
        return x * below(x, gaussian(x))

    @inner
    def gelu_backward(g, x, a, b):  # type: ignore[no-untyped-def]
        x = clamp(x, -normal_largest, normal_largest)
        e = gaussian(x)
        return g * fma(x * density, e, below(x, e))

    @inner
    def sigmoid(x, y, a, b):  # type: ignore[no-untyped-def]
        e = exp(-abs(x), zero)
        return (one if x >= zero else e) / (one + e)

    @inner
    def gelu_tanh(x, y, a, b):  # type: ignore[no-untyped-def]
        return x * sigmoid(x * fma(cubic, x * x, slope), x, a, b)

    @inner
    def gelu_tanh_backward(g, x, a, b):  # type: ignore[no-untyped-def]
        x = clamp(x, -normal_largest, normal_largest)
        square = x * x
        w = x * fma(cubic, square, slope)
        s = sigmoid(w, x, a, b)
        return g * (s * fma(x * sigmoid(-w, x, a, b), fma(cubic_slope, square, slope), one))

    @inner
    def silu(x, y, a, b):  # type: ignore[no-untyped-def]
        e = exp(-abs(x), zero)
        return (x if x >= zero else x * e) / (one + e)

    @inner
    def silu_backward(g, x, a, b):  # type: ignore[no-untyped-def]
        s = sigmoid(x, x, a, b)
        return g * (s * fma(x, sigmoid(-x, x, a, b), one))

    @inner
    def sigmoid_backward(g, y, a, b):  # type: ignore[no-untyped-def]
        return (g * (one - y)) * y

    @inner
    def tanh(x, y, a, b):  # type: ignore[no-untyped-def]
        z = abs(x)
        e = expm1((tanh_largest if z > tanh_largest else z) * two, x, a, b)
        r = e / (e + two)
        return -r if _bits(x) < 0 else r

    @inner
    def tanh_backward(g, y, a, b):  # type: ignore[no-untyped-def]
        return g * fma(-y, y, one)

    @inner
    def sqrt_(x, y, a, b):  # type: ignore[no-untyped-def]
        return sqrt(x)

    @inner
    def rsqrt(x, y, a, b):  # type: ignore[no-untyped-def]
        return one / sqrt(x)

    @inner
    def softplus(x, y, a, b):  # type: ignore[no-untyped-def]
        z = x * a
        return x if z > b else log1p(exp(z, zero), x, a, b) / a

    @inner
    def softplus_backward(g, x, a, b):  # type: ignore[no-untyped-def]
        z = x * a
        return g if z > b else g * sigmoid(z, x, a, b)

    @inner
    def sin(x, y, a, b):  # type: ignore[no-untyped-def]
        return x if x == zero else real(_circular(np.float64(x), 0))

    @inner
    def cos(x, y, a, b):  # type: ignore[no-untyped-def]
        return real(_circular(np.float64(x), 1))

    @inner
    def pow(x, y, a, b):  # type: ignore[no-untyped-def]  # noqa: A001
        return real(_pow(np.float64(x), np.float64(y)))

    return {
        "exp": exp_,
        "exp2": exp2,
        "expm1": expm1,
        "log": log_,
        "log1p": log1p,
        "erf": erf,
        "sqrt": sqrt_,
        "rsqrt": rsqrt,
        "sigmoid": sigmoid,
        "tanh": tanh,
        "silu": silu,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "softplus": softplus,
        "sin": sin,
        "cos": cos,
        "pow": pow,
        "sigmoid_backward": sigmoid_backward,
        "tanh_backward": tanh_backward,
        "silu_backward": silu_backward,
        "gelu_backward": gelu_backward,
        "gelu_tanh_backward": gelu_tanh_backward,
        "softplus_backward": softplus_backward,
    }


def function(name: str, accumulate: str) -> Any:
    """The function of that name."""
    return _functions(accumulate)[name]


# -------------------------------------------------------------------------------------------------- always in float64

_TWO_OVER_PI, _MAGIC, _SMALL = contract.CIRCULAR.two_over_pi, contract.CIRCULAR.magic, contract.CIRCULAR.small
_FIRST, _SECOND, _THIRD = contract.CIRCULAR.half_pi
_WORDS = np.array(contract.CIRCULAR.two_over_pi_words, np.uint64)
_sin_polynomial = _polynomial("float64", contract.CIRCULAR.sin)
_cos_polynomial = _polynomial("float64", contract.CIRCULAR.cos)
_U64 = np.uint64


@inner
def _reduce(x):  # type: ignore[no-untyped-def]
    """Quadrant, and what is left as a sum, of |x| < 2^20."""
    z = fma(x, _TWO_OVER_PI, _MAGIC)
    k = z - _MAGIC
    s = fma(-k, _FIRST, x)
    t = k * _SECOND
    e = fma(k, _SECOND, -t)
    r = s - t
    b = r - s
    error = (s - (r - b)) + (-t - b)
    return _bits(z), r, fma(-k, _THIRD, error - e)


@inner
def _reduce_large(x):  # type: ignore[no-untyped-def]
    """The same of other finite x, by integers."""
    bits = _bits(abs(x))
    significand = _U64(bits & 0xFFFFFFFFFFFFF) | _U64(1 << 52)
    place = (bits >> 52) - 1075 + 62
    word, shift = place >> 6, _U64(place & 63)
    back = _U64(63) - shift
    w2 = _WORDS[word] << shift | (_WORDS[word + 1] >> _U64(1)) >> back
    w1 = _WORDS[word + 1] << shift | (_WORDS[word + 2] >> _U64(1)) >> back
    w0 = _WORDS[word + 2] << shift | (_WORDS[word + 3] >> _U64(1)) >> back
    p0 = significand * w0
    h0 = _high_product(significand, w0)
    p1 = h0 + significand * w1
    p2 = _high_product(significand, w1) + significand * w2 + (_U64(1) if p1 < h0 else _U64(0))
    high = p2 << _U64(2) | p1 >> _U64(62)
    middle = p1 << _U64(2) | p0 >> _U64(62)
    negative = high >> _U64(63)
    if negative != _U64(0):
        high, middle = ~high, ~middle
    a = np.float64(np.int64(high >> _U64(11))) * 2.0**-53
    b = np.float64(np.int64(high & _U64(2047))) * 2.0**-64 + np.float64(np.int64(middle >> _U64(11))) * 2.0**-117
    turns = a + b
    rest = b - (turns - a)
    r = turns * _FIRST
    c = fma(turns, _FIRST, -r) + (turns * _SECOND + rest * _FIRST)
    if negative != _U64(0):
        r, c = -r, -c
    quadrant = np.int64((p2 >> _U64(62)) + negative)
    return (-quadrant, -r, -c) if x < 0.0 else (quadrant, r, c)


@inner
def _circular(x, quarter):  # type: ignore[no-untyped-def]
    """sin(x + quarter * pi / 2)."""
    if not abs(x) < np.inf:
        return np.nan
    quadrant, r, c = _reduce(x) if abs(x) < _SMALL else _reduce_large(x)
    quadrant += quarter
    z = r * r
    if quadrant & 1:
        h = 0.5 * z
        w = 1.0 - h
        result = w + (((1.0 - w) - h) + fma(z * z, _cos_polynomial(z), -(r * c)))
    else:
        result = r + fma(r * z, _sin_polynomial(z), fma(-0.5 * z, c, c))
    return -result if quadrant & 2 else result


@inner
def _pow(x, y):  # type: ignore[no-untyped-def]
    r = exp(y * log(abs(x)), 0.0)
    whole = np.floor(y) == y
    if _bits(x) < 0 and whole and np.floor(y * 0.5) != y * 0.5:
        r = -r
    if x < 0.0 and x > -np.inf and not whole:
        r = np.nan
    if y == 2.0:
        r = x * x
    if y == 1.0:
        r = x
    if x == -1.0 and abs(y) == np.inf:
        r = 1.0
    return 1.0 if y == 0.0 or x == 1.0 else r
