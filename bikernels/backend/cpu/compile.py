"""How this backend compiles: kernels that Python calls, and functions that kernels call by their address.

Rules of this file: everything is compiled once and cached on disk; floating-point contraction and reordering stay off;
no kernel takes an array, so that neither layout nor dtype nor read-only flags multiply the specialisations. Kernels
take integers (addresses, strides, lengths). What depends on a dtype (reading, writing, the inner loop) is a function of
its own, compiled when first needed and handed to the kernels as an address.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from ... import contract

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "boundscheck": False}


def _fingerprint() -> str:
    """Of all sources that decide what is compiled: Numba itself looks at the file of the cached function only."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(contract.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_FINGERPRINT = _fingerprint()


class _Files(IndexDataCacheFile):
    """A file for each key, which its name tells, without Numba's index of numbered files.

    Where two processes add to an index at once, both may give the same number to different keys: the one's code is then
    found under the other's key, and a function computes what another should.
    """

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name(key), data)

    def load(self, key: Any) -> Any:
        try:
            return self._load_data(self._name(key))
        except OSError:
            return None

    def _name(self, key: Any) -> str:
        digest = hashlib.sha256(repr((self._version, self._source_stamp, key)).encode()).hexdigest()
        return f"{self._index_name.removesuffix('.nbi')}.{digest[:32]}.nbc"


class _Cache(FunctionCache):
    """With `name`, which then says what is compiled: a function's own closure has another pickle in every process."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        super().__init__(function)
        self._named = name
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def _index_key(self, signature: Any, codegen: Any) -> Any:
        if self._named:
            return signature, codegen.magic_tuple(), self._named, _FINGERPRINT
        return (*super()._index_key(signature, codegen), _FINGERPRINT)


def _enable_cache(compiled: Any, function: Callable[..., Any], name: str = "") -> None:
    with contextlib.suppress(RuntimeError):  # no folder can be written: compile in every process
        compiled._cache = _Cache(function, name)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: compile for calls from Python, without the GIL."""
    dispatcher = numba.njit(nogil=True, **_OPTIONS)(function)
    _enable_cache(dispatcher, function)
    return dispatcher


def inner(function: Callable[..., Any]) -> Any:
    """Decorator: a function that compiled code calls and LLVM may inline."""
    return numba.njit(**_OPTIONS)(function)


_compiled: list[CFunc] = []  # keeps the machine code alive


def address_of(function: Callable[..., Any], *arguments: Any, name: str = "") -> int:
    """Compile a function of these argument types that returns nothing, and give its address for `invoke`.

    A closure over compiled functions is found in the cache by `name`, which tells it from others made in that place.
    """
    compiled = CFunc(function, sigutils.normalize_signature(types.void(*arguments)), locals={}, options=dict(_OPTIONS))
    _enable_cache(compiled, function, name)
    compiled.compile()
    _compiled.append(compiled)
    return int(compiled.address or 0)


def primitive(function: Callable[..., Any]) -> Any:
    """Decorator: an operation given as LLVM instructions; strings and integers that are constants come as literals."""
    return intrinsic(prefer_literal=True)(function)


def emitted(emit: Callable[..., None], count: int, name: str) -> int:
    """The address of a function of `count` int64, 4 or 10, that emit(builder, *values) writes in LLVM instructions.

    `name` tells it from all others, in the cache too.
    """

    @primitive
    def body(typing_context: Any, arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emit(builder, *[builder.extract_value(values[0], i) for i in range(count)])
            return context.get_dummy_value()

        return types.void(arguments), codegen

    def of_four(a, b, c, d):  # type: ignore[no-untyped-def]
        body((a, b, c, d))

    def of_ten(a, b, c, d, e, f, g, h, i, j):  # type: ignore[no-untyped-def]
        body((a, b, c, d, e, f, g, h, i, j))

    functions: dict[int, Callable[..., None]] = {4: of_four, 10: of_ten}
    return address_of(functions[count], *[types.int64] * count, name=name)


@primitive
def invoke(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the function of that address with a tuple of int64 and float64 arguments."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer, packed = values
        unpacked = [builder.extract_value(packed, i) for i in range(len(arguments))]
        function = ir.FunctionType(ir.VoidType(), [value.type for value in unpacked])
        builder.call(builder.inttoptr(pointer, function.as_pointer()), unpacked)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen
