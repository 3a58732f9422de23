"""Which tensors share a coefficient, and where in a model they lie.

The only module that reads meaning into the names of tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from search.config.sections import SpaceConfig
from search.errors import ConfigError

BETWEEN = "/"  # expert and group, in the name of a coefficient
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


def group_tensors(tensors: Iterable[str], config: SpaceConfig) -> tuple[Group, ...]:
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
    return tuple(Group(g, tuple(members[g])) for g in ranked)


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
