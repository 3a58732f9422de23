"""Which stored tensor fills which parameter of the transformers model, and that none is lost.

The model class itself is asked (built without memory, on the meta device), not a table of architectures: one
that forgets `q_norm` produces a merge that loads with random norms (arcee-ai/mergekit#602).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from objectives.printable import shown
from search.errors import CheckpointError, IncompatibleModelsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Buffers that old checkpoints still store and that transformers computes itself.
_LEGACY_BUFFER = re.compile(r"\.(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias))$")


@dataclass(frozen=True)
class Layout:
    """Stored names against the names of the model's state dict.

    Attributes:
        parameter: stored name -> state-dict name, for every tensor that a merge must produce.
        tied: alias -> tensor it shares, for every tie that the config asks for, stored or not (an alias that
            is not stored goes by its state-dict name). Aliases are not in `parameter`.
        ignored: stored buffers that transformers computes itself.
    """

    parameter: Mapping[str, str]
    tied: Mapping[str, str]
    ignored: tuple[str, ...]


def load_config(folder: Path) -> PretrainedConfig:
    """The folder's config as transformers' class. Raises CheckpointError when that cannot be had."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a hand-written config makes the library raise
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot read it ({_first_line(error)}). "
            "Use a model that this version of transformers knows."
        ) from error
    nested = [key for key in ("text_config", "vision_config", "audio_config") if hasattr(config, key)]
    if nested or getattr(config, "is_encoder_decoder", False):
        kind = f"it has a {nested[0]}" if nested else "it is an encoder-decoder"
        raise CheckpointError(
            f"{folder / 'config.json'}: model type {config.model_type} is not a plain causal language model "
            f"({kind}). Save its language model alone as a checkpoint."
        )
    return config


def attention(config: PretrainedConfig) -> str:
    """The attention code to run: never one that a config file names, since it could name a hub kernel."""
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


def empty_model(
    config: PretrainedConfig, folder: Path, *, implementation: str | None = None
) -> PreTrainedModel:
    """The model without weights, on the meta device. Raises CheckpointError when it cannot be built.

    Args:
        implementation: of attention; None chooses.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, attn_implementation=implementation or attention(config), trust_remote_code=False
            )
    except Exception as error:  # a config that parses may still describe an impossible model
        raise CheckpointError(
            f"{folder / 'config.json'}: no causal language model can be built ({_first_line(error)}). "
            "Check the config."
        ) from error
    return model


def read_layout(model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]], folder: Path) -> Layout:
    """Match the stored tensors (name -> shape) with the model's state dict, one to one.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape than the config says.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    renamings, converters = _conversions(model)
    alias = {name: target for name, target in dict(model.all_tied_weights_keys).items() if name != target}
    ignore = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    parameter: dict[str, str] = {}
    filled: dict[str, str] = {}
    ignored = []
    for name in sorted(stored):
        key = _renamed(name, renamings)
        if key not in wanted:
            if _LEGACY_BUFFER.search(name) or any(pattern.search(name) for pattern in ignore):
                ignored.append(name)
                continue
            if any(converter.rename_source_key(key)[1] is not None for converter in converters):
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)}: transformers fuses it with others on loading, "
                    "as mixtures of experts need. Such models cannot be merged yet."
                )
            raise CheckpointError(
                f"{folder}: tensor {shown(name)} is stored but {type(model).__name__} has no such tensor. "
                "Check that config.json belongs to these weights."
            )
        if key in filled:
            raise CheckpointError(
                f"{folder}: tensors {shown(filled[key])} and {shown(name)} are both {key} of the model. "
                "Save the checkpoint again."
            )
        if stored[name] != wanted[key]:
            raise CheckpointError(
                f"{folder}: tensor {shown(name)}: shape {stored[name]} but config.json says {wanted[key]}. "
                "Check that config.json belongs to these weights."
            )
        filled[key] = name
        parameter[name] = key
    tied = {filled.get(key, key): filled.get(target, target) for key, target in alias.items()}
    for key in tied:
        parameter.pop(key, None)
    for key in sorted(wanted):
        if key not in filled and alias.get(key) not in filled:
            raise CheckpointError(
                f"{folder}: tensor {key} is missing: {type(model).__name__} needs it. Download it again."
            )
    return Layout(parameter, tied, tuple(ignored))


def _conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' own renamings between stored names and parameters (GPT-NeoX: embed_out -> lm_head)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    every = get_model_conversion_mapping(model)
    renamings = [transform for transform in every if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in every if not isinstance(transform, WeightRenaming)]


def _renamed(name: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def _first_line(error: BaseException) -> str:
    return shown((str(error) or type(error).__name__).strip().splitlines()[0])


def same_layout(pre: Layout, post: Layout, label: str) -> None:
    """Raises IncompatibleModelsError when pre and the parent called `label` would fill different parameters."""
    if dict(pre.parameter) == dict(post.parameter):
        return
    first = sorted(set(pre.parameter.items()) ^ set(post.parameter.items()))[0][0]
    owner = "pre" if first in pre.parameter else label
    raise IncompatibleModelsError(
        f"tensor {shown(first)}: only {owner} stores it under this name. "
        "Save both parents with the same version of transformers."
    )
