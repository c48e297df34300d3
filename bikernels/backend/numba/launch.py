"""The host's side of both operations: kernels are compiled, loaded and launched here.

Numba translates a kernel to PTX; NVIDIA's linker assembles that and cuda.core launches it. The PTX that the tests read
is so the PTX that runs, and a launch costs a fraction of what Numba's own, which looks at every argument's type, does.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any, NamedTuple

from cuda.bindings import driver
from cuda.core import LaunchConfig, Linker, LinkerOptions, ObjectCode, Stream
from cuda.core import launch as core_launch

from ...views import Device
from .device import Function, cuda


class Kernel(NamedTuple):
    """A kernel before it is compiled: a Python function, the types of its arguments, its threads per block."""

    function: Function
    signature: Any
    threads: int
    blocks: int = 1
    """Thread blocks that should fit on a multiprocessor together; bounds the registers of a thread."""

    def ptx(self, compute_capability: tuple[int, int]) -> str:
        """Its PTX; needs no GPU."""
        text, _ = cuda.compile(
            self.function,
            self.signature,
            device=False,
            abi="numba",
            cc=compute_capability,
            output="ptx",
            launch_bounds=(self.threads, self.blocks),
        )
        return text


class Binary(NamedTuple):
    """Machine code of a kernel."""

    code: ObjectCode
    name: str
    log: str
    """What the assembler says of registers and local memory."""


def assemble(ptx: str, compute_capability: tuple[int, int]) -> Binary:
    """PTX to machine code; needs no GPU where NVIDIA's nvJitLink is installed."""
    options = LinkerOptions(arch="sm_{}{}".format(*compute_capability), ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    entry = re.search(r"\.entry\s+(\w+)\(", ptx)
    assert entry is not None
    return Binary(linker.link("cubin"), entry[1], linker.get_info_log())


@functools.cache
def _loaded(kernel: Kernel, compute_capability: tuple[int, int]) -> Any:
    binary = assemble(kernel.ptx(compute_capability), compute_capability)
    return binary.code.get_kernel(binary.name)


@functools.cache
def compute_capability(gpu: Device) -> tuple[int, int]:
    """Of a GPU: (9, 0), say."""
    major, minor = cuda.gpus[gpu.index].compute_capability[:2]
    return int(major), int(minor)


@functools.cache
def blocks_to_fill(gpu: Device) -> int:
    """Thread blocks that keep every multiprocessor of the GPU busy."""
    return int(cuda.gpus[gpu.index].MULTIPROCESSOR_COUNT)


def grid_of(blocks: int) -> tuple[int, int]:
    """A grid of at least this many thread blocks; a kernel counts them x first and leaves the rest idle."""
    width = min(max(blocks, 1), 2**31 - 1)
    return width, -(-blocks // width)


def on(gpu: Device) -> contextlib.AbstractContextManager[Any]:
    """Context in which this GPU is the current one."""
    status, current = driver.cuCtxGetDevice()
    if status == driver.CUresult.CUDA_SUCCESS and int(current) == gpu.index:
        return contextlib.nullcontext()
    return cuda.gpus[gpu.index]


@functools.lru_cache(maxsize=256)
def _stream(handle: int) -> Stream:
    return Stream.from_handle(handle)


class Launch:
    """A loaded kernel and its grid. To be made and called inside `on(gpu)`."""

    def __init__(self, kernel: Kernel, gpu: Device, grid: tuple[int, int]) -> None:
        self._kernel = _loaded(kernel, compute_capability(gpu))
        self._config = LaunchConfig(grid=grid, block=kernel.threads)

    def __call__(self, stream: int, *arguments: int | float) -> None:
        """Queue it; an int is passed as int64 (an address, too), a float as float64, a tuple's elements one by one."""
        core_launch(_stream(stream), self._config, self._kernel, *arguments)


def flat(layout: tuple[Any, ...]) -> tuple[int, ...]:
    """Numbers and tuples of numbers as the arguments of a launch."""
    return tuple(number for item in layout for number in (item if isinstance(item, tuple) else (item,)))


# ---------------------------------------------------------------------------------------------------------- workspace

KEEP_BYTES = 64 << 20
"""Workspace that stays allocated between launches."""


def _checked(result: Any) -> Any:
    """What a driver call gave, or RuntimeError."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver failed with {status.name}")
    return values[0] if values else None


@functools.cache
def _pool(gpu: Device) -> Any:
    """Memory that keeps what was freed for the next launch: a pool of our own, as the default one is the caller's."""
    properties = driver.CUmemPoolProps()
    properties.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = gpu.index
    pool = _checked(driver.cuMemPoolCreate(properties))
    threshold = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
    _checked(driver.cuMemPoolSetAttribute(pool, threshold, driver.cuuint64_t(KEEP_BYTES)))
    return pool


class Workspace:
    """Memory for the launches in a `with` block: gives the address of `zeroed` bytes that are 0, and of `more` others.

    It is allocated and freed in the order of the stream, so calls on several streams do not meet in it, and in a CUDA
    graph it becomes the graph's own.
    """

    def __init__(self, gpu: Device, stream: int, zeroed: int, more: int) -> None:
        self._gpu, self._stream, self._zeroed, self._more = gpu, stream, zeroed, more

    def __enter__(self) -> tuple[int, int]:
        self._address = int(
            _checked(driver.cuMemAllocFromPoolAsync(self._zeroed + self._more, _pool(self._gpu), self._stream))
        )
        _checked(driver.cuMemsetD8Async(self._address, 0, self._zeroed, self._stream))
        return self._address, self._address + self._zeroed

    def __exit__(self, *_: Any) -> None:
        _checked(driver.cuMemFreeAsync(self._address, self._stream))
