"""How a thread block multiplies two tiles that lie in shared memory: generated PTX, one block of it per pair of tiles.

A tile is cut into slabs, whose lines are 128 bytes of an operand's contiguous dimension (less, if the tile has less);
within a slab the 16-byte vectors of a line are permuted, so that what a warp reads at once lies in different banks.
The permutation is an exclusive or of address bits. A thread therefore needs one address per tile: all that it reads
lies a constant further, and a constant exclusive or.

Accumulators are one value, a tuple that never takes an address, and so stay in registers. Within a block of PTX the
assembler schedules freely; what the order of its lines fixes is the order of the additions to each accumulator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, ITEMSIZE
from .device import WARP, Function, cuda, device, instruction, intrinsic, types
from .schedules import Tile

VECTOR_BYTES = 16
LINE_BYTES = 128
SLAB_ALIGNMENT = 8 * LINE_BYTES
"""The permutation's period, to which the instructions that know of it want a tile aligned."""

PTX_TYPE = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


class Staged(NamedTuple):
    """A tile of an operand in shared memory: `mn` rows (of b: columns) of `k` elements."""

    dtype: str
    mn: int
    k: int
    k_contiguous: bool

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def inner(self) -> int:
        """Length of the dimension along which lines run."""
        return self.k if self.k_contiguous else self.mn

    @property
    def outer(self) -> int:
        return self.mn if self.k_contiguous else self.k

    @property
    def bytes(self) -> int:
        return self.mn * self.k * self.itemsize

    @property
    def line(self) -> int:
        """Bytes of a line."""
        return min(LINE_BYTES, self.inner * self.itemsize)

    @property
    def slab(self) -> int:
        """Bytes of a slab."""
        return self.outer * self.line

    @property
    def vectors(self) -> int:
        """Vectors in a line."""
        return self.line // VECTOR_BYTES

    def permutation(self, outer: Any) -> Any:
        """What the number of a vector in the line `outer` is combined with; it repeats after 8 lines."""
        return outer // (8 // self.vectors) % self.vectors

    def further(self, mn: int, k: int) -> tuple[int, int]:
        """How the address of (mn0 + mn, k0 + k) comes from that of (mn0, k0): by an exclusive or, then a sum.

        Steps across lines are multiples of 8, unless (mn0, k0) is in a line of that; steps along a line are multiples
        of a power of two below which all of (mn0, k0) lies.
        """
        inner, outer = (k, mn) if self.k_contiguous else (mn, k)
        slab, within = divmod(inner * self.itemsize, self.line)
        return within ^ (self.permutation(outer) * VECTOR_BYTES), slab * self.slab + outer * self.line

    def place(self) -> Function:
        """A device function of mn and k: the offset of an element, in bytes."""
        line, slab, vectors, itemsize = self.line, self.slab, self.vectors, self.itemsize
        repeat, k_contiguous = 8 // vectors, self.k_contiguous

        @device
        def place(mn: Any, k: Any) -> Any:
            inner, outer = (k, mn) if k_contiguous else (mn, k)
            at = types.uint32(inner * itemsize)
            permuted = (at % line) ^ (types.uint32(outer) // repeat % vectors * VECTOR_BYTES)
            return types.uint32(at // line * slab + outer * line + permuted)

        return place


class Product(NamedTuple):
    """How the tiles (m x k and k x n) of one stage are multiplied."""

    zeros: Function
    """zeros(): the accumulators of a thread, a tuple, all +0."""
    addresses: Function
    """addresses(a, b): from the addresses of two tiles what `multiply` takes of them; a stage further is a sum."""
    multiply: Function
    """multiply(accumulators, a, b): the accumulators with the products of two tiles added."""
    wait: Function
    """wait(accumulators): the same when all but the last multiplication have ended. Ends at once if none is
    asynchronous."""
    finish: Function
    """finish(accumulators): the same when all have."""
    store: Function
    """store(accumulators, address): puts them into shared memory as an m x n matrix; rows are `pitch_of` apart."""
    asynchronous: bool
    """Whether `multiply` returns before it has read its tiles."""
    scale: int
    """What divides an offset in bytes between the arguments of `multiply`."""


def _joined(names: Iterator[str] | list[str]) -> str:
    return "{" + ", ".join(names) + "}"


def _block(lines: Iterator[str]) -> str:
    """PTX with registers of its own."""
    return "{\n\t" + "\n\t".join(lines) + "\n\t}"


def _load_matrices(name: str, tile: Staged, count: int, group: int, address: str) -> Iterator[str]:
    """Fragments of 16 rows and the 16 elements of K that are the `group`-th: 8 x 8 matrices (0, 0), (8, 0), (0, 8) and
    (8, 8) of each, as mma wants them of either operand.
    """
    option = "" if tile.k_contiguous else ".trans"
    for i in range(count):
        flip, step = tile.further(16 * i, 16 * group)
        yield f"xor.b32 at, {address}, {flip};"
        words = _joined([f"{name}{i}_{q}" for q in range(4)])
        yield f"ldmatrix.sync.aligned.m8n8.x4{option}.shared.b16 {words}, [at+{step}];"


def _mma(tile: Tile, a: Staged, b: Staged) -> Iterator[str]:
    count_m, count_n = tile.warp_m // 16, tile.warp_n // 16
    total = count_m * count_n * 8
    kind = PTX_TYPE[a.dtype]
    yield ".reg .b32 at;"
    for name, count in (("a", count_m), ("b", count_n)):
        for i in range(count):
            yield f".reg .b32 {name}{i}_<4>;"
    for group in range(tile.k // 16):
        yield from _load_matrices("a", a, count_m, group, f"${2 * total}")
        yield from _load_matrices("b", b, count_n, group, f"${2 * total + 1}")
        for i in range(count_m):
            for j in range(2 * count_n):
                acc = _joined([f"${(i * 2 * count_n + j) * 4 + q}" for q in range(4)])
                of_a = _joined([f"a{i}_{q}" for q in range(4)])
                of_b = _joined([f"b{j // 2}_{j % 2 + q}" for q in (0, 2)])
                yield f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {acc}, {of_a}, {of_b}, {acc};"


def _wgmma(tile: Tile, a: Staged, b: Staged) -> Iterator[str]:
    total = tile.n // 2
    kind = PTX_TYPE[a.dtype]
    acc = _joined([f"${i}" for i in range(total)])
    yield ".reg .pred yes;"
    yield ".reg .b64 a, b;"
    yield "setp.eq.b32 yes, 0, 0;"
    yield "fence.proxy.async.shared::cta;"  # what other threads have copied is there for wgmma, too
    yield "wgmma.fence.sync.aligned;"
    for group in range(tile.k // 16):
        for name, staged, argument in (("a", a, 2 * total), ("b", b, 2 * total + 1)):
            flip, step = staged.further(0, 16 * group)
            yield f"add.s64 {name}, ${argument}, {(flip + step) // VECTOR_BYTES};"
        yield (
            f"wgmma.mma_async.sync.aligned.m64n{tile.n}k16.f32.{kind}.{kind} {acc}, a, b, yes, 1, 1, "
            f"{int(not a.k_contiguous)}, {int(not b.k_contiguous)};"
        )
    yield "wgmma.commit_group.sync.aligned;"


def _load_elements(name: str, tile: Staged, count: int, lanes: int, k0: int, address: str) -> Iterator[str]:
    """{name}{i}_{k}: the elements of a thread's `count` rows and of one vector's length of K, as accumulators' type."""
    vector, run = _vector(tile), _run(tile, count)
    if tile.k_contiguous:
        parts = [((i, 0), [f"{name}{i}_{k}" for k in range(vector)]) for i in range(count)]
    else:
        parts = [
            ((i, k), [f"{name}{i + q}_{k}" for q in range(run)]) for k in range(vector) for i in range(0, count, run)
        ]
    for (i, k), names in parts:
        flip, step = tile.further(_row(tile, count, lanes, i), k0 + k)
        yield f"xor.b32 at, {address}, {flip};"
        yield from _load_reals(tile.dtype, names, f"[at+{step}]")


def _load_reals(dtype: str, names: list[str], place: str) -> Iterator[str]:
    def load(kind: str, into: list[str]) -> str:
        return (
            f"ld.shared.v{len(into)}.{kind} {_joined(into)}, {place};"
            if into[1:]
            else (f"ld.shared.{kind} {into[0]}, {place};")
        )

    if ITEMSIZE[dtype] > 2:
        yield load(PTX_TYPE[dtype], names)
        return
    halves = [f"h{q}" for q in range(len(names))]
    yield load("b16", halves)
    for name, half in zip(names, halves, strict=True):
        if dtype == "bfloat16":
            yield f"mov.b32 {name}, {{zero, {half}}};"
        else:
            yield f"cvt.f32.f16 {name}, {half};"


def _vector(tile: Staged) -> int:
    """Elements that a thread loads at once for fma."""
    return min(4, VECTOR_BYTES // tile.itemsize)


def _fma(tile: Tile, a: Staged, b: Staged) -> Iterator[str]:
    lanes_m, lanes_n = _lanes(tile)
    count_m, count_n = tile.m // lanes_m, tile.n // lanes_n
    total = count_m * count_n
    kind = PTX_TYPE[ACCUMULATE[a.dtype]]
    vector = _vector(a)
    yield ".reg .b32 at;"
    yield ".reg .b16 h<4>, zero;"
    yield "mov.b16 zero, 0;"
    for name, count in (("a", count_m), ("b", count_n)):
        for i in range(count):
            yield f".reg .{kind} {name}{i}_<{vector}>;"
    for k0 in range(0, tile.k, vector):
        yield from _load_elements("a", a, count_m, lanes_m, k0, f"${2 * total}")
        yield from _load_elements("b", b, count_n, lanes_n, k0, f"${2 * total + 1}")
        for k in range(vector):
            for i in range(count_m):
                for j in range(count_n):
                    acc = f"${i * count_n + j}"
                    yield f"fma.rn.{kind} {acc}, a{i}_{k}, b{j}_{k}, {acc};"


def _lanes(tile: Tile) -> tuple[int, int]:
    """Threads along m and n."""
    return tile.warps_m * 4, tile.warps_n * 8


def _run(staged: Staged, count: int) -> int:
    """Of the `count` rows of a thread, how many lie side by side, for fma."""
    return 1 if staged.k_contiguous else min(_vector(staged), count)


def _row(staged: Staged, count: int, lanes: int, i: int) -> int:
    """How far the i-th row of a thread is from its first, for fma."""
    run = _run(staged, count)
    return i // run * run * lanes + i % run


# --------------------------------------------------------------------------------------------------------- instructions


@device
def _same(accumulators: Any) -> Any:
    return accumulators


def _changing(lines: Iterator[str], accumulators: Any, *arguments: Any) -> Function:
    """A device function of accumulators and more that returns the accumulators."""
    total = accumulators.count
    outputs = [f"={_REGISTER[accumulators.dtype]}"] * total
    inputs = [str(i) for i in range(total)] + [_REGISTER[one] for one in arguments]
    return instruction(_block(lines), [*outputs, *inputs, "~{memory}"], accumulators, accumulators, *arguments)


_REGISTER = {types.float32: "f", types.float64: "d", types.uint32: "r", types.int64: "l"}
"""Constraint of a type's registers in inline PTX."""


def _storing(accumulators: Any, places: list[tuple[int, int]], pitch: int) -> Function:
    """store(accumulators, address): accumulator i goes to row and column places[i], neighbours two by two."""
    total, size = accumulators.count, accumulators.dtype.bitwidth // 8
    kind = f"f{8 * size}"

    def lines() -> Iterator[str]:
        i = 0
        while i < total:
            row, column = places[i]
            place = f"[${total}+{row * pitch + column * size}]"
            if column % 2 == 0 and places[i + 1 : i + 2] == [(row, column + 1)]:
                yield f"st.shared.v2.{kind} {place}, {{${i}, ${i + 1}}};"
                i += 2
            else:
                yield f"st.shared.{kind} {place}, ${i};"
                i += 1

    # The operands are numbered from the results on, of which there are none.
    inputs = [_REGISTER[accumulators.dtype]] * total
    return instruction(_block(lines()), [*inputs, "r", "~{memory}"], types.none, accumulators, types.uint32)


# ------------------------------------------------------------------------------------------------------------- products


@functools.cache
def product(tile: Tile, a: Staged, b: Staged) -> Product:
    """How `tile.instruction` multiplies tiles that are staged as `a` and `b`."""
    return {"mma": _mma_product, "wgmma": _wgmma_product, "fma": _fma_product}[tile.instruction](tile, a, b)


def pitch_of(tile: Tile, dtype: str) -> int:
    """Bytes between the rows of the accumulators in shared memory, padded against bank conflicts."""
    return (tile.n + 8) * ITEMSIZE[ACCUMULATE[dtype]]


def _zeros(accumulators: Any) -> Function:
    @intrinsic
    def zeros(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            zero = context.get_constant(accumulators.dtype, 0.0)
            return context.make_tuple(builder, accumulators, [zero] * accumulators.count)

        return accumulators(), generate

    return zeros


def _tensor_core_places(tile: Tile) -> list[tuple[int, int]]:
    """Row and column of a thread's accumulators from its first, as mma and wgmma deal them out."""
    return [
        (16 * i + 8 * half, 8 * j + q)
        for i in range(tile.warp_m // 16)
        for j in range(tile.warp_n // 8)
        for half in range(2)
        for q in range(2)
    ]


def _tensor_core_store(tile: Tile, dtype: str, accumulators: Any) -> Function:
    pitch = pitch_of(tile, dtype)
    put = _storing(accumulators, _tensor_core_places(tile), pitch)
    warp_m, warp_n, warps_n = tile.warp_m, tile.warp_n, tile.warps_n

    @device
    def store(values: Any, address: Any) -> None:
        warp, lane = types.uint32(cuda.threadIdx.x) // WARP, types.uint32(cuda.threadIdx.x) % WARP
        row, column = warp // warps_n * warp_m + lane // 4, warp % warps_n * warp_n + lane % 4 * 2
        put(values, address + row * pitch + column * 4)

    return store


def _mma_product(tile: Tile, a: Staged, b: Staged) -> Product:
    accumulators = types.UniTuple(types.float32, tile.warp_m * tile.warp_n // WARP)
    warp_m, warp_n, warps_n = tile.warp_m, tile.warp_n, tile.warps_n
    a_place, b_place, a_along_k, b_along_k = a.place(), b.place(), a.k_contiguous, b.k_contiguous

    @device
    def addresses(a_address: Any, b_address: Any) -> Any:
        warp, lane = types.uint32(cuda.threadIdx.x) // WARP, types.uint32(cuda.threadIdx.x) % WARP
        # Thread 8q + r names line r of the q-th of four 8 x 8 matrices.
        mn, k, line = lane // 8 % 2 * 8, lane // 16 * 8, lane % 8
        a_mn, a_k = (mn + line, k) if a_along_k else (mn, k + line)
        b_mn, b_k = (mn + line, k) if b_along_k else (mn, k + line)
        return (
            types.uint32(a_address + a_place(warp // warps_n * warp_m + a_mn, a_k)),
            types.uint32(b_address + b_place(warp % warps_n * warp_n + b_mn, b_k)),
        )

    multiply = _changing(_mma(tile, a, b), accumulators, types.uint32, types.uint32)
    store = _tensor_core_store(tile, a.dtype, accumulators)
    return Product(_zeros(accumulators), addresses, multiply, _same, _same, store, False, 1)


def _wgmma_product(tile: Tile, a: Staged, b: Staged) -> Product:
    accumulators = types.UniTuple(types.float32, tile.n // 2)
    a_place = a.place()
    a_fixed, b_fixed = _descriptor(a), _descriptor(b)

    @device
    def addresses(a_address: Any, b_address: Any) -> Any:
        a_rows = a_address + a_place(types.uint32(cuda.threadIdx.x) // 128 * 64, 0)
        return types.int64(a_rows) // 16 | a_fixed, types.int64(b_address) // 16 | b_fixed

    multiply = _changing(_wgmma(tile, a, b), accumulators, types.int64, types.int64)
    wait = _changing(iter(["wgmma.wait_group.sync.aligned 1;"]), accumulators)
    finish = _changing(iter(["wgmma.wait_group.sync.aligned 0;"]), accumulators)
    store = _tensor_core_store(tile, a.dtype, accumulators)
    return Product(_zeros(accumulators), addresses, multiply, wait, finish, store, True, 16)


def _descriptor(staged: Staged) -> int:
    """The fixed part of wgmma's description of a tile: swizzled lines of 128 bytes; how far the next slab and the next
    8 lines are, in units of 16 bytes.
    """
    assert staged.line == LINE_BYTES
    slab, lines = (1 if staged.k_contiguous else staged.slab // VECTOR_BYTES), SLAB_ALIGNMENT // VECTOR_BYTES
    swizzled_in_128_bytes = 1 << 62
    return slab << 16 | lines << 32 | swizzled_in_128_bytes


def _fma_product(tile: Tile, a: Staged, b: Staged) -> Product:
    lanes_m, lanes_n = _lanes(tile)
    count_m, count_n = tile.m // lanes_m, tile.n // lanes_n
    accumulators = types.UniTuple(getattr(types, ACCUMULATE[a.dtype]), count_m * count_n)
    rows = [_row(a, count_m, lanes_m, i) for i in range(count_m)]
    columns = [_row(b, count_n, lanes_n, j) for j in range(count_n)]
    run_m, run_n = _run(a, count_m), _run(b, count_n)
    a_place, b_place, warps_n = a.place(), b.place(), tile.warps_n
    pitch, size = pitch_of(tile, a.dtype), ITEMSIZE[ACCUMULATE[a.dtype]]

    @device
    def first() -> Any:
        """A thread's first row and column."""
        warp, lane = types.uint32(cuda.threadIdx.x) // WARP, types.uint32(cuda.threadIdx.x) % WARP
        return (warp // warps_n * 4 + lane // 8) * run_m, (warp % warps_n * 8 + lane % 8) * run_n

    @device
    def addresses(a_address: Any, b_address: Any) -> Any:
        row, column = first()
        return types.uint32(a_address + a_place(row, 0)), types.uint32(b_address + b_place(column, 0))

    put = _storing(accumulators, [(row, column) for row in rows for column in columns], pitch)

    @device
    def store(values: Any, address: Any) -> None:
        row, column = first()
        put(values, address + row * pitch + column * size)

    multiply = _changing(_fma(tile, a, b), accumulators, types.uint32, types.uint32)
    return Product(_zeros(accumulators), addresses, multiply, _same, _same, store, False, 1)
