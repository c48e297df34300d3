"""What the compiler makes of the Numba kernels: nothing fused, nothing spilled. No GPU is needed."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from typing import Any

import pytest

for package in ("numba_cuda", "cuda.core", "cuda.bindings.nvjitlink"):
    pytest.importorskip(package, reason=f'{package} is not installed; pip install "bikernels[cuda13]"')
try:
    pytest.importorskip("cuda.bindings.nvjitlink").version()
except RuntimeError as error:  # the Python package is there, the library is not
    pytest.skip(f'nvJitLink cannot be loaded ({error}); pip install "bikernels[cuda13]"', allow_module_level=True)

from numba import cuda, types  # noqa: E402

from bikernels.backend.numba import inspection, launch, matmul, reduction  # noqa: E402
from bikernels.contract import ARITHMETIC  # noqa: E402

GPUS = ((8, 0), (9, 0))
"""Compute capabilities, the oldest first."""


def family(variant: Any) -> str:
    """Kernels that are one piece of source with one register budget."""
    if isinstance(variant, matmul.Variant):
        return f"{variant.arithmetic}-{variant.operand}"
    return variant.stage


FAMILIES = {name: list(members) for name, members in groupby(sorted(inspection.variants(), key=family), key=family)}


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), context) as pool:
        yield pool


def faults(kernel: inspection.Compiled) -> list[str]:
    """Why this kernel is not fit to run; empty if it is."""
    found = [f"{instruction!r} may be fused or flushes subnormals" for instruction in kernel.contractible]
    if ".local" in kernel.ptx:
        found.append("the PTX keeps an array in local memory")
    for gpu, needs in kernel.needs.items():
        if needs.stack_bytes or needs.spill_bytes:
            found.append(f"compute capability {gpu}: {needs}")
    if isinstance(kernel.variant, matmul.Variant):
        on_tensor_cores = "mma.sync.aligned.m16n8k16" in kernel.ptx
        if on_tensor_cores != ARITHMETIC[kernel.variant.arithmetic].is_tensor_core:
            found.append("no tensor-core product" if not on_tensor_cores else "an unexpected tensor-core product")
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_compile_clean(name: str, workers: ProcessPoolExecutor) -> None:
    compile_one = functools.partial(inspection.compile_one, compute_capabilities=GPUS)
    found = {kernel.variant: faults(kernel) for kernel in workers.map(compile_one, FAMILIES[name])}
    wrong = {variant: reasons for variant, reasons in found.items() if reasons}
    assert not wrong, "\n".join(f"{variant}: {'; '.join(reasons)}" for variant, reasons in wrong.items())


def test_every_stage_and_class_is_compiled() -> None:
    classes = {f"{arithmetic.name}-{operand}" for arithmetic in ARITHMETIC.values() for operand in arithmetic.covers}
    same_kernels = {"tc8f24-bfloat16", "tc8f24-float16"}  # as tc16f25
    assert set(FAMILIES) == {*reduction.WHOLE, *reduction.SPLIT} | classes - same_kernels


def test_the_check_sees_what_the_compiler_fuses() -> None:
    def written_with_operators(out: Any, a: Any, b: Any) -> None:
        out[0] = a[0] * b[0] + out[0]

    def written_with_functions(out: Any, a: Any, b: Any) -> None:
        out[0] = cuda.libdevice.fadd_rn(cuda.libdevice.fmul_rn(a[0], b[0]), -out[0])

    signature = types.void(*[types.CPointer(types.float32)] * 3)
    ptx, found = inspection.translate(launch.Kernel(written_with_operators, signature, 32), GPUS[0])
    assert "fma.rn.f32" in ptx
    assert len(found) == 2
    ptx, found = inspection.translate(launch.Kernel(written_with_functions, signature, 32), GPUS[0])
    assert "fma" not in ptx
    assert not found


def test_the_check_sees_flushed_subnormals() -> None:
    assert inspection.contractible("", "\tfma.rn.ftz.f32 \t%f4, %f1, %f2, %f3;\n") == ["fma.rn.ftz.f32"]
    assert inspection.contractible("", "\tadd.f64 \t%fd3, %fd1, %fd2;\n") == ["add.f64"]


def test_the_check_sees_spills() -> None:
    variant = next(one for one in reduction.variants() if one.stage == "softmax")
    kernel = reduction.kernel(variant)
    crowded = kernel._replace(blocks=4)  # 32 registers a thread
    ptx, found = inspection.translate(crowded, GPUS[0])
    assert not found
    assert inspection.needs(ptx, GPUS[0]).spill_bytes > 0
