"""What a call costs the host: the first of its kind makes a plan, the others follow it.

An override reads its arguments, decides, allocates and calls the core, which looks at every operand anew. None of that
depends on where the operands lie. So the first call with arguments of certain forms is recorded, and calls of the same
forms only allocate the results and launch the kernels that the core has prepared (`bikernels.prepare`).

    key       the dtype, shape, strides and device of every tensor, the other arguments as they are, and the backend
              and the arithmetic class that contexts name, of the thread and of the mode
    plan      what to allocate, and the launches, which take addresses and the device's current stream

A plan holds no tensor and nothing that a call writes, so threads, streams and the capture of a CUDA graph share it.
What a kernel needs to know of addresses, such as their alignment, its launch looks at. Only overrides are planned whose
results the core writes, to new tensors or to one of the caller's. Every other call goes the ordinary way each time,
which also raises all errors: one that PyTorch computes, one of a tensor that stands in two places, one of an operand
that had to be copied, one whose result shares memory with an operand.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from bikernels.settings import current

from . import core

LIMIT = 4096
"""Plans of an override: a server has many numbers of rows, each of them with every shape of weights. At the next one it
forgets them all: shapes that have come so often will come again.
"""

Override = Callable[..., Any]
_Replay = Callable[[Sequence[Any]], Any]
"""From the positional arguments of a call to its results."""

_plans: list[dict[Hashable, _Replay]] = []


def forget() -> None:
    """Take all plans back."""
    for plans in _plans:
        plans.clear()


def planned(override: Override) -> Override:
    """The override, with plans. It must give new tensors that the core has written and do nothing else."""
    plans: dict[Hashable, _Replay] = {}
    _plans.append(plans)

    def make(key: Hashable, original: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """What a call gives for which there is no plan."""
        given = (*arguments, *keywords.values())
        if key is None or not _differ(given):
            return override(original, *arguments, **keywords)
        with core.recording() as calls:
            results = override(original, *arguments, **keywords)
        _keep(plans, key, _plan(given, results, calls))
        return results

    fixed = _with_fixed_arguments(override, plans, make)
    if fixed is not None:
        return fixed
    plan_of, reader_of = plans.get, _readers.get

    @functools.wraps(override)
    def call(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        reader = None if keywords else reader_of(tuple(map(type, arguments)))
        key = _key(arguments, keywords) if reader is None else reader(*arguments)
        replay = plan_of(key)
        return make(key, original, arguments, keywords) if replay is None else replay(arguments)

    return call


def _with_fixed_arguments(
    override: Override, plans: dict[Hashable, _Replay], make: Callable[..., Any]
) -> Override | None:
    """The planned override, where its annotations say what there is to read of each argument; else None.

    Its text is put together, as that of a dataclass's methods is, since a call that asks of every argument what it is
    takes a microsecond.
    """
    _, *parameters = inspect.signature(override).parameters.values()
    names: list[str] = []
    keywords: list[str] = []
    header, parts = ["original"], []
    for one in parameters:
        if one.annotation not in _READ_AS or one.kind not in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            return None
        if one.kind is one.KEYWORD_ONLY:
            header += ["*"] if not keywords else []
            keywords.append(one.name)
        names.append(one.name)
        header.append(one.name if one.default is one.empty else f"{one.name}={one.default!r}")
        parts.append(_READ_AS[one.annotation].format(one.name))
    positional = names[: len(names) - len(keywords)]
    source = f"""
def call({", ".join(header)}):
    _key = core._settings, current(), {", ".join(parts)}
    _replay = plan_of(_key)
    if _replay is None:
        return make(_key, original, ({", ".join(positional)},), dict({", ".join(f"{one}={one}" for one in keywords)}))
    return _replay(({", ".join(names)},))
"""
    space: dict[str, Any] = {"core": core, "current": current, "plan_of": plans.get, "make": make}
    exec(source, space)
    call: Override = space["call"]
    return functools.update_wrapper(call, override)


def planned_operator(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the kernel of an operator of our own, which has no PyTorch's kernel to hand on to."""
    return functools.partial(planned(lambda _, *arguments, **keywords: compute(*arguments, **keywords)), None)


def planned_into(override: Override) -> Override:
    """The same for an override that writes to a tensor of the caller's and returns it: `out=`, or the first argument.

    The override looks whether that tensor shares memory with an operand; a plan is only followed where it does not.
    """
    plans: dict[Hashable, _Replay] = {}
    _plans.append(plans)
    plan_of, reader_of = plans.get, _readers.get

    @functools.wraps(override)
    def call(
        original: Callable[..., Any], *arguments: Any, out: torch.Tensor | None = None, **keywords: Any
    ) -> torch.Tensor:
        given = arguments if out is None else (*arguments, out)
        reader = None if keywords else reader_of(tuple(map(type, given)))
        key = _key(given, keywords) if reader is None else reader(*given)
        replay = plan_of(key)
        if replay is not None:
            result = replay(given)
            if result is not None:
                return result
        if out is not None:
            keywords["out"] = out
        if replay is not None or key is None or not _differ(given):
            return override(original, *arguments, **keywords)
        with core.recording() as calls:
            result = override(original, *arguments, **keywords)
        _keep(plans, key, _plan_into(given, given[0] if out is None else out, calls))
        return result

    return call


def _keep(plans: dict[Hashable, _Replay], key: Hashable, replay: _Replay | None) -> None:
    if replay is not None:
        if len(plans) >= LIMIT:
            plans.clear()
        plans[key] = replay


# ------------------------------------------------------------------------------------------------------------- the key


def _key(arguments: Sequence[Any], keywords: dict[str, Any]) -> Hashable:
    """All that decides what a call does but the addresses; None if it has no key."""
    given = (*arguments, *itertools.chain(*keywords.items())) if keywords else arguments
    types = tuple(map(type, given))
    reader = _readers.get(types) or _readers.setdefault(types, _reader(types))
    return reader(*given)


def _reader(types: Sequence[type]) -> Callable[..., Hashable]:
    """What makes keys of arguments of certain types, as one expression.

    Not by types of which equal objects may differ: a complex number may be equal to a real one, where PyTorch refuses
    one of them.
    """
    names, parts = [f"x{i}" for i in range(len(types))], []
    for name, kind in zip(names, types, strict=True):
        if issubclass(kind, torch.Tensor):
            parts.append(_TENSOR.format(name))
        elif kind in _AS_THEY_ARE:
            parts.append(name)
        elif kind in _READ_BY:
            parts.append(_READ_BY[kind].format(name))
        else:
            return lambda *_: None
    source = f"lambda {', '.join(names)}: (core._settings, current(), types, {', '.join(parts)})"
    reader: Callable[..., Hashable] = eval(source, {"core": core, "current": current, "types": types})
    return reader


_readers: dict[tuple[type, ...], Callable[..., Hashable]] = {}
"""By the types of arguments."""

_TENSOR = "{0}.dtype, {0}.shape, {0}.stride(), {0}.get_device()"
"""The device by its number, or -1 for a CPU: an override gets no others."""
_READ_BY: dict[type, str] = {list: "tuple({0})", float: "{0}.hex()"}
"""Equal floats may differ in the sign of zero."""

_READ_AS = {
    "torch.Tensor": _TENSOR,
    "Sequence[int]": "tuple({0})",
    "float": "{0}.hex()",
    **dict.fromkeys(("int", "bool", "torch.dtype", "torch.dtype | None"), "{0}"),
    **dict.fromkeys(("torch.Tensor | None", "Affine"), f"None if {{0}} is None else ({_TENSOR})"),
    "Sequence[int] | None": "None if {0} is None else tuple({0})",
    "float | None": "None if {0} is None else {0}.hex()",
}
"""By annotation, which says what PyTorch's schema says."""

_AS_THEY_ARE = frozenset((int, bool, type(None), torch.dtype, str, tuple, torch.Size))
"""Types of arguments that are as good as equal if they are equal; of floats in a tuple there is no operator."""


def _differ(arguments: Sequence[Any]) -> bool:
    """Whether no tensor stands in two places, so that a recorded operand has one place."""
    tensors = [id(x) for x in arguments if isinstance(x, torch.Tensor)]
    return len(set(tensors)) == len(tensors)


# ------------------------------------------------------------------------------------------------------------ the plan


def _plan(arguments: Sequence[Any], results: Any, calls: Sequence[core.Recorded]) -> _Replay | None:
    """The plan of a call that has just been made; None where the core has not made all of its results, of arguments."""
    given = results if isinstance(results, tuple) else (results,)
    written = [[_whole_place(one, given) for one in call.results] for call in calls]
    places = [[_place(one, arguments) for one in call.operands] for call in calls]
    if any(place is None for each in (*written, *places) for place in each):
        return None
    if sorted(itertools.chain(*written)) != [*range(len(given))]:  # type: ignore[type-var]
        return None
    stream = _stream(given[0].device)
    allocate = [_allocator(one) for one in given]
    if len(calls) == 1 and isinstance(results, torch.Tensor):
        return _one_result(allocate[0], stream, calls[0].launch, places[0])
    steps = []
    for call, of_results, of_operands in zip(calls, written, places, strict=True):
        steps.append((call.launch, _addresses(of_results), _addresses(of_operands)))

    def replay(arguments: Sequence[Any]) -> Any:
        results = tuple([new() for new in allocate])
        for launch, to, from_ in steps:
            launch(stream(), *to(results), *from_(arguments))
        return results

    return replay


def _one_result(
    new: Callable[[], torch.Tensor], stream: Callable[[], int], launch: core.Launch, places: Sequence[Any]
) -> _Replay:
    def replay(arguments: Sequence[Any]) -> torch.Tensor:
        result = new()
        launch(stream(), result.data_ptr(), *addresses(arguments))
        return result

    def replay_of_one(arguments: Sequence[Any]) -> torch.Tensor:
        result = new()
        launch(stream(), result.data_ptr(), arguments[first].data_ptr())
        return result

    def replay_of_two(arguments: Sequence[Any]) -> torch.Tensor:
        result = new()
        launch(stream(), result.data_ptr(), arguments[first].data_ptr(), arguments[second].data_ptr())
        return result

    addresses = _addresses(places)
    first, second = (*places, None)[:2]
    return replay_of_one if len(places) == 1 else replay_of_two if len(places) == 2 else replay


def _plan_into(arguments: Sequence[Any], out: torch.Tensor, calls: Sequence[core.Recorded]) -> _Replay | None:
    """The plan of a call that has just been made, whose result is one of its arguments; None as of the others."""
    if len(calls) != 1 or len(calls[0].results) != 1 or _whole_place(calls[0].results[0], (out,)) is None:
        return None
    launch, operands = calls[0].launch, calls[0].operands
    places = [_place(one, arguments) for one in operands]
    if None in places:
        return None
    place = next(i for i, one in enumerate(arguments) if one is out)
    low, high = core.view(out).description.extent()
    others = [
        (at, *core.view(one).description.extent())
        for at, one in zip(places, operands, strict=True)
        if at is not None and at != place
    ]
    stream, addresses = _stream(out.device), _addresses(places)

    def replay(arguments: Sequence[Any]) -> torch.Tensor | None:
        result = arguments[place]
        address = result.data_ptr()
        start, end = address + low, address + high
        for other, below, above in others:
            begin = arguments[other].data_ptr()
            if start < begin + above and begin + below < end:
                return None
        launch(stream(), address, *addresses(arguments))
        return result

    return replay


def _place(x: torch.Tensor, among: Sequence[Any]) -> int | None:
    """Where a tensor stands, or the only one that begins where it does, since a plan only needs the address."""
    for i, one in enumerate(among):
        if one is x:
            return i
    address = x.data_ptr()
    found = [i for i, one in enumerate(among) if isinstance(one, torch.Tensor) and one.data_ptr() == address]
    return found[0] if len(found) == 1 and address else None


def _whole_place(x: torch.Tensor, among: Sequence[Any]) -> int | None:
    """The same, of a tensor of as many elements."""
    place = _place(x, among)
    return place if place is not None and among[place].numel() == x.numel() else None


_address = torch.Tensor.data_ptr


def _addresses(places: Sequence[int | None]) -> Callable[[Sequence[Any]], Sequence[int]]:
    """From a call's arguments to the addresses of those at some places."""
    if len(places) == 1:
        (place,) = places
        assert place is not None
        return lambda arguments: (_address(arguments[place]),)
    pick = operator.itemgetter(*places)
    return lambda arguments: [*map(_address, pick(arguments))]


# ----------------------------------------------------------------------------------------- PyTorch at the lowest price


def _stream(device: torch.device) -> Callable[[], int]:
    """The current stream of a device, as the core's launches take it."""
    if device.type == "cpu":
        return lambda: 0
    return functools.partial(torch._C._cuda_getCurrentRawStream, device.index)


def _allocator(like: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What makes tensors of the same dtype, shape, strides and device."""
    shape, strides, dtype, device = tuple(like.shape), like.stride(), like.dtype, like.device
    new = functools.partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    direct = _DIRECT.get(device.type)
    if direct is None:
        return new
    if device.type == "cpu":
        return functools.partial(direct, shape, strides, dtype)
    if torch.cuda.device_count() == 1:
        return functools.partial(direct, shape, strides, dtype)
    current_device, index = torch._C._cuda_getDevice, device.index
    return lambda: direct(shape, strides, dtype) if current_device() == index else new()


def _direct_allocators() -> dict[str, Callable[..., torch.Tensor]]:
    """What compiled graphs allocate with, on the current device: torch.empty without its way through the dispatcher."""
    names = {"cpu": "_empty_strided_cpu", "cuda": "_empty_strided_cuda"}
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return {device: getattr(guards, name) for device, name in names.items() if hasattr(guards, name)}


_DIRECT = _direct_allocators()
