"""Metrics with their bootstrap intervals: the cells of every table and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from objectives.metrics.bootstrap import resample_weights
from objectives.metrics.diversity import Diversity
from objectives.metrics.names import Metric
from objectives.outcomes import Outcomes
from objectives.questions.questions import Split
from search.storage.evidence import EvidenceFolder

RESAMPLES = 1000

Samples = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Cell:
    """A metric of one trial on one split, with its 95 % bootstrap interval over questions."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


class CellComputer:
    """Metrics of answers with their bootstrap samples, each once."""

    def __init__(self, evidence: EvidenceFolder) -> None:
        self._evidence = evidence
        self._weights: dict[tuple[Split, bool], NDArray[np.float64]] = {}
        self._known: dict[tuple[Split, str, str], tuple[Cell, NDArray[np.float64]]] = {}

    def cells(
        self, split: Split, key: str, read: Callable[[], Outcomes], metrics: Sequence[Metric]
    ) -> tuple[dict[str, Cell], Samples]:
        """Cells and samples by metric; `key` names the outcomes that `read` reads."""
        missing = [metric for metric in metrics if (split, key, metric.name) not in self._known]
        if missing:
            outcomes = read()
            weights = self._resamples(split, outcomes)
            for metric in missing:
                value, drawn = metric.value(outcomes), metric(outcomes, weights)
                self._known[split, key, metric.name] = (
                    cell_around(value, metric.interval(value, drawn)),
                    drawn,
                )
        return self._found(split, key, [metric.name for metric in metrics])

    def sampled(self, split: Split, digest: str | None) -> tuple[dict[str, Cell], Samples]:
        """The same for sampled answers, over prompts instead of questions; nothing where there are none."""
        if digest is None:
            return {}, {}
        diversity = self._evidence.load_diversity(digest)
        weights = self._resamples(split, diversity)
        for metric in diversity.metrics:
            if (split, digest, metric.name) not in self._known:
                value, drawn = metric.value(diversity), metric(diversity, weights)
                cell = cell_around(value, metric.interval(value, drawn))
                self._known[split, digest, metric.name] = (cell, drawn)
        return self._found(split, digest, list(diversity.values))

    def _found(self, split: Split, key: str, names: Sequence[str]) -> tuple[dict[str, Cell], Samples]:
        found = {name: self._known[split, key, name] for name in names}
        return {name: cell for name, (cell, _) in found.items()}, {
            name: drawn for name, (_, drawn) in found.items()
        }

    def _resamples(self, split: Split, answers: Outcomes | Diversity) -> NDArray[np.float64]:
        strata = answers.task if isinstance(answers, Outcomes) else None
        key = (split, strata is None)
        if key not in self._weights:
            self._weights[key] = resample_weights(len(answers), RESAMPLES, strata=strata)
        return self._weights[key]


def cell_around(value: float, interval: tuple[float, float]) -> Cell:
    """With few questions a basic interval of a biased metric (ECE) can leave the value out; shown, it holds it."""
    return Cell(value, min(interval[0], value), max(interval[1], value))
