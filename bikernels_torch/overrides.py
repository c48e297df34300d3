"""Which of PyTorch's operators the mode replaces, and how the replacements are put in and taken out.

An override is a function `f(original, *arguments)` with the operator's own arguments; `original` is PyTorch's kernel,
to which it hands what it does not compute itself: integer, complex and float8 dtypes, and every call in which PyTorch
has to raise. Kernels are replaced below autograd, so gradients are PyTorch's formulas over the replaced operators;
sparse, quantized, nested and meta tensors and other devices have kernels of their own and never get here.

Adding an operator is adding a function in `operators/` and its name in that file's table.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch

from . import compiled, dispatch
from .operators import attention, linear, matmul, norm, pointwise, portable, recurrent, reduction, softmax

Override = Callable[..., Any]

KERNELS: dict[str, Override] = {
    **matmul.OVERRIDES,
    **softmax.OVERRIDES,
    **reduction.OVERRIDES,
    **norm.OVERRIDES,
    **linear.OUT_OVERRIDES,
}
"""Replaced for CPU and CUDA tensors, below autograd."""

CPU_KERNELS: dict[str, Override] = pointwise.OVERRIDES
"""Replaced for CPU tensors only: on a GPU every element is computed alike."""

CUDA_KERNELS: dict[str, Override] = norm.CUDA_OVERRIDES
"""Replaced for CUDA tensors only: on a CPU they are made of other operators."""

PORTABLE_KERNELS: dict[str, Override] = portable.OVERRIDES
"""Replaced for CPU and CUDA tensors beside all others, or in their place, where the mode is portable."""

COMPOSITES: dict[str, Override] = {
    **attention.OVERRIDES,
    **linear.OVERRIDES,
    **matmul.COMPOSITE_OVERRIDES,
    **norm.COMPOSITE_OVERRIDES,
    **recurrent.OVERRIDES,
}
"""Operators that PyTorch makes of others, replaced by another composition; autograd sees what they are made of."""


BELOW_AUTOGRAD: dict[str, Override] = {**linear.BELOW_AUTOGRAD, **norm.BELOW_AUTOGRAD}
"""Of these composites, kernels for CPU and CUDA tensors that autograd does not follow, such as those of inference mode.
The others take the composite. To those who look at operators from without they are composites as before."""

FAKES: dict[str, Callable[..., Any]] = norm.FAKES
"""The results' shapes and dtypes, for compilers, where those of a replacement are not those of PyTorch's kernel."""


def kernels(device_type: str) -> Mapping[str, Override]:
    """The operators that are replaced for tensors on this type of device, below autograd."""
    return _KERNELS.get(device_type, {})


_KERNELS = {"cpu": ChainMap(KERNELS, CPU_KERNELS), "cuda": ChainMap(KERNELS, CUDA_KERNELS)}


class Overrides:
    """The replacements and the switches that go with them, all in or all out. The mode's lock guards it."""

    def __init__(self) -> None:
        self._library: Any = None
        self._switches: list[Callable[[], None]] = []

    def install(self) -> None:
        """Put everything in; nothing happens if it is in."""
        if self._library is not None:
            return
        # Other threads may compute meanwhile: Autograd's kernels are there before those below them, and after them.
        autograd, library = torch.library.Library("aten", "IMPL"), torch.library.Library("aten", "IMPL")
        undo: list[Callable[[], None]] = [_forget_resolved_keys, autograd._destroy, library._destroy]
        try:
            with dispatch.quietly():
                for key in dispatch.backend_keys():
                    for name, override in kernels(key.lower()).items():
                        _replace(library, name, override, key)
                for name, override in COMPOSITES.items():
                    _replace_composite(autograd, library, name, override)
            _forget_resolved_keys()
            undo.append(attention.avoid_fused_layers())
            undo.append(matmul.contract_left_to_right())
            undo.append(compiled.install())
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        self._library, self._switches = library, undo

    def remove(self) -> None:
        """Take everything out; nothing happens if it is out."""
        self._library = None
        while self._switches:
            self._switches.pop()()


def _forget_resolved_keys() -> None:
    """Let PyTorch's dispatcher in Python, which compilers use, look anew for kernels that come and go."""
    for name in BELOW_AUTOGRAD:
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()


class PortableOverrides:
    """Those that a portable mode has besides: put in after the others, and taken out before them."""

    def __init__(self) -> None:
        self._library: Any = None

    @property
    def installed(self) -> bool:
        return self._library is not None

    def install(self) -> None:
        """Put them in; nothing happens if they are in."""
        if self.installed:
            return
        library = torch.library.Library("aten", "IMPL")
        try:
            with dispatch.quietly():
                for key in dispatch.backend_keys():
                    for name, override in PORTABLE_KERNELS.items():
                        _replace(library, name, override, key)
        except BaseException:
            library._destroy()
            raise
        self._library = library

    def remove(self) -> None:
        """Take them out; nothing happens if they are out."""
        if self.installed:
            library, self._library = self._library, None
            library._destroy()


PORTABLE = PortableOverrides()
"""The process's."""


def is_replaced(name: str, device_type: str) -> bool:
    """Whether an operator ("mm.out") is replaced for tensors on this type of device while the mode is as it is now."""
    return name in kernels(device_type) or (PORTABLE.installed and name in PORTABLE_KERNELS)


def _bound(override: Override, original: Callable[..., Any]) -> Callable[..., Any]:
    """The override, given PyTorch's kernel: as a method, which is called more quickly than a `functools.partial`."""
    return MethodType(override, original)


def _replace(library: Any, name: str, override: Override, key: str) -> None:
    operator = f"aten::{name}"
    # Of some operators PyTorch has no kernel, e.g. mm.dtype on a CPU (it says so), or a later PyTorch has it.
    if dispatch.has_kernel(operator, key):
        original = dispatch.kernel(operator, key)
        library.impl(name, _bound(override, original), key, allow_override=True)


def _replace_composite(autograd: Any, library: Any, name: str, override: Override) -> None:
    operator = f"aten::{name}"
    if not dispatch.has_kernel(operator, "CPU"):
        return
    original = dispatch.kernel(operator, "CPU")  # computed alike under every key
    composite = _bound(override, original)
    library.impl(name, composite, "CompositeImplicitAutograd")
    below = BELOW_AUTOGRAD.get(name)
    if below is not None:
        for key in dispatch.backend_keys():  # Autograd takes no composite by itself that has a kernel beside it
            autograd.impl(name, composite, f"Autograd{key}")
            library.impl(name, _bound(below, original), key)
