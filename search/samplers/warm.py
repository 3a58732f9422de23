"""A warm start: gradients propose the first trials of a search, any engine goes on from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from search.samplers.engine import Engine, Proposal
from search.storage.trials import TrialRecord

_WARM = "mergefront:warm"


class WarmStarted(Engine):
    """`count` proposals of one engine, then those of another, which learns from all of them (see `Engine`).

    To a genetic algorithm the first trials are members of its first generation, like the baselines.
    """

    def __init__(self, first: Engine, then: Engine, count: int, baselines: int) -> None:
        self._first = first
        self._then = then
        self._count = count
        self._baselines = baselines

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """See `Engine.baseline_tags`."""
        return self._then.baseline_tags(index)

    def cost(self, history: Sequence[TrialRecord]) -> int:
        """See `Engine.cost`."""
        engine = self._first if self._due(history) is not None else self._then
        return engine.cost(history)

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        place = self._due(history)
        if place is None:
            return self._then.propose(history, draw)
        found = self._first.propose(history, draw)
        tags = {**self._then.baseline_tags(self._baselines + place), **found.tags, _WARM: place}
        return Proposal(found.coefficients, tags)

    def _due(self, history: Sequence[TrialRecord]) -> int | None:
        """Which of the first proposals comes next; None if all were made. A failed one is not made again."""
        place = sum(_WARM in record.tags for record in history)
        return place if place < self._count else None
