"""Where a model lives: on one device, or its layers spread over all GPUs of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from search.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPREAD = "spread"
WANTED = "wanted auto, cpu, cuda, cuda:N or spread"


def choose_device(name: str) -> str:
    """The device that `--device` names; `auto` is a GPU if there is one.

    Raises:
        ConfigError: no such device here, or `spread` without accelerate.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if name == SPREAD:
        if not gpus:
            raise ConfigError("--device spread: there are 0 CUDA devices here.")
        try:
            import accelerate  # noqa: F401
        except ImportError as error:
            raise ConfigError("--device spread: pip install 'mergefront[multi-gpu]'.") from error
        return name
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {WANTED}.") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"--device {name}: there are {gpus} CUDA devices here.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: {WANTED}.")
    return name


def device_title(device: str) -> str:
    """What speed depends on: `cpu`, or the GPUs' model (and number, where a model is spread over them)."""
    if device == SPREAD:
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def place(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Moves a model to a device from `choose_device`; `spread` gives every GPU a balanced share of its layers."""
    if device != SPREAD:
        moved: PreTrainedModel = model.to(device)
        return moved
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or [])
    room: dict[Any, Any] = get_balanced_memory(model, no_split_module_classes=whole)
    room.pop("cpu", None)  # a layer in main memory would be copied for every batch
    return dispatch(model, infer_auto_device_map(model, max_memory=room, no_split_module_classes=whole))


def dispatch(model: PreTrainedModel, device_map: dict[str, Any]) -> PreTrainedModel:
    """Moves each module to its device; hooks hand the activations on.

    Raises:
        ConfigError: a module found no room on the GPUs.
    """
    from accelerate import dispatch_model

    if "disk" in device_map.values():
        module = next(name for name, device in device_map.items() if device == "disk")
        raise ConfigError(
            f"--device spread: no room for {module} on the GPUs. Use --device cpu, or bfloat16."
        )
    # A key-value cache already lies where its layer does.
    keys = getattr(model, "_skip_keys_device_placement", None)
    moved: PreTrainedModel = dispatch_model(model, device_map=device_map, skip_keys=keys, force_hooks=True)
    return moved
