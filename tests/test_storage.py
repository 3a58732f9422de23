"""The storage: what it keeps, what two workers see, and what Optuna finds in it. Its faults: tests/faults/."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from search.database import connect, exclusive, shown
from search.errors import StorageError
from search.storage import StudyStore
from search.worker import Worker, this_worker
from tests.faults.stores import OBJECTIVES, claim, new_store


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_a_trial_is_whole_from_its_first_moment(url: str) -> None:
    store = new_store(url)
    number = claim(store, a=0.1, b=0.25)
    (record,) = StudyStore.open(url, "s").trials()
    assert (record.number, record.state, record.coefficients) == (number, "running", {"a": 0.1, "b": 0.25})
    assert record.tags == {"tag": [1]}
    assert record.attributes["worker"] == this_worker().to_json()
    assert store.complete(number, [0.5, 0.125])
    assert StudyStore.open(url, "s").trials()[0].values == (0.5, 0.125)


def test_optuna_reads_the_same_study(url: str) -> None:
    store = new_store(url)
    store.complete(claim(store, a=0.1), [0.5, 0.1])
    store.complete(claim(store, a=0.2), [0.6, 0.2])
    store.fail(claim(store, a=0.3), "no reason")
    study = optuna.load_study(study_name="s", storage=url)
    assert study.metric_names == ["accuracy", "ece"]
    assert [t.params["a"] for t in study.best_trials] == [0.1, 0.2]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]


def test_records_are_what_optuna_reads(url: str) -> None:
    """Trials are read from Optuna's tables directly: whatever Optuna finds in them, we must find."""
    optuna.create_study(study_name="another", storage=url).optimize(lambda t: t.suggest_float("a", 0, 1), 2)
    store = new_store(url)
    watching = StudyStore.open(url, "s")
    optuna.load_study(study_name="s", storage=url).enqueue_trial({"a": 0.9})
    for values in ([0.5, 0.1], [-float("inf"), float("inf")], [1 / 3, 1e-300]):
        number = claim(store, b=0.1, a=2 / 3)
        watching.trials()
        store.complete(number, values, {"evidence": "e", "nested": {"ä": [1, None]}})
    store.fail(claim(store, a=0.3), "no reason")
    store.give_back(claim(store, z=0.1, a=1.0))
    claim(store, **{f"group.{index}": index / 1000 for index in range(1000)})
    states = {"COMPLETE": "complete", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    theirs = [t for t in optuna.load_study(study_name="s", storage=url).trials if "kind" in t.user_attrs]
    ours = StudyStore.open(url, "s").trials()
    assert ours == watching.trials() == store.trials()
    assert [r.number for r in ours] == [t.number for t in theirs] == [1, 2, 3, 4, 5, 6]
    assert [list(r.coefficients.items()) for r in ours] == [list(t.params.items()) for t in theirs]
    assert [r.values and list(r.values) for r in ours] == [t.values for t in theirs]
    assert [r.attributes for r in ours] == [t.user_attrs for t in theirs]
    assert [r.tags for r in ours] == [t.system_attrs for t in theirs]
    assert [r.state for r in ours] == [states[t.state.name] for t in theirs]
    assert [r.seconds for r in ours] == [t.duration and t.duration.total_seconds() for t in theirs]


def test_more_trials_than_a_statement_takes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.trials.BATCH", 3)
    store = new_store(url)
    for index in range(8):
        store.complete(claim(store, a=index / 10), [0.5, index / 10])
    (found,) = {tuple(r.values or ()) for r in StudyStore.open(url, "s").trials() if r.number == 7}
    assert found == (0.5, 0.7)
    assert [r.number for r in StudyStore.open(url, "s").trials()] == list(range(8))


def test_the_first_trial_of_a_recipe_is_found_in_whatever_order_results_come(url: str) -> None:
    store = new_store(url)
    assert store.scored("r") is None
    first, second, failed = claim(store), claim(store), claim(store)
    store.fail(failed, "no reason")
    assert store.scored("r") is None
    for number in (second, first):
        store.complete(number, [0.5, 0.5])
        found = store.scored("r")
        assert found is not None
        assert found.number == number


def test_a_study_of_somebody_else_is_refused(url: str) -> None:
    study = optuna.create_study(study_name="theirs", storage=url, directions=["maximize", "minimize"])
    study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), n_trials=1)
    for open_it in (StudyStore.open, lambda url, name: StudyStore.create(url, name, OBJECTIVES)):
        with pytest.raises(StorageError, match="'theirs' was not made by mergefront"):
            open_it(url, "theirs")
    optuna.create_study(study_name="single", storage=url)
    with pytest.raises(StorageError, match="'single' was not made by mergefront"):
        StudyStore.create(url, "single", OBJECTIVES)


def test_a_trial_put_in_by_hand_is_left_alone(url: str) -> None:
    store = new_store(url)
    claim(store)
    optuna.load_study(study_name="s", storage=url).enqueue_trial({"a": 0.9})
    assert [record.number for record in store.trials()] == [0]
    with store.exclusive():
        assert store.adopt() is None


def test_given_back_and_orphaned_trials_are_adopted_first_come(url: str) -> None:
    store = new_store(url)
    first, second = claim(store, a=0.1), claim(store, a=0.2)
    store.give_back(second)
    with store.exclusive():
        adopted = store.adopt()
        assert adopted is not None
        assert (adopted.number, adopted.coefficients, adopted.attributes["tries"]) == (second, {"a": 0.2}, 1)
        assert store.adopt() is None, "a trial of a live worker is not touched"
    dead = replace(this_worker(), pid=2**22 + 1, started="1")
    store.annotate(first, "worker", dead.to_json())
    with store.exclusive():
        adopted = store.adopt()
    assert adopted is not None
    assert (adopted.number, adopted.attributes["tries"]) == (first, 2)


def test_a_remote_worker_is_dead_after_silence_by_this_clock(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StudyStore.create(url, "s", OBJECTIVES, grace=10.0)
    store.set_attribute("config", {"any": 1})
    number = claim(store)
    store.annotate(number, "worker", replace(this_worker(), host="elsewhere").to_json())
    clock = [100.0]
    monkeypatch.setattr("search.storage.time.monotonic", lambda: clock[0])
    with store.exclusive():
        assert store.adopt() is None
        clock[0] += 9
        assert store.adopt() is None
    store.annotate(number, "beat", [1, 1])
    with store.exclusive():
        clock[0] += 9
        assert store.adopt() is None, "it was heard"
        clock[0] += 9
        monkeypatch.setattr("time.time", lambda: 0.0)  # the wall clock jumps back: nothing is reaped for that
        assert store.adopt() is None
        clock[0] += 2
        assert store.adopt() is not None


def test_worker_identity() -> None:
    here = this_worker()
    assert Worker.from_json(here.to_json()) == here
    assert not here.is_known_dead(one_machine=True)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    reused = replace(here, pid=child.pid, started="1")
    assert reused.is_known_dead(one_machine=True), "a process id that was given to another process"
    child.communicate(b"\n")
    assert replace(here, host="elsewhere", pid=1).is_known_dead(one_machine=True) is False
    rebooted = replace(here, boot="before")
    assert rebooted.is_known_dead(one_machine=True)
    assert not rebooted.is_known_dead(one_machine=False), "many machines call themselves localhost"
    assert not replace(here, namespace="another container").is_known_dead(one_machine=True)


def test_beats_show_in_the_storage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.storage.BEAT_SECONDS", 0.01)
    store = new_store(url)
    number = claim(store)
    with store.beating(number):
        deadline = time.monotonic() + 20
        while "beat" not in StudyStore.open(url, "s").trials()[0].attributes:
            assert time.monotonic() < deadline
    assert threading.active_count() < 20
    assert store.complete(number, [0.1, 0.1])


def test_the_lock_is_exclusive_and_dies_with_its_process(url: str) -> None:
    new_store(url)
    code = f"""
import os, sys
from search.database import exclusive
with exclusive({url!r}):
    print("held", flush=True)
    sys.stdin.read(1)
    os._exit(9)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    got: list[float] = []

    def wait() -> None:
        with exclusive(url):
            got.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    assert not got
    child.communicate("x")
    thread.join(20)
    assert got


def test_urls() -> None:
    for url in ("mysql://x/y", "journal.log", "redis://localhost", "sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(StorageError):
            connect(url, create=True)
    assert "secret" not in shown("postgresql+psycopg://me:secret@127.0.0.1:1/x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(StorageError, match=r"pip install 'mergefront\[postgresql\]'"):
            connect("postgresql://me@127.0.0.1:2/x", create=True)
    with pytest.raises(StorageError, match="no connection") as refusal:
        connect("postgresql+psycopg://me:secret@127.0.0.1:1/x", create=True)
    assert "secret" not in str(refusal.value)


def test_a_stopped_trial_is_a_pruned_one_to_optuna(url: str) -> None:
    store = new_store(url)
    first, second, third = (claim(store) for _ in range(3))
    assert store.stop(first, [0.5, 0.1], {"tokens": 7, "reason": "trial 0 is better"})
    (record,) = [r for r in store.trials() if r.number == first]
    assert (record.state, record.values, record.finished, record.tokens) == ("stopped", None, True, 7)
    assert record.attributes["estimate"] == [0.5, 0.1]
    found = store.scored("r")
    assert found is not None
    assert found.number == first
    assert not store.stop(first, [0.5, 0.1], {}), "it is over"
    # Complete ones go before stopped ones, whatever their numbers.
    store.complete(second, [0.6, 0.2])
    found = store.scored("r")
    assert found is not None
    assert found.number == second
    study = optuna.load_study(study_name="s", storage=url)
    assert study.trials[first].state == optuna.trial.TrialState.PRUNED
    assert [t.number for t in study.best_trials] == [second]
    # Pruned by somebody else: there is nothing to learn from it.
    study._storage.set_trial_state_values(study.trials[third]._trial_id, optuna.trial.TrialState.PRUNED)
    assert StudyStore.open(url, "s").trials()[third].state == "failed"
