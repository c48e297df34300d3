"""Matrix products: the kernel, for every arithmetic class, and its launch.

A thread block computes one tile of the result. It walks K in order, never splits it, and keeps several tiles of both
operands on their way to shared memory; `products.py` multiplies those that have arrived. What lies outside the operands
is read as +0 in both, which adds nothing. The tile decides speed only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, ARITHMETIC, ITEMSIZE
from ...specs import Layout, MatmulSpec
from ...views import Device
from .. import MatmulLaunch
from .device import (
    OPERATIONS,
    STORAGE,
    WARP,
    Function,
    as_dimensions,
    commit_copies,
    copy_async,
    copy_part_async,
    cuda,
    device,
    int64s,
    load_vector,
    pack,
    pointer,
    reader,
    shared_access,
    shared_address,
    store_vector,
    types,
    wait_for_copies,
    writer,
)
from .launch import Kernel, Launch, compute_capability, flat, multiprocessors, on
from .products import SLAB_ALIGNMENT, VECTOR_BYTES, Staged, pitch_of, product
from .schedules import BAND, Tile, choose, tiles, tiles_of

_uint32 = types.uint32
"""Tiles and matrices are counted in 32 bits: a division of 64 is a call, and in a kernel with calls wgmma waits."""

MAX_GRID_Y = 65535


class Variant(NamedTuple):
    """What a kernel is compiled for. `c` is None where there is no addend."""

    arithmetic: str
    operand: str
    out: str
    c: str | None
    batch_dimensions: int
    a_k_contiguous: bool
    b_k_contiguous: bool
    """How an operand's tiles lie in shared memory. In global memory it may lie in any way, but only one that lies
    likewise is copied in vectors."""
    tile: Tile

    @property
    def staged(self) -> tuple[Staged, Staged]:
        """The operands' tiles."""
        tile = self.tile
        return (
            Staged(self.operand, tile.m, tile.k, self.a_k_contiguous),
            Staged(self.operand, tile.n, tile.k, self.b_k_contiguous),
        )

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block: the stages, and after them the accumulators in their place."""
        return max(
            self.tile.stages * sum(staged.bytes for staged in self.staged),
            self.tile.m * pitch_of(self.tile, self.operand),
        )


def variants() -> Iterator[Variant]:
    """One variant of every kernel, and of every way to end it."""
    for arithmetic in ARITHMETIC.values():
        for operand in arithmetic.covers if arithmetic.name != "tc8f24" else ():  # the kernels of tc16f25
            seen: set[str] = set()
            for tile in tiles(arithmetic.name, operand, None):
                for k_contiguous in (True, False):
                    yield Variant(arithmetic.name, operand, operand, None, 1, k_contiguous, k_contiguous, tile)
                if tile.instruction in seen:
                    continue
                seen.add(tile.instruction)
                yield Variant(arithmetic.name, operand, operand, operand, 2, True, False, tile)
                for out in ("float32", "float64"):
                    if (ACCUMULATE[operand], out) not in (("float64", "float32"), (operand, out)) and operand != out:
                        yield Variant(arithmetic.name, operand, out, out, 1, False, True, tile)


@functools.cache
def _finisher(operand: str, out: str, c: str | None) -> Function:
    """The epilogue: finish(out, out_index, c, c_index, accumulator, alpha, beta)."""
    accumulate = ACCUMULATE[operand]
    operations = OPERATIONS[accumulate]
    real, add, multiply, fma = operations.type, operations.add, operations.multiply, operations.fma
    write = writer(out, accumulate)

    if c is None:

        @device
        def finish(out: Any, out_index: Any, c: Any, c_index: Any, t: Any, alpha: Any, beta: Any) -> None:
            write(out, out_index, multiply(alpha, add(t, real(0))))

    else:
        read = reader(c, accumulate)

        @device
        def finish(out: Any, out_index: Any, c: Any, c_index: Any, t: Any, alpha: Any, beta: Any) -> None:
            t = multiply(alpha, add(t, real(0)))  # an underflow to -0 is +0; a factor of 1 changes no bit
            write(out, out_index, fma(beta, read(c, c_index), t))

    return finish


@device
def _position(m: Any, n: Any, tile_m: Any, tile_n: Any) -> Any:
    """First row and column of this thread block's tile: along n, in bands of m."""
    tiles_m, tiles_n = _uint32((m + tile_m - 1) // tile_m), _uint32((n + tile_n - 1) // tile_n)
    tile = _uint32(cuda.blockIdx.x)
    band = _uint32(tile // _uint32(BAND * tiles_n))
    tile = _uint32(tile - band * _uint32(BAND * tiles_n))
    height = _uint32(min(_uint32(tiles_m - band * BAND), _uint32(BAND)))
    column = _uint32(tile // height)
    row = _uint32(band * BAND + tile - column * height)
    return types.int64(row) * tile_m, types.int64(column) * tile_n


@device
def _offset(index: Any, shape: Any, strides: Any) -> Any:
    """Where matrix `index` of a batch begins, in elements from the first."""
    place = types.int64(0)
    for i in range(len(shape) - 1):
        d = len(shape) - 1 - i
        outer = _uint32(index // _uint32(shape[d]))
        place += types.int64(_uint32(index - outer * _uint32(shape[d]))) * strides[d]
        index = outer
    return place + types.int64(index) * strides[0]


@device
def _product(shape: Any) -> Any:
    size = types.int64(1)
    for length in shape:
        size *= length
    return size


class Filler(NamedTuple):
    """How the loading threads bring an operand's tiles to shared memory. Strides are those along mn and k, in bytes."""

    begin: Function
    """begin(strides): how far a thread's first vector is from its tile's first element, in memory and when staged."""
    copy: Function
    """copy(shared, address, strides, mn_left, k_left): queue the copy of the vectors that `begin` says, of a tile of
    which mn_left x k_left exists; the rest becomes +0."""
    copy_elements: Function
    """The same for any strides and alignment, from the tile's first element on, and not queued."""


@functools.cache
def _filler(staged: Staged, tile: Tile) -> Filler:
    itemsize, k_contiguous, inner_length, outer_length = (
        staged.itemsize,
        staged.k_contiguous,
        staged.inner,
        staged.outer,
    )
    line_bytes, vectors, storage = staged.line, staged.vectors, STORAGE[staged.dtype]
    first_thread, threads = tile.warps * WARP, tile.loaders * WARP
    repeat = 8 // vectors
    in_vector, in_line = VECTOR_BYTES // itemsize, line_bytes // itemsize
    lines = staged.bytes // line_bytes
    together = threads // vectors  # lines that all threads copy in one pass
    down, right = max(outer_length // together, 1), max(together // outer_length, 1)  # passes per slab, slabs per pass
    slabs = max(lines // (down * together), 1)  # passes along a line
    assert lines in (down * slabs * together, lines if lines < together else 0), "every thread copies as many vectors"
    assert together % 8 == 0, "a thread's vectors are permuted alike"
    place, (_, store) = staged.place(), shared_access(staged.dtype)
    elements, unroll = staged.mn * staged.k, 8

    @device
    def position() -> Any:
        """Line and vector of the thread's first vector."""
        thread = _uint32(cuda.threadIdx.x - first_thread)
        return _uint32(thread // vectors), _uint32(thread % vectors)

    @device
    def begin(strides: Any) -> Any:
        line, vector = position()
        outer_stride = strides[0] if k_contiguous else strides[1]
        inner = line // outer_length * line_bytes + vector * VECTOR_BYTES
        permuted = (vector ^ (line // repeat % vectors)) * VECTOR_BYTES
        return line % outer_length * outer_stride + inner, _uint32(line * line_bytes + permuted)

    @device
    def copy(shared: Any, address: Any, strides: Any, mn_left: Any, k_left: Any) -> None:
        line, vector = position()
        if k_contiguous:
            inner_left, outer_left, outer_stride = k_left, mn_left, strides[0]
        else:
            inner_left, outer_left, outer_stride = mn_left, k_left, strides[1]
        if lines < together and line >= lines:
            return
        if inner_left >= inner_length and outer_left >= outer_length:
            for i in range(slabs):
                source = address + i * right * line_bytes
                for j in range(down):
                    copy_async(shared + (i * down + j) * together * line_bytes, source)
                    source += together * outer_stride
        else:
            outer_left -= line % outer_length
            inner_left -= line // outer_length * in_line + vector * in_vector
            for i in range(slabs):
                source = address + i * right * line_bytes
                existing = min(max(inner_left - i * right * in_line, 0), in_vector) * itemsize
                for j in range(down):
                    existing = existing if j * together < outer_left else 0
                    copy_part_async(shared + (i * down + j) * together * line_bytes, source, existing)
                    source += together * outer_stride

    @device
    def copy_elements(shared: Any, address: Any, strides: Any, mn_left: Any, k_left: Any) -> None:
        if k_contiguous:
            inner_left, outer_left, inner_stride, outer_stride = k_left, mn_left, strides[1], strides[0]
        else:
            inner_left, outer_left, inner_stride, outer_stride = mn_left, k_left, strides[0], strides[1]
        values = cuda.local.array(unroll, storage)
        first = _uint32(cuda.threadIdx.x - first_thread)
        while first < elements:
            for i in range(unroll):
                index = _uint32(first + i * threads)
                inner, outer = _uint32(index % inner_length), _uint32(index // inner_length)
                values[i] = storage(0)
                if inner < inner_left and outer < outer_left:
                    values[i] = pointer(address + inner * inner_stride + outer * outer_stride, storage)[0]
            for i in range(unroll):
                index = _uint32(first + i * threads)
                if index < elements:
                    inner, outer = _uint32(index % inner_length), _uint32(index // inner_length)
                    mn, k = (outer, inner) if k_contiguous else (inner, outer)
                    store(shared + place(mn, k), values[i])
            first = _uint32(first + unroll * threads)

    return Filler(begin, copy, copy_elements)


@functools.cache
def _writer_of_tiles(variant: Variant) -> Function:
    """write(staged, out, out_strides, c, c_strides, m_left, n_left, alpha, beta, along_n, in_vectors): the epilogue of
    the tile whose accumulators lie in shared memory. `out` and `c` are the addresses of its first element.
    """
    tile = variant.tile
    accumulate = ACCUMULATE[variant.operand]
    pitch, size, real = pitch_of(tile, variant.operand), ITEMSIZE[accumulate], OPERATIONS[accumulate].type
    multiply, add = OPERATIONS[accumulate].multiply, OPERATIONS[accumulate].add
    storage_out, storage_c = STORAGE[variant.out], STORAGE[variant.c or variant.operand]
    tile_m, tile_n, threads = tile.m, tile.n, tile.threads
    finish = _finisher(variant.operand, variant.out, variant.c)
    load, _ = shared_access(accumulate)
    unroll = 4

    @device
    def write_elements(
        staged: Any, out: Any, out_strides: Any, c: Any, c_strides: Any, m_left: Any, n_left: Any,
        alpha: Any, beta: Any, along_n: Any, in_vectors: Any,
    ) -> None:  # fmt: skip
        out, c = pointer(out, storage_out), pointer(c, storage_c)
        first = _uint32(cuda.threadIdx.x)
        while first < tile_m * tile_n:
            for i in range(unroll):
                index = _uint32(first + i * threads)
                row, column = index // tile_n, index % tile_n
                if not along_n:
                    row, column = index % tile_m, index // tile_m
                if index < tile_m * tile_n and row < m_left and column < n_left:
                    finish(
                        out, row * out_strides[0] + column * out_strides[1],
                        c, row * c_strides[0] + column * c_strides[1],
                        load(staged + row * pitch + column * size), real(alpha), real(beta),
                    )  # fmt: skip
            first = _uint32(first + unroll * threads)

    if variant.c is not None or ITEMSIZE[variant.out] != 2:
        return write_elements

    in_vector = VECTOR_BYTES // 2
    in_row = tile_n // in_vector
    passes = -(-tile_m * in_row // threads)
    packed = pack(variant.out)

    @device
    def scaled(t: Any, factor: Any) -> Any:
        return multiply(factor, add(t, real(0)))

    @device
    def write(
        staged: Any, out: Any, out_strides: Any, c: Any, c_strides: Any, m_left: Any, n_left: Any,
        alpha: Any, beta: Any, along_n: Any, in_vectors: Any,
    ) -> None:  # fmt: skip
        if not in_vectors:
            write_elements(staged, out, out_strides, c, c_strides, m_left, n_left, alpha, beta, along_n, False)
            return
        factor = real(alpha)
        for i in range(passes):
            index = _uint32(cuda.threadIdx.x + i * threads)
            row, column = _uint32(index // in_row), _uint32(index % in_row * in_vector)
            if row < tile_m and row < m_left and column < n_left:
                x = load_vector(staged + row * pitch + column * size)
                y = load_vector(staged + row * pitch + (column + 4) * size)
                store_vector(
                    out + (row * out_strides[0] + column) * 2,
                    packed(scaled(x[0], factor), scaled(x[1], factor)),
                    packed(scaled(x[2], factor), scaled(x[3], factor)),
                    packed(scaled(y[0], factor), scaled(y[1], factor)),
                    packed(scaled(y[2], factor), scaled(y[3], factor)),
                )

    return write


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    tile = variant.tile
    batch = int64s(variant.batch_dimensions)
    signature = types.void(
        *[types.int64] * 4,  # addresses: out, c, a, b
        *[types.float64] * 2,  # alpha, beta
        int64s(3),  # m, n, k
        *[int64s(2)] * 4,  # strides of a matrix, along its rows and columns: out, c, a, b
        *[batch] * 5,  # the batch's shape and strides: out, c, a, b
        types.int64,  # whether neighbours in memory are neighbours along n in out
        *[types.int64] * 3,  # whether these can be accessed in vectors: out, a, b
    )
    return Kernel(
        str(variant),
        lambda: (_kernel(variant), signature),
        tile.threads,
        tile.blocks,
        variant.shared_bytes,
        tile.instruction == "wgmma",
    )


def _kernel(variant: Variant) -> Function:
    tile, itemsize = variant.tile, ITEMSIZE[variant.operand]
    out_size, c_size = ITEMSIZE[variant.out], ITEMSIZE[variant.c or variant.operand]
    tile_m, tile_n, tile_k, stages = tile.m, tile.n, tile.k, tile.stages
    a_staged, b_staged = variant.staged
    a_bytes, stage_bytes = a_staged.bytes, a_staged.bytes + b_staged.bytes
    multiplying_threads = tile.warps * WARP
    (begin_a, copy_a, copy_elements_a), (begin_b, copy_b, copy_elements_b) = (
        _filler(staged, tile) for staged in variant.staged
    )
    zeros, addresses, multiply, wait, finish, store, asynchronous, scale = product(tile, a_staged, b_staged)
    stage_step = stage_bytes // scale
    write = _writer_of_tiles(variant)
    # An asynchronous product still reads the stage before the one that it was given, which so cannot be filled yet.
    ahead = stages - 2 if asynchronous else stages - 1
    wait_for_tile = wait_for_copies(ahead - 1)

    def matmul(
        out: Any, c: Any, a: Any, b: Any, alpha: Any, beta: Any, size: Any,
        out_strides: Any, c_strides: Any, a_strides: Any, b_strides: Any,
        batch_shape: Any, out_batch: Any, c_batch: Any, a_batch: Any, b_batch: Any,
        out_along_n: Any, out_in_vectors: Any, a_in_vectors: Any, b_in_vectors: Any,
    ) -> None:  # fmt: skip
        m, n, k = size
        m0, n0 = _position(m, n, tile_m, tile_n)
        batch = _uint32(_uint32(cuda.blockIdx.z) * cuda.gridDim.y + cuda.blockIdx.y)
        if batch >= _product(batch_shape):
            return
        m_left, n_left = m - m0, n - n0
        a += (_offset(batch, batch_shape, a_batch) + m0 * a_strides[0]) * itemsize
        b += (_offset(batch, batch_shape, b_batch) + n0 * b_strides[1]) * itemsize
        a_strides = (a_strides[0] * itemsize, a_strides[1] * itemsize)
        b_strides = (b_strides[1] * itemsize, b_strides[0] * itemsize)
        shared = shared_address(cuda.shared.array(0, types.uint8, alignment=SLAB_ALIGNMENT))

        steps = (k + tile_k - 1) // tile_k
        if cuda.threadIdx.x >= multiplying_threads:
            a_shared, b_shared = shared, _uint32(shared + a_bytes)
            if a_in_vectors:
                a_first, a_staged_first = begin_a(a_strides)
                a += a_first
                a_shared = _uint32(a_shared + a_staged_first)
            if b_in_vectors:
                b_first, b_staged_first = begin_b(b_strides)
                b += b_first
                b_shared = _uint32(b_shared + b_staged_first)
            # Every round commits one group of copies, past the end an empty one, so that waiting counts throughout.
            k_left, writing = k, 0
            for step in range(-ahead, steps):
                if step >= 0:
                    wait_for_tile()
                    cuda.syncthreads()  # tile `step` has arrived; all are done with the stage that is filled next
                if k_left > 0:
                    if a_in_vectors:
                        copy_a(a_shared + writing, a, a_strides, m_left, k_left)
                    else:
                        copy_elements_a(a_shared + writing, a, a_strides, m_left, k_left)
                    if b_in_vectors:
                        copy_b(b_shared + writing, b, b_strides, n_left, k_left)
                    else:
                        copy_elements_b(b_shared + writing, b, b_strides, n_left, k_left)
                commit_copies()
                a += tile_k * a_strides[1]
                b += tile_k * b_strides[1]
                k_left -= tile_k
                writing = writing + stage_bytes if writing < (stages - 1) * stage_bytes else 0
            cuda.syncthreads()
        else:
            accumulators = zeros()
            a_tiles, b_tiles = addresses(shared, shared + a_bytes)
            reading = 0
            for _ in range(steps):
                cuda.syncthreads()
                accumulators = wait(multiply(accumulators, a_tiles + reading, b_tiles + reading))
                reading = reading + stage_step if reading < (stages - 1) * stage_step else 0
            accumulators = finish(accumulators)
            cuda.syncthreads()  # all are done with the stages
            store(accumulators, shared)
        cuda.syncthreads()
        out += (_offset(batch, batch_shape, out_batch) + m0 * out_strides[0] + n0 * out_strides[1]) * out_size
        c += (_offset(batch, batch_shape, c_batch) + m0 * c_strides[0] + n0 * c_strides[1]) * c_size
        write(shared, out, out_strides, c, c_strides, m_left, n_left, alpha, beta, out_along_n, out_in_vectors)

    return matmul


def _transposed(layout: Layout) -> Layout:
    *batch, rows, columns = range(len(layout.shape))
    order = (*batch, columns, rows)
    return Layout(layout.dtype, tuple(layout.shape[d] for d in order), tuple(layout.strides[d] for d in order))


def _last_runs(layout: Layout) -> bool:
    """Whether memory runs along the last dimension rather than the one before it."""
    (rows, columns), (before, last) = layout.shape[-2:], layout.strides[-2:]
    return rows == 1 or (columns > 1 and abs(last) <= abs(before))


def _in_vectors(layout: Layout) -> bool:
    """Whether memory can be accessed 16 bytes at a time, if the address is a multiple of that."""
    in_vector = VECTOR_BYTES // ITEMSIZE[layout.dtype]
    near = len(layout.shape) - (1 if _last_runs(layout) else 2)
    return all(
        length == 1 or (step == 1 if d == near else step % in_vector == 0)
        for d, (length, step) in enumerate(zip(layout.shape, layout.strides, strict=True))
    )


def _transpose(spec: MatmulSpec) -> MatmulSpec:
    """The product of the transposes, which is the transpose of the product."""
    return MatmulSpec(
        spec.arithmetic,
        _transposed(spec.b),
        _transposed(spec.a),
        _transposed(spec.c) if spec.c else None,
        _transposed(spec.out),
    )


def prepare(spec: MatmulSpec, gpu: Device) -> MatmulLaunch:
    """Choose a tile and build the launch."""
    batches = math.prod(spec.batch)
    m, n, _ = spec.mnk
    tile, swapped = choose(
        tiles(spec.arithmetic, spec.a.dtype, compute_capability(gpu)), m, n, batches, multiprocessors(gpu)
    )
    launch = with_tile(_transpose(spec) if swapped else spec, gpu, tile)
    if not swapped:
        return launch

    def swap(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        launch(stream, out, b, a, c, alpha, beta)

    return swap


def with_tile(spec: MatmulSpec, gpu: Device, tile: Tile) -> MatmulLaunch:
    """Build the launch with a given tile."""
    m, n, k = spec.mnk
    c = spec.c or spec.out
    batch = as_dimensions(spec.batch, *(layout.strides[:-2] for layout in (spec.out, c, spec.a, spec.b)))
    variant = Variant(
        spec.arithmetic,
        spec.a.dtype,
        spec.out.dtype,
        spec.c.dtype if spec.c else None,
        len(batch[0]),
        _last_runs(spec.a),
        not _last_runs(spec.b),
        tile,
    )
    with on(gpu):
        batches = math.prod(spec.batch)
        grid = (tiles_of(m, n, tile), min(batches, MAX_GRID_Y), -(-batches // MAX_GRID_Y))
        run = Launch(kernel(variant), gpu, grid)

    out_along_n = _last_runs(spec.out)
    layout = flat(((m, n, k), *(one.strides[-2:] for one in (spec.out, c, spec.a, spec.b)), *batch, int(out_along_n)))
    out_vectors = out_along_n and _in_vectors(spec.out) and n % (VECTOR_BYTES // ITEMSIZE[spec.out.dtype]) == 0
    a_vectors, b_vectors = _in_vectors(spec.a), _in_vectors(spec.b)

    def launch(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        in_vectors = (
            int(out_vectors and out % VECTOR_BYTES == 0),
            int(a_vectors and a % VECTOR_BYTES == 0),
            int(b_vectors and b % VECTOR_BYTES == 0),
        )
        with on(gpu):
            run(stream, out, c, a, b, alpha, beta, *layout, *in_vectors)

    return launch
