"""Virtual workers of the product: its own asking, proposing and telling, on a virtual clock.

    cluster            against a real storage; what the lock was held is measured
    cluster_in_memory  against trials in memory; what the lock is held is given

Each worker of `cluster` has a store, a history and an engine of its own, as processes have; only who is asking, and
when a silent worker counts as dead, are made up. In memory one engine proposes for all: a proposal is a function of
seed and history.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from events import Asked

import search.storage.store
from search.running.launch import create
from search.running.memory import Memory, Result
from search.running.observer import Observer
from search.running.profile import Stopwatch
from search.samplers import Sources, make_engine
from search.storage.database import connect
from search.storage.evidence import EvidenceFolder
from search.storage.store import GRACE_SECONDS, StudyStore
from search.storage.trials import TrialRecord
from search.storage.worker import Worker
from search.study import _ask, _known, _measured, _Worker

NEAR = 0.01  # coefficients that differ by less make nearly the same merge


class VirtualStore(StudyStore):
    """The product's store of one worker."""

    held = 0.0  # seconds in the lock since it was last set to 0
    now = 0.0
    dead: dict[str, float]  # host of a dead worker -> when it died

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """As the product's, and counts the seconds, those of taking the lock and letting go of it included."""
        begin = time.perf_counter()
        try:
            with super().exclusive():
                yield
        finally:
            self.held += time.perf_counter() - begin

    def _is_orphan(self, record: TrialRecord) -> bool:
        """As the product's of a worker on another machine: silent for `grace` seconds, here since its death."""
        died = self.dead.get(record.attributes["worker"]["host"])
        return died is not None and self.now - died > self.grace


@dataclass(frozen=True)
class Prices:
    """Seconds that the lock is held: by an ask without its proposal, by a tell, by the proposal after t trials."""

    ask: float
    tell: float
    proposal: Callable[[int], float] = lambda trials: 0.0


class MemoryStore:
    """What `search.study` needs of a store, in memory and with given prices; one for all workers."""

    url, name = "memory", "simulated"

    def __init__(self, trials: int, prices: Prices) -> None:
        self.held = self.now = 0.0
        self.dead: dict[str, float] = {}
        self.host, self.grace = "", GRACE_SECONDS
        self.running_twice = self.finished_twice = self.near = 0
        self._budget, self._prices = trials, prices
        self._records: list[TrialRecord] = []
        self._open: set[int] = set()
        self._scored: dict[str, TrialRecord] = {}
        self.completed: list[TrialRecord] = []  # in the order of their ends

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def attribute(self, key: str) -> Any:
        return {"trials": self._budget}.get(key)

    def trials(self) -> list[TrialRecord]:
        return list(self._records)

    def scored(self, recipe: str) -> TrialRecord | None:
        return self._scored.get(recipe)

    def adopt(self) -> TrialRecord | None:
        self.held = self._prices.ask
        for number in sorted(self._open) if self.dead else ():
            record = self._records[number]
            died = self.dead.get(record.attributes["worker"])
            if died is not None and self.now - died > self.grace:
                attributes = {**record.attributes, "worker": self.host}
                self._records[number] = replace(record, attributes=attributes)
                return self._records[number]
        return None

    def claim(
        self,
        kind: str,
        coefficients: Mapping[str, float],
        distributions: Any,
        attributes: Mapping[str, Any],
        tags: Mapping[str, Any],
    ) -> TrialRecord:
        if kind == "search":
            self._count(coefficients, attributes["recipe"])
            self.held += self._prices.proposal(len(self._records) - len(self._open))
        number = len(self._records)
        known = {"kind": kind, **attributes, "worker": self.host}
        self._records.append(TrialRecord(number, kind, "running", coefficients, None, known, tags, None))
        self._open.add(number)
        return self._records[number]

    def complete(self, number: int, values: Sequence[float], attributes: Mapping[str, Any]) -> bool:
        self.held = self._prices.tell
        old = self._records[number]
        done = replace(
            old, state="complete", values=tuple(values), attributes={**old.attributes, **attributes}
        )
        self._records[number] = done
        self._open.discard(number)
        self._scored.setdefault(done.attributes["recipe"], done)
        self.completed.append(done)
        return True

    def _count(self, coefficients: Mapping[str, float], recipe: str) -> None:
        """Whether another worker has the same recipe, or nearly the same, or it is scored already."""
        if recipe in self._scored:
            self.finished_twice += 1
            return
        others = [self._records[number] for number in self._open]
        if any(other.attributes["recipe"] == recipe for other in others):
            self.running_twice += 1
            return
        x = np.array([list(coefficients.values())])
        there = np.array([[other.coefficients[name] for name in coefficients] for other in others])
        self.near += bool(len(there)) and bool((np.abs(there - x).max(axis=1) < NEAR).any())


class VirtualWorker:
    """One process of a cluster, on a machine of its own (see `events.Asker`)."""

    def __init__(self, store: VirtualStore | MemoryStore, worker: _Worker, place: int) -> None:
        self.store, self._worker, self._place, self._lives = store, worker, place, 0
        self._result: Result | None = None

    @property
    def identity(self) -> Worker:
        return Worker(f"virtual-{self._place}-{self._lives}", "boot", "", 1, "1")

    def ask(self, now: float) -> Asked:
        """The product's own."""
        store = self.store
        with self._acting():
            store.now, store.held = now, 0.0
            trial, _ = _ask(self._worker, 0)
            held = store.held
            self._result = None if trial is None else _known(self._worker.store, trial)
        return Asked(trial, held, known=self._result is not None)

    def tell(self, trial: TrialRecord, now: float) -> float:
        """The product's `_run_trial` from the evaluation on, which is simulated."""
        store = self.store
        with self._acting():
            result = self._result or _measured(self._worker, trial)
            store.held = 0.0
            store.complete(trial.number, result.values, result.attributes)
        return store.held

    def die(self, now: float) -> None:
        """Its trial stays as it is until somebody finds it silent."""
        self.store.dead[self.identity.host] = now
        self._lives += 1

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """The product asks the operating system who it is, which knows one process here."""
        if isinstance(self.store, MemoryStore):
            self.store.host = self.identity.host
            yield
            return
        real = search.storage.store.this_worker
        search.storage.store.this_worker = lambda: self.identity
        try:
            yield
        finally:
            search.storage.store.this_worker = real


class _Nowhere(EvidenceFolder):
    """For engines that never read answers: nothing is written."""

    def save(self, evidence: Any) -> str:
        return "0" * 64


class _InMemory(EvidenceFolder):
    """Keeps answers in memory."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(url, name)
        self._kept: list[Any] = []

    def save(self, evidence: Any) -> str:
        self._kept.append(evidence)
        return str(len(self._kept) - 1)

    def load(self, digest: str) -> Any:
        return self._kept[int(digest)]


def cluster(url: str, problem: Any, workers: int, grace: float = GRACE_SECONDS) -> list[VirtualWorker]:
    """Workers at a new study of simulated problem in a storage; their connections are shared."""
    create(problem.config, url, fresh=True, problem=problem)
    storage, dead = connect(url, create=False), {}
    folder = EvidenceFolder if _reads_answers(problem) else _Nowhere
    found = []
    for place in range(workers):
        store = VirtualStore(url, storage, problem.config.name, grace)
        store.dead = dead
        found.append(VirtualWorker(store, _worker(store, problem, folder(url, store.name)), place))
    return found


def cluster_in_memory(problem: Any, workers: int, prices: Prices) -> tuple[list[VirtualWorker], MemoryStore]:
    """Workers at one study in memory, and what they share."""
    store = MemoryStore(problem.config.trials, prices)
    folder = _InMemory if _reads_answers(problem) else _Nowhere
    worker = _worker(store, problem, folder("sqlite:///memory/study.db", store.name))
    return [VirtualWorker(store, worker, place) for place in range(workers)], store


def _reads_answers(problem: Any) -> bool:
    return problem.config.sampler.engine == "composite"


def _worker(store: Any, problem: Any, evidence: EvidenceFolder) -> _Worker:
    """A worker as `search.study.run` makes it."""

    def answers(record: TrialRecord) -> Any:
        return evidence.load(str(record.attributes["evidence"]))

    space = problem.space
    bounds = (space.low, space.high)
    sources = Sources(
        problem.metrics,
        lambda: problem.gradient,
        answers,
        lambda record: problem.losses(answers(record)),
    )
    engine = make_engine(
        problem.config.sampler,
        space.names,
        bounds,
        sources,
        problem.idle,
        len(problem.baselines),
        space.neutral,
    )
    return _Worker(store, problem, evidence, engine, Observer(), Stopwatch(), Memory())
