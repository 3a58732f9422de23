"""`verify` says yes to what was exported, and no to everything that was changed since."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.errors import CheckpointError, ConfigError, ExportError, StorageError
from search.export.verify import verify_folder
from search.results.board import read_board
from search.storage.manifest import MANIFEST, read_manifest, write_manifest
from search.storage.store import StudyStore
from tests.export_process import exported, made_study


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return made_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def trial(url: str) -> int:
    """On the front, so it is scored on both splits."""
    return read_board(StudyStore.open(url, "pico")).front[0].trial


@pytest.fixture(scope="module")
def original(url: str, trial: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(url, tmp_path_factory.mktemp("out"), trial)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / original.name))


def verified(folder: Path, storage: str | None = None, overrides: list[str] | None = None) -> list[str]:
    return list(verify_folder(folder, storage, overrides or [], "cpu"))


def rewritten(folder: Path, **facts: Any) -> None:
    """A new manifest that fits the files as they are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["format"], manifest["files"]
    write_manifest(folder, {**manifest, **facts})


def test_an_export_is_scored_again_to_the_stored_numbers(url: str, original: Path, trial: int) -> None:
    files, model, search, report = verified(original)
    count = sum(path.is_file() for path in original.rglob("*")) - 1
    assert files == f"{original}: {count} files as in the manifest"
    assert re.fullmatch(r"model  \d+ tensors, all finite; loads with no missing and no unexpected key", model)
    row = read_board(StudyStore.open(url, "pico")).row(trial)
    for line, cells, name in ((search, row.search, "search"), (report, row.report, "report")):
        scores = f"accuracy {cells['accuracy'].value:.4f} = stored, ece {cells['ece'].value:.4f} = stored"
        assert re.fullmatch(
            rf"{name}  {scores}; 15 questions, largest log-likelihood difference [\d.e-]+ \(allowed 0\.0001\)  ok",
            line,
        )


def test_bfloat16_weights_score_the_same(tmp_path: Path) -> None:
    merge = {"method": "slerp", "dtype": "bfloat16"}
    url = made_study(tmp_path / "study", arch="qwen3", parents={"dtype": "bfloat16"}, merge=merge)
    best = read_board(StudyStore.open(url, "pico")).front[0].trial
    lines = verified(exported(url, tmp_path / "out", best))
    assert all("= stored" in line and "(allowed 0.05)  ok" in line for line in lines[2:])
    differences = [float(re.search(r"difference ([\d.e-]+)", line)[1]) for line in lines[2:]]  # type: ignore[index]
    assert max(differences) == 0.0  # on one machine the same bits give the same scores


def test_without_weights_the_config_is_compared_with_the_recipe(url: str, trial: int, tmp_path: Path) -> None:
    folder = exported(url, tmp_path, trial, weights=False)
    assert re.fullmatch(
        r"mergekit_config.yml gives all \d+ tensors the weights of the recipe; no checkpoint, nothing was scored",
        verified(folder)[-1],
    )
    config = folder / "mergekit_config.yml"
    first = re.search(r"value: ([\d.]+)", config.read_text())
    assert first is not None
    config.write_text(config.read_text().replace(first[0], "value: 0.123"))
    rewritten(folder)
    with pytest.raises(
        ExportError, match=r"tensor \S+: weights \(0\.123, .*the recipe says .* Export again\.$"
    ):
        verified(folder)


def test_a_folder_of_exports(url: str, tmp_path: Path) -> None:
    for trial in (0, 1):
        exported(url, tmp_path, trial, weights=False)
    assert len(verified(tmp_path)) == 4
    with pytest.raises(ExportError, match=r"no such folder"):
        verified(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"no manifest\.json, and no trial folders"):
        verified(tmp_path / "empty")
    (tmp_path / "trial-00001" / MANIFEST).unlink()
    with pytest.raises(ExportError, match=r"trial-00001: no manifest\.json"):
        verified(tmp_path)


def remove(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()


def add(folder: Path) -> None:
    (folder / "model" / "extra.py").write_text("x")


def grow(folder: Path) -> None:
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + "\n")


def link(folder: Path) -> None:
    (folder / "recipe.yaml").rename(folder.parent / "recipe.yaml")
    (folder / "recipe.yaml").symlink_to(folder.parent / "recipe.yaml")


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def listed(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove, r"model/tokenizer\.json: the manifest lists it but it is missing"),
        (add, r"model/extra\.py: is not in the manifest"),
        (grow, r"recipe\.yaml: was changed: \d+ bytes, the manifest says \d+"),
        (link, r"recipe\.yaml: is a link"),
        (cut_manifest, r"manifest\.json: broken JSON"),
        (listed("../../etc/passwd"), r"manifest\.json: '\.\./\.\./etc/passwd' leads out of the folder"),
        (listed("/etc/passwd"), r"manifest\.json: '/etc/passwd' leads out of the folder"),
        (listed("model\\..\\x"), r"leads out of the folder"),
    ],
)
def test_every_change_of_a_file_is_named(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ExportError, match=message):
        verified(folder)


def test_other_weights_under_a_fitting_manifest_are_found_by_their_scores(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.05
    save_file(tensors, path, metadata={"format": "pt"})
    rewritten(folder)
    with pytest.raises(
        ExportError, match=r"search split: \d+ of 15 questions score otherwise than stored, by up to"
    ):
        verified(folder)


def test_values_that_are_not_finite_and_missing_tensors_are_named(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    rewritten(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 1 of 32 values are NaN"):
        verified(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    rewritten(folder)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        verified(folder)


def test_the_study_must_be_the_one_it_came_from(folder: Path, tmp_path: Path) -> None:
    rewritten(folder, recipe="0" * 64)
    with pytest.raises(
        ExportError, match=r"recipe is 0000000000000000\.\.\., trial \d+ of study 'pico' has "
    ):
        verified(folder)
    rewritten(folder, trial=99)
    with pytest.raises(ExportError, match=r"study 'pico' has no complete trial 99"):
        verified(folder)
    rewritten(folder, storage=f"sqlite:///{tmp_path}/gone.db")
    with pytest.raises(StorageError, match=r"gone\.db: no such storage"):
        verified(folder)


def test_moved_storage_and_questions(url: str, folder: Path, tmp_path: Path) -> None:
    study = Path(url.removeprefix("sqlite:///")).parent
    moved = tmp_path / "moved"
    shutil.copytree(study, moved)
    rewritten(folder, storage="sqlite:////nowhere/study.db")
    assert len(verified(folder, f"sqlite:///{moved}/study.db")) == 4
    questions = tmp_path / "other.jsonl"
    questions.write_text((study / "questions.jsonl").read_text().replace("red", "pink"))
    with pytest.raises(
        ConfigError, match=r"questions changed since it began .* --set tasks\.0\.path=PATH\.$"
    ):
        verified(folder, url, [f"tasks.0.path={questions}"])


def test_the_manifest_is_read_only(original: Path) -> None:
    before = (original / MANIFEST).read_bytes()
    read_manifest(original)
    assert (original / MANIFEST).read_bytes() == before
