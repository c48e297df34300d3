"""Strictness, and the tables of operators on which it and the audit rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bikernels
import bikernels_torch
from bikernels_torch import UncoveredOperatorError, allow_operators, audit, set_batch_invariant_mode
from bikernels_torch.auditing import kinds
from bikernels_torch.auditing.kinds import Kind

library = torch.library.Library("bikernels_strict_test", "DEF")
library.define("mine(Tensor x) -> Tensor")
library.impl("mine", torch.clone, "CPU")
library.impl("mine", torch.clone, "CUDA")


@pytest.fixture
def strict() -> Iterator[None]:
    with set_batch_invariant_mode(strict=True):
        yield


def is_guarded() -> bool:
    dump = torch._C._dispatch_dump("aten::cumprod").splitlines()
    return any(line.startswith("CPU: ") and "bikernels_torch" in line for line in dump)


# ------------------------------------------------------------------------------------------------------ the refusals


@pytest.mark.usefixtures("strict")
def test_the_error_names_what_where_and_who(device: str) -> None:
    class Product(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumprod(x, -1)  # here

    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"inner": Product()})["inner"]).to(device)
    with pytest.raises(UncoveredOperatorError) as caught:
        model(torch.randn(2, 4, device=device))
    error = caught.value
    assert (error.operator, error.shapes, error.dtypes) == ("aten::cumprod", ((2, 4),), (torch.float32,))
    assert torch.device(error.devices[0]).type == device
    assert (error.place.module, error.place.module_class) == ("1", "Product")
    assert error.place.source == "return torch.cumprod(x, -1)  # here"
    for part in ("aten::cumprod", "(2, 4)", "float32", device, "1 (Product)", "test_strict.py", "strict=True"):
        assert part in str(error)
    assert isinstance(error, bikernels.BikernelsError)


@pytest.mark.usefixtures("strict")
def test_what_is_covered_or_does_not_reduce_passes(device: str) -> None:
    x = torch.randn(3, 4, 8, device=device)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Softmax(-1)).to(device)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            model(x).mean(-1)
            F.layer_norm(F.rms_norm(x, (8,)), (4, 8)).sum(0)
            torch.var_mean(x, -1)[0] + x.std((0, 2)) + x.logsumexp(0)[0, 0]
            F.scaled_dot_product_attention(x, x, x, is_causal=True)
            torch.cat([x, x]).sort(-1).values.amax(-1)
            torch.ones(5, dtype=torch.int64, device=device).cumprod(0)  # integers multiply exactly
            torch.einsum("bij,bkj->bik", x, x)
            F.mse_loss(x, x, reduction="none")
            F.interpolate(x, scale_factor=2.0, mode="linear")
            x.clone().index_put_((torch.tensor([0], device=device),), x[1])
            torch.bincount(torch.tensor([0, 2, 2], device=device))


REFUSED = {
    "cumprod": lambda x: x.cumprod(0),
    "complex product": lambda x: torch.mm(x + 0j, x.T + 0j),
    "convolution": lambda x: F.conv1d(x[None], x.new_ones(2, 3, 2)),
    "batch statistics": lambda x: F.batch_norm(x, None, None, training=True),
    "loss": lambda x: F.mse_loss(x, x),
    "accumulating": lambda x: x.clone().index_put_((torch.tensor([0], device=x.device),), x[1], accumulate=True),
    "scatter": lambda x: x.clone().scatter_(
        0, torch.zeros(1, 8, dtype=torch.int64, device=x.device), 2.0, reduce="add"
    ),
    "transform": lambda x: torch.fft.fft(x),
    "into a result": lambda x: torch.cumprod(x, 0, out=torch.empty_like(x)),
    "distances": lambda x: torch.cdist(x, x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, device: str) -> None:
    x = torch.randn(3, 8, device=device)
    REFUSED[name](x)
    with set_batch_invariant_mode():
        REFUSED[name](x)
    with set_batch_invariant_mode(strict=True), pytest.raises(UncoveredOperatorError):
        REFUSED[name](x)


@pytest.mark.usefixtures("strict")
def test_in_a_backward_pass(device: str) -> None:
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    y = F.interpolate(x, scale_factor=2.0, mode="linear")
    with pytest.raises(UncoveredOperatorError, match="upsample_linear1d_backward"):
        y.backward(torch.ones_like(y))


@pytest.mark.usefixtures("strict")
def test_in_other_threads() -> None:
    caught = []

    def work() -> None:
        try:
            torch.ones(3).cumprod(0)
        except UncoveredOperatorError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1


def test_unknown_operators_are_refused_until_they_are_vouched_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_allowed", set())
    x = torch.randn(3, device=device)
    mine = torch.ops.bikernels_strict_test.mine
    with (
        set_batch_invariant_mode(strict=True),
        pytest.raises(UncoveredOperatorError, match="allow_operators") as caught,
    ):
        mine(x)
    assert "'bikernels_strict_test::mine'" in str(caught.value)
    allow_operators("bikernels_strict_test::mine")
    with set_batch_invariant_mode(strict=True):
        mine(x)
    with pytest.raises(ValueError, match="namespace"):
        allow_operators("mine")


# ------------------------------------------------------------------------------------------------- when it is strict


def test_the_newest_decision_is_strict_or_not() -> None:
    assert not is_guarded()
    with set_batch_invariant_mode():
        assert not is_guarded()
        with set_batch_invariant_mode(strict=True):
            assert is_guarded()
            with set_batch_invariant_mode():
                assert not is_guarded()
            with set_batch_invariant_mode(False):
                assert not is_guarded()
            assert is_guarded()
        assert not is_guarded()
    assert not is_guarded()


def test_as_a_decorator() -> None:
    @set_batch_invariant_mode(strict=True)
    def product(x: torch.Tensor) -> torch.Tensor:
        return x.cumprod(0)

    with pytest.raises(UncoveredOperatorError):
        product(torch.ones(3))
    assert not is_guarded()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="strict is 1"):
        set_batch_invariant_mode(strict=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only the mode"):
        set_batch_invariant_mode(False, strict=True)


def test_a_failed_entry_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no")

    with set_batch_invariant_mode():
        monkeypatch.setattr("bikernels_torch.strict._guard", fail)
        with pytest.raises(OSError, match="no"), set_batch_invariant_mode(strict=True):
            pass
        assert bikernels_torch.is_batch_invariant_mode_enabled()
        assert not is_guarded()
    monkeypatch.undo()
    assert not bikernels_torch.is_batch_invariant_mode_enabled()


# --------------------------------------------------------------------------------------------------------- the tables

LEFT_OUT = ("sparse", "quantize", "nested", "mkldnn", "miopen", "_test_", "int4pack", "_dyn_quant", "_cslt", "_foobar")
LEFT_OUT_NAMES = {"sspaddmm", "_validate_compressed_sparse_indices"}
"""Sparse, quantized and nested tensors, and other devices: strictness refuses what they need."""


def operators() -> Iterator[torch._ops.OpOverload]:
    """ATen's operators with a kernel for CPU or CUDA tensors of their own."""
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and torch._C._dispatch_has_kernel(name):
            base, _, overload = name.removeprefix("aten::").partition(".")
            operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
            if operator is not None and any(
                has(name, key) and not kinds.is_composite(operator, key.lower()) for key in ("CPU", "CUDA")
            ):
                yield operator


def test_every_operator_is_in_a_table() -> None:
    unknown = {kinds.base_name(each._name) for each in operators() if kinds.kind_of(each) is Kind.UNKNOWN}
    unknown = {name for name in unknown - LEFT_OUT_NAMES if not any(part in name for part in LEFT_OUT)}
    assert not unknown, f"sort these into the tables of auditing/kinds.py: {sorted(unknown)}"


def test_no_operator_is_in_two_tables() -> None:
    tables = (kinds.EXACT, kinds.POINTWISE, kinds.REDUCTIONS)
    assert sum(map(len, tables)) == len(frozenset.union(*tables))
    tagged = {kinds.base_name(each._name) for each in operators() if torch.Tag.pointwise in each.tags}
    assert not tagged & kinds.REDUCTIONS - {"nll_loss_backward"}


def test_what_pytorch_tags_as_a_reduction_is_in_the_right_table() -> None:
    tag = getattr(torch.Tag, "reduction", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    exact = {"all", "any", "amax", "amin", "aminmax", "argmax", "argmin", "max", "min", "median", "nanmedian", "mode"}
    exact |= {"count_nonzero", "_is_all_true", "_is_any_true", "kthvalue", "hash_tensor"}
    tagged = {kinds.base_name(each._name) for each in operators() if tag in each.tags}
    assert tagged - kinds.REDUCTIONS <= exact


def test_everything_that_is_covered_below_autograd_is_known() -> None:
    for operator in operators():
        if kinds.is_replaced(operator._name, "cpu"):
            assert kinds.kind_of(operator) is not Kind.UNKNOWN, operator


def test_everything_that_models_run_is_known(device: str) -> None:
    """Forward and backward passes of PyTorch's own layers."""
    layers: list[tuple[nn.Module, torch.Tensor]] = [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(3, 3, 8, 8)),
        (nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(12), nn.Dropout()), torch.randn(3, 3, 4, 4)),
        (nn.Sequential(nn.GroupNorm(2, 4), nn.PReLU(), nn.RMSNorm(6), nn.GLU()), torch.randn(3, 4, 6)),
        (nn.Sequential(nn.Upsample(scale_factor=2.0, mode="bilinear"), nn.Softplus()), torch.randn(3, 2, 4, 4)),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(3, 4, 8)),
        (nn.LSTM(4, 4), torch.randn(3, 4)),
        (nn.GRU(4, 4), torch.randn(3, 4)),
        (nn.Sequential(nn.EmbeddingBag(5, 4), nn.Mish(), nn.Hardswish()), torch.randint(5, (3, 2))),
    ]
    seen = set()

    def step(x: torch.Tensor, layer: nn.Module) -> None:
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()

    for layer, x in layers:
        with torch.enable_grad():
            x = x.to(device).requires_grad_(x.is_floating_point())
            report = audit(step, x, layer.to(device), batch_dim=(0, None), slices=[(0, 2)])
        seen |= {call.operator for call in report.calls}
    unknown = []
    for name in seen:
        base, _, overload = name.removeprefix("aten::").partition(".")
        if kinds.kind_of(getattr(getattr(torch.ops.aten, base), overload or "default")) is Kind.UNKNOWN:
            unknown.append(name)
    assert len(seen) > 60
    assert not unknown
