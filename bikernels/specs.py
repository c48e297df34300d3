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


ONE_FOR_A_ROW = ("mean", "sum", "var", "std", "logsumexp", "rms_norm_weight_backward", "layer_norm_weight_backward")
"""The reductions that write one element for a row."""

A_ROW_FOR_A_ROW = (
    "softmax", "log_softmax", "rms_norm", "layer_norm",
    "softmax_backward", "log_softmax_backward", "rms_norm_backward", "layer_norm_backward",
)  # fmt: skip
"""The reductions that write a row for a row."""

REDUCTIONS = ONE_FOR_A_ROW + A_ROW_FOR_A_ROW
"""Every `ReductionSpec.operation`."""


class ReductionSpec(NamedTuple):
    """A reduction of every row of x. A row is one index of the first `kept` dimensions of x; its elements are the
    remaining dimensions in C order.

    Of a forward operation x is cast to out.dtype before anything else; the other operands, and x of a backward one, are
    cast to the accumulate dtype of out.dtype. The layouts have the shape of x, with stride 0 along the dimensions that
    an operand does not have; only `out` has no more than the `kept` dimensions where it gets one element for a row.

    A launch takes out, x, and those of the other layouts that are not None, in the order in which they stand here.
    """

    operation: str
    kept: int
    x: Layout
    """Of a backward operation the forward one's x; of the softmax family's the forward one's result."""
    out: Layout
    grad: Layout | None = None
    """Of a backward operation: the gradient of the forward one's result."""
    weight: Layout | None = None
    """Of a norm, which may have none: broadcast over the `kept` dimensions."""
    bias: Layout | None = None
    """Of layer_norm, which may have none: broadcast over the `kept` dimensions."""
    mean: Layout | None = None
    """Of layer_norm's rows. layer_norm writes it, if it is there, in the accumulate dtype; the backward forms read it.
    Broadcast along the rows; in layer_norm_weight_backward over the `kept` dimensions."""
    rstd: Layout | None = None
    """1 / sqrt(mean square or variance + eps) of a norm's rows, as `mean`."""
    correction: float = 0.0
    """Of var and std: subtracted from the number of elements that divides."""
    eps: float = 0.0
    """Of rms_norm and layer_norm."""

    @property
    def one_for_a_row(self) -> bool:
        return self.operation in ONE_FOR_A_ROW


ELEMENTWISE = (
    "exp", "exp2", "expm1", "log", "log1p", "erf", "sqrt", "rsqrt", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh",
    "softplus", "sin", "cos", "pow",
    "sigmoid_backward", "tanh_backward", "silu_backward", "gelu_backward", "gelu_tanh_backward", "softplus_backward",
)  # fmt: skip
"""Every `ElementwiseSpec.operation`. pow takes x and y; a backward form the gradient and the forward one's x, that of
sigmoid and tanh its result."""


class ElementwiseSpec(NamedTuple):
    """out = operation(x, y), element by element; the operands are cast to out.dtype first.

    The layouts have the shape of `out`, with stride 0 along the dimensions in which an operand is broadcast; y is None
    where there is no second operand. Two numbers are given at launch; the first one stands for y in a pow without.
    """

    operation: str
    out: Layout
    x: Layout
    y: Layout | None = None


class AttentionSpec(NamedTuple):
    """out = softmax(query @ key.T + mask) @ value, by section 11 of docs/contract.md: in float32, with query and key
    multiplied by their factors first.

    query (B, heads, L, D), key (B, groups, S, D), value (B, groups, S, E), out (B, heads, L, E), of one dtype, where
    neighbouring heads share a group; mask (B, heads, L, S), with stride 0 where it is broadcast. A launch takes out,
    query, key, value, and the mask if there is one.
    """

    query: Layout
    key: Layout
    value: Layout
    out: Layout
    mask: Layout | None
    """Added to the scores; of a boolean one 0 or -inf."""
    is_causal: bool
    """Query l has keys 0 ... l; there is no mask."""
    query_factor: float
    key_factor: float


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
