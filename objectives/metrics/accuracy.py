"""The share of right answers."""

from __future__ import annotations

import numpy as np

from objectives.metrics.bootstrap import weighted_mean
from objectives.outcomes import Floats, Outcomes


def accuracy(outcomes: Outcomes, weights: Floats | None = None) -> Floats:
    """Share of questions whose most probable option is the right one, `(b,)` in [0, 1]; higher is better.

    On ties the first of the most probable options is the answer.

    Args:
        weights: `(b, n)` counts of b resamples; without them one row of ones.

    Raises:
        EvaluationError: there are no questions.
    """
    return weighted_mean(accuracy_terms(outcomes), weights, "accuracy")


def accuracy_terms(outcomes: Outcomes) -> Floats:
    """`(n,)` 1.0 where the answer is right, else 0.0."""
    return outcomes.correct.astype(np.float64)
