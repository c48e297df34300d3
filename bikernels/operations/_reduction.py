"""What mean and the softmax family share: axes, dtypes, and the spec of a reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import ReductionLaunch
from ..kinds import order_streams
from ..settings import choose_backend, current_backend
from ..specs import Layout, ReductionSpec, merge_dimensions
from ..views import Device
from ._common import describe, floating, is_integer, order, result, result_dtype


def reduce(
    operation: str,
    x: Any,
    axis: int | Sequence[int] | None,
    *,
    dtype: Any,
    keepdims: bool,
    out: Any,
    backend: str | None,
) -> Any:
    """Compute the reduction `operation` of `x` along `axis` (several: as if flattened in C order; None: all)."""
    operands = describe((("x", x),))
    (view_x,) = operands.views
    if axis is not None and not isinstance(axis, int):
        axis = tuple(axis) if isinstance(axis, Sequence) else (as_index(axis, _AXES),)
    plan = _plan(
        operation,
        view_x.layout,
        axis,
        result_dtype(dtype),
        keepdims,
        operands.device,
        backend,
        None if backend else current_backend(),
    )
    array, view_out = result(out, plan.dtype, plan.shape, operands, ("x",))
    if view_out.size:
        stream = view_out.stream
        view_out.stream = order(operands, view_out)
        plan.prepare(view_out.strides)(view_out, view_x)
        if stream != view_out.stream:
            order_streams(view_out.stream, stream, operands.device)
    return array


_AXES = "an integer, a tuple of integers or None"


def as_index(axis: Any, allowed: str) -> int:
    """The axis as an int; TypeError, saying what is allowed, if it is none."""
    try:
        return int(axis.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"axis is {axis!r}; pass {allowed}") from None


class _Plan(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    prepare: Callable[[tuple[int, ...]], ReductionLaunch]


@functools.lru_cache(maxsize=4096)
def _plan(
    operation: str,
    x: Layout,
    axis: int | tuple[int, ...] | None,
    dtype: str | None,
    keepdims: bool,
    device: Device,
    backend_name: str | None,
    context_backend: str | None,  # part of the key: a context or the environment may change between calls
) -> _Plan:
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

    @functools.lru_cache(maxsize=16)
    def prepare(out_strides: tuple[int, ...]) -> ReductionLaunch:
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

    return _Plan(dtype, shape, prepare)


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
