"""How the arguments of a CUDA launch lie in memory; needs no GPU."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cupy", reason="needs the cuda13 extra")

from bikernels.backend.cupy import launch

CONSTANT = np.arange(7, dtype=np.float64).tobytes()


def read(address: int, size: int) -> bytes:
    return ctypes.string_at(address, size)


def test_structs_have_the_sizes_of_the_drivers() -> None:
    assert ctypes.sizeof(launch._Config) == 56
    assert launch._Config.stream.offset == 32
    assert ctypes.sizeof(launch._Attribute) == 72


@pytest.mark.parametrize("before", [(), (launch.ADDRESS,), (launch.FLOAT32, launch.FLOAT64)])
def test_arguments(before: tuple[str, ...]) -> None:
    arguments: list[bytes | str] = [*before, CONSTANT, launch.TENSOR_MAP, launch.FLOAT32, launch.ADDRESS]
    attribute = launch._Attribute(6, (1,))
    blocks = launch._Blocks(launch._Config((3, 1, 1), (64, 1, 1), 1000), [attribute], arguments)
    tensor_map = bytes(range(128))
    values = (*range(1, len(before) + 1), tensor_map, 2.5, 2**40)
    first, second = blocks.new(), blocks.new()
    exec("\n".join(blocks.statements), first._asdict() | dict(zip(blocks.given, (2**33, *values), strict=True)))

    config = launch._Config.from_address(first.config.value or 0)
    assert (*config.grid, *config.block, config.shared_bytes) == (3, 1, 1, 64, 1, 1, 1000)
    assert (config.stream, config.number_of_attributes) == (2**33, 1)
    assert launch._Attribute.from_address(config.attributes).id == 6
    given: list[Any] = list(values)
    addresses = struct.unpack(f"<{len(arguments)}Q", read(first.all_arguments.value or 0, 8 * len(arguments)))
    for address, argument in zip(addresses, arguments, strict=True):
        if isinstance(argument, bytes):
            assert read(address, len(argument)) == argument
            assert address % 64 == 0
        else:
            size = struct.calcsize(f"<{argument}")
            assert struct.unpack(f"<{argument}", read(address, size)) == (given.pop(0),)
            assert address % min(size, 64) == 0
    assert launch._Config.from_address(second.config.value or 0).stream is None


class Driver:
    """A driver that keeps what it is told to launch, instead of launching it."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, tuple[int, ...], int, list[bytes]]] = []
        self._sizes = [8, 4, 128]

        @ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)
        def launch_kernel(config: int, function: int, arguments: int, extra: int | None) -> int:
            assert extra is None
            given = launch._Config.from_address(config)
            addresses = struct.unpack(f"<{len(self._sizes)}Q", read(arguments, 8 * len(self._sizes)))
            values = [read(address, size) for address, size in zip(addresses, self._sizes, strict=True)]
            self.launched.append((function, (*given.grid, *given.block), given.stream or 0, values))
            return 0

        self._keep = launch_kernel
        address = ctypes.cast(launch_kernel, ctypes.c_void_p).value
        self.cuLaunchKernelEx = ctypes.CDLL(None)._FuncPtr(address)  # declares as little as a library's function

    def cuFuncGetParamInfo(self, handle: Any, number: Any, offset: Any, size: Any) -> int:  # noqa: N802
        if number.value >= len(self._sizes):
            return 1
        ctypes.cast(size, ctypes.POINTER(ctypes.c_size_t))[0] = self._sizes[number.value]
        return 0


def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(launch.driver, "library", lambda: driver)
    monkeypatch.setattr(launch.cupy.cuda.runtime, "getDevice", lambda: 3)
    monkeypatch.setattr(launch.cupy.cuda.runtime, "getDeviceCount", lambda: 4)
    function, stream, address = launch.Function(2**40 + 8, "kernel", 3), 2**45 + 16, 2**50 + 24
    run = launch.shaped(function, 70, 128, 0, (launch.ADDRESS, np.int32(-5), launch.TENSOR_MAP))
    tensor_map = bytes(range(128))
    for shift in (0, 8):
        run(stream + shift, address + shift, tensor_map)
    number = struct.pack("<i", -5)
    assert driver.launched == [
        (
            function.handle,
            (70, 1, 1, 128, 1, 1),
            stream + shift,
            [struct.pack("<Q", address + shift), number, tensor_map],
        )
        for shift in (0, 8)
    ]
    with pytest.raises(ValueError, match="takes parameters of"):
        launch.shaped(function, 70, 128, 0, (launch.ADDRESS, np.int64(-5), launch.TENSOR_MAP))
