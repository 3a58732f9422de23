"""DELLA: drop at random, the small elements of a row more often (Deep et al. 2024, arXiv 2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors, densities, per_expert
from search.merging.methods.consensus import combine
from search.merging.methods.sparsify import (
    Kept,
    check_ranks,
    kept,
    magnitude_ranks,
    row_view,
    task_vector,
    uniform_draws,
)


def merge_della(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float],
    generator: torch.Generator,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    scaling: float = 1.0,
    ranks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus what the pruned task vectors agree on: drop (MAGPRUNE), elect, fuse.

    The element of rank r among the n of its row (0 is the smallest magnitude; a vector is one row) is kept
    with probability `density - epsilon + 2 epsilon r / (n - 1)`, so a row keeps `density` on average; the
    only element of a row with probability `density`, where mergekit stops. The paper divides each element by
    its own probability; mergekit, and so `rescale` here, restores the sum of magnitudes of the whole tensor.

    Equals mergekit 0.1.5 `della` (`weight`, `density`, `epsilon`, `normalize`, `rescale`, `lambda`) bit for bit in
    `dtype: float32` on one thread, if the generator stands where torch's own would (`mask_order.py`), but for the
    ranks of equal magnitudes, here in the order of positions; with ranks of `stable=False` those are equal, too.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed. Rows
            lie in dimension 1.
        weights: one per expert, any finite number.
        density: above 0, at most 1, where 1 keeps all; one for all or one per expert.
        generator: moves on by one number for each element of each expert, in order; a density of 1 draws nothing.
        epsilon: at least 0, with `density - epsilon` and `density + epsilon` between 0 and 1 (unless density is 1);
            one for all or one per expert.
        normalize: divide each element by the weights that count in it, as in `merge_ties`.
        rescale: restore the sum of magnitudes.
        scaling: the paper's and mergekit's `lambda`, any finite number.
        ranks: `magnitude_ranks(task_vector(base, expert), rows=True)` of each expert, which spares the sorting.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number out of its range.
    """
    masks = _prune(base, experts, density, epsilon, rescale, generator, ranks)
    return combine(base, experts, weights, masks, elect=True, normalize=normalize, scaling=scaling)


def merge_della_linear(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float | Sequence[float],
    generator: torch.Generator,
    epsilon: float | Sequence[float] = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    scaling: float = 1.0,
    ranks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus the weighted sum of the pruned task vectors: `merge_della` without the election.

    Equals mergekit 0.1.5 `della_linear` under the same conditions. Arguments, result and errors are those of
    `merge_della`; `normalize` divides by the sum of the weights, unless that is below 1e-8 in magnitude.
    """
    masks = _prune(base, experts, density, epsilon, rescale, generator, ranks)
    return combine(base, experts, weights, masks, elect=False, normalize=normalize, scaling=scaling)


def _prune(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    density: float | Sequence[float],
    epsilon: float | Sequence[float],
    rescale: bool,
    generator: torch.Generator,
    ranks: Sequence[torch.Tensor] | None,
) -> list[Kept | None]:
    check_tensors(base, experts)
    shares = densities(density, experts)
    spreads = per_expert(epsilon, experts, "epsilon")
    for share, spread in zip(shares, spreads, strict=True):
        if share < 1.0 and not (spread >= 0.0 and share - spread > 0.0 and share + spread < 1.0):
            raise MergeError(
                f"merge: epsilon {spread} at density {share} "
                "(wanted at least 0, and density - epsilon and density + epsilon between 0 and 1)."
            )
    masks: list[Kept | None] = []
    known = check_ranks(ranks, base, experts)
    for expert, share, spread, rank in zip(experts, shares, spreads, known, strict=True):
        if share == 1.0:
            masks.append(None)
            continue
        if rank is None:
            rank = magnitude_ranks(task_vector(base, expert), rows=True)
        chance = _probabilities(rank, share, spread).to(generator.device)
        mask = uniform_draws(base.shape, generator).lt_(chance).to(base.device)
        masks.append(kept(base, expert, mask, rescale))
    return masks


def _probabilities(ranks: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    last = row_view(ranks).shape[1] - 1 if ranks.numel() else 0
    if last < 1:
        return torch.full(ranks.shape, density)
    # Each operation rounds to float32, in this order.
    return ranks.float().div_(last).mul_(2.0 * epsilon).add_(density - epsilon)
