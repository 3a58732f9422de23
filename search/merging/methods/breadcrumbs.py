"""Model Breadcrumbs: keep the middle magnitudes of a task vector (Davari and Belilovsky 2023, arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors, densities, per_expert
from search.merging.methods.consensus import combine
from search.merging.methods.sparsify import Kept, check_ranks, kept, places, smallest, task_vector


def merge_breadcrumbs(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    scaling: float = 1.0,
    ranks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus `scaling * sum_k w_k m_k (e_k - base)`, m_k without the largest and the smallest.

    Of n elements in the order of their magnitudes, `int(gamma * n)` are dropped at the upper end and as many at the
    lower one that `int(density * n)` are left, which may be none. Where `gamma + density` exceeds 1, fewer are
    dropped above; a density of 1 keeps all.

    Equals mergekit 0.1.5 `breadcrumbs` (`weight`, `density`, `gamma`, `normalize`, `rescale`, `lambda`) bit for bit
    in `dtype: float32`, but for the choice among elements of equal magnitude at the limits: here by position, there
    whatever `torch.sort` does on that machine. With ranks of `stable=False` that is equal, too.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, any finite number.
        density: above 0, at most 1; one for all or one per expert.
        gamma: share of outliers, at least 0 and below 1; one for all or one per expert.
        normalize: divide the sum by the sum of the weights, unless that is below 1e-8 in magnitude.
        rescale: restore the sum of magnitudes.
        scaling: mergekit's `lambda`, any finite number.
        ranks: `magnitude_ranks(task_vector(base, expert))` of each expert, which spares the selection.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number out of its range.
    """
    masks = _mask(base, experts, density, gamma, rescale, ranks)
    return combine(base, experts, weights, masks, elect=False, normalize=normalize, scaling=scaling)


def merge_breadcrumbs_ties(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float] = 1.0,
    gamma: float | Sequence[float] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    scaling: float = 1.0,
    ranks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus what the middle magnitudes agree on: `merge_breadcrumbs` with the sign election of TIES.

    Equals mergekit 0.1.5 `breadcrumbs_ties` under the same conditions. Arguments, result and errors are those of
    `merge_breadcrumbs`; `normalize` divides each element by the weights that count in it, as in `merge_ties`.
    """
    masks = _mask(base, experts, density, gamma, rescale, ranks)
    return combine(base, experts, weights, masks, elect=True, normalize=normalize, scaling=scaling)


def _mask(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    density: float | Sequence[float],
    gamma: float | Sequence[float],
    rescale: bool,
    ranks: Sequence[torch.Tensor] | None,
) -> list[Kept | None]:
    check_tensors(base, experts)
    shares, outliers = densities(density, experts), per_expert(gamma, experts, "gamma")
    if not all(0.0 <= outlier < 1.0 for outlier in outliers):
        raise MergeError(f"merge: gamma is {outliers} (wanted at least 0 and below 1).")
    masks: list[Kept | None] = []
    known = check_ranks(ranks, base, experts)
    for expert, share, outlier, rank in zip(experts, shares, outliers, known, strict=True):
        if share == 1.0:
            masks.append(None)
            continue
        size, count = base.numel(), int(share * base.numel())
        low = max(0, size - count - int(outlier * size))
        if rank is None:
            vector = task_vector(base, expert)
            mask = smallest(vector, low + count).sub_(smallest(vector, low))
        else:
            mask = places(rank, low, low + count)
        masks.append(kept(base, expert, mask, rescale))
    return masks
