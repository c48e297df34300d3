"""What every operation does with its operands: describe them, check `out`, order the streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..contract import FLOAT_DTYPES, INTEGER_DTYPES, ITEMSIZE
from ..dtypes import dtype_name
from ..kinds import Kind, order_streams, view_of
from ..views import CPU, Device, View, overlaps_itself, share_memory


class Operands(NamedTuple):
    """The views of a call's operands and what they agree on."""

    views: tuple[View, ...]
    kind: Kind
    """Of the first operand; the result is of this kind."""
    device: Device


def describe(arguments: Sequence[tuple[str, Any]]) -> Operands:
    """Describe the operands, given with their arguments' names; they must lie on one device."""
    first_name, first = arguments[0]
    view, kind = view_of(first, first_name)
    views = [view]
    for name, array in arguments[1:]:
        other, _ = view_of(array, name)
        if other.device != view.device:
            raise ValueError(
                f"{name} lies on {other.device} and {first_name} on {view.device}; move them to one device"
            )
        views.append(other)
    return Operands(tuple(views), kind, view.device)


def floating(dtype: str, argument: str, *, or_integer: bool = False) -> str:
    """Return dtype if it is one the operations compute with; TypeError, naming the argument, otherwise."""
    if dtype in FLOAT_DTYPES or (or_integer and dtype in INTEGER_DTYPES):
        return dtype
    raise TypeError(f"{argument} is {dtype}; cast it to one of {', '.join(FLOAT_DTYPES)}")


def result_dtype(dtype: Any) -> str | None:
    """The name of the caller's `dtype=`, which must be a floating-point one; None stays None."""
    return None if dtype is None else floating(dtype_name(dtype), "dtype")


def result(
    out: Any, dtype: str, shape: tuple[int, ...], operands: Operands, names: Sequence[str], in_place: str | None = None
) -> tuple[Any, View]:
    """The array for the result and its view: a new one, or the caller's `out` once it has been checked.

    `names` are the operands' arguments; `in_place` is the one that `out` may be, element for element.
    """
    first = operands.views[0]
    if out is None:
        array = operands.kind.empty(dtype, shape, first)
        return array, view_of(array, "out")[0]
    view, _ = view_of(out, "out")
    if view.dtype != dtype:
        raise TypeError(f"out is {view.dtype} and the result is {dtype}; pass an out of that dtype, or dtype=")
    if view.shape != shape:
        raise ValueError(f"out has shape {view.shape} and the result has {shape}")
    if view.device != operands.device:
        raise ValueError(f"out lies on {view.device} and the operands on {operands.device}; move them to one device")
    if view.read_only:
        raise ValueError("out is read-only; pass a writable array")
    if overlaps_itself(view):
        raise ValueError(f"out has elements that share memory (strides {view.strides}); pass an array that owns each")
    for name, operand in zip(names, operands.views, strict=True):
        if name == in_place and operand.pointer == view.pointer and operand.layout == view.layout:
            continue
        if share_memory(view, operand):
            allowed = f"; only {in_place} itself may be overwritten" if in_place else ""
            raise ValueError(f"out shares memory with {name}{allowed}; pass a separate array or out=None")
    return out, view


def order(operands: Operands, out: View) -> int:
    """Make the first operand's stream wait for the other operands; the stream on which to launch."""
    stream = operands.views[0].stream
    if operands.device != CPU:
        for view in (*operands.views[1:], out):
            if view.stream != stream:
                order_streams(view.stream, stream, operands.device)
    return stream


def is_integer(dtype: str) -> bool:
    """Whether dtype is bool or an integer."""
    return dtype in INTEGER_DTYPES


def at_least(dtype: str, other: str) -> bool:
    """Whether every value of the floating-point dtype `other` is one of `dtype`."""
    return dtype == other or ITEMSIZE[dtype] > ITEMSIZE[other]
