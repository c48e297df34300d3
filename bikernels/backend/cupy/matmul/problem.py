"""A product as the kernels see it, and the parameters that most of them take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ....contract import ACCUMULATE, ITEMSIZE
from ....specs import Layout, MatmulSpec
from ..parameters import DTYPE_CODE, MATMUL, divisor, fill_dims

BAND = 8
"""Tiles along m that are walked before the next step along n: CTAs that run together share operands in the L2."""

SHARED_BYTES, RESERVED_BYTES = 227 * 1024, 1024
"""Of a multiprocessor of Hopper, and what a CTA takes of it beside its own."""

Strides = tuple[int, ...]


class Problem(NamedTuple):
    """out[m, n] = epilogue(fold over k of a[m, k] * b[n, k], c[m, n]) for every matrix of the batch.

    Strides count elements: of an operand along (m or n, k), of c and out along (m, n).
    """

    arithmetic: str
    dtype: str
    m: int
    n: int
    k: int
    a: tuple[int, int]
    b: tuple[int, int]
    c: tuple[int, int]
    out: tuple[int, int]
    batch: tuple[int, ...]
    batch_a: Strides
    batch_b: Strides
    batch_c: Strides
    batch_out: Strides
    c_dtype: str | None
    """None where there is no addend."""
    out_dtype: str
    swapped: bool = False
    """Whether a and b (and m and n) are the caller's b and a."""

    @staticmethod
    def of(spec: MatmulSpec) -> Problem:
        m, n, k = spec.mnk
        return Problem(
            spec.arithmetic,
            spec.a.dtype,
            m,
            n,
            k,
            _operand(spec.a, -2, -1),
            _operand(spec.b, -1, -2),
            _pair(spec.c.strides) if spec.c else (0, 0),
            _pair(spec.out.strides),
            spec.batch,
            spec.a.strides[:-2],
            spec.b.strides[:-2],
            spec.c.strides[:-2] if spec.c else (0,) * len(spec.batch),
            spec.out.strides[:-2],
            spec.c.dtype if spec.c else None,
            spec.out.dtype,
        )

    def swap(self) -> Problem:
        """The transposed product, which has the same bits."""
        return self._replace(
            m=self.n,
            n=self.m,
            a=self.b,
            b=self.a,
            c=self.c[::-1],
            out=self.out[::-1],
            batch_a=self.batch_b,
            batch_b=self.batch_a,
            swapped=not self.swapped,
        )

    @property
    def accumulate(self) -> str:
        return ACCUMULATE[self.dtype]

    @property
    def matrices(self) -> int:
        return math.prod(self.batch)


def _pair(strides: Strides) -> tuple[int, int]:
    return strides[-2], strides[-1]


def _operand(layout: Layout, mn_axis: int, k_axis: int) -> tuple[int, int]:
    """Strides along (m or n) and k. An axis of one element has no stride; it gets the one that suits vectors."""
    (mn, k), (mn_length, k_length) = ((values[mn_axis], values[k_axis]) for values in (layout.strides, layout.shape))
    return (mn if mn_length != 1 else _rounded_up(k_length)), (k if k_length != 1 else _rounded_up(mn_length))


def _rounded_up(length: int) -> int:
    return -(-length // 8) * 8


def along_k(strides: tuple[int, int]) -> bool:
    """Whether an operand is read along k, else along m or n."""
    mn, k = strides
    return k == 1 or (mn != 1 and abs(k) <= abs(mn))


def lies_in_vectors(problem: Problem) -> bool:
    """Whether both operands lie in lines of whole vectors of 16 bytes, but for their addresses."""
    vector = 16 // ITEMSIZE[problem.dtype]
    return all(
        sorted((mn == 1, k == 1)) == [False, True] and (mn if k == 1 else k) % vector == 0
        for mn, k in (problem.a, problem.b)
    )


def tiles_of(m: int, n: int, tile_m: int, tile_n: int) -> int:
    """How many tiles an m x n matrix takes."""
    return -(-m // tile_m) * -(-n // tile_n)


def parameters(problem: Problem, tile_m: int, tile_n: int) -> tuple[Any, int]:
    """The struct `Matmul` of matmul.cuh, and how many tiles it stands for."""
    tiles = tiles_of(problem.m, problem.n, tile_m, tile_n)
    p = np.zeros((), MATMUL)
    p["m"], p["n"], p["k"] = problem.m, problem.n, problem.k
    p["a_stride"], p["b_stride"] = problem.a, problem.b
    p["a_along_k"], p["b_along_k"] = along_k(problem.a), along_k(problem.b)
    p["c_stride"], p["out_stride"] = problem.c, problem.out
    p["addend"] = problem.c_dtype is not None
    p["c_dtype"] = DTYPE_CODE[problem.c_dtype or problem.out_dtype]
    p["out_dtype"] = DTYPE_CODE[problem.out_dtype]
    p["tiles"] = tiles * problem.matrices
    p["tiles_of_matrix"] = divisor(tiles)
    p["tiles_of_band"] = divisor(BAND * -(-problem.n // tile_n))
    p["batch_dims"] = len(problem.batch)
    fill_dims(p["batch"], problem.batch, problem.batch_a, problem.batch_b, problem.batch_c, problem.batch_out)
    return p, tiles * problem.matrices


def resident_ctas(shared_bytes: int) -> int:
    """How many CTAs a multiprocessor of Hopper has the shared memory for."""
    return SHARED_BYTES // (shared_bytes + RESERVED_BYTES)


class Cycles(NamedTuple):
    """Estimates for Hopper, per step of k: of a tile that has a multiprocessor to itself, and of one of many."""

    alone: float
    shared: float

    def of(self, tiles: int, resident: int) -> float:
        """Of a multiprocessor that goes over so many tiles, of which it holds `resident` at a time."""
        rounds, rest = divmod(tiles, resident)
        last = max(self.alone, rest * self.shared) if rest else 0.0
        return rounds * max(self.alone, resident * self.shared) + last


class Tile(Protocol):
    """What a schedule says of its tile."""

    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...


AnyTile = TypeVar("AnyTile", bound=Tile)


def by_size(schedules: Sequence[AnyTile], problem: Problem, multiprocessors: int) -> AnyTile:
    """Of schedules in ascending size: the first as wide as a narrow product, else the largest if its tiles are one for
    each multiprocessor or more, else the one before it.
    """
    m, n = max(problem.m, problem.n), min(problem.m, problem.n)
    *narrow, square, large = schedules
    for schedule in narrow:
        if n <= schedule.n:
            return schedule
    fills = tiles_of(m, n, large.m, large.n) * problem.matrices >= multiprocessors
    return large if fills else square
