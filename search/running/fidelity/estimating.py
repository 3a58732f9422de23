"""Fidelity: a candidate is first scored on a fixed subset; only who is not dominated there is scored in full.

Accuracy is estimated by one of `objectives.estimators`, with item parameters fitted on the bank: baselines and complete
trials before this one. Another objective is the subset's value plus what the bank's trials have more (or
less) on all questions than on the subset, on average. A candidate whose estimates are not dominated by the front of the
complete trials is promoted: the remaining questions are scored and the full value counts, so what enters the front is
always scored in full. Nothing promises that a good candidate is not stopped: an estimate has no interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from objectives.estimators.irt import Items, fit_items
from objectives.estimators.methods import get_estimator
from objectives.estimators.subset import choose_subset
from objectives.metrics.names import Metric
from objectives.outcomes import Booleans, Integers, Outcomes
from search.config.sections import FidelityConfig
from search.front import non_dominated
from search.merging.baselines import PARENTS
from search.running.fidelity.stages import Answers, Judge, Verdict
from search.storage.trials import TrialRecord

DIMENSIONS = 2
BANK = 256  # search trials at most, the newest ones: fitting takes time in proportion
STEP = 8  # search trials that the bank grows by at once, for the same reason


class Estimating:
    """The rule of a study's `fidelity` section (see `Rule`)."""

    def __init__(
        self, config: FidelityConfig, metrics: Sequence[Metric], task: Integers, answers: Answers
    ) -> None:
        self._metrics = tuple(metrics)
        self._answers = answers
        self._estimator = get_estimator(config.estimator)
        self._dimensions = config.dimensions or DIMENSIONS
        self._subset = choose_subset(task.size, config.questions, config.seed, strata=task)
        rest = np.setdiff1d(np.arange(task.size), self._subset.index)
        self.parts: tuple[Integers, ...] = (self._subset.index, rest)
        self._known: dict[
            str, tuple[Booleans, list[float]]
        ] = {}  # evidence -> right answers, full minus subset
        self._fitted: tuple[list[str], Items] | None = None

    def judge(self, trial: TrialRecord, complete: Sequence[TrialRecord]) -> Judge:
        """Promotes everybody while the bank is too small for the estimator."""
        bank = bank_of(complete)
        items = self._items(bank)

        def judged(seen: Outcomes, places: Integers) -> Verdict | None:
            if items is None:
                return None
            estimate = self._estimate(seen, items, bank)
            how = f"estimated by {self._estimator.name} from {len(places)} of {len(items)} questions"
            return verdict_on(estimate, complete, self._metrics, how)

        return judged

    def _estimate(self, seen: Outcomes, items: Items, bank: Sequence[TrialRecord]) -> list[float]:
        """Values on all questions, in the order of the objectives, from the answers to the subset."""
        found = []
        more = np.mean([self._row(record)[1] for record in bank], axis=0)
        parents = items.ability[: sum(record.kind in PARENTS for record in bank)]
        for metric, shift in zip(self._metrics, more, strict=True):
            if metric.name == "accuracy":
                index, weights = self._subset.index, self._subset.weights
                found.append(self._estimator.estimate(items, parents, index, seen.correct, weights))
            else:
                found.append(metric.value(seen) + float(shift))
        return found

    def _items(self, bank: Sequence[TrialRecord]) -> Items | None:
        """The items' parameters, fitted anew where the bank is another; the parents are its first recipes."""
        parents = sum(record.kind in PARENTS for record in bank)
        if parents < 2 or len(bank) <= self._dimensions:
            return None
        key = [str(record.attributes["evidence"]) for record in bank]
        if self._fitted is None or self._fitted[0] != key:
            correct = np.array([self._row(record)[0] for record in bank])
            if self._estimator.ability is None or "accuracy" not in [metric.name for metric in self._metrics]:
                n = correct.shape[1]  # nobody reads parameters
                items = Items(np.zeros((1, n)), np.zeros(n), np.zeros((len(bank), 1)))
            else:
                items = fit_items(correct, self._dimensions)
            self._fitted = key, items
        return self._fitted[1]

    def _row(self, record: TrialRecord) -> tuple[Booleans, list[float]]:
        key = str(record.attributes["evidence"])
        if key not in self._known:
            outcomes = self._answers(record)
            part = outcomes.select(self._subset.index)
            more = [metric.value(outcomes) - metric.value(part) for metric in self._metrics]
            self._known[key] = outcomes.correct, more
        return self._known[key]


def verdict_on(
    estimate: Sequence[float], complete: Sequence[TrialRecord], metrics: Sequence[Metric], how: str
) -> Verdict | None:
    """That a candidate is stopped, if the front dominates its estimates; `how` says how they were made."""
    maximize = [metric.maximize for metric in metrics]
    values = np.array([record.values for record in complete])
    gap = np.where(maximize, 1.0, -1.0) * (values - np.asarray(estimate))
    over = (gap >= 0.0).all(axis=1) & (gap > 0.0).any(axis=1) & non_dominated(values, maximise=maximize)
    if not over.any():
        return None
    shown = ", ".join(f"{metric.name} {value:.4g}" for metric, value in zip(metrics, estimate, strict=True))
    reason = f"{how} ({shown}) it is dominated by trial {complete[int(over.argmax())].number}"
    return Verdict(tuple(map(float, estimate)), reason)


def bank_of(complete: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The parents, the uniform line, and search trials by number, each recipe once.

    Of the search trials whole steps of `STEP`, the newest `BANK`: between two steps the bank is the same.
    """
    first = {record.attributes["recipe"]: record for record in reversed(complete)}
    each = sorted(first.values(), key=lambda record: record.number)
    parents = [record for kind in PARENTS for record in each if record.kind == kind]
    uniform = [record for record in each if record.kind == "uniform"]
    searched = [record for record in each if record.kind == "search"]
    return [*parents, *uniform, *searched[: len(searched) // STEP * STEP][-BANK:]]
