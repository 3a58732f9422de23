"""What a model answered: one probability per option and question. Every metric is a function of this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.errors import EvaluationError

N_BINS = 15

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

SUM_TOLERANCE = 1e-6  # probabilities kept as float32 sum to 1 within about 1e-7


@dataclass(frozen=True, eq=False)
class Outcomes:
    """The answers to n questions with at most k options each; arrays are read-only.

    Attributes:
        probability: `(n, k)` float64 in [0, 1]; row i sums to 1 over its first `options[i]` entries,
            padding is 0.
        options: `(n,)` int64, number of options, 1 to k.
        gold: `(n,)` int64, index of the right option, below `options[i]`.
        task: `(n,)` int64, index into the study's task names.

    n may be 0 (a selection can be empty); metrics refuse that.

    Raises:
        EvaluationError: a shape, a type, a range, a sum, or a number that is not finite; the first bad
            question is named.

    >>> o = Outcomes(np.array([[0.7, 0.3], [0.5, 0.5]]), np.array([2, 2]), np.array([0, 1]), np.array([0, 0]))
    >>> o.predicted.tolist(), o.confidence.tolist(), o.correct.tolist()
    ([0, 0], [0.7, 0.5], [True, False])
    """

    probability: Floats
    options: Integers
    gold: Integers
    task: Integers

    def __post_init__(self) -> None:
        probability = np.asarray(self.probability)
        if probability.ndim != 2 or probability.shape[1] < 1 or probability.dtype.kind != "f":
            raise EvaluationError(
                f"outcomes: probability is {probability.dtype} of shape {probability.shape}, "
                "wanted floats of shape (questions, options)."
            )
        n, k = probability.shape
        object.__setattr__(self, "probability", _frozen(probability, np.float64))
        for name in ("options", "gold", "task"):
            object.__setattr__(self, name, _frozen(_integers(name, getattr(self, name), n), np.int64))

        _refuse_first((self.options < 1) | (self.options > k), "options", self.options, f"1 to {k}")
        _refuse_first((self.gold < 0) | (self.gold >= self.options), "gold", self.gold, "0 to options - 1")
        _refuse_first(self.task < 0, "task", self.task, "0 or more")
        p = self.probability
        in_range = (p >= 0.0) & (p <= 1.0 + SUM_TOLERANCE)  # NaN is out of range: its comparisons are False
        _refuse_first(np.asarray(~in_range.all(axis=1)), "probability", p, "0 to 1, finite")
        padding = np.arange(k) >= self.options[:, None]
        _refuse_first((padding & (p != 0.0)).any(axis=1), "probability", p, "0 after the last option")
        total = p.sum(axis=1)
        _refuse_first(np.abs(total - 1.0) > SUM_TOLERANCE, "sum of probabilities", total, "1")

    def __len__(self) -> int:
        return int(self.probability.shape[0])

    @cached_property
    def predicted(self) -> Integers:
        """`(n,)` index of the most probable option; the first one on ties."""
        return np.asarray(self.probability.argmax(axis=1), dtype=np.int64)

    @cached_property
    def confidence(self) -> Floats:
        """`(n,)` probability of the predicted option."""
        return np.asarray(self.probability.max(axis=1))

    @cached_property
    def correct(self) -> Booleans:
        """`(n,)` whether the predicted option is the right one."""
        return np.asarray(self.predicted == self.gold)

    def select(self, index: npt.NDArray[Any] | Sequence[int] | slice) -> Outcomes:
        """The questions at `index` (integers, repeats allowed; a boolean mask; or a slice), in that order."""
        chosen = index if isinstance(index, slice) else np.asarray(index)
        if isinstance(chosen, np.ndarray) and chosen.size == 0:
            chosen = chosen.astype(np.int64)  # an empty list becomes float64, which cannot index
        return Outcomes(self.probability[chosen], self.options[chosen], self.gold[chosen], self.task[chosen])

    @classmethod
    def from_loglikelihoods(
        cls, score: npt.ArrayLike, options: npt.ArrayLike, gold: npt.ArrayLike, task: npt.ArrayLike
    ) -> Outcomes:
        """Softmax of each question's option scores, in float64.

        Args:
            score: `(n, k)` log-likelihoods (any additive constant per question), padded with -inf after the
                last option. An option may be -inf (probability 0) as long as another one of its question is
                finite.
            options: `(n,)` integers. gold: `(n,)` integers. task: `(n,)` integers.

        Raises:
            EvaluationError: NaN or +inf, padding that is not -inf, no finite option, or as for `Outcomes`.

        >>> Outcomes.from_loglikelihoods([[-1.0, -1.0, -np.inf]], [2], [0], [0]).probability.tolist()
        [[0.5, 0.5, 0.0]]
        """
        scores = np.asarray(score, dtype=np.float64)
        if scores.ndim != 2 or scores.shape[1] < 1:
            raise EvaluationError(f"outcomes: scores have shape {scores.shape}, wanted (questions, options).")
        n, k = scores.shape
        counts = _integers("options", options, n)
        _refuse_first((counts < 1) | (counts > k), "options", counts, f"1 to {k}")
        broken = (np.isnan(scores) | (scores == np.inf)).any(axis=1)
        _refuse_first(broken, "log-likelihood", scores, "finite or -inf")
        padding = np.arange(k) >= counts[:, None]
        overrun = (padding & (scores != -np.inf)).any(axis=1)
        _refuse_first(overrun, "log-likelihood", scores, "-inf after the last option")
        top = scores.max(axis=1, keepdims=True)
        _refuse_first(top[:, 0] == -np.inf, "log-likelihood", scores, "at least one finite option")
        odds = np.exp(scores - top)
        probability = odds / odds.sum(axis=1, keepdims=True)
        return cls(probability, counts, _integers("gold", gold, n), _integers("task", task, n))


def _frozen(array: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    copy = np.array(
        array, dtype=dtype, order="C"
    )  # a copy: nobody else can change it under the cached properties
    copy.flags.writeable = False
    return copy


def _integers(name: str, value: npt.ArrayLike, n: int) -> Integers:
    array = np.asarray(value)
    if array.shape != (n,) or (n > 0 and array.dtype.kind not in "iu"):
        raise EvaluationError(
            f"outcomes: {name} is {array.dtype} of shape {array.shape}, wanted integers of shape ({n},)."
        )
    return array.astype(np.int64)


def _refuse_first(bad: Booleans, name: str, value: npt.NDArray[Any], wanted: str) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise EvaluationError(f"outcomes: question {i}: {name} is {value[i].tolist()} (wanted {wanted}).")
