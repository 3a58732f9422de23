"""Checkpoint folders as the library reads them. Damaged and hostile ones: tests/faults/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from search.checkpoints.checkpoint import SINGLE, Checkpoint
from search.errors import CheckpointError
from search.storage.files import file_sha256
from tests.hostile_files import copy, entry, refused


def test_reads_what_the_library_reads(saved: tuple[Path, Path]) -> None:
    for folder in saved:
        one = Checkpoint.open(folder)
        wanted = {name: t for file in one.files for name, t in load_file(file).items()}
        assert one.names == tuple(sorted(wanted))
        for name, tensor in wanted.items():
            assert torch.equal(one.tensor(name), tensor)
            assert (one.shape(name), one.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert one.bytes == sum(t.nbytes for t in wanted.values())
        assert one.check_finite() == []


def test_tensors_are_views_of_the_mapped_file(saved: tuple[Path, Path]) -> None:
    one = Checkpoint.open(saved[0])
    tensor = one.tensor("model.norm.weight")
    address = tensor.data_ptr()
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    home = [r for r in ranges if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16)]
    assert home[0][-1] == str(one.files[0])
    assert one.tensor("model.norm.weight").data_ptr() == address


def test_digests_follow_the_bytes(saved: tuple[Path, Path], tmp_path: Path) -> None:
    one, again = Checkpoint.open(saved[0]), Checkpoint.open(copy(saved[0], tmp_path / "copy"))
    assert one.sha256() == again.sha256()
    assert one.digests() == {name: file_sha256(saved[0] / name) for name in ("config.json", SINGLE)}
    weights = tmp_path / "copy" / SINGLE
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)  # a flipped bit is legal safetensors: only the digest can tell
    assert Checkpoint.open(tmp_path / "copy").sha256() != one.sha256()


def test_links_of_a_hub_cache(saved: tuple[Path, Path], tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(saved[0].iterdir())):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint.open(snapshot).names == Checkpoint.open(saved[0]).names
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(saved[0] / SINGLE)
    assert "a link that leads out" in refused(snapshot)


def test_link_inside_and_linked_folder(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / SINGLE).rename(folder / "real.safetensors")
    (folder / SINGLE).symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to(folder)
    assert Checkpoint.open(tmp_path / "alias").folder == folder.resolve()


def test_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "no such folder" in refused(tmp_path / "absent")
    assert "not a folder" in refused(tmp_path / "file")
    assert "no config.json" in refused(tmp_path / "empty")
    assert "loop" in refused(tmp_path / "loop")
    assert r"nul\x00" in refused(Path("nul\0"))


def test_good_file_whose_first_bytes_look_like_a_pickle(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(0x280)
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert (folder / SINGLE).read_bytes()[:2] == b"\x80\x02"
    assert Checkpoint.open(folder).names == ("a",)


def test_adapter_is_named_as_such(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert Checkpoint.open(folder).names  # a stray one, beside the weights of a whole model
    (folder / "adapter_model.safetensors").touch()
    assert "PEFT adapter" in refused(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / SINGLE).unlink()
    assert "PEFT adapter" in refused(folder)


def test_unknown_tensor_name(saved: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        Checkpoint.open(saved[0]).tensor("nothing")
