"""exp and log of the contract (`reference.exp`, `reference.log`) as device functions, per accumulate dtype."""

from __future__ import annotations

import functools
import math
from typing import Any

from ...contract import EXP, LOG
from .device import OPERATIONS, Function, device, types

_UNSIGNED = {"float32": types.uint32, "float64": types.uint64}
_SIGNED = {"float32": types.int32, "float64": types.int64}
_FRACTION = {"float32": 23, "float64": 52}
"""Bits of a significand after the point."""
_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
"""The smallest normal number."""
_SHIFT = {"float32": 64, "float64": 512}
"""In `exp_below`, of the exponent: even, as the bias of exp is, so that ties are rounded alike."""


@functools.cache
def _polynomial(accumulate: str, coefficients: tuple[float, ...]) -> Function:
    """polynomial(f): Horner's rule, each step one fma."""
    real, fma = OPERATIONS[accumulate].type, OPERATIONS[accumulate].fma
    last, rest = coefficients[-1], coefficients[-2::-1]

    @device
    def polynomial(f: Any) -> Any:
        p = real(last)
        for i in range(len(rest)):
            p = fma(p, f, real(rest[i]))
        return p

    return polynomial


@functools.cache
def exp(accumulate: str) -> Function:
    """The device function of t and d: e to the power t + d, where d lies below the last bit of t."""
    operations, numbers = OPERATIONS[accumulate], EXP[accumulate]
    real, add, multiply, fma = operations.type, operations.add, operations.multiply, operations.fma
    to_bits, from_bits = operations.to_bits, operations.from_bits
    signed, unsigned, fraction = _SIGNED[accumulate], _UNSIGNED[accumulate], _FRACTION[accumulate]
    polynomial = _polynomial(accumulate, numbers.coefficients)
    log2e, magic, low, high = numbers.log2e, numbers.magic, numbers.low, numbers.high
    minus_ln2_high, minus_ln2_low = -numbers.ln2_high, -numbers.ln2_low

    @device
    def power_of_two(biased: Any) -> Any:
        return from_bits(signed(unsigned(biased << unsigned(fraction))))

    @device
    def exp(t: Any, d: Any) -> Any:
        if t < real(low):  # a NaN fails both comparisons and stays
            t = real(low)
            d = real(0)
        if t > real(high):
            t = real(high)
        z = fma(t, real(log2e), real(magic))
        k = add(z, real(-magic))
        f = add(fma(k, real(minus_ln2_low), fma(k, real(minus_ln2_high), t)), d)
        bits = unsigned(to_bits(z))  # its low bits are k + 2 * bias; what lies above leaves the word in the shifts
        half = unsigned(bits >> unsigned(1))
        return multiply(multiply(polynomial(f), power_of_two(half)), power_of_two(unsigned(bits - half)))

    return exp


@functools.cache
def exp_below(accumulate: str, precise: bool) -> Function:
    """exp where t <= 0, in fewer instructions; of a NaN it is any number. d is there if `precise`, else it is not used.

    The polynomial times 2^(k + SHIFT) is normal for every k, so that adding to its exponent is exact and the product
    with 2^-SHIFT rounds only what is subnormal, as exp's second product does. exp(LOW) is 0, and so is what lies below.
    """
    operations, numbers, shift = OPERATIONS[accumulate], EXP[accumulate], _SHIFT[accumulate]
    real, add, multiply, fma = operations.type, operations.add, operations.multiply, operations.fma
    to_bits, from_bits, larger = operations.to_bits, operations.from_bits, operations.larger
    signed, unsigned, fraction = _SIGNED[accumulate], _UNSIGNED[accumulate], _FRACTION[accumulate]
    polynomial = _polynomial(accumulate, numbers.coefficients)
    log2e, low, back, magic = numbers.log2e, numbers.low, 2.0**-shift, 1.5 * 2.0**fraction + shift
    minus_ln2_high, minus_ln2_low = -numbers.ln2_high, -numbers.ln2_low

    @device
    def exp_below(t: Any, d: Any) -> Any:
        above = larger(t, real(low))
        z = fma(above, real(log2e), real(magic))
        k = add(z, real(-magic))
        f = fma(k, real(minus_ln2_low), fma(k, real(minus_ln2_high), above))
        if precise:
            f = add(f, d if t > real(low) else real(0))
        bits = unsigned(unsigned(to_bits(polynomial(f))) + unsigned(unsigned(to_bits(z)) << unsigned(fraction)))
        return multiply(from_bits(signed(bits)), real(back))

    return exp_below


@functools.cache
def exp_near(accumulate: str, precise: bool) -> Function:
    """exp where t <= 0 and its result is far from subnormal, in still fewer instructions; d as in `exp_below`."""
    operations, numbers = OPERATIONS[accumulate], EXP[accumulate]
    real, add, fma = operations.type, operations.add, operations.fma
    to_bits, from_bits = operations.to_bits, operations.from_bits
    signed, unsigned, fraction = _SIGNED[accumulate], _UNSIGNED[accumulate], _FRACTION[accumulate]
    polynomial = _polynomial(accumulate, numbers.coefficients)
    log2e, magic = numbers.log2e, 1.5 * 2.0**fraction
    minus_ln2_high, minus_ln2_low = -numbers.ln2_high, -numbers.ln2_low

    @device
    def exp_near(t: Any, d: Any) -> Any:
        z = fma(t, real(log2e), real(magic))
        k = add(z, real(-magic))
        f = fma(k, real(minus_ln2_low), fma(k, real(minus_ln2_high), t))
        if precise:
            f = add(f, d)
        return from_bits(
            signed(unsigned(to_bits(polynomial(f))) + unsigned(unsigned(to_bits(z)) << unsigned(fraction)))
        )

    return exp_near


@functools.cache
def log(accumulate: str) -> Function:
    """The device function log, of one argument."""
    operations, numbers = OPERATIONS[accumulate], LOG[accumulate]
    real, add, multiply, fma = operations.type, operations.add, operations.multiply, operations.fma
    to_bits, from_bits = operations.to_bits, operations.from_bits
    signed, fraction = _SIGNED[accumulate], _FRACTION[accumulate]
    polynomial = _polynomial(accumulate, numbers.coefficients)
    cut, ln2_high, ln2_low = numbers.cut, numbers.ln2_high, numbers.ln2_low
    smallest_normal, scale = _NORMAL[accumulate], 2.0**fraction

    @device
    def log(u: Any) -> Any:
        if u == real(math.inf):
            return u
        if u == real(0):
            return real(-math.inf)
        if not u > real(0):
            return real(math.nan)
        small = u < real(smallest_normal)
        bits = signed(to_bits(multiply(u, real(scale)) if small else u))
        exponent = signed(signed(bits - signed(cut)) >> signed(fraction))
        m = from_bits(signed(bits - signed(exponent << signed(fraction))))
        e = real(signed(exponent - fraction if small else exponent))
        f = add(m, real(-1))
        p = polynomial(f)
        square = multiply(f, f)
        if ln2_low == 0:
            return fma(e, real(ln2_high), fma(p, square, f))
        return fma(e, real(ln2_high), add(f, fma(p, square, multiply(e, real(ln2_low)))))

    return log
