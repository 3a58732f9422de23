"""Sampled answers as a third objective: in a study, on its board, in the report, with a calibrator, over a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from objectives.metrics.diversity import get_diversity_metric
from objectives.questions.prompts import load_prompts
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.results.board import read_board
from search.results.page import write_report
from search.running.budget import set_budget
from search.running.launch import create, reopen
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.pico import save_pico
from tests.pico_study import write_prompts, write_study

SAMPLED: dict[str, Any] = {"prompts": "./prompts.jsonl", "samples": 3, "max_new_tokens": 6}


def diverse_study(folder: Path, **keys: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl")
    wanted = {"objectives": ["accuracy", "ece", "distinct-2"], "diversity": SAMPLED, "trials": 3, **keys}
    return write_study(folder, **wanted)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("diverse")
    path = diverse_study(folder)
    url = f"sqlite:///{folder / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    return path, url


def test_every_trial_has_its_diversity(study: tuple[Path, str], tmp_path: Path) -> None:
    store = StudyStore.open(study[1], "pico")
    assert store.attribute("facts")["prompts"] == {"search": 5, "report": 5}
    evidence = EvidenceFolder(store.url, "pico")
    metric = get_diversity_metric("distinct-2")
    for record in store.trials():
        assert record.values is not None
        assert record.values[2] == metric.value(evidence.load_diversity(record.attributes["diversity"]))
    board = read_board(store)
    assert dict(board.objectives)["distinct-2"] is True
    post = board.of_kind("post")[0]
    assert {"distinct-1", "distinct-2", "self-bleu"} <= set(post.report)
    assert post.report["distinct-2"].low <= post.report["distinct-2"].value <= post.report["distinct-2"].high
    for row in board.front:
        if row.kind == "search":
            assert "distinct-2" in row.against["post"]
    assert write_report(store, tmp_path / "report")


def test_interrupted_or_not_the_answers_are_the_same(study: tuple[Path, str], tmp_path: Path) -> None:
    path = diverse_study(tmp_path / "again", trials=1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    store, problem = reopen(url, "pico", "cpu")
    set_budget(store, 3)
    run(store, problem)
    wanted = StudyStore.open(study[1], "pico").trials()
    assert [r.values for r in store.trials()] == [r.values for r in wanted]


def test_a_temperature_changes_diversity(study: tuple[Path, str], cli: Cli) -> None:
    store = StudyStore.open(study[1], "pico")
    code, out, err = cli(
        "calibrate", "pico", "--storage", store.url, "--method", "temperature", "--select", "post"
    )
    assert code == 0, err
    assert "distinct-2 up" in out
    assert "self-bleu down" in out
    board = read_board(StudyStore.open(study[1], "pico"))
    post = board.of_kind("post")[0]
    tempered = next(row for row in board.alternatives if row.label == "post + temperature")
    assert tempered.temperature != 1.0
    assert store.attribute("diversity:1:temperature:report") != store.attribute("diversity:1")
    assert {"distinct-1", "distinct-2", "self-bleu"} <= set(tempered.report)
    assert tempered.report["accuracy"] == post.report["accuracy"]


@pytest.mark.slow
def test_a_calibrated_trial_off_the_front_has_its_diversity(tmp_path: Path, cli: Cli) -> None:
    path = diverse_study(tmp_path / "study", trials=8)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    board = read_board(StudyStore.open(url, "pico"))
    off = next(row for row in board.rows if row.kind == "search" and not row.front)
    assert not off.report
    code, _, err = cli(
        "calibrate", "pico", "--storage", url, "--method", "daca", "--select", f"trial:{off.trial}"
    )
    assert code == 0, err
    store = StudyStore.open(url, "pico")
    assert "distinct-2" in read_board(store).row(off.trial).report
    assert write_report(store, tmp_path / "report")


def test_an_export_of_it_verifies(study: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli("export", "pico", "--storage", study[1], "--weights", "--out", tmp_path / "out")
    assert code == 0, err
    code, out, err = cli("verify", tmp_path / "out")
    assert code == 0, err
    assert "= stored" in out


def test_a_model_says_which_answers_mean_the_same(tmp_path: Path, cli: Cli) -> None:
    judged = {**SAMPLED, "equivalence": "./pre", "threshold": 0.9}
    path = diverse_study(tmp_path, objectives=["accuracy", "semantic-entropy"], diversity=judged, trials=1)
    code, out, err = cli("launch", path)
    assert code == 0, err
    assert "semantic-entropy up" in out
    store = StudyStore.open(f"sqlite:///{Path('runs/pico/study.db').absolute()}", "pico")
    assert store.attribute("identity")["equivalence"]
    found = EvidenceFolder(store.url, "pico").load_diversity(store.trials()[0].attributes["diversity"])
    assert found.equivalence.startswith("embedding ")
    assert (found.values["semantic-entropy"] >= 0).all()
    assert found.values["semantic-entropy"].max() <= math.log(3) + 1e-12
    save_pico(tmp_path / "other", seed=9)
    code, _, err = cli(
        "resume", "pico", "--trials", "+1", "--set", f"diversity.equivalence={tmp_path / 'other'}"
    )
    assert code == 2
    assert "equivalence changed since it began" in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"diversity": None}, "distinct-2 needs sampled answers"),
        ({"objectives": ["accuracy", "semantic-entropy"]}, "needs a model that compares answers"),
        ({"objectives": ["accuracy", "distinct-3"]}, "Did you mean 'distinct-"),
        ({"diversity": {**SAMPLED, "samples": 1}}, "samples"),
        ({"diversity": {**SAMPLED, "threshold": 0.9}}, "threshold: has no model"),
        ({"diversity": {**SAMPLED, "promts": "x"}}, "Did you mean 'prompts'?"),
        ({"diversity": {**SAMPLED, "prompts": "./none.jsonl"}}, "none.jsonl: cannot be read"),
        ({"diversity": {**SAMPLED, "max_new_tokens": 8000}}, "8000 new ones"),
    ],
)
def test_one_line_says_what_is_wrong(keys: dict[str, Any], message: str, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("launch", diverse_study(tmp_path / "study", **keys))
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err


def test_prompts_are_split_without_repeats(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "p.jsonl", 10)
    path.write_text(path.read_text() * 2)
    found = load_prompts(str(path), 8, 0.25, 0)
    assert (len(found.search), len(found.report)) == (2, 6)
    assert not set(found.search) & set(found.report)
    assert load_prompts(str(path), 8, 0.25, 0) == found
    assert load_prompts(str(path), 8, 0.25, 1) != found
    for text, message in (
        ("{", "line 1: is no JSON"),
        ('{"a": 1}', "no text at 'prompt'"),
        ('{"prompt": "a"}', "empty"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_prompts(str(path), None, 0.5, 0)
