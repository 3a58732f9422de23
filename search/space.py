"""Groups <-> vector <-> recipe. The only module that reads meaning into tensor names."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.errors import ConfigError, MergeError
from search.merging.methods.table import OPTIONS, get_method
from search.sections import MergeConfig, SpaceConfig

UNIFORM_LINE = tuple(i / 10 for i in range(11))
METHOD = "method"  # the axis of several methods
BETWEEN = "/"  # expert and group, in the name of a coefficient
_ROUNDING = 1e-12  # of a sum of coefficients

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_ATTENTION = ("self_attn", "attention", "attn")
_MLP = ("mlp", "feed_forward", "block_sparse_moe")
_EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|embed_positions|wte|wpe)\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.")
_NORM = re.compile(r"norm|(?:^|\.)ln_")


@dataclass(frozen=True)
class Group:
    """Tensors that share one coefficient."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A merge method and all coefficients: all that distinguishes one merge of a study's parents from another."""

    method: str
    coefficients: Mapping[str, float]

    @cached_property
    def key(self) -> str:
        """SHA-256 of method and coefficients: equal recipes have equal keys."""
        text = json.dumps([self.method, sorted(self.coefficients.items())])
        return hashlib.sha256(text.encode()).hexdigest()


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
        return min(
            max((1.0 - share) * self.low + share * self.high, self.low), self.high
        )  # exact at both ends


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
        """Groups the stored tensors of the parents as the study file asks.

        Embeddings, head and final norm have groups of their own, except with granularity `uniform` (one group of
        everything) and `tensor` (every tensor its own).

        Raises:
            ConfigError: a tensor lies neither in a layer nor in embeddings, head or final norm; or `block:N` is
                larger than the model.
        """
        names = list(tensors)
        layers = sorted({place[0] for name in names if (place := _layer_of(name)) is not None})
        block = _block_size(config.granularity, len(layers))
        sandwich = any("feedforward_layernorm" in name for name in names)
        members: dict[str, list[str]] = {}
        order: dict[str, tuple[int, int, int]] = {}
        for name in names:
            if config.granularity == "uniform":
                group, rank = "all", (0, 0, 0)
            elif config.granularity == "tensor":
                group, rank = name, (0, 0, 0)
            elif (place := _layer_of(name)) is not None:
                layer, rest = place
                component = _component_of(rest, config.components, sandwich)
                group = _group_name(layer, block, layers, component)
                rank = (1, layer // block, (*config.components, component).index(component))
            else:
                group, position = _outside_layers(name)
                rank = (position, 0, 0)
            members.setdefault(group, []).append(name)
            order[group] = rank
        ranked = sorted(members, key=order.__getitem__)  # stable: tensors keep their order in the checkpoint
        groups = tuple(Group(g, tuple(members[g])) for g in ranked)
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
        reach = self.high - self.low
        shares = {axis.name: axis.share(values[axis.name]) for axis in self.axes}
        return {
            **values,
            **{name: min(self.low + share * reach, self.high) for name, share in shares.items()},
        }

    @cached_property
    def neutral(self) -> dict[str, float]:
        """Where the axes are on the uniform line, as an engine sees them."""
        reach = self.high - self.low
        return {axis.name: self.low + axis.share(axis.neutral) * reach for axis in self.axes}

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


def split_name(name: str) -> tuple[str, str]:
    """Expert and group of a coefficient's name; the expert is empty where there is only one.

    >>> split_name("concise/layer.3.mlp"), split_name("head")
    (('concise', 'layer.3.mlp'), ('', 'head'))
    """
    expert, between, group = name.rpartition(BETWEEN)
    return (expert, group) if between else ("", name)


def layer_of_group(name: str) -> tuple[float, str] | None:
    """Depth and component of a group's name, for pictures by layer; None for groups outside the layers.

    >>> layer_of_group("block.4-7.mlp"), layer_of_group("layer.3"), layer_of_group("head")
    ((5.5, 'mlp'), (3.0, 'layer'), None)
    """
    match = re.fullmatch(r"(?:layer|block)\.(\d+)(?:-(\d+))?(?:\.(\w+))?", name)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    return (first + last) / 2, match[3] or "layer"


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


def places_of(groups: Sequence[str]) -> list[tuple[float, str]]:
    """Depth and component of every group of a space, of any granularity.

    Groups outside the layers have no component: embeddings lie before all layers, the others behind them. With several
    experts each has components of its own.

    >>> places_of(("embeddings", "layer.3.mlp", "model.layers.2.self_attn.q_proj.weight", "head"))
    [(-inf, ''), (3.0, 'mlp'), (2.0, 'attention'), (inf, '')]
    >>> places_of(("concise/layer.3.mlp", "concise/head"))
    [(3.0, 'concise/mlp'), (inf, '')]
    """
    sandwich = any("feedforward_layernorm" in name for name in groups)
    found: list[tuple[float, str]] = []
    for coefficient in groups:
        expert, name = split_name(coefficient)
        place = layer_of_group(name)
        # A tensor with a coefficient of its own has the name of no group.
        if place is None and (inside := _layer_of(name)) is not None:
            place = float(inside[0]), _component_of(inside[1], ("attention", "mlp", "norms"), sandwich)
        before = name == "embeddings" or _EMBEDDINGS.search(name) is not None
        if place is None:
            found.append((-math.inf if before else math.inf, ""))
        else:
            found.append((place[0], f"{expert}{BETWEEN}{place[1]}" if expert else place[1]))
    return found


def _layer_of(name: str) -> tuple[int, str] | None:
    match = _LAYER.search(name)
    return (int(match[1]), match[2]) if match else None


def _block_size(granularity: str, layers: int) -> int:
    kind, _, size = granularity.partition(":")
    if kind != "block":
        return 1
    if int(size) > layers:
        raise ConfigError(f"space.granularity: found {granularity}, but the parents have {layers} layers.")
    return int(size)


def _group_name(layer: int, block: int, layers: Sequence[int], component: str) -> str:
    first = layer // block * block
    last = min(first + block - 1, layers[-1])
    place = f"layer.{layer}" if block == 1 else f"block.{first}-{last}"
    return f"{place}.{component}" if component else place


def _component_of(rest: str, components: Sequence[str], sandwich: bool) -> str:
    """The component of a tensor inside a layer: '' without components, `rest` if its own is not listed.

    A norm goes with the block that it feeds or follows unless `norms` is listed. `post_attention_layernorm` feeds the
    MLP in Llama and follows attention in models with norms on both sides (Gemma-2/3, OLMo-2): `sandwich`.
    """
    if not components:
        return ""
    part = rest.split(".")[0]
    if part in _ATTENTION:
        component = "attention"
    elif part in _MLP:
        component = "mlp"
    elif "norms" in components and _NORM.search(part):
        component = "norms"
    elif "feedforward" in part or (part in ("post_attention_layernorm", "ln_2") and not sandwich):
        component = "mlp"
    else:
        component = "attention"
    return component if component in components else "rest"


def _outside_layers(name: str) -> tuple[str, int]:
    if _EMBEDDINGS.search(name):
        return "embeddings", 0
    if _HEAD.search(name):
        return "head", 3
    if _NORM.search(name):
        return "final_norm", 2
    raise ConfigError(
        f"space: tensor '{name}' is in no layer and is no embedding, head or norm. Use granularity tensor or uniform."
    )
