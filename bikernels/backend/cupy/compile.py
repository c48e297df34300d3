"""Compiles the kernels with NVRTC, on a machine with or without a GPU, and keeps the results on disk.

A kernel is a source file of the folder `kernels` and the macros that make one instance of it. The contract's constants
come in as macros too (`contract_macros`), so that they are written once, in `contract.py`.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ... import contract
from .._disk_cache import stored
from .parameters import MAX_DIMS

SOURCES = Path(__file__).parent / "kernels"

_COMPILING = threading.Lock()
"""cuda.core cannot be imported by two threads at once; and what one compiles, the others then find."""


class Kernel(NamedTuple):
    """One instance of a source file: what is compiled into one binary."""

    source: str
    """Name of a file in the folder `kernels`."""
    macros: tuple[tuple[str, str | int], ...]

    def __str__(self) -> str:
        return f"{self.source}({', '.join(f'{name}={value}' for name, value in self.macros)})"


# ------------------------------------------------------------------------------------------------------------- source


def contract_macros() -> dict[str, str]:
    """Every constant of the contract that a kernel reads, as the text of a C++ literal."""
    macros = {
        "SUM_LANES": str(contract.SUM_LANES),
        "SUM_CHUNK": str(contract.SUM_CHUNK),
        "TENSOR_CORE_GROUP": str(max(kind.group for kind in contract.ARITHMETIC.values() if kind.is_tensor_core)),
    }
    for code, dtype in enumerate(contract.FLOAT_DTYPES + contract.INTEGER_DTYPES):
        macros[f"DTYPE_{dtype.upper()}"] = str(code)
    for dtype, bits in contract.CANONICAL_NAN.items():
        macros[f"NAN_{dtype.upper()}"] = hex(bits) + ("ull" if contract.ITEMSIZE[dtype] == 8 else "u")
    for dtype, suffix in (("float32", "f"), ("float64", "")):
        for function, constants in (("EXP", contract.EXP[dtype]), ("LOG", contract.LOG[dtype])):
            for name, value in constants._asdict().items():
                macros[f"{function}_{dtype}_{name}".upper()] = _literal(value, suffix)
        for name, value in contract.NORMAL[dtype]._asdict().items():
            macros[f"NORMAL_{dtype}_{name}".upper()] = _literal(value, suffix)
    for name, value in contract.CIRCULAR._asdict().items():
        macros[f"CIRCULAR_{name}".upper()] = _literal(value, "")
    for name in ("NORMAL_LARGEST", "EXPM1_LOWEST", "EXP2_LARGEST", "TANH_LARGEST"):
        macros[name] = _literal(getattr(contract, name), "")
    return macros


def _literal(value: float | int | tuple[float, ...], suffix: str) -> str:
    """C++ text of a number (exact, in hexadecimal), of a word of bits, or of a list of numbers."""
    if isinstance(value, tuple):
        return ", ".join(_literal(item, suffix) for item in value)
    return f"({value.hex()}{suffix})" if isinstance(value, float) else f"{value:#x}{'u' if suffix else 'ull'}"


def _program(kernel: Kernel) -> str:
    """The text that is compiled: all macros, then the source file."""
    macros = contract_macros() | {"MAX_DIMS": str(MAX_DIMS)} | {name: str(value) for name, value in kernel.macros}
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + f'#include "{kernel.source}"\n'


@functools.cache
def _sources_text(source: str) -> bytes:
    """The source file and all that it includes, directly or not: what a binary depends on."""
    found: dict[str, bytes] = {}
    left = [source]
    while left:
        if (name := left.pop()) not in found:
            found[name] = (SOURCES / name).read_bytes()
            left += re.findall(r'^#include "(.+)"', found[name].decode(), re.MULTILINE)
    return b"".join(name.encode() + b"\0" + found[name] + b"\0" for name in sorted(found))


# ------------------------------------------------------------------------------------------------------------ compiler


def architecture(compute_capability: tuple[int, int]) -> str:
    """The compiler's name of a GPU; with "a" where it has instructions of its own that kernels may use."""
    major, minor = compute_capability
    return f"sm_{major}{minor}{'a' if major in (9, 10) else ''}"


def _options(arch: str) -> dict[str, object]:
    """Nothing is fused, flushed or approximated."""
    return {
        "arch": arch,
        "std": "c++17",
        "fma": False,
        "ftz": False,
        "prec_div": True,
        "prec_sqrt": True,
        "use_fast_math": False,
        "device_as_default_execution_space": True,  # NVRTC 13.0 would take a generic lambda for the host's
        "ptxas_options": "-v",
    }


@functools.cache
def _compiler_version() -> str:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise RuntimeError(f"NVRTC does not answer: {status}")
    return f"nvrtc {major}.{minor}"


class _Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str | bytes) -> None:
        self.text += text if isinstance(text, str) else text.decode(errors="replace")


def _compile(kernel: Kernel, arch: str) -> tuple[bytes, str]:
    """The binary and the compiler's log."""
    from cuda.core import Program, ProgramOptions

    program, log = _program(kernel), _Log()
    options = ProgramOptions(name=Path(kernel.source).stem, include_path=[str(SOURCES)], **_options(arch))
    try:
        binary = Program(program, "c++", options).compile("cubin", logs=log).code
    except Exception as error:
        raise RuntimeError(
            f"{kernel} did not compile for {arch} with {_compiler_version()}; if this GPU is newer than the compiler, "
            f"upgrade nvidia-cuda-nvrtc\n{error}\n{log.text}"
        ) from error
    return bytes(binary), log.text


# --------------------------------------------------------------------------------------------------------------- cache


def cubin(kernel: Kernel, arch: str) -> Path:
    """The path of the kernel's binary for `arch`, compiled unless it is in the cache (`_disk_cache.py`)."""
    key = hashlib.sha256()
    for part in (str(kernel), _program(kernel), repr(_options(arch)), _compiler_version()):
        key.update(part.encode() + b"\0")
    key.update(_sources_text(kernel.source))
    name = f"{Path(kernel.source).stem}-{arch}-{key.hexdigest()[:32]}.cubin"
    with _COMPILING:
        return stored(name, lambda: _compile(kernel, arch)[0])


# -------------------------------------------------------------------------------------------------------------- report


class Resources(NamedTuple):
    """What the compiler says of one function of a binary."""

    kernel: str
    registers: int
    spill_bytes: int
    local_bytes: int
    serialized: bool
    """Whether asynchronous products (wgmma) wait for one another, because the compiler had to move an accumulator."""


_FUNCTION = re.compile(
    r"Function properties for (?P<name>\w+)\s+"
    r"\S.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers"
)


def resources(kernel: Kernel, arch: str) -> list[Resources]:
    """Compile the kernel, without the cache, and read the resources of its functions."""
    _, log = _compile(kernel, arch)
    found = [
        Resources(
            f"{kernel}: {match['name']}",
            int(match["registers"]),
            int(match["stores"]) + int(match["loads"]),
            int(match["stack"]),
            "wgmma.mma_async instructions are serialized" in log,
        )
        for match in _FUNCTION.finditer(log)
    ]
    if not found:
        raise RuntimeError(f"the compiler's log for {kernel} names no function:\n{log}")
    return found


def all_kernels(arch: str) -> Iterator[Kernel]:
    """Every kernel that the backend can launch on a GPU of this architecture ("sm_80", "sm_90a", …)."""
    from . import attention, elementwise, reduction_kernels
    from .matmul import kernels

    compute_capability = int("".join(filter(str.isdigit, arch)))
    yield from kernels(compute_capability)
    yield from reduction_kernels.kernels(compute_capability)
    yield from elementwise.kernels()
    yield from attention.kernels()


def compile_all(arch: str) -> list[Resources]:
    """Compile `all_kernels` and report on their functions."""
    return [function for kernel in all_kernels(arch) for function in resources(kernel, arch)]
