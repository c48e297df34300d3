"""What every operation does with a call: view the operands, find the plan, allocate or check `out`, order the streams.

The plan holds all that depends on forms and settings and not on addresses, the checks of an operation among it; it is
made at the first call of its kind and looked up at the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..contract import FLOAT_DTYPES, INTEGER_DTYPES, ITEMSIZE
from ..dtypes import dtype_name
from ..kinds import Allocate, Kind, described, kind_of, order_streams, view_of, views_of
from ..specs import contiguous_strides
from ..views import Description, Device, Form, FormView, View, share_memory

Launch = Callable[..., None]
"""launch(out, *operands, *factors): queue the kernels on out.stream. Only addresses are read from the views."""


class Result(NamedTuple):
    """What an operation gives for certain operands."""

    dtype: str
    shape: tuple[int, ...]
    prepare: Callable[[tuple[int, ...]], Launch]
    """From the strides of the result, which has elements, to the launch."""


class Operation(NamedTuple):
    """An operation as `run` needs it."""

    names: tuple[str, ...]
    """Of the operands' arguments."""
    result: Callable[..., Result]
    """result(device, *layouts, *settings): checks the operands; its errors name the arguments."""
    in_place: str | None = None
    """The operand that `out` may be, element for element."""


class _Plan(NamedTuple):
    """What calls with operands and an `out` of certain forms, and with certain settings, have in common."""

    device: Device
    launch: Launch | None
    """None where the result has no elements."""
    allocate: Allocate | None
    """None where the caller gives `out`."""
    extents: tuple[tuple[int, int], ...]
    """What `out`, if the caller gives it, and the operands may touch: offsets from their addresses, in bytes."""


def run(operation: Operation, arrays: Sequence[Any], settings: tuple[Any, ...], out: Any, *factors: float) -> Any:
    """Compute an operation.

    Args:
        operation: which.
        arrays: its operands.
        settings: what else decides about the plan; hashable.
        out: the caller's array for the result, or None.
        factors: passed to the launch.

    Returns:
        out, or a new array.
    """
    views = views_of(arrays, operation.names)
    stream = views[0].stream
    forms = tuple([view.form for view in views])
    if out is None:
        plan = _plan(operation, settings, forms, kind_of(arrays[0], operation.names[0]), None)
        assert plan.allocate is not None
        out, view_out = plan.allocate(stream)
    else:
        view_out = view_of(out, "out")
        plan = _plan(operation, settings, forms, None, view_out.form)
        _check_memory(operation, plan, view_out, views)
    if plan.launch is None:
        return out
    for view in views:
        if view.stream != stream:
            order_streams(view.stream, stream, plan.device)
    if view_out.stream == stream:
        plan.launch(view_out, *views, *factors)
    else:
        order_streams(view_out.stream, stream, plan.device)
        plan.launch(FormView(view_out.form, view_out.pointer, stream), *views, *factors)
        order_streams(stream, view_out.stream, plan.device)
    return out


@functools.lru_cache(maxsize=4096)
def _plan(
    operation: Operation, settings: tuple[Any, ...], forms: tuple[Form, ...], kind: Kind | None, out_form: Form | None
) -> _Plan:
    """The plan; `kind` is that of the array to allocate, or `out_form` the form of the one given."""
    operands = [described(form, name) for form, name in zip(forms, operation.names, strict=True)]
    first = operands[0]
    for name, operand in zip(operation.names, operands, strict=True):
        if operand.device != first.device:
            raise ValueError(
                f"{name} lies on {operand.device} and {operation.names[0]} on {first.device}; move them to one device"
            )
    result = operation.result(first.device, *(operand.layout for operand in operands), *settings)
    allocate = None
    if out_form is None:
        assert kind is not None
        allocate = kind.allocator(result.dtype, result.shape, first.device)
        out = Description(result.dtype, result.shape, contiguous_strides(result.shape), first.device)
    else:
        out = described(out_form, "out")
        _check_out(out, result, first.device)
    launch = result.prepare(out.strides) if out.size else None
    return _Plan(first.device, launch, allocate, tuple(one.extent() for one in (out, *operands)))


def _check_out(out: Description, result: Result, device: Device) -> None:
    """The checks of the caller's `out` that its address does not enter into."""
    if out.dtype != result.dtype:
        raise TypeError(f"out is {out.dtype} and the result is {result.dtype}; pass an out of that dtype, or dtype=")
    if out.shape != result.shape:
        raise ValueError(f"out has shape {out.shape} and the result has {result.shape}")
    if out.device != device:
        raise ValueError(f"out lies on {out.device} and the operands on {device}; move them to one device")
    if out.read_only:
        raise ValueError("out is read-only; pass a writable array")
    if out.overlaps_itself():
        raise ValueError(f"out has elements that share memory (strides {out.strides}); pass an array that owns each")


def _check_memory(operation: Operation, plan: _Plan, out: View, views: Sequence[View]) -> None:
    """The check that `out` shares no memory with the operands."""
    (low, high), *extents = plan.extents
    start, end = out.pointer + low, out.pointer + high
    for name, view, (low, high) in zip(operation.names, views, extents, strict=True):
        if start >= view.pointer + high or view.pointer + low >= end:
            continue
        in_place = name == operation.in_place
        if in_place and view.pointer == out.pointer and view.description.layout == out.description.layout:
            continue
        if share_memory(out, view):
            allowed = f"; only {operation.in_place} itself may be overwritten" if operation.in_place else ""
            raise ValueError(f"out shares memory with {name}{allowed}; pass a separate array or out=None")


# ------------------------------------------------------------------------------------------------------------- dtypes


def floating(dtype: str, argument: str, *, or_integer: bool = False) -> str:
    """Return dtype if it is one the operations compute with; TypeError, naming the argument, otherwise."""
    if dtype in FLOAT_DTYPES or (or_integer and dtype in INTEGER_DTYPES):
        return dtype
    raise TypeError(f"{argument} is {dtype}; cast it to one of {', '.join(FLOAT_DTYPES)}")


def result_dtype(dtype: Any) -> str | None:
    """The name of the caller's `dtype=`, which must be a floating-point one; None stays None."""
    return None if dtype is None else floating(dtype_name(dtype), "dtype")


def is_integer(dtype: str) -> bool:
    """Whether dtype is bool or an integer."""
    return dtype in INTEGER_DTYPES


def at_least(dtype: str, other: str) -> bool:
    """Whether every value of the floating-point dtype `other` is one of `dtype`."""
    return dtype == other or ITEMSIZE[dtype] > ITEMSIZE[other]
