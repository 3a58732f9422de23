"""Attention masks of our own for transformers models: which columns of the keys each token sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Unmaskable(Exception):
    """The model takes no mask of our own, or its values would depend on the batch; the message says why."""


class Masks:
    """Makes the masks of one model.

    Args:
        model: a transformers causal language model with `sdpa` or `eager` attention.

    Raises:
        Unmaskable: another attention implementation, a layer type other than full and sliding attention, or rotary
            scaling that depends on the length of the batch.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.implementation = str(config._attn_implementation)
        if self.implementation not in ("sdpa", "eager"):
            raise Unmaskable(f"attention '{self.implementation}' takes no mask of our own")
        self._dtype = model.dtype
        self._window, self._types = _windows(config)
        scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [scaling, *(value for value in scaling.values() if isinstance(value, dict))]
        for kind in (str(entry.get("rope_type", "default")) for entry in kinds):
            if kind in ("dynamic", "longrope"):
                raise Unmaskable(f"rotary scaling '{kind}' depends on the longest row of a batch")

    def of(self, sees: Tensor, position: Tensor, column: Tensor) -> Tensor | dict[str, Tensor]:
        """`(b, 1, n, m)` for every layer, or by layer type where there are several.

        Args:
            sees: `(b, n, m)` bool, before any window.
            position: `(b, n)` of the tokens that look. column: `(b, m)`, or 1 for b, of what they look at: a window is
                counted in positions, not in places of a row.
        """
        masks = {}
        for kind in self._types:
            seen = sees
            if kind == "sliding_attention":
                seen = sees & (position[:, :, None] - column[:, None, :] < self._window)
            masks[kind] = self._as_mask(seen[:, None])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_mask(self, sees: Tensor) -> Tensor:
        if self.implementation == "sdpa":
            return sees
        mask = torch.zeros(sees.shape, dtype=self._dtype, device=sees.device)
        return mask.masked_fill(~sees, torch.finfo(self._dtype).min)


def _windows(config: Any) -> tuple[int, tuple[str, ...]]:
    """(window in positions, the kinds of attention the layers use)."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one kind for all: Mistral's window when it has one
        kinds = ["full_attention" if window is None else "sliding_attention"]
    types = tuple(sorted(set(kinds)))
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise Unmaskable(f"layers of type '{unknown[0]}' are no plain attention")
    if "sliding_attention" in types and window is None:
        raise Unmaskable("sliding-window layers, but config.json has no sliding_window")
    return int(window or 0), types
