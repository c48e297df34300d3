"""Matrix products: `matmul` and `addmm`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..backend import MatmulLaunch
from ..contract import ACCUMULATE
from ..kinds import order_streams
from ..settings import choose_arithmetic, choose_backend, current_arithmetic, current_backend
from ..specs import Layout, MatmulSpec, merge_dimensions
from ..views import Device
from ._common import at_least, describe, floating, order, result, result_dtype


def matmul(
    a: Any,
    b: Any,
    /,
    *,
    out: Any = None,
    dtype: Any = None,
    backend: str | None = None,
    arithmetic: str | None = None,
) -> Any:
    """Matrix product whose bits depend on nothing but the row of `a` and the column of `b` that meet in an element.

    Args:
        a: (..., M, K), or (K,).
        b: (..., K, N), or (K,). Batch dimensions broadcast; 1-D operands are completed and dropped as in numpy.matmul.
            Both are bfloat16, float16, float32 or float64, of one dtype, on one device, with any strides.
        out: array for the result, of its exact shape and dtype, on the operands' device, sharing no memory with them.
        dtype: dtype of the result: that of the operands (the default) or a wider one. It changes the last rounding
            only; the arithmetic is the operands'.
        backend: "cpu", "cupy" or "numba"; by default what `use_backend`, BIKERNELS_BACKEND or the device decides.
        arithmetic: class of `contract.ARITHMETIC`; by default what `use_arithmetic` or the device decides.

    Returns:
        (..., M, N) in the kind of array that `a` is, on its device and current stream.

    Raises:
        ValueError: the shapes do not match, the devices differ, or `out` does not fit.
        TypeError: unsupported or unequal dtypes, or an operand that is no array.
        BackendUnavailableError: `backend` cannot run here.
        ArithmeticUnsupportedError: the device or the dtype does not have this arithmetic.

    The order of operations is section 2 of docs/contract.md.
    """
    return _product(None, a, b, 1.0, 0.0, out, dtype, backend, arithmetic)


def addmm(
    c: Any,
    a: Any,
    b: Any,
    /,
    *,
    alpha: float = 1,
    beta: float = 1,
    out: Any = None,
    dtype: Any = None,
    backend: str | None = None,
    arithmetic: str | None = None,
) -> Any:
    """beta * c + alpha * (a @ b), rounded once to the result's dtype.

    Args:
        c: broadcasts to the shape of `a @ b`; of the operands' dtype or of the result's. Not read if beta is 0.
        a, b: as in `matmul`.
        alpha, beta: real numbers, rounded once to the accumulate dtype (float64 for float64, float32 for others).
        out: as in `matmul`; it may also be exactly `c`.
        dtype, backend, arithmetic: as in `matmul`.

    Returns:
        As `matmul`.

    Raises:
        As `matmul`.

    The epilogue is t = alpha * acc (if alpha is not 1), then fma(beta, c, t) (if beta is not 0): docs/contract.md.
    """
    if c is None:
        raise TypeError("c is None; pass an array, or call matmul")
    return _product(c, a, b, _real(alpha, "alpha"), _real(beta, "beta"), out, dtype, backend, arithmetic)


def _product(
    c: Any,
    a: Any,
    b: Any,
    alpha: float,
    beta: float,
    out: Any,
    dtype: Any,
    backend: str | None,
    arithmetic: str | None,
) -> Any:
    names = ("a", "b") if c is None else ("a", "b", "c")
    operands = describe(tuple(zip(names, (a, b, c), strict=False)))
    view_a, view_b, *rest = operands.views
    view_c = rest[0] if rest else None
    if view_c is not None:
        alpha, beta = _rounded(alpha, view_a.dtype), _rounded(beta, view_a.dtype)
    plan = _plan(
        view_a.layout,
        view_b.layout,
        None if view_c is None else view_c.layout,
        result_dtype(dtype),
        operands.device,
        backend,
        None if backend else current_backend(),
        arithmetic,
        None if arithmetic else current_arithmetic(),
    )
    array, view_out = result(out, plan.dtype, plan.shape, operands, names, in_place="c")
    if view_out.size:
        stream = view_out.stream
        view_out.stream = order(operands, view_out)
        addend = view_c if beta != 0 else None
        plan.launch(view_out.strides, addend is not None)(view_out, addend, view_a, view_b, alpha, beta)
        if stream != view_out.stream:
            order_streams(view_out.stream, stream, operands.device)
    return array


def _real(value: Any, argument: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument} is {value!r}; pass a real number") from None
    except OverflowError:
        raise ValueError(f"{argument} is too large for float64; pass a smaller number or math.inf") from None


def _rounded(value: float, dtype: str) -> float:
    if ACCUMULATE[dtype] == "float64":
        return value
    with np.errstate(over="ignore"):
        return float(np.float32(value))


class _Plan(NamedTuple):
    """The part of a call that depends on layouts and settings only."""

    dtype: str
    shape: tuple[int, ...]
    prepare: Any

    def launch(self, out_strides: tuple[int, ...], addend: bool) -> MatmulLaunch:
        return self.prepare(out_strides, addend)


@functools.lru_cache(maxsize=4096)
def _plan(
    a: Layout,
    b: Layout,
    c: Layout | None,
    dtype: str | None,
    device: Device,
    backend_name: str | None,
    context_backend: str | None,  # part of the key: a context or the environment may change between calls
    arithmetic_name: str | None,
    context_arithmetic: str | None,
) -> _Plan:
    floating(a.dtype, "a")
    floating(b.dtype, "b")
    if a.dtype != b.dtype:
        raise TypeError(f"a is {a.dtype} and b is {b.dtype}; cast them to one dtype")
    dtype = dtype or a.dtype
    if not at_least(dtype, a.dtype):
        raise TypeError(f"dtype is {dtype} and the operands are {a.dtype}; the result may be {a.dtype} or wider")
    for name, layout in (("a", a), ("b", b)):
        if not layout.shape:
            raise ValueError(f"{name} is 0-dimensional; matmul needs at least 1 dimension (multiply scalars with *)")

    # Complete 1-D operands; `drop` are the result's axes that they do not give it.
    a2 = a if len(a.shape) > 1 else Layout(a.dtype, (1, *a.shape), (0, *a.strides))
    b2 = b if len(b.shape) > 1 else Layout(b.dtype, (*b.shape, 1), (*b.strides, 0))
    (m, k), (k_of_b, n) = a2.shape[-2:], b2.shape[-2:]
    if k != k_of_b:
        raise ValueError(
            f"a of shape {a.shape} and b of shape {b.shape} do not match: a's last axis has {k} elements and "
            f"b's {'last' if len(b.shape) == 1 else 'second-to-last'} has {k_of_b}"
        )
    try:
        batch = np.broadcast_shapes(a2.shape[:-2], b2.shape[:-2])
    except ValueError:
        raise ValueError(f"the batch dimensions of a {a.shape} and b {b.shape} do not broadcast") from None
    shape = batch + ((m,) if len(a.shape) > 1 else ()) + ((n,) if len(b.shape) > 1 else ())

    c2 = None
    if c is not None:
        if floating(c.dtype, "c") not in (a.dtype, dtype):
            raise TypeError(f"c is {c.dtype} and the operands are {a.dtype}; cast c to {a.dtype}")
        c_strides = _broadcast(c, shape)
        if c_strides is None:
            raise ValueError(f"c of shape {c.shape} does not broadcast to the product's shape {shape}")
        c2 = _restore_axes(c_strides, a, b)

    backend = choose_backend(backend_name, device)
    arithmetic = choose_arithmetic(arithmetic_name, a.dtype, backend, device)
    a_batch = _broadcast(Layout(a2.dtype, a2.shape[:-2], a2.strides[:-2]), batch)
    b_batch = _broadcast(Layout(b2.dtype, b2.shape[:-2], b2.strides[:-2]), batch)
    assert a_batch is not None
    assert b_batch is not None

    @functools.lru_cache(maxsize=16)
    def prepare(out_strides: tuple[int, ...], addend: bool) -> MatmulLaunch:
        out2 = _restore_axes(out_strides, a, b)
        batches = [a_batch, b_batch, out2[:-2]]
        if addend and c2 is not None:
            batches.append(c2[:-2])
        merged, strides = merge_dimensions(batch, *batches)
        spec = MatmulSpec(
            arithmetic,
            Layout(a.dtype, (*merged, m, k), strides[0] + a2.strides[-2:]),
            Layout(b.dtype, (*merged, k, n), strides[1] + b2.strides[-2:]),
            Layout(c.dtype, (*merged, m, n), strides[3] + c2[-2:]) if addend and c is not None and c2 else None,
            Layout(dtype, (*merged, m, n), strides[2] + out2[-2:]),
        )
        return backend.prepare_matmul(spec, device)

    return _Plan(dtype, shape, prepare)


def _broadcast(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of `layout` broadcast to `shape`, or None if it does not broadcast."""
    missing = len(shape) - len(layout.shape)
    if missing < 0:
        return None
    strides = [0] * missing
    for length, stride, target in zip(layout.shape, layout.strides, shape[missing:], strict=True):
        if length not in (1, target):
            return None
        strides.append(0 if length == 1 else stride)
    return tuple(strides)


def _restore_axes(strides: tuple[int, ...], a: Layout, b: Layout) -> tuple[int, ...]:
    """Strides of the result with the axes that 1-D operands dropped put back, with stride 0."""
    columns = () if len(b.shape) == 1 else strides[-1:]
    rest = strides[: len(strides) - len(columns)]
    rows = () if len(a.shape) == 1 else rest[-1:]
    return rest[: len(rest) - len(rows)] + (rows or (0,)) + (columns or (0,))
