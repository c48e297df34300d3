"""What an audit found: one entry per operator, one per call, and where the first difference lies."""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib.util
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .place import Place
from .rows import Slice


class Status(enum.Enum):
    """What is known of an operator, worst first."""

    VARIES = "varies"
    """Observed: on identical inputs the rows of a slice have other bits than in the whole batch."""
    NOT_PROVABLE = "not provable"
    """No difference observed, and nothing that rules one out at another batch size."""
    ROW_INDEPENDENT = "row-independent"
    """Every row is computed from itself alone, in one way."""
    COVERED = "covered"
    """Computed by bikernels' kernels, whose order of operations is fixed."""


_SEVERITY = {status: i for i, status in enumerate(Status)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first element whose bits differ, and how many do."""

    rows: Slice
    """The slice in which it was found."""
    output: int
    """Which of the operator's (or the model's) outputs."""
    index: tuple[int, ...]
    """Of the element, in the whole batch's result."""
    value: float | complex
    """In the whole batch's result."""
    value_in_slice: float | complex
    bits: str
    """Of `value`, hexadecimal."""
    bits_in_slice: str
    count: int
    """Elements that differ in this slice."""
    elements: int
    """Elements of this slice's result."""
    repeatable: bool
    """Whether the whole batch gives the same bits once more; if not, the operator is not even deterministic."""

    def __str__(self) -> str:
        text = (
            f"[{', '.join(map(str, self.index))}] is {self.value!r} (0x{self.bits}) in the batch, "
            f"{self.value_in_slice!r} (0x{self.bits_in_slice}) in {self.rows} alone; "
            f"{self.count} of {self.elements} elements differ"
        )
        return text if self.repeatable else f"{text}; not deterministic: the same call gave other bits again"


@dataclasses.dataclass(frozen=True)
class CallReport:
    """One call of an operator in the run of the whole batch."""

    index: int
    """Its place in the program, from 0."""
    operator: str
    """As in "aten::mm.out"."""
    status: Status
    reason: str
    dtype: torch.dtype | None
    """Of its first floating-point tensor, or of its first tensor; None without tensors."""
    device: str
    shapes: tuple[tuple[int, ...], ...]
    """Of its tensor arguments."""
    place: Place
    compared: int
    """On how many slices it was repeated and compared."""
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class OperatorReport:
    """All the calls of one operator."""

    operator: str
    status: Status
    """The worst of its calls'."""
    calls: tuple[CallReport, ...]

    @property
    def worst(self) -> CallReport:
        """The first call with that status."""
        return next(call for call in self.calls if call.status is self.status)


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """One of the model's outputs, compared between whole runs."""

    name: str
    compared: int
    """Slices."""
    differing: int
    """Slices whose rows have other bits than in the whole batch."""
    difference: Difference | None
    reason: str
    """Why it could not be compared, or ""."""


class Report(Sequence[OperatorReport]):
    """The operators that ran, worst first. Printed, it is a table; `to_dict` is for programs."""

    def __init__(
        self,
        calls: Iterable[CallReport],
        outputs: Iterable[OutputReport],
        batch: int,
        slices: Iterable[Slice],
        in_mode: bool,
        notes: Iterable[str],
    ) -> None:
        self.calls = tuple(calls)
        """In the order of the program."""
        self.outputs = tuple(outputs)
        self.batch = batch
        self.slices = tuple(slices)
        self.in_mode = in_mode
        """Whether the batch-invariant mode was on."""
        self.notes = tuple(notes)
        """What the audit could not do, and why."""
        by_name: dict[str, list[CallReport]] = collections.defaultdict(list)
        for call in self.calls:
            by_name[call.operator].append(call)
        operators = [
            OperatorReport(name, min((call.status for call in calls), key=_SEVERITY.__getitem__), tuple(calls))
            for name, calls in by_name.items()
        ]
        self._operators = sorted(operators, key=lambda each: _SEVERITY[each.status])

    def __len__(self) -> int:
        return len(self._operators)

    def __getitem__(self, index: Any) -> Any:
        return self._operators[index]

    def __iter__(self) -> Iterator[OperatorReport]:
        return iter(self._operators)

    def with_status(self, status: Status) -> tuple[CallReport, ...]:
        """The calls of this status, in the order of the program."""
        return tuple(call for call in self.calls if call.status is status)

    @property
    def varying(self) -> tuple[CallReport, ...]:
        """The calls that were observed to vary with the batch, in the order of the program."""
        return self.with_status(Status.VARIES)

    @property
    def outputs_vary(self) -> bool:
        """Whether a row of the model's outputs was observed to have other bits alone than in the batch."""
        return any(output.difference is not None for output in self.outputs)

    # ------------------------------------------------------------------------------------------------------- as data

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that `json.dumps` takes (numbers that are not finite become strings)."""
        return {
            "batch": self.batch,
            "slices": [list(rows) for rows in self.slices],
            "in_mode": self.in_mode,
            "outputs_vary": self.outputs_vary,
            "operators": [
                {"operator": each.operator, "status": each.status.value, "calls": len(each.calls)} for each in self
            ],
            "calls": [_as_data(call) for call in self.calls],
            "outputs": [_as_data(output) for output in self.outputs],
            "notes": list(self.notes),
        }

    # ------------------------------------------------------------------------------------------------------- as text

    def headline(self) -> str:
        """What was run and what came out, in two sentences."""
        slices = ", ".join(f"{rows.start}:{rows.stop}" for rows in self.slices)
        mode = "the batch-invariant mode" if self.in_mode else "standard PyTorch"
        verdict = "no output was compared"
        if self.outputs_vary:
            verdict = "the outputs vary with the batch"
        elif any(output.compared for output in self.outputs):
            verdict = "the outputs have the same bits in every slice"
        return f"{mode}, a batch of {self.batch} against its slices {slices}: {verdict}"

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """The table's rows: operator, number of calls, status with how many of the calls have it, what is known."""
        for each in self:
            number = sum(call.status is each.status for call in each.calls)
            status = each.status.value if number == len(each.calls) else f"{each.status.value} ({number})"
            worst = each.worst
            text = worst.reason
            if each.status in (Status.VARIES, Status.NOT_PROVABLE):
                text = f"{worst.place}: {text}"
            yield each.operator, str(len(each.calls)), status, text

    def __str__(self) -> str:
        return self.format()

    def format(self, width: int = 120) -> str:
        """As plain text, with lines of at most `width` characters where the columns allow it."""
        header = ("operator", "calls", "status", "first such call")
        rows = [header, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        indent = sum(widths) + 6
        lines = [*textwrap.wrap(self.headline(), width), ""]
        for i, row in enumerate(rows):
            start = f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:{widths[2]}}  "
            text = textwrap.wrap(row[3], max(40, width - indent)) or [""]
            lines += [start + text[0], *(" " * indent + rest for rest in text[1:])]
            if i == 0:
                lines.append("-" * min(width, indent + 40))
        remarks = [textwrap.fill(remark, width, subsequent_indent="  ") for remark in self._remarks()]
        return "\n".join([*lines, "", *remarks] if remarks else lines)

    def _remarks(self) -> Iterator[str]:
        for output in self.outputs:
            if output.difference is not None:
                often = f"{output.differing} of {output.compared} slices"
                yield f"output {output.name}: other bits in {often}: {output.difference}"
            elif output.reason:
                yield f"output {output.name}: {output.reason}"
        for note in self.notes:
            yield f"note: {note}"

    def __rich__(self) -> Any:
        from rich.console import Group  # type: ignore[import-not-found,unused-ignore]
        from rich.table import Table  # type: ignore[import-not-found,unused-ignore]
        from rich.text import Text  # type: ignore[import-not-found,unused-ignore]

        colors = {"varies": "red", "not provable": "yellow", "row-independent": "green", "covered": "green"}
        table = Table("operator", "calls", "status", "first such call", title=self.headline())
        for operator, calls, status, text in self.rows():
            style = colors[status.partition(" (")[0]]
            table.add_row(Text(operator), calls, Text(status, style=style), Text(text))
        return Group(table, *map(Text, self._remarks()))

    def print(self) -> None:
        """Print the table: with `rich` where it is installed, otherwise as plain text."""
        if importlib.util.find_spec("rich") is None:
            print(self)
        else:
            from rich.console import Console  # type: ignore[import-not-found,unused-ignore]

            Console().print(self)


def _as_data(x: Any) -> Any:
    if dataclasses.is_dataclass(x):
        return {field.name: _as_data(getattr(x, field.name)) for field in dataclasses.fields(x)}
    if isinstance(x, Place):
        return x._asdict()
    if isinstance(x, tuple | list):
        return [_as_data(each) for each in x]
    if isinstance(x, Status):
        return x.value
    if isinstance(x, torch.dtype | complex) or (isinstance(x, float) and not math.isfinite(x)):
        return str(x)
    return x
