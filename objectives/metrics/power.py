"""What n questions can show: standard errors, and the smallest difference between two models that they tell apart.

Two models answer the same questions, so a difference has the variance s^2 / n of its paired share of a question. A
two-sided test at 5 % finds a true difference delta with a probability (power) of 80 % if

    delta = (z_0.975 + z_0.8) s / sqrt(n) = 2.80 s / sqrt(n),        n = 7.85 s^2 / delta^2

For accuracy s^2 is the discordance, the share of questions that one model answers rightly and the other wrongly
(McNemar's test; Connor 1987 subtracts delta^2 under the alternative; left out, slightly more questions are asked for).
A difference is never larger than the discordance: where n is so small that the formula says
otherwise, all discordant answers go one way, s^2 = delta and delta = 7.85 / n.

Before anything is scored, s is assumed: about what `post` and a uniform merge of 0.5 have on the pairs of
`studies/quickstart` and `studies/smollm2-135m` (accuracy: discordance 0.08 to 0.12). ECE is no mean over questions;
while no bin's gap changes its sign, it is linear in the answers and its error falls as 1 / sqrt(n), which holds well
enough from a few hundred questions on. Bootstrapped, its s was 0.30 to 0.38 for that pair and 0.29 to 0.53 for merges
of the front against 0.5; 0.4 is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from objectives.metrics.bootstrap import resample_weights
from objectives.metrics.diversity import DiversityMetric
from objectives.metrics.names import Metric
from objectives.outcomes import Outcomes

REACH = 1.959964 + 0.841621  # standard errors: normal quantiles of 0.975 and 0.8
RESAMPLES = 400


@dataclass(frozen=True)
class Spread:
    """What is assumed of a metric: standard deviations a question, in the metric's units.

    Attributes:
        single: of one model's value, which has the standard error single / sqrt(n).
        paired: of the difference between two models, in the same way.
        wanted: a difference worth showing. The merges of a front differ from a uniform 0.5 by 0.03 to 0.06 in accuracy
            and 0.02 to 0.04 in ECE on the quickstart pair: a split that does not show 0.03 cannot tell a front from
            its uniform line.
    """

    single: float
    paired: float
    wanted: float


_ASSUMED = {
    "accuracy": Spread(0.5, math.sqrt(0.1), 0.03),
    "ece": Spread(0.45, 0.4, 0.03),
    "ece:debiased": Spread(0.45, 0.45, 0.03),
    "brier": Spread(0.65, 0.3, 0.03),
    "brier:top": Spread(0.27, 0.16, 0.02),
    "nll": Spread(1.7, 0.75, 0.1),
    "auroc": Spread(0.5, 0.43, 0.03),
}


@dataclass(frozen=True)
class Power:
    """What the questions of one split can show of one objective.

    Attributes:
        objective: its name. questions: how many of the split it reads.
        standard_error: of one model's value.
        difference: the smallest true one between two models that shows with 80 % power; inf if none does.
        wanted: one that is worth showing. enough: questions that show it, rounded up to two digits.
    """

    objective: str
    questions: int
    standard_error: float
    difference: float
    wanted: float
    enough: int

    @property
    def too_few(self) -> bool:
        """Whether a difference worth showing would seldom show."""
        return self.difference > self.wanted


def assumed(objective: str) -> Spread | None:
    """The spread that is assumed of an objective; None for those without one: `mce`, and those of sampled answers.

    A single bin decides `mce`, so its error follows no law of the number of questions.

    >>> assumed("ece:10:mass@arc").paired, assumed("mce")
    (0.4, None)
    """
    base, *options = objective.partition("@")[0].split(":")
    known = [option for option in options if f"{base}:{option}" in _ASSUMED]
    return _ASSUMED.get(":".join([base, *known]))


def smallest_difference(spread: float, n: int, *, shares: bool = False) -> float:
    """The smallest true difference that shows on n questions with 80 % power, at 5 % two-sided; lower is better.

    Args:
        spread: s, paired standard deviation of a question, above 0. n: questions, at least 1.
        shares: the metric is a share of right answers, so that a difference is at most the discordance s^2, and 1.

    Returns:
        In the metric's units; inf where not even a share of 1 shows.

    >>> round(smallest_difference(math.sqrt(0.1), 320, shares=True), 3), smallest_difference(0.3, 7, shares=True)
    (0.05, inf)
    """
    found = REACH * spread / math.sqrt(n)
    if not shares or found <= spread**2:
        return found
    one_way = REACH**2 / n
    return one_way if one_way <= 1.0 else math.inf


def questions_for(spread: float, difference: float, *, shares: bool = False) -> int:
    """Questions that show a true difference with 80 % power: the inverse of `smallest_difference`.

    >>> questions_for(math.sqrt(0.1), 0.02, shares=True)
    1963
    """
    square = max(spread**2, difference) if shares else spread**2
    return math.ceil(REACH**2 * square / difference**2)


def measured(metric: Metric, one: Outcomes, other: Outcomes) -> Spread | None:
    """The spread of a metric for two models that answered the same questions, by bootstrap over them.

    Returns:
        None if nothing is assumed of the metric, or the models answer alike.

    Raises:
        EvaluationError: no questions, or not the same number.
    """
    known = assumed(metric.name)
    if known is None:
        return None
    weights = resample_weights(len(one), RESAMPLES, strata=one.task)
    n = len(one) if metric.task is None else int((one.task == metric.task).sum())
    samples = metric(one, weights)
    single = math.sqrt(n) * float(np.std(samples))
    paired = math.sqrt(n) * float(np.std(samples - metric(other, weights)))
    return Spread(single, paired, known.wanted) if paired > 0.0 else None


def powers(
    metrics: Sequence[Metric | DiversityMetric],
    task: Sequence[int],
    pair: tuple[Outcomes, Outcomes] | None = None,
) -> list[Power]:
    """What the questions of one split can show, for each objective of which something is assumed, in order.

    Args:
        task: `(n,)` the task of each question. pair: answers of two models of the study, on whichever split, from
            which the spreads are then measured.
    """
    found = []
    for metric in metrics:
        spread = assumed(metric.name)
        if spread is None or not isinstance(metric, Metric):
            continue
        if pair is not None:
            spread = measured(metric, *pair) or spread
        n = len(task) if metric.task is None else sum(one == metric.task for one in task)
        if n == 0:
            continue
        shares = metric.name.partition("@")[0] == "accuracy"
        found.append(
            Power(
                metric.name,
                n,
                spread.single / math.sqrt(n),
                smallest_difference(spread.paired, n, shares=shares),
                spread.wanted,
                _rounded_up(questions_for(spread.paired, spread.wanted, shares=shares)),
            )
        )
    return found


def note_on(search: Sequence[Power], report: Sequence[Power]) -> str | None:
    """One line on the split that shows least, if either has too few questions for an objective; else None."""
    splits = [("search", search), ("report", report)]
    label, found = max(
        splits, key=lambda split: max((one.difference / one.wanted for one in split[1]), default=0.0)
    )
    weak = [one for one in found if one.too_few]
    if not weak:
        return None
    sizes = " and ".join(dict.fromkeys(f"{one.questions:,}" for one in weak))
    wanted = " and ".join(dict.fromkeys(f"{one.wanted:g}" for one in weak))
    enough = max(one.enough for one in weak)
    return (
        f"{label} split of {sizes} questions shows differences {differences(weak)} and more (80 % power); "
        f"for {wanted} take {enough:,}"
    )


def differences(found: Sequence[Power]) -> str:
    """`of 0.050 in accuracy, 0.063 in ece`."""
    return "of " + ", ".join(f"{_shown(one.difference)} in {one.objective}" for one in found)


def _shown(difference: float) -> str:
    return f"{difference:.3f}" if math.isfinite(difference) else "no size"


def _rounded_up(number: int) -> int:
    """To two digits: 1394 becomes 1400."""
    unit = int("1" + "0" * (len(str(number)) - 2)) if number > 99 else 1
    return -(-number // unit) * unit
