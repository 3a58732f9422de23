"""DARE: drop elements of the task vectors at random and rescale the rest (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.merging.methods.checks import check_tensors, densities
from search.merging.methods.consensus import combine
from search.merging.methods.sparsify import Kept, kept, uniform_draws


def merge_dare_linear(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    rescale: bool = True,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Base plus `scaling * sum_k w_k s_k m_k (e_k - base)` with random masks m_k: drop and rescale.

    Every element of every task vector is kept with probability `density`, on its own. The paper divides what is left
    by `density`, which keeps the expected value; mergekit, and so `rescale` here, restores the sum of magnitudes:
    s_k is the quotient of that sum before and after, nearly the same for a large tensor.

    Equals mergekit 0.1.5 `dare_linear` (`weight`, `density`, `normalize`, `rescale`, `lambda`) bit for bit in
    `dtype: float32` on one thread, if the generator stands where torch's own would (`mask_order.py`).

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, any finite number.
        density: above 0, at most 1; one for all or one per expert.
        generator: moves on by one number for each element of each expert, in order; a density of 1 draws nothing.
        normalize: divide the sum by the sum of the weights, unless that is below 1e-8 in magnitude.
        rescale: restore the sum of magnitudes; else s_k is 1.
        scaling: mergekit's `lambda`, any finite number.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number out of its range.
    """
    masks = _drop(base, experts, density, rescale, generator)
    return combine(base, experts, weights, masks, elect=False, normalize=normalize, scaling=scaling)


def merge_dare_ties(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float],
    generator: torch.Generator,
    normalize: bool = False,
    rescale: bool = True,
    scaling: float = 1.0,
) -> torch.Tensor:
    """Base plus what the randomly dropped task vectors agree on: `merge_dare_linear` with the sign election of TIES.

    Equals mergekit 0.1.5 `dare_ties` under the same conditions. Arguments, result and errors are those of
    `merge_dare_linear`; `normalize` divides each element by the weights that count in it, as in `merge_ties`.
    """
    masks = _drop(base, experts, density, rescale, generator)
    return combine(base, experts, weights, masks, elect=True, normalize=normalize, scaling=scaling)


def _drop(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    density: float | Sequence[float],
    rescale: bool,
    generator: torch.Generator,
) -> list[Kept | None]:
    check_tensors(base, experts)
    masks: list[Kept | None] = []
    for expert, share in zip(experts, densities(density, experts), strict=True):
        if share == 1.0:
            masks.append(None)
            continue
        mask = uniform_draws(base.shape, generator).lt_(share).to(base.device)
        masks.append(kept(base, expert, mask, rescale))
    return masks
