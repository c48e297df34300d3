"""Which kernel attention of few queries takes, and with which CTAs. Needs no GPU."""

from __future__ import annotations

import pytest

from bikernels.specs import AttentionSpec, Layout, contiguous_strides

pytest.importorskip("cupy", reason='CuPy is not installed; pip install "bikernels[cuda13]"')

from bikernels.backend.cupy import attention
from bikernels.backend.cupy.launch import GPU

H200 = GPU("NVIDIA H200", (9, 0), 132, 232_448, 4.9e6)
TURING = GPU("a GPU without redux", (7, 5), 72, 65_536, 0.7e6)


def attend(
    batch: int, heads: int, groups: int, keys: int, width: int, pad: int = 0, causal: bool = False
) -> AttentionSpec:
    """One query a head; the rows of keys and values lie `pad` elements further apart than they are long."""

    def layout(number: int, length: int) -> Layout:
        strides = contiguous_strides((batch, number, length, width + pad))
        return Layout("bfloat16", (batch, number, length, width), strides)

    return AttentionSpec(
        query=layout(heads, 1),
        key=layout(groups, keys),
        value=layout(groups, keys),
        out=layout(heads, 1),
        mask=None,
        is_causal=causal,
        query_factor=0.5,
        key_factor=0.5,
    )


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("keys", [1, 100, 128, 129, 500, 4000])
def test_all_ctas_are_there_at_once(batch: int, keys: int) -> None:
    for heads, groups, width in ((16, 8, 64), (32, 8, 128), (6, 6, 40)):
        plan = attention.choose_short(attend(batch, heads, groups, keys, width), H200)
        if plan is None:
            assert keys > 400 or batch == 64
            continue
        assert plan.threads in (128, 256)
        assert plan.threads == 256 or keys <= 128
        assert plan.rows * plan.row_teams >= heads // groups
        assert plan.grid == batch * groups * plan.row_teams
        resident = H200.shared_bytes // plan.shared_bytes
        assert plan.grid <= H200.multiprocessors * resident
        fewer = attention.short_plan(attend(batch, heads, groups, keys, width), max(1, plan.rows // 2))
        assert plan.rows == 1 or fewer.grid > H200.multiprocessors


def test_what_it_takes_another_kernel_for() -> None:
    assert attention.choose_short(attend(2, 4, 2, 100, 64), H200) is not None
    assert attention.choose_short(attend(2, 4, 2, 100, 64, pad=8), H200) is not None
    assert attention.choose_short(attend(2, 4, 2, 100, 64, pad=3), H200) is None
    assert attention.choose_short(attend(2, 4, 2, 100, 60), H200) is None
    assert attention.choose_short(attend(2, 4, 2, 100, 64, causal=True), H200) is None
    assert attention.choose_short(attend(2, 4, 2, 100, 64), TURING) is None
