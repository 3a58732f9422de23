"""The front: dominance, hypervolume, picking a point. Plain float arrays, never Optuna objects.

`points` is `(n, m)`: n trials, m objectives. `maximise` has one bool per objective and is always given. A row
with NaN or an infinity counts as not measured: never on the front, dominating nothing, never picked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from search.errors import ConfigError, EvaluationError

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

_TIE = 1e-9  # shares of the front's range that differ by less are equal: rounding must not pick a trial


def non_dominated(points: npt.ArrayLike, *, maximise: Sequence[bool]) -> Booleans:
    """`(n,)` True where no other point is at least as good in every objective and better in one.

    Exact duplicates stay together: all on the front, or none. O(n log n) for m = 2, else O(n * front).

    >>> non_dominated([[0.5, 0.1], [0.6, 0.2], [0.4, 0.2]], maximise=(True, False)).tolist()
    [True, True, False]
    """
    loss = _losses(points, maximise)
    keep: Booleans = np.asarray(np.isfinite(loss).all(axis=1))
    unique, inverse = np.unique(loss[keep], axis=0, return_inverse=True)  # lexicographically ascending
    keep[keep] = _front_of_sorted(unique)[inverse.ravel()]
    return keep


def hypervolume(points: npt.ArrayLike, ref: npt.ArrayLike, *, maximise: Sequence[bool]) -> float:
    """Volume that the points dominate up to the reference point; exact for any m; higher is better.

    Points that are not strictly better than `ref` in every objective add nothing. No points: 0.

    Two objectives are one sorted sweep, of all resamples at once; more are moocore's (Fonseca et al. 2006).

    Raises:
        ValueError: shapes disagree, or the reference point is not finite.

    >>> hypervolume([[0.5, 0.1], [0.6, 0.3]], [0.0, 1.0], maximise=(True, False))
    0.52
    """
    values = np.asarray(points, dtype=np.float64)
    values = values.reshape(0, len(maximise)) if values.size == 0 else values
    return float(hypervolume_batch(values[None], ref, maximise=maximise)[0])


def worst_corner(points: npt.ArrayLike, *, maximise: Sequence[bool]) -> Floats:
    """The worst value of each objective over `(n, m)` points: `(m,)`, a reference point for `hypervolume`.

    >>> worst_corner([[0.5, 0.1], [0.6, 0.3]], maximise=(True, False)).tolist()
    [0.5, 0.3]
    """
    values = np.asarray(points, dtype=np.float64)
    return np.asarray(np.where(maximise, values.min(axis=0), values.max(axis=0)))


def hypervolume_batch(points: npt.ArrayLike, ref: npt.ArrayLike, *, maximise: Sequence[bool]) -> Floats:
    """`(b,)` hypervolumes of `(b, n, m)` points, one per bootstrap resample; rules as for `hypervolume`."""
    stack = np.asarray(points, dtype=np.float64)
    if stack.ndim != 3:
        raise ValueError(f"points have shape {stack.shape[1:]}, wanted (n, {len(maximise)})")
    b, n, m = stack.shape
    loss = _losses(stack.reshape(b * n, m), maximise).reshape(b, n, m)
    limit = _losses(np.asarray(ref, dtype=np.float64)[None], maximise)[0]
    if not np.isfinite(limit).all():
        raise ValueError(f"the reference point is {limit.tolist()}, wanted finite numbers")
    with np.errstate(invalid="ignore"):
        inside = (np.isfinite(loss) & (loss < limit)).all(axis=2)
    if m > 2:
        return np.array([_volume(rows[use], limit) for rows, use in zip(loss, inside, strict=True)])
    loss = np.where(inside[:, :, None], loss, limit)  # a point moved onto the reference point has no volume
    if m == 1:
        return np.asarray(limit[0] - loss[:, :, 0].min(axis=1, initial=limit[0]))
    return _sweep(loss, limit)


def knee(points: npt.ArrayLike, *, maximise: Sequence[bool]) -> int:
    """Index of the front's knee: the point that gains most over a straight trade-off.

    Each objective is scaled over the front's range to 0 (worst) .. 1 (best); the knee has the largest sum.
    For two objectives that is the point farthest, on the good side, from the chord between the two extreme
    points (Das 1999); for more it is the same distance, to the plane sum = 1. On a front that bends inwards
    everywhere an extreme point wins. An objective that does not vary on the front does not count.

    Ties (within 1e-9 of the range): the point whose worst scaled objective is best; then the better first
    objective, second, ...; then the lowest index.

    Raises:
        EvaluationError: no point is finite.

    >>> knee([[0.0, 0.0], [0.8, 0.3], [1.0, 1.0]], maximise=(True, False))
    1
    """
    return _pick(points, np.ones(len(maximise)), maximise)


def prefer(points: npt.ArrayLike, weights: Sequence[float], *, maximise: Sequence[bool]) -> int:
    """Index of the front's point with the largest weighted sum of objectives scaled over the front's range.

    Each objective is scaled to 0 (worst on the front) .. 1 (best). A weight says how much the whole range
    of that objective on the front is worth; only ratios of weights matter. Equal weights give the knee;
    ties as there. A point where the front bends inwards is never the answer.

    Raises:
        ConfigError: not one weight per objective, a weight that is negative or not finite, or all 0.
        EvaluationError: no point is finite.
    """
    values = np.asarray(weights, dtype=np.float64)
    m = len(maximise)
    if values.shape != (m,) or not (np.isfinite(values).all() and values.min() >= 0.0 and values.max() > 0.0):
        raise ConfigError(
            f"prefer: weights are {list(weights)} (wanted {m} numbers of 0 or more, not all 0)."
        )
    return _pick(points, values, maximise)


def best(points: npt.ArrayLike, j: int, *, maximise: Sequence[bool]) -> int:
    """Index of the front's point with the best value of objective j; ties as for `knee`.

    Raises:
        EvaluationError: no point is finite.
    """
    return prefer(points, np.eye(len(maximise))[j].tolist(), maximise=maximise)


def _losses(points: npt.ArrayLike, maximise: Sequence[bool]) -> Floats:
    """The points as `(n, m)` values to minimise."""
    values = np.asarray(points, dtype=np.float64)
    m = len(maximise)
    if m == 0 or (values.shape != (0,) and (values.ndim != 2 or values.shape[1] != m)):
        raise ValueError(f"points have shape {values.shape}, wanted (n, {m}), a column per entry of maximise")
    sign = np.where(np.asarray(maximise, dtype=bool), -1.0, 1.0)
    return values.reshape(-1, m) * sign + 0.0  # + 0.0: no negative zeros


def _front_of_sorted(unique: Floats) -> Booleans:
    """`(n,)` front of distinct points in ascending lexicographic order."""
    n, m = unique.shape
    front = np.zeros(n, dtype=bool)
    if m == 2:
        front[:1] = True
        front[1:] = unique[1:, 1] < np.minimum.accumulate(unique[:, 1])[:-1]
        return front
    left = np.arange(n)
    while left.size:  # the first one left is dominated by nothing: its dominators would come before it
        front[left[0]] = True
        left = left[(unique[left] < unique[left[0]]).any(axis=1)]
    return front


def _sweep(loss: Floats, limit: Floats) -> Floats:
    """`(b,)` areas of `(b, n, 2)` points, none beyond `limit`."""
    order = np.argsort(loss[:, :, 0], axis=1, kind="stable")
    x = np.take_along_axis(loss[:, :, 0], order, axis=1)
    height = limit[1] - np.minimum.accumulate(np.take_along_axis(loss[:, :, 1], order, axis=1), axis=1)
    width = np.diff(x, axis=1, append=limit[0])
    return np.asarray((width * height).sum(axis=1))


def _volume(loss: Floats, limit: Floats) -> float:
    """Volume of `(n, m)` points that are strictly inside `limit`."""
    import moocore

    return float(moocore.hypervolume(np.unique(loss, axis=0), ref=limit)) if len(loss) else 0.0


def _pick(points: npt.ArrayLike, weights: Floats, maximise: Sequence[bool]) -> int:
    on_front = np.flatnonzero(non_dominated(points, maximise=maximise))
    if on_front.size == 0:
        raise EvaluationError("front: no trial has finite objectives, so there is no point to pick.")
    loss = _losses(points, maximise)[on_front]
    span = np.ptp(loss, axis=0)
    gain = np.where(span > 0.0, (loss.max(axis=0) - loss) / np.where(span > 0.0, span, 1.0), 0.0)
    candidates = np.arange(on_front.size)
    varying = span > 0.0
    keys = [gain @ (weights / weights.sum()), gain[:, varying].min(axis=1, initial=1.0), *gain.T]
    for key in keys:
        candidates = candidates[key[candidates] >= key[candidates].max() - _TIE]
    return int(on_front[candidates[0]])
