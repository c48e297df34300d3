"""Tensor maps: what a kernel's bulk tensor copies (TMA) need to know of an operand, 128 bytes each, by value."""

from __future__ import annotations

import ctypes
from typing import Any

from ...contract import ITEMSIZE
from . import driver

BYTES = 128
_ALIGNMENT = 64
ADDRESS_ALIGNMENT = 16
"""Of an operand, in bytes."""

# Values of the driver's enumerations (cuda.h).
_DTYPE = {"float16": 6, "float32": 7, "float64": 8, "bfloat16": 9}
_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
_NOT_INTERLEAVED = 0
_PROMOTION_TO_256_BYTES = 3
_ZEROS_OUTSIDE = 0


class TensorMaps(dict[int, bytes]):
    """Address -> tensor maps, for operands that differ in nothing else: `maps[view.pointer]`. They are kept.

    Dimensions are in the driver's order, the contiguous one first.

    One map takes an address and strides that are multiples of 16 bytes. For other addresses and distances of the lines
    (the second dimension), `parts` maps hold every parts-th line each. Such a map begins at the multiple of 16 bytes at
    or before its first element, so that coordinates along the first dimension are that many elements higher.

    Args:
        dtype: "bfloat16", "float16", "float32" or "float64".
        shape: elements of each dimension, 1 to 5 of them.
        strides: bytes between neighbours along each dimension but the first; multiples of 16, that of the lines only
            when multiplied by `parts`.
        box: elements that a copy takes along each dimension, at most 256; the first of them a multiple of 16 bytes and,
            where there is a swizzle, at most its width.
        swizzle: width in bytes, 0, 32, 64 or 128.
        parts: maps for an address; there are no fewer lines.

    Copies are rounded up to 256 bytes in the L2; elements outside of the operand are zeros.

    Raises:
        RuntimeError: at the look-up, if the driver takes no such map (the address must be a multiple of 16).
    """

    LIMIT = 1024
    """Maps that are kept."""

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
        swizzle: int,
        parts: int = 1,
    ) -> None:
        super().__init__()
        rank = len(shape)
        self._dtype, self._shape, self._parts, self._line = dtype, shape, parts, strides[0]
        steps = (ctypes.c_uint64 * max(1, rank - 1))(strides[0] * parts, *strides[1:])
        boxes, ones = (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*(1,) * rank)
        self._after: tuple[Any, ...] = (
            steps,
            boxes,
            ones,
            _NOT_INTERLEAVED,
            _SWIZZLE[swizzle],
            _PROMOTION_TO_256_BYTES,
            _ZEROS_OUTSIDE,
        )

    def __missing__(self, pointer: int) -> bytes:
        encoded = b"".join(self._encoded(pointer, part) for part in range(self._parts))
        if len(self) >= self.LIMIT:
            self.clear()
        self[pointer] = encoded
        return encoded

    def _encoded(self, pointer: int, part: int) -> bytes:
        inner, lines, *batch = self._shape
        begin = pointer + part * self._line
        early = begin % ADDRESS_ALIGNMENT if self._parts > 1 else 0
        lines_of_part = -(-(lines - part) // self._parts)
        rank = len(self._shape)
        dims = (ctypes.c_uint64 * rank)(inner + early // ITEMSIZE[self._dtype], lines_of_part, *batch)
        memory = driver.aligned(BYTES, _ALIGNMENT)
        address = driver.POINTER(begin - early)
        driver.call("cuTensorMapEncodeTiled", memory, _DTYPE[self._dtype], rank, address, dims, *self._after)
        return bytes(memory)
