"""Groups <-> vector <-> recipe, on the tensor names of real architectures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.config.sections import MergeConfig, SpaceConfig
from search.errors import ConfigError, MergeError
from search.merging.groups import places_of
from search.merging.space import CoefficientSpace
from search.recipe import Recipe
from tests.pico import ARCHS, pico_model


def names_of(arch: str, **overrides: Any) -> list[str]:
    model = pico_model(arch, **overrides)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return [name for name, _ in model.named_parameters() if name not in tied]


def space(names: list[str], granularity: str = "layer", components: Any = ()) -> CoefficientSpace:
    config = SpaceConfig(granularity=granularity, components=list(components), low=-0.2, high=1.2)
    return CoefficientSpace.build(names, config, MergeConfig())


LAYOUTS = [
    ("uniform", ()),
    ("block:2", ()),
    ("block:3", ("attention", "mlp")),
    ("layer", ()),
    ("layer", ("attention", "mlp")),
    ("layer", ("attention", "mlp", "norms")),
    ("layer", ("mlp",)),
    ("tensor", ()),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("granularity", "components"), LAYOUTS)
def test_every_tensor_is_in_one_group(arch: str, granularity: str, components: tuple[str, ...]) -> None:
    names = names_of(arch, num_hidden_layers=4)
    one = space(names, granularity, components)
    grouped = [tensor for group in one.groups for tensor in group.tensors]
    assert sorted(grouped) == sorted(names)
    assert len(set(one.names)) == one.dim
    if granularity not in ("uniform", "tensor"):
        assert one.names[0] == "embeddings"
        assert "final_norm" in one.names


def test_groups_of_a_llama() -> None:
    names = names_of("llama", num_hidden_layers=12, tied=False)
    both = space(names, "layer", ("attention", "mlp"))
    assert both.names[:3] == ("embeddings", "layer.0.attention", "layer.0.mlp")
    assert both.names[-3:] == ("layer.11.mlp", "final_norm", "head")
    assert both.dim == 2 * 12 + 3
    tensors = {group.name: group.tensors for group in both.groups}
    # 'layers.1' is a prefix of 'layers.10' and 'layers.11': the layer is read as a number.
    assert all(".layers.1." in name for name in (*tensors["layer.1.attention"], *tensors["layer.1.mlp"]))
    assert "model.layers.1.input_layernorm.weight" in tensors["layer.1.attention"]
    assert "model.layers.1.post_attention_layernorm.weight" in tensors["layer.1.mlp"]
    blocks = space(names, "block:5")
    assert blocks.names == ("embeddings", "block.0-4", "block.5-9", "block.10-11", "final_norm", "head")
    assert space(names, "uniform").names == ("all",)
    assert space(names, "tensor").dim == len(names)
    norms = space(names, "layer", ("attention", "mlp", "norms"))
    assert len(next(g for g in norms.groups if g.name == "layer.3.norms").tensors) == 2


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "olmo2"])
def test_norms_on_both_sides_go_with_their_own_block(arch: str) -> None:
    tensors = {g.name: g.tensors for g in space(names_of(arch), "layer", ("attention", "mlp")).groups}
    assert "model.layers.0.post_attention_layernorm.weight" in tensors["layer.0.attention"]
    assert "model.layers.0.post_feedforward_layernorm.weight" in tensors["layer.0.mlp"]


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "olmo2"])
def test_norms_of_queries_and_keys_are_attention(arch: str) -> None:
    for components in (("attention", "mlp"), ("attention", "mlp", "norms")):
        tensors = {g.name: g.tensors for g in space(names_of(arch), "layer", components).groups}
        assert "model.layers.0.self_attn.q_norm.weight" in tensors["layer.0.attention"]


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="block:9, but the parents have 2 layers"):
        space(names_of("llama"), "block:9")
    with pytest.raises(ConfigError, match=r"tensor 'model\.vision\.proj' is in no layer"):
        space(["model.vision.proj"])
    assert space(["model.vision.proj"], "tensor").dim == 1


TINY = space(names_of("llama"), "layer", ("attention", "mlp"))
COEFFICIENT = st.floats(-0.2, 1.2, allow_nan=False)


@settings(max_examples=200)
@given(st.lists(COEFFICIENT, min_size=TINY.dim, max_size=TINY.dim))
def test_a_vector_survives_the_round_trip_bit_for_bit(values: list[float]) -> None:
    x = np.array(values)
    recipe = TINY.from_vector(x)
    assert TINY.to_vector(recipe).tobytes() == x.tobytes()
    again = Recipe(recipe.method, dict(reversed(recipe.coefficients.items())))
    assert again.key == recipe.key
    by_tensor = TINY.by_tensor(recipe)
    assert len(by_tensor) == len(names_of("llama"))
    assert by_tensor["model.layers.1.mlp.up_proj.weight"] == (recipe.coefficients["layer.1.mlp"],)


@settings(max_examples=50)
@given(st.integers(0, TINY.dim - 1), st.sampled_from([float("nan"), float("inf"), -0.21, 1.3]))
def test_what_is_out_of_the_box_is_refused(place: int, value: float) -> None:
    x = [0.5] * TINY.dim
    x[place] = value
    with pytest.raises(MergeError, match=TINY.names[place]):
        TINY.from_vector(x)


def test_a_recipe_of_another_space_is_refused() -> None:
    with pytest.raises(MergeError, match=f"found 2 coefficients, wanted {TINY.dim}"):
        TINY.from_vector([0.0, 1.0])
    recipe = TINY.uniform(0.5)
    with pytest.raises(MergeError, match="found method slerp, wanted linear"):
        TINY.to_vector(Recipe("slerp", recipe.coefficients))
    with pytest.raises(MergeError, match="group 'x' is not in both"):
        TINY.to_vector(Recipe("linear", {**recipe.coefficients, "x": 0.5}))
    assert Recipe("slerp", recipe.coefficients).key != recipe.key


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tensor_has_the_place_of_its_group(arch: str) -> None:
    names = names_of(arch, num_hidden_layers=4)
    parts = ("attention", "mlp", "norms")
    grouped = space(names, "layer", parts)
    by_group = {
        tensor: place
        for group, place in zip(grouped.groups, places_of(grouped.names), strict=True)
        for tensor in group.tensors
    }
    assert dict(zip(names, places_of(names), strict=True)) == by_group
    assert {component for _, component in by_group.values()} == {"", *parts}
