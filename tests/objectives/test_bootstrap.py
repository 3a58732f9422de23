"""objectives/metrics/bootstrap.py: the resamples' distribution, and what an interval covers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.metrics.bootstrap import interval, resample_weights
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from search.errors import EvaluationError

LAW = settings(deadline=None, max_examples=50)  # no deadline: the machine may be busy


@LAW
@given(n=st.integers(1, 30), b=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_every_row_is_a_resample(n: int, b: int, seed: int) -> None:
    weights = resample_weights(n, b, seed)
    assert weights.shape == (b, n)
    assert weights.dtype == np.float64
    assert (weights == np.round(weights)).all()
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) == n).all()
    np.testing.assert_array_equal(weights, resample_weights(n, b, seed))


@LAW
@given(label=st.lists(st.integers(-3, 3), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_strata_keep_their_size(label: list[int], seed: int) -> None:
    strata = np.array(label)
    weights = resample_weights(strata.size, 5, seed, strata=strata)
    for value in set(label):
        assert (weights[:, strata == value].sum(axis=1) == (strata == value).sum()).all()


def test_one_stratum_is_no_stratum() -> None:
    np.testing.assert_array_equal(resample_weights(9, 4, 2), resample_weights(9, 4, 2, strata=["a"] * 9))


def test_seeds_differ() -> None:
    assert (resample_weights(50, 2, 0) != resample_weights(50, 2, 1)).any()


def test_counts_are_multinomial() -> None:
    n = 40
    weights = resample_weights(n, 20_000, 0)
    np.testing.assert_allclose(weights.mean(axis=0), 1.0, atol=0.04)
    np.testing.assert_allclose(weights.var(axis=0), 1 - 1 / n, atol=0.06)
    assert np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-1 / (n - 1), abs=0.03)


@pytest.mark.parametrize(("n", "b"), [(0, 10), (10, 0), (-1, 5)])
def test_nothing_to_resample(n: int, b: int) -> None:
    with pytest.raises(EvaluationError, match="bootstrap: "):
        resample_weights(n, b)


def test_strata_of_another_length() -> None:
    with pytest.raises(EvaluationError, match=r"strata have shape \(2,\), wanted \(3,\)"):
        resample_weights(3, strata=[0, 1])


def test_percentile_interval() -> None:
    samples = np.random.default_rng(0).permutation(1001).astype(float)
    assert interval(samples) == pytest.approx((25.0, 975.0))
    assert interval(samples, level=0.5) == pytest.approx((250.0, 750.0))
    assert interval([3.0]) == (3.0, 3.0)
    assert interval([np.nan, 3.0, np.nan]) == (3.0, 3.0)


def test_basic_interval_turns_the_samples_around_the_value() -> None:
    samples = np.arange(1001.0)
    assert interval(samples, value=500.0) == pytest.approx((25.0, 975.0))
    assert interval(samples, value=400.0) == pytest.approx((-175.0, 775.0))
    assert interval(samples, value=400.0, bounds=(0.0, 500.0)) == (0.0, 500.0)


@pytest.mark.parametrize("samples", [[], [np.nan], [1.0, np.inf]])
def test_no_interval_without_numbers(samples: list[float]) -> None:
    with pytest.raises(EvaluationError, match="interval: "):
        interval(samples)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 95.0, np.nan])
def test_level_is_a_share(level: float) -> None:
    with pytest.raises(EvaluationError, match="level is"):
        interval([1.0, 2.0], level)


def _over_confident(random: np.random.Generator, n: int) -> tuple[Outcomes, Outcomes]:
    """A calibrated model and the same one sharpened, on the same questions."""
    score = random.normal(size=(n, 4))
    truth = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    gold = (truth.cumsum(axis=1) > random.random((n, 1))).argmax(axis=1)
    options, task = np.full(n, 4), np.zeros(n, dtype=int)
    pre = Outcomes.from_loglikelihoods(score, options, gold, task)
    return pre, Outcomes.from_loglikelihoods(2 * score, options, gold, task)


def test_intervals_cover_the_truth() -> None:
    accuracy, ece = get_metric("accuracy"), get_metric("ece")
    _, post = _over_confident(np.random.default_rng(99), 100_000)
    truth = accuracy.value(post), ece.value(post)
    hits = np.zeros(2)
    random, weights = np.random.default_rng(0), resample_weights(300, 300)
    for _ in range(100):
        _, post = _over_confident(random, 300)
        for i, metric in enumerate((accuracy, ece)):
            low, high = interval(metric(post, weights), value=metric.value(post))
            hits[i] += low <= truth[i] <= high
    assert (hits >= 87).all()  # of 100 at the 95 % level


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    # A temperature keeps the answers, so the paired difference in accuracy is exactly 0 in every resample.
    pre, post = _over_confident(np.random.default_rng(0), 400)
    weights, metric = resample_weights(400), get_metric("accuracy")
    assert interval(metric(post, weights) - metric(pre, weights)) == (0.0, 0.0)
    assert interval(metric(pre, weights))[0] < interval(metric(pre, weights))[1]
