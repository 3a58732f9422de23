"""The parents of a study, pre and its experts, opened, checked and compared before the first trial."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from objectives.printable import shown
from search.checkpoints.adapters import adapter_digest, merged_adapter
from search.checkpoints.checkpoint import Checkpoint, dtype_name, is_adapter
from search.checkpoints.hub import resolve
from search.checkpoints.layout import empty_model, load_config, read_layout, same_layout
from search.checkpoints.tokenizers import compare_tokenizers, load_tokenizer, same_names
from search.errors import CheckpointError, IncompatibleModelsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from search.checkpoints.local_parents import LocalParents


__all__ = ["Parents", "resolve"]

# Config keys that base and instruct releases of one model legitimately set differently. The other keys that
# the config class declares must agree; keys that it does not declare have no effect on the model.
_FREE = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "decoder_start_token_id",
    "use_cache",
    "initializer_range",
    "pretraining_tp",
    "is_decoder",
    "max_position_embeddings",  # a note instead; learned positions are caught by the tensor's shape
    "n_positions",
    "use_sliding_window",  # these three act through sliding_window and layer_types, which are compared
    "max_window_layers",
    "_sliding_window_pattern",
    "architectures",
}
_FIRST = ("model_type", "tie_word_embeddings", "vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(eq=False)
class Parents:
    """A pre-trained checkpoint and what was made from it: one architecture, one vocabulary.

    Attributes:
        pre: the pre-trained checkpoint.
        experts: post-trained ones by name, in order; a single one is called `post`. The first one's config, tokenizer
            and generation config are shipped.
        config: that config, as an object.
        parameter: stored tensor name -> name in the transformers state dict (equal but for GPT-NeoX's head).
        tied: alias -> the stored tensor it shares; an alias is no variable of its own.
        ignored: stored buffers that transformers computes itself; they are neither merged nor shipped.
        revisions: commit hash of each parent that came from the hub, else None; pre first.
        adapters: folders of those experts that are PEFT adapters; their checkpoints are `pre` with the adapter in it.
        notes: differences that do not stop a merge, one line each.
    """

    pre: Checkpoint
    experts: Mapping[str, Checkpoint]
    config: PretrainedConfig
    parameter: Mapping[str, str]
    tied: Mapping[str, str]
    ignored: tuple[str, ...]
    revisions: tuple[str | None, ...] = (None, None)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        pre: str,
        experts: Mapping[str, str],
        *,
        check_values: bool = True,
        local: LocalParents | None = None,
    ) -> Parents:
        """Open all parents and refuse any whose merge would be wrong.

        Args:
            pre: folder or hub id of the pre-trained checkpoint.
            experts: the same for the post-trained ones, by name.
            check_values: read every weight once, to refuse NaN and infinity, and experts that are copies (of memory
                bandwidth's speed).
            local: reads folders from copies on this machine.

        Raises:
            CheckpointError: one parent is missing, broken or unsafe.
            IncompatibleModelsError: they do not belong together; names the first difference and both values.
        """
        where = {label: resolve(str(place)) for label, place in {"pre": pre, **experts}.items()}
        if local is not None:
            where = {
                label: (local.copy_of(label, folder, place), revision)
                for (label, (folder, revision)), place in zip(
                    where.items(), (pre, *experts.values()), strict=True
                )
            }
        base = Checkpoint.open(where["pre"][0])
        opened = {"pre": base}
        adapters = {}
        for label in experts:
            folder, _ = where[label]
            if is_adapter(folder):
                adapters[label] = folder
                folder = merged_adapter(folder, base)
            opened[label] = Checkpoint.open(folder)
        configs = {label: load_config(one.folder) for label, one in opened.items()}
        layouts = {
            label: read_layout(
                empty_model(configs[label], one.folder),
                {name: one.shape(name) for name in one.names},
                one.folder,
            )
            for label, one in opened.items()
        }
        first = next(iter(experts))
        notes = []
        for label in experts:
            pair = configs["pre"], configs[label]
            notes += _compare_configs(base, opened[label], pair, label, first)
            same_layout(layouts["pre"], layouts[label], label)
        parents = cls(
            base,
            {label: opened[label] for label in experts},
            configs[first],
            layouts[first].parameter,
            layouts[first].tied,
            layouts[first].ignored,
            tuple(revision for _, revision in where.values()),
            adapters,
            notes,
        )
        _compare_tensors(parents)
        if local is not None:
            for label, one in opened.items():
                if label not in adapters:
                    local.check(label, one)
        tokenizer = load_tokenizer(base.folder)
        named: dict[int, tuple[str, str]] = {}
        for label, one in parents.experts.items():
            own = parents.tokenizer() if label == first else load_tokenizer(one.folder)
            notes += compare_tokenizers(tokenizer, own, int(configs[label].vocab_size), label, shipped=first)
            same_names(named, own, label)
        if parents.ignored:
            notes.append(f"{len(parents.ignored)} stored buffers are computed by transformers and left out")
        for label, one in opened.items():
            _check_ties(one, parents.tied)
            if check_values:
                zero = one.check_finite(parents.names)
                if zero:
                    notes.append(
                        f"{label}: {len(zero)} tensors are zero throughout (first: {shown(zero[0])})"
                    )
        if check_values and len(experts) > 1:
            notes += compare_experts(parents)
        return parents

    @classmethod
    def pair(cls, pre: str, post: str, *, check_values: bool = True) -> Parents:
        """`open` for one pre-trained and one post-trained checkpoint."""
        return cls.open(pre, {"post": post}, check_values=check_values)

    @property
    def post(self) -> Checkpoint:
        """The expert whose config and tokenizer are shipped: the first."""
        return next(iter(self.experts.values()))

    @property
    def everybody(self) -> tuple[Checkpoint, ...]:
        """Pre, then the experts in order: the order of weights."""
        return self.pre, *self.experts.values()

    @property
    def labels(self) -> tuple[str, ...]:
        """What `everybody` is called: `pre`, then the names of the experts."""
        return "pre", *self.experts

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that a merge must produce, sorted; tied aliases and ignored buffers left out."""
        return tuple(sorted(self.parameter))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what all parents are (`sha256_of`) and the tokenizer that scores."""
        whole = hashlib.sha256()
        for label in self.labels:
            whole.update(self.sha256_of(label).encode())
        tokenizer: Any = self.tokenizer()
        whole.update(tokenizer.backend_tokenizer.to_str().encode())
        whole.update(repr(getattr(tokenizer, "chat_template", None)).encode())
        return whole.hexdigest()

    def sha256_of(self, label: str) -> str:
        """SHA-256 over a parent's weights and config; of an adapter, over the base's and its own, not the merged ones.

        So it is the same on every machine.
        """
        if label in self.adapters:
            return adapter_digest(self.adapters[label], self.pre)
        return (self.pre if label == "pre" else self.experts[label]).sha256()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first expert's tokenizer: it scores, and it is shipped."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.post.folder)
        return self._tokenizer

    @property
    def parameters(self) -> int:
        """How many numbers one merge produces; a tied tensor counts once."""
        return sum(math.prod(self.post.shape(name)) for name in self.names)

    @property
    def bytes(self) -> int:
        """Stored size in bytes of the tensors of one parent (`post`) that a merge reads."""
        return sum(math.prod(self.post.shape(n)) * self.post.dtype(n).itemsize for n in self.names)


def _compare_configs(
    pre: Checkpoint,
    post: Checkpoint,
    configs: tuple[PretrainedConfig, PretrainedConfig],
    label: str,
    shipped: str,
) -> list[str]:
    mine, yours = (config.to_dict() for config in configs)
    _same("model_type", mine["model_type"], yours["model_type"], label)
    heads = pre.config.get("architectures"), post.config.get("architectures")
    if all(heads):
        _same("architectures", *heads, label)
    for key in sorted(_declared(configs[1]), key=lambda key: (key not in _FIRST, key)):
        _same(key, mine.get(key), yours.get(key), label)
    notes = []
    for key in ("max_position_embeddings", "n_positions"):
        if mine.get(key) != yours.get(key):
            notes.append(
                f"config: {key} is {mine.get(key)} in pre, {yours.get(key)} in {label}; {shipped}'s is used"
            )
    return notes


def _declared(config: PretrainedConfig) -> set[str]:
    """The keys of this config class that can change what the model computes."""
    from transformers import PretrainedConfig

    common = set(PretrainedConfig().to_dict())
    keys = set(type(config)().to_dict()) - common - _FREE
    return {
        key for key in keys if "dropout" not in key and "pdrop" not in key and not key.startswith("summary_")
    }


def _same(key: str, pre: object, post: object, label: str) -> None:
    if pre != post:
        raise IncompatibleModelsError(
            f"config.json: {key}: {shown(repr(pre))} in pre but {shown(repr(post))} in {label}. "
            "Parents must share one architecture: take checkpoints of one model."
        )


def _compare_tensors(parents: Parents) -> None:
    for name in parents.names:
        for one in parents.everybody:
            one.check_float(name)
        a = parents.pre.dtype(name)
        for label, expert in parents.experts.items():
            if a != (b := expert.dtype(name)):
                raise IncompatibleModelsError(
                    f"tensor {shown(name)}: type {dtype_name(a)} in pre but {dtype_name(b)} in {label}. "
                    "Save one parent in the other's type first."
                )


def compare_experts(parents: Parents) -> list[str]:
    """A note on every expert whose weights lie as far from pre's as those of another model would.

    Raises:
        IncompatibleModelsError: an expert equals pre, or another expert, in every tensor.
    """
    seen: dict[str, str] = {}
    for label, one in zip(parents.labels, parents.everybody, strict=True):
        digest = _weights_digest(one, parents.names)
        if (twin := seen.setdefault(digest, label)) != label:
            raise IncompatibleModelsError(
                f"{label}: every tensor is as in {twin}, so its task vector is "
                f"{'zero' if twin == 'pre' else 'counted twice'}. Leave one of the two out."
            )
    notes = []
    for label, one in parents.experts.items():
        squared = moved = 0.0
        for name in parents.names:
            if len(parents.pre.shape(name)) < 2:
                continue  # norms are near 1 in every model
            base = parents.pre.tensor(name).double()
            squared += float(base.square().sum())
            moved += float((one.tensor(name).double() - base).square().sum())
        if moved > squared:
            notes.append(
                f"{label}: its task vector is {math.sqrt(moved / squared):.1f} times as long as pre's matrices: "
                "it may have been trained from another base"
            )
    return notes


def _weights_digest(one: Checkpoint, names: Sequence[str]) -> str:
    """SHA-256 of the values alone, however they are stored in files."""
    whole = hashlib.sha256()
    for name in names:
        whole.update(one.tensor(name).reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _check_ties(one: Checkpoint, tied: Mapping[str, str]) -> None:
    """A stored alias must hold what it is tied to; transformers would drop it without a word."""
    for alias, target in tied.items():
        if alias not in one.names:
            continue
        same = one.dtype(alias) == one.dtype(target) and one.shape(alias) == one.shape(target)
        if not same or not torch.equal(one.tensor(alias), one.tensor(target)):
            raise CheckpointError(
                f"{one.folder}: tensor {shown(alias)} differs from {shown(target)} but config.json ties them "
                "(tie_word_embeddings true). Set it to false in both parents if the head was trained."
            )
