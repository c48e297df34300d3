"""The benchmarks' own logic: which cases are chosen, what a record becomes, and the CPU part on tiny shapes."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the folder as its scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
    )


def samples(us: float) -> list[float]:
    """Seven samples with the quartiles 0.99 us and 1.01 us."""
    return [us * factor for factor in (1, 0.98, 0.99, 1, 1, 1.01, 1.02)]


@pytest.fixture
def record(module: Any) -> Any:
    """A function that makes a record of a bf16 case on a GPU from times in microseconds."""
    cases, bounds = module("cases"), module("bounds")

    def make(
        us: dict[str, float],
        m: int = 8,
        n: int = 4096,
        k: int = 4096,
        group: str = "small",
        check: str = "ok",
        beside: dict[str, float] | None = None,
    ) -> Any:
        case = cases.Case(group, "bf16", "nk", m, n, k)
        floor = bounds.floor_us("NVIDIA H200", case.dtype, 2.0 * case.products, case.moved)
        timed = {name: samples(value) for name, value in us.items()}
        chain = bounds.chain_us(case.dtype, k) if k >= bounds.CHAIN_RATIO * n else None
        in_turn = {name: samples(value) for name, value in (beside or {}).items()}
        return cases.Record(case, floor, chain, timed, in_turn, check, {})

    return make


@pytest.fixture
def results(module: Any, record: Any) -> Any:
    """A run with a case of each verdict."""
    made = module("records")
    return made.Results(
        {"device": "cuda", "gpu": "NVIDIA H200", "backend": "cupy"},
        [
            record({"torch": 15.0, "cublaslt": 12.0, "bikernels": 10.0, "peer:matmul": 60.0}),
            record({"torch": 12.0, "cublaslt": 15.0, "bikernels": 12.4}, m=16),
            record({"torch": 5.0, "bikernels": 6.9}, m=32, n=256, k=7168),  # a chain of 5.43 us
            record({"torch": 10.0, "bikernels": 20.0}, m=64),
            record({"torch": 400.0, "cublaslt": 360.0, "bikernels": 350.0}, m=8192, group="large"),
        ],
        [made.Host("small bf16", {"bikernels": samples(12.0), "cupy.matmul": samples(10.0)}, {})],
        [made.FirstUse("filled", [{"import bikernels": 0.4, "first product": 0.9}])],
    )


def test_listed_cases(module: Any) -> None:
    cases = module("cases")
    listed = cases.gpu_cases(cases.Selection())
    assert sum(case.dtype == "bf16" and case.batch == 1 for case in listed) == 7 * 14 * 2
    assert {case.group for case in listed} == set(cases.GPU_GROUPS) - {"host", "first-use"}
    assert {(case.m, case.n, case.k) for case in listed if case.batch > 1 and case.layout == "kn"} == {
        (m, 128, length) for m in (1, 128) for length in (128, 512, 2048, 8192)
    }
    full = cases.gpu_cases(cases.Selection(full=True))
    assert sum(case.dtype == "fp16" for case in full) == 7 * 14 * 2
    assert len(set(full)) == len(full) > len(listed) > len(cases.gpu_cases(cases.Selection(quick=True)))


def test_chosen_cases(module: Any) -> None:
    cases = module("cases")
    chosen = cases.Selection(shapes=[(5, 7)], rows=[3, 300], layouts=["kn"], dtypes=["bf16", "fp64"])
    assert [case[:6] for case in cases.gpu_cases(chosen)] == [
        ("small", "bf16", "kn", 3, 5, 7),
        ("medium", "bf16", "kn", 300, 5, 7),
        ("fp64", "fp64", "kn", 3, 5, 7),
        ("fp64", "fp64", "kn", 300, 5, 7),
    ]
    assert [case.m for case in cases.gpu_cases(chosen._replace(groups=["small"]))] == [3]


def test_arguments(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = module("matmul")
    arguments, _ = command.parse(["--shapes", "6144x4096", "1X2", "--m", "1", "17", "--layouts", "nk"])
    assert arguments.shapes == [(6144, 4096), (1, 2)]
    assert arguments.m == [1, 17]
    for wrong in (["--shapes", "6144"], ["--shapes", "0x4"], ["--m", "0"], ["--m", "-1"], ["--dtypes", "int8"]):
        with pytest.raises(SystemExit):
            command.parse(wrong)
        assert wrong[1] in capsys.readouterr().err


def test_peers(module: Any) -> None:
    products = module("products")
    product = products.peer("operator:add")
    assert product(1, 2, None) == 3
    for name, error in (("operator", ValueError), ("operator:none", AttributeError), ("no_such:f", ImportError)):
        with pytest.raises(error):
            products.peer(name)


def test_rotation(module: Any) -> None:
    timing = module("timing")
    assert timing.rotations(2**40) == 2
    assert timing.rotations(1) == timing.MAX_CALLS
    assert timing.rotations(32 * 2**20) * 32 * 2**20 == timing.ROTATED_BYTES


def test_bounds(module: Any) -> None:
    bounds = module("bounds")
    h200, h100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    assert bounds.floor_us(h200, "bf16", 790e12, 1) == bounds.floor_us(h100, "bf16", 790e12, 1) == pytest.approx(1e6)
    assert bounds.floor_us(h200, "bf16", 1, 4.3e12) == bounds.floor_us(h100, "bf16", 1, 3.35e12) == pytest.approx(1e6)
    assert bounds.chain_us("bf16", 4096) == bounds.chain_us("fp16", 4081) == pytest.approx(3.103, abs=1e-3)
    assert bounds.chain_us("fp32", 4096) == 0
    assert bounds.known(h200) and bounds.known(h100)
    assert not bounds.known("NVIDIA A100-SXM4-80GB")


def test_a_row_that_depends_on_the_batch_is_found(module: Any) -> None:
    torch, products = module("torch"), module("products")
    a, b, out = torch.randn(5, 7), torch.randn(7, 3), torch.empty(5, 3)

    def dependent(a: Any, b: Any, out: Any) -> None:
        torch.mul(a @ b, 1 + 2.0**-20 * (len(a) > 1), out=out)

    def incomplete(a: Any, b: Any, out: Any) -> None:
        out[:, 1:] = 1

    assert products.row_is_invariant(a, b, out, products.ours())
    assert not products.row_is_invariant(a, b, out, dependent)
    assert not products.row_is_invariant(a, b, out, incomplete)
    assert products.row_is_invariant(a.expand(2, 5, 7), b.expand(2, 7, 3), out.repeat(2, 1, 1), products.ours())


def test_wall_samples(module: Any) -> None:
    timing = module("timing")
    timed = timing.wall_samples({"a": lambda: None, "b": lambda: math.factorial(50)}, repeats=3, shortest=1e-4)
    assert {name: len(values) for name, values in timed.items()} == {"a": 3, "b": 3}
    hurried = timing.wall_samples({"a": lambda: None}, repeats=3, shortest=1e-4, budget=0)
    assert len(hurried["a"]) == 1


def test_host_samples(module: Any) -> None:
    calls: list[int] = []
    timed = module("timing").host_samples({"a": lambda: calls.append(1)}, lambda: None, calls=20, burst=5, repeats=3)
    assert len(timed["a"]) == 3
    assert len(calls) == 4 * 20


def test_record_survives_a_file(module: Any, results: Any, tmp_path: Path) -> None:
    results.save(tmp_path / "deep" / "r.json")
    loaded = module("records").Results.load(tmp_path / "deep" / "r.json")
    assert loaded.machine == results.machine
    assert [each.case for each in loaded.cases] == [each.case for each in results.cases]
    assert loaded.cases[0].us["torch"] == pytest.approx(results.cases[0].us["torch"], rel=1e-5)
    assert loaded.host[0].name == "small bf16"


def test_verdicts(module: Any, record: Any, results: Any) -> None:
    report = module("report")
    verdicts = [report.verdict(each, results.machine) for each in results.cases]
    assert [each.name for each in verdicts] == ["REACHED", "NOISE", "CHAIN", "MISSED", "REACHED"]
    narrow = record({"torch": 5.0, "bikernels": 7.0}, n=256, k=7168)
    assert report.verdict(narrow, results.machine) is report.Verdict.MISSED
    assert report.verdict(record({"torch": 5.0}), results.machine) is report.Verdict.MISSED
    assert report.verdict(record({"bikernels": 5.0}), results.machine) is None


def test_a_baseline_of_another_process(module: Any, record: Any) -> None:
    """It is compared with ours in that process, whatever the clocks were in this one."""
    report, us = module("report"), {"torch": 12.0, "cublaslt": 11.0, "bikernels": 10.0}
    assert report.relative(record(us, beside={"cublaslt": 8.8})) == pytest.approx(1.2)
    assert report.relative(record(us, beside={"cublaslt": 11.0})) == pytest.approx(1.0)
    assert report.relative(record(us | {"peer": 24.0}, beside={"cublaslt": 8.8}), "peer") == pytest.approx(0.5)


def test_report(module: Any, results: Any) -> None:
    report = module("report")
    assert report.relative(results.cases[0]) == pytest.approx(1.2)  # beside the faster of the two
    summary = report.summary(results).splitlines()
    mean = (1.2 * 12 / 12.4 * 5 / 6.9 * 0.5) ** 0.25
    assert summary[2] == (
        f"| bf16, M < 128 | 4 | 0.98 each, 1.15 mean | {mean:.2f} | 0.50 (4096x4096, M = 64, w.T) | 1 | 1 | 1 | 1 |"
    )
    assert "785 TFLOP/s" in summary[-1]
    assert "| 0.20 |" in report.peers(results)
    misses = report.misses(results).splitlines()
    assert [line.partition(":")[0] for line in misses] == [
        "- bf16 4096x4096, M = 64, w.T",
        "- host, small bf16",
        "- first use, cache filled",
    ]
    text = report.markdown(results)
    assert "| bf16 | 4096x4096 | w.T | 8 | 15.0 [14.8..15.2] | 12.0 [11.9..12.1] | 60.0 [59.4..60.6] |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_a_changed_row_is_reported(module: Any, record: Any, results: Any) -> None:
    changed = record({"torch": 5.0, "bikernels": 1.0}, check="DIFFERENT")
    assert "DIFFERENT" in module("report").misses(results._replace(cases=[changed]))


def test_drift(module: Any, record: Any) -> None:
    command, products = module("matmul"), module("products")
    here = record({"bikernels": 10.0})
    child = {here.case: products.Timed({"bikernels": samples(11.0)}, {})}
    assert command.drift([here], child) == pytest.approx(1.1)
    assert command.drift([here], {}) is None


def test_report_command(results: Any, tmp_path: Path) -> None:
    results.save(tmp_path / "r.json")
    done = run("report.py", tmp_path / "r.json", "--section", "summary", "--section", "machine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| products |")
    assert done.stdout.endswith("gpu NVIDIA H200, backend cupy\n")


def test_plot(module: Any, results: Any, tmp_path: Path) -> None:
    report, path = module("report"), tmp_path / "speed.svg"
    if report.can_plot():
        report.plot(results, path)
        assert "4096x4096" in path.read_text()
        first = path.read_bytes()
        report.plot(results, path)
        assert path.read_bytes() == first
        with pytest.raises(ValueError, match="nothing to draw"):
            report.plot(results, path, "fp16")
    else:
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            report.plot(results, path)
        results.save(tmp_path / "r.json")
        done = run("report.py", tmp_path / "r.json", "--plot", path)
        assert done.returncode == 1
        assert "pip install matplotlib" in done.stderr


def test_on_the_cpu(tmp_path: Path) -> None:
    written = [tmp_path / "r.json", tmp_path / "r.md"]
    options = ("--device", "cpu", "--shapes", "8x16", "--m", "2", "--layouts", "nk", "--dtypes", "fp32", "bf16")
    done = run("matmul.py", *options, "--json", written[0], "--report", written[1], OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    fields = json.loads(written[0].read_text())
    assert fields["machine"]["threads"] == 1
    assert [(each["case"]["dtype"], each["case"]["arithmetic"], sorted(each["us"])) for each in fields["cases"]] == [
        ("fp32", None, ["bikernels", "torch"]),
        ("bf16", None, ["bikernels", "torch"]),
        ("bf16", "tc16f25", ["bikernels"]),
    ]
    assert all(each["check"] == "ok" for each in fields["cases"])
    assert "| 2x8x16 | bf16 | tc16f25 | w |" in written[1].read_text()


def test_the_child_refuses_a_process_with_other_settings() -> None:
    done = run("cublaslt.py", CUBLASLT_WORKSPACE_SIZE="1024")
    assert done.returncode == 2
    assert "CUBLASLT_WORKSPACE_SIZE" in done.stderr


def test_reductions_are_checked(module: Any) -> None:
    """The first and the last row of a result, whatever the axis; an error in either is seen."""
    torch, reductions = pytest.importorskip("torch"), module("reductions")
    every = [(operation, "last", 5) for operation in reductions.OPERATIONS]
    for operation, axis, rows in (
        *every,
        ("sum", "first", 9),
        ("softmax_backward", "first", 9),
        ("mean", "middle", 128),
    ):
        case = reductions.Case(operation, rows, 20, "bf16", axis)
        function = reductions.OPERATIONS[operation]
        (operands,) = function.draw(case, "cpu", 1)
        out = function.ours(*operands, axis=case.dim, backend="cpu")
        assert out.nbytes == case.written
        assert reductions.check(case, operands, out)
        for place in (0, -1):
            wrong = out.clone()
            wrong.view(torch.int16).view(-1)[place] ^= 1
            assert not reductions.check(case, operands, wrong)


def test_reductions_table(module: Any) -> None:
    reductions = module("reductions")
    every = list(reductions.cases(quick=False))
    goals = list(reductions.cases(quick=True))
    assert every[: len(goals)] == goals
    assert len(set(goals)) == len(goals)
    result = reductions.Result(goals[0], {"bikernels": 2.0, "torch": 3.0}, 1.0, True)
    assert result.ratio == 1.5
    assert result.bandwidth() == pytest.approx(goals[0].moved / 2e6)
    assert len(reductions.fields(result)) == len(reductions.HEADER)
    text = reductions.markdown(reductions.Results({"gpu": "a GPU", "torch": "2", "backend": "cupy"}, 3e6, [result]))
    assert text.splitlines()[0] == "a GPU, torch 2, backend cupy; a copy: 3.00 TB/s"
    assert f"| {result.case.operation} | {result.case.rows} |" in text
    assert text.endswith("0 of 1 cases missed\n")


@pytest.mark.parametrize(("ours", "is_miss"), [(11.9, False), (12.1, True), (1.9, False)])
def test_reductions_misses(module: Any, ours: float, is_miss: bool) -> None:
    """More than a fifth slower, and more than a microsecond."""
    reductions = module("reductions")
    case = next(reductions.sweep())
    torch_us = 10.0 if ours > 2 else 1.0
    result = reductions.Result(case, {"bikernels": ours, "torch": torch_us}, None, True)
    assert result.is_miss == is_miss
    text = reductions.markdown(reductions.Results({"cpu": "one", "torch": "2", "backend": "cpu"}, None, [result]))
    assert f"| {case.operation} | last | 1 | {int(is_miss)} |" in text


def test_reductions_on_a_cpu_are_recorded_and_drawn(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reductions, record, drawn = module("reductions"), tmp_path / "record.json", tmp_path / "plot.svg"

    def run_here(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["reductions.py", *map(str, arguments)])
        return reductions.main()

    assert run_here("--device", "cpu", "--only", "sum 16 256 bf16 last", "--json", record) == 0
    results = reductions.Results.load(record)
    assert [one.case.n for one in results.results] == [256]
    assert results.copied is None
    again = tmp_path / "again.json"
    results.save(again)
    assert again.read_text() == record.read_text()
    assert run_here("--device", "cpu", "--only", "sum 16 1", "--seconds", 0, "--onto", record, "--json", again) == 0
    assert again.read_text() == record.read_text()
    assert run_here("--device", "cpu", "--only", "sum 16 16 bf16 last", "--onto", record, "--json", again) == 0
    assert [one.case.n for one in reductions.Results.load(again).results] == [256, 16]
    with pytest.raises(ValueError, match="is of another machine or other versions"):
        run_here("--device", "cpu", "--backend", "cupy", "--onto", record)
    status = run_here("--from", record, "--plot", drawn)
    if not module("report").can_plot():
        assert status == 1
        assert "pip install matplotlib" in capsys.readouterr().err
        return
    assert status == 0
    assert "16 rows" in drawn.read_text()
    assert run_here("--from", record, "--plot", drawn, "--dtype", "fp64") == 1
    assert "nothing to draw" in capsys.readouterr().err


def test_host_cost_of_the_mode(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On tiny shapes: both ways are timed, and the record is one that `records.py` reads."""
    host, decoder = module("host"), module("decoder")
    tiny = {"width": 16, "heads": 4, "kv_heads": 2, "head": 4, "mlp": 8, "vocabulary": 10, "batch": 2, "context": 3}
    written = tmp_path / "host.json"
    monkeypatch.setattr(host, "REPEATS", 2)
    monkeypatch.setattr(host, "Sizes", lambda layers: decoder.Sizes(layers, **tiny))
    every = host.calls
    monkeypatch.setattr(host, "calls", lambda device: {"mm": every(device)["mm"]})
    monkeypatch.setattr(sys, "argv", ["host.py", "--device", "cpu", "--layers", "2", "--json", str(written)])
    assert host.main() == 0
    loaded = module("records").Results.load(written)
    assert [each.name for each in loaded.host] == ["mm", "decode step, 2 layers, eager"]
    for each in loaded.host:
        assert sorted(each.us) == ["mode", "standard"]
        assert all(us > 0 for samples in each.us.values() for us in samples)


def test_a_decode_step_is_the_same_in_any_batch(module: Any) -> None:
    from bikernels_torch import set_batch_invariant_mode

    decoder = module("decoder")
    model = decoder.Decoder(decoder.Sizes(2, 16, 4, 2, 4, 8, 10, 5, 3), "cpu")
    with torch.inference_mode(), set_batch_invariant_mode():
        whole = model.step()
        for layer in model.layers:
            layer.attention.keys, layer.attention.values = layer.attention.keys[1:2], layer.attention.values[1:2]
        model.tokens = model.tokens[1:2]
        assert torch.equal(model.step(), whole[1:2])
