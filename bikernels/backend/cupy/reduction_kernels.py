"""Every CUDA C++ kernel of the reductions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ...contract import ACCUMULATE, ITEMSIZE, SUM_CHUNK, SUM_LANES
from .column_schedules import (
    PASSES,
    SHORT_TILE_OPERATIONS,
    TileSchedule,
    WeightSchedule,
    arrays_of,
    column_chunk_kernel,
    column_kernel,
    short_kernel,
    short_tile_kernel,
    tall_kernel,
    tile_kernel,
    weight_kernel,
)
from .compile import Kernel
from .launch import FIRST_WITH_CLUSTERS
from .parameters import ANY
from .reduction_operations import (
    COLUMN_OPERATIONS,
    ELEMENTS,
    OPERATIONS,
    SINGLE_COLUMN_OPERATIONS,
    SPLIT,
    TERMS,
    WEIGHT_GRADIENTS,
    vector_width,
)
from .row_schedules import (
    CLUSTER,
    CTA,
    LANES,
    LONG_OPERATIONS,
    LONG_ROW,
    LONG_SOFTMAX,
    OCTETS,
    REGISTER_OPERATIONS,
    SOFTMAX_THREADS,
    WARP_STEPS,
    Steps,
    chunk_kernel,
    has_ring_kernel,
    long_kernel,
    register_kernel,
    register_schedules,
    ring_kernel,
    row_kernel,
    softmax_kernel,
    widened_to,
)

STEPS = [Steps(multiple, are_alike) for multiple in (16, 4, 2, 1) for are_alike in (True, False)]
"""Of rows in registers, of which kernels differ."""


def kernels(compute_capability: int) -> Iterator[Kernel]:
    """Every kernel of the reductions that can be launched on a GPU of this compute capability (90 for 9.0)."""
    has_clusters = compute_capability >= 10 * FIRST_WITH_CLUSTERS[0]
    found: dict[Kernel, None] = {}
    for element, accumulate in (*ACCUMULATE.items(), (ANY, "float32"), (ANY, "float64")):
        for source in ("row_chunks.cu", "softmax_split_rows.cu"):
            found[chunk_kernel(source, element, accumulate)] = None
        for operation in TERMS:
            found[column_chunk_kernel(operation, element, accumulate)] = None
        for operation in filter(SINGLE_COLUMN_OPERATIONS.__contains__, OPERATIONS):
            for in_cluster in (False, True) if has_clusters else (False,):
                found[column_kernel(operation, element, accumulate, in_cluster)] = None
        for operation in filter(REGISTER_OPERATIONS.__contains__, OPERATIONS):
            ends = (SUM_LANES, WARP_STEPS * SUM_LANES, SUM_CHUNK, LONG_ROW, 2 * LONG_ROW)
            lengths = (1, *ends, *(end - vector_width(element) for end in ends))
            for n, steps in itertools.product(lengths, STEPS) if element in ELEMENTS else ():
                for schedule in register_schedules(operation, n, element, steps):
                    found[register_kernel(operation, element, schedule)] = None
        if has_clusters and element in ELEMENTS:
            for operation in filter(LONG_OPERATIONS.__contains__, OPERATIONS):
                for is_narrow in (False, True):
                    found[long_kernel(operation, element, is_narrow)] = None
            for operation in filter(LONG_SOFTMAX.__contains__, OPERATIONS) if ITEMSIZE[element] == 2 else ():
                for most_threads in SOFTMAX_THREADS:
                    found[softmax_kernel(operation, element, most_threads)] = None
            if compute_capability < 120:  # of which a CTA has less shared memory
                found[tall_kernel(element)] = None
        if element != ANY:
            for operation in filter(COLUMN_OPERATIONS.__contains__, OPERATIONS):
                one = TileSchedule(vector_width(element), 1, 1, 1, False, False, arrays_of(operation))
                ways = [one._replace(keeps=keeps, spread=spread) for keeps in (False, True) for spread in (False, True)]
                if operation in TERMS:
                    found[tile_kernel(operation, element, accumulate, one, of_chunks=True)] = None
                for out_dtype in (element, accumulate):
                    for way in ways if PASSES[operation] > 1 else ways[:1]:
                        found[tile_kernel(operation, element, out_dtype, way)] = None
                    found[short_kernel(operation, element, out_dtype)] = None
                if operation in WEIGHT_GRADIENTS:
                    width = vector_width(element)
                    for columns, streams in ((1, False), (width, False), (width, True)):
                        found[weight_kernel(operation, element, WeightSchedule(columns, 8, 4, streams))] = None
                if operation in SHORT_TILE_OPERATIONS:
                    found[short_tile_kernel(operation, element, accumulate)] = None
        for operation in OPERATIONS:
            for out_dtype in ELEMENTS:
                if compute_capability == 90 and has_ring_kernel(operation, element, out_dtype):
                    found[ring_kernel(operation, element, out_dtype)] = None
                if ACCUMULATE[out_dtype] == accumulate and element in (ANY, out_dtype, *widened_to(out_dtype)):
                    for team in (LANES, CTA, CLUSTER) if has_clusters else (LANES, CTA):
                        found[row_kernel(operation, element, out_dtype, team)] = None
                    found[row_kernel(operation, element, out_dtype, LANES, octets=OCTETS)] = None
                    if operation not in SPLIT:
                        team = CLUSTER if has_clusters else CTA
                        found[row_kernel(operation, element, out_dtype, team, keeps=False)] = None
    yield from found
