"""Side-by-side timing: contenders take turns, and what counts is the median of their ratios, with the spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Of paired seconds, a / b: median, smallest and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> Ratio:
        pairs = [x / y for x, y in zip(a, b, strict=True)]
        return cls(statistics.median(pairs), min(pairs), max(pairs))

    def __str__(self) -> str:
        digits = 1 if self.median >= 10 else 2
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every call, a list each; the order is turned round every time, so that a drift hits all alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for i in order:
            taken[i].append(seconds(calls[i]))
    return taken
