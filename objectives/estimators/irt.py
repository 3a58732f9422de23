"""Multi-dimensional two-parameter logistic item response model: which questions are alike, over many recipes.

    P(recipe j answers item i rightly) = sigmoid(a_i . g_j - b_i)            (MERGE3, arXiv 2502.10436)

An item is a question, g_j the ability of recipe j. The parameters of the items are fitted once, on recipes that were
scored on every question (the baselines, earlier trials); the ability of a new recipe takes few of its answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.errors import ConfigError, EvaluationError
from objectives.outcomes import Floats, Integers

LOGIT_LIMIT = 30.0  # a probability is never closer to 0 or 1 than 1e-13

_MAX_ITERATIONS = 500
_GRADIENT = 1e-5  # of the penalised log-likelihood, nats; probabilities change by less than 1e-4 beyond it
_SPREAD = 1e-6  # of abilities; below, it is rounding
_MAX_STEPS = 100
_DECREMENT = 1e-12  # of Newton's method, relative to the loss: one more step squares what is left


@dataclass(frozen=True, eq=False)
class Items:
    """Item parameters, and the abilities that they were fitted with; arrays are read-only.

    Only abilities of one fit may be used together: another fit may rotate, mirror or shift its dimensions.

    Attributes:
        discrimination: `(d, n)` float64, A: how strongly an item depends on each dimension of ability.
        difficulty: `(n,)` float64, b: logit of a wrong answer at ability 0; higher is harder.
        ability: `(m, d)` float64, g of the bank's recipes, in the bank's order.

    Raises:
        EvaluationError: shapes that do not fit together, or a number that is not finite.
    """

    discrimination: Floats
    difficulty: Floats
    ability: Floats

    def __post_init__(self) -> None:
        arrays = {name: np.array(value, dtype=np.float64) for name, value in self.to_arrays().items()}
        a, b, g = arrays.values()
        if a.ndim != 2 or g.ndim != 2 or b.shape != a.shape[1:] or g.shape[1] != a.shape[0] or not a.size:
            raise EvaluationError(
                f"items: discrimination {a.shape}, difficulty {b.shape} and ability {g.shape} do not fit together "
                "(wanted (d, n), (n,) and (m, d))."
            )
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise EvaluationError(f"items: {name} holds a number that is not finite.")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return int(self.difficulty.size)

    @property
    def dimensions(self) -> int:
        return int(self.discrimination.shape[0])

    def probability(self, ability: npt.ArrayLike) -> Floats:
        """`(..., n)` probabilities of a right answer at abilities `(..., d)`; logits are clipped to +-30.

        >>> Items(np.array([[1.0, 2.0]]), np.array([0.0, 2.0]), np.zeros((1, 1))).probability([1.0]).round(3).tolist()
        [0.731, 0.5]
        """
        return _sigmoid(np.asarray(ability, dtype=np.float64) @ self.discrimination - self.difficulty)

    def to_arrays(self) -> dict[str, Floats]:
        """The three arrays by name; `Items(**arrays)` is the way back."""
        return {
            "discrimination": self.discrimination,
            "difficulty": self.difficulty,
            "ability": self.ability,
        }


def fit_items(
    bank: npt.ArrayLike,
    dimensions: int,
    *,
    discrimination_ridge: float = 1.0,
    difficulty_ridge: float = 0.1,
) -> Items:
    """Item parameters and abilities of greatest joint posterior density (MAP), by L-BFGS in float64.

    Minimises, with z_ji = a_i . g_j - b_i,

        sum_ji [log(1 + exp(z_ji)) - y_ji z_ji] + |G|^2 / 2 + r_A |A|^2 / 2 + r_B |B|^2 / 2

    that is, with independent normal priors: abilities of variance 1, discriminations of variance 1 / r_A, difficulties
    of variance 1 / r_B. The abilities are then centred, scaled and rotated, and the items against them, so that the
    bank's have mean 0, variance 1 and no correlation: no probability changes, and a standard normal prior of a new
    ability says "as the bank's". The problem is not convex; it starts from the leading singular vectors of the bank's
    residuals, so equal banks give equal items, without a seed.

    Args:
        bank: `(m, n)` of 0 and 1 (or bool): whether recipe j answered question i rightly.
        dimensions: d, at least 1, below m and at most n.
        discrimination_ridge, difficulty_ridge: r_A and r_B, above 0.

    Raises:
        ConfigError: dimensions or a ridge out of range, or too few recipes or questions for the dimensions.
        EvaluationError: another shape, no questions, or entries other than 0 and 1.

    >>> fit_items([[0, 0, 1], [0, 1, 1], [1, 1, 1]], 1).difficulty.argsort().tolist()
    [2, 1, 0]
    """
    from scipy.optimize import minimize

    y = _answers(bank, "bank", ndim=2)
    m, n = y.shape
    if dimensions < 1 or m <= dimensions or n < dimensions:
        raise ConfigError(
            f"items: {m} scored recipes and {n} questions for {dimensions} dimensions of ability (wanted at least 1 "
            "dimension, more recipes than dimensions and no fewer questions). Score more first."
        )
    _require_ridge("discrimination_ridge", discrimination_ridge)
    _require_ridge("difficulty_ridge", difficulty_ridge)

    def unpacked(x: Floats) -> tuple[Floats, Floats, Floats]:
        a, b, g = np.split(x, [dimensions * n, dimensions * n + n])
        return a.reshape(dimensions, n), b, g.reshape(m, dimensions)

    def loss(x: Floats) -> tuple[float, Floats]:
        a, b, g = unpacked(x)
        z = g @ a - b
        prior = (g**2).sum() + discrimination_ridge * (a**2).sum() + difficulty_ridge * (b**2).sum()
        residual = _sigmoid(z) - y
        slope_a = g.T @ residual + discrimination_ridge * a
        slope_b = difficulty_ridge * b - residual.sum(axis=0)
        slope_g = residual @ a.T + g
        value = _misfit(z, y) + 0.5 * float(prior)
        return value, np.concatenate([slope_a.ravel(), slope_b, slope_g.ravel()])

    options = {"maxiter": _MAX_ITERATIONS, "gtol": _GRADIENT, "ftol": 0.0}
    found = minimize(loss, _start(y, dimensions), jac=True, method="L-BFGS-B", options=options)
    return Items(*_standardised(*unpacked(found.x)))


def fit_ability(items: Items, index: npt.ArrayLike, correct: npt.ArrayLike, *, ridge: float = 1.0) -> Floats:
    """The ability of greatest posterior density given some answers of one recipe.

    Minimises sum_i [log(1 + exp(z_i)) - y_i z_i] + r |g|^2 / 2 over the observed items, with z_i = a_i . g - b_i: the
    likelihood under the prior of `fit_items`. It is strictly convex, so all answers right, or all wrong, give a finite
    ability too. The order of the items does not matter.

    Args:
        index: `(k,)` integers, the observed items S, none twice; at least one.
        correct: `(k,)` of 0 and 1 (or bool), their answers.
        ridge: r, above 0.

    Returns:
        `(d,)` float64.

    Raises:
        EvaluationError: no items, unknown or repeated ones, or answers that do not belong to them.
        ConfigError: a ridge that is not above 0.
    """
    _require_ridge("ridge", ridge)
    seen, y = observed(items, index, correct)
    return _maximum(
        items.discrimination[:, seen].T, items.difficulty[seen], y, np.zeros(items.dimensions), ridge
    )


def fit_mixture(
    items: Items, parents: npt.ArrayLike, index: npt.ArrayLike, correct: npt.ArrayLike, *, ridge: float = 1.0
) -> Floats:
    """How a merge's ability mixes those of its parents: l of g = sum_j l_j g_j, given some of its answers.

    Minimises sum_i [log(1 + exp(z_i)) - y_i z_i] + r |l - 1/m|^2 / 2 over the observed items, with
    z_i = sum_j l_j (a_i . g_j) - b_i (mp-IRT, MERGE3). Nothing holds l in [0, 1] or to a sum of 1. The paper's fit has
    no ridge; without one, answers that are all right send l to infinity.

    Args:
        parents: `(m, d)` abilities of at least two parents, from the fit of `items`.
        index, correct, ridge: as for `fit_ability`.

    Returns:
        `(m,)` float64; `l @ parents` is the ability.

    Raises:
        ConfigError: fewer than two parents, or a ridge that is not above 0. EvaluationError: abilities of another
            shape or not finite, or as `fit_ability`.
    """
    _require_ridge("ridge", ridge)
    ability = np.asarray(parents, dtype=np.float64)
    if ability.ndim != 2 or ability.shape[1] != items.dimensions or not np.isfinite(ability).all():
        raise EvaluationError(
            f"parents: abilities of shape {ability.shape} (wanted (parents, {items.dimensions}), all finite)."
        )
    m = len(ability)
    if m < 2:
        raise ConfigError(f"mp-irt: {m} parents (wanted at least 2). Use p-irt or gp-irt for a single model.")
    seen, y = observed(items, index, correct)
    design = (ability @ items.discrimination[:, seen]).T  # (k, m)
    return _maximum(design, items.difficulty[seen], y, np.full(m, 1.0 / m), ridge)


def observed(items: Items, index: npt.ArrayLike, correct: npt.ArrayLike) -> tuple[Integers, Floats]:
    """The observed items in ascending order, `(k,)` int64, and their answers, `(k,)` float64.

    Raises:
        EvaluationError: no items, unknown or repeated ones, or answers that do not belong to them.
    """
    seen = np.asarray(index)
    if seen.ndim != 1 or seen.size == 0:
        raise EvaluationError(f"observed: items of shape {seen.shape} (wanted a list of at least one).")
    if seen.dtype.kind not in "iu":
        raise EvaluationError(f"observed: items are {seen.dtype} (wanted integers).")
    unknown = (seen < 0) | (seen >= len(items))
    if unknown.any():
        raise EvaluationError(f"observed: no item {seen[unknown][0]} (wanted 0 to {len(items) - 1}).")
    order = np.argsort(seen, kind="stable")
    seen = seen[order].astype(np.int64)
    repeated = np.flatnonzero(np.diff(seen) == 0)
    if repeated.size:
        raise EvaluationError(f"observed: item {seen[repeated[0]]} occurs twice (wanted each once).")
    y = _answers(correct, "observed", ndim=1)
    if y.shape != seen.shape:
        raise EvaluationError(f"observed: {y.size} answers to {seen.size} items (wanted one each).")
    return seen, y[order]


def _start(y: Floats, dimensions: int) -> Floats:
    """Difficulties from the shares of right answers, the rest from the residuals' singular vectors.

    All zeros would be a saddle point: A and G vanish together.
    """
    m = len(y)
    share = (y.sum(axis=0) + 0.5) / (m + 1.0)
    left, size, right = np.linalg.svd(y - y.mean(axis=0), full_matrices=False)
    ability = np.sqrt(m) * left[:, :dimensions]
    # A logistic curve is four times flatter in probability than in logit at its steepest place.
    discrimination = 4.0 * size[:dimensions, None] * right[:dimensions] / np.sqrt(m)
    return np.concatenate([discrimination.ravel(), np.log1p(-share) - np.log(share), ability.ravel()])


def _standardised(a: Floats, b: Floats, g: Floats) -> tuple[Floats, Floats, Floats]:
    """The same probabilities, with abilities of mean 0, variance 1 and no correlation over the bank.

    Joint estimation leaves the scale to the priors and the sizes of bank and questions: abilities drift far above
    variance 1, and the prior of a new ability would then be too narrow.
    """
    centre = g.mean(axis=0)
    _, size, axes = np.linalg.svd(g - centre, full_matrices=False)
    spread = size / np.sqrt(len(g))
    spread = np.where(spread > _SPREAD, spread, 1.0)  # recipes that are all alike
    return spread[:, None] * (axes @ a), b - centre @ a, (g - centre) @ axes.T / spread


def _maximum(design: Floats, offset: Floats, y: Floats, centre: Floats, ridge: float) -> Floats:
    """The x of least misfit(design @ x - offset, y) + ridge |x - centre|^2 / 2, by Newton's method."""

    def loss(x: Floats) -> float:
        return _misfit(design @ x - offset, y) + 0.5 * ridge * float(((x - centre) ** 2).sum())

    x = centre
    for _ in range(_MAX_STEPS):
        p = _sigmoid(design @ x - offset)
        gradient = design.T @ (p - y) + ridge * (x - centre)
        hessian = (design.T * (p * (1.0 - p))) @ design + ridge * np.eye(x.size)
        step = np.linalg.solve(hessian, gradient)
        decrement, before, size = float(gradient @ step), loss(x), 1.0
        if decrement < _DECREMENT * (1.0 + before):
            return np.asarray(x - step)
        while loss(x - size * step) > before - 0.25 * size * decrement:  # (Armijo)
            size *= 0.5
        x = x - size * step
    return x


def _misfit(z: Floats, y: Floats) -> float:
    """Negative log-likelihood, nats. Of the logits as they are: clipped ones would have no slope to come back by."""
    return float((np.logaddexp(0.0, z) - y * z).sum())


def _sigmoid(z: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(z, -LOGIT_LIMIT, LOGIT_LIMIT))))


def _answers(value: Any, where: str, ndim: int) -> Floats:
    array = np.asarray(value)
    if array.ndim != ndim or 0 in array.shape or array.dtype.kind not in "biuf":
        wanted = "(recipes, questions)" if ndim == 2 else "(questions,)"
        raise EvaluationError(
            f"{where}: answers are {array.dtype} of shape {array.shape} (wanted 0 and 1 of shape {wanted}, not empty)."
        )
    wrong = ~((array == 0) | (array == 1))
    if wrong.any():
        raise EvaluationError(f"{where}: an answer is {array[wrong][0]} (wanted 0 or 1).")
    return array.astype(np.float64)


def _require_ridge(name: str, value: float) -> None:
    if not (0.0 < value < np.inf):
        raise ConfigError(f"{name}: found {value}, wanted a finite number above 0.")
