"""LoRA adapters as parents, against the real peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from search.checkpoints.adapters import average_adapters, merged_adapter
from search.checkpoints.checkpoint import ADAPTER_CONFIG as CONFIG
from search.checkpoints.checkpoint import ADAPTER_WEIGHTS as WEIGHTS
from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.lora_config import _KNOWN, _MORE
from search.checkpoints.parents import Parents
from search.config.study_file import load_study_file
from search.errors import CheckpointError, IncompatibleModelsError, MergeError
from search.export.folder import export_rows
from search.results.board import read_board
from search.running.launch import create
from search.study import run
from tests.conftest import Cli
from tests.merging.test_mergekit_config import differing, loaded
from tests.pico import VOCAB, save_pico
from tests.pico_study import write_questions, write_study

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEFRONT_CACHE", str(tmp_path / "cache"))


def save_adapter(pre: Path, folder: Path, seed: int = 1, **config: Any) -> Path:
    """An adapter of random weights, as peft saves it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pre), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
            elif "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def by_peft(pre: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pre), folder).merge_and_unload()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"alpha_pattern": {r"layers\.[1-9]\..*(q|up)_proj": 3, "q_proj": 5}, "use_rslora": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False},
    ],
    ids=lambda config: "-".join([*config, str(config.get("init_lora_weights", ""))]).strip("-") or "plain",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_as_peft_merges_it(config: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, dtype=dtype, tied=False)
    adapter = save_adapter(pre, tmp_path / "adapter", **config)
    folder = merged_adapter(adapter, Checkpoint.open(pre))
    ours, base, wanted = loaded(folder), loaded(pre), by_peft(pre, adapter)
    assert ours.keys() == base.keys()
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert changed == [name for name in ours if not torch.equal(wanted[name], base[name])]
    # peft rounds the product and the sum in bfloat16, here both are float32 and rounded once.
    allowed = 1e-6 if dtype == "float32" else 2e-3
    for name, tensor in ours.items():
        assert tensor.dtype == base[name].dtype
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=0, atol=allowed)
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged_adapter(adapter, Checkpoint.open(pre)) == folder  # found again, not made again


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(3, 60).view(3, -1)).logits
    return found


def trained_logits(pre: Path, folder: Path) -> torch.Tensor:
    """What the model computes that was trained: the adapter beside its base, not merged."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pre), folder))


def merged_logits(pre: Path, folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(merged_adapter(folder, Checkpoint.open(pre))))


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_layers_are_turned_as_the_model_has_them_not_as_the_config_says(
    tmp_path: Path, fan_in_fan_out: bool
) -> None:
    """GPT-2 has Conv1D but a linear head; peft's config then says what the last of them needed."""
    pre = tmp_path / "gpt2"
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64}
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(pre)
    modules = ["c_attn", "c_proj", "c_fc", "lm_head", "wte"]
    folder = save_adapter(pre, tmp_path / "a", target_modules=modules, fan_in_fan_out=fan_in_fan_out)
    for said in (True, False):
        edited(folder, fan_in_fan_out=said)
        torch.testing.assert_close(merged_logits(pre, folder), trained_logits(pre, folder), rtol=0, atol=1e-5)
    edited(folder, target_parameters=["c_attn.weight"])
    with pytest.raises(CheckpointError, match=r"LoRA of a parameter \(target_parameters\) of a Conv1D"):
        merged_adapter(folder, Checkpoint.open(pre))


@pytest.mark.parametrize("arch", ["gemma3", "gpt_neox"])
def test_other_architectures(arch: str, tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", arch, tied=False)
    modules = {"gemma3": ["q_proj", "embed_tokens", "lm_head"], "gpt_neox": ["query_key_value", "dense"]}[
        arch
    ]
    folder = save_adapter(pre, tmp_path / "a", target_modules=modules, bias="all")
    torch.testing.assert_close(merged_logits(pre, folder), trained_logits(pre, folder), rtol=0, atol=1e-5)


UNTIED_ADVICE = r"shares between input embedding and head .* Save the base untied"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=lambda config: "-".join(f"{key}:{value}" for key, value in config.items()),
)
def test_embeddings_that_the_base_ties(config: dict[str, Any], tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=True)
    folder = save_adapter(pre, tmp_path / "adapter", **config)
    with pytest.raises(CheckpointError, match=UNTIED_ADVICE) as error:
        merged_adapter(folder, Checkpoint.open(pre))
    assert "\n" not in str(error.value)
    # The advice is right: an untied copy of the base merges to what was trained.
    model = AutoModelForCausalLM.from_pretrained(pre)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "untied").names
    torch.testing.assert_close(
        merged_logits(tmp_path / "untied", folder), trained_logits(pre, folder), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_are_saved_but_not_changed(tied: bool, tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=tied)
    folder = save_adapter(pre, tmp_path / "adapter", ensure_weight_tying=True)
    tensors = load_file(folder / WEIGHTS)
    embedding = loaded(pre)["model.embed_tokens.weight"]
    head = embedding if tied else loaded(pre)["lm_head.weight"]
    extra = {"model.embed_tokens.weight": embedding.clone(), "lm_head.weight": head.clone()}
    save_file(tensors | {f"base_model.model.{key}": value for key, value in extra.items()}, folder / WEIGHTS)
    torch.testing.assert_close(merged_logits(pre, folder), trained_logits(pre, folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_is_refused_and_its_conversion_is_not(
    start: str, tmp_path: Path
) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pre), LoraConfig(init_lora_weights=start, **settings)
    )
    model.peft_config[
        "default"
    ].init_lora_weights = True  # as peft's guide has it: the start, for its difference
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "asis")
    wanted = logits(model)
    with pytest.raises(
        CheckpointError, match=f"init_lora_weights: found '{start}', wanted true, false or one"
    ):
        merged_adapter(tmp_path / "asis", Checkpoint.open(pre))
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    torch.testing.assert_close(merged_logits(pre, tmp_path / "converted"), wanted, rtol=0, atol=1e-4)


def test_every_key_of_peft_is_known() -> None:
    """A key that a new peft adds must be judged before its adapters are merged."""
    assert set(LoraConfig().to_dict()) <= _KNOWN | set(_MORE)


def test_the_product_is_exact(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    adapter = save_adapter(pre, tmp_path / "adapter", target_modules=["q_proj"])
    ours, base, parts = (
        loaded(merged_adapter(adapter, Checkpoint.open(pre))),
        loaded(pre),
        load_file(adapter / WEIGHTS),
    )
    name = "model.layers.1.self_attn.q_proj"
    a, b = (parts[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    exact = base[f"{name}.weight"].double() + 6 / 4 * (b @ a)
    torch.testing.assert_close(ours[f"{name}.weight"].double(), exact, rtol=0, atol=1e-7)


def test_adapters_are_experts_of_a_study(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, dtype="bfloat16", tied=True)
    for seed, name in enumerate(("brief", "kind"), start=1):
        save_adapter(pre, tmp_path / name, seed=seed)
    write_questions(tmp_path / "questions.jsonl")
    path = write_study(tmp_path, experts=("brief", "kind"), trials=4)
    store, problem = create(load_study_file(path), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    run(store, problem)
    board = read_board(store)
    row = board.of_kind("search")[0]
    (folder,) = export_rows(
        store, board, [row], tmp_path / "out", weights=True, overwrite=False, overrides=[]
    )
    text = (folder / "mergekit_config.yml").read_text()
    assert f"CAUTION: brief is the adapter {tmp_path / 'brief'}" in text
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(text)),
        str(tmp_path / "rebuilt"),
        MergeOptions(quiet=True),
    )
    assert differing(loaded(folder / "model"), loaded(tmp_path / "rebuilt")) == 0
    assert problem.idle  # the adapters left the embeddings alone


def test_an_adapter_may_be_post(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0)
    save_adapter(pre, tmp_path / "post")
    parents = Parents.pair(str(pre), str(tmp_path / "post"))
    assert list(parents.adapters) == ["post"]
    assert parents.post.folder.is_relative_to(tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"no config\.json|PEFT adapter"):
        Parents.pair(str(tmp_path / "post"), str(pre))


def edited(folder: Path, **config: Any) -> Path:
    value = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(value))
    return folder


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    base = Checkpoint.open(pre)
    whole = save_adapter(pre, tmp_path / "whole")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(whole, tmp_path / name))

    def with_tensors(name: str, change: dict[str, torch.Tensor | None]) -> Path:
        folder = copy(name)
        tensors = {**load_file(folder / WEIGHTS), **change}
        save_file({key: t for key, t in tensors.items() if t is not None}, folder / WEIGHTS)
        return folder

    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    other = key.format("A").replace("layers.0", "layers.9"), key.format("B").replace("layers.0", "layers.9")
    for folder, wanted in (
        (edited(copy("a"), peft_type="IA3"), "of type 'IA3', wanted LORA"),
        (edited(copy("b"), use_dora=True), r"LoRA with DoRA \(use_dora\)"),
        (edited(copy("c"), lora_alpha="many"), "lora_alpha: found 'many'"),
        (with_tensors("d", {key.format("A"): None}), "has lora_B, wanted the two halves of a LoRA pair"),
        (
            with_tensors("e", {key.format("A"): torch.zeros(4, 9)}),
            r"q_proj.weight: shape \(32, 9\) but \(32, 32\)",
        ),
        (with_tensors("f", {key.format("A"): torch.zeros(3, 32)}), r"LoRA of shapes \(3, 32\) and \(32, 4\)"),
        (
            with_tensors("g", {other[0]: torch.zeros(4, 32), other[1]: torch.zeros(32, 4)}),
            "changes model.layers.9.self_attn.q_proj.weight, which .* does not have",
        ),
    ):
        with pytest.raises(CheckpointError, match=wanted) as error:
            merged_adapter(folder, base)
        assert "\n" not in str(error.value)
    (copy("h") / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        merged_adapter(tmp_path / "h", base)
    torn = copy("i") / WEIGHTS
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        merged_adapter(torn.parent, base)
    infinite = with_tensors(
        "j", {key.format("B"): torch.full((32, 4), 3e38), key.format("A"): torch.ones(4, 32)}
    )
    with pytest.raises(MergeError, match="a merged value is not finite"):
        merged_adapter(infinite, base)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))  # nothing half-made is left


def test_an_adapter_that_changes_nothing_is_no_expert(tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0)
    folders = [save_adapter(pre, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    tensors = load_file(folders[1] / WEIGHTS)
    save_file(
        {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}, folders[1] / WEIGHTS
    )
    with pytest.raises(
        IncompatibleModelsError, match="b: every tensor is as in pre, so its task vector is zero"
    ):
        Parents.open(str(pre), {name: str(folder) for name, folder in zip("ab", folders, strict=True)})


def test_separate_averages_have_cross_terms(tmp_path: Path) -> None:
    """mean(B) mean(A) of two adapters is a quarter of all four products."""
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    folders = [save_adapter(pre, tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    average_adapters(folders, [0.5, 0.5], tmp_path / "mean")
    name = "model.layers.0.mlp.up_proj"
    parts = [load_file(folder / WEIGHTS) for folder in folders]
    a, b = ([part[f"base_model.model.{name}.lora_{side}.weight"].double() for part in parts] for side in "AB")
    merged, base = loaded(merged_adapter(tmp_path / "mean", Checkpoint.open(pre))), loaded(pre)
    wanted = base[f"{name}.weight"].double() + 1.5 * sum(0.25 * y @ x for x in a for y in b)
    torch.testing.assert_close(merged[f"{name}.weight"].double(), wanted, rtol=0, atol=1e-6)
    edited(folders[1], lora_alpha=99)
    with pytest.raises(CheckpointError, match="other modules, ranks or scaling than"):
        average_adapters(folders, [0.5, 0.5], tmp_path / "again")
    with pytest.raises(MergeError, match="2 adapters with weights"):
        average_adapters(folders, [0.5], tmp_path / "again")
    edited(folders[1], lora_alpha=6)
    with pytest.raises(MergeError, match="a sum of the adapters is not finite"):
        average_adapters(folders, [1e38, 1e38 * 1000], tmp_path / "again")
    edited(folders[1], init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match="init_lora_weights: found 'pissa'"):
        average_adapters(folders, [0.5, 0.5], tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_merge_of_halves_by_the_command_line(cli: Cli, tmp_path: Path) -> None:
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    folders = {name: save_adapter(pre, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    start = ["merge", "lora_separate", "--pre", str(pre)]
    both = [part for name, folder in folders.items() for part in ("--expert", f"{name}={folder}")]
    code, _, err = cli(*start, *both, "--weight", "a=0.75", "--weight=b=0.25", "--out", str(tmp_path / "out"))
    assert code == 0, err
    average_adapters(list(folders.values()), [0.75, 0.25], tmp_path / "mean")
    wanted = loaded(merged_adapter(tmp_path / "mean", Checkpoint.open(pre)))
    assert differing(loaded(tmp_path / "out"), wanted) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    code, _, err = cli("verify", str(tmp_path / "out"))
    assert code == 0, err
    whole = save_pico(tmp_path / "whole", seed=5, tied=False)
    code, _, err = cli(*start, *both, "--expert", f"c={whole}", "--out", str(tmp_path / "no"))
    assert code == 2
    assert "lora_separate: c is a whole checkpoint" in err
    assert not (tmp_path / "no").exists()


def test_what_has_no_halves_is_not_averaged(tmp_path: Path) -> None:
    """A norm that is saved whole is kept where all adapters agree, and refused where they do not."""
    pre = save_pico(tmp_path / "pre", seed=0, tied=False)
    folders = [save_adapter(pre, tmp_path / n, seed=k, modules_to_save=["norm"]) for k, n in enumerate("ab")]
    with pytest.raises(CheckpointError, match=r"norm.* is saved as a whole and not as in"):
        average_adapters(folders, [0.5, 0.25], tmp_path / "mean")
    first, other = (load_file(folder / WEIGHTS) for folder in folders)
    whole = {name: tensor for name, tensor in first.items() if "lora_" not in name}
    assert whole
    save_file({**other, **whole}, folders[1] / WEIGHTS)
    edited(folders[1], use_rslora=False)
    average_adapters(folders, [0.5, 0.25], tmp_path / "mean")
    mean = load_file(tmp_path / "mean" / WEIGHTS)
    assert all(torch.equal(mean[name], tensor) for name, tensor in whole.items())
