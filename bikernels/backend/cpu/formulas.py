"""What the reductions made of sums compute of each element: the terms that are added up, and the results.

An element function is given elements of each operand, scalars or vectors of code that is being emitted (those that the
formula does not read are anything), and the row's scalars, which are what the sums before it ended in. `Formula` says
in which order; docs/contract.md has the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from ...contract import ITEMSIZE
from . import vectors
from .compile import emitted
from .elementary import Real, exponential, fused
from .numerics import LLVM_TYPE, VECTOR_BYTES

TOTAL, MEAN, ROOT, RECIPROCAL_ROOT = range(4)
"""What a sum ends in: itself, divided by a number, the root of that, or 1 / sqrt(that + eps)."""


class Sum(NamedTuple):
    """A sum over a row."""

    term: Any
    """The element function of what is added up; None: x itself."""
    reads: tuple[str, ...]
    """The operands of which it makes use."""
    end: int
    corrected: bool = False
    """Whether the divisor is n - correction instead of n."""

    def divisor(self, n: int, correction: float) -> float:
        """What a sum over n elements is divided by."""
        return max(0.0, n - correction) if self.corrected else float(n)


class Formula(NamedTuple):
    """One reduction: at most two sums, and the elements of the row that is written, if one is."""

    sums: tuple[Sum, ...]
    element: Any = None
    reads: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ("out",)
    """The operand to which each sum's end is written, where the spec has it; "" for none."""


def formula(operation: str, has_weight: bool, has_bias: bool) -> Formula:
    """The formula of a reduction, in the form for the operands that it has."""
    by_weight = _FORMULAS[operation]
    return by_weight if isinstance(by_weight, Formula) else by_weight[has_weight, has_bias]


@functools.cache
def loop(element: Callable[..., Any], accumulate: str) -> int:
    """The address of an element function's loop over `count` elements.

    It is called as loop(target, x, grad, weight, bias, mean, rstd, first, second, count); the elements lie side by side
    in each operand, in the two scalars and in target.
    """
    return emitted(_loop(element, accumulate), 10, f"{element.__name__} {accumulate}")


def _loop(element: Callable[..., Real], accumulate: str) -> Callable[..., None]:
    real = LLVM_TYPE[accumulate]
    size, vector = ITEMSIZE[accumulate], ir.VectorType(real, VECTOR_BYTES // ITEMSIZE[accumulate])

    def emit(builder: Any, target: Any, *arguments: Any) -> None:
        *operands, count = arguments
        whole = builder.and_(count, vectors.I64(-vector.count))
        for start, end, kind in ((vectors.I64(0), whole, vector), (whole, count, real)):

            def step(i: Any, _: list[Any], kind: ir.Type = kind) -> list[Any]:
                offset = builder.mul(i, vectors.I64(size))
                places = [builder.add(operand, offset) for operand in operands]
                given = [Real(builder, vectors.load(builder, place, 0, kind)) for place in places]
                vectors.store(builder, element(*given).value, builder.add(target, offset))
                return []

            vectors.for_range(builder, start, end, vector.count if kind is vector else 1, [], step)

    return emit


# ------------------------------------------------------------------------------------- element functions
# x, grad, weight, bias, mean, rstd, and the scalars s and t.


def _square(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return x * x


def _deviation_squared(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    y = x - s
    return y * y


def _rms_norm(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return x * s


def _rms_norm_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return (x * s) * w


def _layer_norm(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return (x - s) * t


def _layer_norm_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return ((x - s) * t) * w


def _layer_norm_bias(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return (x - s) * t + b


def _layer_norm_weight_bias(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused((x - s) * t, w, b)


def _grad(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return g


def _grad_times_x(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return g * x


def _softmax_backward(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return x * (g - s)


def _log_softmax_backward(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused(-exponential(x), s, g)


def _weighted(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return g * w


def _rms_product(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return g * (x * r)


def _rms_product_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return (g * w) * (x * r)


def _rms_backward(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused(-(x * r), s, g) * r


def _rms_backward_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused(-(x * r), s, g * w) * r


def _layer_product(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return g * ((x - m) * r)


def _layer_product_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return (g * w) * ((x - m) * r)


def _layer_backward(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused(-((x - m) * r), t, g - s) * r


def _layer_backward_weight(x: Real, g: Real, w: Real, b: Real, m: Real, r: Real, s: Real, t: Real) -> Real:
    return fused(-((x - m) * r), t, g * w - s) * r


# -------------------------------------------------------------------------------------------------------- the formulas

_MEAN = Sum(None, ("x",), MEAN)
_LAYER_SUMS = (_MEAN, Sum(_deviation_squared, ("x",), RECIPROCAL_ROOT))


def _rms_norms() -> dict[tuple[bool, bool], Formula]:
    sums = (Sum(_square, ("x",), RECIPROCAL_ROOT),)
    return {
        (False, False): Formula(sums, _rms_norm, ("x",), ("rstd",)),
        (True, False): Formula(sums, _rms_norm_weight, ("x", "weight"), ("rstd",)),
    }


def _layer_norms() -> dict[tuple[bool, bool], Formula]:
    scalars = ("mean", "rstd")
    return {
        (False, False): Formula(_LAYER_SUMS, _layer_norm, ("x",), scalars),
        (True, False): Formula(_LAYER_SUMS, _layer_norm_weight, ("x", "weight"), scalars),
        (False, True): Formula(_LAYER_SUMS, _layer_norm_bias, ("x", "bias"), scalars),
        (True, True): Formula(_LAYER_SUMS, _layer_norm_weight_bias, ("x", "weight", "bias"), scalars),
    }


def _backward(sums: tuple[Sum, ...], element: Any) -> Formula:
    reads = tuple(dict.fromkeys(name for one in sums for name in one.reads))
    return Formula(sums, element, tuple(dict.fromkeys(("x", "grad", *reads))), ("",) * len(sums))


_RMS, _LAYER = ("x", "grad", "rstd"), ("x", "grad", "mean", "rstd")

_FORMULAS: dict[str, Formula | dict[tuple[bool, bool], Formula]] = {
    "sum": Formula((Sum(None, ("x",), TOTAL),)),
    "mean": Formula((_MEAN,)),
    "var": Formula((_MEAN, Sum(_deviation_squared, ("x",), MEAN, corrected=True)), scalars=("", "out")),
    "std": Formula((_MEAN, Sum(_deviation_squared, ("x",), ROOT, corrected=True)), scalars=("", "out")),
    "rms_norm": _rms_norms(),
    "layer_norm": _layer_norms(),
    "softmax_backward": _backward((Sum(_grad_times_x, ("x", "grad"), TOTAL),), _softmax_backward),
    "log_softmax_backward": _backward((Sum(_grad, ("grad",), TOTAL),), _log_softmax_backward),
    "rms_norm_backward": {
        (False, False): _backward((Sum(_rms_product, _RMS, MEAN),), _rms_backward),
        (True, False): _backward((Sum(_rms_product_weight, (*_RMS, "weight"), MEAN),), _rms_backward_weight),
    },
    "layer_norm_backward": {
        (False, False): _backward((Sum(_grad, ("grad",), MEAN), Sum(_layer_product, _LAYER, MEAN)), _layer_backward),
        (True, False): _backward(
            (Sum(_weighted, ("grad", "weight"), MEAN), Sum(_layer_product_weight, (*_LAYER, "weight"), MEAN)),
            _layer_backward_weight,
        ),
    },
    "rms_norm_weight_backward": Formula((Sum(_rms_product, _RMS, TOTAL),)),
    "layer_norm_weight_backward": Formula((Sum(_layer_product, _LAYER, TOTAL),)),
}

OPERATIONS = frozenset(_FORMULAS)
