"""python -m bikernels_torch doctor, audit and bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bikernels import reference
from bikernels_torch.commands import bench, main


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "bikernels_torch", "doctor", "--no-self-test"]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "backends" in completed.stdout
    assert torch.__version__ in completed.stdout


def test_wrong_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["nonsense"], ["audit", "nocolon"], ["audit", "no.such.module:f"], ["audit", "json:absent"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "nocolon" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- doctor


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["ok"] is True
    assert findings["backends"]["cpu"]["available"] is True
    assert findings["arithmetic"]["cpu"]["bfloat16"] == {"native": "fma32", "computes": ["tc16f25", "tc8f24", "fma32"]}
    tested = {(each["operation"], each["dtype"], each["arithmetic"]) for each in findings["self_test"]}
    assert {
        ("matmul", "bfloat16", "tc16f25"),
        ("matmul", "float64", "fma64"),
        ("mean", "float16", ""),
        ("layer_norm", "bfloat16", ""),
    } <= tested
    for name, status in findings["backends"].items():
        if not status["available"]:
            assert status["reason"]
        elif status["chosen_for"]:
            assert any(each["backend"] == name for each in findings["self_test"])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "This machine computes the contract." in text
    assert findings["cache"]["folder"] in text


def test_doctor_finds_a_wrong_bit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = reference.mean

    def wrong(x: np.ndarray[Any, Any], **options: Any) -> np.ndarray[Any, Any]:
        result = right(x, **options)
        if result.dtype == np.float32:
            result.view(np.int32)[1] ^= 1
        return result

    monkeypatch.setattr(reference, "mean", wrong)
    assert main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert findings["ok"] is False
    differing = [each for each in findings["self_test"] if each["differing"]]
    assert {(each["operation"], each["dtype"], each["differing"]) for each in differing} == {("mean", "float32", 2)}
    assert "batch of 7, [1]" in differing[0]["first"]
    assert main(["doctor"]) == 1
    assert "2 DIFFER" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- audit

TARGETS = """
import torch
from torch import nn

def steady():
    return nn.Softmax(-1), (torch.randn(4, 3),)

def joined():
    return (lambda x: x - x.amax()), (torch.arange(12.0).reshape(3, 4),), {"batch_dim": 1, "slices": [(0, 2)]}

def wrong():
    return 3
"""


@pytest.fixture
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "audited_program.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "audited_program"


def test_audit(targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", f"{targets}:steady"]) == 0
    text = capsys.readouterr().out
    assert "standard PyTorch" in text
    assert "batch-invariant mode" in text
    assert main(["audit", f"{targets}:steady", "--mode", "on", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["in_mode"] is True
    assert [each["status"] for each in report["operators"]] == ["covered"]
    assert main(["audit", f"{targets}:joined", "--json", "--mode", "off"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["batch"], report["slices"], report["outputs_vary"]) == (4, [[0, 2]], True)
    assert main(["audit", f"{targets}:wrong"]) == 2
    assert "must return" in capsys.readouterr().out


def test_audit_without_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--json", "--mode", "on"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert {"aten::addmm", "aten::bmm"} <= {each["operator"] for each in report["operators"]}


# ---------------------------------------------------------------------------------------------------------------- bench


def test_bench(device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cases(device: str) -> Any:
        x = torch.randn(3, 5, device=device)
        yield bench.Case("mean", "(3, 5)", "float32", lambda: x.mean(-1))

    monkeypatch.setattr(bench, "_cases", cases)
    assert main(["bench", "--json", "--device", device]) == 0
    (row,) = json.loads(capsys.readouterr().out)["microseconds"]
    for way in ("standard", "mode"):
        times = row[way].values() if device == "cuda" else [row[way]]
        assert all(each > 0 for each in times)
    assert main(["bench", "--device", device]) == 0
    assert "mean" in capsys.readouterr().out


def test_bench_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().out
