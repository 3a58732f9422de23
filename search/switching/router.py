"""One author for the whole answer, chosen by the question: what taking turns comes to when a segment is the answer.

(As RouteLLM, Ong et al. 2024, arXiv 2406.18665, which learns from preferences; this one learns from outcomes.) Each
candidate answers training questions on its own, each question is labelled with the candidate whose answers score best,
and a logistic regression on the hidden state of the question learns the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objectives.questions.matching import Rule
from search.errors import ConfigError, EvaluationError
from search.switching.classifier import Classifier, fit_classifier
from search.switching.labels import Labels, label

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Router:
    """Chooses who answers a question.

    Attributes:
        candidates: their names, in the order of the classes.
        classifier: of question features.
        labels: of the training questions, as `label` gave them.
    """

    candidates: tuple[str, ...]
    classifier: Classifier
    labels: Labels

    def choose(self, features: npt.ArrayLike) -> Integers:
        """`(n,)` int64 indices of the most probable candidate for `(n, d)` features; of equal ones the first."""
        return np.asarray(self.classifier.logits(features).argmax(axis=1), dtype=np.int64)


def train_router(
    right: Mapping[str, npt.ArrayLike],
    features: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    margin: float = 0.0,
    settle: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> Router:
    """A router that sends a question to the candidate whose own answers to such questions score best.

    Args:
        right: candidate -> `(n, s)` scores in [0, 1] of its s answers to each of n questions, as from `scored`; the
            mean of a row counts.
        features: `(n, d)` of the same questions, what the host has of them before anybody writes.
        margin: by which the best candidate must be ahead for the question to be learned from; ties never are.
        settle: learns from ties, too, unless all are equal: the candidate of the best mean goes first among the best.
        groups: `(n,)` integers as in `fit_classifier`; None makes each question a group of its own.
        folds, seed: as in `fit_classifier`.

    Raises:
        ConfigError: fewer than two candidates, no question that is kept, one candidate the best of them all, or fewer
            kept questions than folds.
        EvaluationError: shapes that do not fit together, or a number that is not finite or out of range.
    """
    means = []
    rows = np.shape(features)[:1]
    for name, scores in right.items():
        found = np.asarray(scores, dtype=np.float64)
        if found.ndim != 2 or not found.shape[1] or found.shape[:1] != rows:
            raise EvaluationError(
                f"router: scores of {name} have shape {found.shape} (wanted (questions, samples) of the {rows} "
                "questions with features)."
            )
        if not ((found >= 0.0) & (found <= 1.0)).all():  # written so that NaN fails too
            raise EvaluationError(f"router: a score of {name} is not in [0, 1].")
        means.append(found.mean(axis=1))
    if len(means) < 2:
        raise ConfigError(f"router: {len(means)} candidates to choose from (wanted 2 or more).")
    scores = np.column_stack(means)
    labels = label(scores, margin, np.tile(scores.mean(axis=0), (len(scores), 1)) if settle else None)
    kept = labels.kept
    group = np.arange(len(kept)) if groups is None else np.asarray(groups)
    classifier = fit_classifier(
        np.asarray(features)[kept], labels.label[kept], len(means), groups=group[kept], folds=folds, seed=seed
    )
    return Router(tuple(right), classifier, labels)


def scored(
    texts: Sequence[Sequence[str]], accepted: Sequence[Sequence[str]], rules: Sequence[Rule]
) -> Floats:
    """`(n, s)` float64 scores by the rules, in [0, 1]; higher is better.

    Args:
        texts: s answers to each of n questions, as many for each. accepted: right answers to each. rules: of each.

    Raises:
        EvaluationError: lengths that differ.

    >>> from objectives.questions.matching import get_rule
    >>> scored([["Rome.", "Paris"]], [("rome",)], [get_rule("exact")]).tolist()
    [[1.0, 0.0]]
    """
    counts = {len(answers) for answers in texts}
    if len(counts) != 1 or not len(texts) == len(accepted) == len(rules):
        raise EvaluationError(
            f"router: {sorted(counts)} answers to {len(texts)} questions, {len(accepted)} of which have right ones "
            "(wanted as many answers for each)."
        )
    every = zip(texts, accepted, rules, strict=True)
    return np.array([[rule.score(text, right) for text in answers] for answers, right, rule in every])
