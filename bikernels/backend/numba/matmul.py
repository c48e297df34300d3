"""Matrix products: one kernel for the tensor-core classes, one for the fma classes, and the launch of either.

Both walk K in order, one tile of shared memory after the other, and never split it. What lies outside the operands is
read as +0 in both, which adds nothing. The tile decides speed only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...contract import ACCUMULATE, ARITHMETIC
from ...specs import Layout, MatmulSpec
from ...views import Device, View
from .. import MatmulLaunch
from .device import (
    OPERATIONS,
    STORAGE,
    TENSOR_CORE_PRODUCT,
    WARP,
    Function,
    as_dimensions,
    cuda,
    device,
    int64s,
    load_matrices,
    load_matrices_transposed,
    offset,
    pointer,
    reader,
    types,
    writer,
)
from .launch import Kernel, Launch, blocks_to_fill, flat, grid_of, on


class Tile(NamedTuple):
    """The block of the result that a thread block computes, `k` products at a time, and the part that one thread (fma
    classes) or one warp (tensor-core classes) has of it.
    """

    m: int
    n: int
    k: int
    part_m: int
    part_n: int
    blocks: int
    """Thread blocks that should fit on a multiprocessor."""


class Variant(NamedTuple):
    """What a kernel is compiled for. `c` is None where there is no addend."""

    arithmetic: str
    operand: str
    out: str
    c: str | None
    batch_dimensions: int
    tile: Tile


TENSOR_CORE_TILES = (Tile(128, 128, 32, 64, 32, 1), Tile(32, 64, 64, 16, 32, 2))
FMA_TILES = {
    "float32": (Tile(64, 128, 8, 8, 8, 3), Tile(32, 32, 32, 2, 2, 2)),
    "float64": (Tile(64, 64, 16, 4, 4, 2), Tile(32, 32, 16, 2, 2, 2)),
}


def tiles(arithmetic: str, operand: str) -> tuple[Tile, ...]:
    """The tiles to choose from, the largest first."""
    return TENSOR_CORE_TILES if ARITHMETIC[arithmetic].is_tensor_core else FMA_TILES[ACCUMULATE[operand]]


def threads(variant: Variant) -> int:
    """Threads per block."""
    tile = variant.tile
    parts = (tile.m // tile.part_m) * (tile.n // tile.part_n)
    return parts * WARP if ARITHMETIC[variant.arithmetic].is_tensor_core else parts


def variants() -> Iterator[Variant]:
    """One variant of every kernel, and of every way to end it."""
    for arithmetic in ARITHMETIC.values():
        for operand in arithmetic.covers if arithmetic.name != "tc8f24" else ():  # the kernels of tc16f25
            for tile in tiles(arithmetic.name, operand):
                yield Variant(arithmetic.name, operand, operand, None, 1, tile)
                yield Variant(arithmetic.name, operand, operand, operand, 2, tile)
            for out in ("float32", "float64"):
                if (ACCUMULATE[operand], out) not in (("float64", "float32"), (operand, out)) and operand != out:
                    yield Variant(arithmetic.name, operand, out, out, 1, tile)


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
def _walk(rows: Any, columns: Any, block: Any, along_rows: Any) -> Any:
    """The first element of a tile that a thread fetches (row, column) and its step from one to the next: neighbouring
    threads lie along the dimension in which memory runs.
    """
    t = types.int64(cuda.threadIdx.x)
    if along_rows:
        return t % rows, t // rows, 0, block // rows
    return t // columns, t % columns, block // columns, 0


@device
def _position(m: Any, n: Any, tile_m: Any, tile_n: Any) -> Any:
    """The index in the batch, first row and first column of this thread block's tile; neighbours share columns."""
    blocks_m, blocks_n = (m + tile_m - 1) // tile_m, (n + tile_n - 1) // tile_n
    block = types.int64(cuda.blockIdx.y) * cuda.gridDim.x + cuda.blockIdx.x
    batch = block // (blocks_m * blocks_n)
    block -= batch * (blocks_m * blocks_n)
    column = block // blocks_m
    return batch, (block - column * blocks_m) * tile_m, column * tile_n


@device
def _product(shape: Any) -> Any:
    size = types.int64(1)
    for length in shape:
        size *= length
    return size


@functools.cache
def kernel(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    body = _tensor_core_kernel if ARITHMETIC[variant.arithmetic].is_tensor_core else _fma_kernel
    batch = int64s(variant.batch_dimensions)
    signature = types.void(
        *[types.int64] * 4,  # addresses: out, c, a, b
        *[types.float64] * 2,  # alpha, beta
        int64s(3),  # m, n, k
        *[int64s(2)] * 4,  # strides of a matrix: out, c, a, b
        *[batch] * 5,  # the batch's shape and strides: out, c, a, b
        *[types.int64] * 3,  # along_rows of a, of b (whose rows are its columns), and whether words can be read
    )
    return Kernel(body(variant), signature, threads(variant), variant.tile.blocks)


def _tensor_core_kernel(variant: Variant) -> Function:
    """Classes tc16f25 and tc8f24. Both operands are rows of K elements (b: its columns), and their tiles lie in shared
    memory as the operands lie in global memory: in lines of words of two neighbours, along K or along the rows.
    """
    tile, product = variant.tile, TENSOR_CORE_PRODUCT[variant.operand]
    tile_m, tile_n, tile_k, warp_m, warp_n, _ = tile
    block = threads(variant)
    a_words, b_words = tile_m * tile_k // 2 // block, tile_n * tile_k // 2 // block
    fragments_m, fragments_n, warps_m = warp_m // 16, warp_n // 8, tile_m // warp_m
    storage_out = STORAGE[variant.out]
    storage_c = STORAGE[variant.c or variant.operand]
    finish = _finisher(variant.operand, variant.out, variant.c)
    word, half, real = types.uint32, types.uint16, types.float32
    bits = types.uint32(16)
    # Four words between lines, so that eight rows of four words lie in different banks.
    along_k = tile_k // 2 + 4
    a_size = max(tile_m * along_k, tile_k * (tile_m // 2 + 4))
    b_size = max(tile_n * along_k, tile_k * (tile_n // 2 + 4))

    @device
    def walk(in_tile: Any, along_rows: Any) -> Any:
        """A thread's first word of a tile (line, word) and the lines that it steps from one to the next."""
        t = types.int64(cuda.threadIdx.x)
        if along_rows:
            return t // (in_tile // 2), t % (in_tile // 2), block // (in_tile // 2)
        return t // (tile_k // 2), t % (tile_k // 2), block // (tile_k // 2)

    @device
    def fetch(
        staged: Any, address: Any, place: Any, first: Any, rows: Any, k0: Any, k: Any, strides: Any, in_tile: Any,
        along_rows: Any, paired: Any,
    ) -> None:  # fmt: skip
        """A thread's words of the next tile, from global memory to registers."""
        elements, pairs = pointer(address, half), pointer(address, word)
        line, w, lines = walk(in_tile, along_rows)
        if along_rows:
            line_stride, stride, lines_left, left = strides[1], strides[0], k - k0 - line, rows - first - 2 * w
        else:
            line_stride, stride, lines_left, left = strides[0], strides[1], rows - first - line, k - k0 - 2 * w
        at = place + k0 * strides[1] + line * line_stride + 2 * w * stride
        step = lines * line_stride
        for s in range(len(staged)):
            value = word(0)
            if lines_left > 0 and left > 0:
                if paired:
                    value = pairs[at // 2]
                else:
                    value = word(elements[at])
                    if left > 1:
                        value |= word(elements[at + stride]) << bits
            staged[s] = value
            at += step
            lines_left -= lines

    @device
    def store(shared: Any, staged: Any, in_tile: Any, along_rows: Any) -> None:
        """The fetched words, from registers to shared memory."""
        line, w, lines = walk(in_tile, along_rows)
        pitch = in_tile // 2 + 4 if along_rows else along_k
        at = line * pitch + w
        for s in range(len(staged)):
            shared[at] = staged[s]
            at += lines * pitch

    @device
    def locate(row: Any, k: Any, in_tile: Any, along_rows: Any) -> Any:
        """Where the eight elements lie that this thread names to `load_matrices`, for the block of 8 rows and 8 of K at
        (row, k) that is its own; the steps to the next 8 rows and the next 8 of K.
        """
        r = types.int64(cuda.threadIdx.x) % 8
        if along_rows:
            pitch = in_tile // 2 + 4
            return (k + r) * pitch + row // 2, 4, 8 * pitch
        return (row + r) * along_k + k // 2, 8 * along_k, 4

    def tensor_core_matmul(
        out_address: Any, c_address: Any, a_address: Any, b_address: Any, alpha: Any, beta: Any, size: Any,
        out_strides: Any, c_strides: Any, a_strides: Any, b_strides: Any,
        batch_shape: Any, out_batch: Any, c_batch: Any, a_batch: Any, b_batch: Any,
        a_along_rows: Any, b_along_rows: Any, paired: Any,
    ) -> None:  # fmt: skip
        m, n, k = size
        out, c = pointer(out_address, storage_out), pointer(c_address, storage_c)
        a_shared = cuda.shared.array(a_size, word, alignment=16)
        b_shared = cuda.shared.array(b_size, word, alignment=16)
        a_staged = cuda.local.array(a_words, word)
        b_staged = cuda.local.array(b_words, word)
        a_fragment = cuda.local.array((fragments_m, 4), word)
        accumulator = cuda.local.array((fragments_m, fragments_n, 4), real)

        batch, m0, n0 = _position(m, n, tile_m, tile_n)
        if batch >= _product(batch_shape):
            return
        a_place = offset(batch, batch_shape, a_batch) + m0 * a_strides[0]
        b_place = offset(batch, batch_shape, b_batch) + n0 * b_strides[1]
        b_steps = (b_strides[1], b_strides[0])

        # The part of this thread: its warp's block of the tile, and in every fragment row `group` and column `pair`.
        warp, lane = types.int64(cuda.threadIdx.x) // WARP, types.int64(cuda.threadIdx.x) % WARP
        group, pair = lane // 4, lane % 4
        warp_row, warp_column = (warp % warps_m) * warp_m, (warp // warps_m) * warp_n
        # Of four 8x8 matrices that are loaded together, a's first two follow one another along the rows, b's along K.
        one, two = lane // 8 % 2 * 8, lane // 16 * 8
        a_at, a_rows, a_ks = locate(warp_row + one, two, tile_m, a_along_rows)
        b_at, b_rows, b_ks = locate(warp_column + two, one, tile_n, b_along_rows)

        for i in range(fragments_m):
            for j in range(fragments_n):
                for q in range(4):
                    accumulator[i, j, q] = real(0)

        fetch(a_staged, a_address, a_place, m0, m, 0, k, a_strides, tile_m, a_along_rows, paired & 1)
        fetch(b_staged, b_address, b_place, n0, n, 0, k, b_steps, tile_n, b_along_rows, paired & 2)
        for k0 in range(0, k, tile_k):
            store(a_shared, a_staged, tile_m, a_along_rows)
            store(b_shared, b_staged, tile_n, b_along_rows)
            cuda.syncthreads()
            after = k0 + tile_k
            fetch(a_staged, a_address, a_place, m0, m, after, k, a_strides, tile_m, a_along_rows, paired & 1)
            fetch(b_staged, b_address, b_place, n0, n, after, k, b_steps, tile_n, b_along_rows, paired & 2)
            for group_of_k in range(tile_k // 16):
                for i in range(fragments_m):
                    at = a_at + 2 * i * a_rows + 2 * group_of_k * a_ks
                    words = load_matrices_transposed(a_shared, at) if a_along_rows else load_matrices(a_shared, at)
                    for q in range(4):
                        a_fragment[i, q] = words[q]
                for j in range(0, fragments_n, 2):
                    at = b_at + j * b_rows + 2 * group_of_k * b_ks
                    words = load_matrices_transposed(b_shared, at) if b_along_rows else load_matrices(b_shared, at)
                    for i in range(fragments_m):
                        for h in range(2):
                            d = product(
                                a_fragment[i, 0], a_fragment[i, 1], a_fragment[i, 2], a_fragment[i, 3],
                                words[2 * h], words[2 * h + 1],
                                accumulator[i, j + h, 0], accumulator[i, j + h, 1],
                                accumulator[i, j + h, 2], accumulator[i, j + h, 3],
                            )  # fmt: skip
                            for q in range(4):
                                accumulator[i, j + h, q] = d[q]
            cuda.syncthreads()

        out_place = offset(batch, batch_shape, out_batch)
        c_place = offset(batch, batch_shape, c_batch)
        for i in range(fragments_m):
            for h in range(2):
                row = m0 + warp_row + i * 16 + group + h * 8
                if row >= m:
                    continue
                out_row, c_row = out_place + row * out_strides[0], c_place + row * c_strides[0]
                for j in range(fragments_n):
                    for q in range(2):
                        column = n0 + warp_column + j * 8 + pair * 2 + q
                        if column < n:
                            finish(
                                out, out_row + column * out_strides[1], c, c_row + column * c_strides[1],
                                accumulator[i, j, 2 * h + q], real(alpha), real(beta),
                            )  # fmt: skip

    return tensor_core_matmul


def _fma_kernel(variant: Variant) -> Function:
    """Classes fma32 and fma64: every product is one fma. The tiles are [k][row of a or column of b]."""
    tile = variant.tile
    tile_m, tile_n, tile_k, thread_m, thread_n, _ = tile
    block = threads(variant)
    accumulate = ACCUMULATE[variant.operand]
    real, fma = OPERATIONS[accumulate].type, OPERATIONS[accumulate].fma
    read, storage = reader(variant.operand, accumulate), STORAGE[variant.operand]
    storage_out = STORAGE[variant.out]
    storage_c = STORAGE[variant.c or variant.operand]
    finish = _finisher(variant.operand, variant.out, variant.c)
    a_row, b_row = tile_m + 4, tile_n + 4  # fewer bank conflicts where K runs along memory; still whole 16 bytes
    a_count, b_count = tile_m * tile_k // block, tile_n * tile_k // block
    threads_n = tile_n // thread_n
    # A thread has groups of neighbouring rows and columns, so that it reads shared memory 16 bytes at a time and its
    # warp reads without bank conflicts.
    run = min(thread_m, 16 // (4 if accumulate == "float32" else 8))
    stride_m, stride_n = tile_m // thread_m * run, tile_n // thread_n * run

    @device
    def fetch(
        staged: Any, elements: Any, place: Any, first: Any, rows: Any, k0: Any, k: Any, strides: Any, in_tile: Any,
        along_rows: Any,
    ) -> None:  # fmt: skip
        """A thread's elements of the next tile, from global memory to registers."""
        row, w, row_step, w_step = _walk(in_tile, tile_k, block, along_rows)
        at = place + row * strides[0] + (k0 + w) * strides[1]
        step = row_step * strides[0] + w_step * strides[1]
        rows_left, k_left = rows - first - row, k - k0 - w
        for s in range(len(staged)):
            value = real(0)
            if rows_left > 0 and k_left > 0:
                value = read(elements, at)
            staged[s] = value
            at += step
            rows_left -= row_step
            k_left -= w_step

    @device
    def store(shared: Any, staged: Any, in_tile: Any, along_rows: Any) -> None:
        """The fetched elements, from registers to shared memory."""
        row, w, row_step, w_step = _walk(in_tile, tile_k, block, along_rows)
        for s in range(len(staged)):
            shared[w, row] = staged[s]
            row += row_step
            w += w_step

    def fma_matmul(
        out_address: Any, c_address: Any, a_address: Any, b_address: Any, alpha: Any, beta: Any, size: Any,
        out_strides: Any, c_strides: Any, a_strides: Any, b_strides: Any,
        batch_shape: Any, out_batch: Any, c_batch: Any, a_batch: Any, b_batch: Any,
        a_along_rows: Any, b_along_rows: Any, paired: Any,
    ) -> None:  # fmt: skip
        m, n, k = size
        out, c = pointer(out_address, storage_out), pointer(c_address, storage_c)
        a, b = pointer(a_address, storage), pointer(b_address, storage)
        a_shared = cuda.shared.array((tile_k, a_row), real, alignment=16)
        b_shared = cuda.shared.array((tile_k, b_row), real, alignment=16)
        a_staged = cuda.local.array(a_count, real)
        b_staged = cuda.local.array(b_count, real)
        a_fragment = cuda.local.array(thread_m, real)
        b_fragment = cuda.local.array(thread_n, real)
        accumulator = cuda.local.array((thread_m, thread_n), real)

        thread_row, thread_column = cuda.threadIdx.x // threads_n * run, cuda.threadIdx.x % threads_n * run
        batch, m0, n0 = _position(m, n, tile_m, tile_n)
        if batch >= _product(batch_shape):
            return
        a_place = offset(batch, batch_shape, a_batch) + m0 * a_strides[0]
        b_place = offset(batch, batch_shape, b_batch) + n0 * b_strides[1]
        b_steps = (b_strides[1], b_strides[0])
        for i in range(thread_m):
            for j in range(thread_n):
                accumulator[i, j] = real(0)

        fetch(a_staged, a, a_place, m0, m, 0, k, a_strides, tile_m, a_along_rows)
        fetch(b_staged, b, b_place, n0, n, 0, k, b_steps, tile_n, b_along_rows)
        for k0 in range(0, k, tile_k):
            store(a_shared, a_staged, tile_m, a_along_rows)
            store(b_shared, b_staged, tile_n, b_along_rows)
            cuda.syncthreads()
            fetch(a_staged, a, a_place, m0, m, k0 + tile_k, k, a_strides, tile_m, a_along_rows)
            fetch(b_staged, b, b_place, n0, n, k0 + tile_k, k, b_steps, tile_n, b_along_rows)
            for w in range(tile_k):
                for i in range(thread_m):
                    a_fragment[i] = a_shared[w, thread_row + i // run * stride_m + i % run]
                for j in range(thread_n):
                    b_fragment[j] = b_shared[w, thread_column + j // run * stride_n + j % run]
                for i in range(thread_m):
                    for j in range(thread_n):
                        accumulator[i, j] = fma(a_fragment[i], b_fragment[j], accumulator[i, j])
            cuda.syncthreads()

        out_place = offset(batch, batch_shape, out_batch)
        c_place = offset(batch, batch_shape, c_batch)
        for i in range(thread_m):
            for j in range(thread_n):
                row = m0 + thread_row + i // run * stride_m + i % run
                column = n0 + thread_column + j // run * stride_n + j % run
                if row < m and column < n:
                    finish(
                        out, out_place + row * out_strides[0] + column * out_strides[1],
                        c, c_place + row * c_strides[0] + column * c_strides[1],
                        accumulator[i, j], real(alpha), real(beta),
                    )  # fmt: skip

    return fma_matmul


def _in_words(operand: Layout) -> bool:
    """Whether neighbours in memory are two by two one aligned word, if the address is."""
    near = -1 if abs(operand.strides[-1]) <= abs(operand.strides[-2]) else -2
    far = [step for i, step in enumerate(operand.strides) if i != len(operand.strides) + near]
    return operand.strides[near] == 1 and operand.shape[near] % 2 == 0 and all(step % 2 == 0 for step in far)


def prepare(spec: MatmulSpec, gpu: Device) -> MatmulLaunch:
    """Choose a tile and build the launch."""
    m, n, k = spec.mnk
    c = spec.c or spec.out
    batch = as_dimensions(spec.batch, *(layout.strides[:-2] for layout in (spec.out, c, spec.a, spec.b)))
    batches = 1
    for length in batch[0]:
        batches *= length

    def blocks(tile: Tile) -> int:
        return -(-m // tile.m) * -(-n // tile.n)

    choices = tiles(spec.arithmetic, spec.a.dtype)
    tile = next((one for one in choices if blocks(one) * batches >= blocks_to_fill(gpu)), choices[-1])
    variant = Variant(
        spec.arithmetic, spec.a.dtype, spec.out.dtype, spec.c.dtype if spec.c else None, len(batch[0]), tile
    )
    with on(gpu):
        run = Launch(kernel(variant), gpu, grid_of(blocks(tile) * batches))

    a, b = spec.a.strides, spec.b.strides
    layout = flat(
        (
            (m, n, k),
            *(one.strides[-2:] for one in (spec.out, c, spec.a, spec.b)),
            *batch,
            int(abs(a[-2]) < abs(a[-1])),
            int(abs(b[-1]) <= abs(b[-2])),
        )
    )
    a_even, b_even = _in_words(spec.a), _in_words(spec.b)

    def launch(out: View, c: View | None, a: View, b: View, alpha: float, beta: float) -> None:
        paired = (a_even and a.pointer % 4 == 0) + 2 * (b_even and b.pointer % 4 == 0)
        with on(gpu):
            run(out.stream, out.pointer, c.pointer if c else 0, a.pointer, b.pointer, alpha, beta, *layout, paired)

    return launch
