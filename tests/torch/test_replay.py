"""A completion recorded on a GPU, computed again on this CPU: every log-probability has the same bits."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers")
pytest.importorskip("tqdm", reason="tqdm is not installed; pip install tqdm")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def replay() -> Iterator[Any]:
    """The example as a module, imported as the script imports its neighbours."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("replay_on_cpu")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def recorded(replay: Any) -> dict[str, Any]:
    return json.loads((EXAMPLES / "recordings" / "hopper.json").read_text())


def test_the_recordings(replay: Any, recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The program as it is called."""
    assert (recorded["arithmetic"], len(recorded["tokens"])) == ("tc16f25", replay.SIZE.new_tokens)
    assert len(set(recorded["logprobs"])) > 40  # so that one answer to everything would not do
    assert replay.main([]) == 0
    assert capsys.readouterr().out.count("the same in every bit") == len(replay.RECORDINGS)


def changed(recorded: dict[str, Any], key: str, place: int, value: Any) -> dict[str, Any]:
    return recorded | {key: [*recorded[key][:place], value, *recorded[key][place + 1 :]]}


def test_a_bit_that_differs_is_named(
    replay: Any, recorded: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = int(recorded["logprobs"][5], 16)
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(changed(recorded, "logprobs", 5, f"{bits ^ 1:08x}")))
    assert replay.main([str(file)]) == 1
    printed = capsys.readouterr().out
    assert "first in token 6 of the completion: its log-probability is" in printed
    assert f"(0x{bits:08x}) here and was" in printed
    other = (recorded["tokens"][7] + 1) % replay.SIZE.vocabulary
    cases = {
        "token 10 of the completion: the log-probability of another": changed(recorded, "distributions", 9, "0" * 16),
        "token 8 of the completion": changed(recorded, "tokens", 7, other),
        "the model's weights": recorded | {"weights": "0" * 64},
        "record it again": recorded | {"contract_version": -1},
    }
    for named, case in cases.items():
        assert named in replay.first_difference(case)


def test_another_class_differs(replay: Any, recorded: dict[str, Any]) -> None:
    assert "token 1 of" in replay.first_difference(recorded | {"arithmetic": "fma32"})


def test_pytorch_s_functions_differ(replay: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where no rounding hides a bit; what a CPU decoded stands in for a GPU's."""
    monkeypatch.setattr(replay, "SIZE", replay.SIZE._replace(copies=1, new_tokens=5))
    monkeypatch.setattr(replay, "OTHERS", 2)
    recorded = replay.record("float32", 1, "cpu")
    assert replay.first_difference(recorded) is None
    mode = replay.set_batch_invariant_mode
    monkeypatch.setattr(replay, "digest_of_weights", lambda model: recorded["weights"])
    monkeypatch.setattr(replay, "set_batch_invariant_mode", lambda portable: mode())
    assert "token 1 of" in replay.first_difference(recorded)


def test_a_recording_needs_a_gpu(
    replay: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        replay.main(["--record", str(tmp_path / "recording.json")])
    assert "--record needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_this_machine_s_gpu(replay: Any, dtype: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False")
    file = tmp_path / "recording.json"
    assert replay.main(["--record", str(file), "--dtype", dtype, "--seed", "1"]) == 0
    assert replay.main([str(file)]) == 0
