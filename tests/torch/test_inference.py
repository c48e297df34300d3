"""A token's logits are the same bits however it is computed: in a prefill, in chunks, decoding, behind a prefix."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bikernels
import bikernels_torch

from .helpers import same_bits

pytest.importorskip("transformers", reason="transformers is not installed; pip install transformers")

EXAMPLES = Path(__file__).parents[2] / "examples"
VOCABULARY, PROMPT, NEW = 211, 29, 9


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example as a module, imported as the script imports its neighbour."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("deterministic_inference")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def batching(example: Any) -> Any:
    return sys.modules["continuous_batching"]


@pytest.fixture(params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, example: Any, device: str) -> Any:
    size = example.Size(0, 0, 0, 0, getattr(torch, request.param), 64, 2, VOCABULARY)
    return example.load_model(None, size, device, seed=1)


@pytest.fixture(params=["native", "tc16f25"])
def mode(request: pytest.FixtureRequest, model: Any) -> Iterator[None]:
    """The mode, also in the arithmetic of a Hopper GPU's tensor cores, which the CPU computes too."""
    with contextlib.ExitStack() as stack:
        if request.param != "native":
            if model.dtype is not torch.bfloat16 or model.device.type != "cpu":
                pytest.skip(
                    f"{request.param} is a class of bfloat16 and float16; a GPU has it as its own or not at all"
                )
            stack.enter_context(bikernels.use_arithmetic(request.param))
        stack.enter_context(bikernels_torch.set_batch_invariant_mode())
        yield


def engine(batching: Any, model: Any, slots: int = 6, tokens_per_step: int = 16, seed: int = 0, **options: Any) -> Any:
    return batching.Engine(model, slots=slots, max_length=64, tokens_per_step=tokens_per_step, seed=seed, **options)


def tokens(seed: int, count: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(VOCABULARY) for _ in range(count)]


def sampled(batching: Any, prompt: list[int]) -> Any:
    return batching.Request(list(prompt), NEW, keep_distributions=True)


def traffic(batching: Any, count: int, seed: int) -> list[Any]:
    numbers = random.Random(seed)
    return [
        batching.Request(tokens(seed + i, numbers.randint(1, 40)), numbers.randint(1, 2 * NEW)) for i in range(count)
    ]


@pytest.mark.usefixtures("mode")
def test_prefill_chunks_decoding_and_prefix_give_the_same_logits(batching: Any, model: Any) -> None:
    sequence = tokens(5, PROMPT + NEW)
    whole = engine(batching, model).score(sequence, 1)[1]  # one prefill: the distribution after every token

    @torch.inference_mode()
    def computed(chunks: list[int], prefix: int = 0) -> Any:
        """The distributions when the tokens are computed so many at a time, the first `prefix` taken from another."""
        e = engine(batching, model)
        if prefix:
            other = batching.Request([*sequence[:prefix], *tokens(6, 3)], 1)
            e._join(other, reuse=False)
            e._forward([(other, prefix + 3)], [])
        request = batching.Request(sequence[:-1], 1)
        e._join(request, reuse=bool(prefix))
        assert request.cached == prefix
        return torch.cat([e._forward([(request, chunk)], list(range(chunk))) for chunk in chunks])

    length = len(sequence) - 1
    assert same_bits(computed([1] * length), whole)
    assert same_bits(computed([PROMPT, *[1] * (NEW - 1)]), whole)
    assert same_bits(computed([7, 16, 1, length - 24]), whole)
    assert same_bits(computed([4, length - 21], prefix=17), whole[17:])


@pytest.mark.usefixtures("mode")
def test_completion_and_logprobs_do_not_depend_on_traffic(batching: Any, model: Any) -> None:
    prompt = tokens(1, PROMPT)
    alone = sampled(batching, prompt)
    engine(batching, model).run([alone])
    for slots, tokens_per_step, seed in ((3, 5, 1), (6, 16, 2), (16, 64, 3)):
        copies = [sampled(batching, prompt) for _ in range(3)]
        others = traffic(batching, 9, seed)
        requests = [*others[:4], copies[0], copies[1], *others[4:], copies[2]]
        e = engine(batching, model, slots, tokens_per_step, seed)
        e.run(requests)
        assert len(set(e.batches)) > 3  # the batch did change
        assert len(e.free) == slots
        assert all(len(request.tokens) == request.new_tokens for request in requests)
        for copy in copies:
            assert copy.tokens == alone.tokens
            assert same_bits(torch.stack(copy.distributions), torch.stack(alone.distributions))


@pytest.mark.usefixtures("mode")
def test_scoring_in_one_prefill_gives_the_samplers_logprobs(batching: Any, model: Any) -> None:
    request = sampled(batching, tokens(2, PROMPT))
    e = engine(batching, model)
    e.run([*traffic(batching, 6, 1), request])
    logprobs, distributions = e.score(request.sequence, len(request.prompt))
    assert same_bits(logprobs, torch.stack(request.logprobs))
    sampler = torch.stack(request.distributions)
    assert same_bits(distributions, sampler)
    assert (sampler.exp() * (sampler - distributions)).sum() == 0  # KL


@pytest.mark.usefixtures("mode")
def test_graphs_give_the_bits_of_eager_steps(
    batching: Any, model: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, which has no CUDA graphs, what a graph would replay is computed: a padded batch of single tokens."""
    sizes, capture = [], batching.capture if device == "cuda" else lambda compute, *_: compute

    def counted(compute: Any, *arguments: Any) -> Any:
        replay = capture(compute, *arguments)

        def replayed() -> Any:
            answer = replay()
            sizes.append(len(answer.best))
            return answer

        return replayed

    monkeypatch.setattr(batching, "capture", counted)
    steps = []
    runs = []
    for graphs in (False, True):
        e = engine(batching, model, slots=20, tokens_per_step=44, graphs=graphs)
        requests = [sampled(batching, tokens(8, PROMPT)), *traffic(batching, 24, 4), sampled(batching, tokens(9, 1))]
        for request in requests:
            request.keep_distributions = True
        e.run(requests)
        steps.append(e.batches)
        runs.append(requests)
    assert steps[0] == steps[1]
    assert len(sizes) == len(steps[1])  # no step was eager
    assert len(set(sizes)) > 2
    for eager, replayed in zip(*runs, strict=True):
        assert eager.tokens == replayed.tokens
        assert same_bits(torch.stack(eager.logprobs), torch.stack(replayed.logprobs))
        assert same_bits(torch.stack(eager.distributions), torch.stack(replayed.distributions))


def test_graph_sizes(batching: Any) -> None:
    assert batching.graph_sizes(5) == [5]
    assert batching.graph_sizes(30) == [8, 16, 24, 30]
    sizes = batching.graph_sizes(1000)
    assert sizes[-1] == 1000
    assert all(0 < b - a <= max(8, b // 5) for a, b in itertools.pairwise(sizes))


@pytest.mark.usefixtures("mode")
def test_slots_are_cleared(batching: Any, model: Any) -> None:
    """Beside a longer request the attention reads a slot to the end, where weights of 0 meet what was left there."""
    prompt = tokens(3, PROMPT)
    expected, again = sampled(batching, prompt), sampled(batching, prompt)
    engine(batching, model).run([expected])
    e = engine(batching, model, slots=2, tokens_per_step=64)
    with torch.inference_mode():
        before = [batching.Request([1], 1) for _ in range(2)]
        for request in before:
            e._join(request)
        for cache in (*e.keys, *e.values):
            cache.fill_(float("nan"))
        for request in before:
            e._leave(request)
    e.run([batching.Request(tokens(4, 64 - 2 * NEW), 2 * NEW), again])
    assert same_bits(torch.stack(again.distributions), torch.stack(expected.distributions))


def test_engine_computes_the_models_own_logits(batching: Any, model: Any) -> None:
    """Against the model's code with its own attention: a cache or a mask that is wrong would show."""
    if model.dtype is not torch.float32:
        pytest.skip("closeness is checked in float32")
    request = sampled(batching, tokens(7, PROMPT))
    engine(batching, model, tokens_per_step=6).run([*traffic(batching, 5, 2), request])
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([request.sequence[:-1]], device=model.device), use_cache=False).logits[
            0, PROMPT - 1 :
        ]
    torch.testing.assert_close(torch.log_softmax(logits, -1), torch.stack(request.distributions), atol=1e-4, rtol=1e-4)


def test_errors_name_the_argument(batching: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="tokens_per_step is 3 with slots=6; pass at least 6"):
        engine(batching, model, tokens_per_step=3)
    if model.device.type == "cpu":
        with pytest.raises(ValueError, match="graphs=True with a model on cpu; CUDA graphs need a GPU"):
            engine(batching, model, graphs=True)
    e = engine(batching, model)
    with pytest.raises(ValueError, match="first is 0 of 3 tokens"):
        e.score([1, 2, 3], 0)
    for prompt, new in (([], 1), ([1], 0), ([1] * 60, 5)):
        with pytest.raises(ValueError, match="at most max_length=64"):
            e.run([batching.Request(prompt, new)])


def test_sliding_windows_are_refused(batching: Any) -> None:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match=r"sliding_window=8.*choose a model without"):
        engine(batching, model).run([batching.Request([1], 1)])


def test_the_example_runs(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program as it is called, with a model that was saved to a folder."""
    size = example.Size(0, 0, 0, 0, torch.float32, 64, 2, VOCABULARY)
    example.load_model(None, size, "cpu", seed=1).save_pretrained(tmp_path / "model")
    picture, record = tmp_path / "picture.svg", tmp_path / "record.json"
    arguments = ["--device", "cpu", "--copies", "4", "--new-tokens", "6", "--picture", str(picture)]
    assert example.main([*arguments, "--model", str(tmp_path / "model"), "--json", str(record)]) == 0
    printed = capsys.readouterr().out
    assert "4 copies of one prompt of 32 tokens among 4 other requests" in printed
    assert "batch-invariant mode  1 " in printed
    assert "0 of 6         0" in printed
    assert picture.exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert json.loads(record.read_text())["runs"]["batch-invariant mode"]["different in every bit"] == 1
    drawn = picture.read_bytes() if picture.exists() else None
    assert example.main(["--draw", str(record), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out == printed
    assert drawn is None or picture.read_bytes() == drawn


def small(example: Any, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Let the example be one of few requests to a small model."""
    monkeypatch.setitem(example.SIZES, device, example.Size(2, 2, 8, 40, torch.float32, 64, 1, VOCABULARY))


def test_the_example_fails_if_a_bit_differs(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example.Run, "rescored", lambda _: 1)
    small(example, monkeypatch, "cpu")
    assert example.main(["--device", "cpu", "--picture", str(tmp_path / "picture.png")]) == 1
    assert "The mode gave other bits; first operator that varies in it: none" in capsys.readouterr().out


def test_the_example_names_an_operator_that_varies(
    example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a layer whose result depends on how many tokens there are, as a kernel's may."""
    load = example.load_model

    def load_with_fault(*arguments: Any) -> Any:
        model = load(*arguments)
        gate = model.model.layers[0].mlp.gate_proj
        gate.register_forward_hook(lambda _, given, out: out * (1 + out[..., 0].numel() / 1024))
        return model

    monkeypatch.setattr(example, "load_model", load_with_fault)
    small(example, monkeypatch, device)
    arguments = ["--device", device, "--copies", "9", "--picture", str(tmp_path / "picture.png")]
    if device == "cuda":
        arguments.append("--cuda-graphs")
    assert example.main(arguments) == 1
    *_, last, answers = capsys.readouterr().out.splitlines()
    assert "The mode gave other bits; first operator that varies in it: model.layers.0.mlp" in last
    assert "aten::mul" in last
    assert int(answers.rpartition(" ")[2]) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_the_example_runs_in_graphs(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(example, monkeypatch, "cuda")
    record = tmp_path / "record.json"
    arguments = ["--device", "cuda", "--copies", "20", "--new-tokens", "12", "--cuda-graphs"]
    assert example.main([*arguments, "--json", str(record), "--picture", str(tmp_path / "picture.png")]) == 0
    recorded = json.loads(record.read_text())
    assert len(recorded["runs"]) == 4
    assert recorded["different in every bit in all runs of the mode"] == 1


def test_the_example_says_that_graphs_need_a_gpu(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        example.main(["--device", "cpu", "--cuda-graphs"])
    assert "--cuda-graphs needs a GPU, and --device is cpu; leave it out" in capsys.readouterr().err


def test_counts_and_shares(example: Any) -> None:
    completions = [(1, 2, 3), (1, 2, 4), (1, 2, 3), (5, 2, 3)]
    assert example.parting(completions) == (3, 1)
    assert example.parting(completions[:3]) == (2, 3)
    assert example.parting([(1, 2)] * 3) == (1, None)
    assert example.still_identical(completions) == [0.75, 0.75, 0.5]
