"""Which backend and which arithmetic class apply where a call names none: contexts, then the environment."""

from __future__ import annotations

import contextlib
import os
from contextvars import ContextVar
from typing import Any

from . import backend as registry
from .contract import ARITHMETIC
from .errors import ArithmeticUnsupportedError, BackendUnavailableError
from .views import Device

_environment_backend = os.environ.get("BIKERNELS_BACKEND") or None

_Entries = tuple[tuple[object, str], ...]
_backend_entries: ContextVar[_Entries] = ContextVar("bikernels_backend", default=())
_arithmetic_entries: ContextVar[_Entries] = ContextVar("bikernels_arithmetic", default=())
_current: ContextVar[tuple[str | None, str | None]] = ContextVar("bikernels", default=(_environment_backend, None))

current = _current.get
"""The backend that the innermost context or the environment names, or None, and the arithmetic class likewise."""


class _Use(contextlib.ContextDecorator):
    """A context that names something. Leaving takes back this entry and no other, in whatever order contexts end."""

    _entries: ContextVar[_Entries]

    def __init__(self, name: str) -> None:
        self._name = name
        self._marks: list[object] = []

    def _recreate_cm(self) -> _Use:
        return type(self)(self._name)

    def __enter__(self) -> None:
        mark = object()
        self._marks.append(mark)
        self._set((*self._entries.get(), (mark, self._name)))

    def __exit__(self, *_: Any) -> None:
        mark = self._marks.pop()
        self._set(tuple(entry for entry in self._entries.get() if entry[0] is not mark))

    def _set(self, entries: _Entries) -> None:
        self._entries.set(entries)
        backends, arithmetics = _backend_entries.get(), _arithmetic_entries.get()
        backend = backends[-1][1] if backends else _environment_backend
        _current.set((backend, arithmetics[-1][1] if arithmetics else None))


class use_backend(_Use):  # noqa: N801  (reads as a statement: with use_backend("numba"):)
    """Context manager and decorator: compute with the backend of this name, on the devices that it serves.

    Arrays on other devices keep their own backend. The environment variable BIKERNELS_BACKEND, read when
    bikernels is imported, has the same effect for a whole process, and a call's `backend=` goes before both.

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailableError: it cannot run here; the message says what to install.
    """

    _entries = _backend_entries

    def __init__(self, name: str) -> None:
        registry.get(name)
        super().__init__(name)


class use_arithmetic(_Use):  # noqa: N801
    """Context manager and decorator: compute matrix products in this arithmetic class (see `contract.ARITHMETIC`).

    It applies to the dtypes that the class covers; products of other dtypes stay in their native class.

    Raises:
        ValueError: there is no class of this name.
    """

    _entries = _arithmetic_entries

    def __init__(self, name: str) -> None:
        _check_arithmetic(name)
        super().__init__(name)


def _check_arithmetic(name: str) -> None:
    if name not in ARITHMETIC:
        raise ValueError(f"arithmetic {name!r} does not exist; use one of {', '.join(map(repr, ARITHMETIC))}")


def current_backend() -> str | None:
    """The backend that the innermost context or the environment names, or None."""
    return current()[0]


def current_arithmetic() -> str | None:
    """The arithmetic class that the innermost context names, or None."""
    return current()[1]


def choose_backend(name: str | None, device: Device) -> registry.Backend:
    """The backend for operands on `device`. A name given in the call must serve that device."""
    if name is not None:
        backend = registry.get(name)
        if backend.device_type != device.type:
            remedy = "pass CUDA arrays" if backend.device_type == "cuda" else "pass NumPy arrays"
            raise ValueError(
                f"backend {name!r} computes on {backend.device_type} arrays and the operands lie on {device}; "
                f"{remedy}, or backend={registry.preferred(device.type).name!r}"
            )
        return backend
    return _default_backend(device.type)


def _default_backend(device_type: str) -> registry.Backend:
    name = current_backend()
    if name is not None:
        backend = registry.get(name)
        if backend.device_type == device_type:
            return backend
    return registry.preferred(device_type)


def choose_arithmetic(name: str | None, dtype: str, backend: registry.Backend, device: Device) -> str:
    """The class of a product of operands of `dtype`. A class given in the call must cover it."""
    if name is not None:
        _check_arithmetic(name)
        if dtype not in ARITHMETIC[name].covers:
            covering = [other.name for other in ARITHMETIC.values() if dtype in other.covers]
            raise ArithmeticUnsupportedError(
                f"arithmetic {name!r} is for {' and '.join(ARITHMETIC[name].covers)} and the operands are {dtype}; "
                f"use {' or '.join(map(repr, covering))}"
            )
    else:
        name = current_arithmetic()
        if name is None or dtype not in ARITHMETIC[name].covers:
            return backend.native_arithmetic(dtype, device)
    if not backend.computes(name, device):
        able = [other.name for other in ARITHMETIC.values() if dtype in other.covers]
        able = [other for other in able if backend.computes(other, device)]
        raise ArithmeticUnsupportedError(
            f"arithmetic {name!r} cannot be computed on {device} by backend {backend.name!r}; "
            f"use {' or '.join(map(repr, able))}, or pass NumPy arrays: the CPU computes every class"
        )
    return name


def backends() -> dict[str, registry.BackendStatus]:
    """Every backend: whether it is available, or why not; what it is chosen for; its native arithmetic classes."""

    def default(device_type: str) -> registry.Backend | None:
        try:
            return _default_backend(device_type)
        except BackendUnavailableError:  # the environment names one that cannot run here: nothing is chosen
            return None

    return registry.statuses(default)
