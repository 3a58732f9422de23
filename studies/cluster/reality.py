"""Real processes beside the simulation: the same study, evaluations that sleep, trials a second and connections.

Each process is `search.study.run` with its own store, as `mergefront launch --workers N` starts them; only merging and
scoring are replaced by a pause.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy
from service import fresh
from surrogate import SimulatedMaterials

from search.running.launch import create
from search.running.observer import Observer
from search.storage.database import sqlite_path
from search.storage.store import StudyStore
from search.study import run


class _OverError(Exception):
    """The time is up."""


class _Until(Observer):
    """Ends a run at its first step after the deadline."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def step(self, step: Any, trial: Any) -> None:
        if time.time() > self._deadline:
            raise _OverError


class _Sleeping(SimulatedMaterials):
    """An evaluation takes a while."""

    seconds: float

    def evaluate(self, split: Any, progress: Any = None) -> Any:
        time.sleep(self.seconds)
        return super().evaluate(split, progress)


@dataclass(frozen=True)
class Measured:
    """Trials a second of real processes; connections to the database as (mean, most) of looks at a server."""

    workers: int
    seconds: float
    rate: float
    connections: tuple[float, int] | None


def real_rate(
    url: str, problem: SimulatedMaterials, label: str, workers: int, seconds: float, evaluation: float
) -> Measured:
    """Runs so many processes for so many seconds, each evaluation a pause of `evaluation` seconds.

    The first fifth, in which they start, does not count.
    """
    made = fresh(problem, label, 10**6)
    made.__class__ = _Sleeping
    made.__dict__["seconds"] = evaluation
    create(made.config, url, fresh=True, problem=made)
    begin = time.time()
    context = multiprocessing.get_context("fork")  # the problem are open; no connection is
    processes = [
        context.Process(target=_work, args=(url, made, begin + seconds), daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    looks = _looks(url, begin + seconds)
    for process in processes:
        process.join()
    counted_from = begin + seconds / 5
    # The clock of the process that completed a trial, which is this machine's.
    done = sum(counted_from <= end <= begin + seconds for end in _completions(url, made.config.name))
    mean = (sum(looks) / len(looks), max(looks)) if looks else None
    return Measured(workers, evaluation, done / (seconds * 4 / 5), mean)


def _work(url: str, problem: Any, deadline: float) -> None:
    store = StudyStore.open(url, problem.config.name)
    try:
        run(store, problem, _Until(deadline), report=False)
    except _OverError:
        return


def _completions(url: str, name: str) -> list[float]:
    """When trials were complete, in seconds since the epoch."""
    store = StudyStore.open(url, name)
    question = sqlalchemy.text(
        "select datetime_complete from trials where study_id = :study and state = 'COMPLETE'"
    )
    with store._storage.engine.connect() as connection:
        found = connection.execute(
            question.columns(datetime_complete=sqlalchemy.DateTime()), {"study": store._study_id}
        ).scalars()
        return [when.timestamp() for when in found]


def connections(url: str) -> Callable[[], int] | None:
    """Counts the connections to a server's database, its own one left out; None for SQLite."""
    if sqlite_path(url) is not None:
        return None
    import psycopg

    server = psycopg.connect(url.replace("+psycopg", ""), autocommit=True)
    question = (
        "select count(*) from pg_stat_activity where datname = current_database() and pid != pg_backend_pid()"
    )

    def count() -> int:
        row = server.execute(question).fetchone()
        assert row is not None
        return int(row[0])

    return count


def _looks(url: str, until: float) -> list[int]:
    count, found = connections(url), []
    while time.time() < until:
        time.sleep(0.1)
        if count is not None:
            found.append(count())
    return found
