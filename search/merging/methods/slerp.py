"""Spherical interpolation: one tensor moves along the arc between its parents, as mergekit's `slerp` does.

With the angle w between the parents (as flat vectors) the weights are sin((1-c) w) / sin w and
sin(c w) / sin w. The angle depends on the parents alone, so it is measured once; after that a slerp is a
weighted sum like any other.
"""

from __future__ import annotations

import math

import torch

from search.merging.methods.linear import linear_weights

PARALLEL = 0.9995  # above this |cos| the arc is a line: its formula divides by almost zero
_TINY = 1e-8  # a norm below this has no direction
_CHUNK = 2**20


def angle(pre: torch.Tensor, post: torch.Tensor) -> float | None:
    """Angle between two tensors in radians, from float64 sums. Symmetric; the tensors are not changed.

    Returns None, meaning "merge linearly", when |cos| > 0.9995 (parallel or opposite, so also equal parents)
    or when a norm is at most 1e-8 (an all-zero or empty tensor).
    """
    dot = square_a = square_b = 0.0
    flat_a, flat_b = pre.detach().reshape(-1), post.detach().reshape(-1)
    for start in range(0, flat_a.numel(), _CHUNK):
        a, b = (flat[start : start + _CHUNK].double() for flat in (flat_a, flat_b))
        dot += float(torch.dot(a, b))
        square_a += float(torch.dot(a, a))
        square_b += float(torch.dot(b, b))
    norm_a, norm_b = math.sqrt(square_a), math.sqrt(square_b)
    if norm_a <= _TINY or norm_b <= _TINY:
        return None
    cosine = dot / norm_a / norm_b
    return None if abs(cosine) > PARALLEL else math.acos(cosine)


def slerp_weights(coefficient: float, omega: float | None) -> tuple[float, ...]:
    """Weights of `pre` and `post` at a coefficient; `omega` is what `angle` gave.

    0 gives exactly (1, 0) and 1 exactly (0, 1); outside [0, 1] the arc goes on.

    >>> [round(w, 4) for w in slerp_weights(0.5, math.pi / 2)]
    [0.7071, 0.7071]
    """
    if omega is None:
        return linear_weights([coefficient])
    scale = math.sin(omega)
    return math.sin((1.0 - coefficient) * omega) / scale, math.sin(coefficient * omega) / scale
