"""Training of the quickstart pair in plain loops: language modelling, supervised answers, preference tuning (DPO).

Every loop is a pure function of its arguments: all draws come from the `rng` that is passed in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import END, Question, World

CLIP = 1.0  # norm that the gradient of a step is cut to


@dataclass(frozen=True)
class Training:
    """Sizes and lengths, as measured to fit two minutes on two cores.

    Attributes:
        statements: sentences of one pre-training step.
        questions: question rows of one pre-training step: the format is rare in the corpus.
        batch: questions of one supervised or preference step.
        beta: DPO's strength of the pull towards the reference model.
    """

    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 4
    pretrain_steps: int = 1200
    pretrain_rate: float = 3e-3
    statements: int = 64
    questions: int = 2
    supervise_steps: int = 100
    supervise_rate: float = 3e-4
    prefer_steps: int = 100
    prefer_rate: float = 1e-4
    batch: int = 64
    beta: float = 0.1


def new_model(tokenizer: PreTrainedTokenizerFast, training: Training, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama with tied embeddings, float32; the caller's random state is left alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.hidden,
        intermediate_size=training.intermediate,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Token ids, (n, longest) int64, padded on the right."""
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows))
    return torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])


def language_loss(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, int]:
    """Sum of the next-token cross-entropies in nats, and how many tokens were predicted; padding does not count."""
    padding = model.config.pad_token_id
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:]
    loss = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=padding, reduction="sum"
    )
    return loss, int((targets != padding).sum())


def answer_loglikelihoods(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> Tensor:
    """Log-probability of each option, one token long, right after its prompt, (n, options) float32."""
    ids = encode(tokenizer, [question.prompt for question in questions])
    last = (ids != tokenizer.pad_token_id).sum(dim=1) - 1
    options = torch.cat([encode(tokenizer, [f" {c}" for c in question.choices]).T for question in questions])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(ids)), last]
    return torch.log_softmax(model.lm_head(hidden), dim=-1).gather(1, options)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean of -log sigmoid(beta * (margin of the policy - margin of the reference)).     (arXiv 2305.18290, eq. 7)

    Args:
        policy: log-likelihoods of the chosen and the rejected answer, (n, 2).
        reference: the same under the reference model, (n, 2).
        beta: strength of the pull towards the reference, above 0.

    Example:
        >>> round(dpo_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), 0.5).item(), 4)
        0.3133
    """
    margin = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -functional.logsigmoid(beta * margin).mean()


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    training: Training,
    rng: np.random.Generator,
) -> None:
    """Language modelling on fresh statements, with a few questions about the `asked` entities among them."""

    def loss() -> Tensor:
        stated = encode(tokenizer, [text + END for text in world.statements(training.statements, rng)])
        asked = world.questions(training.questions, "asked", rng)
        answered = encode(tokenizer, [f"{q.prompt} {q.choices[q.answer]}{END}" for q in asked])
        (statement_loss, n), (question_loss, m) = language_loss(model, stated), language_loss(model, answered)
        return (statement_loss + question_loss) / (n + m)

    _descend(model, loss, training.pretrain_steps, training.pretrain_rate, weight_decay=0.1)


def supervise(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    training: Training,
    rng: np.random.Generator,
) -> None:
    """Cross-entropy of the gold answers of questions about the `trained` entities; prompts carry no loss."""

    def loss() -> Tensor:
        questions = world.questions(training.batch, "trained", rng)
        gold = torch.tensor([question.answer for question in questions])
        return -answer_loglikelihoods(model, tokenizer, questions).gather(1, gold[:, None]).mean()

    _descend(model, loss, training.supervise_steps, training.supervise_rate)


def prefer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    training: Training,
    rng: np.random.Generator,
) -> None:
    """DPO on questions about the `trained` entities: the gold answer over a random other option.

    The reference is the model as it comes in.
    """
    reference = copy.deepcopy(model).eval().requires_grad_(False)

    def loss() -> Tensor:
        questions = world.questions(training.batch, "trained", rng)
        gold = np.array([question.answer for question in questions])
        options = len(questions[0].choices)
        other = (gold + rng.integers(1, options, size=len(gold))) % options
        pair = torch.from_numpy(np.stack([gold, other], axis=1))
        policy = answer_loglikelihoods(model, tokenizer, questions).gather(1, pair)
        return dpo_loss(
            policy, answer_loglikelihoods(reference, tokenizer, questions).gather(1, pair), training.beta
        )

    _descend(model, loss, training.prefer_steps, training.prefer_rate)


def _descend(
    model: LlamaForCausalLM, loss: Callable[[], Tensor], steps: int, rate: float, weight_decay: float = 0.0
) -> None:
    """AdamW with a linear warm-up over a tenth of the steps (30 at most), then a cosine down to a tenth of the rate."""
    warmup = max(1, min(30, steps // 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * decay * min(1.0, (step + 1) / warmup)
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    model.eval()
