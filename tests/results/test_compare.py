"""Engines side by side: equal tokens, one split, numbers that the board of each study has, too."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.front import hypervolume, worst_corner
from search.merging.baselines import BASELINES
from search.results.board import Board, Row, read_board
from search.results.compare.command import compare
from search.results.compare.entrants import LINE, budget_tokens, entries, parse_entrants
from search.results.compare.judge import Volume
from search.results.compare.picture import _median_attainment, comparison_figure
from search.results.compare.runs import checkpoints, run_entries
from search.results.compare.standings import Outcome, Standings, _standing, read_standings
from search.results.compare.table import comparison_table
from search.results.intervals import RESAMPLES
from search.running.problem import Problem
from search.storage.database import reserved
from search.storage.store import StudyStore
from tests.conftest import Cli
from tests.pico_study import write_study
from tests.scripts import load_script

FIRST = len(BASELINES)
ENGINES = "random,composite:startup=3"


def opened(folder: Path, seeds: int = 2, evaluations: int = 16) -> tuple[list[Any], Problem, str]:
    config = load_study_file(write_study(folder))
    problem = Problem.open(config, "cpu")
    tokens = evaluations * problem.evaluator("search").tokens
    return (
        entries(config, parse_entrants(ENGINES), seeds, tokens),
        problem,
        f"sqlite:///{folder / 'study.db'}",
    )


@pytest.fixture(scope="module")
def run_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[StudyStore], Standings]:
    every, problem, url = opened(tmp_path_factory.mktemp("compare"))
    stores = run_entries(every, problem, url)
    return every, stores, read_standings("pico", every, stores, checkpoints(every[0].config.tokens))


def test_every_study_spends_the_same_tokens(run_once: tuple[list[Any], list[StudyStore], Standings]) -> None:
    every, stores, found = run_once
    assert [(entry.entrant.label, entry.seed) for entry in every] == [
        ("random", 0),
        ("composite:startup=3", 0),
        (LINE, 0),
        ("random", 1),
        ("composite:startup=3", 1),
    ]
    for entry, store in zip(every, stores, strict=True):
        spent = sum(record.tokens for record in store.trials())
        assert spent == entry.config.tokens == found.budget, "baselines that another study scored count, too"
        assert len(store.trials()) == 16
    line = stores[2].trials()[FIRST:]
    assert all(len(set(record.coefficients.values())) == 1 for record in line)


def volume(board: Board, rows: Sequence[Row]) -> float:
    """Over the parents' worst values on the report split."""
    corner = worst_corner(board.points(board.of_kind("pre", "post"), "report"), maximise=board.maximize)
    return hypervolume(board.points(rows, "report"), corner, maximise=board.maximize)


def test_the_numbers_are_those_of_each_studys_board(
    run_once: tuple[list[Any], list[StudyStore], Standings],
) -> None:
    every, stores, found = run_once
    for label in ("random", "composite:startup=3", LINE):
        boards = [
            read_board(store)
            for entry, store in zip(every, stores, strict=True)
            if entry.entrant.label == label
        ]
        standing = next(one for one in found.standings if one.label == label)
        volumes = [volume(board, board.front) for board in boards]
        assert standing.report.value == pytest.approx(np.mean(volumes))
        assert standing.spread == pytest.approx((min(volumes), max(volumes)))
        assert standing.search[-1] == pytest.approx(
            np.mean([board.hypervolume["search"].front for board in boards])
        )
        assert list(standing.search) == sorted(standing.search), "more tokens never lose what was found"
        assert found.rivals[0].report.value == pytest.approx(volume(boards[0], boards[0].uniform_line()))
    temperature = next(one for one in found.rivals if one.label == "post + temperature")
    (row,) = [row for row in boards[0].alternatives if row.label == "post + temperature"]
    assert temperature.values == {name: row.report[name] for name in ("accuracy", "ece")}


def test_standings_are_sorted_and_their_intervals_hold_them(
    run_once: tuple[list[Any], list[StudyStore], Standings],
) -> None:
    found = run_once[2]
    values = [one.report.value for one in found.standings]
    assert values == sorted(values, reverse=True)
    for one in found.standings:
        for cell in (one.report, one.over_line, one.over_temperature):
            assert cell is None or cell.low <= cell.value <= cell.high
        assert one.over_temperature is None or one.over_temperature.value >= 1.0, "a union is never less"
        assert len(one.at) == 3
        assert one.at[-1] == pytest.approx(one.report.value)
    line = next(one for one in found.standings if one.label == LINE)
    assert line.seeds == 1
    assert (line.gain.low, line.gain.value, line.gain.high) == (0.0, 0.0, 0.0)
    for one in found.standings:
        assert one.gain.value == pytest.approx(one.report.value - line.report.value)
        assert one.gain.low <= one.gain.value <= one.gain.high
    if line.over_line is not None:
        assert line.over_line.value == pytest.approx(1.0)


def test_table_json_and_picture(run_once: tuple[list[Any], list[StudyStore], Standings]) -> None:
    found = run_once[2]
    table = comparison_table(found)
    assert all(f"| {one.label}" in table for one in (*found.standings, *found.rivals))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["budget"] == found.budget
    assert max(map(len, table.splitlines())) < 260
    assert len(comparison_figure(found).axes) == 2
    three = replace(found, objectives=(*found.objectives, ("brier", False)))
    assert len(comparison_figure(three).axes) == 2, "says that it cannot draw surfaces"


def test_a_finished_comparison_is_read_not_run(tmp_path: Path) -> None:
    every, problem, url = opened(tmp_path, seeds=1, evaluations=13)
    first = [store.trials() for store in run_entries(every, problem, url)]
    again, fresh, _ = opened(tmp_path, seeds=1, evaluations=13)
    assert [store.trials() for store in run_entries(again, fresh, url)] == first


def test_the_limit_is_the_front_of_everything(
    run_once: tuple[list[Any], list[StudyStore], Standings],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, stores, found = run_once
    limit = load_script("quickstart/limit.py")
    monkeypatch.setattr("sys.argv", ["limit.py", "--storage", stores[0].url])
    limit.main()
    first, *table = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{len(stores)} studies, {16 * len(stores)} trials of ")
    rows = {
        cells[0]: cells for line in table[2:] if (cells := [c.strip() for c in line.strip("|").split("|")])
    }
    values = np.array([r.values for store in stores for r in store.trials()])
    parents = [r.values for r in stores[0].trials() if r.kind in ("pre", "post")]
    corner = worst_corner(np.array(parents), maximise=(True, False))
    everything = hypervolume(values, corner, maximise=(True, False))
    assert rows[limit.POOLED][3] == f"{1000 * everything:.2f}"
    for one in found.standings:
        cells = rows[f"pico-{one.label.replace(':', '-').replace('=', '-')}"]
        assert (cells[1], cells[3]) == (str(one.seeds), f"{1000 * one.search[-1]:.2f}")
        assert float(cells[4]) == pytest.approx(one.search[-1] / everything, abs=1e-3)
        assert cells[5].startswith(f"{1000 * one.report.value:.2f} [")


@pytest.mark.slow
def test_what_another_process_works_on_is_left_to_it(tmp_path: Path) -> None:
    every, problem, url = opened(tmp_path, seeds=1, evaluations=12)
    with reserved(url, every[1].config.name):
        # This very process holds it: what a process holds it may take again, so the helper is another one.
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            names = pool.apply(helped, (tmp_path,))
    assert names == [every[0].config.name, every[2].config.name]
    said: list[str] = []
    stores = run_entries(every, problem, url, done=lambda entry, *_: said.append(entry.config.name))
    assert [store.name for store in stores] == [entry.config.name for entry in every]
    assert said == [every[1].config.name], "the others were finished"


def helped(folder: Path) -> list[str]:
    """Names of what a helping process finished."""
    every, problem, url = opened(folder, seeds=1, evaluations=12)
    return [store.name for store in run_entries(every, problem, url, helping=True)]


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path)
    arguments = ["compare", str(study), "--engines", ENGINES, "--budget", "14x", "--seeds", "1"]
    tables = []
    for workers in ("1", "2"):
        url = f"sqlite:///{tmp_path / workers / 'study.db'}"
        out = tmp_path / workers / "out"
        code, shown, err = cli(*arguments, "--storage", url, "--workers", workers, "--out", str(out))
        assert code == 0, err
        assert (out / "comparison.md").read_text().rstrip("\n") == shown.rstrip("\n")
        assert {path.name for path in out.iterdir()} == {
            f"comparison.{kind}" for kind in ("md", "json", "png", "svg")
        }
        tables.append(shown)
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("engines", "wanted"),
    [
        ("nothing", "engine"),
        ("tpe:population=4", "population"),
        ("tpe,tpe", "twice"),
        ("tpe:startup", "wanted options"),
        ("tpe:seed=3", "no seed"),
    ],
)
def test_engines_that_do_not_exist_are_refused(tmp_path: Path, engines: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        compare(
            load_study_file(write_study(tmp_path)),
            f"sqlite:///{tmp_path / 'study.db'}",
            tmp_path / "out",
            engines=engines,
            budget="20x",
            seeds=1,
            device="cpu",
        )
    assert not (tmp_path / "study.db").exists()


@pytest.mark.parametrize(
    ("text", "wanted"), [("11x", "parents and uniform line"), ("many", "wanted scored tokens")]
)
def test_budgets_that_are_none_are_refused(text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        budget_tokens(text, 1000, FIRST)


def test_shared_materials_are_of_one_study(tmp_path: Path) -> None:
    config = load_study_file(write_study(tmp_path))
    problem = Problem.open(config, "cpu")
    twin = problem.under(config.model_copy(update={"name": "other", "trials": 3}))
    assert twin.live is problem.live
    assert twin.evaluator("report") is problem.evaluator("report")
    with pytest.raises(ConfigError, match="differs"):
        problem.under(config.model_copy(update={"objectives": ["accuracy"]}))


def test_half_of_the_seeds_attain_the_median_surface() -> None:
    corner = np.array([1.0, 1.0])
    low, high = np.array([[0.2, 0.4], [0.4, 0.2]]), np.array([[0.3, 0.3]])
    assert _median_attainment([high], corner).tolist() == [[0.3, 0.3]]
    both = _median_attainment([low, low, high], corner)
    assert both.tolist() == low.tolist()
    assert len(_median_attainment([low, low + 5.0, low + 5.0], corner)) == 0, (
        "one of three attains nothing of it"
    )


def test_a_front_twice_as_large_on_every_resample_is_twice_as_large() -> None:
    draw = np.random.default_rng(0)
    line = Volume(1.0, draw.uniform(0.8, 1.2, RESAMPLES))
    twice = Volume(2.0, 2.0 * line.samples)

    def outcome(label: str, volume: Volume) -> Outcome:
        return Outcome(label, 0, 1, (1,), (1.0,), (volume,), volume, (1.0,), np.zeros((1, 2)), {})

    base = outcome(LINE, line)
    found = _standing([outcome("a", twice)] * 3, base, Volume(4.0, 4.0 * line.samples))
    assert found.over_line is not None
    assert (found.over_line.low, found.over_line.value, found.over_line.high) == pytest.approx(
        (2.0, 2.0, 2.0)
    )
    assert found.over_temperature is not None
    assert found.over_temperature.value == pytest.approx(0.5)
    assert found.report.low < 2.0 < found.report.high
    nothing = _standing([base], outcome(LINE, Volume(0.0, 0.0 * line.samples)), line)
    assert nothing.over_line is None
