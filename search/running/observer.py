"""Who watches a study run. The base class watches in silence; `progress` prints; tests strike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from search.storage.trials import TrialRecord

Step = Literal["asked", "merging", "merged", "evaluated", "evidence"]


class Observer:
    """Every method is called by `study.run` in the worker's own thread; what it raises ends the run."""

    def started(self, trials: Sequence[TrialRecord], total: int) -> None:
        """The study as it stands, and how many trials, complete or stopped, it shall have."""

    def step(self, step: Step, trial: TrialRecord) -> None:
        """A trial reached a step."""

    def batches(self, tokens: int) -> None:
        """Tokens a batch, padding counted, once they are known."""

    def evaluating(self, done: int, of: int) -> None:
        """Questions scored so far."""

    def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
        """A trial is stored, with its values in the order of the objectives."""

    def stopped(self, trial: TrialRecord, reason: str) -> None:
        """A trial was stopped after a part of its questions, and why."""

    def failed(self, trial: TrialRecord, reason: str) -> None:
        """A trial failed, and why."""

    def ended(self, trials: Sequence[TrialRecord]) -> None:
        """The budget is complete."""

    def reporting(self, done: int, of: int) -> None:
        """Trials scored on the report split so far."""
