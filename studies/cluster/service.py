"""What asking, proposing and telling take: storages by the number of workers, engines by the number of trials."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import sqlalchemy
from events import Plan, simulate
from virtual import Prices, VirtualWorker, cluster, cluster_in_memory

from search.config.sampler import SamplerConfig
from search.results.compare.entrants import parse_entrants
from search.samplers import Sources, make_engine
from search.samplers.engine import sobol_point
from search.storage.evidence import EvidenceFolder
from search.storage.trials import TrialRecord

AFTER = (64, 256, 512)  # trials
DEAR = ("gp", "composite")  # engines whose own history would take an hour: they get Sobol points
TOLD = 48  # trials complete before a storage's measurement ends


@dataclass(frozen=True)
class Lock:
    """Seconds that one request holds the lock, medians, with N trials open.

    Attributes:
        ask: of an ask without its proposal. tell: of a tell. look: of an ask that finds nothing to do. beat: of a
            heartbeat, which holds no lock. statements, transactions: of an ask and a tell together.
    """

    workers: int
    ask: float
    tell: float
    look: float
    beat: float
    statements: float
    transactions: float

    @property
    def both(self) -> float:
        return self.ask + self.tell


def sampler(label: str, seed: int = 0) -> SamplerConfig:
    """The `sampler` section that `mergefront compare --engines LABEL` would take."""
    return SamplerConfig(**parse_entrants(label)[0].sampler, seed=seed)


def fresh(problem: Any, label: str, trials: int, seed: int = 0) -> Any:
    """Simulated problem of a study with a name of its own."""
    made = problem.sampled_by(sampler(label, seed), trials)
    object.__setattr__(
        made, "config", made.config.model_copy(update={"name": f"simulated-{secrets.token_hex(6)}"})
    )
    return made


def measure_lock(url: str, problem: Any, workers: int) -> Lock:
    """One storage with so many virtual workers; Sobol points cost next to nothing to propose."""
    with _counted() as counts:
        found = cluster(url, fresh(problem, "qmc", 10**6), workers)
        begin = dict(counts)
        record = simulate(found, Plan(TOLD, lambda rng: 1e4))
        total = {key: counts[key] - begin[key] for key in counts}
    looks, beats = _looks(found), _beats(found)
    requests = len(record.asks) + len(record.tells)
    steady = record.asks[workers:]  # the first ones found fewer trials open
    return Lock(
        workers,
        float(np.median(steady)),
        float(np.median(record.tells)),
        float(np.median(looks)),
        float(np.median(beats)),
        2.0 * total["statements"] / requests,
        2.0 * total["transactions"] / requests,
    )


def _looks(workers: Sequence[VirtualWorker], times: int = 8) -> list[float]:
    """What a worker does twice a second once all trials are given out."""
    found = []
    for worker in workers[-times:]:
        store = worker.store
        store.trials()  # the others' news are old news for who looks twice a second
        begin = time.perf_counter()
        with store.exclusive():
            store.adopt()
            store.trials()
        found.append(time.perf_counter() - begin)
    return found


def _beats(workers: Sequence[VirtualWorker], times: int = 8) -> list[float]:
    store, found = workers[0].store, []
    number = workers[0].ask(0.0).trial.number
    for count in range(times):
        begin = time.perf_counter()
        store._is_mine(number)
        store.annotate(number, "beat", count)
        found.append(time.perf_counter() - begin)
    return found


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts statements and ends of transactions of all databases meanwhile."""
    counts = {"statements": 0, "transactions": 0}

    def statement(*_: Any) -> None:
        counts["statements"] += 1

    def transaction(*_: Any) -> None:
        counts["transactions"] += 1

    listened = [("before_cursor_execute", statement), ("commit", transaction), ("rollback", transaction)]
    for event, listener in listened:
        sqlalchemy.event.listen(sqlalchemy.Engine, event, listener)
    try:
        yield counts
    finally:
        for event, listener in listened:
            sqlalchemy.event.remove(sqlalchemy.Engine, event, listener)


@dataclass(frozen=True)
class Proposals:
    """CPU seconds of an engine's proposals.

    Attributes:
        after: number of complete trials -> seconds of a proposal of an engine that knows all but the newest one.
        each: seconds more for each further trial that is new to it.
    """

    after: dict[int, float]
    each: float

    def at(self, trials: int) -> float:
        """Seconds of a proposal, interpolated; beyond the last measurement along the last line."""
        t, s = np.array(sorted(self.after)), np.array([self.after[key] for key in sorted(self.after)])
        if trials <= t[-1] or len(t) < 2:
            return float(np.interp(trials, t, s))
        return float(max(s[-1], s[-1] + (trials - t[-1]) * (s[-1] - s[-2]) / (t[-1] - t[-2])))


def measure_proposals(
    label: str, problem: Any, folder: str, after: Sequence[int], news: int = 32
) -> Proposals:
    """What one engine takes; process time, since other processes may have the cores.

    Args:
        folder: for the evidence of engines that read answers. news: trials that are new, for `Proposals.each`.
    """
    made = fresh(problem, label, 10**6)
    evidence = EvidenceFolder(f"sqlite:///{folder}/study.db", "simulated")
    if label in DEAR:
        history = _sobol_history(made, max(after), evidence)
    else:
        workers, store = cluster_in_memory(made, 1, Prices(0.0, 0.0))
        simulate(workers, Plan(max(after), lambda rng: 1.0))
        history = store.trials()[: max(after)]
    sources = Sources(
        made.metrics,
        lambda: made.gradient,
        lambda record: evidence.load(str(record.attributes["evidence"])),
        lambda record: made.losses(evidence.load(str(record.attributes["evidence"]))),
    )
    space = made.space
    box = (space.low, space.high)
    found, each = {}, []
    for trials in after:
        engine = make_engine(
            made.config.sampler, space.names, box, sources, made.idle, len(made.baselines), space.neutral
        )
        early = max(trials - 1 - news, len(made.baselines))
        _seconds(engine, history[:early])
        many = _seconds(engine, history[: trials - 1])
        found[trials] = _seconds(engine, history[:trials])
        each.append(max(0.0, many - found[trials]) / (trials - 1 - early))
    return Proposals(found, float(np.median(each)))


def _seconds(engine: Any, history: Sequence[TrialRecord]) -> float:
    begin = time.process_time()
    engine.propose(history, len(history))
    return time.process_time() - begin


def _sobol_history(problem: Any, trials: int, evidence: EvidenceFolder) -> list[TrialRecord]:
    """Complete trials: baselines, then Sobol points."""
    space, found = problem.space, []
    for number in range(trials):
        if number < len(problem.baselines):
            kind, recipe = problem.baselines[number].kind, problem.baselines[number].recipe
        else:
            unit = sobol_point(len(space.names), 1, number)
            kind, recipe = "search", space.from_vector(space.low + unit * (space.high - space.low))
        evaluation = problem.predicted(recipe)
        values = tuple(float(metric.value(evaluation.outcomes)) for metric in problem.metrics)
        attributes = {"recipe": recipe.key, "method": recipe.method, "evidence": evidence.save(evaluation)}
        found.append(TrialRecord(number, kind, "complete", recipe.coefficients, values, attributes, {}, 1.0))
    return found


def to_json(value: Lock | Proposals) -> dict[str, Any]:
    return asdict(value)


def slower(lock: Lock, seconds: float) -> Lock:
    """The same over a network: each round trip takes so many seconds more."""
    trips = lock.statements + 2.0 * lock.transactions
    return replace(lock, ask=lock.ask + seconds * trips / 2.0, tell=lock.tell + seconds * trips / 2.0)
