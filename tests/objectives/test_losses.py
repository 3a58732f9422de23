"""Differentiable losses against the metrics that they stand for, and by the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from objectives.metrics import calibration
from objectives.outcomes import Outcomes
from objectives.scoring.losses import (
    BRIER,
    CROSS_ENTROPY,
    SOFT_BINNED_ECE,
    Loss,
    scalarized,
    soft_binned_ece,
    stand_in,
)
from search.errors import ConfigError

LOSSES = (CROSS_ENTROPY, BRIER, SOFT_BINNED_ECE)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def scores(n: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Outcomes]:
    """Questions with two to five options."""
    rng = np.random.default_rng(seed)
    options = rng.integers(2, 6, n)
    score = rng.normal(0.0, 2.0, (n, 5))
    score[np.arange(5) >= options[:, None]] = -np.inf
    gold = rng.integers(0, options)
    outcomes = Outcomes.from_loglikelihoods(score, options, gold, np.zeros(n, dtype=np.int64))
    return torch.from_numpy(score), torch.from_numpy(gold), outcomes


def test_proper_scores_equal_the_metrics() -> None:
    score, gold, outcomes = scores()
    assert float(CROSS_ENTROPY(score, gold)) == pytest.approx(calibration.nll(outcomes)[0], rel=1e-12)
    assert float(BRIER(score, gold)) == pytest.approx(calibration.brier(outcomes)[0], rel=1e-12)


@pytest.mark.parametrize("n_bins", [5, 15])
def test_soft_binned_ece_by_its_definition(n_bins: int) -> None:
    score, gold, outcomes = scores()
    temperature = 1 / (n_bins**2 * math.log(80))
    centres = [(j + 0.5) / n_bins for j in range(n_bins)]
    mass, confidence, accuracy = (np.zeros(n_bins) for _ in range(3))
    for c, right in zip(outcomes.confidence, outcomes.correct, strict=True):
        pull = np.array([math.exp(-((c - centre) ** 2) / temperature) for centre in centres])
        member = pull / pull.sum()
        mass += member
        confidence += member * c
        accuracy += member * right
    wanted = math.sqrt(
        sum(
            s / len(outcomes) * (a / s - c / s) ** 2
            for s, c, a in zip(mass, confidence, accuracy, strict=True)
        )
    )
    assert float(soft_binned_ece(score, gold, n_bins=n_bins)) == pytest.approx(wanted, rel=1e-10)
    hard = calibration.reliability_bins(outcomes, n_bins)
    gap = np.nan_to_num(hard.confidence - hard.accuracy)
    assert wanted == pytest.approx(math.sqrt((hard.count / len(outcomes) * gap**2).sum()), rel=0.15)


@every_loss
def test_derivatives(loss: Loss) -> None:
    """Padding has no share and gives nothing that is not a number; the rest equals central differences."""
    score, gold, _ = scores(12)
    leaf = score.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, gold), leaf)
    padding = torch.isinf(score)
    assert (found[padding] == 0).all()
    h = 1e-6
    for i, j in torch.nonzero(~padding).tolist():
        step = torch.zeros_like(score)
        step[i, j] = h
        slope = (loss(score + step, gold) - loss(score - step, gold)) / (2 * h)
        assert float(found[i, j]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


@every_loss
def test_only_a_coupled_loss_is_no_mean_of_its_parts(loss: Loss) -> None:
    score, gold, _ = scores(40)
    halves = 0.25 * loss(score[:10], gold[:10]) + 0.75 * loss(score[10:], gold[10:])
    assert (abs(float(halves - loss(score, gold))) > 1e-9) == loss.coupled


def test_perfect_calibration_has_a_derivative() -> None:
    score = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(SOFT_BINNED_ECE(score, torch.tensor([0])), score)
    assert found.tolist() == [[0.0, 0.0]]


def test_weighted_sums() -> None:
    score, gold, _ = scores()
    both = scalarized(LOSSES[:2], (0.25, 0.75))
    assert float(both(score, gold)) == pytest.approx(
        0.25 * float(CROSS_ENTROPY(score, gold)) + 0.75 * float(BRIER(score, gold))
    )
    assert not both.coupled
    assert scalarized(LOSSES, (1.0, 1.0, 0.5)).coupled
    assert not scalarized(LOSSES, (1.0, 1.0, 0.0)).coupled


def test_stand_ins() -> None:
    assert stand_in("accuracy") is stand_in("nll") is CROSS_ENTROPY
    assert stand_in("brier") is BRIER
    score, gold, _ = scores()
    for name, n_bins in (("ece", 15), ("ece:mass", 15), ("ece:10", 10), ("ece:20:debiased", 20)):
        assert float(stand_in(name)(score, gold)) == float(soft_binned_ece(score, gold, n_bins=n_bins))
    for name in ("auroc", "mce", "brier:top", "distinct-2", "accuracy@arc", "ece@arc"):
        with pytest.raises(ConfigError, match=f"objectives: {name}: .* no differentiable stand-in"):
            stand_in(name)
