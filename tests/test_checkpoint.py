"""Hostile and broken checkpoint folders: each is refused with one line that names the place, and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.errors import CheckpointError
from search.merging.checkpoint import INDEX, SINGLE, Checkpoint, file_sha256
from search.merging.header import read_header
from tests.pico import save_pico

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One checkpoint in a single file and the same one in several shards; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("saved")
    return save_pico(folder / "single"), save_pico(folder / "sharded", shards=3)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def shard(header: object, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


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


BROKEN_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda b: b[:-7], "is cut"),
    "truncated header": (lambda b: b[:200], "is cut or broken"),
    "trailing": (lambda b: b + b"xx", "2 bytes follow the last tensor"),
    "zero-byte": (lambda b: b"", "is empty"),
    "tiny": (lambda b: b"abc", "not a safetensors file"),
    "giant header": (lambda b: (2**40).to_bytes(8, "little") + b[8:], "claims 1099511627776 bytes"),
    "header past the end": (lambda b: (len(b)).to_bytes(8, "little") + b[8:], "is cut or broken"),
    "lfs pointer": (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (lambda b: b"\n<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "gguf": (lambda b: b"GGUF" + bytes(64), "GGUF"),
    "header no json": (lambda b: shard(b"{nonsense"), "header is broken"),
    "header no utf-8": (lambda b: shard(b"{\xff\xfe}"), "header is broken"),
    "header nested": (lambda b: shard(b'{"a":' * 60_000), "header is broken"),
    "duplicate key": (
        lambda b: shard(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        "key 'a' is given twice",
    ),
    "overlap": (lambda b: shard({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "tensor b: overlaps"),
    "hole": (lambda b: shard({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "tensor b: leaves a hole"),
    "negative offset": (lambda b: shard({"a": entry(-4, 4)}, bytes(8)), "no byte range"),
    "shape overflow": (lambda b: shard({"a": entry(0, 4, [2**62, 8])}, bytes(4)), "needs"),
    "shape of booleans": (lambda b: shard({"a": entry(0, 4, [True])}, bytes(4)), "not a list of sizes"),
    "unknown type": (lambda b: shard({"a": entry(0, 4, dtype="F6")}, bytes(4)), "type F6 is unknown"),
    "entry no object": (lambda b: shard({"a": 3}), "tensor a: no dtype"),
    "no tensors": (lambda b: shard({"__metadata__": {}}), "hold no tensor"),
    "control characters": (lambda b: shard({"a\x1b[2J": 3}), r"tensor a\x1b[2J: no dtype"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_weight_file(case: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    damage, wanted = BROKEN_FILES[case]
    folder = copy(saved[0], tmp_path / "model")
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    message = refused(folder)
    assert wanted in message
    assert message.startswith(str(folder))


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


@pytest.mark.parametrize("case", BROKEN_INDEXES)
def test_broken_index(case: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    edit, wanted = BROKEN_INDEXES[case]
    folder = copy(saved[1], tmp_path / "model")
    edit(folder)
    assert wanted in refused(folder)


@pytest.mark.parametrize(
    "value",
    ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "a\0.safetensors", "..", "", "x\\y.safetensors",
     "C:x.safetensors", "sub/x.safetensors", "pytorch_model.bin", 3, None, ["x.safetensors"], "\x1b[2J.safetensors"],
)  # fmt: skip
def test_hostile_weight_map(value: object, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[1], tmp_path / "model")
    _edit_index(lambda m: m.update({"model.norm.weight": value}))(folder)
    message = refused(folder)
    assert "weight_map of model.norm.weight" in message
    assert INDEX in message


def test_huge_weight_map_is_refused_quickly(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[1], tmp_path / "model")
    _edit_index(lambda m: m.update({f"t{i}": f"f{i}.safetensors" for i in range(100_000)}))(folder)
    assert "shard is missing" in refused(folder)


def test_link_out_of_the_folder(saved: tuple[Path, Path], tmp_path: Path) -> None:
    for name in (SINGLE, "config.json", "tokenizer.json"):
        folder = copy(saved[0], tmp_path / name)
        outside = tmp_path / f"outside-{name}"
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        assert "a link that leads out of the folder" in refused(folder)


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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "broken JSON"),
        ("[1]", "JSON list"),
        ("[" * 100_000, "broken JSON"),
        ("{}", "no model_type"),
        ('{"model_type": "llama", "model_type": "llama"}', "given twice"),
        (
            '{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}',
            "auto_map: the model brings",
        ),
        ('{"model_type": "llama", "text_config": {"auto_map": {"A": "b.C"}}}', "text_config.auto_map"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "weights are quantised"),
    ],
)
def test_bad_config(text: str, wanted: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert wanted in message
    assert "config.json" in message


class Canary:
    """Pickles into a command that writes a file; the tests look for the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickle_by_name(suffix: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / SINGLE).unlink()
    (folder / f"pytorch_model.{suffix}").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "pickled weights are never opened" in refused(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "zip", "torch"])
def test_pickle_under_another_name(protocol: int | str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, canary = copy(saved[0], tmp_path / "model"), Canary(tmp_path / "canary")
    target = folder / SINGLE
    if protocol == "torch":
        torch.save({"a": canary}, target)
    elif protocol == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(canary))
    else:
        target.write_bytes(pickle.dumps(canary, protocol=int(protocol)))
    message = refused(folder)
    assert "not a safetensors file" in message
    assert protocol == 0 or "Pickled weights are never opened" in message
    assert not (tmp_path / "canary").exists()


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(
    dtype: str, value: float, saved: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy(saved[0], tmp_path / "model")
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / SINGLE).items()}
    tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[77] = value
    save_file(tensors, folder / SINGLE)
    one = Checkpoint.open(folder)
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 2048 values are NaN"
    ):
        one.check_finite()


def test_zero_subnormal_and_empty_tensors_are_finite(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    save_file({"z": torch.zeros(5), "s": torch.full((3,), 1e-42), "e": torch.zeros(0, 4)}, folder / SINGLE)
    assert Checkpoint.open(folder).check_finite() == ["e", "z"]


def test_integer_weights_are_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    save_file({"q": torch.zeros(5, dtype=torch.int8)}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"tensor q: type int8 \(wanted float32"):
        Checkpoint.open(folder).check_finite()


def test_unknown_tensor_name(saved: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        Checkpoint.open(saved[0]).tensor("nothing")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_the_same_tensors(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes of a good file changed at random: a CheckpointError, or a header that accounts for every byte."""
    body = bytearray(shard({"a": entry(0, 8), "b": entry(8, 12)}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.safetensors"
    file.write_bytes(body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body)
    try:
        entries = read_header(file)
    except CheckpointError:
        return
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(e.end - e.start for e in entries.values()) == file.stat().st_size - header
