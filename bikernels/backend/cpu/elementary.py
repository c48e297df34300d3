"""exp and log: the contract's sequences of operations, with its constants, in float32 and float64; fma and sqrt."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ...contract import EXP, LOG
from .compile import primitive
from .numerics import call_intrinsic
from .vectors import F32, I32, I64, constant, element_of, like


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_intrinsic(builder, "fma", a, b, c)


def _polynomial(builder: Any, coefficients: tuple[float, ...], f: Any) -> Any:
    p = constant(f.type, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = _fma(builder, p, f, constant(f.type, coefficient))
    return p


def _format(real: ir.Type) -> tuple[str, ir.Type, int]:
    """Of float32 or float64, or a vector of them: its name, the integer as wide, and the bits of the fraction."""
    name, word, fraction = ("float32", I32, 23) if element_of(real) == F32 else ("float64", I64, 52)
    return name, like(real, word), fraction


def _reduced(builder: Any, t: Any, magic: float) -> tuple[Any, Any]:
    """The number whose low bits hold k, which the magic number shifts there, and t - k ln 2."""
    real = t.type
    numbers, shift = EXP[_format(real)[0]], constant(real, magic)
    z = _fma(builder, t, constant(real, numbers.log2e), shift)
    k = builder.fsub(z, shift)
    f = _fma(builder, k, constant(real, -numbers.ln2_high), t)
    return z, _fma(builder, k, constant(real, -numbers.ln2_low), f)


def emit_exp(builder: Any, t: Any, d: Any = None) -> Any:
    """e to the power t + d, where d, 0 if there is none, lies below the last bit of t; scalars or vectors."""
    real = t.type
    name, word, fraction = _format(real)
    numbers = EXP[name]
    low, high = constant(real, numbers.low), constant(real, numbers.high)
    below = builder.fcmp_ordered("<", t, low)
    t_in_range = builder.select(below, low, t)  # a NaN fails both comparisons and stays
    t = builder.select(builder.fcmp_ordered(">", t_in_range, high), high, t_in_range)
    z, f = _reduced(builder, t, numbers.magic)
    if d is not None:
        f = builder.fadd(f, builder.select(below, constant(real, 0.0), d))
    p = _polynomial(builder, numbers.coefficients, f)
    b = builder.bitcast(z, word)
    half = builder.lshr(b, constant(word, 1))
    for bits in (half, builder.sub(b, half)):
        p = builder.fmul(p, builder.bitcast(builder.shl(bits, constant(word, fraction)), real))
    return p


@primitive
def exp(typing_context: Any, t: Any, d: Any) -> Any:
    """e to the power t + d, float32 or float64, where d lies below the last bit of t."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return emit_exp(builder, *values)

    return t(t, d), codegen


NEAR = {"float32": -80.0, "float64": -700.0}
"""Above it, and up to 0, exp is a normal number far within its range."""


def emit_exp_near(builder: Any, t: Any, d: Any = None) -> Any:
    """As `emit_exp` for NEAR < t <= 0: the same numbers, without the ends of the range, scaled in one step."""
    real = t.type
    name, word, fraction = _format(real)
    numbers, bias = EXP[name], 127 if name == "float32" else 1023
    z, f = _reduced(builder, t, numbers.magic - 2 * bias)  # z holds k alone
    if d is not None:
        f = builder.fadd(f, d)
    p = builder.bitcast(_polynomial(builder, numbers.coefficients, f), word)
    exponent = builder.shl(builder.bitcast(z, word), constant(word, fraction))
    return builder.bitcast(builder.add(p, exponent), real)


def emit_exp_below(builder: Any, t: Any, d: Any = None) -> Any:
    """As `emit_exp` for t <= 0: what is 0 in any case, such as that of -inf, never meets a subnormal number, which
    processors compute slowly.
    """
    real = t.type
    name, word, fraction = _format(real)
    numbers, bias, shift = EXP[name], *((127, 65) if name == "float32" else (1023, 513))
    zero = constant(real, 0.0)
    below = builder.fcmp_ordered("<", t, constant(real, numbers.low))
    t = builder.select(below, zero, t)
    z, f = _reduced(builder, t, numbers.magic - bias + shift)  # z holds the exponent of 2^(k + shift), a normal number
    if d is not None:
        f = builder.fadd(f, builder.select(below, zero, d))
    p = _polynomial(builder, numbers.coefficients, f)
    p = builder.fmul(p, builder.bitcast(builder.shl(builder.bitcast(z, word), constant(word, fraction)), real))
    return builder.select(below, zero, builder.fmul(p, constant(real, 2.0**-shift)))


def emit_log(builder: Any, u: Any) -> Any:
    """Natural logarithm of u, float32 or float64, scalar or vector."""
    real = u.type
    name, word, fraction = _format(real)
    numbers, least = LOG[name], 2.0**-126 if name == "float32" else 2.0**-1022
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


@primitive
def log(typing_context: Any, u: Any) -> Any:
    """Natural logarithm of u, a float32 or float64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return emit_log(builder, *values)

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


class Real:
    """A scalar or a vector, float32 or float64, of code that is being emitted: each operator is one instruction."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: Real) -> Real:
        return Real(self.builder, self.builder.fdiv(self.value, other.value))

    def __neg__(self) -> Real:
        return Real(self.builder, self.builder.fneg(self.value))


def fused(a: Real, b: Real, c: Real) -> Real:
    """a * b + c with one rounding."""
    return Real(a.builder, _fma(a.builder, a.value, b.value, c.value))


def exponential(x: Real) -> Real:
    """e to the power x."""
    return Real(x.builder, emit_exp(x.builder, x.value))


def root(x: Real) -> Real:
    """The square root of x, correctly rounded."""
    return Real(x.builder, call_intrinsic(x.builder, "sqrt", x.value))
