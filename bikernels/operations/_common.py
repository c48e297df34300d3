"""What every operation does with a call: view the operands, find the plan, allocate or check `out`, order the streams.

The plan holds all that depends on forms and settings and not on addresses, the checks of an operation among it; it is
made at the first call of its kind and looked up at the others.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..contract import FLOAT_DTYPES, INTEGER_DTYPES, ITEMSIZE
from ..dtypes import dtype_name
from ..kinds import Allocate, Facts, Kind, described, facts_of, facts_of_each, kind_of, order_streams
from ..specs import contiguous_strides
from ..views import Description, Device, Form, FormView, View, share_memory

Launch = Callable[..., None]
"""launch(stream, *results, *operands, *factors): queue the kernels on the stream of that handle, by addresses."""


class Result(NamedTuple):
    """What an operation gives for certain operands."""

    dtype: str
    shape: tuple[int, ...]
    prepare: Callable[..., Launch]
    """From the strides of the results, of which one at least has elements, to the launch."""
    more: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Dtype and shape of the results beside the first."""


class Operation(NamedTuple):
    """An operation as `run` needs it."""

    names: tuple[str, ...]
    """Of the operands' arguments."""
    result: Callable[..., Result]
    """result(device, *layouts, *settings): checks the operands; its errors name the arguments."""
    in_place: str | None = None
    """The operand that `out` may be, element for element."""
    results: tuple[str, ...] = ("out",)
    """The names of the results; several are returned, and taken as `out`, in a tuple."""


class _Plan(NamedTuple):
    """What calls with operands and an `out` of certain forms, and with certain settings, have in common."""

    device: Device
    launch: Launch | None
    """None where no result has elements."""
    allocate: Callable[[int], tuple[Any, tuple[int, ...]]]
    """allocate(stream): what a call returns where its caller gives no `out`, and the addresses of the results."""
    apart: tuple[tuple[int, int, int, int], ...]
    """For each result and each array after it, of results and operands: which two; they may have a byte in common only
    if the first one's address, less the other's, lies between these."""


def run(operation: Operation, arrays: Sequence[Any], settings: tuple[Any, ...], out: Any, *factors: float) -> Any:
    """Compute an operation.

    Args:
        operation: which.
        arrays: its operands.
        settings: what else decides about the plan; hashable.
        out: the caller's array for the result (a tuple for several), or None.
        factors: passed to the launch.

    Returns:
        out, or a new array (a tuple of several).
    """
    facts = facts_of_each(arrays, operation.names)
    forms, addresses, streams, _ = zip(*facts, strict=True)
    stream = streams[0]
    streams_of_outs: tuple[int, ...] = ()
    if out is None:
        plan = _plan(operation, settings, forms, kind_of(arrays[0], operation.names[0]), ())
        out, results = plan.allocate(stream)
    else:
        prepares = type(out) is _ToPrepare
        outs = _facts_of_out(operation, out.out if prepares else out)
        forms_of_outs, results, streams_of_outs, _ = zip(*outs, strict=True)
        plan = _plan(operation, settings, forms, None, forms_of_outs)
        if prepares:
            return _prepared(plan.launch, len(outs), out.places(arrays), factors)
        every = (*results, *addresses)
        for i, j, least, most in plan.apart:
            if least < every[i] - every[j] < most:
                _check_memory(operation, [FormView(*one) for one in (*outs, *facts)], i, j)
    if plan.launch is None:
        return out
    if streams.count(stream) == len(streams) and streams_of_outs.count(stream) == len(streams_of_outs):
        plan.launch(stream, *results, *addresses, *factors)
        return out
    apart = {*streams, *streams_of_outs} - {stream}
    for other in apart:
        order_streams(other, stream, plan.device)
    plan.launch(stream, *results, *addresses, *factors)
    for other in apart.intersection(streams_of_outs):
        order_streams(stream, other, plan.device)
    return out


class _ToPrepare(NamedTuple):
    """In the place of `out`: the call is to be prepared, not made."""

    out: Any
    operands: tuple[Any, ...]

    def places(self, arrays: Sequence[Any]) -> list[int]:
        """Of an operation's arrays among the operands that the caller gave."""
        return [next(i for i, one in enumerate(self.operands) if one is array) for array in arrays]


def prepare(function: Callable[..., Any], /, *operands: Any, out: Any, **options: Any) -> Launch:
    """What `function(*operands, out=out, **options)` would launch, to be launched for other arrays of the same forms.

    For programs that call again and again with the like, adapters of other frameworks above all: a call costs what the
    launch costs. The kernels are loaded, and compiled if need be; nothing is computed.

    Args:
        function: a function of this package that takes arrays, such as `matmul`.
        operands: its operands, each an object of its own (they may share memory); those that may be left out may be
            None.
        out: an array for the result; of several, a tuple.
        options: its other arguments. Of alpha and beta the values are kept, as are the backend and the arithmetic class
            of the contexts around this call.

    Returns:
        launch(stream, *addresses): queue the kernels on the CUDA stream of that handle (0 for the default stream, and
        on a CPU, where it waits for the result). `addresses` are those of the results, then of the operands that are
        not None, in the order in which they were given. It may be called in any thread, and in the capture of a CUDA
        graph. The arrays must have the dtypes, shapes, strides and devices of those given here, and a result must
        share no memory with an operand or another result: nothing of that is checked.

    Raises:
        ValueError: an operand is given twice.
        Otherwise what the function raises.
    """
    given = tuple([one for one in operands if one is not None])
    if len({id(one) for one in given}) < len(given):
        raise ValueError("an operand is given twice; pass two views of it, so that each has a place of its own")
    launch: Launch = function(*operands, out=_ToPrepare(out, given), **options)
    return launch


def _prepared(launch: Launch | None, results: int, places: list[int], factors: tuple[float, ...]) -> Launch:
    """A launch by the addresses of the results, and of the operands in the caller's order."""
    if launch is None:
        return lambda stream, *addresses: None
    if places == sorted(places):
        return (lambda stream, *addresses: launch(stream, *addresses, *factors)) if factors else launch
    order = operator.itemgetter(*range(results), *[results + place for place in places])
    return lambda stream, *addresses: launch(stream, *order(addresses), *factors)


def _facts_of_out(operation: Operation, out: Any) -> list[Facts]:
    names = operation.results
    if len(names) == 1:
        return [facts_of(out, "out")]
    if not isinstance(out, tuple) or len(out) != len(names):
        raise TypeError(f"out is {type(out).__name__}; pass a tuple of {len(names)} arrays: {', '.join(names)}")
    return [facts_of(one, name) for one, name in zip(out, names, strict=True)]


@functools.lru_cache(maxsize=4096)
def _plan(
    operation: Operation,
    settings: tuple[Any, ...],
    forms: tuple[Form, ...],
    kind: Kind | None,
    out_forms: tuple[Form, ...],
) -> _Plan:
    """The plan; `kind` is that of the arrays to allocate, or `out_forms` the forms of those given."""
    operands = [described(form, name) for form, name in zip(forms, operation.names, strict=True)]
    first = operands[0]
    for name, operand in zip(operation.names, operands, strict=True):
        if operand.device != first.device:
            raise ValueError(
                f"{name} lies on {operand.device} and {operation.names[0]} on {first.device}; move them to one device"
            )
    result = operation.result(first.device, *(operand.layout for operand in operands), *settings)
    results = ((result.dtype, result.shape), *result.more)
    allocate = _allocate_all([])
    if kind is not None:
        allocate = _allocate_all([kind.allocator(dtype, shape, first.device) for dtype, shape in results])
        outs = [Description(dtype, shape, contiguous_strides(shape), first.device) for dtype, shape in results]
    else:
        outs = [described(form, name) for form, name in zip(out_forms, operation.results, strict=True)]
        for out, name, (dtype, shape) in zip(outs, operation.results, results, strict=True):
            _check_out(out, name, dtype, shape, first.device)
    launch = result.prepare(*(out.strides for out in outs)) if any(out.size for out in outs) else None
    apart = _apart([one.extent() for one in (*outs, *operands)], len(outs))
    return _Plan(first.device, launch, allocate, apart)


def _allocate_all(each: list[Allocate]) -> Callable[[int], tuple[Any, tuple[int, ...]]]:
    """See `_Plan.allocate`."""
    one = each[0] if len(each) == 1 else None

    def allocate(stream: int) -> tuple[Any, tuple[int, ...]]:
        if one is not None:
            out, address = one(stream)
            return out, (address,)
        outs, addresses = zip(*[allocate(stream) for allocate in each], strict=True)
        return outs, addresses

    return allocate


def _check_out(out: Description, name: str, dtype: str, shape: tuple[int, ...], device: Device) -> None:
    """The checks of a result that the caller gives that its address does not enter into."""
    if out.dtype != dtype:
        raise TypeError(f"{name} is {out.dtype} and the result is {dtype}; pass an out of that dtype, or dtype=")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape} and the result has {shape}")
    if out.device != device:
        raise ValueError(f"{name} lies on {out.device} and the operands on {device}; move them to one device")
    if out.read_only:
        raise ValueError(f"{name} is read-only; pass a writable array")
    if out.overlaps_itself():
        raise ValueError(f"{name} has elements that share memory (strides {out.strides}); pass an array that owns each")


def _apart(extents: Sequence[tuple[int, int]], results: int) -> tuple[tuple[int, int, int, int], ...]:
    """See `_Plan.apart`; `extents` are what the arrays may touch: offsets from their addresses, in bytes."""
    return tuple(
        (i, j, low_j - high_i, high_j - low_i)
        for i, (low_i, high_i) in enumerate(extents[:results])
        for j, (low_j, high_j) in enumerate(extents[i + 1 :], start=i + 1)
    )


def _check_memory(operation: Operation, arrays: Sequence[View], i: int, j: int) -> None:
    """The check that result i shares no memory with array j, where addresses do not tell."""
    names = operation.results + operation.names
    out, other, name = arrays[i], arrays[j], names[j]
    in_place = j >= len(operation.results) and name == operation.in_place
    if in_place and other.pointer == out.pointer and other.description.layout == out.description.layout:
        return
    if share_memory(out, other):
        allowed = f"; only {operation.in_place} itself may be overwritten" if operation.in_place else ""
        raise ValueError(f"{names[i]} shares memory with {name}{allowed}; pass a separate array or out=None")


# ------------------------------------------------------------------------------------------- numbers and dtypes


def real(value: Any, argument: str) -> float:
    """A real number as a float; TypeError and ValueError, naming the argument, for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument} is {value!r}; pass a real number") from None
    except OverflowError:
        raise ValueError(f"{argument} is too large for float64; pass a smaller number or math.inf") from None


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
