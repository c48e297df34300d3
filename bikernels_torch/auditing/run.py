"""`audit`: run a program on a batch and on slices of it, operator by operator, and compare bytes.

How a difference is traced to its origin. The program runs on every slice first, and what each operator was given is
noted down: shapes, strides, numbers, and a few values. Then it runs on the whole batch. There, at every operator, the
slice's rows are taken out of the very tensors that the operator is given, laid out as in the slice's own run, and the
operator is repeated on them. Since its inputs are then the same bits, a difference in its result is its own; what it
inherits from an earlier operator does not show.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..mode import is_batch_invariant_mode_enabled
from . import kinds, rows
from .kinds import Kind
from .place import Locator, Place
from .report import CallReport, Difference, OutputReport, Report, Status
from .rows import Placement, Slice

MAX_ALONE = 8
"""Up to this batch size every row is run alone by default."""

_KEPT_INTEGERS = 4096
"""Integer tensors of up to this many elements are taken from the slice's own run: they may hold positions in it."""


def audit(
    fn_or_model: Callable[..., Any],
    *inputs: Any,
    batch_dim: Any = 0,
    slices: Iterable[int | slice | tuple[int, int]] | None = None,
    **kwargs: Any,
) -> Report:
    """Find the operators of a program that make its results depend on the batch.

    The program runs once on each slice and twice on the whole batch, with copies of the inputs, in the caller's grad
    mode and in the batch-invariant mode or out of it, as the caller has it. Only the forward pass is audited. Switch
    dropout off (`model.eval()`).

    Args:
        fn_or_model: a module or a function.
        *inputs, **kwargs: its arguments: tensors, and tuples, lists and dicts of them, besides anything else.
        batch_dim: which dimension of the tensors is the batch. A number holds for all of them. Otherwise a tuple with
            an entry for every positional argument, or a dict from positions and names of arguments to entries (0 where
            there is none); an entry is a number, None for what every sample shares, or a container of entries like
            the argument.
        slices: of the batch, each as a row's number, a slice or a pair (start, stop). By default every row alone (of
            more than 8 the first two, the middle and the last one) and batches of ragged sizes.

    Returns:
        A `Report`: `print` it, iterate over it for the operators, or see its `calls`, `varying` and `outputs_vary`.

    Raises:
        ValueError: the arguments do not have one batch size, or it is 1, or a slice does not fit.
        TypeError: `batch_dim` does not fit the arguments.
    """
    leaves, spec = pytree.tree_flatten((inputs, kwargs))
    dims = _batch_dims(batch_dim, inputs, kwargs)
    batch = _batch_size(leaves, dims)
    chosen = _slices(slices, batch)
    locator = Locator()

    def run(part: Slice | None, observer: TorchDispatchMode) -> Any:
        copies = [
            _part(leaf, dim, part) if isinstance(leaf, torch.Tensor) else leaf
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        arguments, keywords = pytree.tree_unflatten(copies, spec)
        with observer:
            return fn_or_model(*arguments, **keywords)

    traces = []
    results = []
    for part in chosen:
        recorder = _Recorder(locator)
        results.append(run(part, recorder))
        traces.append(recorder.calls)
    recorder = _Recorder(locator, with_values=False)
    run(None, recorder)
    program = recorder.calls
    aligned, notes = _align(program, traces, chosen)
    comparer = _Comparer(locator, batch, chosen, aligned)
    whole = run(None, comparer)
    if len(comparer.reports) != len(program):
        notes.append(
            f"the program took {len(program)} operators at first and {len(comparer.reports)} on being run again: "
            "it keeps a state, and what follows the first such change was not compared"
        )
    outputs = _compare_outputs(whole, results, batch, chosen)
    return Report(comparer.reports, outputs, batch, chosen, is_batch_invariant_mode_enabled(), notes)


# ---------------------------------------------------------------------------------------------------------- the inputs


def _batch_dims(batch_dim: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
    """The batch dimension of every leaf of (inputs, kwargs)."""
    if isinstance(batch_dim, dict):
        unknown = [key for key in batch_dim if key not in kwargs and key not in range(len(inputs))]
        if unknown:
            raise TypeError(f"batch_dim names {unknown[0]!r}, and there is no such argument")
        entries = [*(batch_dim.get(i, 0) for i in range(len(inputs))), *(batch_dim.get(name, 0) for name in kwargs)]
    elif isinstance(batch_dim, tuple | list):
        if len(batch_dim) != len(inputs):
            raise TypeError(f"batch_dim has {len(batch_dim)} entries for {len(inputs)} positional arguments")
        entries = [*batch_dim, *(0 for _ in kwargs)]
    else:
        entries = [batch_dim] * (len(inputs) + len(kwargs))
    result: list[int | None] = []
    for entry, value in zip(entries, (*inputs, *kwargs.values()), strict=True):
        dims = pytree._broadcast_to_and_flatten(entry, pytree.tree_structure(value))
        if dims is None or any(isinstance(dim, bool) or not isinstance(dim, int | None) for dim in dims):
            raise TypeError(f"batch_dim has {entry!r} for an argument of another structure; give each tensor its own")
        result += dims
    return result


def _batch_size(leaves: list[Any], dims: list[int | None]) -> int:
    sizes = []
    for leaf, dim in zip(leaves, dims, strict=True):
        if dim is not None and isinstance(leaf, torch.Tensor):
            if not -leaf.dim() <= dim < leaf.dim():
                raise ValueError(
                    f"a tensor of shape {tuple(leaf.shape)} has no dimension {dim}; give it None in batch_dim if every "
                    "sample shares it"
                )
            sizes.append(leaf.shape[dim])
    if not sizes:
        raise ValueError("no tensor among the arguments has a batch dimension; pass the batch as arguments")
    if len(set(sizes)) != 1:
        raise ValueError(
            f"the tensors have batch sizes {', '.join(map(str, dict.fromkeys(sizes)))}; say in batch_dim which "
            "dimension of each is the batch, and None for those that every sample shares"
        )
    if sizes[0] < 2:
        raise ValueError(f"the batch size is {sizes[0]}; pass a batch of at least 2, so that slices can be compared")
    return int(sizes[0])


def _slices(slices: Iterable[int | slice | tuple[int, int]] | None, batch: int) -> list[Slice]:
    if slices is None:
        alone = range(batch) if batch <= MAX_ALONE else (0, 1, batch // 2, batch - 1)
        ragged = ((0, 2), (batch // 2, batch // 2 + 3), (0, batch // 2 + 1), (1, batch), (0, batch - 1))
        default = [*(Slice(i, i + 1) for i in alone), *itertools.starmap(Slice, ragged)]
        return list(dict.fromkeys(part for part in default if part.stop <= batch and part.stop - part.start < batch))
    result = []
    for given in slices:
        if isinstance(given, slice):
            start, stop, step = given.indices(batch)
            if step != 1:
                raise ValueError(f"slice {given} has a step; pass slices of neighbouring rows")
            part = Slice(start, stop)
        elif isinstance(given, int):
            part = Slice(given % batch if -batch <= given < batch else given, given % batch + 1)
        else:
            part = Slice(*given)
        if not 0 <= part.start < part.stop <= batch or part.stop - part.start == batch:
            raise ValueError(f"slice {given} is not a smaller part of a batch of {batch} rows")
        result.append(part)
    if not result:
        raise ValueError("slices is empty; pass at least one, or None for the usual ones")
    return result


def _part(x: torch.Tensor, dim: int | None, part: Slice | None) -> torch.Tensor:
    """A copy of the samples of a slice (None: of all), which the program may overwrite."""
    source = x.detach()
    if dim is not None and part is not None:
        source = source.narrow(dim, part.start, part.stop - part.start)
    return source.clone().requires_grad_(x.requires_grad)


# ----------------------------------------------------------------------------------------------------- the slices' runs


class _Tensor(NamedTuple):
    """What is noted of a tensor argument in a slice's run."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    values: torch.Tensor | None
    """All of a small integer tensor; a few of another one."""
    is_whole: bool


class _Call(NamedTuple):
    """What is noted of an operator's call in a slice's run."""

    name: str
    place: Place
    leaves: list[Any]
    """Of (args, kwargs); tensors as `_Tensor`."""
    spec: pytree.TreeSpec


class _Operators(TorchDispatchMode):
    """Sees the operators that compute: those that PyTorch makes of others are taken apart first."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = _device_type(args, kwargs)
        if kinds.is_composite(func, device) and kinds.kind_of(func) not in (Kind.EXACT, Kind.POINTWISE):
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            alias = next(key for key in _COMPOSITE_KEYS if has_kernel(func._name, key))
            with self:
                return func._op_dk(torch._C.DispatchKey.__members__[alias], *args, **kwargs)
        return self.observe(func, args, kwargs)

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


_COMPOSITE_KEYS = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")


def _device_type(args: Any, kwargs: Any) -> str:
    found = [x.device.type for x in kinds.tensors((args, kwargs))]
    return next((each for each in found if each != "cpu"), "cpu")


class _Recorder(_Operators):
    """Notes down every call."""

    def __init__(self, locator: Locator, with_values: bool = True) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._locator = locator
        self._with_values = with_values

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        noted = [self._note(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.calls.append(_Call(func._name, self._locator(), noted, spec))
        return func(*args, **kwargs)

    def _note(self, x: torch.Tensor) -> _Tensor:
        if not rows.is_comparable(x):
            return _Tensor(tuple(x.shape), (), None, False)
        values = None
        is_whole = not x.is_floating_point() and not x.is_complex() and x.numel() <= _KEPT_INTEGERS
        if self._with_values and x.numel():
            values = x.clone() if is_whole else rows.sample(x)
        return _Tensor(tuple(x.shape), tuple(x.stride()), values, is_whole and values is not None)


def _align(
    program: list[_Call], traces: list[list[_Call]], chosen: list[Slice]
) -> tuple[list[dict[int, _Call]], list[str]]:
    """For each slice, which of its calls each call of the whole batch's program corresponds to; and remarks."""
    keys = [(call.name, call.place) for call in program]
    aligned = []
    departures: dict[str, list[Slice]] = {}
    for part, trace in zip(chosen, traces, strict=True):
        others = [(call.name, call.place) for call in trace]
        if keys == others:
            aligned.append(dict(enumerate(trace)))
            continue
        pairs: dict[int, _Call] = {}
        for i, j, length in difflib.SequenceMatcher(None, keys, others, autojunk=False).get_matching_blocks():
            pairs |= {i + k: trace[j + k] for k in range(length)}
        aligned.append(pairs)
        left_out = [call for i, call in enumerate(program) if i not in pairs]
        kept = set(map(id, pairs.values()))
        others_left_out = [call for call in trace if id(call) not in kept]
        departures.setdefault(_departure(keys, others, left_out, others_left_out), []).append(part)
    return aligned, [f"{text}: {', '.join(map(str, parts))}" for text, parts in departures.items()]


def _departure(
    keys: list[tuple[str, Place]], others: list[tuple[str, Place]], left_out: list[_Call], others_left_out: list[_Call]
) -> str:
    """How a slice's program differs from the whole batch's."""
    if all(kinds.base_name(call.name) in kinds.LAYOUT for call in (*left_out, *others_left_out)):
        return f"some slices make {len(left_out)} copies or views otherwise, as reshape does where it need not copy"
    at = next(i for i, (own, other) in enumerate(itertools.zip_longest(keys, others)) if own != other)
    name, place = keys[at] if at < len(keys) else others[at]
    return (
        f"the control flow depends on the batch, from call {at} on ({name}, {place}); {len(left_out)} of {len(keys)} "
        "calls were not compared with these slices"
    )


# ------------------------------------------------------------------------------------------------ the whole batch's run


class _Inputs(NamedTuple):
    """The arguments with which a call is repeated on a slice."""

    variants: list[list[Any]]
    """Several, where the values do not tell which rows are the slice's; at least one of them is right."""
    are_rows: bool
    """Whether all are the slice's rows of the whole batch's; its integers may be others, as positions in it are."""


_MAX_VARIANTS = 6


def _again(leaf: Any, overwrites: bool) -> Any:
    """An argument for one more repetition."""
    return leaf.clone() if overwrites and isinstance(leaf, torch.Tensor) else leaf


class _NotCompared(Exception):  # noqa: N818  (not an error: the reason is reported)
    """Why a call could not be repeated on a slice."""


class _Comparer(_Operators):
    """Repeats every call on each slice of its actual inputs, and reports on it."""

    def __init__(self, locator: Locator, batch: int, chosen: list[Slice], aligned: list[dict[int, _Call]]) -> None:
        super().__init__()
        self.reports: list[CallReport] = []
        self._locator = locator
        self._batch = batch
        self._chosen = chosen
        self._aligned = aligned

    def observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        index, place = len(self.reports), self._locator()
        kind = kinds.kind_of_call(func, args, kwargs)
        shapes = tuple(tuple(x.shape) for x in kinds.tensors((args, kwargs)))
        leaves, _ = pytree.tree_flatten((args, kwargs))
        overwrites = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        finding = _Finding(_outs(func, args, kwargs))
        repeats: list[tuple[Slice, _Call]] = []
        compares = not func.is_view and any(isinstance(leaf, torch.Tensor) for leaf in leaves)
        if compares and kinds.is_repeatable(func, args, kwargs):
            for part, calls in zip(self._chosen, self._aligned, strict=True):
                call = calls.get(index)
                if call is None or call.name != func._name or len(call.leaves) != len(leaves):
                    finding.reasons.append("the slice's program has no such call here")
                else:
                    repeats.append((part, call))
        # What the call overwrites has to be copied before it runs; otherwise one slice at a time is in memory.
        prepared = [self._inputs(leaves, part, call, overwrites, finding) for part, call in repeats if overwrites]
        result = func(*args, **kwargs)
        for i, (part, call) in enumerate(repeats):
            inputs = prepared[i] if overwrites else self._inputs(leaves, part, call, False, finding)
            if inputs is not None and finding.difference is None:
                self._compare(func, inputs, call, part, result, finding)
        if finding.difference is not None and not overwrites:
            again = _results(func(*args, **kwargs))
            same = all(
                not bool(rows.differing(x, y).any()) for x, y in zip(_results(result), again, strict=True) if x.numel()
            )
            finding.difference = dataclasses.replace(finding.difference, repeatable=same)
        status, reason = self._judge(func, kind, args, kwargs, result, finding)
        operands = [x.dtype for x in kinds.tensors((args, kwargs, result))]
        dtype = next((x for x in operands if x.is_floating_point or x.is_complex), operands[0] if operands else None)
        device = next((str(x.device) for x in kinds.tensors((args, kwargs, result)) if x.dim()), "cpu")
        self.reports.append(
            CallReport(
                index, func._name, status, reason, dtype, device, shapes, place, finding.compared, finding.difference
            )
        )
        return result

    def _inputs(
        self, leaves: list[Any], part: Slice, call: _Call, overwrites: bool, finding: _Finding
    ) -> _Inputs | None:
        """The call's arguments for a slice, out of the whole batch's; None if they cannot be told."""
        choices: list[list[Any]] = []
        are_rows = True
        try:
            for leaf, noted in zip(leaves, call.leaves, strict=True):
                if isinstance(leaf, torch.Tensor) != isinstance(noted, _Tensor):
                    raise _NotCompared("the slice's call has other arguments")
                if isinstance(leaf, torch.Tensor):
                    choice, same = self._input(leaf, noted, part, overwrites, finding)
                    choices.append(choice)
                    are_rows &= same
                else:
                    choices.append([noted])
        except _NotCompared as reason:
            finding.reasons.append(str(reason))
            return None
        variants = [
            [choice[i] if i < len(choice) else _again(choice[-1], overwrites) for choice in choices]
            for i in range(max(map(len, choices)))
        ]
        return _Inputs(variants, are_rows)

    def _input(
        self, x: torch.Tensor, noted: _Tensor, part: Slice, overwrites: bool, finding: _Finding
    ) -> tuple[list[torch.Tensor], bool]:
        """What a slice's part of a tensor argument may be, likeliest first, and whether it is a part indeed."""
        if tuple(x.shape) != noted.shape:
            finding.sees_batch = True
        if id(x) in finding.outs:
            return [_laid_out(x.new_empty(noted.shape), noted.stride)], True
        options = rows.placements(tuple(x.shape), noted.shape, self._batch, part.stop - part.start)
        if noted.is_whole and noted.values is not None:
            same = any(torch.equal(rows.take(x, placement, self._batch, part), noted.values) for placement in options)
            return [_laid_out(noted.values, noted.stride)], same
        if tuple(x.shape) == noted.shape:
            return [x.clone() if overwrites else x], True
        found: list[torch.Tensor] = []
        for placement in options if rows.is_comparable(x) else ():
            taken = rows.take(x, placement, self._batch, part)
            if noted.values is not None and not rows.resembles(taken, noted.values):
                continue
            if all(bool(rows.differing(taken, other).any()) for other in found):
                found.append(_laid_out(taken, noted.stride))
            if len(found) == _MAX_VARIANTS:
                break
        if not found:
            raise _NotCompared(
                f"a tensor of shape {tuple(x.shape)}, {noted.shape} in {part}, does not hold these rows recognisably"
            )
        return found, True

    def _compare(self, func: Any, inputs: _Inputs, call: _Call, part: Slice, whole: Any, finding: _Finding) -> None:
        variants = inputs.variants
        masks = any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.bool for leaf in variants[0])
        if torch.Tag.dynamic_output_shape in func.tags and (masks or kinds.base_name(func._name) != "index"):
            finding.reasons.append("the length of its result follows the data")
            return
        difference: Difference | None = None
        for leaves in variants:
            args, kwargs = pytree.tree_unflatten(leaves, call.spec)
            try:
                result = func(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  (whatever the operator objects to, it was not compared)
                finding.reasons.append(f"it cannot be repeated on {part}: {error}")
                return
            found = self._difference(part, _results(whole), _results(result), finding)
            difference = difference or found
            if found is None:
                difference = None
                break
        finding.compared += 1
        if difference is not None and not inputs.are_rows:
            finding.reasons.append(f"it is given other integers in {part} than in the batch")
        elif difference is not None:
            finding.difference = difference

    def _difference(
        self, part: Slice, whole: list[torch.Tensor], results: list[torch.Tensor], finding: _Finding
    ) -> Difference | None:
        """The first difference between an operator's results for a slice and those for the whole batch."""
        without_batch: list[tuple[torch.Tensor, torch.Tensor]] = []
        carries_batch = False
        for number, (x, y) in enumerate(zip(whole, results, strict=False)):
            options = rows.placements(tuple(x.shape), tuple(y.shape), self._batch, part.stop - part.start)
            if not options:
                finding.reasons.append("the shape of its result does not follow the batch")
            elif not options[0] and finding.sees_batch:
                without_batch.append((x, y))
            else:
                carries_batch = True
                found = _first_difference(x, y, options, self._batch, part, number)
                if found is not None:
                    return found
        differ = any(bool(rows.differing(x, y).any()) for x, y in without_batch)
        finding.joins_rows |= differ or (bool(without_batch) and not carries_batch)
        return None

    def _judge(
        self, func: Any, kind: Kind, args: Any, kwargs: Any, result: Any, finding: _Finding
    ) -> tuple[Status, str]:
        device = _device_type(args, kwargs) if any(True for _ in kinds.tensors((args, kwargs))) else "cpu"
        dtypes = list(kinds.float_dtypes((args, kwargs)))
        replaced = is_batch_invariant_mode_enabled() or func._name.partition("::")[0] in kinds.OURS
        covered = replaced and bool(dtypes) and kinds.is_covered(func._name, device, dtypes)
        if finding.difference is not None:
            reason = str(finding.difference)
            if kind is Kind.EXACT:  # it computes nothing, so the rows themselves are others
                reason = f"it mixes the rows of different samples: {reason}"
            return Status.VARIES, f"although the mode covers it: {reason}" if covered else reason
        if finding.joins_rows:
            return Status.NOT_PROVABLE, "its result has no batch dimension and comes from all the rows"
        if covered:
            return Status.COVERED, "bikernels' kernel"
        if kind is Kind.EXACT:
            return Status.ROW_INDEPENDENT, kind.value
        if finding.compared and not finding.sees_batch and kind is not Kind.RANDOM:
            return Status.ROW_INDEPENDENT, "its inputs are the same at every batch size"
        if kind is Kind.POINTWISE and device == "cuda":
            return Status.ROW_INDEPENDENT, kind.value
        reason = kind.value
        if kind is Kind.POINTWISE:
            reason = "pointwise, but a CPU's vectorised loop may compute its tail otherwise"
        if finding.compared:
            reason = f"{reason}; same bits in {finding.compared} slices"
        if finding.reasons:
            others = f" with {len(finding.reasons)} others" if finding.compared else ""
            reason = f"{reason}; not compared{others}: {finding.reasons[0]}"
        return Status.NOT_PROVABLE, reason


def _outs(func: Any, args: Any, kwargs: Any) -> set[int]:
    """The ids of the call's `out=` tensors that hold anything before: they are not among its inputs too."""
    bound = kinds.bind(func, args, kwargs)
    outs = {argument.name for argument in func._schema.arguments if argument.is_out}
    inputs = [value for name, value in bound.items() if name not in outs]
    return {id(x) for name in outs for x in kinds.tensors(bound[name])} - set(map(id, kinds.tensors(inputs)))


class _Finding:
    """What comparing one call has shown so far."""

    def __init__(self, outs: set[int]) -> None:
        self.outs = outs
        self.sees_batch = False
        self.joins_rows = False
        self.compared = 0
        self.reasons: list[str] = []
        self.difference: Difference | None = None


def _laid_out(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """A copy with these strides: an operator may choose its way by the layout."""
    shared = [dim for dim, (length, step) in enumerate(zip(x.shape, stride, strict=True)) if step == 0 and length > 1]
    base = x
    for dim in shared:  # an expanded tensor holds such a dimension once
        base = base.narrow(dim, 0, 1)
    shape = tuple(base.shape)
    order = sorted((step, length) for length, step in zip(shape, stride, strict=True) if length > 1)
    if any(step * length > following for (step, length), (following, _) in itertools.pairwise(order)):
        return x.clone(memory_format=torch.contiguous_format)  # its elements share memory in some other way
    return torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device).copy_(base).expand(x.shape)


def _results(result: Any) -> list[torch.Tensor]:
    return [x for x in kinds.tensors(result) if rows.is_comparable(x)]


def _first_difference(
    x: torch.Tensor, y: torch.Tensor, options: list[Placement], batch: int, part: Slice, output: int
) -> Difference | None:
    """The first element of the slice's result y that is not in x, by the placement with which they agree best."""
    best: tuple[int, Placement, torch.Tensor] | None = None
    if x.dtype is not y.dtype or y.numel() == 0:
        return None
    for placement in options:
        mask = rows.differing(rows.take(x, placement, batch, part), y)
        count = int(mask.sum())
        if count == 0:
            return None
        if best is None or count < best[0]:
            best = count, placement, mask
    assert best is not None
    count, placement, mask = best
    at = rows.first(mask)
    taken = rows.take(x, placement, batch, part)
    index = rows.index_in_whole(at, placement, batch, part)
    return Difference(
        part, output, index, taken[at].item(), y[at].item(), _hex(taken[at]), _hex(y[at]), count, y.numel(), True
    )


def _hex(x: torch.Tensor) -> str:
    bits = rows.as_bits(x.reshape(1)).reshape(-1).tolist()
    width = x.element_size() // len(bits)
    return "_".join(f"{value % (1 << 8 * width):0{2 * width}x}" for value in bits)


def _compare_outputs(whole: Any, results: list[Any], batch: int, chosen: list[Slice]) -> Iterator[OutputReport]:
    """The program's own results, from its own runs."""
    for number, (path, x) in enumerate(pytree.tree_flatten_with_path(whole)[0]):
        if not isinstance(x, torch.Tensor) or not rows.is_comparable(x):
            continue
        compared = differing = 0
        first: Difference | None = None
        reason = ""
        for part, result in zip(chosen, results, strict=True):
            leaves = pytree.tree_leaves(result)
            y = leaves[number] if number < len(leaves) else None
            if not isinstance(y, torch.Tensor):
                reason = "the slices give none"
                continue
            options = rows.placements(tuple(x.shape), tuple(y.shape), batch, part.stop - part.start)
            if not options or not options[0]:
                reason = "it has no batch dimension" if options else "its shape does not follow the batch"
                continue
            compared += 1
            found = _first_difference(x.detach(), y.detach(), options, batch, part, number)
            if found is not None:
                differing += 1
                first = first or found
        yield OutputReport(pytree.keystr(path) or "0", compared, differing, first, reason)
