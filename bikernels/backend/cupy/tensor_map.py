"""Tensor maps: what a kernel's bulk tensor copies (TMA) need to know of an operand, 128 bytes by value."""

from __future__ import annotations

import ctypes
from typing import Any

from . import driver

BYTES = 128
_ALIGNMENT = 64

# Values of the driver's enumerations (cuda.h).
_DTYPE = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
_NOT_INTERLEAVED = 0
_PROMOTION_TO_128_BYTES = 2
_ZEROS_OUTSIDE = 0


class TensorMaps(dict[int, bytes]):
    """Address -> tensor map, for operands that differ in nothing else: `maps[address]`. It keeps what it has made.

    Dimensions are in the driver's order, the contiguous one first.

    Args:
        dtype: "bfloat16", "float16", "float32" or "float64".
        shape: elements of each dimension, 1 to 5 of them.
        strides: bytes between neighbours along each dimension but the first; multiples of 16.
        box: elements that a copy takes along each dimension, at most 256; the first of them a multiple of 16 bytes and,
            where there is a swizzle, at most its width.
        swizzle: width in bytes, 0, 32, 64 or 128.

    Copies are rounded up to 128 bytes in the L2; elements outside of the operand are zeros.

    Raises:
        RuntimeError: at the look-up, if the driver takes no such map (the address must be a multiple of 16).
    """

    LIMIT = 1024
    """Maps that are kept."""

    def __init__(
        self, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
    ) -> None:
        super().__init__()
        rank = len(shape)
        dims, steps = (ctypes.c_uint64 * rank)(*shape), (ctypes.c_uint64 * max(1, rank - 1))(*strides)
        boxes, ones = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank)
        self._before: tuple[Any, ...] = (_DTYPE[dtype], rank)
        self._after: tuple[Any, ...] = (
            dims,
            steps,
            boxes,
            ones,
            _NOT_INTERLEAVED,
            _SWIZZLE[swizzle],
            _PROMOTION_TO_128_BYTES,
            _ZEROS_OUTSIDE,
        )

    def __missing__(self, pointer: int) -> bytes:
        memory = driver.aligned(BYTES, _ALIGNMENT)
        driver.call("cuTensorMapEncodeTiled", memory, *self._before, driver.POINTER(pointer), *self._after)
        if len(self) >= self.LIMIT:
            self.clear()
        self[pointer] = encoded = bytes(memory)
        return encoded
