"""Measure which schedule is fastest for each product on this GPU, and write the table that the library reads.

    python benchmarks/tune.py --table FILE [--shapes NxK ...] [--m M ...] [--layouts nk kn] [--dtype bf16|fp16]
                              [--groups small medium large | batched] [--most CHOICES] [--seconds LIMIT] [--record FILE]

Without --shapes: the shapes of `benchmarks/matmul.py`, whose groups these are; `batched` are the products of attention.
Layout nk multiplies by the transpose of a row-major N x K weight, kn by a row-major K x N one. Products that the table
has already are kept unless they are measured again. Name the file in BIKERNELS_SCHEDULES, or put it into the package's
folder `bikernels/backend/cupy/matmul/tables`. A table decides speed and no bit. --record keeps all timings, with the
model's predictions, to judge the model by, and those of PyTorch's product beside them.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import DTYPE, ROWS, Case, Selection, gpu_cases, shape
from products import TORCH, Operands, Product, torch_product, view
from timing import alternate, capture, rotations, settle

from bikernels.backend.cupy.compile import Kernel, architecture, cubin
from bikernels.backend.cupy.launch import gpu
from bikernels.backend.cupy.matmul import wgmma
from bikernels.backend.cupy.matmul.choice import Choice, choices, key, predicted_us, variants
from bikernels.backend.cupy.matmul.problem import Problem, along_k
from bikernels.specs import MatmulSpec

GROUPS = ("small", "medium", "large", "batched")
REPLAYS = 4
PROMISING = 2.5
"""Choices that the model puts further behind the best are not timed."""
MOST = 14
"""Choices that are timed for a product, unless --most says otherwise."""
FINALISTS = 3
"""Of these, all variants are timed."""
PAIRED = 6
"""Variants that are timed once more, each in turn with PyTorch's product alone: near the power limit a neighbour that
draws less helps.
"""
LONG_US = 1000.0


def operands(case: Case, buffer: torch.Tensor) -> list[Operands]:
    """Activations, results, and as many weights as the buffer holds or a benchmark rotates over."""
    lead = (case.batch,) if case.batch > 1 else ()
    size = case.batch * case.n * case.k
    x = torch.randn(*lead, case.m, case.k, device="cuda", dtype=buffer.dtype)
    out = torch.empty(*lead, case.m, case.n, device="cuda", dtype=buffer.dtype)
    made = []
    for first in range(0, min(rotations(case.weight_bytes), buffer.numel() // size) * size, size):
        flat = buffer[first : first + size]
        made.append(
            (x, flat.view(*lead, case.n, case.k).mT if case.layout == "nk" else flat.view(*lead, case.k, case.n), out)
        )
    return made


def problem_of(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> Problem:
    """What the library makes of a product of tensors."""
    of_a, of_b, of_out = (view(x).description.layout for x in (a, b, out))
    return Problem.of(MatmulSpec("tc16f25", of_a, of_b, None, of_out))


def promising(problem: Problem, most: int) -> list[Choice]:
    """The choices worth timing, by the model."""
    ranked = sorted(choices(problem, gpu(0)), key=lambda choice: predicted_us(problem, choice, gpu(0)))
    best = predicted_us(problem, ranked[0], gpu(0))
    return [c for c in ranked[:most] if predicted_us(problem, c, gpu(0)) < PROMISING * best]


def kernel_of(problem: Problem, choice: Choice) -> Kernel:
    """What the choice runs."""
    if choice.swap:
        problem = problem.swap()
    return choice.schedule.kernel("matmul_wgmma.cu", problem.dtype, along_k(problem.a), along_k(problem.b))


def compile_ahead(problems: list[Problem], most: int) -> None:
    """Compile every kernel that will be timed, in parallel."""
    kernels = list({kernel_of(problem, choice): None for problem in problems for choice in promising(problem, most)})
    arch = architecture(gpu(0).compute_capability)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(cubin, kernels, [arch] * len(kernels), chunksize=4))


class Measured(NamedTuple):
    """What was timed of a product."""

    problem: Problem
    us: dict[Choice, float]
    """Medians of each promising choice and of all variants of the best."""
    beside: float
    """The median of PyTorch's product."""
    best: Choice
    """The fastest in turn with PyTorch's product alone."""
    speed: float
    """Of the best, relative to PyTorch's product."""


def measure(case: Case, buffer: torch.Tensor, most: int) -> Measured:
    """Time a product's promising choices, then variants of the best of them, then the best of these one by one."""
    given = operands(case, buffer)
    problem = problem_of(*given[0])
    listed = promising(problem, most)
    if predicted_us(problem, listed[0], gpu(0)) > LONG_US:
        given = given[:2]

    def refuse() -> Any:
        raise ValueError("the operands are not aligned")

    def launched(choice: Choice) -> Product:
        launch = wgmma.prepare(problem, choice, 0, refuse)

        def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
            launch(torch.cuda.current_stream().cuda_stream, out.data_ptr(), a.data_ptr(), b.data_ptr())

        return product

    def timed(candidates: list[Choice]) -> dict[Choice, float]:
        graphs = {}
        products = {TORCH: torch_product} | {repr(choice): launched(choice) for choice in candidates}
        for name, product in products.items():
            product(*given[0])
            graphs[name] = capture(functools.partial(product, *each) for each in given)
        us = {name: statistics.median(values) for name, values in alternate(graphs, len(given), REPLAYS).items()}
        beside.append(us[TORCH])
        return {choice: us[repr(choice)] for choice in candidates}

    beside: list[float] = []
    first = timed(listed)
    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    second = timed([variant for choice in finalists for variant in variants(problem, choice)])
    us = first | second
    alone = {choice: timed([choice])[choice] / beside[-1] for choice in sorted(second, key=second.__getitem__)[:PAIRED]}
    return Measured(problem, us, statistics.median(beside), min(alone, key=alone.__getitem__), 1 / min(alone.values()))


def main() -> None:
    """Measure and write, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", type=shape)
    parser.add_argument("--m", nargs="+", type=int)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS[:3])
    parser.add_argument("--layouts", nargs="+", choices=("nk", "kn"), default=("nk", "kn"))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--most", type=int, default=MOST)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="write what there is after this time")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    start = time.perf_counter()
    rows = arguments.m or (None if arguments.groups == ["batched"] else ROWS[3:])
    selection = Selection(arguments.shapes, rows, arguments.layouts, (arguments.dtype,), arguments.groups)
    cases = gpu_cases(selection)
    dtype = getattr(torch, DTYPE[arguments.dtype])
    buffer = torch.randn(
        max(2 * max(case.weight_bytes // case.itemsize for case in cases), 2**28), device="cuda", dtype=dtype
    )
    compile_ahead([problem_of(*operands(case, buffer)[0]) for case in cases], arguments.most)
    print(f"compiled after {time.perf_counter() - start:.1f} s", flush=True)

    known = json.loads(arguments.table.read_text())["products"] if arguments.table.is_file() else {}
    table = {"gpu": gpu(0).name, "bytes_per_us": gpu(0).bytes_per_us, "products": known}
    record = []
    speeds: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    with torch.cuda.stream(torch.cuda.Stream()):
        settle()
        for case in cases:
            if time.perf_counter() - start > arguments.seconds:
                break
            problem, times, beside, best, speed = measure(case, buffer, arguments.most)
            table["products"][key(problem)] = best
            picked = min(times, key=lambda choice: (predicted_us(problem, choice, gpu(0)), times[choice]))
            speeds[case.group].append((speed, beside / times[picked]))
            record += [
                {
                    "case": case,
                    "choice": choice,
                    "us": round(us, 3),
                    "predicted_us": round(predicted_us(problem, choice, gpu(0)), 3),
                    TORCH: round(beside, 3),
                }
                for choice, us in times.items()
            ]
    arguments.table.write_text(_lines(table))
    if arguments.record:
        arguments.record.write_text(json.dumps(record))
    print(f"{len(table['products'])} products in {arguments.table} after {time.perf_counter() - start:.1f} s")
    for group, pairs in speeds.items():
        for name, values in zip(("the fastest", "the model's choice"), zip(*pairs, strict=True), strict=True):
            mean, worst = statistics.geometric_mean(values), min(values)
            print(f"{group}, {len(values)} products: {name} at {mean:.2f} of PyTorch's speed, {worst:.2f} at worst")


def _lines(table: dict[str, Any]) -> str:
    """JSON with a line for each product."""
    products = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table["products"].items())
    machine = "".join(f"  {json.dumps(name)}: {json.dumps(table[name])},\n" for name in ("gpu", "bytes_per_us"))
    return f'{{\n{machine}  "products": {{\n{products}\n  }}\n}}\n'


if __name__ == "__main__":
    main()
