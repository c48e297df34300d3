"""What an inner loop is to the driver of matrix products in `matmul.py`."""

from __future__ import annotations

from typing import NamedTuple


class Panels(NamedTuple):
    """An inner loop and the packed form in which it wants its operands.

    A panel holds a few rows of a, or columns of b, for a stretch of k: a header, then for each k `words` times as many
    accumulate values as the panel is wide, of which the first are the operand's. Panels of b are `columns` wide, those
    of a `rows`, the last one of a the least power of two that suffices. What the operand does not fill is zero.
    """

    multiply: int
    """Address of multiply(acc, leading, a, b, depth, width, first): a tile of accumulators, `leading` elements to a
    row, takes `depth` products from a panel of a, `width` wide, and one of b. It begins at +0 if `first`."""
    finish: int
    """Address of finish(panel, depth, width), which fills in the header and the other words; 0: there are none."""
    rows: int
    columns: int
    group: int
    """Depth is a multiple of it."""
    header: int
    """Bytes."""
    words: int
