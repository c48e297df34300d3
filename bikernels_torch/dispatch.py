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
    """Whether a composite may be one kernel: nothing follows what it is made of, neither a derivative nor a tracer."""
    return (
        not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and all(x is None or type(x) in _PLAIN for x in tensors)
        and all(x is None or (x.layout is torch.strided and x.device.type in ("cpu", "cuda")) for x in tensors)
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


class quietly(warnings.catch_warnings):  # noqa: N801
    """PyTorch warns, once a process, that a kernel is overridden; here that is the purpose."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
