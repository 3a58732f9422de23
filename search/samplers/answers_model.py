"""A model of what merges answer: a Gaussian process from coefficients to the scores of every option of every question.

Scores change smoothly with the coefficients where accuracy and binned calibration error jump, and every evaluation
shows thousands of them at once. The objectives are computed from predicted scores (composite functions: Astudillo and
Frazier 2019, arXiv 1906.01537). All scores share one kernel,

    k(x, x') = v exp(-sum_d (x_d - x'_d)^2 / (2 l_d^2))  +  noise where x = x'

fitted by marginal likelihood, averaged over the scores, with the prior log l_d ~ N(sqrt 2 + log(D) / 2, 3) of
Hvarfner, Hellsten and Nardi (2024, arXiv 2402.02229) for a unit box in D dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from objectives.outcomes import Outcomes

Floats = NDArray[np.float64]

_MAX_ITERATIONS = 60
_LENGTHS = (0.05, 500.0)  # of the unit box
_NOISES = (1e-6, 1e-1)  # relative to the scores' variance
_FIRST_NOISE = 1e-3
_LEAST = 1e-30  # of a probability: what lies below tells nothing more


class AnswersModel:
    """Predicts the scores of any recipe from those of scored ones.

    Args:
        x: `(t, d)` float64, the scored recipes in the unit box; none twice.
        scores: `(t, m)` float64, any numbers that a recipe is scored with, all in one row.
    """

    def __init__(self, x: Floats, scores: Floats) -> None:
        self._x = torch.from_numpy(np.ascontiguousarray(x))
        mean = scores.mean(axis=0)
        centred = torch.from_numpy(scores - mean)
        products = centred @ centred.T / centred.shape[1]
        spread = float(products.diagonal().mean())
        self._log = _fitted(self._x, products / (spread or 1.0))
        self._factor = torch.linalg.cholesky(_covariance(self._x, self._log))
        self._weights = torch.cholesky_solve(centred, self._factor).float()
        self._offset = torch.from_numpy(mean).float()

    def predict(self, x: Floats) -> NDArray[np.float32]:
        """`(c, m)` expected scores of recipes `(c, d)`."""
        found: NDArray[np.float32] = (self._between(x).float() @ self._weights + self._offset).numpy()
        return found

    def variance(self, x: Floats) -> Floats:
        """`(c,)` variance that is left in a score of recipes `(c, d)`, as a share of the variance before any trial."""
        explained = (
            torch.linalg.solve_triangular(self._factor, self._between(x).T, upper=False).square().sum(dim=0)
        )
        return np.asarray((1.0 - explained / self._log[-2].exp()).clamp_min(0.0).numpy())

    def _between(self, x: Floats) -> torch.Tensor:
        return _kernel(torch.from_numpy(np.ascontiguousarray(x)), self._x, self._log)


def _fitted(x: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """`(d + 2,)` logarithms of lengths, variance and noise that the scores' `(t, t)` mean products make likeliest."""
    from scipy.optimize import minimize

    d = x.shape[1]
    centre, width = math.sqrt(2.0) + 0.5 * math.log(d), math.sqrt(3.0)

    def loss(log: Floats) -> tuple[float, Floats]:
        leaf = torch.from_numpy(log.copy()).requires_grad_()
        factor = torch.linalg.cholesky(_covariance(x, leaf))
        fit = torch.cholesky_solve(products, factor).diagonal().sum()
        prior = ((leaf[:d] - centre) / width).square().sum()
        value = 0.5 * fit + factor.diagonal().log().sum() + 0.5 * prior
        value.backward()
        assert leaf.grad is not None
        return float(value.detach()), leaf.grad.numpy()

    start = np.concatenate([np.full(d, math.log(2.0)), [0.0, math.log(_FIRST_NOISE)]])
    bounds = [(math.log(_LENGTHS[0]), math.log(_LENGTHS[1]))] * d
    bounds += [(-5.0, 5.0), (math.log(_NOISES[0]), math.log(_NOISES[1]))]
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _MAX_ITERATIONS}
    )
    return torch.from_numpy(found.x)


def _kernel(a: torch.Tensor, b: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    lengths = log[:-2].exp()
    a, b = a / lengths, b / lengths
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2.0 * a @ b.T
    return log[-2].exp() * torch.exp(-0.5 * squares.clamp_min(0.0))


def _covariance(x: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    return _kernel(x, x, log) + log[-1].exp() * torch.eye(len(x), dtype=x.dtype)


def relative_scores(outcomes: Outcomes) -> Floats:
    """`(n * k,)`: log-probabilities relative to their mean over a question's options, 0 after the last option.

    What all options of a question share changes no probability, and would be most of what there is to model.
    """
    there = np.arange(outcomes.probability.shape[1]) < outcomes.options[:, None]
    score = np.where(there, np.log(np.maximum(outcomes.probability, _LEAST)), 0.0)
    mean = score.sum(axis=1) / outcomes.options
    return np.asarray(np.where(there, score - mean[:, None], 0.0).ravel())


def predicted_outcomes(scores: NDArray[np.float32], like: Outcomes) -> Outcomes:
    """The answers of a row `(n * k,)` of `AnswersModel.predict`, to the questions of `like`."""
    n, k = like.probability.shape
    padding = np.arange(k) >= like.options[:, None]
    score = np.where(padding, -np.inf, scores.reshape(n, k))
    return Outcomes.from_loglikelihoods(score, like.options, like.gold, like.task)
