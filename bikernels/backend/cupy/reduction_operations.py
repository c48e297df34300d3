"""The reductions' names and kinds, and what the choices of schedules for rows and for columns have in common."""

from __future__ import annotations

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK
from .launch import FIRST_WITH_CLUSTERS, GPU, PORTABLE_CTAS
from .parameters import ANY

GROUP_LANES = 8
"""Neighbouring lanes of the tree that a thread sums."""

ELEMENTS = ("bfloat16", "float16", "float32", "float64")

OPERATIONS = {
    "sum": "Mean",  # by 1
    "mean": "Mean",
    "var": "Variance",
    "std": "Variance",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "logsumexp": "LogSumExp",
    "softmax_backward": "SoftmaxBackward",
    "log_softmax_backward": "LogSoftmaxBackward",
    "rms_norm": "RmsNorm",
    "layer_norm": "LayerNorm",
    "rms_norm_backward": "RmsNormBackward",
    "layer_norm_backward": "LayerNormBackward",
    "rms_norm_weight_backward": "RmsNormWeightBackward",
    "layer_norm_weight_backward": "LayerNormWeightBackward",
}
"""The operations, and the structs in rows.cu and columns.cu that compute them."""

COLUMN_OPERATIONS = frozenset(
    {
        *("sum", "mean", "var", "std", "softmax", "log_softmax", "logsumexp"),
        *("softmax_backward", "log_softmax_backward", "rms_norm_weight_backward", "layer_norm_weight_backward"),
    }
)
"""Those that have kernels for columns."""

SUMS = frozenset(("sum", "mean"))

VARIANCES = frozenset(("var", "std"))

TERMS = {"sum": 0, "mean": 0, "rms_norm_weight_backward": 1, "layer_norm_weight_backward": 2}
"""The operations that are a sum along a column, and of what (column_chunks.cu)."""

WEIGHT_GRADIENTS = frozenset(TERMS) - SUMS

SOFTMAX_GRADIENTS = frozenset(("softmax_backward", "log_softmax_backward"))

COLUMN_GRADIENTS = WEIGHT_GRADIENTS | SOFTMAX_GRADIENTS
"""Which read the gradient of the result beside x."""

SINGLE_COLUMN_OPERATIONS = COLUMN_OPERATIONS - SOFTMAX_GRADIENTS
"""Those that columns.cu has."""

EXPONENTIALS = frozenset(("softmax", "log_softmax", "logsumexp"))
"""Their kernels differ by the result's dtype."""

SPLIT = SUMS | {"softmax", "log_softmax"}
"""Operations that may be spread over the GPU chunk by chunk."""

MAX_CTAS, MOST_CTAS = PORTABLE_CTAS, 16
"""Of a cluster; the second, where it can be had, of rows that fit no other."""

RING_CAPABILITY = (9, 0)
"""The compute capability that rows_ring.cu and clusters of 16 CTAs are for."""

CTA_BYTES = 1024
"""Of shared memory, that the system takes for each CTA."""


def chunks_of(n: int) -> int:
    """Chunks of a row of n elements."""
    return -(-n // SUM_CHUNK)


def cluster_sizes(device: GPU) -> tuple[int, ...]:
    """CTAs of a cluster, as far as every GPU with clusters has them."""
    return (1, 2, 4, MAX_CTAS) if device.compute_capability >= FIRST_WITH_CLUSTERS else (1,)


def teams(rows: int, resident: int) -> int:
    """How many teams take the rows; `resident`: how many work at a time."""
    return min(rows, resident)


def vector_width(element: str) -> int:
    """Columns of a 16-byte vector."""
    return 1 if element == ANY else 16 // ITEMSIZE[element]


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def element_of(x_dtype: str, accumulate: str, rounds: bool) -> str:
    """As what x is read: its dtype, if that accumulates so and is not rounded first; else ANY."""
    return x_dtype if x_dtype in ELEMENTS and ACCUMULATE[x_dtype] == accumulate and not rounds else ANY
