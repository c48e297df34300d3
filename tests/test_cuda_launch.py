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
    struct.Struct(blocks.layout).pack_into(first.memory, blocks.WRITTEN, 2**33, *blocks.attributes, *values)

    config = launch._Config.from_address(first.config.value or 0)
    assert (*config.grid, *config.block, config.shared_bytes) == (3, 1, 1, 64, 1, 1, 1000)
    assert (config.stream, config.number_of_attributes) == (2**33, 1)
    assert launch._Attribute.from_address(config.attributes).id == 6
    given: list[Any] = list(values)
    addresses = struct.unpack(f"<{len(arguments)}Q", read(first.arguments.value or 0, 8 * len(arguments)))
    for address, argument in zip(addresses, arguments, strict=True):
        if isinstance(argument, bytes):
            assert read(address, len(argument)) == argument
            assert address % 64 == 0
        else:
            size = struct.calcsize(f"<{argument}")
            assert struct.unpack(f"<{argument}", read(address, size)) == (given.pop(0),)
            assert address % min(size, 64) == 0
    assert launch._Config.from_address(second.config.value or 0).stream is None
