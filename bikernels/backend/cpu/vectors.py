"""Vector instructions for inner loops: short helpers over LLVM's builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

I32, I64 = ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()


def element_of(kind: ir.Type) -> ir.Type:
    """The type of a vector's elements; a scalar's own."""
    return kind.element if isinstance(kind, ir.VectorType) else kind


def like(kind: ir.Type, element: ir.Type) -> ir.Type:
    """A vector of `element` with as many as `kind` has; `element` itself where that is a scalar."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def constant(kind: ir.Type, number: int | float) -> ir.Constant:
    """The number as a scalar, or in every element of a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, number)] * kind.count)
    return ir.Constant(kind, number)


def place(builder: Any, address: Any, offset: int, kind: ir.Type) -> Any:
    """A pointer to `kind`, `offset` bytes behind the address."""
    return builder.inttoptr(builder.add(address, ir.Constant(I64, offset)), kind.as_pointer())


def load(builder: Any, address: Any, offset: int, kind: ir.Type, align: int = 4) -> Any:
    """Load a vector, or a scalar, that is aligned to its elements of `align` bytes or more."""
    return builder.load(place(builder, address, offset, kind), align=align)


def load_splat(builder: Any, address: Any, offset: int, kind: ir.VectorType) -> Any:
    """Load a scalar into every element of a vector."""
    vector = builder.insert_element(
        ir.Constant(kind, ir.Undefined), load(builder, address, offset, kind.element), ir.Constant(I32, 0)
    )
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count))


def store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Store a vector at an address aligned to its elements."""
    builder.store(value, place(builder, address, offset, value.type), align=4)


def prefetch(builder: Any, address: Any) -> None:
    """Fetch what will be read at the address; one that is not mapped does no harm."""
    place = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [place, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
    to_read, often, data = I32(0), I32(3), I32(1)
    builder.call(function, [builder.inttoptr(address, place), to_read, often, data])


def loop(builder: Any, count: Any, carried: list[Any], body: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Run `body` `count` times (0 is fine) on the carried values; their last values. All stay in registers."""
    before = builder.basic_block
    inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
    zero, one = ir.Constant(I64, 0), ir.Constant(I64, 1)
    builder.cbranch(builder.icmp_signed(">", count, zero), inside, after)
    builder.position_at_end(inside)
    index = builder.phi(I64)
    phis = [builder.phi(value.type) for value in carried]
    results = body(phis)
    following = builder.add(index, one)
    last = builder.basic_block
    for phi, start, result in zip([index, *phis], [zero, *carried], [following, *results], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(result, last)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    final = []
    for start, result in zip(carried, results, strict=True):
        phi = builder.phi(start.type)
        phi.add_incoming(start, before)
        phi.add_incoming(result, last)
        final.append(phi)
    return final


def for_range(
    builder: Any, start: Any, end: Any, step: int, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """As `loop`, for every `step`-th integer from start to end, which `body` is given before the carried values."""
    count = builder.sdiv(builder.add(builder.sub(end, start), I64(step - 1)), I64(step))  # negative: none

    def next_one(values: list[Any]) -> list[Any]:
        index, *rest = values
        return [builder.add(index, I64(step)), *body(index, rest)]

    return loop(builder, count, [start, *carried], next_one)[1:]


def when(builder: Any, condition: Any, values: list[Any], then: Callable[[], list[Any]]) -> list[Any]:
    """What `then` gives if the condition holds, else `values`."""
    return either(builder, condition, then, lambda: values)


def either(
    builder: Any, condition: Any, then: Callable[[], list[Any]], otherwise: Callable[[], list[Any]]
) -> list[Any]:
    """What `then` gives if the condition holds, else what `otherwise` does."""
    starts = [builder.append_basic_block(name) for name in ("then", "otherwise")]
    after = builder.append_basic_block("after")
    builder.cbranch(condition, *starts)
    ends, results = [], []
    for start, emit in zip(starts, (then, otherwise), strict=True):
        builder.position_at_end(start)
        results.append(emit())
        ends.append(builder.basic_block)
        builder.branch(after)
    builder.position_at_end(after)
    phis = []
    for values in zip(*results, strict=True):
        phi = builder.phi(values[0].type)
        for value, end in zip(values, ends, strict=True):
            phi.add_incoming(value, end)
        phis.append(phi)
    return phis


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector with the scalar in every element."""
    kind = ir.VectorType(value.type, count)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, count), [0] * count))


def memory(builder: Any, size: int) -> Any:
    """The address of so many bytes of the function's own stack, aligned to a cache line."""
    with builder.goto_entry_block():
        place = builder.alloca(ir.IntType(8), I32(size))
        place.align = 64
        return builder.ptrtoint(place, I64)


def is_x86(builder: Any) -> bool:
    """Whether instructions of x86 are emitted."""
    return str(builder.module.triple).startswith(("x86_64", "i686"))


def opaque(builder: Any, value: Any) -> Any:
    """The vector of floats itself, of which LLVM does not know that on x86: it would make horizontal additions."""
    if not is_x86(builder):
        return value
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], side_effect=False)


def maximum(builder: Any, x: Any, y: Any) -> Any:
    """The larger of signed integers."""
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def minimum(builder: Any, x: Any, y: Any) -> Any:
    """The smaller of signed integers."""
    return builder.select(builder.icmp_signed("<", x, y), x, y)


def power_of_two(builder: Any, exponent: Any, kind: ir.Type) -> Any:
    """2^exponent as float32 or float64, for exponents of normal numbers (integers as wide as `kind`)."""
    element = element_of(kind)
    bias, shift = (127, 23) if isinstance(element, ir.FloatType) else (1023, 52)
    biased = builder.add(exponent, constant(exponent.type, bias))
    return builder.bitcast(builder.shl(biased, constant(exponent.type, shift)), kind)
