"""The time of a product's chain of additions on this GPU, launch included, however little data there is."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from types import SimpleNamespace

import cupy
import numpy as np
import torch
from timing import alternate, capture

from bikernels.contract import ARITHMETIC

CALLS = 64
GROUP = ARITHMETIC["tc16f25"].group


@functools.cache
def _kernel() -> cupy.cuda.Function:
    return cupy.RawKernel(Path(__file__).with_suffix(".cu").read_text(), "chain").kernel


@functools.cache
def measured_us(k: int) -> float:
    """Microseconds of a kernel of K / 16 dependent tensor-core instructions, in a graph of equal ones."""
    out = torch.empty(32, device="cuda")
    arguments = (np.int32(-(-k // GROUP)), np.uint32(0), out.data_ptr())

    def call() -> None:
        stream = SimpleNamespace(ptr=torch.cuda.current_stream().cuda_stream)
        _kernel()((1, 1, 1), (32, 1, 1), arguments, 0, stream)

    call()
    return statistics.median(alternate({"": capture([call] * CALLS)}, CALLS)[""])
