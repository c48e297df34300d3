"""What a reduction computes of each element and of each row, as device functions (docs/contract.md, sections 3 to 6).

A formula is one or two passes over a row, each of which ends in a number, and then, of some, a row of results.
Functions of elements get x, the gradient g, weight w, bias b, mean m, rstd r, then the numbers s and t that the passes
have ended in; those that an operation does not have are 0, and no code is left of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from ...contract import ACCUMULATE
from ...specs import ReductionSpec
from .device import OPERATIONS, Function, device
from .functions import exp as exp_of
from .functions import exp_below, exp_near
from .functions import log as log_of

OPERANDS = ("x", "grad", "weight", "bias", "mean", "rstd")
"""What functions of elements are given, in this order."""

BESIDE = {
    "rms_norm": ("weight", "rstd"),
    "layer_norm": ("weight", "bias", "mean", "rstd"),
    "softmax_backward": ("grad",),
    "log_softmax_backward": ("grad",),
    "rms_norm_backward": ("grad", "weight", "rstd"),
    "layer_norm_backward": ("grad", "weight", "mean", "rstd"),
    "rms_norm_weight_backward": ("grad", "rstd"),
    "layer_norm_weight_backward": ("grad", "mean", "rstd"),
}
"""All operands that an operation may have beside out and x."""

NEAR = -68.0
"""exp of what lies from here to 0, that by a sum of up to 2^24 of them, and what leads to it are not subnormal."""


class Pass(NamedTuple):
    """The maximum of a row, or a sum of terms by the contract's tree."""

    term: Function | None
    """Of an element and s; of a sum that counts also whether the element is counted. None: the maximum of x."""
    reads: tuple[str, ...]
    """Of OPERANDS."""
    end: Function | None = None
    """end(sum, count, s, divisor, eps): the number in which it ends, s being that of the pass before."""
    counts: bool = False
    written: str = ""
    """The operand, if it is there, to which the number is written."""
    power: Function | None = None
    """Of x and s, the exponential that a term is; the term of the maximum, which is counted, is 0."""
    near_power: Function | None = None
    """The same, in fewer instructions, of x from s + NEAR to s whose magnitude is not above that of s."""

    @property
    def is_sum(self) -> bool:
        return self.term is not None


class Formula(NamedTuple):
    """One reduction."""

    passes: tuple[Pass, ...]
    element: Function | None = None
    """The results of a row, of an element, s and t."""
    reads: tuple[str, ...] = ()
    divides: bool = False
    """Whether an element is the last pass's power divided by t, for kernels that divide many."""


@functools.cache
def formula(operation: str, out: str, weight: bool = False, bias: bool = False) -> Formula:
    """The formula of an operation whose result's dtype is `out`, in the form for the operands that it has."""
    accumulate = ACCUMULATE[out]
    if operation in ("softmax", "log_softmax", "logsumexp"):
        return _softmaxes(operation, accumulate, precise=out == accumulate)
    if operation in ("softmax_backward", "log_softmax_backward"):
        return _softmaxes_backward(operation, accumulate)
    if operation in ("sum", "mean", "var", "std"):
        return _sums(operation, accumulate)
    name, _, rest = operation.partition("_norm")
    if rest == "":
        return _norms(name == "layer", accumulate, weight, bias)
    if rest == "_weight_backward":
        return _weights_backward(name == "layer", accumulate)
    return _norms_backward(name == "layer", accumulate, weight)


def numbers_of(spec: ReductionSpec, n: int) -> tuple[float, float, float]:
    """What divides the sums of both passes over n elements, and eps."""
    of_squares = max(0.0, n - spec.correction) if spec.operation in ("var", "std") else float(n)
    return float(n), of_squares, float(spec.eps)


# -------------------------------------------------------------------------------------------------------------- sums


class _Ends(NamedTuple):
    """What sums end in."""

    total: Function
    mean: Function
    root: Function
    reciprocal_root: Function


@functools.cache
def _ends(accumulate: str) -> _Ends:
    operations = OPERATIONS[accumulate]
    real, add, divide, square_root = operations.type, operations.add, operations.divide, operations.square_root

    @device
    def total(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        return total

    @device
    def mean(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        return divide(total, divisor)

    @device
    def root(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        return square_root(divide(total, divisor))

    @device
    def reciprocal_root(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        return divide(real(1), square_root(add(divide(total, divisor), eps)))

    return _Ends(total, mean, root, reciprocal_root)


@device
def _x(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
    return x


@device
def _grad(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
    return g


@functools.cache
def _deviation_squared(accumulate: str) -> Function:
    add, multiply = OPERATIONS[accumulate].add, OPERATIONS[accumulate].multiply

    @device
    def term(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        y = add(x, -s)
        return multiply(y, y)

    return term


def _sums(operation: str, accumulate: str) -> Formula:
    ends = _ends(accumulate)
    if operation in ("sum", "mean"):
        return Formula((Pass(_x, ("x",), ends.total if operation == "sum" else ends.mean, written="out"),))
    end = ends.mean if operation == "var" else ends.root
    squares = Pass(_deviation_squared(accumulate), ("x",), end, written="out")
    return Formula((Pass(_x, ("x",), ends.mean), squares))


# ----------------------------------------------------------------------------------------------------------- softmax


def _softmaxes(operation: str, accumulate: str, precise: bool) -> Formula:
    """s is the maximum; t the sum of the exponentials, its logarithm, or the result of logsumexp. `precise`: whether
    exp makes up for the rounding of x - s.
    """
    operations, log = OPERATIONS[accumulate], log_of(accumulate)
    exp, exp_of_near = exp_below(accumulate, precise), exp_near(accumulate, precise)
    real, add, divide = operations.type, operations.add, operations.divide

    @device
    def exponential(x: Any, s: Any, t: Any) -> Any:
        if not precise:
            return exp(t, real(0))
        shadow = add(t, -x)
        return exp(t, add(add(x, -add(t, -shadow)), add(-s, -shadow)))  # the error, exactly

    @device
    def near_power(x: Any, s: Any) -> Any:
        t = add(x, -s)
        return exp_of_near(t, add(x, -add(t, s)) if precise else real(0))  # the error, exactly (Dekker)

    @device
    def counted(total: Any, count: Any, s: Any) -> Any:
        """The sum of all exponentials; NaN if the maximum is infinite or a NaN, as all of the row then is."""
        return add(real(count), total) if add(s, -s) == real(0) else real(math.nan)

    @device
    def term(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        t = add(x, -s)
        value = exponential(x, s, t)  # no branch around it: selects cost less
        is_maximum = t == real(0)
        return real(0) if is_maximum else value, 1 if is_maximum else 0

    @device
    def normaliser(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        return counted(total, count, s)

    @device
    def logarithm(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        ones = real(count)
        u = counted(total, count, s)
        shadow = add(u, -ones)
        error = add(add(ones, -add(u, -shadow)), add(total, -shadow))  # of the addition, exactly
        quotient = divide(u if error == real(0) else error, u)  # a division of 0 takes longer
        return add(log(u), real(0) if error == real(0) else quotient)

    @device
    def logsumexp(total: Any, count: Any, s: Any, divisor: Any, eps: Any) -> Any:
        if s == real(math.inf) or s == real(-math.inf):
            return s
        return add(s, logarithm(total, count, s, divisor, eps))

    @device
    def power(x: Any, s: Any) -> Any:
        return exponential(x, s, add(x, -s))

    @device
    def softmax(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        return divide(power(x, s), t)

    @device
    def log_softmax(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        return add(add(x, -s), -t)

    end, element = {
        "softmax": (normaliser, softmax),
        "log_softmax": (logarithm, log_softmax),
        "logsumexp": (logsumexp, None),
    }[operation]
    exponentials = Pass(term, ("x",), end, True, "" if element else "out", power, near_power)
    return Formula((Pass(None, ("x",)), exponentials), element, ("x",), operation == "softmax")


def _softmaxes_backward(operation: str, accumulate: str) -> Formula:
    operations, exp = OPERATIONS[accumulate], exp_of(accumulate)
    real, add, multiply, fma = operations.type, operations.add, operations.multiply, operations.fma

    @device
    def product(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        return multiply(g, x)

    @device
    def softmax(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        return multiply(x, add(g, -s))

    @device
    def log_softmax(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        return fma(-exp(x, real(0)), s, g)

    total = _ends(accumulate).total
    if operation == "softmax_backward":
        return Formula((Pass(product, ("x", "grad"), total),), softmax, ("x", "grad"))
    return Formula((Pass(_grad, ("grad",), total),), log_softmax, ("x", "grad"))


# ------------------------------------------------------------------------------------------------------------- norms


def _norms(centred: bool, accumulate: str, weight: bool, bias: bool) -> Formula:
    """rms_norm; layer_norm if `centred`."""
    operations, ends = OPERATIONS[accumulate], _ends(accumulate)
    add, multiply, fma = operations.add, operations.multiply, operations.fma

    @device
    def square(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        return multiply(x, x)

    normalised = _normalised(centred, accumulate)

    @device
    def element(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        h = normalised(x, s, t if centred else s)
        if weight:
            return fma(h, w, b) if bias else multiply(h, w)
        return add(h, b) if bias else h

    reads = ("x", *(("weight",) if weight else ()), *(("bias",) if bias else ()))
    if not centred:
        return Formula((Pass(square, ("x",), ends.reciprocal_root, written="rstd"),), element, reads)
    mean = Pass(_x, ("x",), ends.mean, written="mean")
    squares = Pass(_deviation_squared(accumulate), ("x",), ends.reciprocal_root, written="rstd")
    return Formula((mean, squares), element, reads)


def _normalised(centred: bool, accumulate: str) -> Function:
    """normalised(x, m, r), of a row's mean, if it is centred, and the reciprocal of its root."""
    add, multiply = OPERATIONS[accumulate].add, OPERATIONS[accumulate].multiply

    @device
    def normalised(x: Any, m: Any, r: Any) -> Any:
        return multiply(add(x, -m), r) if centred else multiply(x, r)

    return normalised


def _norms_backward(centred: bool, accumulate: str, weight: bool) -> Formula:
    operations, ends = OPERATIONS[accumulate], _ends(accumulate)
    add, multiply, fma = operations.add, operations.multiply, operations.fma
    normalised = _normalised(centred, accumulate)

    @device
    def weighted(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        return multiply(g, w) if weight else g

    @device
    def product(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        return multiply(weighted(x, g, w, b, m, r, s), normalised(x, m, r))

    @device
    def element(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any, t: Any) -> Any:
        h, p = normalised(x, m, r), weighted(x, g, w, b, m, r, s)
        return multiply(fma(-h, t, add(p, -s)) if centred else fma(-h, s, p), r)

    of_weight = ("weight",) if weight else ()
    reads = ("x", "grad", *of_weight, *(("mean",) if centred else ()), "rstd")
    products = Pass(product, reads, ends.mean)
    passes = (Pass(weighted, ("grad", *of_weight), ends.mean), products) if centred else (products,)
    return Formula(passes, element, reads)


def _weights_backward(centred: bool, accumulate: str) -> Formula:
    multiply, normalised = OPERATIONS[accumulate].multiply, _normalised(centred, accumulate)

    @device
    def product(x: Any, g: Any, w: Any, b: Any, m: Any, r: Any, s: Any) -> Any:
        return multiply(g, normalised(x, m, r))

    reads = ("x", "grad", *(("mean",) if centred else ()), "rstd")
    return Formula((Pass(product, reads, _ends(accumulate).total, written="out"),))
