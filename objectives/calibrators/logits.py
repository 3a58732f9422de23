"""What calibrators are fitted on and applied to: one score per option, of the last layer or of every layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from objectives.calibrators.tempering import tempered
from objectives.errors import ConfigError, EvaluationError
from objectives.outcomes import Booleans, Floats, Integers, Outcomes

if TYPE_CHECKING:
    from objectives.evaluation import Evaluation


Index = npt.NDArray[Any] | Sequence[int]


@dataclass(frozen=True, eq=False)
class OptionLogits:
    """The option scores of one model on n questions with at most k options; arrays are read-only.

    Attributes:
        score: `(n, k)` float64, `loglikelihood / divisor` of an `Evaluation` (nats; any additive constant per
            question), -inf after the last option. This is what a temperature divides.
        options: `(n,)` int64, number of options, 1 to k.
        task: `(n,)` int64, index into the study's task names.
        gold: `(n,)` int64, index of the right option; None for a set without labels.
        digest: which questions, in which order; empty when not known.
        vocabulary: `vocabulary_digest` of the tokenizer; empty when not known.
        samples: `(n,)` int64, of a written answer how many were drawn: its scores are the logarithms of their shares,
            the last option is any other answer; 0 where options were scored. None: options everywhere.

    Raises:
        EvaluationError: a score of an option that is not finite, or as `Outcomes.from_loglikelihoods`.

    >>> logits = OptionLogits(np.array([[0.0, -1.0], [-2.0, -1.0]]), np.array([2, 2]), np.array([0, 0]))
    >>> logits.predicted.tolist(), logits.gold is None
    ([0, 1], True)
    """

    score: Floats
    options: Integers
    task: Integers
    gold: Integers | None = None
    digest: str = ""
    vocabulary: str = ""
    samples: Integers | None = None

    def __post_init__(self) -> None:
        score = np.array(self.score, dtype=np.float64)
        options = np.asarray(self.options)
        if score.ndim == 2 and options.shape == score.shape[:1]:
            _refuse_non_finite(score, options)
        checked = Outcomes.from_loglikelihoods(
            score, options, np.zeros_like(options) if self.gold is None else self.gold, self.task
        )
        score.flags.writeable = False
        object.__setattr__(self, "score", score)
        object.__setattr__(self, "options", checked.options)
        object.__setattr__(self, "task", checked.task)
        if self.gold is not None:
            object.__setattr__(self, "gold", checked.gold)

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def predicted(self) -> Integers:
        """`(n,)` the answer: index of the most probable option, the first on ties, exactly as `Outcomes.predicted`."""
        return np.asarray(tempered(self.score, 1.0)[0].argmax(axis=1), dtype=np.int64)

    @property
    def final(self) -> OptionLogits:
        """Itself; so that code takes `OptionLogits` and `LayerwiseLogits` alike."""
        return self

    def select(self, index: Index) -> OptionLogits:
        """The questions at `index` (integers, or a boolean mask), in that order: a split of the calibration set."""
        chosen = _chosen(index, len(self))
        gold, samples = (None if column is None else column[chosen] for column in (self.gold, self.samples))
        digest = _digest([self.digest, chosen.tolist()]) if self.digest else ""
        return OptionLogits(
            self.score[chosen],
            self.options[chosen],
            self.task[chosen],
            gold,
            digest,
            self.vocabulary,
            samples,
        )

    @property
    def written(self) -> Booleans:
        """`(n,)` whether a question's answer is written."""
        return np.zeros(len(self), dtype=np.bool_) if self.samples is None else np.asarray(self.samples > 0)

    @property
    def smoothed(self) -> OptionLogits:
        """With half a sample for any other answer of a written question, so that a temperature can weigh it.

        (Krichevsky and Trofimov 1981.) A share of 0 has a logarithm that only an `Evaluation`'s floor keeps finite.
        """
        if self.samples is None:
            return self
        score, rows = self.score.copy(), np.flatnonzero(self.written)
        score[rows, self.options[rows] - 1] = -np.log(2.0 * self.samples[rows])
        return replace(self, score=score)

    @classmethod
    def from_evaluation(
        cls, evaluation: Evaluation, tokenizer: Any = None, samples: Sequence[int] = ()
    ) -> OptionLogits:
        """The scores whose softmax is `evaluation.outcomes`; the tokenizer, where given, names the vocabulary.

        Args:
            samples: of each task the answers that are drawn to a question, 0 where options are scored; empty: all so.

        Raises:
            EvaluationError: as the class.
        """
        score = evaluation.loglikelihood.astype(np.float64) / evaluation.divisor.astype(np.float64)
        o = evaluation.outcomes
        vocabulary = "" if tokenizer is None else vocabulary_digest(tokenizer)
        drawn = np.array(samples, dtype=np.int64)[o.task] if any(samples) else None
        return cls(score, o.options, o.task, o.gold, evaluation.digest, vocabulary, drawn)


@dataclass(frozen=True, eq=False)
class LayerwiseLogits:
    """The option scores of one model after each of its L decoder layers.

    Attributes:
        final: after layer L: the model's own scores.
        earlier: `(n, L - 1, k)` float64, after layers 1 to L - 1 through the final norm and the head (the "logit
            lens"), divided by the same divisors; -inf after the last option. Any additive constant per question
            and layer.

    Raises:
        EvaluationError: a shape that does not fit `final`, a score of an option that is not finite, or padding
            that is not -inf.
    """

    final: OptionLogits
    earlier: Floats

    def __post_init__(self) -> None:
        earlier = np.array(self.earlier, dtype=np.float64)
        n, k = self.final.score.shape
        if earlier.ndim != 3 or earlier.shape[::2] != (n, k):
            raise EvaluationError(
                f"layer-wise logits: shape {earlier.shape}, wanted (questions, layers - 1, options) of ({n}, k)."
            )
        for layer in range(earlier.shape[1]):
            _refuse_non_finite(earlier[:, layer], self.final.options, f"layer {layer + 1}: ")
        if np.isfinite(earlier).sum() != self.final.options.sum() * earlier.shape[1]:
            raise EvaluationError("layer-wise logits: padding after a last option is not -inf.")
        earlier.flags.writeable = False
        object.__setattr__(self, "earlier", earlier)

    def __len__(self) -> int:
        return len(self.final)

    @property
    def depth(self) -> int:
        """L, the number of decoder layers."""
        return int(self.earlier.shape[1]) + 1

    @property
    def scores(self) -> Floats:
        """`(n, L, k)` float64: all layers in order."""
        return np.concatenate([self.earlier, self.final.score[:, None]], axis=1)

    def select(self, index: Index) -> LayerwiseLogits:
        """As `OptionLogits.select`."""
        return LayerwiseLogits(self.final.select(index), self.earlier[_chosen(index, len(self))])


def vocabulary_digest(tokenizer: Any) -> str:
    """SHA-256 over all (token, id) pairs of a tokenizer."""
    return _digest(sorted(tokenizer.get_vocab().items()))


def require_questions_to_fit(logits: OptionLogits, method: str) -> None:
    """Raises EvaluationError when the calibration set is empty."""
    if len(logits) == 0:
        raise EvaluationError(f"{method}: the calibration set has no questions. Give it some.")


def require_same_questions(post: OptionLogits, pre: OptionLogits, method: str) -> None:
    """Refuses two sets of scores that cannot be compared option by option.

    Raises:
        EvaluationError: an empty set, other questions, or another order of them.
        ConfigError: the models were read with different vocabularies.
    """
    require_questions_to_fit(post, method)
    if post.score.shape != pre.score.shape or not np.array_equal(post.options, pre.options):
        raise EvaluationError(
            f"{method}: post answered {_size(post)} but pre {_size(pre)}. Score both on the same questions."
        )
    if post.digest and pre.digest and post.digest != pre.digest:
        raise EvaluationError(
            f"{method}: post and pre answered different questions, or in another order "
            f"({post.digest[:12]}... and {pre.digest[:12]}...). Score both on the same questions."
        )
    if post.vocabulary and pre.vocabulary and post.vocabulary != pre.vocabulary:
        raise ConfigError(
            f"{method}: post and pre have different vocabularies ({post.vocabulary[:12]}... and "
            f"{pre.vocabulary[:12]}...), so their scores cover different tokens. Give the reference that post was "
            "trained from."
        )


def _refuse_non_finite(score: Floats, options: Integers, where: str = "") -> None:
    padding = np.arange(score.shape[1]) >= options[:, None]
    broken = ~(np.isfinite(score) | padding).all(axis=1)
    if broken.any():
        i = int(broken.argmax())
        raise EvaluationError(
            f"logits: question {i}: {where}option scores are {score[i, : options[i]].tolist()} (wanted finite "
            f"numbers), {int(broken.sum())} of {len(score)} questions are so. Use float32, or another model."
        )


def _chosen(index: Index, n: int) -> Integers:
    """`index` as non-negative integers, so that equal selections have equal digests."""
    every = np.arange(n, dtype=np.int64)
    return np.asarray(every[np.asarray(index)] if len(index) else every[:0], dtype=np.int64)


def _size(logits: OptionLogits) -> str:
    return f"{len(logits)} questions with {int(logits.options.sum())} options"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
