"""Blocks of an operand in memory, of any dtype and strides, to and from dense blocks of the accumulate dtype.

A reader is called as read(target, leading, source, row_stride, column_stride, rows, columns) and makes element (i, j)
of the dense block, `leading` elements to a row, from element (i * row_stride, j * column_stride) of the source. A
writer is called as write(target, row_stride, column_stride, source, leading, rows, columns) and does the reverse,
rounding to the dtype and writing canonical NaN. Addresses count bytes, everything else elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from numba import types

from ...contract import ITEMSIZE
from .compile import address_of
from .numerics import FLOAT, TRANSPOSE, load, pointer, rounded, store, transpose


@functools.cache
def reader(dtype: str, accumulate: str) -> int:
    """The address of the reader of `dtype` into `accumulate` ("float32" or "float64")."""
    return address_of(_reader(dtype, accumulate), *[types.int64] * 7)


@functools.cache
def writer(accumulate: str, dtype: str) -> int:
    """The address of the writer of `dtype` from `accumulate`."""
    return address_of(_writer(accumulate, dtype), *[types.int64] * 7)


@functools.cache
def rounder(dtype: str) -> int:
    """The address of round(values, count): float32 values rounded in place to bfloat16 or float16."""
    return address_of(_rounder(dtype), types.int64, types.int64)


def _reader(dtype: str, accumulate: str) -> Callable[..., None]:
    dtype, kind, size = str(dtype), FLOAT[accumulate], ITEMSIZE[accumulate]
    itemsize = ITEMSIZE[dtype]

    def read(target, leading, source, row_stride, column_stride, rows, columns):  # type: ignore[no-untyped-def]
        if columns == 1 and leading == 1:  # walk it as a row
            rows, columns, column_stride = 1, rows, row_stride
        if rows == 1 or column_stride == 1 or row_stride != 1:
            for i in range(rows):
                row = pointer(target + i * leading * size, kind)
                start = source + i * row_stride * itemsize
                if column_stride == 1:
                    for j in range(columns):
                        row[j] = load(dtype, kind, start, j)
                else:
                    for j in range(columns):
                        row[j] = load(dtype, kind, start, j * column_stride)
            return
        whole_rows = rows - rows % TRANSPOSE
        whole_columns = columns - columns % TRANSPOSE
        for j in range(0, whole_columns, TRANSPOSE):
            for i in range(0, whole_rows, TRANSPOSE):
                start = source + (i + j * column_stride) * itemsize
                transpose(dtype, kind, target + (i * leading + j) * size, leading, start, column_stride)
        dense = pointer(target, kind)
        for i in range(rows):
            for j in range(0 if i >= whole_rows else whole_columns, columns):
                dense[i * leading + j] = load(dtype, kind, source, i + j * column_stride)

    return read


def _writer(accumulate: str, dtype: str) -> Callable[..., None]:
    dtype, kind, size = str(dtype), FLOAT[accumulate], ITEMSIZE[accumulate]
    itemsize = ITEMSIZE[dtype]

    def write(target, row_stride, column_stride, source, leading, rows, columns):  # type: ignore[no-untyped-def]
        if columns == 1 and leading == 1:  # walk it as a row
            rows, columns, column_stride = 1, rows, row_stride
        for i in range(rows):
            row = pointer(source + i * leading * size, kind)
            start = target + i * row_stride * itemsize
            if column_stride == 1:
                for j in range(columns):
                    store(dtype, start, j, row[j])
            else:
                for j in range(columns):
                    store(dtype, start, j * column_stride, row[j])

    return write


def _rounder(dtype: str) -> Callable[..., None]:
    dtype, kind = str(dtype), FLOAT["float32"]

    def round_values(values, count):  # type: ignore[no-untyped-def]
        place = pointer(values, kind)
        for i in range(count):
            place[i] = rounded(dtype, place[i])

    return round_values
