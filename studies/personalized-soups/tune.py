"""Training of the base, of one expert a taste, and of the joint model: supervised answers, then DPO on sampled ones.

Every loop is a pure function of its arguments: all draws come from the `rng` or the seed that is passed in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import styles
import torch
from torch import Tensor
from torch.nn import functional
from train import Muon, _adamw, _descend, dpo_loss
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from world import World

from objectives.generation.sampler import AnswerSampler, Decoding
from objectives.metrics.preferences import Preference

TRAINED = ("asked", "trained")  # roles of the people that training is about; the study asks about the others
PADDING = -100  # what cross-entropy leaves out

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Tuning:
    """Lengths and learning rates.

    Attributes:
        supervise_rate: AdamW's, of embeddings and norms. matrix_rate: Muon's, of all other matrices.
        samples: answers drawn to a prompt, of which the most and the least preferred make a pair.
        pairs: of one step. prefer_steps: of an expert. joint_steps: of the joint model.
        beta: DPO's strength of the pull towards the base.
    """

    supervise_steps: int = 220
    supervise_rate: float = 3e-3
    matrix_rate: float = 0.02
    batch: int = 40
    samples: int = 8
    prefer_steps: int = 40
    joint_steps: int = 160
    prefer_rate: float = 1e-4
    pairs: int = 24
    beta: float = 0.1
    new_tokens: int = 40


@dataclass(frozen=True)
class Pairs:
    """n prompts with a chosen and a rejected answer: token ids."""

    prompts: tuple[Ids, ...]
    chosen: tuple[Ids, ...]
    rejected: tuple[Ids, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.prompts + other.prompts, self.chosen + other.chosen, self.rejected + other.rejected)

    def at(self, index: Sequence[int]) -> tuple[list[Ids], list[Ids]]:
        """Prompts twice, and the chosen answers before the rejected ones."""
        answers = [self.chosen[i] for i in index] + [self.rejected[i] for i in index]
        return [self.prompts[i] for i in index] * 2, answers


def extend(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Gives the model a row for every new word; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer))


def loglikelihoods(model: LlamaForCausalLM, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """Log-probability of each answer after its prompt, summed over its tokens, (n,) float32."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    pad = model.config.pad_token_id
    ids = torch.tensor([row + (pad,) * (longest - len(row)) for row in rows])
    targets = torch.full_like(ids, PADDING)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        targets[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(
        logits.transpose(1, 2), targets[:, 1:], ignore_index=PADDING, reduction="none"
    )
    return -loss.sum(dim=1)


def supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    manners: styles.Manners,
    tuning: Tuning,
    rng: np.random.Generator,
) -> None:
    """Cross-entropy of styled answers; prompts carry no loss."""
    end = (tokenizer.eos_token_id,)

    def loss() -> Tensor:
        drawn = styles.styled_answers(world, tuning.batch, TRAINED, manners, rng)
        prompts = [tuple(tokenizer(prompt)["input_ids"]) for prompt, _ in drawn]
        answers = [tuple(tokenizer(answer)["input_ids"]) + end for _, answer in drawn]
        return -loglikelihoods(model, prompts, answers).sum() / sum(map(len, answers))

    matrices = [t for name, t in model.named_parameters() if t.ndim == 2 and "embed" not in name]
    others = [t for name, t in model.named_parameters() if t.ndim != 2 or "embed" in name]
    optimizers = (Muon(matrices, tuning.matrix_rate), _adamw(others, tuning.supervise_rate))
    _descend(model, loss, tuning.supervise_steps, optimizers)


class Answers:
    """Answers that a model drew to some prompts, with their scores by every preference.

    Attributes:
        scores: preference -> (n, samples) float64.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        prompts: Sequence[str],
        preferences: Mapping[str, Preference],
        tuning: Tuning,
        seed: int,
    ) -> None:
        decoding = Decoding(tuning.samples, max_new_tokens=tuning.new_tokens, seed=seed)
        sampler = AnswerSampler(model, tokenizer, prompts, decoding, batch_rows=256)
        self._prompts = sampler.prompts
        self._drawn = sampler.generate()
        self._end = tokenizer.eos_token_id
        texts = self._drawn.texts(tokenizer)
        self.scores = {name: one(prompts, texts) for name, one in preferences.items()}

    def pairs(self, reward: np.ndarray) -> Pairs:
        """The most and the least rewarded answer to each prompt, where they differ; `reward` is (n, samples)."""
        best, worst = reward.argmax(axis=1), reward.argmin(axis=1)
        kept = np.flatnonzero(reward.max(axis=1) > reward.min(axis=1))
        return Pairs(
            tuple(self._prompts[i] for i in kept),
            tuple(self._ids(i, best[i]) for i in kept),
            tuple(self._ids(i, worst[i]) for i in kept),
        )

    def _ids(self, prompt: int, sample: int) -> Ids:
        tokens = self._drawn.tokens[prompt, sample]
        end = (self._end,) if self._drawn.finished[prompt, sample] else ()
        return (*tokens[tokens >= 0].tolist(), *end)


def prefer(
    base: LlamaForCausalLM, pairs: Pairs, steps: int, tuning: Tuning, rng: np.random.Generator
) -> LlamaForCausalLM:
    """A copy of the base after DPO on the pairs; the base itself is the reference."""
    model = copy.deepcopy(base)
    with torch.inference_mode():
        order = range(len(pairs))
        parts = [order[i : i + 64] for i in range(0, len(pairs), 64)]
        known = [loglikelihoods(base, *pairs.at(part)).reshape(2, -1).T for part in parts]
    reference = torch.cat(known).clone()

    def loss() -> Tensor:
        index = rng.choice(len(pairs), size=min(tuning.pairs, len(pairs)), replace=False)
        policy = loglikelihoods(model, *pairs.at(index.tolist())).reshape(2, -1).T
        return dpo_loss(policy, reference[torch.from_numpy(index)], tuning.beta)

    _descend(model, loss, steps, [_adamw(model.parameters(), tuning.prefer_rate)])
    return model
