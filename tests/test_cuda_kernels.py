"""Every CUDA C++ kernel compiles, without a GPU, for each architecture, and spills no register."""

from __future__ import annotations

import collections
import functools
import zlib
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="needs the cuda13 extra")

from bikernels import contract
from bikernels.backend.cupy import compile as compiler
from bikernels.backend.cupy.compile import all_kernels

ARCHITECTURES = ("sm_80", "sm_90a")
NEWER = ("sm_100a", "sm_120")

REDUCTIONS_SHARE = {"sm_80": 22, "sm_90a": 14}
"""One in so many kernels of each reduction: of hundreds that differ by little, and most of sm_80 are sm_90a's, too."""
OPERANDS = ("ELEMENT", "ROWS", "A_K_CONTIGUOUS", "B_K_CONTIGUOUS", "A_ALONG_K", "B_ALONG_K")
"""In which kernels of one schedule differ."""


@functools.cache
def kernels(arch: str, every: bool) -> dict[str, compiler.Kernel]:
    """All, or of each schedule of the products one dtype and layout, and a share of each reduction's."""
    found: collections.defaultdict[str, list[compiler.Kernel]] = collections.defaultdict(list)
    for kernel in all_kernels(arch):
        macros = dict(kernel.macros)
        if kernel.source == "elementwise.cu" and arch == ARCHITECTURES[0] and not every:
            continue  # they have nothing of an architecture's own
        operation = macros.get("OPERATION")
        schedule = operation or str(kernel._replace(macros=tuple(kv for kv in kernel.macros if kv[0] not in OPERANDS)))
        found[f"{kernel.source} {schedule}"].append(kernel)

    def chosen(group: str, members: list[compiler.Kernel]) -> list[compiler.Kernel]:
        if every:
            return members
        share = REDUCTIONS_SHARE[arch] if "OPERATION" in dict(members[0].macros) else len(members)
        return members[zlib.crc32(group.encode()) % min(share, len(members)) :: share]

    return {str(kernel): kernel for group, members in found.items() for kernel in chosen(group, members)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_kernel")
        listed = [(arch, kernel) for arch in ARCHITECTURES for kernel in kernels(arch, every).values()]
        metafunc.parametrize(("arch", "kernel"), listed, ids=str)


def test_no_spills(arch: str, kernel: compiler.Kernel) -> None:
    for function in compiler.resources(kernel, arch):
        assert function.spill_bytes == 0, function
        assert function.local_bytes == 0, function
        assert not function.serialized, function


@pytest.mark.parametrize("arch", NEWER)
def test_newer_architectures(arch: str) -> None:
    """One kernel of each source."""
    by_source = {kernel.source: kernel for kernel in all_kernels(arch)}
    for kernel in by_source.values():
        for function in compiler.resources(kernel, arch):
            assert function.spill_bytes == 0, function


def test_spills_are_seen() -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
        "ptxas info    : Function properties for f\n"
        "ptxas         .     48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads\n"
        "ptxas info    : Used 255 registers\n"
    )
    match = compiler._FUNCTION.search(log)
    assert match is not None
    assert (match["stack"], match["stores"], match["loads"], match["registers"]) == ("48", "40", "44", "255")


def test_a_binary_is_known_by_what_its_source_includes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"first.cu": '#include "a.cuh"\n', "a.cuh": '#include "b.cuh"\n', "b.cuh": "int b;\n", "second.cu": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    of = compiler._sources_text.__wrapped__
    before = of("first.cu"), of("second.cu")
    (tmp_path / "b.cuh").write_text("int c;\n")
    assert of("first.cu") != before[0] and of("second.cu") == before[1]


def test_constants_come_from_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    macros = compiler.contract_macros()
    assert macros["SUM_LANES"] == str(contract.SUM_LANES)
    numbers = contract.EXP["float32"]._replace(low=-50.0)
    monkeypatch.setitem(contract.EXP, "float32", numbers)
    assert compiler.contract_macros() != macros


def test_float_literals_are_exact() -> None:
    macros = compiler.contract_macros()
    for dtype in ("float32", "float64"):
        literal = macros[f"EXP_{dtype}_LOG2E".upper()].strip("()").removesuffix("f" if dtype == "float32" else "")
        assert float.fromhex(literal) == contract.EXP[dtype].log2e
