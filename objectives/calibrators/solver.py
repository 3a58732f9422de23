"""The temperature of least loss, between 2^-10 and 2^10."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TEMPERATURES = tuple(float(t) for t in 2.0 ** (np.arange(-40, 41) / 4.0))  # four an octave, 1 among them
FLAT = 1e-12  # nats; a loss that varies less over all temperatures tells nothing about them

Loss = Callable[[float], float]
Curve = tuple[tuple[float, float], ...]


class Minimum(NamedTuple):
    """Where a loss is least.

    Attributes:
        temperature: its place; 1.0 where the loss is flat.
        curve: (temperature, loss) in ascending order: every fourth of an octave, and the place itself.
        reason: None, or why the place is no minimum in the inside of the range.
    """

    temperature: float
    curve: Curve
    reason: str | None


def stationary_point(loss: Loss, slope: Loss) -> Minimum:
    """The minimum of a loss that is convex in beta = 1 / temperature, as the root of its derivative.

    Args:
        loss: loss at a temperature, nats.
        slope: d loss / d beta at a temperature; never increasing in the temperature.

    The relative error is that of the slope's rounding, below 1e-9 for logits of ordinary spread.
    """
    from scipy.optimize import brentq

    curve = [(t, loss(t)) for t in TEMPERATURES]
    if _flat(curve):
        return _kept(curve)
    low, high = TEMPERATURES[0], TEMPERATURES[-1]
    if slope(low) <= 0.0:
        return _at_edge(curve, low)
    if slope(high) >= 0.0:
        return _at_edge(curve, high)
    root = brentq(lambda s: slope(math.exp(s)), math.log(low), math.log(high), xtol=1e-13)
    return _inside(curve, math.exp(root), loss)


def grid_minimum(loss: Loss) -> Minimum:
    """The minimum of any smooth loss: the best of `TEMPERATURES`, refined between its neighbours (Brent).

    The relative error is about 1e-6 for losses of ordinary curvature: that is where values of the loss differ by less
    than float64 can tell. A valley narrower than a fourth of an octave can be missed.
    """
    from scipy.optimize import minimize_scalar

    curve = [(t, loss(t)) for t in TEMPERATURES]
    if _flat(curve):
        return _kept(curve)
    best = min(range(len(curve)), key=lambda i: (curve[i][1], abs(math.log(curve[i][0]))))
    if best in (0, len(curve) - 1):
        return _at_edge(curve, curve[best][0])
    bounds = (math.log(curve[best - 1][0]), math.log(curve[best + 1][0]))
    found = minimize_scalar(
        lambda s: loss(math.exp(s)), bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    return _inside(curve, math.exp(float(found.x)), loss)


def _flat(curve: list[tuple[float, float]]) -> bool:
    values = [value for _, value in curve]
    return max(values) - min(values) <= FLAT


def _kept(curve: list[tuple[float, float]]) -> Minimum:
    return Minimum(1.0, tuple(curve), "the loss is the same at every temperature, so 1 is kept")


def _at_edge(curve: list[tuple[float, float]], temperature: float) -> Minimum:
    side = "smallest" if temperature < 1.0 else "largest"
    return Minimum(
        temperature,
        tuple(curve),
        f"the loss falls up to the {side} temperature tried ({temperature:g}): no finite optimum",
    )


def _inside(curve: list[tuple[float, float]], temperature: float, loss: Loss) -> Minimum:
    merged = {**dict(curve), temperature: loss(temperature)}
    return Minimum(temperature, tuple(sorted(merged.items())), None)
