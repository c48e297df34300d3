"""What the compiler makes of the kernels, on a machine without a GPU: for tests, and for whoever changes a kernel."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

from numba.cuda.cudadrv import nvvm

from . import columns, matmul, reduction, rows
from .launch import Kernel, assemble
from .schedules import WGMMA_GPU

Variant = matmul.Variant | reduction.Variant | rows.Variant | columns.Variant


class Needs(NamedTuple):
    """What the machine code of a kernel needs, per thread."""

    registers: int
    stack_bytes: int
    """Local memory, spills included."""
    spill_bytes: int
    """Stores of registers to local memory and loads from it, counted in the code."""


class Compiled(NamedTuple):
    """One kernel's PTX and what its machine code needs."""

    variant: Variant
    ptx: str
    contractible: list[str]
    needs: dict[tuple[int, int], Needs]
    """Per compute capability."""


def variants() -> Iterator[Variant]:
    """Kernels of products and the general ones of reductions, once for every way in which their code differs, and
    examples of those of rows and columns, which have thousands of layouts; `compile_one` takes any other one, too.
    """
    return itertools.chain(matmul.variants(), reduction.variants(), rows.variants(), columns.variants())


def compile_one(variant: Variant, compute_capabilities: tuple[tuple[int, int], ...]) -> Compiled:
    """Compile one kernel for GPUs of these compute capabilities, (9, 0) say. The PTX, which takes most of the time, is
    made once, for the first, unless registers are bounded otherwise on another: name the oldest first.
    """
    kernel = kernel_of(variant)
    gpus = [one for one in compute_capabilities if one >= kernel.oldest and (not kernel.specific or one == WGMMA_GPU)]
    ptx, fused = translate(kernel, gpus[0])
    bounds = {kernel.blocks_of(gpus[0]): ptx}
    for one in gpus:
        if kernel.blocks_of(one) not in bounds:
            bounds[kernel.blocks_of(one)] = kernel.ptx(one)
    found = {one: needs(bounds[kernel.blocks_of(one)], kernel.architecture(one)) for one in gpus}
    return Compiled(variant, ptx, fused, found)


def kernel_of(variant: Variant) -> Kernel:
    """The kernel of a variant, not compiled yet."""
    match variant:
        case matmul.Variant():
            return matmul.kernel(variant)
        case rows.Variant():
            return rows.kernel(variant)
        case columns.Variant():
            return columns.kernel(variant)
    return reduction.kernel(variant)


def compile_all(compute_capabilities: tuple[tuple[int, int], ...]) -> Iterator[Compiled]:
    """Compile `variants()`; one or two seconds each."""
    for variant in variants():
        yield compile_one(variant, compute_capabilities)


def translate(kernel: Kernel, compute_capability: tuple[int, int]) -> tuple[str, list[str]]:
    """A kernel's PTX, and what in it is `contractible`."""
    with mock.patch.object(nvvm, "compile_ir", wraps=nvvm.compile_ir) as compile_ir:
        ptx = kernel.ptx(compute_capability)
    modules = compile_ir.call_args.args[0]
    return ptx, contractible(modules if isinstance(modules, str) else "".join(modules), ptx)


def needs(ptx: str, architecture: str) -> Needs:
    """What the assembler reports; ValueError if it does not."""
    log = assemble(ptx, architecture).log

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise ValueError(f"the assembler reports no {pattern!r}: {log!r}")
        return int(found[1])

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Needs(number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), spills)


def contractible(llvm: str, ptx: str) -> list[str]:
    """The floating-point instructions that a compiler may fuse or that flush subnormals; there should be none.

    NVVM fuses the operators of LLVM, so that a fused one looks in the PTX like an fma that was asked for; what the
    functions of `device.Operations` become is no operator. A negation, -0 - x, is exact and may stay.
    """
    operators = re.findall(r"= (f(?:add|sub|mul|div|rem)\b .*)", llvm)
    arithmetic = re.findall(r"^\s+(?:@\S+\s+)?((?:add|sub|mul|mad|fma|div)\.\S*f(?:32|64))\s", ptx, re.MULTILINE)
    return [text for text in operators if not re.match(r"fsub \w+ (?:0x8000000000000000|-0\.0\S*), ", text)] + [
        name for name in arithmetic if ".rn" not in name or ".ftz" in name
    ]
