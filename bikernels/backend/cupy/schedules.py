"""What decides the speed of reductions and no bit: launch shapes, and which kernel takes which layout.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...contract import ACCUMULATE, SUM_CHUNK, SUM_LANES
from .compile import Kernel
from .parameters import C_TYPE

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


def reduction_kernels() -> Iterator[Kernel]:
    """Every kernel of the reductions that can be launched."""
    for source in REDUCTION_SOURCES:
        yield from {
            reduction_kernel(source, x_dtype, accumulate): None
            for x_dtype in (*ROW_ELEMENTS, "int64")
            for accumulate in ("float32", "float64")
        }
