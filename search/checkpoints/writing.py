"""Writing a checkpoint in the layout of transformers, with one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from objectives.printable import shown
from search.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint, dtype_name
from search.checkpoints.header import DTYPES
from search.errors import MergeError

SHARD_BYTES = 2 * 2**30
# What a tokenizer may consist of, and what generation starts from. All of them come from `post`.
TAGALONG = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def save_tensors(
    like: Checkpoint,
    names: Sequence[str],
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, config, tokenizer and generation config into an existing empty folder.

    Args:
        like: has tensors of these names and shapes; what is not a weight comes from its folder.
        names: in the order in which the tensors are asked for. Aliases of tied ones need not be among them.
        tensor: gives each tensor in this dtype, on the CPU, contiguous, in that shape.
        dtype: of the stored tensors.
        shard_bytes: a file gets no further tensor beyond this; a larger tensor has a file of its own.

    Raises:
        MergeError: a value is not finite in the dtype. OSError: the disk refused.
    """
    shards = _shards(like, names, dtype, shard_bytes)
    single = len(shards) == 1
    files = (
        [SINGLE]
        if single
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, inside in zip(files, shards, strict=True):
        _write_shard(like, inside, tensor, dtype, folder / file)
    if not single:
        total = sum(_count(like, name) for name in names)
        index = {
            "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
            "weight_map": {name: file for file, inside in zip(files, shards, strict=True) for name in inside},
        }
        _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", merged_config(like, dtype))
    for name in TAGALONG:
        if (like.folder / name).is_file():
            shutil.copyfile(like.folder / name, folder / name)


def merged_config(like: Checkpoint, dtype: torch.dtype) -> dict[str, object]:
    """A checkpoint's config.json with the dtype of the merge."""
    config = {key: value for key, value in like.config.items() if key != "_name_or_path"}
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = dtype_name(dtype)
    return config


def _shards(like: Checkpoint, names: Sequence[str], dtype: torch.dtype, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        bytes_ = _count(like, name) * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _write_shard(
    like: Checkpoint,
    names: Sequence[str],
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    path: Path,
) -> None:
    # Not `safetensors.save_file`: that needs the whole shard in memory, and hides the errno of a full disk.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _count(like, name) * dtype.itemsize
        shape = list(like.shape(name))
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            found = tensor(name).view(-1)
            if found.numel() and not all(map(math.isfinite, map(float, torch.aminmax(found)))):  # NaN spreads
                raise MergeError(
                    f"{shown(name)}: a merged value is not finite in {dtype_name(dtype)}. Use smaller weights or "
                    "rates, or another dtype."
                )
            stream.write(found.view(torch.uint8).numpy().data)


def _count(like: Checkpoint, name: str) -> int:
    return math.prod(like.shape(name))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
