"""Weight files that are cut, lengthened, faked or inconsistent: refused in one line, before a tensor is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from search.checkpoints.checkpoint import SINGLE, Checkpoint
from search.checkpoints.header import read_header
from search.errors import CheckpointError
from tests.fault_table import Fault
from tests.hostile_files import copy, entry, refused, shard

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
    "many dimensions": (
        lambda b: shard({"a": entry(0, 4, [2**62] * 20_000)}, bytes(4)),
        "is not a list of sizes",
    ),
    "shape of booleans": (lambda b: shard({"a": entry(0, 4, [True])}, bytes(4)), "not a list of sizes"),
    "unknown type": (lambda b: shard({"a": entry(0, 4, dtype="F6")}, bytes(4)), "type F6 is unknown"),
    "entry no object": (lambda b: shard({"a": 3}), "tensor a: no dtype"),
    "no tensors": (lambda b: shard({"__metadata__": {}}), "hold no tensor"),
    "control characters": (lambda b: shard({"a\x1b[2J": 3}), r"tensor a\x1b[2J: no dtype"),
}


@pytest.mark.fault(15)
@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_weight_file(case: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    damage, wanted = BROKEN_FILES[case]
    folder = copy(saved[0], tmp_path / "model")
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    message = refused(folder)
    assert wanted in message
    assert message.startswith(str(folder))


@pytest.mark.fault(15)
def test_integer_weights_are_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    save_file({"q": torch.zeros(5, dtype=torch.int8)}, folder / SINGLE)
    with pytest.raises(CheckpointError, match=r"tensor q: type int8 \(wanted float32"):
        Checkpoint.open(folder).check_finite()


@pytest.mark.fault(15)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_or_the_same_tensors(
    data: st.DataObject, tmp_path: Path, fault: Fault
) -> None:
    """Bytes of a good file changed at random: a CheckpointError, or a header that accounts for every byte."""
    body = bytearray(shard({"a": entry(0, 8), "b": entry(8, 12)}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "x.safetensors"
    file.write_bytes(body[: data.draw(st.integers(0, len(body)))] if data.draw(st.booleans()) else body)
    fault.struck(150)
    try:
        entries = read_header(file)
    except CheckpointError:
        return
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(e.end - e.start for e in entries.values()) == file.stat().st_size - header
