"""The example that measures vLLM, on a stand-in of vLLM: what it counts, and when it fails."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "examples" / "deterministic_vllm_inference.py"
SMALL = ["--copies", "5", "--others", "3", "--new-tokens", "4", "--passes", "2", "--model", "a-model"]


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("deterministic_vllm_inference", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_traffic(example: Any) -> None:
    """The same at every call; copies of one prompt among others."""
    options = example.parse(SMALL)
    requests = example.traffic(100, options)
    assert requests == example.traffic(100, options) != example.traffic(100, example.parse([*SMALL, "--seed", "1"]))
    copies = [request for request in requests if request.is_copy]
    assert len(requests) == 8 and len(copies) == 5
    assert all(copy == copies[0] and len(copy.prompt) == 64 and copy.new_tokens == 4 for copy in copies)
    assert [request.is_copy for request in requests] != sorted((request.is_copy for request in requests), reverse=True)


def test_bursts(example: Any) -> None:
    """All requests in their order, alone and in company."""
    requests = example.traffic(100, example.parse(["--copies", "300", "--others", "300"]))
    groups = example.bursts(requests)
    assert [request for group in groups for request in group] == requests
    assert tuple(map(len, groups[:8])) == example.BURSTS and sum(map(len, groups)) == 600


def test_count(example: Any) -> None:
    same = [(1, 2, 3)] * 3
    assert example.count([same, same]) == {
        "completions of a pass": 3,
        "different in each pass": [1, 1],
        "different in all": 1,
        "first token that differs": None,
    }
    counted = example.count([[(1, 2, 3), (1, 2, 4), (1, 3, 3)], same, [(1, 2, 5)] * 3])
    assert counted["different in each pass"] == [3, 1, 1]
    assert counted["different in all"] == 4
    assert counted["first token that differs"] == 2


def stand_in(differs: str) -> Any:
    """A vLLM whose third copy gets another token, or another bit of a log-probability, or nothing else."""

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            assert model == "a-model" and not settings["enable_prefix_caching"] and settings["skip_tokenizer_init"]
            self.copies = 0
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(get_vocab_size=lambda: 50))

        def collective_rpc(self, method: Any) -> list[str]:
            return ["bikernels_torch.vllm_plugin"]

        def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> list[Any]:
            outputs = []
            for one in parameters:
                tokens = list(range(one.max_tokens))
                self.copies += one.max_tokens == 4
                third = self.copies % 5 == 3 and one.max_tokens == 4
                logprobs = [{token: types.SimpleNamespace(logprob=-1.0)} for token in tokens]
                if third and differs == "token":
                    tokens[2], logprobs[2] = 7, {7: logprobs[2][2]}
                if third and differs == "bit":
                    logprobs[1][1].logprob = -1.0 - 2**-23
                answer = types.SimpleNamespace(token_ids=tokens, logprobs=None if one.logprobs is None else logprobs)
                outputs.append(types.SimpleNamespace(outputs=[answer]))
            return outputs

    return types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: types.SimpleNamespace(**settings))


@pytest.mark.parametrize(("differs", "tokens", "bits"), [("", 1, 1), ("token", 2, 2), ("bit", 1, 2)])
def test_serve(example: Any, monkeypatch: pytest.MonkeyPatch, differs: str, tokens: int, bits: int) -> None:
    monkeypatch.setitem(sys.modules, "vllm", stand_in(differs))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(example.importlib.metadata, "version", lambda name: "0.0")
    served = example.serve(example.parse(SMALL))
    json.dumps(served)
    assert served["different in each pass"] == [tokens] * 4
    assert served["different in every bit"] == bits
    assert served["first token that differs"] == (3 if tokens > 1 else None)
    assert len(served["tokens per second"]) == 2


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"different in all": 2}, 1),
        ({"different in every bit": 2}, 1),
        ({"linear": "vllm.model_executor.layers.batch_invariant"}, 1),
        (None, 1),
    ],
)
def test_status(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, changes: Any, status: int
) -> None:
    good = {
        **example.count([[(1, 2)] * 3]),
        "different in every bit": 1,
        "linear": "bikernels_torch.vllm_plugin",
        "tokens per second": [10, 20, 30],
        "gpu": "a GPU",
        "versions": {"vllm": "0.0"},
    }
    standard = {**good, "different in all": 3, "linear": "vllm"}  # what vLLM's own modes give is no failure
    monkeypatch.setattr(example, "require_plugin", lambda: None)
    ours = None if changes is None else {**good, **changes}
    monkeypatch.setattr(example, "run_mode", lambda name, *_: ours if name == example.OURS else standard)
    monkeypatch.setattr(example, "where_bits_part", lambda *_: "layers.0 aten.mm")
    results = tmp_path / "results.json"
    assert example.main([*SMALL, "--json", str(results)]) == status
    assert json.loads(results.read_text())["results"][example.OURS] == ours
    assert ("layers.0 aten.mm" in capsys.readouterr().out) == any("different" in name for name in changes or {})


def test_the_audit_is_asked(example: Any, tmp_path: Path) -> None:
    """Of the model that vLLM was given: nothing of it varies in the mode."""
    small = ["--layers", "1", "--hidden-size", "128", "--vocabulary", "64", "--prompt-tokens", "5"]
    options = example.parse(small)
    example.save_random_model(tmp_path, options)
    assert "what is left is vLLM's" in example.where_bits_part(str(tmp_path), options)


def test_a_mode_that_fails(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Its last words are shown; a wrong argument ends the process before anything is imported."""
    assert example.run_mode("vLLM", ["--copies", "none"], tmp_path, timeout=60) is None
    assert "invalid int value" in capsys.readouterr().out


def test_it_needs_the_plugin(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "PLUGIN", "a plugin that is not installed")
    with pytest.raises(SystemExit, match="vLLM finds no plugin"):
        example.require_plugin()
