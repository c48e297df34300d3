"""Continuous batching for a Hugging Face causal language model, as small as it can be.

A step runs the model once over a packed batch: one token of every request that is decoding, and chunks of prompts as
far as the step's budget of tokens goes. Requests join when a slot is free and leave when they are complete, so the
batch that a request shares changes at every step. The model's code is not touched: an attention function, registered
through transformers' attention interface, reads and writes the cache. On a GPU a step can be a CUDA graph's replay.

transformers has continuous batching of its own, which accepts only attention functions of its own. Those that are made
of products see the keys of all requests in one row, where a key's place depends on the other requests. Here key j of a
request is element j of its row, always. So a token's attention is the same product and the same softmax, with more or
fewer masked keys after it, whether it is computed in a prefill, in a chunk of one, in a decode step or behind a reused
prefix.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedModel

# ---- Requests --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A prompt, how many tokens to append greedily, and what came of it.

    Attributes:
        prompt: token ids, at least one.
        new_tokens: the length of the completion; no token ends it earlier, so that schedules are comparable.
        sequence: the prompt and the completion so far.
        logprobs: the log-probability of each of `tokens`, 0-d float32 tensors on the model's device.
        keep_distributions: also keep the log-probabilities of the whole vocabulary, in `distributions`.
    """

    prompt: list[int]
    new_tokens: int
    keep_distributions: bool = False
    sequence: list[int] = field(init=False)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    distributions: list[torch.Tensor] = field(default_factory=list)
    slot: int = -1  # row of the cache
    cached: int = 0  # tokens whose keys and values are in the cache

    def __post_init__(self) -> None:
        self.sequence = [*self.prompt]

    @property
    def tokens(self) -> list[int]:
        """The completion so far."""
        return self.sequence[len(self.prompt) :]


# ---- Attention -------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Requests of a step that take equally many tokens, side by side in the packed batch from token `first` on."""

    first: int
    slots: torch.Tensor  # (requests,)
    later: torch.Tensor  # (requests, 1, tokens of each, keys): whether the key stands after the token

    @classmethod
    def of(cls, slots: torch.Tensor, positions: torch.Tensor, span: Span) -> Group:
        """The group of a span of the packed batch, of which the slots and positions of all tokens are given."""
        end = span.first + span.requests * span.each
        own = positions[span.first : end].view(span.requests, 1, span.each, 1)
        return cls(span.first, slots[span.first : end : span.each], torch.arange(span.keys, device=slots.device) > own)


class Span(NamedTuple):
    """The same, in numbers that the host knows."""

    first: int
    requests: int
    each: int
    keys: int  # that the longest request sees, rounded up to a multiple of ALIGNED


ALIGNED = 16
"""Rows of scores of such lengths lie aligned in memory, which products want; and there are fewer lengths to prepare."""


class Step(NamedTuple):
    """What the attention function has to know about a packed batch."""

    keys: list[torch.Tensor]  # of each layer: (slots, key-value heads, positions, head size)
    values: list[torch.Tensor]
    slots: torch.Tensor  # (tokens,)
    positions: torch.Tensor  # (tokens,)
    groups: list[Group]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over the cache, of products and a softmax; query is (1, heads, tokens, head size)."""
    refused = {name: options[name] for name in ("softcap", "s_aux") if options.get(name) is not None}
    if sliding_window is not None or refused:
        raise ValueError(
            f"sliding_window={sliding_window}, other options {sorted(refused)}: slot_attention computes full causal "
            "attention only; choose a model without sliding windows, soft caps and attention sinks"
        )
    keys, values = step.keys[module.layer_idx], step.values[module.layer_idx]
    keys[step.slots, :, step.positions] = key[0].transpose(0, 1)
    values[step.slots, :, step.positions] = value[0].transpose(0, 1)

    _, heads, tokens, size = query.shape
    kv_heads = keys.shape[1]
    out = query.new_empty(tokens, heads, size)
    for first, slots, later in step.groups:
        requests, _, each, length = later.shape
        rows = slice(first, first + requests * each)
        # The query heads that share a key-value head are rows of one product.
        q = query[0, :, rows].reshape(kv_heads, heads // kv_heads, requests, each, size).permute(2, 0, 1, 3, 4)
        q = q.reshape(requests, kv_heads, -1, size)
        k, v = keys[slots, :, :length], values[slots, :, :length]
        scores = (q @ k.transpose(-1, -2)).float() * scaling
        # Later keys than the query's own stand on the right. -inf makes their weight an exact zero, and trailing zeros
        # change no bit of a sum or product, so it does not matter how many there are.
        scores = scores.view(requests, -1, each, length).masked_fill(later, float("-inf")).view(scores.shape)
        attended = torch.softmax(scores, dim=-1).to(q.dtype) @ v
        attended = attended.view(requests, heads, each, size).transpose(1, 2)
        out[rows] = attended.reshape(requests * each, heads, size)
    return out.unsqueeze(0), None


AttentionInterface.register("slot_attention", slot_attention)  # without a function for masks transformers makes none


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What follows the kept tokens of a step."""

    distributions: torch.Tensor  # (kept, vocabulary), log-probabilities in float32
    best: torch.Tensor  # (kept,): the likeliest token; of equal ones, the first
    logprobs: torch.Tensor  # (kept,)


class Captured(NamedTuple):
    """A step of up to so many tokens: its inputs are written, the graph replayed, and its answer read."""

    inputs: torch.Tensor  # (4, tokens), int64: ids, slots, positions, indices of the kept tokens
    replay: Callable[[], Answer]


def capture(compute: Callable[[], Answer], device: torch.device, pool: Any) -> Callable[[], Answer]:
    """Record what a function launches in a CUDA graph, whose memory is of the pool; returns what replays it."""
    if device.type != "cuda":
        raise ValueError(f"graphs=True with a model on {device}; CUDA graphs need a GPU, so move the model or leave it")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        compute()  # kernels are compiled and libraries set up, which no capture may contain
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        answer = compute()

    def replay() -> Answer:
        graph.replay()
        return answer

    return replay


def graph_sizes(most: int) -> list[int]:
    """How many tokens the graphs take: multiples of 8, and four of them to every doubling, up to `most`."""
    sizes = [min(8, most)]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] + max(8, 1 << sizes[-1].bit_length() - 3)))
    return sizes


# ---- The engine ------------------------------------------------------------------------------------------------------


class Engine:
    """Greedy generation under continuous batching.

    Args:
        model: a causal language model with full attention in every layer; its attention function is replaced.
        slots: how many requests run at a time.
        max_length: the longest prompt and completion together, in tokens.
        tokens_per_step: how many tokens a step computes; at least `slots`, one for each request that is decoding.
        seed: of the random numbers of the schedule: when requests join, how long chunks are, which prefixes are reused.
        graphs: replay steps from CUDA graphs, which are captured here, in the mode or out of it. There is one for each
            of `graph_sizes(tokens_per_step)`; a batch between two of them is padded on the right.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_length: int,
        tokens_per_step: int,
        seed: int = 0,
        graphs: bool = False,
    ) -> None:
        if tokens_per_step < slots:
            raise ValueError(f"tokens_per_step is {tokens_per_step} with slots={slots}; pass at least {slots}")
        self.model = model.eval()
        model.set_attn_implementation("slot_attention")
        self.device = model.device
        self.max_length = max_length
        self.tokens_per_step = tokens_per_step
        self.random = random.Random(seed)
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Zeros, since a masked key's weight of 0 is multiplied with its value, and 0 times what memory held before
        # might be 0 times a NaN. The last slot is that of padding.
        self.positions = -(-max_length // ALIGNED) * ALIGNED
        shape = (2, config.num_hidden_layers, slots + 1, heads, self.positions, size)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.keys, self.values = ([*layers] for layers in self.cache)
        self.free = list(range(slots))
        self.running: list[Request] = []
        self.batches: list[int] = []  # tokens of each step so far
        self.graphs = self._capture(graph_sizes(tokens_per_step), slots) if graphs else {}

    @torch.inference_mode()
    def run(self, requests: Iterable[Request], progress: Callable[[int], object] = lambda tokens: None) -> None:
        """Complete the requests, which wait in this order; `progress` is told how many tokens each step has made."""
        waiting = deque(requests)
        for request in waiting:
            self._check(request)
        while waiting or self.running:
            # Now and then nobody joins although there is room, as when requests arrive one by one.
            for _ in range(self.random.randint(0 if self.running else 1, 4)):
                if waiting and self.free:
                    self._join(waiting.popleft())
            progress(self._step())

    @torch.inference_mode()
    def score(self, tokens: list[int], first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities of `tokens[first:]` in one prefill, as a trainer computes them.

        Returns:
            (log-probabilities of these tokens, of the whole vocabulary at their positions), float32.
        """
        if not 0 < first < len(tokens):
            raise ValueError(f"first is {first} of {len(tokens)} tokens; pass 1 or more, and less than their number")
        if not self.free:
            raise RuntimeError("every slot is taken; score when a request has left")
        request = Request(tokens[:-1], 1)
        self._check(request)
        self._join(request, reuse=False)
        kept = list(range(first - 1, len(tokens) - 1))  # the logits after a token are those of the next one
        distributions = self._forward([(request, len(tokens) - 1)], kept)
        self._leave(request)
        chosen = torch.tensor(tokens[first:], device=self.device)
        return distributions.gather(-1, chosen[:, None])[:, 0], distributions

    def _check(self, request: Request) -> None:
        length = len(request.prompt) + request.new_tokens
        if not request.prompt or request.new_tokens < 1 or length > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens with new_tokens={request.new_tokens}; both are at least 1, "
                f"and together at most max_length={self.max_length}"
            )

    def _join(self, request: Request, reuse: bool | None = None) -> None:
        """Give the request a slot; in one case of two (or as `reuse` says) copy the keys of a prefix from another's."""
        request.slot = self.free.pop()
        if reuse or (reuse is None and self.random.random() < 0.5):
            for other in self.running:
                # The last token of a prompt is always computed: its logits give the first new token.
                most = min(len(request.prompt) - 1, other.cached)
                shared = min(common_prefix(request.prompt, other.sequence), most)
                if shared > request.cached:
                    self.cache[:, :, request.slot, :, :shared] = self.cache[:, :, other.slot, :, :shared]
                    request.cached = shared
        self.running.append(request)

    def _leave(self, request: Request) -> None:
        self.cache[:, :, request.slot] = 0
        self.running.remove(request)
        self.free.append(request.slot)

    def _step(self) -> int:
        """One pass of the model; returns how many new tokens it has made."""
        missing = {request: len(request.sequence) - request.cached for request in self.running}
        decoding = [request for request in self.running if request.logprobs]
        plan = [(request, 1) for request in decoding]
        budget = self.tokens_per_step - len(decoding)
        for request in self.running:
            if not request.logprobs and budget > 0:
                chunk = self.random.randint(1, min(budget, missing[request]))
                if self.random.random() < 0.5:
                    chunk = min(budget, missing[request])
                plan.append((request, chunk))
                budget -= chunk
        plan.sort(key=lambda item: item[1] != 1)  # those that take one token make one group of the attention

        last, kept, complete = -1, [], []
        for request, count in plan:
            last += count
            if count == missing[request]:  # a chunk that ends within a prompt gives no new token
                kept.append(last)
                complete.append(request)
        answer = self._answer(plan, kept)
        # Copies, as a view would keep all that the step has made, or see what the graph's next replay makes.
        count = len(complete)
        made = zip(complete, answer.best[:count].tolist(), answer.logprobs[:count].clone().unbind(), strict=True)
        for i, (request, token, logprob) in enumerate(made):
            request.sequence.append(token)
            request.logprobs.append(logprob)
            if request.keep_distributions:
                request.distributions.append(answer.distributions[i].clone())
            if len(request.logprobs) == request.new_tokens:
                self._leave(request)
        return count

    def _answer(self, plan: list[tuple[Request, int]], kept: list[int]) -> Answer:
        """Compute so many tokens of each request, and what follows the `kept` ones; by a graph if there are graphs."""
        if not self.graphs:
            return _greedy(self._forward(plan, kept))
        packed, _ = self._pack(plan)
        tokens = len(packed[0])
        graph = self.graphs[next(size for size in self.graphs if size >= tokens)]
        padding = graph.inputs.shape[1] - tokens
        rows = [one + [fill] * padding for one, fill in zip(packed, self._padding, strict=True)]
        rows.append(kept + [0] * (graph.inputs.shape[1] - len(kept)))
        graph.inputs.copy_(torch.tensor(rows))
        return graph.replay()

    @torch.inference_mode()
    def _capture(self, sizes: list[int], slots: int) -> dict[int, Captured]:
        """Graphs of steps of so many tokens. The attention takes each token for a request of its own, which sees the
        keys that a chunk has written before it, so a step that prefills is no other graph than one that only decodes.
        """
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        graphs = {}
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            inputs = torch.zeros(4, size, dtype=torch.int64, device=self.device)
            inputs[:3] = torch.tensor(self._padding)[:, None]
            kept = inputs[3, :slots]  # no step keeps more tokens than requests run
            compute = functools.partial(self._distributions, inputs[:3], kept, [Span(0, size, 1, self.positions)])
            graphs[size] = Captured(inputs, capture(lambda compute=compute: _greedy(compute()), self.device, pool))
        return dict(reversed(graphs.items()))

    @property
    def _padding(self) -> tuple[int, int, int]:
        """Token id, slot and position that fill a batch up."""
        return 0, self.cache.shape[2] - 1, 0

    def _pack(self, plan: list[tuple[Request, int]]) -> tuple[tuple[list[int], list[int], list[int]], list[Span]]:
        """The (ids, slots, positions) of so many tokens of each request, which count as cached from now on."""
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for each, members in itertools.groupby(plan, key=lambda item: item[1]):
            first, requests = len(ids), [request for request, _ in members]
            for request in requests:
                ids += request.sequence[request.cached : request.cached + each]
                slots += [request.slot] * each
                positions += range(request.cached, request.cached + each)
                request.cached += each
            longest = max(request.cached for request in requests)
            spans.append(Span(first, len(requests), each, -(-longest // ALIGNED) * ALIGNED))
        self.batches.append(len(ids))
        return (ids, slots, positions), spans

    def _forward(self, plan: list[tuple[Request, int]], kept: list[int]) -> torch.Tensor:
        """Compute so many tokens of each request; the log-probabilities that follow the `kept` ones, float32."""
        packed, spans = self._pack(plan)
        return self._distributions(
            torch.tensor(packed, device=self.device),
            torch.tensor(kept, dtype=torch.int64, device=self.device),
            spans,
        )

    def _distributions(self, packed: torch.Tensor, kept: torch.Tensor, spans: list[Span]) -> torch.Tensor:
        """The model's pass over a packed batch of (ids, slots, positions)."""
        ids, slots, positions = packed
        groups = [Group.of(slots, positions, span) for span in spans]
        logits = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            logits_to_keep=kept,
            use_cache=False,
            step=Step(self.keys, self.values, slots, positions, groups),
        ).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


def _greedy(distributions: torch.Tensor) -> Answer:
    best = distributions.argmax(-1)
    return Answer(distributions, best, distributions.gather(-1, best[:, None])[:, 0])


def common_prefix(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """How many tokens two sequences have in common, from the start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
