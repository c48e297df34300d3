"""The peer that counts: cuBLASLt with split-K off, vLLM's batch-invariant recipe for Hopper, timed in its own process.

    python benchmarks/cublaslt.py [--backend NAME] < cases.json > samples.json

`matmul.py` starts it, since cuBLAS reads these settings once a process: the environment below (a workspace too small
for split-K), cuBLASLt as the preferred library, and neither split-K nor a reduction in a narrower dtype allowed. Input
is a list of cases, output a list of the samples of each; the GPU must be otherwise idle. Ours is timed in turn with it,
as it is with cuBLAS in the parent, so that clocks and power are alike and a drift between the processes shows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case
from products import NO_SPLIT_K, OURS, Memory, Timed, on_gpu, ours, torch_product
from timing import settle

import bikernels

ENVIRONMENT = {"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}


def time_in_child(cases: Sequence[Case], backend: str | None) -> list[Timed]:
    """Run this file as a child process over the cases; RuntimeError, with its last words, if it fails."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__)), *(["--backend", backend] if backend else [])],
        input=json.dumps([case._asdict() for case in cases]),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"{Path(__file__).name} exited with {child.returncode}: {child.stderr.strip()[-500:]}")
    return [Timed(*each) for each in json.loads(child.stdout)]


def forbid_split_k() -> None:
    """PyTorch's part of the settings."""
    torch.backends.cuda.preferred_blas_library("cublaslt")
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        try:
            setattr(torch.backends.cuda.matmul, name, (False, False))  # narrower sums, split-K
        except TypeError:  # before torch 2.10 there was no second flag
            setattr(torch.backends.cuda.matmul, name, False)


def time_cases(cases: Sequence[Case]) -> list[Timed]:
    """Samples of each case, which are ordered by dtype."""
    timed: list[Timed] = []
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for dtype, of_dtype in itertools.groupby(cases, lambda case: case.dtype):
            listed = list(of_dtype)
            memory = Memory(dtype, listed)
            settle()
            timed += [on_gpu(case, memory, {NO_SPLIT_K: torch_product, OURS: ours()}) for case in listed]
    return timed


def main() -> int:
    """Read cases, write samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="of ours")
    backend = parser.parse_args().backend
    wrong = [name for name, value in ENVIRONMENT.items() if os.environ.get(name) != value]
    if wrong:
        print(f"{' and '.join(wrong)} must be set as ENVIRONMENT says before the process starts", file=sys.stderr)
        return 2
    forbid_split_k()
    fields: list[dict[str, Any]] = json.load(sys.stdin)
    with bikernels.use_backend(backend) if backend else contextlib.nullcontext():
        json.dump(time_cases([Case(**each) for each in fields]), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
