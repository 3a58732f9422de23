"""PEFT adapters as parents: LoRA, merged into the base once and exactly, then a checkpoint like any other.

    W' = W + scaling B A        scaling = lora_alpha / r   (rsLoRA: lora_alpha / sqrt(r))

Sum and product are float32 and rounded once, to the base's dtype. The merged checkpoint lies in a cache folder named by
the content of both, so that a study finds it again, and mergekit reads it like any other model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from search.errors import CheckpointError, MergeError
from search.merging.checkpoint import Checkpoint, read_json
from search.merging.header import read_header, shown
from search.merging.writing import TAGALONG, save_tensors
from search.staging import check_space, locked_folder, staged_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"^(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?$")
# What changes the sum above; others (dropout, task type, who initialised it) change training only.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "repeated layers",
    "lora_bias": "biases",
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits its base.

    Attributes:
        pairs: stored tensor of the base -> (A, B, scaling, whether the product is transposed).
        whole: stored tensor of the base -> what replaces it (`modules_to_save`, biases).
    """

    folder: Path
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor, float, bool]]
    whole: Mapping[str, torch.Tensor]

    @classmethod
    def open(cls, folder: Path, base: Checkpoint) -> Adapter:
        """Reads an adapter without trusting it, and refuses one that does not fit.

        Raises:
            CheckpointError: no LoRA, of a kind that is more than the sum above, a module that the base does not
                have or has in another shape, or half of a pair.
        """
        config = read_json(folder / CONFIG)
        _check_kind(folder, config)
        tensors = _tensors(folder)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        whole = {}
        for key, tensor in tensors.items():
            match = _PART.match(key)
            if match is None:
                # peft stores an embedding that it adapts, or whose size changed, as a whole beside its pair.
                name = key.removeprefix(_PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")
                whole[_in_base(folder, base, name, tensor.shape)] = tensor
                continue
            name = f"{match['module'].removeprefix(_PREFIX)}.weight"
            parts.setdefault(name, {})[match["side"]] = tensor
            parts[name]["embedding"] = torch.tensor(bool(match["embedding"]))
        pairs = {}
        for name, sides in parts.items():
            if not {"A", "B"} <= sides.keys():
                raise CheckpointError(f"{folder}: {shown(name)} has one half of a LoRA pair. Save it again.")
            a, b = sides["A"], sides["B"]
            turned = bool(config.get("fan_in_fan_out")) or bool(sides["embedding"])
            shape = torch.Size((a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1]))
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
                raise CheckpointError(
                    f"{folder}: {shown(name)}: LoRA of shapes {tuple(a.shape)} and {tuple(b.shape)}, wanted (r, in) "
                    "and (out, r) of a linear layer."
                )
            module = name.removesuffix(".weight")
            pairs[_in_base(folder, base, name, shape)] = (a, b, _scaling(config, module, a.shape[0]), turned)
        if not pairs and not whole:
            raise CheckpointError(f"{folder}: holds no LoRA weights. Save the adapter again.")
        return cls(folder, pairs, whole)

    def apply(self, base: Checkpoint, name: str) -> torch.Tensor:
        """The tensor of the base with the adapter in it, in the base's dtype.

        Raises:
            MergeError: a value does not fit into that dtype.
        """
        tensor = base.tensor(name)
        if name not in self.whole and name not in self.pairs:
            return tensor
        start = self.whole.get(name, tensor).float()
        if name in self.pairs:
            a, b, scaling, turned = self.pairs[name]
            delta = b.float() @ a.float()
            start = torch.add(start, delta.T if turned else delta, alpha=scaling)
        merged = start.to(tensor.dtype)
        if not bool(merged.isfinite().all()):
            raise MergeError(f"{self.folder}: {shown(name)}: a merged value is not finite in {tensor.dtype}.")
        return merged.contiguous()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a checkpoint."""
    return (folder / CONFIG).is_file()


def merged_adapter(folder: Path, base: Checkpoint) -> Path:
    """The folder of a checkpoint that is the base with the adapter in it; made at the first call.

    It lies below `MERGEFRONT_CACHE`, or below `mergefront` in the user's cache folder. A tokenizer beside the adapter
    goes before the base's.

    Raises:
        CheckpointError: the adapter is broken or does not fit. DiskError: no space or no permission.
    """
    adapter = Adapter.open(folder, base)
    final = _cache() / _digest(folder, base)
    if final.exists():
        return final
    with locked_folder(final.parent):
        if final.exists():  # another process was first
            return final
        check_space(final.parent, base.bytes + 2**20)
        with staged_folder(final) as staging:
            dtypes = {base.dtype(name) for name in base.names}
            if len(dtypes) > 1:
                raise CheckpointError(
                    f"{base.folder}: tensors of {len(dtypes)} types, so the adapter {folder} has no single one. "
                    "Save the base in one type first."
                )
            save_tensors(
                base, base.names, lambda name: adapter.apply(base, name).contiguous(), dtypes.pop(), staging
            )
            for name in TAGALONG:
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, staging / name)
    return final


def average_adapters(folders: Sequence[Path], weights: Sequence[float], out: Path) -> None:
    """Writes the adapter whose A and B are weighted sums of the given ones': `A = sum_k w_k A_k`, `B = sum_k w_k B_k`.

    So the published code of Personalized Soups (arXiv 2310.11564) merges. `B A` has cross terms between the adapters
    then, of the order of the squared weights, and is not the weighted sum of their `B_k A_k`: merging the adapters as
    `parents.experts` is.

    Args:
        folders: LoRA adapters of one base, with the same modules, ranks and scaling. weights: one for each, finite.
        out: a folder that does not exist yet.

    Raises:
        CheckpointError: they differ in more than their weights. DiskError: `out` cannot be written.
    """
    if len(folders) != len(weights) or not folders or not all(map(math.isfinite, weights)):
        raise MergeError(
            f"merge: {len(folders)} adapters with weights {list(weights)} (wanted one finite each)."
        )
    every = [_tensors(folder) for folder in folders]
    configs = [read_json(folder / CONFIG) for folder in folders]
    told = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
    for folder, tensors, config in zip(folders, every, configs, strict=True):
        _check_kind(folder, config)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in every[0].items()} or any(
            config.get(key) != configs[0].get(key) for key in told
        ):
            raise CheckpointError(
                f"{folder}: other modules, ranks or scaling than {folders[0]}. A and B are averaged where they agree."
            )
    mean = {
        name: torch.stack([tensors[name].float() * w for tensors, w in zip(every, weights, strict=True)]).sum(
            0
        )
        for name in every[0]
    }
    with locked_folder(out.parent), staged_folder(out) as staging:
        save_file({name: tensor.contiguous() for name, tensor in mean.items()}, staging / WEIGHTS)
        (staging / CONFIG).write_text(json.dumps(configs[0], indent=2) + "\n", encoding="utf-8")


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder}: a PEFT adapter of type {shown(repr(config.get('peft_type')))}, wanted LORA. Merge it into its "
            "base first (`merge_and_unload()`, then `save_pretrained`)."
        )
    for key, what in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{folder}: a LoRA with {what} ({key}), which is more than B times A. Merge it into its base first "
                "(`merge_and_unload()`, then `save_pretrained`)."
            )


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS}. Save the adapter with safetensors.")
    read_header(path)  # every length and type, before anything is mapped
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in sorted(opened.keys())}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({shown(str(error))}). Save the adapter again."
        ) from error


def _in_base(folder: Path, base: Checkpoint, name: str, shape: Sequence[int]) -> str:
    """The stored name of a tensor of the base."""
    if name not in base.names:
        raise CheckpointError(
            f"{folder}: changes {shown(name)}, which {base.folder} does not have. Take the adapter's own base as pre."
        )
    if tuple(shape) != base.shape(name):
        raise CheckpointError(
            f"{folder}: {shown(name)}: shape {tuple(shape)} but {base.shape(name)} in {base.folder}. "
            "Take the adapter's own base as pre."
        )
    return name


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{CONFIG}: lora_alpha: found {shown(repr(alpha))}, wanted a number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """peft's rule: a pattern is matched against the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _digest(folder: Path, base: Checkpoint) -> str:
    whole = hashlib.sha256(base.sha256().encode())
    for name in (CONFIG, WEIGHTS, *TAGALONG):
        if (folder / name).is_file():
            whole.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return whole.hexdigest()[:32]


def _cache() -> Path:
    given = os.environ.get("MERGEFRONT_CACHE")
    usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(usual) / "mergefront" / "adapters"
