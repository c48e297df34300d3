"""Which products are timed: their shapes, groups and layouts, and the record that a run keeps of each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bikernels.contract import ITEMSIZE

DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}

LAYOUTS = {"nk": "w.T", "kn": "w"}
"""How weights lie: as the transpose of a row-major N x K array, and as a row-major K x N array."""

GROUPS = {
    "small": "M < 128",
    "medium": "128 ≤ M < 2048",
    "large": "M ≥ 2048",
    "fp32": "fp32",
    "fp64": "fp64",
    "batched": "batched",
    "host": "host cost",
    "first-use": "first use",
    "cpu": "CPU",
    "tc16f25": "CPU, tc16f25",
}
GPU_GROUPS = ("small", "medium", "large", "fp32", "fp64", "batched", "host", "first-use")
CPU_GROUPS = ("cpu", "tc16f25")

Shape = tuple[int, int]
"""N and K of a layer's weights."""

LAYERS: tuple[Shape, ...] = (
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (1024, 4096),
    (256, 7168),
    (151936, 4096),
)
ROWS = tuple(2**i for i in range(14))
SQUARE: Shape = (4096, 4096)

HEADS, HEAD_WIDTH = 32, 128


def shape(text: str) -> Shape:
    """N and K from "6144x4096"."""
    n, _, k = text.lower().partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) > 0 and int(k) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape of weights; write NxK, e.g. 6144x4096")
    return int(n), int(k)


class Case(NamedTuple):
    """(batch, M, K) times (batch, K, N); a batch of 1 is a plain 2-D product."""

    group: str
    dtype: str
    layout: str
    m: int
    n: int
    k: int
    batch: int = 1
    arithmetic: str | None = None
    """A class of the contract where it is not the device's native one."""

    @property
    def shape(self) -> str:
        """The weights, as tables name them."""
        heads = f"{self.batch}x" if self.batch > 1 else ""
        return f"{heads}{self.n}x{self.k}"

    @property
    def products(self) -> int:
        return self.batch * self.m * self.n * self.k

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[DTYPE[self.dtype]]

    @property
    def weight_bytes(self) -> int:
        return self.batch * self.n * self.k * self.itemsize

    @property
    def moved(self) -> int:
        """Bytes: both operands read once and the result written once."""
        return self.batch * (self.m * self.k + self.n * self.k + self.m * self.n) * self.itemsize


class Record(NamedTuple):
    """A case as measured."""

    case: Case
    floor_us: float | None
    """The least time; None on devices whose limits are not known."""
    chain_us: float | None
    """The chain of additions alone, where it may be what limits."""
    us: dict[str, list[float]]
    """Per implementation, samples in microseconds a call; those that failed are absent."""
    beside: dict[str, list[float]]
    """Per implementation that was timed in a process of its own, the samples of ours in turn with it."""
    check: str
    """"ok" if a row alone has the bytes that it has in the batch, "DIFFERENT" if not, else why it is not known."""
    failed: dict[str, str]
    """Per implementation that could not run, why."""

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"case": self.case._asdict()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Record:
        return cls(**(fields | {"case": Case(**fields["case"])}))


class Selection(NamedTuple):
    """What the caller asked for; None stands for the list of the group."""

    shapes: Sequence[Shape] | None = None
    rows: Sequence[int] | None = None
    layouts: Sequence[str] = tuple(LAYOUTS)
    dtypes: Sequence[str] = tuple(DTYPE)
    groups: Sequence[str] = tuple(GROUPS)
    quick: bool = False
    full: bool = False

    def weights(self, default: Sequence[Shape]) -> Sequence[Shape]:
        """The shapes asked for, or the default."""
        return default if self.shapes is None else self.shapes

    def batch(self, default: Sequence[int]) -> Sequence[int]:
        """The values of M asked for, or the default."""
        return default if self.rows is None else self.rows


def gpu_cases(selection: Selection) -> list[Case]:
    """The products to time on a GPU, dtype by dtype, light ones first: heavy ones lower the clocks for a while."""
    cases = itertools.chain.from_iterable(
        itertools.chain(_attention(dtype, selection), _layers(dtype, selection)) for dtype in selection.dtypes
    )
    return [case for case in cases if case.group in selection.groups]


def _layers(dtype: str, selection: Selection) -> Iterator[Case]:
    shapes, rows = _listed(dtype, selection)
    for m, (n, k), layout in itertools.product(selection.batch(rows), selection.weights(shapes), selection.layouts):
        yield Case(dtype if dtype in ("fp32", "fp64") else _group(m), dtype, layout, m, n, k)


def _listed(dtype: str, selection: Selection) -> tuple[Sequence[Shape], Sequence[int]]:
    """Shapes and values of M where the caller names none."""
    if dtype == "fp64":
        return (SQUARE,), (4096,)
    if dtype == "fp32":
        return (SQUARE,), (1, 64, 4096) if selection.quick else (1, 2, 4, 8, 16, 32, 64, 4096)
    if selection.full:
        return LAYERS, ROWS
    if selection.quick:
        shapes = ((4096, 4096), (24576, 4096), (1024, 4096), (256, 7168))
        return (shapes, (1, 16, 64, 256, 1024, 4096)) if dtype == "bf16" else (shapes[:1], (1, 64, 4096))
    return (LAYERS, ROWS) if dtype == "bf16" else (LAYERS, (1, 64, 512, 4096))


def _group(m: int) -> str:
    return "small" if m < 128 else "medium" if m < 2048 else "large"


def _attention(dtype: str, selection: Selection) -> Iterator[Case]:
    """q @ k.T, (M, 128) by (128, L), and p @ v, (M, L) by (L, 128), of every head; q is a prompt or one token."""
    if dtype != "bf16" or selection.shapes is not None or selection.rows is not None:
        return
    for length, m in itertools.product((512, 8192) if selection.quick else (128, 512, 2048, 8192), (128, 1)):
        yield Case("batched", dtype, "nk", m, length, HEAD_WIDTH, HEADS)
        yield Case("batched", dtype, "kn", m, HEAD_WIDTH, length, HEADS)


def cpu_cases(selection: Selection) -> list[Case]:
    """The products to time on a CPU: in the native class, then in that of a Hopper GPU."""
    if selection.shapes is None and selection.rows is None:
        native, replayed = [(1024, 1024, 1024), (64, *SQUARE), (1, *SQUARE)], [(128, 256, 4096)]
    else:
        native = [(m, n, k) for n, k in selection.weights((SQUARE,)) for m in selection.batch((1, 64))]
        replayed = native
    cases = [
        Case("cpu", dtype, layout, *mnk)
        for mnk, dtype, layout in itertools.product(native, selection.dtypes, selection.layouts)
    ] + [
        Case("tc16f25", dtype, "kn", *mnk, arithmetic="tc16f25")
        for mnk, dtype in itertools.product(replayed, selection.dtypes)
        if dtype in ("bf16", "fp16")
    ]
    return [case for case in cases if case.group in selection.groups]
