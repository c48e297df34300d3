"""Calls of the core on tensors: described without a copy, with the mode's settings, into the caller's tensor."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import bikernels
from bikernels import Device, View
from bikernels import backend as registry
from bikernels.backend import AttentionLaunch
from bikernels.settings import choose_backend, current_arithmetic, current_backend
from bikernels.specs import AttentionSpec
from bikernels.views import CPU

FLOATS = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
"""What the core computes with; other dtypes are left to PyTorch."""

Launch = Callable[..., None]
"""As `bikernels.prepare` gives it."""

_NAMES = FLOATS | {
    getattr(torch, name): name
    for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the core adds up numbers of `dtype`, one of FLOATS."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------ the settings


class Settings(NamedTuple):
    """The backend and the arithmetic class of a `bikernels` context, where there is one."""

    backend: str | None
    arithmetic: str | None


NO_SETTINGS = Settings(None, None)
_settings = NO_SETTINGS


def set_mode_settings(settings: Settings) -> None:
    """Compute with these where the calling thread's own context names none."""
    global _settings
    _settings = settings


class Recorded(NamedTuple):
    """A call of the core that has been made, and how to make it again."""

    launch: Launch
    """launch(stream, *addresses) of the results and the operands."""
    results: tuple[torch.Tensor, ...]
    operands: tuple[torch.Tensor, ...]


class _Recorder(threading.local):
    calls: list[Recorded] | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recording() -> Iterator[list[Recorded]]:
    """The calls of the core that this thread makes within the context."""
    before, calls = _recorder.calls, list[Recorded]()
    _recorder.calls = calls
    try:
        yield calls
    finally:
        _recorder.calls = before


@contextlib.contextmanager
def _with_mode_settings() -> Iterator[None]:
    """Within, the mode's settings hold where the calling thread's own context names none."""
    with contextlib.ExitStack() as stack:
        if _settings.backend is not None and current_backend() is None:
            stack.enter_context(bikernels.use_backend(_settings.backend))
        if _settings.arithmetic is not None and current_arithmetic() is None:
            stack.enter_context(bikernels.use_arithmetic(_settings.arithmetic))
        yield


def _call(
    function: Callable[..., Any],
    results: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor | float | None, ...],
    **options: Any,
) -> None:
    """function(*operands) into the results, computed as the dtype of the first."""
    views = [view(one) if isinstance(one, torch.Tensor) else one for one in operands]
    outs = tuple(map(view, results))
    options |= {"out": outs if len(outs) > 1 else outs[0], "dtype": _NAMES[results[0].dtype]}
    with _with_mode_settings():
        function(*views, **options)
        if _recorder.calls is not None and not any(isinstance(one, float) for one in operands):
            given = tuple([one for one in operands if isinstance(one, torch.Tensor)])
            _recorder.calls.append(Recorded(bikernels.prepare(function, *views, **options), results, given))


# -------------------------------------------------------------------------------------------------------- the tensors


def view(x: torch.Tensor) -> View:
    """The memory of a dense CPU or CUDA tensor, on the current stream of its device."""
    device = x.device
    if device.type == "cpu":
        return View(x.data_ptr(), _NAMES[x.dtype], x.shape, x.stride(), CPU)
    index = device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    return View(x.data_ptr(), _NAMES[x.dtype], x.shape, x.stride(), _gpu(index), stream=stream)


@functools.cache
def _gpu(index: int) -> Device:
    return Device("cuda", index)


def is_readable(x: torch.Tensor) -> bool:
    """Whether the core reads the tensor's dtype (as the input of a cast)."""
    return x.dtype in _NAMES


def write(
    out: torch.Tensor,
    shape: tuple[int, ...],
    operands: tuple[torch.Tensor, ...],
    compute: Callable[[torch.Tensor], None],
) -> torch.Tensor:
    """Let `compute` fill `out`, the caller's, by PyTorch's rules: it is resized to `shape`, and may be an operand.

    Where `out` has another shape, or shares memory with an operand or with itself, the result is computed apart.
    """
    memory = out.untyped_storage().data_ptr()
    if (
        out.shape != shape
        or any(memory == x.untyped_storage().data_ptr() for x in operands)
        or view(out).description.overlaps_itself()
    ):
        result = torch.empty(shape, dtype=out.dtype, device=out.device)
        compute(result)
        return store(out, result)
    compute(out)
    return out


def store(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Copy a result into `out`, the caller's, which PyTorch resizes (and warns if there is something to lose)."""
    return torch.ops.aten.clone.out(result, out=out)


# ----------------------------------------------------------------------------------------------------- the operations


def matmul(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write a @ b to out, rounded to its dtype."""
    _call(bikernels.matmul, (out,), (a, b))


def addmm(out: torch.Tensor, c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float) -> None:
    """Write beta * c + alpha * (a @ b) to out, rounded once to its dtype; out may be c."""
    _call(bikernels.addmm, (out,), (c, a, b), alpha=alpha, beta=beta)


def reduce(
    operation: Callable[..., Any],
    out: torch.Tensor,
    x: torch.Tensor,
    dims: tuple[int, ...] | None,
    keepdim: bool,
    **options: Any,
) -> None:
    """Write a reduction of x over some dimensions, or all, to out, computed as out's dtype."""
    _call(operation, (out,), (x,), axis=dims, keepdims=keepdim, **options)


def along_rows(operation: Callable[..., Any], out: torch.Tensor, operands: tuple[torch.Tensor, ...], dim: int) -> None:
    """Write a row for each row along one dimension to out, computed as out's dtype."""
    _call(operation, (out,), operands, axis=dim)


def elementwise(operation: Callable[..., Any], out: torch.Tensor, *operands: Any, **options: Any) -> None:
    """Write a function of the elements of one or two operands to out, computed as out's dtype; y may be a number."""
    _call(operation, (out,), operands, **options)


def normalise(
    operation: Callable[..., Any],
    results: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor | None, ...],
    dims: tuple[int, ...],
    eps: float | None,
) -> None:
    """Write a norm and its statistics to `results`, computed as the dtype of the first."""
    _call(operation, results, operands, axis=dims, eps=eps)


def differentiate(
    operation: Callable[..., Any],
    out: torch.Tensor,
    operands: tuple[torch.Tensor | None, ...],
    dims: tuple[int, ...],
) -> None:
    """Write a norm's gradient to out, computed as out's dtype."""
    _call(operation, (out,), operands, axis=dims)


def attend(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    factors: tuple[float, float],
) -> bool:
    """Write an attention (`AttentionSpec`) to out, if the backend has it as one operation; else False."""
    views = [view(one) for one in (out, query, key, value)]
    of_mask = None if mask is None else view(mask)
    layouts = [one.description.layout for one in views]
    spec = AttentionSpec(
        query=layouts[1],
        key=layouts[2],
        value=layouts[3],
        out=layouts[0],
        mask=None if of_mask is None else of_mask.description.layout,
        is_causal=is_causal,
        query_factor=factors[0],
        key_factor=factors[1],
    )
    device = views[0].device
    with _with_mode_settings():
        launch = _attention_launch(choose_backend(None, device).name, spec, device)
    if launch is None:
        return False
    operands = (query, key, value) if mask is None else (query, key, value, mask)
    launch(views[0].stream, *[one.data_ptr() for one in (out, *operands)])
    if _recorder.calls is not None:
        _recorder.calls.append(Recorded(launch, (out,), operands))
    return True


@functools.lru_cache(maxsize=1024)
def _attention_launch(backend: str, spec: AttentionSpec, device: Device) -> AttentionLaunch | None:
    return registry.get(backend).prepare_attention(spec, device)
