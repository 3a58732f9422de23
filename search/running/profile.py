"""Where the time of trials goes: merging, scoring, proposing, storing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from search.storage.trials import TrialRecord

PARTS = ("merge", "score", "propose", "store")
ATTRIBUTE = "seconds"  # of a trial: what `Stopwatch.lap` gave


class Stopwatch:
    """Sums up one worker's seconds by part. Parts may nest: the inner one's time is not the outer one's."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Counts the block's time under `part`, one of `PARTS`."""
        self._settle()
        self._open.append(part)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap, to the microsecond.

        A trial is stored with the lap that its own commit ends, so that commit is counted with the worker's next trial.
        """
        self._settle()
        lap = {part: round(seconds, 6) for part, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return lap

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True)
class Profile:
    """Seconds a trial by part: mean over the trials that were scored (repeats of a recipe are not)."""

    trials: int
    mean: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.mean.values())

    def rows(self) -> list[tuple[str, float, float]]:
        """(part, seconds a trial, share of the whole), then the whole."""
        whole = self.total or 1.0
        parts = [(part, self.mean[part], self.mean[part] / whole) for part in PARTS]
        return [*parts, ("trial", self.total, 1.0)]

    def text(self) -> str:
        """A table for a terminal."""
        lines = [f"{'where time goes':<18}{'s/trial':>9}{'share':>9}   (mean of {self.trials} trials)"]
        lines += [f"  {part:<16}{seconds:>9.3f}{share:>9.1%}" for part, seconds, share in self.rows()]
        return "\n".join(lines)


def read_profile(records: Sequence[TrialRecord]) -> Profile | None:
    """The profile of a study; None before a trial was scored."""
    laps = [
        record.attributes[ATTRIBUTE]
        for record in records
        if record.state in ("complete", "stopped")
        and ATTRIBUTE in record.attributes
        and "same_as" not in record.attributes
    ]
    if not laps:
        return None
    return Profile(len(laps), {part: float(np.mean([lap[part] for lap in laps])) for part in PARTS})
