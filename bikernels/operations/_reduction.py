"""What the reductions share: axes, dtypes, the operands beside x, and the spec."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..backend import Backend
from ..contract import ACCUMULATE
from ..errors import OperationUnsupportedError
from ..settings import choose_backend, current_backend
from ..specs import ONE_FOR_A_ROW, Layout, ReductionSpec, merge_dimensions
from ..views import Device
from ._common import Launch, Operation, Result, floating, is_integer, result_dtype, run

_AXES = "an integer, a tuple of integers or None"
_ROW = "an integer or a tuple of integers"


class Settings(NamedTuple):
    """What decides about a reduction besides the layouts of its operands."""

    axis: int | tuple[int, ...] | None
    dtype: str | None
    backend: str | None
    context_backend: str | None
    """Part of a plan's key: the context may change between calls."""
    keepdims: bool = False
    correction: float = 0.0
    eps: float | None = 0.0
    """None: the unit in the last place of 1, in the accumulate dtype."""


def reduce(
    operation: Operation,
    arrays: Sequence[Any],
    axis: int | Sequence[int] | None,
    *,
    dtype: Any,
    out: Any,
    backend: str | None,
    keepdims: bool = False,
    correction: float = 0.0,
    eps: float | None = 0.0,
) -> Any:
    """Compute a reduction along `axis` (several: as if flattened in C order; None: all)."""
    if axis is not None and not isinstance(axis, int):
        axis = tuple(axis) if isinstance(axis, Sequence) else (as_index(axis, _AXES),)
    name = None if dtype is None else result_dtype(dtype)
    context = None if backend else current_backend()
    return run(operation, arrays, (axis, name, backend, context, keepdims, correction, eps), out)  # see `Settings`


def row_axes(axis: Any) -> int | Sequence[int]:
    """The axis or axes of a row; TypeError for None, which is no axis of a row."""
    if axis is None:
        raise TypeError(f"axis is None; pass {_ROW}")
    return axis


@functools.cache
def reduction(name: str, *operands: str, results: tuple[str, ...] = ("out",)) -> Operation:
    """The operation of that name (see `ReductionSpec`), for `reduce`.

    Args:
        name: of `specs.REDUCTIONS`.
        operands: the arguments' names, that of x first; the others have the names of the spec.
        results: "out", and the statistics of the rows that are written beside it.
    """
    return Operation(operands, functools.partial(_result, name, operands, results[1:]), results=results)


def reduce_rows(
    name: str,
    required: dict[str, Any],
    axis: Any,
    *,
    optional: dict[str, Any] | None = None,
    results: tuple[str, ...] = ("out",),
    eps: float | None = 0.0,
    dtype: Any,
    out: Any,
    backend: str | None,
) -> Any:
    """Compute a reduction of rows by its name, of operands by theirs, x first; an optional one may be None."""
    operands = required | {name: operand for name, operand in (optional or {}).items() if operand is not None}
    operation = reduction(name, *operands, results=results)
    return reduce(operation, tuple(operands.values()), row_axes(axis), eps=eps, dtype=dtype, out=out, backend=backend)


def as_index(axis: Any, allowed: str) -> int:
    """The axis as an int; TypeError, saying what is allowed, if it is none."""
    try:
        return int(axis.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"axis is {axis!r}; pass {allowed}") from None


def _result(
    operation: str, names: tuple[str, ...], statistics: tuple[str, ...], device: Device, x: Layout, *rest: Any
) -> Result:
    others: dict[str, Layout] = dict(zip(names[1:], rest, strict=False))
    settings = Settings(*rest[len(others) :])
    floating(x.dtype, names[0], or_integer="grad" not in others)
    for name, operand in others.items():
        floating(operand.dtype, name)
    dtype = settings.dtype or ("float64" if is_integer(x.dtype) else x.dtype)
    axes = _normalise(settings.axis, len(x.shape))
    for name, operand in others.items():
        expected = _shape_of(name, x.shape, axes)
        if operand.shape != expected:
            raise ValueError(
                f"{name} has shape {operand.shape}; pass one of shape {expected}, since {names[0]} has {x.shape} and "
                f"axis is {settings.axis}"
            )
    strides = {name: _along_all(name, operand.strides, len(x.shape), axes) for name, operand in others.items()}
    backend = choose_backend(settings.backend, device)
    _check_backend(operation, backend)

    one_for_a_row = operation in ONE_FOR_A_ROW
    # A weight's gradient belongs to a place of the normalised axes, and is summed over the others.
    row = tuple(i for i in range(len(x.shape)) if (i in axes) != operation.endswith("weight_backward"))
    kept = tuple(i for i in range(len(x.shape)) if i not in row)
    keepdims = settings.keepdims or not one_for_a_row
    accumulate = ACCUMULATE[dtype]
    eps = settings.eps if settings.eps is not None else float(np.finfo(accumulate).eps)
    dtypes = {"x": x.dtype, "out": dtype, **{name: operand.dtype for name, operand in others.items()}}
    dtypes |= dict.fromkeys(statistics, accumulate)

    def prepare(out_strides: tuple[int, ...], *statistics_strides: tuple[int, ...]) -> Launch:
        given = zip(statistics, statistics_strides, strict=True)
        every = {"x": x.strides, **strides} | {name: _along_all(name, own, len(x.shape), axes) for name, own in given}
        if not one_for_a_row:
            every["out"] = out_strides
        in_row = [_take(own, row) for own in every.values()]
        in_kept = [_take(own, kept) for own in every.values()]
        if one_for_a_row:
            in_kept.append(_take(out_strides, kept) if keepdims else out_strides)
        row_shape, merged_row = merge_dimensions(_take(x.shape, row), *in_row)
        kept_shape, merged_kept = merge_dimensions(_take(x.shape, kept), *in_kept)
        layouts = {
            name: Layout(dtypes[name], kept_shape + row_shape, outer + inner)
            for name, outer, inner in zip(every, merged_kept, merged_row, strict=False)
        }
        if one_for_a_row:
            layouts["out"] = Layout(dtype, kept_shape, merged_kept[-1])
        spec = ReductionSpec(operation, len(kept_shape), correction=settings.correction, eps=eps, **layouts)
        return _in_order(backend.prepare_reduction(spec, device), ("out", *statistics), ("x", *others))

    shape = _reduced(x.shape, row, keepdims) if one_for_a_row else x.shape
    of_rows = _reduced(x.shape, axes, True)
    return Result(dtype, shape, prepare, tuple((accumulate, of_rows) for _ in statistics))


def _in_order(launch: Launch, results: tuple[str, ...], operands: tuple[str, ...]) -> Launch:
    """A launch that is given the results, then the operands, from one that is given them in the order of the spec."""
    given = results + operands
    order = [given.index(name) for name in _ORDER if name in given]
    if order == sorted(order):
        return launch
    return lambda stream, *addresses: launch(stream, *[addresses[i] for i in order])


_ORDER = ("out", "x", "grad", "weight", "bias", "mean", "rstd")
"""That of the spec's fields, but for out."""


def _check_backend(operation: str, backend: Backend) -> None:
    if operation not in backend.reductions:
        raise OperationUnsupportedError(
            f"{operation} cannot be computed by backend {backend.name!r}, which has "
            f"{', '.join(sorted(backend.reductions))}; pass NumPy arrays: backend 'cpu' computes every operation"
        )


def _take(values: tuple[int, ...], indices: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([values[i] for i in indices])


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    """The shape without the axes, or with each of length 1."""
    return tuple(1 if i in axes else length for i, length in enumerate(shape) if keepdims or i not in axes)


def _shape_of(name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an operand beside x, by that of x and the axes."""
    if name == "grad":
        return shape
    return _take(shape, axes) if name in ("weight", "bias") else _reduced(shape, axes, True)


def _along_all(name: str, strides: tuple[int, ...], ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an operand beside x along the dimensions of x, 0 where it is broadcast."""
    if name == "grad":
        return strides
    if name in ("weight", "bias"):
        own = iter(strides)
        return tuple(next(own) if i in axes else 0 for i in range(ndim))
    return tuple(0 if i in axes else stride for i, stride in enumerate(strides))


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
