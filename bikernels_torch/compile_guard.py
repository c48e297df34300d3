"""torch.compile in the mode: inductor generates kernels of its own and ignores overrides, so it is refused, clearly.

Refused is both compiling with inductor while the mode is on and calling what inductor compiled while it was off; the
other backends (eager, aot_eager) run PyTorch's operators, hence the overrides.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from bikernels import BikernelsError


class CompiledInModeError(BikernelsError):
    """A function compiled by inductor was called in the batch-invariant mode, which could not hold in it."""


_MESSAGE = (
    "the batch-invariant mode is on, and torch.compile's inductor backend generates kernels that bypass it; "
    'call the model uncompiled, compile it with backend="aot_eager", or leave the mode around this call '
    "(with bikernels_torch.set_batch_invariant_mode(False):)"
)


def install() -> Callable[[], None]:
    """Refuse inductor from now on; the returned function ends that."""
    undo = [_patch(torch._TorchCompileInductorWrapper, "__call__", _refusing)]
    # What was compiled before the mode came on is found when it is called. It can only exist if dynamo is loaded.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and hasattr(dynamo, "_callback_from_stance"):
        undo.append(_patch(dynamo, "_callback_from_stance", _refusing_inductor))

    def remove() -> None:
        for step in undo:
            step()

    return remove


def _patch(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    original = getattr(owner, name)
    replacement = wrap(original)
    setattr(owner, name, replacement)

    def restore() -> None:
        if getattr(owner, name) is replacement:  # not if another program has patched it meanwhile
            setattr(owner, name, original)

    return restore


def _refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def refuse(*_: Any, **__: Any) -> Any:
        raise CompiledInModeError(_MESSAGE)

    return refuse


def _refusing_inductor(choose_callback: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function that dynamo asks for its compiler at each call of a compiled function."""

    @functools.wraps(choose_callback)
    def choose(callback: Any) -> Any:
        chosen = choose_callback(callback)
        if _is_inductor(chosen):
            raise CompiledInModeError(_MESSAGE)
        return chosen

    return choose


def _is_inductor(callback: Any) -> bool:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return isinstance(callback, torch._TorchCompileInductorWrapper) or (
        getattr(callback, "__module__", None) == "torch._dynamo.backends.inductor"
    )
