"""How long the first product of a fresh process takes; prints seconds as JSON.

    python benchmarks/first_use.py [--backend NAME]

`matmul.py` starts it with an empty and then with a filled BIKERNELS_CACHE_DIR. Imports and arrays of CuPy, which make
the CUDA context, come first and are timed apart: every program that holds a CuPy array has paid for them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def time_in_child(cache: Path, backend: str | None) -> dict[str, float]:
    """Run this file as a child process with this folder as the cache; RuntimeError, with its last words, on failure."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__)), *(["--backend", backend] if backend else [])],
        env=os.environ | {"BIKERNELS_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"{Path(__file__).name} exited with {child.returncode}: {child.stderr.strip()[-500:]}")
    seconds: dict[str, float] = json.loads(child.stdout)
    return seconds


def main() -> int:
    """Time each step once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend")
    backend = parser.parse_args().backend
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name] = round(now - start, 4)
        start = now

    import cupy
    import numpy as np

    lap("import cupy")
    a, b = (cupy.asarray(np.ones(shape, np.float16)) for shape in ((16, 64), (64, 16)))
    cupy.cuda.Device().synchronize()
    lap("context")

    import bikernels

    lap("import bikernels")
    bikernels.matmul(a, b, backend=backend)
    cupy.cuda.Device().synchronize()
    lap("first product")
    cupy.matmul(a, b)
    cupy.cuda.Device().synchronize()
    lap("first cupy.matmul")
    json.dump(seconds, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
