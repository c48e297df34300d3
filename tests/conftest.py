"""The `--backend` option, and arrays on the backend under test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import bikernels
from bikernels.backend import NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=NAMES,
        help="test this backend (may be repeated) and fail if it is not available; by default all that are",
    )
    parser.addoption("--every-kernel", action="store_true", help="compile all GPU kernels, not a share of them")


def pytest_report_header() -> list[str]:
    return [
        f"backend {name}: {'available' if status.available else f'not available ({status.reason})'}"
        for name, status in bikernels.backends().items()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("backend") or NAMES, indirect=True, scope="session")


class BackendUnderTest:
    """A backend and the arrays it computes on: NumPy for the CPU, CuPy for a GPU."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arithmetic = bikernels.backends()[name].arithmetic
        self.xp: Any = np if name == "cpu" else pytest.importorskip("cupy")

    def put(self, x: np.ndarray) -> Any:
        """A C-contiguous copy on the backend's device, byte for byte."""
        if self.xp is np:
            return np.array(x, order="C")
        source = np.array(x, order="C")
        moved = self.xp.empty(source.shape, source.dtype)
        host_to_device = 1
        self.xp.cuda.runtime.memcpy(moved.data.ptr, source.ctypes.data, source.nbytes, host_to_device)
        return moved

    def layouts(self, x: np.ndarray) -> Iterator[tuple[str, Any]]:
        """The same values on the device in every kind of layout; what lies between them is NaN."""
        yield "contiguous", self.put(x)
        yield "transposed", self.put(x.T).T
        if x.ndim:
            yield "reversed", self.put(x[::-1])[::-1]
            yield "reversed last axis", self.put(x[..., ::-1])[..., ::-1]
            wide = np.full((*x.shape[:-1], 3 * x.shape[-1] + 1), np.nan, x.dtype)
            wide[..., 1::3] = x
            yield "sliced last axis", self.put(wide)[..., 1::3]
            padded = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
            padded[..., 1:-2] = x
            yield "unaligned rows", self.put(padded)[..., 1:-2]

    def get(self, x: Any) -> np.ndarray:
        """Back to NumPy, byte for byte."""
        return x if isinstance(x, np.ndarray) else x.get()

    def call(self, operation: str, *arrays: np.ndarray, **options: Any) -> np.ndarray:
        """An operation of the core on this backend, from NumPy to NumPy."""
        moved = [None if x is None else self.put(x) for x in arrays]
        return self.get(getattr(bikernels, operation)(*moved, backend=self.name, **options))

    def can_compute(self, arithmetic: str) -> bool:
        """Whether the backend's device computes an arithmetic class."""
        if self.name == "cpu" or arithmetic in bikernels.contract.PORTABLE_ARITHMETIC.values():
            return True
        return arithmetic in self.arithmetic.values()


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> BackendUnderTest:
    name = request.param
    status = bikernels.backends()[name]
    if not status.available:
        message = f"backend {name!r} is not available: {status.reason}"
        if request.config.getoption("backend"):
            pytest.fail(message)
        pytest.skip(message)
    return BackendUnderTest(name)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
