"""What a backend is asked to compute: frozen, hashable, free of any array and of any backend.

An operation normalises its operands into a spec (batch dimensions broadcast, axes sorted, dimensions that lie behind
one another merged). A backend turns a spec into a launch once; calls with an equal spec reuse it.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """How one operand lies in memory. Strides count elements and may be 0 or negative."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array in C order, in elements."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


class MatmulSpec(NamedTuple):
    """out[..., m, n] = epilogue(fold over k of a[..., m, k] * b[..., k, n], c[..., m, n]).

    The four layouts have the same leading batch dimensions; an operand that is broadcast has stride 0 there. c is None
    where there is no addend. alpha and beta are given at launch.
    """

    arithmetic: str
    a: Layout
    b: Layout
    c: Layout | None
    out: Layout

    @property
    def batch(self) -> tuple[int, ...]:
        return self.out.shape[:-2]

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.out.shape[-2], self.out.shape[-1], self.a.shape[-1]


class ReductionSpec(NamedTuple):
    """A reduction of every row of x. A row is one index of the first `kept` dimensions of x; its elements are the
    remaining dimensions in C order.

    x is cast to out.dtype before anything else. `operation` "mean" writes one element a row (out has the `kept`
    dimensions only); "softmax" and "log_softmax" write a row for a row (out has the shape of x).
    """

    operation: str
    kept: int
    x: Layout
    out: Layout


Spec = MatmulSpec | ReductionSpec


def merge_dimensions(
    shape: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Drop dimensions of length 1 and merge neighbours that every operand walks with one stride. C order is kept."""
    merged: list[tuple[int, list[int]]] = []
    for length, *steps in zip(shape, *strides, strict=True):
        if length == 1:
            continue
        if merged and all(outer == inner * length for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * length, steps)
        else:
            merged.append((length, steps))
    return (
        tuple(length for length, _ in merged),
        tuple(tuple(steps[i] for _, steps in merged) for i in range(len(strides))),
    )
