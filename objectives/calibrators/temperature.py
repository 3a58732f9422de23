"""Temperature scaling with labels, and no temperature at all: the two ends that every other method lies between."""

from __future__ import annotations

import numpy as np

from objectives.calibrators.alignment import align
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import OptionLogits, require_questions_to_fit
from objectives.errors import EvaluationError


def vanilla(post: OptionLogits) -> FittedTemperature:
    """The model as it is: temperature 1.

    Raises:
        EvaluationError: no questions.
    """
    require_questions_to_fit(post, "vanilla")
    return FittedTemperature("vanilla", 1.0, len(post), 0, digest=post.digest)


def temperature_scaling(post: OptionLogits) -> FittedTemperature:
    """The temperature of least negative log-likelihood on labelled questions (Guo et al. 2017, section 4.2).

    It sees the labels, so for the methods without labels it is the oracle. On the questions it was fitted on, its
    NLL is never above that of temperature 1. The minimum is found as the root of the derivative.

    Raises:
        EvaluationError: no questions, or no labels.

    >>> score = np.array([[np.log(9.0), 0.0]] * 4)  # 0.9 sure, right three times in four
    >>> two, zero = np.full(4, 2), np.zeros(4, dtype=np.int64)
    >>> round(temperature_scaling(OptionLogits(score, two, zero, np.array([0, 0, 0, 1]))).temperature, 6)
    2.0
    """
    require_questions_to_fit(post, "temperature")
    if post.gold is None:
        raise EvaluationError(
            "temperature: temperature scaling needs labels, and the calibration set has none. Use daca or dual-align."
        )
    n = len(post)
    target = np.zeros(post.score.shape)
    target[np.arange(n), post.gold] = 1.0
    best = align(post, target, np.ones(n, dtype=np.bool_))
    return FittedTemperature(
        "temperature", best.temperature, n, n, curve=best.curve, reason=best.reason, digest=post.digest
    )
