"""The frameworks whose arrays the public functions take, and in which they answer.

Rules of this file: a framework that the caller has not imported is never imported; inputs are never copied; an array of
a framework without a class here comes in through DLPack or the CUDA array interface and is answered in CuPy (GPU) or
NumPy (CPU).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .contract import ITEMSIZE
from .dtypes import NUMPY_DTYPE, dtype_name
from .specs import contiguous_strides
from .views import CPU, Description, Device, Form, View, description

Facts = tuple[Form, int, int, Any]
"""What a call needs of an array: its form, its address, its stream, and what keeps its memory alive."""

Allocate = Callable[[int], tuple[Any, int]]
"""allocate(stream): a new C-contiguous array, uninitialised, that is used on this stream; and its address."""


class Kind:
    """One framework: how to describe its arrays, and how to allocate them."""

    name: str

    def facts(self, array: Any) -> Facts:
        """Of an array, without copying it. Done at each call, so what can be left to the form's description is."""
        raise NotImplementedError

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        """What allocates arrays like this."""
        raise NotImplementedError


class NumpyKind(Kind):
    name = "numpy"

    def facts(self, array: Any) -> Facts:
        if type(array) is not np.ndarray:
            if isinstance(array, np.ma.MaskedArray):
                raise TypeError(
                    "is a masked array, whose mask would be ignored; pass a plain array, e.g. array.filled(0)"
                )
            if isinstance(array, np.generic):  # a scalar owns no memory
                array = np.asarray(array)
                array.flags.writeable = False
        dtype, flags = array.dtype, array.flags
        writeable = flags.writeable
        form = (self._describe, dtype, array.shape, array.strides, flags.aligned, writeable)
        return form, _address(array, dtype, writeable and flags.c_contiguous), 0, array

    @staticmethod
    def _describe(
        dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool, writeable: bool
    ) -> Description:
        name = dtype_name(dtype)
        return Description(name, shape, _element_strides(shape, strides, name, aligned), CPU, not writeable)

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        own, empty = NUMPY_DTYPE[dtype], np.empty

        def allocate(stream: int) -> tuple[Any, int]:
            array = empty(shape, own)
            return array, _address(array, own, True)

        return allocate


_first_byte, _address_of = ctypes.c_char.from_buffer, ctypes.addressof


def _address(array: Any, dtype: np.dtype[Any], is_buffer: bool) -> int:
    """Where an array lies; `is_buffer`: it is contiguous and writeable, and may be asked in a third of the time."""
    if is_buffer and dtype.isbuiltin == 1 and array.size:
        return _address_of(_first_byte(array))
    pointer: int = array.__array_interface__["data"][0]
    return pointer


class CupyKind(Kind):
    name = "cupy"

    @functools.cached_property
    def _cupy(self) -> Any:
        return importlib.import_module("cupy")

    @functools.cached_property
    def _current_stream(self) -> Callable[[int], Any]:
        return self._cupy.cuda.get_current_stream

    def facts(self, array: Any) -> Facts:
        memory = array.data
        index = memory.device_id
        form = (self._describe, array.dtype, array.shape, array.strides, index)
        return form, memory.ptr, self._current_stream(index).ptr, array

    @staticmethod
    def _describe(dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...], index: int) -> Description:
        name = dtype_name(dtype)
        return Description(name, shape, _element_strides(shape, strides, name), Device("cuda", index))

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        cupy, own, index = self._cupy, NUMPY_DTYPE[dtype], device.index
        new, current_device = cupy.ndarray, cupy.cuda.runtime.getDevice

        def allocate(stream: int) -> tuple[Any, int]:
            if current_device() == index:
                array = new(shape, own)
            else:
                with cupy.cuda.Device(index):
                    array = new(shape, own)
            return array, array.data.ptr

        return allocate


class NumbaKind(Kind):
    name = "numba"

    def facts(self, array: Any) -> Facts:
        view = _view_of_interface(array)
        return view.form, view.pointer, int(array.stream), view  # 0, or one of Numba's streams

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        cuda = importlib.import_module("numba.cuda")

        def allocate(stream: int) -> tuple[Any, int]:
            with cuda.gpus[device.index]:
                bound = cuda.external_stream(stream) if stream else 0
                array = cuda.device_array(shape, NUMPY_DTYPE[dtype], stream=bound)
            return array, self.facts(array)[1]

        return allocate


class ForeignKind(Kind):
    """Any other framework, by DLPack or by the CUDA array interface."""

    name = "foreign"

    def facts(self, array: Any) -> Facts:
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            view = _view_of_dlpack(array)
            return view.form, view.pointer, view.stream, view
        view = _view_of_interface(array)
        producer = array.__cuda_array_interface__.get("stream")
        stream = _current_cuda_stream(view.device.index)
        if producer is not None:
            order_streams(producer, stream, view.device)
        return view.form, view.pointer, stream, view

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        if device == CPU:
            return NUMPY.allocator(dtype, shape, device)
        with contextlib.suppress(ImportError):
            return CUPY.allocator(dtype, shape, device)
        return NUMBA.allocator(dtype, shape, device)


class ViewKind(Kind):
    """A caller that describes its memory itself. It has nothing to allocate with, so it passes `out`."""

    name = "view"

    def facts(self, array: Any) -> Facts:
        return array.form, array.pointer, array.stream, array

    def allocator(self, dtype: str, shape: tuple[int, ...], device: Device) -> Allocate:
        raise TypeError(f"out is required where the operands are View objects: pass a {dtype} View of shape {shape}")


NUMPY, CUPY, NUMBA, FOREIGN, VIEW = NumpyKind(), CupyKind(), NumbaKind(), ForeignKind(), ViewKind()

_KIND_OF_MODULE: dict[str, Kind] = {"numpy": NUMPY, "cupy": CUPY, "numba": NUMBA, "numba_cuda": NUMBA}
_KIND_OF_TYPE: dict[type, Kind] = {np.ndarray: NUMPY, View: VIEW}


def kind_of(array: Any, argument: str) -> Kind:
    """The kind of an array; TypeError, naming the argument, for what is not an array."""
    cls = type(array)
    kind = _KIND_OF_TYPE.get(cls)
    if kind is None:
        kind = _find_kind(cls, array)
        if kind is None:
            raise TypeError(
                f"{argument} is of type {cls.__name__}; pass a NumPy or CuPy array, a Numba device array, or an object "
                "that exports DLPack or the CUDA array interface"
            )
        _KIND_OF_TYPE[cls] = kind
    return kind


def _find_kind(cls: type, array: Any) -> Kind | None:
    exports_cuda = hasattr(array, "__cuda_array_interface__")
    for base in cls.__mro__:
        kind = _KIND_OF_MODULE.get(base.__module__.partition(".")[0])
        if kind is NUMPY and isinstance(array, np.ndarray | np.generic):
            return kind
        if kind in (CUPY, NUMBA) and exports_cuda:
            return kind
    if exports_cuda or (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        return FOREIGN
    return None


_REFUSALS = (BufferError, TypeError, ValueError)
"""Errors of a kind, which are raised again with the argument's name in front."""


def facts_of(array: Any, argument: str) -> Facts:
    """What a call needs of an array; TypeError and ValueError, naming the argument, for what cannot be viewed."""
    kind = kind_of(array, argument)
    try:
        return kind.facts(array)
    except _REFUSALS as error:
        raise type(error)(f"{argument}: {error}") from None


def facts_of_each(arrays: Sequence[Any], arguments: Sequence[str]) -> list[Facts]:
    """`facts_of` each."""
    try:
        return [_KIND_OF_TYPE[type(array)].facts(array) for array in arrays]
    except (KeyError, *_REFUSALS):  # a type that is new, or an error that still needs its argument's name
        return [facts_of(array, argument) for array, argument in zip(arrays, arguments, strict=True)]


def described(form: Form, argument: str) -> Description:
    """The description of a form; TypeError and ValueError, naming the argument, if no operation takes such arrays."""
    try:
        return description(form)
    except _REFUSALS as error:
        raise type(error)(f"{argument}: {error}") from None


# ------------------------------------------------------------------------------------------------------ protocols


def _element_strides(
    shape: tuple[int, ...], byte_strides: tuple[int, ...], dtype: str, aligned: bool = True
) -> tuple[int, ...]:
    itemsize = ITEMSIZE[dtype]
    if not aligned or any(step % itemsize for length, step in zip(shape, byte_strides, strict=True) if length > 1):
        raise ValueError(f"its elements are not aligned to {itemsize} bytes; pass a contiguous copy")
    return tuple(step // itemsize for step in byte_strides)


def _view_of_interface(array: Any) -> View:
    """Through the CUDA array interface, version 3."""
    fields = array.__cuda_array_interface__
    pointer, read_only = fields["data"]
    shape = tuple(fields["shape"])
    # An extension dtype such as bfloat16 has no code in the interface; the array itself knows it.
    own = getattr(array, "dtype", None)
    dtype = dtype_name(own if isinstance(own, np.dtype) else np.dtype(fields["typestr"]))
    steps = fields.get("strides")
    strides = contiguous_strides(shape) if steps is None else _element_strides(shape, tuple(steps), dtype)
    return View(pointer, dtype, shape, strides, _cuda_device_of(pointer), read_only=read_only, owner=array)


class _DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_CODE = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_DL_READ_ONLY = 1

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _view_of_dlpack(array: Any) -> View:
    """Through DLPack, read in place: bfloat16 and negative strides survive, and the capsule keeps the memory."""
    device_type, index = array.__dlpack_device__()
    arguments: dict[str, Any] = {}
    stream = 0
    if device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        stream = _current_cuda_stream(index)
        arguments["stream"] = stream or 1  # DLPack's name for the default stream
    elif device_type not in (_DL_CPU, _DL_CUDA_HOST):
        raise TypeError(f"lies on a device of DLPack type {int(device_type)}; move it to a CPU or a CUDA GPU")
    try:
        capsule = array.__dlpack__(max_version=(1, 0), **arguments)
    except TypeError:  # an exporter from before DLPack 1.0
        capsule = array.__dlpack__(**arguments)
    read_only = False
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        versioned = _DLVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        tensor, read_only = versioned.tensor, bool(versioned.flags & _DL_READ_ONLY)
    else:
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    kind = _DL_CODE.get(tensor.dtype.code)
    name = "bool" if kind == "bool" else f"{kind}{tensor.dtype.bits}"
    if kind is None or tensor.dtype.lanes != 1 or name not in ITEMSIZE:
        raise TypeError(f"its dtype (DLPack code {tensor.dtype.code}, {tensor.dtype.bits} bits) is not supported")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else contiguous_strides(shape)
    pointer = (tensor.data or 0) + tensor.byte_offset
    if pointer % ITEMSIZE[name]:
        raise ValueError(f"its elements are not aligned to {ITEMSIZE[name]} bytes; pass a contiguous copy")
    device = Device("cuda", index) if arguments else CPU
    return View(pointer, name, shape, strides, device, stream=stream, read_only=read_only, owner=(array, capsule))


def _current_cuda_stream(index: int) -> int:
    """CuPy's current stream on that GPU, since CuPy arrays answer foreign ones; else the default stream."""
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return 0
    return int(cupy.cuda.get_current_stream(index).ptr)


def _driver_call(name: str, *arguments: Any) -> Any:
    driver = importlib.import_module("cuda.bindings.driver")
    status, *results = getattr(driver, name)(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{name} failed: {status}")
    return results[0] if results else None


def _cuda_device_of(pointer: int) -> Device:
    if not pointer:  # an empty array
        return Device("cuda", 0)
    driver = importlib.import_module("cuda.bindings.driver")
    ordinal = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return Device("cuda", int(_driver_call("cuPointerGetAttribute", ordinal, pointer)))


def order_streams(producer: int, consumer: int, device: Device) -> None:
    """Make the consumer's stream, on that GPU, wait for what the producer's stream has been given so far."""
    if producer == consumer or {producer, consumer} == {0, 1}:  # 1 is the default stream's other name
        return
    driver = importlib.import_module("cuda.bindings.driver")
    _driver_call("cuCtxPushCurrent", _driver_call("cuDevicePrimaryCtxRetain", device.index))
    try:
        event = _driver_call("cuEventCreate", driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        try:
            _driver_call("cuEventRecord", event, producer)
            _driver_call("cuStreamWaitEvent", consumer, event, 0)
        finally:
            _driver_call("cuEventDestroy", event)
    finally:
        _driver_call("cuCtxPopCurrent")
        _driver_call("cuDevicePrimaryCtxRelease", device.index)
