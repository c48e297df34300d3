"""How many different answers does a server give to one prompt, sent many times among other traffic? Ideally one.

    python examples/deterministic_inference.py [--model NAME_OR_PATH] [--copies 1000] [--device cuda|cpu]

A Hugging Face causal language model generates greedily under continuous batching (`continuous_batching.py`): requests
with prompts and completions of random lengths join and leave, so the batch is another one at every step. One prompt is
sent many times among them. The same requests run on the same schedule twice, in standard PyTorch and in the
batch-invariant mode; the model's code and the engine know nothing of the mode.

Then the completion is scored as a trainer does it, all of its tokens in one prefill, and these log-probabilities are
compared with those that the sampler had.

Without --model it is a small model of the Qwen3 architecture with random weights, so no download is needed. The exit
status is 1 if the mode gives more than one answer, or a log-probability in another bit; the audit then says which
operator made the difference.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

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


def load_model(name: str | None, size: Size, device: str, seed: int) -> PreTrainedModel:
    """The model by its name or path; with None one with random weights."""
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
    torch.manual_seed(seed)  # on the CPU, so that the weights do not depend on the device
    return AutoModelForCausalLM.from_config(config, dtype=size.dtype).to(device).eval()


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
    tokens_per_second: float
    largest_batch: int
    smallest_batch: int

    def in_bits(self) -> list[tuple[Hashable, ...]]:
        """The completions, each token with the bits of its log-probability."""
        bits = self.logprobs.view(torch.int32).tolist()
        return [tuple(zip(*pair, strict=True)) for pair in zip(self.completions, bits, strict=True)]

    def rescored(self) -> int:
        """How many log-probabilities of the first completion have other bits in the prefill."""
        return int((self.scored.view(torch.int32) != self.logprobs[0].view(torch.int32)).sum())


def still_identical(completions: Sequence[tuple[Hashable, ...]]) -> list[float]:
    """For each length, the share of the largest group of completions that are the same so far."""
    lengths = range(1, len(completions[0]) + 1)
    return [Counter(c[:n] for c in completions).most_common(1)[0][1] / len(completions) for n in lengths]


def how_many(completions: Sequence[tuple[Hashable, ...]]) -> str:
    """How many are different, and where they first part."""
    different = len(set(completions))
    if different == 1:
        return "1"
    shared = min(common_prefix(completions[0], other) for other in completions)
    return f"{different}, from token {shared + 1}"


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
        tokens_per_second=total / seconds,
        largest_batch=max(batches),
        smallest_batch=min(batches),
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


# ---- The picture -----------------------------------------------------------------------------------------------------


def draw(runs: dict[str, Run], title: str, path: Path) -> bool:
    """The share of completions still identical against token position; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (name, result), colour in zip(runs.items(), ("tab:red", "tab:blue"), strict=True):
        for in_bits, style, what in ((False, "-", "tokens"), (True, "--", "log-probabilities, every bit")):
            completions = result.in_bits() if in_bits else result.completions
            shares = [100 * share for share in still_identical(completions)]
            axes.plot(range(1, len(shares) + 1), shares, style, color=colour, label=f"{name}: {what}")
    axes.set(xlabel="token of the completion", ylabel="completions still identical, %", ylim=(0, 105), title=title)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


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
    parser.add_argument("--picture", type=Path, default=Path("deterministic_inference.png"))
    options = parser.parse_args(arguments)
    size = SIZES[options.device]
    options.copies = size.copies if options.copies is None else options.copies
    options.others = options.copies if options.others is None else options.others
    options.new_tokens = size.new_tokens if options.new_tokens is None else options.new_tokens
    if options.copies < 2 or options.others < 0 or options.new_tokens < 1:
        parser.error("--copies is at least 2, --others at least 0, --new-tokens at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both; 1 if the mode gave more than one answer, or other bits in the prefill."""
    options = parse(arguments)
    size = SIZES[options.device]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"bikernels {bikernels.__version__}, contract version {bikernels.contract_version}"
    )
    model = load_model(options.model, size, options.device, options.seed)
    vocabulary = model.config.get_text_config().vocab_size
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{options.model or 'Qwen3 architecture, random weights'}: {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{dtype}; seed {options.seed}\n{options.copies} copies of one prompt among {options.others} other requests, "
        f"answered with {options.new_tokens} tokens"
    )

    def serve(name: str) -> Run:
        def engine() -> Engine:
            return Engine(
                model,
                slots=size.slots,
                max_length=LONGEST_PROMPT + options.new_tokens,
                tokens_per_step=size.tokens_per_step,
                seed=options.seed,
            )

        # Kernels are compiled at first use, which is not timed.
        engine().run(traffic(vocabulary, 1, size.slots, min(4, options.new_tokens), options.seed)[1])
        same, requests = traffic(vocabulary, options.copies, options.others, options.new_tokens, options.seed)
        return run(model, same, requests, engine(), name)

    runs = {"standard PyTorch": serve("standard PyTorch")}
    with set_batch_invariant_mode():
        runs["batch-invariant mode"] = mode = serve("batch-invariant mode")

    print(f"steps of {mode.smallest_batch} to {mode.largest_batch} tokens\n")
    width = max(map(len, runs))
    print(
        f"{'':{width}}  {'different completions':22}  {'in every bit':22}  {'tokens/s':>8}  {'prefill':>9}  {'KL':>8}"
    )
    for name, result in runs.items():
        print(
            f"{name:{width}}  {how_many(result.completions):22}  {how_many(result.in_bits()):22}  "
            f"{result.tokens_per_second:>8.0f}  {f'{result.rescored()} of {options.new_tokens}':>9}  {result.kl:>8.2g}"
        )
    print(
        "in every bit: log-probabilities of the tokens included; prefill: log-probabilities of a completion that have\n"
        "other bits when it is scored in one prefill; KL: the largest, of the sampler to that prefill"
    )

    failed = len(set(mode.in_bits())) != 1 or mode.rescored() != 0 or mode.kl != 0
    title = f"{options.copies} completions of one prompt among {options.others} others, {dtype}"
    if draw(runs, title, options.picture):
        print(f"\npicture: {options.picture}")
    print(f"\nfirst operator that varies in standard PyTorch: {where_bits_part(model, vocabulary, options.seed)}")
    if failed:
        with set_batch_invariant_mode():
            where = where_bits_part(model, vocabulary, options.seed)
        print(f"The mode gave other bits; first operator that varies in it: {where}")
    else:
        print("In the mode there is one answer, and the prefill gives the sampler's log-probabilities in every bit.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
