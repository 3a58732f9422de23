"""TSV-Merge: singular vectors of the task vectors, made orthogonal (Gargiulo et al. 2025, arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from search.errors import MergeError
from search.merging.methods.checks import check_tensors, per_expert
from search.merging.methods.consensus import add_directions
from search.merging.methods.sparsify import task_vector

_TINY = 1e-10  # squared length of a direction, among unit vectors, that counts as none


def merge_tsv(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    directions: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Base plus `sum_k w_k D_k`, the directions D_k being those of `tsv_directions`.

    Weights of 1 give the method as published. A weight scales the singular values of its expert; an expert of
    weight 0 still takes its part of the rank, and the others stay orthogonal to it. No mergekit method.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.
        weights: one per expert, any finite number.
        directions: `tsv_directions(base, experts)`; computed once, they leave a weighted sum to do.

    Returns:
        float32 tensor `(...)`.

    Raises:
        MergeError: no experts, another number of weights, tensors that differ, a number that is not finite.
    """
    check_tensors(base, experts)
    found = tsv_directions(base, experts) if directions is None else directions
    return add_directions(base, found, per_expert(list(weights), experts, "weight"))


@torch.no_grad()
def tsv_directions(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One direction for each of K experts: `D_k = A_k S_k B_k'`, its task vector with orthogonalised singular vectors.

    Of a matrix `(m, n)` each task vector `U S V'` keeps its first `min(m, n) // K` singular triplets (at
    least one). The kept U of all experts side by side, `(m, r)`, are replaced by their nearest orthonormal
    columns (the polar factor), the kept V likewise; A_k and B_k are the parts of expert k. One expert gives
    its task vector. Of any other shape: `D_k = (e_k - base) / K`, the plain mean.

    Where the paper leaves a choice to the linear algebra package, this does not depend on it: a zero task
    vector is no expert (its direction is zero, K counts the others), a singular value of zero no triplet, and
    where the side by side columns are linearly dependent, as with equal experts, the polar factor is the
    partial isometry. Equal experts thus give their common task vector, truncated. The reference takes
    embeddings and heads by the plain mean as well, which is for the caller to do.

    Args:
        base, experts: tensors `(...)` of one shape and one dtype, float32, bfloat16 or float16; not changed.

    Returns:
        K float32 tensors `(...)`, computed in float64.

    Raises:
        MergeError: no experts, tensors that differ, or a task vector that is not finite.
    """
    check_tensors(base, experts)
    vectors = [task_vector(base, expert) for expert in experts]
    if base.dim() != 2 or not base.numel():
        return [vector / len(vectors) for vector in vectors]
    found = [torch.zeros_like(vector) for vector in vectors]
    active = [k for k, vector in enumerate(vectors) if vector.count_nonzero()]
    if not active:
        return found
    rank = max(1, min(base.shape) // len(active))
    parts = [_triplets(vectors[k], rank) for k in active]
    left = _polar(torch.cat([u for u, _, _ in parts], dim=1))
    right = _polar(torch.cat([v for _, _, v in parts], dim=1))
    at = 0
    for k, (_, s, _) in zip(active, parts, strict=True):
        own = slice(at, at + len(s))
        found[k] = ((left[:, own] * s) @ right[:, own].T).float()
        at += len(s)
    return found


def _triplets(vector: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U `(m, r)`, S `(r,)` and V `(n, r)` of the largest singular values, at most `rank`, none of them zero."""
    if not bool(vector.isfinite().all()):
        raise MergeError("merge: a task vector is not finite, so it has no singular values.")
    u, s, vh = torch.linalg.svd(vector.double(), full_matrices=False)
    count = min(rank, int((s > s[0] * max(vector.shape) * torch.finfo(torch.float32).eps).sum()))
    return u[:, :count], s[:count], vh[:count].T


def _polar(columns: torch.Tensor) -> torch.Tensor:
    """`C (C'C)^(-1/2)`, the columns that are orthonormal and nearest to C; directions that C lacks stay zero."""
    values, basis = torch.linalg.eigh(columns.T @ columns)
    roots = torch.where(values > _TINY, values.clamp(min=_TINY).rsqrt(), 0.0)
    polar: torch.Tensor = columns @ (basis * roots) @ basis.T
    return polar
