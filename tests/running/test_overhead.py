"""What a study costs besides merging and scoring: it must not grow with the study."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import event

from search.storage import trials
from search.storage.store import StudyStore
from search.study import run
from tests.scripts import load_script


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    """studies/bench/overhead.py"""
    return load_script("bench/overhead.py")


@pytest.mark.parametrize("engine", ["optuna:nsga2", "pymoo:nsga2"])
def test_a_trial_reads_and_writes_the_same_in_a_small_and_in_a_large_study(
    overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Counted are the statements, and the trials that come back, of four trials after the study was read once."""
    read: list[int] = []
    read_trials = trials.TrialTables.read

    def counting(self: Any, ids: Any, connection: Any) -> Any:
        read.append(len(ids))
        return read_trials(self, ids, connection)

    monkeypatch.setattr(trials.TrialTables, "read", counting)
    costs = []
    for size in (40, 400):
        folder = tmp_path / str(size)
        folder.mkdir()
        store, problem = overhead.free_study(folder, engine, 3, size + 4)
        overhead.fill(folder / "study.db", problem, size)
        store = StudyStore.open(store.url, store.name)
        assert len(store.trials()) == size
        statements: list[str] = []
        event.listen(
            store._storage.engine, "before_cursor_execute", lambda *a, to=statements: to.append(a[2])
        )
        read.clear()
        run(store, problem, report=False)
        assert sum(trial.state == "complete" for trial in store.trials()) == size + 4
        costs.append((len(statements), sum(read)))
    (few, read_few), (many, read_many) = costs
    assert many <= 1.05 * few, "a recipe that was scored before has one attribute more"
    assert read_few == read_many <= 4 * 6, "a running trial is read at each look, a finished one once"


# Below, processor time is compared: what other processes do at the same time changes wall time by more than the slack.


@pytest.mark.slow
@pytest.mark.parametrize("coefficients", [14, 64])
def test_proposing_and_storing_are_less_than_two_percent_of_a_real_trial(
    overhead: ModuleType, coefficients: int
) -> None:
    found = overhead.measure_trials("optuna:tpe", coefficients, 75, window=50, clock=time.process_time)
    assert found["seconds"] < 0.02 * overhead.REAL_TRIAL, found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["optuna:nsga2", "pymoo:nsga2"])
def test_the_last_of_2000_trials_costs_at_most_twice_the_200th(overhead: ModuleType, engine: str) -> None:
    found = overhead.measure_trials(engine, 64, 2000, clock=time.process_time)
    assert found["growth"] <= 2, found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["optuna:nsga2", "optuna:tpe", "pymoo:nsga2"])
def test_a_study_of_10000_trials_goes_on_within_ten_seconds(overhead: ModuleType, engine: str) -> None:
    found = overhead.measure_reopening(engine, 64, 10_000, clock=time.process_time)
    assert found["total"] < 10, found
