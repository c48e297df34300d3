"""The backends: one package each, one line each in the table. A backend never imports another."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ..contract import FLOAT_DTYPES
from ..errors import BackendUnavailableError
from ..specs import AttentionSpec, ElementwiseSpec, MatmulSpec, ReductionSpec
from ..views import Device


class MatmulLaunch(Protocol):
    """Queues a product on the stream of that handle (0 on a CPU), by the addresses of its operands; c of none is 0."""

    def __call__(
        self, stream: int, out: int, a: int, b: int, c: int = 0, alpha: float = 1.0, beta: float = 0.0, /
    ) -> None: ...


class ReductionLaunch(Protocol):
    """Queues a reduction likewise; `others` are the addresses of those that the spec has, in its order."""

    def __call__(self, stream: int, out: int, x: int, /, *others: int) -> None: ...


class ElementwiseLaunch(Protocol):
    """Queues a function likewise, with the two numbers of `ElementwiseSpec`; y of none is 0."""

    def __call__(self, stream: int, out: int, x: int, y: int = 0, a: float = 0.0, b: float = 0.0, /) -> None: ...


class AttentionLaunch(Protocol):
    """Queues an attention likewise; `mask` is the address of the spec's, if it has one."""

    def __call__(self, stream: int, out: int, query: int, key: int, value: int, /, *mask: int) -> None: ...


class Backend(Protocol):
    """What a backend package offers as its `backend`. Nothing heavy is imported before `unavailable` is asked."""

    name: str
    device_type: str
    """Where its operands lie: "cpu" or "cuda"."""
    reductions: frozenset[str]
    """The operations of `specs.REDUCTIONS` that it computes."""
    elementwise: frozenset[str]
    """The functions of `specs.ELEMENTWISE` that it computes."""

    def unavailable(self) -> str | None:
        """None if the backend can run here; otherwise why not, and what to install."""

    def devices(self) -> list[Device]:
        """The devices that it can compute on."""

    def native_arithmetic(self, dtype: str, device: Device) -> str:
        """The arithmetic class of a matrix product whose caller names none."""

    def computes(self, arithmetic: str, device: Device) -> bool:
        """Whether the device can compute this arithmetic class."""

    def prepare_matmul(self, spec: MatmulSpec, device: Device) -> MatmulLaunch:
        """Build what the launch needs (kernel, grid); the caller keeps the launch for equal specs."""

    def prepare_reduction(self, spec: ReductionSpec, device: Device) -> ReductionLaunch:
        """As `prepare_matmul`, for a reduction."""

    def prepare_elementwise(self, spec: ElementwiseSpec, device: Device) -> ElementwiseLaunch:
        """As `prepare_matmul`, for an elementwise function."""

    def prepare_attention(self, spec: AttentionSpec, device: Device) -> AttentionLaunch | None:
        """As `prepare_matmul`, for an attention; None where its steps have to be computed one by one."""


_MODULES = {
    "cpu": "bikernels.backend.cpu",
    "cupy": "bikernels.backend.cupy",
    "numba": "bikernels.backend.numba",
}
"""Name and module of each backend; of two for one kind of device, the one that is preferred comes first."""

NAMES = tuple(_MODULES)


@functools.cache
def _load(name: str) -> Backend:
    return importlib.import_module(_MODULES[name]).backend


@functools.cache
def _unavailable(name: str) -> str | None:
    return _load(name).unavailable()


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a backend's."""
    if name not in _MODULES:
        raise ValueError(f"backend {name!r} does not exist; use one of {', '.join(map(repr, NAMES))}")


def get(name: str) -> Backend:
    """The backend of that name; BackendUnavailableError, with the remedy, if it cannot run here."""
    check_name(name)
    reason = _unavailable(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} is not available: {reason}")
    return _load(name)


@functools.cache
def preferred(device_type: str) -> Backend:
    """The first available backend for this type of device."""
    reasons = []
    for name in NAMES:
        if _load(name).device_type == device_type:
            reason = _unavailable(name)
            if reason is None:
                return _load(name)
            reasons.append(f"{name!r}: {reason}")
    raise BackendUnavailableError(f"no backend for {device_type} arrays is available: " + "; ".join(reasons))


class BackendStatus(NamedTuple):
    """What `backends()` says of one backend."""

    available: bool
    reason: str | None
    """Why it is not available, and what to install; None if it is."""
    chosen_for: tuple[str, ...]
    """The devices whose arrays it gets when the caller names no backend."""
    arithmetic: dict[str, str]
    """Per dtype, the native arithmetic class of its first device."""


def statuses(default: Callable[[str], Backend | None]) -> dict[str, BackendStatus]:
    """The status of every backend; `default` answers which one the caller's context chooses for a type of device."""
    result = {}
    for name in NAMES:
        backend, reason = _load(name), _unavailable(name)
        if reason is not None:
            result[name] = BackendStatus(False, reason, (), {})
            continue
        devices = backend.devices()
        chosen = default(backend.device_type) is backend
        result[name] = BackendStatus(
            True,
            None,
            tuple(map(str, devices)) if chosen else (),
            {dtype: backend.native_arithmetic(dtype, devices[0]) for dtype in FLOAT_DTYPES},
        )
    return result
