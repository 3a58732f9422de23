"""The metrics by name: what a study file's `objectives` may say, with direction and worst value.

Names: `accuracy`, `ece`, `ece:N`, `ece:mass`, `ece:N:mass`, `ece:debiased`, `ece:N:debiased`, `mce`, `brier`,
`brier:top`, `nll`, `auroc`; with `@TASK` behind it, on the questions of one task only. And those of sampled answers:
`distinct-1`, `distinct-2`, `self-bleu`, `semantic-entropy` (`diversity.py`), and a study's own preferences
(`preferences.py`).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from objectives.errors import ConfigError, EvaluationError
from objectives.metrics import calibration
from objectives.metrics.accuracy import accuracy, accuracy_terms
from objectives.metrics.bootstrap import checked_weights, interval, require_questions
from objectives.metrics.diversity import DIVERSITY_NAMES, DiversityMetric, get_sampled_metric
from objectives.outcomes import Floats, Outcomes

MAX_BINS = 1000
_ROUNDING = 1e-9  # how far beyond its range a mean of float64 numbers may come to lie

_Function = Callable[[Outcomes, Floats | None], Floats]


@dataclass(frozen=True)
class Metric:
    """One number per set of outcomes, and which way is better.

    Attributes:
        name: as the user wrote it. maximize: whether higher is better.
        worst: the worst possible value, where its intervals are cut.
        function: `(outcomes, weights)` to `(b,)`.
        task: index of the only task that counts, or None for all questions.
        terms: outcomes to the `(n,)` values of the single questions whose mean the metric is; None where it is no mean.
    """

    name: str
    maximize: bool
    worst: float
    function: _Function
    task: int | None = None
    terms: Callable[[Outcomes], Floats] | None = None

    def __call__(self, outcomes: Outcomes, weights: Floats | None = None) -> Floats:
        """The metric's `(b,)` float64 values, one per row of `(b, n)` weights; b is 1 without weights.

        All are finite, except that a metric of one task is NaN for a resample without any question of that
        task (`resample_weights(..., strata=outcomes.task)` draws none such).

        Raises:
            EvaluationError: no questions, or weights that are not counts of these questions.
        """
        rows = None if weights is None else checked_weights(weights, len(outcomes))
        if self.task is None:
            return self.function(outcomes, rows)
        index = np.flatnonzero(outcomes.task == self.task)
        require_questions(index.size, self.name)
        chosen = outcomes.select(index)
        if rows is None:
            return self.function(chosen, None)
        rows = rows[:, index]
        drawn = rows.any(axis=1)
        values = np.full(rows.shape[0], np.nan)
        if drawn.any():
            values[drawn] = self.function(chosen, rows[drawn])
        return values

    def value(self, outcomes: Outcomes) -> float:
        """The metric on the questions themselves.

        Raises:
            EvaluationError: what was computed is not one finite number in the metric's range.
        """
        found, (low, high) = self(outcomes), self.bounds
        if found.shape != (1,):
            raise EvaluationError(f"{self.name}: found {found.size} values, wanted one.")
        value = float(found[0])
        if not low - _ROUNDING <= value <= high + _ROUNDING:  # NaN fails, too
            raise EvaluationError(
                f"{self.name}: found {value}, wanted a finite number between {low:g} and {high:g}."
            )
        return value

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value it can have."""
        best = 1.0 if self.maximize else 0.0
        return min(self.worst, best), max(self.worst, best)

    def interval(self, value: float, samples: Floats, level: float = 0.95) -> tuple[float, float]:
        """The basic bootstrap interval of `value` from its `(b,)` samples, cut to the metric's range."""
        return interval(samples, level, value=value, bounds=self.bounds)


_SIMPLE: dict[str, tuple[bool, float, _Function]] = {  # name -> maximize, worst value, function
    "accuracy": (True, 0.0, accuracy),
    "ece": (False, 1.0, calibration.ece),
    "ece:mass": (False, 1.0, calibration.ece_mass),
    "ece:debiased": (False, 1.0, calibration.ece_debiased),
    "mce": (False, 1.0, calibration.mce),
    "brier": (False, 2.0, calibration.brier),
    "brier:top": (False, 1.0, calibration.brier_top),
    "nll": (False, -math.log(calibration.NLL_FLOOR), calibration.nll),
    "auroc": (True, 0.0, calibration.auroc),
}
METRIC_NAMES = tuple(_SIMPLE)
_TERMS: dict[str, Callable[[Outcomes], Floats]] = {
    "accuracy": accuracy_terms,
    "brier": calibration.brier_terms,
    "brier:top": calibration.brier_top_terms,
    "nll": calibration.nll_terms,
}
_BINNED = re.compile(r"ece:([1-9][0-9]{0,3})(?::(mass|debiased))?", re.ASCII)
_BINNED_FUNCTIONS = {"": calibration.ece, "mass": calibration.ece_mass, "debiased": calibration.ece_debiased}


def get_metric(name: str, tasks: Sequence[str] = (), beside: Collection[str] = ()) -> Metric:
    """The metric called `name`; `tasks` are the study's task names, in the order of `Outcomes.task`.

    Args:
        beside: names of preferences, which have no task and which a misspelt one may have meant, too.

    Raises:
        ConfigError: no such metric or task; the nearest name is suggested.

    >>> get_metric("ece:10").maximize, get_metric("accuracy@arc", tasks=["sciq", "arc"]).task
    (False, 1)
    """
    base, at, task = name.partition("@")
    index = None
    if at:
        if task not in tasks and base not in beside:
            raise ConfigError(_unknown(f"objectives: {name}: no task called", task, tasks, "tasks"))
        index = list(tasks).index(task) if task in tasks else None
    if base in _SIMPLE:
        maximize, worst, function = _SIMPLE[base]
        return Metric(name, maximize, worst, function, index, _TERMS.get(base))
    binned = _BINNED.fullmatch(base)
    if base in beside:
        raise ConfigError(
            f"objectives: {name}: a preference is measured on prompts, which have no task. Write {base}."
        )
    if binned is None:
        known = (*METRIC_NAMES, "ece:10", "ece:10:mass", *DIVERSITY_NAMES, *beside)
        raise ConfigError(_unknown("objectives: no metric called", base, known, "metrics"))
    n_bins = int(binned[1])
    if n_bins > MAX_BINS:
        raise ConfigError(f"objectives: {name}: {n_bins} bins (wanted 1 to {MAX_BINS}).")
    return Metric(name, False, 1.0, partial(_BINNED_FUNCTIONS[binned[2] or ""], n_bins=n_bins), index)


def find_metric(
    name: str, tasks: Sequence[str] = (), preferences: Collection[str] = ()
) -> Metric | DiversityMetric:
    """The metric called `name`, of answers to questions or of sampled answers to prompts.

    Args:
        tasks: as for `get_metric`. preferences: names of the study's preferences.

    Raises:
        ConfigError: as `get_metric`.
    """
    if is_sampled(name, preferences):
        return get_sampled_metric(name, preferences)
    return get_metric(name, tasks, preferences)


def is_sampled(name: str, preferences: Collection[str]) -> bool:
    """Whether a metric is measured on sampled answers.

    >>> is_sampled("self-bleu", []), is_sampled("ece", ["helpful"])
    (True, False)
    """
    return name in DIVERSITY_NAMES or name in preferences


def _unknown(problem: str, found: str, known: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(found.lower(), known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{problem} {found!r}. {hint}The {kind} are: {', '.join(known) or 'none'}."
