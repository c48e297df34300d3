"""What the compiler makes of the Numba kernels: nothing fused, nothing spilled. No GPU is needed."""

from __future__ import annotations

import itertools
import re
import zlib
from typing import Any
from unittest import mock

import numpy as np
import pytest

import bikernels
from bikernels.contract import ACCUMULATE, ARITHMETIC, ITEMSIZE, PORTABLE_ARITHMETIC, SUM_LANES
from bikernels.specs import ONE_FOR_A_ROW, REDUCTIONS, Layout, MatmulSpec, ReductionSpec
from bikernels.views import Device, View

from .cases import FLOATS, assert_same_bits, draw, rows_to_reduce

for package in ("numba_cuda", "cuda.core", "cuda.bindings.nvjitlink"):
    pytest.importorskip(package, reason=f'{package} is not installed; pip install "bikernels[cuda13]"')
try:
    pytest.importorskip("cuda.bindings.nvjitlink").version()
except RuntimeError as error:  # the Python package is there, the library is not
    pytest.skip(f'nvJitLink cannot be loaded ({error}); pip install "bikernels[cuda13]"', allow_module_level=True)

from numba import cuda, types  # noqa: E402

from bikernels.backend.numba import (  # noqa: E402
    columns,
    device,
    formulas,
    inspection,
    launch,
    matmul,
    reduction,
    rows,
    schedules,
)

GPUS = ((8, 0), (9, 0))
"""Compute capabilities, the oldest first."""
TENSOR_CORE_STEP = max(arithmetic.group for arithmetic in ARITHMETIC.values() if arithmetic.is_tensor_core)
"""K of a tensor-core instruction: one group of tc16f25, two of tc8f24."""
SHARED_BYTES = 99 << 10
"""Shared memory that every GPU from sm_80 on has for a thread block."""


PRODUCTS_SHARE, REDUCTIONS_SHARE, ROWS_SHARE, COLUMNS_SHARE = 4, 9, 27, 3
"""One in so many kernels of each product, which differ by their tiles, and of each reduction: of the general ones,
which differ by stage, mode and dtype, those of rows and those of columns, unless --every-kernel asks for all.
"""


def family(variant: Any) -> str:
    """Kernels of one operation."""
    if isinstance(variant, matmul.Variant):
        return f"{variant.arithmetic}-{variant.operand}"
    return variant.operation


def families(every: bool) -> dict[str, list[Any]]:
    """The kernels that are compiled; of products in float16, which are those in bfloat16 but for names, one of each
    instruction.
    """
    found: dict[str, list[Any]] = {}
    for name, members in itertools.groupby(sorted(inspection.variants(), key=family), key=family):
        chosen = list(members)
        if not every and isinstance(chosen[0], matmul.Variant) and chosen[0].operand == "float16":
            chosen = list({one.tile.instruction: one for one in chosen}.values())
        elif not every:
            shares = {
                matmul.Variant: PRODUCTS_SHARE,
                reduction.Variant: REDUCTIONS_SHARE,
                rows.Variant: ROWS_SHARE,
                columns.Variant: COLUMNS_SHARE,
            }
            of_kinds = {kind: [one for one in chosen if isinstance(one, kind)] for kind in shares}
            chosen = [
                one
                for kind, share in shares.items()
                for one in of_kinds[kind][zlib.crc32(name.encode()) % share :: share]
            ]
        found[name] = chosen
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernels" in metafunc.fixturenames:
        chosen = families(metafunc.config.getoption("every_kernel"))
        metafunc.parametrize("kernels", chosen.values(), ids=chosen.keys())


def faults(kernel: inspection.Compiled) -> list[str]:
    """Why this kernel is not fit to run; empty if it is."""
    found = [f"{instruction!r} may be fused or flushes subnormals" for instruction in kernel.contractible]
    if ".local" in kernel.ptx:
        found.append("the PTX keeps an array in local memory")
    for gpu, needs in kernel.needs.items():
        if needs.stack_bytes or needs.spill_bytes:
            found.append(f"compute capability {gpu}: {needs}")
    if isinstance(kernel.variant, matmul.Variant):
        groups = re.findall(r"mma(?:\.mma_async|)\.sync\.aligned\.m\d+n\d+(k\d+)\.", kernel.ptx)
        arithmetic = ARITHMETIC[kernel.variant.arithmetic]
        if set(groups) != ({f"k{TENSOR_CORE_STEP}"} if arithmetic.is_tensor_core else set()):
            found.append(f"tensor-core products of {sorted(set(groups))}")
        if kernel.variant.tile.instruction != "wgmma" and kernel.variant.shared_bytes > SHARED_BYTES:
            found.append(f"{kernel.variant.shared_bytes} bytes of shared memory")
        if "div.s64" in kernel.ptx or "div.u64" in kernel.ptx:
            found.append("a division of 64 bits")
    return found


def test_kernels_compile_clean(kernels: list[Any]) -> None:
    wrong = {variant: reasons for variant in kernels if (reasons := faults(inspection.compile_one(variant, GPUS)))}
    assert not wrong, "\n".join(f"{variant}: {'; '.join(reasons)}" for variant, reasons in wrong.items())


def test_every_operation_and_class_is_compiled() -> None:
    classes = {f"{arithmetic.name}-{operand}" for arithmetic in ARITHMETIC.values() for operand in arithmetic.covers}
    same_kernels = {"tc8f24-bfloat16", "tc8f24-float16"}  # as tc16f25
    assert families(every=False).keys() == families(every=True).keys() == {*REDUCTIONS} | classes - same_kernels
    reductions = [variant for name in REDUCTIONS for variant in families(every=False)[name]]
    assert any(isinstance(variant, columns.Variant) for variant in reductions)
    stages = {variant.stage for variant in reductions if isinstance(variant, reduction.Variant)}
    assert stages == {reduction.WHOLE, *reduction.PASSES, reduction.END}
    of_rows = [variant for variant in reductions if isinstance(variant, rows.Variant)]
    assert {variant.dtype for variant in of_rows} == {"bfloat16", "float32"}
    for kinds in zip(*((one.width == 1, one.ctas > 1, one.streams) for one in of_rows), strict=True):
        assert {*kinds} == {True, False}


def test_the_check_sees_what_the_compiler_fuses() -> None:
    def written_with_operators(out: Any, a: Any, b: Any) -> None:
        out[0] = a[0] * b[0] + out[0]

    def written_with_functions(out: Any, a: Any, b: Any) -> None:
        out[0] = cuda.libdevice.fadd_rn(cuda.libdevice.fmul_rn(a[0], b[0]), -out[0])

    signature = types.void(*[types.CPointer(types.float32)] * 3)
    ptx, found = inspection.translate(launch.Kernel("", lambda: (written_with_operators, signature), 32), GPUS[0])
    assert "fma.rn.f32" in ptx
    assert len(found) == 2
    ptx, found = inspection.translate(launch.Kernel("", lambda: (written_with_functions, signature), 32), GPUS[0])
    assert "fma" not in ptx
    assert not found


def test_the_check_sees_flushed_subnormals() -> None:
    assert inspection.contractible("", "\tfma.rn.ftz.f32 \t%f4, %f1, %f2, %f3;\n") == ["fma.rn.ftz.f32"]
    assert inspection.contractible("", "\tadd.f64 \t%fd3, %fd1, %fd2;\n") == ["add.f64"]


def test_the_check_sees_spills() -> None:
    variant = next(one for one in reduction.variants() if one.operation == "softmax")
    kernel = reduction.kernel(variant)
    crowded = kernel._replace(blocks=4, older_blocks=None)  # 32 registers a thread
    ptx, found = inspection.translate(crowded, GPUS[0])
    assert not found
    assert inspection.needs(ptx, kernel.architecture(GPUS[0])).spill_bytes > 0


def test_few_long_rows_have_the_large_clusters_that_a_gpu_holds() -> None:
    gpu = Device("cuda", 0)

    def planned(rows_: int, n: int, held: int, processors: int = 132, capability: tuple[int, int] = (9, 0)) -> int:
        row = Layout("bfloat16", (rows_, n), (n, 1))
        with (
            mock.patch.object(rows, "compute_capability", return_value=capability),
            mock.patch.object(rows, "multiprocessors", return_value=processors),
            mock.patch.object(rows, "clusters_at_once", return_value=held),
            mock.patch.object(rows, "on"),
        ):
            found = rows._plan_for(ReductionSpec("softmax", 1, x=row, out=row), gpu)
        return 0 if found is None else found.variant.ctas

    large, portable = rows.LARGE_CTAS, device.MOST_CTAS
    assert planned(1, 151936, held=1) == planned(8, 151936, held=14) == large
    assert planned(1, 151936, held=0) == planned(8, 151936, held=7) == portable
    assert planned(64, 151936, held=14) == planned(8, 151936, held=14, processors=78) == portable
    assert planned(16, 32000, held=0) == portable
    assert planned(4096, 32000, held=14) == 1
    assert planned(1, 151936, held=14, capability=(8, 0)) == 0


ROWS = ((9, 200), (9, 201), (8, 4096), (9, 9001), (5, 152000))
"""Rows and their length. Of odd ones, rows begin anywhere in a vector."""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("operation", rows.ROW_OPERATIONS)
def test_rows_in_registers_have_the_bits_of_the_general_kernels(
    backend: Any, operation: str, dtype: str, rng: np.random.Generator
) -> None:
    if backend.name != "numba":
        pytest.skip("the kernels are those of the backend 'numba'")
    gpu = Device("cuda", backend.xp.cuda.runtime.getDevice())
    has_clusters = launch.compute_capability(gpu) >= device.FIRST_WITH_CLUSTERS
    taken = set()
    for count, n in ROWS:
        x = rows_to_reduce(rng, operation, (count, n), dtype)
        row, arrays = Layout(dtype, x.shape, (n, 1)), [x]
        layouts = {"out": Layout(dtype, (count,), (1,)) if operation in ONE_FOR_A_ROW else row, "x": row}
        for name in formulas.BESIDE.get(operation, ()):
            if name == "grad":
                layouts[name] = row
                arrays.append(draw(rng, x.shape, dtype))
            elif name in ("weight", "bias"):
                layouts[name] = Layout(dtype, x.shape, (0, 1))
                arrays.append(draw(rng, (n,), dtype))
            elif operation.endswith("backward"):  # else it is a result
                layouts[name] = Layout("float32", x.shape, (1, 0))
                arrays.append(abs(draw(rng, (count,), "float32")))
        spec = ReductionSpec(operation, 1, correction=1.0, eps=1e-3, **layouts)
        operands = [backend.put(one) for one in arrays]

        def result(launched: Any, shape: Any, operands: list[Any], dtype: Any) -> np.ndarray:
            out = backend.put(np.zeros(shape, dtype))
            launched(0, out.data.ptr, *(one.data.ptr for one in operands))
            return backend.get(out)

        expected = result(reduction.prepare_general(spec, gpu), layouts["out"].shape, operands, x.dtype)
        width = 1 if n % 2 else 16 // x.itemsize
        given = operation, dtype, tuple(layouts)
        tried = [rows.choose(*given, as_if, n, width, 132, has_clusters) for as_if in (1, 8, 16, 2**16)]  # rows
        for variant in dict.fromkeys(tried):
            if variant is not None and rows.holds(variant, count, gpu):
                variant = variant._replace(ahead=min(variant.ahead, 1))  # a row that there is
                taken.add(variant)
                with mock.patch.object(rows, "choose", return_value=variant):
                    actual = result(reduction.prepare(spec, gpu), layouts["out"].shape, operands, x.dtype)
                assert_same_bits(actual, expected, f"{count} x {n}, {variant}")
    assert len({variant.width for variant in taken}) > 1
    assert len({variant.warps for variant in taken}) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_tile_gives_the_same_bits(backend: Any, dtype: str, rng: np.random.Generator) -> None:
    if backend.name != "numba":
        pytest.skip("the tiles are those of the backend 'numba'")
    gpu = Device("cuda", backend.xp.cuda.runtime.getDevice())

    def view(x: Any) -> View:
        return View(x.data.ptr, dtype, x.shape, tuple(step // x.itemsize for step in x.strides), gpu)

    for arithmetic in sorted({backend.arithmetic[dtype], PORTABLE_ARITHMETIC[dtype]}):
        for m, n, k in ((70, 136, 304), (33, 75, 131)):  # rows that can be read in vectors, and rows that cannot
            a, b = draw(rng, (m, k), dtype), draw(rng, (k, n), dtype)
            expected = bikernels.matmul(a, b, arithmetic=arithmetic, backend="cpu")
            along_k = backend.put(a), backend.put(b.T).T
            across_k = backend.put(a.T).T, backend.put(b)
            for left, right in (along_k, across_k):
                for tile in schedules.tiles(arithmetic, dtype, launch.compute_capability(gpu)):
                    for swapped in (False, True):
                        out = backend.put(np.zeros_like(expected))
                        x, y, z = view(left), view(right), view(out)
                        of_a, of_b, of_out = (one.description.layout for one in (x, y, z))
                        spec = MatmulSpec(arithmetic, of_a, of_b, None, of_out)
                        with mock.patch.object(matmul, "choose", return_value=(tile, swapped)):
                            matmul.prepare(spec, gpu)(0, z.pointer, x.pointer, y.pointer)
                        assert_same_bits(backend.get(out), expected, f"{arithmetic} {tile}, swapped {swapped}")


@pytest.mark.parametrize("operation", columns.OPERATIONS_TAKEN)
def test_schedules_of_columns_fit(operation: str) -> None:
    for dtype, n in itertools.product(FLOATS, (2, 40, 256, 257, 1025, 2049, 8192, 16384, 70000, 262144)):
        width, accumulate = device.VECTOR_BYTES // ITEMSIZE[dtype], ITEMSIZE[ACCUMULATE[dtype]]
        for clusters in (False, True):
            for plan in columns.schedules(operation, n, width, clusters):
                assert plan.shared_bytes(n, operation, width, accumulate) <= SHARED_BYTES, (dtype, n, plan)
                assert clusters or plan.blocks == 1
                lanes_of_chunk = plan.parts * plan.lanes * (columns.THREADS // plan.vectors)
                assert lanes_of_chunk == SUM_LANES or (plan.parts == 1 and n <= lanes_of_chunk < SUM_LANES), (n, plan)
            assert columns.choose(operation, 1, n, width, 4096 // width, clusters, 132) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "operation"),
    [
        *(("bfloat16", "log_softmax"), ("float16", "softmax"), ("float32", "var"), ("float64", "mean")),
        *(("bfloat16", "layer_norm_weight_backward"), ("float32", "rms_norm_weight_backward")),
    ],
)
def test_every_schedule_of_columns_gives_the_same_bits(
    backend: Any, dtype: str, operation: str, rng: np.random.Generator
) -> None:
    if backend.name != "numba":
        pytest.skip("the schedules are those of the backend 'numba'")
    gpu = Device("cuda", backend.xp.cuda.runtime.getDevice())
    tried, width = set(), device.VECTOR_BYTES // ITEMSIZE[dtype]
    for n in (2, 33, 300, 2049, 5000, 17000):
        x = np.ascontiguousarray(rows_to_reduce(rng, operation, (40, n), dtype).T)
        beside = {"grad": draw(rng, x.shape, dtype)} | {
            name: abs(rng.standard_normal(n)).astype(np.float32) for name in ("mean", "rstd")
        }
        operands = [backend.put(array) for array in (x, *(beside[name] for name in formulas.BESIDE.get(operation, ())))]
        results: list[np.ndarray] = []
        spec = columns_spec(operation, dtype, x.shape)
        shape = (40,) if spec.one_for_a_row else x.shape
        plans = {plan for clusters in (False, True) for plan in columns.schedules(operation, n, width, clusters)}
        if launch.compute_capability(gpu) < device.FIRST_WITH_CLUSTERS:
            plans = {plan for plan in plans if plan.blocks == 1}
        launches = {plan: columns.build(spec, gpu, plan, None) for plan in sorted(plans)}
        tried |= {(plan.at_once, plan.blocks > 1) for plan in plans}
        for name, run in {"rows": reduction.prepare_general(spec, gpu), **launches}.items():
            out = backend.put(np.zeros(shape, x.dtype))
            run(0, out.data.ptr, *(operand.data.ptr for operand in operands))
            results.append(backend.get(out))
            assert_same_bits(results[-1], results[0], f"{operation} of {n} elements, {name}")
    enough = 2 * len(columns._ways(operation))  # by blocks alone and in clusters
    assert len(tried) == enough or launch.compute_capability(gpu) < device.FIRST_WITH_CLUSTERS


def columns_spec(operation: str, dtype: str, shape: tuple[int, int]) -> ReductionSpec:
    """The reduction of the first axis of a contiguous array."""
    n, count = shape
    x = Layout(dtype, (count, n), (1, count))
    out = Layout(dtype, (count,), (1,)) if operation in ONE_FOR_A_ROW else x
    of_rows = Layout(ACCUMULATE[dtype], (count, n), (0, 1))
    beside = {name: x if name == "grad" else of_rows for name in formulas.BESIDE.get(operation, ())}
    return ReductionSpec(operation, 1, x, out, **beside, correction=1.0)


@pytest.mark.gpu
def test_columns_at_any_address(backend: Any, rng: np.random.Generator) -> None:
    if backend.name != "numba":
        pytest.skip("the schedules are those of the backend 'numba'")
    gpu = Device("cuda", backend.xp.cuda.runtime.getDevice())
    x = draw(rng, (300, 40), "float32")
    spec = columns_spec("sum", "float32", x.shape)
    whole = backend.put(np.concatenate([x[0, :1], x.ravel()]))
    results = backend.put(np.zeros(2 * 40, x.dtype))
    run = reduction.prepare(spec, gpu)
    expected = bikernels.sum(x, axis=0, backend="cpu")
    for source in (whole[1:], whole[1:].copy()):
        for out in (results[1:41], results[:40]):
            assert columns.takes(spec)
            out[...] = 0
            run(0, out.data.ptr, source.data.ptr)
            assert_same_bits(backend.get(out), expected)
