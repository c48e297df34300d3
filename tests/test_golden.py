"""Results recorded on a Hopper GPU (`golden/record.py`): the reference and every backend still give these bytes."""

from __future__ import annotations

from typing import Any

import pytest

from .cases import Case, assert_same_bits
from .golden import GOLDEN, load

RECORDED = load()


@pytest.mark.skipif(not RECORDED, reason=f"{GOLDEN.name} has not been recorded")
@pytest.mark.parametrize("name", RECORDED)
def test_reference(name: str) -> None:
    case, recorded = RECORDED[name]
    assert_same_bits(case.expected(), recorded, name)


@pytest.mark.parametrize("name", RECORDED)
def test_backend(backend: Any, name: str) -> None:
    case: Case = RECORDED[name][0]
    if not backend.can_compute(case.options.get("arithmetic", "fma32")):
        pytest.skip("the device does not compute this class")
    options = case.options if case.operation in ("matmul", "addmm") else {"axis": -1} | case.options
    assert_same_bits(backend.call(case.operation, *case.arrays, **options), RECORDED[name][1], name)
