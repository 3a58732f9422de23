"""How sure a model is of what it writes: the share of its sampled answers that say the same.

Self-consistency (Wang et al. 2022, arXiv 2203.11171) takes the answer that most samples agree on; its share is the
confidence (Lyu et al. 2024, arXiv 2402.13904). So written answers become `Outcomes` like those of questions with
options: the different answers that were given to a question are its options, and all metrics of calibration apply.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from objectives.errors import EvaluationError
from objectives.outcomes import Outcomes
from objectives.questions.matching import Rule


def agreement(
    texts: Sequence[Sequence[str]],
    accepted: Sequence[Sequence[str]],
    rules: Sequence[Rule],
    task: npt.ArrayLike,
) -> Outcomes:
    """What s answers to each of n questions come to.

    An option is one key of the question's rule, in the order in which they were first given, with the share of the
    answers that have it; behind them stands any other answer, with a share of 0. The gold option is the predicted one
    if that is right, else the first one that is, else that other answer: it is there whether one is right or not, so
    that the number of options tells nothing. So `correct` says whether the answer that most agree on is right, of
    several with equal shares the first; with one sample it is plain accuracy, at a confidence of 1.

    Args:
        texts: s answers to each question, at least one, as many for all.
        accepted: at least one right answer to each question.
        rules: of each question. task: `(n,)` integers.

    Returns:
        Outcomes of at most s + 1 options.

    Raises:
        EvaluationError: no answers, another number for some question, or lengths that differ.

    >>> from objectives.questions.matching import get_rule
    >>> found = agreement([["Paris", "paris.", "Rome"]], [("Paris",)], [get_rule("exact")], [0])
    >>> found.confidence.round(3).tolist(), found.correct.tolist()
    ([0.667], [True])
    """
    counts = {len(answers) for answers in texts}
    if len(counts) != 1 or 0 in counts or not len(texts) == len(accepted) == len(rules):
        raise EvaluationError(
            f"agreement: {sorted(counts)} answers to {len(texts)} questions, {len(accepted)} of which have right ones "
            "(wanted as many answers for each, at least one)."
        )
    samples = counts.pop()
    probability = np.zeros((len(texts), samples + 1))
    options, gold = np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=np.int64)
    for i, (answers, right, rule) in enumerate(zip(texts, accepted, rules, strict=True)):
        keys = [rule.key(answer) for answer in answers]
        different = list(dict.fromkeys(keys))
        shares = [keys.count(key) / samples for key in different]
        probability[i, : len(different)] = shares
        good = [place for place, key in enumerate(different) if rule.right(key, right)]
        predicted = int(np.argmax(shares))
        gold[i] = predicted if predicted in good else good[0] if good else len(different)
        options[i] = len(different) + 1
    return Outcomes(probability, options, gold, np.asarray(task))
