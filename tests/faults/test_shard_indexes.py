"""Indexes of sharded checkpoints: one that disagrees with its shards, or leads out of the folder, is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.checkpoints.checkpoint import INDEX, SINGLE
from tests.hostile_files import copy, refused

Edit = Callable[[Path], Any]


def _edit_index(change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def _shard_with_stray_tensor(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    save_file({**load_file(first), "stray": torch.zeros(2)}, first)


def _tensor_in_two_shards(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first).items()))
    save_file({**load_file(second), twice[0]: twice[1]}, second)


def _tensor_not_in_shard(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    save_file(dict(list(load_file(first).items())[1:]), first)


BROKEN_INDEXES: dict[str, tuple[Edit, str]] = {
    "shard missing": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "this shard is missing"),
    "tensor not in shard": (_tensor_not_in_shard, "no shard holds it"),
    "tensor in another shard": (
        _edit_index(lambda m: m.update({min(m, key=m.__getitem__): max(m.values())})),
        "but it is in",
    ),
    "tensor in two shards": (_tensor_in_two_shards, "is in two shards"),
    "tensor not listed": (_shard_with_stray_tensor, "stray is not listed"),
    "empty map": (_edit_index(dict.clear), "no weight_map"),
    "not json": (lambda f: (f / INDEX).write_text("{"), "broken JSON"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "JSON list (wanted an object)"),
    "duplicate name": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        "key 'a' is given twice",
    ),
    "both forms": (lambda f: (f / SINGLE).write_bytes(b"x"), "which is meant"),
}


@pytest.mark.fault(15)
@pytest.mark.parametrize("case", BROKEN_INDEXES)
def test_broken_index(case: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    edit, wanted = BROKEN_INDEXES[case]
    folder = copy(saved[1], tmp_path / "model")
    edit(folder)
    assert wanted in refused(folder)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "value",
    ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "a\0.safetensors", "..", "", "x\\y.safetensors",
     "C:x.safetensors", "sub/x.safetensors", "pytorch_model.bin", 3, None, ["x.safetensors"], "\x1b[2J.safetensors",
     "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_hostile_weight_map(
    value: object, saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before any weight file is opened, the good ones included."""
    opened: list[Path] = []
    monkeypatch.setattr("search.checkpoints.checkpoint.read_header", opened.append)
    folder = copy(saved[1], tmp_path / "model")
    _edit_index(lambda m: m.update({"model.norm.weight": value}))(folder)
    message = refused(folder)
    assert "weight_map of model.norm.weight" in message
    assert INDEX in message
    assert opened == [], "a path was tried before the whole index was judged"


@pytest.mark.fault(18)
def test_huge_weight_map_is_refused_quickly(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[1], tmp_path / "model")
    _edit_index(lambda m: m.update({f"t{i}": f"f{i}.safetensors" for i in range(100_000)}))(folder)
    began = time.process_time()
    assert "shard is missing" in refused(folder)
    assert time.process_time() - began < 3


@pytest.mark.fault(18)
@pytest.mark.parametrize("value", [3, None, True, 1.5, [], ["x.safetensors"], "x.safetensors", {}])
def test_index_whose_map_is_none(value: object, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[1], tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"metadata": value, "weight_map": value}))
    assert refused(folder).startswith(str(folder / INDEX))


@pytest.mark.fault(18)
@pytest.mark.parametrize("what", ["shard", "single", "index"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_file_that_is_a_folder_a_pipe_or_a_device(
    kind: str, what: str, saved: tuple[Path, Path], tmp_path: Path
) -> None:
    """Reading a pipe would wait for ever; only regular files are read."""
    folder = copy(saved[0] if what == "single" else saved[1], tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    path = {"shard": shards[0], "single": folder / SINGLE, "index": folder / INDEX}[what]
    path.unlink()
    make = {"folder": Path.mkdir, "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero")}[
        kind
    ]
    make(path)
    assert refused(folder).startswith(str(path))


@pytest.mark.fault(18)
def test_link_out_of_the_folder(saved: tuple[Path, Path], tmp_path: Path) -> None:
    for name in (SINGLE, "config.json", "tokenizer.json"):
        folder = copy(saved[0], tmp_path / name)
        outside = tmp_path / f"outside-{name}"
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        assert "a link that leads out of the folder" in refused(folder)
