"""Which schedule a product on Hopper takes: tables, the model, and what is worth measuring. Needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bikernels.specs import Layout, MatmulSpec

pytest.importorskip("cupy", reason='CuPy is not installed; pip install "bikernels[cuda13]"')

from bikernels.backend.cupy.launch import GPU
from bikernels.backend.cupy.matmul import choice, wgmma
from bikernels.backend.cupy.matmul.problem import Problem
from bikernels.backend.cupy.matmul.wgmma import Choice, Schedule

H100 = GPU("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 3.35e6)
H200 = GPU("NVIDIA H200", (9, 0), 132, 232_448, 4.9e6)
OTHER = GPU("a chip without a table", (9, 0), 78, 232_448, 2.0e6)


def product(m: int, n: int, k: int, batch: tuple[int, ...] = ()) -> Problem:
    """x (m, k) row-major times the transpose of a row-major n x k weight, of every matrix of a batch."""
    rows, weights, results = (((*batch, *shape)) for shape in ((m, k), (k, n), (m, n)))

    def outer(size: int) -> tuple[int, ...]:
        steps = [size]
        for length in reversed(batch[1:]):
            steps.append(steps[-1] * length)
        return tuple(reversed(steps[: len(batch)]))

    return Problem.of(
        MatmulSpec(
            "tc16f25",
            Layout("bfloat16", rows, (*outer(m * k), k, 1)),
            Layout("bfloat16", weights, (*outer(n * k), 1, k)),
            None,
            Layout("bfloat16", results, (*outer(m * n), n, 1)),
        )
    )


def test_tables_of_the_package() -> None:
    """A GPU reads its chip's tables, that of the memory most like its own first; all of their schedules exist."""
    assert [table.name for table in choice.tables(H100)] == ["sm_90-132-h100.json", "sm_90-132-h200.json"]
    assert choice.tables(H200) == choice.tables(H100)[::-1]
    assert not choice.tables(OTHER)
    for table in choice.TABLES.glob("*.json"):
        written = json.loads(table.read_text())["products"]
        assert len(written) == len(choice._read(table))
        for chosen in choice._read(table).values():
            assert chosen.schedule in wgmma.SCHEDULES
            assert isinstance(chosen.swap, bool) and isinstance(chosen.early, bool) and chosen.band >= 1


def test_the_table_of_the_nearest_memory_goes_first() -> None:
    """Of a product that both chips have measured, each takes its own."""
    of_h100, of_h200 = (choice._read(table) for table in choice.tables(H100))
    differing = [
        name for name in of_h100 if name.startswith("kk 1x") and of_h200.get(name, of_h100[name]) != of_h100[name]
    ]
    assert differing
    for name in differing:
        problem = product(*map(int, name.removeprefix("kk 1x").split("x")))
        assert choice.key(problem) == name
        assert (choice.choose(problem, H100), choice.choose(problem, H200)) == (of_h100[name], of_h200[name])


def test_a_table_goes_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = product(16, 4096, 4096)
    entry = Choice(Schedule(64, 64, 128, 7), True, False, 2)
    assert entry not in (choice.choose(problem, H200), choice.choose(problem, OTHER))
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"gpu": "any", "products": {choice.key(problem): entry}}))
    monkeypatch.setenv(choice.ENVIRONMENT_TABLE, str(table))
    assert choice.choose(problem, H200) == choice.choose(problem, OTHER) == entry
    assert choice.choose(product(9, 4096, 4096), OTHER) == entry  # of the same power of two
    assert choice.choose(product(17, 4096, 4096), OTHER) != entry


def test_a_table_holds_for_the_rows_that_fill_its_tiles_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 x 192 suit 1024 x 6144, and of 520 rows a third of them would hold next to nothing."""
    entry = Choice(Schedule(256, 192, 64, 4, 2), False, False, 4)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"gpu": "any", "products": {choice.key(product(1024, 6144, 4096)): entry}}))
    monkeypatch.setenv(choice.ENVIRONMENT_TABLE, str(table))
    for m in (1024, 1000, 900):
        assert choice.choose(product(m, 6144, 4096), H100) == entry
    for m in (520, 600):
        problem = product(m, 6144, 4096)
        chosen = choice.choose(problem, H100)
        assert choice.predicted_us(problem, chosen, H100) < 0.8 * choice.predicted_us(problem, entry, H100)


@pytest.mark.parametrize("m", [200, 280, 336, 448, 600])
def test_tiles_that_share_weights_lie_side_by_side(m: int) -> None:
    """A band that left out some of the activations' tiles would have them read all weights once more."""
    problem = product(m, 24576, 4096)
    found = {one: choice._tiles(problem, one.schedule, one.swap) for one in choice.choices(problem, OTHER)}
    few = {(one.swap, one.band, tiles_m) for one, (tiles_m, tiles_n) in found.items() if min(tiles_m, tiles_n) < 9}
    assert {swap for swap, *_ in few} == {False, True}
    assert all(band == (1 if swap else tiles) for swap, band, tiles in few)
    measured = Choice(Schedule(128, 192, 64, 5, 2), False, False, 2)
    there, fewer = product(512, 24576, 4096), product(336, 24576, 4096)
    assert choice._with_band(measured, there) == measured
    assert choice._with_band(measured, fewer) == measured._replace(band=3)


def test_entries_of_schedules_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may be older than the schedules."""
    problem = product(16, 4096, 4096)
    table = tmp_path / "table.json"
    gone = [[24, 24, 64, 2, 1, 1, 1], False, False, 4]
    table.write_text(json.dumps({"gpu": "any", "products": {choice.key(problem): gone}}))
    expected = choice.choose(problem, OTHER)
    monkeypatch.setenv(choice.ENVIRONMENT_TABLE, str(table))
    assert choice.choose(problem, OTHER) == expected


@pytest.mark.parametrize(
    ("m", "n", "k", "batch"),
    [
        (1, 1, 1, ()),
        (1, 8, 8, ()),
        (7, 151936, 64, ()),
        (8192, 8, 4096, ()),
        (3, 5, 100000, (2, 3)),
        (128, 2048, 128, (32,)),
    ],
)
def test_every_product_has_a_choice(m: int, n: int, k: int, batch: tuple[int, ...]) -> None:
    problem = product(m, n, k, batch)
    found = choice.choices(problem, OTHER)
    assert choice.choose(problem, OTHER) in found
    for one in found:
        assert 0 < choice.predicted_us(problem, one, OTHER) < float("inf")
        tried = choice.variants(problem, one)
        assert len(set(tried)) == len(tried) >= 2
        assert {each.early for each in tried} == {False, True}
        assert all(each[:2] == one[:2] for each in tried)


def test_launches_are_early_where_memory_limits() -> None:
    assert {one.early for one in choice.choices(product(1, 4096, 4096), H200)} == {True}
    assert {one.early for one in choice.choices(product(4096, 4096, 4096), H200)} == {False}


def test_the_model_knows_the_memory() -> None:
    """A product of few rows takes as long as its weights, one of many does not."""
    few, many = product(1, 24576, 4096), product(8192, 4096, 4096)
    for problem, slower in ((few, 1.2), (many, 1.0)):
        chosen = choice.choose(problem, H200)
        ratio = choice.predicted_us(problem, chosen, H100) / choice.predicted_us(problem, chosen, H200)
        assert slower <= ratio < H200.bytes_per_us / H100.bytes_per_us


def test_the_last_tile_lies_within_the_matrix() -> None:
    """It begins early, in whole vectors of an operand along m, and not where the addend may be the result."""

    def begins(problem: Problem) -> tuple[int, int]:
        parameters, _ = wgmma.parameters(problem, Schedule(64, 128, 64, 9), early=False, band=1)
        return int(parameters["last_m"]), int(parameters["last_n"])

    problem = product(200, 300, 4096)
    assert begins(problem) == (136, 172)
    assert begins(problem._replace(a=(1, 200), m=197)) == (136, 172)
    assert begins(product(3, 128, 4096)) == (0, 0)
    in_place = problem._replace(c_dtype="bfloat16", c=problem.out)
    assert begins(in_place) == (wgmma.ANYWHERE, wgmma.ANYWHERE)
    assert begins(in_place._replace(c=(0, 1))) == (136, 172)
    assert begins(in_place._replace(m=1, c=(0, 1)))[1] == wgmma.ANYWHERE  # of one row a stride says nothing
