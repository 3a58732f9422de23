"""One author for the whole answer, chosen by the question: what taking turns comes to when a segment is the answer.

(As RouteLLM, Ong et al. 2024, arXiv 2406.18665, which learns from preferences; this one learns from outcomes.) Each
candidate answers training questions on its own, each question is labelled with the candidate whose answers score best,
and a logistic regression on the hidden state of the question learns the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from objectives.matching import Rule
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
    margin: float = 0.0,
    settle: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> Router:
    """A router that sends a question to the candidate whose own answers to such questions score best.

    Args:
        right: candidate -> `(n, s)` scores in [0, 1] of its s answers to each of n questions, as from `scored`; the
            mean of a row counts.
        features: `(n, d)` of the same questions, as from `question_features`.
        margin: by which the best candidate must be ahead for the question to be learned from; ties never are.
        settle: learns from ties, too, unless all are equal: the candidate of the best mean goes first among the best.
        folds, seed: as in `fit_classifier`; each question is a group of its own.

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
    classifier = fit_classifier(
        np.asarray(features)[kept], labels.label[kept], len(means), folds=folds, seed=seed
    )
    return Router(tuple(right), classifier, labels)


def scored(
    texts: Sequence[Sequence[str]], accepted: Sequence[Sequence[str]], rules: Sequence[Rule]
) -> Floats:
    """`(n, s)` float64: 1 where an answer is right, else 0.

    Args:
        texts: s answers to each of n questions, as many for each. accepted: right answers to each. rules: of each.

    Raises:
        EvaluationError: lengths that differ.

    >>> from objectives.matching import get_rule
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
    return np.array(
        [[float(rule.right(rule.key(text), right)) for text in answers] for answers, right, rule in every]
    )


@torch.inference_mode()
def question_features(
    model: Any, prompts: Sequence[Sequence[int]], batch_rows: int = 64
) -> npt.NDArray[np.float32]:
    """`(n, d)` float32: the hidden state that a model has of a question before it answers.

    That is the state of the prompt's last token after the last layer and the final norm, what the output head sees.
    Rows are padded on the right, where no token before looks, so neither the other prompts nor the batches matter
    beyond the last bits.

    Args:
        model: a transformers causal language model in eval mode.
        prompts: token ids of each, at least one, as from `encode_prompts`.
        batch_rows: prompts read at once.

    Raises:
        ConfigError: no prompts, or one without tokens.
        EvaluationError: a state that is not finite; its prompt is named.
    """
    if not prompts or not all(map(len, prompts)):
        raise ConfigError(
            f"router: {len(prompts)} prompts, or one without tokens (wanted at least one of each)."
        )
    device = model.get_input_embeddings().weight.device
    found = np.empty((len(prompts), 0), dtype=np.float32)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), batch_rows):
        batch = order[first : first + batch_rows]
        size = np.array([len(prompts[i]) for i in batch])
        ids = np.array([[*prompts[i], *[prompts[i][0]] * (size.max() - len(prompts[i]))] for i in batch])
        mask = (np.arange(size.max()) < size[:, None]).astype(np.int64)
        states = model.base_model(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            use_cache=False,
        ).last_hidden_state
        last = states[torch.arange(len(batch)), torch.from_numpy(size - 1)].float().cpu().numpy()
        if not found.shape[1]:
            found = np.empty((len(prompts), last.shape[1]), dtype=np.float32)
        found[batch] = last
    broken = ~np.isfinite(found).all(axis=1)
    if broken.any():
        raise EvaluationError(f"router: the hidden state of prompt {int(broken.argmax())} is not finite.")
    return found
