"""What decides the speed of matrix products and no bit: the tiles, and which of them a product gets.

Everything here may change freely; the results stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

from ...contract import ACCUMULATE, ARITHMETIC
from .device import WARP

BAND = 16
"""Tiles along m that are walked before the next step along n: thread blocks that run together share operands in the
L2."""

WGMMA_GPU = (9, 0)
"""The compute capability whose tensor cores take wgmma."""


class Tile(NamedTuple):
    """The block of the result that a thread block computes and how it goes about it."""

    instruction: str
    """What multiplies: "wgmma" (the tensor cores of sm_90, of four warps together), "mma" (those of sm_80 and newer, of
    one warp) or "fma" (any GPU, of one thread)."""
    m: int
    n: int
    k: int
    """Products between two synchronisations."""
    warps_m: int
    warps_n: int
    stages: int
    """Tiles of K in shared memory, those under way included."""
    blocks: int
    """Thread blocks that should fit on a multiprocessor, which bounds a thread's registers."""
    alone: float
    """Cycles that a thread block takes for one step along K where it has a multiprocessor for itself (on an H200)."""
    among_others: float
    """The same, divided by how many share the multiprocessor, where they are many."""
    loaders: int = 4
    """Warps that bring tiles to shared memory while the others multiply."""

    @property
    def warps(self) -> int:
        """Warps that multiply."""
        return self.warps_m * self.warps_n

    @property
    def threads(self) -> int:
        return (self.warps + self.loaders) * WARP

    @property
    def warp_m(self) -> int:
        return self.m // self.warps_m

    @property
    def warp_n(self) -> int:
        return self.n // self.warps_n


# The stages of all but the wgmma tiles fit into the 99 KB of shared memory that the smallest GPUs (sm_86, sm_89) have.
WGMMA_TILES = (
    Tile("wgmma", 128, 256, 64, 8, 1, 4, 1, 21.0, 21.0),
    Tile("wgmma", 128, 128, 64, 8, 1, 6, 1, 12.7, 12.7),
)
MMA_TILES = (
    Tile("mma", 128, 128, 64, 2, 4, 3, 1, 25.0, 25.0),
    Tile("mma", 64, 64, 128, 2, 2, 3, 2, 9.0, 6.7),
    Tile("mma", 32, 64, 128, 2, 2, 4, 2, 6.3, 5.2),
    Tile("mma", 32, 32, 256, 2, 2, 3, 2, 4.5, 3.6),
    Tile("mma", 32, 16, 256, 2, 1, 4, 2, 3.5, 2.8),
    Tile("mma", 16, 16, 256, 1, 1, 5, 2, 3.2, 1.9),
)
FMA_TILES = {
    "float32": (
        Tile("fma", 128, 128, 16, 4, 2, 4, 1, 180.0, 180.0),
        Tile("fma", 128, 64, 16, 4, 1, 4, 2, 95.0, 90.0, 2),
        Tile("fma", 32, 16, 32, 2, 1, 4, 3, 22.0, 12.0),
    ),
    "float64": (
        Tile("fma", 128, 64, 16, 4, 1, 3, 1, 180.0, 180.0),
        Tile("fma", 32, 16, 16, 2, 1, 4, 3, 30.0, 20.0),
    ),
}


def tiles(arithmetic: str, operand: str, compute_capability: tuple[int, int] | None) -> tuple[Tile, ...]:
    """The tiles for an arithmetic class and a dtype on such a GPU, or on any."""
    if not ARITHMETIC[arithmetic].is_tensor_core:
        return FMA_TILES[ACCUMULATE[operand]]
    return MMA_TILES if compute_capability not in (WGMMA_GPU, None) else (*WGMMA_TILES, *MMA_TILES)


def tiles_of(m: int, n: int, tile: Tile) -> int:
    """How many tiles an m x n product takes."""
    return -(-m // tile.m) * -(-n // tile.n)


def _cycles_per_step(tile: Tile, m: int, n: int, batches: int, multiprocessors: int) -> float:
    """What a step along K takes, roughly, all of the result's tiles together."""
    in_turn = -(-tiles_of(m, n, tile) * batches // multiprocessors)
    return max(-(-in_turn // tile.blocks) * tile.alone, in_turn * tile.among_others)


def choose(candidates: tuple[Tile, ...], m: int, n: int, batches: int, multiprocessors: int) -> tuple[Tile, bool]:
    """The tile that should take least time, and whether to multiply the transposes; of equals the first."""

    def cycles(choice: tuple[Tile, bool]) -> float:
        tile, swapped = choice
        return _cycles_per_step(tile, *((n, m) if swapped else (m, n)), batches, multiprocessors)

    return min(((tile, swapped) for tile in candidates for swapped in (False, True)), key=cycles)
