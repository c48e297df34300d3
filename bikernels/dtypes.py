"""The dtypes of the contract and their NumPy counterparts. bfloat16 is the one of ml_dtypes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .contract import FLOAT_DTYPES, INTEGER_DTYPES

NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in FLOAT_DTYPES + INTEGER_DTYPES
}
_NAME = {dtype: name for name, dtype in NUMPY_DTYPE.items()}

STORAGE_DTYPE: dict[str, np.dtype[Any]] = NUMPY_DTYPE | {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.uint16),
}
"""The dtype under which a compiler that has no 16-bit floats sees the bits."""


def dtype_name(dtype: Any) -> str:
    """The contract's name of a dtype, or of anything that NumPy takes for one; raises TypeError for any other."""
    if isinstance(dtype, str) and dtype in NUMPY_DTYPE:
        return str(dtype)  # not a numpy.str_
    try:
        converted = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype {dtype!r} is not a NumPy dtype; use one of {', '.join(FLOAT_DTYPES)}") from None
    name = _NAME.get(converted)
    if name is None:
        raise TypeError(
            f"dtype {converted} is not supported; cast to one of {', '.join(FLOAT_DTYPES)} (in native byte order)"
        )
    return name
