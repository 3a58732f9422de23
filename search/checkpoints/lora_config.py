"""The adapter_config.json of a LoRA adapter, read without trusting it: what enters the sum, or why it cannot be had.

A key that changes more than `W + scaling B A` is refused, and so is one that is not known here, unless it is unset: a
silently wrong expert is worse than a line of advice. The keys are those of peft 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from objectives.printable import shown
from search.checkpoints.checkpoint import ADAPTER_CONFIG
from search.checkpoints.patterns import Pattern
from search.errors import CheckpointError
from search.storage.files import read_json

_MERGE = "Merge it into its base with peft (`merge_and_unload()`, then `save_pretrained`)."
_AGAIN = "Save the adapter again."
_MORE = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "layer_replication": "repeated layers",
    "lora_bias": "biases of its own",
    "alora_invocation_tokens": "Activated LoRA",
    "trainable_token_indices": "trainable tokens",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}
# What the sum needs, and what changes training, loading or the choice of modules, which the tensors' names show anyway.
_KNOWN = {
    *("alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"),
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "target_parameters", "task_type"),
    *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # ms-swift's
}
# The starts that leave the base as it is. Others subtract from it what A and B begin with, and it is saved nowhere.
_STARTS = ("gaussian", "orthogonal", "eva")
_MOST_PATTERNS, _MOST_SEARCHING = 4096, 64
_HIGHEST = 1e30  # of alpha
_RANKS = 2**31


@dataclass(frozen=True)
class LoraConfig:
    """What enters the sum.

    Attributes:
        ranks, alphas: pattern of module names -> value; the first that matches counts, else `rank` and `alpha`.
        root: alpha is divided by the root of the rank (rsLoRA).
        by_parameter: peft wrapped parameters instead of modules (`target_parameters`).
    """

    path: Path
    rank: int
    alpha: float
    ranks: tuple[tuple[Pattern, int], ...]
    alphas: tuple[tuple[Pattern, float], ...]
    root: bool
    by_parameter: bool

    @classmethod
    def read(cls, folder: Path) -> LoraConfig:
        """Raises CheckpointError: broken, of another kind than a plain LoRA, or a value makes no sense."""
        path = folder / ADAPTER_CONFIG
        config = read_json(path)
        _check_kind(path, config)
        _check_keys(path, config)
        return cls(
            path,
            _rank(path, "r", config.get("r", 8)),
            _alpha(path, "lora_alpha", config.get("lora_alpha", 8)),
            tuple((p, _rank(path, "rank_pattern", v)) for p, v in _patterns(path, config, "rank_pattern")),
            tuple((p, _alpha(path, "alpha_pattern", v)) for p, v in _patterns(path, config, "alpha_pattern")),
            _switch(path, config, "use_rslora"),
            bool(config.get("target_parameters")),
        )

    def rank_of(self, module: str) -> int:
        return next((rank for pattern, rank in self.ranks if pattern.matches(module)), self.rank)

    def scaling(self, module: str) -> float:
        """By what `B A` of a module is multiplied."""
        alpha = next((alpha for pattern, alpha in self.alphas if pattern.matches(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root else rank)


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: a PEFT adapter of type {_found(kind)}, wanted LORA (peft_type). {_MERGE}"
        )
    for key, value in config.items():
        if value is None or value is False:
            continue
        if key in _MORE:
            raise CheckpointError(
                f"{path}: a LoRA with {_MORE[key]} ({key}), which is more than B times A. {_MERGE}"
            )
        if key not in _KNOWN and value not in ("", [], {}):
            raise CheckpointError(
                f"{path}: {shown(key)}: found {_found(value)}, and nothing is known of this key. Take it out if it "
                f"does not change what the adapter computes. Else: {_MERGE}"
            )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and (not isinstance(start, str) or start not in _STARTS):
        raise CheckpointError(
            f"{path}: init_lora_weights: found {_found(start)}, wanted true, false or one of {', '.join(_STARTS)}: "
            "other starts may change the base itself, which is not in the adapter. Save it with peft's "
            "path_initial_model_for_weight_conversion, or merged (`merge_and_unload()`, then `save_pretrained`)."
        )


def _check_keys(path: Path, config: Mapping[str, Any]) -> None:
    for key in ("fan_in_fan_out", "ensure_weight_tying"):
        _switch(path, config, key)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(
            f"{path}: bias: found {_found(config['bias'])}, wanted none, all or lora_only. {_AGAIN}"
        )


def _switch(path: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key}: found {_found(value)}, wanted true or false. {_AGAIN}")
    return value


def _rank(path: Path, key: str, value: object) -> int:
    if type(value) is not int or not 1 <= value < _RANKS:
        raise CheckpointError(f"{path}: {key}: found {_found(value)}, wanted a rank of 1 or more. {_AGAIN}")
    return value


def _alpha(path: Path, key: str, value: object) -> float:
    # Compared before it is converted: an integer may be too large for that. NaN compares false.
    if not isinstance(value, int | float) or isinstance(value, bool) or not -_HIGHEST <= value <= _HIGHEST:
        raise CheckpointError(f"{path}: {key}: found {_found(value)}, wanted a number. {_AGAIN}")
    return float(value)


def _patterns(path: Path, config: Mapping[str, Any], key: str) -> list[tuple[Pattern, Any]]:
    given = config.get(key)
    if given is None:
        return []
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{path}: {key}: found {_found(given)}, wanted an object of patterns and numbers. {_AGAIN}"
        )
    found = []
    for text, value in given.items():
        try:
            found.append((Pattern(text), value))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {key}: found the pattern {_found(text)}: {shown(str(error))}. Write the names of modules "
                f"there, or: {_MERGE}"
            ) from error
    searching = sum(not pattern.is_plain for pattern, _ in found)
    if len(found) > _MOST_PATTERNS or searching > _MOST_SEARCHING:
        raise CheckpointError(
            f"{path}: {key}: found {len(found)} patterns, {searching} of which are no plain names, wanted at most "
            f"{_MOST_PATTERNS} and {_MOST_SEARCHING}. {_MERGE}"
        )
    return found


def _found(value: object) -> str:
    """A JSON value for a message; a nested one may be too deep for `repr`."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return shown(repr(value))
