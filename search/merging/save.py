"""Writing a merge as a checkpoint that transformers loads, with one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from search.errors import CheckpointError
from search.merging.checkpoint import INDEX, SINGLE, Checkpoint, dtype_name
from search.merging.header import DTYPES, shown
from search.merging.layout import empty_model, load_config, read_layout
from search.merging.methods.linear import weighted_sum
from search.merging.parents import Parents

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


def save_checkpoint(
    parents: Parents,
    weights: Mapping[str, tuple[float, float]],
    dtype: torch.dtype,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a linear merge of the parents as `save_tensors` does. The numbers come from the kernel that scored them.

    Args:
        weights: (weight of pre, weight of post) for each of `parents.names`.
    """

    def merged(name: str) -> torch.Tensor:
        out = torch.empty(parents.post.shape(name), dtype=dtype)
        weighted_sum(parents.pre.tensor(name), parents.post.tensor(name), *weights[name], out, name=name)
        return out

    save_tensors(parents, list(weights), merged, dtype, folder, shard_bytes=shard_bytes)


def save_tensors(
    parents: Parents,
    names: Sequence[str],
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, config, tokenizer and generation config into an existing empty folder.

    Tied aliases are not stored. What is not a weight comes from `parents.post`.

    Args:
        names: all of `parents.names`, in the order in which the tensors are asked for.
        tensor: gives each tensor in this dtype, on the CPU, contiguous, in the shape that the parents have.
        dtype: of the stored tensors.
        shard_bytes: a file gets no further tensor beyond this; a larger tensor has a file of its own.

    Raises:
        MergeError: a value does not fit into the dtype. OSError: the disk refused.
    """
    shards = _shards(parents, names, dtype, shard_bytes)
    single = len(shards) == 1
    files = (
        [SINGLE]
        if single
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, inside in zip(files, shards, strict=True):
        _write_shard(parents, inside, tensor, dtype, folder / file)
    if not single:
        total = sum(_count(parents, name) for name in names)
        index = {
            "metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
            "weight_map": {name: file for file, inside in zip(files, shards, strict=True) for name in inside},
        }
        _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", merged_config(parents, dtype))
    for name in TAGALONG:
        if (parents.post.folder / name).is_file():
            shutil.copyfile(parents.post.folder / name, folder / name)


def size_of(parents: Parents, dtype: torch.dtype) -> int:
    """About how many bytes `save_checkpoint` needs; never less than it writes."""
    extra = sum(
        (parents.post.folder / name).stat().st_size
        for name in TAGALONG
        if (parents.post.folder / name).is_file()
    )
    headers = sum(len(name) + 200 for name in parents.names) * 2
    return parents.parameters * dtype.itemsize + extra + headers + 2**16


def merged_config(parents: Parents, dtype: torch.dtype) -> dict[str, object]:
    """`post`'s config.json with the dtype of the merge."""
    config = {key: value for key, value in parents.post.config.items() if key != "_name_or_path"}
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = dtype_name(dtype)
    return config


def check_saved(folder: Path, parents: Parents, dtype: torch.dtype) -> Checkpoint:
    """Reads the headers of a saved merge back: every tensor of the parents in its shape, and nothing else.

    Raises:
        CheckpointError: what lies there is not what transformers needs to build this model.
    """
    saved = Checkpoint.open(folder)
    shapes = {name: saved.shape(name) for name in saved.names}
    if shapes != {name: parents.post.shape(name) for name in parents.names}:
        odd = sorted(set(shapes) ^ set(parents.names)) or [
            n for n in shapes if shapes[n] != parents.post.shape(n)
        ]
        raise CheckpointError(f"{folder}: tensor {shown(odd[0])} is not stored as the parents have it.")
    for name in saved.names:
        if saved.dtype(name) != dtype:
            raise CheckpointError(
                f"{folder}: tensor {shown(name)}: type {dtype_name(saved.dtype(name))} (wanted {dtype_name(dtype)})."
            )
    read_layout(empty_model(load_config(folder), folder), shapes, folder)
    return saved


def _shards(parents: Parents, names: Sequence[str], dtype: torch.dtype, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        bytes_ = _count(parents, name) * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    return shards


def _write_shard(
    parents: Parents,
    names: Sequence[str],
    tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    path: Path,
) -> None:
    # Not `safetensors.save_file`: that needs the whole shard in memory, and hides the errno of a full disk.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _count(parents, name) * dtype.itemsize
        shape = list(parents.post.shape(name))
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(tensor(name).view(-1).view(torch.uint8).numpy().data)


def _count(parents: Parents, name: str) -> int:
    return math.prod(parents.post.shape(name))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
