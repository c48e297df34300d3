"""What mean and the softmax family share: axes, dtypes, and the spec of a reduction."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..settings import choose_backend, current_backend
from ..specs import Layout, ReductionSpec, merge_dimensions
from ..views import Device
from ._common import Launch, Operation, Result, floating, is_integer, result_dtype, run


def reduce(
    operation: Operation,
    x: Any,
    axis: int | Sequence[int] | None,
    *,
    dtype: Any,
    keepdims: bool,
    out: Any,
    backend: str | None,
) -> Any:
    """Compute a reduction of `x` along `axis` (several: as if flattened in C order; None: all)."""
    if axis is not None and not isinstance(axis, int):
        axis = tuple(axis) if isinstance(axis, Sequence) else (as_index(axis, _AXES),)
    context = None if backend else current_backend()
    return run(operation, (x,), (axis, result_dtype(dtype), keepdims, backend, context), out)


def reduction(name: str) -> Operation:
    """The operation of that name (see `ReductionSpec`), for `reduce`."""
    return Operation(("x",), functools.partial(_result, name))


_AXES = "an integer, a tuple of integers or None"


def as_index(axis: Any, allowed: str) -> int:
    """The axis as an int; TypeError, saying what is allowed, if it is none."""
    try:
        return int(axis.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"axis is {axis!r}; pass {allowed}") from None


def _result(
    operation: str,
    device: Device,
    x: Layout,
    axis: int | tuple[int, ...] | None,
    dtype: str | None,
    keepdims: bool,
    backend_name: str | None,
    context_backend: str | None,  # part of a plan's key: the context may change between calls
) -> Result:
    floating(x.dtype, "x", or_integer=True)
    dtype = dtype or ("float64" if is_integer(x.dtype) else x.dtype)
    ndim = len(x.shape)
    axes = _normalise(axis, ndim)
    kept_axes = tuple(i for i in range(ndim) if i not in axes)
    writes_rows = operation != "mean"
    if writes_rows:
        shape = x.shape
    else:
        shape = tuple(1 if i in axes else x.shape[i] for i in range(ndim) if keepdims or i not in axes)
    backend = choose_backend(backend_name, device)

    def prepare(out_strides: tuple[int, ...]) -> Launch:
        def take(values: tuple[int, ...], indices: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[i] for i in indices)

        out_kept = take(out_strides, kept_axes) if writes_rows or keepdims else out_strides
        kept, (x_kept, out_kept) = merge_dimensions(take(x.shape, kept_axes), take(x.strides, kept_axes), out_kept)
        x_row, out_row = take(x.strides, axes), take(out_strides, axes) if writes_rows else ()
        if writes_rows:
            row, (x_row, out_row) = merge_dimensions(take(x.shape, axes), x_row, out_row)
        else:
            row, (x_row,) = merge_dimensions(take(x.shape, axes), x_row)
        spec = ReductionSpec(
            operation,
            len(kept),
            Layout(x.dtype, kept + row, x_kept + x_row),
            Layout(dtype, kept + row if writes_rows else kept, out_kept + out_row),
        )
        return backend.prepare_reduction(spec, device)

    return Result(dtype, shape, prepare)


def _normalise(axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The axes, ascending and counted from 0."""
    if axis is None:
        return tuple(range(ndim))
    axes = []
    for one in (axis,) if isinstance(axis, int) else axis:
        index = as_index(one, _AXES)
        if not -ndim <= index < ndim:
            raise np.exceptions.AxisError(index, ndim, "axis")
        axes.append(index % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis {axis} names an axis twice")
    return tuple(sorted(axes))
