"""Turn results of `matmul.py` into the Markdown tables and the plot that the documents show; nothing is typed by hand.

    python benchmarks/report.py RESULTS.json [--section NAME ...] [--plot FILE.svg]

Times are medians of the samples with their quartiles in brackets. "Best cuBLAS" is, per case, the faster of cuBLAS as
PyTorch ships it and cuBLASLt without split-K, each relative to ours as timed in turn with it. A case is "reached" if it
meets its group's goal, "at chain" if M < 128, K / N ≥ 16 and it is within 1.5 µs of its chain of additions alone
(`chain.py`), "in noise" if it would meet the goal at the favourable quartiles of both times; otherwise it is "missed".
"""

from __future__ import annotations

import argparse
import enum
import functools
import importlib
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cases import DTYPE, GROUPS, LAYOUTS, Record
from records import Results, Spread, spread

OURS, TORCH, NO_SPLIT_K = "bikernels", "torch", "cublaslt"
BASELINES = (TORCH, NO_SPLIT_K)

CHAIN_MARGIN_US = 1.5
TENSOR_CORE_GOAL = 200e6
"""Products a second and core of `tc16f25` on a CPU."""
HOST_PEER = "cupy.matmul"
"""What a call of ours on CuPy arrays may cost on the host."""
FIRST_USE_GOAL = 1.0
"""Seconds that a fresh process with a filled cache may spend on importing bikernels and on the first product."""


class Goal(NamedTuple):
    """Speed relative to the baseline: of every case, and the geometric mean aimed at."""

    each: float
    mean: float | None


GOALS = {
    "cupy": {
        "small": Goal(0.98, 1.15),
        "medium": Goal(0.95, 1.05),
        "large": Goal(0.95, 1.0),
        "fp32": Goal(0.95, 1.05),
        "fp64": Goal(0.95, 1.0),
        "batched": Goal(0.95, 1.1),
    },
    "numba": {"small": Goal(0.5, None), "large": Goal(0.45, 0.6)},
    "cpu": {"cpu": Goal(0.6, 0.9)},
}
"""By backend and group. On a CPU they are those of fp32 and fp64."""


class Verdict(enum.Enum):
    REACHED = "reached"
    CHAIN = "at chain"
    NOISE = "in noise"
    MISSED = "missed"


# -------------------------------------------------------------------------------------------------------------- figures


class Pair(NamedTuple):
    """A baseline, and ours as timed in turn with it; None if ours failed."""

    baseline: Spread
    ours: Spread | None

    @property
    def speed(self) -> float:
        """Of ours relative to the baseline's, whose own stands in where ours failed."""
        return self.baseline.median / (self.ours or self.baseline).median


def pair(record: Record) -> Pair | None:
    """Ours beside the baseline that it is slowest against."""
    pairs = []
    for name in BASELINES:
        if name in record.us:
            ours = record.beside.get(name, record.us.get(OURS))
            pairs.append(Pair(spread(record.us[name]), spread(ours) if ours else None))
    return min(pairs, key=lambda each: (each.speed, each.baseline.median), default=None)


def relative(record: Record, name: str = OURS) -> float | None:
    """Speed of an implementation relative to the best baseline."""
    against = pair(record)
    if against is None or name not in record.us:
        return None
    return against.speed if name == OURS else against.baseline.median / spread(record.us[name]).median


def goal(record: Record, backend: str) -> Goal | None:
    """The goal of this case, if it has one."""
    if record.case.group == "cpu" and record.case.dtype not in ("fp32", "fp64"):
        return None
    return GOALS.get(backend, {}).get(record.case.group)


def verdict(record: Record, machine: Mapping[str, Any]) -> Verdict | None:
    """How the case stands to its goal; None if it has none or no baseline was timed."""
    if record.case.group == "tc16f25" and OURS in record.us:
        return Verdict.REACHED if products_per_core(record, machine) >= TENSOR_CORE_GOAL else Verdict.MISSED
    target, against = goal(record, machine["backend"]), pair(record)
    if target is None or against is None:
        return None
    baseline, ours = against
    if ours is None:
        return Verdict.MISSED
    if against.speed >= target.each:
        return Verdict.REACHED
    by_chain = record.case.group == "small" and record.chain_us is not None
    if by_chain and ours.median <= (record.chain_us or 0.0) + CHAIN_MARGIN_US:
        return Verdict.CHAIN
    return Verdict.NOISE if baseline.high / ours.low >= target.each else Verdict.MISSED


def tflops(record: Record, name: str = OURS) -> float:
    """10^12 floating-point operations a second."""
    return 2e-6 * record.case.products / spread(record.us[name]).median


def products_per_core(record: Record, machine: Mapping[str, Any]) -> float:
    """Products a second and thread of a CPU."""
    return 1e6 * record.case.products / spread(record.us[OURS]).median / machine["threads"]


def name_of(record: Record) -> str:
    """The case in words."""
    return f"{record.case.shape}, M = {record.case.m}, {LAYOUTS[record.case.layout]}"


def by_shape(records: Sequence[Record]) -> list[Record]:
    """Records of one dtype, shape and layout together, M ascending; shapes in the order of their first case."""
    order = {record.case.shape: place for place, record in reversed(list(enumerate(records)))}
    dtypes, layouts = list(DTYPE), list(LAYOUTS)

    def key(record: Record) -> tuple[int, int, int, int]:
        case = record.case
        return dtypes.index(case.dtype), order[case.shape], layouts.index(case.layout), case.m

    return sorted(records, key=key)


def grouped(records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Records by dtype and group, with a name."""
    order = list(GROUPS)
    key = lambda record: (order.index(record.case.group), list(DTYPE).index(record.case.dtype))  # noqa: E731
    for _, members in itertools.groupby(sorted(records, key=key), key):
        listed = list(members)
        dtype, group = listed[0].case.dtype, listed[0].case.group
        yield (GROUPS[group] if dtype == group else f"{dtype}, {GROUPS[group]}"), listed


# --------------------------------------------------------------------------------------------------------------- tables


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines]) if lines else ""


def _time(samples: Sequence[float] | None) -> str:
    return _spread(spread(samples) if samples else None)


def _spread(times: Spread | None) -> str:
    return f"{times.median:.1f} [{times.low:.1f}..{times.high:.1f}]" if times else "-"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _checked(record: Record) -> str:
    return "failed" if OURS in record.failed else record.check


def _on_cpu(results: Results) -> bool:
    return results.machine["device"] == "cpu"


def title(results: Results, name: str) -> str:
    """An implementation, as columns name it."""
    torch = "torch" if _on_cpu(results) else "cuBLAS"
    return {OURS: f"bikernels ({results.machine['backend']})", TORCH: torch, NO_SPLIT_K: "cuBLASLt, no split-K"}.get(
        name, name
    )


def implementations(records: Iterable[Record]) -> list[str]:
    """Who was timed: the baselines first, ours last."""
    found = dict.fromkeys(name for record in records for name in record.us)
    return [*(name for name in BASELINES if name in found), *(name for name in found if name not in (*BASELINES, OURS))]


def machine(results: Results) -> str:
    """The line of names and versions."""
    return ", ".join(f"{name} {value}" for name, value in results.machine.items())


def summary(results: Results) -> str:
    """Geometric mean and worst case of each group, and how its cases stand to the goal."""
    backend = results.machine["backend"]
    baseline = "torch" if _on_cpu(results) else "best cuBLAS"

    def rows() -> Iterator[Sequence[str]]:
        for name, records in grouped(results.cases):
            speeds = [(speed, record) for record in records if (speed := relative(record)) is not None]
            worst, slowest = min(speeds, key=lambda pair: pair[0], default=(None, None))
            mean = statistics.geometric_mean([speed for speed, _ in speeds]) if speeds else None
            target = goal(records[0], backend)
            verdicts = [verdict(record, results.machine) for record in records]
            counts = [str(verdicts.count(each)) if any(verdicts) else "-" for each in Verdict]
            wanted = "-" if target is None else f"{target.each:g} each, {_number(target.mean)} mean"
            where = f" ({name_of(slowest)})" if slowest else ""
            yield (name, str(len(records)), wanted, _number(mean), _number(worst) + where, *counts)

    heads = [
        "products",
        "cases",
        "goal",
        f"speed / {baseline}, geometric mean",
        "worst case",
        *(each.value for each in Verdict),
    ]
    highest = max((record for record in results.cases if OURS in record.us), key=tflops, default=None)
    text = table(heads, rows())
    if highest is not None and not _on_cpu(results):
        text += f"\n\nThe highest rate: {tflops(highest):.0f} TFLOP/s in {highest.case.dtype} ({name_of(highest)})."
    return text


def peers(results: Results) -> str:
    """Geometric means of everybody's speed relative to the best baseline."""
    names = [*implementations(results.cases), OURS]

    def mean(records: Sequence[Record], name: str) -> str:
        speeds = [speed for record in records if (speed := relative(record, name)) is not None]
        return _number(statistics.geometric_mean(speeds) if speeds else None)

    compared = [record for record in results.cases if pair(record)]
    rows = ([group, *(mean(records, name) for name in names)] for group, records in grouped(compared))
    return table(["speed / best, geometric mean", *(title(results, name) for name in names)], rows)


def misses(results: Results) -> str:
    """What is below its goal beyond noise and the hardware's bound, what failed, and rows that a batch changed."""
    lines = []
    for record in by_shape(results.cases):
        text = f"- {record.case.dtype} {name_of(record)}: "
        if record.check != "ok":
            lines.append(f"{text}{record.check}")
        elif verdict(record, results.machine) is not Verdict.MISSED:
            continue
        elif record.case.group == "tc16f25":
            rate = 1e-6 * products_per_core(record, results.machine)
            lines.append(f"{text}{rate:.0f} million products a second and core in tc16f25")
        else:
            against = pair(record)
            times = f"{_spread(against and against.ours)} µs beside {_spread(against and against.baseline)}"
            lines.append(f"{text}{_number(relative(record))} ({times}; bound {_number(record.floor_us, 1)})")
    for each in results.host:
        medians = {name: spread(samples).median for name, samples in each.us.items()}
        if OURS in each.failed:
            lines.append(f"- host, {each.name}: {each.failed[OURS]}")
        elif medians[OURS] > medians.get(HOST_PEER, math.inf):
            lines.append(f"- host, {each.name}: {medians[OURS]:.1f} µs beside {medians[HOST_PEER]:.1f} of {HOST_PEER}")
    for use in results.first_use:
        seconds = statistics.median(each["import bikernels"] + each["first product"] for each in use.seconds)
        if use.cache == "filled" and seconds > FIRST_USE_GOAL:
            lines.append(f"- first use, cache filled: {seconds:.2f} s")
    return "\n".join(lines) or "Nothing missed its goal."


def cases(results: Results) -> str:
    """Every case on a GPU."""
    if _on_cpu(results):
        return ""
    names = implementations(results.cases)
    heads = ["dtype", "weights NxK", "layout", "M", *(f"{title(results, name)}, µs" for name in names)]
    heads += [f"{title(results, OURS)}, µs", "bound, µs", "speed / best", "row alone"]
    return table(
        heads,
        (
            [
                record.case.dtype,
                record.case.shape,
                LAYOUTS[record.case.layout],
                str(record.case.m),
                *(_time(record.us.get(name)) for name in [*names, OURS]),
                _number(record.floor_us, 1),
                _number(relative(record)),
                _checked(record),
            ]
            for record in by_shape(results.cases)
        ),
    )


def host(results: Results) -> str:
    """Host time of eager calls."""
    names = list(dict.fromkeys(name for each in results.host for name in each.us))
    return table(
        ["host time of a call, µs", *names],
        ([each.name, *(_time(each.us.get(name)) for name in names)] for each in results.host),
    )


def first_use(results: Results) -> str:
    """Seconds from the start of a process to its first product."""
    steps = list(dict.fromkeys(step for use in results.first_use for each in use.seconds for step in each))
    return table(
        ["cache", "processes", *(f"{step}, s" for step in steps)],
        (
            [
                use.cache,
                str(len(use.seconds)),
                *(_number(statistics.median(each[s] for each in use.seconds)) for s in steps),
            ]
            for use in results.first_use
        ),
    )


def cpu(results: Results) -> str:
    """Every case on a CPU; bf16 and fp16 also relative to our own fp32."""
    if not _on_cpu(results):
        return ""
    in_fp32 = {
        record.case._replace(dtype=""): spread(record.us[OURS]).median
        for record in results.cases
        if record.case.dtype == "fp32" and OURS in record.us
    }

    def row(record: Record) -> Sequence[str]:
        ours, fp32 = spread(record.us[OURS]).median, in_fp32.get(record.case._replace(dtype=""))
        arithmetic = record.case.arithmetic
        rate = 1e-6 * products_per_core(record, results.machine) if arithmetic else None
        return [
            f"{record.case.m}x{record.case.n}x{record.case.k}",
            record.case.dtype,
            arithmetic or "native",
            LAYOUTS[record.case.layout],
            *(_number(1e3 * tflops(record, name) if name in record.us else None, 1) for name in (TORCH, OURS)),
            _number(relative(record)),
            _number(fp32 / ours if fp32 else None),
            _number(rate, 0),
            _checked(record),
        ]

    heads = ["MxNxK", "dtype", "class", "layout", "torch, GFLOP/s", "bikernels, GFLOP/s", "speed / torch"]
    heads += ["speed / own fp32", "million products a second and core", "row alone"]
    return table(heads, (row(record) for record in results.cases if OURS in record.us))


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "machine": ("Machine", machine),
    "summary": ("Summary", summary),
    "peers": ("Everybody", peers),
    "misses": ("Misses", misses),
    "host": ("Host cost", host),
    "first-use": ("First use", first_use),
    "cpu": ("CPU", cpu),
    "cases": ("Cases", cases),
}


def markdown(results: Results, sections: Sequence[str] | None = None) -> str:
    """The report, or some of its sections without headings."""
    if sections:
        return "\n\n".join(SECTIONS[name][1](results) for name in sections) + "\n"
    parts = ((heading, make(results)) for heading, make in SECTIONS.values())
    return "# Matrix products\n\n" + "\n".join(f"## {heading}\n\n{text}\n" for heading, text in parts if text)


# ----------------------------------------------------------------------------------------------------------------- plot

NO_MATPLOTLIB = "the plot needs matplotlib, which is not installed: pip install matplotlib"

GREY, BLUE, ORANGE, GREEN = "#7d8590", "#2f81f7", "#d9730d", "#2da44e"  # readable on white and on black
COLUMNS, TOP = 4, 2.0


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(results: Results, path: Path, dtype: str = "bf16") -> None:
    """Speed relative to the best cuBLAS over M, a panel per shape; the grey line is what the hardware allows.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the results have no case to draw.
    """
    records = [record for record in results.cases if record.case.dtype == dtype and record.case.batch == 1]
    records = [record for record in records if relative(record) is not None and record.case.group != "cpu"]
    shapes = list(dict.fromkeys(record.case.shape for record in records))
    if not shapes:
        raise ValueError(f"the results have no {dtype} product on a GPU beside cuBLAS, so there is nothing to draw")

    def draw(panel: Any, shape: str) -> None:
        _draw(panel, results, [record for record in records if record.case.shape == shape])

    draw_panels(path, shapes, draw, "M (rows of activations)", "speed / best cuBLAS", TOP)


def draw_panels(
    path: Path,
    names: Sequence[str],
    draw: Callable[[Any, str], None],
    x_label: str,
    y_label: str,
    top: float | None = None,
) -> None:
    """A figure of a panel for each name, which draw(panel, name) fills; the axes are shared.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not can_plot():
        raise ModuleNotFoundError(NO_MATPLOTLIB)
    matplotlib: Any = importlib.import_module("matplotlib")
    figure_module: Any = importlib.import_module("matplotlib.figure")
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    style = {"svg.fonttype": "none", "svg.hashsalt": "bikernels", "font.size": 9, "text.color": GREY}
    style |= {"axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=(2.6 * columns, 2.1 * rows + 0.7), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for panel, name in zip(panels, names, strict=False):
            draw(panel, name)
            panel.set_title(name, fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(names) - columns) : len(names)]:
            panel.tick_params(labelbottom=True)
        panels[0].set_ylim(0, top)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        handles: dict[str, Any] = {}
        for panel in panels:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(path, format=path.suffix.lstrip(".") or "svg", transparent=True, metadata=_undated(path))


def _undated(path: Path) -> dict[str, None]:
    return {"Date": None} if path.suffix == ".svg" else {}


def _draw(panel: Any, results: Results, records: Sequence[Record]) -> None:
    """The lines of one shape."""

    def line(layout: str, value: Callable[[Record], float | None], label: str, **how: Any) -> None:
        points = [(record.case.m, y) for record in records if record.case.layout == layout if (y := value(record))]
        if points:
            panel.plot(*zip(*sorted(points), strict=True), label=label, **how)

    def ceiling(record: Record) -> float | None:
        against, bound = pair(record), record.floor_us
        return against.baseline.median / bound if against and bound else None

    drawn = records[0].case.layout  # the peers and the bound differ little between layouts
    line(drawn, ceiling, "hardware bound", color=GREY, linewidth=1, linestyle=":")
    others = [name for name in implementations(records) if name not in BASELINES]
    for name, color in zip(others, itertools.cycle((GREEN, GREY))):
        line(drawn, functools.partial(relative, name=name), title(results, name), color=color, linewidth=1)
    for layout, style, color in (("nk", "-", BLUE), ("kn", "--", ORANGE)):
        label = f"{title(results, OURS)}, {LAYOUTS[layout]}"
        line(layout, relative, label, color=color, linestyle=style, linewidth=1.6, marker="o", markersize=2.5)
    panel.axhline(1, color=GREY, linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda m, _: f"{m:.0f}")


# -------------------------------------------------------------------------------------------------------------- command


def main() -> int:
    """Print the report of a record, or draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--section", action="append", choices=tuple(SECTIONS), help="only this one; may be repeated")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw instead of printing")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"), help="of the plot")
    arguments = parser.parse_args()
    results = Results.load(arguments.results)
    if arguments.plot is None:
        print(markdown(results, arguments.section), end="")
        return 0
    try:
        plot(results, arguments.plot, arguments.dtype)
    except (ModuleNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
