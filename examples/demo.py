"""How many answers does one input have? Standard PyTorch against batch-invariant mode, on this machine's GPU or CPU.

    python examples/demo.py [--device cuda|cpu]

Each line of the table computes one row (or one sequence) alone and inside batches of several sizes, and counts how many
different results it got, compared as bytes. The first experiment is the one of batch_invariant_ops: a linspace of
2048 x 4096 times one of 4096 x 4096. The last is a small transformer whose code knows nothing of the mode. The exit
status is 1 if the mode ever gives more than one result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import bikernels
from bikernels_torch import set_batch_invariant_mode

ROWS, COLUMNS = 2048, 4096
BATCH_SIZES = (1, 2, 3, 8, 17, 64, 333, ROWS)


class Experiment(NamedTuple):
    """A function of a batch size and a position that returns what the input at that position gave."""

    name: str
    dtype: torch.dtype
    batches: list[tuple[int, int]]
    compute: Callable[[int, int], torch.Tensor]


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch has fast products of this dtype; those of a CPU without are left out, at about 1 GFLOP/s."""
    if device.type == "cuda" or dtype is torch.float32:
        return True
    return dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def operations(device: torch.device) -> Iterator[Experiment]:
    """Row 0 of each operator's result, over batch sizes."""
    product_dtypes = [dtype for dtype in (torch.bfloat16, torch.float32, torch.float16) if multiplies(dtype, device)]
    batches = [(size, 0) for size in BATCH_SIZES]
    for dtype in product_dtypes:
        a = torch.linspace(-100, 100, ROWS * COLUMNS, device=device).reshape(ROWS, COLUMNS).to(dtype)
        b = torch.linspace(-100, 100, COLUMNS * COLUMNS, device=device).reshape(COLUMNS, COLUMNS).to(dtype)
        bias = torch.linspace(-1, 1, COLUMNS, device=device).to(dtype)
        yield Experiment("mm", dtype, batches, lambda size, at, a=a, b=b: torch.mm(a[:size], b)[at])
        yield Experiment(
            "addmm", dtype, batches, lambda size, at, a=a, b=b, bias=bias: torch.addmm(bias, a[:size], b)[at]
        )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        yield Experiment("log_softmax", dtype, batches, lambda size, at, x=x: torch.log_softmax(x[:size], -1)[at])
        yield Experiment("softmax", dtype, batches, lambda size, at, x=x: torch.softmax(x[:size], -1)[at])
        yield Experiment("mean", dtype, batches, lambda size, at, x=x: torch.mean(x[:size], -1)[at])
        # Columns are the batch here; the mean runs over rows.
        yield Experiment("mean, dim 0", dtype, batches, lambda size, at, x=x: torch.mean(x[:, :size], 0)[at])


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over (batch, length, width)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(batch, length, width))


class Transformer(nn.Module):
    """A decoder-only language model of ordinary PyTorch modules."""

    def __init__(self, vocabulary: int = 1000, width: int = 256, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(width),
                    Attention(width, heads),
                    nn.LayerNorm(width),
                    nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
                ]
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (batch, length, vocabulary) of the next token after each of (batch, length) tokens."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for norm_attention, attention, norm_mlp, mlp in self.blocks:
            x = x + attention(norm_attention(x))
            x = x + mlp(norm_mlp(x))
        return torch.log_softmax(self.head(self.norm(x)), -1)


def models(device: torch.device) -> Iterator[Experiment]:
    """One sequence of 5 tokens, alone and at several positions of batches of other sequences."""
    torch.manual_seed(0)
    model = Transformer().eval()
    others = torch.randint(1000, (64, 5))
    batches = [(size, at) for size in (1, 2, 3, 5, 8, 16, 33, 64) for at in sorted({0, size // 2, size - 1})]

    for dtype in filter(lambda dtype: multiplies(dtype, device), (torch.bfloat16, torch.float32)):
        on_device = Transformer().to(device, dtype).eval()
        on_device.load_state_dict(model.state_dict())

        def compute(size: int, at: int, on_device: nn.Module = on_device) -> torch.Tensor:
            batch = others[:size].clone()
            batch[at] = torch.arange(5)
            return on_device(batch.to(device))[at]

        yield Experiment("transformer", dtype, batches, compute)


def as_bytes(x: torch.Tensor) -> bytes:
    """The result's bytes, whatever its dtype."""
    return x.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def count(experiment: Experiment, device: torch.device) -> tuple[int, float]:
    """How many distinct results the experiment gives, and the milliseconds of its largest batch."""
    results = {as_bytes(experiment.compute(size, at)) for size, at in experiment.batches}
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    experiment.compute(*experiment.batches[-1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return len(results), 1e3 * (time.perf_counter() - start)


def linspace_difference(device: torch.device) -> float:
    """The largest difference between `torch.mm(a[:1], b)` and `torch.mm(a, b)[:1]`, as in the original experiment."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.linspace(-100, 100, ROWS * COLUMNS, device=device).reshape(ROWS, COLUMNS).to(dtype)
    b = torch.linspace(-100, 100, COLUMNS * COLUMNS, device=device).reshape(COLUMNS, COLUMNS).to(dtype)
    return (torch.mm(a[:1], b) - torch.mm(a, b)[:1]).abs().max().item()


@torch.inference_mode()
def main() -> int:
    """Run every experiment; 1 if the mode gave more than one result anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    backend = [name for name, status in bikernels.backends().items() if device.type in "".join(status.chosen_for)]
    print(f"{where}; torch {torch.__version__}, backend {backend[0]}, contract version {bikernels.contract_version}\n")

    standard = linspace_difference(device)
    with set_batch_invariant_mode():
        invariant = linspace_difference(device)
    print("largest difference between mm(a[:1], b) and mm(a, b)[:1]:")
    print(f"  standard PyTorch {standard:g}, batch-invariant mode {invariant:g}\n")

    print(f"{'':14}{'':10}{'':>8}  {'distinct results':^20}  {'ms, largest batch':^20}")
    print(f"{'':14}{'dtype':10}{'batches':>8}  {'standard':>9} {'in mode':>10}  {'standard':>9} {'in mode':>10}")
    failed = invariant != 0
    for experiments in (operations, models):
        for experiment in experiments(device):
            distinct, milliseconds = count(experiment, device)
            with set_batch_invariant_mode():
                distinct_in_mode, milliseconds_in_mode = count(experiment, device)
            failed |= distinct_in_mode != 1
            dtype = str(experiment.dtype).removeprefix("torch.")
            print(
                f"{experiment.name:14}{dtype:10}{len(experiment.batches):>8}  {distinct:>9} {distinct_in_mode:>10}  "
                f"{milliseconds:>9.2f} {milliseconds_in_mode:>10.2f}",
                flush=True,
            )
    print("\nThe mode gave more than one result." if failed else "\nIn the mode every input has one result.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
