"""The decoder layers of a model, each as a function of hidden states, with the weights of any checkpoint.

No table of architectures: the model class builds itself without memory, and is asked what it hands to each of its
layers (rotary embeddings, the causal mask, which may be a sliding window). Attention is `eager`, in eval mode: the
fused kernels cannot be differentiated twice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.layout import empty_model
from search.checkpoints.parents import Parents
from search.errors import MergeError
from search.merging.anchors.functional import Weights, call


class Block(torch.nn.Module):
    """One decoder layer: hidden states `(n, tokens, d)` -> hidden states of the same shape.

    Its parameters have no memory: call it with `torch.func.functional_call` and the weights of a checkpoint. Positions
    count from 0 and each token sees itself and those before it.

    A block normalises its input, so scaling the input scales little but the residual part of the output; only below the
    epsilon of the norm (about 1e-3 for 1e-6) does the input's size reach the layer itself.
    """

    def __init__(self, layer: torch.nn.Module, index: int, blocks: Blocks) -> None:
        super().__init__()
        self.layer = layer
        self._index = index
        self._arguments = blocks.arguments

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        arguments = self._arguments(hidden.shape[1], hidden.device)[self._index]
        result: torch.Tensor = self.layer(hidden, **arguments)
        return result


class Blocks:
    """All decoder layers of one architecture.

    Args:
        parents: their config and names are used, none of their weights.

    Raises:
        MergeError: the model has no list of decoder layers, or they hold more than parameters.
    """

    def __init__(self, parents: Parents) -> None:
        config = copy.deepcopy(parents.config)
        config.dtype = torch.float32
        self._model = empty_model(config, parents.post.folder, implementation="eager").eval()
        self._base: Any = self._model.base_model
        layers = getattr(self._base, "layers", None)
        if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
            raise MergeError(
                f"{parents.post.folder}: {type(self._model).__name__} has no list of decoder layers; "
                "anchors cannot be made for it."
            )
        path = next(name for name, module in self._model.named_modules() if module is layers)
        stored = {key: name for name, key in parents.parameter.items()}
        self._blocks = [Block(layer, index, self) for index, layer in enumerate(layers)]
        self._names = [
            {f"layer.{name}": stored[f"{path}.{index}.{name}"] for name, _ in layer.named_parameters()}
            for index, layer in enumerate(layers)
        ]
        for index, layer in enumerate(layers):
            for name, _ in layer.named_buffers():
                raise MergeError(
                    f"{parents.post.folder}: block {index} holds a buffer ({name}), not supported."
                )
        embedding = next(k for k, m in self._model.named_modules() if m is self._model.get_input_embeddings())
        self._embedding = stored[f"{embedding}.weight"]
        inside = {name for names in self._names for name in names.values()}
        self.outside = tuple(name for name in parents.names if name not in inside)
        self.width = int(config.hidden_size)
        self._given: dict[tuple[int, torch.device], list[dict[str, Any]]] = {}
        self._base.layers = torch.nn.ModuleList(_Recorder() for _ in layers)
        for module in self._base.children():
            if module is not self._model.get_input_embeddings():
                self._materialise(module)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return self._blocks[index]

    def names(self, index: int) -> dict[str, str]:
        """Parameter of the block -> name of the stored tensor."""
        return dict(self._names[index])

    def weights(self, index: int, checkpoint: Checkpoint, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Copies of a checkpoint's tensors for this block, float32.

        Raises:
            CheckpointError: the checkpoint lacks one of them.
        """
        # Copies: the bits of a matrix product may depend on where in a mapped file its operands happen to lie.
        return {
            name: checkpoint.tensor(stored).to(device, torch.float32, copy=True)
            for name, stored in self._names[index].items()
        }

    @torch.no_grad()
    def outputs(self, index: int, weights: Weights, hidden: torch.Tensor) -> torch.Tensor:
        """What the block with these weights makes of hidden states `(n, tokens, d)`; without gradients."""
        return call(self[index], weights, hidden)

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, checkpoint: Checkpoint) -> torch.Tensor:
        """The hidden states `(n, tokens, d)` float32 that enter block 0 for token ids `(n, tokens)` int64.

        Raises:
            MergeError: the ids are not of this shape, or not in the vocabulary.
        """
        rows = checkpoint.shape(self._embedding)[0]
        if ids.ndim != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise MergeError(f"token ids: shape {tuple(ids.shape)} {ids.dtype} (wanted (n, tokens) int64).")
        if int(ids.min()) < 0 or int(ids.max()) >= rows:
            raise MergeError(
                f"token ids: from {int(ids.min())} to {int(ids.max())} (wanted 0 to {rows - 1})."
            )
        embedding = self._model.get_input_embeddings()
        self._materialise(embedding)
        embedding.weight.copy_(checkpoint.tensor(self._embedding))
        try:
            self._base(input_ids=ids, use_cache=False)
        finally:
            embedding.to("meta")
        hidden: torch.Tensor = self._base.layers[0].hidden
        return hidden.clone()

    @torch.no_grad()
    def arguments(self, tokens: int, device: torch.device) -> list[dict[str, Any]]:
        """What the model hands to each layer beside the hidden states, for sequences of this length; kept."""
        key = (tokens, device)
        if key not in self._given:
            self._base(inputs_embeds=torch.zeros(1, tokens, self.width), use_cache=False)
            self._given[key] = [_moved(recorder.arguments, device) for recorder in self._base.layers]
        return self._given[key]

    def _materialise(self, module: torch.nn.Module) -> None:
        """Gives a module memory, and its buffers (rotary frequencies, the scale of an embedding) their values."""
        module.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):  # weights are drawn too, though nobody reads them
            module.apply(self._model._init_weights)


class _Recorder(torch.nn.Module):
    """Stands where a decoder layer was, and remembers what it is given."""

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value
