"""An array of any framework, described by where it lies.

`View` is all that the operations and the backends know of an array. `kinds.py` makes views of the frameworks' arrays; a
program that holds raw memory (an adapter for another framework, say) makes its own and passes it in place of an array.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .contract import ITEMSIZE
from .dtypes import STORAGE_DTYPE
from .specs import Layout


@dataclass(frozen=True, slots=True)
class Device:
    """Where memory lies: type "cpu" or "cuda", and the index of the GPU."""

    type: str
    index: int = 0

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"


CPU = Device("cpu")


class View:
    """An array in memory: address, layout, device. It owns nothing; `owner` keeps the memory alive.

    Args:
        pointer: address of the first element (of index 0 along every axis).
        dtype: a name of `contract.FLOAT_DTYPES` or `contract.INTEGER_DTYPES`.
        shape: length of each axis, in elements.
        strides: step of each axis, in elements; 0 and negative steps are allowed.
        device: where the memory lies.
        stream: handle of the CUDA stream on which the array is ready and results are wanted; 0 is the default stream.
        read_only: the memory must not be written.
        owner: any object that keeps the memory alive.
    """

    __slots__ = ("device", "dtype", "owner", "pointer", "read_only", "shape", "stream", "strides")

    def __init__(
        self,
        pointer: int,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        device: Device = CPU,
        *,
        stream: int = 0,
        read_only: bool = False,
        owner: Any = None,
    ) -> None:
        self.pointer = pointer
        self.dtype = dtype
        self.shape = shape
        self.strides = strides
        self.device = device
        self.stream = stream
        self.read_only = read_only
        self.owner = owner

    @property
    def layout(self) -> Layout:
        return Layout(self.dtype, self.shape, self.strides)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def extent(self) -> tuple[int, int]:
        """First address and one past the last that the array can touch; equal where it has no elements."""
        if self.size == 0:
            return self.pointer, self.pointer
        low = high = 0
        for length, stride in zip(self.shape, self.strides, strict=True):
            reach = (length - 1) * stride
            low, high = (low + reach, high) if reach < 0 else (low, high + reach)
        itemsize = ITEMSIZE[self.dtype]
        return self.pointer + low * itemsize, self.pointer + (high + 1) * itemsize

    def __repr__(self) -> str:
        return f"View({self.dtype}, shape={self.shape}, strides={self.strides}, device={self.device})"


class _ArrayInterface:
    def __init__(self, view: View, layout: Layout) -> None:
        storage = STORAGE_DTYPE[layout.dtype]
        self.owner = view
        self.__array_interface__ = {
            "version": 3,
            "data": (view.pointer, view.read_only),
            "typestr": storage.str,
            "shape": layout.shape,
            "strides": tuple(stride * storage.itemsize for stride in layout.strides),
        }


def as_numpy(view: View, layout: Layout | None = None) -> np.ndarray[Any, Any]:
    """The memory of `view` as a NumPy array of the given layout, without a copy; 16-bit floats appear as uint16.

    With memory of another device the array may be asked about addresses, and must not be read.
    """
    layout = layout or view.layout
    return np.asarray(_ArrayInterface(view, layout))


def share_memory(a: View, b: View) -> bool:
    """True if some element of `a` and some element of `b` have a byte in common."""
    if a.device != b.device:
        return False
    (a_low, a_high), (b_low, b_high) = a.extent(), b.extent()
    if a_low >= b_high or b_low >= a_high:
        return False
    try:  # the arrays interleave; NumPy solves for a common address (and reads no memory)
        return bool(np.shares_memory(as_numpy(a), as_numpy(b), max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(a: View) -> bool:
    """True if two indices of `a` may lead to one element (a broadcast axis, say)."""
    reach = 0
    for stride, length in sorted((abs(stride), length) for stride, length in zip(a.strides, a.shape, strict=True)):
        if length > 1 and stride <= reach:
            return True
        reach += (length - 1) * stride
    return False
