"""The record of a run: written by `matmul.py`, read by `report.py`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cases import Record


class Spread(NamedTuple):
    """The middle of some samples and their quartiles."""

    low: float
    median: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Quartiles of the samples; of one sample, itself."""
    low, median, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [*samples] * 3
    return Spread(low, median, high)


class Host(NamedTuple):
    """Host time of one eager call on small operands."""

    name: str
    us: dict[str, list[float]]
    failed: dict[str, str]


class FirstUse(NamedTuple):
    """Seconds of the steps of a fresh process, one dict a process."""

    cache: str
    seconds: list[dict[str, float]]


class Results(NamedTuple):
    """Everything that one run measured."""

    machine: dict[str, Any]
    cases: list[Record]
    host: list[Host]
    first_use: list[FirstUse]

    def save(self, path: Path) -> None:
        """One line per case, so that two records can be compared line by line."""
        rows = {
            "cases": [record.to_json() for record in self.cases],
            "host": [host._asdict() for host in self.host],
            "first_use": [use._asdict() for use in self.first_use],
        }
        parts = [f'"machine": {json.dumps(self.machine, ensure_ascii=False)}']
        for name, items in rows.items():
            lines = ",\n".join(f"  {json.dumps(_rounded(item), ensure_ascii=False)}" for item in items)
            parts.append(f'"{name}": [\n{lines}\n ]')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` has written."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            fields["machine"],
            [Record.from_json(each) for each in fields["cases"]],
            [Host(**each) for each in fields["host"]],
            [FirstUse(**each) for each in fields["first_use"]],
        )


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, which is more than any of them has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
