"""The CUDA driver through ctypes: what CuPy does not offer, and what it offers at a higher price.

`call` checks what the driver answers; who needs a function often takes it from `library` once, with its types.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

POINTER = ctypes.c_void_p


@functools.cache
def library() -> ctypes.CDLL:
    """The driver's library; OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def error(name: str, status: int) -> RuntimeError:
    """The exception for a driver's function that did not answer 0."""
    text = ctypes.c_char_p()
    library().cuGetErrorName(status, ctypes.byref(text))
    return RuntimeError(f"{name} failed: {(text.value or str(status).encode()).decode()}")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver with ctypes values; RuntimeError, naming it, if it fails."""
    status = getattr(library(), name)(*arguments)
    if status:
        raise error(name, status)


def handle(name: str, *arguments: Any) -> int:
    """The handle or address that a function of the driver writes to its first parameter."""
    value = POINTER()
    call(name, ctypes.byref(value), *arguments)
    return value.value or 0


def aligned(size: int, alignment: int) -> ctypes.Array[ctypes.c_char]:
    """Zeroed memory that begins at a multiple of `alignment`."""
    memory = ctypes.create_string_buffer(size + alignment - 1)
    return (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % alignment)
