"""How many different answers does vLLM give to one prompt, sent many times among other traffic? Ideally one.

    python examples/deterministic_vllm_inference.py [--model NAME_OR_PATH] [--copies 300] [--json results.json]

One prompt is sent many times among requests of random lengths, all of them token ids, and answered greedily: by vLLM
as it is, by vLLM's batch-invariant mode, and by that mode with the kernels of bikernels behind it, which the plugin
of this package puts there (pip install "bikernels[vllm,cuda13]"). Each has a process of its own, is compiled and uses
CUDA graphs as vLLM does by default; prefixes are not cached, so that every copy is computed. The first pass over the
requests is not timed: they come in bursts of 1, 2, 4 up to 128, each answered before the next, so that
copies share batches of every size; and it asks for the log-probabilities of the tokens too, whose last bits show what
tokens hide. In the other passes all requests come at once, once for warming up and then timed.

Without --model it is a model of the Qwen3 architecture with random weights, made from the seed and saved in a
temporary folder, so no download is needed. The exit status is 1 if one of the modes failed, or if bikernels gave more
than one answer; the audit then says which operator of the model varies with the batch in PyTorch, if one does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

PLUGIN = "bikernels"
MODES = {
    "vLLM": {"VLLM_BATCH_INVARIANT": "0", "VLLM_PLUGINS": ""},
    "vLLM's batch-invariant mode": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": ""},
    "that mode with bikernels": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": PLUGIN},
}
"""The environment of each; VLLM_PLUGINS names the plugins to load."""
OURS = "that mode with bikernels"

LONGEST_PROMPT, FEWEST_TOKENS, MOST_TOKENS = 511, 20, 199
"""Of the other requests."""
BURSTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Request(NamedTuple):
    """A prompt as token ids, and how many tokens answer it."""

    prompt: list[int]
    new_tokens: int
    is_copy: bool


def traffic(vocabulary: int, options: argparse.Namespace) -> list[Request]:
    """The copies of one prompt among the other requests, in the order of their arrival."""
    numbers = random.Random(options.seed)

    def prompt(length: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(length)]

    asked = prompt(options.prompt_tokens)
    requests = [Request(asked, options.new_tokens, True) for _ in range(options.copies)]
    for _ in range(options.others):
        length, new_tokens = numbers.randint(1, LONGEST_PROMPT), numbers.randint(FEWEST_TOKENS, MOST_TOKENS)
        requests.append(Request(prompt(length), new_tokens, False))
    numbers.shuffle(requests)
    return requests


def bursts(requests: Sequence[Request]) -> list[Sequence[Request]]:
    """The requests in their order, in groups of BURSTS, again and again."""
    groups, start, sizes = [], 0, itertools.cycle(BURSTS)
    while start < len(requests):
        groups.append(requests[start : (start := start + next(sizes))])
    return groups


def save_random_model(folder: Path, options: argparse.Namespace) -> None:
    """Write the configuration of a Qwen3-architecture model and its weights, which are the same on every machine."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config

    head_size = 128
    heads = options.hidden_size // head_size
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_size,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = [(name, x.shape) for name, x in AutoModelForCausalLM.from_config(config).named_parameters()]

    def random_weight(index: int, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(options.seed * len(shapes) + index)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=generator)

    with ThreadPoolExecutor() as threads:
        weights = threads.map(random_weight, range(len(shapes)), [shape for _, shape in shapes])
        save_file(
            {name: weight for (name, _), weight in zip(shapes, weights, strict=True)}, folder / "model.safetensors"
        )
    config.save_pretrained(folder)


# ---- In the process of one mode --------------------------------------------------------------------------------------


def whose_linear(worker: Any) -> str:
    """The module of the function that vLLM's layers call in the batch-invariant mode."""
    from vllm.model_executor.layers import linear

    return str(linear.linear_batch_invariant.__module__)


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Answer the requests several times; what the copies were answered with, and how fast it went."""
    import torch
    import vllm

    longest = max(options.prompt_tokens + options.new_tokens, LONGEST_PROMPT + MOST_TOKENS)
    start = time.perf_counter()
    llm = vllm.LLM(
        options.model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        enable_prefix_caching=False,
        seed=options.seed,
    )
    seconds_to_start = time.perf_counter() - start
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    requests = traffic(vocabulary, options)

    def answer(requests: Sequence[Request], logprobs: int | None = None) -> list[Any]:
        """Of the copies."""
        parameters = [
            vllm.SamplingParams(
                temperature=0.0,
                max_tokens=request.new_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs if request.is_copy else None,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        return [output.outputs[0] for output, request in zip(outputs, requests, strict=True) if request.is_copy]

    # The log-probability of the chosen token alone.
    groups = bursts(requests)
    first = [one for group in groups for one in answer(group, logprobs=0)]
    in_every_bit = {
        tuple((token, of_step[token].logprob) for token, of_step in zip(one.token_ids, one.logprobs, strict=True))
        for one in first
    }
    seconds, completions = [], [[tuple(one.token_ids) for one in first]]
    for _ in range(1 + options.passes):
        start = time.perf_counter()
        answers = answer(requests)
        seconds.append(time.perf_counter() - start)
        completions.append([tuple(one.token_ids) for one in answers])
        print(f"{seconds[-1]:.3f} s", flush=True)
    seconds = seconds[1:]  # the first meets batches that were never as large
    tokens = sum(request.new_tokens for request in requests)
    return {
        "linear": llm.collective_rpc(whose_linear)[0],
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("vllm", "torch", "transformers", PLUGIN)},
        "seconds to start": round(seconds_to_start, 1),
        "tokens": tokens,
        "prompt tokens": sum(len(request.prompt) for request in requests),
        "tokens per second": [round(tokens / one) for one in seconds],
        **count(completions),
        "different in every bit": len(in_every_bit),
    }


def count(passes: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Any]:
    """How many different completions the copies have in each pass and in all of them, and where the first ones part."""
    different = [set(one) for one in passes]
    in_all = sorted(set.union(*different))
    first, *others = in_all
    parts = [next(i for i, (a, b) in enumerate(zip(first, other, strict=True)) if a != b) for other in others]
    return {
        "completions of a pass": len(passes[0]),
        "different in each pass": [len(one) for one in different],
        "different in all": len(in_all),
        "first token that differs": min(parts) + 1 if parts else None,
    }


# ---- If there is more than one answer --------------------------------------------------------------------------------


def where_bits_part(model: str, options: argparse.Namespace) -> str:
    """What the audit says of the model in the mode of bikernels, in PyTorch: vLLM's own kernels it cannot see."""
    import torch
    from transformers import AutoModelForCausalLM

    import bikernels_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    audited = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    audited.config.use_cache = False
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randint(audited.config.vocab_size, (16, options.prompt_tokens), generator=generator).to(device)
    with torch.inference_mode(), bikernels_torch.set_batch_invariant_mode():
        report = bikernels_torch.audit(audited, tokens, slices=(0, 7, (0, 2), (3, 11)))
    if report.varying:
        call = report.varying[0]
        return f"{call.place} {call.operator}: {call.reason}"
    return "no operator of the model in PyTorch; what is left is vLLM's: attention, its cache, what it compiles"


# ---- The program -----------------------------------------------------------------------------------------------------


def run_mode(name: str, arguments: Sequence[str], folder: Path, timeout: float) -> dict[str, Any] | None:
    """Serve in a process with the mode's environment, whose log is `folder`/NAME.log; None if it failed."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    log, result = folder / f"{slug}.log", folder / f"{slug}.json"
    command = [sys.executable, __file__, *arguments, "--serve", str(result)]
    settings = {
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `whose_linear` is sent to the workers of this machine
        "VLLM_CACHE_ROOT": str(folder / f"{slug}-cache"),
    }
    print(f"{name}: log in {log}", flush=True)
    with log.open("w") as output:
        child = subprocess.Popen(
            command,
            env=os.environ | settings | MODES[name],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            print(f"  stopped after {timeout:.0f} s")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
    if child.returncode or not result.exists():
        print("  failed; its last lines:\n" + "".join(f"    {line}\n" for line in log.read_text().splitlines()[-30:]))
        return None
    served: dict[str, Any] = json.loads(result.read_text())
    return served


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name on the Hugging Face hub or a path; default: random weights")
    parser.add_argument("--layers", type=int, default=8, help="of the model with random weights")
    parser.add_argument("--hidden-size", type=int, default=4096, help="of that model, a multiple of 128")
    parser.add_argument("--vocabulary", type=int, default=32768, help="of that model")
    parser.add_argument("--copies", type=int, default=300, help="how many times the prompt is sent")
    parser.add_argument("--others", type=int, default=300, help="how many other requests there are")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the prompt")
    parser.add_argument("--new-tokens", type=int, default=100, help="that answer it")
    parser.add_argument("--passes", type=int, default=3, help="timed ones over all requests, after two that are not")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the requests")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES), metavar="MODE")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for a mode")
    parser.add_argument("--folder", type=Path, help="for logs, caches and the model; default: a temporary one")
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # the file for the result of a mode's process
    options = parser.parse_args(arguments)
    if min(options.copies, options.new_tokens, options.prompt_tokens, options.passes) < 1 or options.others < 0:
        parser.error("--copies, --new-tokens, --prompt-tokens and --passes are at least 1, --others at least 0")
    if options.hidden_size % 128 or options.hidden_size < 128:
        parser.error("--hidden-size is a multiple of 128")
    return options


def require_plugin() -> None:
    """Exit unless vLLM would find the plugin."""
    if PLUGIN not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        sys.exit('vLLM finds no plugin "bikernels"; install this package: pip install ".[vllm,cuda13]"')


def report(results: dict[str, dict[str, Any] | None]) -> None:
    """Print the table."""
    width = max(map(len, results))
    print(f"\n{'':{width}}  {'different completions':24}  {'first differs':13}  {'in every bit':12}  tokens/s (median)")
    for name, result in results.items():
        if result is None:
            print(f"{name:{width}}  failed")
            continue
        copies, in_each = result["completions of a pass"], result["different in each pass"]
        different = f"{max(in_each)} of {copies}, {result['different in all']} in {len(in_each)} passes"
        token, speeds = result["first token that differs"], result["tokens per second"]
        print(
            f"{name:{width}}  {different:24}  {'-' if token is None else f'token {token}':13}  "
            f"{result['different in every bit']:<12}  {statistics.median(speeds):,.0f}  "
            f"({', '.join(f'{speed:,}' for speed in speeds)})"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modes, or be the process of one."""
    options = parse(arguments)
    if options.serve is not None:
        options.serve.write_text(json.dumps(serve(options)))
        return 0
    require_plugin()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        given = list(sys.argv[1:] if arguments is None else arguments)
        model = what = options.model
        if model is None:
            what = f"Qwen3 architecture, {options.layers} layers, hidden size {options.hidden_size}, random weights"
            model = str(folder / "model")
            Path(model).mkdir(exist_ok=True)
            save_random_model(Path(model), options)
            given += ["--model", model]
        print(
            f"{what}; seed {options.seed}\n{options.copies} copies of one prompt of {options.prompt_tokens} tokens "
            f"among {options.others} other requests, answered with {options.new_tokens} tokens",
            flush=True,
        )
        results = {name: run_mode(name, given, folder, options.timeout) for name in options.modes}
        ours = results.get(OURS)
        different = 1 if ours is None else max(ours["different in all"], ours["different in every bit"])
        part = where_bits_part(model, options) if different > 1 else None
    for result in results.values():
        if result is not None:
            versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
            print(f"\n{result['gpu']}; {versions}")
            break
    report(results)
    print("in every bit: completions of the first pass that differ in a token or in a bit of its log-probability")
    if options.json is not None:
        kept = ("copies", "others", "prompt_tokens", "new_tokens", "passes", "seed")
        settings = {
            "bursts": BURSTS,
            "model": what,
            "python": platform.python_version(),
            **{name: getattr(options, name) for name in kept},
        }
        options.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    if part is not None:
        print(f"\n{OURS}: {different} different completions. The first operator that varies with the batch: {part}")
        return 1
    if ours is not None and not ours["linear"].startswith("bikernels_torch"):
        print(f"\n{OURS}: its products were those of {ours['linear']}")
        return 1
    return int(any(result is None for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
