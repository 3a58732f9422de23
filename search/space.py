"""Groups <-> vector <-> recipe. The only module that reads meaning into tensor names."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.config import SpaceConfig
from search.errors import ConfigError, MergeError

UNIFORM_LINE = tuple(i / 10 for i in range(11))

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
    """A merge method and one coefficient a group: all that distinguishes one merge of two parents from another."""

    method: str
    coefficients: Mapping[str, float]

    @cached_property
    def key(self) -> str:
        """SHA-256 of method and coefficients: equal recipes have equal keys."""
        text = json.dumps([self.method, sorted(self.coefficients.items())])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class CoefficientSpace:
    """The box of all recipes of a study; dim = number of groups. 0 is `pre`, 1 is `post`, in every group."""

    groups: tuple[Group, ...]
    method: str
    low: float
    high: float

    @classmethod
    def build(cls, tensors: Iterable[str], config: SpaceConfig, method: str) -> CoefficientSpace:
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
        return cls(tuple(Group(g, tuple(members[g])) for g in ranked), method, config.low, config.high)

    @property
    def dim(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    def from_vector(self, x: NDArray[np.float64] | Sequence[float]) -> Recipe:
        """The recipe of a vector `(dim,)`; exact: no number is rounded.

        Raises:
            MergeError: wrong length, not finite, or out of bounds.
        """
        values = [float(value) for value in x]
        if len(values) != self.dim:
            raise MergeError(f"recipe: found {len(values)} coefficients, wanted {self.dim}, one a group.")
        return self._checked(Recipe(self.method, dict(zip(self.names, values, strict=True))))

    def to_vector(self, recipe: Recipe) -> NDArray[np.float64]:
        """The vector `(dim,)` float64 of a recipe, in the order of `groups`.

        Raises:
            MergeError: other groups or another method than this space, not finite, or out of bounds.
        """
        self._checked(recipe)
        return np.array([recipe.coefficients[name] for name in self.names], dtype=np.float64)

    def uniform(self, coefficient: float) -> Recipe:
        """The point of the uniform line with this coefficient: 0.0 is `pre`, 1.0 is `post`."""
        return self.from_vector([coefficient] * self.dim)

    def by_tensor(self, recipe: Recipe) -> dict[str, float]:
        """The coefficient of every stored tensor."""
        self._checked(recipe)
        return {tensor: recipe.coefficients[group.name] for group in self.groups for tensor in group.tensors}

    def _checked(self, recipe: Recipe) -> Recipe:
        if recipe.method != self.method:
            raise MergeError(f"recipe: found method {recipe.method}, wanted {self.method}.")
        if recipe.coefficients.keys() != set(self.names):
            odd = sorted(recipe.coefficients.keys() ^ set(self.names))[0]
            raise MergeError(f"recipe: group '{odd}' is not in both the recipe and the space.")
        for name, value in recipe.coefficients.items():
            if not math.isfinite(value) or not self.low <= value <= self.high:
                raise MergeError(
                    f"recipe: {name}: found {value}, wanted a number in [{self.low}, {self.high}]."
                )
        return recipe


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


def places_of(groups: Sequence[str]) -> list[tuple[float, str]]:
    """Depth and component of every group of a space, of any granularity.

    Groups outside the layers have no component: embeddings lie before all layers, the others behind them.

    >>> places_of(("embeddings", "layer.3.mlp", "model.layers.2.self_attn.q_proj.weight", "head"))
    [(-inf, ''), (3.0, 'mlp'), (2.0, 'attention'), (inf, '')]
    """
    sandwich = any("feedforward_layernorm" in name for name in groups)
    found = []
    for name in groups:
        place = layer_of_group(name)
        # A tensor with a coefficient of its own has the name of no group.
        if place is None and (inside := _layer_of(name)) is not None:
            place = float(inside[0]), _component_of(inside[1], ("attention", "mlp", "norms"), sandwich)
        before = name == "embeddings" or _EMBEDDINGS.search(name) is not None
        found.append(place or (-math.inf if before else math.inf, ""))
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
