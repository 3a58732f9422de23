"""Adapter folders that are hostile, damaged or linked, and the cache of merged ones."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import search.checkpoints.adapters
from search.checkpoints.adapters import KIND, merged_adapter
from search.checkpoints.checkpoint import Checkpoint, is_adapter
from search.checkpoints.lora_config import _KNOWN, _MORE
from search.checkpoints.parents import Parents
from search.config.study_file import load_study_file
from search.errors import CheckpointError, DiskError, MergeError
from search.export.folder import export_rows
from search.results.board import read_board
from search.running.launch import create, reopen
from search.storage.manifest import write_manifest
from search.storage.staging import locked_folder, staged_folder
from search.study import run
from tests.merging.test_mergekit_config import loaded
from tests.pico import CHAT_TEMPLATE, pico_tokenizer, save_pico
from tests.pico_study import write_questions, write_study

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGEFRONT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def pre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico(tmp_path_factory.mktemp("base") / "pre", seed=0, tied=False)


def pair(module: str = MODULE, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_A.weight": 0.1 * torch.randn(rank, 32, generator=draw),
        f"base_model.model.{module}.lora_B.weight": 0.1 * torch.randn(32, rank, generator=draw),
    }


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(PLAIN | config))
    save_file(pair() if tensors is None else tensors, folder / WEIGHTS)
    return folder


def refused(folder: Path, base: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        merged_adapter(folder, Checkpoint.open(base))
    text = str(error.value)
    assert text.isprintable()
    assert str(folder) in text
    return text


A, B = pair()


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"r": 0}, "r: found 0, wanted a rank"),
        ({"r": True}, "r: found True, wanted a rank"),
        ({"r": "2"}, "r: found '2', wanted a rank"),
        ({"r": 3}, f"r: found 3 for {MODULE}.weight, whose LoRA has rank 2"),
        ({"rank_pattern": {"q_proj": 4}}, f"r: found 4 for {MODULE}.weight, whose LoRA has rank 2"),
        ({"lora_alpha": 10**400}, "lora_alpha: found 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan, wanted a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: found inf, wanted a number"),
        ({"lora_alpha": None}, "lora_alpha: found None, wanted a number"),
        ({"lora_alpha": [[]]}, "lora_alpha: found a list, wanted a number"),
        ({"use_rslora": "yes"}, "use_rslora: found 'yes', wanted true or false"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: found a list, wanted an object"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern: found 'q_proj', wanted an object"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern: found '1', wanted a number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: found 0, wanted a rank"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: found the pattern '(': it ends too early"),
        ({"alpha_pattern": {"(.*)*": 1}}, "found the pattern '(.*)*': a repetition within a repetition"),
        (
            {"alpha_pattern": {f".*{i}": 1 for i in range(65)}},
            "found 65 patterns, 65 of which are no plain names",
        ),
        ({"bias": 7}, "bias: found 7, wanted none, all or lora_only"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: found 'lora_ga', wanted true, false"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: found 'loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: found 'corda'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights: found 'mica'"),
        ({"init_lora_weights": None}, "init_lora_weights: found None"),
        ({"init_lora_weights": 1}, "init_lora_weights: found 1"),
        ({"alora_invocation_tokens": []}, "a LoRA with Activated LoRA (alora_invocation_tokens)"),
        ({"trainable_token_indices": [1]}, "a LoRA with trainable tokens (trainable_token_indices)"),
        ({"use_bdlora": {}}, "a LoRA with BD-LoRA (use_bdlora)"),
        ({"arrow_config": {"top_k": 1}}, "a LoRA with Arrow routing (arrow_config)"),
        ({"kasa_config": {}}, "a LoRA with KaSA (kasa_config)"),
        ({"monteclora_config": {}}, "a LoRA with MonteCLoRA"),
        ({"velora_config": {}}, "a LoRA with VeLoRA"),
        ({"layer_replication": [[0, 1]]}, "a LoRA with repeated layers"),
        (
            {"use_next_great_thing": True},
            "use_next_great_thing: found True, and nothing is known of this key",
        ),
        ({"peft_type": {}}, "of type an object, wanted LORA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_make_no_sense(config: dict[str, Any], wanted: str, pre: Path, tmp_path: Path) -> None:
    assert wanted in refused(write(tmp_path / "a", **config), pre)


@pytest.mark.parametrize(
    ("tensors", "wanted"),
    [
        ({A: torch.zeros(2), B: torch.zeros(32, 2)}, "LoRA of shapes (2,) and (32, 2), wanted (r, in)"),
        ({A: torch.zeros(2, 32), B: torch.tensor(1.0)}, "LoRA of shapes (2, 32) and (), wanted (r, in)"),
        ({A: torch.zeros(0, 32), B: torch.zeros(32, 0)}, "LoRA of shapes (0, 32) and (32, 0), wanted (r, in)"),
        ({A: torch.zeros(2, 32), B: torch.zeros(32, 2).int()}, "type int32 (wanted float32"),
        ({A: torch.zeros(2, 32).to(torch.float8_e4m3fn), B: torch.zeros(32, 2)}, "type float8_e4m3fn"),
        ({A: torch.zeros(2, 32)}, "has lora_A, wanted the two halves"),
        (
            {key.replace("lora_", "lora_embedding_").removesuffix(".weight"): value for key, value in pair().items()},
            "has lora_embedding_A and lora_embedding_B, wanted the two halves of a LoRA pair, lora_A and lora_B",
        ),
        (pair("model.norm"), "LoRA of a LlamaRMSNorm, wanted a linear layer or an embedding"),
        (pair() | {A.removesuffix(".weight"): torch.zeros(2, 32)}, "is stored twice"),
        ({"model.norm.weight": torch.zeros(32), "model.base_layer.norm.weight": torch.zeros(32)}, "is stored twice"),
        ({"model.norm.weight": torch.zeros(())}, "shape () but (32,)"),
        ({"x\x1b[31m\n": torch.zeros(1)}, r"changes x\x1b[31m\n, which"),
        (pair() | {f"base_model.model.{MODULE}.lora_B.bias": torch.zeros(32)}, "lora_B.bias, which"),
        ({}, "holds no LoRA weights"),
    ],
)  # fmt: skip
def test_tensors_that_make_no_sense(
    tensors: dict[str, torch.Tensor], wanted: str, pre: Path, tmp_path: Path
) -> None:
    assert wanted in refused(write(tmp_path / "a", tensors), pre)


# Mostly keys that are read, so that not every example ends at one that is refused whatever it holds.
_KEYS = st.one_of(
    *[st.sampled_from(["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"])]
    * 4,
    st.sampled_from(sorted([*_KNOWN, *_MORE, "runtime", "auto_map", ""])),
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["LORA", "gaussian", "eva", "none", "q_proj", ".*", "(", 2, 10**400]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=3) | st.sampled_from(["q_proj", ".*_proj", "(a*)*"]), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip
_NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["base_model.model.", ""]),
    st.sampled_from([MODULE, "model.norm", "model.embed_tokens", "lm_head", "model", "", "modules_to_save"]),
    st.sampled_from(
        [
            *(".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", ".weight", ""),
            *(".base_layer.weight", ".lora_magnitude_vector"),
        ]
    ),
)
_SHAPES = st.sampled_from(
    [(), (2,), (2, 32), (32, 2), (0, 32), (32, 0), (32, 32), (32,), (2, 32, 1), (96, 32), (2, 96)]
)
_TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(_KEYS, _JSON, max_size=2),
    based=st.integers(0, 9).map(bool),
    tensors=st.dictionaries(
        _NAMES, st.tuples(_SHAPES, _TYPES, st.sampled_from([0.0, 1.0, 3e38])), max_size=2
    ),
    fitting=st.integers(0, 9).map(bool),
)
def test_any_config_and_any_tensors(
    config: dict[str, Any],
    based: bool,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype, float]],
    fitting: bool,
    pre: Path,
    tmp_path: Path,
) -> None:
    """Either one line of error or a checkpoint that opens."""
    folder = tmp_path / "any"
    shutil.rmtree(folder, ignore_errors=True)
    some = {name: torch.full(shape, value).to(dtype) for name, (shape, dtype, value) in tensors.items()}
    write(folder, (pair() if fitting else {}) | some)
    (folder / CONFIG).write_text(json.dumps((PLAIN if based else {}) | config))
    said = ""
    try:
        merged = Checkpoint.open(merged_adapter(folder, Checkpoint.open(pre)))
        assert merged.names == Checkpoint.open(pre).names
        merged.check_finite()
    except (CheckpointError, MergeError) as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) < 1500
    event(said.removeprefix(str(folder))[:24] or "merged")


def test_a_slow_pattern_does_not_hang(pre: Path, tmp_path: Path) -> None:
    began = time.process_time()
    assert "a repetition within a repetition" in refused(
        write(tmp_path / "a", alpha_pattern={"(([a-z_0-9.])+)+!": 1}), pre
    )
    merged_adapter(
        write(tmp_path / "b", alpha_pattern={"(a|aa|model|.)" + ".*" * 100 + "x": 1}), Checkpoint.open(pre)
    )
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", ["chat_template.jinja", CONFIG, WEIGHTS])
def test_links_that_leave_the_folder(name: str, pre: Path, tmp_path: Path) -> None:
    folder, secret = write(tmp_path / "a"), tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("secret")
    (folder / name).symlink_to(secret)
    assert "a link that leads out of the folder" in refused(folder, pre)
    assert not list((tmp_path / "cache").rglob(name))
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        search.checkpoints.adapters.average_adapters([folder], [1.0], tmp_path / "mean")
    (folder / name).unlink()
    secret.rename(folder / f"own-{name}")
    (folder / name).symlink_to(f"own-{name}")
    assert merged_adapter(folder, Checkpoint.open(pre)).is_dir()


def test_links_of_a_hub_cache(pre: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = write(repository / "snapshots" / ("a" * 40))
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert merged_adapter(snapshot, Checkpoint.open(pre)).is_dir()
    (tmp_path / "link").symlink_to(snapshot)
    assert merged_adapter(tmp_path / "link", Checkpoint.open(pre)).is_dir()
    (snapshot / "chat_template.jinja").symlink_to("../../../secret")
    (tmp_path / "secret").write_text("secret")
    assert "a link that leads out" in refused(snapshot, pre)


def test_whatever_is_copied_makes_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = save_pico(tmp_path / "pre", tied=False), write(tmp_path / "a")
    seen: list[Path] = []

    def merged() -> Path:
        seen.append(merged_adapter(folder, Checkpoint.open(base)))
        return seen[-1]

    merged()
    pico_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(base)
    assert (merged() / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (seen[-1] / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    assert (merged() / "generation_config.json").read_text() == '{"temperature": 0.5}'
    (folder / "merges.txt").write_text("same")
    merged()
    (folder / "merges.txt").rename(folder / "vocab.txt")  # the same bytes under another name
    assert (merged() / "vocab.txt").read_text() == "same"
    write(folder, pair(seed=1))
    merged()
    monkeypatch.setattr("search.checkpoints.adapters.FORMAT", 99)
    merged()
    assert len(set(seen)) == len(seen) == 7
    merged()
    assert seen[-1] == seen[-2]


def flip_last_bits(folder: Path) -> None:
    """What another processor's sum of products may do to a float32."""
    file = folder / "model.safetensors"
    tensors = loaded(folder)
    name = f"{MODULE}.weight"
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(9.0))
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(folder, {"kind": KIND})


def test_identity_is_that_of_adapter_and_base(pre: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    parents = Parents.pair(str(pre), str(folder))
    merged = parents.post.sha256()
    flip_last_bits(parents.post.folder)
    elsewhere = Parents.pair(str(pre), str(folder))
    assert elsewhere.post.sha256() != merged
    assert elsewhere.digest == parents.digest
    pico_tokenizer().save_pretrained(folder)  # equal to the base's
    assert Parents.pair(str(pre), str(folder)).digest == parents.digest
    write(folder, pair(seed=1))
    assert Parents.pair(str(pre), str(folder)).digest != parents.digest
    write(folder, lora_alpha=5)
    assert Parents.pair(str(pre), str(folder)).digest != parents.digest


def test_identity_of_whole_checkpoints_stays_what_it_was(tmp_path: Path) -> None:
    """Stored studies compare it: over weights, configs and the first expert's tokenizer, in this order."""
    import hashlib

    parents = Parents.pair(str(save_pico(tmp_path / "pre")), str(save_pico(tmp_path / "post", seed=1)))
    whole = hashlib.sha256()
    for one in parents.everybody:
        whole.update(one.sha256().encode())
    tokenizer: Any = parents.tokenizer()
    whole.update(tokenizer.backend_tokenizer.to_str().encode())
    whole.update(b"None")
    assert parents.digest == whole.hexdigest()


def test_a_study_goes_on_where_the_merged_bits_differ(tmp_path: Path) -> None:
    save_pico(tmp_path / "pre", seed=0, tied=False)
    write(tmp_path / "post")
    write_questions(tmp_path / "questions.jsonl")
    path, url = write_study(tmp_path, trials=2), f"sqlite:///{tmp_path / 'study.db'}"
    store, problem = create(load_study_file(path), url, "cpu")
    run(store, problem)
    flip_last_bits(problem.parents.post.folder)
    store, problem = reopen(url, "pico", "cpu")
    board = read_board(store)
    (folder,) = export_rows(
        store,
        board,
        board.of_kind("search")[:1],
        tmp_path / "out",
        weights=False,
        overwrite=False,
        overrides=[],
    )
    assert f"post  sha256 {problem.parents.sha256_of('post')}" in (folder / "mergekit_config.yml").read_text()


def test_what_killed_processes_left_is_cleared(pre: Path, tmp_path: Path, cache: Path) -> None:
    folder = write(tmp_path / "a")
    final = merged_adapter(folder, Checkpoint.open(pre))
    shutil.rmtree(final)
    for left in (f".{final.name}.{os.getpid()}.part", f".{'0' * 32}.1-abcdef.part"):
        (cache / left).mkdir()
        (cache / left / "model.safetensors").write_bytes(b"half")
    (cache / "notes.txt").write_text("mine")
    assert merged_adapter(folder, Checkpoint.open(pre)) == final
    assert {path.name for path in cache.iterdir()} == {final.name, "notes.txt"}


def test_a_number_of_a_process_may_come_again(tmp_path: Path) -> None:
    """Of a killed one, or in another container, where nothing may be cleared."""
    (tmp_path / f".x.{os.getpid()}.part").mkdir()
    with staged_folder(tmp_path / "x") as one, staged_folder(tmp_path / "y") as other:
        assert one != other
    assert (tmp_path / "x").is_dir()


def broken(tmp_path: Path, how: str) -> str:
    if how == "file":
        (tmp_path / "file").write_text("")
        return str(tmp_path / "file")
    if how == "below":
        (tmp_path / "file").write_text("")
        return str(tmp_path / "file" / "cache")
    return {"unwritable": "/proc/cache", "no such user": "~no-such-user-here/x"}[how]


@pytest.mark.parametrize("how", ["file", "below", "unwritable", "no such user"])
def test_errors_of_the_cache_name_its_variable(
    how: str, pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEFRONT_CACHE", broken(tmp_path, how))
    with pytest.raises(DiskError, match=r"^[^\n]+MERGEFRONT_CACHE names the folder[^\n]+$") as error:
        merged_adapter(write(tmp_path / "a"), Checkpoint.open(pre))
    assert "--out" not in str(error.value)


def test_a_full_disk_names_the_variable(pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "search.storage.staging.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0)
    )
    with pytest.raises(DiskError, match=r"no space left .* MERGEFRONT_CACHE names the folder"):
        merged_adapter(write(tmp_path / "a"), Checkpoint.open(pre))


def test_home_and_xdg(pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder, base = write(tmp_path / "a"), Checkpoint.open(pre)
    monkeypatch.setenv("MERGEFRONT_CACHE", "~/x")
    assert merged_adapter(folder, base).parent == tmp_path / "home" / "x"
    assert not (tmp_path / "~").exists()
    monkeypatch.delenv("MERGEFRONT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert merged_adapter(folder, base).parent == tmp_path / "xdg" / "mergefront" / "adapters"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert merged_adapter(folder, base).parent == tmp_path / "home" / ".cache" / "mergefront" / "adapters"


def test_who_waits_says_for_what(
    pre: Path, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[Path] = []
    folder, base = write(tmp_path / "a"), Checkpoint.open(pre)
    thread = threading.Thread(target=lambda: done.append(merged_adapter(folder, base)))
    with caplog.at_level(logging.INFO, "mergefront"), locked_folder(cache):
        thread.start()
        deadline = time.monotonic() + 20
        while "waiting" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not done
    thread.join(20)
    assert done
    assert (
        "waiting for another process that merges an adapter in this folder (MERGEFRONT_CACHE)" in caplog.text
    )
    assert "export" not in caplog.text


def add_config(folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(PLAIN | {"base_model_name_or_path": "org/elsewhere"}))


@pytest.mark.parametrize("label", ["pre", "post"])
def test_a_stray_config_beside_a_whole_checkpoint(label: str, tmp_path: Path) -> None:
    path = write_study(tmp_path, trials=2)
    plain = Parents.pair(str(tmp_path / "pre"), str(tmp_path / "post"))
    add_config(tmp_path / label)
    parents = Parents.pair(str(tmp_path / "pre"), str(tmp_path / "post"))
    assert not parents.adapters
    assert parents.digest == plain.digest
    store, problem = create(load_study_file(path), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    run(store, problem)  # loads the model, which transformers would do otherwise where peft is installed


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda folder: None, True),
        (lambda folder: (folder / WEIGHTS).unlink(), True),
        (lambda folder: (folder / "model.safetensors").touch(), True),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.safetensors"), False),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.safetensors.index.json"), False),
        (lambda folder: (folder / CONFIG).unlink(), False),
    ],
)
def test_what_an_adapter_is(change: Callable[[Path], Any], wanted: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    change(folder)
    assert is_adapter(folder) is wanted
