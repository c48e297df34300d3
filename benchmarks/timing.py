"""How the benchmarks time: alternating samples of all the candidates, so that a drift of the clocks meets each of them.

On a GPU the calls are captured in a CUDA graph over rotating operands, so that neither launches nor a warm L2 flatter
anyone, and a sample is the time of a replay divided by the number of calls. Eager calls are timed apart, on the host.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch

ROTATED_BYTES = 512 * 2**20
MAX_CALLS = 160
REPLAYS = 7
PAUSE = 0.01
SETTLING_CALLS = 1000
FIRST_CALLS = 10

Call = Callable[[], object]
Samples = dict[str, list[float]]
"""Per candidate, microseconds of one call, in the order of measurement."""


# ---------------------------------------------------------------------------------------------------------------- GPU


def rotations(moved: int) -> int:
    """How many calls to capture where each reads `moved` bytes that no other call reads."""
    return min(MAX_CALLS, max(2, math.ceil(ROTATED_BYTES / max(moved, 1))))


def capture(calls: Iterable[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the calls, which must have run before; they may allocate. The current stream must not be the default.

    `torch.cuda.graph` would also collect garbage and empty the allocator's cache, which takes longer than most samples.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    return graph


def alternate(graphs: Mapping[str, torch.cuda.CUDAGraph], calls: int, replays: int = REPLAYS) -> Samples:
    """Replay the graphs in turn, after a round to warm up, without letting the GPU run idle.

    Every other round is in reverse order: near the power limit a graph runs faster after one that draws less, so each
    follows itself as often as another.
    """
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for turn in range(1 + replays):
        for name, graph in list(graphs.items())[:: -1 if turn % 2 else 1]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [1e3 * start.elapsed_time(end) / calls for start, end in pairs[1:]] for name, pairs in marks.items()}


def settle(limit: float = 3.0) -> None:
    """Multiply until three timings in a row agree to 1 %, or `limit` seconds: the clocks have then settled.

    The products draw little power. After heavy ones a GPU holds its clocks down for longer than a light case lasts.
    """
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.mm(a[:16], a)
    graph = capture([lambda: torch.mm(a[:16], a)] * SETTLING_CALLS)
    deadline = time.perf_counter() + limit
    recent: list[float] = []
    while time.perf_counter() < deadline:
        recent = [*recent[-2:], *alternate({"": graph}, SETTLING_CALLS, replays=1)[""]]
        if len(recent) == 3 and max(recent) < 1.01 * min(recent):
            return


def host_samples(
    candidates: Mapping[str, Call], synchronize: Call, calls: int = 2000, burst: int = 100, repeats: int = REPLAYS
) -> Samples:
    """Host time of eager calls, in microseconds.

    A synchronisation between bursts, outside the timed regions, keeps the launch queue from filling.
    """
    samples: Samples = {name: [] for name in candidates}
    gc.disable()
    try:
        for _ in range(1 + repeats):
            for name, call in candidates.items():
                spent = 0.0
                for _ in range(calls // burst):
                    synchronize()
                    start = time.perf_counter()
                    for _ in itertools.repeat(None, burst):
                        call()
                    spent += time.perf_counter() - start
                samples[name].append(1e6 * spent / (calls // burst * burst))
    finally:
        gc.enable()
    return {name: values[1:] for name, values in samples.items()}


# ---------------------------------------------------------------------------------------------------------------- CPU


def wall_samples(
    candidates: Mapping[str, Call], repeats: int = REPLAYS, shortest: float = 0.02, budget: float = 3.0
) -> Samples:
    """Wall time of calls on a CPU, in microseconds.

    The candidates take turns: `repeats` samples of about `shortest` seconds or more each, and fewer of a candidate that
    has used up its `budget` of seconds. A pause before each sample lets the other's threads come to rest.
    """
    samples: Samples = {name: [] for name in candidates}
    left = dict.fromkeys(candidates, budget)
    numbers = {}
    for name, call in candidates.items():
        call()  # compiles
        once = _seconds(call, 1)
        if once < shortest:  # the first calls find no cache filled and no thread awake
            once = min(_seconds(call, 1) for _ in range(FIRST_CALLS))
        numbers[name] = math.ceil(shortest / once)
        if numbers[name] == 1:
            samples[name].append(1e6 * once)
            left[name] -= once
    for _ in range(repeats):
        for name, call in candidates.items():
            if len(samples[name]) < repeats and (left[name] > 0 or not samples[name]):
                time.sleep(PAUSE)
                seconds = _seconds(call, numbers[name])
                samples[name].append(1e6 * seconds / numbers[name])
                left[name] -= seconds
    return samples


def _seconds(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, number):
        call()
    return time.perf_counter() - start
