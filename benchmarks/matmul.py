"""Time matrix products beside the peers that are installed, and check that no bit depends on the batch.

    python benchmarks/matmul.py --json FILE.json --report FILE.md --plot FILE.svg
    python benchmarks/matmul.py --quick
    python benchmarks/matmul.py --shapes 5120x2048 --m 1 17 300 --dtypes bf16 fp16 --layouts nk
    python benchmarks/matmul.py --device cpu

On a GPU: bf16 at every listed shape, M and layout, a part of that in fp16 (all of it with --full), fp32, fp64, the
products of attention, the host time of a call, and the first use in a fresh process. Each case is captured in CUDA
graphs over rotating random operands, which are replayed in turn (see timing.py). Beside ours: cuBLAS as PyTorch ships
it, the functions that --peer names, batch_invariant_ops if it is installed, and cuBLASLt without split-K. The last
needs its own process (cublaslt.py), which runs first and ends before anything else is timed. On a CPU: beside PyTorch
on the same threads, which OMP_NUM_THREADS or --threads sets.

A column "row alone" says whether the first, middle and last row have the same bytes alone as in the batch. The exit
status is 1 if one has not, or if a product of ours failed. `report.py` makes tables and a plot of the record.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bounds
import cublaslt
import first_use
import report
import torch
from cases import CPU_GROUPS, DTYPE, GPU_GROUPS, LAYOUTS, Case, Record, Selection, cpu_cases, gpu_cases, shape
from machine import describe
from products import (
    KNOWN_PEERS,
    NO_SPLIT_K,
    OURS,
    TORCH,
    Memory,
    Product,
    Timed,
    cpu_operands,
    on_cpu,
    on_gpu,
    ours,
    peer,
    reason,
    row_is_invariant,
    torch_product,
)
from records import FirstUse, Host, Results, spread
from timing import host_samples, settle

import bikernels

WARM_PROCESSES = 3


# ------------------------------------------------------------------------------------------------------------- on a GPU


def time_gpu(selection: Selection, peers: Mapping[str, Product], backend: str | None, results: Results) -> None:
    """Fill the results with everything that is timed on a GPU."""
    cases = gpu_cases(selection)
    beside = without_split_k([case for case in cases if is_plain_16_bit(case)], backend)
    if "first-use" in selection.groups:
        results.first_use.extend(time_first_use(backend))
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    if "host" in selection.groups:
        results.host.extend(time_host())
    print_heads(cases, [TORCH, NO_SPLIT_K, *peers])
    if not cases:
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        reported: set[str] = set()
        for dtype, of_dtype in itertools.groupby(cases, lambda case: case.dtype):
            listed = list(of_dtype)
            memory = Memory(dtype, listed)
            settle()
            for case in listed:
                products = {TORCH: torch_product, OURS: ours()} | (dict(peers) if is_plain_16_bit(case) else {})
                timed = on_gpu(case, memory, products)
                in_turn = {}
                if case in beside:
                    timed = Timed(beside[case].us | timed.us, beside[case].failed | timed.failed)
                    in_turn = {NO_SPLIT_K: beside[case].us[OURS]} if OURS in beside[case].us else {}
                for name in timed.failed.keys() - reported:
                    print(f"{name}: {timed.failed[name]}", file=sys.stderr)
                    reported.add(name)
                row = check(timed, functools.partial(memory.row_is_invariant, case, ours()))
                results.cases.append(record(case, timed, in_turn, row, torch.cuda.get_device_name()))
                print_row(results.cases[-1], [TORCH, NO_SPLIT_K, *peers])
    results.machine["drift"] = drift(results.cases, beside)


def drift(records: Sequence[Record], child: Mapping[Case, Timed]) -> float | None:
    """Geometric mean of our times in the child process relative to those in this one."""
    ratios = [
        spread(child[record.case].us[OURS]).median / spread(record.us[OURS]).median
        for record in records
        if record.case in child and OURS in child[record.case].us and OURS in record.us
    ]
    return round(statistics.geometric_mean(ratios), 4) if ratios else None


def is_plain_16_bit(case: Case) -> bool:
    """Whether the peers that multiply two matrices in 16 bits take the case."""
    return case.batch == 1 and case.dtype in ("bf16", "fp16")


def without_split_k(cases: Sequence[Case], backend: str | None) -> dict[Case, Timed]:
    """The times of the child process; none, with a message, if it fails."""
    if not cases:
        return {}
    try:
        return dict(zip(cases, cublaslt.time_in_child(cases, backend), strict=True))
    except RuntimeError as error:
        print(f"cuBLASLt without split-K was not timed: {error}", file=sys.stderr)
        return {}


def time_first_use(backend: str | None) -> Iterator[FirstUse]:
    """Fresh processes with an empty cache of kernels, then with the one that the first has filled."""
    with tempfile.TemporaryDirectory() as cache:
        for name, processes in (("empty", 1), ("filled", WARM_PROCESSES)):
            use = FirstUse(name, [first_use.time_in_child(Path(cache), backend) for _ in range(processes)])
            print(f"first use, cache {name}: " + "; ".join(map(str, use.seconds)), flush=True)
            yield use


def time_host() -> Iterator[Host]:
    """Eager calls on CuPy arrays, which allocate their results, beside cupy.matmul and torch.mm."""
    import cupy

    from bikernels.dtypes import NUMPY_DTYPE

    for dtype in ("bf16", "fp16", "fp32"):
        x, y = (torch.randn(shape, device="cuda").to(getattr(torch, DTYPE[dtype])) for shape in ((16, 64), (64, 16)))
        storage = torch.int16 if x.itemsize == 2 else torch.int32
        a, b = (cupy.asarray(each.view(storage)).view(NUMPY_DTYPE[DTYPE[dtype]]) for each in (x, y))
        candidates: dict[str, Callable[[], object]] = {
            OURS: functools.partial(bikernels.matmul, a, b),
            "cupy.matmul": functools.partial(cupy.matmul, a, b),
            "torch.mm": functools.partial(torch.mm, x, y),
        }
        failed = {}
        for name, call in candidates.items():
            try:
                call()
            except Exception as error:  # noqa: BLE001  (cupy.matmul may not take the dtype; the others go on)
                failed[name] = reason(error)
        able = {name: call for name, call in candidates.items() if name not in failed}
        host = Host(f"16x64 @ 64x16 {dtype}", host_samples(able, torch.cuda.synchronize), failed)
        medians = (f"{name} {spread(samples).median:.1f}" for name, samples in host.us.items())
        print(f"host, us a call, {host.name}: {', '.join(medians)} {failed or ''}", flush=True)
        yield host


# ------------------------------------------------------------------------------------------------------------- on a CPU


def time_cpu(selection: Selection, results: Results) -> None:
    """Fill the results with everything that is timed on a CPU."""
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # ours obey it, too
    cases = cpu_cases(selection)
    print_heads(cases, [TORCH])
    for case in cases:
        a, b, out = cpu_operands(case)
        product = ours(case.arithmetic)
        timed = on_cpu(case, (a, b, out), {OURS: product} if case.arithmetic else {TORCH: torch_product, OURS: product})
        row = check(timed, functools.partial(row_is_invariant, a, b, out, product))
        results.cases.append(record(case, timed, {}, row, gpu=""))
        print_row(results.cases[-1], [TORCH])


# ---------------------------------------------------------------------------------------------------------------- both


def check(timed: Timed, invariant: Callable[[], bool]) -> str:
    """What the column "row alone" says."""
    if OURS in timed.failed:
        return timed.failed[OURS]
    return "ok" if invariant() else "DIFFERENT"


def record(case: Case, timed: Timed, beside: dict[str, list[float]], row: str, gpu: str) -> Record:
    """A case with its bounds, where those of the device are known."""
    if not bounds.known(gpu):
        return Record(case, None, None, timed.us, beside, row, timed.failed)
    steps = bounds.chain_us(case.dtype, case.k)
    floor = max(steps, bounds.floor_us(gpu, case.dtype, 2.0 * case.products, case.moved))
    measured = None
    if steps and case.k >= bounds.CHAIN_RATIO * case.n:
        from chain import measured_us

        measured = measured_us(case.k)
    return Record(case, floor, measured, timed.us, beside, row, timed.failed)


HEADS = f"{'N x K':15}{'dtype':6}{'layout':7}{'M':>6}"


def print_heads(cases: Sequence[Case], names: Sequence[str]) -> None:
    """The line above the table."""
    if cases:
        columns = "".join(f"{name.partition(':')[0][:12]:>13}" for name in names)
        print(f"{HEADS}{columns}{OURS:>11}{'quartiles':>20}{'bound':>9}{'x best':>8}  row alone   (us a call)")


def print_row(record: Record, names: Sequence[str]) -> None:
    """One case."""
    low, median, high = spread(record.us[OURS]) if OURS in record.us else (float("nan"),) * 3
    times = "".join(f"{spread(record.us[name]).median:13.1f}" if name in record.us else f"{'-':>13}" for name in names)
    bound, relative = record.floor_us, report.relative(record)
    case = record.case
    print(
        f"{case.shape:15}{case.dtype:6}{LAYOUTS[case.layout]:7}{case.m:6}{times}{median:11.1f}"
        f"{f'{low:.1f}..{high:.1f}':>20}{'-' if bound is None else f'{bound:.1f}':>9}"
        f"{'-' if relative is None else f'{relative:.2f}':>8}  {record.check[:80]} {case.arithmetic or ''}",
        flush=True,
    )


def chosen_peers(names: Sequence[str], parser: argparse.ArgumentParser) -> dict[str, Product]:
    """The peers that the caller names, which must be there, and the known ones that are."""
    peers = {}
    for name in [*names, *KNOWN_PEERS]:
        try:
            peers[name] = peer(name)
        except (ImportError, AttributeError, ValueError) as error:
            if name in names:
                parser.error(f"--peer {name}: {error}")
            print(f"{name.partition(':')[0]} is not installed")
    return peers


def rows(text: str) -> int:
    """M from text."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows; write an integer of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    add("--backend", choices=tuple(bikernels.backends()), help="by default the device's preferred one")
    add("--shapes", type=shape, nargs="+", metavar="NxK", help="weights, in place of the listed ones")
    add("--m", type=rows, nargs="+", metavar="M", help="rows, in place of the listed ones")
    add("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS), help="of weights: w.T of N x K, K x N")
    add("--dtypes", nargs="+", choices=tuple(DTYPE), default=tuple(DTYPE))
    add("--groups", nargs="+", choices=GPU_GROUPS + CPU_GROUPS, default=GPU_GROUPS + CPU_GROUPS)
    add("--quick", action="store_true", help="a part that represents the rest")
    add("--full", action="store_true", help="fp16 at every shape and M, too")
    add("--peer", action="append", default=[], metavar="MODULE:FUNCTION", help="time function(a, b) on tensors, too")
    add("--threads", type=rows, help="of both sides, on a CPU")
    add("--json", type=Path, metavar="FILE", help="write the record")
    add("--report", type=Path, metavar="FILE", help="write tables in Markdown")
    add("--plot", type=Path, metavar="FILE", help="draw speed over M (SVG)")
    return parser.parse_args(arguments), parser


def main() -> int:
    """Time, print, write."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the record is written
    arguments, parser = parse()
    if arguments.plot and not report.can_plot():
        print(f"{report.NO_MATPLOTLIB}; report.py can draw it from the record later", file=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    selection = Selection(
        arguments.shapes,
        arguments.m,
        arguments.layouts,
        arguments.dtypes,
        arguments.groups,
        arguments.quick,
        arguments.full,
    )
    results = Results(describe(arguments.device, arguments.backend), [], [], [])
    print(report.machine(results), flush=True)
    use = bikernels.use_backend(arguments.backend) if arguments.backend else contextlib.nullcontext()
    try:
        with torch.inference_mode(), use:
            if arguments.device == "cuda":
                peers = chosen_peers(arguments.peer, parser)
                time_gpu(selection, peers, arguments.backend, results)
            else:
                time_cpu(selection, results)
    finally:  # an interrupted run keeps what it has measured
        if arguments.json:
            results.save(arguments.json)
    if arguments.report:
        arguments.report.write_text(report.markdown(results), encoding="utf-8")
    if arguments.plot and report.can_plot():
        report.plot(results, arguments.plot)
    print("\n" + report.markdown(results, ["summary", "misses"]), end="")
    return int(any(each.check != "ok" for each in results.cases) or any(OURS in each.failed for each in results.host))


if __name__ == "__main__":
    sys.exit(main())
