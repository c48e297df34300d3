"""Exponentials by their sum, as a thread of `rows.py` has them, rounded as a division rounds them."""

from __future__ import annotations

import functools
from typing import Any

from ...contract import EXP
from .device import MEMBER, OPERATIONS, Function, cuda, device, folded, instruction, mapped, types
from .vectors import ACCUMULATED, narrower, widener

NEAR_POWER_BITS = (127 - 98) << 23
"""Of a float32 above exp(NEAR)."""
SCALE, UNSCALE, HALF = 2.0**64, 2.0**-64, 2.0**-86
"""Makes all of them normal; undoes that; half of the least number, so scaled."""
_arithmetic = OPERATIONS[ACCUMULATED]
_multiply, _fma = _arithmetic.multiply, _arithmetic.fma
_add, _to_bits, _magnitude = _arithmetic.add, _arithmetic.to_bits, cuda.libdevice.fabsf


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


@functools.cache
def quotients_near(dtype: str, in_halves: bool) -> Function:
    """quotients(powers, divisor, reciprocal): words of exponentials, 0 or of what lies from NEAR to 0, by their sum.
    `in_halves`: whether there are the instructions of `_least_halves`, of compute capability 9.0.
    """
    if dtype == ACCUMULATED:

        @device
        def bits(more: Any, i: Any, value: Any) -> Any:  # of a number
            return types.uint32(_to_bits(value))

        all_bits = mapped(bits, MEMBER)

        @device
        def exact(powers: Any, divisor: Any, reciprocal: Any) -> Any:
            return all_bits(0, _quotients((divisor, reciprocal), powers))

        return exact
    narrow = narrower(dtype)
    if dtype == "bfloat16" and in_halves:

        @device
        def rounded_product(powers: Any, divisor: Any, reciprocal: Any) -> Any:
            products = _products(reciprocal, powers)
            least = _least_of_all(types.uint32(0xFFFFFFFF), 0, products)
            if min(types.uint32(least & types.uint32(0xFFFF)), types.uint32(least >> types.uint32(16))) <= types.uint32(
                _SURE
            ):
                products = _quotients((divisor, reciprocal), powers)
            return narrow(0, products)

        return rounded_product

    @device
    def rounded(powers: Any, divisor: Any, reciprocal: Any) -> Any:
        words = narrow(0, _products(_multiply(reciprocal, types.float32(_BELOW)), powers))
        others = narrow(0, _products(_multiply(reciprocal, types.float32(_ABOVE)), powers))
        if _difference(types.uint32(0), 0, words, others) != types.uint32(0):
            return narrow(0, _quotients((divisor, reciprocal), powers))
        return words

    return rounded


# A product with the reciprocal is within three units in the last place of the quotient, if neither is subnormal. Where
# both ends of that round to the same 16 bits, so does what lies between them. A bfloat16 is the upper half of a
# float32, whose lower half tells how far it is from the middle between two.
_REACH, _SURE = 3, 6
_BELOW, _ABOVE = 1 - 1.5 * 2.0**-22, 1 + 1.5 * 2.0**-22
_least_halves = instruction(
    "{ .reg .b32 halves, from; prmt.b32 halves, $2, $3, 0x5410; "
    f"mov.b32 from, {(0x8000 + _REACH) * 0x10001}; add.u16x2 from, halves, from; min.u16x2 $0, from, $1; }}",
    ["=r", "r", "f", "f"],
    types.uint32,
    *(types.uint32, types.float32, types.float32),
    pure=True,
)
"""Of the lower halves of two float32, counted from _REACH below the middle, and of a word of two halves, the least."""


@device
def _product(factor: Any, i: Any, value: Any) -> Any:
    return _multiply(value, factor)


@device
def _least_of_two(state: Any, more: Any, i: Any, values: Any) -> Any:
    return _least_halves(state, values[0], values[1])


@device
def _differs(state: Any, more: Any, i: Any, a: Any, b: Any) -> Any:
    return types.uint32(state | types.uint32(a ^ b))


_products, _least_of_all, _difference = (
    mapped(_product, MEMBER),
    folded(_least_of_two, 2),
    folded(_differs, MEMBER, MEMBER),
)


@functools.cache
def exact_quotients(dtype: str, power: Function) -> Function:
    """quotients(words, s, divisor, reciprocal): words of power(x, s) / divisor, for vectors of which there are few."""
    widen, narrow = widener(dtype), narrower(dtype)

    @device
    def power_of(s: Any, i: Any, x: Any) -> Any:
        return power(x, s)

    powers = mapped(power_of, MEMBER)

    @device
    def quotients(words: Any, s: Any, divisor: Any, reciprocal: Any) -> Any:
        return narrow(0, _quotients_anywhere((divisor, reciprocal), powers(s, widen(0, words))))

    return quotients


_LOG2E = EXP[ACCUMULATED].log2e
_OF_T, _OF_REST = 1.25 * 2.0**-24, 2.0**-20
_power_of_two = instruction("ex2.approx.ftz.f32 $0, $1;", ["=f", "f"], types.float32, types.float32, pure=True)


@device
def bounds(reciprocal: Any, least: Any) -> Any:
    """What `rounded_quotients` multiplies with, where no x - s is below `least`, nor that below NEAR.

    In units of 2^-24: exp by the hardware's power of two is off by 4 and its argument by 1.24 for each unit of x - s,
    the contract's exp by 2, the reciprocal, the quotient, each product and each bound by 1.
    """
    slack = _fma(-least, types.float32(_OF_T), types.float32(_OF_REST))
    one = types.float32(1)
    return _multiply(reciprocal, _add(one, -slack)), _multiply(reciprocal, _add(one, slack))


@functools.cache
def rounded_quotients(dtype: str) -> Function:
    """quotients(words, s, bounds): words of exp(x - s) by the divisor in 16 bits, and 0 if that is what they are, for
    sure: whatever lies between two numbers that round alike rounds as they do.
    """
    widen, narrow = widener(dtype), narrower(dtype)

    @device
    def rough(s: Any, i: Any, x: Any) -> Any:
        return _power_of_two(_multiply(_add(x, -s), types.float32(_LOG2E)))

    roughs = mapped(rough, MEMBER)

    @device
    def quotients(words: Any, s: Any, bounds: Any) -> Any:
        powers, (least, most) = roughs(s, widen(0, words)), bounds
        low = narrow(0, _products(least, powers))
        return low, _difference(types.uint32(0), 0, low, narrow(0, _products(most, powers)))

    return quotients
