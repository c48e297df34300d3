"""The vocabulary of the kernels: typed pointers, 16-bit floats as bits, arithmetic that no compiler may fuse.

Rules of this folder: a multiplication or addition of floats is written with the functions of `Operations`, never with
an operator, because Numba and the assembler contract a * b + c into one rounding where they like; device functions are
made with `device` below, so that a kernel compiles on a machine without a GPU too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cuda as _cuda
from numba import types as _types
from numba.cuda.compiler import compile_cuda
from numba.cuda.dispatcher import CUDADispatcher

from ...contract import ACCUMULATE, CANONICAL_NAN, INTEGER_DTYPES, ITEMSIZE

cuda: Any = _cuda
types: Any = _types
"""Numba without its annotations, which describe it as the Python that a kernel is not run as."""
libdevice, cgutils, intrinsic = cuda.libdevice, cuda.cgutils, cuda.extending.intrinsic

Function = Callable[..., Any]

WARP = 32
VECTOR_BYTES = 16
"""Of the widest access to memory."""
ALL_LANES = 0xFFFFFFFF

_OLDEST = (7, 5)
"""A compute capability that every compiler of CUDA 13 knows."""


class _DeviceFunction(CUDADispatcher):
    """A function that kernels call, typed once for each types of arguments.

    Numba's own asks the current GPU for its compute capability, on which nothing in a function depends.
    """

    def compile_device(self, args: Any, return_type: Any = None) -> Any:
        if args not in self.overloads:
            options = {"opt": 3, "fastmath": False}
            made = compile_cuda(self.py_func, return_type, args, forceinline=True, nvvm_options=options, cc=_OLDEST)
            self.overloads[args] = made
            made.target_context.insert_user_function(made.entry_point, made.fndesc, [made.library])
        return self.overloads[args]


def device(function: Function) -> Any:
    """Decorator of the functions that kernels are made of: LLVM inlines them wherever they are called.

    Numba's own inlining, `inline="always"`, would type them anew in every kernel, which takes most of a compilation.
    """
    return _DeviceFunction(function, {"device": True, "opt": True, "fastmath": False, "debug": False})


STORAGE = {
    "bfloat16": types.uint16,
    "float16": types.uint16,
    "float32": types.float32,
    "float64": types.float64,
    "bool": types.uint8,
} | {name: getattr(types, name) for name in INTEGER_DTYPES if name != "bool"}
"""The type under which a kernel sees a dtype's elements in memory."""


class Operations(NamedTuple):
    """Arithmetic in one accumulate dtype; every function rounds once, to nearest even, and keeps subnormals."""

    type: Any
    add: Function
    multiply: Function
    divide: Function
    square_root: Function
    fma: Function
    """fma(a, b, c) = a * b + c."""
    to_bits: Function
    from_bits: Function
    larger: Function
    """Of two numbers; a NaN is overlooked."""


OPERATIONS = {
    "float32": Operations(
        types.float32,
        libdevice.fadd_rn,
        libdevice.fmul_rn,
        libdevice.fdiv_rn,
        libdevice.fsqrt_rn,
        libdevice.fmaf_rn,
        libdevice.float_as_int,
        libdevice.int_as_float,
        libdevice.fmaxf,
    ),
    "float64": Operations(
        types.float64,
        libdevice.dadd_rn,
        libdevice.dmul_rn,
        libdevice.ddiv_rn,
        libdevice.dsqrt_rn,
        libdevice.fma_rn,
        libdevice.double_as_longlong,
        libdevice.longlong_as_double,
        libdevice.fmax,
    ),
}

# ------------------------------------------------------------------------------------------------------------ memory


@intrinsic
def pointer(typing_context: Any, address: Any, dtype: Any) -> Any:
    """Global memory at an address, as p[i] of a dtype; i counts elements and may be negative."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_data_type(signature.return_type.dtype)
        # By way of the global address space, so that loads are global and not generic ones.
        in_global = builder.inttoptr(arguments[0], ir.PointerType(element, addrspace=1))
        return builder.addrspacecast(in_global, ir.PointerType(element))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


def _atomic(operation: str) -> Any:
    @intrinsic
    def atomic(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw(operation, place, arguments[2], "monotonic")

        return array.dtype(array, types.int64, array.dtype), generate

    return atomic


atomic_add = _atomic("add")
"""atomic_add(p, i, value) on int64."""
atomic_max = _atomic("umax")
"""atomic_max(p, i, value) on uint64."""


@device
def offset(index: Any, shape: Any, strides: Any) -> Any:
    """Where element `index`, in C order, of an array lies, in elements from its first. One dimension: no division."""
    place = types.int64(0)
    for i in range(len(shape) - 1):
        d = len(shape) - 1 - i
        outer = index // shape[d]
        place += (index - outer * shape[d]) * strides[d]
        index = outer
    return place + index * strides[0]


# ------------------------------------------------------------------------------------------------------- inline PTX


def _values(builder: Any, kind: Any, value: Any) -> list[Any]:
    """The members of a tuple, or the one value."""
    if isinstance(kind, types.UniTuple):
        return [builder.extract_value(value, i) for i in range(kind.count)]
    return [value]


def instruction(text: str, constraints: list[str], result: Any, *arguments: Any, pure: bool = False) -> Any:
    """A device function that is PTX: $0, $1, … are the results, then the arguments. A tuple is so many operands.

    Unless it is `pure`, it is not moved, nor a branch put around what a whole warp does together.
    """

    def execute(typing_context: Any, *given: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            operands = [
                one for kind, value in zip(arguments, values, strict=True) for one in _values(builder, kind, value)
            ]
            is_tuple = isinstance(result, types.UniTuple)
            if is_tuple and result.count > 1:
                returned = ir.LiteralStructType([context.get_value_type(result.dtype)] * result.count)
            else:
                one = result.dtype if is_tuple else result
                returned = ir.VoidType() if result is types.none else context.get_value_type(one)
            kind = ir.FunctionType(returned, [one.type for one in operands])
            call = builder.call(ir.InlineAsm(kind, text, ",".join(constraints), side_effect=not pure), operands)
            if result is types.none:
                return context.get_dummy_value()
            if is_tuple:
                members = [builder.extract_value(call, i) for i in range(result.count)] if result.count > 1 else [call]
                return context.make_tuple(builder, result, members)
            return call

        return result(*arguments), generate

    # Numba asks for the signature and does not lower calls of functions that take *arguments.
    names = ["typing_context", *(f"operand_{i}" for i in range(len(arguments)))]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    execute.__signature__ = inspect.Signature([inspect.Parameter(name, positional) for name in names])  # type: ignore[attr-defined]
    return intrinsic(execute)


# ------------------------------------------------------------------------------------------------------- straight code
# What a thread keeps in registers is a tuple, and a loop over it is written out, whatever NVVM thinks of its length.

MEMBER = 0
"""In place of a size: a member, not a tuple of one."""


def _slices(builder: Any, kinds: Any, values: Any, sizes: tuple[int, ...], i: int, context: Any) -> list[Any]:
    """The parts that belong to i, of every tuple."""
    found = []
    for kind, value, size in zip(kinds, values, sizes, strict=True):
        if size == MEMBER:
            found.append(builder.extract_value(value, i))
        else:
            members = [builder.extract_value(value, size * i + j) for j in range(size)]
            found.append(context.make_tuple(builder, types.UniTuple(kind.dtype, size), members))
    return found


def _slice_types(kinds: Any, sizes: tuple[int, ...]) -> list[Any]:
    return [
        kind.dtype if size == MEMBER else types.UniTuple(kind.dtype, size)
        for kind, size in zip(kinds, sizes, strict=True)
    ]


def _times(tuples: Any, sizes: tuple[int, ...]) -> int:
    """How many parts the tuples have."""
    return int(tuples[0].count // max(sizes[0], 1))


def _straight(execute: Callable[..., Any], names: list[str]) -> Any:
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, positional) for name in ("typing_context", *names)]
    execute.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(execute)


def _resolved(typing_context: Any, function: Function, arguments: list[Any]) -> tuple[Any, Any]:
    """The type of a device function, and its signature for these arguments."""
    kind = typing_context.resolve_value_type(function)
    return kind, kind.get_call_type(typing_context, tuple(arguments), {})


def _called(context: Any, builder: Any, kind: Any, signature: Any, arguments: list[Any], given: list[Any]) -> Any:
    """The result of a device function."""
    cast = [
        context.cast(builder, value, source, target)
        for value, source, target in zip(arguments, given, signature.args, strict=True)
    ]
    implementation = context.get_function(kind, signature)
    context.add_linking_libs(getattr(implementation, "libs", ()))
    return implementation(builder, cast)


@functools.cache
def mapped(function: Function, *sizes: int, count: int | None = None) -> Function:
    """A device function, mapped: of `more` and tuples, the results of `function` for every part of these.

    The i-th result is that of function(more, i, part, ...), a number or a tuple; they become one tuple. A part is the
    next `size` members of a tuple, or, of size MEMBER, the next one itself. Without tuples: `count` results.
    """

    def execute(typing_context: Any, more: Any, *tuples: Any) -> Any:
        given = [more, types.int32, *_slice_types(tuples, sizes)]
        kind, inner = _resolved(typing_context, function, given)
        times = count if count is not None else _times(tuples, sizes)
        result = inner.return_type
        is_tuple = isinstance(result, types.UniTuple)
        width, member = (result.count, result.dtype) if is_tuple else (1, result)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            members = []
            for i in range(times):
                parts = _slices(builder, tuples, arguments[1:], sizes, i, context)
                number = context.get_constant(types.int32, i)
                value = _called(context, builder, kind, inner, [arguments[0], number, *parts], given)
                members += [builder.extract_value(value, j) for j in range(width)] if is_tuple else [value]
            return context.make_tuple(builder, signature.return_type, members)

        return types.UniTuple(member, times * width)(more, *tuples), generate

    return _straight(execute, ["more", *(f"tuple_{i}" for i in range(len(sizes)))])


@functools.cache
def folded(function: Function, *sizes: int) -> Function:
    """A device function, folded: of a state, `more` and tuples, the state after every part of these.

    With the i-th ones it becomes function(state, more, i, part, ...). Parts: see `mapped`.
    """

    def execute(typing_context: Any, state: Any, more: Any, *tuples: Any) -> Any:
        given = [state, more, types.int32, *_slice_types(tuples, sizes)]
        kind, inner = _resolved(typing_context, function, given)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = arguments[0]
            for i in range(_times(tuples, sizes)):
                parts = _slices(builder, tuples, arguments[2:], sizes, i, context)
                number = context.get_constant(types.int32, i)
                value = _called(context, builder, kind, inner, [value, arguments[1], number, *parts], given)
                value = context.cast(builder, value, inner.return_type, state)
            return value

        return state(state, more, *tuples), generate

    return _straight(execute, ["state", "more", *(f"tuple_{i}" for i in range(len(sizes)))])


@functools.cache
def scanned(function: Function, *sizes: int) -> Function:
    """A device function, folded and mapped: of a state, `more` and tuples, the last state and the results.

    With the i-th parts `function` gives the next state and a tuple of results; all of these become one tuple.
    """

    def execute(typing_context: Any, state: Any, more: Any, *tuples: Any) -> Any:
        given = [state, more, types.int32, *_slice_types(tuples, sizes)]
        kind, inner = _resolved(typing_context, function, given)
        times, (of_state, of_results) = _times(tuples, sizes), inner.return_type
        results = types.UniTuple(of_results.dtype, of_results.count * times)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value, members = arguments[0], []
            for i in range(times):
                parts = _slices(builder, tuples, arguments[2:], sizes, i, context)
                number = context.get_constant(types.int32, i)
                both = _called(context, builder, kind, inner, [value, arguments[1], number, *parts], given)
                value = context.cast(builder, builder.extract_value(both, 0), of_state, state)
                found = builder.extract_value(both, 1)
                members += [builder.extract_value(found, j) for j in range(of_results.count)]
            return context.make_tuple(
                builder, signature.return_type, [value, context.make_tuple(builder, results, members)]
            )

        return types.Tuple((state, results))(state, more, *tuples), generate

    return _straight(execute, ["state", "more", *(f"tuple_{i}" for i in range(len(sizes)))])


# ------------------------------------------------------------------------------------------------------- conversions


_double_of_words = instruction(
    "mov.b64 $0, {$1, $2};", ["=d", "r", "r"], types.float64, *(types.uint32, types.uint32), pure=True
)
_words_of_double = instruction(
    "mov.b64 {$0, $1}, $2;", ["=r", "=r", "d"], types.UniTuple(types.uint32, 2), types.float64, pure=True
)
_float_of_half = instruction("cvt.f32.f16 $0, $1;", ["=f", "h"], types.float32, types.uint16, pure=True)
_half_of_float = instruction("cvt.rn.f16.f32 $0, $1;", ["=h", "f"], types.uint16, types.float32, pure=True)


@device
def _float_of_bfloat(bits: Any) -> Any:
    return libdevice.int_as_float(types.int32(types.uint32(bits) << types.uint32(16)))


@device
def _bfloat_of_float(value: Any) -> Any:
    """To nearest even; not for NaN."""
    bits = types.uint32(libdevice.float_as_int(value))
    odd = (bits >> types.uint32(16)) & types.uint32(1)
    return types.uint16((bits + types.uint32(0x7FFF) + odd) >> types.uint32(16))


@functools.cache
def reader(dtype: str, result: str) -> Function:
    """A device function read(p, i): element i of a `dtype` array, cast to `result`, as the accumulate dtype of that."""
    real = OPERATIONS[ACCUMULATE[result]].type

    if dtype in ("bfloat16", "float16"):
        widen = _float_of_bfloat if dtype == "bfloat16" else _float_of_half

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(widen(p[i]))

    elif dtype == "bool":

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(p[i] != 0)

    else:

        @device
        def exact(p: Any, i: Any) -> Any:
            return real(p[i])

    if result == dtype or result not in ("bfloat16", "float16"):
        return exact

    narrow, widen_again = (
        (_bfloat_of_float, _float_of_bfloat) if result == "bfloat16" else (_half_of_float, _float_of_half)
    )

    @device
    def rounded(p: Any, i: Any) -> Any:
        value = exact(p, i)
        if value == value:
            value = widen_again(narrow(value))
        return value

    return rounded


@functools.cache
def writer(dtype: str, accumulate: str) -> Function:
    """A device function write(p, i, value): round a value of the accumulate dtype to `dtype`; NaN is canonical."""
    nan = CANONICAL_NAN[dtype]

    if dtype in ("bfloat16", "float16"):
        narrow = _bfloat_of_float if dtype == "bfloat16" else _half_of_float

        @device
        def write(p: Any, i: Any, value: Any) -> None:
            p[i] = narrow(value) if value == value else types.uint16(nan)

    else:
        target = OPERATIONS[dtype]
        real, from_bits = target.type, target.from_bits
        bits_type = types.int32 if dtype == "float32" else types.int64

        @device
        def write(p: Any, i: Any, value: Any) -> None:
            p[i] = real(value) if value == value else from_bits(bits_type(nan))

    return write


# ---------------------------------------------------------------------------------------------------- shared memory


@intrinsic
def shared_address(typing_context: Any, array: Any) -> Any:
    """Where an array of shared memory lies, as shared memory is addressed: 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=arguments[0]).data
        in_shared = builder.addrspacecast(data, ir.PointerType(data.type.pointee, addrspace=3))
        return builder.ptrtoint(in_shared, ir.IntType(32))

    return types.uint32(array), generate


copy_async = instruction(
    "cp.async.cg.shared.global [$0], [$1], 16;", ["r", "l", "~{memory}"], types.none, types.uint32, types.int64
)
"""copy_async(shared, address): queue 16 bytes to shared memory."""
copy_part_async = instruction(
    "cp.async.cg.shared.global [$0], [$1], 16, $2;",
    ["r", "l", "r", "~{memory}"],
    types.none,
    *(types.uint32, types.int64, types.uint32),
)
"""copy_part_async(shared, address, bytes): the same of the first `bytes` only; the others become +0."""
commit_copies = instruction("cp.async.commit_group;", ["~{memory}"], types.none)
"""commit_copies(): a thread's copies since the last one are a group."""


@functools.cache
def wait_for_copies(pending: int) -> Function:
    """A device function: wait until at most `pending` of this thread's groups of copies are under way."""
    return instruction(f"cp.async.wait_group {pending};", ["~{memory}"], types.none)


load_vector = instruction(
    "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
    ["=f", "=f", "=f", "=f", "r", "~{memory}"],
    types.UniTuple(types.float32, 4),
    types.uint32,
)
"""load_vector(address): 16 bytes of shared memory."""
store_vector = instruction(
    "st.global.v4.b32 [$0], {$1, $2, $3, $4};",
    ["l", "r", "r", "r", "r", "~{memory}"],
    types.none,
    *(types.int64, types.uint32, types.uint32, types.uint32, types.uint32),
)
"""store_vector(address, w0, w1, w2, w3): 16 bytes to global memory."""


load_words = instruction(
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
    ["=r", "=r", "=r", "=r", "r"],
    types.UniTuple(types.uint32, 4),
    types.uint32,
)
"""load_words(address): 16 bytes of shared memory, as words. Others may be on their way before these are used."""
load_global_words = instruction(
    "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
    " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
    ["=&r", "=&r", "=&r", "=&r", "l", "r"],
    types.UniTuple(types.uint32, 4),
    *(types.int64, types.uint32),
)
"""load_global_words(address, exists): 16 bytes of global memory, or zeros. Others may be on their way, as above."""


@functools.cache
def load_global(dtype: str) -> Function:
    """A device function load(address, exists): an element of float32 or float64 in global memory, or 0."""
    bits, register = _register(dtype)
    zero = f"mov.f{8 * ITEMSIZE[dtype]} $0, 0{register}{0:0{2 * ITEMSIZE[dtype]}};"
    text = f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; {zero} @p ld.global.{bits} $0, [$1]; }}"
    return instruction(text, [f"=&{register}", "l", "r"], STORAGE[dtype], types.int64, types.uint32)


@functools.cache
def unpack_words(dtype: str) -> Function:
    """A device function unpack(words, values): to an array, the elements of four words in their accumulate dtype."""
    if dtype == "float64":

        @device
        def unpack(words: Any, values: Any) -> None:
            values[0] = _double_of_words(words[0], words[1])
            values[1] = _double_of_words(words[2], words[3])

    elif dtype == "float32":

        @device
        def unpack(words: Any, values: Any) -> None:
            for i in range(4):
                values[i] = libdevice.int_as_float(types.int32(words[i]))

    else:
        widen = _float_of_bfloat if dtype == "bfloat16" else _float_of_half

        @device
        def unpack(words: Any, values: Any) -> None:
            for i in range(4):
                values[2 * i] = widen(types.uint16(words[i]))
                values[2 * i + 1] = widen(types.uint16(words[i] >> types.uint32(16)))

    return unpack


@functools.cache
def pack_words(dtype: str) -> Function:
    """A device function pack(values, first): the elements values[first], ... of an array, which are of the accumulate
    dtype of `dtype`, as four words; NaN is canonical.
    """
    nan = CANONICAL_NAN[dtype]
    if dtype == "float64":

        @device
        def word(value: Any) -> Any:
            return _words_of_double(value if value == value else libdevice.longlong_as_double(nan))

        @device
        def pack_all(values: Any, first: Any) -> Any:
            return word(values[first]) + word(values[first + 1])

    elif dtype == "float32":

        @device
        def word(value: Any) -> Any:
            return types.uint32(libdevice.float_as_int(value)) if value == value else types.uint32(nan)

        @device
        def pack_all(values: Any, first: Any) -> Any:
            return word(values[first]), word(values[first + 1]), word(values[first + 2]), word(values[first + 3])

    else:
        two = pack(dtype)

        @device
        def pack_all(values: Any, first: Any) -> Any:
            return (
                two(values[first], values[first + 1]),
                two(values[first + 2], values[first + 3]),
                two(values[first + 4], values[first + 5]),
                two(values[first + 6], values[first + 7]),
            )

    return pack_all


@functools.cache
def pack(dtype: str) -> Function:
    """A device function of two float32: both as 16-bit floats in a word, the first low; NaN is canonical."""
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    text = f"cvt.rn.{kind}.f32 $0, $2, $1;"
    return instruction(text, ["=r", "f", "f"], types.uint32, types.float32, types.float32, pure=True)


def _register(dtype: str) -> tuple[str, str]:
    """The type under which PTX moves an element, and the constraint of its register."""
    size = ITEMSIZE[dtype]
    return f"b{8 * size}", {"float32": "f", "float64": "d"}.get(dtype, {2: "h", 4: "r", 8: "l"}[size])


@functools.cache
def shared_access(dtype: str) -> tuple[Function, Function]:
    """Device functions load(address) and store(address, element) of an element in shared memory."""
    storage, (bits, register) = STORAGE[dtype], _register(dtype)
    load = instruction(f"ld.shared.{bits} $0, [$1];", [f"={register}", "r", "~{memory}"], storage, types.uint32)
    store = instruction(f"st.shared.{bits} [$0], $1;", ["r", register, "~{memory}"], types.none, types.uint32, storage)
    return load, store


add_shared = instruction(
    "red.shared.add.u32 [$0], $1;", ["r", "r", "~{memory}"], types.none, types.uint32, types.uint32
)
"""add_shared(address, value): to a 32-bit count in shared memory, by any number of threads."""

# ----------------------------------------------------------------------------------- clusters (compute capability 9.0)

FIRST_WITH_CLUSTERS = (9, 0)
MOST_CTAS = 8
"""Thread blocks of a cluster, on every GPU that has them."""

cluster_number = instruction("mov.u32 $0, %clusterid.x;", ["=r"], types.int32, pure=True)
"""cluster_number(): which cluster of the grid, along x, this is."""
rank_in_cluster = instruction("mov.u32 $0, %cluster_ctarank;", ["=r"], types.int32, pure=True)
"""rank_in_cluster(): which thread block of its cluster this is."""
begin_in_cluster = instruction("barrier.cluster.arrive.relaxed;", [], types.none)
"""begin_in_cluster(): this thread has begun, which is all that those know whose wait this ends."""
arrive_in_cluster = instruction("barrier.cluster.arrive.release;", ["~{memory}"], types.none)
"""arrive_in_cluster(): what this thread has written can be read by those whose wait this ends."""
wait_in_cluster = instruction("barrier.cluster.wait.acquire;", ["~{memory}"], types.none)
"""wait_in_cluster(): until all threads of the cluster have arrived."""


@functools.cache
def store_in_cluster(dtype: str) -> Function:
    """A device function store(address, rank, element): to this shared address in a thread block of the cluster."""
    bits, register = _register(dtype)
    text = f"{{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.{bits} [a], $2; }}"
    return instruction(text, ["r", "r", register, "~{memory}"], types.none, types.uint32, types.uint32, STORAGE[dtype])


@functools.cache
def begin_sending(first_bytes: int, second_bytes: int) -> Function:
    """A device function begin(thread, barriers): for all threads of a cluster, before `wait_in_cluster`; two barriers
    at that shared address then wait until so many bytes have been sent to their thread block.
    """
    text = (
        "{ .reg .pred is_first; setp.eq.u32 is_first, $0, 0; "
        "@is_first mbarrier.init.shared::cta.b64 [$1], 1; @is_first mbarrier.init.shared::cta.b64 [$1+8], 1; "
        "@is_first fence.mbarrier_init.release.cluster; "
        f"@is_first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {first_bytes}; "
        f"@is_first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1+8], {second_bytes}; "
        "barrier.cluster.arrive.relaxed; }"
    )
    return instruction(text, ["r", "r", "~{memory}"], types.none, types.uint32, types.uint32)


@functools.cache
def send_in_cluster(dtype: str) -> Function:
    """A device function send(address, rank, element, barrier): to this shared address in a thread block of the cluster,
    whose barrier there counts the bytes.
    """
    _, register = _register(dtype)
    text = (
        "{ .reg .b32 there, counter; mapa.shared::cluster.u32 there, $0, $1; mapa.shared::cluster.u32 counter, $3, $1; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], $2, [counter]; }"
    )
    operands = types.uint32, types.uint32, STORAGE[dtype], types.uint32
    return instruction(text, ["r", "r", register, "r", "~{memory}"], types.none, *operands)


wait_for_bytes = instruction(
    "{ .reg .pred is_done; WAIT_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 is_done, [$0], 0; "
    "@!is_done bra WAIT_${:uid}; }",
    ["r", "~{memory}"],
    types.none,
    types.uint32,
)
"""wait_for_bytes(barrier): until they have been sent, to a barrier that is used once."""


launch_dependents = instruction("griddepcontrol.launch_dependents;", ["~{memory}"], types.none)
"""launch_dependents(): let the next kernel of the stream be launched, if it overlaps."""
wait_for_predecessors = instruction("griddepcontrol.wait;", ["~{memory}"], types.none)
"""wait_for_predecessors(): until the kernels in front have ended and what they wrote is visible."""
prefetch_line = instruction("prefetch.global.L2 [$0];", ["l", "~{memory}"], types.none, types.int64)
"""prefetch_line(address): have the L2 fetch what lies there; it may be done before that wait."""


# ------------------------------------------------------------------------------------------------------------- maxima


@functools.cache
def larger(accumulate: str) -> Function:
    """A device function of a and b: the larger; NaN if either is. Compute capability 8.0 on."""
    if accumulate == "float32":
        return instruction(
            "max.NaN.f32 $0, $1, $2;", ["=f", "f", "f"], types.float32, *(types.float32, types.float32), pure=True
        )

    @device
    def larger_of_two(a: Any, b: Any) -> Any:
        return a if a > b or a != a else b

    return larger_of_two


@functools.cache
def larger_pair(dtype: str) -> Function:
    """A device function of two words: `larger` of their 16-bit floats, each. Compute capability 8.0 on."""
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype]
    text = f"max.NaN.{kind} $0, $1, $2;"
    return instruction(text, ["=r", "r", "r"], types.uint32, *(types.uint32, types.uint32), pure=True)


# ------------------------------------------------------------------------------------------------------------ host


def int64s(count: int) -> Any:
    """The type of a tuple of `count` int64, for signatures."""
    return types.UniTuple(types.int64, count)


def as_dimensions(*operands: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A shape and strides over it, with at least one dimension."""
    shape, *strides = operands
    return (shape or (1,), *(one or (0,) for one in strides))
