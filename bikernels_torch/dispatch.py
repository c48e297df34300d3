"""PyTorch's dispatcher, as overrides and guards need it: keys, the kernel that is there, and replacing it quietly."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def backend_keys() -> tuple[str, ...]:
    """The dispatch keys of the devices that this PyTorch is built for."""
    return ("CPU", "CUDA") if torch.backends.cuda.is_built() else ("CPU",)


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator ("aten::mm") that exists computes anything under a key, by whatever way."""
    return bool(
        torch._C._dispatch_has_kernel(operator)
        and torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, key)
    )


def kernel(operator: str, key: str) -> Callable[..., Any]:
    """What an operator runs under a key at present."""
    found = torch.library.get_kernel(operator, key)
    # The key set matters to kernels that dispatch further by it; PyTorch's own do not.
    return functools.partial(found.call_boxed, torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key]))


def autograd_is_idle(*tensors: torch.Tensor | None) -> bool:
    """Whether a composite may be one kernel that reads and writes memory: the tensors are dense and on a CPU or a GPU,
    and nothing follows what it is made of, neither a derivative nor a transform nor a mode.
    """
    if (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for x in tensors:  # noqa: SIM110  (in half the time of a generator)
        if x is not None and torch._C._dispatch_keys(x).raw_repr() not in _DENSE:
            return False
    return True


def _dense_keys() -> frozenset[int]:
    """The dispatch keys of dense tensors, made in inference mode and elsewhere."""
    keys, new = torch._C.DispatchKey, torch._C.DispatchKeySet
    found = []
    for device in ("CPU", "CUDA"):
        inference = new(getattr(keys, device)) | new(getattr(keys, f"Autocast{device}"))
        found += [inference, inference | new(keys.ADInplaceOrView) | new(getattr(keys, f"Autograd{device}"))]
    return frozenset(one.raw_repr() for one in found)


_DENSE = _dense_keys()


class quietly(warnings.catch_warnings):  # noqa: N801
    """PyTorch warns, once a process, that a kernel is overridden; here that is the purpose."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
