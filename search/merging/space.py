"""Groups <-> vector <-> recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.config.methods import OPTIONS, get_method
from search.config.sections import MergeConfig, SpaceConfig
from search.errors import MergeError
from search.merging.groups import BETWEEN, Group, group_tensors, split_name
from search.recipe import Recipe

UNIFORM_LINE = tuple(i / 10 for i in range(11))
METHOD = "method"  # the axis of several methods
_ROUNDING = 1e-12  # of a sum of coefficients


@dataclass(frozen=True)
class Axis:
    """A number of the merge method that is searched beside the coefficients: a hyper-parameter, or which method it is.

    Attributes:
        name: of the hyper-parameter, or `method`. neutral: its value on the uniform line.
        choices: the methods, of which a value is the index; empty for a hyper-parameter.
    """

    name: str
    low: float
    high: float
    neutral: float
    choices: tuple[str, ...] = ()

    def share(self, value: float) -> float:
        """Where a value lies in [0, 1]; an index in the middle of its part."""
        return (
            (value + 0.5) / len(self.choices) if self.choices else (value - self.low) / (self.high - self.low)
        )

    def value(self, share: float) -> float:
        """The value at a place in [0, 1]."""
        if self.choices:
            return float(min(int(share * len(self.choices)), len(self.choices) - 1))
        mixed = (1.0 - share) * self.low + share * self.high  # exact at both ends
        return min(max(mixed, self.low), self.high)


@dataclass(frozen=True)
class CoefficientSpace:
    """The box of all recipes of a study: a coefficient for each group and expert, and the axes of the merge method.

    0 is `pre` in every group, 1 the expert (with 0 for the others). With `simplex` the coefficients of a group are at
    or above 0 and add up to 1, except those of `pre` and of the uniform line.

    Attributes:
        methods: which a recipe may have; the first one's is the uniform line.
        fixed: hyper-parameters that are not searched.
    """

    groups: tuple[Group, ...]
    methods: tuple[str, ...]
    low: float
    high: float
    experts: tuple[str, ...] = ("post",)
    simplex: bool = False
    axes: tuple[Axis, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        tensors: Iterable[str],
        config: SpaceConfig,
        merge: MergeConfig,
        experts: Sequence[str] = ("post",),
    ) -> CoefficientSpace:
        """The space that a study file asks for, of the stored tensors of its parents.

        Raises:
            ConfigError: as `group_tensors`.
        """
        groups = group_tensors(tensors, config)
        axes, fixed = _axes(merge)
        return cls(
            groups, merge.methods, config.low, config.high, tuple(experts), config.simplex, axes, fixed
        )

    @property
    def dim(self) -> int:
        return len(self.names)

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the coefficients: the groups; with several experts `EXPERT/GROUP`, expert after expert."""
        if len(self.experts) == 1:
            return tuple(group.name for group in self.groups)
        return tuple(f"{expert}{BETWEEN}{group.name}" for expert in self.experts for group in self.groups)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all coordinates: the coefficients, then the axes."""
        return (*self.coefficients, *(axis.name for axis in self.axes))

    def from_vector(self, x: NDArray[np.float64] | Sequence[float]) -> Recipe:
        """The recipe of a vector `(dim,)` in the box; exact: no coefficient is rounded.

        An axis reaches from `low` to `high` of the box. In a simplex, what does not add up to 1 in a group is divided
        by its sum; a group of zeros gets equal shares.

        Raises:
            MergeError: wrong length, not finite, or out of bounds.
        """
        values = [float(value) for value in x]
        if len(values) != self.dim:
            raise MergeError(f"recipe: found {len(values)} coefficients, wanted {self.dim}.")
        for name, value in zip(self.names, values, strict=True):
            self._check_bounds(name, value)
        count = len(self.coefficients)
        found = dict(zip(self.coefficients, self._shared(values[:count]), strict=True))
        for axis, value in zip(self.axes, values[count:], strict=True):
            found[axis.name] = axis.value((value - self.low) / (self.high - self.low))
        place = int(found.get(METHOD, 0))
        return Recipe(self.methods[place], found)

    def to_vector(self, recipe: Recipe) -> NDArray[np.float64]:
        """The vector `(dim,)` float64 of a recipe, in the order of `names`.

        Raises:
            MergeError: other groups or another method than this space, not finite, or out of bounds.
        """
        self._checked(recipe)
        values = self.coordinates(recipe.coefficients)
        return np.array([values[name] for name in self.names], dtype=np.float64)

    def coordinates(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """All numbers of a recipe as an engine sees them: each in the box."""
        if not self.axes:
            return values
        return {**values, **{axis.name: self._in_box(axis, values[axis.name]) for axis in self.axes}}

    @cached_property
    def neutral(self) -> dict[str, float]:
        """Where the axes are on the uniform line, as an engine sees them."""
        return {axis.name: self._in_box(axis, axis.neutral) for axis in self.axes}

    def unit(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """All numbers of a recipe in the unit box: `(dim,)`."""
        known = self.coordinates(values)
        x = np.array([known[name] for name in self.names])
        return np.asarray((x - self.low) / (self.high - self.low))

    def uniform(self, coefficient: float) -> Recipe:
        """The point of the uniform line with this coefficient: 0.0 is `pre`, 1.0 is `post`.

        With several experts all have this coefficient, the sweep of task arithmetic; in a simplex they share it, and
        1.0 is their mean. The method is the study's first with neutral hyper-parameters; linear where that one knows
        no way back to `pre`.
        """
        share = coefficient / len(self.experts) if self.simplex else coefficient
        relative = get_method(self.methods[0]).relative
        return self._plain(dict.fromkeys(self.coefficients, share), "linear" if relative else self.methods[0])

    def alone(self, expert: str | None) -> Recipe:
        """The recipe of one parent by itself, bit for bit: of an expert, or of `pre`."""
        each = [float(other == expert) for other in self.experts for _ in self.groups]
        method = "linear" if self.methods[0] not in ("linear", "slerp") else self.methods[0]
        return self._plain(dict(zip(self.coefficients, each, strict=True)), method)

    def options(self, recipe: Recipe) -> dict[str, float]:
        """The hyper-parameters of a recipe's method."""
        known = {**self.fixed, **recipe.coefficients}
        return {name: known[name] for name in get_method(recipe.method).options}

    def by_tensor(self, recipe: Recipe) -> dict[str, tuple[float, ...]]:
        """The coefficients of every stored tensor, one for each expert."""
        self._checked(recipe)
        values = [recipe.coefficients[name] for name in self.coefficients]
        found: dict[str, tuple[float, ...]] = {}
        for place, group in enumerate(self.groups):
            each = tuple(values[place :: len(self.groups)])
            found |= dict.fromkeys(group.tensors, each)
        return found

    def _in_box(self, axis: Axis, value: float) -> float:
        return min(self.low + axis.share(value) * (self.high - self.low), self.high)

    def _plain(self, coefficients: Mapping[str, float], method: str) -> Recipe:
        return self._checked(
            Recipe(method, {**coefficients, **{axis.name: axis.neutral for axis in self.axes}})
        )

    def _shared(self, values: Sequence[float]) -> list[float]:
        if not self.simplex:
            return list(values)
        given = np.array(values).reshape(len(self.experts), len(self.groups))
        sums = given.sum(axis=0)
        shares = np.where(sums > 0.0, given / np.where(sums > 0.0, sums, 1.0), 1.0 / len(self.experts))
        found: list[float] = np.where(np.abs(sums - 1.0) < _ROUNDING, given, shares).ravel().tolist()
        return found

    def _checked(self, recipe: Recipe) -> Recipe:
        if recipe.method not in (*self.methods, "linear"):
            raise MergeError(f"recipe: found method {recipe.method}, wanted {' or '.join(self.methods)}.")
        if recipe.coefficients.keys() != set(self.names):
            odd = sorted(recipe.coefficients.keys() ^ set(self.names))[0]
            raise MergeError(f"recipe: group '{odd}' is not in both the recipe and the space.")
        for name, value in self.coordinates(recipe.coefficients).items():
            self._check_bounds(name, value)
        return recipe

    def _check_bounds(self, name: str, value: float) -> None:
        if not math.isfinite(value) or not self.low <= value <= self.high:
            raise MergeError(f"recipe: {name}: found {value}, wanted a number in [{self.low}, {self.high}].")


def _axes(merge: MergeConfig) -> tuple[tuple[Axis, ...], dict[str, float]]:
    """What is searched of the merge method, and what is fixed."""
    axes, fixed = [], {}
    for name, option in OPTIONS.items():
        if not any(name in get_method(method).options for method in merge.methods):
            continue
        low, high = merge.range_of(name)
        if low == high:
            fixed[name] = low
        else:
            axes.append(Axis(name, low, high, min(max(option.default, low), high)))
    if len(merge.methods) > 1:
        axes.append(Axis(METHOD, 0.0, len(merge.methods) - 1.0, 0.0, merge.methods))
    return tuple(axes), fixed


def by_expert(coefficients: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Coefficients by group for each expert, without axes of the method; a single expert has no name.

    >>> by_expert({"a/head": 0.5, "b/head": 0.25})
    {'a': {'head': 0.5}, 'b': {'head': 0.25}}
    """
    found: dict[str, dict[str, float]] = {}
    for name, value in coefficients.items():
        if name == METHOD or name in OPTIONS:
            continue
        expert, group = split_name(name)
        found.setdefault(expert, {})[group] = value
    return found
