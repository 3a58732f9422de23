"""Preference tuning: listwise DPO over the options of a question, on LoRA adapters.

A question is one sequence: its context once, then all options side by side. The attention mask lets an
option see the context and itself, never another option, so that the log-likelihoods are those of one sequence
per option at a third of the tokens.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from questions import CONTEXT, Question
from torch import Tensor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How `post` is made from `pre`. Any change here makes a new pair."""

    rank: int = 16
    scale: int = 32  # LoRA's alpha: the adapter is multiplied by scale / rank
    beta: float = 0.1
    learning_rate: float = 5e-4
    warmup: float = 0.1  # share of the steps
    questions: int = 1520  # drawn from the training ranges; one epoch
    batch: int = 8
    clip: float = 1.0
    seed: int = 0

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Packed:
    """A batch of questions, one row each, padded to `length`; `n` counts the options of the whole batch."""

    tokens: Tensor  # (rows, length) int64
    positions: Tensor  # (rows, length) int64
    mask: Tensor  # (rows, 1, length, length) bool, true where a token may look
    row: Tensor  # (m,) int64: the row of each scored token
    source: Tensor  # (m,) int64: where its prediction is read
    target: Tensor  # (m,) int64: its id
    option: Tensor  # (m,) int64 in 0..n-1: the option it belongs to
    sizes: tuple[int, ...]  # options of each question


Encoded = tuple[list[int], list[list[int]]]  # context ids, ids of every option


def encode(tokenizer: Any, question: Question) -> Encoded:
    """Token ids of the context and of every option, which starts with its space."""
    context = tokenizer.encode(CONTEXT.format(question=question.question), add_special_tokens=False)
    return context, [tokenizer.encode(f" {choice}", add_special_tokens=False) for choice in question.choices]


def pack(batch: Sequence[Encoded]) -> Packed:
    """Lays a batch of encoded questions out in rows."""
    length = max(len(context) + sum(map(len, options)) for context, options in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    # Everything sees itself, padding too: no row of the softmax is empty.
    mask = torch.eye(length, dtype=torch.bool).repeat(len(batch), 1, 1)
    row, source, target, option, n = [], [], [], [], 0
    for r, (context, options) in enumerate(batch):
        start = len(context)
        tokens[r, :start] = torch.tensor(context)
        positions[r, :start] = torch.arange(start)
        mask[r, :start, :start] = torch.ones(start, start).tril().bool()
        for ids in options:
            end = start + len(ids)
            tokens[r, start:end] = torch.tensor(ids)
            positions[r, start:end] = torch.arange(len(context), len(context) + len(ids))
            mask[r, start:end, : len(context)] = True
            mask[r, start:end, start:end] = torch.ones(len(ids), len(ids)).tril().bool()
            row += [r] * len(ids)
            source += [len(context) - 1, *range(start, end - 1)]
            target += ids
            option += [n] * len(ids)
            start, n = end, n + 1
    return Packed(
        tokens,
        positions,
        mask[:, None],
        row=torch.tensor(row),
        source=torch.tensor(source),
        target=torch.tensor(target),
        option=torch.tensor(option),
        sizes=tuple(len(options) for _, options in batch),
    )


def loglikelihoods(model: Any, packed: Packed) -> Tensor:
    """Log-likelihood of each option, summed over its tokens: `(n,)` float32, question after question."""
    hidden = model.model(
        input_ids=packed.tokens, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[packed.row, packed.source]).float()  # (m, vocabulary)
    token = logits.log_softmax(-1).gather(1, packed.target[:, None])[:, 0]  # (m,)
    return torch.zeros(sum(packed.sizes), dtype=token.dtype).index_add(0, packed.option, token)


def listwise_dpo(
    policy: Tensor,
    reference: Tensor,
    sizes: Sequence[int],
    gold: Sequence[int],
    beta: float,
) -> Tensor:
    """Mean over questions of -log softmax(beta * (policy - reference))[gold]: DPO with one winner among many.

    Args:
        policy: `(n,)` log-likelihoods of all options, question after question; carries the gradient.
        reference: the same from the reference model.
        sizes: the number of options of each question; sums to n.
        gold: the right option of each question.
        beta: how much a log-likelihood may move before the loss is satisfied.
    """
    margin = beta * (policy - reference)
    losses = [-part.log_softmax(0)[g] for part, g in zip(torch.split(margin, list(sizes)), gold, strict=True)]
    return torch.stack(losses).mean()


def draw(questions: Sequence[Question], recipe: Recipe) -> list[Question]:
    """The questions that train, in the order they do: all shuffled by the seed, then the first ones."""
    order = list(questions)
    random.Random(recipe.seed).shuffle(order)
    return order[: recipe.questions]


def tune(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    recipe: Recipe,
    steps: int | None = None,
) -> Any:
    """The preference-tuned model, its adapters merged into full weights. Changes `model` in place.

    One epoch in the given order (`steps` ends it earlier, for a trial run). The reference is the model
    without its adapters. Progress goes to stderr. Other machines may round differently.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    batches = [questions[i : i + recipe.batch] for i in range(0, len(questions), recipe.batch)]
    lora = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.scale,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)  # wraps the layers of `model` itself
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    warmup = max(1, round(recipe.warmup * len(batches)))
    model.train()
    began = time.monotonic()
    for step, batch in enumerate(batches[:steps]):
        packed = pack([encode(tokenizer, question) for question in batch])
        with torch.no_grad(), adapted.disable_adapter():
            reference = loglikelihoods(model, packed)
        policy = loglikelihoods(model, packed)
        loss = listwise_dpo(policy, reference, packed.sizes, [q.answer for q in batch], recipe.beta)
        rate = min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, rate)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        left = (time.monotonic() - began) / (step + 1) * (len(batches) - step - 1)
        line = f"post: step {step + 1}/{len(batches)}  loss {loss.item():.4f}  {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
    return adapted.merge_and_unload().eval()
