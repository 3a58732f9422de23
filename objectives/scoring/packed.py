"""A transformers causal language model fed with token trees: masks, the shared cache, and the output head."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from objectives.scoring.masks import Masks, Unmaskable
from objectives.scoring.tree_attention import Batch

HEAD_VALUES = 2**25  # logits computed at once: 128 MiB in float32


class PackedModel:
    """Runs batches of token trees after an optional shared prefix.

    Args:
        model: a transformers causal language model with `sdpa` or `eager` attention.

    Raises:
        Unmaskable: see `Masks`, or a missing part.
    """

    def __init__(self, model: Any) -> None:
        self.masks = Masks(model)
        base, head = model.base_model, model.get_output_embeddings()
        if base is model or head is None:
            raise Unmaskable(f"{type(model).__name__} has no separate output head")
        self._base, self._head = base, head
        self._device = model.get_input_embeddings().weight.device
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @torch.inference_mode()
    def prefix(self, tokens: tuple[int, ...]) -> Any:
        """The key-value cache of `tokens`, shared by later batches; None for no tokens."""
        return _shared(self._keys_and_values(tokens)) if tokens else None

    @torch.inference_mode()
    def read(self, batch: Batch, cache: Any) -> npt.NDArray[np.float64]:
        """`(r,)` float64: log-probability (natural) of the token of each of the batch's reads."""
        picked: npt.NDArray[np.float64] = self._log_probability(batch, cache).double().cpu().numpy()
        return picked

    def prefix_in_graph(self, tokens: tuple[int, ...]) -> GraphPrefix | None:
        """`prefix` for a backward pass; None for no tokens."""
        return GraphPrefix(self._keys_and_values(tokens)) if tokens else None

    def read_in_graph(self, batch: Batch, prefix: GraphPrefix | None) -> Tensor:
        """`read` for a backward pass: a float32 tensor `(r,)` on the output head's device, with its graph."""
        return self._log_probability(batch, None if prefix is None else prefix.cache)

    def _keys_and_values(self, tokens: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Of each layer, `(1, heads, n, width)` each."""
        from transformers.cache_utils import DynamicCache

        n = len(tokens)
        cache = DynamicCache()  # without a config it keeps every position; windows are the masks' business
        position = torch.arange(n, device=self._device)[None]
        end = torch.full((1, n), n, device=self._device)
        self._base(
            input_ids=torch.tensor([tokens], device=self._device),
            attention_mask=self._masks(position, end, 0),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _log_probability(self, batch: Batch, cache: Any) -> Tensor:
        tokens, position, end = (
            torch.from_numpy(values).to(self._device) for values in (batch.tokens, batch.position, batch.end)
        )
        hidden = self._base(
            input_ids=tokens,
            attention_mask=self._masks(position, end, cache.get_seq_length() if cache is not None else 0),
            position_ids=position,
            past_key_values=cache,
            use_cache=cache is not None,
        )[0]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        nodes = torch.from_numpy(batch.nodes).to(hidden.device)
        step = max(1, HEAD_VALUES // self._head.weight.shape[0])
        parts, order = [], []
        for first in range(0, len(nodes), step):
            # Reads are grouped by option, nodes sorted: the reads of these nodes are found by value.
            mine = np.nonzero((batch.reads[:, 0] >= first) & (batch.reads[:, 0] < first + step))[0]
            at = torch.from_numpy(batch.reads[mine, 0] - first)
            wanted = torch.from_numpy(batch.reads[mine, 1])
            read = (hidden[nodes[first : first + step]], at, wanted)
            # A graph would keep the logits of every part until its end.
            again = torch.is_grad_enabled() and len(nodes) > step
            parts.append(
                checkpoint(self._head_reads, *read, use_reentrant=False) if again else self._head_reads(*read)
            )
            order.append(mine)
        place = torch.from_numpy(np.argsort(np.concatenate(order)))
        return torch.cat(parts)[place.to(parts[0].device)]

    def _head_reads(self, hidden: Tensor, at: Tensor, wanted: Tensor) -> Tensor:
        """`(r,)`: log-probability of `wanted` tokens after the rows `at` of `hidden` `(u, width)`."""
        logits = self._logits(hidden)
        at, wanted = at.to(logits.device), wanted.to(logits.device)
        return logits[at, wanted] - torch.logsumexp(logits, dim=-1)[at]

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden.to(self._head.weight.device))
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()

    def _masks(self, position: Tensor, end: Tensor, past: int) -> Tensor | dict[str, Tensor]:
        """`(b, 1, n, past + n)` per layer type: what each token sees of the prefix and of its row.

        Its position is its depth in the tree.
        """
        n = position.shape[1]
        place = torch.arange(n, device=position.device)
        # [row, i, j]: j is i or an ancestor of i
        sees = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < end[:, None, :])
        before = sees.new_ones((position.shape[0], n, past))
        depth = torch.arange(past, device=position.device).expand(position.shape[0], past)
        column = torch.cat([depth, position], dim=-1)
        return self.masks.of(torch.cat([before, sees], dim=-1), position, column)


class GraphPrefix:
    """A shared prefix that takes part in a backward pass, cut off from the batches that read it.

    The graphs of the batches end at leaves with the prefix's keys and values, which sum up the gradients of all
    batches; `backward` hands the sums down the prefix's own graph, once. So its tokens cost one forward and one
    backward pass however many batches there are. And a graph of both would hold the gradient of every parameter from
    the batch's part to the prefix's part: the memory of a whole model.

    Attributes:
        cache: for `read_in_graph`.
    """

    def __init__(self, keys_and_values: list[tuple[Tensor, Tensor]]) -> None:
        self._computed = [tensor for pair in keys_and_values for tensor in pair]
        self._leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self._computed]
        self.cache = _shared(list(zip(self._leaves[::2], self._leaves[1::2], strict=True)))

    def backward(self) -> None:
        """Ends the pass, after the last batch; the prefix cannot be used again."""
        reached = [
            (one, leaf.grad)
            for one, leaf in zip(self._computed, self._leaves, strict=True)
            if leaf.grad is not None
        ]
        if reached:
            torch.autograd.backward([one for one, _ in reached], [gradient for _, gradient in reached])


def _shared(keys_and_values: list[tuple[Tensor, Tensor]]) -> Any:
    """A read-only cache of one row, for batches of any size."""
    from transformers.cache_utils import Cache, DynamicLayer

    class SharedLayer(DynamicLayer):  # type: ignore[misc]
        """Gives a layer the prefix and its own keys, and keeps nothing, so the next batch finds it unchanged."""

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            b = keys.shape[0]
            return (
                torch.cat([self.keys.expand(b, -1, -1, -1), keys], dim=-2),
                torch.cat([self.values.expand(b, -1, -1, -1), values], dim=-2),
            )

    layers = []
    for keys, values in keys_and_values:
        layer = SharedLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    return Cache(layers=layers)
