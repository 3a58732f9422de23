"""The real mergekit on tensors and on whole models, to compare bits with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.options import MergeOptions
from safetensors.torch import load_file


def by_mergekit(
    method: str,
    base: torch.Tensor | None,
    experts: Sequence[torch.Tensor],
    seed: int | None = None,
    **parameters: Any,
) -> torch.Tensor:
    """One tensor by mergekit's method object in float32; parameters per expert are lists, `lambda` is `scaling`."""
    if "scaling" in parameters:
        parameters["lambda"] = parameters.pop("scaling")
    inputs = [*([] if base is None else [base]), *experts]
    group = TensorGroup.from_tensors(inputs, base_index=None if base is None else 0)
    if seed is not None:
        torch.manual_seed(seed)
    (result,) = registry.get(method)((group,), parameters=parameters, dtype=torch.float32)
    assert isinstance(result, torch.Tensor)
    return result


def registry_names() -> list[str]:
    """All merge methods that mergekit knows."""
    return sorted(method.spec.name for method in registry.registered_methods())


def model_by_mergekit(
    out: Path,
    method: str,
    folders: Sequence[Path],
    settings: Sequence[dict[str, Any]],
    seed: int | None = None,
    *,
    options: dict[str, Any] | None = None,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """A whole merge in float32: base first in `folders`; `settings` are the parameters of each expert."""
    models = [
        {"model": str(folder), "parameters": one} for folder, one in zip(folders[1:], settings, strict=True)
    ]
    config = {
        "merge_method": method, "base_model": str(folders[0]), "models": models,
        "parameters": parameters, "dtype": "float32", "out_dtype": "float32",
    }  # fmt: skip
    chosen = {"quiet": True, "copy_tokenizer": False, "write_model_card": False, **(options or {})}
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(**chosen, random_seed=seed))
    return stored(out)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved checkpoint."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of float32 tensors to the last bit, signs of zeros included."""
    assert a.dtype == b.dtype == torch.float32
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.int32), b.contiguous().view(torch.int32)
    )
