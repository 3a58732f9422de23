"""Loading a checkpoint folder into transformers, strictly: no remote code, no network, no pickle, no missing weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from objectives.printable import shown
from search.checkpoints.checkpoint import ADAPTER_CONFIG
from search.checkpoints.layout import attention
from search.errors import MergefrontError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REFUSED = ("missing_keys", "mismatched_keys")


def load_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype,
    *,
    error: type[MergefrontError],
    refused: Sequence[str] = REFUSED,
) -> PreTrainedModel:
    """The model of a folder on the CPU, in eval mode; its values may be views of the mapped file.

    Args:
        config: transformers' config, as `load_config` reads it.
        error: what is raised when the model does not load cleanly.
        refused: which of transformers' lists of keys must be empty.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _without_adapter(folder) as seen:
            model, report = AutoModelForCausalLM.from_pretrained(
                str(seen),
                config=config,
                dtype=dtype,
                attn_implementation=attention(config),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as problem:
        reason = shown(str(problem).strip().splitlines()[0])
        raise error(f"{folder}: the model does not load ({reason}).") from problem
    finally:
        if bars:
            logging.enable_progress_bar()
    for kind in refused:
        for key in sorted(report.get(kind, ()), key=str):
            raise error(f"{folder}: {shown(str(key))}: {kind.replace('_', ' ')} on loading.")
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder, or its files without a stray adapter_config.json: transformers obeys that where peft is installed."""
    if not (folder / ADAPTER_CONFIG).exists():
        yield folder
        return
    with TemporaryDirectory() as seen:
        for path in folder.iterdir():
            if path.suffix in (".json", ".safetensors") and not path.name.startswith("adapter_"):
                (Path(seen) / path.name).symlink_to(path.resolve())
        yield Path(seen)
