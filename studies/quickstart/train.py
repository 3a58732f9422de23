"""Training of the quickstart pair in plain loops: language modelling, supervised answers, preference tuning (DPO).

Every loop is a pure function of its arguments: all draws come from the `rng` that is passed in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
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
    """Sizes, lengths and learning rates.

    Attributes:
        pretrain_rate: AdamW's learning rate of embeddings and norms.
        matrix_rate: Muon's learning rate of all other matrices.
        statements: sentences of one pre-training step.
        questions: question rows of one pre-training step: the format is rare in the corpus.
        batch: questions of one supervised or preference step.
        beta: DPO's strength of the pull towards the reference model.
    """

    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 4
    pretrain_steps: int = 600
    pretrain_rate: float = 3e-3
    matrix_rate: float = 0.02
    statements: int = 64
    questions: int = 2
    supervise_steps: int = 60
    supervise_rate: float = 3e-4
    prefer_steps: int = 120
    prefer_rate: float = 2e-4
    batch: int = 48
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

    matrices = [t for name, t in model.named_parameters() if t.ndim == 2 and "embed" not in name]
    others = [t for name, t in model.named_parameters() if t.ndim != 2 or "embed" in name]
    optimizers = (
        Muon(matrices, training.matrix_rate),
        _adamw(others, training.pretrain_rate, weight_decay=0.1),
    )
    _descend(model, loss, training.pretrain_steps, optimizers)


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

    _descend(model, loss, training.supervise_steps, [_adamw(model.parameters(), training.supervise_rate)])


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

    _descend(model, loss, training.prefer_steps, [_adamw(model.parameters(), training.prefer_rate)])


class Muon(torch.optim.Optimizer):
    """Momentum whose update of every matrix is made orthogonal: learns these facts in fewer steps than AdamW.

    Steps as in Jordan et al. 2024 (kellerjordan.github.io/posts/muon), in float32. Matrices only.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every matrix that has a gradient; takes no closure."""
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = matrix.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                updates.setdefault(matrix.shape, []).append((matrix, update))
            for shape, pairs in updates.items():  # all matrices of one shape at once: few large products
                rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (matrix, _), update in zip(
                    pairs, orthogonal(torch.stack([u for _, u in pairs])), strict=True
                ):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, (n, rows, columns) float32: singular values end between 0.6 and 1.3."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x: Tensor = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # Newton-Schulz; the quintic's coefficients grow small singular values fastest
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)


def _adamw(tensors: Iterable[Tensor], rate: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tensors, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)


def _descend(
    model: LlamaForCausalLM,
    loss: Callable[[], Tensor],
    steps: int,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Linear warm-up over a tenth of the steps (30 at most), then a cosine down to a tenth of each learning rate."""
    warmup = max(1, min(30, steps // 10))
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        for group, rate in groups:
            group["lr"] = rate * decay * min(1.0, (step + 1) / warmup)
        model.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
