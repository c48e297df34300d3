"""Matrix products: `matmul` and `addmm`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from ..backend import MatmulLaunch
from ..contract import ACCUMULATE
from ..settings import choose_arithmetic, choose_backend, current_arithmetic, current_backend
from ..specs import Layout, MatmulSpec, merge_dimensions
from ..views import Device
from ._common import Launch, Operation, Result, at_least, floating, real, result_dtype, run


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
    return run(_MATMUL, (a, b), _settings(dtype, backend, arithmetic), out)


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
    factors = real(alpha, "alpha"), real(beta, "beta")
    return run(_ADDMM, (a, b, c), _settings(dtype, backend, arithmetic), out, *factors)


def _settings(dtype: Any, backend: str | None, arithmetic: str | None) -> tuple[str | None, ...]:
    """The arguments of `_result` behind the layouts."""
    context_backend = None if backend else current_backend()
    context_arithmetic = None if arithmetic else current_arithmetic()
    return result_dtype(dtype), backend, context_backend, arithmetic, context_arithmetic


def _rounded(value: float, accumulate: str) -> float:
    if accumulate == "float64" or value in (0, 1):
        return value
    return ctypes.c_float(value).value  # to nearest; infinite if too large


def _result(
    device: Device,
    a: Layout,
    b: Layout,
    c: Layout | None,
    dtype: str | None,
    backend_name: str | None,
    context_backend: str | None,  # part of a plan's key: the context may change between calls
    arithmetic_name: str | None,
    context_arithmetic: str | None,
) -> Result:
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

    def prepare(out_strides: tuple[int, ...]) -> Launch:
        out2 = _restore_axes(out_strides, a, b)

        @functools.cache
        def product(addend: bool) -> MatmulLaunch:
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

        if c is None:
            return product(False)
        accumulate = ACCUMULATE[a.dtype]

        def sum_of_products(stream: int, out: int, a: int, b: int, c: int, alpha: float, beta: float) -> None:
            alpha, beta = _rounded(alpha, accumulate), _rounded(beta, accumulate)
            addend = beta != 0
            product(addend)(stream, out, a, b, c if addend else 0, alpha, beta)

        return sum_of_products

    return Result(dtype, shape, prepare)


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


def _result_without_addend(device: Device, a: Layout, b: Layout, *settings: str | None) -> Result:
    return _result(device, a, b, None, *settings)


_MATMUL = Operation(("a", "b"), _result_without_addend)
_ADDMM = Operation(("a", "b", "c"), _result, in_place="c")
