"""Temperatures that bring the option distribution closest to a target distribution: convex, one root."""

from __future__ import annotations

import numpy as np

from objectives.calibrators.logits import OptionLogits
from objectives.calibrators.solver import Minimum, stationary_point
from objectives.calibrators.tempering import tempered
from objectives.outcomes import Booleans, Floats


def divergence_from(target: Floats, post: OptionLogits, temperature: float) -> Floats:
    """`(n,)` KL(target || softmax(g / temperature)) in nats; for a one-hot target the negative log-likelihood.

    Args:
        target: `(n, k)` probabilities, 0 after the last option.
        post: the scores g.
    """
    _, log_q = tempered(post.score, temperature)
    log_target = np.log(np.where(target > 0.0, target, 1.0))
    return np.asarray((target * (log_target - log_q)).sum(axis=1))


def align(post: OptionLogits, target: Floats, used: Booleans) -> Minimum:
    """The temperature tau of least mean_x used(x) KL(target(x) || softmax(g(x) / tau)).

    In beta = 1 / tau the loss is convex, with derivative mean used (E_softmax(beta g)[g] - E_target[g]), whose root
    is found by bracketing: no step size, no noise. There is no finite root where the target favours high scores
    less than the uniform distribution does, mean used E_target[g] <= mean used mean_i g_i, and none above 0 where
    it always picks the highest score: then the edge of the range is returned with a reason.

    Args:
        target: `(n, k)` probabilities. used: `(n,)`; the mean is over all n, as in DACA's published code.
    """
    rows = np.flatnonzero(used)
    n = len(post)
    chosen, aim = post.select(rows), target[rows]
    real = np.isfinite(chosen.score)
    centred = np.where(real, chosen.score - chosen.score.max(axis=1, keepdims=True), 0.0)

    def loss(temperature: float) -> float:
        return float(divergence_from(aim, chosen, temperature).sum() / n)

    def slope(temperature: float) -> float:
        q, _ = tempered(chosen.score, temperature)
        return float(((q - aim) * centred).sum() / n)

    return stationary_point(loss, slope)
