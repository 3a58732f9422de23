"""Pairs that real releases form and that must pass, and where parents come from. Those that must not: tests/faults/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search.checkpoints.checkpoint import SINGLE
from search.checkpoints.hub import resolve
from search.checkpoints.parents import Parents
from search.errors import CheckpointError, IncompatibleModelsError
from tests.hostile_files import edit_json, edit_tensors
from tests.pico import (
    _LETTERS,
    ARCHS,
    CHAT_TEMPLATE,
    block_network,
    pico_model,
    pico_tokenizer,
    save_pair,
    save_pico,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def refused(pre: Path, post: Path, kind: type[Exception] = IncompatibleModelsError) -> str:
    with pytest.raises(kind) as caught:
        Parents.pair(str(pre), str(post))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_architecture_is_covered(arch: str, tied: bool, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, arch, tied=tied, shards=3, dtype="bfloat16")
    parents = Parents.pair(str(pre), str(post))
    state = pico_model(arch, tied=tied).state_dict()
    head, embedding = (
        "lm_head.weight",
        "gpt_neox.embed_in.weight" if arch == "gpt_neox" else "model.embed_tokens.weight",
    )
    wanted = set(state) - ({head} if tied else set())
    assert set(parents.parameter.values()) == wanted
    assert dict(parents.tied) == ({head: embedding} if tied else {})
    assert parents.names == tuple(sorted(parents.parameter))
    assert parents.parameters == sum(state[name].numel() for name in wanted)
    assert parents.bytes == 2 * parents.parameters
    assert parents.notes == []
    if arch in ("qwen3", "gemma3", "olmo2"):
        assert any("q_norm" in name for name in parents.names)


def test_harmless_config_differences(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "qwen2")
    edit_json(
        post / "config.json",
        eos_token_id=[2, 3], bos_token_id=None, pad_token_id=None, use_cache=False, transformers_version="4.43.1",
        _name_or_path="/elsewhere", max_window_layers=1, sliding_window=77, attention_dropout=0.1,
        max_position_embeddings=1024, initializer_range=0.5, unsloth_fixed=True, torch_dtype="bfloat16",
    )  # fmt: skip
    parents = Parents.pair(str(pre), str(post))
    assert parents.notes == ["config: max_position_embeddings is 512 in pre, 1024 in post; post's is used"]
    assert parents.config.max_position_embeddings == 1024


def test_config_spelt_the_old_way(tmp_path: Path) -> None:
    """rope_theta at the top level (transformers 4) equals rope_parameters (transformers 5)."""
    pre, post = save_pair(tmp_path, "llama")
    config = json.loads((pre / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config.pop("head_dim")
    config["torch_dtype"] = config.pop("dtype")
    (pre / "config.json").write_text(json.dumps(config))
    assert Parents.pair(str(pre), str(post)).notes == []


def test_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, tied=True)
    embedding = load_file(post / SINGLE)["model.embed_tokens.weight"]
    edit_tensors(post, **{"lm_head.weight": embedding.clone()})
    parents = Parents.pair(str(pre), str(post))
    assert "lm_head.weight" not in parents.names
    assert dict(parents.tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    edit_tensors(post, **{"lm_head.weight": embedding + 1})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(pre, post, CheckpointError)


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "gpt_neox")
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
    }
    edit_tensors(post, **old)
    parents = Parents.pair(str(pre), str(post))
    assert set(parents.ignored) == set(old)
    assert not set(parents.names) & set(old)
    assert parents.notes == ["3 stored buffers are computed by transformers and left out"]


def test_ids_that_one_parent_names(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre")
    more = pico_tokenizer(chat_template=CHAT_TEMPLATE)
    more.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    post = save_pico(tmp_path / "post", tokenizer=more)
    parents = Parents.pair(str(pre), str(post))
    first = 4 + len(_LETTERS)
    assert parents.notes == [
        f"tokenizer: 1 ids are named in post only (id {first}: '<|im_end|>')",
        "chat template: pre has none; post's tokenizer is used and shipped",
    ]
    assert parents.tokenizer().chat_template == CHAT_TEMPLATE
    assert "tokenizer: 1 ids are named in pre only" in Parents.pair(str(post), str(pre)).notes[0]


def test_placeholder_that_got_a_name(tmp_path: Path) -> None:
    tokenizers = []
    for token in ("<|reserved_special_token_0|>", "<|im_start|>"):
        tokenizers.append(pico_tokenizer())
        tokenizers[-1].add_special_tokens({"additional_special_tokens": [token]})
    pre = save_pico(tmp_path / "pre", tokenizer=tokenizers[0])
    post = save_pico(tmp_path / "post", tokenizer=tokenizers[1])
    assert "placeholder ids of pre have names in post" in Parents.pair(str(pre), str(post)).notes[0]
    assert "'<|im_start|>' in pre but '<|reserved" in refused(post, pre)


def test_experts_agree_on_the_ids_that_pre_left_free(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre")
    places = {}
    for name, token in (("a", "<think>"), ("b", "<tool>"), ("c", "<think>"), ("d", "<|reserved_0|>")):
        tokenizer = pico_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        places[name] = str(save_pico(tmp_path / name, seed=ord(name), tokenizer=tokenizer))
    first = 4 + len(_LETTERS)
    with pytest.raises(IncompatibleModelsError, match=f"id {first} is '<think>' in a but '<tool>' in b"):
        Parents.open(str(pre), places)
    del places["b"]
    assert Parents.open(str(pre), places).names


def test_digest_follows_weights_and_tokenizer_not_the_place(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path / "a")
    first = Parents.pair(str(pre), str(post)).digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert Parents.pair(str(tmp_path / "b/pre"), str(tmp_path / "b/post")).digest == first
    assert Parents.pair(str(post), str(pre)).digest != first
    pico_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(post)
    assert Parents.pair(str(pre), str(post)).digest != first


def hub_cache(root: Path, name: str, revision: str = "a" * 40) -> Path:
    repo = root / f"models--{name.replace('/', '--')}"
    snapshot = save_pico(repo / "snapshots" / revision)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repo / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    return snapshot


def test_hub_id_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path, "org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True, raising=False)
    assert resolve("org/name") == (snapshot, "a" * 40)
    assert resolve("org/name@main") == (snapshot, "a" * 40)
    parents = Parents.pair("org/name", "org/name@" + "a" * 40)
    assert parents.revisions == ("a" * 40, "a" * 40)
    for absent in ("org/other", "org/name@v2"):
        with pytest.raises(CheckpointError, match=f"{absent}: no such folder here, not in the hub cache"):
            resolve(absent)


def test_resolve_never_turns_a_mistyped_folder_into_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("models") == (Path("models"), None)
    for where in (
        "models/pre",
        "./pre",
        "/no/such",
        "pre",
        "",
        "a/b/c",
        "../x",
        "nul\0",
        "~nobody/x",
        "-x/y",
    ):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve(where)
