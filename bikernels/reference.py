"""The contract in plain NumPy: slow, short, and the judge of every backend.

Only operations that IEEE 754 rounds correctly are used (NumPy's exp, log, dot, sum and mean are not), and the fused
multiply-add, which NumPy lacks, is built from them. Arrays are C-ordered and small; `tests/` compares bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from . import contract
from .dtypes import NUMPY_DTYPE, dtype_name

Array = np.ndarray[Any, np.dtype[Any]]

# ------------------------------------------------------------------------------------- fused multiply-add, a * b + c


def _add_to_odd(x: Array, y: Array) -> Array:
    """x + y in float64, rounded to odd: an inexact sum takes the neighbour whose last bit is set (Boldo, Melquiond
    2008). Rounding it again to a shorter format then gives what rounding the exact sum once would have given.
    """
    total = x + y
    shadow = total - x
    error = (x - (total - shadow)) + (y - shadow)
    even = (total.view(np.int64) & 1) == 0
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where((error != 0) & even, total.view(np.int64) + towards, total.view(np.int64)).view(np.float64)


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """float32 fma: the product is exact in float64, the sum rounded to odd there."""
    product = a.astype(np.float64) * b.astype(np.float64)
    c = np.broadcast_to(c.astype(np.float64), np.broadcast_shapes(product.shape, c.shape))
    exact = np.isfinite(product) & np.isfinite(c)
    zero = np.zeros_like(c)
    odd = _add_to_odd(np.where(exact, product, zero), np.where(exact, c, zero))
    return np.where(exact & (odd != 0), odd, product + c).astype(np.float32)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    """float64 fma (Boldo and Melquiond's algorithm); exact rational arithmetic where that could over- or underflow."""
    a, b, c = (np.ascontiguousarray(x) for x in np.broadcast_arrays(a, b, c))
    plain = np.where(np.isfinite(a) & np.isfinite(b) & np.isinf(c), c, a * b + c)  # a * b itself may overflow

    def ordinary(x: Array, low: int, high: int) -> Array:
        exponent = np.frexp(x)[1]
        return (x == 0) | (np.isfinite(x) & (exponent > low) & (exponent < high))

    safe = ordinary(a, -400, 400) & ordinary(b, -400, 400) & ordinary(c, -900, 900)
    a_s, b_s, c_s = (np.where(safe, x, 0.0) for x in (a, b, c))
    high = a_s * b_s
    a_up, b_up = (x * 134217729.0 for x in (a_s, b_s))  # 2^27 + 1: Veltkamp's splitting
    a_hi, b_hi = a_up - (a_up - a_s), b_up - (b_up - b_s)
    low = (a_s - a_hi) * (b_s - b_hi) - (((high - a_hi * b_hi) - (a_s - a_hi) * b_hi) - a_hi * (b_s - b_hi))
    middle = c_s + low
    shadow = middle - c_s
    middle_error = (c_s - (middle - shadow)) + (low - shadow)
    total = high + middle
    shadow = total - high
    total_error = (high - (total - shadow)) + (middle - shadow)
    result = total + _add_to_odd(middle_error, total_error)
    result = np.where(safe & (result != 0), result, plain)
    for i in np.flatnonzero(~safe & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(a.flat[i]) * Fraction(b.flat[i]) + Fraction(c.flat[i])
        if exact != 0:
            try:
                result.flat[i] = float(exact)
            except OverflowError:
                result.flat[i] = np.inf if exact > 0 else -np.inf
            if result.flat[i] == 0:  # an underflow keeps the exact sum's sign
                result.flat[i] = np.copysign(0.0, 1 if exact > 0 else -1)
    return result


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with one rounding, elementwise, in the dtype of a (float32 or float64)."""
    with np.errstate(all="ignore"):
        return _fma32(a, b, c) if a.dtype == np.float32 else _fma64(a, b, c)


# -------------------------------------------------------------------------------------------------- casts and output


def cast(x: Array, dtype: str) -> Array:
    """To `dtype`, by way of its accumulate dtype, each step rounded to nearest even."""
    with np.errstate(all="ignore"):
        return x.astype(NUMPY_DTYPE[contract.ACCUMULATE[dtype]]).astype(NUMPY_DTYPE[dtype])


def write(x: Array, dtype: str) -> Array:
    """To the result's dtype, with the canonical NaN."""
    with np.errstate(all="ignore"):
        result = np.array(x.astype(NUMPY_DTYPE[dtype]))
    bits = result.view(f"u{result.itemsize}")
    bits[np.isnan(result)] = contract.CANONICAL_NAN[dtype]
    return result


# --------------------------------------------------------------------------------------------------- matrix products


def _exponent(x: Array, least: int) -> Array:
    """floor(log2 |x|), and `least` for subnormal numbers; far below everything for zero."""
    return np.where(x == 0, -100_000, np.maximum(np.frexp(x)[1] - 1, least))


def _tensor_core_step(acc: Array, a: Array, b: Array, arithmetic: contract.Arithmetic, least: int) -> Array:
    """One fused step: acc (M, N) float64 holding float32 values, a (M, group), b (group, N) float64."""
    assert arithmetic.fraction_bits is not None
    with np.errstate(invalid="ignore"):
        products = a[:, :, None] * b[None, :, :]
        special = products.sum(1) + acc  # decides infinities and NaN only
    exponents = _exponent(a, least)[:, :, None] + _exponent(b, least)[None, :, :]
    largest = np.maximum(exponents.max(1), np.maximum(_exponent(acc, -126), arithmetic.floor))
    unit = np.ldexp(1.0, largest - arithmetic.fraction_bits)
    with np.errstate(invalid="ignore"):
        total = (np.trunc(products / unit[:, None, :]).sum(1) + np.trunc(acc / unit)) * unit  # exact in float64
        last_place = np.ldexp(1.0, np.maximum(np.frexp(total)[1] - 1, -126) - 23)
        rounded = np.trunc(total / last_place) * last_place + 0.0  # toward zero to float32; a zero is +0
    rounded = np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)
    return np.where(np.isfinite(special), rounded, special)


def fold(a: Array, b: Array, arithmetic: str) -> Array:
    """The accumulators of a (M, K) times b (K, N): float32, or float64 for float64 operands."""
    kind = contract.ARITHMETIC[arithmetic]
    dtype = dtype_name(a.dtype)
    acc_dtype = NUMPY_DTYPE[contract.ACCUMULATE[dtype]]
    k_total = a.shape[1]
    if kind.is_tensor_core:
        acc = np.zeros((a.shape[0], b.shape[1]))
        padding = -k_total % kind.group
        a = np.pad(a.astype(np.float64), ((0, 0), (0, padding)))
        b = np.pad(b.astype(np.float64), ((0, padding), (0, 0)))
        for k in range(0, k_total, kind.group):
            group = slice(k, k + kind.group)
            acc = _tensor_core_step(acc, a[:, group], b[group], kind, contract.EXPONENT_MIN[dtype])
        return acc.astype(np.float32)
    acc = np.zeros((a.shape[0], b.shape[1]), acc_dtype)
    a, b = a.astype(acc_dtype), b.astype(acc_dtype)
    for k in range(k_total):
        acc = fma(a[:, k, None], b[None, k, :], acc)
    return acc + acc_dtype.type(0)  # an underflow to -0 becomes +0


def addmm(
    c: Array | None,
    a: Array,
    b: Array,
    alpha: float = 1.0,
    beta: float = 1.0,
    *,
    arithmetic: str | None = None,
    dtype: str | None = None,
) -> Array:
    """beta * c + alpha * (a @ b) for a (M, K), b (K, N) and c that broadcasts to (M, N); c None: no addend."""
    name = dtype_name(a.dtype)
    t = fold(a, b, arithmetic or contract.native_arithmetic(name))
    scale, factor = t.dtype.type(alpha), t.dtype.type(beta)
    with np.errstate(all="ignore"):
        if scale != 1:
            t = scale * t
    if c is not None and factor != 0:
        t = fma(factor, c.astype(t.dtype), t)
    return write(t, dtype or name)


def matmul(a: Array, b: Array, *, arithmetic: str | None = None, dtype: str | None = None) -> Array:
    """a (M, K) times b (K, N)."""
    return addmm(None, a, b, arithmetic=arithmetic, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- exp and log


def _polynomial(coefficients: tuple[float, ...], f: Array) -> Array:
    """Horner's rule in the dtype of f, each step one fma."""
    p = np.full_like(f, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        p = fma(p, f, f.dtype.type(coefficient))
    return p


def exp(t: Array, d: Array | float = 0.0) -> Array:
    """The exponential of t + d in float32 or float64, where d lies below the last bit of t."""
    real, unsigned = t.dtype.type, np.dtype(f"u{t.itemsize}")
    fraction = np.finfo(t.dtype).nmant
    numbers = contract.EXP[str(t.dtype)]
    d = np.where(t < real(numbers.low), real(0), d)
    t = np.where(t < real(numbers.low), real(numbers.low), t)  # a NaN fails both comparisons and stays
    t = np.where(t > real(numbers.high), real(numbers.high), t)
    z = fma(t, real(numbers.log2e), real(numbers.magic))
    k = z - real(numbers.magic)
    f = fma(k, real(-numbers.ln2_high), t)
    f = fma(k, real(-numbers.ln2_low), f) + d
    p = _polynomial(numbers.coefficients, f)
    b = z.view(unsigned)  # its low bits are i + 2 * bias; what lies above leaves the word in the shifts
    half = b >> unsigned.type(1)
    with np.errstate(all="ignore"):
        r = p * (half << unsigned.type(fraction)).view(t.dtype)
        return r * ((b - half) << unsigned.type(fraction)).view(t.dtype)


def log(u: Array) -> Array:
    """log in float32 or float64."""
    real, unsigned, signed = u.dtype.type, np.dtype(f"u{u.itemsize}"), np.dtype(f"i{u.itemsize}")
    info = np.finfo(u.dtype)
    fraction = info.nmant
    numbers = contract.LOG[str(u.dtype)]
    small = u < info.smallest_normal
    shift = 23 if u.dtype == np.float32 else 52
    with np.errstate(all="ignore"):
        b = np.where(small, u * real(2.0**shift), u).view(unsigned)
    d = b - unsigned.type(numbers.cut)  # modulo 2^32 or 2^64
    e = ((d.view(signed) >> fraction) - np.where(small, shift, 0)).astype(u.dtype)
    m = (b - (d & unsigned.type(-(2**fraction) % 2 ** (8 * u.itemsize)))).view(u.dtype)
    f = m - real(1)
    with np.errstate(all="ignore"):
        p = _polynomial(numbers.coefficients, f)
        if numbers.ln2_low == 0:
            r = fma(e, real(numbers.ln2_high), fma(p, f * f, f))
        else:
            r = fma(e, real(numbers.ln2_high), f + fma(p, f * f, e * real(numbers.ln2_low)))
    r = np.where(u == np.inf, u, r)
    return np.where(u > 0, r, np.where(u == 0, real(-np.inf), real(np.nan)))


# -------------------------------------------------------------------------------------------------------- reductions


def tree_sum(rows: Array) -> Array:
    """The sum of every row of (R, n) float32 or float64 values, by the contract's tree."""
    lanes, chunk = contract.SUM_LANES, contract.SUM_CHUNK
    count, n = rows.shape
    chunks = max(1, -(-n // chunk))
    padded = np.zeros((count, chunks, chunk // lanes, lanes), rows.dtype)
    padded.reshape(count, chunks * chunk)[:, :n] = rows
    with np.errstate(all="ignore"):
        acc = np.zeros((count, chunks, lanes), rows.dtype)
        for i in range(chunk // lanes):
            acc = acc + padded[:, :, i]
        while acc.shape[2] > 1:
            acc = acc[:, :, 0::2] + acc[:, :, 1::2]
    return acc[:, 0, 0] if chunks == 1 else tree_sum(acc[:, :, 0])


def _rows(x: Array, dtype: str | None, kept: int) -> tuple[Array, str]:
    """x as (rows, n) in the accumulate dtype, after the cast to the result's dtype."""
    name = dtype or ("float64" if dtype_name(x.dtype) in contract.INTEGER_DTYPES else dtype_name(x.dtype))
    count = int(np.prod(x.shape[:kept], dtype=np.int64))
    n = int(np.prod(x.shape[kept:], dtype=np.int64))
    return cast(x, name).astype(NUMPY_DTYPE[contract.ACCUMULATE[name]]).reshape(count, n), name


def _tree_mean(rows: Array) -> Array:
    return tree_sum(rows) / rows.dtype.type(rows.shape[1])


def _for_a_row(compute: Callable[[Array, str], Array], x: Array, kept: int, dtype: str | None) -> Array:
    """One element for each of the rows, which `compute` is given in the accumulate dtype, with the result's dtype."""
    rows, name = _rows(x, dtype, kept)
    with np.errstate(all="ignore"):
        return write(compute(rows, name), name).reshape(x.shape[:kept])


def mean(x: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The mean over all axes but the first `kept`."""
    return _for_a_row(lambda rows, _: _tree_mean(rows), x, kept, dtype)


def sum(x: Array, kept: int = 0, dtype: str | None = None) -> Array:  # noqa: A001
    """The sum over all axes but the first `kept`."""
    return _for_a_row(lambda rows, _: tree_sum(rows), x, kept, dtype)


def _variance(rows: Array, correction: float) -> Array:
    y = rows - _tree_mean(rows)[:, None]
    return tree_sum(y * y) / rows.dtype.type(max(0.0, rows.shape[1] - correction))


def var(x: Array, kept: int = 0, dtype: str | None = None, correction: float = 0.0) -> Array:
    """The variance over all axes but the first `kept`."""
    return _for_a_row(lambda rows, _: _variance(rows, correction), x, kept, dtype)


def std(x: Array, kept: int = 0, dtype: str | None = None, correction: float = 0.0) -> Array:
    """The square root of the variance."""
    return _for_a_row(lambda rows, _: np.sqrt(_variance(rows, correction)), x, kept, dtype)


def _sum_and_error(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y, and by how much its rounding went wrong (Knuth's TwoSum)."""
    total = x + y
    b = total - x
    return total, (x - (total - b)) + (y - b)


def _maximum(rows: Array) -> Array:
    return rows.max(1, initial=-np.inf)  # NumPy's max propagates NaN


def _softmax_terms(rows: Array, dtype: str) -> tuple[Array, Array, Array, Array]:
    """t = x - max, its exponentials, and their sum as u and the error e of its last addition."""
    real = rows.dtype.type
    with np.errstate(all="ignore"):
        t, d = _sum_and_error(rows, -_maximum(rows)[:, None])
        exponentials = exp(t, d if dtype == str(rows.dtype) else 0.0)
        count = (t == 0).sum(1).astype(rows.dtype)
        u, e = _sum_and_error(count, tree_sum(np.where(t == 0, real(0), exponentials)))
    return t, exponentials, u[:, None], e[:, None]


def _row_by_row(compute: Callable[[Array, str], Array], x: Array, kept: int, dtype: str | None) -> Array:
    rows, name = _rows(x, dtype, kept)
    if rows.size == 0:
        return np.empty(x.shape, NUMPY_DTYPE[name])
    with np.errstate(all="ignore"):
        return write(compute(rows, name), name).reshape(x.shape)


def softmax(x: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The softmax over all axes but the first `kept`."""

    def compute(rows: Array, name: str) -> Array:
        _, exponentials, u, _ = _softmax_terms(rows, name)
        return exponentials / u

    return _row_by_row(compute, x, kept, dtype)


def log_softmax(x: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The log_softmax over all axes but the first `kept`."""

    def compute(rows: Array, name: str) -> Array:
        t, _, u, e = _softmax_terms(rows, name)
        return t - (log(u) + e / u)

    return _row_by_row(compute, x, kept, dtype)


def logsumexp(x: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The logarithm of the sum of the exponentials over all axes but the first `kept`."""

    def compute(rows: Array, name: str) -> Array:
        _, _, u, e = _softmax_terms(rows, name)
        m = _maximum(rows)
        return np.where(np.isinf(m), m, m + (log(u) + e / u)[:, 0])

    return _for_a_row(compute, x, kept, dtype)


def softmax_backward(grad: Array, y: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The gradient of softmax, from that of its result y."""

    def compute(g: Array, y: Array) -> Array:
        return y * (g - tree_sum(g * y)[:, None])

    return _backward(compute, grad, y, (), kept, dtype)


def log_softmax_backward(grad: Array, y: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The gradient of log_softmax, from that of its result y."""

    def compute(g: Array, y: Array) -> Array:
        return fma(-exp(y), tree_sum(g)[:, None], g)

    return _backward(compute, grad, y, (), kept, dtype)


# ------------------------------------------------------------------------------------------------------------- norms


def _along_row(x: Array | None, rows: Array) -> Array | None:
    """A weight or a bias, one element for each place of a row, in the dtype of the rows."""
    with np.errstate(all="ignore"):
        return None if x is None else x.astype(rows.dtype).reshape(1, rows.shape[1])


def _reciprocal_root(mean_square: Array, eps: float | None) -> Array:
    real = mean_square.dtype.type
    return real(1) / np.sqrt(mean_square + real(np.finfo(mean_square.dtype).eps if eps is None else eps))


def rms_norm_with_statistics(
    x: Array, weight: Array | None = None, kept: int = 0, dtype: str | None = None, eps: float | None = None
) -> tuple[Array, Array]:
    """rms_norm over all axes but the first `kept`, and each row's rstd."""
    rows, name = _rows(x, dtype, kept)
    w = _along_row(weight, rows)
    with np.errstate(all="ignore"):
        r = _reciprocal_root(_tree_mean(rows * rows), eps)
        h = rows * r[:, None]
        result = h if w is None else h * w
    return write(result, name).reshape(x.shape), write(r, str(r.dtype)).reshape(x.shape[:kept])


def rms_norm(
    x: Array, weight: Array | None = None, kept: int = 0, dtype: str | None = None, eps: float | None = None
) -> Array:
    """rms_norm over all axes but the first `kept`."""
    return rms_norm_with_statistics(x, weight, kept, dtype, eps)[0]


def layer_norm_with_statistics(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    kept: int = 0,
    dtype: str | None = None,
    eps: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """layer_norm over all axes but the first `kept`, and each row's mean and rstd."""
    rows, name = _rows(x, dtype, kept)
    w, b = _along_row(weight, rows), _along_row(bias, rows)
    with np.errstate(all="ignore"):
        m = _tree_mean(rows)
        r = _reciprocal_root(_variance(rows, 0.0), eps)
        result = (rows - m[:, None]) * r[:, None]
        if w is not None and b is not None:
            result = fma(result, w, b)
        elif w is not None:
            result = result * w
        elif b is not None:
            result = result + b
    m, r = (write(one, str(one.dtype)).reshape(x.shape[:kept]) for one in (m, r))
    return write(result, name).reshape(x.shape), m, r


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    kept: int = 0,
    dtype: str | None = None,
    eps: float = 1e-5,
) -> Array:
    """layer_norm over all axes but the first `kept`."""
    return layer_norm_with_statistics(x, weight, bias, kept, dtype, eps)[0]


def _backward(
    compute: Callable[..., Array],
    grad: Array,
    x: Array,
    statistics: tuple[Array, ...],
    kept: int,
    dtype: str | None,
    weight: Array | None = None,
) -> Array:
    """compute(grad, x, *statistics, weight if there is one): rows in the accumulate dtype of the result's."""
    name = dtype or dtype_name(x.dtype)
    count, n = (int(np.prod(lengths, dtype=np.int64)) for lengths in (x.shape[:kept], x.shape[kept:]))
    accumulate = NUMPY_DTYPE[contract.ACCUMULATE[name]]
    with np.errstate(all="ignore"):
        rows = [one.astype(accumulate).reshape(count, n) for one in (grad, x)]
        of_rows = [one.astype(accumulate).reshape(count, 1) for one in statistics]
        w = _along_row(weight, rows[0])
        result = write(compute(*rows, *of_rows, *(() if w is None else (w,))), name)
    return result.reshape(x.shape if result.ndim > 1 else x.shape[kept:])


def rms_norm_backward(
    grad: Array, x: Array, rstd: Array, weight: Array | None = None, kept: int = 0, dtype: str | None = None
) -> Array:
    """The gradient of rms_norm with respect to x."""

    def compute(g: Array, x: Array, r: Array, w: Array | None = None) -> Array:
        h, p = x * r, g if w is None else g * w
        return fma(-h, _tree_mean(p * h)[:, None], p) * r

    return _backward(compute, grad, x, (rstd,), kept, dtype, weight)


def rms_norm_weight_backward(grad: Array, x: Array, rstd: Array, kept: int = 0, dtype: str | None = None) -> Array:
    """The gradient of rms_norm with respect to the weight: over the first `kept` axes."""

    def compute(g: Array, x: Array, r: Array) -> Array:
        return tree_sum((g * (x * r)).T)

    return _backward(compute, grad, x, (rstd,), kept, dtype)


def layer_norm_backward(
    grad: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    weight: Array | None = None,
    kept: int = 0,
    dtype: str | None = None,
) -> Array:
    """The gradient of layer_norm with respect to x."""

    def compute(g: Array, x: Array, m: Array, r: Array, w: Array | None = None) -> Array:
        h, p = (x - m) * r, g if w is None else g * w
        return fma(-h, _tree_mean(p * h)[:, None], p - _tree_mean(p)[:, None]) * r

    return _backward(compute, grad, x, (mean, rstd), kept, dtype, weight)


def layer_norm_weight_backward(
    grad: Array, x: Array, mean: Array, rstd: Array, kept: int = 0, dtype: str | None = None
) -> Array:
    """The gradient of layer_norm with respect to the weight: over the first `kept` axes."""

    def compute(g: Array, x: Array, m: Array, r: Array) -> Array:
        return tree_sum((g * ((x - m) * r)).T)

    return _backward(compute, grad, x, (mean, rstd), kept, dtype)
