"""Parents that do not fit together are refused with the first differing key and both values, and nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from search.checkpoints.checkpoint import SINGLE
from search.config.study_file import load_study_file
from search.errors import CheckpointError, IncompatibleModelsError
from search.running.launch import create
from search.storage.store import StudyStore
from tests.conftest import Cli
from tests.hostile_files import edit_json, edit_tensors, refused_pair
from tests.pico import _LETTERS, block_network, pico_tokenizer, save_experts, save_pair, save_pico
from tests.pico_study import write_questions, write_study


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


@pytest.mark.fault(21)
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
    assert wanted in refused_pair(
        save_pico(tmp_path / "pre", arch, **pre), save_pico(tmp_path / "post", arch, **post)
    )


@pytest.mark.fault(21)
def test_other_architecture(tmp_path: Path) -> None:
    pre, post = save_pico(tmp_path / "pre", "llama"), save_pico(tmp_path / "post", "mistral")
    assert "model_type: 'llama' in pre but 'mistral' in post" in refused_pair(pre, post)
    edit_json(pre / "config.json", architectures=["LlamaModel"])
    other = save_pico(tmp_path / "other", "llama")
    assert "architectures: ['LlamaModel'] in pre" in refused_pair(pre, other)


@pytest.mark.fault(21)
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
    message = refused_pair(pre, post, CheckpointError)
    assert wanted in message
    assert str(pre) in message


@pytest.mark.fault(21)
def test_parents_saved_by_different_versions(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, "gpt_neox")
    head = load_file(pre / SINGLE)["embed_out.weight"]
    edit_tensors(pre, **{"embed_out.weight": None, "lm_head.weight": head})
    assert "embed_out.weight: only post stores it under this name" in refused_pair(pre, post)


@pytest.mark.fault(21)
def test_same_size_other_order(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre")
    swapped = pico_tokenizer(order=_LETTERS.replace("ab", "ba"))
    assert "tokenizer: id 4 is 'a' in pre but 'b' in post" in refused_pair(
        pre, save_pico(tmp_path / "post", tokenizer=swapped)
    )


@pytest.mark.fault(21)
def test_token_without_a_row(tmp_path: Path) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(40)])
    pre, post = save_pico(tmp_path / "pre"), save_pico(tmp_path / "post", tokenizer=tokenizer)
    assert "has no row in the embedding (vocab_size 96)" in refused_pair(pre, post)


@pytest.mark.fault(21)
def test_quantised_parent(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_json(post / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantization_config: the weights are quantised" in refused_pair(pre, post, CheckpointError)


@pytest.mark.fault(21)
def test_a_storage_with_another_study_stays_as_it_is(tmp_path: Path) -> None:
    """Oracle: the bytes of the database."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create(load_study_file(write_study(tmp_path)), url, "cpu")
    before = (tmp_path / "study.db").read_bytes()
    wide = save_pico(tmp_path / "wide", intermediate_size=96)
    config = load_study_file(tmp_path / "study.yaml", ["name=other", f"parents.post={wide}"])
    with pytest.raises(IncompatibleModelsError, match="intermediate_size: 64 in pre but 96 in post"):
        create(config, url, "cpu")
    assert (tmp_path / "study.db").read_bytes() == before
    assert StudyStore.find(url, "other") is None


@pytest.mark.fault(21)
def test_one_expert_of_several_is_named(tmp_path: Path) -> None:
    save_experts(tmp_path, ("math", "code"))
    study = write_study(tmp_path, experts=("math", "code", "odd"))
    save_pico(tmp_path / "odd", num_hidden_layers=3)
    write_questions(tmp_path / "questions.jsonl", 8)
    with pytest.raises(IncompatibleModelsError, match="num_hidden_layers: 2 in pre but 3 in odd"):
        create(load_study_file(study), f"sqlite:///{tmp_path / 'runs' / 'study.db'}", "cpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(21)
def test_unsafe_and_incompatible_parents_exit_with_3(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    save_pico(tmp_path / "wide", intermediate_size=96)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"PK\x03\x04")
    for other, message in (("wide", "intermediate_size"), ("pickled", "pytorch_model.bin"), ("none", "none")):
        code, out, err = cli("launch", study, "--set", f"parents.post={tmp_path / other}")
        assert (code, out) == (3, ""), err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists(), "refused before anything was written"
