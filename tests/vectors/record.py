"""Check all published vectors and keep some: `python -m tests.vectors.record FOLDER`, from the repository's root.

FOLDER is a checkout of the source that `README.md` names. Nothing is written, and the script exits non-zero, unless the
reference agrees in every byte of all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bikernels import reference
from bikernels.dtypes import NUMPY_DTYPE

from . import GPUS, NAMES, VECTORS, Vectors

KEPT = 256
"""Vectors of a GPU and dtype in the file, the first ones."""


def read(folder: Path, gpu: str, dtype: str) -> Vectors:
    """Operands are hexadecimal float32, c and d float32 in binary digits."""
    name = NAMES[dtype]
    place = folder / "model_validation" / gpu / name

    def operand(letter: str) -> np.ndarray:
        lines = (place / f"{letter}_{gpu}_{name}.txt").read_text().splitlines()
        words = np.array([[int(word, 16) for word in line.split()] for line in lines if line.strip()], np.uint32)
        values = words.view(np.float32)
        narrow = values.astype(NUMPY_DTYPE[dtype])
        assert (narrow.astype(np.float32) == values).all()
        return narrow

    def result(letter: str) -> np.ndarray:
        text = (place / f"{letter}_{gpu}_fp32.txt").read_text()
        return np.array([int(digits, 2) for digits in text.split()], np.uint32).view(np.float32)

    return Vectors(operand("a"), operand("b"), result("c"), result("d"))


def main() -> int:
    kept: dict[str, np.ndarray] = {}
    failures = 0
    for arithmetic, gpus in GPUS.items():
        for gpu in gpus:
            for dtype in NAMES:
                vectors = read(Path(sys.argv[1]), gpu, dtype)
                different = 0
                for start in range(0, len(vectors.d), KEPT):
                    some = Vectors(*(x[start : start + KEPT] for x in vectors))
                    products = reference.matmul(*some.operands(), arithmetic=arithmetic, dtype="float32").diagonal()
                    different += int((products.copy().view(np.uint32) != some.d.view(np.uint32)).sum())
                print(f"{gpu}, {dtype}, {arithmetic}: {different} of {len(vectors.d)} results differ")
                failures += different
                for letter, x in zip("abcd", vectors, strict=True):
                    kept[f"{gpu}-{dtype}-{letter}"] = x[:KEPT].view(f"u{x.itemsize}")
    if not failures:
        np.savez_compressed(VECTORS, **kept)  # type: ignore[arg-type]
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
