"""Clocks that are set back or forth: a worker that lives keeps its trial, whatever the time of day is said to be."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution

import search.storage.store
from search.config.study_file import load_study_file
from search.running.launch import create
from search.running.observer import Observer
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.storage.worker import Worker, this_worker
from search.study import run
from tests.fault_table import Fault
from tests.faults.child import in_child
from tests.pico_study import write_study
from tests.study_process import whole

pytestmark = pytest.mark.fault(29)

DAY = 86_400.0
JUMPS = (-3650 * DAY, -3600.0, 3600.0, 3650 * DAY)


_now = datetime.datetime


def _set_clock(seconds: float, real: Callable[[], float]) -> None:
    """Moves the time of day of this process: what `time.time` and `datetime.now` say, here and in Optuna's storage."""

    class Moved(_now):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return _now.fromtimestamp(real() + seconds, tz)

        @classmethod
        def utcnow(cls) -> Any:
            return _now.fromtimestamp(real() + seconds, datetime.UTC).replace(tzinfo=None)

    setattr(time, "time", lambda: real() + seconds)  # noqa: B010
    setattr(datetime, "datetime", Moved)  # noqa: B010
    from optuna.storages._rdb import models, storage

    for module in (models, storage):
        if hasattr(module, "datetime"):
            setattr(module, "datetime", Moved if isinstance(module.datetime, type) else datetime)  # noqa: B010


def _claimed(url: str, owner: Worker) -> None:
    store = StudyStore.open(url, "x")
    with store.exclusive():
        record = store.claim("search", {"a": 0.5}, {"a": FloatDistribution(0, 1)}, {"recipe": "r"}, {})
    store.annotate(record.number, "worker", owner.to_json())


def _try_to_adopt(url: str, jumps: tuple[float, ...]) -> tuple[list[int], list[float]]:
    """What a worker whose clock jumps takes over, with the usual grace, and the jumps as it sees them."""
    store, real, found, seen = StudyStore.open(url, "x"), time.time, [], []
    for jump in (0.0, *jumps, 0.0):
        _set_clock(jump, real)
        seen.append(round(time.time() - real()))
        for _ in range(2):
            with store.exclusive():
                found += [record.number for record in [store.adopt()] if record is not None]
    return found, seen


def test_live_workers_keep_their_trials(tmp_path: Path, fault: Fault) -> None:
    """One of this machine, and one of another that was heard of a moment ago: neither is adopted after a jump."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store = StudyStore.create(url, "x", [("accuracy", True)])
    store.set_attribute("config", {})
    owners = [this_worker(), Worker("elsewhere", "boot", "ns", 1, "2")]
    for owner in owners:
        _claimed(url, owner)
    adopted, seen = in_child(_try_to_adopt, url, JUMPS)
    assert adopted == []
    assert seen == [0, *JUMPS, 0], "the clock was not moved"
    assert [t.attributes["worker"] for t in store.trials()] == [owner.to_json() for owner in owners]
    fault.struck(len(JUMPS))


def _run_with_jumps(study: str, url: str) -> int:
    """A whole study in whose trials the clock jumps, with beats so frequent that they fall between."""

    class Jumping(Observer):
        count, real = 0, staticmethod(time.time)

        def step(self, step: str, trial: TrialRecord) -> None:
            if step == "merged":
                type(self).count += 1
                _set_clock(JUMPS[self.count % len(JUMPS)], self.real)

    torch.set_num_threads(1)  # as in the tests' own process
    search.storage.store.BEAT_SECONDS = 0.005
    run(*create(load_study_file(Path(study)), url, "cpu"), Jumping())
    return Jumping.count


def test_a_study_in_which_the_clock_jumps_is_the_same_study(tmp_path: Path, fault: Fault) -> None:
    """Oracle: front, recipes, values and tags of a run with a quiet clock; nothing is tried twice."""
    study = write_study(tmp_path, trials=4)
    quiet, jumping = (f"sqlite:///{tmp_path / name / 'study.db'}" for name in ("quiet", "jumping"))
    run(*create(load_study_file(study), quiet, "cpu"))
    fault.struck(in_child(_run_with_jumps, str(study), jumping))
    assert whole(jumping) == whole(quiet)
    assert {t.attributes["tries"] for t in StudyStore.open(jumping, "pico").trials()} == {1}
