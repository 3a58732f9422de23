"""What every merge method refuses: tensors that do not fit each other, and numbers out of range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from search.checkpoints.checkpoint import FLOATS
from search.errors import MergeError


def check_pair(first: torch.Tensor, other: torch.Tensor) -> None:
    """Refuse two tensors of different shape or dtype."""
    # Broadcasting would accept (3, 4) + (4,) without a word.
    if first.shape != other.shape or first.dtype != other.dtype:
        raise MergeError(
            f"merge: shape {tuple(first.shape)} {first.dtype} with {tuple(other.shape)} {other.dtype}. "
            "All parents must share one architecture."
        )


def check_tensors(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
    """Refuse a merge without experts, a dtype other than float32, bfloat16 or float16, tensors that differ."""
    if not experts:
        raise MergeError("merge: no experts (wanted at least one).")
    if base.dtype not in FLOATS:
        raise MergeError(f"merge: tensors of {base.dtype} (wanted float32, bfloat16 or float16).")
    for expert in experts:
        check_pair(base, expert)


def rounded(factor: float, name: str = "weight") -> float:
    """The float32 nearest to a number, as a float; refuses what is not finite there."""
    nearest = float(torch.tensor(factor, dtype=torch.float32))
    if not abs(nearest) < math.inf:
        raise MergeError(f"merge: a {name} is {factor} (wanted a finite number).")
    return nearest


def per_expert(values: float | Sequence[float], experts: Sequence[object], name: str) -> list[float]:
    """One finite number for each expert; a single number stands for all.

    Raises:
        MergeError: another number of values, or one that is not finite.
    """
    found = [float(values)] * len(experts) if isinstance(values, (int, float)) else [float(v) for v in values]
    if len(found) != len(experts):
        raise MergeError(
            f"merge: {len(found)} values of {name} for {len(experts)} experts. Give one for each."
        )
    for value in found:
        rounded(value, name)
    return found


def densities(values: float | Sequence[float], experts: Sequence[object]) -> list[float]:
    """The share of elements to keep for each expert, above 0 and at most 1."""
    found = per_expert(values, experts, "density")
    for value in found:
        if not 0.0 < value <= 1.0:
            raise MergeError(f"merge: a density is {value} (wanted above 0, at most 1).")
    return found
