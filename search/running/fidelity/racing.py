"""Racing: a candidate is stopped once its questions so far show that it cannot enter the front.

The questions of the search split are put into a seeded random order and scored in `looks` batches. After each batch
but the last, every objective gets a one-sided confidence bound of the candidate's value *on the whole split*: the best
value that it may still reach. It is stopped if one complete trial is at least as good as that bound in every
objective.

The bound (a difference estimator, as in survey sampling): a few complete trials whose recipes are nearest are the
candidate's references, chosen before its first answer. What they answered to the whole split is stored, so only the
paired difference candidate - references has to be estimated from the m questions seen,

    value on all n  ~  references on all n  +  (candidate - references) on the m seen.

- Metrics that are means over questions: Student's t for the mean difference, within tasks, with the finite population
  correction (1 - m/n): the questions seen are drawn from those n without replacement (Cochran 1977, "Sampling
  Techniques", sections 2.8 and 5.6). Two made-up differences of opposite sign are added to the variance: a few answers
  that all agree do not show that the others will.
- Others (ECE, AUROC): the paired bootstrap's basic interval, shrunk by sqrt(1 - m/n), or the normal one if that is
  wider. ECE is larger on fewer questions. By how much for the references is known; for the candidate the bootstrap
  shows a part of it, and the bound allows for the rest at its worst (`HIDDEN`).

The rule of error: a candidate that belongs on the front is better than every complete trial in some objective, so it
is stopped wrongly only if the bound of one of these objectives fails. With F trials on the front there are at most
min(objectives, F) of them whose failure can matter at a look; each bound has the level

    error / ((looks - 1) * min(objectives, F)),

and the probability that a given candidate is stopped wrongly is at most `error`, over the draw of the order
(Bonferroni). Racing after Maron and Moore 1997, "The Racing Algorithm". Their Hoeffding bounds hold for any number of
questions, and so do the tighter ones for sampling without replacement of Bardenet and Maillard 2015, but both let
almost everything pass at the differences between merges of one pair. The price of t and bootstrap is that their levels
are approximate where a look has few questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from objectives.metrics.bootstrap import interval, resample_weights
from objectives.metrics.names import Metric
from objectives.outcomes import Floats, Integers, Outcomes
from search.config.sections import RacingConfig
from search.front import non_dominated
from search.running.fidelity.stages import Answers, Judge, Verdict
from search.storage.trials import TrialRecord

REFERENCES = 3
RESAMPLES = 500
LEAST = 10  # questions, for a bootstrap
PARTS = 200
DRAWS = 20
# A mean of absolute values of noise: resampling noise that is there already raises it by sqrt(2) - 1 of itself only.
HIDDEN = 1.0 + 2.0**0.5


class Racing:
    """The rule of a study's `racing` section (see `Rule`)."""

    def __init__(
        self, config: RacingConfig, metrics: Sequence[Metric], task: Integers, answers: Answers
    ) -> None:
        self._config = config
        self._metrics = tuple(metrics)
        self._task = task
        self._answers = answers
        # A bootstrap takes long, and few candidates come so far.
        self._cheapest_first = sorted(range(len(self._metrics)), key=lambda j: self._metrics[j].terms is None)
        self.parts = looks(task, config.looks, config.seed)

    def judge(self, trial: TrialRecord, complete: Sequence[TrialRecord]) -> Judge:
        """References are the complete trials with the nearest coefficients, the earlier one where two are as near."""
        if not complete:
            return lambda seen, places: None
        values = np.array([record.values for record in complete])
        front = np.flatnonzero(non_dominated(values, maximise=[m.maximize for m in self._metrics])).tolist()
        different = len(np.unique(values[front], axis=0))
        level = self._config.error / (self._config.looks - 1) / min(len(self._metrics), different)
        here = np.array(list(trial.coefficients.values()))
        there = np.array([[r.coefficients[name] for name in trial.coefficients] for r in complete])
        nearest = np.argsort(((there - here) ** 2).sum(axis=1), kind="stable")[:REFERENCES].tolist()
        references = [self._answers(complete[i]) for i in nearest]
        rivals = [(complete[i].number, values[i]) for i in front]
        names = f"{'trial' if len(nearest) == 1 else 'trials'} {', '.join(str(complete[i].number) for i in nearest)}"

        def judged(seen: Outcomes, places: Integers) -> Verdict | None:
            comparison = Comparison(seen, references, places, self._task)
            found: dict[int, tuple[float, float]] = {}
            left = rivals
            for j in self._cheapest_first:
                metric = self._metrics[j]
                found[j] = comparison.reach(metric, level)
                sign, best = (1.0 if metric.maximize else -1.0), found[j][1]
                left = [(number, value) for number, value in left if sign * value[j] >= sign * best]
                if not left:
                    return None
            shown = ", ".join(f"{metric.name} {found[j][1]:.4g}" for j, metric in enumerate(self._metrics))
            reason = (
                f"after {len(places)} of {self._task.size} questions trial {left[0][0]} is at least as good as it can "
                f"become ({shown}; level {level:.2g}, beside {names})"
            )
            return Verdict(tuple(float(found[j][0]) for j in range(len(self._metrics))), reason)

        return judged


def looks(task: Integers, count: int, seed: int) -> tuple[Integers, ...]:
    """The places of n questions in `count` batches of equal size (to one question), each ascending.

    A random order within each task; tasks are interleaved so that every batch, and all batches so far, have the
    tasks' shares.

    Args:
        task: `(n,)` task of each question.
    """
    random = np.random.default_rng(seed)
    position = np.empty(task.size)
    for value in np.unique(task):
        members = np.flatnonzero(task == value)
        position[random.permutation(members)] = (np.arange(members.size) + random.random()) / members.size
    order = np.argsort(position, kind="stable")
    return tuple(np.sort(batch).astype(np.int64) for batch in np.array_split(order, count))


@dataclass(frozen=True, eq=False)
class Comparison:
    """A candidate's answers to m of n questions beside the answers of its references to all n.

    Attributes:
        seen: the candidate's, in the order of `places`. references: at least one.
        places: `(m,)` places of the questions seen. task: `(n,)` task of each question.
    """

    seen: Outcomes
    references: Sequence[Outcomes]
    places: Integers
    task: Integers

    def reach(self, metric: Metric, level: float) -> tuple[float, float]:
        """The metric's estimate on all n questions, and the best value that it may have there.

        The estimate is the references' mean value plus the paired difference; the true value lies beyond the other
        number with a probability of about `level`.
        """
        known = float(np.mean([metric.value(reference) for reference in self.references]))
        if metric.terms is not None:
            difference, margin = self._mean_difference(metric, level)
            return known + difference, known + difference + (margin if metric.maximize else -margin)
        low, difference, high = self._bootstrapped(metric, level)
        return known + difference, known + (high if metric.maximize else low)

    def _mean_difference(self, metric: Metric, level: float) -> tuple[float, float]:
        """Stratified mean difference of all questions that count, and the one-sided margin of its estimate."""
        from scipy.stats import t

        assert metric.terms is not None
        others = np.mean([metric.terms(one) for one in self._alongside], axis=0)
        values = metric.terms(self.seen) - others
        counting = np.unique(self.task) if metric.task is None else np.array([metric.task])
        total = np.isin(self.task, counting).sum()
        difference, variances, degrees = 0.0, [], []
        for value in counting:
            d, n = values[self.task[self.places] == value], int((self.task == value).sum())
            m, share = d.size, n / total
            if m == n:
                difference += share * float(d.mean())
                continue
            if m < 2:  # nothing is known of its spread
                return share * float(d.sum()) + difference, np.inf
            difference += share * float(d.mean())
            unit = max(1.0 if metric.name.partition("@")[0] == "accuracy" else 0.0, float(np.abs(d).max()))
            spread = (float(((d - d.mean()) ** 2).sum()) + 2.0 * unit**2) / (m + 1)
            variances.append(share**2 * spread / m * (1.0 - m / n))
            degrees.append(m - 1)
        variance = sum(variances)
        if variance == 0.0:
            return difference, 0.0
        freedom = variance**2 / sum(
            v**2 / f for v, f in zip(variances, degrees, strict=True)
        )  # Satterthwaite
        return difference, float(t.isf(level, freedom)) * variance**0.5

    def _bootstrapped(self, metric: Metric, level: float) -> tuple[float, float, float]:
        """Low end, value and high end of the difference on all n questions, each end at the level."""
        from scipy.stats import norm

        m, n = self.places.size, self.task.size
        counting = self.seen.task if metric.task is None else self.seen.task[self.seen.task == metric.task]
        if counting.size < LEAST:
            return -np.inf, 0.0, np.inf
        weights = _resamples(self.seen.task.tobytes())
        own, others = metric(self.seen, weights), [metric(one, weights) for one in self._alongside]
        alone = metric.value(self.seen)
        value = alone - float(np.mean([metric.value(one) for one in self._alongside]))
        drawn = own - np.mean(others, axis=0)
        spread = np.sqrt(1.0 - m / n) * (drawn - drawn.mean())
        if not spread.any() and m < n:  # too few wrong answers, say, for an AUROC: nothing is known
            return -np.inf, 0.0, np.inf
        low, high = interval(value + spread, 1.0 - 2.0 * level, value=value)
        margin = float(norm.isf(level) * spread.std(ddof=1))
        # What the references' values on m questions are off by on average is known, the candidate's own is not.
        parts = _parts(self.task.tobytes(), self.seen.task.tobytes())
        theirs = np.mean([metric(one, parts).mean() - metric.value(one) for one in self.references])
        own_bias = HIDDEN * (float(own.mean()) - alone)
        least, most = min(own_bias, 0.0), max(own_bias, 0.0)
        if not metric.maximize:  # an error of calibration: noise is all of it where a model is calibrated
            most = max(most, _of_the_calibrated(metric, self.seen))
        fewer = 1.0 - np.sqrt(m / n)
        return (
            min(low, value - margin) + float(theirs) - fewer * most,
            value + (1.0 - m / n) * float(value - drawn.mean()),
            max(high, value + margin) + float(theirs) - fewer * least,
        )

    @cached_property
    def _alongside(self) -> list[Outcomes]:
        return [reference.select(self.places) for reference in self.references]


@lru_cache(8)
def _resamples(task: bytes) -> Floats:
    """Weights of bootstrap resamples of questions of these tasks (int64)."""
    strata = np.frombuffer(task, dtype=np.int64)
    return resample_weights(strata.size, RESAMPLES, strata=strata)


def _of_the_calibrated(metric: Metric, seen: Outcomes) -> float:
    """The metric's mean value had the right options been drawn from the model's own probabilities."""
    uniform = np.random.default_rng(0).random((DRAWS, len(seen), 1))
    gold = (uniform >= seen.probability.cumsum(axis=1)).sum(axis=2)
    drawn = (replace(seen, gold=np.minimum(each, seen.options - 1)) for each in gold)
    return float(np.mean([metric.value(each) for each in drawn]))


@lru_cache(8)
def _parts(task: bytes, seen: bytes) -> Floats:
    """Weights, `(PARTS, n)` of 0 and 1, of random parts of the questions with as many of each task as were seen."""
    whole, part = (np.frombuffer(each, dtype=np.int64) for each in (task, seen))
    random = np.random.default_rng(0)
    weights = np.zeros((PARTS, whole.size))
    for value in np.unique(part):
        members = np.flatnonzero(whole == value)
        chosen = random.permuted(np.tile(members, (PARTS, 1)), axis=1)[:, : int((part == value).sum())]
        np.put_along_axis(weights, chosen, 1.0, axis=1)
    return weights
