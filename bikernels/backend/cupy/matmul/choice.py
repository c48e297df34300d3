"""Which schedule of wgmma.py a product takes: what was measured for it on this GPU, else what a model predicts.

The table and the model decide speed and no bit: a wrong entry is slow and still right. `benchmarks/tune.py` measures
and writes tables; those of the package lie in the folder `tables`, one for each GPU, and BIKERNELS_SCHEDULES may name
another file, which goes first.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from ....contract import ARITHMETIC
from .problem import Problem, along_k
from .wgmma import SCHEDULES, Schedule

ENVIRONMENT_TABLE = "BIKERNELS_SCHEDULES"
GROUP = ARITHMETIC["tc16f25"].group
FEWEST_ROWS = 8
"""Of an instruction."""
TABLES = Path(__file__).parent / "tables"


class Choice(NamedTuple):
    """A schedule, and whether it computes the transposed product."""

    schedule: Schedule
    swap: bool


def choose(problem: Problem, device_name: str, multiprocessors: int) -> Choice:
    """The choice for a product on a GPU of that name (as the driver has it)."""
    measured = {**_read(TABLES / table_name(device_name)), **_read(os.environ.get(ENVIRONMENT_TABLE))}.get(key(problem))
    if measured is not None:
        return measured
    return min(choices(problem), key=lambda choice: predicted_us(problem, choice, multiprocessors))


def choices(problem: Problem) -> list[Choice]:
    """Every schedule, straight and swapped, whose tile is not mostly outside of the product."""
    found = []
    for swap in (False, True):
        m, n = (problem.n, problem.m) if swap else (problem.m, problem.n)
        for schedule in SCHEDULES:
            rows, columns = schedule.m * schedule.cluster_m, schedule.n * schedule.cluster_n
            if rows < 2 * max(m, 8) and columns < 2 * max(n, 8):
                found.append(Choice(schedule, swap))
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def table_name(device_name: str) -> str:
    """The file of a GPU's table."""
    return device_name.lower().replace(" ", "-") + ".json"


def key(problem: Problem) -> str:
    """What a table knows a product by: layouts and lengths, m rounded up to a power of two from FEWEST_ROWS on."""
    layouts = "".join("k" if along_k(strides) else "n" for strides in (problem.a, problem.b))
    m = max(FEWEST_ROWS, 1 << (problem.m - 1).bit_length())
    return f"{layouts} {problem.matrices}x{m}x{problem.n}x{problem.k}"


@functools.cache
def _read(path: str | Path | None) -> dict[str, Choice]:
    """A table's choices; none if there is no such file."""
    if not path or not Path(path).is_file():
        return {}
    products = json.loads(Path(path).read_text())["products"]
    known = set(SCHEDULES)
    entries = {name: Choice(Schedule(*entry["schedule"]), entry["swap"]) for name, entry in products.items()}
    return {name: choice for name, choice in entries.items() if choice.schedule in known}


# --------------------------------------------------------------------------------------------------------------- model

# Fitted by hand to timings on an H200; `benchmarks/tune.py --record` keeps timings beside predictions.
CYCLES_PER_US = 1980.0
FLOPS_PER_US = 7.8e8
BYTES_PER_US, L2_BYTES_PER_US = 4.2e6, 18e6
SHARED_BYTES_PER_CYCLE = 128
WRITTEN_BYTE = 0.36
"""What a byte that arrives in shared memory costs of one that is read there."""
LINE_CYCLES = 1.75
"""Of a line of at most 128 bytes that the TMA brings, however short it is."""
LINE_EFFICIENCY = {128: 1.0, 64: 1.0, 32: 0.73, 16: 0.46}
"""Of device memory, by the bytes of a line."""
STEP_CYCLES, STAGE_CYCLES = 15, 17
"""Of an instruction that waits for the one before it, and of waiting for a stage."""
EPILOGUE_CYCLES, OUTPUT_CYCLES = 150, 4
"""Between one tile and the next, and for each element that a thread writes."""
CLUSTER_FACTOR = 1.2
"""How much longer CTAs take that wait for one another."""
START_US, OVERLAP = 2.7, 0.125
"""OVERLAP: the part of the second slowest resource that does not hide behind the slowest."""


def predicted_us(problem: Problem, choice: Choice, multiprocessors: int) -> float:
    """Microseconds of a product: the slower of a multiprocessor's work, the L2 and device memory, and a start."""
    schedule, swap = choice
    if swap:
        problem = problem.swap()
    m, n, k = problem.m, problem.n, problem.k
    tiles_m, tiles_n = schedule.tiles(m, n)
    ctas = tiles_m * tiles_n * schedule.cluster * problem.matrices
    stages = -(-k // schedule.k)
    groups = stages * (schedule.k // GROUP)
    blocks = -(-schedule.m // 64)  # of 64 rows, which an instruction takes

    arithmetic = blocks * max(schedule.n / 2, STEP_CYCLES)
    read, written = blocks * (64 + schedule.n) * 32, (schedule.m + schedule.n) * 32
    shared = (read + WRITTEN_BYTE * written) / SHARED_BYTES_PER_CYCLE
    sides = ((schedule.m, m, problem.a), (schedule.n, n, problem.b))
    lines = sum(_lines(tile, length, along_k(strides)) for tile, length, strides in sides)
    step = max(arithmetic, shared, LINE_CYCLES * lines) * (CLUSTER_FACTOR if schedule.cluster > 1 else 1)
    busiest, rounds = -(-ctas // multiprocessors), -(-ctas // (multiprocessors * schedule.resident))
    outputs = schedule.m * schedule.n / (128 * schedule.consumers)  # of a thread
    epilogue = EPILOGUE_CYCLES + OUTPUT_CYCLES * outputs
    cycles = max(busiest * groups * step, rounds * (groups * step + stages * STAGE_CYCLES)) + (busiest - 1) * epilogue

    l2 = ctas * k * 2 * (schedule.m / schedule.cluster_n + schedule.n / schedule.cluster_m)
    operands = sum(length * k / LINE_EFFICIENCY[_line_bytes(tile, along_k(strides))] for tile, length, strides in sides)
    memory = 2 * problem.matrices * (operands + m * n)
    flops = 2.0 * problem.matrices * m * n * k
    slowest = (cycles / CYCLES_PER_US, l2 / L2_BYTES_PER_US, memory / BYTES_PER_US, flops / FLOPS_PER_US)
    second, first = sorted(slowest)[-2:]
    return START_US + first + OVERLAP * second


def _line_bytes(tile: int, k_contiguous: bool) -> int:
    """Of what the TMA brings in one piece; see `Operand` in wgmma.cuh."""
    return 128 if k_contiguous else 2 * math.gcd(tile, 64)


def _lines(tile: int, length: int, k_contiguous: bool) -> float:
    """Lines that a group of K takes, of a tile or, along K, of as many rows as there are."""
    rows = min(tile, length) if k_contiguous else tile
    return rows * GROUP * 2 / _line_bytes(tile, k_contiguous)
