"""LSTM, GRU and RNN layers: products and pointwise functions, never the one fused operator of cuDNN or oneDNN.

A layer's products with its inputs are one `linear` over all time steps, those with its state one `linear` a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import core

State = tuple[torch.Tensor, ...]
"""What a cell hands on: (h,), or (h, c) in an LSTM; each (rows, width)."""


class Weights(NamedTuple):
    """The parameters of one direction of one layer; `project` is (projection, hidden), of an LSTM with proj_size."""

    of_input: torch.Tensor
    of_state: torch.Tensor
    bias_of_input: torch.Tensor | None
    bias_of_state: torch.Tensor | None
    project: torch.Tensor | None


Cell = Callable[[torch.Tensor, torch.Tensor, State], State]
"""(the input's part of the gates, the state's part, state) -> state"""


def _lstm(x: torch.Tensor, h: torch.Tensor, state: State) -> State:
    enter, forget, new, leave = (x + h).chunk(4, 1)
    c = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * c.tanh(), c


def _gru(x: torch.Tensor, h: torch.Tensor, state: State) -> State:
    (reset_x, keep_x, new_x), (reset_h, keep_h, new_h) = x.chunk(3, 1), h.chunk(3, 1)
    new = (new_x + new_h * (reset_x + reset_h).sigmoid()).tanh()
    return ((state[0] - new) * (keep_x + keep_h).sigmoid() + new,)


def _rnn_tanh(x: torch.Tensor, h: torch.Tensor, _: State) -> State:
    return ((x + h).tanh(),)


def _rnn_relu(x: torch.Tensor, h: torch.Tensor, _: State) -> State:
    return ((x + h).relu(),)


def _direction(
    cell: Cell, x: torch.Tensor, counts: Sequence[int], state: State, weights: Weights, reverse: bool
) -> tuple[torch.Tensor, State]:
    """One direction of one layer.

    Args:
        x: (sum of counts, width), the rows of the first step, then those of the second, and so on.
        counts: Rows of each step; the first so many sequences of the batch have reached it.
        state: Of all sequences.
    """
    parts = F.linear(x, weights.of_input, weights.bias_of_input).split(list(counts))
    outputs: list[Any] = [None] * len(parts)
    for step in reversed(range(len(parts))) if reverse else range(len(parts)):
        count = counts[step]
        before = tuple(s[:count] for s in state)
        now = cell(parts[step], F.linear(before[0], weights.of_state, weights.bias_of_state), before)
        if weights.project is not None:
            now = (F.linear(now[0], weights.project), *now[1:])
        outputs[step] = now[0]
        # Sequences that have ended keep their state, and those that a reversed pass has not begun their first one.
        state = tuple(torch.cat([n, s[count:]]) if count < s.shape[0] else n for n, s in zip(now, state, strict=True))
    return torch.cat(outputs), state


def _weights(params: Sequence[torch.Tensor], has_biases: bool, projects: bool) -> Iterator[Weights]:
    size = 2 + 2 * has_biases + projects
    for start in range(0, len(params), size):
        own = params[start : start + size]
        bias_of_input, bias_of_state = own[2:4] if has_biases else (None, None)
        yield Weights(own[0], own[1], bias_of_input, bias_of_state, own[-1] if projects else None)


def _layers(
    cell: Cell,
    x: torch.Tensor,
    counts: Sequence[int],
    state: State,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[torch.Tensor, ...]:
    """All layers; the last one's outputs and the final states, (layers * directions, batch, width)."""
    directions = 1 + bidirectional
    ends: list[State] = []
    weights = [*_weights(params, has_biases, len(state) == 2 and state[0].shape[2] != state[1].shape[2])]
    for index, own in enumerate(weights):
        reverse = index % directions == 1
        if not reverse:
            given = x if index == 0 or dropout == 0 else torch.dropout(x, dropout, train)
            outputs = []
        output, end = _direction(cell, given, counts, tuple(s[index] for s in state), own, reverse)
        outputs.append(output)
        ends.append(end)
        if len(outputs) == directions:
            x = torch.cat(outputs, 1) if bidirectional else output
    return (x, *(torch.stack(one) for one in zip(*ends, strict=True)))


def _accepts(x: torch.Tensor, state: State, params: Sequence[torch.Tensor]) -> bool:
    tensors = (x, *state, *params)
    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype in core.FLOATS
        and x.numel() > 0
        and all(t.layout is torch.strided and not t.is_nested and t.device == x.device for t in tensors)
        and all(t.dtype is x.dtype for t in tensors)
    )


def _as_autocast(x: torch.Tensor, state: State, params: Sequence[torch.Tensor]) -> tuple[Any, Any, Any]:
    """The operands in the dtype to which autocast takes the fused operators."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x, state, params
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), tuple(s.to(dtype) for s in state), [p.to(dtype) for p in params]


def is_fused(name: str, x: torch.Tensor) -> bool:
    """Whether PyTorch may run a fused operator; elsewhere it makes the layer of covered ones itself."""
    return x.is_cuda or name == "lstm"


def _override(name: str, cell: Cell) -> dict[str, Callable[..., Any]]:
    """Both overloads: of a padded batch, and of a packed one."""

    def padded(original: Any, x: torch.Tensor, hx: Any, params: Sequence[torch.Tensor], *options: Any) -> Any:
        state = (hx,) if isinstance(hx, torch.Tensor) else tuple(hx)
        has_biases, _, dropout, train, bidirectional, batch_first = options
        steps = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
        if (
            not is_fused(name, x)
            or x.dim() != 3
            or not _accepts(x, state, params)
            or state[0].shape[1] != steps.shape[1]
        ):
            return original(x, hx, params, *options)
        steps, state, params = _as_autocast(steps, state, params)
        counts = [steps.shape[1]] * steps.shape[0]
        flags = has_biases, dropout, train, bidirectional
        output, *ends = _layers(cell, steps.flatten(0, 1), counts, state, params, *flags)
        output = output.view(*steps.shape[:2], -1)
        return (output.transpose(0, 1) if batch_first else output, *ends)

    def packed(
        original: Any,
        x: torch.Tensor,
        batch_sizes: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        *options: Any,
    ) -> Any:
        state = (hx,) if isinstance(hx, torch.Tensor) else tuple(hx)
        has_biases, _, dropout, train, bidirectional = options
        counts = batch_sizes.tolist()
        if not is_fused(name, x) or x.dim() != 2 or not _accepts(x, state, params) or state[0].shape[1] != counts[0]:
            return original(x, batch_sizes, hx, params, *options)
        x, state, params = _as_autocast(x, state, params)
        return _layers(cell, x, counts, state, params, has_biases, dropout, train, bidirectional)

    return {f"{name}.input": padded, f"{name}.data": packed}


OVERRIDES: dict[str, Callable[..., Any]] = {
    **_override("lstm", _lstm),
    **_override("gru", _gru),
    **_override("rnn_tanh", _rnn_tanh),
    **_override("rnn_relu", _rnn_relu),
}
