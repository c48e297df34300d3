"""Elementwise functions: fills the kernel's parameters, and picks the kernel and its launch shape."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ...contract import ACCUMULATE
from ...specs import ELEMENTWISE, ElementwiseSpec, contiguous_strides
from ...views import Device
from .. import ElementwiseLaunch
from .compile import Kernel
from .parameters import ANY, C_TYPE, DTYPE_CODE, c_type, fill_dims
from .parameters import ELEMENTWISE as PARAMETERS

_BINARY = frozenset(name for name in ELEMENTWISE if name == "pow" or name.endswith("backward"))
_THREADS, _WIDTH, _CTAS_PER_MULTIPROCESSOR = 256, 8, 8


def _kernel(operation: str, element: str, accumulate: str, binary: bool) -> Kernel:
    """The kernel of elementwise.cu."""
    return Kernel(
        "elementwise.cu",
        (
            ("OPERATION", "".join(part.capitalize() for part in operation.split("_"))),
            ("ELEMENT", c_type(element)),
            ("ACCUMULATE", C_TYPE[accumulate]),
            ("BINARY", str(binary).lower()),
        ),
    )


def kernels() -> Iterator[Kernel]:
    """Every kernel of the elementwise functions."""
    for element, accumulate in (*ACCUMULATE.items(), (ANY, "float32"), (ANY, "float64")):
        for operation in ELEMENTWISE:
            yield _kernel(operation, element, accumulate, operation in _BINARY)
        yield _kernel("pow", element, accumulate, False)


def prepare(spec: ElementwiseSpec, device: Device) -> ElementwiseLaunch:
    """See `bikernels.backend.Backend.prepare_elementwise`."""
    from .launch import ADDRESS, FIRST_WITH_CLUSTERS, FLOAT64, gpu, load, shaped

    layouts = [spec.out, spec.x, spec.y or spec.x]
    shape, accumulate = spec.out.shape, ACCUMULATE[spec.out.dtype]
    same = all(layout.dtype == spec.out.dtype for layout in layouts)
    kernel = _kernel(spec.operation, spec.out.dtype if same else ANY, accumulate, spec.y is not None)
    parameters = np.zeros((), PARAMETERS)
    parameters["count"], parameters["dims_count"] = math.prod(shape), len(shape)
    parameters["is_flat"] = all(layout.strides == contiguous_strides(shape) for layout in layouts)
    parameters["dtype"] = [DTYPE_CODE[layout.dtype] for layout in layouts]
    fill_dims(parameters["dims"], shape, *(layout.strides for layout in layouts))
    most = gpu(device.index).multiprocessors * _CTAS_PER_MULTIPROCESSOR
    run = shaped(
        load(kernel, "apply_elementwise", device.index),
        max(1, min(-(-math.prod(shape) // (_THREADS * _WIDTH)), most)),
        _THREADS,
        0,
        (parameters, FLOAT64, FLOAT64, ADDRESS, ADDRESS, ADDRESS),
        overlapping=gpu(device.index).compute_capability >= FIRST_WITH_CLUSTERS,
    )

    def launch(stream: int, out: int, x: int, y: int = 0, a: float = 0.0, b: float = 0.0) -> None:
        run(stream, a, b, out, x, y)

    return launch
