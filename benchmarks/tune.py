"""Measure which schedule is fastest for each product on this GPU, and write the table that the library reads.

    python benchmarks/tune.py --table FILE [--shapes NxK ...] [--m M ...] [--layouts nk kn] [--dtype bf16|fp16]
                              [--seconds LIMIT] [--record FILE]

Without --shapes: the shapes of `benchmarks/matmul.py`. Layout nk multiplies by the transpose of a row-major N x K
weight, kn by a row-major K x N one. Products that the table has already are kept unless they are measured again. Name
the file in BIKERNELS_SCHEDULES, or put it into the package's folder `bikernels/backend/cupy/matmul/tables`. A table
decides speed and no bit. --record keeps all timings, with the model's predictions, to judge the model by.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import DTYPE, LAYERS, ROWS, Shape
from products import view
from timing import alternate, capture, rotations, settle

from bikernels.backend.cupy.compile import Kernel, architecture, cubin
from bikernels.backend.cupy.launch import gpu
from bikernels.backend.cupy.matmul import wgmma
from bikernels.backend.cupy.matmul.choice import Choice, choices, key, predicted_us
from bikernels.backend.cupy.matmul.problem import Problem, along_k
from bikernels.specs import Layout, MatmulSpec

REPLAYS = 4
PROMISING = 2.5
"""Choices that the model puts further behind the best are not timed."""
MOST = 14
"""Choices that are timed for a product."""
LONG_US = 1000.0


def problem_of(m: int, n: int, k: int, layout: str, dtype: str) -> Problem:
    """x (M, K) row-major times the weight of that layout."""
    b = (1, k) if layout == "nk" else (n, 1)
    return Problem.of(
        MatmulSpec(
            "tc16f25",
            Layout(dtype, (m, k), (k, 1)),
            Layout(dtype, (k, n), b),
            None,
            Layout(dtype, (m, n), (n, 1)),
        )
    )


def promising(problem: Problem) -> list[Choice]:
    """The choices worth timing, by the model."""
    multiprocessors = gpu(0).multiprocessors
    ranked = sorted(choices(problem), key=lambda choice: predicted_us(problem, choice, multiprocessors))
    best = predicted_us(problem, ranked[0], multiprocessors)
    return [c for c in ranked[:MOST] if predicted_us(problem, c, multiprocessors) < PROMISING * best]


def kernel_of(problem: Problem, choice: Choice) -> Kernel:
    """What the choice runs."""
    if choice.swap:
        problem = problem.swap()
    return choice.schedule.kernel("matmul_wgmma.cu", problem.dtype, along_k(problem.a), along_k(problem.b))


def compile_ahead(problems: list[Problem]) -> None:
    """Compile every kernel that will be timed, in parallel."""
    kernels = list({kernel_of(problem, choice): None for problem in problems for choice in promising(problem)})
    arch = architecture(gpu(0).compute_capability)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(cubin, kernels, [arch] * len(kernels), chunksize=4))


def measure(problem: Problem, layout: str, buffer: torch.Tensor) -> dict[Choice, float]:
    """Median microseconds of each promising choice, beside one another."""
    m, n, k = problem.m, problem.n, problem.k
    weights = min(rotations(n * k * buffer.itemsize), buffer.numel() // (n * k))
    if predicted_us(problem, promising(problem)[0], gpu(0).multiprocessors) > LONG_US:
        weights = min(weights, 2)
    x = torch.randn(m, k, device="cuda", dtype=buffer.dtype)
    out = torch.empty(m, n, device="cuda", dtype=buffer.dtype)
    flat = [buffer[i * n * k : (i + 1) * n * k] for i in range(weights)]
    operands = [w.view(n, k).t() if layout == "nk" else w.view(k, n) for w in flat]

    def refuse() -> Any:
        raise ValueError("the operands are not aligned")

    graphs = {}
    for choice in promising(problem):
        launch = wgmma.prepare(problem, choice.schedule, choice.swap, 0, refuse)
        calls = [lambda w=w, launch=launch: launch(view(out), None, view(x), view(w), 1.0, 0.0) for w in operands]
        calls[0]()
        graphs[repr(choice)] = (choice, capture(calls))
    samples = alternate({name: graph for name, (_, graph) in graphs.items()}, len(operands), REPLAYS)
    return {graphs[name][0]: statistics.median(values) for name, values in samples.items()}


def shape(text: str) -> Shape:
    """Parse NxK."""
    n, k = text.split("x")
    return int(n), int(k)


def main() -> None:
    """Measure and write, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=LAYERS, type=shape)
    parser.add_argument("--m", nargs="+", type=int, default=ROWS[3:])
    parser.add_argument("--layouts", nargs="+", choices=("nk", "kn"), default=("nk", "kn"))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="write what there is after this time")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    start, name = time.perf_counter(), DTYPE[arguments.dtype]
    dtype = getattr(torch, name)
    cases = [
        (problem_of(m, n, k, layout, name), layout)
        for m in arguments.m
        for layout in arguments.layouts
        for n, k in arguments.shapes
    ]
    compile_ahead([problem for problem, _ in cases])
    print(f"compiled after {time.perf_counter() - start:.1f} s", flush=True)

    most = max(n * k for n, k in arguments.shapes)
    buffer = torch.randn(max(2 * most, 2**28), device="cuda", dtype=dtype)
    table: dict[str, Any] = {"gpu": gpu(0).name, "products": {}}
    if arguments.table.is_file():
        table = json.loads(arguments.table.read_text())
    record = []
    with torch.cuda.stream(torch.cuda.Stream()):
        settle()
        for problem, layout in cases:
            if time.perf_counter() - start > arguments.seconds:
                break
            times = measure(problem, layout, buffer)
            best = min(times, key=times.__getitem__)
            table["products"][key(problem)] = {"schedule": list(best.schedule), "swap": best.swap}
            record += [
                {
                    "product": [problem.m, problem.n, problem.k, layout],
                    "schedule": list(choice.schedule),
                    "swap": choice.swap,
                    "us": round(us, 3),
                    "predicted_us": round(predicted_us(problem, choice, gpu(0).multiprocessors), 3),
                }
                for choice, us in times.items()
            ]
    arguments.table.write_text(_lines(table))
    if arguments.record:
        arguments.record.write_text(json.dumps(record))
    print(f"{len(table['products'])} products in {arguments.table} after {time.perf_counter() - start:.1f} s")


def _lines(table: dict[str, Any]) -> str:
    """JSON with a line for each product."""
    products = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table["products"].items())
    return f'{{\n  "gpu": {json.dumps(table["gpu"])},\n  "products": {{\n{products}\n  }}\n}}\n'


if __name__ == "__main__":
    main()
