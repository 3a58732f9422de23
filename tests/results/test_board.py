"""The board: numbers that can be recomputed, a front that is one, picks made on the search split only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import moocore
import numpy as np
import pytest

from objectives.metrics.names import get_metric
from search.config.study_file import load_study_file
from search.errors import ConfigError, StorageError
from search.results.board import Board, Row, Volume, read_board
from search.results.front_table import front_table
from search.results.intervals import Cell
from search.results.picks import named_picks, pick
from search.running.launch import create
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.study import run
from tests.pico_study import write_study


@pytest.fixture(scope="module")
def board(finished_study: tuple[Path, str]) -> Board:
    return read_board(StudyStore.open(finished_study[1], "pico"))


def test_stored_values_follow_from_the_evidence(finished_study: tuple[Path, str], board: Board) -> None:
    store = StudyStore.open(finished_study[1], "pico")
    evidence = EvidenceFolder(store.url, store.name)
    for record in store.trials():
        outcomes = evidence.load(record.attributes["evidence"]).outcomes
        values = [get_metric(name).value(outcomes) for name, _ in board.objectives]
        assert record.values == tuple(values)
        assert [board.row(record.number).search[name].value for name, _ in board.objectives] == values


def test_the_front_is_the_one_of_moocore(board: Board) -> None:
    points = board.points(board.rows, "search")
    mine = {tuple(p) for p in board.points(board.front, "search")}
    theirs = points[moocore.is_nondominated(points, maximise=[True, False])]
    assert mine == {tuple(p) for p in theirs}
    reference = [board.reference[name] for name, _ in board.objectives]
    assert board.hypervolume["search"].front == pytest.approx(
        moocore.hypervolume(points, ref=reference, maximise=[True, False])
    )


def test_the_reference_is_the_corner_of_the_parents(board: Board) -> None:
    pre, post = board.row(0).search, board.row(1).search
    assert board.reference["accuracy"] == min(pre["accuracy"].value, post["accuracy"].value)
    assert board.reference["ece"] == max(pre["ece"].value, post["ece"].value)
    assert [row.label for row in board.uniform_line()] == [
        "pre",
        *(f"uniform 0.{i}" for i in range(1, 10)),
        "post",
    ]


def test_differences_are_paired(finished_study: tuple[Path, str], board: Board) -> None:
    row = next(row for row in board.rows if row.kind == "uniform")
    for parent, number in (("pre", 0), ("post", 1)):
        for name, cell in row.against[parent].items():
            assert cell.value == pytest.approx(row.report[name].value - board.row(number).report[name].value)
            assert cell.low <= cell.value <= cell.high
    assert not board.row(0).against


def test_missing_evidence_is_named(finished_study: tuple[Path, str], tmp_path: Path) -> None:
    study, _ = finished_study
    copy = tmp_path / "study.db"
    copy.write_bytes((study.parent / "runs" / "study.db").read_bytes())
    with pytest.raises(StorageError, match="Copy the folder 'evidence' along"):
        read_board(StudyStore.open(f"sqlite:///{copy}", "pico"))


def test_a_study_without_its_parents_has_no_board(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create(load_study_file(study), url, "cpu")
    with pytest.raises(
        ConfigError, match=r"has not scored its parents yet\. Resume it: mergefront resume pico"
    ):
        read_board(StudyStore.open(url, "pico"))


def made_up(points: list[tuple[float, float]], report: list[tuple[float, float]] | None = None) -> Board:
    """A board of front points only; on the report split they may be anything."""
    names = ("accuracy", "ece")
    rows = tuple(
        Row(i, "search", f"trial {i}", True, "linear", {"all": 0.5}, cells, other)
        for i, (cells, other) in enumerate(
            (
                {n: Cell(v, v, v) for n, v in zip(names, point, strict=True)},
                {n: Cell(v, v, v) for n, v in zip(names, seen, strict=True)},
            )
            for point, seen in zip(points, report or points, strict=True)
        )
    )
    volume = Volume(0.2, 0.1, Cell(0.1, 0.05, 0.15))
    return Board("s", (("accuracy", True), ("ece", False)), {"accuracy": 0.0, "ece": 1.0},
                 {"search": volume, "report": volume}, rows, {"search": 9, "report": 9})  # fmt: skip


def test_picks() -> None:
    board = made_up([(0.5, 0.05), (0.6, 0.10), (0.65, 0.25)])
    assert pick(board, "best-accuracy").trial == 2
    assert pick(board, "best-calibration").trial == pick(board, "best-ece").trial == 0
    assert pick(board, "knee").trial == 1
    assert pick(board, "trial:2").trial == 2
    assert pick(board, "prefer:accuracy=1").trial == 2
    assert pick(board, "prefer:accuracy=0.1,ece=0.9").trial == 0
    assert {label: row.trial for label, row in named_picks(board).items()} == {
        "best accuracy": 2,
        "best ece": 0,
        "knee": 1,
    }
    without = replace(board, objectives=(("accuracy", True), ("auroc", True)))
    with pytest.raises(ConfigError, match="no objective measures calibration"):
        pick(without, "best-calibration")


def test_nothing_is_picked_on_the_report_split() -> None:
    points = [(0.5, 0.05), (0.6, 0.10), (0.65, 0.25)]
    board, other = made_up(points), made_up(points, report=[(0.9, 0.0), (0.1, 0.9), (0.2, 0.8)])
    for selection in ("knee", "best-accuracy", "best-ece", "prefer:accuracy=0.5,ece=0.5"):
        assert pick(board, selection).trial == pick(other, selection).trial


def test_the_table(board: Board) -> None:
    table = front_table(board)
    assert table.startswith("pico: report split, 20 questions, 95 % intervals")
    assert all(f" {row.label}" in table for row in board.uniform_line())
    assert "knee" in table
    assert max(map(len, table.splitlines())) < 125
    assert front_table(made_up([(0.5, 0.1)]), "search").count("trial 0") == 0


def test_report_all_scores_every_trial_there(tmp_path: Path) -> None:
    study = write_study(tmp_path, trials=2, split={"search": 0.5, "seed": 0, "report": "all"})
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(study), url, "cpu"))
    board = read_board(StudyStore.open(url, "pico"))
    assert all(row.report for row in board.rows)
    assert len(board.rows) == 13


@pytest.mark.parametrize(
    "objectives", [["accuracy"], ["accuracy", "ece", "brier", "nll"], ["auroc", "ece:mass", "mce"]]
)
def test_any_number_of_objectives(tmp_path: Path, objectives: list[str]) -> None:
    study = write_study(tmp_path, trials=3, objectives=objectives)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(study), url, "cpu"))
    board = read_board(StudyStore.open(url, "pico"))
    assert [name for name, _ in board.objectives] == objectives
    assert board.to_json()
    assert board.to_csv()
    assert front_table(board)
    assert np.isfinite(board.points(board.front, "report")).all()
