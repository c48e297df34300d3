"""Implementations of a product, the operands they share, and how one case is timed and checked."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from cases import DTYPE, Case
from timing import Samples, alternate, capture, rotations, wall_samples

import bikernels

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""product(a, b, out). One that returns a new tensor may leave out alone."""

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

OURS, TORCH, NO_SPLIT_K = "bikernels", "torch", "cublaslt"

KNOWN_PEERS = ("batch_invariant_ops:matmul_persistent",)
"""Timed where they can be imported."""


# ------------------------------------------------------------------------------------------------------ implementations


def view(x: torch.Tensor) -> bikernels.View:
    """A tensor's memory, on its device's current stream."""
    dtype = str(x.dtype).removeprefix("torch.")
    if not x.is_cuda:
        return bikernels.View(x.data_ptr(), dtype, tuple(x.shape), x.stride(), owner=x)
    device, stream = bikernels.Device("cuda", x.device.index), torch.cuda.current_stream(x.device).cuda_stream
    return bikernels.View(x.data_ptr(), dtype, tuple(x.shape), x.stride(), device, stream=stream, owner=x)


def ours(arithmetic: str | None = None) -> Product:
    """`bikernels.matmul` with the backend of the context."""

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        bikernels.matmul(view(a), view(b), out=view(out), arithmetic=arithmetic)

    return product


def torch_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """`torch.mm` or `torch.bmm`: cuBLAS, or the library that PyTorch has for this CPU."""
    (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out=out)


def peer(name: str) -> Product:
    """The function `MODULE:FUNCTION`, which takes two tensors and returns their product.

    Raises:
        ImportError: there is no such module.
        ValueError, AttributeError: `name` has no colon, or the module no such function.
    """
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"peer {name!r} names no function; write MODULE:FUNCTION")
    multiply = getattr(importlib.import_module(module), function)
    return lambda a, b, out: multiply(a, b)


# ------------------------------------------------------------------------------------------------------------- operands


class _Buffer:
    """Device memory from which consecutive, aligned arrays are cut; at the end it begins again."""

    ALIGNMENT = 128  # elements

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self.data = torch.empty(sum(self._padded(size) for size in sizes), dtype=dtype, device="cuda")
        self.rewind()

    def rewind(self) -> None:
        self._next = 0

    def take(self, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        if self._next + size > self.data.numel():
            self._next = 0
        part = self.data[self._next : self._next + size].view(shape)
        self._next += self._padded(size)
        return part

    def _padded(self, size: int) -> int:
        return -(-size // self.ALIGNMENT) * self.ALIGNMENT


class Memory:
    """Standard normal operands, and room for results, for all cases of a dtype: drawn once, cut anew for each case."""

    OUT_BYTES = 2**30
    """Room for results, unless one of them needs more."""
    COMPANIONS = 64
    """Rows of the batch with which a single row is compared."""

    def __init__(self, dtype: str, cases: Sequence[Case]) -> None:
        self.dtype: torch.dtype = getattr(torch, DTYPE[dtype])
        needs = [self._sizes(case) for case in cases]
        self._values = _Buffer(max((need.values for need in needs), key=sum), self.dtype)
        self._values.data.normal_(generator=torch.Generator("cuda").manual_seed(0))
        largest = max(need.out for need in needs)
        most = max(need.out * rotations(case.weight_bytes) for case, need in zip(cases, needs, strict=True))
        self._out = _Buffer([max(largest, min(most, self.OUT_BYTES // self.dtype.itemsize))], self.dtype)

    class _Sizes(NamedTuple):
        values: list[int]
        out: int

    def _sizes(self, case: Case) -> _Sizes:
        m = max(case.m, self.COMPANIONS)
        pair = [case.batch * m * case.k, case.batch * case.n * case.k]
        return self._Sizes(pair * rotations(case.weight_bytes), case.batch * m * case.n)

    def operands(self, case: Case) -> Iterator[Operands]:
        """Different operands for each call of a graph."""
        self._values.rewind()
        self._out.rewind()
        for _ in range(rotations(case.weight_bytes)):
            yield self._operands(case)

    def _operands(self, case: Case) -> Operands:
        batch = (case.batch,) if case.batch > 1 else ()
        a, out = self._values.take(*batch, case.m, case.k), self._out.take(*batch, case.m, case.n)
        if case.layout == "nk":
            return a, self._values.take(*batch, case.n, case.k).mT, out
        return a, self._values.take(*batch, case.k, case.n), out

    def row_is_invariant(self, case: Case, product: Product) -> bool:
        """As the function of this name; a case of one row is compared with a batch of `COMPANIONS`."""
        a, b, out = self._operands(case._replace(m=case.m if case.m > 1 else self.COMPANIONS))
        return row_is_invariant(a, b, out, product)


def row_is_invariant(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, product: Product) -> bool:
    """Whether the first, the middle and the last row of the first matrix have the same bytes in the product of all rows
    as alone.

    What a product leaves unwritten differs.
    """
    first = (0,) * (a.dim() - 2)
    out.view(torch.uint8).fill_(0xFF)
    product(a, b, out)
    rows = a.shape[-2]
    for row in {0, rows // 2, rows - 1}:
        alone = torch.zeros_like(out[first][:1])
        product(a[first][row : row + 1], b[first], alone)
        if not torch.equal(out[first][row : row + 1].view(torch.uint8), alone.view(torch.uint8)):
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------- time


class Timed(NamedTuple):
    """Samples of the implementations that ran, and why the others did not."""

    us: Samples
    failed: dict[str, str]


def on_gpu(case: Case, memory: Memory, products: Mapping[str, Product]) -> Timed:
    """Graphs of the same calls by each implementation, replayed in turn."""
    operands, graphs, failed = list(memory.operands(case)), {}, {}
    for name, product in products.items():
        try:
            for each in operands[:2]:  # compiles, loads and picks algorithms
                product(*each)
            graphs[name] = capture(functools.partial(product, *each) for each in operands)
        except Exception as error:  # noqa: BLE001  (a peer may refuse in any way; the others go on)
            failed[name] = reason(error)
    return Timed(alternate(graphs, len(operands)), failed)


def on_cpu(case: Case, operands: Operands, products: Mapping[str, Product]) -> Timed:
    """Wall time of each implementation, in turn."""
    return Timed(wall_samples({name: functools.partial(product, *operands) for name, product in products.items()}), {})


def cpu_operands(case: Case) -> Operands:
    """Standard normal operands of a case on the CPU."""
    dtype = getattr(torch, DTYPE[case.dtype])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    b = normal(case.n, case.k).mT if case.layout == "nk" else normal(case.k, case.n)
    return normal(case.m, case.k), b, torch.empty(case.m, case.n, dtype=dtype)


def reason(error: Exception) -> str:
    """The first line of an error, for a table."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
