"""What every storage keeps: one list of tests for SQLite and for PostgreSQL. Whole studies: test_study_contract.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from search.errors import StorageError
from search.storage.database import exclusive, reserved
from search.storage.store import StudyStore
from search.storage.worker import this_worker
from tests.faults.stores import OBJECTIVES, UNIT, claim, new_store
from tests.study_process import context, ended

HOLDER = """
import sys
from search.storage.database import reserved
with reserved(sys.argv[1], sys.argv[2]) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def _draw(url: str, wanted: int) -> None:
    """A worker without a model: takes over what is left, draws until `wanted` trials are there, and scores them."""
    store = StudyStore.open(url, "s")
    while True:
        with store.exclusive():
            adopted = store.adopt()
            if adopted is not None:
                number = adopted.number
            elif len(store.trials()) < wanted:
                values = {"a": 0.5}
                number = store.claim("search", values, {"a": UNIT}, {"recipe": "r"}, {}).number
            else:
                return
        assert store.complete(number, [number / wanted, 0.5])


def _draw_and_die(url: str) -> None:
    store = StudyStore.open(url, "s")
    with store.exclusive():
        store.claim("search", {"a": 0.5}, {"a": UNIT}, {"recipe": "r"}, {})
        os._exit(9)  # the lock in hand


class TestStorage:
    """`storage_url` is a new storage of either kind."""

    def test_a_trial_is_whole_from_its_first_moment(self, storage_url: str) -> None:
        store = new_store(storage_url)
        number = claim(store, a=0.1, b=0.25)
        (record,) = StudyStore.open(storage_url, "s").trials()
        assert (record.number, record.state, record.coefficients) == (
            number,
            "running",
            {"a": 0.1, "b": 0.25},
        )
        assert record.tags == {"tag": [1]}
        assert record.attributes["worker"] == this_worker().to_json()
        assert store.complete(number, [0.5, 0.125])
        assert StudyStore.open(storage_url, "s").trials()[0].values == (0.5, 0.125)

    def test_optuna_reads_the_same_study(self, storage_url: str) -> None:
        store = new_store(storage_url)
        store.complete(claim(store, a=0.1), [0.5, 0.1])
        store.complete(claim(store, a=0.2), [0.6, 0.2])
        store.fail(claim(store, a=0.3), "no reason")
        study = optuna.load_study(study_name="s", storage=storage_url)
        assert study.metric_names == ["accuracy", "ece"]
        assert [t.params["a"] for t in study.best_trials] == [0.1, 0.2]
        assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]

    def test_records_are_what_optuna_reads(self, storage_url: str) -> None:
        """Trials are read from Optuna's tables directly: whatever Optuna finds in them, we must find."""
        optuna.create_study(study_name="another", storage=storage_url).optimize(
            lambda t: t.suggest_float("a", 0, 1), 2
        )
        store = new_store(storage_url)
        watching = StudyStore.open(storage_url, "s")
        optuna.load_study(study_name="s", storage=storage_url).enqueue_trial({"a": 0.9})
        for values in ([0.5, 0.1], [-float("inf"), float("inf")], [1 / 3, 1e-300]):
            number = claim(store, b=0.1, a=2 / 3)
            watching.trials()
            store.complete(number, values, {"evidence": "e", "nested": {"ä": [1, None]}})
        store.fail(claim(store, a=0.3), "no reason")
        claim(store, z=0.1, a=1.0)
        store.give_back_all()
        claim(store, **{f"group.{index}": index / 300 for index in range(300)})
        states = {"COMPLETE": "complete", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
        theirs = [
            t for t in optuna.load_study(study_name="s", storage=storage_url).trials if "kind" in t.user_attrs
        ]
        ours = StudyStore.open(storage_url, "s").trials()
        assert ours == watching.trials() == store.trials()
        assert [r.number for r in ours] == [t.number for t in theirs] == [1, 2, 3, 4, 5, 6]
        assert [list(r.coefficients.items()) for r in ours] == [list(t.params.items()) for t in theirs]
        assert [r.values and list(r.values) for r in ours] == [t.values for t in theirs]
        assert [r.attributes for r in ours] == [t.user_attrs for t in theirs]
        assert [r.tags for r in ours] == [t.system_attrs for t in theirs]
        assert [r.state for r in ours] == [states[t.state.name] for t in theirs]
        assert [r.seconds for r in ours] == [t.duration and t.duration.total_seconds() for t in theirs]

    def test_more_trials_than_a_statement_takes(
        self, storage_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("search.storage.trials.BATCH", 3)
        store = new_store(storage_url)
        for index in range(8):
            store.complete(claim(store, a=index / 10), [0.5, index / 10])
        (found,) = {
            tuple(r.values or ()) for r in StudyStore.open(storage_url, "s").trials() if r.number == 7
        }
        assert found == (0.5, 0.7)
        assert [r.number for r in StudyStore.open(storage_url, "s").trials()] == list(range(8))

    def test_the_first_trial_of_a_recipe_is_found_in_whatever_order_results_come(
        self, storage_url: str
    ) -> None:
        store = new_store(storage_url)
        assert store.scored("r") is None
        first, second, failed = claim(store), claim(store), claim(store)
        store.fail(failed, "no reason")
        assert store.scored("r") is None
        for number in (second, first):
            store.complete(number, [0.5, 0.5])
            found = store.scored("r")
            assert found is not None
            assert found.number == number

    def test_a_study_of_somebody_else_is_refused(self, storage_url: str) -> None:
        study = optuna.create_study(
            study_name="theirs", storage=storage_url, directions=["maximize", "minimize"]
        )
        study.optimize(lambda trial: (trial.suggest_float("x", 0, 1), 0.0), n_trials=1)
        for open_it in (StudyStore.open, lambda url, name: StudyStore.create(storage_url, name, OBJECTIVES)):
            with pytest.raises(StorageError, match="'theirs' was not made by mergefront"):
                open_it(storage_url, "theirs")
        optuna.create_study(study_name="single", storage=storage_url)
        with pytest.raises(StorageError, match="'single' was not made by mergefront"):
            StudyStore.create(storage_url, "single", OBJECTIVES)

    def test_a_trial_put_in_by_hand_is_left_alone(self, storage_url: str) -> None:
        store = new_store(storage_url)
        claim(store)
        optuna.load_study(study_name="s", storage=storage_url).enqueue_trial({"a": 0.9})
        assert [record.number for record in store.trials()] == [0]
        with store.exclusive():
            assert store.adopt() is None

    def test_given_back_and_orphaned_trials_are_adopted_first_come(self, storage_url: str) -> None:
        store = new_store(storage_url)
        first, second = claim(store, a=0.1), claim(store, a=0.2)
        store.annotate(first, "worker", replace(this_worker(), host="elsewhere").to_json())
        store.give_back_all()
        with store.exclusive():
            adopted = store.adopt()
            assert adopted is not None
            assert (adopted.number, adopted.coefficients, adopted.attributes["tries"]) == (
                second,
                {"a": 0.2},
                1,
            )
            assert store.adopt() is None, "a trial of a live worker is not touched"
        dead = replace(this_worker(), pid=2**22 + 1, started="1")
        store.annotate(first, "worker", dead.to_json())
        with store.exclusive():
            adopted = store.adopt()
        assert adopted is not None
        assert (adopted.number, adopted.attributes["tries"]) == (first, 2)

    def test_a_remote_worker_is_dead_after_silence_by_this_clock(
        self, storage_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = StudyStore.create(storage_url, "s", OBJECTIVES, grace=10.0)
        store.set_attribute("config", {"any": 1})
        number = claim(store)
        store.annotate(number, "worker", replace(this_worker(), host="elsewhere").to_json())
        clock = [100.0]
        monkeypatch.setattr("search.storage.store.time.monotonic", lambda: clock[0])
        with store.exclusive():
            assert store.adopt() is None
            clock[0] += 9
            assert store.adopt() is None
        store.annotate(number, "beat", [1, 1])
        with store.exclusive():
            clock[0] += 9
            assert store.adopt() is None, "it was heard"
            clock[0] += 9
            # The wall clock jumps back: nothing is reaped for that.
            monkeypatch.setattr("time.time", lambda: 0.0)
            assert store.adopt() is None
            clock[0] += 2
            assert store.adopt() is not None

    def test_beats_show_in_the_storage(self, storage_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("search.storage.store.BEAT_SECONDS", 0.01)
        store = new_store(storage_url)
        number = claim(store)
        with store.beating(number):
            deadline = time.monotonic() + 20
            while "beat" not in StudyStore.open(storage_url, "s").trials()[0].attributes:
                assert time.monotonic() < deadline
        assert threading.active_count() < 20
        assert store.complete(number, [0.1, 0.1])

    def test_the_lock_is_exclusive_and_dies_with_its_process(self, storage_url: str) -> None:
        new_store(storage_url)
        code = f"""
import os, sys
from search.storage.database import exclusive
with exclusive({storage_url!r}):
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
            with exclusive(storage_url):
                got.append(time.monotonic())

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.3)
        assert not got
        child.communicate("x")
        thread.join(20)
        assert got

    def test_a_stopped_trial_is_a_pruned_one_to_optuna(self, storage_url: str) -> None:
        store = new_store(storage_url)
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
        study = optuna.load_study(study_name="s", storage=storage_url)
        assert study.trials[first].state == optuna.trial.TrialState.PRUNED
        assert [t.number for t in study.best_trials] == [second]
        # Pruned by somebody else: there is nothing to learn from it.
        study._storage.set_trial_state_values(study.trials[third]._trial_id, optuna.trial.TrialState.PRUNED)
        assert StudyStore.open(storage_url, "s").trials()[third].state == "failed"

    def test_a_name_is_reserved_by_one_process_until_it_dies(self, storage_url: str) -> None:
        command = [sys.executable, "-c", HOLDER, storage_url, "one"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True\n"
            with reserved(storage_url, "one") as mine:
                assert not mine
            with reserved(storage_url, "another") as mine:
                assert mine
            with reserved(storage_url, "one") as mine:
                assert not mine, "what this process let go of was not the other's"
            holder.kill()
        deadline = time.monotonic() + 10  # a server may take a moment to notice
        while True:
            with reserved(storage_url, "one") as mine:
                if mine:
                    break
            assert time.monotonic() < deadline
        with reserved(storage_url, "one") as mine:
            assert mine

    def test_several_processes_draw_exactly_what_is_wanted(self, storage_url: str) -> None:
        """Oracle: counting. One of them dies with the lock in hand and a trial drawn."""
        new_store(storage_url)
        dead = context.Process(target=_draw_and_die, args=(storage_url,))
        dead.start()
        assert ended(dead) == 9
        workers: list[Any] = [context.Process(target=_draw, args=(storage_url, 24)) for _ in range(4)]
        for worker in workers:
            worker.start()
        assert [ended(worker) for worker in workers] == [0] * 4
        trials = StudyStore.open(storage_url, "s").trials()
        assert [(t.number, t.state, t.values) for t in trials] == [
            (number, "complete", (number / 24, 0.5)) for number in range(24)
        ]
        assert [t.attributes["tries"] for t in trials] == [2, *[1] * 23]

    def test_two_studies_of_one_storage_do_not_mix(self, storage_url: str) -> None:
        one, other = new_store(storage_url, "one"), new_store(storage_url, "other")
        first, second, third = claim(one, a=0.1), claim(other, a=0.2), claim(one, a=0.3)
        assert (first, second, third) == (0, 0, 1)
        other.complete(second, [0.5, 0.5])
        other.set_attribute("trials", 7)
        assert [t.state for t in one.trials()] == ["running", "running"]
        assert [t.coefficients for t in other.trials()] == [{"a": 0.2}]
        assert one.attribute("trials") is None

    def test_attributes_are_kept_as_they_are(self, storage_url: str) -> None:
        store = new_store(storage_url)
        values = {"text": "ä€😀\n'\";--%s", "deep": {"a": [1, None, 1e-300, True]}, "long": "x" * 200_000}
        for key, value in values.items():
            store.set_attribute(key, value)
            store.set_attribute(key, value)
        again = StudyStore.open(storage_url, "s")
        assert {key: again.attribute(key) for key in values} == values
        assert again.attribute("never set") is None
        assert again.attributes() == {"config": {"any": 1}, **values}

    def test_what_is_not_there_is_named(self, storage_url: str, tmp_path: Path) -> None:
        assert StudyStore.find(storage_url, "s") is None
        new_store(storage_url)
        assert StudyStore.find(storage_url, "s") is not None
        with pytest.raises(StorageError, match=r"no study 'lama'\. This storage has: s\."):
            StudyStore.open(storage_url, "lama")
