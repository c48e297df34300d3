"""What the TMA writes to shared memory is what wgmma reads there, for every schedule. Needs no GPU.

How a kernel divides its tiles comes from the compiler, which evaluates the constants of `Operand` in wgmma.cuh; boxes
come from wgmma.py. How the TMA swizzles a box, and how wgmma finds an element from a descriptor (the canonical layouts
of "Asynchronous Warpgroup Level Matrix Shared Memory Layout" in the PTX manual), is written down here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("cuda.core", reason="needs the cuda13 extra")
pytest.importorskip("cupy", reason="needs the cuda13 extra")

from bikernels.backend.cupy import compile as compiler
from bikernels.backend.cupy.matmul import wgmma, wgmma_copy
from bikernels.backend.cupy.matmul.problem import SHARED_BYTES, Problem
from bikernels.backend.cupy.matmul.wgmma import Schedule
from bikernels.contract import ARITHMETIC
from bikernels.specs import Layout, MatmulSpec

GROUP = ARITHMETIC["tc16f25"].group
BLOCK = 64
"""Rows of a that an instruction takes."""
EIGHT = 8
"""Elements in 16 bytes, and lines of a block of the canonical layouts."""

PROBE = """
template <int ROWS, bool K_CONTIGUOUS>
__device__ void probe() {
    using O = Operand<ROWS, K_CONTIGUOUS>;
    const MatrixDescriptor first = O::descriptor(0);
    asm volatile("OPERAND %0 %1 %2 %3 %4 %5 %6 %7;" ::"r"(ROWS), "r"((int)K_CONTIGUOUS), "r"(O::WIDTH), "r"(O::SLABS),
                 "r"(O::LINES), "r"(O::SLAB_BYTES), "r"(first.low), "r"(first.high));
#pragma unroll
    for (int block = 0; block < (ROWS + 63) / 64; block++)
#pragma unroll
        for (int group = 0; group < TILE_K / GROUP_K; group++)
            asm volatile("OFFSET %0;" ::"r"(O::offset(block, group)));
}
"""


class Operand(NamedTuple):
    """The constants of an `Operand` of wgmma.cuh."""

    width: int
    slabs: int
    lines: int
    slab_bytes: int
    low: int
    high: int
    offsets: tuple[int, ...]
    """Of every group of K, for one block of rows after the other."""


def ptx(source: str) -> str:
    """What NVRTC makes of it; ptxas, which does not know the probe's lines, does not see it. Needs no driver."""
    from cuda.bindings import nvrtc

    def check(answer: tuple[Any, ...]) -> Any:
        assert int(answer[0]) == 0, answer
        return answer[-1]

    options = (
        "gpu-architecture=compute_90a",
        "std=c++17",
        f"include-path={compiler.SOURCES}",
        "device-as-default-execution-space",
    )
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"probe.cu", 0, [], []))
    check(nvrtc.nvrtcCompileProgram(program, len(options), [f"--{option}".encode() for option in options]))
    text = b" " * check(nvrtc.nvrtcGetPTXSize(program))
    check(nvrtc.nvrtcGetPTX(program, text))
    check(nvrtc.nvrtcDestroyProgram(program))
    return text.decode()


@functools.cache
def operands(k: int) -> dict[tuple[int, bool], Operand]:
    """By rows and whether they are contiguous along K, of all tiles of that length along K."""
    schedules = [schedule for schedule in wgmma.SCHEDULES + wgmma_copy.SCHEDULES if schedule.k == k]
    rows = sorted({length for schedule in schedules for length in (schedule.m, schedule.n)})
    calls = "".join(f"probe<{length}, {along}>();" for length in rows for along in ("true", "false"))
    kernel = schedules[0].kernel("wgmma.cuh", "bfloat16", True, True)
    text = ptx(compiler._program(kernel) + PROBE + f'extern "C" __global__ void probes() {{ {calls} }}')

    registers: dict[str, int] = {}
    found: dict[tuple[int, bool], Operand] = {}
    for line in text.splitlines():
        if move := re.match(r"\s*mov\.[bsu]32\s+(%r\d+), (-?\d+);", line):
            registers[move[1]] = int(move[2]) & 0xFFFFFFFF
        elif match := re.match(r"\s*(OPERAND|OFFSET) (.*);", line):
            values = [registers[name] for name in match[2].split()]
            if match[1] == "OPERAND":
                length, along, width, slabs, lines, slab_bytes, low, high = values
                key = length, bool(along)
                found[key] = Operand(width, slabs, lines, slab_bytes, low, high, ())
            else:
                found[key] = found[key]._replace(offsets=(*found[key].offsets, values[0]))
    assert len(found) == 2 * len(rows)
    return found


# ------------------------------------------------------------------------------------------------ what hardware does


def swizzled(address: Any, width: int) -> Any:
    """Where a byte goes that would lie at `address` without the swizzle of that width in bytes (0: none)."""
    return address ^ ((address >> 7) % (width // 16) << 4) if width else address


def read(low: int, high: int, k_contiguous: bool, rows: int) -> Any:
    """Addresses of the rows x 16 elements that wgmma reads for a descriptor."""
    start, leading, stride = ((field & 0x3FFF) << 4 for field in (low, low >> 16, high))
    width = {0: 0, 1: 128, 2: 64, 3: 32}[high >> 30]
    row, k = np.ogrid[:rows, :GROUP]
    if k_contiguous:
        assert width == 128  # the only one of these kernels
        return swizzled(start + row // EIGHT * stride + row % EIGHT * width + k * 2, width)
    if not width:
        return start + row // EIGHT * stride + row % EIGHT * 2 + k // EIGHT * leading + k % EIGHT * 16
    line = width // 2
    return swizzled(start + row // line * leading + row % line * 2 + k // EIGHT * stride + k % EIGHT * width, width)


# ------------------------------------------------------------------------------------------------------------- checks


class Recorded(NamedTuple):
    """In place of `TensorMaps`: what it is made of."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Side(NamedTuple):
    """An operand of a schedule: its rows in a tile, and the CTAs that share it."""

    schedule: Schedule
    name: str
    k_contiguous: bool

    def __str__(self) -> str:
        return "-".join(map(str, (*self.schedule, self.name, "k" if self.k_contiguous else "mn")))

    @property
    def rows(self) -> int:
        return self.schedule.m if self.name == "a" else self.schedule.n

    @property
    def sharers(self) -> int:
        return self.schedule.cluster_n if self.name == "a" else self.schedule.cluster_m


def sides() -> Iterator[Side]:
    for schedule in wgmma.SCHEDULES:
        for name in "ab":
            for k_contiguous in (True, False):
                yield Side(schedule, name, k_contiguous)


def brought(side: Side, length: int) -> tuple[Recorded, int]:
    """The map of an operand of that many rows, and the bytes that a stage waits for."""
    k = 8 * side.schedule.k
    line = k if side.k_contiguous else -(-length // wgmma.ELEMENTS) * wgmma.ELEMENTS
    strides = (line, 1) if side.k_contiguous else (1, line)
    rows, columns = Layout("bfloat16", (length, k), strides), Layout("bfloat16", (k, length), strides[::-1])
    out = Layout("bfloat16", (length, length), (length, 1))
    problem = Problem.of(MatmulSpec("tc16f25", rows, columns, None, out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wgmma, "TensorMaps", Recorded)
        maps: Any
        maps, of_operand = wgmma._maps(problem, side.schedule, side.k_contiguous, side.name)
    return maps, int(of_operand["bytes"])


@pytest.mark.parametrize("side", list(sides()), ids=str)
def test_wgmma_reads_what_the_tma_wrote(side: Side) -> None:
    tile_k = side.schedule.k
    operand = operands(tile_k)[side.rows, side.k_contiguous]
    for length in (1000, max(1, side.rows - 3)):
        maps, expected_bytes = brought(side, length)
        width, lines = maps.box[:2]
        assert maps.box[2:] == (1, 1)
        assert max(maps.box) <= wgmma.LONGEST_BOX
        assert maps.swizzle in (0, width * 2)
        assert width == operand.width

        # Every element of a tile gets a number; memory around the tile holds -1.
        tile = 64 * 1024
        shared = np.full(tile + side.rows * tile_k * 2 + BLOCK * 128 * 2, -1)
        arrived = 0
        part = operand.lines // side.sharers
        inner, line = np.meshgrid(np.arange(width), np.arange(lines))
        for slab in range(operand.slabs):
            for begin in range(0, operand.lines, part):
                for outer in range(begin, begin + part, min(part, wgmma.LONGEST_BOX)):
                    box = tile + slab * operand.slab_bytes + outer * operand.width * 2
                    assert box % (8 * maps.swizzle or 128) == 0
                    address = swizzled(box + (line * width + inner) * 2, maps.swizzle)
                    assert (shared[address] == -1).all()
                    along, across = inner + slab * width, line + outer
                    row, k = (across, along) if side.k_contiguous else (along, across)
                    shared[address] = row * tile_k + k
                    arrived += address.size * 2
        assert arrived == expected_bytes

        instruction = min(side.rows, BLOCK) if side.name == "a" else side.rows
        blocks = -(-side.rows // instruction)
        groups = tile_k // GROUP
        existing = min(length, side.rows)
        for block in range(blocks):
            for group in range(groups):
                low = operand.low + (tile + operand.offsets[block * groups + group] >> 4)
                address = read(low, operand.high, side.k_contiguous, instruction)
                row, k = np.ogrid[:instruction, :GROUP]
                row = row + block * instruction
                wanted = row * tile_k + group * GROUP + k
                assert (shared[address] == wanted)[(row < existing)[:, 0]].all(), (length, block, group)


@pytest.mark.parametrize("schedule", wgmma.SCHEDULES + wgmma_copy.SCHEDULES, ids=str)
def test_shared_memory(schedule: Schedule) -> None:
    """A CTA fits, and rows of an instruction that a narrow tile does not have lie within its memory."""
    assert schedule.resident >= 1
    assert schedule.shared_bytes <= SHARED_BYTES
    last = (schedule.stages - 1) * schedule.m * schedule.k * 2
    for k_contiguous in (True, False):
        operand = operands(schedule.k)[schedule.m, k_contiguous]
        for offset in operand.offsets:
            address = read(operand.low + (last + offset >> 4), operand.high, k_contiguous, BLOCK)
            assert address.max() < schedule.shared_bytes
