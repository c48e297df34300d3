"""Times of mm, log_softmax and mean in the mode beside standard PyTorch, on this machine.

On a GPU the host time is that of a call that does not wait for the GPU, the device time that of a call in a CUDA graph,
whose operands stay in its cache. On a CPU there is one time. All are medians, in microseconds. The benchmarks of the
repository measure more carefully.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..mode import set_batch_invariant_mode

_REPEATS = 7
_CALLS = 20
_PAUSE = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    devices = ("cpu", "cuda")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=devices, default=default, help="a GPU by default, where there is one")


class Case(NamedTuple):
    """A call to be timed."""

    name: str
    shape: str
    dtype: str
    call: Callable[[], object]


def run(options: argparse.Namespace) -> int:
    """Print a table; 2 if the device is not there."""
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("torch.cuda.is_available() is False; choose --device cpu")
        return 2
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    rows = []
    with torch.inference_mode():
        for case in _cases(options.device):
            row: dict[str, Any] = {"operation": case.name, "shape": case.shape, "dtype": case.dtype}
            for key, enabled in (("standard", False), ("mode", True)):
                with set_batch_invariant_mode(enabled):
                    case.call()  # compiles
                    row[key] = {"host": _host(case.call), "device": _device(case.call)} if on_gpu else _wall(case.call)
            rows.append(row)
    if options.json:
        print(json.dumps({"device": where, "torch": torch.__version__, "microseconds": rows}, indent=2))
        return 0
    print(f"{where}, torch {torch.__version__}; microseconds of a call")
    columns = ("host", "device") if on_gpu else ("",)
    titles = [f"{way} {column}".strip() for column in columns for way in ("standard", "mode")]
    print(f"{'':12}{'':24}{'':10}" + "".join(f"{title:>17}" for title in titles))
    for row in rows:
        times = [row[way][column] if column else row[way] for column in columns for way in ("standard", "mode")]
        line = f"{row['operation']:12}{row['shape']:24}{row['dtype']:10}"
        print(line + "".join(f"{each:17.1f}" for each in times))
    return 0


def _cases(device: str) -> Iterator[Case]:
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    name = str(dtype).removeprefix("torch.")
    side, row = (4096, 32000) if on_gpu else (512, 4000)
    b = torch.randn(side, side, device=device).to(dtype)
    for M in (1, 16, 256) if on_gpu else (1, 16, 64):
        a = torch.randn(M, side, device=device).to(dtype)
        yield Case("mm", f"({M}, {side}) @ ({side}, {side})", name, lambda a=a: torch.mm(a, b))  # type: ignore[misc]
    for M in (1, 64):
        x = torch.randn(M, row, device=device).to(dtype)
        yield Case("log_softmax", f"({M}, {row})", name, lambda x=x: torch.log_softmax(x, -1))  # type: ignore[misc]
        yield Case("mean", f"({M}, {row})", name, lambda x=x: torch.mean(x, -1))  # type: ignore[misc]


def _host(call: Callable[[], object]) -> float:
    """Of calls that only queue work; the queue is emptied between samples, so that it never fills."""
    samples = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize()
        samples.append(_seconds(call, _CALLS) / _CALLS)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(samples[1:])


def _device(call: Callable[[], object]) -> float:
    """Of calls in a CUDA graph, by events around its replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    samples = []
    for _ in range(1 + _REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / _CALLS)
    return 1e3 * statistics.median(samples[1:])


def _wall(call: Callable[[], object], shortest: float = 0.01) -> float:
    """On a CPU. A pause before each sample lets other threads come to rest."""
    number = 1
    while (spent := _seconds(call, number)) < shortest:
        number *= 2 if spent <= 0 else max(2, min(10, round(shortest / spent)))
    samples = []
    for _ in range(_REPEATS):
        time.sleep(_PAUSE)
        samples.append(_seconds(call, number) / number)
    return 1e6 * statistics.median(samples)


def _seconds(call: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, number):
        call()
    return time.perf_counter() - start
