"""Record the golden cases on this machine's GPU: `python -m tests.golden.record [FILE]`, from the repository's root.

Matrix products in a tensor-core class come from the GPU's tensor cores; the rest from the `cupy` backend. Nothing is
written, and the script exits non-zero, unless the reference agrees with the GPU in every byte of every case.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

import bikernels

from ..cases import (
    Case,
    assert_same_bits,
    backward_cases,
    long_matmul_cases,
    matmul_cases,
    norm_cases,
    reduction_cases,
)
from . import GOLDEN, save

SEED = 2026
LARGEST, LARGEST_OF_OTHERS = 12_000, 2_500
"""Bytes of a case's arrays above which it is left out, to keep the file small."""
LARGER = ("matmul", "addmm", "log_softmax", "softmax", "mean")
"""Operations of which longer cases are kept."""


def main() -> int:
    import cupy as cp

    can_compute = set(bikernels.backends()["cupy"].arithmetic.values()) | {"fma32", "fma64"}
    results: dict[str, tuple[Case, np.ndarray]] = {}
    failures = []
    families = (matmul_cases, long_matmul_cases, reduction_cases, norm_cases, backward_cases)
    for case in itertools.chain.from_iterable(cases(SEED) for cases in families):
        if case.options.get("arithmetic", "fma32") not in can_compute:
            continue
        if sum(x.nbytes for x in case.arrays) > (LARGEST if case.operation in LARGER else LARGEST_OF_OTHERS):
            continue
        options = case.options if case.operation in ("matmul", "addmm") else {"axis": -1} | case.options
        arrays = [cp.asarray(x) for x in case.arrays]
        result = getattr(bikernels, case.operation)(*arrays, backend="cupy", **options).get()
        try:
            assert_same_bits(result, case.expected(), case.name)
        except AssertionError as error:
            failures.append(str(error))
        results[case.name] = (case, result)
    device = cp.cuda.runtime.getDeviceProperties(0)
    machine = {
        "gpu": device["name"].decode(),
        "driver": str(cp.cuda.runtime.driverGetVersion()),
        "cupy": cp.__version__,
        "bikernels": bikernels.__version__,
        "contract": str(bikernels.contract_version),
    }
    print(machine)
    print(f"{len(results)} cases, {len(failures)} differ from the reference")
    print("\n".join(failures))
    if not failures:
        save(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN, results, machine)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
