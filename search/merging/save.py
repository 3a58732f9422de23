"""Writing a merge as a checkpoint that transformers loads, and reading back what was written."""

from __future__ import annotations

from pathlib import Path

import torch

from objectives.printable import shown
from search.checkpoints.checkpoint import Checkpoint, dtype_name
from search.checkpoints.layout import empty_model, load_config, read_layout
from search.checkpoints.parents import Parents
from search.checkpoints.writing import SHARD_BYTES, TAGALONG, save_tensors
from search.errors import CheckpointError
from search.merging.blend import Blend, merge_order, merging


@torch.no_grad()
def save_checkpoint(
    parents: Parents, blend: Blend, dtype: torch.dtype, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a merge of the parents as `save_tensors` does. The numbers come from the kernel that scored them."""
    steps = merging(parents, blend)

    def merged(name: str) -> torch.Tensor:
        due, fill = next(steps)
        assert due == name, "tensors are written in the order in which they are merged"
        out = torch.empty(parents.post.shape(name), dtype=dtype)
        fill(out)
        return out

    save_tensors(parents.post, merge_order(parents, blend), merged, dtype, folder, shard_bytes=shard_bytes)


def size_of(parents: Parents, dtype: torch.dtype) -> int:
    """About how many bytes `save_checkpoint` needs; never less than it writes."""
    extra = sum(
        (parents.post.folder / name).stat().st_size
        for name in TAGALONG
        if (parents.post.folder / name).is_file()
    )
    headers = sum(len(name) + 200 for name in parents.names) * 2
    return parents.parameters * dtype.itemsize + extra + headers + 2**16


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
