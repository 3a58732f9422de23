"""Local models that judge answers: how they are loaded, and sequences in batches for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from objectives.scoring.encoding import max_length
from search.errors import CheckpointError

if TYPE_CHECKING:
    from search.checkpoints.checkpoint import Checkpoint


ROWS = 64  # sequences that go through a judge at once


def load_judge(
    folder: str | os.PathLike[str], kind: str, device: str, optional: str | None = None
) -> tuple[Any, Any, Checkpoint]:
    """Model in eval mode, tokenizer, checkpoint.

    Args:
        kind: the auto class of transformers. optional: tensors that start with it may be missing.

    Raises:
        CheckpointError: the folder is missing, broken or unsafe, or not such a model.
    """
    import transformers

    from search.checkpoints.checkpoint import Checkpoint
    from search.checkpoints.layout import load_config
    from search.checkpoints.tokenizers import load_tokenizer

    checkpoint = Checkpoint.open(Path(folder))
    tokenizer = load_tokenizer(checkpoint.folder)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            str(checkpoint.folder),
            config=load_config(checkpoint.folder),
            dtype=torch.float32,
            attn_implementation="eager",  # every architecture has it, DeBERTa has nothing else
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: the model does not load ({reason}).") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    missing = sorted(
        key for key in report["missing_keys"] if optional is None or not key.startswith(optional)
    )
    if missing:
        raise CheckpointError(f"{folder}: {missing[0]}: missing. It is not a checkpoint for {kind}.")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id or 0
    return model.eval().to(device), tokenizer, checkpoint


def longest(model: Any, tokenizer: Any) -> int:
    """Most tokens of a sequence; the tokenizer knows better where some positions are reserved (RoBERTa)."""
    return min(max_length(model.config, tokenizer), int(tokenizer.model_max_length))


def batches(encoded: Any, model: Any) -> Iterator[dict[str, Tensor]]:
    """The encoded sequences in their order, `ROWS` at once, padded on the right."""
    rows = encoded["input_ids"]
    for first in range(0, len(rows), ROWS):
        inputs = {}
        width = max(1, *map(len, rows[first : first + ROWS]))
        for name in encoded:
            fill = model.config.pad_token_id if name == "input_ids" else 0
            padded = [[*row, *[fill] * (width - len(row))] for row in encoded[name][first : first + ROWS]]
            inputs[name] = torch.tensor(padded, device=model.device)
        yield inputs
