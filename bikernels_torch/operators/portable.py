"""What `set_batch_invariant_mode(portable=True)` adds: pointwise functions whose bits do not depend on the device.

Transcendental functions, their gradients and the square root, which a CPU's library does not round correctly, are the
core's (section 10 of docs/contract.md). Of arithmetic PyTorch's
own kernels stay where each of them rounds once. Where they do not, the operation is taken apart in the accumulate
dtype, every step rounded to nearest, and the result is rounded once to its dtype:

- sums with an alpha, `addcmul`, `addcdiv`, `lerp`: a GPU's code contracts a product and a sum;
- a number, or a tensor of no dimensions, beside bfloat16 or float16: a CPU rounds it to that dtype, a GPU does not;
- a division by a number: a GPU multiplies by the reciprocal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import bikernels

from .. import core
from .pointwise import taking_numbers

aten = torch.ops.aten

Fill = Callable[[torch.Tensor], None]
"""Writes the result to the tensor that it is given, of the result's shape and dtype."""


# ------------------------------------------------------------------------------------------------- dtypes and results


def _floating(*values: Any) -> torch.dtype | None:
    """The dtype in which PyTorch computes these tensors and numbers; None unless the core has it."""
    dtype: torch.dtype = functools.reduce(
        torch.promote_types, (torch.result_type(a, b) for a in values for b in values)
    )
    if not dtype.is_floating_point and not dtype.is_complex:
        dtype = torch.get_default_dtype()
    return dtype if dtype in core.FLOATS else None


def _like(dtype: torch.dtype, *operands: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the shape and the strides that PyTorch gives a pointwise result."""
    first = operands[0]
    if all(x.shape == first.shape and x.stride() == first.stride() for x in operands[1:]):
        return torch.empty_like(first, dtype=dtype)
    described = [torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device="meta") for x in operands]
    result = functools.reduce(aten.add.Tensor, described) if len(described) == 2 else aten.addcmul(*described)
    return torch.empty_strided(result.shape, result.stride(), dtype=dtype, device=first.device)


def _written(out: torch.Tensor, dtype: torch.dtype, operands: tuple[torch.Tensor, ...], fill: Fill) -> torch.Tensor:
    """The result in `out`, the caller's, cast to its dtype."""
    shape = tuple(torch.broadcast_shapes(*(x.shape for x in operands)))
    if out.dtype is dtype and out.shape == shape:
        return core.write(out, shape, operands, fill)
    result = _like(dtype, *operands)
    fill(result)
    resized = out.shape != shape
    core.store(out, result.to(out.dtype))
    if resized and out.stride() != result.stride():
        out.as_strided_(result.shape, result.stride()).copy_(result)
    return out


Plan = Callable[..., tuple[torch.dtype, tuple[torch.Tensor, ...], Fill] | None]
"""plan(*arguments): the result's dtype, the tensors that give it its shape, and its computation; None for a call that
is PyTorch's."""


def _forms(plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The overrides of an operator, of its in-place form, and of its form with `out` or `grad_input`."""

    def functional(original: Any, *arguments: Any, **keywords: Any) -> Any:
        planned = plan(*arguments, **keywords)
        if planned is None:
            return original(*arguments, **keywords)
        dtype, operands, fill = planned
        result = _like(dtype, *operands)
        fill(result)
        return result

    def in_place(original: Any, target: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        planned = plan(target, *arguments, **keywords)
        if planned is None:
            return original(target, *arguments, **keywords)
        dtype, operands, fill = planned
        shape = tuple(torch.broadcast_shapes(*(x.shape for x in operands)))
        if (
            shape != tuple(target.shape)
            or not torch.can_cast(dtype, target.dtype)
            or core.view(target).description.overlaps_itself()
        ):
            return original(target, *arguments, **keywords)  # which raises
        result = _like(dtype, *operands)
        fill(result)
        return target.copy_(result)

    def with_out(original: Any, *arguments: Any, **keywords: Any) -> Any:
        name = "out" if "out" in keywords else "grad_input"
        out = keywords.pop(name)
        planned = plan(*arguments, **keywords)
        if (
            planned is None
            or out.device != planned[1][0].device
            or not core.is_readable(out)
            or not torch.can_cast(planned[0], out.dtype)
        ):
            return original(*arguments, **keywords, **{name: out})
        return _written(out, *planned)

    return functional, in_place, with_out


def _on_one_device(*operands: Any) -> bool:
    return all(isinstance(x, torch.Tensor) and x.device == operands[0].device for x in operands)


# --------------------------------------------------------------------------------------------- functions of the core


def _of_one(operation: Callable[..., Any], *names: str) -> Plan:
    """A function of one tensor, and of options by their names in the core, in PyTorch's order."""

    def plan(x: torch.Tensor, *values: Any, **options: Any) -> Any:
        dtype = _floating(x)
        if dtype is None:
            return None
        options |= dict(zip(names, values, strict=False))
        return dtype, (x,), lambda out: core.elementwise(operation, out, x, **options)

    return plan


def _of_gradient(operation: Callable[..., Any], *names: str) -> Plan:
    """A backward form, of the gradient and one other tensor."""

    def plan(grad: torch.Tensor, x: torch.Tensor, *values: Any, **options: Any) -> Any:
        if not _on_one_device(grad, x) or not (grad.dtype in core.FLOATS and x.dtype in core.FLOATS):
            return None
        options |= dict(zip(names, values, strict=False))
        dtype = torch.promote_types(grad.dtype, x.dtype)
        return dtype, (grad, x), lambda out: core.elementwise(operation, out, grad, x, **options)

    return plan


def _power(x: Any, y: Any) -> Any:
    tensors = [one for one in (x, y) if isinstance(one, torch.Tensor)]
    if not all(one.dtype in core.FLOATS or core.is_readable(one) for one in tensors):
        return None
    dtype = torch.result_type(x, y)
    if dtype not in core.FLOATS:
        return None
    device = next((one.device for one in tensors if one.dim() > 0), tensors[0].device)
    if not isinstance(y, torch.Tensor):
        return dtype, (x,), functools.partial(_power_of_number, x, float(y))
    base = x.to(device) if isinstance(x, torch.Tensor) and x.dim() == 0 else x
    base = base if isinstance(base, torch.Tensor) else torch.full((), x, dtype=dtype, device=device)
    exponent = y.to(device) if y.dim() == 0 else y
    if not _on_one_device(base, exponent):
        return None
    operands = (base, exponent) if base.dim() or not exponent.dim() else (exponent,)
    return dtype, operands, lambda out: core.elementwise(bikernels.pow, out, base, exponent)


def _power_of_number(x: torch.Tensor, y: float, out: torch.Tensor) -> None:
    """x to the power y; those that are one correctly rounded operation, or two, are that."""
    if y == 0.5:
        core.elementwise(bikernels.sqrt, out, x)
    elif y == -1:
        aten.reciprocal.out(x.to(out.dtype), out=out)
    elif y == -0.5:
        core.elementwise(bikernels.rsqrt, out, x)
    else:
        core.elementwise(bikernels.pow, out, x, y)


# --------------------------------------------------------------------------------------------------------- arithmetic


def _parts(dtype: torch.dtype, device: torch.device, *values: Any) -> list[torch.Tensor]:
    """The operands in the accumulate dtype; a tensor is cast to the result's dtype first, a number is not."""
    accumulate = core.accumulate_dtype(dtype)
    return [
        x.to(device=device, dtype=dtype).to(accumulate)
        if isinstance(x, torch.Tensor)
        else torch.full((), x, dtype=accumulate, device=device)
        for x in values
    ]


def _taken_apart(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """add, sub, mul and div where PyTorch's kernels differ between devices; elsewhere they are as they were."""

    def compute(original: Any, x: Any, y: Any, alpha: Any) -> torch.Tensor | None:
        values = (x, y)
        tensors = [one for one in values if isinstance(one, torch.Tensor)]
        exact = all(isinstance(one, torch.Tensor) and one.dim() > 0 for one in values)
        if (alpha == 1 and exact) or not tensors or any(one.dtype is torch.bool for one in tensors):
            return None
        if isinstance(alpha, complex) or any(isinstance(one, complex) for one in values):
            return None
        dtype = torch.result_type(x, y)
        if name == "div" and not dtype.is_floating_point and not dtype.is_complex:
            dtype = torch.get_default_dtype()
        narrow = dtype in (torch.bfloat16, torch.float16)
        if dtype not in core.FLOATS or not (alpha != 1 or narrow or name == "div"):
            return None
        device = next((one.device for one in tensors if one.dim() > 0), tensors[0].device)
        if not all(one.device == device or one.dim() == 0 for one in tensors):
            return None
        a, b = _parts(dtype, device, *values)
        if alpha != 1:
            b = torch.mul(b, *_parts(dtype, device, alpha))
        return original(a, b).to(dtype)

    plain = getattr(aten, name).Tensor
    schemas = plain._schema, getattr(aten, f"{name}_").Tensor._schema, getattr(aten, name).out._schema
    functional_as_given, in_place_as_given, with_out_as_given = (taking_numbers(one, _as_given) for one in schemas)

    def functional(original: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
        result = compute(original, x, y, alpha)
        return functional_as_given(original, x, y, **_given(alpha)) if result is None else result

    def in_place(original: Any, x: torch.Tensor, y: Any, *, alpha: Any = 1) -> Any:
        result = compute(plain, x, y, alpha)
        if result is None or result.shape != x.shape or not torch.can_cast(result.dtype, x.dtype):
            return in_place_as_given(original, x, y, **_given(alpha))
        return x.copy_(result)

    def with_out(original: Any, x: Any, y: Any, *, alpha: Any = 1, out: torch.Tensor) -> Any:
        result = compute(plain, x, y, alpha)
        if result is None or result.device != out.device or not torch.can_cast(result.dtype, out.dtype):
            return with_out_as_given(original, x, y, **_given(alpha), out=out)
        return core.store(out, result.to(out.dtype))

    return functional, in_place, with_out


def _as_given(original: Any, *arguments: Any, **keywords: Any) -> Any:
    return original(*arguments, **keywords)


def _given(alpha: Any) -> dict[str, Any]:
    return {} if alpha == 1 else {"alpha": alpha}


def _fused(formula: Callable[..., torch.Tensor]) -> Plan:
    """An operator of three operands, by a formula of accumulate-dtype tensors and `value`."""

    def plan(*values: Any, value: Any = 1) -> Any:
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        if any(x.dtype not in core.FLOATS for x in tensors) or isinstance(value, complex):
            return None
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
        device = next((x.device for x in tensors if x.dim() > 0), tensors[0].device)
        if not all(x.device == device or x.dim() == 0 for x in tensors):
            return None

        def fill(out: torch.Tensor) -> None:
            parts = _parts(dtype, device, *values)
            out.copy_(formula(*parts) if value == 1 else formula(*parts, *_parts(dtype, device, value)))

        return dtype, tuple(x.to(device) for x in tensors), fill

    return plan


def _addcmul(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
    return x + (a if value is None else a * value) * b


def _addcdiv(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, value: torch.Tensor | None = None) -> torch.Tensor:
    return x + (a if value is None else a * value) / b


def _relu(x: torch.Tensor) -> Any:
    """A zero is +0: PyTorch's GPU makes it of -0, its CPU does not."""
    if x.dtype not in core.FLOATS:
        return None
    return x.dtype, (x,), lambda out: out.copy_(torch.where(x <= 0, torch.zeros((), dtype=x.dtype, device=x.device), x))


def _lerp(x: torch.Tensor, end: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    step = end - x
    one = torch.ones_like(weight)
    return torch.where(weight.abs() < one / 2, x + weight * step, end - step * (one - weight))


# ------------------------------------------------------------------------------------------------------- the operators


def _table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    names = (
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "erf",
        "sqrt",
        "rsqrt",
        "sigmoid",
        "tanh",
        "silu",
        "sin",
        "cos",
        "gelu",
    )
    of_one = {name: _of_one(getattr(bikernels, name)) for name in names}
    of_one["softplus"] = _of_one(bikernels.softplus, "beta", "threshold")
    for name, plan in of_one.items():
        table[name], table[f"{name}_"], table[f"{name}.out"] = _forms(plan)
    del table["softplus_"]  # there is none
    for name in ("sigmoid", "tanh", "silu", "gelu", "softplus"):
        more = ("beta", "threshold") if name == "softplus" else ()
        plan = _of_gradient(getattr(bikernels, f"{name}_backward"), *more)
        table[f"{name}_backward"], _, table[f"{name}_backward.grad_input"] = _forms(plan)

    table["relu"], table["relu_"], table["relu.out"] = _forms(_relu)

    functional, in_place, with_out = _forms(_power)
    for overload in ("Tensor_Tensor", "Tensor_Scalar", "Scalar"):
        table[f"pow.{overload}"] = functional
        table[f"pow.{overload}_out"] = with_out
    table["pow_.Tensor"] = table["pow_.Scalar"] = in_place

    for name in ("add", "sub", "mul", "div"):
        table[f"{name}.Tensor"], table[f"{name}_.Tensor"], table[f"{name}.out"] = _taken_apart(name)
    for name, formula in (("addcmul", _addcmul), ("addcdiv", _addcdiv)):
        table[name], table[f"{name}_"], table[f"{name}.out"] = _forms(_fused(formula))
    functional, in_place, with_out = _forms(_fused(_lerp))
    for overload in ("Scalar", "Tensor"):
        table[f"lerp.{overload}"], table[f"lerp_.{overload}"] = functional, in_place
        table[f"lerp.{overload}_out"] = with_out
    return table


OVERRIDES = _table()
