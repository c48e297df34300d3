"""Compute again, on a CPU, what a GPU answered: every log-probability has to have the same bits.

    python examples/replay_on_cpu.py [FILE ...]         compute these again (default: the recordings beside this script)
    python examples/replay_on_cpu.py --record FILE      record on this machine's GPU

A recording is a prompt, the tokens with which a small language model, in bfloat16 or in float32, answered it on a GPU,
in the middle of other traffic, and their log-probabilities. The model is made again from the seed of its weights, and
all tokens are scored in one prefill, in the arithmetic class that the GPU had (in bfloat16 that of its tensor cores),
which a CPU computes too. Both sides are in `set_batch_invariant_mode(portable=True)`: exp, silu, rsqrt, sin, cos and
the like are bikernels' own there, and the same on every device. In float32 one bit of theirs would show; the rounding
to bfloat16 hides most of them.

The exit status is 1 if a bit differs; the first place is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from continuous_batching import Engine
from deterministic_inference import LONGEST_PROMPT, Size, load_model, traffic
from transformers import PreTrainedModel

import bikernels
from bikernels_torch import set_batch_invariant_mode

RECORDINGS = sorted(Path(__file__).with_name("recordings").glob("*.json"))
SIZE = Size(
    copies=2,
    new_tokens=48,
    slots=16,
    tokens_per_step=64,
    dtype=torch.bfloat16,
    hidden_size=256,
    layers=4,
    vocabulary=4096,
)
OTHERS = 40


# ---- The model -------------------------------------------------------------------------------------------------------


def make_model(size: Size, seed: int) -> PreTrainedModel:
    """The model on the CPU, with the same weights on every machine. To be called in the portable mode, in which the
    frequencies of the rotary embedding are the same too.
    """
    model = load_model(None, size, "cpu", seed)
    spread = model.config.initializer_range
    numbers = np.random.RandomState(seed)  # its stream is frozen, that of NumPy's newer generator is not
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:  # the norms' weights are 1
            # Normal enough: sums of four integers, which are exact, times one number. torch's normal_ calls functions
            # that differ from CPU to CPU.
            drawn = numbers.randint(0, 1 << 16, (4, weight.numel())).sum(0) - 2 * 65535
            scaled = drawn.astype(np.float32) * np.float32(spread / (65536 / 3**0.5))
            weight.data.copy_(torch.from_numpy(scaled).view(weight.shape))
    return model


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """Of all their bytes."""
    found = hashlib.sha256()
    for one in tensors:
        found.update(one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_weights(model: PreTrainedModel) -> str:
    """Of parameters and buffers, in the order of their names."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return digest([named[name] for name in sorted(named)])


# ---- Recording -------------------------------------------------------------------------------------------------------


def record(dtype: str, seed: int, device: str = "cuda:0") -> dict[str, Any]:
    """Serve one prompt among others, and write down what the first copy was answered."""
    arithmetic = next(one.arithmetic for one in bikernels.backends().values() if device in one.chosen_for)
    with set_batch_invariant_mode(portable=True):
        model = make_model(SIZE._replace(dtype=getattr(torch, dtype)), seed)
        weights = digest_of_weights(model)
        model.to(device)
        same, requests = traffic(SIZE.vocabulary, SIZE.copies, OTHERS, SIZE.new_tokens, seed)
        engine = Engine(
            model,
            slots=SIZE.slots,
            max_length=LONGEST_PROMPT + SIZE.new_tokens,
            tokens_per_step=SIZE.tokens_per_step,
            seed=seed,
        )
        engine.run(requests)
    answer = same[0]
    logprobs = torch.stack(answer.logprobs).cpu()
    return {
        "gpu": torch.cuda.get_device_name(device) if device != "cpu" else None,
        "dtype": dtype,
        "arithmetic": arithmetic[dtype],
        "contract_version": bikernels.contract_version,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seed": seed,
        "weights": weights,
        "prompt": answer.prompt,
        "tokens": answer.tokens,
        "logprobs": [f"{bits & 0xFFFFFFFF:08x}" for bits in logprobs.view(torch.int32).tolist()],
        "distributions": [digest([one])[:16] for one in answer.distributions],
    }


# ---- Replaying -------------------------------------------------------------------------------------------------------


def first_difference(recorded: dict[str, Any]) -> str | None:
    """Compute a recording again on the CPU: where it first differs, or None."""
    if recorded["contract_version"] != bikernels.contract_version:
        return (
            f"it was recorded with contract version {recorded['contract_version']} and this is version "
            f"{bikernels.contract_version}; record it again"
        )
    prompt, tokens = recorded["prompt"], recorded["tokens"]
    dtype = getattr(torch, recorded.get("dtype", "bfloat16"))  # the first recordings do not say it
    with bikernels.use_arithmetic(recorded["arithmetic"]), set_batch_invariant_mode(portable=True):
        model = make_model(SIZE._replace(dtype=dtype), recorded["seed"])
        if digest_of_weights(model) != recorded["weights"]:
            return f"the model's weights, or its rotary frequencies, which seed {recorded['seed']} gives"
        length = len(prompt) + len(tokens)
        engine = Engine(model, slots=1, max_length=length, tokens_per_step=length)
        logprobs, distributions = engine.score(prompt + tokens, len(prompt))
    for i, token in enumerate(tokens):
        bits = int(recorded["logprobs"][i], 16)
        here = int(logprobs[i].view(torch.int32)) & 0xFFFFFFFF
        if here != bits:
            there = float(np.uint32(bits).view(np.float32))
            return (
                f"token {i + 1} of the completion: its log-probability is {logprobs[i].item()!r} (0x{here:08x}) here "
                f"and was {there!r} (0x{bits:08x})"
            )
        if digest([distributions[i]])[:16] != recorded["distributions"][i]:
            return f"token {i + 1} of the completion: the log-probability of another token of the vocabulary"
        if int(distributions[i].argmax()) != token:
            return (
                f"token {i + 1} of the completion: {int(distributions[i].argmax())} here and {token} in the recording"
            )
    return None


# ---- The program -----------------------------------------------------------------------------------------------------


def replay(file: Path) -> bool:
    """Compute a recording again and print what came of it; True if all bits are the same."""
    recorded = json.loads(file.read_text())
    versions = " and ".join(f"{name} {version}" for name, version in recorded["versions"].items())
    print(
        f"{file.name}: {len(recorded['tokens'])} tokens, recorded on {recorded['gpu']}, products in "
        f"{recorded['arithmetic']}, with {versions}"
    )
    start = time.perf_counter()
    difference = first_difference(recorded)
    if difference is not None:
        print(f"  This CPU differs from the recording, first in {difference}.")
        return False
    here = f"torch {torch.__version__} and transformers {transformers.__version__}"
    print(
        f"  On this CPU, with {here}, the same in every bit: the log-probabilities of\n"
        f"  the tokens and of the whole vocabulary ({time.perf_counter() - start:.1f} s)."
    )
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, or compute again; 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="*", type=Path, default=RECORDINGS)
    parser.add_argument("--record", type=Path, metavar="FILE", help="record on a GPU, to this file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of a recording")
    parser.add_argument("--seed", type=int, default=0, help="of a recording: of the weights, the prompts, the schedule")
    options = parser.parse_args(arguments)
    if options.record is None:
        different = [file for file in options.recordings if not replay(file)]
        return int(bool(different))
    if not torch.cuda.is_available():
        parser.error("--record needs a GPU, and torch.cuda.is_available() is False")
    recorded = record(options.dtype, options.seed)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items())
    options.record.write_text(f"{{\n{lines}\n}}\n")
    print(f"{len(recorded['tokens'])} tokens in {recorded['arithmetic']}, recorded on {recorded['gpu']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
