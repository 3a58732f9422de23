"""Where the adaptation of the blocks begins, and what becomes of the tensors outside the blocks.

Anchors say something about blocks only. Embeddings, final norm and head are taken from the merge that is refined, or,
when the blocks are adapted from `pre`, from the uniform mean of the experts: the blocks then end near all experts, and
rows that only one expert trained (its special tokens) would be lost with `pre`'s embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from objectives.printable import shown
from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.parents import Parents
from search.errors import ConfigError, IncompatibleModelsError
from search.merging.anchors.blocks import Blocks
from search.merging.anchors.functional import Weights
from search.merging.methods.linear import merge_linear


@dataclass(frozen=True, eq=False)
class Begun:
    """A block before it is adapted.

    Attributes:
        weights: every parameter, float32.
        task_vectors: what Eq. 6 gives factors to, parameter -> tau; None for Eq. 5.
    """

    weights: Weights
    task_vectors: tuple[Weights, ...] | None


class Start(Protocol):
    """The merge that is adapted."""

    def check(self, parents: Parents) -> None:
        """Raises MergefrontError unless it fits these experts."""

    def facts(self) -> dict[str, Any]:
        """All that the start depends on beside `pre` and the experts, for a digest."""

    def block(self, blocks: Blocks, index: int, pre: Weights, experts: Callable[[], list[Weights]]) -> Begun:
        """The start of one block. `experts` reads their weights, float32."""

    def outside(self, name: str, parents: Parents, dtype: torch.dtype) -> torch.Tensor:
        """A stored tensor outside the blocks, rounded once to `dtype`."""


@dataclass(frozen=True)
class FromPre:
    """Eq. 5: the blocks' tensors are fitted, from those of `pre`; outside them the uniform mean of the experts."""

    def check(self, parents: Parents) -> None:
        """Fits any."""

    def facts(self) -> dict[str, Any]:
        return {"from": "pre"}

    def block(self, blocks: Blocks, index: int, pre: Weights, experts: Callable[[], list[Weights]]) -> Begun:
        return Begun(pre, None)

    def outside(self, name: str, parents: Parents, dtype: torch.dtype) -> torch.Tensor:
        return _linear(name, parents, [1 / len(parents.experts)] * len(parents.experts), dtype)


@dataclass(frozen=True)
class FromExperts:
    """Eq. 6: refines task arithmetic, theta_0 + sum_k c_k tau_k, computed as the linear merge that it is.

    Attributes:
        coefficients: one for each expert, the initial value of its factors (paper: 0.2 to 0.5, the best of the plain
            merge).
    """

    coefficients: tuple[float, ...]

    def check(self, parents: Parents) -> None:
        """Raises ConfigError unless there is a finite coefficient for each expert."""
        if len(self.coefficients) != len(parents.experts) or not all(map(math.isfinite, self.coefficients)):
            raise ConfigError(
                f"start: coefficients {list(self.coefficients)} for {len(parents.experts)} experts. "
                "Give a finite one for each."
            )

    def facts(self) -> dict[str, Any]:
        return {"from": "experts", "coefficients": list(self.coefficients)}

    def block(self, blocks: Blocks, index: int, pre: Weights, experts: Callable[[], list[Weights]]) -> Begun:
        factors, others = _with_pre(self.coefficients), experts()
        weights = {name: merge_linear([pre[name], *(one[name] for one in others)], factors) for name in pre}
        return Begun(weights, tuple(_task_vector(pre, one) for one in others))

    def outside(self, name: str, parents: Parents, dtype: torch.dtype) -> torch.Tensor:
        return _linear(name, parents, self.coefficients, dtype)


@dataclass(frozen=True, eq=False)
class FromMerge:
    """Eq. 6: refines any finished merge of the same experts as one task vector whose factors begin at 1.

    Attributes:
        merge: float32, bfloat16 or float16; its names and shapes are those of `pre`.
    """

    merge: Checkpoint

    def check(self, parents: Parents) -> None:
        """Raises IncompatibleModelsError if a tensor is missing or has another shape, CheckpointError if one is NaN."""
        for name in parents.names:
            wanted = parents.pre.shape(name)
            found = self.merge.shape(name) if name in self.merge.names else None
            if found != wanted:
                raise IncompatibleModelsError(
                    f"{self.merge.folder}: tensor {shown(name)}: {found or 'missing'} but {wanted} in pre. "
                    "Give a merge of the same models."
                )
        self.merge.check_finite(parents.names)

    def facts(self) -> dict[str, Any]:
        return {"from": "merge", "sha256": self.merge.sha256()}

    def block(self, blocks: Blocks, index: int, pre: Weights, experts: Callable[[], list[Weights]]) -> Begun:
        device = next(iter(pre.values())).device
        weights = blocks.weights(index, self.merge, str(device))
        return Begun(weights, (_task_vector(pre, weights),))

    def outside(self, name: str, parents: Parents, dtype: torch.dtype) -> torch.Tensor:
        return self.merge.tensor(name).to(dtype, copy=True)


def _linear(name: str, parents: Parents, coefficients: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    tensors = [one.tensor(name) for one in parents.everybody]
    return merge_linear(tensors, _with_pre(coefficients), dtype)


def _with_pre(coefficients: Sequence[float]) -> list[float]:
    return [1.0 - math.fsum(coefficients), *coefficients]


def _task_vector(pre: Weights, other: Weights) -> dict[str, torch.Tensor]:
    return {name: other[name] - tensor for name, tensor in pre.items()}
