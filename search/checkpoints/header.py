"""The header of one safetensors file, checked so strictly that every byte of the file is accounted for.

The library checks most of this too; here each fault gets its own sentence, and two faults that it lets pass
(a JSON key given twice, a tensor type that no model uses) are refused as well.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from objectives.printable import shown
from search.errors import CheckpointError
from search.storage.files import unique_pairs

MAX_HEADER = 100_000_000  # bytes; the cap of the safetensors library
MAX_DIMENSIONS = 64  # what torch can hold; a product of more could take for ever
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What people find under a safetensors name, by the first bytes; judged only once the header made no sense,
# because the first eight bytes of a good file are a length and may look like anything.
_LOOKALIKES = (
    (b"PK", "it is a zip archive, the form of a pickled PyTorch checkpoint"),
    (b"\x80", "it is a Python pickle"),
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
    (b"<", "it is an HTML or XML page"),
    (b"GGUF", "it is a GGUF file"),
    (b"{", "it is JSON text"),
)
_REMEDY = {
    b"PK": "Pickled weights are never opened: give a safetensors checkpoint.",
    b"\x80": "Pickled weights are never opened: give a safetensors checkpoint.",
    b"version https://git-lfs": "Run `git lfs pull` in that folder.",
    b"GGUF": "Convert it to a safetensors checkpoint first.",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: dtype, shape, and where its bytes lie after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in the order of their names.

    Raises:
        CheckpointError: the file is empty, cut, too long, not safetensors, or its header is inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(64)
            if size == 0:
                raise CheckpointError(f"{path}: the file is empty (0 bytes). Download or save it again.")
            length = int.from_bytes(head[:8], "little")
            if size < 10 or head[8:9] != b"{" or length > MAX_HEADER or length > size - 8:
                raise _not_safetensors(path, head, size, length)
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file."
        ) from error
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        reason = shown(str(error))
        raise CheckpointError(
            f"{path}: the safetensors header is broken ({reason}). Save it again."
        ) from error
    entries = {
        name: _entry(path, name, value) for name, value in sorted(parsed.items()) if name != "__metadata__"
    }
    _check_cover(path, entries, size - 8 - length)
    return entries


def _not_safetensors(path: Path, head: bytes, size: int, length: int) -> CheckpointError:
    for magic, what in _LOOKALIKES:
        if head.lstrip()[: len(magic)] == magic if magic in (b"<", b"{") else head.startswith(magic):
            fix = _REMEDY.get(magic, "Download or save it again.")
            return CheckpointError(f"{path}: not a safetensors file: {what}. {fix}")
    if length > MAX_HEADER:
        what = f"its header claims {length} bytes, the limit is {MAX_HEADER}"
    elif length > size - 8:
        what = f"its header claims {length} bytes but the file has {size}; it is cut or broken"
    else:
        what = "its header does not begin with '{'"
    return CheckpointError(f"{path}: not a safetensors file: {what}. Download or save it again.")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(path: Path, name: str, value: Any) -> Entry:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: no dtype, shape and data_offsets in the header. Save it again.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: type {shown(str(dtype))} is unknown (wanted F32, BF16 or F16). Convert the checkpoint."
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise CheckpointError(
            f"{where}: shape {shown(str(shape))} is not a list of sizes. Save the file again."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(
            f"{where}: offsets {shown(str(offsets))} are no byte range. Save the file again."
        )
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{where}: shape {shown(str(tuple(shape)))} in {dtype} needs {shown(str(wanted))} bytes "
            f"but the header gives it {offsets[1] - offsets[0]}. Save the file again."
        )
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _check_cover(path: Path, entries: dict[str, Entry], body: int) -> None:
    """The tensors must lie end to end and fill the body: nothing hidden between, nothing read twice."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            fault = "overlaps another tensor" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: {fault} (starts at byte {entry.start}, wanted {end}). "
                "Save the file again."
            )
        end = entry.end
    if end > body:
        raise CheckpointError(
            f"{path}: the file is cut: its tensors need {end} bytes, it has {body}. Download it again."
        )
    if end < body:
        raise CheckpointError(
            f"{path}: {body - end} bytes follow the last tensor ({body}, wanted {end}). Download it again."
        )
