"""The audit: what varies is found, located and not confused with what inherits a difference."""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bikernels_torch import Report, Status, audit, set_batch_invariant_mode
from bikernels_torch.auditing import rows
from bikernels_torch.auditing.report import CallReport
from bikernels_torch.auditing.rows import Axis, Slice

library = torch.library.Library("bikernels_audit_test", "DEF")
library.define("vary(Tensor x, int dim=0, int least=2) -> Tensor")
library.define("unsteady(Tensor x) -> Tensor")
calls = 0
DELTA = 2.0**-8


def _vary(x: torch.Tensor, dim: int = 0, least: int = 2) -> torch.Tensor:
    """A copy; something is added to the last element if dimension `dim` has a length of `least` or more."""
    result = x.clone(memory_format=torch.contiguous_format)
    if x.shape[dim] >= least:
        result.view(-1)[-1] += DELTA
    return result


def _unsteady(x: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    return x * (1 + calls)


library.impl("vary", _vary, "CompositeExplicitAutograd")
library.impl("unsteady", _unsteady, "CompositeExplicitAutograd")
vary = torch.ops.bikernels_audit_test.vary


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Vary(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return vary(x)  # here


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.up, self.inner, self.down = nn.Linear(6, 12), inner, nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.inner(torch.relu(self.up(x))))


def calls_of(report: Report, name: str) -> list[CallReport]:
    return [call for call in report.calls if call.operator.partition("::")[2].partition(".")[0] == name]


def assert_nothing_varies(report: Report) -> None:
    assert not report.varying, str(report)
    assert not report.outputs_vary, str(report)


# ---------------------------------------------------------------------------------------------------- what varies


def test_the_origin_is_found_and_what_follows_is_not_blamed(device: str) -> None:
    model = nn.Sequential(Block(nn.Identity()), Block(Vary()), Block(nn.Identity())).to(device)
    x = torch.randn(5, 6, device=device)
    with set_batch_invariant_mode():
        report = audit(model, x)
    (call,) = report.varying
    assert call.operator == "bikernels_audit_test::vary"
    assert (call.place.module, call.place.module_class) == ("1.inner", "Vary")
    assert call.place.source == "return vary(x)  # here"
    assert call.place.file == __file__
    assert call.place.line == inspect.getsourcelines(Vary)[1] + 2
    assert (call.dtype, call.device, call.shapes) == (torch.float32, str(x.device), ((5, 12),))
    assert report.outputs_vary
    assert report.outputs[0].difference is not None
    assert report[0].operator == call.operator
    assert report[0].worst is call


def test_the_first_differing_element_and_its_bits() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    report = audit(lambda x: vary(x, 0, 4), x, slices=[(2, 4)])
    difference = report.varying[0].difference
    assert difference is not None
    assert (difference.rows, difference.index) == (Slice(2, 4), (3, 2))
    assert (difference.count, difference.elements, difference.repeatable) == (1, 6, True)
    assert difference.value_in_slice == x[3, 2].item()
    assert difference.value == x[3, 2].item() + DELTA
    for value, bits in ((difference.value, difference.bits), (difference.value_in_slice, difference.bits_in_slice)):
        assert struct.pack(">d", value).hex() == bits
    assert "[3, 2]" in str(report)
    assert difference.bits in str(report)


def test_an_operator_that_is_not_deterministic_is_said_to_be_so() -> None:
    report = audit(lambda x: torch.ops.bikernels_audit_test.unsteady(x), torch.randn(3, 2))
    difference = report.varying[0].difference
    assert difference is not None and not difference.repeatable
    assert "not deterministic" in str(difference)


LAYOUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "rows": (lambda x: x, 0),
    "batch second": (lambda x: x.transpose(0, 1), 1),
    "batch last": (lambda x: x.permute(1, 2, 0), 2),
    "batch * time": (lambda x: x.flatten(0, 1), 0),
    "time * batch": (lambda x: x.transpose(0, 1).flatten(0, 1), 0),
    "heads * batch * time": (lambda x: x.unflatten(-1, (2, 4)).permute(2, 0, 1, 3).flatten(0, 2), 0),
    "expanded": (lambda x: x[:, None].expand(-1, 3, -1, -1), 0),
    "gram": (lambda x: x[:, 0] @ x[:, 0].T, 1),
}
"""Where the batch lies, and in which dimension."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("mode")
def test_wherever_the_batch_lies(layout: str) -> None:
    """The varying operator is found in every layout, and with a threshold that is never met nothing is accused."""
    arrange, dim = LAYOUTS[layout]
    x = torch.randn(6, 5, 8)
    whole = arrange(x).shape[dim]
    report = audit(lambda x: vary(arrange(x), dim, whole), x)
    assert [call.operator for call in report.varying] == ["bikernels_audit_test::vary"]
    report = audit(lambda x: torch.tanh(vary(arrange(x), dim, 10**6)), x)
    assert_nothing_varies(report)
    assert calls_of(report, "vary")[0].compared == len(report.slices)
    assert calls_of(report, "vary")[0].status is Status.NOT_PROVABLE


@pytest.mark.usefixtures("mode")
def test_rows_that_look_alike_are_not_confused() -> None:
    """Nearly all values of x are equal, so that the slice's rows may lie in several places of (heads * batch, ...)."""

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, 4)).permute(2, 0, 1, 3).reshape(-1, 5, 4)

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.bmm(heads(vary(x).flip(0)), heads(y).mT)

    report = audit(program, torch.ones(3, 5, 8), torch.randn(3, 5, 8))
    assert {call.operator for call in report.varying} <= {"bikernels_audit_test::vary", "aten::flip"}
    assert calls_of(report, "bmm")[0].compared == len(report.slices)


def test_batch_statistics_vary() -> None:
    model = nn.BatchNorm1d(4)
    report = audit(model.train(), torch.randn(6, 4), slices=[(0, 3)])
    assert [call.place.module_class for call in report.varying] == ["BatchNorm1d"]
    report = audit(model.eval(), torch.randn(6, 4))
    (call,) = calls_of(report, "native_batch_norm")
    assert call.status is not Status.VARIES
    assert "all the rows" not in call.reason


def test_a_program_that_mixes_rows_is_told_from_an_operator_that_varies() -> None:
    report = audit(lambda x: x.sort(0).values, torch.randn(6, 4))
    (call,) = report.varying
    assert "mixes the rows" in call.reason


def test_routing_by_data() -> None:
    """Tokens sent to experts: their number follows the data, so nothing is said of what happens there."""

    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in range(2):
            chosen = torch.where((x[:, 0] > 0) == bool(expert))[0]
            out.index_add_(0, chosen, x[chosen].cumsum(-1))
        return out

    report = audit(program, torch.randn(9, 4))
    assert_nothing_varies(report)
    assert all(call.compared == 0 for call in calls_of(report, "nonzero"))
    assert all(call.status is Status.NOT_PROVABLE for call in calls_of(report, "cumsum"))


# ------------------------------------------------------------------------------------------------ what does not vary


def test_a_transformer_in_the_mode(device: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, device=device).eval()
    model = nn.Sequential(nn.Embedding(11, 16, device=device), nn.TransformerEncoder(layer, 2), nn.LogSoftmax(-1))
    tokens = torch.randint(11, (5, 7), device=device)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), set_batch_invariant_mode():
            report = audit(model, tokens)
        assert report.in_mode
        assert_nothing_varies(report)
        status = {call.operator: call.status for call in report.calls}
        for name in ("addmm", "bmm", "_softmax", "_log_softmax"):
            assert status[f"aten::{name}"] is Status.COVERED
        assert status["aten::embedding"] is Status.ROW_INDEPENDENT
    norm = calls_of(report, "addmm")[0]
    assert norm.place.module == "1.layers.0.self_attn"


def test_reductions_and_norms_in_the_mode(device: str) -> None:
    """Forward and backward, every one of them."""
    norms = nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)).to(device)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        y = norms(x) + x.logsumexp(1, keepdim=True) * x.sum(1, keepdim=True) + x.std(1, keepdim=True)
        (gradient,) = torch.autograd.grad(y.log_softmax(1), x, x.detach())
        return gradient * torch.stack(torch.var_mean(x, 1)).sum(0)[:, None]

    with set_batch_invariant_mode(), torch.enable_grad():
        report = audit(step, torch.randn(5, 8, device=device))
    assert_nothing_varies(report)
    status = {call.operator: call.status for call in report.calls}
    names = (
        *("native_layer_norm", "native_layer_norm_backward", "logsumexp", "sum.dim_IntList", "std.correction"),
        *("var_mean.correction", "_log_softmax", "_log_softmax_backward_data"),
    )
    assert {status[f"aten::{name}"] for name in names} == {Status.COVERED}
    assert status["bikernels::_rms_norm"] is Status.COVERED


def test_on_a_cpu_a_pointwise_function_is_not_provable() -> None:
    report = audit(lambda x: torch.sin(x) + x, torch.randn(4, 5))
    assert [call.status for call in report.calls] == [Status.NOT_PROVABLE, Status.ROW_INDEPENDENT]
    with set_batch_invariant_mode():
        report = audit(torch.sigmoid, torch.randn(4, 5))
    assert [call.status for call in report.calls] == [Status.COVERED]
    with set_batch_invariant_mode(portable=True):
        report = audit(torch.sin, torch.randn(4, 5))
    assert [call.status for call in report.calls] == [Status.COVERED]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_it_is_row_independent() -> None:
    report = audit(torch.sin, torch.randn(4, 5, device="cuda"))
    assert [call.status for call in report.calls] == [Status.ROW_INDEPENDENT]


def test_a_reduction_over_the_batch_is_said_to_be_one() -> None:
    report = audit(lambda x: x - x.cumsum(1).amax(), torch.randn(4, 5))
    assert calls_of(report, "cumsum")[0].status is Status.NOT_PROVABLE
    joined = calls_of(report, "amax")[0]
    assert joined.status is Status.NOT_PROVABLE
    assert "all the rows" in joined.reason
    assert not report.varying
    assert report.outputs_vary


def test_what_does_not_see_the_batch() -> None:
    weight = torch.randn(5, 5)
    report = audit(lambda x: x + weight.cumsum(0)[0], torch.randn(3, 5))
    (call,) = calls_of(report, "cumsum")
    assert call.status is Status.ROW_INDEPENDENT
    assert "every batch size" in call.reason


def test_random_numbers() -> None:
    report = audit(lambda x: F.dropout(x, 0.5), torch.randn(8, 64))
    assert any(call.reason == "random" for call in report.calls)
    assert not report.varying


def test_in_place_and_out_and_several_results() -> None:
    def program(x: torch.Tensor) -> dict[str, Any]:
        y = x.clone().mul_(2).clamp_(min=0)
        out = torch.empty_like(y)
        torch.mul(y, x, out=out)
        values, indices = out.topk(2, -1)
        x.zero_()  # the caller's tensor must not see it
        return {"values": values, "more": [indices, None, "text"], "shared": torch.ones(3)}

    x = torch.randn(5, 6)
    before = x.clone()
    report = audit(program, x)
    assert torch.equal(x, before)
    assert_nothing_varies(report)
    assert [output.name for output in report.outputs] == ["['values']", "['more'][0]", "['shared']"]
    assert [output.compared for output in report.outputs] == [len(report.slices), len(report.slices), 0]
    assert report.outputs[2].reason == "it has no batch dimension"
    assert calls_of(report, "mul")[0].compared == len(report.slices)


def test_positions_of_rows_are_the_slice_s_own() -> None:
    def program(x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(x.shape[0]), last].cumsum(-1)

    report = audit(program, torch.randn(6, 4, 3), torch.randint(4, (6,)))
    assert_nothing_varies(report)
    (index,) = calls_of(report, "index")
    assert index.compared == len(report.slices)
    assert calls_of(report, "cumsum")[0].compared == len(report.slices)


# ---------------------------------------------------------------------------------------------------- control flow


def test_control_flow_that_follows_the_batch_is_reported() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        x = torch.cumsum(x, 1) if x.shape[0] > 2 else torch.cumprod(x, 1)
        return torch.relu(x)

    report = audit(program, torch.randn(5, 4), slices=[(0, 4), (1, 3)])
    (note,) = report.notes
    assert "control flow" in note
    assert "rows 1:3" in note
    assert "aten::cumsum" in note
    assert not report.varying
    assert report.outputs_vary
    assert calls_of(report, "cumsum")[0].compared == 1
    report = audit(program, torch.randn(5, 4), slices=[(1, 3)])
    (call,) = calls_of(report, "cumsum")
    assert call.compared == 0
    assert "no such call" in call.reason
    assert "1 of 3 calls" in report.notes[0]


def test_a_program_with_a_state_is_reported() -> None:
    state = []

    def program(x: torch.Tensor) -> torch.Tensor:
        state.append(0)
        for _ in state:
            x = x + 1
        return x

    assert any("keeps a state" in note for note in audit(program, torch.randn(3, 2)).notes)


# ------------------------------------------------------------------------------------------------------ arguments


def test_batch_dimensions() -> None:
    def program(x: torch.Tensor, pair: list[torch.Tensor], *, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = x + pair[0].T + pair[1]
        return y if scale is None else y * scale

    x, other, shared = torch.randn(5, 3), torch.randn(3, 5), torch.randn(3)
    for batch_dim in ((0, [1, None]), {1: [1, None]}, {0: 0, 1: [-1, None]}):
        report = audit(program, x, [other, shared], batch_dim=batch_dim)
        assert report.batch == 5
        assert_nothing_varies(report)
    report = audit(program, x, [other, shared], scale=shared, batch_dim={1: [1, None], "scale": None})
    assert_nothing_varies(report)
    report = audit(lambda x, y: x + y, x.T, y=other, batch_dim=1, slices=[0])
    assert report.batch == 5
    assert_nothing_varies(report)


@pytest.mark.parametrize(
    ("batch_dim", "error", "message"),
    [
        (0, ValueError, "batch sizes 5, 3"),
        (2, ValueError, "no dimension 2"),
        (None, ValueError, "no tensor"),
        ((0,), TypeError, "1 entries for 2"),
        ({"y": 0}, TypeError, "'y'"),
        ((0, [0, 0]), TypeError, "another structure"),
        ((0, True), TypeError, "another structure"),
    ],
)
def test_wrong_batch_dimensions(batch_dim: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(torch.add, torch.randn(5, 3), torch.randn(3), batch_dim=batch_dim)


def test_a_batch_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        audit(torch.sin, torch.randn(1, 3))


def test_slices() -> None:
    x = torch.randn(5, 2)
    assert audit(torch.sin, x).slices[:5] == tuple(Slice(i, i + 1) for i in range(5))
    assert len(audit(torch.sin, torch.randn(40, 2)).slices) == 9
    given = audit(torch.sin, x, slices=[2, -1, slice(1, 3), slice(-2, None), (0, 4)]).slices
    assert given == (Slice(2, 3), Slice(4, 5), Slice(1, 3), Slice(3, 5), Slice(0, 4))
    for wrong in ([5], [slice(0, 4, 2)], [(0, 5)], [(2, 2)], [(-1, 2)], []):
        with pytest.raises(ValueError, match=r"slice|empty"):
            audit(torch.sin, x, slices=wrong)


@pytest.mark.parametrize("outer", [1, 2, 3, 6])
def test_rows_and_their_indices(outer: int) -> None:
    """Taking a slice's rows and saying where an element lay are inverse to one another."""
    x = torch.arange(24 * 2).reshape(2, 24)
    placement = (Axis(1, outer, 6 // outer),)
    part = Slice(1, 3)
    taken = rows.take(x, placement, 4, part)
    assert placement in rows.placements((2, 24), (2, 12), 4, 2)
    for index in ((0, 0), (1, 5), (1, 11)):
        assert x[rows.index_in_whole(index, placement, 4, part)] == taken[index]
    assert rows.placements((2, 25), (2, 12), 4, 2) == []
    assert rows.placements((6,), (3,), 4, 2) == []
    assert rows.placements((7,), (7,), 4, 2) == [()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_rows_are_recognised_by_a_few_values(dtype: torch.dtype) -> None:
    x = torch.randn(6, 40) * 20
    x = x > 0 if dtype is torch.bool else x.to(dtype)
    samples = rows.sample(x[2:4])
    assert rows.resembles(x[2:4], samples)
    if dtype.is_floating_point:
        assert rows.resembles(x[2:4] * (1 + 1e-3), samples)
    assert not rows.resembles(x[3:5], samples)


# ------------------------------------------------------------------------------------------------------- the report


def test_the_report_as_data_and_as_text() -> None:
    report = audit(lambda x: vary(torch.tanh(x)).view(-1), torch.randn(3, 4))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["outputs_vary"] is True
    assert [call["operator"] for call in data["calls"]][:2] == ["aten::tanh", "bikernels_audit_test::vary"]
    assert data["calls"][1]["difference"]["rows"] == [0, 1] or data["calls"][1]["difference"]["count"] == 1
    assert data["operators"][0] == {"operator": "bikernels_audit_test::vary", "status": "varies", "calls": 1}
    assert len(report) == len(list(report)) == 3
    assert {each.operator for each in report} == {call.operator for call in report.calls}
    text = report.format(100)
    assert all(each.operator in text for each in report)
    assert "the outputs vary" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_report_in_rich(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    audit(torch.sin, torch.randn(3, 4)).print()
    assert "aten::sin" in capsys.readouterr().out
