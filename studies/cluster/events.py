"""The virtual clock: workers that ask, evaluate and tell, and one lock that serves them in the order of their requests.

Asking and telling hold the lock for as long as the worker says it took; evaluating takes a drawn latency and nothing of
ours. So a study of hours on 256 workers is one of seconds here.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from search.study import POLL_SECONDS

Draw = Callable[[np.random.Generator], float]


@dataclass(frozen=True)
class Asked:
    """What an ask came to.

    Attributes:
        trial: None if there is none. held: seconds that the lock was held. known: it needs no evaluation.
    """

    trial: Any
    held: float
    known: bool = False


class Asker(Protocol):
    """A worker as the clock sees it; `now` is virtual."""

    def ask(self, now: float) -> Asked: ...

    def tell(self, trial: Any, now: float) -> float:
        """Stores the result; seconds that the lock was held."""
        ...

    def die(self, now: float) -> None:
        """The process is gone; who asks next in its place is another one."""
        ...


@dataclass(frozen=True)
class Plan:
    """One cluster.

    Attributes:
        trials: complete ones after which the simulation ends. latency: draws an evaluation's seconds.
        death: probability that the worker dies in an evaluation. restart: seconds until another takes its place.
    """

    trials: int
    latency: Draw
    death: float = 0.0
    restart: float = 60.0
    seed: int = 0


@dataclass
class Record:
    """What happened, in virtual seconds.

    Attributes:
        done: when each trial was complete. waits: for the lock, a request each. asks, tells: holding it.
        busy: worker-seconds of evaluations that ended in a tell. deaths: of workers.
    """

    workers: int
    done: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    asks: list[float] = field(default_factory=list)
    tells: list[float] = field(default_factory=list)
    busy: float = 0.0
    deaths: int = 0

    def rate(self, skip: int = 0) -> float:
        """Trials a second after the first `skip` trials."""
        return (len(self.done) - skip) / (self.done[-1] - (self.done[skip - 1] if skip else 0.0))

    @property
    def utilisation(self) -> float:
        """Share of the workers' time that complete evaluations took."""
        return self.busy / (self.workers * self.done[-1])


def simulate(workers: Sequence[Asker], plan: Plan) -> Record:
    """Runs the workers until `plan.trials` trials are complete."""
    rng = np.random.default_rng([plan.seed, len(workers)])
    found = Record(len(workers))
    free = 0.0  # when the lock is free next
    # (when, tie-break, worker, trial to tell or None to ask, seconds of its evaluation)
    events: list[tuple[float, int, int, Any, float]] = [(0.0, i, i, None, 0.0) for i in range(len(workers))]
    count = len(events)

    def later(when: float, worker: int, trial: Any = None, seconds: float = 0.0) -> None:
        nonlocal count
        heapq.heappush(events, (when, count, worker, trial, seconds))
        count += 1

    while len(found.done) < plan.trials:
        now, _, worker, trial, seconds = heapq.heappop(events)
        granted = max(now, free)
        found.waits.append(granted - now)
        if trial is not None:
            held = workers[worker].tell(trial, granted)
            free = granted + held
            found.tells.append(held)
            found.done.append(free)
            found.busy += seconds
            later(free, worker)
            continue
        asked = workers[worker].ask(granted)
        free = granted + asked.held
        if asked.trial is None:
            later(free + POLL_SECONDS, worker)
            continue
        found.asks.append(asked.held)
        seconds = 0.0 if asked.known else plan.latency(rng)
        if rng.random() < plan.death:
            died = free + rng.random() * seconds
            workers[worker].die(died)
            found.deaths += 1
            later(died + plan.restart, worker)
        else:
            later(free + seconds, worker, asked.trial, seconds)
    return found


class Priced:
    """A worker that does nothing but hold the lock for given seconds (see `Asker`): throughput without a search."""

    def __init__(self, ask: float, tell: float) -> None:
        self._ask, self._tell = ask, tell

    def ask(self, now: float) -> Asked:
        return Asked(object(), self._ask)

    def tell(self, trial: Any, now: float) -> float:
        return self._tell

    def die(self, now: float) -> None:
        """Nobody adopts what it had: without a search a trial is as good as any other."""


def drawn_from(seconds: Sequence[float], mean: float | None = None) -> Draw:
    """Draws from measured latencies, scaled to another mean if one is given."""
    scaled = np.asarray(seconds) * (1.0 if mean is None else mean / np.mean(seconds))
    return lambda rng: float(rng.choice(scaled))
