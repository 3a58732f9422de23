"""Export folders of a real study: what is in them, and where they go. Faults: tests/faults/test_exports.py."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from search.checkpoints.writing import TAGALONG
from search.config.strict_yaml import load_yaml
from search.config.study_file import load_study_file
from search.errors import ConfigError, ExportError
from search.export.folder import export_rows, portable_url
from search.merging.save import save_checkpoint
from search.recipe import Recipe
from search.results.board import Board, Row, read_board
from search.results.picks import pick
from search.running.problem import Problem
from search.storage.manifest import read_manifest
from search.storage.store import StudyStore
from tests.export_process import exported, made_study, tree
from tests.merging.test_mergekit_config import differing, loaded
from tests.pico import pico_tokenizer


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def store(url: str) -> StudyStore:
    return StudyStore.open(url, "pico")


@pytest.fixture(scope="module")
def board(store: StudyStore) -> Board:
    return read_board(store)


@pytest.fixture(scope="module")
def row(board: Board) -> Row:
    """A search trial: its coefficients differ from group to group."""
    return board.of_kind("search")[0]


# -- what is in it ----------------------------------------------------------------------------------------------


def test_the_checkpoint_is_the_model_that_was_scored(url: str, row: Row, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported(url, tmp_path / "out", row.trial)
    assert folder == tmp_path / "out" / f"trial-{row.trial:05d}"
    model, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = load_study_file(Path(url.removeprefix("sqlite:///")).parent / "study.yaml")
    problem = Problem.open(config, "cpu")
    problem.merge(Recipe(row.method, row.coefficients))
    scored = problem.live.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, scored[name]), name
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == "{{ messages[0]['content'] }}"
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "float32"
    assert model.generation_config.max_new_tokens == 7


def test_mergekit_rebuilds_the_exported_trial(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial)
    config = yaml.safe_load((folder / "mergekit_config.yml").read_text())
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "rebuilt"), MergeOptions(quiet=True))
    ours, theirs = loaded(folder / "model"), loaded(tmp_path / "rebuilt")
    assert ours.keys() == theirs.keys()
    assert differing(ours, theirs) == 0


def test_manifest_recipe_and_card(
    url: str, store: StudyStore, board: Board, row: Row, tmp_path: Path
) -> None:
    folder = exported(url, tmp_path, row.trial)
    manifest = read_manifest(folder)
    assert set(manifest["files"]) == tree(folder).keys() - {"manifest.json"}
    assert manifest["storage"] == url
    assert manifest["evidence"]["search"] == store.trials()[row.trial].attributes["evidence"]
    recipe = load_yaml((folder / "recipe.yaml").read_text(), "recipe")
    assert {name: group["coefficient"] for name, group in recipe["groups"].items()} == row.coefficients
    assert sum(group["tensors"] for group in recipe["groups"].values()) == len(
        load_file(folder / "model" / "model.safetensors")
    )
    card = (folder / "README.md").read_text()
    assert card == (folder / "model" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert {"merge", "mergefront"} <= set(front["tags"])
    assert manifest["parents"]["pre"]["sha256"] in card
    assert f"mergefront export pico --select trial:{row.trial} --weights --out DIR" in card
    cell = row.search["accuracy"]
    assert f"| accuracy (up) | {cell.value:.4f} [{cell.low:.4f}, {cell.high:.4f}] |" in card
    assert "vllm serve ./model --dtype float32" in card
    assert max(map(len, card.splitlines())) < 250


def test_a_parent_can_be_exported_and_is_that_parent(url: str, board: Board, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, board.of_kind("post")[0].trial)
    ours = load_file(folder / "model" / "model.safetensors")
    post = load_file(Path(url.removeprefix("sqlite:///")).parent / "post" / "model.safetensors")
    assert all(torch.equal(ours[name], post[name]) for name in post)
    assert "value: " not in (folder / "mergekit_config.yml").read_text()  # one weight for all: no filters


def test_shards_have_an_index_and_one_tensor_at_a_time(
    url: str, row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    whole = load_file(exported(url, tmp_path / "whole", row.trial) / "model" / "model.safetensors")
    monkeypatch.setattr("search.export.folder.save_checkpoint", partial(save_checkpoint, shard_bytes=20_000))
    model = exported(url, tmp_path / "shards", row.trial) / "model"
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 24_000 for path in shards)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    merged = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    _, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_two_exports_have_the_same_bytes(url: str, row: Row, tmp_path: Path) -> None:
    first, second = (exported(url, tmp_path / name, row.trial) for name in ("a", "b"))
    assert tree(first) == tree(second)


def test_without_weights_there_is_no_model(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial, weights=False)
    assert sorted(tree(folder)) == ["README.md", "manifest.json", "mergekit_config.yml", "recipe.yaml"]
    assert "This folder holds the recipe only" in (folder / "README.md").read_text()


def test_bfloat16_tied_slerp_by_tensor(tmp_path: Path) -> None:
    url = made_study(
        tmp_path / "study",
        arch="gemma2",
        parents={"dtype": "bfloat16"},
        merge={"method": "slerp", "dtype": "bfloat16"},
        space={"granularity": "tensor"},
    )
    board = read_board(StudyStore.open(url, "pico"))
    folder = exported(url, tmp_path / "out", board.of_kind("search")[0].trial)
    config = yaml.safe_load((folder / "mergekit_config.yml").read_text())
    assert (config["merge_method"], config["out_dtype"]) == ("linear", "bfloat16")
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "rebuilt"), MergeOptions(quiet=True))
    ours, theirs = loaded(folder / "model"), loaded(tmp_path / "rebuilt")
    assert "lm_head.weight" not in ours
    assert ours.keys() == theirs.keys()
    assert differing(ours, theirs) == 0


# -- where it goes ----------------------------------------------------------------------------------------------


def test_an_existing_export_stays_unless_overwritten(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial, weights=False)
    before = tree(folder)
    with pytest.raises(
        ExportError, match=f"^{folder}: exists. Give another --out, or --overwrite to replace it.$"
    ):
        exported(url, tmp_path, row.trial)
    assert tree(folder) == before
    exported(url, tmp_path, row.trial, overwrite=True)
    assert (folder / "model" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_what_is_not_an_export_is_never_replaced(url: str, row: Row, tmp_path: Path) -> None:
    mine = tmp_path / f"trial-{row.trial:05d}"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(ExportError, match="is not an export of mergefront, so it is not replaced"):
        exported(url, tmp_path, row.trial, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "x"


def test_out_must_be_a_folder(url: str, row: Row, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"file: is a file. Give a folder.$"):
        exported(url, tmp_path / "file", row.trial)
    with pytest.raises(ExportError, match=r"a part of this path is a file. Give a folder.$"):
        exported(url, tmp_path / "file" / "below", row.trial)


def test_an_export_never_replaces_a_parent(url: str, row: Row, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, row.trial)
    post = Path(url.removeprefix("sqlite:///")).parent / "post"
    shutil.copytree(post, folder / "parent")
    with pytest.raises(ExportError, match="holds a parent of the study"):
        exported(url, tmp_path, row.trial, overwrite=True, overrides=[f"parents.post={folder / 'parent'}"])


def test_moved_and_changed_parents(url: str, row: Row, tmp_path: Path) -> None:
    post = Path(url.removeprefix("sqlite:///")).parent / "post"
    moved = tmp_path / "moved"
    shutil.copytree(post, moved)
    folder = exported(url, tmp_path / "a", row.trial, overrides=[f"parents.post={moved}"])
    assert f'  - model: "{moved}"' in (folder / "mergekit_config.yml").read_text()
    with (moved / "model.safetensors").open("r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-3, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(ConfigError, match=r"parents changed since it began \(sha256 "):
        exported(url, tmp_path / "b", row.trial, overrides=[f"parents.post={moved}"])
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="only places may be set"):
        exported(url, tmp_path / "b", row.trial, overrides=["space.high=2.0"])


def test_all_of_the_front(store: StudyStore, board: Board, tmp_path: Path) -> None:
    made = export_rows(store, board, board.front, tmp_path, weights=False, overwrite=False, overrides=[])
    assert [path.name for path in made] == [f"trial-{row.trial:05d}" for row in board.front]
    assert all(read_manifest(path)["trial"] == row.trial for path, row in zip(made, board.front, strict=True))
    assert pick(board, "knee").trial in {row.trial for row in board.front}


def test_storage_is_written_down_without_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable_url("sqlite:///runs/x/study.db") == f"sqlite:///{tmp_path}/runs/x/study.db"
    url = "postgresql+psycopg://me:secret@db.example:5432/studies?password=secret&sslpassword=secret&sslmode=require"
    assert portable_url(url) == "postgresql+psycopg://me@db.example:5432/studies?sslmode=require"


def test_tokenizer_files_are_all_known(tmp_path: Path) -> None:
    pico_tokenizer(chat_template="x").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= set(TAGALONG)
