"""Time the reductions beside PyTorch's, over rows, lengths, dtypes, axes and operations.

    python benchmarks/reductions.py [--quick] [--backend NAME] [--only TEXT] [--json FILE] [--markdown FILE]

Both are captured in CUDA graphs over rotating operands, so that L2 is cold, and replayed in turn (see timing.py); every
result has memory of its own. A time is the median of the samples. The floor is the time of the bytes that have to be
read and written at the bandwidth of a copy, measured first, and TB/s are of those bytes. Before a case is timed, its
first and last row are compared with the reference, byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe
from records import spread
from timing import Samples, alternate, capture, rotations

import bikernels
from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE
from bikernels_torch.core import view

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
BIKERNELS_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
COPIED_BYTES = 2**30
MOST_BYTES = 4 * 2**30
"""Of a case: read and written."""
MOST_RESERVED = 16 * 2**30


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
    def moved(self) -> int:
        """Bytes that have to be read and written."""
        results = self.rows if OPERATIONS[self.operation].one_for_a_row else self.rows * self.n
        return (self.rows * self.n + results) * DTYPES[self.dtype].itemsize


class Operation(NamedTuple):
    """The function of the core and that of PyTorch, each of an array, its weights (see `sides`) and an axis."""

    core: Callable[..., object]
    torch: Callable[..., torch.Tensor]
    one_for_a_row: bool
    sides: int = 0
    """Arrays of the length of a row beside x."""

    def ours(self, x: torch.Tensor, *sides: torch.Tensor, axis: int, backend: str | None) -> torch.Tensor:
        """What the core computes of tensors, on the current stream."""
        shape = list(x.shape)
        if self.one_for_a_row:
            del shape[axis]
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        self.core(view(x), *map(view, sides), axis=axis, out=view(out), backend=backend)
        return out


def _layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[dim:], w, b)


def _rms_norm(x: torch.Tensor, w: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[dim:], w)


OPERATIONS = {
    "log_softmax": Operation(bikernels.log_softmax, torch.log_softmax, False),
    "softmax": Operation(bikernels.softmax, torch.softmax, False),
    "mean": Operation(bikernels.mean, torch.mean, True),
    "sum": Operation(bikernels.sum, torch.sum, True),
    "var": Operation(functools.partial(bikernels.var, correction=1), torch.var, True),
    "logsumexp": Operation(bikernels.logsumexp, torch.logsumexp, True),
    "rms_norm": Operation(bikernels.rms_norm, _rms_norm, False, 1),
    "layer_norm": Operation(bikernels.layer_norm, _layer_norm, False, 2),
}
REFERENCE = {"var": functools.partial(reference.var, correction=1)}
NORMS = ("rms_norm", "layer_norm")

SHAPES = ((1024, 151936), (8192, 32000), (8192, 4096), (1, 151936), (8, 151936), (64, 151936))
"""Those that the goals name."""


def cases(quick: bool) -> Iterator[Case]:
    """Shapes of language models; without `quick` a sweep of rows and lengths as well."""
    for dtype in ("bf16", "fp32"):
        for operation in ("log_softmax", "softmax", "mean"):
            for rows, n in (*SHAPES, (65536, 256)):
                yield Case(operation, rows, n, dtype, "last")
            yield Case(operation, 4096, 50257, dtype, "last")  # rows that begin anywhere
            yield Case(operation, 4096, 8192, dtype, "first")
            yield Case(operation, 151936, 1024, dtype, "first")
            yield Case(operation, 4096, 1024, dtype, "middle")
        for operation in NORMS:
            for rows, n in ((8192, 4096), (64, 8192)):
                yield Case(operation, rows, n, dtype, "last")
        for operation in ("sum", "var", "logsumexp"):
            yield Case(operation, 8192, 4096, dtype, "last")
            yield Case(operation, 1024, 151936, dtype, "last")
            yield Case(operation, 4096, 8192, dtype, "first")
    if quick:
        return
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for axis in ("last", "first", "middle"):
                for rows in (1, 16, 256, 4096, 65536):
                    for n in (1, 16, 256, 1024, 4096, 16384, 65536, 262144):
                        case = Case(operation, rows, n, dtype, axis)
                        has_axis = axis == "last" or operation not in NORMS
                        if case.moved <= MOST_BYTES and has_axis and (axis != "middle" or rows >= 64):
                            yield case


class Result(NamedTuple):
    """Microseconds of a call, and whether the bytes are those of the reference."""

    case: Case
    ours: float
    torch: float
    floor: float
    is_right: bool

    @property
    def ratio(self) -> float:
        return self.torch / self.ours

    def bandwidth(self, us: float) -> float:
        """TB/s."""
        return 1e-6 * self.case.moved / us


def copy_bandwidth() -> float:
    """Bytes that a large copy reads and writes in a microsecond."""
    x = torch.randn(COPIED_BYTES // 4, device="cuda")
    y = torch.empty_like(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        graph = capture([functools.partial(y.copy_, x)] * 4)
        return 2 * COPIED_BYTES / min(alternate({"": graph}, 4)[""])


def measure(case: Case, backend: str | None, copied: float) -> Result:
    """Check a case, then time it."""
    if torch.cuda.memory_reserved() > MOST_RESERVED:
        torch.cuda.empty_cache()  # the memory of graphs that are gone
    calls = OPERATIONS[case.operation]
    ours = functools.partial(calls.ours, axis=case.dim, backend=backend)
    theirs = functools.partial(calls.torch, dim=case.dim)
    with torch.cuda.stream(torch.cuda.Stream()):
        rotated = [
            torch.randn(case.shape, device="cuda", dtype=DTYPES[case.dtype]) for _ in range(rotations(case.moved))
        ]
        sides = [torch.randn(case.n, device="cuda", dtype=DTYPES[case.dtype]) for _ in range(calls.sides)]
        is_right = check(case, rotated[0], ours(rotated[0], *sides), sides)
        theirs(rotated[0], *sides)
        results: list[torch.Tensor] = []  # so that each has its memory
        graphs = {}
        for name, call in (("ours", ours), ("torch", theirs)):
            graphs[name] = capture(functools.partial(_keep, results, call, x, *sides) for x in rotated)
        samples: Samples = alternate(graphs, len(rotated))
    times = {name: spread(samples[name]).median for name in graphs}
    return Result(case, times["ours"], times["torch"], case.moved / copied, is_right)


def _keep(results: list[torch.Tensor], call: Callable[..., torch.Tensor], *operands: torch.Tensor) -> None:
    results.append(call(*operands))


def check(case: Case, x: torch.Tensor, out: torch.Tensor, sides: Sequence[torch.Tensor] = ()) -> bool:
    """Whether the first and the last row of a result are the reference's, byte for byte."""
    rows = x.movedim(case.dim, -1).reshape(-1, case.n) if case.axis == "last" else _edges(case, x)
    compute = REFERENCE.get(case.operation, getattr(reference, case.operation))
    expected = compute(*(_to_numpy(operand, case.dtype) for operand in (rows[[0, -1]], *sides)), kept=1)
    if OPERATIONS[case.operation].one_for_a_row:
        actual = out.reshape(-1)[[0, -1]]
    else:
        actual = (out if case.axis == "last" else _edges(case, out)).reshape(-1, case.n)[[0, -1]]
    return bool(_to_numpy(actual, case.dtype).tobytes() == expected.tobytes())


def _edges(case: Case, x: torch.Tensor) -> torch.Tensor:
    """The first and the last row of an array that is reduced along another axis than the last."""
    if case.axis == "first":
        return x[:, [0, -1]].T
    return torch.stack([x[0, :, 0], x[-1, :, -1]])


def _to_numpy(x: torch.Tensor, dtype: str) -> Any:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(words).cpu().numpy().view(NUMPY_DTYPE[BIKERNELS_DTYPES[dtype]])


HEADER = ("operation", "rows", "n", "dtype", "axis", "us", "torch us", "floor us", "TB/s", "torch TB/s", "x torch", "")


def fields(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    return (
        *map(str, result.case),
        *(f"{us:.1f}" for us in (result.ours, result.torch, result.floor)),
        f"{result.bandwidth(result.ours):.2f}",
        f"{result.bandwidth(result.torch):.2f}",
        f"{result.ratio:.2f}",
        "" if result.is_right else "WRONG",
    )


def line(texts: tuple[str, ...]) -> str:
    """Texts in columns."""
    return f"{texts[0]:22}" + "".join(f"{text:>11}" for text in texts[1:])


def markdown(results: list[Result], machine: dict[str, Any], copied: float) -> str:
    """The table as a document has it."""
    rows = [HEADER[:-1], ("---",) * (len(HEADER) - 1), *(fields(result)[:-1] for result in results)]
    title = (
        f"{machine['gpu']}, torch {machine['torch']}, backend {machine['backend']}; a copy: {1e-6 * copied:.2f} TB/s"
    )
    return title + "\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> int:
    """Print the table and, if asked to, write it; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=tuple(bikernels.backends()))
    parser.add_argument("--quick", action="store_true", help="the shapes of the goals only")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose fields, joined by spaces, contain it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    machine = describe("cuda", arguments.backend)
    copied = copy_bandwidth()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), f"copy {1e-6 * copied:.2f} TB/s", sep=", ")
    print(line(HEADER))
    results = []
    with torch.inference_mode():
        for case in cases(arguments.quick):
            if arguments.only in " ".join(map(str, case)):
                results.append(measure(case, arguments.backend, copied))
                print(line(fields(results[-1])), flush=True)
    if arguments.json:
        rows = [result.case._asdict() | result._asdict() | {"case": None} for result in results]
        for row in rows:
            del row["case"]
        arguments.json.write_text(json.dumps({"machine": machine, "copy": copied, "cases": rows}, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results, machine, copied))
    return 0 if all(result.is_right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
