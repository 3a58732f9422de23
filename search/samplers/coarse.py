"""From coarse to fine: few blocks of groups first, and now and then the one that matters most is split.

A block is halved by depth, a block of one layer by component. Blocks are only ever split, so every earlier trial lies
in every later subspace, exactly, and goes on teaching the inner engine. When all blocks are single groups, this is the
inner engine and nothing else.

The blocks are in the tags of every proposal. A draw takes them from the finest trial before it, whatever its state:
what was split once is split for every worker, and a resumed study never weighs an old split again.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from search.merging.groups import places_of
from search.samplers.engine import Engine, Proposal
from search.samplers.subspace import Blocks, Build, MakeGradient, SubspaceEngine
from search.storage.trials import TrialRecord

if TYPE_CHECKING:
    from search.samplers.engine import WeightedGradient
    from search.samplers.gradient import LossGradient


Floats = NDArray[np.float64]
Partition = tuple[tuple[int, ...], ...]  # blocks of indices of groups, by their first index

optuna.logging.set_verbosity(optuna.logging.ERROR)  # studies that importances are read from are no news

TOP = 0.25  # PED-ANOVA compares this share of the trials, the best by one objective, with all of them
_BLOCKS = "mergefront:blocks"
_SLOPE = "mergefront:slope"


class CoarseToFine(Engine):
    """An engine over blocks of groups that are split in the course of a study (see `Engine`).

    A split is due when `every` trials of the newest blocks are complete. Without gradients the block with the largest
    importance by PED-ANOVA (Watanabe et al. 2023) is split, the mean over the objectives. With gradients it is the
    block that can follow its part of the gradient least: its importance is the length of what the parts of its groups
    differ from their mean by, over the length of the whole gradient, averaged over the trials of these blocks. Where
    no block matters more than another the one with the most groups is split.

    Args:
        groups: names of the coefficients.
        bounds: of every coefficient.
        maximize: one flag an objective.
        start: blocks at the beginning; at most as many as groups.
        every: trials between two splits.
        build: makes the inner engine for the names of the blocks.
        gradient: of the coefficients, for an inner engine that follows it.
    """

    def __init__(
        self,
        groups: tuple[str, ...],
        bounds: tuple[float, float],
        maximize: tuple[bool, ...],
        start: int,
        every: int,
        build: Build,
        gradient: MakeGradient | None,
    ) -> None:
        self._groups = groups
        self._bounds = bounds
        self._sign = np.where(maximize, -1.0, 1.0)
        self._every = every
        self._build = build
        self._gradient = gradient
        self._places = places_of(groups)
        self._slope: Floats | None = None
        self._first = first_blocks(self._places, start)
        self._blocks: Partition = ()
        self._use(self._first)

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """See `Engine.baseline_tags`."""
        return self._inner.baseline_tags(index)

    def cost(self, history: Sequence[TrialRecord]) -> int:
        """See `Engine.cost`."""
        return self._inner.cost(history)

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        self._use(self._due(history))
        self._slope = None
        proposal = self._inner.propose(history, draw)
        tags = {**proposal.tags, _BLOCKS: to_tag(self._blocks)}
        if self._slope is not None:
            tags[_SLOPE] = self._slope.tolist()
        return Proposal(proposal.coefficients, tags)

    def _use(self, blocks: Partition) -> None:
        """Gets the inner engine ready for these blocks. It learns the history anew when they are new."""
        if self._blocks == blocks:
            return
        self._blocks = blocks
        self._subspace = Blocks(self._groups, blocks)
        self._inner = SubspaceEngine(self._subspace, self._build, self._gradient and self._watched)

    def _due(self, history: Sequence[TrialRecord]) -> Partition:
        """The blocks of the next draw."""
        tags = [record.tags[_BLOCKS] for record in history if _BLOCKS in record.tags]
        newest = max(tags, key=max, default=to_tag(self._first))
        blocks = from_tag(newest)
        scored = [r for r in history if r.state == "complete" and r.tags.get(_BLOCKS) == newest]
        if len(scored) < self._every or len(blocks) == len(self._groups):
            return blocks
        self._use(blocks)
        importance = self._unfollowed(scored) if self._gradient else self._importance(history)
        wide = [number for number, block in enumerate(blocks) if len(block) > 1]
        chosen = max(wide, key=lambda number: (importance[number], len(blocks[number]), -number))
        return split(blocks, chosen, self._places)

    def _importance(self, history: Sequence[TrialRecord]) -> Floats:
        """`(blocks,)` from the complete trials: 0 or more, 1 in total, the mean over the objectives."""
        names = self._subspace.names
        study = optuna.create_study(directions=["minimize"] * len(self._sign))
        space: dict[str, BaseDistribution] = {name: FloatDistribution(*self._bounds) for name in names}
        for record in history:
            x = self._subspace.contract(record) if record.values is not None else None
            if x is not None:
                values = (self._sign * record.values).tolist()
                params = dict(zip(names, x.tolist(), strict=True))
                study.add_trial(create_trial(values=values, params=params, distributions=space))
        total = np.zeros(len(names))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index in range(len(self._sign)):
                found = get_param_importances(
                    study,
                    evaluator=PedAnovaImportanceEvaluator(target_quantile=TOP),
                    params=list(names),
                    target=lambda trial, index=index: _value(trial, index),  # type: ignore[misc]
                )
                total += [found[name] for name in names]
        return total / len(self._sign)

    def _unfollowed(self, trials: Sequence[TrialRecord]) -> Floats:
        """`(blocks,)`: the part of the gradient that each block cannot follow; see the class."""
        total = np.zeros(len(self._blocks))
        for record in trials:
            slope = np.array(record.tags[_SLOPE])
            length = float(np.linalg.norm(slope)) or 1.0
            parts = [slope[list(block)] for block in self._blocks]
            total += [np.linalg.norm(part - part.mean()) / length for part in parts]
        return total / len(trials)

    def _watched(self) -> WeightedGradient:
        """The gradient of the coefficients, which leaves what it found last in `_slope`."""
        assert self._gradient is not None, "called for engines with gradients"
        return _Watched(self._gradient(), self._remember)

    def _remember(self, slope: Floats) -> None:
        self._slope = slope


class _Watched:
    def __init__(self, gradient: WeightedGradient, remember: Callable[[Floats], None]) -> None:
        self._gradient, self._remember = gradient, remember
        self.tokens = gradient.tokens

    def __call__(self, coefficients: Floats, weights: Floats, step: int, /) -> LossGradient:
        found = self._gradient(coefficients, weights, step)
        self._remember(found.gradient)
        return found


def first_blocks(places: Sequence[tuple[float, str]], count: int) -> Partition:
    """`count` blocks of groups at these places: one of all, and the largest is split until there are enough.

    >>> first_blocks([(float("-inf"), ""), (0.0, "layer"), (1.0, "layer"), (float("inf"), "")], 2)
    ((0, 1), (2, 3))
    """
    blocks: Partition = (tuple(range(len(places))),)
    while len(blocks) < min(count, len(places)):
        largest = max(range(len(blocks)), key=lambda number: (len(blocks[number]), -number))
        blocks = split(blocks, largest, places)
    return blocks


def split(blocks: Partition, number: int, places: Sequence[tuple[float, str]]) -> Partition:
    """The same blocks with one of them, of two groups or more, in halves.

    Halves by depth where it spans several, else by component, else in the order of the groups.
    """
    block = blocks[number]
    depths = sorted({places[index][0] for index in block})
    components = list(dict.fromkeys(places[index][1] for index in block))
    if len(depths) > 1:
        upper = set(depths[: len(depths) // 2])
        head = tuple(index for index in block if places[index][0] in upper)
    elif len(components) > 1:
        first = set(components[: len(components) // 2])
        head = tuple(index for index in block if places[index][1] in first)
    else:
        head = block[: len(block) // 2]
    tail = tuple(index for index in block if index not in set(head))
    return tuple(sorted((*blocks[:number], head, tail, *blocks[number + 1 :])))


def to_tag(blocks: Partition) -> list[int]:
    """For every group the number of its block."""
    number_of = {index: number for number, block in enumerate(blocks) for index in block}
    return [number_of[index] for index in range(len(number_of))]


def from_tag(tag: Sequence[int]) -> Partition:
    """The inverse of `to_tag`."""
    blocks: dict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(tag):
        blocks[number].append(index)
    return tuple(tuple(blocks[number]) for number in sorted(blocks))


def _value(trial: FrozenTrial, index: int) -> float:
    return float(trial.values[index])
