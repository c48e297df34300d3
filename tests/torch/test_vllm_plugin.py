"""The plugin for vLLM, on a stand-in of vLLM's modules: their names, and who imports what from where."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import bikernels
from bikernels_torch import drop_in, vllm_plugin

from .helpers import distinct, same_bits

ROOT = Path(__file__).parents[2]

BATCH_INVARIANT = """
import torch

def mm_batch_invariant(a, b):
    return torch.zeros(())

def bmm_batch_invariant(a, b, *, out=None):
    return torch.zeros(())

def _log_softmax_batch_invariant(input, dim, _half_to_float):
    return torch.zeros(())

def mean_batch_invariant(input, dim, keepdim=False, dtype=None):
    return torch.zeros(())

def rms_norm_batch_invariant(input, weight, eps=1e-6, residual=None):
    return torch.zeros(())

def linear_batch_invariant(input, weight, bias=None):
    return torch.zeros(())

_batch_invariant_MODE = False
_batch_invariant_LIB = None

def init_batch_invariance():
    global _batch_invariant_MODE, _batch_invariant_LIB
    if _batch_invariant_MODE:
        return
    _batch_invariant_MODE = True
    _batch_invariant_LIB = torch.library.Library("aten", "IMPL")
    _batch_invariant_LIB.impl("aten::_log_softmax", _log_softmax_batch_invariant, "CPU", allow_override=True)
    _batch_invariant_LIB.impl("aten::mean.dim", mean_batch_invariant, "CPU", allow_override=True)
    _batch_invariant_LIB.impl("aten::bmm", bmm_batch_invariant, "CPU", allow_override=True)
"""

LINEAR = """
import torch
from {module} import linear_batch_invariant

class Linear(torch.nn.Module):
    def __init__(self, inputs, outputs, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None

    def forward(self, x):
        return linear_batch_invariant(x, self.weight, self.bias)
"""

LAYER_NORM = """
from {module} import rms_norm_batch_invariant
"""

StandIn = Callable[..., None]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Make a package `vllm`, of which `module` is that of the batch-invariant mode, and have it found."""
    before = set(sys.modules)
    assert "vllm" not in before

    def make(module: str, batch_invariant: str = BATCH_INVARIANT, on: bool = True, cuda: bool = True) -> None:
        files = {
            "vllm": '__version__ = "0.0"',
            "vllm.envs": f"VLLM_BATCH_INVARIANT = {on}",
            "vllm.platforms": f"class current_platform:\n    is_cuda = staticmethod(lambda: {cuda})",
            "vllm.model_executor": "",
            "vllm.model_executor.layers": "",
            "vllm.model_executor.layers.linear": LINEAR.format(module=module),
            "vllm.model_executor.layers.layernorm": LAYER_NORM.format(module=module),
            module.rpartition(".")[0]: "",
            module: batch_invariant,
        }
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("."))
            is_package = any(other.startswith(f"{name}.") for other in files)
            path = path / "__init__.py" if is_package else path.with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield make
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "vllm":
            library = getattr(sys.modules[name], "_batch_invariant_LIB", None)
            if library is not None:
                library._destroy()
            del sys.modules[name]


def layer(name: str) -> ModuleType:
    return importlib.import_module(f"vllm.model_executor.layers.{name}")


pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # the stand-in's overrides


@pytest.mark.parametrize("module", vllm_plugin.MODULES)
@pytest.mark.parametrize("imported_first", [True, False])
def test_it_replaces_the_functions_wherever_they_are(stand_in: StandIn, module: str, imported_first: bool) -> None:
    stand_in(module)
    if imported_first:
        layer("linear"), layer("layernorm")
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM may call it again
    theirs = importlib.import_module(module)
    assert layer("linear").linear_batch_invariant is theirs.linear_batch_invariant is vllm_plugin.linear_batch_invariant
    assert layer("layernorm").rms_norm_batch_invariant is drop_in.rms_norm_batch_invariant
    for name in ("mm_batch_invariant", "bmm_batch_invariant", "_log_softmax_batch_invariant", "mean_batch_invariant"):
        assert getattr(theirs, name) is getattr(drop_in, name)
    assert not hasattr(theirs, "bmm_out_batch_invariant")  # nor did this version of vLLM have it

    x = torch.randn(5, 33)
    theirs.init_batch_invariance()
    vllm_plugin.register()
    for actual, expected in (
        (torch.log_softmax(x, -1), bikernels.log_softmax(x.numpy(), -1)),
        (x.mean(-1), bikernels.mean(x.numpy(), -1)),
        (torch.bmm(x[None], x.t()[None])[0], bikernels.matmul(x.numpy(), x.numpy().T)),
    ):
        assert same_bits(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("setting", ["on", "cuda"])
def test_it_leaves_vllm_alone(stand_in: StandIn, setting: str) -> None:
    """Where the mode is off, and on other platforms."""
    stand_in(vllm_plugin.MODULES[0], **{setting: False})
    theirs = importlib.import_module(vllm_plugin.MODULES[0])
    before = dict(vars(theirs))
    vllm_plugin.register()
    assert vars(theirs) == before


def test_it_says_when_it_is_too_late(stand_in: StandIn) -> None:
    stand_in(vllm_plugin.MODULES[1])
    importlib.import_module(vllm_plugin.MODULES[1]).init_batch_invariance()
    with pytest.raises(RuntimeError, match="before it called the plugins"):
        vllm_plugin.register()


@pytest.mark.parametrize("module", ["vllm.elsewhere.batch_invariant", vllm_plugin.MODULES[1]])
def test_it_says_which_version_it_does_not_know(stand_in: StandIn, module: str) -> None:
    stand_in(module, batch_invariant="linear = None")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.0 has no linear_batch_invariant.*bikernels\[vllm\]"):
        vllm_plugin.register()


def test_a_layer_compiled_and_not(stand_in: StandIn) -> None:
    """One opaque operator in the graph of any number of rows; rows have the core's bits in every batch."""
    stand_in(vllm_plugin.MODULES[0])
    vllm_plugin.register()
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(65, 129)
    for bias in (False, True):
        linear = layer("linear").Linear(129, 17, bias)
        compiled = torch.compile(linear, backend=backend, fullgraph=True, dynamic=True)
        weight = linear.weight.numpy().T
        expected = (
            bikernels.addmm(linear.bias.numpy(), x.numpy(), weight) if bias else bikernels.matmul(x.numpy(), weight)
        )
        for call in (linear, compiled):
            assert same_bits(call(x), torch.from_numpy(expected))
            assert same_bits(call(x.view(5, 13, 129)), torch.from_numpy(expected).view(5, 13, 17))
            assert distinct(call(x[:n])[0] for n in (1, 2, 7, 64)) == 1
    assert set(called) == {"bikernels_vllm.linear.default"}


def test_opcheck() -> None:
    tensors = torch.randn(3, 4, 5), torch.randn(2, 5), torch.randn(2)
    tests = ("test_schema", "test_faketensor")
    for bias in (None, tensors[2]):
        torch.library.opcheck(torch.ops.bikernels_vllm.linear.default, (*tensors[:2], bias), test_utils=tests)


# ------------------------------------------------------------------------------------------------------------- warm-up


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


def weight_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape).as_subclass(OnGPU)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows the products have that are computed."""
    rows: list[int] = []
    monkeypatch.setattr(vllm_plugin, "_prepared", {})
    monkeypatch.setattr(vllm_plugin.core, "matmul", lambda out, a, b: rows.append(a.shape[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return rows


def test_the_first_product_is_computed_with_fewer_rows_too(products: list[int]) -> None:
    weight = weight_of(3, 4)
    vllm_plugin._prepare(torch.randn(100, 4), weight)
    assert products == [1, 2, 4, *range(8, 100, 8)]
    products.clear()
    vllm_plugin._linear(torch.randn(64, 4), weight, None)
    assert products == [64]
    products.clear()
    vllm_plugin._linear(torch.randn(130, 4), weight, None)
    assert products == [104, 112, 120, 128, 130]


def test_no_product_is_the_first_in_a_graph(products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(3, 4)
    vllm_plugin._linear(torch.randn(64, 4), weight, None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    vllm_plugin._linear(torch.randn(63, 4), weight, None)
    for rows, other in ((65, weight), (1, weight_of(5, 4))):
        with pytest.raises(RuntimeError, match=rf"product of {rows} rows .* graph is captured"):
            vllm_plugin._linear(torch.randn(rows, 4), other, None)


def test_a_product_of_known_forms_has_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 5, 4), torch.randn(3, 4), torch.randn(3)
    linear = torch.ops.bikernels_vllm.linear.default
    for operands in ((x, weight, None), (x[0], weight, None), (x, weight, bias)):
        expected = linear(*operands)
        with monkeypatch.context() as patch:
            for name in ("matmul", "addmm"):
                patch.delattr(vllm_plugin.core, name)
            assert same_bits(linear(*operands), expected)


def test_numbers_of_rows() -> None:
    """All up to 1024 that vLLM captures by default, none far from the next one, and few."""
    numbers = list(vllm_plugin._numbers_of_rows(16384))
    assert {1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)} <= set(numbers)
    steps = np.diff([*numbers, 16384])
    assert (steps > 0).all() and (steps[numbers.index(1024) :] <= np.array(numbers[numbers.index(1024) :]) / 16).all()
    assert len(numbers) < 200


# --------------------------------------------------------------------------------------------------------- entry point


def test_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["bikernels"].partition(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register
    assert any(requirement.startswith("vllm") for requirement in project["optional-dependencies"]["vllm"])
