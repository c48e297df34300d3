"""Loads kernels and launches them through CuPy.

A launch that has run before neither compiles nor synchronises, so it may be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cupy

from . import compile as compiler
from .compile import Kernel

MAX_GRID = 2**31 - 1
"""CTAs of a launch; kernels walk on where there is more work."""

_STATIC_SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a kernel gets without asking."""


class GPU(NamedTuple):
    """What schedules need to know of a device."""

    compute_capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def gpu(index: int) -> GPU:
    """The properties of device `index`."""
    device = cupy.cuda.Device(index)
    digits = device.compute_capability  # "90", "120"
    return GPU((int(digits[:-1]), int(digits[-1])), device.attributes["MultiProcessorCount"])


@functools.cache
def _module(kernel: Kernel, arch: str) -> Any:
    return cupy.RawModule(path=str(compiler.cubin(kernel, arch)))


@functools.cache
def load(kernel: Kernel, name: str, index: int, shared_bytes: int = 0) -> Callable[..., None]:
    """The function `name` of a kernel on device `index`, called as f(grid, block, arguments, shared_bytes, stream)."""
    with cupy.cuda.Device(index):
        function = _module(kernel, compiler.architecture(gpu(index).compute_capability)).get_function(name)
        if shared_bytes > _STATIC_SHARED_LIMIT:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return function.kernel


class Stream:
    """A stream's handle as CuPy's launch takes it; entering a stream's context would cost more than the launch."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


Launch = Callable[..., None]
"""launch(stream, *arguments): queue a kernel of a fixed launch shape."""


def shaped(function: Callable[..., None], grid: int, block: int, shared_bytes: int) -> Launch:
    """A function of `load` with its CTAs, threads of a CTA and bytes of dynamic shared memory."""
    grid_shape, block_shape = (min(grid, MAX_GRID), 1, 1), (block, 1, 1)

    def launch(stream: Stream, *arguments: Any) -> None:
        function(grid_shape, block_shape, arguments, shared_bytes, stream)

    return launch


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
def workspace(size: int, index: int, stream: Stream) -> Iterator[int]:
    """The address of `size` bytes for the kernels that are launched on `stream` within the context.

    The memory is allocated and freed in the order of the stream: launches on other streams have their own, and in a
    captured graph the two become nodes, so that every graph has its own as well. Nothing synchronises.
    """
    runtime = cupy.cuda.runtime
    address = runtime.mallocFromPoolAsync(size, _workspace_pool(index), stream.ptr)
    try:
        yield address
    finally:
        runtime.freeAsync(address, stream.ptr)


def on_device(index: int, launch: Callable[..., None]) -> Callable[..., None]:
    """`launch`, made with device `index` as the current one."""
    current = cupy.cuda.runtime.getDevice

    @functools.wraps(launch)
    def launch_there(*arguments: Any) -> None:
        if current() == index:
            launch(*arguments)
        else:
            with cupy.cuda.Device(index):
                launch(*arguments)

    return launch_there
