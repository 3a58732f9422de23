"""A block as a function of weights and inputs, and how far the outputs of two versions of it are from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch.func import functional_call
from torch.nn import functional

from search.merging.anchors.options import Distance

Weights: TypeAlias = Mapping[str, torch.Tensor]  # name of a parameter of the block -> tensor


def call(block: torch.nn.Module, weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """What the block makes of inputs `(n, ...)` with these weights in the place of all its own."""
    outputs: torch.Tensor = functional_call(block, dict(weights), (inputs,), tie_weights=False)
    return outputs


def distances(found: torch.Tensor, wanted: torch.Tensor, kind: Distance) -> torch.Tensor:
    """The distance of each anchor's output, 0 for equal ones; lower is better.

    Args:
        found, wanted: `(n, ...)` of one shape, of which everything after n is taken as one long vector.
        kind: `cosine` 1 - cos, `squared` half the squared Euclidean length, `l1` the sum of absolute values.

    Returns:
        `(n,)`, differentiable twice. An output of zeros has cosine 0 to any other. NaN stays NaN.
    """
    a, b = found.flatten(1), wanted.flatten(1)
    if kind == "cosine":
        return 1 - functional.cosine_similarity(a, b, dim=1)
    if kind == "squared":
        return 0.5 * (a - b).square().sum(1)
    return (a - b).abs().sum(1)
