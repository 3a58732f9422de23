"""Several processes at one study in one SQLite file: the budget is met exactly, a dead worker's trial has one heir."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import search.storage.database
from search.errors import StorageError
from search.merging.baselines import BASELINES
from search.storage.store import StudyStore
from search.storage.worker import this_worker
from tests.fault_table import Fault
from tests.faults.conftest import TRIALS
from tests.faults.stores import claim, new_store
from tests.study_process import context, ended, merges, results, said, sound, start, url_in, whole

TOTAL = len(BASELINES) + TRIALS


@pytest.mark.fault(7)
@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_share_one_budget_exactly(
    study: Path, uninterrupted: str, tmp_path: Path, workers: int, fault: Fault
) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    processes = [start(study, url, diary=diary) for _ in range(workers)]
    assert [ended(process) for process in processes] == [0] * workers
    trials = StudyStore.open(url, "pico").trials()
    assert [t.number for t in trials] == list(range(TOTAL))
    assert all(t.state == "complete" for t in trials)
    assert len({tuple(t.attributes["worker"].items()) for t in trials}) == workers
    # Nothing died, so nothing is tried or merged twice; a copy of an earlier recipe need not be merged at all.
    assert {int(t.attributes["tries"]) for t in trials} == {1}
    merged = merges(diary)
    copies = {t.number for t in trials if "same_as" in t.attributes}
    assert merged == Counter(t.number for t in trials if t.number not in copies)
    # The sequence of several workers is not promised, the score of a recipe is.
    alone = {t.attributes["recipe"]: t.values for t in StudyStore.open(uninterrupted, "pico").trials()}
    shared = {t.attributes["recipe"]: t.values for t in trials}
    both = shared.keys() & alone.keys()
    assert {key: shared[key] for key in both} == {key: alone[key] for key in both}
    assert len(both) >= len(BASELINES)
    assert sound(url)
    fault.kept({}, results(url))


@pytest.mark.fault(7)
def test_a_killed_worker_of_two_loses_nothing(study: Path, tmp_path: Path, fault: Fault) -> None:
    url = url_in(tmp_path)
    victim, other = start(study, url, "merged", 5), start(study, url)
    assert ended(victim) == -signal.SIGKILL
    before = results(url)
    assert ended(other) == 0
    fault.kept(before, results(url))
    trials = StudyStore.open(url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]


ROUNDS = 5


def _claim_and_die(url: str) -> None:
    store = StudyStore.open(url, "s")
    for _ in range(ROUNDS):
        claim(store)
    os._exit(9)


def _adopt(url: str, barrier: Any, outcomes: Any) -> None:
    """In every round both ask at once, and who is the heir runs the trial to its end."""
    store = StudyStore.open(url, "s")
    for _ in range(ROUNDS):
        barrier.wait(60)
        with store.exclusive():
            adopted = store.adopt()
        outcomes.put((os.getpid(), None if adopted is None else adopted.number))
        barrier.wait(60)
        if adopted is not None:
            assert store.complete(adopted.number, [0.5, 0.5])


@pytest.mark.fault(8)
def test_two_adopters_at_the_same_moment_and_one_heir(tmp_path: Path, fault: Fault) -> None:
    url = url_in(tmp_path)
    store = new_store(url)
    dead = context.Process(target=_claim_and_die, args=(url,))
    dead.start()
    assert ended(dead) == 9
    ghost = store.trials()[0].attributes["worker"]
    for number in range(1, ROUNDS):  # one at a time: the others are in the hands of a worker that lives
        store.annotate(number, "worker", this_worker().to_json())
    barrier, outcomes = context.Barrier(3), context.SimpleQueue()
    both = [context.Process(target=_adopt, args=(url, barrier, outcomes)) for _ in range(2)]
    for process in both:
        process.start()
    for number in range(ROUNDS):
        store.annotate(number, "worker", ghost)
        barrier.wait(60)
        adopted = dict(outcomes.get() for _ in both)
        barrier.wait(60)
        assert sorted(adopted.values(), key=str) == [number, None], "one heir; the other goes away empty"
        (heir,) = (process for process, got in adopted.items() if got == number)
        assert store.trials()[number].attributes["worker"]["pid"] == heir
    assert [ended(process) for process in both] == [0, 0]
    assert [(t.state, t.attributes["tries"]) for t in store.trials()] == [("complete", 2)] * ROUNDS
    fault.struck(ROUNDS)


@pytest.mark.fault(8)
def test_two_workers_come_to_a_study_whose_worker_died(study: Path, tmp_path: Path, fault: Fault) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    assert ended(start(study, url, "merged", 4, diary=diary)) == -signal.SIGKILL
    before = results(url)
    both = [start(study, url, diary=diary) for _ in range(2)]
    assert [ended(process) for process in both] == [0, 0]
    fault.kept(before, results(url))
    trials = StudyStore.open(url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(TOTAL)]
    assert {t.number: t.attributes["tries"] for t in trials if t.attributes["tries"] != 1} == {4: 2}
    assert merges(diary)[4] == 2


# -- a locked database ------------------------------------------------------------------------------------------

HOLDER = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("begin exclusive")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def _held(url: str, seconds: float) -> subprocess.Popen[str]:
    """A process of nobody we know that holds the database as long, or until it is killed."""
    command = [sys.executable, "-c", HOLDER, url.removeprefix("sqlite:///"), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.fault(10)
def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    url = url_in(tmp_path)
    store = new_store(url)
    with _held(url, 1.5):
        began = time.monotonic()
        claim(store)
    assert time.monotonic() - began > 1.0


@pytest.mark.fault(10)
@pytest.mark.slow
def test_a_study_waits_ten_seconds_and_ends_as_if_nothing_had_been(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    process = start(study, url, diary=diary)
    while not diary.exists() or "told 3" not in diary.read_text():
        assert process.is_alive()
        time.sleep(0.02)
    with _held(url, 10):
        before = diary.read_text()
        time.sleep(8)
        during = diary.read_text()
    assert during.count("told") <= before.count("told") + 1, "nothing is told while it waits"
    assert ended(process) == 0
    assert whole(url) == whole(uninterrupted)
    fault.kept({}, results(url))


def _impatient() -> None:
    search.storage.database.BUSY_SECONDS = 0.3  # type: ignore[assignment]


@pytest.mark.fault(10)
def test_past_the_time_limit_the_holder_is_named_and_no_trial_is_lost(
    study: Path, uninterrupted: str, tmp_path: Path, fault: Fault
) -> None:
    url, diary = url_in(tmp_path), tmp_path / "diary"
    process = start(study, url, before=_impatient, diary=diary)
    while not diary.exists() or "told 12" not in diary.read_text():
        assert process.is_alive()
        time.sleep(0.02)
    with _held(url, 60) as holder:
        assert ended(process) == StorageError.exit_code
        holder.kill()
    assert said(diary) == (
        f"{tmp_path / 'study.db'}: another process held the database for 0.3 s. Resume when it is free."
    )
    before = results(url)
    assert len(before) >= 13
    assert ended(start(study, url)) == 0
    fault.kept(before, results(url))
    assert whole(url) == whole(uninterrupted)
