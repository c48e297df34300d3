"""What the reductions made of sums compute of each element: the terms that are added up, and the results.

An element function is given an element of each operand (those that the spec does not have are anything) and the row's
scalars, which are what the sums before it ended in. `Formula` says in which order; docs/contract.md has the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from ...contract import SUM_CHUNK, SUM_LANES
from ...specs import ReductionSpec
from .compile import address_of, inner
from .elementary import exp, fma, zero
from .numerics import FLOAT, load, pointer, store
from .sum_tree import fold_lanes

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


class Formula(NamedTuple):
    """One reduction: at most two sums, and the elements of the row that is written, if one is."""

    sums: tuple[Sum, ...]
    element: Any = None
    reads: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ("out",)
    """The operand to which each sum's end is written, where the spec has it; "" for none."""


def formula(spec: ReductionSpec) -> Formula:
    """The formula of a reduction, in the form for the operands that it has."""
    by_weight = _FORMULAS[spec.operation]
    if isinstance(by_weight, Formula):
        return by_weight
    return by_weight[spec.weight is not None, spec.bias is not None]


@functools.cache
def loop(element: Callable[..., Any], accumulate: str) -> int:
    """The address of an element function's loop over `count` elements.

    It is called as loop(target, x, grad, weight, bias, mean, rstd, first, second, count); the elements lie side by side
    in each operand, in the two scalars and in target.
    """
    name = f"{element.__name__} {accumulate}"
    return address_of(_loop(element, accumulate), *[types.int64] * 10, name=name)


def _loop(element: Callable[..., Any], accumulate: str) -> Callable[..., None]:
    kind = FLOAT[accumulate]

    def elementwise(target, x, grad, weight, bias, mean, rstd, first, second, count):  # type: ignore[no-untyped-def]
        result, xs, gs = pointer(target, kind), pointer(x, kind), pointer(grad, kind)
        ws, bs, ms, rs = pointer(weight, kind), pointer(bias, kind), pointer(mean, kind), pointer(rstd, kind)
        ss, ts = pointer(first, kind), pointer(second, kind)
        for i in range(count):
            result[i] = element(xs[i], gs[i], ws[i], bs[i], ms[i], rs[i], ss[i], ts[i])

    return elementwise


Dtypes = tuple[str | None, str | None, str | None, str | None]
"""Of x, grad, weight and bias; None for those that are not read."""


@functools.cache
def chunk_loop(term: Callable[..., Any] | None, accumulate: str, dtypes: Dtypes) -> int:
    """The address of a loop that sums a chunk of terms (None: of x) by the tree, of operands read where they lie.

    It is called as loop(target, lanes, x, grad, weight, bias, mean, rstd, s, t, length). The elements of the first four
    operands lie side by side, the next four are the row's own, as float64. `lanes` has room for SUM_LANES values;
    `target` gets the sum.
    """
    return address_of(_chunk_loop(term or _itself, accumulate, dtypes), *[types.int64] * 6, *_OF_A_ROW, types.int64)


@functools.cache
def row_loop(element: Callable[..., Any], accumulate: str, dtypes: Dtypes, out: str) -> int:
    """The address of loop(target, x, grad, weight, bias, mean, rstd, s, t, length): the results, side by side."""
    return address_of(_row_loop(element, accumulate, dtypes, out), *[types.int64] * 5, *_OF_A_ROW, types.int64)


_OF_A_ROW = (types.float64,) * 4


def _loader(dtype: str | None, accumulate: str) -> Any:
    """The function of an address and an index that reads an element; 0 of an operand that is not there."""
    kind = FLOAT[accumulate]
    if dtype is None:
        return inner(lambda address, i: kind(0))
    name = str(dtype)
    return inner(lambda address, i: load(name, kind, address, i))


def _chunk_loop(term: Any, accumulate: str, dtypes: Dtypes) -> Callable[..., None]:
    kind, zero_of = FLOAT[accumulate], FLOAT[accumulate](0)
    read_x, read_grad, read_weight, read_bias = (_loader(dtype, accumulate) for dtype in dtypes)

    @inner
    def value(i, x, grad, weight, bias, m, r, s, t):  # type: ignore[no-untyped-def]
        return term(read_x(x, i), read_grad(grad, i), read_weight(weight, i), read_bias(bias, i), m, r, s, t)

    def sum_chunk(target, lanes, x, grad, weight, bias, mean, rstd, first, second, length):  # type: ignore[no-untyped-def]
        lane = pointer(lanes, kind)
        m, r, s, t = kind(mean), kind(rstd), kind(first), kind(second)
        if length == SUM_CHUNK:
            for i in range(SUM_LANES):
                total = zero_of
                for k in range(SUM_CHUNK // SUM_LANES):
                    total += value(i + k * SUM_LANES, x, grad, weight, bias, m, r, s, t)
                lane[i] = total
        else:
            filled = min(length, SUM_LANES)
            for i in range(filled):
                lane[i] = zero_of + value(i, x, grad, weight, bias, m, r, s, t)
            for i in range(filled, SUM_LANES):
                lane[i] = zero_of
            for start in range(SUM_LANES, length, SUM_LANES):
                for i in range(min(length - start, SUM_LANES)):
                    lane[i] += value(start + i, x, grad, weight, bias, m, r, s, t)
        pointer(target, kind)[0] = fold_lanes(kind, lanes)

    return sum_chunk


def _row_loop(element: Any, accumulate: str, dtypes: Dtypes, out: str) -> Callable[..., None]:
    kind, dtype = FLOAT[accumulate], str(out)
    read_x, read_grad, read_weight, read_bias = (_loader(each, accumulate) for each in dtypes)

    def write_row(target, x, grad, weight, bias, mean, rstd, first, second, length):  # type: ignore[no-untyped-def]
        m, r, s, t = kind(mean), kind(rstd), kind(first), kind(second)
        for i in range(length):
            value = element(read_x(x, i), read_grad(grad, i), read_weight(weight, i), read_bias(bias, i), m, r, s, t)
            store(dtype, target, i, value)

    return write_row


# ------------------------------------------------------------------------------------- element functions
# x, grad, weight, bias, mean, rstd, and the scalars s and t.


@inner
def _itself(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return x


@inner
def _square(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return x * x


@inner
def _deviation_squared(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    y = x - s
    return y * y


@inner
def _rms_norm(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return x * s


@inner
def _rms_norm_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return (x * s) * w


@inner
def _layer_norm(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return (x - s) * t


@inner
def _layer_norm_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return ((x - s) * t) * w


@inner
def _layer_norm_bias(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return (x - s) * t + b


@inner
def _layer_norm_weight_bias(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma((x - s) * t, w, b)


@inner
def _grad(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return g


@inner
def _grad_times_x(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return g * x


@inner
def _softmax_backward(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return x * (g - s)


@inner
def _log_softmax_backward(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma(-exp(x, zero(x)), s, g)


@inner
def _weighted(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return g * w


@inner
def _rms_product(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return g * (x * r)


@inner
def _rms_product_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return (g * w) * (x * r)


@inner
def _rms_backward(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma(-(x * r), s, g) * r


@inner
def _rms_backward_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma(-(x * r), s, g * w) * r


@inner
def _layer_product(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return g * ((x - m) * r)


@inner
def _layer_product_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return (g * w) * ((x - m) * r)


@inner
def _layer_backward(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma(-((x - m) * r), t, g - s) * r


@inner
def _layer_backward_weight(x, g, w, b, m, r, s, t):  # type: ignore[no-untyped-def]
    return fma(-((x - m) * r), t, g * w - s) * r


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
