"""Products of bfloat16 and float16 with wgmma (matmul_wgmma.cu): Hopper, operands that the TMA can bring."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ....contract import ARITHMETIC
from ... import MatmulLaunch
from ..compile import Kernel
from ..launch import ADDRESS, FLOAT32, TENSOR_MAP, gpu, load, shaped
from ..parameters import C_TYPE, DTYPE_CODE
from ..tensor_map import TensorMaps
from .problem import Problem, along_k, resident_ctas

COMPUTE_CAPABILITY = (9, 0)
ALIGNMENT = 16
"""Bytes, of what the TMA reads: of addresses and of every stride but the one between neighbours."""

STRIDES = 2**38
"""Elements of a stride are fewer."""

ELEMENTS = 8
"""That `ALIGNMENT` bytes hold."""

SLAB = 64
"""Elements of K (or of m or n) that lie behind one another in shared memory: 128 bytes."""

PARAMETERS = np.dtype(
    [
        ("c_stride", "i8", (2,)),
        ("out_stride", "i8", (2,)),
        ("c_batch", "i8", (2,)),
        ("out_batch", "i8", (2,)),
        ("m", "u4"),
        ("n", "u4"),
        ("steps", "u4"),
        ("last_m", "u4"),
        ("last_n", "u4"),
        ("tiles_m", "u4"),
        ("tiles_n", "u4"),
        ("tiles", "u4"),
        ("band", "u4"),
        ("batch", "u4"),
        ("addend", "u4"),
        ("c_dtype", "u4"),
        ("out_dtype", "u4"),
        ("vectors", "u4"),
        ("early", "u4"),
    ],
    align=True,
)
"""The struct `Wgmma` of wgmma.cuh."""

NO_VECTORS, VECTORS_ALONG_N, VECTORS_ALONG_M = range(3)
"""Of wgmma.cuh."""

BROUGHT = np.dtype([("batch", "u4", (2,)), ("bytes", "u4")])
"""The struct `Brought` of matmul_wgmma.cu."""

AHEAD = np.dtype([("line", "i8"), ("rows", "u4"), ("depth", "u4"), ("steps", "u4"), ("is_b", "u4")], align=True)
"""The struct `Ahead` of matmul_wgmma.cu."""

AHEAD_BYTES = 32 * 1024
"""That a CTA brings to the L2 before the kernels before it have ended: what memory can bring meanwhile."""

ANYWHERE = 2**31 - 1
"""In place of where the last tile begins: past the end, too, in a cluster that the matrix does not fill."""

LONGEST_BOX = 256
"""Elements along a dimension that the TMA takes at once."""


class Schedule(NamedTuple):
    """A tile and how CTAs go over it; see wgmma.cuh."""

    m: int
    n: int
    k: int
    stages: int
    consumers: int = 1
    cluster_m: int = 1
    cluster_n: int = 1

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n

    @property
    def threads(self) -> int:
        producers = 128 if self.consumers > 1 else 64
        return 128 * self.consumers + producers

    @property
    def shared_bytes(self) -> int:
        barriers = 16
        return self.stages * ((self.m + self.n) * self.k * 2 + barriers)

    @property
    def resident(self) -> int:
        """CTAs that a multiprocessor holds. One with several consumers takes all its registers."""
        return 1 if self.consumers > 1 else resident_ctas(self.shared_bytes)

    @property
    def producer_registers(self) -> int:
        """Of a producer's thread beside two consumers, which get the rest. Tiles in many slabs take more."""
        return 40 if self.m == 256 and self.n % SLAB else 24

    def takes(self, b_k_contiguous: bool) -> bool:
        """Whether it is for a b that lies so: where tiles of b are walked along n, lines of 16 bytes are slow."""
        return b_k_contiguous or self.consumers == 1 or self.n % 32 == 0

    def grid(self, tiles: int, multiprocessors: int) -> int:
        """CTAs to launch: as many as run at once. Clusters of more than two may not fill every part of the GPU; there,
        one for each tile, and the GPU places them as others end.
        """
        if self.cluster <= 2:
            tiles = min(tiles, max(1, multiprocessors * self.resident // self.cluster))
        return tiles * self.cluster

    def kernel(self, source: str, dtype: str, a_k_contiguous: bool, b_k_contiguous: bool) -> Kernel:
        return Kernel(
            source,
            (
                ("ELEMENT", C_TYPE[dtype]),
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("STAGES", self.stages),
                ("CONSUMERS", self.consumers),
                ("CLUSTER_M", self.cluster_m),
                ("CLUSTER_N", self.cluster_n),
                ("CTAS", self.resident),
                ("PRODUCER_REGISTERS", self.producer_registers),
                ("A_K_CONTIGUOUS", int(a_k_contiguous)),
                ("B_K_CONTIGUOUS", int(b_k_contiguous)),
            ),
        )

    def tiles(self, m: int, n: int) -> tuple[int, int]:
        """How many clusters an m x n matrix takes along each of its dimensions."""
        return -(-m // (self.m * self.cluster_m)), -(-n // (self.n * self.cluster_n))


SCHEDULES = (
    # One warpgroup, few rows or columns: for products that read much more than they compute.
    Schedule(8, 8, 512, 6),
    Schedule(16, 8, 512, 6),
    Schedule(16, 16, 512, 6),
    Schedule(32, 8, 256, 9),
    Schedule(32, 8, 256, 9, 1, 1, 2),
    Schedule(32, 16, 256, 8),
    Schedule(32, 32, 256, 6),
    Schedule(48, 8, 256, 7),
    Schedule(48, 16, 256, 6),
    Schedule(48, 64, 256, 3),
    Schedule(64, 8, 256, 5),
    Schedule(64, 8, 256, 5, 1, 1, 2),
    Schedule(64, 16, 256, 4),
    Schedule(64, 32, 128, 9),
    Schedule(64, 32, 128, 9, 1, 1, 2),
    Schedule(128, 8, 128, 6),
    Schedule(128, 32, 128, 5),
    Schedule(192, 16, 128, 4),
    Schedule(192, 32, 64, 7),
    Schedule(192, 64, 64, 6),
    # Several CTAs on a multiprocessor: for short chains, of which most time goes into the ends.
    Schedule(64, 64, 64, 6),
    Schedule(64, 128, 64, 4),
    # One warpgroup, 64 rows.
    Schedule(64, 64, 128, 7),
    Schedule(64, 96, 128, 5),
    Schedule(64, 128, 64, 9),
    Schedule(64, 256, 64, 5),
    # Two warpgroups: for products that compute. The many widths are for the numbers of rows that serving has.
    Schedule(128, 64, 64, 9, 2),
    Schedule(128, 64, 64, 9, 2, 1, 2),
    Schedule(128, 72, 64, 9, 2),
    Schedule(128, 96, 64, 8, 2),
    Schedule(128, 104, 64, 7, 2),
    Schedule(128, 120, 64, 7, 2),
    Schedule(128, 128, 64, 7, 2),
    Schedule(128, 144, 64, 6, 2),
    Schedule(128, 152, 64, 6, 2),
    Schedule(128, 160, 64, 6, 2),
    Schedule(128, 176, 64, 5, 2),
    Schedule(128, 192, 64, 5, 2),
    Schedule(128, 192, 64, 5, 2, 2, 1),
    Schedule(128, 208, 64, 5, 2),
    Schedule(128, 224, 64, 5, 2),
    Schedule(128, 256, 64, 4, 2),
    Schedule(128, 256, 64, 4, 2, 2, 1),
    Schedule(256, 160, 64, 4, 2),
    Schedule(256, 160, 64, 4, 2, 1, 2),
    Schedule(256, 192, 64, 4, 2),
)


def fits(problem: Problem) -> bool:
    """Whether the kernels' counters hold the product: coordinates have a sign, and tiles may go past the end."""
    lengths = problem.m, problem.n, problem.k
    smallest = min(min(schedule.m, schedule.n) for schedule in SCHEDULES)
    tiles = problem.matrices * -(-problem.m // smallest) * -(-problem.n // smallest)
    return len(problem.batch) <= 2 and 0 < tiles < 2**31 and 0 < min(lengths) <= max(lengths) < 2**31 - 2**16


def takes(problem: Problem) -> bool:
    """Whether the TMA can bring the operands, wherever they lie aligned."""
    return fits(problem) and all(
        _brought(strides, length, problem.k)
        and all(0 <= stride < STRIDES and stride % ELEMENTS == 0 for stride in batch)
        for strides, length, batch in (
            (problem.a, problem.m, problem.batch_a),
            (problem.b, problem.n, problem.batch_b),
        )
    )


def _brought(strides: tuple[int, int], length: int, k: int) -> bool:
    """Whether the TMA can bring a matrix of length x k: one of its strides is 1, and lines do not overlap."""
    line, inner = max(strides), k if along_k(strides) else length
    return min(strides) == 1 and inner <= line < STRIDES and line % ELEMENTS == 0


class Choice(NamedTuple):
    """How a product is computed."""

    schedule: Schedule
    swap: bool
    """Whether the transposed product is computed."""
    early: bool
    """Whether the next kernel's CTAs may start, and bring lines to the L2, while this one ends. It helps where memory
    limits; where products do, all CTAs had better start at once, in order, so that neighbours load the same lines
    together.
    """
    band: int
    """Clusters along m that are walked before the next ones along n."""


def prepare(problem: Problem, choice: Choice, index: int, otherwise: Callable[[], MatmulLaunch]) -> MatmulLaunch:
    """A launch of that choice on device `index`.

    `otherwise` prepares the launch for operands whose addresses are not aligned.
    """
    schedule = choice.schedule
    if choice.swap:
        problem = problem.swap()
    along = along_k(problem.a), along_k(problem.b)
    kernel = schedule.kernel("matmul_wgmma.cu", problem.dtype, *along)
    a_maps, of_a = _maps(problem, schedule, along[0], "a")
    b_maps, of_b = _maps(problem, schedule, along[1], "b")
    ahead = _ahead(problem, schedule, choice.early)
    shared_parameters, tiles = parameters(problem, schedule, choice.early, choice.band)
    function = load(kernel, "matmul_wgmma", index, schedule.shared_bytes)
    pointers = (ADDRESS,) * 4
    run = shaped(
        function,
        schedule.grid(tiles, gpu(index).multiprocessors),
        schedule.threads,
        schedule.shared_bytes,
        (TENSOR_MAP, TENSOR_MAP, of_a, of_b, ahead, shared_parameters, *pointers, FLOAT32, FLOAT32),
        cluster=schedule.cluster,
        overlapping=True,
    )
    swapped, unaligned = problem.swapped, functools.cache(otherwise)

    def launch(stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0) -> None:
        if (a | b) % ALIGNMENT:
            unaligned()(stream, out, a, b, c, alpha, beta)
            return
        if swapped:
            a, b = b, a
        run(stream, a_maps[a], b_maps[b], out, c, a, b, alpha, beta)

    return launch


def parameters(problem: Problem, schedule: Schedule, early: bool, band: int) -> tuple[Any, int]:
    """The struct `Wgmma`, and how many clusters' tiles it stands for."""
    tiles_m, tiles_n = schedule.tiles(problem.m, problem.n)
    p = np.zeros((), PARAMETERS)
    p["c_stride"], p["out_stride"] = problem.c, problem.out
    p["c_batch"], p["out_batch"] = last_two(problem.batch_c), last_two(problem.batch_out)
    p["m"], p["n"], p["steps"] = problem.m, problem.n, -(-problem.k // schedule.k)
    p["last_m"], p["last_n"] = _last_tiles(problem, schedule)
    p["tiles_m"], p["tiles_n"], p["tiles"] = tiles_m, tiles_n, tiles_m * tiles_n * problem.matrices
    p["band"] = min(tiles_m, band)
    p["batch"] = (1, *problem.batch)[-1]
    p["addend"] = problem.c_dtype is not None
    p["c_dtype"] = DTYPE_CODE[problem.c_dtype or problem.out_dtype]
    p["out_dtype"] = DTYPE_CODE[problem.out_dtype]
    p["vectors"] = _vectors(problem)
    p["early"] = early
    return p, int(p["tiles"])


def _last_tiles(problem: Problem, schedule: Schedule) -> list[int]:
    """Where the last tile along m and along n may begin at the latest.

    An addend may be the result itself, unless it is broadcast; then nothing is computed twice. Of an operand that is
    contiguous along m or n the TMA takes elements from a multiple of `ELEMENTS` on.
    """
    is_broadcast = any(
        length > 1 and stride == 0 for length, stride in zip((problem.m, problem.n), problem.c, strict=True)
    )
    may_be_result = problem.c_dtype is not None and not is_broadcast
    last = []
    for length, tile, strides in ((problem.m, schedule.m, problem.a), (problem.n, schedule.n, problem.b)):
        begin = max(0, length - tile)
        step = 1 if along_k(strides) else ELEMENTS
        last.append(ANYWHERE if may_be_result else -(-begin // step) * step)
    return last


def _vectors(problem: Problem) -> int:
    """Along which dimension 16 bytes of the result can be written at once."""
    if problem.out_dtype == problem.dtype:
        row, column = problem.out
        for code, inner, outer, length in (
            (VECTORS_ALONG_N, column, row, problem.n),
            (VECTORS_ALONG_M, row, column, problem.m),
        ):
            if inner == 1 and all(stride % ELEMENTS == 0 for stride in (outer, length, *problem.batch_out)):
                return code
    return NO_VECTORS


def _ahead(problem: Problem, schedule: Schedule, early: bool) -> Any:
    """The struct `Ahead`: the larger operand of a single product, which is the one that the L2 does not have yet."""
    ahead = np.zeros((), AHEAD)
    is_b = problem.n > problem.m
    length, tile, strides = (problem.n, schedule.n, problem.b) if is_b else (problem.m, schedule.m, problem.a)
    ahead["line"], ahead["rows"], ahead["depth"], ahead["is_b"] = max(strides), length, problem.k, is_b
    if early and problem.matrices == 1:
        ahead["steps"] = min(schedule.stages, max(1, AHEAD_BYTES // (tile * schedule.k * 2)))
    return ahead


def _maps(problem: Problem, schedule: Schedule, k_contiguous: bool, operand: str) -> tuple[TensorMaps, Any]:
    """How the TMA reads an operand, and the struct `Brought`.

    The dimensions are the contiguous one, the other one, and the batch's two.
    """
    if operand == "a":
        length, strides, batch, tile, sharers = problem.m, problem.a, problem.batch_a, schedule.m, schedule.cluster_n
    else:
        length, strides, batch, tile, sharers = problem.n, problem.b, problem.batch_b, schedule.n, schedule.cluster_m
    if k_contiguous:
        inner, outer, width = problem.k, length, SLAB
        lines = min(tile, length) if sharers == 1 else tile
        pieces = schedule.k // width
    else:
        inner, outer, width, lines = length, problem.k, math.gcd(tile, SLAB), schedule.k
        pieces = tile // width
    itemsize, narrowest_swizzle = 2, 32
    steps, lengths = last_two(batch), (1, 1, *problem.batch)[-2:]
    shape = (inner, outer, *(length if step else 1 for length, step in zip(lengths, steps, strict=True)))
    strides_bytes = tuple(max(step * itemsize, ALIGNMENT) for step in (max(strides), *steps))
    swizzle = width * itemsize
    maps = TensorMaps(
        problem.dtype,
        shape,
        strides_bytes,
        (width, min(lines // sharers, LONGEST_BOX), 1, 1),
        swizzle if swizzle >= narrowest_swizzle else 0,
    )
    brought = np.zeros((), BROUGHT)
    brought["batch"], brought["bytes"] = [step != 0 for step in steps], pieces * lines * width * itemsize
    return maps, brought


def last_two(batch: tuple[int, ...]) -> tuple[int, int]:
    """Values along the two dimensions of the batch that the kernel knows."""
    outer, inner = (0, 0, *batch)[-2:]
    return outer, inner


def instances(compute_capability: int, source: str, schedules: Iterable[Schedule]) -> Iterator[Kernel]:
    """A source's kernels for these schedules, on GPUs that have wgmma."""
    major, minor = COMPUTE_CAPABILITY
    if compute_capability != 10 * major + minor:
        return
    for dtype in sorted({dtype for kind in ARITHMETIC.values() if kind.is_tensor_core for dtype in kind.covers}):
        for schedule in schedules:
            for a_k_contiguous in (True, False):
                for b_k_contiguous in filter(schedule.takes, (True, False)):
                    yield schedule.kernel(source, dtype, a_k_contiguous, b_k_contiguous)


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel that may be launched on a GPU of this compute capability (90 for 9.0)."""
    return instances(compute_capability, "matmul_wgmma.cu", SCHEDULES)
