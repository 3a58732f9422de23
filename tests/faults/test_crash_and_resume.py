"""Interrupted equals uninterrupted: real kills, a real SQLite file, the same front JSON and trials."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from search.config.study_file import load_study_file
from search.errors import ConfigError, StorageError
from search.merging.baselines import BASELINES
from search.running.budget import set_budget
from search.running.launch import create, reopen
from search.storage.store import MAX_TRIES, StudyStore
from search.study import run
from tests.conftest import Cli
from tests.fault_table import Fault
from tests.faults.conftest import TRIALS
from tests.pico_study import write_study
from tests.study_process import (
    AFTER_TELL,
    STEPS,
    ended,
    kill_self,
    merges,
    results,
    sound,
    start,
    url_in,
    whole,
)

TOTAL = len(BASELINES) + TRIALS


@pytest.mark.fault(1)
def test_killed_at_every_step_it_ends_with_the_same_front(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    # The first kill hits a baseline, the others search trials, the one after the tell the last of them, and so the
    # two behind it the report split.
    strikes = [(step, 3 + 2 * index) for index, step in enumerate(STEPS[:-1])]
    strikes += [(AFTER_TELL, TOTAL - 1), ("merged", 0), ("evaluated", 2)]
    kept: dict[int, Any] = {}
    for step, number in strikes:
        assert ended(start(study, url, step, number, diary=diary)) == -signal.SIGKILL, step
        fault.kept(kept, kept := results(url))
    assert ended(start(study, url)) == 0
    fault.struck(len(strikes))
    fault.kept(kept, results(url))
    assert whole(url) == whole(uninterrupted)
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials] == list(range(TOTAL))
    assert all(t.state == "complete" for t in trials)
    # Each kill before a tell costs one try, and nothing is merged more often than it is tried.
    assert sum(int(t.attributes["tries"]) - 1 for t in trials) == len(STEPS) - 1
    searched = merges(diary)
    assert all(searched[t.number] <= int(t.attributes["tries"]) <= 2 for t in trials)
    assert sound(url)


@pytest.mark.fault(1)
def test_killed_three_times_in_one_trial_it_ends_with_the_same_front(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    url = url_in(tmp_path)
    for step in ("merged", "evaluated", "evidence"):
        assert ended(start(study, url, step, 14)) == -signal.SIGKILL
    before = results(url)
    assert ended(start(study, url)) == 0
    fault.struck(3)
    fault.kept(before, results(url))
    assert whole(url) == whole(uninterrupted)


@pytest.mark.fault(4)
def test_a_recipe_that_always_kills_is_given_up_and_the_study_goes_on(
    study: Path, tmp_path: Path, fault: Fault
) -> None:
    url = url_in(tmp_path)
    for _ in range(MAX_TRIES):
        assert ended(start(study, url, "merged", 13, kill_self)) == -signal.SIGKILL
    before = results(url)
    assert ended(start(study, url)) == 0
    fault.struck(MAX_TRIES)
    fault.kept(before, results(url))
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials if t.state == "failed"] == [13]
    assert f"{MAX_TRIES} times" in trials[13].attributes["error"]
    assert sum(t.state == "complete" for t in trials) == TOTAL


@pytest.mark.fault(6)
def test_a_finished_study_is_left_as_it_is(cli: Cli, study: Path, uninterrupted: str, tmp_path: Path) -> None:
    shutil.copytree(Path(uninterrupted.removeprefix("sqlite:///")).parent, tmp_path / "copy")
    url = url_in(tmp_path / "copy")
    before = whole(url)
    evidence = {path: path.read_bytes() for path in (tmp_path / "copy" / "evidence").iterdir()}
    fronts = [cli("front", "pico", "--storage", url, "--format", "json")]
    for command in (("launch", study), ("resume", "pico"), ("launch", study, "--workers", "2")):
        code, _, err = cli(*command, "--storage", url)
        assert code == 0
        assert f"resuming: {TOTAL} done, 0 to go" in err
        fronts.append(cli("front", "pico", "--storage", url, "--format", "json"))
    assert fronts[0][0] == 0
    assert len(set(fronts)) == 1, "the same bytes each time"
    assert whole(url) == before
    assert {path: path.read_bytes() for path in (tmp_path / "copy" / "evidence").iterdir()} == evidence


@pytest.mark.fault(6)
def test_a_finished_study_can_be_extended(study: Path, tmp_path: Path, fault: Fault) -> None:
    url = url_in(tmp_path)
    store, problem = create(load_study_file(study), url, "cpu")
    set_budget(store, 2)
    run(store, problem)
    before = whole(url), results(url)
    store, problem = reopen(url, "pico", "cpu")
    set_budget(store, None)
    run(store, problem)
    assert whole(url) == before[0]
    assert set_budget(store, "+3") == 5
    run(store, problem)
    fault.kept(before[1], results(url))
    assert len(results(url)) == len(BASELINES) + 5
    with pytest.raises(ConfigError, match=r"--trials \+-3: wanted a number"):
        set_budget(store, "+-3")


@pytest.mark.fault(5)
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


@pytest.mark.fault(5)
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
