"""Interrupted equals uninterrupted: real kills, a real SQLite file, the same front JSON."""

from __future__ import annotations

import signal
import sqlite3
import time
from pathlib import Path

import pytest

from search.baselines import BASELINES
from search.budget import set_budget
from search.config import load_study_file
from search.errors import ConfigError, StorageError
from search.opening import create, reopen
from search.storage import MAX_TRIES, StudyStore
from search.study import run
from tests.pico_study import write_study
from tests.study_process import STEPS, ended, kill_self, start, terminate_self, whole

TRIALS = 10
TOTAL = len(BASELINES) + TRIALS


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampler = {"engine": "optuna", "name": "nsga2", "seed": 3, "population": 12}
    return write_study(tmp_path_factory.mktemp("study"), trials=TRIALS, sampler=sampler)


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


@pytest.fixture(scope="module")
def uninterrupted(study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = url_of(tmp_path_factory.mktemp("uninterrupted"))
    assert ended(start(study, url)) == 0
    return url


def test_killed_at_every_step_it_ends_with_the_same_front(
    study: Path, uninterrupted: str, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    # The first kill hits a baseline, the others search trials, the last one the report split.
    for index, step in enumerate(STEPS):
        assert ended(start(study, url, step, 3 + 2 * index)) == -signal.SIGKILL, step
    assert ended(start(study, url)) == 0
    assert whole(url) == whole(uninterrupted)
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials] == list(range(TOTAL))
    assert all(t.state == "complete" for t in trials)
    assert (
        sum(int(t.attributes["tries"]) - 1 for t in trials) == len(STEPS) - 1
    )  # after the tell nothing is open
    with sqlite3.connect(tmp_path / "study.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_sigterm_gives_the_trial_back_and_exits_143(study: Path, uninterrupted: str, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    began = time.monotonic()
    assert ended(start(study, url, "merged", 12, terminate_self)) == 143
    assert time.monotonic() - began < 60
    trials = StudyStore.open(url, "pico").trials()
    assert [t.state for t in trials[-2:]] == ["complete", "waiting"]
    assert ended(start(study, url)) == 0
    assert whole(url) == whole(uninterrupted)


def test_killed_three_times_in_one_trial_it_ends_with_the_same_front(
    study: Path, uninterrupted: str, tmp_path: Path
) -> None:
    url = url_of(tmp_path)
    for step in ("merged", "evaluated", "evidence"):
        assert ended(start(study, url, step, 14)) == -signal.SIGKILL
    assert ended(start(study, url)) == 0
    assert whole(url) == whole(uninterrupted)


def test_two_workers_share_one_budget_exactly(study: Path, uninterrupted: str, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    both = [start(study, url), start(study, url)]
    assert [ended(process) for process in both] == [0, 0]
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials] == list(range(TOTAL))
    assert all(t.state == "complete" for t in trials)
    assert len({tuple(t.attributes["worker"].items()) for t in trials}) == 2
    # The sequence of several workers is not promised, the score of a recipe is.
    alone = {t.attributes["recipe"]: t.values for t in StudyStore.open(uninterrupted, "pico").trials()}
    shared = {t.attributes["recipe"]: t.values for t in trials}
    assert {key: shared[key] for key in shared.keys() & alone.keys()} == {
        key: alone[key] for key in shared.keys() & alone.keys()
    }
    assert len(shared.keys() & alone.keys()) >= len(BASELINES)


def test_a_killed_worker_of_two_loses_nothing(study: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    victim, other = start(study, url, "merged", 5), start(study, url)
    assert ended(victim) == -signal.SIGKILL
    assert ended(other) == 0
    trials = StudyStore.open(url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]


def test_a_recipe_that_always_kills_is_given_up_and_the_study_goes_on(study: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    for _ in range(MAX_TRIES):
        assert ended(start(study, url, "merged", 13, kill_self)) == -signal.SIGKILL
    assert ended(start(study, url)) == 0
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials if t.state == "failed"] == [13]
    assert f"{MAX_TRIES} times" in trials[13].attributes["error"]
    assert sum(t.state == "complete" for t in trials) == TOTAL


def test_a_finished_study_is_left_as_it_is_and_can_be_extended(study: Path, tmp_path: Path) -> None:
    url = url_of(tmp_path)
    store, materials = create(load_study_file(study), url, "cpu")
    set_budget(store, 2)
    run(store, materials)
    before = whole(url), (tmp_path / "study.db").read_bytes()
    store, materials = reopen(url, "pico", "cpu")
    set_budget(store, None)
    run(store, materials)
    assert whole(url) == before[0]
    assert set_budget(store, "+3") == 5
    run(store, materials)
    assert len(StudyStore.open(url, "pico").trials()) == len(BASELINES) + 5
    with pytest.raises(ConfigError, match=r"--trials \+-3: wanted a number"):
        set_budget(store, "+-3")


def test_a_changed_study_is_refused_with_the_keys(study: Path, uninterrupted: str, tmp_path: Path) -> None:
    changed = load_study_file(study, ["space.high=1.5", "objectives=[accuracy, brier]", "trials=99"])
    with pytest.raises(ConfigError) as refusal:
        create(changed, uninterrupted, "cpu")
    message = str(refusal.value)
    assert "space.high: 1.2 -> 1.5" in message
    assert "objectives.1: 'ece' -> 'brier'" in message
    assert "trials" not in message
    with pytest.raises(ConfigError, match="only places may be set when resuming, found sampler"):
        reopen(uninterrupted, "pico", "cpu", ["sampler.seed=9"])
    with pytest.raises(ConfigError, match="give --trials instead"):
        reopen(uninterrupted, "pico", "cpu", ["trials=9"])
    with pytest.raises(ConfigError, match=r"objectives.2: None -> 'nll'"):
        create(load_study_file(study, ["objectives=[accuracy, ece, nll]"]), uninterrupted, "cpu")
    with pytest.raises(StorageError, match=r"no study 'lama'\. This storage has: pico"):
        reopen(uninterrupted, "lama", "cpu")


def test_changed_parents_and_questions_are_noticed_and_moved_ones_are_not(
    study: Path, uninterrupted: str, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    write_study(moved, trials=TRIALS)
    for name in ("pre", "post"):
        for file in (study.parent / name).iterdir():
            (moved / name / file.name).write_bytes(file.read_bytes())
    places = [f"parents.{name}={moved / name}" for name in ("pre", "post")]
    store, _ = reopen(uninterrupted, "pico", "cpu", [*places, f"tasks.0.path={moved / 'questions.jsonl'}"])
    assert store.name == "pico"
    with pytest.raises(ConfigError, match="parents changed since it began"):
        reopen(uninterrupted, "pico", "cpu", [f"parents.pre={moved / 'post'}"])
    questions = moved / "questions.jsonl"
    questions.write_text(questions.read_text().replace("red", "rot"))
    with pytest.raises(ConfigError, match="questions changed since it began"):
        reopen(uninterrupted, "pico", "cpu", [f"tasks.0.path={questions}"])
