"""Which elements of a task vector are kept: the largest, a band of magnitudes, or random ones.

Magnitudes are compared as the integers that their bits are, which have the same order. Among equal magnitudes
the position decides, so that the choice is the same on every machine. mergekit leaves that choice to
`torch.argsort`, whose vectorised sorting orders equal values by the instructions that a processor has;
`magnitude_ranks(..., stable=False)` gives its order on this machine. It matters: the differences of bfloat16 parents
are full of equal magnitudes, and in a TIES merge of such parents up to a tenth of the elements hangs on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from search.errors import MergeError

Keys = npt.NDArray[np.int32]
_TINY = 1e-7  # a norm below this is not restored
_SAMPLE = 4096


@dataclass(frozen=True)
class Kept:
    """The elements that a sparsified task vector keeps, and the factor on them.

    Attributes:
        mask: float32 `(...)` of zeros and ones, with which torch multiplies faster than with truth values.
        scale: 1.0, or what restores the sum of magnitudes (`kept`).
    """

    mask: torch.Tensor
    scale: float = 1.0


def task_vector(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """`expert - base` in float32 `(...)`."""
    return expert.float() - base.float()


def kept(base: torch.Tensor, expert: torch.Tensor, mask: torch.Tensor, rescale: bool) -> Kept:
    """The mask with the scale that belongs to it: if `rescale`, the sum of magnitudes before over that after; else 1.

    A sum below 1e-7, before or after, is left as it is. The sums are float32 sums of the whole task vector, as
    torch makes them; with several threads their last bits depend on the number of threads.
    """
    if not rescale:
        return Kept(mask)
    vector = task_vector(base, expert)
    before, after = vector.abs().sum(), (vector * mask).abs_().sum()
    if before < _TINY or after < _TINY:
        return Kept(mask)
    return Kept(mask, float(before / after))


def largest(vector: torch.Tensor, count: int) -> torch.Tensor:
    """Mask `(...)`, ones for the `count` elements of largest magnitude; among equal ones the first."""
    return _first(-_keys(vector), count).reshape(vector.shape).to(vector.device)


def smallest(vector: torch.Tensor, count: int) -> torch.Tensor:
    """Mask `(...)`, ones for the `count` elements of smallest magnitude; among equal ones the first."""
    return _first(_keys(vector), count).reshape(vector.shape).to(vector.device)


def uniform_draws(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Uniform float32 numbers in [0, 1) `(...)`, one step of the generator each, in the order of the elements.

    `draws < p` is bit for bit what `torch.bernoulli` gives at probability p, three times as fast.
    """
    return torch.rand(shape, generator=generator, device=generator.device)


def places(ranks: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Mask `(...)` of zeros and ones for the ranks from `low` up to but not including `high`."""
    mask = torch.lt(ranks, high, out=torch.empty(ranks.shape, device=ranks.device))
    return mask.sub_(torch.lt(ranks, low, out=torch.empty_like(mask))) if low else mask


def magnitude_ranks(
    vector: torch.Tensor, *, descending: bool = False, rows: bool = False, stable: bool = True
) -> torch.Tensor:
    """Position of every element in the order of magnitudes, int32 `(...)`, 0 the first.

    It depends on the task vector alone: computed once, it spares every later merge its sorting.

    Args:
        vector: float32 `(...)`.
        descending: the largest first.
        rows: an order for each row (dimension 1, of a tensor with several) instead of one for the tensor.
        stable: equal magnitudes in the order of their positions; else in the order that `torch.argsort` gives on
            this machine, which is mergekit's.
    """
    table = row_view(vector) if rows else vector.reshape(1, -1)
    if not stable:
        return _ranks_of_torch(table, descending).reshape(vector.shape)
    lines = table.movedim(1, -1)
    bits = _keys(lines).astype(np.int64).reshape(lines.shape)
    # Sorting keys that end in their own position is far faster than sorting indices, and stable.
    keys = ((-bits if descending else bits) << 32) + np.arange(table.shape[1])
    keys.sort(axis=-1)
    ranks = np.empty(lines.shape, dtype=np.int32)
    spread = np.broadcast_to(np.arange(table.shape[1], dtype=np.int32), lines.shape)
    np.put_along_axis(ranks, keys & 0xFFFFFFFF, spread, axis=-1)
    return torch.from_numpy(ranks).movedim(-1, 1).to(vector.device).reshape(vector.shape)


def row_view(vector: torch.Tensor) -> torch.Tensor:
    """The tensor with its rows in dimension 1; a vector is one row."""
    return vector if vector.dim() > 1 else vector.reshape(1, -1)


def check_ranks(
    ranks: Sequence[torch.Tensor] | None, base: torch.Tensor, experts: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The ranks of each expert, or None for each; refuses another number, shape or dtype of them."""
    if ranks is None:
        return [None] * len(experts)
    for one in ranks:
        if one.shape != base.shape or one.dtype != torch.int32:
            raise MergeError(
                f"merge: ranks {tuple(one.shape)} {one.dtype} for tensors {tuple(base.shape)} "
                "(wanted the same shape, int32)."
            )
    if len(ranks) != len(experts):
        raise MergeError(
            f"merge: {len(ranks)} tensors of ranks for {len(experts)} experts. Give one for each."
        )
    return list(ranks)


def _ranks_of_torch(table: torch.Tensor, descending: bool) -> torch.Tensor:
    order = torch.argsort(table.abs(), dim=1, descending=descending)
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=order.device)
    spread = positions.reshape(1, -1, *[1] * (order.dim() - 2)).expand(order.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, spread)


def _keys(vector: torch.Tensor) -> Keys:
    """Integers in the order of the magnitudes, flat; NaN above infinity, as torch sorts it."""
    magnitudes = vector.detach().abs().reshape(-1).cpu()
    found: Keys = magnitudes.view(torch.int32).numpy()
    return found


def _first(keys: Keys, count: int) -> torch.Tensor:
    """Mask of the `count` smallest keys; among equal ones the first."""
    if count <= 0 or count >= keys.size:
        return torch.full((keys.size,), float(count > 0))
    limit = _value_at(keys, count - 1)
    mask = keys < limit
    missing = count - int(np.count_nonzero(mask))
    mask[np.flatnonzero(keys == limit)[:missing]] = True
    return torch.from_numpy(mask).float()


def _value_at(keys: Keys, place: int) -> int:
    """The key at a place of the sorted order.

    A sorted sample says within which two values it must lie, four standard deviations wide; only the keys in that
    window are looked at closely. Where it lies outside after all, all keys are.
    """
    sample = np.sort(keys[:: max(1, keys.size // _SAMPLE)])
    middle, width = place / keys.size * sample.size, 2.0 * sample.size**0.5 + 2.0
    low = sample[int(max(0.0, middle - width))]
    high = sample[int(min(sample.size - 1.0, middle + width))]
    inside = place - int(np.count_nonzero(keys < low))
    window = keys[(keys >= low) & (keys <= high)]
    if not 0 <= inside < window.size:
        window, inside = keys, place
    return int(np.partition(window, inside)[inside])
