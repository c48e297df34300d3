"""vLLM's batch-invariant mode, computed by bikernels: a plugin of vLLM (docs/serving.md).

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Where VLLM_BATCH_INVARIANT=1
the functions of vLLM's mode are replaced by those of `drop_in`: vLLM looks most of them up when it registers them as
overrides of ATen's operators, and the layers call the others by names of their own, which are found and changed too.

A layer's product is the operator `torch.ops.bikernels_vllm.linear`, which vLLM's compiler does not look into and its
CUDA graphs record. CUDA kernels are compiled at first use, which a graph cannot record and a request should not wait
for: the first product of a layer, which is in vLLM's own warm-up with the largest batch, is computed with smaller
batches too.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from . import core, drop_in
from .plans import planned_operator

MODULES = (
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.layers.batch_invariant",  # until 0.26
)
"""Where vLLM has the functions of its mode; the first that there is."""

NAMES = (
    "_log_softmax_batch_invariant",
    "addmm_batch_invariant",
    "addmm_out_batch_invariant",
    "bmm_batch_invariant",
    "bmm_out_batch_invariant",
    "log_softmax",
    "matmul_batch_invariant",
    "matmul_persistent",
    "mean_batch_invariant",
    "mean_dim",
    "mm_batch_invariant",
    "mm_out_batch_invariant",
    "rms_norm",
    "rms_norm_batch_invariant",
    "softmax",
    "softmax_batch_invariant",
)
"""What is replaced by drop_in's function of that name, where vLLM has it; `linear_batch_invariant` is below."""

_logger = logging.getLogger("vllm.plugins.bikernels")


# --------------------------------------------------------------------------------------------------- a layer's product

_library = torch.library.Library("bikernels_vllm", "DEF")
_prepared: dict[tuple[torch.Size, torch.dtype, torch.device], int] = {}
"""Of which weights products have been computed, and with how many rows at most."""


def linear_batch_invariant(
    input: torch.Tensor,  # noqa: A002
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """aten::linear for input (..., K), weight (N, K), bias (N,), with the bits of drop_in's; it has no gradient."""
    product: torch.Tensor = torch.ops.bikernels_vllm.linear.default(input, weight, bias)
    return product


def _linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if rows.shape[0] > _prepared.get((weight.shape, weight.dtype, weight.device), 0):
        _prepare(rows, weight)
    if bias is not None:
        return drop_in.linear_batch_invariant(x, weight, bias)
    out = rows.new_empty((rows.shape[0], weight.shape[0]))
    core.matmul(out, rows, weight.t())
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


def _prepare(rows: torch.Tensor, weight: torch.Tensor) -> None:
    """Have the kernels compiled and loaded for products of this many rows and fewer, as far as they are not yet."""
    most = rows.shape[0]
    if weight.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a product of {most} rows with a weight of shape {tuple(weight.shape)} is computed for the first time "
                "while a CUDA graph is captured, where its kernels cannot be compiled; run the model once before with "
                "the largest batch (vLLM does unless cudagraph_num_of_warmups is 0)"
            )
        fewest = _prepared.get((weight.shape, weight.dtype, weight.device), 0)
        for number in _numbers_of_rows(most):
            if number > fewest:
                core.matmul(rows.new_empty((number, weight.shape[0])), rows[:number], weight.t())
    _prepared[weight.shape, weight.dtype, weight.device] = most


def _numbers_of_rows(most: int) -> Iterator[int]:
    """Numbers below `most` so close to one another that no schedule is chosen only between two of them."""
    number = 1
    while number < most:
        yield number
        number += number if number < 8 else 8 if number < 1024 else number // 128 * 8


_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA"):
    _library.impl("linear", planned_operator(_linear), _key)
torch.library.register_fake("bikernels_vllm::linear", _linear_fake, lib=_library)


# ------------------------------------------------------------------------------------------------------- vLLM's module


def register() -> None:
    """Put bikernels behind vLLM's batch-invariant mode, if that is on; vLLM calls it, in each of its processes.

    Raises:
        RuntimeError: this version of vLLM keeps its mode elsewhere, or has set it up already.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if not envs.VLLM_BATCH_INVARIANT or not current_platform.is_cuda():
        return
    theirs = _batch_invariant_module()
    replacements = {name: getattr(drop_in, name) for name in NAMES} | {"linear_batch_invariant": linear_batch_invariant}
    originals = {name: getattr(theirs, name) for name in replacements if hasattr(theirs, name)}
    if originals["linear_batch_invariant"] is linear_batch_invariant:
        return  # it has been called before
    if getattr(theirs, "_batch_invariant_MODE", False):
        raise RuntimeError(
            "vLLM has set up its batch-invariant mode before it called the plugins, and has its own kernels behind it; "
            "call bikernels_torch.vllm_plugin.register() before vLLM's engine is made"
        )
    by_identity = {id(original): replacements[name] for name, original in originals.items()}
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] == "vllm":
            for attribute, value in tuple(getattr(module, "__dict__", {}).items()):
                if id(value) in by_identity:
                    setattr(module, attribute, by_identity[id(value)])
    _logger.info("The batch-invariant mode computes with bikernels: %s", ", ".join(sorted(originals)))


def _batch_invariant_module() -> Any:
    for name in MODULES:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # its parent does not exist
            found = False
        if found:
            module = importlib.import_module(name)
            if hasattr(module, "linear_batch_invariant"):
                return module
    version = getattr(sys.modules.get("vllm"), "__version__", "of an unknown version")
    raise RuntimeError(
        f"vLLM {version} has no linear_batch_invariant in {' or '.join(MODULES)}; install a version that the extra "
        "bikernels[vllm] names, or keep this plugin from loading with VLLM_PLUGINS"
    )
