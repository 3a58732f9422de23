"""The option scores of a model after every decoder layer, from one forward pass.

While a token tree passes through the model (`objectives/scoring/packed.py`), a hook on each decoder layer takes its
output at
the positions that predict an option's token, passes it through the final norm and the head at once, and keeps the
log-probability of that token: one number for each layer, option and token. No hidden state outlives its layer.

An option's score after a layer is formed as its final score is: the sum of the log-probabilities of its tokens, over
the same divisor. In the letter format that is the letter's log-probability at the last prompt token. There, as in any
question whose options are one token each in one place, what normalises over the vocabulary is the same for all
options, so the head is applied to their tokens only. Longer options need the whole head after each layer: with many
layers and a large vocabulary that costs more than the forward pass itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from objectives.calibrators.logits import LayerwiseLogits, OptionLogits, vocabulary_digest
from objectives.calibrators.tempering import tempered
from objectives.errors import ConfigError, EvaluationError
from objectives.evaluation import Progress, divisors, questions_digest
from objectives.outcomes import Booleans, Floats, Integers
from objectives.scoring.encoding import EncodedQuestion
from objectives.scoring.packed import HEAD_VALUES, PackedModel
from objectives.scoring.scorer import Scorer
from objectives.scoring.tree_attention import Batch, Group, pack

if TYPE_CHECKING:
    from objectives.questions.config import TaskConfig
    from objectives.questions.questions import Question


T = TypeVar("T")


class LayerwiseScorer(Scorer):
    """A `Scorer` that also reads every layer, in the same batches; its scores are kept as they are."""

    @torch.inference_mode()
    def layerwise(
        self, questions: Sequence[Question], tasks: Sequence[TaskConfig], progress: Progress | None = None
    ) -> LayerwiseLogits:
        """Scores every option of every question after every decoder layer.

        `final` equals what `Evaluator.evaluate` finds for the same questions: it need not be called as well.

        Args:
            tasks: the study's tasks; `normalize` is read from them.
            progress: called with (questions done, questions).

        Raises:
            ConfigError: as `encode_questions`, or a model whose layers, final norm or head cannot be found.
            EvaluationError: a score is not finite, or the layers do not lead to the model's own scores.
        """
        _, encoded, groups = self._plan(questions)
        self._check()
        tap = _Tap(self.model)
        options = np.array([len(question.options) for question in questions], dtype=np.int64)
        tokens = np.zeros((len(encoded), max((len(q.starts) for q in encoded), default=1)), dtype=np.int64)
        for i, one in enumerate(encoded):
            tokens[i, : len(one.starts)] = [
                len(s) - at for s, at in zip(one.sequences, one.starts, strict=True)
            ]
        divisor = divisors(questions, tokens, tasks).astype(np.float64)
        n, k = divisor.shape
        cancels = np.array([_cancels(q, d) for q, d in zip(encoded, divisor, strict=True)], dtype=np.bool_)

        total = np.zeros((n, k))
        layers = np.zeros((n, k, tap.depth))
        done = 0
        for reads in self._reads(tap, encoded, groups, cancels):
            np.add.at(total, (reads.question, reads.option), reads.final)
            np.add.at(layers, (reads.question, reads.option), reads.layers)
            done += len(np.unique(reads.question))
            if progress is not None:
                progress(done, n)

        padding = np.arange(k) >= options[:, None]
        # Rounded to float32 first, as an Evaluation is, so that both give the same numbers.
        final = np.where(padding, -np.inf, total.astype(np.float32).astype(np.float64) / divisor)
        each = np.where(padding[:, :, None], -np.inf, layers / divisor[:, :, None])
        logits = OptionLogits(
            final,
            options,
            np.array([question.task for question in questions], dtype=np.int64),
            np.array([question.gold for question in questions], dtype=np.int64),
            questions_digest(questions, tasks),
            vocabulary_digest(self.tokenizer),
        )
        self._require_own_scores(final, each[:, :, -1])
        return LayerwiseLogits(logits, np.moveaxis(each, 2, 1)[:, :-1])

    def _reads(
        self, tap: _Tap, encoded: list[EncodedQuestion], groups: list[Group], cancels: Booleans
    ) -> Iterator[_Reads]:
        """All reads, each once: by batches of token trees, or question by question where the model takes no trees."""
        if self._packed is None:
            for i, question in enumerate(encoded):
                yield _read_plain(tap, self.model, i, question, bool(cancels[i]))
            return
        for group in groups:
            cache = self._packed.prefix(group.prefix)
            for batch in pack(group, self.batch_tokens):
                yield from _read_batch(tap, self._packed, batch, cache, cancels)

    def _require_own_scores(self, final: Floats, last: Floats) -> None:
        """The norm and the head are found by the model's structure: this proves that they were the right ones."""
        gap = np.abs(_log_share(final) - _log_share(last))
        allowed = 1e-3 if self.model.dtype == torch.float32 else 0.5
        if not (gap <= allowed).all():
            raise EvaluationError(
                f"{type(self.model).__name__}: its last layer, final norm and head do not lead to its own scores "
                f"(they differ by {gap.max():.3g}). Dual-Align cannot read this model; use daca."
            )


class _Reads(NamedTuple):
    """r option tokens: `(r,)` question, option and final log-probability, `(r, L)` that after each layer."""

    question: Integers
    option: Integers
    final: Floats
    layers: Floats


class _Tap:
    """Turns the output of each decoder layer, during a forward pass, into log-probabilities of chosen tokens."""

    def __init__(self, model: Any) -> None:
        self._layers, self._norm = _decoder(model)
        self._head = model.get_output_embeddings()
        if not isinstance(self._head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__}: has no linear output head, so its layers cannot be read."
            )
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def depth(self) -> int:
        return len(self._layers)

    def during(
        self, forward: Callable[[], T], nodes: Integers, at: Integers, wanted: Integers, cancels: bool
    ) -> tuple[T, Floats]:
        """Runs `forward`, once.

        Args:
            nodes: `(u,)` places in the flattened `(b x n)` tokens.
            at, wanted: `(r,)` index into `nodes`, and the token to predict there.
            cancels: leave out the normalisation over the vocabulary.

        Returns:
            What `forward` returns, and the `(r, L)` float64 log-probabilities.
        """
        device = self._head.weight.device
        place, token = torch.from_numpy(at).to(device), torch.from_numpy(wanted).to(device)
        values: list[Tensor] = []

        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            chosen = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(nodes).to(hidden.device)]
            normed = self._norm(chosen.to(next(self._norm.parameters(), chosen).device)).to(device)
            values.append(self._some(normed[place], token) if cancels else self._all(normed, place, token))

        hooks = [layer.register_forward_hook(read) for layer in self._layers]
        try:
            result = forward()
        finally:
            for hook in hooks:
                hook.remove()
        return result, torch.stack(values, dim=1).double().cpu().numpy()

    def _some(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """`(r,)` logits of one token for each of the `(r, d)` states."""
        logits = torch.einsum("rd,rd->r", hidden, self._head.weight[wanted])
        return self._capped(logits if self._head.bias is None else logits + self._head.bias[wanted])

    def _all(self, hidden: Tensor, place: Tensor, wanted: Tensor) -> Tensor:
        """`(r,)` log-probabilities of tokens after the states at `place` of `(u, d)`."""
        values = hidden.new_empty(len(wanted), dtype=torch.float32)
        step = max(1, HEAD_VALUES // self._head.weight.shape[0])
        for first in range(0, len(hidden), step):
            logits = self._capped(self._head(hidden[first : first + step]))
            mine = torch.nonzero((place >= first) & (place < first + step))[:, 0]
            row = place[mine] - first
            values[mine] = logits[row, wanted[mine]] - torch.logsumexp(logits, dim=-1)[row]
        return values

    def _capped(self, logits: Tensor) -> Tensor:
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()


def _decoder(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layers, and the norm that follows them."""
    depth = int(model.config.get_text_config().num_hidden_layers)
    for module in model.base_model.modules():
        children = list(module.children())
        for i, child in enumerate(children):
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                for norm in children[i + 1 :]:
                    if "norm" in type(norm).__name__.lower():
                        return child, norm
    raise ConfigError(
        f"{type(model).__name__}: no list of {depth} decoder layers followed by a norm, so its layers cannot be read."
    )


def _read_batch(tap: _Tap, packed: PackedModel, batch: Batch, cache: Any, cancels: Booleans) -> list[_Reads]:
    """Reads a batch of token trees; where an accelerator's memory does not hold it, its halves, and so on."""
    at, wanted, question, option = (np.ascontiguousarray(column) for column in batch.reads.T)
    try:
        final, layers = tap.during(
            lambda: packed.read(batch, cache), batch.nodes, at, wanted, bool(cancels[question].all())
        )
        return [_Reads(question, option, final, layers)]
    except torch.OutOfMemoryError:
        if len(batch.rows) == 1:
            raise
    torch.cuda.empty_cache()
    return [part for half in batch.halves() for part in _read_batch(tap, packed, half, cache, cancels)]


def _read_plain(tap: _Tap, model: Any, number: int, encoded: EncodedQuestion, cancels: bool) -> _Reads:
    """Reads one question by one plain forward pass for each of its options."""
    parts = []
    device = model.get_input_embeddings().weight.device
    for option, (sequence, start) in enumerate(zip(encoded.sequences, encoded.starts, strict=True)):
        ids = torch.tensor([sequence[:-1]], device=device)
        wanted = np.array(sequence[start:], dtype=np.int64)
        nodes = np.arange(start - 1, len(sequence) - 1)
        output, layers = tap.during(
            partial(model, input_ids=ids, use_cache=False), nodes, nodes - nodes[0], wanted, cancels
        )
        logits = output.logits[0, start - 1 :].double().cpu()
        final = torch.log_softmax(logits, dim=-1).gather(1, torch.from_numpy(wanted)[:, None])[:, 0].numpy()
        parts.append((np.full(len(wanted), option), final, layers))
    options, finals, all_layers = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Reads(np.full(len(options), number), options, finals, all_layers)


def _cancels(encoded: EncodedQuestion, divisor: Floats) -> bool:
    """Whether all options are one token after one and the same context, and are divided alike."""
    contexts = {sequence[:-1] for sequence in encoded.sequences}
    single = all(len(s) - at == 1 for s, at in zip(encoded.sequences, encoded.starts, strict=True))
    return single and len(contexts) == 1 and len(set(divisor[: len(encoded.starts)])) == 1


def _log_share(score: Floats) -> Floats:
    """Log-probabilities of the options, 0 in the padding."""
    return np.where(np.isfinite(score), tempered(score, 1.0)[1], 0.0)
