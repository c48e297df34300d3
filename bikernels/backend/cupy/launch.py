"""Loads kernels and launches them.

A launch is prepared once: its shape, its attributes and the arguments that stay the same lie in memory as the driver
reads them, and a call writes the rest. One that has run before neither compiles nor synchronises, so it may be captured
in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from . import compile as compiler
from . import driver
from .compile import Kernel

FIRST_WITH_CLUSTERS = (9, 0)
"""The first compute capability that has clusters and launches that overlap."""

MAX_GRID = 2**31 - 1
"""CTAs of a launch; kernels walk on where there is more work."""


class GPU(NamedTuple):
    """What schedules need to know of a device."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    """Of a CTA, at most."""
    bytes_per_us: float
    """Of device memory, by its clock and width."""


@functools.cache
def gpu(index: int) -> GPU:
    """The properties of device `index`."""
    device = cupy.cuda.Device(index)
    digits = device.compute_capability  # "90", "120"
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    attributes = device.attributes
    mhz, transfers_per_clock, bits = 1e-3, 2, 8
    bytes_of_clock = attributes["GlobalMemoryBusWidth"] / bits * transfers_per_clock
    return GPU(
        name,
        (int(digits[:-1]), int(digits[-1])),
        attributes["MultiProcessorCount"],
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MemoryClockRate"] * mhz * bytes_of_clock,
    )


# ------------------------------------------------------------------------------------------------------------- loading

# Of the driver's function attributes.
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14

PORTABLE_CTAS = 8
"""Of a cluster, on every GPU that has clusters."""

_INVALID_CONTEXT = 201  # of the driver's errors


def _bind_context() -> None:
    """Make the context of the current device the calling thread's, which the driver does not do by itself."""
    cupy.cuda.runtime.free(0)


class Function(NamedTuple):
    """A function of a kernel, loaded on device `device`."""

    handle: int
    name: str
    device: int


@functools.cache
def _module(kernel: Kernel, arch: str) -> ctypes.c_void_p:
    path = str(compiler.cubin(kernel, arch)).encode()
    return driver.POINTER(driver.handle("cuLibraryLoadFromFile", path, None, None, 0, None, None, 0))


@functools.cache
def load(kernel: Kernel, name: str, index: int, shared_bytes: int = 0, ctas: int = 1) -> Function:
    """The function `name` of a kernel on device `index`, allowed that much dynamic shared memory and such clusters."""
    with cupy.cuda.Device(index):
        _bind_context()
        module = _module(kernel, compiler.architecture(gpu(index).compute_capability))
        entry = driver.handle("cuLibraryGetKernel", module, name.encode())
        function = driver.POINTER(driver.handle("cuKernelGetFunction", driver.POINTER(entry)))
        attribute, allowed = _MAX_DYNAMIC_SHARED_SIZE_BYTES, ctypes.c_int()
        driver.call("cuFuncGetAttribute", ctypes.byref(allowed), attribute, function)
        if shared_bytes > allowed.value:
            driver.call("cuFuncSetAttribute", function, attribute, shared_bytes)
        if ctas > PORTABLE_CTAS:
            driver.call("cuFuncSetAttribute", function, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
    return Function(function.value or 0, name, index)


def _parameter_sizes(function: Function) -> list[int]:
    """Bytes of each parameter, as compiled."""
    number, offset, size = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_size_t()
    read = driver.library().cuFuncGetParamInfo
    sizes: list[int] = []
    while read(driver.POINTER(function.handle), number, ctypes.byref(offset), ctypes.byref(size)) == 0:
        sizes.append(size.value)
        number.value += 1
    return sizes


@functools.cache
def resident_ctas(function: Function, block: int, shared_bytes: int, cluster: int) -> int:
    """How many CTAs of such a launch its device holds at a time, whole clusters of them."""
    with cupy.cuda.Device(function.device):
        _bind_context()
        count, handle = ctypes.c_int(), driver.POINTER(function.handle)
        if cluster == 1:
            name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
            driver.call(name, ctypes.byref(count), handle, block, ctypes.c_size_t(shared_bytes))
            return count.value * gpu(function.device).multiprocessors
        attributes = (_Attribute * 1)(_Attribute(_CLUSTER_DIMENSION, (cluster, 1, 1)))
        config = _Config((cluster, 1, 1), (block, 1, 1), shared_bytes, None, ctypes.addressof(attributes), 1)
        driver.call("cuOccupancyMaxActiveClusters", ctypes.byref(count), handle, ctypes.byref(config))
        return count.value * cluster


# ----------------------------------------------------------------------------------------------------------- launching

# The arguments that a call gives, as codes of the module struct.
ADDRESS, FLOAT32, FLOAT64, TENSOR_MAP = "Q", "f", "d", "128s"

SCALAR = {"float32": FLOAT32, "float64": FLOAT64}

Argument = str | np.ndarray[Any, Any] | np.generic
"""One of the codes above, or a NumPy value (a struct, too) that all calls share."""

Launch = Callable[..., None]
"""launch(stream, *arguments): queue a kernel of a fixed launch shape on the stream of that handle."""


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("number_of_attributes", ctypes.c_uint64),  # 32 bits and padding
    )


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_uint * 16))  # 32 bits and padding


_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
_ALIGNMENT = 64
"""Of arguments in memory: enough for a tensor map."""


class _Block(NamedTuple):
    """What the driver reads at one launch: the config, the arguments that the call gives, the addresses of all."""

    config: ctypes.c_void_p
    """Addresses within the memory."""
    all_arguments: ctypes.c_void_p
    words: memoryview
    """The memory, by 8 bytes; and otherwise."""
    octets: memoryview
    singles: memoryview[float]
    doubles: memoryview[float]


class _Blocks:
    """Makes the blocks of a launch. Two calls may be on their way at once, so each takes one of its own."""

    def __init__(self, config: _Config, attributes: list[_Attribute], arguments: Sequence[bytes | str]) -> None:
        self._attributes = (_Attribute * len(attributes))(*attributes)
        config.attributes, config.number_of_attributes = ctypes.addressof(self._attributes), len(attributes)
        self._config = config
        self._places: list[int | ctypes.Array[ctypes.c_char]] = []  # a constant, or the offset of what a call gives
        self.given: list[str] = ["stream"]
        """Names of what a call gives."""
        self.statements = [f"words[{_Config.stream.offset // 8}] = stream"]
        """Python that writes them to a block, whose parts have their names."""
        end = ctypes.sizeof(_Config)
        for argument in arguments:
            if isinstance(argument, bytes):
                constant = driver.aligned(len(argument), _ALIGNMENT)
                constant.raw = argument
                self._places.append(constant)
            else:
                size = struct.calcsize(f"<{argument}")
                place = end + -end % min(size, _ALIGNMENT)
                end = place + size
                name = f"x{len(self.given)}"
                self.given.append(name)
                view = _WRITTEN_BY.get(argument)
                where = f"octets[{place}:{end}]" if view is None else f"{view}[{place // size}]"
                self.statements.append(f"{where} = {name}")
                self._places.append(place)
        self._addresses = -(-end // 8) * 8

    def new(self) -> _Block:
        memory = driver.aligned(self._addresses + 8 * len(self._places), _ALIGNMENT)
        start = ctypes.addressof(memory)
        ctypes.memmove(memory, ctypes.byref(self._config), ctypes.sizeof(self._config))
        addresses = [start + place if isinstance(place, int) else ctypes.addressof(place) for place in self._places]
        struct.pack_into(f"<{len(addresses)}Q", memory, self._addresses, *addresses)
        octets = memoryview(memory).cast("B")
        views = octets.cast("Q"), octets, octets.cast("f"), octets.cast("d")
        return _Block(driver.POINTER(start), driver.POINTER(start + self._addresses), *views)


_WRITTEN_BY = {ADDRESS: "words", FLOAT32: "singles", FLOAT64: "doubles"}


def shaped(
    function: Function,
    grid: int,
    block: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
    *,
    cluster: int = 1,
    overlapping: bool = False,
    cooperative: bool = False,
) -> Launch:
    """A launch of a function of `load`, on its device.

    Args:
        function: what to launch.
        grid: CTAs, a multiple of `cluster`; no more than MAX_GRID are launched.
        block: threads of a CTA.
        shared_bytes: of dynamic shared memory.
        arguments: of the kernel, in its order. Those that are codes are given at each call: an int for ADDRESS, a float
            for FLOAT32 and FLOAT64, bytes (of `TensorMaps`) for TENSOR_MAP.
        cluster: neighbouring CTAs that form a cluster (from compute capability 9.0 on).
        overlapping: the kernel may start before the stream's previous one has ended (programmatic dependent launch); it
            waits itself (griddepcontrol.wait) before it touches memory that others write or still read.
        cooperative: all CTAs are on the device at once, and may wait for one another; no more than `resident_ctas`.

    Raises:
        ValueError: the arguments do not have the sizes of the function's parameters.
    """
    values = [argument if isinstance(argument, str) else argument.tobytes() for argument in arguments]
    sizes = [struct.calcsize(f"<{value}") if isinstance(value, str) else len(value) for value in values]
    if sizes != _parameter_sizes(function):
        raise ValueError(f"{function.name} takes parameters of {_parameter_sizes(function)} bytes and got {sizes}")

    attributes = []
    if cluster > 1:
        attributes.append(_Attribute(_CLUSTER_DIMENSION, (cluster, 1, 1)))
    if overlapping:
        attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
    if cooperative:
        attributes.append(_Attribute(_COOPERATIVE, (1,)))
    ctas = min(grid, MAX_GRID // cluster * cluster)
    blocks = _Blocks(_Config((ctas, 1, 1), (block, 1, 1), shared_bytes), attributes, values)

    handle, launch_kernel = driver.POINTER(function.handle), driver.library().cuLaunchKernelEx
    device, free = function.device, [blocks.new()]

    def launch_elsewhere(*given: Any) -> None:
        with cupy.cuda.Device(device):
            launch(*given)

    def launch_again(status: int, config: Any, all_arguments: Any) -> None:
        if status == _INVALID_CONTEXT:  # a thread that has not used its device yet
            _bind_context()
            status = launch_kernel(config, handle, all_arguments, None)
        if status:
            raise driver.error(f"launching {function.name}", status)

    # The text is put together, so that the function takes and writes no other number of arguments than there are, and
    # asks for no device where there is one.
    given, line, several = ", ".join(blocks.given), "\n    ", cupy.cuda.runtime.getDeviceCount() > 1
    source = f"""
def launch({given}):
    if {several} and current_device() != device:
        return launch_elsewhere({given})
    try:
        block = take()
    except IndexError:
        block = new_block()
    {", ".join(_Block._fields)} = block
    {line.join(blocks.statements)}
    status = launch_kernel(config, handle, all_arguments, None)
    if status:
        launch_again(status, config, all_arguments)
    give_back(block)
"""
    space: dict[str, Any] = {
        "current_device": cupy.cuda.runtime.getDevice,
        "device": device,
        "launch_elsewhere": launch_elsewhere,
        "take": free.pop,
        "new_block": blocks.new,
        "launch_kernel": launch_kernel,
        "handle": handle,
        "give_back": free.append,
        "launch_again": launch_again,
    }
    exec(source, space)
    launch: Launch = space["launch"]
    return launch


# ----------------------------------------------------------------------------------------------------------- workspace


@functools.cache
def _workspace_pool(index: int) -> int:
    """A pool of device memory that keeps what it has, so that later allocations cost about a microsecond."""
    runtime = cupy.cuda.runtime
    allocation_type_pinned = location_type_device = 1
    no_handle = 0
    pool = runtime.memPoolCreate(runtime.MemPoolProps(allocation_type_pinned, no_handle, location_type_device, index))
    runtime.memPoolSetAttribute(pool, runtime.cudaMemPoolAttrReleaseThreshold, 2**64 - 1)
    return int(pool)


@contextlib.contextmanager
def workspace(size: int, index: int, stream: int) -> Iterator[int]:
    """The address of `size` bytes for the kernels that are launched on `stream` within the context.

    The memory is allocated and freed in the order of the stream: launches on other streams have their own, and in a
    captured graph the two become nodes, so that every graph has its own as well. Nothing synchronises.
    """
    runtime = cupy.cuda.runtime
    address = runtime.mallocFromPoolAsync(size, _workspace_pool(index), stream)
    try:
        yield address
    finally:
        runtime.freeAsync(address, stream)
