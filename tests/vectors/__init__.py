"""Results of tensor cores that others have published: `hardware.npz`, and what it takes to compare with them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from bikernels.dtypes import NUMPY_DTYPE

VECTORS = Path(__file__).with_name("hardware.npz")
GPUS = {"tc8f24": ("A100", "A2", "Ada"), "tc16f25": ("H100", "H200", "B200")}
NAMES = {"bfloat16": "bf16", "float16": "fp16"}
"""Of a dtype, in the source."""


class Vectors(NamedTuple):
    """n results of one step of a tensor core: d = a_0 b_0 + ... + c."""

    a: np.ndarray
    """(n, group), bfloat16 or float16; so is b."""
    b: np.ndarray
    c: np.ndarray
    """(n,) float32; so is d."""
    d: np.ndarray

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """a (n, 2 group) and b (2 group, n) so that element (i, i) of their product is d_i.

        A matrix product starts at +0, so a group before the vector's own sums to c: c in parts that fit the dtype, each
        the product of a part and 1, scaled so that float16 holds both. That sum is exact in every class.
        """
        n, group = self.a.shape
        dtype = self.a.dtype
        first_a, first_b = np.zeros((n, group)), np.zeros((n, group))
        scale = 2.0**14
        rest = self.c.astype(np.float64)
        for i in range(3):
            part = (rest * scale).astype(dtype)
            first_a[:, i], first_b[:, i] = part, 1 / scale
            rest = rest - part.astype(np.float64) / scale
        assert not rest.any()
        rows = np.concatenate([first_a.astype(dtype), self.a], 1)
        columns = np.concatenate([first_b.astype(dtype), self.b], 1)
        return rows, np.ascontiguousarray(columns.T)


def load(gpu: str, dtype: str) -> Vectors:
    """The vectors of one GPU and dtype."""
    with np.load(VECTORS) as file:
        a, b, c, d = (file[f"{gpu}-{dtype}-{name}"] for name in "abcd")
    return Vectors(a.view(NUMPY_DTYPE[dtype]), b.view(NUMPY_DTYPE[dtype]), c.view(np.float32), d.view(np.float32))
