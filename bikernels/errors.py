"""Exceptions of the project. Wrong shapes raise ValueError and wrong types TypeError, as in NumPy."""

from __future__ import annotations


class BikernelsError(RuntimeError):
    """What this machine or this configuration cannot do."""


class BackendUnavailableError(BikernelsError):
    """A backend was asked for that cannot run here; the message says what to install."""


class OperationUnsupportedError(BikernelsError):
    """An operation was asked for that the backend does not have."""


class ArithmeticUnsupportedError(BikernelsError):
    """An arithmetic class was asked for that the device or the operands' dtype does not have."""
