"""One model that stays in memory and takes on the weights of one recipe after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from search.checkpoints.checkpoint import dtype_name
from search.checkpoints.loading import load_model
from search.checkpoints.parents import Parents
from search.checkpoints.placement import place
from search.errors import CheckpointError, MergeError
from search.merging.blend import Blend, merging

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LiveModel:
    """A transformers model whose parameters are overwritten in place; nothing is written to disk.

    Attributes:
        model: in eval mode, without gradients, on `device`; holds the weights of the last `apply`, at first
            those of `post`.
    """

    def __init__(
        self, parents: Parents, dtype: torch.dtype | str = torch.float32, device: str = "cpu"
    ) -> None:
        """Load `post` and give every parameter memory of its own.

        Args:
            parents: opened and compared.
            dtype: of the merged weights: float32, bfloat16 or float16 (as torch.dtype or by name).
            device: where the model lives: `cpu`, `cuda:0`, `spread` over all GPUs; the parents stay on disk, mapped.

        Raises:
            CheckpointError: the model does not load cleanly, or its tensors are not those of the parents.
        """
        self.parents = parents
        self.dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.model = _load(parents, self.dtype, device)
        state = self.model.state_dict()
        self._targets = {name: state[key] for name, key in parents.parameter.items()}
        for name, target in self._targets.items():
            if target.dtype != self.dtype:
                raise CheckpointError(
                    f"{parents.post.folder}: tensor {name}: {type(self.model).__name__} keeps it in "
                    f"{dtype_name(target.dtype)} (wanted {dtype_name(self.dtype)}). Use merge.dtype float32."
                )

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Stored tensor name -> the model's parameter, a shared one once; stored buffers are left out."""
        known = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: known[key] for name, key in self.parents.parameter.items() if key in known}

    @torch.no_grad()
    def apply(self, blend: Blend) -> None:
        """Overwrite every parameter with a merge of the parents.

        Raises:
            MergeError: the blend does not fit, or a value does not fit into the dtype; the model then holds
                a mixture until the next successful `apply`.
        """
        for name, fill in merging(self.parents, blend):
            fill(self._targets[name])


def _load(parents: Parents, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model = load_model(parents.post.folder, parents.config, dtype, error=CheckpointError)
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers hands out views of the mapped file; writing to those would copy page by page.
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            parameter.requires_grad_(False)
        for buffer in model.buffers():
            buffer.data = buffer.data.clone()
    _check_ties(model, parents)
    return place(model, device)


def _check_ties(model: PreTrainedModel, parents: Parents) -> None:
    state = model.state_dict()
    for alias, target in parents.tied.items():
        key = parents.parameter[target]
        shared = [name for name, tensor in state.items() if tensor.data_ptr() == state[key].data_ptr()]
        if len(shared) < 2:
            raise MergeError(f"{alias}: tied to {target} by config.json but separate in the loaded model.")
