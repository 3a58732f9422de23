"""A LoRA adapter, read without trusting it and fitted to its base, module by module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from objectives.printable import shown
from search.checkpoints.checkpoint import ADAPTER_WEIGHTS, FLOATS, Checkpoint, checked_folder, dtype_name
from search.checkpoints.header import read_header
from search.checkpoints.layout import empty_model, load_config, read_layout
from search.checkpoints.lora_config import LoraConfig
from search.errors import CheckpointError

_PREFIX = "base_model.model."
PART = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_OWN = "Take the adapter's own base as pre."
_AGAIN = "Save the adapter again."


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
            CheckpointError: no LoRA, of a kind that is more than `W + scaling B A`, half of a pair, a link that leads
                out of the folder, or a module that the base does not have, has in another shape, or ties.
        """
        folder = checked_folder(folder)
        fitting = _Fitting(folder, LoraConfig.read(folder), _Base.of(base))
        parts: dict[str, dict[str, torch.Tensor]] = {}
        whole: dict[str, torch.Tensor] = {}
        for key, tensor in read_tensors(folder).items():
            match = PART.fullmatch(key)
            if match is None:
                # peft stores an embedding that it adapts, or whose size changed, as a whole beside its pair.
                name = key.removeprefix(_PREFIX).replace(".modules_to_save", "").replace(".base_layer", "")
                if fitting.leaves(name, tensor):
                    continue
                stored = fitting.stored(name, tuple(tensor.shape))
                if stored in whole:
                    raise _twice(folder, name)
                whole[stored] = tensor
                continue
            module = match["module"].removeprefix(_PREFIX)
            side = f"{'embedding_' if match['embedding'] else ''}{match['side']}"
            if side in (sides := parts.setdefault(module, {})):
                raise _twice(folder, f"{module}.lora_{side}")
            sides[side] = tensor
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float, bool]] = {}
        for module, found in parts.items():
            stored, pair = fitting.pair(module, found)
            if stored in pairs:
                raise _twice(folder, module)
            pairs[stored] = pair
        if not pairs and not whole:
            raise CheckpointError(f"{folder}: holds no LoRA weights. Save the adapter again.")
        return cls(folder, pairs, whole)

    def apply(self, base: Checkpoint, name: str) -> torch.Tensor:
        """The tensor of the base with the adapter in it, in the base's dtype."""
        tensor = base.tensor(name)
        if name not in self.whole and name not in self.pairs:
            return tensor
        start = self.whole.get(name, tensor).float()
        if name in self.pairs:
            a, b, scaling, turned = self.pairs[name]
            delta = b.float() @ a.float()
            start = torch.add(start, delta.T if turned else delta, alpha=scaling)
        return start.to(tensor.dtype).contiguous()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter. Raises CheckpointError."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS}. Save the adapter with safetensors.")
    for name, entry in read_header(path).items():  # every length and type, before anything is mapped
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: type {dtype_name(entry.dtype)} (wanted float32, bfloat16 or float16). "
                "Save the adapter in one of these."
            )
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in sorted(opened.keys())}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({shown(str(error))}). {_AGAIN}") from error


@dataclass(frozen=True)
class _Base:
    """What the model class says of a checkpoint: its modules, and where each one's tensors are stored.

    Attributes:
        at: name in the state dict -> stored name. shared: name of either kind -> the stored tensor that a tie shares.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, nn.Module]
    at: Mapping[str, str]
    shared: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Base:
        folder = checkpoint.folder
        model = empty_model(load_config(folder), folder)
        layout = read_layout(model, {name: checkpoint.shape(name) for name in checkpoint.names}, folder)
        at = {parameter: name for name, parameter in layout.parameter.items()}
        aliases: dict[str, str] = dict(model.all_tied_weights_keys)
        ties = {name: at.get(target, target) for name, target in aliases.items() if name != target}
        ties.update(layout.tied)
        shared = ties | {target: target for target in ties.values()}
        shared |= {name: stored for name, stored in at.items() if stored in shared}
        return cls(checkpoint, dict(model.named_modules()), at, shared)


@dataclass(frozen=True)
class _Fitting:
    """One adapter against its base."""

    folder: Path
    config: LoraConfig
    base: _Base

    def leaves(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a whole tensor is what the base shares there already; peft saves embeddings that nobody trained."""
        stored = self.base.shared.get(name)
        if stored is None:
            return False
        checkpoint = self.base.checkpoint
        same = tuple(tensor.shape) == checkpoint.shape(stored)
        return same and torch.equal(tensor.to(checkpoint.dtype(stored)), checkpoint.tensor(stored))

    def known(self, name: str) -> str:
        """The stored name of a tensor of the base that may be changed."""
        checkpoint = self.base.checkpoint
        if name in self.base.shared:
            raise CheckpointError(
                f"{self.folder}: changes {shown(name)}, which {checkpoint.folder} shares between input embedding and "
                "head (tie_word_embeddings); they were trained apart. Save the base untied, with the head stored and "
                "tie_word_embeddings false, and take that as pre."
            )
        stored = self.base.at.get(name, name)
        if stored not in checkpoint.names:
            raise CheckpointError(
                f"{self.folder}: changes {shown(name)}, which {checkpoint.folder} does not have. {_OWN}"
            )
        return stored

    def stored(self, name: str, shape: tuple[int, ...]) -> str:
        """The stored name of a tensor of the base that the adapter changes, and that has this shape."""
        stored, checkpoint = self.known(name), self.base.checkpoint
        if shape != checkpoint.shape(stored):
            raise CheckpointError(
                f"{self.folder}: {shown(name)}: shape {shown(str(shape))} but {checkpoint.shape(stored)} in "
                f"{checkpoint.folder}. {_OWN}"
            )
        checkpoint.check_float(stored)
        return stored

    def pair(
        self, module: str, sides: Mapping[str, torch.Tensor]
    ) -> tuple[str, tuple[torch.Tensor, torch.Tensor, float, bool]]:
        """The stored tensor that a pair belongs to, and the pair."""
        name = f"{module}.weight"
        kind = self.base.modules.get(module)
        embedding = isinstance(kind, nn.Embedding)
        turned = embedding or type(kind).__name__ == "Conv1D"  # what GPT-2 has for linear layers
        if kind is not None and not (turned or isinstance(kind, nn.Linear)):
            raise CheckpointError(
                f"{self.folder}: {shown(name)}: LoRA of a {type(kind).__name__}, wanted a linear layer or an "
                "embedding. Merge it into its base with peft (`merge_and_unload()`, then `save_pretrained`)."
            )
        if turned and self.config.by_parameter:
            raise CheckpointError(
                f"{self.folder}: {shown(name)}: LoRA of a parameter (target_parameters) of a {type(kind).__name__}. "
                "Merge it into its base with peft (`merge_and_unload()`, then `save_pretrained`)."
            )
        wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(sides) != set(wanted):
            self.known(name)
            raise CheckpointError(
                f"{self.folder}: {shown(name)} has {' and '.join('lora_' + side for side in sorted(sides))}, "
                f"wanted the two halves of a LoRA pair, lora_{wanted[0]} and lora_{wanted[1]}. {_AGAIN}"
            )
        a, b = (sides[side] for side in wanted)
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"{self.folder}: {shown(name)}: LoRA of shapes {shown(str(tuple(a.shape)))} and "
                f"{shown(str(tuple(b.shape)))}, wanted (r, in) and (out, r) of a linear layer. {_AGAIN}"
            )
        stored = self.stored(name, (a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1]))
        if (rank := self.config.rank_of(module)) != a.shape[0]:
            raise CheckpointError(
                f"{self.config.path}: r: found {rank} for {shown(name)}, whose LoRA has rank {a.shape[0]}. {_AGAIN}"
            )
        return stored, (a, b, self.config.scaling(module), turned)


def _twice(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {shown(name)} is stored twice, under two names. {_AGAIN}")
