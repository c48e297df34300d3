"""Which elements of a tensor belong to some samples of the batch, found by comparing shapes at two batch sizes.

A dimension carries the batch if its length is proportional to it: `per_sample` elements for each sample. These may lie
together (batch * time, as `flatten` makes them), apart (time * batch), or in between (heads * batch * time). The shape
alone does not tell; `placements` gives every possibility, and the caller tells them apart by their values.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

MAX_PLACEMENTS = 64


class Slice(NamedTuple):
    """Samples start to stop - 1 of the batch."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"row {self.start}" if self.stop == self.start + 1 else f"rows {self.start}:{self.stop}"


class Axis(NamedTuple):
    """A dimension that carries the batch: its length is outer * batch * inner, in this order."""

    dim: int
    outer: int
    inner: int


Placement = tuple[Axis, ...]
"""The dimensions that carry the batch; none if every sample shares the tensor."""


def placements(whole: tuple[int, ...], part: tuple[int, ...], batch: int, size: int) -> list[Placement]:
    """How a tensor of shape `whole` in a run of `batch` samples may hold those of one of `part` in a run of `size`.

    Returns:
        The possibilities, the most usual first; empty if the shapes do not follow the batch.
    """
    if len(whole) != len(part):
        return []
    choices: list[list[Axis]] = []
    for dim, (long, short) in enumerate(zip(whole, part, strict=True)):
        if long == short:
            continue
        if long * size != short * batch or long % batch:
            return []
        per_sample = long // batch
        divisors = [outer for outer in range(1, per_sample + 1) if per_sample % outer == 0]
        choices.append([Axis(dim, outer, per_sample // outer) for outer in divisors])
    return list(itertools.islice(itertools.product(*choices), MAX_PLACEMENTS))


def take(x: torch.Tensor, placement: Placement, batch: int, rows: Slice) -> torch.Tensor:
    """The elements of these samples: a view where there can be one."""
    for dim, outer, inner in placement:
        split = x.unflatten(dim, (outer, batch, inner))
        x = split.narrow(dim + 1, rows.start, rows.stop - rows.start).flatten(dim, dim + 2)
    return x


def index_in_whole(index: tuple[int, ...], placement: Placement, batch: int, rows: Slice) -> tuple[int, ...]:
    """Where an element of `take`'s result lies in the whole tensor."""
    result, size = list(index), rows.stop - rows.start
    for dim, _, inner in placement:
        rest, within = divmod(index[dim], inner)
        outer, sample = divmod(rest, size)
        result[dim] = (outer * batch + rows.start + sample) * inner + within
    return tuple(result)


# ----------------------------------------------------------------------------------------------------------- the bytes

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """The elements as integers of the same size; complex numbers as two, in a last dimension."""
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return x.resolve_neg().contiguous().view(_BITS[x.element_size()])


def differing(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A mask of the elements that are not the same bytes."""
    mask = as_bits(x) != as_bits(y)
    return mask.any(-1) if x.is_complex() else mask


def is_comparable(x: torch.Tensor) -> bool:
    """Whether the elements can be read as bytes."""
    return x.layout is torch.strided and not x.is_quantized and x.device.type != "meta"


# ------------------------------------------------------------------------------------------------------------- samples

_SAMPLES = 48


def sample(x: torch.Tensor) -> torch.Tensor:
    """A few elements, spread over the tensor, as float64: enough to tell which rows these are."""
    values = x[_positions(tuple(x.shape), x.device)]
    return (values.abs() if values.is_complex() else values).to(torch.float64)


@functools.lru_cache(maxsize=1024)
def _positions(shape: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Always the same ones for a shape."""
    generator = torch.Generator().manual_seed(len(shape))
    return tuple(torch.randint(max(length, 1), (_SAMPLES,), generator=generator).to(device) for length in shape)


def resembles(x: torch.Tensor, samples: torch.Tensor) -> bool:
    """Whether `x` has about these values at the places of `sample`; rounding may differ, the rows may not."""
    if x.numel() == 0:
        return True
    values = sample(x)
    scale = samples[samples.isfinite()].abs().max() if bool(samples.isfinite().any()) else samples.new_ones(())
    near = (values - samples).abs() <= 0.05 * samples.abs() + 0.02 * scale
    return bool((near | (values == samples) | (values.isnan() & samples.isnan())).double().mean() > 0.9)


def first(mask: torch.Tensor) -> tuple[int, ...]:
    """The index of the first True in a mask with at least one."""
    return tuple(int(i) for i in mask.nonzero()[0])
