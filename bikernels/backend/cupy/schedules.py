"""What decides speed and no bit: tiles, launch shapes, and which kernel takes which layout.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...contract import ACCUMULATE, ARITHMETIC, SUM_CHUNK, SUM_LANES
from .compile import Kernel

C_TYPE = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float", "float64": "double"}

# ----------------------------------------------------------------------------------------------------- matrix products


BAND = 8
"""Tiles along m that are walked before the next step along n: CTAs that run together share operands in the L2."""


class MmaTile(NamedTuple):
    """A schedule of matmul_mma.cu."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.m + self.n) * self.k * 2

    def kernel(self, dtype: str, a_k_contiguous: bool, b_k_contiguous: bool) -> Kernel:
        return Kernel(
            "matmul_mma.cu",
            (
                ("ELEMENT", C_TYPE[dtype]),
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("WARPS_M", self.warps_m),
                ("WARPS_N", self.warps_n),
                ("STAGES", self.stages),
                ("CTAS", self.ctas),
                ("A_K_CONTIGUOUS", int(a_k_contiguous)),
                ("B_K_CONTIGUOUS", int(b_k_contiguous)),
                ("MATMUL_BAND", BAND),
            ),
        )


class FmaTile(NamedTuple):
    """A schedule of matmul_fma.cu."""

    m: int
    n: int
    k: int
    thread_m: int
    thread_n: int
    ctas: int
    """That a multiprocessor should hold, which bounds a thread's registers."""

    @property
    def threads(self) -> int:
        return self.m // self.thread_m * (self.n // self.thread_n)

    @property
    def shared_bytes(self) -> int:
        return 0  # static

    def kernel(self, dtype: str) -> Kernel:
        return Kernel(
            "matmul_fma.cu",
            (
                ("ELEMENT", C_TYPE[dtype]),
                ("ACCUMULATE", C_TYPE[ACCUMULATE[dtype]]),
                ("TILE_M", self.m),
                ("TILE_N", self.n),
                ("TILE_K", self.k),
                ("THREAD_M", self.thread_m),
                ("THREAD_N", self.thread_n),
                ("CTAS", self.ctas),
                ("MATMUL_BAND", BAND),
            ),
        )


# Ascending in n, the last two for products that are large in both directions.
MMA_TILES = (
    MmaTile(32, 16, 128, 2, 1, 6, 3),
    MmaTile(64, 32, 128, 4, 1, 4, 2),
    MmaTile(32, 64, 128, 2, 2, 4, 2),
    MmaTile(64, 64, 128, 2, 2, 3, 2),
    MmaTile(128, 128, 64, 2, 2, 3, 2),
)
FMA32_TILES = (FmaTile(32, 8, 64, 2, 1, 3), FmaTile(64, 64, 16, 4, 4, 3), FmaTile(128, 128, 16, 8, 8, 1))
FMA64_TILES = (FmaTile(32, 8, 32, 2, 1, 4), FmaTile(64, 64, 16, 4, 4, 2))


def fma_tiles(dtype: str) -> tuple[FmaTile, ...]:
    """The schedules of matmul_fma.cu for operands of that dtype."""
    return FMA64_TILES if ACCUMULATE[dtype] == "float64" else FMA32_TILES


def tiles_of(m: int, n: int, tile: MmaTile | FmaTile) -> int:
    """How many tiles an m x n product takes."""
    return -(-m // tile.m) * -(-n // tile.n)


def choose_mma_tile(m: int, n: int, matrices: int, multiprocessors: int) -> MmaTile:
    """The tile for a product whose longer side is m."""
    *narrow, square, large = MMA_TILES
    for tile in narrow:
        if n <= tile.n:
            return tile
    return large if tiles_of(m, n, large) * matrices >= multiprocessors else square


def choose_fma_tile(m: int, n: int, matrices: int, multiprocessors: int, dtype: str) -> FmaTile:
    """The tile for a product whose longer side is m."""
    narrow, *wide = fma_tiles(dtype)
    if n <= 2 * narrow.n:
        return narrow
    for tile in reversed(wide):
        if tiles_of(m, n, tile) * matrices >= multiprocessors:
            return tile
    return wide[0]


# ---------------------------------------------------------------------------------------------------------- reductions

MAX_ROW_CHUNKS = SUM_CHUNK
"""Chunks of a row that one CTA may sum: their sums are one chunk of the next level."""

ROWS_PER_CTA = 4
"""Where a row is one warp's."""

SHORT_ROW = 1024
"""Elements that a warp can keep in registers."""

MIN_COLUMNS = 8
"""Neighbouring rows from which on lanes run over rows."""

MAX_COLUMN_CHUNKS = 32
"""The same where the lanes run over rows (columns.cuh)."""

ROW_ELEMENTS = ("bfloat16", "float16", "float32", "float64")
REDUCTION_SOURCES = (
    "mean_rows.cu",
    "mean_columns.cu",
    "softmax_rows.cu",
    "softmax_split_rows.cu",
    "softmax_columns.cu",
)


def reduction_kernel(source: str, x_dtype: str, accumulate: str) -> Kernel:
    """The kernel for x of that dtype: its own where it accumulates as its dtype does, else one for all dtypes."""
    own = x_dtype in ROW_ELEMENTS and ACCUMULATE[x_dtype] == accumulate
    return Kernel(
        source,
        (
            ("ELEMENT", C_TYPE[x_dtype] if own else "any_dtype"),
            ("ACCUMULATE", C_TYPE[accumulate]),
            ("SHORT_ROW", SHORT_ROW),
        ),
    )


def row_warps(n: int) -> int:
    """Warps for a row of n elements: one up to a chunk, else as many as share its chunks evenly, at most 16."""
    chunks = max(1, -(-n // SUM_CHUNK))
    rounds = -(-chunks // 16)
    return 1 if chunks == 1 else max(2, -(-chunks // rounds))


def splits_rows(rows: int, n: int, multiprocessors: int) -> bool:
    """Whether rows are spread over CTAs: there are too few of them for the GPU, and each is long."""
    return n > MAX_ROW_CHUNKS * SUM_CHUNK or (n >= 32 * SUM_CHUNK and rows < multiprocessors)


def column_warps(n: int) -> int:
    """Warps for rows side by side: a group of the tree's lanes each, at most 16."""
    return min(16, max(1, -(-min(n, SUM_LANES) // 8)))


def splits_columns(rows: int, n: int, multiprocessors: int, first: bool) -> bool:
    """Whether a mean along a strided axis is spread over CTAs, a chunk each; `first`: not yet, at the first level."""
    return n > MAX_COLUMN_CHUNKS * SUM_CHUNK or (first and n > SUM_CHUNK and -(-rows // 32) < 2 * multiprocessors)


# ------------------------------------------------------------------------------------------------------- every instance


def all_kernels(arch: str) -> Iterator[Kernel]:
    """Every kernel that can be launched on a GPU of this architecture."""
    capability = int("".join(filter(str.isdigit, arch)))
    if capability >= 80:
        tensor_core = sorted({dtype for kind in ARITHMETIC.values() if kind.is_tensor_core for dtype in kind.covers})
        for dtype in tensor_core:
            for mma in MMA_TILES:
                for a_k_contiguous in (True, False):
                    for b_k_contiguous in (True, False):
                        yield mma.kernel(dtype, a_k_contiguous, b_k_contiguous)
    for dtype in C_TYPE:
        for fma in fma_tiles(dtype):
            yield fma.kernel(dtype)
    for source in REDUCTION_SOURCES:
        yield from {
            reduction_kernel(source, x_dtype, accumulate): None
            for x_dtype in (*ROW_ELEMENTS, "int64")
            for accumulate in ("float32", "float64")
        }
