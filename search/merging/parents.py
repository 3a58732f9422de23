"""The two parents of a study, opened, checked and compared before the first trial."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from search.errors import CheckpointError, IncompatibleModelsError
from search.merging.checkpoint import Checkpoint, dtype_name
from search.merging.header import shown
from search.merging.hub import resolve
from search.merging.layout import empty_model, load_config, read_layout, same_layout
from search.merging.tokenizers import compare_tokenizers, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

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
    """Two checkpoints of one architecture and one vocabulary.

    Attributes:
        pre, post: the checkpoints.
        config: `post`'s config object; it is the one that is shipped.
        parameter: stored tensor name -> name in the transformers state dict (equal but for GPT-NeoX's head).
        tied: alias -> the stored tensor it shares; an alias is no variable of its own.
        ignored: stored buffers that transformers computes itself; they are neither merged nor shipped.
        revisions: commit hash of each parent that came from the hub, else None.
        notes: differences that do not stop a merge, one line each.
    """

    pre: Checkpoint
    post: Checkpoint
    config: PretrainedConfig
    parameter: Mapping[str, str]
    tied: Mapping[str, str]
    ignored: tuple[str, ...]
    revisions: tuple[str | None, str | None] = (None, None)
    notes: list[str] = field(default_factory=list)
    _tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    @classmethod
    def open(cls, pre: str, post: str, *, check_values: bool = True) -> Parents:
        """Open both parents and refuse any pair whose merge would be wrong.

        Args:
            pre: folder or hub id of the pre-trained checkpoint.
            post: the same for the post-trained one.
            check_values: read every weight once, to refuse NaN and infinity (memory-bandwidth bound).

        Raises:
            CheckpointError: one parent is missing, broken or unsafe.
            IncompatibleModelsError: they do not belong together; names the first difference and both values.
        """
        where = [resolve(str(pre)), resolve(str(post))]
        first, second = (Checkpoint.open(folder) for folder, _ in where)
        configs = load_config(first.folder), load_config(second.folder)
        notes = _compare_configs(first, second, configs)
        layouts = [
            read_layout(
                empty_model(config, one.folder), {name: one.shape(name) for name in one.names}, one.folder
            )
            for one, config in zip((first, second), configs, strict=True)
        ]
        same_layout(*layouts)
        parents = cls(
            first,
            second,
            configs[1],
            layouts[1].parameter,
            layouts[1].tied,
            layouts[1].ignored,
            (where[0][1], where[1][1]),
            notes,
        )
        _compare_tensors(parents)
        notes += compare_tokenizers(
            load_tokenizer(first.folder), parents.tokenizer(), int(configs[1].vocab_size)
        )
        if parents.ignored:
            notes.append(f"{len(parents.ignored)} stored buffers are computed by transformers and left out")
        for label, one in (("pre", first), ("post", second)):
            _check_ties(one, parents.tied)
            if check_values:
                zero = one.check_finite(parents.names)
                if zero:
                    notes.append(
                        f"{label}: {len(zero)} tensors are zero throughout (first: {shown(zero[0])})"
                    )
        return parents

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that a merge must produce, sorted; tied aliases and ignored buffers left out."""
        return tuple(sorted(self.parameter))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over both parents' weights and configs and the tokenizer that scores."""
        whole = hashlib.sha256()
        for one in (self.pre, self.post):
            whole.update(one.sha256().encode())
        tokenizer: Any = self.tokenizer()
        whole.update(tokenizer.backend_tokenizer.to_str().encode())
        whole.update(repr(getattr(tokenizer, "chat_template", None)).encode())
        return whole.hexdigest()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """`post`'s tokenizer: it scores, and it is shipped."""
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
    pre: Checkpoint, post: Checkpoint, configs: tuple[PretrainedConfig, PretrainedConfig]
) -> list[str]:
    mine, yours = (config.to_dict() for config in configs)
    _same("model_type", mine["model_type"], yours["model_type"])
    heads = pre.config.get("architectures"), post.config.get("architectures")
    if all(heads):
        _same("architectures", *heads)
    for key in sorted(_declared(configs[1]), key=lambda key: (key not in _FIRST, key)):
        _same(key, mine.get(key), yours.get(key))
    notes = []
    for key in ("max_position_embeddings", "n_positions"):
        if mine.get(key) != yours.get(key):
            notes.append(f"config: {key} is {mine.get(key)} in pre, {yours.get(key)} in post; post's is used")
    return notes


def _declared(config: PretrainedConfig) -> set[str]:
    """The keys of this config class that can change what the model computes."""
    from transformers import PretrainedConfig

    common = set(PretrainedConfig().to_dict())
    keys = set(type(config)().to_dict()) - common - _FREE
    return {
        key for key in keys if "dropout" not in key and "pdrop" not in key and not key.startswith("summary_")
    }


def _same(key: str, pre: object, post: object) -> None:
    if pre != post:
        raise IncompatibleModelsError(
            f"config.json: {key}: {shown(repr(pre))} in pre but {shown(repr(post))} in post. "
            "Parents must share one architecture: take two checkpoints of one model."
        )


def _compare_tensors(parents: Parents) -> None:
    for name in parents.names:
        for one in (parents.pre, parents.post):
            one.check_float(name)
        a, b = parents.pre.dtype(name), parents.post.dtype(name)
        if a != b:
            raise IncompatibleModelsError(
                f"tensor {shown(name)}: type {dtype_name(a)} in pre but {dtype_name(b)} in post. "
                "Save one parent in the other's type first."
            )


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
