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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe
from records import spread
from timing import Samples, alternate, capture, rotations

import bikernels
from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
BIKERNELS_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
COPIED_BYTES = 2**30
MOST_BYTES = 4 * 2**30
"""Of a case: read and written."""


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
    """The call of the core and that of PyTorch, each of an array and an axis."""

    ours: Callable[..., torch.Tensor]
    torch: Callable[..., torch.Tensor]
    one_for_a_row: bool


OPERATIONS = {
    "log_softmax": Operation(bikernels.log_softmax, torch.log_softmax, False),
    "softmax": Operation(bikernels.softmax, torch.softmax, False),
    "mean": Operation(bikernels.mean, torch.mean, True),
}

SHAPES = ((1024, 151936), (8192, 32000), (8192, 4096), (1, 151936), (8, 151936), (64, 151936))
"""Those that the goals name."""


def cases(quick: bool) -> Iterator[Case]:
    """Shapes of language models; without `quick` a sweep of rows and lengths as well."""
    for operation in OPERATIONS:
        for dtype in ("bf16", "fp32"):
            for rows, n in SHAPES:
                yield Case(operation, rows, n, dtype, "last")
            yield Case(operation, 65536, 256, dtype, "last")
            yield Case(operation, 4096, 8192, dtype, "first")
            yield Case(operation, 151936, 1024, dtype, "first")
            yield Case(operation, 4096, 1024, dtype, "middle")
    if quick:
        return
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for axis in ("last", "first", "middle"):
                for rows in (1, 16, 256, 4096, 65536):
                    for n in (1, 16, 256, 1024, 4096, 16384, 65536, 262144):
                        case = Case(operation, rows, n, dtype, axis)
                        if case.moved <= MOST_BYTES and (axis != "middle" or rows >= 64):
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
    calls = OPERATIONS[case.operation]
    ours = functools.partial(calls.ours, axis=case.dim, backend=backend)
    theirs = functools.partial(calls.torch, dim=case.dim)
    with torch.cuda.stream(torch.cuda.Stream()):
        rotated = [
            torch.randn(case.shape, device="cuda", dtype=DTYPES[case.dtype]) for _ in range(rotations(case.moved))
        ]
        is_right = check(case, rotated[0], ours(rotated[0]))
        theirs(rotated[0])
        results: list[torch.Tensor] = []  # so that each has its memory
        graphs = {}
        for name, call in (("ours", ours), ("torch", theirs)):
            graphs[name] = capture(functools.partial(_keep, results, call, x) for x in rotated)
        samples: Samples = alternate(graphs, len(rotated))
    times = {name: spread(samples[name]).median for name in graphs}
    return Result(case, times["ours"], times["torch"], case.moved / copied, is_right)


def _keep(results: list[torch.Tensor], call: Callable[..., torch.Tensor], x: torch.Tensor) -> None:
    results.append(call(x))


def check(case: Case, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the first and the last row of a result are the reference's, byte for byte."""
    rows = x.movedim(case.dim, -1).reshape(-1, case.n) if case.axis == "last" else _edges(case, x)
    expected = getattr(reference, case.operation)(_to_numpy(rows[[0, -1]], case.dtype), 1)
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
