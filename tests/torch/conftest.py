"""Devices: every test that takes `device` runs on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bikernels_torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    return request.param


@pytest.fixture(autouse=True)
def _leaves_no_mode() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    assert not bikernels_torch.is_batch_invariant_mode_enabled()


@pytest.fixture
def mode() -> Iterator[None]:
    with bikernels_torch.set_batch_invariant_mode():
        yield
