"""Descents along the gradient of differentiable stand-ins for the objectives, one for each of a spread of weights.

Each of the `weights` descents minimises a weighted sum of the objectives' losses with Adam (Kingma and Ba 2015),
projected on the bounds, from the best baseline for its weights. A weight is per reach of its loss: what the losses
differ by among the baselines counts as one, or cross-entropy would drown a calibration error ten times as small. Every
proposal is `steps` steps further on the descent whose turn it is. What a descent
must know to go on is in the tags of its last trial: where it is, Adam's moments, and the count of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.config.sampler import SamplerConfig
from search.samplers.engine import Engine, Proposal, WeightedGradient, seed_of
from search.storage.trials import PROPOSAL_TOKENS, TrialRecord

STEPS = 8
RATE = 0.2
BATCH = 125  # questions a step
WEIGHTS = 5
DECAY = (0.9, 0.999)  # of Adam's first and second moment
EPSILON = 1e-8
_DESCENT = "mergefront:descent"
_ADAM = "mergefront:adam"

Floats = NDArray[np.float64]


class GradientEngine(Engine):
    """Projected Adam from the uniform line (see `Engine`).

    Args:
        gradient: makes what gives the gradients; called at the first proposal, since it needs the live model.
        losses: `(objectives,)` losses of a complete trial, in the order of the weights.
    """

    def __init__(
        self,
        config: SamplerConfig,
        groups: tuple[str, ...],
        bounds: tuple[float, float],
        maximize: tuple[bool, ...],
        gradient: Callable[[], WeightedGradient],
        losses: Callable[[TrialRecord], Floats],
    ) -> None:
        self._groups = groups
        self._bounds = bounds
        self._sign = np.where(maximize, -1.0, 1.0)
        self._steps = config.steps or STEPS
        self._rate = config.rate or RATE
        self._weights = spread(config.weights or WEIGHTS, len(maximize), config.seed)
        self._gradient = cache(gradient)
        self._losses = losses
        self._known: dict[int, Floats] = {}

    def cost(self, history: Sequence[TrialRecord]) -> int:
        """See `Engine.cost`."""
        return self._steps * self._gradient().tokens

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`. Values of a descent's own trials are not waited for: its gradients lead it."""
        descents = [record for record in history if _DESCENT in record.tags]
        turn = len(descents) % len(self._weights)
        weights = self._weights[turn]
        last = next((r for r in reversed(descents) if r.tags[_DESCENT] == turn), None)
        if last is None or last.state == "failed":  # from where it failed it would fail again
            x = self._start(history, weights)
            adam = _Adam(self._rate, len(x))
        else:
            x = np.array([last.coefficients[group] for group in self._groups])
            kept = last.tags[_ADAM]
            # Moments of other coordinates, from before blocks were split (`coarse`), are of no use to these.
            adam = _Adam(self._rate, len(x), **(kept if len(kept["first"]) == len(x) else {}))
        pull = weights / self._reach(history)
        gradient, tokens = self._gradient(), 0
        for step in range(self._steps):
            here = gradient(x, pull, len(descents) * self._steps + step)
            x = np.clip(x + adam.step(here.gradient), *self._bounds)
            tokens += here.tokens
        tags = {_DESCENT: turn, _ADAM: adam.to_json(), PROPOSAL_TOKENS: tokens}
        return Proposal({group: float(c) for group, c in zip(self._groups, x, strict=True)}, tags)

    def _reach(self, history: Sequence[TrialRecord]) -> Floats:
        """`(objectives,)`: what each loss differs by among the baselines; 1 where it does not."""
        known = _baselines(history)
        for record in known:
            if record.number not in self._known:
                self._known[record.number] = self._losses(record)
        if not known:
            return np.ones(len(self._sign))
        reach = np.ptp([self._known[record.number] for record in known], axis=0)
        return np.where(reach > 0.0, reach, 1.0)

    def _start(self, history: Sequence[TrialRecord], weights: Floats) -> Floats:
        """The best baseline by the weighted sum of its values, each scaled to [0, 1] over the baselines."""
        known = _baselines(history)
        if not known:  # other workers have them all
            return np.full(len(self._groups), 0.5)
        values = np.array([record.values for record in known]) * self._sign
        reach = np.ptp(values, axis=0)
        scaled = (values - values.min(axis=0)) / np.where(reach > 0.0, reach, 1.0)
        best = known[int((scaled @ weights).argmin())]
        return np.array([best.coefficients[group] for group in self._groups])


def _baselines(history: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in history if record.kind != "search" and record.state == "complete"]


def spread(count: int, objectives: int, seed: int) -> Floats:
    """`(count, objectives)` weights: each row is 0 or more and sums to 1. With one objective there is one row, [1].

    A Latin hypercube in the `objectives - 1` cuts of the unit interval, whose pieces are the weights: evenly spread
    without the corners, which ignore an objective, and another sample for another seed.
    """
    if objectives == 1:
        return np.ones((1, 1))
    rng = np.random.default_rng(seed_of(seed, 0))
    strata = rng.permuted(np.tile(np.arange(count), (objectives - 1, 1)), axis=1).T
    cuts = np.sort((strata + rng.random(strata.shape)) / count, axis=1)
    return np.diff(np.pad(cuts, ((0, 0), (1, 1)), constant_values=(0.0, 1.0)), axis=1)


class _Adam:
    """Adam without weight decay; its state is plain JSON."""

    def __init__(
        self, rate: float, dim: int, count: int = 0, first: Sequence[float] = (), second: Sequence[float] = ()
    ) -> None:
        self._rate = rate
        self._count = count
        self._first = np.array(first) if count else np.zeros(dim)
        self._second = np.array(second) if count else np.zeros(dim)

    def step(self, gradient: Floats) -> Floats:
        """The next move, `(dim,)`; a coordinate whose gradient was always 0 stays."""
        self._count += 1
        slow, slower = DECAY
        self._first = slow * self._first + (1.0 - slow) * gradient
        self._second = slower * self._second + (1.0 - slower) * gradient**2
        mean = self._first / (1.0 - slow**self._count)
        power = self._second / (1.0 - slower**self._count)
        move: Floats = -self._rate * mean / (np.sqrt(power) + EPSILON)
        return move

    def to_json(self) -> dict[str, Any]:
        return {"count": self._count, "first": self._first.tolist(), "second": self._second.tolist()}
