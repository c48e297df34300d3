"""Pointwise functions whose bits, on a CPU, depend on where in a tensor an element lies.

PyTorch's CPU loops compute blocks of contiguous elements with vector instructions and what is left at the end of a
tensor, or of a thread's share, one by one. For the functions below the two ways give other bits, so the size of the
batch shows. The vector code is taken only where the tensors of an operator are contiguous. Here every operand is first
copied into every second element of a buffer, and PyTorch's own kernel, given that, computes every element one by one:
the bits of an element are those it has alone, in a tensor of one element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

VARYING = (
    "addr",
    "atan2",
    "atanh",
    "cosh",
    "elu",
    "elu_backward",
    "exp2",
    "gelu",
    "gelu_backward",
    "glu",
    "hypot",
    "logaddexp",
    "logaddexp2",
    "mish",
    "mish_backward",
    "pow",
    "rsqrt",
    "sigmoid",
    "silu",
    "silu_backward",
    "sinh",
    "softplus",
    "softplus_backward",
    "softshrink",
    "special_i0e",
)
"""Found by trying every pointwise operator of PyTorch 2.13 on x86 in every dtype: tests/torch/test_pointwise.py.

Not covered: add, sub and rsub with alpha other than 1, which vary in bfloat16 and float16 (PyTorch hands their Python
numbers to an override in a form in which its own kernel does not take them back), and logit, which in float32 gives
other bits for strided tensors than for contiguous ones."""

_EXACT_ON_INTEGERS = ("addr", "pow")
_PROMOTING = ("self", "other", "exponent")
"""The arguments of which even a number has a say in the dtype of the result."""


def _spread(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of x in every second element of a buffer; dimensions keep their order in memory."""
    strides = torch.empty_like(x, device="meta").stride()
    return torch.empty_strided(x.shape, [2 * stride for stride in strides], dtype=dtype).copy_(x)


def _common_dtype(tensors: list[torch.Tensor], promoting: list[Any], exact: bool) -> torch.dtype | None:
    """The dtype in which PyTorch computes; None where it is not a floating-point one."""
    dtype = tensors[0].dtype
    if not dtype.is_floating_point or any(x.dtype is not dtype for x in tensors):
        dtype = functools.reduce(torch.promote_types, (torch.result_type(a, b) for a in promoting for b in promoting))
    if dtype.is_complex or dtype.is_floating_point:
        return None if dtype.is_complex else dtype
    return None if exact else torch.get_default_dtype()


def _with_tensors(schema: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """PyTorch hands a Python number in a tensor's place to an override as a number, which its kernel does not take."""
    numbers = [
        i
        for i, x in enumerate(arguments)
        if str(schema.arguments[i].type) == "Tensor" and not isinstance(x, torch.Tensor)
    ]
    if not numbers:
        return arguments
    dtype = functools.reduce(torch.promote_types, (torch.result_type(a, b) for a in arguments for b in arguments))
    tensors = (torch.scalar_tensor(x, dtype=dtype) if i in numbers else x for i, x in enumerate(arguments))
    return tuple(tensors)


def _override(operator: Any) -> Callable[..., Any]:
    schema = operator._schema
    exact = schema.name.removeprefix("aten::").rstrip("_") in _EXACT_ON_INTEGERS
    inputs = [(i, argument.name) for i, argument in enumerate(schema.arguments) if not argument.is_out]
    in_place = bool(schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write)

    def run(original: Any, *arguments: Any, **keywords: Any) -> Any:
        arguments = _with_tensors(schema, arguments)
        values = [arguments[i] for i, _ in inputs if i < len(arguments)]
        tensors = [x for x in values if isinstance(x, torch.Tensor) and x.dim() > 0]
        if not tensors:
            return original(*arguments, **keywords)
        promoting = [
            x
            for x, (_, name) in zip(values, inputs, strict=False)
            if isinstance(x, torch.Tensor) or (name in _PROMOTING and isinstance(x, int | float))
        ]
        dtype = _common_dtype(tensors, promoting, exact)
        if dtype is None:
            return original(*arguments, **keywords)
        spread = [_spread(x, dtype) if isinstance(x, torch.Tensor) and x.dim() > 0 else x for x in arguments]
        if not in_place:
            return original(*spread, **keywords)
        target = arguments[0]
        if target.dtype is not dtype:  # PyTorch computes in the wider dtype and casts, or raises
            spread[0] = _spread(target, target.dtype)
        original(*spread, **keywords)
        return target.copy_(spread[0])

    return run


def _has_cpu_kernel(operator: Any) -> bool:
    """Whether PyTorch computes this overload itself (TorchScript has some; others are made of another's kernel)."""
    has_kernel = torch._C._dispatch_has_kernel(operator._name)
    return has_kernel and torch._C._dispatch_has_kernel_for_dispatch_key(operator._name, "CPU")


def _table() -> dict[str, Callable[..., Any]]:
    table = {}
    for base in VARYING:
        for name in (base, f"{base}_"):
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                operator = getattr(packet, overload)
                if _has_cpu_kernel(operator):
                    table[operator._name.removeprefix("aten::")] = _override(operator)
    return table


OVERRIDES = _table()
