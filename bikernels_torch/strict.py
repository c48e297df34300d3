"""Strictness: in the mode, refuse the first operator that reduces and is not covered.

Guards are put before PyTorch's own kernels, for CPU and CUDA tensors, in the way of the mode's overrides; so they hold
in every thread, in backward passes, and for what PyTorch calls from C++. Guarded are the operators that reduce and
those that no table knows, of any library that has registered them by then; the rest runs as without strictness, and
without it nothing is in the way of anything. Operators made of others are not guarded: what they are made of is.

Unknown operators are refused, since strictness is asked for by those who would rather be stopped than trust;
`allow_operators` vouches for one. Kernels that are launched without PyTorch's dispatcher (Triton, CuPy) are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bikernels import BikernelsError

from . import dispatch
from .auditing import kinds
from .auditing.kinds import Kind
from .auditing.place import Locator, Place


class UncoveredOperatorError(BikernelsError):
    """In the strict mode an operator ran that reduces and that the mode does not cover, or that it does not know.

    Attributes:
        operator: as in "aten::cumsum".
        shapes, dtypes, devices: of its tensor arguments.
        place: the module that called it, and the line of source.
    """

    def __init__(self, operator: str, operands: list[torch.Tensor], kind: Kind, place: Place) -> None:
        self.operator = operator
        self.shapes = tuple(tuple(x.shape) for x in operands)
        self.dtypes = tuple(x.dtype for x in operands)
        self.devices = tuple(str(x.device) for x in operands)
        self.place = place
        described = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in operands) or "no tensors"
        caller = f"{place.module or 'the model itself'} ({place.module_class})" if place.module_class else "no module"
        source = f", at {place.file}:{place.line}: {place.source}" if place.file else ""
        what = "reduces, and the batch-invariant mode does not cover it"
        remedy = "use an operator that the mode covers, or leave strict=True out"
        if kind is Kind.UNKNOWN:
            what = "is not known to bikernels, and may reduce"
            name = operator.partition(".")[0]
            remedy = f"if it computes every row by itself, say so with bikernels_torch.allow_operators({name!r})"
        super().__init__(f"{operator} {what} ({described}; called by {caller}{source}); {remedy}")


class Guards:
    """The guards, all in or all out. The mode's lock guards it."""

    def __init__(self) -> None:
        self._libraries: list[Any] = []

    def install(self) -> None:
        """Put the guards in; nothing happens if they are in."""
        if self._libraries:
            return
        libraries: dict[str, Any] = {}
        try:
            with dispatch.quietly():
                for operator, key in _guarded():
                    namespace = operator._name.partition("::")[0]
                    if namespace not in libraries:
                        libraries[namespace] = torch.library.Library(namespace, "IMPL")
                    _guard(libraries[namespace], operator, key)
        except BaseException:
            for library in libraries.values():
                library._destroy()
            raise
        self._libraries = list(libraries.values())

    def remove(self) -> None:
        """Take the guards out; nothing happens if they are out."""
        while self._libraries:
            self._libraries.pop()._destroy()


def _guarded() -> Iterator[tuple[Any, str]]:
    """Operators and dispatch keys."""
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        operator = _operator(name)
        if operator is None or not _may_be_refused(operator):
            continue
        for key in dispatch.backend_keys():
            if dispatch.has_kernel(name, key) and not kinds.is_composite(operator, key.lower()):
                yield operator, key


@functools.cache
def _operator(name: str) -> Any:
    """The operator, or None for what PyTorch keeps for TorchScript only."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    if not torch._C._dispatch_has_kernel(name):
        return None
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return getattr(packet, overload or "default", None)


def _may_be_refused(operator: Any) -> bool:
    """Whether some call of it may reduce; bikernels' own are covered, and `prims` call other operators."""
    if operator._name.partition("::")[0] in (*kinds.OURS, "prims", "prim", "profiler"):
        return False
    if kinds.kind_of(operator) in (Kind.REDUCES, Kind.UNKNOWN):
        return True
    return any(argument.name in ("accumulate", "reduction") for argument in operator._schema.arguments)


def _guard(library: Any, operator: Any, key: str) -> None:
    name = operator._name
    guard = functools.partial(_check, operator, dispatch.kernel(name, key))
    library.impl(name.partition("::")[2], guard, key, allow_override=True)


def _check(operator: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kind = kinds.kind_of_call(operator, args, kwargs)
    if kind in (Kind.REDUCES, Kind.UNKNOWN):
        operands = list(kinds.tensors((args, kwargs)))
        device = next((x.device.type for x in operands), "cpu")
        if not kinds.is_covered(operator._name, device, kinds.float_dtypes((args, kwargs))):
            raise UncoveredOperatorError(operator._name, operands, kind, Locator()())
    return original(*args, **kwargs)
