"""exp and log: the contract's sequences of operations, with its constants, in float32 and float64; fma and sqrt."""

from __future__ import annotations

from typing import Any

from ...contract import EXP, LOG
from .compile import primitive
from .numerics import call_intrinsic
from .vectors import F32, I32, I64, constant


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_intrinsic(builder, "fma", a, b, c)


def _polynomial(builder: Any, coefficients: tuple[float, ...], f: Any) -> Any:
    p = constant(f.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = _fma(builder, p, f, constant(f.type, coefficient))
    return p


@primitive
def exp(typing_context: Any, t: Any, d: Any) -> Any:
    """e to the power t + d, float32 or float64, where d lies below the last bit of t."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        t, d = values
        real = t.type
        word, fraction = (I32, 23) if real == F32 else (I64, 52)
        numbers = EXP["float32" if real == F32 else "float64"]
        low, high = constant(real, numbers.low), constant(real, numbers.high)
        below = builder.fcmp_ordered("<", t, low)
        d = builder.select(below, constant(real, 0.0), d)
        t = builder.select(below, low, t)  # a NaN fails both comparisons and stays
        t = builder.select(builder.fcmp_ordered(">", t, high), high, t)
        magic = constant(real, numbers.magic)
        z = _fma(builder, t, constant(real, numbers.log2e), magic)
        k = builder.fsub(z, magic)
        f = _fma(builder, k, constant(real, -numbers.ln2_high), t)
        f = builder.fadd(_fma(builder, k, constant(real, -numbers.ln2_low), f), d)
        p = _polynomial(builder, numbers.coefficients, f)
        b = builder.bitcast(z, word)
        half = builder.lshr(b, constant(word, 1))
        for bits in (half, builder.sub(b, half)):
            p = builder.fmul(p, builder.bitcast(builder.shl(bits, constant(word, fraction)), real))
        return p

    return t(t, d), codegen


NEAR = {"float32": -80.0, "float64": -700.0}
"""Above it, and up to 0, exp is a normal number far within its range."""


@primitive
def exp_near(typing_context: Any, t: Any, d: Any) -> Any:
    """exp(t, d) for NEAR < t <= 0: the same numbers, without the ends of the range, scaled in one step."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        t, d = values
        real = t.type
        word, fraction, bias = (I32, 23, 127) if real == F32 else (I64, 52, 1023)
        numbers = EXP["float32" if real == F32 else "float64"]
        magic = constant(real, numbers.magic - 2 * bias)  # z then holds k alone in its low bits
        z = _fma(builder, t, constant(real, numbers.log2e), magic)
        k = builder.fsub(z, magic)
        f = _fma(builder, k, constant(real, -numbers.ln2_high), t)
        f = builder.fadd(_fma(builder, k, constant(real, -numbers.ln2_low), f), d)
        p = builder.bitcast(_polynomial(builder, numbers.coefficients, f), word)
        exponent = builder.shl(builder.bitcast(z, word), constant(word, fraction))
        return builder.bitcast(builder.add(p, exponent), real)

    return t(t, d), codegen


@primitive
def log(typing_context: Any, u: Any) -> Any:
    """Natural logarithm of u, a float32 or float64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (u,) = values
        real = u.type
        word, fraction, least = (I32, 23, 2.0**-126) if real == F32 else (I64, 52, 2.0**-1022)
        numbers = LOG["float32" if real == F32 else "float64"]
        zero, infinity = constant(real, 0.0), constant(real, float("inf"))
        small = builder.fcmp_ordered("<", u, constant(real, least))
        scaled = builder.select(small, builder.fmul(u, constant(real, 2.0**fraction)), u)
        b = builder.bitcast(scaled, word)
        d = builder.sub(b, constant(word, numbers.cut))
        e = builder.ashr(d, constant(word, fraction))
        e = builder.sub(e, builder.select(small, constant(word, fraction), constant(word, 0)))
        e = builder.sitofp(e, real)
        m = builder.bitcast(builder.sub(b, builder.and_(d, constant(word, -(2**fraction)))), real)
        f = builder.fsub(m, constant(real, 1.0))
        p = _polynomial(builder, numbers.coefficients, f)
        square = builder.fmul(f, f)
        if numbers.ln2_low == 0:
            p = _fma(builder, p, square, f)
        else:
            low = builder.fmul(e, constant(real, numbers.ln2_low))
            p = builder.fadd(f, _fma(builder, p, square, low))
        r = _fma(builder, e, constant(real, numbers.ln2_high), p)
        r = builder.select(builder.fcmp_ordered("==", u, infinity), infinity, r)
        r = builder.select(builder.fcmp_ordered(">", u, zero), r, constant(real, float("nan")))
        return builder.select(builder.fcmp_ordered("==", u, zero), constant(real, float("-inf")), r)

    return u(u), codegen


@primitive
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding, float32 or float64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _fma(builder, *values)

    return a(a, b, c), codegen


@primitive
def sqrt(typing_context: Any, x: Any) -> Any:
    """The square root of x, correctly rounded, float32 or float64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return call_intrinsic(builder, "sqrt", values[0])

    return x(x), codegen


@primitive
def zero(typing_context: Any, x: Any) -> Any:
    """+0 in the type of x."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return constant(values[0].type, 0.0)

    return x(x), codegen
