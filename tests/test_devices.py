"""Arrays of two GPUs: each computes on its own, whichever is current, in its own thread too."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import bikernels

from .cases import FLOATS, assert_same_bits, draw


@pytest.fixture
def gpus(backend: Any) -> Any:
    if backend.name == "cpu":
        pytest.skip("the CPU is one device")
    runtime = backend.xp.cuda.runtime
    if runtime.getDeviceCount() < 2:
        pytest.skip("there are fewer than two GPUs")
    return backend.xp.cuda.Device


def calls(rng: np.random.Generator, dtype: str, backend: str) -> list[tuple[str, list[np.ndarray], dict[str, Any]]]:
    """Operations whose kernels take addresses, tensor maps, scratch memory and clusters."""
    wide, long = draw(rng, (70, 264), dtype), draw(rng, (3, 70001), dtype)
    return [
        ("matmul", [wide, draw(rng, (264, 136), dtype)], {}),
        ("matmul", [wide[:3], draw(rng, (264, 136), dtype)], {}),
        ("addmm", [draw(rng, (70,), dtype), wide, draw(rng, (264, 70), dtype)], {"beta": 0.5}),
        ("log_softmax", [wide], {}),
        ("log_softmax", [long], {}),
        ("mean", [long], {"axis": 0}),
        ("sum", [long.reshape(-1)], {}),
        ("rms_norm", [wide, wide[0]], {}),
        *([("exp", [wide], {})] if backend == "cupy" else []),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_home(backend: Any, gpus: Any, dtype: str, rng: np.random.Generator) -> None:
    for operation, arrays, options in calls(rng, dtype, backend.name):
        expected: np.ndarray | None = None
        for current, home in itertools.product(range(2), repeat=2):
            with gpus(home):
                moved = [backend.put(x) for x in arrays]
            with gpus(current):
                for _ in range(2):
                    out = getattr(bikernels, operation)(*moved, backend=backend.name, **options)
                    assert out.device.id == home, operation
                    assert backend.xp.cuda.runtime.getDevice() == current, operation
                    with gpus(home):
                        result = backend.get(out)
                    expected = result if expected is None else expected
                    assert_same_bits(result, expected, f"{operation} on {home}, while {current} is current")


def test_threads(backend: Any, gpus: Any, rng: np.random.Generator) -> None:
    """Threads that alternate between the devices, each the other way round."""
    x, y = draw(rng, (70, 264), "bfloat16"), draw(rng, (264, 136), "bfloat16")
    expected = backend.call("matmul", x, y), backend.call("log_softmax", x)

    def work(first: int) -> None:
        for step in range(first, first + 40):
            with gpus(step % 2):
                assert_same_bits(backend.call("matmul", x, y), expected[0], f"step {step}")
                assert_same_bits(backend.call("log_softmax", x), expected[1], f"step {step}")

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(work, range(4)))
