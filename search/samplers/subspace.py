"""Searching fewer numbers than a study has coefficients, embedded linearly into them.

A recipe always holds the study's own coefficients, one a group, so it stays exact. An engine may move fewer
coordinates: `Subspace` says which coefficients they stand for, and `SubspaceEngine` stands between any engine, which
sees coordinates alone, and the study, which sees coefficients alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search.merging.groups import BETWEEN, places_of, split_name
from search.samplers.engine import Engine, Proposal, WeightedGradient
from search.storage.trials import TrialRecord

if TYPE_CHECKING:
    from search.samplers.gradient import LossGradient


Floats = NDArray[np.float64]
MakeGradient = Callable[[], WeightedGradient]
# Makes an engine for coordinates of these names, which stands behind this gradient if it follows one.
Build = Callable[[tuple[str, ...], MakeGradient | None], Engine]

OUTSIDE = "outside"
IDLE_COEFFICIENT = 0.0
_KNOTS = "mergefront:knots"


class Subspace(ABC):
    """Coordinates that stand for the coefficients of a study.

    Every coefficient is a weighted mean of coordinates (or constant), so bounds of the one are bounds of the other.

    Attributes:
        groups: names of the coefficients.
        names: names of the coordinates.
    """

    groups: tuple[str, ...]
    names: tuple[str, ...]

    @abstractmethod
    def expand(self, coordinates: Floats) -> Floats:
        """The coefficients `(groups,)` that coordinates `(names,)` stand for."""

    @abstractmethod
    def contract(self, trial: TrialRecord) -> Floats | None:
        """The coordinates `(names,)` that `expand` to the trial's coefficients, exactly; None if it lies outside."""

    def tags(self, coordinates: Floats) -> Mapping[str, Any]:
        """What a proposal must carry so that `contract` finds its coordinates again."""
        return {}

    @cached_property
    def jacobian(self) -> Floats:
        """`(groups, names)`: derivative of every coefficient by every coordinate."""
        return np.stack([self.expand(unit) for unit in np.eye(len(self.names))], axis=1)


class Moving(Subspace):
    """All coefficients but the idle ones, whose tensors are equal in both parents.

    An idle coefficient changes nothing, so no trial lies outside. It is proposed as 0, except on the uniform line,
    whose recipes are those of the baselines.
    """

    def __init__(self, groups: tuple[str, ...], idle: Collection[str]) -> None:
        self.groups = groups
        self.names = tuple(group for group in groups if group not in idle)
        self._moving = np.array([group not in idle for group in groups])

    def expand(self, coordinates: Floats) -> Floats:
        """See `Subspace.expand`."""
        uniform = np.ptp(coordinates) == 0.0
        coefficients = np.full(len(self.groups), coordinates[0] if uniform else IDLE_COEFFICIENT)
        coefficients[self._moving] = coordinates
        return coefficients

    def contract(self, trial: TrialRecord) -> Floats:
        """See `Subspace.contract`."""
        return np.array([trial.coefficients[name] for name in self.names])

    @cached_property
    def jacobian(self) -> Floats:
        """See `Subspace.jacobian`; an idle coefficient is taken as constant."""
        return np.eye(len(self.groups))[:, self._moving]


class Knots(Subspace):
    """`count` knots for each component, spread over depth; the layers between two of them are interpolated.

    mergekit does the same with a list of values in place of one. A component with fewer layers has one knot a layer.
    Groups outside the layers share one coordinate, with several experts one an expert; it comes last.

    Coordinates of a proposal are found in its tags, since interpolated coefficients do not give them back to the last
    bit. A trial without them is a baseline, or one that no such engine proposed: on the uniform line its knots are
    constant, off the line it lies outside.
    """

    def __init__(self, groups: tuple[str, ...], count: int) -> None:
        self.groups = groups
        places = places_of(groups)
        names: list[str] = []
        # (indices of the component's groups, their depths, first knot, depths of the knots)
        self._lines: list[tuple[list[int], list[float], int, Floats]] = []
        for component in dict.fromkeys(component for _, component in places if component):
            inside = [index for index, (_, other) in enumerate(places) if other == component]
            depths = [places[index][0] for index in inside]
            layers = np.unique(depths)
            knots = layers if len(layers) <= count else np.linspace(layers[0], layers[-1], count)
            self._lines.append((inside, depths, len(names), knots))
            names += [f"{component}.{knot}" for knot in range(len(knots))]
        # (indices of an expert's groups outside the layers, their coordinate)
        self._outside: list[tuple[list[int], int]] = []
        outside = [index for index, (_, component) in enumerate(places) if not component]
        for expert in dict.fromkeys(split_name(groups[index])[0] for index in outside):
            own = [index for index in outside if split_name(groups[index])[0] == expert]
            self._outside.append((own, len(names)))
            names.append(f"{expert}{BETWEEN}{OUTSIDE}" if expert else OUTSIDE)
        self.names = tuple(names)

    def expand(self, coordinates: Floats) -> Floats:
        """See `Subspace.expand`."""
        coefficients = np.empty(len(self.groups))
        for inside, depths, first, knots in self._lines:
            values = coordinates[first : first + len(knots)]
            # Rounding may lead an interpolated value past both its neighbours, and so out of bounds.
            coefficients[inside] = np.clip(np.interp(depths, knots, values), values.min(), values.max())
        for own, place in self._outside:
            coefficients[own] = coordinates[place]
        return coefficients

    def contract(self, trial: TrialRecord) -> Floats | None:
        """See `Subspace.contract`."""
        if _KNOTS in trial.tags:
            return np.array(trial.tags[_KNOTS], dtype=np.float64)
        first, *others = (trial.coefficients[group] for group in self.groups)
        return np.full(len(self.names), first) if all(other == first for other in others) else None

    def tags(self, coordinates: Floats) -> Mapping[str, Any]:
        """See `Subspace.tags`."""
        return {_KNOTS: coordinates.tolist()}


class Blocks(Subspace):
    """One coordinate a block of groups, named after the first group in it.

    Args:
        blocks: indices of groups; every group is in one of them. Blocks of one group each make the whole space.
    """

    def __init__(self, groups: tuple[str, ...], blocks: Sequence[Sequence[int]]) -> None:
        self.groups = groups
        self.names = tuple(groups[block[0]] for block in blocks)
        self._blocks = [[groups[index] for index in block] for block in blocks]
        self._block_of = np.empty(len(groups), dtype=np.intp)
        for number, block in enumerate(blocks):
            self._block_of[list(block)] = number

    def expand(self, coordinates: Floats) -> Floats:
        """See `Subspace.expand`."""
        return coordinates[self._block_of]

    def contract(self, trial: TrialRecord) -> Floats | None:
        """See `Subspace.contract`."""
        values = []
        for block in self._blocks:
            first, *others = (trial.coefficients[group] for group in block)
            if any(other != first for other in others):
                return None
            values.append(first)
        return np.array(values)


class SubspaceEngine(Engine):
    """An engine that moves the coordinates of a subspace (see `Engine`).

    Trials outside the subspace are kept from the inner engine: their values belong to recipes it cannot propose.

    Args:
        subspace: what the coordinates stand for.
        build: makes the inner engine.
        gradient: of the coefficients; the inner engine gets that of its coordinates.
    """

    def __init__(self, subspace: Subspace, build: Build, gradient: MakeGradient | None) -> None:
        self._subspace = subspace
        self._inner = build(
            subspace.names, None if gradient is None else lambda: pulled(gradient(), subspace)
        )
        self._seen: dict[int, tuple[TrialRecord, TrialRecord | None]] = {}

    def baseline_tags(self, index: int) -> Mapping[str, Any]:
        """See `Engine.baseline_tags`."""
        return self._inner.baseline_tags(index)

    def cost(self, history: Sequence[TrialRecord]) -> int:
        """See `Engine.cost`."""
        return self._inner.cost(history)

    def propose(self, history: Sequence[TrialRecord], draw: int) -> Proposal:
        """See `Engine.propose`."""
        mapped = [inside for record in history if (inside := self._mapped(record)) is not None]
        proposal = self._inner.propose(mapped, draw)
        x = np.array([proposal.coefficients[name] for name in self._subspace.names])
        coefficients = map(float, self._subspace.expand(x))
        return Proposal(
            dict(zip(self._subspace.groups, coefficients, strict=True)),
            {**proposal.tags, **self._subspace.tags(x)},
        )

    def _mapped(self, record: TrialRecord) -> TrialRecord | None:
        """The record as the inner engine sees it; one that did not change since is not mapped again."""
        known = self._seen.get(record.number)
        if known is None or known[0] is not record:
            x = self._subspace.contract(record)
            inside = None
            if x is not None:
                inside = replace(
                    record, coefficients=dict(zip(self._subspace.names, x.tolist(), strict=True))
                )
            known = self._seen[record.number] = record, inside
        return known[1]


def pulled(gradient: WeightedGradient, subspace: Subspace) -> WeightedGradient:
    """The gradient by the coordinates of a subspace, from that by the coefficients (chain rule)."""
    return _Pulled(gradient, subspace)


class _Pulled:
    def __init__(self, gradient: WeightedGradient, subspace: Subspace) -> None:
        self._gradient, self._subspace = gradient, subspace
        self.tokens = gradient.tokens

    def __call__(self, coordinates: Floats, weights: Floats, step: int, /) -> LossGradient:
        found = self._gradient(self._subspace.expand(coordinates), weights, step)
        return replace(found, gradient=self._subspace.jacobian.T @ found.gradient)
