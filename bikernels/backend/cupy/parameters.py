"""The structs that kernels take by value, as NumPy dtypes; their fields are those of the .cuh files, in their order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...contract import FLOAT_DTYPES, INTEGER_DTYPES

MAX_DIMS = 32
"""Dimensions of a `Dims`. Operands with more that do not merge have at least 2^33 elements."""

C_TYPE = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float", "float64": "double"}
"""The floating-point dtypes in CUDA C++."""

ANY = "any"
"""In place of a dtype: read as whatever it is, an element at a time."""

DTYPE_CODE = {dtype: code for code, dtype in enumerate(FLOAT_DTYPES + INTEGER_DTYPES)}

DIVISOR = np.dtype([("number", "i8"), ("multiplier", "u8"), ("shift", "i8")])


def c_type(element: str) -> str:
    """The type in CUDA C++ of a dtype, or of ANY."""
    return "any_dtype" if element == ANY else C_TYPE[element]


def _dims(operands: int) -> np.dtype[Any]:
    return np.dtype([("length", DIVISOR, (MAX_DIMS,)), ("stride", "i8", (operands, MAX_DIMS))])


MATMUL = np.dtype(
    [
        ("m", "i8"),
        ("n", "i8"),
        ("k", "i8"),
        ("a_stride", "i8", (2,)),
        ("b_stride", "i8", (2,)),
        ("a_along_k", "i8"),
        ("b_along_k", "i8"),
        ("c_stride", "i8", (2,)),
        ("out_stride", "i8", (2,)),
        ("addend", "i8"),
        ("c_dtype", "i8"),
        ("out_dtype", "i8"),
        ("tiles", "i8"),
        ("tiles_of_matrix", DIVISOR),
        ("tiles_of_band", DIVISOR),
        ("batch_dims", "i8"),
        ("batch", _dims(4)),
    ]
)

OPERANDS = ("x", "out", "grad", "weight", "bias", "mean", "rstd")
"""Of a reduction, in the order in which its parameters have them (reduction.cuh)."""

REDUCTION = np.dtype(
    [
        ("rows", "i8"),
        ("n", "i8"),
        ("chunks", DIVISOR),
        ("divisor", "f8"),
        ("eps", "f8"),
        ("rounds", "i8"),
        ("logarithm", "i8"),
        ("kept", "i8"),
        ("count", "i8"),
        ("dtype", "i8", (len(OPERANDS),)),
        ("step", "i8", (len(OPERANDS),)),
        ("dims", _dims(len(OPERANDS))),
    ]
)

ELEMENTWISE = np.dtype(
    [
        ("count", "i8"),
        ("dims_count", "i8"),
        ("is_flat", "i8"),
        ("dtype", "i8", (3,)),
        ("dims", _dims(3)),
    ]
)

ATTENTION = np.dtype(
    [
        ("keys", "i8"),
        ("width", "i8"),
        ("columns", "i8"),
        ("groups", DIVISOR),
        ("queries", DIVISOR),
        ("row_teams", DIVISOR),
        ("sharing", "i8"),
        ("slice", "i8"),
        ("tile", "i8"),
        ("stage_bytes", "i8"),
        ("is_apart", "i8"),
        ("is_causal", "i8"),
        ("mask_dtype", "i8"),
        ("query_factor", "f8"),
        ("key_factor", "f8"),
        *((f"{operand}_stride", "i8", (4,)) for operand in ("query", "key", "value", "out", "mask")),
    ]
)

SHORT_ATTENTION = np.dtype(
    [
        ("groups", DIVISOR),
        ("queries", DIVISOR),
        ("row_teams", DIVISOR),
        ("sharing", "i4"),
        ("keys", "i4"),
        ("padded", "i4"),
        ("width", "i4"),
        ("columns", "i4"),
        ("key_shift", "i4"),
        ("value_shift", "i4"),
        ("query_factor", "f4"),
        ("key_factor", "f4"),
        ("padding", "i4"),
        ("query_along", "i8"),
        ("out_along", "i8"),
        *((f"{operand}_stride", "i8", (3,)) for operand in ("query", "key", "value", "out")),
    ]
)


def divisor(number: int) -> tuple[int, int, int]:
    """A `Divisor` by number >= 1.

    With l = ceil(log2(number)) and m = floor(2^64 (2^l - number) / number) + 1, the quotient of an n below 2^63 is
    (floor(m n / 2^64) + n) >> l (Granlund and Montgomery 1994, figure 4.1).
    """
    shift = (number - 1).bit_length()
    return number, (((1 << shift) - number) << 64) // number + 1, shift


def fill_dims(dims: Any, shape: tuple[int, ...], *strides: tuple[int, ...]) -> None:
    """Write dimensions that operands walk together into a `Dims`."""
    if len(shape) > MAX_DIMS:
        raise ValueError(
            f"the operands have {len(shape)} dimensions that do not merge and at most {MAX_DIMS} are supported; "
            "pass contiguous copies"
        )
    dims["length"][: len(shape)] = [divisor(max(1, length)) for length in shape]
    for operand, steps in enumerate(strides):
        dims["stride"][operand, : len(shape)] = steps
