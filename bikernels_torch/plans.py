"""What a call costs the host: the first of its kind makes a plan, the others follow it.

An override reads its arguments, decides, allocates and calls the core, which looks at every operand anew. None of that
depends on where the operands lie. So the first call with arguments of certain forms is recorded, and calls of the same
forms only allocate the results and launch the kernels that the core has prepared (`bikernels.prepare`).

    key       the dtype, shape, strides and device of every tensor, the other arguments as they are, and the backend
              and the arithmetic class that contexts name, of the thread and of the mode
    plan      what to allocate, and the launches, which take addresses and the device's current stream

A plan holds no tensor and nothing that a call writes, so threads, streams and the capture of a CUDA graph share it.
What a kernel needs to know of addresses, such as their alignment, its launch looks at. Only overrides are planned whose
results are new tensors that the core writes. Every other call goes the ordinary way each time, which also raises all
errors: one that PyTorch computes, one of a tensor that stands in two places, one of an operand that had to be copied.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

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

    @functools.wraps(override)
    def call(original: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        key = _key(arguments, keywords)
        replay = plans.get(key)
        if replay is not None:
            return replay(arguments)
        if key is None or not _differ(arguments):
            return override(original, *arguments, **keywords)
        with core.recording() as calls:
            results = override(original, *arguments, **keywords)
        replay = _plan(arguments, results, calls)
        if replay is not None:
            if len(plans) >= LIMIT:
                plans.clear()
            plans[key] = replay
        return results

    return call


def planned_operator(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The same for the kernel of an operator of our own, which has no PyTorch's kernel to hand on to."""
    return functools.partial(planned(lambda _, *arguments, **keywords: compute(*arguments, **keywords)), None)


def _key(arguments: Sequence[Any], keywords: dict[str, Any]) -> Hashable:
    """All that decides what a call does but the addresses; None if it has no key."""
    if len(arguments) == 2 and not keywords:  # most products, by a shorter way
        a, b = arguments
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            of_a = (a.dtype, a.shape, a.stride(), a.device)
            return *core.settings_in_force(), *of_a, b.dtype, b.shape, b.stride(), b.device
    parts: list[Any] = [*core.settings_in_force()]
    for x in (*arguments, *itertools.chain(*keywords.items())) if keywords else arguments:
        if type(x) in _AS_THEY_ARE:
            parts.append(x)
        elif isinstance(x, torch.Tensor):
            parts += (x.dtype, x.shape, x.stride(), x.device)
        elif isinstance(x, list):
            parts.append(tuple(x))
        elif isinstance(x, float):
            parts.append(x.hex())  # equal floats may differ in the sign of zero
        else:
            return None  # a complex number, for one, may be equal to a real one, where PyTorch refuses one of them
    return tuple(parts)


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
        of_all_two = len(arguments) == 2 and places[0] == [0, 1]
        return _one_result(allocate[0], stream, calls[0].launch, _addresses(places[0]), of_all_two)
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
    new: Callable[[], torch.Tensor],
    stream: Callable[[], int],
    launch: core.Launch,
    addresses: Callable[[Sequence[Any]], Sequence[int]],
    of_all_two: bool,
) -> _Replay:
    def replay(arguments: Sequence[Any]) -> torch.Tensor:
        result = new()
        launch(stream(), result.data_ptr(), *addresses(arguments))
        return result

    def replay_of_two(arguments: Sequence[Any]) -> torch.Tensor:
        a, b = arguments
        result = new()
        launch(stream(), result.data_ptr(), a.data_ptr(), b.data_ptr())
        return result

    return replay_of_two if of_all_two else replay


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
    current_device, index = torch._C._cuda_getDevice, device.index
    return lambda: direct(shape, strides, dtype) if current_device() == index else new()


def _direct_allocators() -> dict[str, Callable[..., torch.Tensor]]:
    """What compiled graphs allocate with, on the current device: torch.empty without its way through the dispatcher."""
    names = {"cpu": "_empty_strided_cpu", "cuda": "_empty_strided_cuda"}
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return {device: getattr(guards, name) for device, name in names.items() if hasattr(guards, name)}


_DIRECT = _direct_allocators()
