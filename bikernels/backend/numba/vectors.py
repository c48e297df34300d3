"""A thread's elements of a row (`rows.py`): as words of memory in vectors, and as float32, all in registers.

16-bit elements are two in a word. Functions of several are straight code over tuples (`mapped` and `folded` in
`device.py`).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, CANONICAL_NAN, ITEMSIZE, SUM_LANES
from .device import MEMBER, OPERATIONS, Function, device, folded, instruction, mapped, pack, types

DTYPES = ("bfloat16", "float16", "float32")
"""Those of the elements; they accumulate in float32."""
ACCUMULATED = ACCUMULATE[DTYPES[0]]
assert {ACCUMULATE[dtype] for dtype in DTYPES} == {ACCUMULATED}


def _access(dtype: str, width: int) -> tuple[int, str]:
    """The words of a vector and the type of an access to it."""
    words = width * ITEMSIZE[dtype] // 4
    return words, {1: "b32", 2: "v2.b32", 4: "v4.b32"}[words]


@functools.cache
def _load(dtype: str, width: int, absent: int, gap: int) -> Function:
    """load(address, left, i): a vector as words, if left > i; else words that are all `absent`. A vector of one element
    of 16 bits is two, a `gap` of elements apart, in a word.
    """
    if width * ITEMSIZE[dtype] == 2:
        text = (
            "{ .reg .pred is_low, is_high; .reg .s32 next; .reg .b32 low, high; "
            f"add.s32 next, $3, {gap}; setp.gt.s32 is_low, $2, $3; setp.gt.s32 is_high, $2, next; "
            f"mov.b32 low, {absent & 0xFFFF}; mov.b32 high, {absent & 0xFFFF}; @is_low ld.global.u16 low, [$1]; "
            f"@is_high ld.global.u16 high, [$1+{2 * gap}]; prmt.b32 $0, low, high, 0x5410; }}"
        )
        words = 1
    else:
        words, kind = _access(dtype, width)
        to = ", ".join(f"${i}" for i in range(words))
        moves = " ".join(f"mov.b32 ${i}, {absent};" for i in range(words))
        text = (
            f"{{ .reg .pred there; setp.gt.s32 there, ${words + 1}, ${words + 2}; {moves} "
            f"@there ld.global.{kind} {f'{{{to}}}' if words > 1 else to}, [${words}]; }}"
        )
    constraints = [*["=&r"] * words, "l", "r", "r"]
    return instruction(text, constraints, types.UniTuple(types.uint32, words), types.int64, types.int32, types.int32)


@functools.cache
def _store(dtype: str, width: int, gap: int) -> Function:
    """store(address, left, i, words): a vector, if left > i; as `_load`."""
    if width * ITEMSIZE[dtype] == 2:
        text = (
            "{ .reg .pred is_low, is_high; .reg .s32 next; .reg .b16 low, high; "
            f"add.s32 next, $2, {gap}; setp.gt.s32 is_low, $1, $2; setp.gt.s32 is_high, $1, next; "
            "mov.b32 {low, high}, $3; @is_low st.global.b16 [$0], low; "
            f"@is_high st.global.b16 [$0+{2 * gap}], high; }}"
        )
        words = 1
    else:
        words, kind = _access(dtype, width)
        what = ", ".join(f"${i + 3}" for i in range(words))
        text = (
            "{ .reg .pred there; setp.gt.s32 there, $1, $2; "
            f"@there st.global.{kind} [$0], {f'{{{what}}}' if words > 1 else what}; }}"
        )
    constraints = ["l", "r", "r", *["r"] * words, "~{memory}"]
    kind_of_words = types.UniTuple(types.uint32, words)
    return instruction(text, constraints, types.none, types.int64, types.int32, types.int32, kind_of_words)


MINUS_INFINITY = {"bfloat16": 0xFF80FF80, "float16": 0xFC00FC00, "float32": 0xFF800000}

_floats_of_halves = instruction(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
    ["=&f", "=f", "r"],
    types.UniTuple(types.float32, 2),
    types.uint32,
    pure=True,
)
_from_bits, _to_bits = OPERATIONS[ACCUMULATED].from_bits, OPERATIONS[ACCUMULATED].to_bits


@device
def _float_of_word(more: Any, i: Any, word: Any) -> Any:
    return _from_bits(types.int32(word))


@device
def _floats_of_bfloats(more: Any, i: Any, word: Any) -> Any:
    low, high = types.uint32(word << types.uint32(16)), types.uint32(word & types.uint32(0xFFFF0000))
    return _from_bits(types.int32(low)), _from_bits(types.int32(high))


@device
def _floats_of_float16s(more: Any, i: Any, word: Any) -> Any:
    return _floats_of_halves(word)


@functools.cache
def widener(dtype: str) -> Function:
    """widen(more, words): the elements of some vectors."""
    functions = {"bfloat16": _floats_of_bfloats, "float16": _floats_of_float16s, "float32": _float_of_word}
    return mapped(functions[dtype], MEMBER)


@functools.cache
def narrower(dtype: str) -> Function:
    """narrow(more, elements): the words of vectors, each element rounded once."""
    if dtype == "float32":
        nan = CANONICAL_NAN[dtype]

        @device
        def word(more: Any, i: Any, value: Any) -> Any:
            return types.uint32(_to_bits(value) if value == value else types.int32(nan))

        return mapped(word, MEMBER)
    two = pack(dtype)

    @device
    def pair(more: Any, i: Any, values: Any) -> Any:
        return two(values[0], values[1])

    return mapped(pair, 2)


_opaque = instruction("", ["=r", "0"], types.uint32, types.uint32)


@device
def _forget(more: Any, i: Any, word: Any) -> Any:
    return _opaque(word)


forget_widened = mapped(_forget, MEMBER)
"""forget_widened(more, words): the same words, so that NVVM widens them again and does not keep twice as many."""


class Vectors(NamedTuple):
    """How a thread has its elements."""

    words: int
    """Of a step, which is its elements of 256."""
    load: Function
    """load((address, left), i): the words of step i."""
    store: Function
    """store(address, left, i, words): the results of step i."""


@functools.cache
def vectors_of(dtype: str, width: int, lanes: int, span: int, absent: int) -> Vectors:
    """Vectors of `width` elements, for `lanes` of the tree; those of `span` threads lie side by side. Words of elements
    that are not there are `absent`.
    """
    itemsize, gap = ITEMSIZE[dtype], span * width
    elements = max(width, 4 // itemsize)  # of an access, or of two
    step, words = elements * span, elements * itemsize // 4
    load, store = _load(dtype, width, absent, gap), _store(dtype, width, gap)

    @device
    def load_vector(more: Any, g: Any) -> Any:
        address, left, i = more
        place = types.int32(i * types.int32(SUM_LANES) + g * types.int32(step))
        return load(address + place * itemsize, left, place)

    load_vectors = mapped(load_vector, count=lanes // elements)

    @device
    def load_step(more: Any, i: Any) -> Any:
        address, left = more
        return load_vectors((address, left, i))

    @device
    def store_vector(state: Any, more: Any, g: Any, vector: Any) -> Any:
        address, left, i = more
        place = types.int32(i * types.int32(SUM_LANES) + g * types.int32(step))
        store(address + place * itemsize, left, place, vector)
        return state

    store_vectors = folded(store_vector, words)

    @device
    def store_step(address: Any, left: Any, i: Any, results: Any) -> Any:
        return store_vectors(types.int32(0), (address, left, i), results)

    return Vectors(lanes * itemsize // 4, load_step, store_step)


@functools.cache
def extreme_of(dtype: str, name: str, start: float) -> Function:
    """extreme(words): max.NaN of the elements, which is a NaN if one is, or min, which overlooks it; and of `start`."""
    of_two = instruction(
        f"{name}.f32 $0, $1, $2;", ["=f", "f", "f"], types.float32, types.float32, types.float32, pure=True
    )
    widen = widener(dtype)

    @device
    def more_extreme(state: Any, more: Any, i: Any, value: Any) -> Any:
        return of_two(state, value)

    of_floats = folded(more_extreme, MEMBER)

    @device
    def extreme(words: Any) -> Any:
        return of_floats(types.float32(start), 0, widen(0, words))

    if dtype == "float32":
        return extreme
    kind, infinity = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype], MINUS_INFINITY[dtype]
    first = infinity if start < 0 else infinity & 0x7FFF7FFF
    of_pairs = instruction(
        f"{name}.{kind} $0, $1, $2;", ["=r", "r", "r"], types.uint32, types.uint32, types.uint32, pure=True
    )

    @device
    def more_extreme_pair(state: Any, more: Any, i: Any, word: Any) -> Any:
        return of_pairs(state, word)

    of_words = folded(more_extreme_pair, MEMBER)

    @device
    def extreme_of_pairs(words: Any) -> Any:
        return extreme((of_words(types.uint32(first), 0, words),))

    return extreme_of_pairs
