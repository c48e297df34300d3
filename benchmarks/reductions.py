"""Time the reductions beside PyTorch's and the peers that are installed, over rows, lengths, dtypes, axes, operations.

    python benchmarks/reductions.py [--quick] [--backend NAME] [--only TEXT] [--seconds N] [--json FILE] [--plot FILE]
    python benchmarks/reductions.py --device cpu [--quick] ...
    python benchmarks/reductions.py --from FILE.json [--plot FILE] [--markdown FILE]

On a GPU all are captured in CUDA graphs over rotating operands, so that L2 is cold, and replayed in turn (see
timing.py); every result has memory of its own. A time is the median of the samples; on a CPU, whose cores other
programs use too, it is the least of many short ones, of calls with NumPy arrays beside PyTorch's with tensors in the
same memory, and OMP_NUM_THREADS says in how many threads. Beside it stands the time in which a large copy, measured
first, moves as many bytes as have to be read and written, and TB/s are of those; not on a CPU. Before a case is timed,
its first and last row are compared with the reference, byte for byte; the exit status is 1 if one was wrong. The
misses, listed last, are slower than PyTorch by more than a fifth and by more than a microsecond.

`--from` reads a record instead of timing anything; `--onto` times what a record leaves out, on the same machine, so
that a sweep can be done in parts.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from machine import describe
from records import spread
from timing import ROTATED_BYTES, alternate, capture, rotations, wall_samples

import bikernels
from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE
from bikernels_torch.core import view

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
COPIED_BYTES = 2**30
MOST_READ, MOST_WRITTEN = 32 * 2**30, 8 * 2**30
"""Bytes of a case: of what is reduced, and of a result, of which there are three at a time."""
MOST_RESERVED = 16 * 2**30
MOST_ELEMENTS_ON_A_CPU = 2**24
CPU_SAMPLES, CPU_SAMPLE = 25, 0.008
"""How many, and seconds of each."""
MISS_RATIO, MISS_US = 1.2, 1.0
OURS, TORCH = "bikernels", "torch"
PEERS = {"batch_invariant_ops.batch_invariant_ops": {"log_softmax": "log_softmax", "mean": "mean_dim"}}
"""Modules that are timed where they can be imported, and their names of operations: of a tensor and an axis."""


class Case(NamedTuple):
    """A reduction of one array."""

    operation: str
    rows: int
    n: int
    dtype: str
    axis: str
    """Which one is reduced: "last", "first" or "middle"."""

    @property
    def shape(self) -> tuple[int, ...]:
        if self.axis == "middle":  # rows of 64 side by side
            return (self.rows // 64, self.n, 64)
        return (self.n, self.rows) if self.axis == "first" else (self.rows, self.n)

    @property
    def dim(self) -> int:
        return {"last": -1, "first": 0, "middle": 1}[self.axis]

    @property
    def read(self) -> int:
        """Bytes of the arrays that are reduced."""
        arrays = 2 if "grad" in OPERATIONS[self.operation].operands else 1
        return arrays * self.rows * self.n * DTYPES[self.dtype].itemsize

    @property
    def written(self) -> int:
        """Bytes of the result."""
        elements = {A_ROW: self.n, ONE_FOR_A_ROW: self.rows, ROWS_OF_N: self.rows * self.n}
        return elements[OPERATIONS[self.operation].result] * DTYPES[self.dtype].itemsize

    @property
    def moved(self) -> int:
        """Bytes that have to be read and written."""
        return self.read + self.written


ROWS_OF_N, ONE_FOR_A_ROW, A_ROW = "rows", "one for a row", "a row"
"""What a result is."""


class Operation(NamedTuple):
    """The function of the core and that of PyTorch, each of its operands in this order and an axis."""

    core: Callable[..., object]
    torch: Callable[..., torch.Tensor]
    result: str = ROWS_OF_N
    operands: tuple[str, ...] = ("x",)
    """x and grad; mean and rstd, which have an element for a row; weight and bias, which have the elements of a row."""
    is_masked: bool = False
    """Whether every other element, at random, is -inf, as those that are not to be attended to or chosen; never a row's
    first one."""

    def ours(self, *operands: torch.Tensor, axis: int, backend: str | None) -> torch.Tensor:
        """What the core computes of tensors, on the current stream."""
        x = operands[self.operands.index("x")]
        shape = list(x.shape)
        if self.result == ONE_FOR_A_ROW:
            del shape[axis]
        elif self.result == A_ROW:
            shape = [x.shape[axis]]
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.core(*map(view, operands), axis=axis, out=view(out), backend=backend)
        return out

    def draw(self, case: Case, device: str, number: int) -> list[tuple[torch.Tensor, ...]]:
        """Random operands of so many calls; x and grad are each call's own."""
        dtype = DTYPES[case.dtype]
        of_rows = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        shape = [1 if i == case.dim % len(case.shape) else size for i, size in enumerate(case.shape)]
        shared = {
            "mean": torch.randn(shape, **of_rows),
            "rstd": torch.rand(shape, **of_rows),
            "weight": torch.randn(case.n, device=device).to(dtype),
            "bias": torch.randn(case.n, device=device).to(dtype),
        }

        def operand(name: str) -> torch.Tensor:
            if name in shared:
                return shared[name]
            x = torch.randn(case.shape, device=device, dtype=dtype)
            if self.is_masked:
                mask = torch.rand(case.shape, device=device) < 0.5
                mask.select(case.dim, 0).fill_(False)
                x.masked_fill_(mask, -torch.inf)
            is_logarithm = self.core is bikernels.log_softmax_backward and name == "x"
            return x.abs_().neg_() if is_logarithm else x

        return [tuple(map(operand, self.operands)) for _ in range(number)]


def _layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[dim:], w, b)


def _rms_norm(x: torch.Tensor, w: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[dim:], w)


def _softmax_backward(name: str) -> Callable[..., torch.Tensor]:
    backward = getattr(torch.ops.aten, f"_{name}_backward_data")
    return lambda grad, y, dim: backward(grad, y, dim, y.dtype)


def _norm_backward(name: str, of_weight: bool) -> Callable[..., torch.Tensor]:
    """The gradient of x, or that of the weight, of which the shape is all that matters."""

    def call(grad: torch.Tensor, x: torch.Tensor, *others: torch.Tensor, dim: int) -> torch.Tensor:
        *statistics, weight = (*others, x[0]) if of_weight else others
        arguments = (grad, x, x.shape[dim:], *statistics, weight)
        if name == "rms_norm":
            return torch.ops.aten._fused_rms_norm_backward(*arguments, [not of_weight, of_weight])[of_weight]
        mask = [not of_weight, of_weight, False]
        return torch.ops.aten.native_layer_norm_backward(*arguments, None, mask)[of_weight]

    return call


OPERATIONS = {
    "log_softmax": Operation(bikernels.log_softmax, torch.log_softmax),
    "softmax": Operation(bikernels.softmax, torch.softmax),
    "masked_log_softmax": Operation(bikernels.log_softmax, torch.log_softmax, is_masked=True),
    "masked_softmax": Operation(bikernels.softmax, torch.softmax, is_masked=True),
    "mean": Operation(bikernels.mean, torch.mean, ONE_FOR_A_ROW),
    "sum": Operation(bikernels.sum, torch.sum, ONE_FOR_A_ROW),
    "var": Operation(functools.partial(bikernels.var, correction=1), torch.var, ONE_FOR_A_ROW),
    "logsumexp": Operation(bikernels.logsumexp, torch.logsumexp, ONE_FOR_A_ROW),
    "rms_norm": Operation(bikernels.rms_norm, _rms_norm, operands=("x", "weight")),
    "layer_norm": Operation(bikernels.layer_norm, _layer_norm, operands=("x", "weight", "bias")),
    "log_softmax_backward": Operation(
        bikernels.log_softmax_backward, _softmax_backward("log_softmax"), operands=("grad", "x")
    ),
    "softmax_backward": Operation(bikernels.softmax_backward, _softmax_backward("softmax"), operands=("grad", "x")),
    "rms_norm_backward": Operation(
        bikernels.rms_norm_backward, _norm_backward("rms_norm", False), operands=("grad", "x", "rstd", "weight")
    ),
    "layer_norm_backward": Operation(
        bikernels.layer_norm_backward,
        _norm_backward("layer_norm", False),
        operands=("grad", "x", "mean", "rstd", "weight"),
    ),
    "rms_norm_weight_backward": Operation(
        bikernels.rms_norm_weight_backward, _norm_backward("rms_norm", True), A_ROW, ("grad", "x", "rstd")
    ),
    "layer_norm_weight_backward": Operation(
        bikernels.layer_norm_weight_backward, _norm_backward("layer_norm", True), A_ROW, ("grad", "x", "mean", "rstd")
    ),
}
REFERENCE = {
    "var": functools.partial(reference.var, correction=1),
    "masked_log_softmax": reference.log_softmax,
    "masked_softmax": reference.softmax,
}
NORMS = ("rms_norm", "layer_norm")
MASKED = tuple(name for name, operation in OPERATIONS.items() if operation.is_masked)
FORWARD = tuple(name for name in OPERATIONS if not name.endswith("backward"))
BACKWARD = tuple(name for name in OPERATIONS if name.endswith("backward"))

SHAPES = ((1024, 151936), (8192, 32000), (8192, 4096), (1, 151936), (8, 151936), (64, 151936))
"""Those that the goals name."""
SERVED = ((32, 32000), (128, 32000), (32, 128256), (128, 128256))
"""Requests that are served together, and vocabularies."""


def cpu_cases(quick: bool) -> Iterator[Case]:
    """Shapes that fit a cache and one that does not; without `quick` a sweep as well."""
    for dtype in ("bf16", "fp32"):
        for operation in FORWARD:
            yield Case(operation, 512, 4096, dtype, "last")
            yield Case(operation, 4096, 256, dtype, "last")
            yield Case(operation, 16, 151936, dtype, "last")
            if operation not in (*NORMS, *MASKED):
                yield Case(operation, 4096, 512, dtype, "first")
                yield Case(operation, 4096, 512, dtype, "middle")
    if not quick:
        yield from (case for case in sweep() if case.rows * case.n <= MOST_ELEMENTS_ON_A_CPU)


def cases(quick: bool) -> Iterator[Case]:
    """Shapes of language models; without `quick` a sweep of rows and lengths as well."""
    yield from dict.fromkeys(_cases(quick))  # some are in both


def _cases(quick: bool) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for operation in ("log_softmax", "softmax", "mean"):
            for rows, n in (*SHAPES, (65536, 256)):
                yield Case(operation, rows, n, dtype, "last")
            yield Case(operation, 4096, 50257, dtype, "last")  # rows that begin anywhere
            yield Case(operation, 4096, 8192, dtype, "first")
            yield Case(operation, 151936, 1024, dtype, "first")
            yield Case(operation, 4096, 1024, dtype, "middle")
        for operation in ("log_softmax", "softmax"):
            for rows, n in SERVED:
                yield Case(operation, rows, n, dtype, "last")
        for operation in MASKED:
            for rows, n in (*SHAPES, (65536, 256), (4096, 50257)):
                yield Case(operation, rows, n, dtype, "last")
        for operation in NORMS:
            for rows, n in ((8192, 4096), (64, 8192)):
                yield Case(operation, rows, n, dtype, "last")
        for operation in ("sum", "var", "logsumexp"):
            yield Case(operation, 8192, 4096, dtype, "last")
            yield Case(operation, 1024, 151936, dtype, "last")
            yield Case(operation, 4096, 8192, dtype, "first")
        for operation in BACKWARD:
            yield Case(operation, 8192, 4096, dtype, "last")
    if not quick:
        yield from sweep()


ROWS, LENGTHS = (1, 16, 256, 4096, 65536), (1, 16, 256, 1024, 4096, 16384, 65536, 262144)
ODD_ROWS, ODD_LENGTHS = (16, 4096, 65536), (100, 1001, 5001, 30522, 50257)
"""Rows of other lengths: all but those of 100 elements of 32 bits begin anywhere in a vector."""


def sweep() -> Iterator[Case]:
    """All operations, dtypes and axes over rows and lengths, and rows of odd lengths; backward passes in the dtypes of
    training.
    """
    for operation in (one for one in OPERATIONS if one not in MASKED):
        axes = ("last",) if operation.startswith(NORMS) else ("last", "first", "middle")
        dtypes = ("bf16", "fp32") if operation in BACKWARD else tuple(DTYPES)
        for dtype, axis, rows, n in itertools.product(dtypes, axes, ROWS, LENGTHS):
            case = Case(operation, rows, n, dtype, axis)
            if case.read <= MOST_READ and case.written <= MOST_WRITTEN and (axis != "middle" or rows >= 64):
                yield case
    for operation in (one for one in OPERATIONS if one not in MASKED and OPERATIONS[one].result != A_ROW):
        for dtype, rows, n in itertools.product(("bf16", "fp32"), ODD_ROWS, ODD_LENGTHS):
            yield Case(operation, rows, n, dtype, "last")


class Result(NamedTuple):
    """What was measured of a case."""

    case: Case
    us: dict[str, float]
    """Microseconds of a call, ours and the others'."""
    copy: float | None
    """Microseconds in which a copy moves as many bytes."""
    is_right: bool
    """Whether the bytes are those of the reference."""

    @property
    def ratio(self) -> float:
        return self.us[TORCH] / self.us[OURS]

    @property
    def is_miss(self) -> bool:
        """Whether ours is slower than PyTorch by more than the goals allow."""
        return self.us[OURS] > MISS_RATIO * self.us[TORCH] and self.us[OURS] > self.us[TORCH] + MISS_US

    def bandwidth(self, name: str = OURS) -> float:
        """TB/s."""
        return 1e-6 * self.case.moved / self.us[name]


class Results(NamedTuple):
    """What a run measured."""

    machine: dict[str, Any]
    copied: float | None
    """Bytes that a copy reads and writes in a microsecond; None on a CPU."""
    results: list[Result]

    def save(self, path: Path) -> None:
        """One line per case."""
        lines = [json.dumps(one._asdict() | {"case": one.case._asdict()}) for one in self.results]
        parts = f'"machine": {json.dumps(self.machine)},\n "copy": {json.dumps(self.copied)}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{" + parts + ',\n "cases": [\n  ' + ",\n  ".join(lines) + "\n ]}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` has written."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        results = [Result(Case(**one.pop("case")), **one) for one in fields["cases"]]
        return cls(fields["machine"], fields["copy"], results)


def peers(operation: str) -> dict[str, Callable[..., torch.Tensor]]:
    """The functions of the peers that can be imported."""
    found = {}
    for module, functions in PEERS.items():
        if operation in functions:
            try:
                found[module.partition(".")[0]] = getattr(importlib.import_module(module), functions[operation])
            except (ImportError, AttributeError, RuntimeError):
                continue
    return found


def copy_bandwidth() -> float:
    """Bytes that a large copy reads and writes in a microsecond."""
    x = torch.randn(COPIED_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = capture([functools.partial(y.copy_, x)] * 4)
        return 2 * COPIED_BYTES / min(alternate({"": graph}, 4)[""])


def free_unused() -> None:
    """Give back memory that no tensor has, if there is much of it."""
    if torch.cuda.memory_reserved() > MOST_RESERVED:
        torch.cuda.empty_cache()


def measure(case: Case, backend: str | None, copied: float | None) -> Result:
    """Check a case, then time it; on a GPU if there is a `copied` bandwidth."""
    calls = OPERATIONS[case.operation]
    device = "cpu" if copied is None else "cuda"
    candidates = {
        OURS: functools.partial(calls.ours, axis=case.dim, backend=backend),
        TORCH: functools.partial(calls.torch, dim=case.dim),
    }
    if device == "cuda":
        candidates |= {name: functools.partial(call, dim=case.dim) for name, call in peers(case.operation).items()}
        free_unused()  # the memory of graphs that are gone
        with torch.cuda.stream(torch.cuda.Stream()):
            rotated = rotations(case.moved) if case.moved < ROTATED_BYTES else 1  # L2 is cold
            return _time(case, candidates, device, rotated, case.moved / (copied or 1.0))
    return _time(case, candidates, device, 1, None)


def _time(
    case: Case,
    candidates: dict[str, functools.partial[torch.Tensor]],
    device: str,
    rotated: int,
    copy: float | None,
) -> Result:
    operands = OPERATIONS[case.operation].draw(case, device, rotated)
    is_right = check(case, operands[0], candidates[OURS](*operands[0]))
    if device == "cpu":
        calls = {name: functools.partial(call, *operands[0]) for name, call in candidates.items()}
        arrays = map(_to_numpy, operands[0])
        calls[OURS] = functools.partial(OPERATIONS[case.operation].core, *arrays, **candidates[OURS].keywords)
        samples = wall_samples(calls, CPU_SAMPLES, CPU_SAMPLE)
    else:
        results: list[torch.Tensor] = []  # so that each has its memory
        graphs = {}
        for name, call in list(candidates.items()):
            call(*operands[0])
            free_unused()  # a graph has memory of its own
            graphs[name] = capture(functools.partial(_keep, results, call, *given) for given in operands)
        samples = alternate(graphs, len(operands))
    one = min if device == "cpu" else lambda times: spread(times).median
    return Result(case, {name: one(times) for name, times in samples.items()}, copy, is_right)


def _keep(results: list[torch.Tensor], call: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
    results.append(call(*operands))


def check(case: Case, operands: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
    """Whether the first and the last row of a result are the reference's, byte for byte; of a row, its two ends."""
    operation = OPERATIONS[case.operation]

    def part(operand: torch.Tensor) -> torch.Tensor:
        """What they are computed from."""
        if operation.result == A_ROW:
            return operand[:, [0, -1]] if operand.shape[1] > 1 else operand
        return operand if operand.dim() == 1 else _ends(case, operand)

    compute = REFERENCE.get(case.operation) or getattr(reference, case.operation)
    expected = compute(*(_to_numpy(part(operand)) for operand in operands), kept=1)
    actual = _ends(case, out) if operation.result == ROWS_OF_N else out.reshape(-1)[[0, -1]]
    actual = actual[: len(expected)]  # of a single column
    return bool(_to_numpy(actual).tobytes() == expected.tobytes())


def _ends(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The first and the last row of an array."""
    if case.axis == "last":
        return x[[0, -1]]
    if case.axis == "first":
        return x[:, [0, -1]].T
    return torch.stack([x[0, :, 0], x[-1, :, -1]])


def _to_numpy(x: torch.Tensor) -> Any:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(words).cpu().numpy().view(NUMPY_DTYPE[str(x.dtype).removeprefix("torch.")])


HEADER = ("operation", "rows", "n", "dtype", "axis", "us", "torch us", "copy us", "TB/s", "torch TB/s", "x torch")


def fields(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    return (
        *map(str, result.case),
        f"{result.us[OURS]:.1f}",
        f"{result.us[TORCH]:.1f}",
        "" if result.copy is None else f"{result.copy:.1f}",
        f"{result.bandwidth():.2f}",
        f"{result.bandwidth(TORCH):.2f}",
        f"{result.ratio:.2f}",
    )


def line(result: Result) -> str:
    """A row in columns; beside it the peers' times, and whether ours is wrong."""
    others = "".join(f"  {name} {us:.1f} us" for name, us in result.us.items() if name not in (OURS, TORCH))
    return columns(fields(result)) + others + ("" if result.is_right else "  WRONG")


def columns(texts: tuple[str, ...]) -> str:
    """Texts in columns."""
    return f"{texts[0]:26}" + "".join(f"{text:>11}" for text in texts[1:])


def table(results: Sequence[Result]) -> str:
    """A table as a document has it."""
    rows = [HEADER, ("---",) * len(HEADER), *map(fields, results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def markdown(record: Results) -> str:
    """The goals' shapes, then how the sweep went by operation, then its misses."""
    machine = record.machine
    title = f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, backend {machine['backend']}"
    if record.copied is not None:
        title += f"; a copy: {1e-6 * record.copied:.2f} TB/s"
    goals = set((cases if record.copied is not None else cpu_cases)(quick=True))
    swept = [one for one in record.results if one.case not in goals]
    parts = [title, table([one for one in record.results if one.case in goals])]
    if swept:
        parts.append(summary(swept))
    missed = [one for one in record.results if one.is_miss]
    parts.append(f"{len(missed)} of {len(record.results)} cases missed\n" + ("\n" + table(missed) if missed else ""))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def summary(results: Sequence[Result]) -> str:
    """Per operation and axis: cases, misses, and the range of speeds relative to PyTorch."""
    lines = ["| operation | axis | cases | misses | x torch: least | median | most |", "|---|---|---|---|---|---|---|"]
    for operation, axis in dict.fromkeys((one.case.operation, one.case.axis) for one in results):
        group = [one for one in results if (one.case.operation, one.case.axis) == (operation, axis)]
        low, middle, high = (f"{value:.2f}" for value in _range([one.ratio for one in group]))
        missed = sum(one.is_miss for one in group)
        lines.append(f"| {operation} | {axis} | {len(group)} | {missed} | {low} | {middle} | {high} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), sorted(values)[len(values) // 2], max(values)


def plot(record: Results, path: Path, dtype: str = "bf16") -> None:
    """Bandwidth over n, a panel per operation, a colour per number of rows; dashed: PyTorch.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the record has no sweep along the last axis to draw.
    """
    chosen = [one for one in record.results if one.case.axis == "last" and one.case.dtype == dtype]
    chosen = [one for one in chosen if one.case.rows in ROWS and one.case.n in LENGTHS]
    chosen = [one for one in chosen if one.case.operation not in MASKED]  # few lengths
    operations = list(dict.fromkeys(one.case.operation for one in chosen))
    if not chosen:
        raise ValueError(f"the record has no sweep of {dtype} along the last axis, so there is nothing to draw")
    colors = dict(zip(ROWS, (report.GREY, report.ORANGE, report.GREEN, report.BLUE, "#a371f7"), strict=True))

    def draw(panel: Any, operation: str) -> None:
        for rows in ROWS:
            of = [one for one in chosen if (one.case.operation, one.case.rows) == (operation, rows)]
            for name, how in ((OURS, {"linewidth": 1.6}), (TORCH, {"linewidth": 1, "linestyle": "--"})):
                points = sorted((one.case.n, one.bandwidth(name)) for one in of)
                label = f"{rows} rows" if name == OURS else None
                if points:
                    panel.plot(*zip(*points, strict=True), color=colors[rows], label=label, **how)
        if record.copied is not None:
            panel.axhline(1e-6 * record.copied, color=report.GREY, linewidth=1, linestyle=":")
        panel.set_xscale("log", base=2)

    report.draw_panels(
        path, operations, draw, f"n, elements of a row ({dtype})", "TB/s (dashed: PyTorch; dotted: a copy)"
    )


def run(arguments: argparse.Namespace) -> Results:
    """Time the cases, printing each."""
    machine = describe(arguments.device, arguments.backend)
    copied = copy_bandwidth() if arguments.device == "cuda" else None
    record = Results(machine, copied, [])
    if arguments.onto is not None:
        before = Results.load(arguments.onto)
        if before.machine != machine:
            raise ValueError(
                f"{arguments.onto} is of another machine or other versions: {before.machine}, not {machine}"
            )
        record.results.extend(before.results)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    if copied is not None:
        print(f"copy {1e-6 * copied:.2f} TB/s")
    print(columns(HEADER))
    of_device = cases if arguments.device == "cuda" else cpu_cases
    done = {one.case for one in record.results}
    wanted = [
        case for case in of_device(arguments.quick) if arguments.only in " ".join(map(str, case)) and case not in done
    ]
    end = time.perf_counter() + arguments.seconds
    with torch.inference_mode():
        for number, case in enumerate(wanted):
            if time.perf_counter() > end:
                print(f"{len(wanted) - number} cases left out: the time is over")
                break
            try:
                record.results.append(measure(case, arguments.backend, copied))
            except torch.OutOfMemoryError:  # some of PyTorch's functions keep several arrays as large as x
                print(f"{' '.join(map(str, case))} left out: the GPU has too little memory")
                continue
            print(line(record.results[-1]), flush=True)
    missed = [one for one in record.results if one.is_miss]
    print(f"{len(missed)} of {len(record.results)} cases missed", *map(line, missed), sep="\n")
    return record


def main() -> int:
    """Time, or read a record, and write what is asked for; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", choices=tuple(bikernels.backends()))
    parser.add_argument("--quick", action="store_true", help="the shapes of the goals only")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose fields, joined by spaces, contain it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--from", dest="record", type=Path, metavar="FILE", help="a record to read")
    parser.add_argument("--onto", type=Path, metavar="FILE", help="a record whose cases are kept, and not timed again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES), help="of the plot")
    arguments = parser.parse_args()
    record = run(arguments) if arguments.record is None else Results.load(arguments.record)
    if arguments.json:
        record.save(arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(record), encoding="utf-8")
    if arguments.plot:
        try:
            plot(record, arguments.plot, arguments.dtype)
        except (ModuleNotFoundError, ValueError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0 if all(result.is_right for result in record.results) else 1


if __name__ == "__main__":
    sys.exit(main())
