"""Softmax at a temperature and what is computed from it, over the last axis, with -inf as padding."""

from __future__ import annotations

import numpy as np

from objectives.outcomes import Floats


def tempered(score: Floats, temperature: float) -> tuple[Floats, Floats]:
    """`softmax(score / temperature)` and its logarithm, each `(..., k)` float64.

    Padding has probability 0 and a finite, meaningless logarithm, so that p * log p is 0 there. At temperature 1
    the probabilities are those of `Outcomes.from_loglikelihoods` to the last bit.

    >>> tempered(np.array([0.0, 0.0, -np.inf]), 2.0)[0].tolist()
    [0.5, 0.5, 0.0]
    """
    scaled = (score - score.max(axis=-1, keepdims=True)) / temperature
    odds = np.exp(scaled)
    total = odds.sum(axis=-1, keepdims=True)
    return odds / total, np.where(np.isfinite(scaled), scaled, 0.0) - np.log(total)


def entropy(score: Floats, temperature: float) -> Floats:
    """Shannon entropy of `softmax(score / temperature)` in nats, `(...)`; 0 to log k."""
    p, log_p = tempered(score, temperature)
    return np.asarray(0.0 - (p * log_p).sum(axis=-1))


def jensen_shannon(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence of probabilities `(..., k)` in nats, `(...)`; 0 (exactly, where equal) to log 2.

    >>> bool(jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == np.log(2.0))
    True
    """
    middle = 0.5 * (p + q)
    log_middle = _log(middle)
    both = p * (_log(p) - log_middle) + q * (_log(q) - log_middle)
    return np.asarray(np.maximum(0.5 * both.sum(axis=-1), 0.0))


def _log(p: Floats) -> Floats:
    return np.log(np.where(p > 0.0, p, 1.0))
