"""objectives/metrics/calibration.py, accuracy.py: hand-made cases, independent implementations, known biases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from objectives.metrics import calibration as cal
from objectives.metrics.accuracy import accuracy
from objectives.outcomes import Floats, Outcomes


def answers(confidence: list[float], correct: list[bool]) -> Outcomes:
    """Two-option questions with these confidences (at least 0.5) and verdicts."""
    p = np.array(confidence, dtype=np.float64).reshape(-1, 1)
    gold = np.where(np.array(correct, dtype=bool), 0, 1)
    zeros = np.zeros(gold.size, dtype=np.int64)
    return Outcomes(np.hstack([p, 1.0 - p]), zeros + 2, gold, zeros)


def simulated(seed: int, n: int = 700, k: int = 5, sharpness: float = 2.0) -> Outcomes:
    """Gold answers drawn from a distribution that the model sharpens; 2 to k options."""
    random = np.random.default_rng(seed)
    options = random.integers(2, k + 1, size=n)
    score = np.where(np.arange(k) < options[:, None], random.normal(size=(n, k)), -np.inf)
    truth = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    gold = np.array([random.choice(k, p=row) for row in truth])
    return Outcomes.from_loglikelihoods(sharpness * score, options, gold, random.integers(0, 2, size=n))


SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_ece_and_mce_equal_torchmetrics(seed: int, n_bins: int) -> None:
    o = simulated(seed)
    # float64 as it is: torchmetrics would otherwise round the bin edges to float32.
    preds, target = torch.tensor(o.probability), torch.tensor(o.gold)
    for function, norm in ((cal.ece, "l1"), (cal.mce, "max")):
        expected = multiclass_calibration_error(preds, target, num_classes=5, n_bins=n_bins, norm=norm)
        assert function(o, n_bins=n_bins)[0] == pytest.approx(float(expected), abs=1e-6)
    confidence, correct = torch.tensor(o.confidence), torch.tensor(o.correct).long()
    expected = binary_calibration_error(confidence, correct, n_bins=n_bins, norm="l1")
    assert cal.ece(o, n_bins=n_bins)[0] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_equal_sklearn(seed: int) -> None:
    o = simulated(seed)
    assert accuracy(o)[0] == pytest.approx(float(np.mean(o.correct)))
    assert cal.auroc(o)[0] == pytest.approx(roc_auc_score(o.correct, o.confidence))
    assert cal.brier_top(o)[0] == pytest.approx(brier_score_loss(o.correct, o.confidence))
    labels = list(range(5))
    assert cal.nll(o)[0] == pytest.approx(log_loss(o.gold, o.probability, labels=labels))
    expected = brier_score_loss(o.gold, o.probability, labels=labels, scale_by_half=False)
    assert cal.brier(o)[0] == pytest.approx(expected)


def test_auroc_equals_sklearn_with_ties() -> None:
    random = np.random.default_rng(0)
    o = answers((random.integers(5, 10, size=200) / 10).tolist(), (random.random(200) < 0.6).tolist())
    assert cal.auroc(o)[0] == pytest.approx(roc_auc_score(o.correct, o.confidence))
    weights = random.integers(0, 4, size=(3, 200)).astype(np.float64)
    expected = [roc_auc_score(o.correct, o.confidence, sample_weight=row) for row in weights]
    np.testing.assert_allclose(cal.auroc(o, weights), expected)


@pytest.mark.parametrize("n_bins", [1, 7, 15])
def test_equal_mass_is_the_quantile_split(n_bins: int) -> None:
    o = simulated(0, n=n_bins * 20)
    order = np.argsort(o.confidence)
    parts = np.split(order, n_bins)
    gaps = [abs(o.confidence[part].mean() - o.correct[part].mean()) for part in parts]
    assert cal.ece_mass(o, n_bins=n_bins)[0] == pytest.approx(np.mean(gaps))


def test_equal_mass_shares_the_question_on_a_cut() -> None:
    # Three questions, two bins of 1.5: the middle one (excess +0.7) counts half in each.
    o = answers([0.6, 0.7, 0.9], [True, False, True])
    low, middle, high = -0.4, 0.7, -0.1
    expected = (abs(low + middle / 2) + abs(middle / 2 + high)) / 3
    assert cal.ece_mass(o, n_bins=2)[0] == pytest.approx(expected)


def test_equal_mass_with_ties_does_not_depend_on_their_order() -> None:
    verdicts = [True] * 10 + [False] * 10
    one, other = answers([0.5] * 20, verdicts), answers([0.5] * 20, verdicts[::-1])
    assert cal.ece_mass(one)[0] == pytest.approx(0.0, abs=1e-12)  # all alike: every bin is half right
    assert cal.ece_mass(other)[0] == pytest.approx(0.0, abs=1e-12)


def test_equal_mass_with_fewer_questions_than_bins_is_the_mean_gap() -> None:
    o = answers([0.6, 0.7, 0.9], [True, False, True])
    assert cal.ece_mass(o)[0] == pytest.approx((0.4 + 0.7 + 0.1) / 3)


def test_hand_computed() -> None:
    # Bins of a fifth: (0.4, 0.6] holds 0.5 (right) and 0.6 (wrong); (0.8, 1] holds 0.9 and 1.0 (right).
    o = answers([0.5, 0.6, 0.9, 1.0], [True, False, True, True])
    assert cal.ece(o, n_bins=5)[0] == pytest.approx(0.5 * abs(0.55 - 0.5) + 0.5 * abs(0.95 - 1.0))
    assert cal.mce(o, n_bins=5)[0] == pytest.approx(0.05)
    assert cal.brier_top(o)[0] == pytest.approx((0.25 + 0.36 + 0.01 + 0.0) / 4)
    assert cal.brier(o)[0] == pytest.approx(2 * (0.25 + 0.36 + 0.01 + 0.0) / 4)
    assert cal.nll(o)[0] == pytest.approx(-np.log([0.5, 0.4, 0.9, 1.0]).mean())
    assert cal.auroc(o)[0] == pytest.approx(2 / 3)


def test_bin_edges_belong_to_the_bin_below() -> None:
    o = answers([0.5, 0.6, 0.8, 1.0], [True] * 4)
    bins = cal.reliability_bins(o, 5)
    assert bins.count.tolist() == [0, 0, 2, 1, 1]
    np.testing.assert_allclose(bins.low, [0.0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(bins.high, [0.2, 0.4, 0.6, 0.8, 1.0])


def test_confidence_one_is_in_the_last_bin_and_zero_in_the_first() -> None:
    member = cal._membership(np.array([0.0, 1.0]), 15)
    assert member.argmax(axis=1).tolist() == [0, 14]
    assert member.sum() == 2.0


def test_reliability_bins_add_up() -> None:
    o = simulated(1)
    bins = cal.reliability_bins(o, 15)
    assert bins.count.dtype == np.int64
    assert bins.count.sum() == len(o)
    filled = bins.count > 0
    assert not filled.all()  # five options or fewer: no confidence below 0.2
    assert np.isnan(bins.confidence[~filled]).all()
    assert np.isnan(bins.accuracy[~filled]).all()
    gap = np.abs(bins.confidence - bins.accuracy)[filled]
    assert (bins.count[filled] * gap).sum() / len(o) == pytest.approx(cal.ece(o)[0])
    assert gap.max() == pytest.approx(cal.mce(o)[0])


def test_reliability_bins_of_nothing() -> None:
    bins = cal.reliability_bins(simulated(0).select([]), 3)
    assert bins.count.tolist() == [0, 0, 0]
    assert np.isnan(bins.accuracy).all()


def test_debiased_equals_sampling_the_bins() -> None:
    # The published estimator draws each bin's accuracy from a normal; ours takes the exact expectation.
    o = simulated(3, n=200)
    bins = cal.reliability_bins(o, 15)
    use = bins.count > 0
    count, confidence, rate = bins.count[use], bins.confidence[use], bins.accuracy[use]
    random = np.random.default_rng(0)
    draws = random.normal(rate, np.sqrt(rate * (1 - rate) / count), size=(200_000, rate.size))
    sampled = (count * np.abs(draws - confidence)).sum(axis=1).mean() / count.sum()
    expected = 2 * cal.ece(o)[0] - sampled
    assert cal.ece_debiased(o)[0] == pytest.approx(expected, abs=3e-4)


def test_debiased_is_nearer_to_the_truth() -> None:
    truth = cal.ece(simulated(99, n=60_000))[0]
    few = [simulated(seed, n=150) for seed in range(40)]
    plain = np.mean([cal.ece(o)[0] for o in few]) - truth
    debiased = np.mean([cal.ece_debiased(o)[0] for o in few]) - truth
    assert plain > 0.004
    assert abs(debiased) < plain / 2


def test_debiased_leaves_bins_without_variance_alone() -> None:
    one_each = answers([0.52, 0.65, 0.75, 0.95], [True, False, True, False])
    assert cal.ece_debiased(one_each)[0] == pytest.approx(cal.ece(one_each)[0])


def test_debiased_never_exceeds_ece_and_is_not_negative() -> None:
    for seed in range(20):
        o = simulated(seed, n=40, sharpness=1.0)
        assert 0.0 <= cal.ece_debiased(o)[0] <= cal.ece(o)[0] + 1e-12


FUNCTIONS: list[Callable[[Outcomes], Floats]] = [
    cal.ece,
    cal.ece_mass,
    cal.ece_debiased,
    cal.mce,
    cal.brier,
    cal.brier_top,
    cal.nll,
    cal.auroc,
    accuracy,
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("confidence", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("n", [1, 20])
def test_degenerate_sets_give_finite_numbers(
    function: Callable[[Outcomes], Floats], correct: bool, confidence: float, n: int
) -> None:
    o = answers([confidence] * n, [correct] * n)
    values = function(o)
    assert values.shape == (1,)
    gap = 1.0 - confidence if correct else confidence
    by_function: dict[Callable[[Outcomes], Floats], float] = {
        cal.brier: 2 * gap**2,
        cal.brier_top: gap**2,
        cal.nll: min(-np.log(max(1.0 - gap, 1e-12)), 27.7),
        cal.auroc: 0.5,
        accuracy: float(correct),
    }
    assert values[0] == pytest.approx(by_function.get(function, gap), abs=1e-12)


def test_nll_is_cut_at_the_floor() -> None:
    o = answers([1.0], [False])
    assert cal.nll(o)[0] == pytest.approx(-np.log(1e-12))
    assert (
        np.signbit(cal.nll(answers([1.0], [True]))[0]) == np.False_ or cal.nll(answers([1.0], [True]))[0] == 0
    )


def test_constant_confidence_games_ece_but_not_auroc() -> None:
    o = answers([0.75] * 4, [True, True, True, False])
    assert cal.ece(o)[0] == pytest.approx(0.0)
    assert cal.auroc(o)[0] == 0.5


def test_long_bootstraps_run_in_blocks_with_the_same_result() -> None:
    o = simulated(0, n=90)
    weights: Floats = np.random.default_rng(0).integers(0, 3, size=(150, 90)).astype(np.float64)
    for function in (cal.auroc, cal.ece_mass):
        together = function(o, weights)
        apart = np.concatenate([function(o, row[None]) for row in weights])
        np.testing.assert_array_equal(together, apart)
