"""What a record of results says of the machine."""

from __future__ import annotations

import importlib.metadata
import subprocess

import torch

import bikernels

MODULES = ("cupy-cuda13x", "numba", "numba-cuda", "numpy", "triton")


def describe(device: str, backend: str | None) -> dict[str, str | int]:
    """Names and versions; `device` is "cuda" or "cpu"."""
    found: dict[str, str | int] = {"device": device}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": str(torch.version.cuda)}
    else:
        found |= {"cpu": _processor(), "threads": torch.get_num_threads()}
    found["torch"] = torch.__version__
    for module in MODULES:
        try:
            found[module] = importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            continue
    found |= {"bikernels": bikernels.__version__, "contract": bikernels.contract_version}
    found["backend"] = backend or _preferred(device)
    return found


def _preferred(device: str) -> str:
    """The backend that a call gets which names none."""
    for name, status in bikernels.backends().items():
        if any(place.startswith(device) for place in status.chosen_for):
            return name
    raise RuntimeError(f"no backend for {device} arrays is available; bikernels.backends() says why")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"
