"""exp and log of every float32, alone and within reductions: `python -m tests.exhaustive [--every N]`.

On a GPU and on a CPU, compared in bytes; and how far the results lie from the exact ones, in units in the last place,
which must not be further than docs/polynomials.py states. `--every N` takes each N-th block of 2^24 bit patterns.
The status is 1 if a byte differs or a bound is passed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np

import bikernels

BLOCK = 2**24
PATTERNS = range(0, 2**32, BLOCK)
NOT_POSITIVE = range(2**31, 2**31 + 0x43000000, BLOCK)
"""From -0 to -128: below, exp is 0."""
GPU_BACKENDS = ("cupy", "numba")


class Form(NamedTuple):
    """How numbers are given to a function: alone, or as elements of rows that begin with 0."""

    function: str
    n: int = 0
    """The length of a row; 0: each number alone."""
    is_column: bool = False

    @property
    def patterns(self) -> range:
        """The first of each block of bit patterns."""
        is_of_any_number = not self.n or self.function.endswith("backward")
        return PATTERNS if is_of_any_number else NOT_POSITIVE

    @property
    def backends(self) -> tuple[str, ...]:
        """Those on a GPU that have the function."""
        return GPU_BACKENDS if self.n else ("cupy",)

    def __str__(self) -> str:
        return f"{self.function}, {'columns' if self.is_column else 'rows'} of {self.n}" if self.n else self.function


FORMS = (
    *(Form(function) for function in ("exp", "log")),
    *(
        Form(function, n, is_column)
        for function in ("softmax", "log_softmax")
        for n, is_column in ((2, False), (300, False), (4096, False), (20000, False), (300, True))
    ),
    *(Form("logsumexp", n, is_column) for n, is_column in ((2, False), (300, True))),
    *(Form("log_softmax_backward", n, is_column) for n, is_column in ((2, False), (4096, False), (300, True))),
)
"""A row (0, t) has the sum 1 + exp(t), so of these log takes every number from 1 to 2; and the gradient from (1, 0) is
-exp(t) alone."""


def call(form: Form, first: int, backend: str) -> Any:
    """The results for a block of bit patterns on the backend's side: NumPy's or CuPy's."""
    function, xp = getattr(bikernels, form.function), np if backend == "cpu" else cupy
    numbers = xp.arange(first, first + BLOCK, dtype=np.uint32).view(np.float32)
    if not form.n:
        return function(numbers, backend=backend)
    rows = -(-numbers.size // (form.n - 1))
    x = xp.zeros((rows, form.n), np.float32)
    padded = xp.zeros(rows * (form.n - 1), np.float32)
    padded[: numbers.size] = numbers
    x[:, 1:] = padded.reshape(rows, -1)
    operands = [x]
    if form.function.endswith("backward"):
        grad = xp.zeros_like(x)
        grad[:, 0] = 1
        operands = [grad, x]
    if form.is_column:
        operands = [xp.ascontiguousarray(one.T) for one in operands]
    return function(*operands, axis=0 if form.is_column else 1, backend=backend)


EXACT: dict[str, Callable[[Any], Any]] = {"exp": np.exp, "log": np.log}


def call_cpu(form: Form, first: int) -> tuple[np.ndarray, float]:
    """The results for a block on a CPU, and how far they are from those in float64, of the functions in EXACT."""
    results = call(form, first, "cpu")
    if form.function not in EXACT:
        return results, 0.0
    numbers = np.arange(first, first + BLOCK, dtype=np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        return results, error(results, EXACT[form.function](numbers.astype(np.float64)))


def error(results: np.ndarray, exact: np.ndarray) -> float:
    """The largest |result - exact| in units in the last place of float32; an infinite result stands for 2^128."""
    values = np.where(np.isinf(results), 2.0**128, results.astype(np.float64))
    is_counted = np.isfinite(exact) & ~((values == 2.0**128) & (exact >= 2.0**128))
    values, exact = values[is_counted], exact[is_counted]
    exponent = np.clip(np.frexp(exact)[1] - 1, -126, 127)
    return float(np.max(np.abs(values - exact) / np.ldexp(1.0, exponent - 23), initial=0))


def bounds() -> dict[str, float]:
    """Those that docs/polynomials.py states."""
    path = Path(__file__).parents[1] / "docs" / "polynomials.py"
    spec = importlib.util.spec_from_file_location("polynomials", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"exp": module.BOUNDS["exp32"], "log": module.BOUNDS["log32"]}


def run(every: int, threads: ThreadPoolExecutor) -> Iterator[tuple[str, bool]]:
    """A line for each form, and whether it is as it should be."""
    stated = bounds()
    for form in FORMS:
        taken = form.patterns[::every]
        differences, largest = dict.fromkeys(form.backends, 0), 0.0
        on_cpu = threads.map(functools.partial(call_cpu, form), taken)
        for first, (results, furthest) in zip(taken, on_cpu, strict=True):
            expected, largest = cupy.asarray(results).view(np.uint32), max(largest, furthest)
            for backend in form.backends:
                actual = call(form, first, backend).view(np.uint32)
                differences[backend] += int(cupy.count_nonzero(actual != expected))
        found = ", ".join(f"{number} differ on {name}" for name, number in differences.items())
        is_right = not any(differences.values())
        if form.function in EXACT:
            found += f", at most {largest:.4f} units in the last place ({stated[form.function]} stated)"
            is_right &= largest <= stated[form.function]
        yield f"{form}: {len(taken) * BLOCK} numbers, {found}{'' if is_right else '  WRONG'}", is_right


def main() -> int:
    """Print what was found; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    print(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())
    status = 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for line, is_right in run(arguments.every, threads):
            print(line, flush=True)
            status |= not is_right
    return status


if __name__ == "__main__":
    sys.exit(main())
