"""Questions and studies without contrast: nothing to divide by, nothing to rank, nothing finished. No traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from objectives.metrics.names import METRIC_NAMES, get_metric
from objectives.outcomes import Outcomes
from search.checkpoints.checkpoint import SINGLE
from search.config.study_file import load_study_file
from search.errors import TooManyFailuresError
from search.front import hypervolume, non_dominated
from search.results.board import read_board
from search.results.plots.style import Picture
from search.running.launch import create
from search.running.observer import Observer
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.conftest import Cli
from tests.hostile_files import edit_tensors
from tests.pico_study import write_questions, write_study

pytestmark = pytest.mark.fault(27)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the time that drawing takes; what is drawn of odd studies: tests/results/test_report.py."""
    monkeypatch.setattr("search.results.page.render", lambda figure: Picture(b"png", b"svg", 3.0))
    monkeypatch.setattr("search.results.page.render_svg", lambda figure: b"svg")


def outcomes(probability: Sequence[Sequence[float]], gold: Sequence[int]) -> Outcomes:
    with np.errstate(divide="ignore"):
        score = np.log(np.array(probability, dtype=float))
    return Outcomes.from_loglikelihoods(
        score, np.full(len(score), score.shape[1]), np.array(gold), np.zeros(len(score), dtype=np.int64)
    )


CONSTANT = {
    "certain and right": ([[1.0, 0.0]] * 5, [0] * 5),
    "certain and wrong": ([[1.0, 0.0]] * 5, [1] * 5),
    "all options alike": ([[0.5, 0.5]] * 6, [0, 1, 0, 1, 1, 1]),
    "one class only": ([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]], [0, 0, 0]),
    "one question": ([[0.2, 0.8]], [1]),
    "confidence 0 for the truth": ([[1.0, 0.0], [0.0, 1.0]], [1, 1]),
    "confidence at the borders of bins": ([[k / 15, 1 - k / 15] for k in range(16)], [0, 1] * 8),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_every_metric_is_finite(case: str) -> None:
    """Oracles: its range, and where everything is right or wrong with certainty the value itself."""
    found = {name: get_metric(name) for name in (*METRIC_NAMES, "ece:1", "ece:1000")}
    values = {name: metric.value(outcomes(*CONSTANT[case])) for name, metric in found.items()}
    assert all(np.isfinite(value) for value in values.values())
    if case == "certain and right":
        assert values["accuracy"] == 1.0
        assert max(values[name] for name in ("ece", "ece:mass", "mce", "brier", "nll")) <= 1e-12
    if case == "certain and wrong":
        assert (values["accuracy"], values["ece"], values["brier"]) == (0.0, 1.0, 2.0)
        assert values["nll"] == found["nll"].worst
    for metric in found.values():
        samples = metric(outcomes(*CONSTANT[case]), np.ones((3, len(CONSTANT[case][1])), dtype=np.int64))
        low, high = metric.interval(metric.value(outcomes(*CONSTANT[case])), samples)
        assert low <= high


@pytest.mark.parametrize("text", ["", "\n\n", " \n"])
def test_an_empty_file_of_questions_is_refused(text: str, cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    (tmp_path / "study/questions.jsonl").write_text(text)
    code, out, err = cli("launch", study)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "questions" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("points", [0, 1, 2, 50])
def test_fronts_of_nothing_of_one_and_of_equals(points: int) -> None:
    values = np.full((points, 2), 0.5)
    assert non_dominated(values, maximise=(True, False)).tolist() == [True] * points
    if points:
        assert hypervolume(values, np.array([0.0, 1.0]), maximise=(True, False)) == pytest.approx(0.25)
        assert hypervolume(values, np.array([0.5, 0.5]), maximise=(True, False)) == 0.0


class Refusing(Observer):
    """Every search trial fails."""

    def step(self, step: str, trial: TrialRecord) -> None:
        if step == "merged" and trial.kind == "search":
            raise RuntimeError("no.")


def _tied(folder: Path) -> None:
    """Models of zeros, and options of one letter each: all are equally likely, whatever the recipe."""
    for name in ("pre", "post"):
        tensors = load_file(folder / name / SINGLE)
        edit_tensors(folder / name, **{key: torch.zeros_like(tensor) for key, tensor in tensors.items()})
    line = {"choices": ["a", "b"], "answer": 1}
    text = "".join(json.dumps({"question": f"{i}?", **line}) + "\n" for i in range(20))
    (folder / "questions.jsonl").write_text(text)


def _single(folder: Path) -> None:
    write_questions(folder / "questions.jsonl", 2)


def _alike(folder: Path) -> None:
    """Parents that differ by one unit in the last place of a norm: no merge answers otherwise than they do."""
    for path in (folder / "pre").iterdir():
        (folder / "post" / path.name).write_bytes(path.read_bytes())
    norm = load_file(folder / "pre" / SINGLE)["model.norm.weight"]
    edit_tensors(folder / "post", **{"model.norm.weight": torch.nextafter(norm, torch.full_like(norm, 9.0))})


UNIFORM = {"granularity": "uniform", "low": 0.0, "high": 1.0}
ODD: dict[str, tuple[dict[str, Any], Callable[[Path], None] | None]] = {
    "every search trial failed": ({"trials": 3}, None),
    "ties throughout": ({"trials": 2, "space": UNIFORM}, _tied),
    "a single question a split": ({"trials": 1}, _single),
    "no search trials": ({"trials": 0}, None),
    "all recipes alike": ({"trials": 3, "space": UNIFORM}, _alike),
}
FAST = ("every search trial failed", "ties throughout")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FAST else pytest.mark.slow) for case in ODD]
)
def test_odd_studies_are_shown_and_exported(case: str, cli: Cli, tmp_path: Path) -> None:
    """Launched (or as far as it comes), then status, front in every form, report and export: exit 0, finite numbers."""
    keys, prepare = ODD[case]
    study = write_study(tmp_path / "study", **keys)
    if prepare is not None:
        prepare(tmp_path / "study")
    url = f"sqlite:///{tmp_path / 'runs/pico/study.db'}"
    if case == "every search trial failed":
        store, problem = create(load_study_file(study), url, "cpu")
        with pytest.raises(TooManyFailuresError):
            run(store, problem, Refusing())
    else:
        code, _, err = cli("launch", study)
        assert code == 0, err
    for command in (
        ("status", "pico", "--json"),
        ("front", "pico"),
        ("front", "pico", "--format", "csv"),
        ("front", "pico", "--format", "json"),
        ("report", "pico", "--out", "page"),
        ("export", "pico", "--all", "--out", "out"),
        ("export", "pico", "--select", "knee", "--out", "knee"),
    ):
        code, out, err = cli(*command)
        assert code == 0, (command, err)
        if command[-1] in ("json", "--json"):
            json.loads(out, parse_constant=pytest.fail)
    if case == "ties throughout":
        rows = read_board(StudyStore.open(url, "pico")).rows
        assert {row.search["accuracy"].value for row in rows} == {0.0}, (
            "the first of equal options is answered"
        )
