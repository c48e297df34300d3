"""Tensors in parts over two processes: what DTensor and FSDP make of a model computes the mode's bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bikernels_torch import set_batch_invariant_mode

from .helpers import same_bits

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no torch.distributed")

PROCESSES = 2
ROWS, WIDTH, HIDDEN = 6, 48, 80


class Model(torch.nn.Module):
    """What a layer of a transformer has, but for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.up(self.norm(x)))
        return torch.log_softmax(self.down(hidden), -1)


def in_parts(rank: int, folder: str, kind: str) -> None:
    """One of the processes; an assertion that fails is raised in the parent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(folder) / "store"), PROCESSES)
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = {"cpu": "gloo", "cuda": "nccl"}[kind]
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh(kind, (PROCESSES,))
        torch.manual_seed(0)
        model, x = Model().to(device), torch.randn(ROWS, WIDTH).to(device)
        w = torch.randn(WIDTH, HIDDEN).to(device)
        with torch.no_grad(), set_batch_invariant_mode():
            whole = model(x)

            def gathered(result: Any) -> torch.Tensor:
                return result.full_tensor() if isinstance(result, DTensor) else result

            # Parts of the rows, and parts of the columns, are computed as in the whole.
            by_rows, everywhere = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(x, mesh, [Replicate()])
            assert same_bits(gathered(by_rows @ distribute_tensor(w, mesh, [Replicate()])), x @ w)
            assert same_bits(gathered(everywhere @ distribute_tensor(w, mesh, [Shard(1)])), x @ w)
            for reduce in (torch.log_softmax, torch.mean, torch.sum):
                assert same_bits(gathered(reduce(by_rows, -1)), reduce(x, -1)), reduce

            sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
            assert same_bits(gathered(sharded(x)), whole)

            # K in parts is another sum, but the same one for every batch.
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallel = parallelize_module(copy.deepcopy(model), mesh, plan)
            batch = gathered(parallel(x))
            torch.testing.assert_close(batch, whole)
            for row in range(ROWS):
                assert same_bits(gathered(parallel(x[row : row + 1])), batch[row : row + 1]), row
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_parts(tmp_path: Path, kind: str) -> None:
    if kind == "cuda" and torch.cuda.device_count() < PROCESSES:
        pytest.skip("a process has a GPU of its own, and there are fewer")
    torch.multiprocessing.spawn(in_parts, (str(tmp_path), kind), PROCESSES)
