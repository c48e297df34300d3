"""Tensors as bytes, and layouts of the same values."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import torch

import bikernels
from bikernels_torch.core import FLOATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(_INTEGER[x.element_size()]).cpu()


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype is y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))


def distinct(results: Iterator[torch.Tensor]) -> int:
    """How many different results there are, in bits."""
    return len({bits(x).numpy().tobytes() for x in results})


def to_numpy(x: torch.Tensor) -> np.ndarray:
    array = x.detach().cpu().contiguous()
    if x.dtype is torch.bfloat16:
        return array.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array.numpy()


def from_numpy(x: np.ndarray) -> torch.Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def native_arithmetic(dtype: torch.dtype, device: str) -> str:
    """The class in which the core multiplies tensors of that device."""
    for status in bikernels.backends().values():
        if any(chosen.startswith(device) for chosen in status.chosen_for):
            return status.arithmetic[FLOATS[dtype]]
    raise AssertionError(f"no backend for {device}")


def on_numpy(function: Callable[..., np.ndarray], *operands: torch.Tensor, **options: object) -> torch.Tensor:
    """The core's public function on NumPy copies of the operands, in the arithmetic of their device."""
    if function in (bikernels.matmul, bikernels.addmm):
        options["arithmetic"] = native_arithmetic(operands[-1].dtype, operands[-1].device.type)
    result = function(*map(to_numpy, operands), **options)
    return from_numpy(np.asarray(result)).to(operands[0].device)


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same values in every kind of layout that PyTorch has; what lies between them is NaN."""
    yield "contiguous", x.contiguous()
    yield "transposed", x.mT.contiguous().mT
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 1::3] = x
    yield "sliced", wide[..., 1::3]
    rows = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    rows[..., ::2, 1:-2] = x
    yield "unaligned rows", rows[..., ::2, 1:-2]


LAYOUTS_OF_ELEMENTS: dict[str, Callable[[Callable[..., torch.Tensor]], torch.Tensor]] = {
    "contiguous": lambda draw: draw(3, 5, 7),
    "transposed": lambda draw: draw(3, 5, 7).transpose(0, 2),
    "channels last": lambda draw: draw(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sliced": lambda draw: draw(3, 5, 9)[:, ::2, 1:8],
    "expanded": lambda draw: draw(3, 1, 7).expand(3, 5, 7),
    "0-d": lambda draw: draw(()),
    "empty": lambda draw: draw(3, 0, 7),
}
"""Operands of pointwise functions, drawn by `torch.rand` or its like."""
