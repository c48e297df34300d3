"""An array of any framework, described by where it lies.

`View` has all that the operations and the backends know of an array. `kinds.py` has it of the frameworks' arrays; a
program that holds raw memory (an adapter for another framework, say) makes a view and passes it in place of an array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Description(NamedTuple):
    """An array but for its address: the layout, in elements, and where it lies."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: Device
    read_only: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.dtype, self.shape, self.strides)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def extent(self) -> tuple[int, int]:
        """Offsets, in bytes, of the first byte that the array can touch and of the end; equal without elements."""
        if self.size == 0:
            return 0, 0
        low = high = 0
        for length, stride in zip(self.shape, self.strides, strict=True):
            reach = (length - 1) * stride
            low, high = (low + reach, high) if reach < 0 else (low, high + reach)
        itemsize = ITEMSIZE[self.dtype]
        return low * itemsize, (high + 1) * itemsize

    def overlaps_itself(self) -> bool:
        """True if two indices may lead to one element (a broadcast axis, say)."""
        if self.size == 0:  # NumPy's strides are then 0
            return False
        reach = 0
        steps = ((abs(stride), length) for stride, length in zip(self.strides, self.shape, strict=True))
        for stride, length in sorted(steps):
            if length > 1 and stride <= reach:
                return True
            reach += (length - 1) * stride
        return False


Form = tuple[Any, ...]
"""What a framework says of an array but for its address, as cheaply as it can be had: a function, and the arguments
from which it makes the description. Equal forms have equal descriptions: what is prepared for an array is kept by form.
"""


@functools.lru_cache(maxsize=4096)
def description(form: Form) -> Description:
    """The description of that form; errors are those of its framework."""
    describe, *facts = form
    result: Description = describe(*facts)
    return result


def _as_given(
    dtype: str, shape: Sequence[int], strides: Sequence[int], device_type: str, index: int, read_only: bool
) -> Description:
    return Description(dtype, tuple(shape), tuple(strides), Device(device_type, index), read_only)


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

    __slots__ = ("form", "owner", "pointer", "stream")

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
        self.form: Form = (_as_given, dtype, shape, strides, device.type, device.index, read_only)
        self.pointer = pointer
        self.stream = stream
        self.owner = owner

    @property
    def description(self) -> Description:
        return description(self.form)

    @property
    def dtype(self) -> str:
        return self.description.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.description.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.description.strides

    @property
    def device(self) -> Device:
        return self.description.device

    @property
    def read_only(self) -> bool:
        return self.description.read_only

    def __repr__(self) -> str:
        return f"View({self.dtype}, shape={self.shape}, strides={self.strides}, device={self.device})"


class FormView(View):
    """A view made of a form."""

    __slots__ = ()

    def __init__(self, form: Form, pointer: int, stream: int = 0, owner: Any = None) -> None:
        self.form = form
        self.pointer = pointer
        self.stream = stream
        self.owner = owner


class _ArrayInterface:
    def __init__(self, view: View) -> None:
        storage = STORAGE_DTYPE[view.dtype]
        self.owner = view
        self.__array_interface__ = {
            "version": 3,
            "data": (view.pointer, view.read_only),
            "typestr": storage.str,
            "shape": view.shape,
            "strides": tuple(stride * storage.itemsize for stride in view.strides),
        }


def share_memory(a: View, b: View) -> bool:
    """True if some element of `a` and some element of `b`, which lie on one device, have a byte in common.

    NumPy solves for a common address, and reads no memory.
    """
    arrays = np.asarray(_ArrayInterface(a)), np.asarray(_ArrayInterface(b))
    try:
        return bool(np.shares_memory(*arrays, max_work=10_000))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
