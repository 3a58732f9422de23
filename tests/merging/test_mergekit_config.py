"""The exported config against mergekit itself: same rule for filters, same bits after a rebuild."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration, evaluate_setting
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

from search.checkpoints.parents import Parents
from search.errors import ExportError
from search.merging.blend import Blend, Weights, make_blend
from search.merging.mergekit_config import (
    caveats,
    check_config,
    config_text,
    first_match,
    make_filters,
    natural,
    number,
    place_of,
    quoted,
)
from search.merging.save import save_checkpoint
from tests.pico import save_pair, save_pico

PART = st.sampled_from(
    ["model", "layers", "h", "1", "10", "11", "2", "norm", "norm1", "mlp", "weight", "bias", "lm_head"]
)
NAMES = st.lists(st.lists(PART, min_size=1, max_size=5).map(".".join), min_size=1, max_size=30, unique=True)
FEW = st.sampled_from([0.0, 0.25, 1.0])


def blend_for(parents: Parents, method: str = "linear") -> Blend:
    """Another coefficient for every tensor, some outside [0, 1], some equal."""
    coefficients = {
        name: (round(-0.15 + 1.3 * math.sin(i // 2) ** 2, 7),) for i, name in enumerate(parents.names)
    }
    found = make_blend(parents, coefficients, method)
    return found.in_order(natural(found.weights))


def rebuilt(config: str, out: Path) -> dict[str, torch.Tensor]:
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config)), str(out), MergeOptions(quiet=True))
    return loaded(out)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> int:
    """Elements whose bits differ, over the tensors of `a`."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return sum(int((a[n].view(bits[a[n].dtype]) != b[n].view(bits[a[n].dtype])).sum()) for n in a)


@given(names=NAMES, data=st.data())
def test_filters_give_every_tensor_its_weights_by_mergekits_own_rule(
    names: list[str], data: st.DataObject
) -> None:
    weights = {name: (data.draw(FEW), data.draw(FEW)) for name in names}
    filters = make_filters(weights)
    assert len({text for text, _ in filters}) == len(filters) <= len(names)
    for side in (0, 1):
        setting = [ConditionalParameter(filter=text, value=pair[side]) for text, pair in filters]
        for name in names:
            assert evaluate_setting(name, setting, validate=float) == weights[name][side]


def test_filters_are_compact_and_tell_layer_1_from_10() -> None:
    weights = {
        f"model.layers.{i}.{part}.weight": (1 - i / 12, i / 12)
        for i in range(12)
        for part in ("mlp.up", "norm")
    }
    weights |= {"model.embed_tokens.weight": (0.5, 0.5), "model.norm.weight": (0.25, 0.75)}
    filters = dict(make_filters(weights))
    assert list(filters)[:3] == ["model.embed_tokens.", "model.layers.0.", "model.layers.1."]
    assert len(filters) == 14
    assert first_match("model.layers.1.norm.weight", filters.items()) == (1 - 1 / 12, 1 / 12)
    assert first_match("model.layers.11.norm.weight", filters.items()) == (1 - 11 / 12, 11 / 12)
    assert make_filters(dict.fromkeys(weights, (0.5, 0.5))) == [("*", (0.5, 0.5))]


def test_a_name_inside_another_name_comes_after_it() -> None:
    weights: dict[str, Weights] = {
        "norm.weight": (1.0, 0.0),
        "pre_norm.weight": (0.0, 1.0),
        "x.pre_norm.weight": (0.5, 0.5),
    }
    filters = make_filters(weights)
    assert {name: first_match(name, filters) for name in weights} == weights


def test_a_star_is_no_name_for_mergekit() -> None:
    with pytest.raises(ExportError, match=r"^tensor a: mergekit's filters cannot address it alone\.$"):
        make_filters({"*": (1.0, 0.0), "a": (0.0, 1.0)})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_both_kinds_of_yaml(value: float) -> None:
    from search.config.strict_yaml import load_yaml

    for found in (yaml.safe_load(f"a: {number(value)}")["a"], load_yaml(f"a: {number(value)}", "x")["a"]):
        assert isinstance(found, float)
        assert found == value


@given(st.text())
def test_quoted_text_survives(text: str) -> None:
    assert yaml.safe_load(f"a: {quoted(text)}") == {"a": text}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tied": True}),
    ("llama", {"tied": False}),
    ("qwen3", {}),
    ("gemma2", {}),
    ("olmo2", {}),
]


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("arch", "options"), CASES)
def test_mergekit_rebuilds_the_same_bits(
    tmp_path: Path, arch: str, options: dict[str, Any], stored: str
) -> None:
    pre, post = save_pair(tmp_path, arch, dtype=stored, **options)
    parents = Parents.pair(str(pre), str(post))
    blend = blend_for(parents)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        (tmp_path / name).mkdir()
        save_checkpoint(parents, blend, dtype, tmp_path / name)
        ours = loaded(tmp_path / name)
        theirs = rebuilt(
            config_text(parents, blend, (str(pre), str(post)), name, []), tmp_path / f"mergekit-{name}"
        )
        assert theirs.keys() == ours.keys() == set(parents.names)
        assert all(tensor.dtype == dtype for tensor in theirs.values())
        assert differing(ours, theirs) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slerp_is_rebuilt_by_linear(tmp_path: Path, dtype: torch.dtype) -> None:
    pre, post = save_pair(tmp_path, "llama")
    parents = Parents.pair(str(pre), str(post))
    blend = blend_for(parents, "slerp")
    assert any(abs(sum(pair) - 1) > 0.01 for pair in blend.weights.values())
    (tmp_path / "ours").mkdir()
    save_checkpoint(parents, blend, dtype, tmp_path / "ours")
    name = str(dtype).removeprefix("torch.")
    theirs = rebuilt(config_text(parents, blend, (str(pre), str(post)), name, []), tmp_path / "mergekit")
    assert differing(loaded(tmp_path / "ours"), theirs) == 0


def with_neox_buffers(folder: Path) -> None:
    """What checkpoints of Pythia's time store beside the weights."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[f"{prefix}bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
        tensors[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.rand(4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mergekit_rebuilds_gpt_neox_that_stores_its_buffers(tmp_path: Path, dtype: torch.dtype) -> None:
    pre, post = save_pair(tmp_path, "gpt_neox")
    parents = Parents.pair(str(pre), str(post))
    assert "asks GPT-NeoX parents for buffers" in caveats(parents, blend_for(parents))[0]
    with_neox_buffers(pre)
    with_neox_buffers(post)
    parents = Parents.pair(str(pre), str(post))
    assert caveats(parents, blend_for(parents)) == []
    blend = blend_for(parents)
    (tmp_path / "ours").mkdir()
    save_checkpoint(parents, blend, dtype, tmp_path / "ours")
    name = str(dtype).removeprefix("torch.")
    theirs = rebuilt(config_text(parents, blend, (str(pre), str(post)), name, []), tmp_path / "mergekit")
    ours = loaded(tmp_path / "ours")
    assert ours.keys() == set(parents.names) <= theirs.keys()
    assert differing(ours, theirs) == 0


def test_an_alias_that_one_parent_stores_is_rebuilt_as_what_it_is_tied_to(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "llama", tied=True)
    tensors = load_file(pre / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, pre / "model.safetensors", metadata={"format": "pt"})
    parents = Parents.pair(str(pre), str(post))
    blend = blend_for(parents)
    theirs = rebuilt(config_text(parents, blend, (str(pre), str(post)), "float32", []), tmp_path / "mergekit")
    assert torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])


@pytest.mark.slow
def test_the_command_line_takes_config_and_tokenizer_from_post(tmp_path: Path) -> None:
    """mergekit takes them from a parent of its own choosing, another one in every process, unless told."""
    folder = tmp_path / "with+plus and@sign"  # mergekit reads '+' and '@' in plain paths as LoRA and revision
    folder.mkdir()
    pre = save_pico(folder / "pre", seed=0, chat_template="pre")
    post = save_pico(folder / "post", seed=1, chat_template="post", max_position_embeddings=256)
    parents = Parents.pair(str(pre), str(post))
    blend = blend_for(parents)
    config = tmp_path / "mergekit_config.yml"
    config.write_text(config_text(parents, blend, (str(pre), str(post)), "float32", ["trial\n1: # x"]))
    (tmp_path / "ours").mkdir()
    save_checkpoint(parents, blend, torch.float32, tmp_path / "ours")
    for attempt in range(2):
        out = tmp_path / f"out-{attempt}"
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(config), str(out)]
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            env={"PYTHONHASHSEED": str(attempt), "HF_HUB_OFFLINE": "1"},
        )
        assert differing(loaded(tmp_path / "ours"), loaded(out)) == 0
        assert '"max_position_embeddings": 256' in (out / "config.json").read_text()
        assert (out / "chat_template.jinja").read_text() == "post"


def test_config_is_read_back_exactly(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "llama")
    parents = Parents.pair(str(pre), str(post))
    path = tmp_path / "mergekit_config.yml"
    for blend in (
        blend_for(parents),
        make_blend(parents, dict.fromkeys(parents.names, (0.1,))),
        blend_for(parents, "slerp"),
    ):
        path.write_text(config_text(parents, blend, (str(pre), str(post)), "bfloat16", ["x"]))
        check_config(path, parents, blend)
        with pytest.raises(ExportError, match="the recipe says"):
            check_config(path, parents, make_blend(parents, dict.fromkeys(parents.names, (0.7,))))
    path.write_text(path.read_text().replace("normalize: false", "normalize: true"))
    with pytest.raises(ExportError, match=r"wanted .'linear'.*Export again"):
        check_config(path, parents, blend)
    path.write_text("models: 3")
    with pytest.raises(ExportError, match="not a config that mergefront wrote"):
        check_config(path, parents, blend)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pre").mkdir()
    assert place_of("pre", None) == str(tmp_path / "pre")
    assert place_of("org/name@main", "c0ffee") == "org/name@c0ffee"
    assert place_of("org/name", None) == "org/name"
    assert str(ModelReference.model_validate(place_of("org/name", "c0ffee"))) == "org/name@c0ffee"
