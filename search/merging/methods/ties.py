"""TIES: trim each task vector, elect a sign, merge what agrees with it (Yadav et al. 2023, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.merging.methods.checks import check_tensors, densities
from search.merging.methods.consensus import combine
from search.merging.methods.sparsify import Kept, check_ranks, kept, largest, places, task_vector


def merge_ties(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    scaling: float = 1.0,
    ranks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus `scaling` times the disjoint mean of the trimmed task vectors (algorithm 1 of the paper).

    Trim keeps of each task vector the `int(density * n)` elements of largest magnitude, at least one. Elect takes in
    each element the sign of the weighted sum (zero: positive). Merge averages the summands of that sign by their
    weights; zeros never count, and a sum of weights that is exactly zero divides by one.

    Equals mergekit 0.1.5 `ties` (`weight`, `density`, `normalize`, `rescale`, `lambda`) bit for bit in
    `dtype: float32`, but for the choice among elements of equal magnitude at the limit: here the first ones
    in memory, there whatever `torch.argsort` puts first on that machine. With ranks of `stable=False` that is
    equal, too.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, any finite number.
        density: above 0, at most 1, where 1 keeps all; one for all or one per expert.
        normalize: divide each element by the weights that count in it, the paper's mean; else the sum.
        rescale: restore the sum of magnitudes that trimming took.
        scaling: the paper's and mergekit's `lambda`, any finite number.
        ranks: `magnitude_ranks(task_vector(base, expert), descending=True)` of each expert, which spares the
            selection.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number out of its range.
    """
    check_tensors(base, experts)
    shares, known = densities(density, experts), check_ranks(ranks, base, experts)
    trimmed = [_trim(base, *one, rescale) for one in zip(experts, shares, known, strict=True)]
    return combine(base, experts, weights, trimmed, elect=True, normalize=normalize, scaling=scaling)


def _trim(
    base: torch.Tensor, expert: torch.Tensor, density: float, ranks: torch.Tensor | None, rescale: bool
) -> Kept | None:
    if density == 1.0 or not base.numel():
        return None
    count = max(1, int(density * base.numel()))
    if ranks is None:
        return kept(base, expert, largest(task_vector(base, expert), count), rescale)
    return kept(base, expert, places(ranks, 0, count), rescale)
