"""What this machine has, and whether it computes the contract's bits.

The self-test computes small products, reductions and norms with every backend, device, dtype and arithmetic class, at
several batch sizes, and compares their bytes with the reference in plain NumPy. On a GPU whose tensor cores have a
class of their own (tc16f25 on Hopper) it is these that compute. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

import bikernels
from bikernels import backend as registry
from bikernels import contract, reference
from bikernels.backend import _disk_cache
from bikernels.dtypes import NUMPY_DTYPE
from bikernels.views import Device

from ..core import FLOATS, view

_PACKAGES = (
    "numpy", "numba", "ml_dtypes", "cupy-cuda13x", "numba-cuda", "cuda-core", "cuda-bindings", "triton",
)  # fmt: skip
_TORCH_DTYPE = {name: dtype for dtype, name in FLOATS.items()}
_BATCHES = (1, 7, 70)
_N, _K = 40, 150
_ROW = 2100  # more than a chunk of the sum tree
_REDUCTIONS = ("softmax", "log_softmax", "logsumexp", "mean", "sum", "var", "rms_norm", "layer_norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("--no-self-test", action="store_true", help="only say what is here; compute nothing")


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if a bit differs."""
    findings: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "backends": {name: status._asdict() for name, status in bikernels.backends().items()},
        "gpus": _gpus(),
        "arithmetic": _arithmetic(),
        "cache": _cache(),
        "self_test": [] if options.no_self_test else [result._asdict() for result in _self_test()],
    }
    findings["ok"] = all(result["differing"] == 0 for result in findings["self_test"])
    print(json.dumps(findings, indent=2) if options.json else "\n".join(_as_text(findings)))
    return 0 if findings["ok"] else 1


# ------------------------------------------------------------------------------------------------------ what there is


def _versions() -> dict[str, str]:
    versions = {"bikernels": bikernels.__version__, "contract": str(contract.VERSION)}
    versions |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch cuda": torch.version.cuda or "built without CUDA",
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": each.name,
            "compute capability": f"{each.major}.{each.minor}",
            "memory GiB": round(each.total_memory / 2**30, 1),
            "multiprocessors": each.multi_processor_count,
            "tensor cores": contract.tensor_core_arithmetic((each.major, each.minor)) or "not known: fma32 is used",
        }
        for each in properties
    ]


def _arithmetic() -> dict[str, dict[str, dict[str, Any]]]:
    """Per device and dtype: the native class, and all that its preferred backend computes."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for name, status in bikernels.backends().items():
        if not status.available:
            continue
        backend = registry.get(name)
        for device in backend.devices():
            result.setdefault(
                str(device),
                {
                    dtype: {
                        "native": backend.native_arithmetic(dtype, device),
                        "computes": [
                            each.name
                            for each in contract.ARITHMETIC.values()
                            if dtype in each.covers and backend.computes(each.name, device)
                        ],
                    }
                    for dtype in contract.FLOAT_DTYPES
                },
            )
    return result


def _cache() -> dict[str, Any]:
    folder = next(_disk_cache.folders())
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return {
        "folder": str(folder),
        "set by": _disk_cache.ENVIRONMENT_CACHE if os.environ.get(_disk_cache.ENVIRONMENT_CACHE) else "default",
        "exists": folder.is_dir(),
        "writable": os.access(existing, os.W_OK),
        "files": len(files),
        "MiB": round(sum(path.stat().st_size for path in files) / 2**20, 2),
    }


# ------------------------------------------------------------------------------------------------------- the self-test


class Result(NamedTuple):
    """One operation on one device, against the reference."""

    backend: str
    device: str
    operation: str
    dtype: str
    arithmetic: str
    elements: int
    differing: int
    first: str
    """The first element that differs, with both values' bits; "" if none does."""


def _self_test() -> Iterator[Result]:
    for name, status in bikernels.backends().items():
        if not status.available:
            continue
        backend = registry.get(name)
        for device in backend.devices():
            if device.type == "cuda" and not torch.cuda.is_available():
                continue  # the tensors are PyTorch's
            for arithmetic in contract.ARITHMETIC.values():
                if backend.computes(arithmetic.name, device):
                    for dtype in arithmetic.covers:
                        yield _product(name, device, dtype, arithmetic.name)
            for dtype in contract.FLOAT_DTYPES:
                for operation in _REDUCTIONS:
                    if operation in backend.reductions:
                        yield _reduction(name, device, dtype, operation)


def _product(backend: str, device: Device, dtype: str, arithmetic: str) -> Result:
    a, b = _numbers((max(_BATCHES), _K), dtype, 1), _numbers((_K, _N), dtype, 2)
    expected = reference.matmul(a, b, arithmetic=arithmetic)
    right = _to_torch(b, device)

    def compute(batch: int) -> torch.Tensor:
        left = _to_torch(a[:batch], device)
        out = torch.empty(batch, _N, dtype=_TORCH_DTYPE[dtype], device=left.device)
        bikernels.matmul(view(left), view(right), out=view(out), dtype=dtype, arithmetic=arithmetic, backend=backend)
        return out

    return _compare(compute, expected, backend, device, "matmul", dtype, arithmetic)


def _reduction(backend: str, device: Device, dtype: str, operation: str) -> Result:
    x = _numbers((max(_BATCHES), _ROW), dtype, 3)
    expected = getattr(reference, operation)(x, kept=1)

    def compute(batch: int) -> torch.Tensor:
        rows = _to_torch(x[:batch], device)
        out = torch.empty(expected[:batch].shape, dtype=rows.dtype, device=rows.device)
        getattr(bikernels, operation)(view(rows), axis=1, out=view(out), dtype=dtype, backend=backend)
        return out

    return _compare(compute, expected, backend, device, operation, dtype, "")


def _numbers(shape: tuple[int, int], dtype: str, seed: int) -> np.ndarray[Any, Any]:
    """Numbers over many binades, with cancellation, and rows of subnormal numbers, zeros, infinities and NaN."""
    random = np.random.default_rng(seed)
    spread = 4 if dtype == "float16" else 12
    x = random.standard_normal(shape) * 2.0 ** random.integers(-spread, spread, shape)
    x[:, 1::7] = -x[:, 0:-1:7][:, : x[:, 1::7].shape[1]]
    with np.errstate(over="ignore"):
        x = x.astype(NUMPY_DTYPE[dtype])
    tiny = float(ml_dtypes.finfo(x.dtype).smallest_subnormal)
    x[3] = random.integers(-50, 50, shape[1]) * tiny
    x[4] = 0
    x[5, shape[1] // 2] = np.inf
    x[6, shape[1] // 3] = np.nan
    return x


def _to_torch(x: np.ndarray[Any, Any], device: Device) -> torch.Tensor:
    place = "cpu" if device.type == "cpu" else str(device)
    if x.dtype == ml_dtypes.bfloat16:  # DLPack and torch.from_numpy do not take it
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).to(place)
    return torch.from_numpy(x).to(place)


def _compare(
    compute: Callable[[int], torch.Tensor],
    expected: np.ndarray[Any, Any],
    backend: str,
    device: Device,
    operation: str,
    dtype: str,
    arithmetic: str,
) -> Result:
    unsigned = f"u{expected.itemsize}"
    elements = differing = 0
    first = ""
    for batch in _BATCHES:
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
        got = compute(batch).cpu().contiguous().view(integers).numpy().view(unsigned)
        want = np.ascontiguousarray(expected[:batch]).view(unsigned)
        wrong = np.argwhere(got != want)
        elements += want.size
        differing += len(wrong)
        if len(wrong) and not first:
            at = tuple(int(i) for i in wrong[0])
            digits = 2 * expected.itemsize
            first = f"batch of {batch}, {list(at)}: 0x{got[at]:0{digits}x}, not 0x{want[at]:0{digits}x}"
    return Result(backend, str(device), operation, dtype, arithmetic, elements, differing, first)


# ------------------------------------------------------------------------------------------------------------- as text


def _as_text(findings: dict[str, Any]) -> Iterator[str]:
    yield "versions   " + ", ".join(f"{name} {version}" for name, version in findings["versions"].items())
    yield "machine    " + ", ".join(f"{name}: {value}" for name, value in findings["machine"].items())
    yield "backends"
    for name, status in findings["backends"].items():
        chosen = f"chosen for {', '.join(status['chosen_for'])}" if status["chosen_for"] else "available, not chosen"
        yield f"  {name:10} {chosen if status['available'] else 'not available: ' + status['reason']}"
    yield "GPUs" if findings["gpus"] else "GPUs       none that PyTorch can use"
    for gpu in findings["gpus"]:
        yield "  " + ", ".join(f"{name}: {value}" for name, value in gpu.items())
    yield "arithmetic classes of products (the native one first)"
    for device, dtypes in findings["arithmetic"].items():
        for dtype, classes in dtypes.items():
            others = [name for name in classes["computes"] if name != classes["native"]]
            yield f"  {device:10} {dtype:9} {', '.join([classes['native'], *others])}"
    cache = findings["cache"]
    state = f"{cache['files']} files, {cache['MiB']} MiB" if cache["exists"] else "not there yet"
    writable = "writable" if cache["writable"] else "NOT WRITABLE: kernels are compiled in every process"
    yield f"cache      {cache['folder']} ({cache['set by']}): {state}, {writable}"
    if not findings["self_test"]:
        return
    yield "self-test  against the reference, in bits"
    for result in findings["self_test"]:
        name = f"{result['operation']} {result['arithmetic']}".strip()
        verdict = "same bits" if result["differing"] == 0 else f"{result['differing']} DIFFER; {result['first']}"
        where = f"{result['backend']:6} {result['device']:7}"
        yield f"  {where} {name:15} {result['dtype']:9} {result['elements']:6} elements  {verdict}"
    yield "This machine computes the contract." if findings["ok"] else "THIS MACHINE DOES NOT COMPUTE THE CONTRACT."
