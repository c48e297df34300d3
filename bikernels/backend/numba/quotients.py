"""Exponentials by their sum, as a thread of `rows.py` has them, rounded as a division rounds them."""

from __future__ import annotations

import functools
import math
from typing import Any

from ...contract import EXP
from .device import MEMBER, OPERATIONS, Function, cuda, device, folded, instruction, mapped, types
from .vectors import ACCUMULATED, extreme_of, narrower, widener

NEAR, NEAR_POWER = -68.0, 2.0**-98
"""With exponentials of what lies from here to 0, which are no less than the second, and a divisor of 1 to SUM_CHUNK *
PLACES, no quotient is subnormal, nor is what leads to it."""
SCALE, UNSCALE, HALF = 2.0**64, 2.0**-64, 2.0**-86
"""Makes all of them normal; undoes that; half of the least number, so scaled."""
_arithmetic = OPERATIONS[ACCUMULATED]
_multiply, _fma = _arithmetic.multiply, _arithmetic.fma
_add, _from_bits, _to_bits = _arithmetic.add, _arithmetic.from_bits, _arithmetic.to_bits
_magnitude, _smaller = cuda.libdevice.fabsf, cuda.libdevice.fminf


@device
def _quotient(more: Any, i: Any, value: Any) -> Any:
    """By the reciprocal and two corrections, the last of which rounds as a division does (Markstein 1990)."""
    divisor, reciprocal = more
    q = _multiply(value, reciprocal)
    q = _fma(_fma(-divisor, q, value), reciprocal, q)
    return _fma(_fma(-divisor, q, value), reciprocal, q)


@device
def _quotient_anywhere(more: Any, i: Any, value: Any) -> Any:
    """The same of a scaled dividend. The product that undoes that rounds again, which is the same as rounding once
    unless the first result lies in the middle between two numbers; the remainder then tells where the quotient lies.
    """
    divisor, _ = more
    scaled = _multiply(value, types.float32(SCALE))
    q = _quotient(more, i, scaled)
    remainder = _fma(-divisor, q, scaled)
    rounded = _multiply(q, types.float32(UNSCALE))
    is_middle = _magnitude(_fma(-rounded, types.float32(SCALE), q)) == types.float32(HALF)
    towards = types.float32(HALF) if remainder > types.float32(0) else types.float32(-HALF)
    nearest = _multiply(_add(q, towards), types.float32(UNSCALE))
    return nearest if is_middle & (remainder != types.float32(0)) else rounded


_quotients, _quotients_anywhere = mapped(_quotient, MEMBER), mapped(_quotient_anywhere, MEMBER)


@device
def _least_of(state: Any, more: Any, i: Any, value: Any) -> Any:
    return _smaller(state, value)


_least = folded(_least_of, MEMBER)


@device
def _divide(dividends: Any, divisor: Any, reciprocal: Any) -> Any:
    """Exponentials by one sum of them, correctly rounded."""
    if _least(types.float32(1), 0, dividends) > types.float32(NEAR_POWER):
        return _quotients((divisor, reciprocal), dividends)
    return _quotients_anywhere((divisor, reciprocal), dividends)


BELOW, ABOVE = 1 - 1.5 * 2.0**-21, 1 + 1.5 * 2.0**-21
"""Factors: twelve times 2^-24, which is more than the hardware's power of two (2^-22), the contract's exp (2^-23), the
reciprocal, the quotient and a product (2^-24 each) are off by together."""
_exp = EXP[ACCUMULATED]
_LOG2E, _LOG2E_LOW, _MAGIC = _exp.log2e, math.log2(math.e) - _exp.log2e, 1.5 * 2.0**23
_power_of_two = instruction("ex2.approx.ftz.f32 $0, $1;", ["=f", "f"], types.float32, types.float32, pure=True)


@device
def _rough_exp(t: Any) -> Any:
    """exp of a t between NEAR and 0, by the hardware's power of two."""
    z = _fma(t, types.float32(_LOG2E), types.float32(_MAGIC))
    below = _fma(t, types.float32(_LOG2E), _add(types.float32(_MAGIC), -z))
    power = _power_of_two(_fma(t, types.float32(_LOG2E_LOW), below))
    return _from_bits(types.int32(_to_bits(power) + types.int32(_to_bits(z) << types.int32(23))))


@functools.cache
def exact_quotients(dtype: str, dividend: Function) -> Function:
    """quotients(words, s, divisor, reciprocal): words of exp(x - s) / divisor."""
    widen, narrow = widener(dtype), narrower(dtype)

    @device
    def power(s: Any, i: Any, x: Any) -> Any:
        return dividend(x, s)

    powers = mapped(power, MEMBER)

    @device
    def quotients(words: Any, s: Any, divisor: Any, reciprocal: Any) -> Any:
        return narrow(0, _divide(powers(s, widen(0, words)), divisor, reciprocal))

    return quotients


@functools.cache
def rounded_quotients(dtype: str, dividend: Function) -> Function:
    """quotients(words, s, divisor, reciprocal): the same in 16 bits. Whatever lies between two numbers that round alike
    rounds as they do; where they do not, all is computed as the contract says.
    """
    widen, narrow, least = widener(dtype), narrower(dtype), extreme_of(dtype, "min", math.inf)

    @device
    def rough(s: Any, i: Any, x: Any) -> Any:
        return _rough_exp(_add(x, -s))

    @device
    def exactly(s: Any, i: Any, x: Any) -> Any:
        return dividend(x, s)

    @device
    def scaled(factor: Any, i: Any, value: Any) -> Any:
        return _multiply(value, factor)

    @device
    def differs(state: Any, more: Any, i: Any, a: Any, b: Any) -> Any:
        return types.uint32(state | types.uint32(a ^ b))

    roughs, exacts, products = mapped(rough, MEMBER), mapped(exactly, MEMBER), mapped(scaled, MEMBER)
    difference = folded(differs, MEMBER, MEMBER)

    @device
    def quotients(words: Any, s: Any, divisor: Any, reciprocal: Any) -> Any:
        x = widen(0, words)
        if _add(least(words), -s) > types.float32(NEAR):
            powers = roughs(s, x)
            low = narrow(0, products(_multiply(reciprocal, types.float32(BELOW)), powers))
            high = narrow(0, products(_multiply(reciprocal, types.float32(ABOVE)), powers))
            if difference(types.uint32(0), 0, low, high) == types.uint32(0):
                return low
        return narrow(0, _quotients_anywhere((divisor, reciprocal), exacts(s, x)))

    return quotients
