"""PEFT adapters as parents: LoRA, merged into the base once and exactly, then a checkpoint like any other.

    W' = W + scaling B A        scaling = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r))

Sum and product are float32 and rounded once, to the base's dtype. The merged checkpoint lies in a cache folder named by
the content of both, so that a study finds it again, and mergekit reads it like any other model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from objectives.printable import shown
from search.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, checked_folder
from search.checkpoints.lora import PART, Adapter, read_tensors
from search.checkpoints.lora_config import LoraConfig
from search.checkpoints.writing import TAGALONG, save_tensors
from search.errors import CheckpointError, DiskError, ExportError, MergeError
from search.storage.files import file_sha256, read_json
from search.storage.manifest import read_manifest, write_manifest
from search.storage.staging import check_space, locked_folder, lone_folder, staged_folder

# Raised whenever an adapter would be merged into other files than before: older ones are not found again, and a study
# over adapters is another study.
FORMAT = 2
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_VARIABLE = "MERGEFRONT_CACHE"
KIND = "merged-adapter"  # in the manifest

logger = logging.getLogger("mergefront")


def merged_adapter(folder: Path, base: Checkpoint) -> Path:
    """The folder of a checkpoint that is the base with the adapter in it; made at the first call.

    It lies below `MERGEFRONT_CACHE`, or below `mergefront` in the user's cache folder. A tokenizer beside the adapter
    goes before the base's.

    Raises:
        CheckpointError: the adapter is broken or does not fit. MergeError: a merged value is not finite. DiskError: no
            space or no permission.
    """
    adapter = Adapter.open(folder, base)
    final = _cache() / _name(adapter.folder, base)
    if _is_whole(final):
        return final
    dtypes = {base.dtype(name) for name in base.names}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{base.folder}: tensors of {len(dtypes)} types, so the adapter {folder} has no single one. "
            "Save the base in one type first."
        )
    with _in_cache(final):
        if _is_whole(final):  # another process was first
            return final
        if damaged := final.exists():
            logger.warning("%s: does not hold what was written there; it is made again", final)
        check_space(final.parent, base.bytes + 2**20)
        with staged_folder(final, overwrite=damaged) as staging:
            save_tensors(base, base.names, lambda name: adapter.apply(base, name), dtypes.pop(), staging)
            for name in TAGALONG:
                if (adapter.folder / name).is_file():
                    shutil.copyfile(adapter.folder / name, staging / name)
            write_manifest(staging, {"kind": KIND})
    return final


def adapter_digest(folder: Path, base: Checkpoint) -> str:
    """SHA-256 of what an adapter and its base hold. Merged bytes have none: their last bits depend on the processor."""
    return _sha256({"format": FORMAT, "base": base.sha256(), "adapter": _files(folder, _ADAPTER)})


def average_adapters(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes the adapter whose A and B are weighted sums of the given ones': `A = sum_k w_k A_k`, `B = sum_k w_k B_k`.

    So the published code of Personalized Soups (arXiv 2310.11564) merges. `B A` has cross terms between the adapters
    then, of the order of the squared weights, and is not the weighted sum of their `B_k A_k`: merging the adapters as
    `parents.experts` is. What an adapter saves as a whole (`modules_to_save`, biases) has no halves: it must be the
    same in all of them, and is kept.

    Args:
        folders: LoRA adapters of one base, with the same modules, ranks and scaling. weights: one for each, finite.
        out: a folder that does not exist yet.

    Raises:
        MergeError: not one finite weight for each, or a sum is not finite. CheckpointError: one is broken or no plain
            LoRA, or they differ in more than their weights. ExportError: `out` exists. DiskError: it cannot be written.
    """
    if len(folders) != len(weights) or not folders or not all(map(math.isfinite, weights)):
        raise MergeError(
            f"merge: {len(folders)} adapters with weights {list(weights)} (wanted one finite each)."
        )
    folders = [checked_folder(folder) for folder in folders]
    read = [LoraConfig.read(folder) for folder in folders]
    every = [read_tensors(folder) for folder in folders]
    configs = [read_json(folder / ADAPTER_CONFIG) for folder in folders]
    for folder, tensors, config in zip(folders, every, read, strict=True):
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in every[0].items()} or (
            replace(config, path=read[0].path) != read[0]
        ):
            raise CheckpointError(
                f"{folder}: other modules, ranks or scaling than {folders[0]}. A and B are averaged where they agree."
            )
    mean = {}
    for name, first in every[0].items():
        if PART.fullmatch(name) is None:
            for folder, tensors in zip(folders, every, strict=True):
                if not torch.equal(tensors[name], first):
                    raise CheckpointError(
                        f"{folder}: {shown(name)} is saved as a whole and not as in {folders[0]}: it has no A and B to "
                        "average. Merge these adapters by another method."
                    )
            mean[name] = first
            continue
        terms = [tensors[name].float() * w for tensors, w in zip(every, weights, strict=True)]
        mean[name] = torch.stack(terms).sum(0).contiguous()
        if not bool(mean[name].isfinite().all()):
            raise MergeError(f"merge: {shown(name)}: a sum of the adapters is not finite.")
    with lone_folder(out) as staging:
        save_file(mean, staging / ADAPTER_WEIGHTS)
        text = json.dumps(configs[0], indent=2)
        (staging / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether the merged checkpoint is there and every byte of it is what was written."""
    try:
        return folder.exists() and read_manifest(folder).get("kind") == KIND
    except (ExportError, CheckpointError):
        return False


@contextmanager
def _in_cache(final: Path) -> Iterator[None]:
    """Holds the cache folder, and says in every error of the disk what names it."""
    other = f"another process that merges an adapter in this folder ({_VARIABLE})"
    try:
        with locked_folder(final.parent, stale="[0-9a-f]" * 32, other=other, remedy=""):
            yield
    except (DiskError, ExportError) as error:
        if isinstance(error, ExportError) and (final / "config.json").is_file():
            return  # made meanwhile, where a file system has no locks
        raise DiskError(f"{str(error).strip()} {_VARIABLE} names the folder of merged adapters.") from error


def _cache() -> Path:
    given = os.environ.get(_VARIABLE)
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(given).expanduser() if given else Path(usual).expanduser() / "mergefront" / "adapters"
    except RuntimeError as error:  # no home
        raise DiskError(
            f"{given or usual}: {error}. {_VARIABLE} names the folder of merged adapters."
        ) from error


def _name(folder: Path, base: Checkpoint) -> str:
    """The cache folder's name: everything that is read to make it."""
    facts = {
        "format": FORMAT,
        "base": [base.sha256(), _files(base.folder, TAGALONG)],
        "adapter": _files(folder, (*_ADAPTER, *TAGALONG)),
    }
    return _sha256(facts)[:32]


def _files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
