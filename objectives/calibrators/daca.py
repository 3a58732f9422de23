"""Alignment of a post-trained model's confidence with its pre-trained model's: naive, and on agreement only.

f are the scores of the pre-trained model, g those of the post-trained one (Luo, Wang, Li and Wei 2025, "Your
Pre-trained LLM is Secretly an Unsupervised Confidence Calibrator", arXiv 2505.16690). No labels are read.
"""

from __future__ import annotations

import numpy as np

from objectives.calibrators.alignment import align
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import OptionLogits, require_same_questions
from objectives.calibrators.tempering import tempered
from objectives.outcomes import Booleans


def naive_alignment(post: OptionLogits, pre: OptionLogits) -> FittedTemperature:
    """The temperature of least mean KL(softmax(f) || softmax(g / tau)) over all questions.

    Where the two models answer differently, the confidence of `pre` says nothing about the answer of `post` and
    mostly pushes the temperature up: the more disagreement, the more under-confident the result.

    Raises:
        EvaluationError: no questions, or not the same ones. ConfigError: different vocabularies.
    """
    require_same_questions(post, pre, "naive")
    return _aligned("naive", post, pre, np.ones(len(post), dtype=np.bool_))


def daca(post: OptionLogits, pre: OptionLogits) -> FittedTemperature:
    """Disagreement-aware confidence alignment: the same on the questions that both models answer alike.

    The loss is mean_x 1[argmax f = argmax g] KL(softmax(f) || softmax(g / tau)), with the answers at temperature 1
    (the first option on ties). The paper's code descends on it with Adam; here the root of its derivative in 1 / tau
    is taken. Without any agreement the temperature stays 1, and `reason` says so.

    Raises:
        EvaluationError: no questions, or not the same ones. ConfigError: different vocabularies.

    >>> f = np.array([[1.0, 0.0], [0.5, 0.0]])
    >>> two, zero = np.array([2, 2]), np.array([0, 0])
    >>> round(daca(OptionLogits(3.0 * f, two, zero), OptionLogits(f, two, zero)).temperature, 9)
    3.0
    """
    require_same_questions(post, pre, "daca")
    return _aligned("daca", post, pre, agreement(post, pre))


def agreement(post: OptionLogits, pre: OptionLogits) -> Booleans:
    """`(n,)` whether both models give the same answer."""
    return np.asarray(post.predicted == pre.predicted)


def _aligned(method: str, post: OptionLogits, pre: OptionLogits, used: Booleans) -> FittedTemperature:
    n, alike = len(post), int(agreement(post, pre).sum())
    if not used.any():
        reason = f"post and pre agree on none of {n} questions, so 1 is kept"
        return FittedTemperature(method, 1.0, n, 0, alike, reason=reason, digest=post.digest)
    best = align(post, tempered(pre.score, 1.0)[0], used)
    return FittedTemperature(
        method,
        best.temperature,
        n,
        int(used.sum()),
        alike,
        curve=best.curve,
        reason=best.reason,
        digest=post.digest,
    )
