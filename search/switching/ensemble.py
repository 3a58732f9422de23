"""Several causal language models that write as one: their next-token distributions are combined at every token.

The logit level of the baselines: every member reads every token, so an answer costs as many forward passes a token as
there are members. Temperature and nucleus apply to the combined distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from objectives.generation.sampler import new_cache
from objectives.scoring.encoding import max_length
from search.errors import ConfigError

# Float32 logits `(..., v)` of each member, on one device -> those of all together; constants of a row do not matter.
Combine = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Combined:
    """What a forward pass gives: `(rows, kept positions, v)` float32 logits, up to a constant of each position."""

    logits: Tensor


class Caches:
    """The caches of all members, cut and copied together."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copies every row so often."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows only."""
        for part in self.parts:
            part.batch_select_indices(indices)


class Ensemble:
    """Models of one vocabulary that behave as one model for `AnswerSampler`.

    Where the logits of one member are not usable (NaN, +inf, or -inf for every token), those of the ensemble are NaN.

    Args:
        members: transformers causal language models, or ensembles; at least one. Put into eval mode.
        combine: their logits -> logits.

    Attributes:
        members: as given. config: of the member with the smallest context, which is the ensemble's.

    Raises:
        ConfigError: no members, or vocabularies of different sizes.
    """

    def __init__(self, members: Sequence[Any], combine: Combine) -> None:
        if not members:
            raise ConfigError("ensemble: there are no members. Give at least one model.")
        sizes = [_vocabulary(one) for one in members]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"ensemble: vocabularies of {sizes} tokens (wanted one size). Take checkpoints of one model."
            )
        self.members = tuple(members)
        self.config = min((one.config for one in members), key=lambda config: max_length(config, None))
        self._combine = combine
        self._is_stateful = any(getattr(one, "_is_stateful", False) for one in members)
        self.eval()

    def eval(self) -> Ensemble:
        """Puts every member into eval mode."""
        for one in self.members:
            one.eval()
        return self

    def get_input_embeddings(self) -> Any:
        """Those of the first member: inputs are expected on its device, and logits come on it."""
        return self.members[0].get_input_embeddings()

    def new_cache(self) -> Caches:
        """An empty cache for each member."""
        return Caches([new_cache(one) for one in self.members])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Caches | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> Combined:
        """One step of every member, each on its own device; arguments as of a transformers model."""
        caches = (None,) * len(self.members) if past_key_values is None else past_key_values.parts
        home = input_ids.device
        found, usable = [], torch.ones((), dtype=torch.bool, device=home)
        for one, cache in zip(self.members, caches, strict=True):
            there = one.get_input_embeddings().weight.device
            given = {
                "input_ids": input_ids.to(there),
                "attention_mask": None if attention_mask is None else attention_mask.to(there),
                "position_ids": None if position_ids is None else position_ids.to(there),
            }
            out = one(**given, past_key_values=cache, use_cache=use_cache, logits_to_keep=logits_to_keep)
            logits = out.logits.to(home).float()
            usable = usable & torch.isfinite(logits.amax(dim=-1, keepdim=True))
            found.append(logits)
        return Combined(self._combine(found).masked_fill(~usable, torch.nan))

    __call__ = forward


def logit_average(models: Sequence[Any]) -> Ensemble:
    """The normalised geometric mean of the members' distributions: the mean of their log-probabilities.

    p(x) ~ prod_k p_k(x)^(1/K): a product of experts (Hinton 2002, "Training products of experts by minimizing
    contrastive divergence") with shares that add up to one, so that equal members change nothing. A token that one
    member rules out is ruled out. The mean of logits is the same thing: they differ from log-probabilities by a
    constant of each member and position, which the softmax does not see.
    """
    return Ensemble(models, average)


def contrastive(strong: Any, weak: Any, strength: float = 0.5, plausibility: float = 0.1) -> Ensemble:
    """Away from the weak model, among the tokens that the strong one finds plausible: contrastive decoding.

        score(x) = (1 + b) log p_strong(x) - b log p_weak(x)   where p_strong(x) >= plausibility * max p_strong
        score(x) = -inf                                        elsewhere

    (Li et al. 2022, arXiv 2210.15097, whose score log p_strong - log p_weak this becomes, but for its scale, for large
    b; in this form O'Brien and Lewis 2023, arXiv 2309.09117.) With strength 0 and plausibility 0 it is the strong model
    by itself. The scores are drawn from as log-probabilities are.

    Where the weak model rules a token out (-inf) its score would have no bound; it counts as its least probable one.

    Args:
        strong, weak: such as post and pre.
        strength: b, 0 or more. plausibility: from 0, which keeps all tokens, to 1, which keeps the most probable.

    Raises:
        ConfigError: a number out of its range, or as for `Ensemble`.
    """
    if not 0.0 <= strength < math.inf:
        raise ConfigError(f"contrastive: strength is {strength} (wanted 0 or more).")
    if not 0.0 <= plausibility <= 1.0:
        raise ConfigError(f"contrastive: plausibility is {plausibility} (wanted from 0 to 1).")
    return Ensemble((strong, weak), lambda logits: contrast(logits[0], logits[1], strength, plausibility))


def average(logits: Sequence[Tensor]) -> Tensor:
    """The mean of K tensors `(..., v)`; -inf in one is -inf.

    >>> average([torch.tensor([0.0, 1.0]), torch.tensor([2.0, -torch.inf])]).tolist()
    [1.0, -inf]
    """
    return torch.stack(list(logits)).mean(dim=0)


def contrast(strong: Tensor, weak: Tensor, strength: float, plausibility: float) -> Tensor:
    """The scores of `contrastive` from float32 logits `(..., v)`, up to a constant of each row.

    >>> contrast(torch.tensor([2.0, 1.0, -9.0]), torch.tensor([1.0, -1.0, 0.0]), 1.0, 0.1).tolist()
    [3.0, 3.0, -inf]
    """
    if strength == 0.0:
        score = strong
    else:
        known = torch.isfinite(weak)
        least = weak.masked_fill(~known, torch.inf).amin(dim=-1, keepdim=True)
        score = (1.0 + strength) * strong - strength * torch.where(weak == -torch.inf, least, weak)
    floor = math.log(plausibility) if plausibility > 0.0 else -math.inf
    plausible = strong >= strong.amax(dim=-1, keepdim=True) + floor
    return torch.where(plausible, score, -torch.inf)


def _vocabulary(model: Any) -> int:
    config = model.config
    return int((getattr(config, "text_config", None) or config).vocab_size)
