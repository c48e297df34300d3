"""Which schedule of wgmma.py a product takes: what was measured for it on this GPU, else what a model predicts.

What was measured is for m rounded up to a power of two; the model says for which of the other lengths it will do.

The table and the model decide speed and no bit: a wrong entry is slow and still right. `benchmarks/tune.py` measures
and writes tables; those of the package lie in the folder `tables`, and BIKERNELS_SCHEDULES may name another file, which
goes first.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from ....contract import ARITHMETIC
from ..launch import GPU
from .problem import Problem, along_k
from .wgmma import SCHEDULES, Choice, Schedule

ENVIRONMENT_TABLE = "BIKERNELS_SCHEDULES"
GROUP = ARITHMETIC["tc16f25"].group
FEWEST_ROWS = 8
"""Of an instruction."""
TABLES = Path(__file__).parent / "tables"
BAND, BANDS = 4, (1, 2, 4, 8, 16)
"""Of tiles along m: where nothing is known, and what is worth a try."""
FEW_TILES = 8
"""Tiles along a short side, which lie side by side if they share a tile of the long one."""
TOLERANCE = 1.1
"""Of a prediction."""


def choose(problem: Problem, gpu: GPU) -> Choice:
    """The choice for a product on a GPU."""
    for table in (os.environ.get(ENVIRONMENT_TABLE), *tables(gpu)):
        measured = _read(table).get(key(problem))
        if measured is not None and _suits(measured, _nearby(problem), gpu):
            return _with_band(measured, problem)
        if measured is not None:
            break
    return _fastest(_nearby(problem), gpu)[0]


def _nearby(problem: Problem) -> Problem:
    """One whose m is rounded up by little: a server's products have many lengths, and the model takes its time."""
    step = max(1, min(16, problem.m // 16))
    return problem._replace(m=-(-problem.m // step) * step)


@functools.lru_cache(maxsize=4096)
def _suits(measured: Choice, problem: Problem, gpu: GPU) -> bool:
    """Whether a schedule that was measured with more rows is still one to take.

    With 513 to 640 rows tiles fill the GPU otherwise than with the 1024 of the table. The model may be wrong about a
    schedule; it tells by how much it falls behind, between there and here.
    """
    there = _measured(problem)

    def behind(problem: Problem) -> float:
        return predicted_us(problem, measured, gpu) / _fastest(problem, gpu)[1]

    return problem.m == there.m or behind(problem) <= TOLERANCE * behind(there)


def _with_band(measured: Choice, problem: Problem) -> Choice:
    """The band was measured for so many tiles; of fewer it would leave some to walk all of the weights alone."""
    tiles, there = (_tiles(other, measured.schedule, measured.swap) for other in (problem, _measured(problem)))
    return measured if tiles == there else measured._replace(band=_band(*tiles))


def _tiles(problem: Problem, schedule: Schedule, swap: bool) -> tuple[int, int]:
    return schedule.tiles(*(problem.n, problem.m) if swap else (problem.m, problem.n))


def _band(tiles_m: int, tiles_n: int) -> int:
    """Of how many tiles along m. Few that share a tile of the other side lie side by side, and it is read once."""
    if tiles_n < tiles_m and tiles_n <= FEW_TILES:
        return 1
    if tiles_m <= FEW_TILES:
        return tiles_m
    return -(-tiles_m // 2) if tiles_m <= 2 * FEW_TILES else BAND


@functools.lru_cache(maxsize=4096)
def _fastest(problem: Problem, gpu: GPU) -> tuple[Choice, float]:
    """The choice of which the model says that it takes the least time, and how long."""
    times = {choice: predicted_us(problem, choice, gpu) for choice in choices(problem, gpu)}
    return min(times.items(), key=lambda item: item[1])


def choices(problem: Problem, gpu: GPU) -> list[Choice]:
    """Every schedule, straight and swapped, whose tile is not mostly outside of the product.

    Swapped first if that makes the shorter side m: of equals the first is chosen, and bands then span more of m.
    """
    early = _memory_us(problem, gpu) > EARLY * _flops_us(problem)
    found = []
    for swap in (problem.m > problem.n, problem.m <= problem.n):
        m, n, b = (problem.n, problem.m, problem.a) if swap else (problem.m, problem.n, problem.b)
        for schedule in SCHEDULES:
            if not schedule.takes(along_k(b)):
                continue
            rows, columns = schedule.m * schedule.cluster_m, schedule.n * schedule.cluster_n
            if rows < 2 * max(m, FEWEST_ROWS) and columns < 2 * max(n, FEWEST_ROWS):
                found.append(Choice(schedule, swap, early, _band(*schedule.tiles(m, n))))
    return found


def variants(problem: Problem, choice: Choice) -> list[Choice]:
    """The same schedule, early and not, over every band worth a try."""
    tiles_m, tiles_n = _tiles(problem, choice.schedule, choice.swap)
    bands = sorted({min(band, tiles_m) for band in (*BANDS, _band(tiles_m, tiles_n))})
    return [choice._replace(early=early, band=band) for early in (False, True) for band in bands]


# -------------------------------------------------------------------------------------------------------------- tables


@functools.cache
def tables(gpu: GPU) -> tuple[Path, ...]:
    """The package's tables for a chip with as many multiprocessors; first that of the memory most like this GPU's."""
    major, minor = gpu.compute_capability
    found = TABLES.glob(f"sm_{major}{minor}-{gpu.multiprocessors}-*.json")

    def unlike(table: Path) -> float:
        bytes_per_us: float = json.loads(table.read_text())["bytes_per_us"]
        return abs(math.log(bytes_per_us / gpu.bytes_per_us))

    return tuple(sorted(found, key=unlike))


def key(problem: Problem) -> str:
    """What a table knows a product by: layouts and lengths, m rounded up to a power of two from FEWEST_ROWS on."""
    layouts = "".join("k" if along_k(strides) else "n" for strides in (problem.a, problem.b))
    return f"{layouts} {problem.matrices}x{_measured_rows(problem)}x{problem.n}x{problem.k}"


def _measured_rows(problem: Problem) -> int:
    return max(FEWEST_ROWS, 1 << (problem.m - 1).bit_length())


def _measured(problem: Problem) -> Problem:
    return problem._replace(m=_measured_rows(problem))


@functools.cache
def _read(path: str | Path | None) -> dict[str, Choice]:
    """A table's choices; none if there is no such file."""
    if not path or not Path(path).is_file():
        return {}
    products = json.loads(Path(path).read_text())["products"]
    known = set(SCHEDULES)
    entries = {name: Choice(Schedule(*schedule), *rest) for name, (schedule, *rest) in products.items()}
    return {name: choice for name, choice in entries.items() if choice.schedule in known}


# --------------------------------------------------------------------------------------------------------------- model

# Fitted by hand to timings on an H200; `benchmarks/tune.py --record` keeps timings beside predictions.
CYCLES_PER_US = 1560.0
FLOPS_PER_US = 1.4e9
L2_BYTES_PER_US = {128: 20e6, 64: 9e6, 32: 8.5e6, 16: 5.1e6}
"""By what the distance between an operand's lines is a multiple of. CTAs that ask for the same lines get them together,
but only lines that begin and end where those of the L2 do.
"""
MEMORY_EFFICIENCY = 0.95
"""Of reads."""
EARLY = 4
"""How many times longer than arithmetic the memory takes from which on the next kernel starts early."""
SHARED_BYTES_PER_CYCLE = 128
WRITTEN_BYTE = 0.14
"""What a byte that arrives in shared memory costs of one that is read there."""
LINE_CYCLES = 1.44
"""Of a line of at most 128 bytes that the TMA brings, however short it is."""
LINE_EFFICIENCY = {128: 1.0, 64: 1.0, 32: 0.73, 16: 0.46}
"""Of device memory, by the bytes of a line."""
STEP_CYCLES, STAGE_CYCLES = 11, 1.5
"""Of an instruction that waits for the one before it, and of waiting for a stage."""
LATENCY_CYCLES = 1670
"""From asking for a stage until it is there. One of the ring is being read meanwhile."""
EPILOGUE_CYCLES, OUTPUT_CYCLES = 75, 59
"""Between one tile and the next, and for each element that a thread writes."""
CLUSTER_FACTOR = 1.06
"""How much longer CTAs take that wait for one another."""
START_US, OVERLAP = 2.0, 0.27
"""OVERLAP: the part of the second slowest resource that does not hide behind the slowest."""


def predicted_us(problem: Problem, choice: Choice, gpu: GPU) -> float:
    """Microseconds of a product: the slower of a multiprocessor's work, the L2 and device memory, and a start."""
    return _model(problem, choice.swap, gpu).predicted_us(choice.schedule)


@functools.lru_cache(maxsize=64)
def _model(problem: Problem, swap: bool, gpu: GPU) -> _Model:
    return _Model(problem.swap() if swap else problem, gpu)


class _Model:
    """Of one product: what all schedules have in common is computed once, since there are a hundred of them."""

    def __init__(self, problem: Problem, gpu: GPU) -> None:
        self.m, self.n, self.k, self.matrices = problem.m, problem.n, problem.k, problem.matrices
        self.multiprocessors = gpu.multiprocessors
        self.along_k = along_k(problem.a), along_k(problem.b)
        self.l2_rates = tuple(L2_BYTES_PER_US[_aligned_bytes(strides)] for strides in (problem.a, problem.b))
        self.flops_us = _flops_us(problem)
        self.memory_us = functools.cache(functools.partial(_memory_us, problem, gpu))

    def predicted_us(self, schedule: Schedule) -> float:
        m, n, k, multiprocessors = self.m, self.n, self.k, self.multiprocessors
        tile = _tile(schedule, *self.along_k)
        tiles_m, tiles_n = schedule.tiles(m, n)
        ctas = tiles_m * tiles_n * tile.cluster * self.matrices
        stages = -(-k // schedule.k)
        groups = stages * (schedule.k // GROUP)
        rows_m = min(schedule.m, m) if self.along_k[0] else schedule.m
        rows_n = min(schedule.n, n) if self.along_k[1] else schedule.n
        lines = rows_m * tile.lines_m + rows_n * tile.lines_n
        step = max(tile.step, lines * LINE_CYCLES) * (CLUSTER_FACTOR if tile.cluster > 1 else 1)
        busiest, rounds = -(-ctas // multiprocessors), -(-ctas // (multiprocessors * tile.resident))
        alone = max(groups * step + stages * STAGE_CYCLES, stages * LATENCY_CYCLES / (schedule.stages - 1))
        cycles = max(busiest * groups * step, rounds * alone) + (busiest - 1) * tile.epilogue

        of_a, of_b = self.l2_rates
        brought = schedule.m / schedule.cluster_n / of_a + schedule.n / schedule.cluster_m / of_b
        memory_us = self.memory_us(tile.efficiency_m, tile.efficiency_n)
        slowest = (cycles / CYCLES_PER_US, ctas * k * 2 * brought, memory_us, self.flops_us)
        second, first = sorted(slowest)[-2:]
        return START_US + first + OVERLAP * second


class _Tile(NamedTuple):
    """What a schedule costs whatever the product."""

    cluster: int
    resident: int
    step: float
    """Cycles of a group of K but for the lines that it brings."""
    lines_m: float
    """That a group of K takes of each row."""
    lines_n: float
    efficiency_m: float
    efficiency_n: float
    epilogue: float
    """Cycles, shared among the CTAs of a multiprocessor."""


@functools.cache
def _tile(schedule: Schedule, a_along_k: bool, b_along_k: bool) -> _Tile:
    blocks = -(-schedule.m // 64)  # of 64 rows, which an instruction takes
    arithmetic = blocks * max(schedule.n / 2, STEP_CYCLES)
    read, written = blocks * (64 + schedule.n) * 32, (schedule.m + schedule.n) * 32
    shared = (read + WRITTEN_BYTE * written) / SHARED_BYTES_PER_CYCLE
    of_m, of_n = _line_bytes(schedule.m, a_along_k), _line_bytes(schedule.n, b_along_k)
    outputs = schedule.m * schedule.n / (128 * schedule.consumers)  # of a thread
    return _Tile(
        schedule.cluster,
        schedule.resident,
        max(arithmetic, shared),
        GROUP * 2 / of_m,
        GROUP * 2 / of_n,
        LINE_EFFICIENCY[of_m],
        LINE_EFFICIENCY[of_n],
        (EPILOGUE_CYCLES + OUTPUT_CYCLES * outputs) / schedule.resident,
    )


def _memory_us(problem: Problem, gpu: GPU, of_a: float = 1.0, of_b: float = 1.0) -> float:
    """Each operand read once, at this part of the speed, and the result written."""
    itemsize, m, n, k = 2, problem.m, problem.n, problem.k
    elements = problem.matrices * (m * k / of_a + n * k / of_b + m * n)
    return itemsize * elements / (MEMORY_EFFICIENCY * gpu.bytes_per_us)


def _flops_us(problem: Problem) -> float:
    return 2.0 * problem.matrices * problem.m * problem.n * problem.k / FLOPS_PER_US


def _line_bytes(tile: int, k_contiguous: bool) -> int:
    """Of what the TMA brings in one piece; see `Operand` in wgmma.cuh."""
    return 128 if k_contiguous else 2 * math.gcd(tile, 64)


def _aligned_bytes(strides: tuple[int, int]) -> int:
    """A power of two, at most 128, of which the distance between lines is a multiple."""
    return math.gcd(2 * max(strides), 128)
