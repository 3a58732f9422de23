"""Bootstrap over questions: resampling weights, weighted sums, intervals.

A resample is a row of counts, not a list of questions: `(b, n)` weights turn a metric over b resamples into
matrix products. Use the same weights for every model on the same questions: the difference of two models'
samples is then the paired bootstrap of their difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from objectives.errors import EvaluationError
from objectives.outcomes import Floats

BLOCK = 64  # rows handled at once where a metric needs (rows, n) temporaries: they stay in cache


def resample_weights(n: int, b: int = 1000, seed: int = 0, *, strata: npt.ArrayLike | None = None) -> Floats:
    """How often each of n questions occurs in each of b resamples with replacement: `(b, n)` float64 counts.

    Every row sums to n. The same (n, b, seed, strata) gives the same counts.

    Args:
        strata: `(n,)` labels, such as `outcomes.task`: each stratum is resampled within itself, so that it
            keeps its size and none is ever empty.

    Raises:
        EvaluationError: n or b below 1, or strata of another length.

    >>> resample_weights(4, b=3).sum(axis=1).tolist()
    [4.0, 4.0, 4.0]
    """
    if n < 1 or b < 1:
        raise EvaluationError(f"bootstrap: {b} resamples of {n} questions (wanted at least 1 of each).")
    label = np.zeros(n, dtype=np.int64) if strata is None else np.asarray(strata)
    if label.shape != (n,):
        raise EvaluationError(f"bootstrap: strata have shape {label.shape}, wanted ({n},).")
    random = np.random.default_rng(seed)
    weights = np.empty((b, n), dtype=np.float64)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        m = members.size
        # Counting uniform draws: the same distribution as Generator.multinomial, in a third of its time.
        draws = random.integers(0, m, size=(b, m)) + m * np.arange(b)[:, None]
        weights[:, members] = np.bincount(draws.ravel(), minlength=b * m).reshape(b, m)
    return weights


def interval(
    samples: npt.ArrayLike,
    level: float = 0.95,
    *,
    value: float | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[float, float]:
    """A bootstrap interval (low, high) from the metric's `(b,)` samples, cut to `bounds`.

    Without `value`: the percentile interval, quantiles (1 - level) / 2 and (1 + level) / 2 with linear
    interpolation. With `value`, the metric on the questions themselves: the basic interval (Davison and
    Hinkley 1997), 2 * value minus those quantiles. ECE needs it: every resample adds noise to the bins, so
    the samples lie above the value as the value lies above the truth, and the percentile interval errs twice
    in one direction where the basic one corrects (simulated pair, 300 and 1,000 questions: a 95 %
    percentile interval held the true difference in ECE 28 and 22 times in 100, the basic one 82 and 92).
    With few questions the value itself can lie outside.

    NaN samples (a task that was not drawn) are left out.

    Raises:
        EvaluationError: no sample that is a number, an infinite one, or a level outside (0, 1).

    >>> interval([0.0, 1.0, 2.0, 3.0, 4.0], level=0.5)
    (1.0, 3.0)
    """
    drawn = np.asarray(samples, dtype=np.float64).ravel()
    drawn = drawn[~np.isnan(drawn)]
    if drawn.size == 0 or np.isinf(drawn).any():
        raise EvaluationError(
            f"interval: {drawn.size} samples that are numbers, or an infinite one among them."
        )
    if not 0.0 < level < 1.0:
        raise EvaluationError(f"interval: level is {level} (wanted between 0 and 1).")
    low, high = np.quantile(drawn, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    if value is not None:
        low, high = 2.0 * value - high, 2.0 * value - low
    return float(np.clip(low, *bounds)), float(np.clip(high, *bounds))


def checked_weights(weights: npt.ArrayLike, n: int) -> Floats:
    """`weights` as `(b, n)` float64 (a single `(n,)` row becomes `(1, n)`).

    Raises:
        EvaluationError: another shape, a negative or non-finite weight, or a row without any weight.
    """
    rows = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != n:
        raise EvaluationError(f"weights: shape {rows.shape}, wanted (resamples, {n}).")
    if n > 0:
        total = rows.sum(axis=1)
        if not (rows.min() >= 0.0 and total.min() > 0.0 and np.isfinite(total.max())):
            raise EvaluationError("weights: negative, not finite, or a row that sums to 0 (wanted counts).")
    return rows


def weighted_sum(columns: Floats, weights: Floats | None) -> Floats:
    """`(b, c)` sums over the questions of `(n, c)` columns, per row of weights; `(1, c)` without weights."""
    if weights is None:
        # Not a matrix product: the value of a metric must not depend on the number of BLAS threads.
        return np.asarray(columns.sum(axis=0, keepdims=True))
    return np.asarray(weights @ columns)


def weighted_mean(values: Floats, weights: Floats | None, where: str) -> Floats:
    """`(b,)` means over the questions of `(n,)` values; `where` names the metric in the error.

    Raises:
        EvaluationError: there are no questions.
    """
    require_questions(values.size, where)
    total = float(values.size) if weights is None else weights.sum(axis=1)
    return np.asarray(weighted_sum(values[:, None], weights)[:, 0] / total)


def require_questions(n: int, where: str) -> None:
    """Raises EvaluationError when n is 0: no metric has a value for no questions."""
    if n == 0:
        raise EvaluationError(f"{where}: there are no questions to score. Raise `limit` or change `split`.")


def blocks(weights: Floats | None, n: int) -> Iterator[Floats]:
    """`weights` in blocks of at most 64 rows, in order; one row of ones without weights."""
    if weights is None:
        yield np.ones((1, n))
        return
    for start in range(0, weights.shape[0], BLOCK):
        yield weights[start : start + BLOCK]
