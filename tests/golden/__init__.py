"""Golden cases: inputs and the bytes that a Hopper GPU gave for them, in one file that `record.py` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from bikernels.dtypes import NUMPY_DTYPE

from ..cases import Case

GOLDEN = Path(__file__).with_name("hopper.npz")


def save(path: Path, results: dict[str, tuple[Case, np.ndarray]], machine: dict[str, str]) -> None:
    """Write cases and results. Arrays are stored as bytes beside their dtype and shape."""
    arrays: dict[str, np.ndarray] = {}
    index = []
    for i, (case, result) in enumerate(results.values()):
        described = []
        for j, array in enumerate((*case.arrays, result)):
            arrays[f"{i}.{j}"] = np.array(bytearray(array.tobytes()), np.uint8)
            described.append([str(array.dtype), list(array.shape)])
        index.append({"name": case.name, "operation": case.operation, "options": case.options, "arrays": described})
    header = np.frombuffer(json.dumps({"machine": machine, "cases": index}).encode(), np.uint8)
    np.savez_compressed(path, header=header, **arrays)  # type: ignore[arg-type]


def load(path: Path = GOLDEN) -> dict[str, tuple[Case, np.ndarray]]:
    """The recorded cases and results, by name; empty where nothing was recorded."""
    if not path.exists():
        return {}
    with np.load(path) as stored:
        header = json.loads(stored["header"].tobytes())
        result = {}
        for i, entry in enumerate(header["cases"]):
            arrays = [
                np.ndarray(shape, NUMPY_DTYPE[dtype], stored[f"{i}.{j}"].tobytes())
                for j, (dtype, shape) in enumerate(entry["arrays"])
            ]
            case = Case(entry["name"], entry["operation"], tuple(arrays[:-1]), entry["options"])
            result[case.name] = (case, arrays[-1])
        return result
