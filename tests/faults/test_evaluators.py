"""Trials that fail: by what the evaluator raises or returns, for lack of memory, or because they take too long."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from search.config.study_file import load_study_file
from search.errors import EvaluationError, TooManyFailuresError
from search.merging.baselines import BASELINES
from search.running.fidelity import rules
from search.running.launch import create
from search.running.observer import Observer
from search.running.problem import Problem
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.fault_table import Fault
from tests.faults.child import in_child
from tests.pico_study import write_study
from tests.study_process import whole

FIRST = len(BASELINES)


@pytest.fixture
def opened(tmp_path: Path) -> tuple[StudyStore, Problem]:
    study = write_study(tmp_path, trials=6)
    return create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")


class Failing(Observer):
    """Raises from within the evaluation of the trials that `when` names."""

    def __init__(self, when: Callable[[int], bool], error: BaseException) -> None:
        self._when, self._error, self._trial = when, error, -1
        self.reasons: list[str] = []

    def step(self, step: str, trial: TrialRecord) -> None:
        self._trial = trial.number
        if step == "merged" and self._when(trial.number):
            raise self._error

    def failed(self, trial: TrialRecord, reason: str) -> None:
        self.reasons.append(reason)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "error",
    [EvaluationError("question 3: not a number."), RuntimeError("CUDA out of memory"), MemoryError()],
    ids=["evaluation", "torch", "memory"],
)
def test_a_failing_trial_is_recorded_and_replaced(
    opened: tuple[StudyStore, Problem], error: Exception
) -> None:
    store, problem = opened
    observer = Failing(lambda number: number in (FIRST, FIRST + 2), error)
    run(store, problem, observer)
    trials = store.trials()
    assert [t.number for t in trials if t.state == "failed"] == [FIRST, FIRST + 2]
    assert sum(t.state == "complete" for t in trials) == FIRST + 6
    assert trials[FIRST].attributes["error"] == observer.reasons[0] != ""


@pytest.mark.fault(24)
def test_a_defect_is_no_failed_trial(opened: tuple[StudyStore, Problem]) -> None:
    """A bug must show itself: only what a recipe can cause is recorded as its failure."""
    store, problem = opened
    with pytest.raises(KeyError):
        run(store, problem, Failing(lambda number: number == FIRST, KeyError("bug")))


@pytest.mark.fault(24)
def test_five_failures_in_a_row_stop_the_study(opened: tuple[StudyStore, Problem]) -> None:
    store, problem = opened
    with pytest.raises(
        TooManyFailuresError, match=r"trials 11 to 15 failed in a row; the last one: no\. Mend"
    ):
        run(store, problem, Failing(lambda number: number >= FIRST, EvaluationError("no.")))
    assert len(store.trials()) == FIRST + 5
    run(store, problem)  # mended
    assert sum(t.state == "complete" for t in store.trials()) == FIRST + 6


@pytest.mark.fault(24)
def test_a_failing_baseline_ends_the_study_at_once(opened: tuple[StudyStore, Problem]) -> None:
    store, problem = opened
    with pytest.raises(EvaluationError, match=r"trial 1 \(post\): broken. A study needs its baselines"):
        run(store, problem, Failing(lambda number: number == 1, EvaluationError("broken.")))
    run(store, problem)  # mended: the baseline is drawn again, and once
    done = [t for t in store.trials() if t.state == "complete"]
    assert sorted(t.kind for t in done if t.kind != "search") == ["post", "pre", *["uniform"] * 9]
    assert len(done) == FIRST + 6


_ODD = {
    "nan": ([float("nan")], "found nan, wanted a finite number between 0 and 1"),
    "infinite": ([float("inf")], "found inf, wanted a finite number between 0 and 1"),
    "minus infinite": ([-float("inf")], "found -inf, wanted a finite number"),
    "above its range": ([1.5], "found 1.5, wanted a finite number between 0 and 1"),
    "below its range": ([-0.01], "found -0.01, wanted a finite number between 0 and 1"),
    "two values": ([0.5, 0.5], "found 2 values, wanted one"),
    "no value": ([], "found 0 values, wanted one"),
}


@pytest.mark.fault(24)
@pytest.mark.parametrize("kind", _ODD)
def test_a_number_that_is_none_never_reaches_the_front(opened: tuple[StudyStore, Problem], kind: str) -> None:
    store, problem = opened
    values, reason = _ODD[kind]
    count = [0]

    def odd(outcomes: Any, weights: Any = None) -> Any:
        count[0] += 1
        return np.array(values if count[0] == FIRST + 2 else [0.5])

    metrics = (replace(problem.metrics[0], function=odd), problem.metrics[1])
    run(store, replace(problem, metrics=metrics), report=False)
    failed = [t for t in store.trials() if t.state == "failed"]
    assert [t.number for t in failed] == [FIRST + 1]
    assert reason in failed[0].attributes["error"]
    assert sum(t.state == "complete" for t in store.trials()) == FIRST + 6


# -- memory ------------------------------------------------------------------------------------------------------


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class Gluttons(Observer):
    """In some trials the model's own forward pass takes all memory that the process may have."""

    CHUNK = 2**24

    def __init__(self, problem: Problem, numbers: tuple[int, ...]) -> None:
        self._numbers, self._hungry = numbers, False
        self.resident: list[int] = []
        self.reasons: list[str] = []
        problem.live.model.model.layers[0].register_forward_pre_hook(self._forward)

    def _forward(self, *_: object) -> None:
        eaten = []
        while self._hungry:
            eaten.append(torch.zeros(self.CHUNK))

    def step(self, step: str, trial: TrialRecord) -> None:
        if step == "asked":
            self.resident.append(_resident())
        if step == "merged":
            self._hungry = trial.number in self._numbers

    def failed(self, trial: TrialRecord, reason: str) -> None:
        self.reasons.append(reason)


def _run_short_of_memory(study: str, url: str, numbers: tuple[int, ...]) -> tuple[list[int], list[str]]:
    store, problem = create(load_study_file(Path(study)), url, "cpu")
    observer = Gluttons(problem, numbers)
    most = _address_space() + 300 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    run(store, problem, observer, report=False)
    return observer.resident, observer.reasons


@pytest.mark.fault(25)
def test_out_of_memory_in_a_trial_fails_it_and_gives_the_memory_back(tmp_path: Path, fault: Fault) -> None:
    """The allocator of torch fails for real, in a child whose address space is limited.

    Oracles: the reason in the storage, all other trials as without the fault, and the resident memory at the beginning
    of each later trial against that of the first trial.
    """
    study = write_study(tmp_path, trials=8)
    url, hungry = f"sqlite:///{tmp_path / 'study.db'}", (FIRST + 1, FIRST + 3, FIRST + 5, FIRST + 6)
    resident, reasons = in_child(_run_short_of_memory, str(study), url, hungry)
    trials = StudyStore.open(url, "pico").trials()
    assert tuple(t.number for t in trials if t.state == "failed") == hungry
    assert sum(t.state == "complete" for t in trials) == FIRST + 8
    for number, reason in zip(hungry, reasons, strict=True):
        assert "can't allocate memory" in reason
        assert trials[number].attributes["error"] == reason
    fault.struck(len(hungry))
    assert max(resident[FIRST + 1 :]) - resident[FIRST] < 2**25, "each fault had taken 300 MB"


# -- time --------------------------------------------------------------------------------------------------------


class Slow(Observer):
    """Some trials take their time over their questions."""

    def __init__(self, wait: Callable[[], None], *numbers: int) -> None:
        self._wait, self._numbers, self._trial = wait, numbers, -1
        self.reasons: list[str] = []

    def step(self, step: str, trial: TrialRecord) -> None:
        self._trial = trial.number

    def evaluating(self, done: int, of: int) -> None:
        if self._trial in self._numbers:
            self._wait()

    def failed(self, trial: TrialRecord, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of the clock by which trials are limited, for a test to move."""
    now = [1000.0]
    monkeypatch.setattr("search.running.deadline.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def limited(tmp_path: Path, seconds: float | None, **keys: Any) -> tuple[StudyStore, Problem]:
    study = write_study(tmp_path, trials=6, trial_seconds=seconds, **keys)
    return create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")


@pytest.mark.fault(26)
def test_a_trial_that_takes_too_long_fails_and_the_study_goes_on(tmp_path: Path, clock: list[float]) -> None:
    store, problem = limited(tmp_path, 60)
    observer = Slow(lambda: clock.__setitem__(0, clock[0] + 61), FIRST, FIRST + 2)
    run(store, problem, observer)
    trials = store.trials()
    assert [t.number for t in trials if t.state == "failed"] == [FIRST, FIRST + 2]
    assert sum(t.state == "complete" for t in trials) == FIRST + 6
    assert trials[FIRST].attributes["error"] == observer.reasons[0]
    assert re.match(
        r"took 61\.0 s until question \d+ of 20, wanted at most 60 s \(trial_seconds\)", observer.reasons[0]
    )


@pytest.mark.fault(26)
def test_loading_models_is_no_trials_time(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, of = Problem.load, rules.stages_of

    def slow(work: Callable[..., Any]) -> Callable[..., Any]:
        def done(*arguments: Any) -> Any:
            clock[0] += 1000
            return work(*arguments)

        return done

    monkeypatch.setattr(Problem, "load", slow(load))
    monkeypatch.setattr("search.study.stages_of", slow(of))
    store, problem = limited(tmp_path, 60, racing={"error": 0.3, "looks": 4})
    run(store, problem)
    assert "failed" not in {t.state for t in store.trials()}
    assert clock[0] > 2000


@pytest.mark.fault(26)
def test_a_limit_that_no_trial_keeps_stops_the_study(tmp_path: Path, clock: list[float]) -> None:
    """A baseline at once; search trials after five in a row. A higher limit goes on where it stopped."""
    store, problem = limited(tmp_path / "one", 60)
    with pytest.raises(
        EvaluationError, match=r"trial 0 \(pre\): took 61\.0 s .* A study needs its baselines"
    ):
        run(store, problem, Slow(lambda: clock.__setitem__(0, clock[0] + 61), 0))
    store, problem = limited(tmp_path / "two", 60)
    with pytest.raises(TooManyFailuresError, match="took 61"):
        run(store, problem, Slow(lambda: clock.__setitem__(0, clock[0] + 61), *range(FIRST, 99)))
    store, problem = limited(tmp_path / "two", 1000)
    run(store, problem, Slow(lambda: clock.__setitem__(0, clock[0] + 61), *range(FIRST, 99)))
    assert sum(t.state == "complete" for t in store.trials()) == FIRST + 6


@pytest.mark.fault(26)
def test_a_limit_that_is_not_reached_changes_nothing(tmp_path: Path) -> None:
    """Oracle: front, recipes, values and tags, number by number."""
    for folder, seconds in (("without", None), ("with", 3600.0)):
        store, problem = limited(tmp_path / folder, seconds)
        run(store, problem)
    without, limit = (whole(f"sqlite:///{tmp_path / folder / 'study.db'}") for folder in ("without", "with"))
    assert limit == without


@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_trial_that_really_takes_too_long(tmp_path: Path) -> None:
    store, problem = limited(tmp_path, 10.0)
    run(store, problem, Slow(lambda: time.sleep(10.1), FIRST + 1), report=False)
    assert [t.number for t in store.trials() if t.state == "failed"] == [FIRST + 1]
