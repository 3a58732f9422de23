"""The adapter of a trained switcher: put into a model by peft, saved as a plain PEFT folder, loaded without peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from search.checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint
from search.checkpoints.layout import load_config, read_layout
from search.checkpoints.loading import load_model
from search.checkpoints.lora import Adapter
from search.checkpoints.placement import place
from search.config.switching import LoraOptions
from search.errors import CheckpointError, ConfigError, MergeError, MergefrontError
from search.storage.files import read_json

Collect = Callable[[], tuple[dict[str, Any], dict[str, Tensor]]]


@contextmanager
def adapted(model: Any, options: LoraOptions) -> Iterator[tuple[list[nn.Parameter], Collect]]:
    """Puts LoRA layers into a model, and takes them out again; within, random numbers are those of `options.seed`.

    Gives the layers' parameters, the only ones with gradients, and what collects config and tensors of the adapter.
    The model is the same afterwards, and in eval mode.

    Raises:
        MergefrontError: peft is not installed. ConfigError: targets that the model does not have.
    """
    try:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    except ImportError as error:
        raise MergefrontError(
            "switching: training a switcher needs peft: pip install 'mergefront[switch]'."
        ) from error
    _check_targets(model, options)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is outdated
            wrapped = get_peft_model(model, config)

        def collect() -> tuple[dict[str, Any], dict[str, Tensor]]:
            # Not "auto", which asks the hub whether the embedding has grown; no layer of it is a target.
            found = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
            return _as_saved(config), tensors

        try:
            yield [parameter for parameter in model.parameters() if parameter.requires_grad], collect
        finally:
            wrapped.unload()
            model.eval()
            for parameter, wanted in before:
                parameter.requires_grad_(wanted)


def save_adapter(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a PEFT adapter into a folder that exists. Raises OSError."""
    save_file(dict(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def load_switcher(
    base: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """The model of a checkpoint folder, with an adapter in it, in eval mode; nothing is written and peft not needed.

    Args:
        base: a checkpoint. adapter: a plain PEFT adapter of it; merged as a parent's is, in the base's type.
        dtype: of the model. device: as from `choose_device`.

    Raises:
        CheckpointError: a folder is broken, or the two do not fit. MergeError: a merged value is not finite.
    """
    checkpoint = Checkpoint.open(base)
    model: Any = load_model(checkpoint.folder, load_config(checkpoint.folder), dtype, error=CheckpointError)
    if adapter is not None:
        opened = Adapter.open(adapter, checkpoint)
        stored = {name: checkpoint.shape(name) for name in checkpoint.names}
        layout = read_layout(model, stored, checkpoint.folder)
        known = dict(model.named_parameters())
        for name in sorted({*opened.pairs, *opened.whole}):
            merged = opened.apply(checkpoint, name).to(dtype)
            if not bool(merged.isfinite().all()):
                raise MergeError(f"{adapter}: {name}: a merged value is not finite.")
            known[layout.parameter[name]].data = merged
    return place(model.requires_grad_(False), device)


def _check_targets(model: Any, options: LoraOptions) -> None:
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for target in options.targets:
        if target not in linear:
            raise ConfigError(
                f"switching.lora.targets: found {target!r} (wanted linear layers of {type(model).__name__}: "
                f"{', '.join(sorted(linear))})."
            )


def _as_saved(config: Any) -> dict[str, Any]:
    """A config of peft as it writes it, without the path of the base."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = read_json(Path(folder) / ADAPTER_CONFIG)
    return {
        **found,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(found["target_modules"]),
    }
