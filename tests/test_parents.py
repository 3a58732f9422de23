"""Pairs that must be refused, pairs that real releases form and that must not, and where parents come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.errors import CheckpointError, IncompatibleModelsError
from search.merging.checkpoint import SINGLE
from search.merging.parents import Parents, resolve
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


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, **values: torch.Tensor | None) -> None:
    """Add or replace tensors of a single-file checkpoint; None removes one."""
    tensors = {**load_file(folder / SINGLE), **values}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / SINGLE)


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


@pytest.mark.parametrize(
    ("arch", "pre", "post", "wanted"),
    [
        ("llama", {}, {"hidden_size": 48}, "hidden_size: 32 in pre but 48 in post"),
        ("llama", {}, {"num_hidden_layers": 3}, "num_hidden_layers: 2 in pre but 3"),
        ("llama", {}, {"num_attention_heads": 2}, "head_dim: 8 in pre but 16"),
        ("llama", {}, {"num_key_value_heads": 4}, "num_key_value_heads: 2 in pre but 4"),
        ("llama", {}, {"intermediate_size": 48}, "intermediate_size: 64 in pre but 48"),
        ("llama", {}, {"vocab_size": 100}, "vocab_size: 96 in pre but 100"),
        ("llama", {"tied": True}, {"tied": False}, "tie_word_embeddings: True in pre but False"),
        ("llama", {}, {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-06 in pre but 1e-05"),
        ("llama", {}, {"hidden_act": "gelu"}, "hidden_act: 'silu' in pre but 'gelu'"),
        ("llama", {}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters"),
        ("llama", {}, {"attention_bias": True}, "attention_bias: False in pre but True"),
        ("mistral", {}, {"sliding_window": 64}, "sliding_window: 4096 in pre but 64"),
        ("gemma2", {}, {"final_logit_softcapping": None}, "final_logit_softcapping: 30.0 in pre but None"),
        ("llama", {"dtype": "bfloat16"}, {}, "lm_head.weight: type bfloat16 in pre but float32 in post"),
    ],
)  # fmt: skip
def test_first_differing_key_is_named(
    arch: str, pre: dict[str, Any], post: dict[str, Any], wanted: str, tmp_path: Path
) -> None:
    assert wanted in refused(
        save_pico(tmp_path / "pre", arch, **pre), save_pico(tmp_path / "post", arch, **post)
    )


def test_other_architecture(tmp_path: Path) -> None:
    pre, post = save_pico(tmp_path / "pre", "llama"), save_pico(tmp_path / "post", "mistral")
    assert "model_type: 'llama' in pre but 'mistral' in post" in refused(pre, post)
    edit_json(pre / "config.json", architectures=["LlamaModel"])
    other = save_pico(tmp_path / "other", "llama")
    assert "architectures: ['LlamaModel'] in pre" in refused(pre, other)


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


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        ({"model.layers.1.self_attn.q_norm.weight": None}, "q_norm.weight is missing: Qwen3ForCausalLM needs it"),
        ({"model.layers.0.extra.weight": torch.ones(2)}, "extra.weight is stored but Qwen3ForCausalLM has no such"),
        ({"model.norm.weight": torch.ones(31)}, r"model.norm.weight: shape (31,) but config.json says (32,)"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int32)}, "model.norm.weight: type int32 (wanted float32"),
        ({"model.norm.weight": torch.full((32,), float("nan"))}, "model.norm.weight: 32 of 32 values are NaN"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(edit: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "qwen3")
    edit_tensors(pre, **edit)
    message = refused(pre, post, CheckpointError)
    assert wanted in message
    assert str(pre) in message


def test_values_are_read_only_when_asked(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_tensors(pre, **{"model.norm.weight": torch.full((32,), float("nan"))})
    assert Parents.pair(str(pre), str(post), check_values=False).names
    edit_tensors(pre, **{"model.norm.weight": torch.zeros(32)})
    assert Parents.pair(str(pre), str(post)).notes == [
        "pre: 1 tensors are zero throughout (first: model.norm.weight)"
    ]


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


def test_parents_saved_by_different_versions(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "gpt_neox")
    head = load_file(pre / SINGLE)["embed_out.weight"]
    edit_tensors(pre, **{"embed_out.weight": None, "lm_head.weight": head})
    assert "embed_out.weight: only post stores it under this name" in refused(pre, post)


def test_same_size_other_order(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre")
    swapped = pico_tokenizer(order=_LETTERS.replace("ab", "ba"))
    assert "tokenizer: id 4 is 'a' in pre but 'b' in post" in refused(
        pre, save_pico(tmp_path / "post", tokenizer=swapped)
    )


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


def test_token_without_a_row(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    pre, post = save_pico(tmp_path / "pre"), save_pico(tmp_path / "post", tokenizer=tokenizer)
    assert "has no row in the embedding (vocab_size 96)" in refused(pre, post)


def test_tokenizer_missing_or_with_code(tmp_path: Path) -> None:
    pre, bare = save_pico(tmp_path / "pre"), save_pico(tmp_path / "bare", tokenizer=False)
    assert "no tokenizer can be loaded" in refused(pre, bare, CheckpointError)
    evil = save_pico(tmp_path / "evil")
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edit_json(evil / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    assert "tokenizer_config.json: auto_map" in refused(pre, evil, CheckpointError)
    edit_json(evil / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "config.json: auto_map" in refused(evil, pre, CheckpointError)
    assert not (tmp_path / "canary").exists()


def test_config_that_transformers_does_not_know(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_json(pre / "config.json", model_type="no-such-type")
    assert "transformers cannot read it" in refused(pre, post, CheckpointError)
    edit_json(pre / "config.json", model_type="llama", hidden_act="no-such-function")
    edit_json(post / "config.json", hidden_act="no-such-function")
    assert "no causal language model can be built" in refused(pre, post, CheckpointError)


def test_config_cannot_choose_the_attention_code(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_json(
        post / "config.json", _attn_implementation="some-org/some-kernel", attn_implementation="some-org/k"
    )
    assert Parents.pair(str(pre), str(post)).names


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
