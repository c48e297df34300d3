"""The host's side of both operations: kernels are compiled, loaded and launched here.

Numba translates a kernel to PTX; NVIDIA's linker assembles that and cuda.core launches it. The PTX that the tests read
is so the PTX that runs, and a launch costs a fraction of what Numba's own, which looks at every argument's type, does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cuda.bindings import driver, nvjitlink
from cuda.core import LaunchConfig, Linker, LinkerOptions, ObjectCode, Stream
from cuda.core import launch as core_launch
from numba.cuda.cudadrv import nvvm

from ...views import Device
from .._disk_cache import stored
from .device import MOST_CTAS, Function, cuda

ENTRY = "kernel"
"""Name of every kernel in its PTX."""


class Kernel(NamedTuple):
    """A kernel before it is compiled."""

    name: str
    """Says all by which it differs from other kernels of this package's source."""
    build: Callable[[], tuple[Function, Any]]
    """The Python function and its signature."""
    threads: int
    """Per thread block."""
    blocks: int = 1
    """Thread blocks that should fit on a multiprocessor together; bounds the registers of a thread."""
    shared_bytes: int = 0
    """Dynamic shared memory of a thread block."""
    specific: bool = False
    """Whether it has instructions that only GPUs of one compute capability have."""
    older_blocks: int | None = None
    """`blocks` of GPUs older than compute capability 9.0, where they differ: those need a few more registers."""
    oldest: tuple[int, int] = (0, 0)
    """The compute capability from which on there are its instructions."""
    cluster: int = 1
    """Thread blocks of a cluster."""
    overlaps: bool = False
    """Whether it may be launched before the kernel in front has ended, for whose end it waits then (9.0 too)."""

    def architecture(self, compute_capability: tuple[int, int]) -> str:
        """The assembler's name of the GPU."""
        return "sm_{}{}".format(*compute_capability) + ("a" if self.specific else "")

    def blocks_of(self, compute_capability: tuple[int, int]) -> int:
        """Thread blocks that should fit on a multiprocessor of such a GPU."""
        return self.older_blocks if self.older_blocks is not None and compute_capability < (9, 0) else self.blocks

    def ptx(self, compute_capability: tuple[int, int]) -> str:
        """Its PTX; needs no GPU."""
        function, signature = self.build()
        text, _ = cuda.compile(
            function,
            signature,
            device=False,
            abi="numba",
            cc=compute_capability,
            output="ptx",
            launch_bounds=(self.threads, self.blocks_of(compute_capability)),
        )
        entry = re.search(r"\.entry\s+(\w+)\(", text)
        assert entry is not None
        text = text.replace(entry[1], ENTRY)
        return re.sub(r"\.target sm_\d+", f".target {self.architecture(compute_capability)}", text)


class Binary(NamedTuple):
    """Machine code of a kernel."""

    code: bytes
    log: str
    """What the assembler says of registers and local memory."""


def assemble(ptx: str, architecture: str) -> Binary:
    """PTX to machine code; needs no GPU where NVIDIA's nvJitLink is installed."""
    options = LinkerOptions(arch=architecture, ptxas_options=["-v"], verbose=True)
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    return Binary(bytes(linker.link("cubin").code), linker.get_info_log())


@functools.cache
def _sources() -> bytes:
    """All on which the machine code depends besides the kernel's name and the GPU."""
    folder = Path(__file__).parent
    files = (*sorted(folder.glob("*.py")), folder.parents[1] / "contract.py")
    versions = [
        *(f"{name} {metadata.version(name)}" for name in ("numba", "numba-cuda", "llvmlite")),
        f"nvvm {nvvm.NVVM().get_version()}",
        f"nvjitlink {nvjitlink.version()}",
    ]
    return b"\0".join([*(path.read_bytes() for path in files), *(version.encode() for version in versions)])


def cubin(kernel: Kernel, compute_capability: tuple[int, int]) -> Path:
    """The file of a kernel's machine code, compiled unless it is in the cache."""
    architecture = kernel.architecture(compute_capability)
    key = hashlib.sha256(_sources())
    for part in (kernel.name, architecture, f"{kernel.threads} {kernel.blocks_of(compute_capability)}"):
        key.update(b"\0" + part.encode())
    return stored(
        f"numba-{architecture}-{key.hexdigest()[:32]}.cubin",
        lambda: assemble(kernel.ptx(compute_capability), architecture).code,
    )


@functools.cache
def _loaded(kernel: Kernel, gpu: Device) -> Any:
    """The kernel on a GPU, which is the current one."""
    loaded = ObjectCode.from_cubin(str(cubin(kernel, compute_capability(gpu)))).get_kernel(ENTRY)
    if kernel.shared_bytes > DEFAULT_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuKernelSetAttribute(attribute, kernel.shared_bytes, int(loaded.handle), gpu.index))
    if kernel.cluster > MOST_CTAS:  # where that fails, `clusters_at_once` is 0
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
        driver.cuKernelSetAttribute(attribute, 1, int(loaded.handle), gpu.index)
    return loaded


DEFAULT_SHARED_BYTES = 48 << 10
"""Shared memory that a thread block gets unasked."""


def _cluster_config(kernel: Kernel) -> Any:
    """Of a launch of one cluster."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = attribute.value.clusterDim
    size.x, size.y, size.z = kernel.cluster, 1, 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = kernel.cluster, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes, config.attrs, config.numAttrs = kernel.shared_bytes, [attribute], 1
    return config


@functools.cache
def clusters_at_once(kernel: Kernel, gpu: Device) -> int:
    """How many of its clusters a GPU, which is the current one, holds; 0: it has none so large."""
    function = driver.CUfunction(int(_loaded(kernel, gpu).handle))
    status, count = driver.cuOccupancyMaxActiveClusters(function, _cluster_config(kernel))
    return int(count) if status == driver.CUresult.CUDA_SUCCESS else 0


@functools.cache
def compute_capability(gpu: Device) -> tuple[int, int]:
    """Of a GPU: (9, 0), say."""
    major, minor = cuda.gpus[gpu.index].compute_capability[:2]
    return int(major), int(minor)


@functools.cache
def multiprocessors(gpu: Device) -> int:
    """How many a GPU has."""
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


_CAN_OVERLAP = hasattr(LaunchConfig, "programmatic_stream_serialization")


class Launch:
    """A loaded kernel and its grid, of thread blocks or of clusters of so many. To be made and called in `on(gpu)`."""

    def __init__(self, kernel: Kernel, gpu: Device, grid: tuple[int, ...], cluster: int | None = None) -> None:
        self._kernel = _loaded(kernel, gpu)
        early = {"programmatic_stream_serialization": True} if kernel.overlaps and _CAN_OVERLAP else {}
        self._config = LaunchConfig(
            grid=grid, cluster=cluster, block=kernel.threads, shmem_size=kernel.shared_bytes, **early
        )

    def __call__(self, stream: int, *arguments: int | float) -> None:
        """Queue it; an int is passed as int64 (an address, too), a float as float64, a tuple's elements one by one."""
        core_launch(_stream(stream), self._config, self._kernel, *arguments)


def flat(layout: tuple[Any, ...]) -> tuple[Any, ...]:
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
