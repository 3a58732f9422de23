"""A whole model merged with one generator in `mask_order` equals the real mergekit with the same seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from search.errors import MergeError
from search.merging.mask_order import mask_order
from search.merging.methods.dare import merge_dare_linear, merge_dare_ties
from search.merging.methods.della import merge_della
from tests.mergekit_oracle import model_by_mergekit, same_bits, stored
from tests.pico import save_pico

SEED = 7
ALIAS = {"lm_head.weight": "model.embed_tokens.weight"}


def parents(tmp: Path, arch: str, experts: int = 2, **options: Any) -> list[Path]:
    """A base and its experts, which share the base's weights but for small differences."""
    folders = [save_pico(tmp / "base", arch, 0, tokenizer=False, **options)]
    for seed in range(1, experts + 1):
        folders.append(save_pico(tmp / f"expert-{seed}", arch, seed, tokenizer=False, **options))
    return folders


def ours(
    folders: list[Path], weights: list[float], density: Any, tied: dict[str, str], seed: int = SEED
) -> dict[str, torch.Tensor]:
    models = [{n: t if t.is_floating_point() else t.float() for n, t in stored(f).items()} for f in folders]
    generator = torch.Generator().manual_seed(seed)
    return {
        name: merge_dare_linear(
            models[0][name],
            [model[name] for model in models[1:]],
            weights,
            density=density,
            generator=generator,
        )
        for name in mask_order(models, tied)
    }


def compare(merged: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert merged.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(merged[name], wanted[name])] == []


@pytest.mark.parametrize(
    ("arch", "tied", "stored_as"),
    [
        ("llama", True, "float32"),
        ("llama", False, "bfloat16"),
        ("qwen2", None, "bfloat16"),
        ("qwen3", True, "float32"),
        ("gemma2", None, "float32"),
        ("gemma3", None, "bfloat16"),
        ("olmo2", None, "float32"),
    ],
)
def test_masks_of_a_whole_model_are_those_of_mergekit(
    arch: str, tied: bool | None, stored_as: str, tmp_path: Path
) -> None:
    folders = parents(tmp_path, arch, tied=tied, dtype=stored_as)
    settings = [{"weight": 0.7, "density": 0.4}, {"weight": -0.3, "density": 0.8}]
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED)
    compare(ours(folders, [0.7, -0.3], [0.4, 0.8], ALIAS if tied else {}), wanted)


def test_layer_10_comes_before_layer_2(tmp_path: Path) -> None:
    folders = parents(tmp_path, "llama", num_hidden_layers=11, tied=True)
    names = mask_order([stored(folders[0])], ALIAS)
    assert [n.split(".")[2] for n in names if "q_proj" in n][:4] == ["0", "1", "10", "2"]
    settings = [{"weight": 0.5, "density": 0.5}] * 2
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED)
    compare(ours(folders, [0.5, 0.5], 0.5, ALIAS), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"lazy_unpickle": True, "async_write": True, "write_threads": 3},
        {"low_cpu_memory": True, "clone_tensors": True, "out_shard_size": 5000},
    ],
)
def test_shards_and_options_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    folders = parents(tmp_path, "llama", shards=4, tied=False)
    assert len(list(folders[0].glob("*.safetensors"))) > 2
    settings = [{"weight": 0.5, "density": 0.5}, {"weight": 0.25, "density": 1.0}]  # 1 draws nothing
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED, options=options)
    compare(ours(folders, [0.5, 0.25], [0.5, 1.0], {}), wanted)


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_other_random_methods(method: str, tmp_path: Path) -> None:
    folders = parents(tmp_path, "llama", 3, tied=True)
    weights, density = [0.7, -0.3, 0.0], [0.3, 0.7, 0.5]
    settings = [{"weight": w, "density": d} for w, d in zip(weights, density, strict=True)]
    extra = {"epsilon": 0.2} if method == "della" else {}
    wanted = model_by_mergekit(
        tmp_path / "out", method, folders, [{**one, **extra} for one in settings], SEED, **{"lambda": 1.5}
    )
    models, merged = [stored(folder) for folder in folders], {}
    generator = torch.Generator().manual_seed(SEED)
    for name in mask_order(models, ALIAS):
        base, *experts = (model[name] for model in models)
        common: dict[str, Any] = {"density": density, "generator": generator, "scaling": 1.5}
        if method == "della":
            merged[name] = merge_della(base, experts, weights, epsilon=0.2, **common)
        else:
            merged[name] = merge_dare_ties(base, experts, weights, **common)
    compare(merged, wanted)


def test_an_alias_that_all_parents_store_draws_masks_of_its_own(tmp_path: Path) -> None:
    folders = parents(tmp_path, "llama", tied=True)
    for folder in folders:
        tensors = stored(folder)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = [{"weight": 0.5, "density": 0.5}] * 2
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED)
    assert not torch.equal(wanted["lm_head.weight"], wanted["model.embed_tokens.weight"])
    compare(ours(folders, [0.5, 0.5], 0.5, ALIAS), wanted)


def test_gpt_neox_draws_for_its_buffers(tmp_path: Path) -> None:
    folders = parents(tmp_path, "gpt_neox")
    for folder in folders:
        tensors = stored(folder)
        for layer in range(2):
            prefix = f"gpt_neox.layers.{layer}.attention."
            tensors[f"{prefix}bias"] = torch.tril(torch.ones(1, 1, 8, 8, dtype=torch.bool))
            tensors[f"{prefix}masked_bias"] = torch.tensor(-1e9)
            tensors[f"{prefix}rotary_emb.inv_freq"] = torch.rand(4)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = [{"weight": 0.5, "density": 0.5}] * 2
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED)
    compare(ours(folders, [0.5, 0.5], 0.5, {}), wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_an_architecture_that_mergekit_infers(tied: bool, tmp_path: Path) -> None:
    config = transformers.SmolLM3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    folders = [tmp_path / str(k) for k in range(3)]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        transformers.SmolLM3ForCausalLM(config).save_pretrained(folder)
    settings = [{"weight": 0.5, "density": 0.5}] * 2
    wanted = model_by_mergekit(tmp_path / "out", "dare_linear", folders, settings, SEED)
    compare(ours(folders, [0.5, 0.5], 0.5, {}), wanted)


@pytest.mark.slow
def test_the_command_line_with_another_hash_seed_and_two_threads(tmp_path: Path) -> None:
    folders = parents(tmp_path, "llama", tied=True)
    models = [{"model": str(f), "parameters": {"weight": 0.5, "density": 0.5}} for f in folders[1:]]
    config = {
        "merge_method": "dare_linear",
        "base_model": str(folders[0]),
        "models": models,
        "dtype": "float32",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(tmp_path / "config.yml")]
    flags = ["--random-seed", str(SEED), "-j", "2", "--lazy-unpickle"]
    for attempt in "12":
        out = tmp_path / attempt
        subprocess.run(
            [*command, str(out), *flags], check=True, capture_output=True,
            env={"PYTHONHASHSEED": attempt, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        compare(ours(folders, [0.5, 0.5], 0.5, ALIAS), stored(out))


def test_only_what_is_certain_is_ordered() -> None:
    names = ["b", "a"]
    assert mask_order([names, names], {}) == ("a", "b")
    with pytest.raises(MergeError, match=r"tensor lm_head\.weight: an alias that some parents store"):
        mask_order([names, [*names, "lm_head.weight"]], {"lm_head.weight": "a"})
    with pytest.raises(MergeError, match="tensor c: missing in a parent"):
        mask_order([[*names, "c"], names], {})
    with pytest.raises(MergeError, match="no parents"):
        mask_order([], {})
