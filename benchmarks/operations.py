"""Time PyTorch's operators in batch-invariant mode beside standard PyTorch, in one process.

    python benchmarks/operations.py [--device cuda|cpu] [--backend NAME] [--quick] [--json FILE]

On a GPU both are captured in CUDA graphs over rotating operands, which are replayed in turn (see timing.py). A time is
the median of the samples, the floor what an H200 or H100 allows (see bounds.py; on other devices there is none), and
the last column the speed relative to the standard.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bounds
import torch
from records import spread
from timing import Samples, alternate, capture, rotations, wall_samples

import bikernels
from bikernels_torch import set_batch_invariant_mode

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class Measurement(NamedTuple):
    """One operator on one shape, microseconds per call."""

    name: str
    dtype: str
    standard: float
    invariant: float
    floor: float | None


class Workload(NamedTuple):
    """Operands to rotate over, the call, and its least work."""

    name: str
    dtype: str
    make: Callable[[], tuple[torch.Tensor, ...]]
    call: Callable[..., torch.Tensor]
    flops: float
    bytes: int


def product(m: int, n: int, k: int, dtype: str, device: torch.device) -> Workload:
    """x (M, K) times the transpose of a weight (N, K)."""

    def make() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(rows, k, device=device).to(DTYPES[dtype]) for rows in (m, n))

    size = (m * k + n * k + m * n) * DTYPES[dtype].itemsize
    return Workload(f"mm {m}x{n}x{k}", dtype, make, lambda x, w: torch.mm(x, w.T), 2.0 * m * n * k, size)


def reduction(name: str, rows: int, n: int, dtype: str, device: torch.device) -> Workload:
    """A reduction of (rows, n)."""
    call = {
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "softmax": lambda x: torch.softmax(x, -1),
        "mean(-1)": lambda x: torch.mean(x, -1),
        "mean(0)": lambda x: torch.mean(x, 0),
    }[name]
    size = rows * n * DTYPES[dtype].itemsize * (2 if "softmax" in name else 1)
    return Workload(
        f"{name} {rows}x{n}", dtype, lambda: (torch.randn(rows, n, device=device).to(DTYPES[dtype]),), call, 0, size
    )


def decode(batch: int, keys: int, dtype: str, device: torch.device) -> Workload:
    """Attention of the newest token of every sequence, with 4 heads to one of keys."""
    heads, groups, width = 32, 8, 128

    def make() -> tuple[torch.Tensor, ...]:
        shapes = (batch, heads, 1, width), *[(batch, groups, keys, width)] * 2
        return tuple(torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in shapes)

    call = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    size = (2 * groups * keys + 2 * heads) * batch * width * DTYPES[dtype].itemsize
    return Workload(f"attention {batch}x{heads}, {keys} keys", dtype, make, call, 0, size)


def workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """Shapes of a language model on a GPU; smaller ones on a CPU."""
    if device.type == "cpu":
        for dtype in ("fp32", "fp64", "bf16"):
            for m, n, k in ((1024, 1024, 1024), (64, 4096, 4096), (1, 4096, 4096)):
                yield product(m, n, k, dtype, device)
        for name in ("log_softmax", "softmax", "mean(-1)", "mean(0)"):
            for dtype in ("bf16", "fp32"):
                yield reduction(name, 512, 4096, dtype, device)
        return
    for m in (1, 16, 128, 2048) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        shapes = [(4096, 4096)] if quick else [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1024, 4096)]
        for n, k in shapes:
            yield product(m, n, k, "bf16", device)
    yield product(4096, 4096, 4096, "fp32", device)
    yield product(4096, 4096, 4096, "fp64", device)
    for rows, n in ((1, 151936), (64, 151936), (1024, 151936), (8192, 4096)):
        for name in ("log_softmax", "softmax", "mean(-1)", "mean(0)"):
            for dtype in ("bf16",) if quick else ("bf16", "fp32"):
                yield reduction(name, rows, n, dtype, device)
    for batch, keys in ((8, 128), (1, 4096), (8, 4096)) if quick else itertools.product((1, 8, 64), (128, 1024, 4096)):
        yield decode(batch, keys, "bf16", device)


MODES = {"standard": contextlib.nullcontext, "invariant": set_batch_invariant_mode}


def samples(workload: Workload, device: torch.device) -> Samples:
    """Times of a call in each mode."""
    found: Samples = {}
    if device.type == "cpu":
        operands = workload.make()
        for name, mode in MODES.items():
            with mode():
                found |= wall_samples({name: functools.partial(workload.call, *operands)})
        return found
    graphs = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        rotated = [workload.make() for _ in range(rotations(workload.bytes))]
        for name, mode in MODES.items():
            with mode():
                workload.call(*rotated[0])
                graphs[name] = capture(functools.partial(workload.call, *operands) for operands in rotated)
        return alternate(graphs, len(rotated))


def main() -> int:
    """Print the table and, if asked to, write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", choices=tuple(bikernels.backends()))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    use = bikernels.use_backend(arguments.backend) if arguments.backend else contextlib.nullcontext()

    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "bikernels": bikernels.__version__,
        "contract": bikernels.contract_version,
        "backend": arguments.backend or "default",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'':28}{'dtype':6}{'standard us':>12}{'in mode us':>12}{'floor us':>10}{'x standard':>12}")
    results = []
    with torch.inference_mode(), use:
        for workload in workloads(device, arguments.quick):
            timed = samples(workload, device)
            standard, invariant = (spread(timed[name]).median for name in MODES)
            floor = None
            if bounds.known(str(machine["device"])):
                floor = bounds.floor_us(str(machine["device"]), workload.dtype, workload.flops, workload.bytes)
            results.append(Measurement(workload.name, workload.dtype, standard, invariant, floor))
            bound = "" if floor is None else f"{floor:.1f}"
            print(
                f"{workload.name:28}{workload.dtype:6}{standard:>12.1f}{invariant:>12.1f}{bound:>10}"
                f"{standard / invariant:>12.2f}",
                flush=True,
            )
    if arguments.json:
        record = {"machine": machine, "microseconds": [result._asdict() for result in results]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
