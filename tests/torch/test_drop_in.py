"""The drop-in: names, signatures and aliases of other modules, and the core's bytes."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bikernels
from bikernels_torch import drop_in, set_batch_invariant_mode

from .helpers import DTYPES, distinct, on_numpy, same_bits


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(device)


SIGNATURES = {
    "matmul_persistent": ["a", "b", "bias"],
    "mm_batch_invariant": ["a", "b"],
    "addmm_batch_invariant": ["bias", "a", "b"],
    "bmm_batch_invariant": ["a", "b", "out"],
    "matmul_batch_invariant": ["a", "b", "out"],
    "linear_batch_invariant": ["input", "weight", "bias"],
    "softmax": ["input", "dim"],
    "softmax_batch_invariant": ["input", "dim"],
    "log_softmax": ["input", "dim"],
    "_log_softmax_batch_invariant": ["input", "dim", "_half_to_float"],
    "mean_dim": ["input", "dim", "keepdim", "dtype"],
    "mean_batch_invariant": ["input", "dim", "keepdim", "dtype"],
    "rms_norm": ["input", "weight", "eps"],
    "rms_norm_batch_invariant": ["input", "weight", "eps", "residual"],
    "set_batch_invariant_mode": ["enabled"],
    "enable_batch_invariant_mode": ["enable_bmm"],
    "disable_batch_invariant_mode": [],
    "is_batch_invariant_mode_enabled": [],
    "get_batch_invariant_attention_block_size": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = list(inspect.signature(getattr(drop_in, name)).parameters)
    assert parameters[: len(SIGNATURES[name])] == SIGNATURES[name]
    assert name in drop_in.__all__ or name.startswith("_")


def calls(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Callable[[torch.Tensor], Any]]:
    batch = weight.expand(len(x), *weight.shape)
    return {
        "mm": lambda x: drop_in.mm_batch_invariant(x, weight),
        "persistent": lambda x: drop_in.matmul_persistent(x, weight, bias=bias),
        "addmm": lambda x: drop_in.addmm_batch_invariant(bias, x, weight),
        "bmm": lambda x: drop_in.bmm_batch_invariant(x[:, None], batch[: len(x)]).squeeze(1),
        "matmul": lambda x: drop_in.matmul_batch_invariant(x[:, None], weight).squeeze(1),
        "linear": lambda x: drop_in.linear_batch_invariant(x, weight.t(), bias),
        "softmax": drop_in.softmax,
        "softmax, ATen's form": lambda x: drop_in.softmax_batch_invariant(x, -1, False),
        "log_softmax": drop_in.log_softmax,
        "log_softmax, ATen's form": lambda x: drop_in._log_softmax_batch_invariant(x, 1, False),
        "mean_dim": lambda x: drop_in.mean_dim(x, 1),
        "mean": lambda x: drop_in.mean_batch_invariant(x, [-1], keepdim=True),
        "rms_norm": lambda x: drop_in.rms_norm(x, weight[:, 0]),
        "rms_norm with residual": lambda x: drop_in.rms_norm_batch_invariant(x.clone(), weight[:, 0], 1e-5, x * 2)[0],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, device: str) -> None:
    x, weight, bias = (random(*shape, dtype=dtype, device=device) for shape in ((65, 129), (129, 17), (17,)))
    for name, call in calls(x, weight, bias).items():
        assert distinct(call(x[:n])[0] for n in (1, 2, 7, 64, 65)) == 1, name
        with set_batch_invariant_mode():
            assert same_bits(call(x), call(x[:1]).expand_as(call(x))) or same_bits(call(x)[:1], call(x[:1])), name


def test_the_bits_are_the_cores(device: str) -> None:
    a, b, c = random(5, 33, device=device), random(33, 4, device=device), random(4, device=device)
    for expected, actual in (
        (on_numpy(bikernels.matmul, a, b), drop_in.mm_batch_invariant(a, b)),
        (on_numpy(bikernels.addmm, c, a, b), drop_in.matmul_persistent(a, b, c)),
        (on_numpy(bikernels.addmm, c, a, b), drop_in.linear_batch_invariant(a.view(1, 5, 33), b.t(), c)[0]),
        (on_numpy(bikernels.softmax, a, axis=0), drop_in.softmax(a, 0)),
        (on_numpy(bikernels.log_softmax, a, axis=1), drop_in.log_softmax(a)),
        (on_numpy(bikernels.mean, a, axis=1), drop_in.mean_dim(a, 1)),
        (on_numpy(bikernels.mean, a, axis=(0, 1)), drop_in.mean_batch_invariant(a, [])),
    ):
        assert same_bits(expected, actual)


def test_rms_norm(device: str) -> None:
    """The order of operations that its docstring names, on NumPy."""
    import numpy as np

    x, weight = random(7, 129), random(129)
    mean = np.asarray(bikernels.mean((x * x).numpy(), axis=-1, keepdims=True))
    expected = x.numpy() * (np.float32(1) / np.sqrt(mean + np.float32(1e-6))) * weight.numpy()
    actual = drop_in.rms_norm(x.to(device), weight.to(device))
    assert same_bits(torch.from_numpy(expected), actual.cpu())
    assert same_bits(drop_in.rms_norm_batch_invariant(x, None), drop_in.rms_norm(x, torch.ones(129)))
    half = drop_in.rms_norm(x.bfloat16(), weight.bfloat16())
    wide = drop_in.rms_norm(x.bfloat16().float(), weight.bfloat16().float())
    assert same_bits(half, wide.bfloat16())

    given, residual = x.clone(), weight.expand(7, 129).clone()
    normalized, merged = drop_in.rms_norm_batch_invariant(given, weight, 1e-6, residual)
    assert normalized is given and merged is residual
    assert same_bits(residual, x + weight)
    assert same_bits(given, drop_in.rms_norm(residual, weight))


def test_dtypes() -> None:
    half = random(3, 5, dtype=torch.float16)
    assert drop_in.softmax_batch_invariant(half, 1, True).dtype is torch.float32
    assert drop_in.softmax_batch_invariant(half, 1, torch.float32).dtype is torch.float32
    assert drop_in.softmax_batch_invariant(half, 1, dtype=torch.float32).dtype is torch.float32
    assert drop_in._log_softmax_batch_invariant(half, 1, True).dtype is torch.float32
    assert drop_in.mean_batch_invariant(half, [0, 1]).dtype is torch.float16
    assert drop_in.mean_batch_invariant(half, [0], dtype=torch.float32).dtype is torch.float32
    assert drop_in.mean_dim(torch.arange(6).view(2, 3), 1).tolist() == [1.0, 4.0]


def test_gradients() -> None:
    x, weight, bias = (random(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 5), (5, 2), (2,)))
    assert torch.autograd.gradcheck(drop_in.matmul_persistent, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w: drop_in.rms_norm(x, w[:, 0]), (x, weight))


ERRORS = {
    "a is .* b is": lambda: drop_in.mm_batch_invariant(random(2, 3), random(2, 3)),
    "out is": lambda: drop_in.bmm_batch_invariant(random(1, 2, 3), random(1, 3, 2), out=torch.empty(1, 2, 3)),
    "weight has shape": lambda: drop_in.rms_norm(random(2, 3), random(2)),
    "residual has shape": lambda: drop_in.rms_norm_batch_invariant(random(2, 3), random(3), residual=random(3)),
    "Dimension out of range": lambda: drop_in.softmax(random(2, 3), 2),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        ERRORS[message]()


def test_results_are_written_to_out() -> None:
    a, b, out = random(2, 3, 4), random(2, 4, 5), torch.empty(2, 3, 5)
    assert drop_in.bmm_batch_invariant(a, b, out=out) is out
    assert same_bits(out, drop_in.matmul_batch_invariant(a, b))


def test_the_mode() -> None:
    assert drop_in._batch_invariant_MODE is False and drop_in._batch_invariant_LIB is None
    drop_in.enable_batch_invariant_mode(enable_bmm=False)
    try:
        assert drop_in._batch_invariant_MODE is True and drop_in._batch_invariant_LIB is not None
    finally:
        drop_in.disable_batch_invariant_mode()
    assert not drop_in.is_batch_invariant_mode_enabled()
    assert drop_in.get_batch_invariant_attention_block_size() == drop_in.AttentionBlockSize(block_m=16, block_n=16)


# ------------------------------------------------------------------------------------------------------------- aliases


@pytest.mark.parametrize("name", ["batch_invariant_ops_of_a_test", "package_of_a_test.layers.batch_invariant"])
def test_install_as(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, _, last = name.rpartition(".")
    for alias in (name, f"{name}.{last}"):
        monkeypatch.setitem(sys.modules, alias, drop_in)
    if parent:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    drop_in.install_as(name)
    drop_in.install_as(name)
    assert importlib.import_module(name) is drop_in
    assert importlib.import_module(f"{name}.{last}") is drop_in
    if parent:
        assert getattr(sys.modules[parent], last) is drop_in


def test_install_as_refuses_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "other_of_a_test", types.ModuleType("other_of_a_test"))
    with pytest.raises(RuntimeError, match=r"already been imported.*before"):
        drop_in.install_as("other_of_a_test")


def test_a_file_of_that_name(tmp_path: Path) -> None:
    """The two lines that docs/drop_in.md shows, on the path of a program that is not changed."""
    lines = "from bikernels_torch.drop_in import install_as\n\ninstall_as(__name__)\n"
    (tmp_path / "batch_invariant_ops.py").write_text(lines)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from batch_invariant_ops import batch_invariant_ops, set_batch_invariant_mode
from batch_invariant_ops.batch_invariant_ops import mm_batch_invariant
import batch_invariant_ops as package
import torch
with set_batch_invariant_mode(True):
    assert package._batch_invariant_MODE and package is batch_invariant_ops
    a = torch.ones(2, 3)
    assert torch.equal(torch.mm(a, a.T), mm_batch_invariant(a, a.T))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(drop_in.__file__).parents[1])
