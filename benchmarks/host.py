"""Time what the mode costs the host: eager calls on small operands, and a decode step of a transformer.

    python benchmarks/host.py [--device cuda|cpu] [--backend NAME] [--layers N] [--json FILE]

Calls are made in bursts that the GPU does not limit, and nothing is synchronised within a burst. The decode step is
that of a decoder like Qwen3 with random weights (decoder.py): eager, where the host limits a GPU, and on a GPU also
in a CUDA graph, where the kernels do. Standard PyTorch and the mode take turns; times are medians. In the last column
is the time in the mode relative to the standard one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from decoder import Decoder, Sizes
from machine import describe
from records import Host, Results, spread
from timing import Call, Samples, alternate, capture, host_samples

import bikernels
from bikernels_torch import set_batch_invariant_mode

MODES: Mapping[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "standard": contextlib.nullcontext,
    "mode": set_batch_invariant_mode,
}
STEPS = 3
"""Of a decoder between two synchronisations."""
REPEATS = 7


def calls(device: str) -> dict[str, Call]:
    """Operators on operands that take a GPU less time than the host."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    a, b, c, x = random(16, 64), random(64, 16), random(16), random(16, 512)
    batch_a, batch_b, weight, bias = random(4, 16, 64), random(4, 64, 16), random(512), random(512)
    functional = torch.nn.functional
    return {
        "mm": lambda: torch.mm(a, b),
        "addmm": lambda: torch.addmm(c, a, b),
        "bmm": lambda: torch.bmm(batch_a, batch_b),
        "linear": lambda: functional.linear(a, b.T),
        "linear with bias": lambda: functional.linear(a, b.T, c),
        "log_softmax": lambda: torch.log_softmax(x, -1),
        "softmax": lambda: torch.softmax(x, -1),
        "mean": lambda: torch.mean(x, -1),
        "sum": lambda: torch.sum(x, -1),
        "rms_norm": lambda: functional.rms_norm(x, (512,), weight),
        "layer_norm": lambda: functional.layer_norm(x, (512,), weight, bias),
        "mm, out=": functools.partial(torch.mm, a, b, out=random(16, 16)),
    }


def in_both(call: Call, synchronize: Call) -> Samples:
    """Host time of a call in each mode, in turns."""
    samples: Samples = {name: [] for name in MODES}
    for _ in range(REPEATS):
        for name, mode in MODES.items():
            with mode():
                samples[name] += host_samples({name: call}, synchronize, calls=500, repeats=1)[name]
    return samples


def steps(decoder: Decoder, synchronize: Call) -> Samples:
    """Wall time of an eager step in each mode, in microseconds."""
    samples: Samples = {name: [] for name in MODES}
    for turn in range(1 + REPEATS):
        for name, mode in MODES.items():
            with mode():
                decoder.step()
                synchronize()
                start = time.perf_counter()
                for _ in range(STEPS):
                    decoder.step()
                synchronize()
                if turn:
                    samples[name].append(1e6 * (time.perf_counter() - start) / STEPS)
    return samples


def captured_steps(decoder: Decoder) -> Samples:
    """Time of a step's kernels in a CUDA graph in each mode, in microseconds."""
    graphs = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for name, mode in MODES.items():
            with mode():
                decoder.step()
                torch.cuda.synchronize()
                graphs[name] = capture([decoder.step])
        return alternate(graphs, 1)


def show(host: Host) -> Host:
    """Print a line of the table."""
    standard, mode = (spread(host.us[name]).median for name in MODES)
    print(f"{host.name:34}{standard:12.1f}{mode:12.1f}{mode / standard:12.2f}", flush=True)
    return host


def main() -> int:
    """Print the table and, if asked to, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--backend", choices=tuple(bikernels.backends()))
    parser.add_argument("--layers", type=int, default=32, help="of the decoder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    synchronize: Call = torch.cuda.synchronize if on_gpu else lambda: None
    use = bikernels.use_backend(arguments.backend) if arguments.backend else contextlib.nullcontext()

    results = Results(describe(arguments.device, arguments.backend), [], [], [])
    print(", ".join(f"{key} {value}" for key, value in results.machine.items()))
    print(f"{'us':34}{'standard':>12}{'mode':>12}{'mode / standard':>18}")
    with torch.inference_mode(), use:
        for name, call in calls(arguments.device).items():
            results.host.append(show(Host(name, in_both(call, synchronize), {})))
        decoder = Decoder(Sizes(layers=arguments.layers), arguments.device)
        what = f"decode step, {arguments.layers} layers, "
        results.host.append(show(Host(what + "eager", steps(decoder, synchronize), {})))
        if on_gpu:
            results.host.append(show(Host(what + "CUDA graph", captured_steps(decoder), {})))
    if arguments.json:
        results.save(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
