"""Multinomial logistic regression: the small model that chooses an author from what the checkpoints already computed.

    P(class c | x) = softmax_c(W z + b),   z = (x - mean) / scale

W and b minimise   mean log loss + penalty / 2 * |W|^2   in nats; the bias is free. The penalty is the one of least log
loss on rows that were not fitted, with all rows of a question on one side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from search.errors import ConfigError, EvaluationError

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)

_STILL = 1e-6  # spread of a feature relative to its largest magnitude; below, it is the rounding of float32
_GRADIENT = 1e-9  # of the objective, nats
_ITERATIONS = 5000

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted regression of c classes on d features; arrays are read-only.

    Attributes:
        weight: `(c, d)` float64, of standardised features. bias: `(c,)` float64; -inf for a class that no row had,
            which so has probability 0.
        mean, scale: `(d,)` float64, what the features are standardised by; scale is above 0.

    Raises:
        EvaluationError: shapes that do not fit together, or a number that is not finite.

    >>> one = Classifier(np.array([[1.0], [-1.0]]), np.zeros(2), np.array([3.0]), np.array([2.0]))
    >>> one.logits([[5.0]]).tolist()
    [[1.0, -1.0]]
    """

    weight: Floats
    bias: Floats
    mean: Floats
    scale: Floats

    def __post_init__(self) -> None:
        found = {name: np.array(value, dtype=np.float64) for name, value in self.arrays().items()}
        weight, bias, mean, scale = found.values()
        fits = weight.ndim == 2 and (bias.shape, mean.shape) == (weight.shape[:1], weight.shape[1:])
        if not fits or not weight.size:
            raise EvaluationError(
                f"classifier: weight {weight.shape}, bias {bias.shape} and mean {mean.shape} do not fit together "
                "(wanted (c, d), (c,) and (d,))."
            )
        usable = {"weight": weight, "mean": mean, "scale": scale, "bias": bias[bias != -np.inf]}
        for name, array in usable.items():
            if not np.isfinite(array).all() or not array.size:
                raise EvaluationError(f"classifier: {name} holds no number, or one that is not finite.")
        if scale.shape != mean.shape or scale.min() <= 0.0:
            raise EvaluationError(f"classifier: scale has shape {scale.shape} or is not above 0.")
        for name, array in found.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def logits(self, features: npt.ArrayLike) -> Floats:
        """`(m, c)` float64 for `(m, d)` features; their softmax are the probabilities, -inf is probability 0.

        Raises:
            EvaluationError: another number of features, or one that is not finite.
        """
        found = _features(features)
        if found.shape[1] != len(self.mean):
            raise EvaluationError(
                f"classifier: {found.shape[1]} features a row (wanted {len(self.mean)}, as it was fitted with)."
            )
        return np.asarray((found - self.mean) / self.scale @ self.weight.T + self.bias)

    def arrays(self) -> dict[str, Floats]:
        """The four arrays by name, ready for a safetensors file; `from_arrays` is the way back."""
        return {"weight": self.weight, "bias": self.bias, "mean": self.mean, "scale": self.scale}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.float64]]) -> Classifier:
        """What `arrays` gave.

        Raises:
            EvaluationError: other names, another dtype than float64, or as for the class.
        """
        wanted = ("weight", "bias", "mean", "scale")
        kinds = {name: str(np.asarray(array).dtype) for name, array in arrays.items()}
        if kinds != dict.fromkeys(wanted, "float64"):
            raise EvaluationError(f"classifier: found {kinds} (wanted float64 of {', '.join(wanted)}).")
        return cls(**arrays)


def fit_classifier(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: int,
    *,
    groups: npt.ArrayLike | None = None,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
) -> Classifier:
    """The regression of labels on features, its penalty chosen by `penalty_losses`; of equal ones the largest.

    Neither the order of the rows nor the units of a feature change it. A feature that does not vary has weight 0.

    Args:
        features: `(m, d)` finite numbers. labels: `(m,)` integers from 0 to classes - 1.
        classes: c, at least 2; a class that no row has gets probability 0.
        groups: `(m,)` integers: rows of one group, such as a question, are never fitted and held out at once. None
            makes every row a group.
        penalties: finite, above 0; with a single one nothing is held out.
        folds: parts of the groups, 2 or more. seed: of which group is in which.

    Raises:
        ConfigError: no rows, no feature that varies, rows of one class only, fewer groups than folds, or an argument
            out of its range.
        EvaluationError: shapes that do not fit together, a feature that is not finite, a label out of range.

    >>> one = fit_classifier([[0.0], [0.2], [0.8], [1.0]], [0, 0, 1, 1], 2, penalties=(1e-2,))
    >>> one.logits([[0.1], [0.9]]).argmax(axis=1).tolist()
    [0, 1]
    """
    x, y, _ = _checked(features, labels, classes, groups)
    chosen = float(penalties[0]) if len(penalties) == 1 else 0.0
    if len(penalties) != 1:
        losses = penalty_losses(
            features, labels, classes, groups=groups, penalties=penalties, folds=folds, seed=seed
        )
        chosen = max(zip(penalties, losses, strict=True), key=lambda pair: (-pair[1], pair[0]))[0]
    _check_penalties([chosen])
    return _fit(x, y, classes, [chosen])[0]


def penalty_losses(
    features: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: int,
    *,
    groups: npt.ArrayLike | None = None,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
) -> list[float]:
    """Mean log loss in nats of held-out rows under each penalty, lower is better.

    A row counts where its class is among the rows fitted; where it is not, no penalty gives it a probability.

    Args, Raises: as `fit_classifier`.
    """
    _check_penalties(penalties)
    x, y, group = _checked(features, labels, classes, groups)
    known = np.unique(group)
    if folds < 2 or len(known) < folds:
        raise ConfigError(
            f"classifier: {len(known)} groups of rows for {folds} folds (wanted 2 or more folds and no fewer groups). "
            "Collect rows from more questions, or lower the number of folds."
        )
    turn = np.random.default_rng(seed).permutation(len(known))
    fold = turn[np.searchsorted(known, group)] % folds
    total, count = np.zeros(len(penalties)), 0
    # From strong to weak, each starts where the one before ended.
    order = sorted(range(len(penalties)), key=lambda place: -penalties[place])
    for held in range(folds):
        inside, outside = fold != held, fold == held
        outside &= np.isin(y, y[inside])
        if len(np.unique(y[inside])) < 2 or not outside.any():
            continue
        fitted = _fit(x[inside], y[inside], classes, [penalties[place] for place in order])
        count += int(outside.sum())
        for place, one in zip(order, fitted, strict=True):
            logits = one.logits(x[outside])
            total[place] += float((_log_sum(logits) - logits[np.arange(len(logits)), y[outside]]).sum())
    if not count:
        raise ConfigError(
            "classifier: every fold leaves rows of one class only. Collect rows of more questions."
        )
    return [float(value) for value in total / count]


def _fit(x: Floats, y: Integers, classes: int, penalties: Sequence[float]) -> list[Classifier]:
    """One regression for each penalty; classes and features that the rows do not have get none of it."""
    from scipy.optimize import minimize

    mean = x.mean(axis=0)
    spread = x.std(axis=0)
    still = spread <= _STILL * np.abs(x).max(axis=0)
    scale = np.where(still, 1.0, spread)
    z = (x - mean) / scale
    z[:, still] = 0.0  # so its weight stays where it starts, at 0
    present = np.unique(y)
    c, d, m = len(present), x.shape[1], len(x)
    hot = (y[:, None] == present).astype(np.float64)

    def objective(flat: Floats, penalty: float) -> tuple[float, Floats]:
        weight, bias = flat[c:].reshape(c, d), flat[:c]
        logits = z @ weight.T + bias
        norm = _log_sum(logits)
        loss = float((norm - (logits * hot).sum(axis=1)).mean())
        residual = (np.exp(logits - norm[:, None]) - hot) / m
        slope = residual.T @ z + penalty * weight
        value = loss + 0.5 * penalty * float((weight**2).sum())
        return value, np.concatenate([residual.sum(axis=0), slope.ravel()])

    start = np.concatenate([np.log(hot.mean(axis=0)), np.zeros(c * d)])
    start[:c] -= start[:c].mean()  # the softmax knows differences only
    made = []
    for penalty in penalties:
        options = {"maxiter": _ITERATIONS, "maxfun": 10 * _ITERATIONS, "gtol": _GRADIENT, "ftol": 0.0}
        found = minimize(objective, start, (penalty,), jac=True, method="L-BFGS-B", options=options)
        start = found.x
        weight, bias = np.zeros((classes, d)), np.full(classes, -np.inf)
        weight[present], bias[present] = start[c:].reshape(c, d), start[:c]
        made.append(Classifier(weight, bias, mean, scale))
    return made


def _log_sum(logits: Floats) -> Floats:
    """`(m,)` logarithms of the sums of exp over `(m, c)`."""
    top = logits.max(axis=1)
    return np.asarray(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)))


def _features(features: npt.ArrayLike) -> Floats:
    found = np.asarray(features, dtype=np.float64)
    if found.ndim != 2 or not found.shape[1]:
        raise EvaluationError(f"classifier: features have shape {found.shape}, wanted (rows, features).")
    broken = ~np.isfinite(found).all(axis=1)
    if broken.any():
        raise EvaluationError(f"classifier: row {int(broken.argmax())} has a feature that is not finite.")
    return found


def _checked(
    features: npt.ArrayLike, labels: npt.ArrayLike, classes: int, groups: npt.ArrayLike | None
) -> tuple[Floats, Integers, Integers]:
    """Features, labels and groups in an order of their own, so that sums do not depend on the caller's."""
    if not len(np.asarray(labels)):
        raise ConfigError("classifier: there are no rows to fit. Lower the margin or collect more.")
    x = _features(features)
    y = _integers("labels", labels, len(x))
    if y.min() < 0 or y.max() >= classes:
        raise EvaluationError(f"classifier: labels from {y.min()} to {y.max()} (wanted 0 to {classes - 1}).")
    if y.min() == y.max():
        raise ConfigError(
            f"classifier: all {len(y)} rows are of class {y[0]} (wanted two classes or more). Lower the margin, or "
            "collect more rows: here one choice is always the best."
        )
    if (np.ptp(x, axis=0) <= _STILL * np.abs(x).max(axis=0)).all():
        raise ConfigError(f"classifier: none of {x.shape[1]} features varies from row to row. Give others.")
    group = np.arange(len(x)) if groups is None else _integers("groups", groups, len(x))
    keys = [y, *x.T[::-1]] if groups is None else [group, y, *x.T[::-1]]
    order = np.lexsort(keys)
    return x[order], y[order], np.arange(len(x)) if groups is None else group[order]


def _integers(name: str, value: npt.ArrayLike, m: int) -> Integers:
    found = np.asarray(value)
    if found.shape != (m,) or found.dtype.kind not in "iu":
        raise EvaluationError(
            f"classifier: {name} are {found.dtype} of shape {found.shape}, wanted integers of shape ({m},)."
        )
    return found.astype(np.int64)


def _check_penalties(penalties: Sequence[float]) -> None:
    if not penalties or not all(math.isfinite(one) and one > 0.0 for one in penalties):
        raise ConfigError(f"classifier: penalties are {list(penalties)} (wanted finite numbers above 0).")
