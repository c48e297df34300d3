"""PyTorch, batch-invariant: one line puts the kernels of `bikernels` behind PyTorch's own operators.

    with bikernels_torch.set_batch_invariant_mode():
        logits = model(tokens)  # the same bits for a sequence alone and in any batch, on a GPU and on a CPU

Where to look: `mode` says when the mode is on, `overrides` which of PyTorch's operators it replaces, `operators` how
each of them is computed, `library` defines `torch.ops.bikernels.*`, which compute like that in the mode and out of it.
`dispatch` is what they ask of PyTorch's dispatcher, `compiled` what torch.compile gets to see of them.
`auditing` finds the operators that make a model's results depend on the batch; `strict` refuses what is not covered.
"""

from bikernels import __version__

from . import library  # noqa: F401  (defines torch.ops.bikernels)
from .auditing.kinds import allow_operators
from .auditing.report import Report, Status
from .auditing.run import audit
from .compiled import CompiledInModeError
from .mode import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from .operators.attention import AttentionBlockSize, get_batch_invariant_attention_block_size
from .strict import UncoveredOperatorError

__all__ = [
    "AttentionBlockSize",
    "CompiledInModeError",
    "Report",
    "Status",
    "UncoveredOperatorError",
    "__version__",
    "allow_operators",
    "audit",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "get_batch_invariant_attention_block_size",
    "is_batch_invariant_mode_enabled",
    "set_batch_invariant_mode",
]
