"""Which operators make a model's results depend on the batch.

TARGET is module:callable. Called without arguments, it returns a function or module and its inputs, and if need be
the keywords of `bikernels_torch.audit`: `return model, (tokens,)` or `return model, (x,), {"batch_dim": 1}`. Without a
target a small transformer is audited. Exit code 1 if an output or an operator was observed to vary in the last run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..auditing.run import audit
from ..mode import set_batch_invariant_mode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.add_argument("target", nargs="?", metavar="TARGET", type=_target, default=_demo, help="module:callable")
    parser.add_argument(
        "--mode",
        choices=("off", "on", "both"),
        default="both",
        help="audit standard PyTorch, the batch-invariant mode, or one after the other (the default)",
    )


def run(options: argparse.Namespace) -> int:
    """Print a table for each way; 1 if anything varied in the last one."""
    prepared = options.target()
    if not isinstance(prepared, tuple) or len(prepared) not in (2, 3) or not callable(prepared[0]):
        print("the target must return (function or module, inputs) or (function or module, inputs, keywords)")
        return 2
    program, inputs, keywords = (*prepared, {})[:3]
    reports = []
    with torch.no_grad():
        for enabled in {"off": (False,), "on": (True,), "both": (False, True)}[options.mode]:
            with set_batch_invariant_mode(enabled):
                reports.append(audit(program, *inputs, **keywords))
            if not options.json:
                reports[-1].print()
                print()
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    return int(bool(reports[-1].outputs_vary or reports[-1].varying))


def _target(text: str) -> Callable[[], Any]:
    module, separator, name = text.partition(":")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form module:callable")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not callable")
    return found


class _Block(torch.nn.Module):
    """Attention and a multilayer perceptron, each behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(torch.nn.functional.silu(self.up(self.norm_mlp(x))))


def _demo() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """Two blocks of a transformer between an embedding and a log_softmax; six sequences of five tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    width, vocabulary = 128, 500
    head = (torch.nn.LayerNorm(width), torch.nn.Linear(width, vocabulary), torch.nn.LogSoftmax(-1))
    model = torch.nn.Sequential(torch.nn.Embedding(vocabulary, width), _Block(width), _Block(width), *head)
    return model.to(device).eval(), (torch.randint(vocabulary, (6, 5)).to(device),)
