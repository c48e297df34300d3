"""How many different answers does a server give to one prompt, sent many times among other traffic? Ideally one.

    python examples/deterministic_inference.py [--model NAME_OR_PATH] [--copies 1000] [--cuda-graphs] [--json FILE]

A Hugging Face causal language model generates greedily under continuous batching (`continuous_batching.py`): requests
with prompts and completions of random lengths join and leave, so the batch is another one at every step. One prompt is
sent many times among them. The same requests run on the same schedule in standard PyTorch and in the batch-invariant
mode, eager and, on a GPU with --cuda-graphs, replayed from CUDA graphs; the model's code and the engine know nothing of
the mode.

Then the completion is scored as a trainer does it, all of its tokens in one prefill, and these log-probabilities are
compared with those that the sampler had.

Without --model it is a small model of the Qwen3 architecture with random weights, so no download is needed. The exit
status is 1 if the mode gives more than one answer, or a log-probability in another bit, in all of its runs together;
the audit then says which operator made the difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from continuous_batching import Engine, Request, common_prefix
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import bikernels
import bikernels_torch
from bikernels_torch import set_batch_invariant_mode

# ---- What is run -----------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Defaults that suit a machine."""

    copies: int
    new_tokens: int
    slots: int
    tokens_per_step: int
    dtype: torch.dtype
    hidden_size: int
    layers: int
    vocabulary: int


# A CPU takes float32: PyTorch's products of bfloat16 are slow on many.
SIZES = {
    "cpu": Size(100, 32, 16, 48, torch.float32, 128, 4, 2048),
    "cuda": Size(1000, 100, 256, 1024, torch.bfloat16, 4096, 8, 32768),
}
LONGEST_PROMPT = 64
STANDARD, MODE, IN_GRAPHS = "standard PyTorch", "batch-invariant mode", ", CUDA graphs"


def load_model(name: str | None, size: Size, device: str, seed: int) -> PreTrainedModel:
    """The model by its name or path; with None one with random weights, which are drawn on the device."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=size.dtype).to(device).eval()
    head_size = min(128, size.hidden_size // 4)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden_size // head_size,
        num_key_value_heads=max(1, size.hidden_size // head_size // 4),
        head_dim=head_size,
        # The usual 0.02 at a hidden size of 4096; the logits of narrower models are then spread as widely.
        initializer_range=1.28 * size.hidden_size**-0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=size.dtype).eval()


def traffic(
    vocabulary: int, copies: int, others: int, new_tokens: int, seed: int
) -> tuple[list[Request], list[Request]]:
    """The copies of one prompt, and all requests in the order of their arrival."""
    numbers = random.Random(seed)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(length)]

    asked = prompt(LONGEST_PROMPT // 2)
    same = [Request(list(asked), new_tokens) for _ in range(copies)]
    same[0].keep_distributions = True
    rest = [Request(prompt(numbers.randint(1, LONGEST_PROMPT)), numbers.randint(1, new_tokens)) for _ in range(others)]
    requests = same + rest
    numbers.shuffle(requests)
    return same, requests


# ---- One run, and what it gave ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run gave for the copies of the prompt."""

    completions: list[tuple[Hashable, ...]]
    logprobs: torch.Tensor  # (copies, tokens), float32
    scored: torch.Tensor  # (tokens,): those of the first completion, computed in one prefill
    kl: float  # of the sampler's distributions to those of the prefill, largest over the tokens
    new_tokens: int  # of all requests
    seconds: float
    batches: list[int]  # tokens of each step

    def in_bits(self) -> list[tuple[Hashable, ...]]:
        """The completions, each token with the bits of its log-probability."""
        bits = self.logprobs.view(torch.int32).tolist()
        return [tuple(zip(*pair, strict=True)) for pair in zip(self.completions, bits, strict=True)]

    def rescored(self) -> int:
        """How many log-probabilities of the first completion have other bits in the prefill."""
        return int((self.scored.view(torch.int32) != self.logprobs[0].view(torch.int32)).sum())

    def to_json(self) -> dict[str, Any]:
        """What is kept of it."""
        different, first = parting(self.completions)
        different_in_bits, first_in_bits = parting(self.in_bits())
        return {
            "different completions": different,
            "first token that differs": first,
            "different in every bit": different_in_bits,
            "first token that differs in a bit": first_in_bits,
            "log-probabilities with other bits in one prefill": self.rescored(),
            "largest KL to the prefill": self.kl,
            "tokens per second": round(self.new_tokens / self.seconds),
            "seconds": round(self.seconds, 2),
            "new tokens": self.new_tokens,
            "steps": len(self.batches),
            "tokens of a step": [min(self.batches), max(self.batches)],
            "share still identical": still_identical(self.completions),
            "share still identical in every bit": still_identical(self.in_bits()),
        }


def still_identical(completions: Sequence[tuple[Hashable, ...]]) -> list[float]:
    """For each length, the share of the largest group of completions that are the same so far."""
    lengths = range(1, len(completions[0]) + 1)
    return [Counter(c[:n] for c in completions).most_common(1)[0][1] / len(completions) for n in lengths]


def parting(completions: Sequence[tuple[Hashable, ...]]) -> tuple[int, int | None]:
    """How many are different, and from which token on, counted from 1; None if all are the same."""
    different = set(completions)
    if len(different) == 1:
        return 1, None
    return len(different), 1 + min(common_prefix(completions[0], other) for other in different - {completions[0]})


def run(model: PreTrainedModel, same: list[Request], requests: list[Request], engine: Engine, name: str) -> Run:
    """Serve the requests, then score the first completion."""
    total = sum(request.new_tokens for request in requests)
    with tqdm(total=total, desc=name, unit="token", leave=False) as bar:
        start = time.perf_counter()
        engine.run(requests, progress=bar.update)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    batches = list(engine.batches)
    first = same[0]
    scored, trainer = engine.score(first.sequence, len(first.prompt))
    sampler = torch.stack(first.distributions).double()
    kl = (sampler.exp() * (sampler - trainer.double())).sum(-1)
    return Run(
        completions=[tuple(request.tokens) for request in same],
        logprobs=torch.stack([torch.stack(request.logprobs) for request in same]).cpu(),
        scored=scored.cpu(),
        kl=kl.abs().max().item(),
        new_tokens=total,
        seconds=seconds,
        batches=batches,
    )


def where_bits_part(model: PreTrainedModel, vocabulary: int, seed: int) -> str:
    """The first operator of the model that the audit sees vary with the batch, in the mode if that is on."""
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(seed)
    # As in a step that only decodes, and as in one with prefills.
    for shape, slices in (((48, 1), (0, 5, (0, 3), (0, 17))), ((16, 24), (0, 7, (0, 2), (3, 11)))):
        tokens = torch.randint(vocabulary, shape, generator=generator).to(model.device)
        with torch.inference_mode():
            report = bikernels_torch.audit(model, tokens, slices=slices)
        if report.varying:
            call = report.varying[0]
            return f"{call.place} {call.operator}: {call.reason}"
    return "none at the batch sizes of the audit"


# ---- The record ------------------------------------------------------------------------------------------------------


def describe(settings: dict[str, Any], versions: dict[str, Any]) -> str:
    """What is run, on what."""
    return (
        f"{settings['device']}; {', '.join(f'{name} {version}' for name, version in versions.items())}\n"
        f"{settings['model']}: {settings['layers']} layers, hidden size {settings['hidden size']}, "
        f"{settings['parameters'] / 1e6:.1f} M parameters, {settings['dtype']}; seed {settings['seed']}\n"
        f"{settings['copies']} copies of one prompt of {settings['prompt tokens']} tokens among "
        f"{settings['other requests']} other requests, answered with {settings['new tokens']} tokens"
    )


def table(record: dict[str, Any]) -> str:
    """A line for each run."""

    def parted(different: int, first: int | None) -> str:
        return str(different) if first is None else f"{different}, from token {first}"

    runs = record["runs"]
    width = max(map(len, runs))
    lines = [
        f"{'':{width}}  {'different completions':22}  {'in every bit':22}  {'tokens/s':>8}  {'prefill':>10}  {'KL':>8}"
    ]
    for name, result in runs.items():
        tokens = parted(result["different completions"], result["first token that differs"])
        bits = parted(result["different in every bit"], result["first token that differs in a bit"])
        prefill = f"{result['log-probabilities with other bits in one prefill']} of {record['settings']['new tokens']}"
        lines.append(
            f"{name:{width}}  {tokens:22}  {bits:22}  {result['tokens per second']:>8}  {prefill:>10}  "
            f"{result['largest KL to the prefill']:>8.2g}"
        )
    return "\n".join(lines)


LINES = {
    STANDARD: ("tab:red", "-", 2.4),
    STANDARD + IN_GRAPHS: ("tab:orange", "--", 1.2),
    MODE: ("tab:blue", "-", 2.4),
    MODE + IN_GRAPHS: ("black", "--", 1.2),
}
"""Colour, style and width for each run; of lines that coincide both show."""


def draw(record: dict[str, Any], path: Path) -> bool:
    """The share of completions still identical against token position; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    settings = record["settings"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bikernels"}):
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained")
        for panel, key, what in zip(
            panels,
            ("share still identical", "share still identical in every bit"),
            ("tokens", "tokens and every bit of their log-probabilities"),
            strict=True,
        ):
            for name, result in record["runs"].items():
                shares = [100 * share for share in result[key]]
                colour, style, width = LINES[name]
                panel.plot(range(1, len(shares) + 1), shares, style, color=colour, linewidth=width, label=name)
            panel.set(xlabel="token of the completion", ylim=(0, 105), title=what)
        panels[0].set(ylabel="completions still identical, %")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(
            f"{settings['copies']} completions of one prompt among {settings['other requests']} other requests, "
            f"{settings['device']}"
        )
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
        pyplot.close(figure)
    return True


def show(record: dict[str, Any], picture: Path) -> int:
    """Print and draw what came of it; 1 if the mode failed."""
    batches = [size for result in record["runs"].values() for size in result["tokens of a step"]]
    print(f"steps of {min(batches)} to {max(batches)} tokens\n\n{table(record)}")
    print(
        "in every bit: log-probabilities of the tokens included; prefill: log-probabilities of a completion that have\n"
        "other bits when it is scored in one prefill; KL: the largest, of the sampler to that prefill"
    )
    if draw(record, picture):
        print(f"\npicture: {picture}")
    print(f"\nfirst operator that varies in standard PyTorch: {record['first operator that varies']['standard']}")
    where = record["first operator that varies"].get("mode")
    if where is None:
        print("In the mode there is one answer, and the prefill gives the sampler's log-probabilities in every bit.")
        return 0
    print(f"The mode gave other bits; first operator that varies in it: {where}")
    answers = record["different in every bit in all runs of the mode"]
    print(f"different completions in all of its runs together, in every bit: {answers}")
    return 1


def save(record: dict[str, Any], path: Path) -> None:
    """As JSON, a line for each run."""
    parts = {key: json.dumps(value) for key, value in record.items()}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(result)}" for name, result in record["runs"].items())
    parts["runs"] = f"{{\n{lines}\n }}"
    path.write_text("{\n" + ",\n".join(f" {json.dumps(key)}: {part}" for key, part in parts.items()) + "\n}\n")


# ---- The program -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name on the Hugging Face hub or a path; default: random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--copies", type=int, help="how many times the prompt is sent; default 1000 (cuda), 100 (cpu)")
    parser.add_argument("--others", type=int, help="how many other requests; default as many")
    parser.add_argument("--new-tokens", type=int, help="tokens of a completion; default 100 (cuda), 32 (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the prompts and the schedule")
    parser.add_argument("--cuda-graphs", action="store_true", help="serve from CUDA graphs, too, which needs a GPU")
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    parser.add_argument("--picture", type=Path, default=Path("deterministic_inference.png"))
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only print and draw such a record")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch.cuda.is_available() is False")
    if options.cuda_graphs and options.device != "cuda":
        parser.error("--cuda-graphs needs a GPU, and --device is cpu; leave it out")
    size = SIZES[options.device]
    options.copies = size.copies if options.copies is None else options.copies
    options.others = options.copies if options.others is None else options.others
    options.new_tokens = size.new_tokens if options.new_tokens is None else options.new_tokens
    if options.copies < 2 or options.others < 0 or options.new_tokens < 1:
        parser.error("--copies is at least 2, --others at least 0, --new-tokens at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; 1 if the mode gave more than one answer, or other bits in the prefill."""
    options = parse(arguments)
    if options.draw is not None:
        record = json.loads(options.draw.read_text())
        print(describe(record["settings"], record["versions"]))
        return show(record, options.picture)
    size = SIZES[options.device]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bikernels": bikernels.__version__,
        "contract": bikernels.contract_version,
    }
    model = load_model(options.model, size, options.device, options.seed)
    config = model.config.get_text_config()
    settings = {
        "device": where,
        "model": options.model or "Qwen3 architecture, random weights",
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "vocabulary": config.vocab_size,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": options.seed,
        "copies": options.copies,
        "other requests": options.others,
        "prompt tokens": LONGEST_PROMPT // 2,
        "new tokens": options.new_tokens,
        "requests at a time": size.slots,
        "tokens of a step, at most": size.tokens_per_step,
    }
    print(describe(settings, versions), flush=True)

    def serve(name: str, graphs: bool) -> Run:
        engine = Engine(
            model,
            slots=size.slots,
            max_length=LONGEST_PROMPT + options.new_tokens,
            tokens_per_step=size.tokens_per_step,
            graphs=graphs,
        )
        # Kernels are compiled at first use, which is not timed.
        engine.run(traffic(config.vocab_size, 1, size.slots, options.new_tokens, options.seed)[1])
        engine.random.seed(options.seed)
        engine.batches.clear()
        same, requests = traffic(config.vocab_size, options.copies, options.others, options.new_tokens, options.seed)
        return run(model, same, requests, engine, name)

    ways = {"": False, IN_GRAPHS: True} if options.cuda_graphs else {"": False}
    standard = {STANDARD + way: serve(STANDARD + way, graphs) for way, graphs in ways.items()}
    with set_batch_invariant_mode():
        mode = {MODE + way: serve(MODE + way, graphs) for way, graphs in ways.items()}
    answers, _ = parting([completion for result in mode.values() for completion in result.in_bits()])
    varies = {"standard": where_bits_part(model, config.vocab_size, options.seed)}
    if answers != 1 or any(result.rescored() or result.kl != 0 for result in mode.values()):
        with set_batch_invariant_mode():
            varies["mode"] = where_bits_part(model, config.vocab_size, options.seed)
    record = {
        "settings": settings,
        "versions": versions,
        "runs": {name: result.to_json() for name, result in {**standard, **mode}.items()},
        "different in every bit in all runs of the mode": answers,
        "first operator that varies": varies,
    }
    if options.json is not None:
        save(record, options.json)
    return show(record, options.picture)


if __name__ == "__main__":
    sys.exit(main())
