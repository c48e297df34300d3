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

from .. import core

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

Not covered: logit, which in float32 gives other bits for strided tensors than for contiguous ones."""

SCALING = ("add", "sub")
"""These vary (in bfloat16 and float16) where alpha is not 1; rsub is made of sub."""

_EXACT_ON_INTEGERS = ("addr", "pow", *SCALING)
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


_WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
"""The dtype that holds a Python number as it is."""
_KINDS = (bool, int, float, complex)


def _kind(dtype: torch.dtype) -> int:
    """How many kinds of numbers lie below the dtype's own."""
    if dtype.is_complex or dtype.is_floating_point:
        return 2 + dtype.is_complex
    return int(dtype is not torch.bool)


def _as_tensor(number: Any, other: torch.Tensor) -> torch.Tensor:
    """The number in a tensor that, beside `other`, of at least one dimension, has no more say than the number."""
    if _KINDS.index(type(number)) > _kind(other.dtype):
        return torch.scalar_tensor(number, dtype=torch.result_type(other, number))
    return torch.scalar_tensor(number, dtype=_WIDEST[type(number)])


def taking_numbers(schema: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch hands a Python number in a tensor's place to an override as a number, which its kernel does not take."""
    places = [
        i for i, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor" and not argument.is_out
    ]

    def wrapped(original: Any, *arguments: Any, **keywords: Any) -> Any:
        tensor = None
        numbers = False
        for i in places:
            if isinstance(arguments[i], torch.Tensor):
                tensor = arguments[i]
            else:
                numbers = True
        if not numbers:
            return run(original, *arguments, **keywords)
        if tensor is None:
            return run(
                original, *(torch.scalar_tensor(x, dtype=torch.result_type(x, x)) for x in arguments), **keywords
            )
        if tensor.dim() > 0:
            converted = [x if isinstance(x, torch.Tensor) else _as_tensor(x, tensor) for x in arguments]
            return run(original, *converted, **keywords)
        # Two tensors of no dimensions would have the same say.
        tensor = tensor.view(1)
        converted = [tensor if isinstance(x, torch.Tensor) else _as_tensor(x, tensor) for x in arguments]
        out = keywords.get("out")
        if out is not None:
            keywords["out"] = torch.empty(1, dtype=out.dtype, device=out.device)
        result = run(original, *converted, **keywords).view(())
        if out is not None:
            return core.store(out, result)
        return arguments[0] if schema.is_mutable else result

    return wrapped


def _where_alpha_counts(run: Callable[..., Any]) -> Callable[..., Any]:
    def override(original: Any, *arguments: Any, alpha: Any = 1, **keywords: Any) -> Any:
        # PyTorch raises where a bool is subtracted.
        if alpha == 1 or any(isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in arguments):
            return original(*arguments, alpha=alpha, **keywords)
        return run(original, *arguments, alpha=alpha, **keywords)

    return override


def _override(operator: Any) -> Callable[..., Any]:
    schema = operator._schema
    name = schema.name.removeprefix("aten::").rstrip("_")
    exact = name in _EXACT_ON_INTEGERS
    inputs = [(i, argument.name) for i, argument in enumerate(schema.arguments) if not argument.is_out]
    in_place = bool(schema.arguments[0].alias_info and schema.arguments[0].alias_info.is_write)

    def run(original: Any, *arguments: Any, **keywords: Any) -> Any:
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

    if name in SCALING:
        run = _where_alpha_counts(run)
    return taking_numbers(schema, run)


def _has_cpu_kernel(operator: Any) -> bool:
    """Whether PyTorch computes this overload itself (TorchScript has some; others are made of another's kernel)."""
    has_kernel = torch._C._dispatch_has_kernel(operator._name)
    return has_kernel and torch._C._dispatch_has_kernel_for_dispatch_key(operator._name, "CPU")


def _table() -> dict[str, Callable[..., Any]]:
    table = {}
    for base in (*VARYING, *SCALING):
        for name in (base, f"{base}_"):
            packet = getattr(torch.ops.aten, name, None)
            for overload in packet.overloads() if packet is not None else ():
                operator = getattr(packet, overload)
                if _has_cpu_kernel(operator):
                    table[operator._name.removeprefix("aten::")] = _override(operator)
    return table


OVERRIDES = _table()
