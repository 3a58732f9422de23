"""How far a model's confidence is from its accuracy, by the common definitions.

The confidence of an answer is the probability of the predicted option, and an answer is right or wrong:
top-1 calibration. `brier` and `nll` look at all options. Every function takes `(b, n)` weights (counts of b
resamples, every row with a positive sum) and returns `(b,)` values; without weights b is 1. Integer weights
equal repeated questions. All raise EvaluationError when there are no questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from objectives.metrics.bootstrap import blocks, require_questions, weighted_mean, weighted_sum
from objectives.outcomes import N_BINS, Floats, Integers, Outcomes

NLL_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """A reliability diagram in numbers; all arrays `(n_bins,)`. Empty bins have count 0 and NaN means.

    Attributes:
        low, high: the bin holds the confidences in (low, high]; the first one also holds 0.
        count: number of questions. confidence: their mean confidence. accuracy: their share of right answers.
    """

    low: Floats
    high: Floats
    count: Integers
    confidence: Floats
    accuracy: Floats


def reliability_bins(outcomes: Outcomes, n_bins: int = N_BINS) -> ReliabilityBins:
    """Equal-width bins over confidence, as `ece` uses them (Guo et al. 2017)."""
    count, confidence, correct = (row[0] for row in _bin_sums(outcomes, None, n_bins))
    edge = np.arange(n_bins + 1) / n_bins
    with np.errstate(invalid="ignore"):  # 0 / 0 in an empty bin is the NaN that is promised
        mean, rate = confidence / count, correct / count
    return ReliabilityBins(edge[:-1], edge[1:], count.astype(np.int64), mean, rate)


def ece(outcomes: Outcomes, weights: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """Expected calibration error with equal-width bins (Guo et al. 2017), in [0, 1]; lower is better.

    Sum over bins of n_bin / n * |mean confidence - accuracy|. Bin j of N holds the confidences in ((j-1)/N,
    j/N], as in
    that paper: exactly 1 falls in the last bin, exactly 0 in the first. Empty bins count 0.

    >>> two = Outcomes(np.full((2, 2), 0.5), np.array([2, 2]), np.array([0, 1]), np.array([0, 0]))
    >>> ece(two).tolist()
    [0.0]
    """
    require_questions(len(outcomes), "ece")
    member = _membership(outcomes.confidence, n_bins)
    gap = weighted_sum(member * _excess(outcomes)[:, None], weights)
    return np.asarray(np.abs(gap).sum(axis=1) / _total(outcomes, weights))


def ece_mass(outcomes: Outcomes, weights: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """ECE with bins of equal mass (adaptive ECE, Nixon et al. 2019), in [0, 1]; lower is better.

    The questions, in order of confidence, are cut into bins of exactly n / n_bins each. A question on a cut
    belongs to both bins in proportion; questions of equal confidence are shared out alike, so that their
    order does not matter. Without ties and with n divisible by n_bins these are the usual quantile bins;
    with n <= n_bins and no ties the result is the mean of |confidence - correct|.
    """
    require_questions(len(outcomes), "ece:mass")
    order, starts = _tie_groups(outcomes.confidence)
    excess = _excess(outcomes)[order]
    cut = np.arange(n_bins + 1) / n_bins
    values = []
    for rows in blocks(weights, len(outcomes)):
        ordered = rows[:, order]
        # Excess confidence accumulated over accumulated mass is piecewise linear; a bin's gap is its rise
        # between cuts.
        mass = np.cumsum(_merge_ties(ordered, starts), axis=1)
        rise = np.cumsum(_merge_ties(ordered * excess, starts), axis=1)
        mass = np.pad(mass, ((0, 0), (1, 0)))
        rise = np.pad(rise, ((0, 0), (1, 0)))
        at_cut = np.array([np.interp(cut * m[-1], m, r) for m, r in zip(mass, rise, strict=True)])
        values.append(np.abs(np.diff(at_cut, axis=1)).sum(axis=1) / mass[:, -1])
    return np.concatenate(values)


def ece_debiased(outcomes: Outcomes, weights: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """ECE (equal-width bins) with the upward bias of small bins subtracted; in [0, 1], lower is better.

    The normal-approximation estimator of Kumar, Liang and Ma (2019, "Verified Uncertainty Calibration", as
    their library computes it for the l1 error): 2 * ECE - E[ECE*], where ECE* is the ECE
    with every bin's accuracy a replaced by a draw from Normal(a, a (1 - a) / n_bin). They sample; here the
    expectation is exact (mean of a folded normal). Unlike the l2 estimator of Broecker (2012) it is in the
    units of ECE, so both can stand side by side.

    A bin with one question, or with answers all right or all wrong, has a (1 - a) = 0 and is not corrected
    (their library refuses bins with one question). A total below 0 is returned as 0: no
    miscalibration detectable.
    """
    require_questions(len(outcomes), "ece:debiased")
    count, confidence, correct = _bin_sums(outcomes, weights, n_bins)
    filled = np.where(count > 0.0, count, 1.0)
    rate = np.clip(correct / filled, 0.0, 1.0)
    gap = np.abs(confidence - correct) / filled
    spread = np.sqrt(rate * (1.0 - rate) / filled)
    corrected = 2.0 * gap - _folded_normal_mean(gap, spread)
    return np.asarray(np.maximum((count * corrected).sum(axis=1) / count.sum(axis=1), 0.0))


def mce(outcomes: Outcomes, weights: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """Maximum calibration error (Guo et al. 2017): the largest |mean confidence - accuracy| of any bin.

    Equal-width bins as in `ece`, empty ones left out; in [0, 1], lower is better. A bin with one question
    can decide it: read it with care.
    """
    require_questions(len(outcomes), "mce")
    count, confidence, correct = _bin_sums(outcomes, weights, n_bins)
    return np.asarray((np.abs(confidence - correct) / np.where(count > 0.0, count, 1.0)).max(axis=1))


def brier(outcomes: Outcomes, weights: Floats | None = None) -> Floats:
    """Brier score over all options (Brier 1950), in [0, 2]; lower is better.

    Mean squared distance to the one-hot of the right option, summed over options (not divided by their
    number), as in lm-eval.
    """
    return weighted_mean(brier_terms(outcomes), weights, "brier")


def brier_terms(outcomes: Outcomes) -> Floats:
    """`(n,)` Brier scores of the single questions."""
    p_gold = outcomes.probability[np.arange(len(outcomes)), outcomes.gold]
    # |p - e|^2 = |p|^2 - p_gold^2 + (1 - p_gold)^2, without the (n, k) one-hot.
    return np.asarray((outcomes.probability**2).sum(axis=1) - p_gold**2 + (1.0 - p_gold) ** 2)


def brier_top(outcomes: Outcomes, weights: Floats | None = None) -> Floats:
    """Brier score of the predicted option only: mean (confidence - correct)^2, in [0, 1]; lower is better."""
    return weighted_mean(brier_top_terms(outcomes), weights, "brier:top")


def brier_top_terms(outcomes: Outcomes) -> Floats:
    """`(n,)` Brier scores of the single predictions."""
    return np.asarray((outcomes.confidence - outcomes.correct) ** 2)


def nll(outcomes: Outcomes, weights: Floats | None = None) -> Floats:
    """Mean negative log-probability of the right option, in nats; lower is better.

    Probabilities below 1e-12 count as 1e-12, so that one question costs at most 27.63.
    """
    return weighted_mean(nll_terms(outcomes), weights, "nll")


def nll_terms(outcomes: Outcomes) -> Floats:
    """`(n,)` negative log-probabilities of the single questions' right options, in nats."""
    p_gold = outcomes.probability[np.arange(len(outcomes)), outcomes.gold]
    return np.asarray(0.0 - np.log(np.clip(p_gold, NLL_FLOOR, 1.0)))


def auroc(outcomes: Outcomes, weights: Floats | None = None) -> Floats:
    """Probability that a right answer has a higher confidence than a wrong one; in [0, 1], higher is better.

    Equal confidences count 1/2 (Mann-Whitney). With all answers right, or all wrong, there is no pair: 0.5.
    """
    require_questions(len(outcomes), "auroc")
    order, starts = _tie_groups(outcomes.confidence)
    correct = outcomes.correct[order].astype(np.float64)
    values = []
    for rows in blocks(weights, len(outcomes)):
        ordered = rows[:, order]
        right = ordered * correct
        wrong = _merge_ties(ordered - right, starts)
        right = _merge_ties(right, starts)
        wins = (right * (np.cumsum(wrong, axis=1) - 0.5 * wrong)).sum(axis=1)
        pairs = right.sum(axis=1) * wrong.sum(axis=1)
        values.append(np.where(pairs > 0.0, wins / np.where(pairs > 0.0, pairs, 1.0), 0.5))
    return np.concatenate(values)


def _excess(outcomes: Outcomes) -> Floats:
    return outcomes.confidence - outcomes.correct


def _total(outcomes: Outcomes, weights: Floats | None) -> Floats:
    return np.array([float(len(outcomes))]) if weights is None else weights.sum(axis=1)


def _membership(confidence: Floats, n_bins: int) -> Floats:
    """`(n, n_bins)`: 1 where the confidence lies in ((j-1)/n_bins, j/n_bins]."""
    inner = np.arange(1, n_bins) / n_bins
    member = np.zeros((confidence.size, n_bins))
    member[np.arange(confidence.size), np.searchsorted(inner, confidence, side="left")] = 1.0
    return member


def _bin_sums(outcomes: Outcomes, weights: Floats | None, n_bins: int) -> tuple[Floats, Floats, Floats]:
    """Number of questions, summed confidence and number of right answers per bin, each `(b, n_bins)`."""
    member = _membership(outcomes.confidence, n_bins)
    return (
        weighted_sum(member, weights),
        weighted_sum(member * outcomes.confidence[:, None], weights),
        weighted_sum(member * outcomes.correct[:, None], weights),
    )


def _tie_groups(confidence: Floats) -> tuple[Integers, Integers]:
    """The ascending order of the confidences, and where in it each group of equal ones starts."""
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    starts = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1])))
    return order.astype(np.int64), starts.astype(np.int64)


def _merge_ties(ordered: Floats, starts: Integers) -> Floats:
    """Sums `(b, n)` over each group: `(b, groups)`."""
    return ordered if starts.size == ordered.shape[1] else np.add.reduceat(ordered, starts, axis=1)


def _folded_normal_mean(mean: Floats, spread: Floats) -> Floats:
    """E|X| for X ~ Normal(mean, spread^2), elementwise; |mean| where spread is 0."""
    safe = np.where(spread > 0.0, spread, 1.0)
    z = mean / safe
    erf = np.asarray(np.frompyfunc(math.erf, 1, 1)(z / math.sqrt(2.0)), dtype=np.float64)
    folded = safe * math.sqrt(2.0 / math.pi) * np.exp(-0.5 * z * z) + mean * erf
    return np.where(spread > 0.0, folded, np.abs(mean))
