"""Matrix products: fills the kernels' parameters and picks a schedule."""

from __future__ import annotations

import math

import numpy as np

from ...contract import ACCUMULATE, ARITHMETIC
from ...specs import Layout, MatmulSpec
from ...views import Device, View
from .. import MatmulLaunch
from . import schedules
from .launch import Stream, gpu, load, on_device, shaped
from .parameters import DTYPE_CODE, MATMUL, by_value, divisor, fill_dims

_SCALAR = {"float32": np.float32, "float64": np.float64}


def prepare(spec: MatmulSpec, device: Device) -> MatmulLaunch:
    """See `bikernels.backend.Backend.prepare_matmul`."""
    m, n, k = spec.mnk
    a, b = _operand(spec.a, (-2, -1)), _operand(spec.b, (-1, -2))
    out = spec.out.strides[-2:]
    c = spec.c.strides[-2:] if spec.c else (0, 0)
    batch_a, batch_b = spec.a.strides[:-2], spec.b.strides[:-2]
    swap = n > m  # the transposed product has the same bits, and tiles are made for a long m
    if swap:
        m, n, a, b, batch_a, batch_b = n, m, b, a, batch_b, batch_a
        out, c = out[::-1], c[::-1]

    matrices = math.prod(spec.batch)
    multiprocessors = gpu(device.index).multiprocessors
    tile: schedules.MmaTile | schedules.FmaTile
    if ARITHMETIC[spec.arithmetic].is_tensor_core:
        tile = schedules.choose_mma_tile(m, n, matrices, multiprocessors)
        kernel, name = tile.kernel(spec.a.dtype, _along_k(a), _along_k(b)), "matmul_mma"
    else:
        tile = schedules.choose_fma_tile(m, n, matrices, multiprocessors, spec.a.dtype)
        kernel, name = tile.kernel(spec.a.dtype), "matmul_fma"
    tiles = schedules.tiles_of(m, n, tile)

    parameters = np.zeros((), MATMUL)
    parameters["m"], parameters["n"], parameters["k"] = m, n, k
    parameters["a_stride"], parameters["b_stride"] = a, b
    parameters["a_along_k"], parameters["b_along_k"] = _along_k(a), _along_k(b)
    parameters["c_stride"], parameters["out_stride"] = c, out
    parameters["addend"] = spec.c is not None
    parameters["c_dtype"] = DTYPE_CODE[spec.c.dtype] if spec.c else 0
    parameters["out_dtype"] = DTYPE_CODE[spec.out.dtype]
    parameters["tiles"] = tiles * matrices
    parameters["tiles_of_matrix"] = divisor(tiles)
    parameters["tiles_of_band"] = divisor(schedules.BAND * -(-n // tile.n))
    parameters["batch_dims"] = len(spec.batch)
    batch_c = spec.c.strides[:-2] if spec.c else (0,) * len(spec.batch)
    fill_dims(parameters["batch"], spec.batch, batch_a, batch_b, batch_c, spec.out.strides[:-2])

    arguments = by_value(parameters)
    function = load(kernel, name, device.index, tile.shared_bytes)
    run = shaped(function, tiles * matrices, tile.threads, tile.shared_bytes)
    scalar = _SCALAR[ACCUMULATE[spec.a.dtype]]

    def launch(out: View, c: View | None, a: View, b: View, alpha: float, beta: float) -> None:
        if swap:
            a, b = b, a
        c_pointer = 0 if c is None else c.pointer
        run(Stream(out.stream), arguments, out.pointer, c_pointer, a.pointer, b.pointer, scalar(alpha), scalar(beta))

    return on_device(device.index, launch)


def _operand(layout: Layout, axes: tuple[int, int]) -> tuple[int, int]:
    """Strides along (m or n) and k. An axis of one element has no stride; it gets the one that suits vectors."""
    (mn, k), (mn_length, k_length) = (layout.strides[axis] for axis in axes), (layout.shape[axis] for axis in axes)
    return (mn if mn_length != 1 else _rounded_up(k_length)), (k if k_length != 1 else _rounded_up(mn_length))


def _rounded_up(length: int) -> int:
    return -(-length // 8) * 8


def _along_k(strides: tuple[int, int]) -> bool:
    """Whether an operand is read along k, else along m or n."""
    mn, k = strides
    return k == 1 or (mn != 1 and abs(k) <= abs(mn))
