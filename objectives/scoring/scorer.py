"""Log-likelihoods of answer options, with every token computed once.

A question's options are one row, a tree (`tree_attention.py`); what several questions start with (few-shot
examples, a header, a passage) is computed once per evaluation and kept as a key-value cache; only the positions
that are read pass the output head. The result equals one plain forward pass per option within 1e-4 (float32);
`plain_loglikelihoods` is that computation.

What a model must be for this, and what happens if it is not: attention `sdpa` or `eager`, layers of full or
sliding-window attention, rotary or learned positions. Anything else, or a model whose packed scores differ from
its plain ones in a check on a few tokens, is scored the plain way, and `Scorer.notes` says why.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from objectives.errors import ConfigError, EvaluationError
from objectives.evaluation import Progress
from objectives.scoring.encoding import EncodedQuestion, encode_questions, max_length
from objectives.scoring.masks import Unmaskable
from objectives.scoring.packed import PackedModel
from objectives.scoring.tree_attention import Batch, Group, build_row, make_batch, pack, plan_groups

if TYPE_CHECKING:
    from objectives.questions.questions import Question


Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Tokens a batch, padding counted: those that are tried, in this order. Beyond these, memory grows and speed does not.
CPU_BATCHES = (256, 512, 1024, 2048, 4096)
GPU_BATCHES = (4096, 8192, 16384, 32768, 65536)
WORTH = 1.03  # a larger batch must be that much faster: timings are noisy, and small batches pad less
_SLOW = "scored one option at a time"


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of n questions with at most k options.

    Attributes:
        total: `(n, k)` float64, log-likelihood of each option (natural log, summed over its tokens); -inf after the
            last option.
        tokens: `(n, k)` int64, tokens of each option; 0 after the last.
        mass: `(n,)` float64, probability that the model puts on the options' texts together, 0 to 1 unless one
            option's text starts with another's. In the letter format: the mass on the letters.
        fed: tokens that went through the model, padding not counted.
    """

    total: Floats
    tokens: Integers
    mass: Floats
    fed: int


class Scorer:
    """Scores questions with the model's present values; the model may be overwritten between calls.

    Args:
        model: a transformers causal language model, on its device(s), in its dtype. Put into eval mode.
        tokenizer: the one whose tokens are scored.
        batch_tokens: tokens a batch, padding counted; None: 1024 on a CPU, 16384 elsewhere, until `measure` finds
            a better number. Another one changes the last bits of a score, and with them what a search proposes next:
            a study measures once and keeps the answer.

    Attributes:
        batch_tokens: as above.
        sized: whether `batch_tokens` was given or measured.
        notes: how this model is scored, where that is not the default; filled by the first call.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.limit = max_length(model.config, tokenizer)
        self.notes: list[str] = []
        on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
        self._candidates = CPU_BATCHES if on_cpu else GPU_BATCHES
        self.batch_tokens = batch_tokens or self._candidates[2]
        self.sized = batch_tokens is not None
        self._packed: PackedModel | None = None
        self._checked = False
        self._plans: dict[int, tuple[Sequence[Question], list[EncodedQuestion], list[Group]]] = {}

    def prepare(self, questions: Sequence[Question]) -> int:
        """Tokenises and plans `questions` (kept for later calls with the same object).

        Returns:
            Tokens one evaluation feeds, padding not counted.

        Raises:
            ConfigError: as `encode_questions`.
        """
        _, _, groups = self._plan(questions)
        return sum(group.tokens for group in groups)

    def loglikelihoods(self, questions: Sequence[Question], progress: Progress | None = None) -> Scores:
        """Scores every option of every question.

        Args:
            progress: called with (questions done, questions) after each batch.

        Raises:
            EvaluationError: a log-likelihood is not a finite number; the first such question is named.
        """
        _, encoded, groups = self._plan(questions)
        self._check()
        if self._packed is None:
            scores = _plain(self.model, encoded, progress)
        else:
            scores = self._score(self._packed, encoded, groups, progress)
        _refuse_non_finite(scores, questions)
        return scores

    def measure(self, questions: Sequence[Question]) -> int:
        """Sets `batch_tokens` to what scores most tokens a second here, and returns it.

        One batch of each candidate size is timed, from the small ones up, until a larger one is no longer worth it or
        does not fit into memory: fewer tokens than two evaluations of a few hundred questions. Timing decides, so two
        calls may differ.
        """
        _, _, groups = self._plan(questions)
        self._check()
        if self._packed is None or not groups:
            return self.batch_tokens
        group = max(groups, key=lambda group: sum(map(len, group.rows)))
        cache = self._packed.prefix(group.prefix)
        rows = group.rows[len(group.rows) // 4 :]  # longest first: neither the longest nor the shortest
        self._packed.read(make_batch(rows[:1]), cache)  # the first call sets up kernels
        best, fastest = self._candidates[0], 0.0
        for candidate in self._candidates:
            batch = make_batch(rows[: max(1, candidate // len(rows[0]))])
            try:
                start = time.perf_counter()
                self._packed.read(batch, cache)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            speed = sum(map(len, batch.rows)) / (time.perf_counter() - start)
            if speed >= fastest * WORTH:
                best, fastest = candidate, speed
            elif speed < fastest / WORTH:
                break
            if len(batch.rows) == len(rows):
                break
        self.use(best)
        return best

    def use(self, batch_tokens: int) -> None:
        """Sets tokens a batch to what was measured before."""
        self.batch_tokens, self.sized = batch_tokens, True

    def packing(
        self, questions: Sequence[Question]
    ) -> tuple[PackedModel, list[EncodedQuestion], list[Group]]:
        """What a pass of another kind over the questions needs: the model for token trees, and the trees.

        Raises:
            ConfigError: this model is scored one option at a time; the reason is named.
        """
        _, encoded, groups = self._plan(questions)
        self._check()
        if self._packed is None:
            reason = next(note for note in self.notes if note.startswith(_SLOW))
            raise ConfigError(
                f"a backward pass needs a model that takes token trees, but this one is {reason}"
            )
        return self._packed, encoded, groups

    def _plan(
        self, questions: Sequence[Question]
    ) -> tuple[Sequence[Question], list[EncodedQuestion], list[Group]]:
        plan = self._plans.get(id(questions))
        if plan is None or plan[0] is not questions:
            encoded = encode_questions(questions, self.tokenizer, self.limit)
            truncated = sum(question.truncated for question in encoded)
            if truncated:
                self.notes.append(
                    f"{truncated} of {len(questions)} questions are longer than the model's {self.limit} tokens; "
                    "they lose context on the left, as in lm-eval."
                )
            plan = (questions, encoded, plan_groups(encoded))
            self._plans[id(questions)] = plan  # holds `questions`, so its id stays taken
        return plan

    def _score(
        self,
        packed: PackedModel,
        encoded: list[EncodedQuestion],
        groups: list[Group],
        progress: Progress | None,
    ) -> Scores:
        total, tokens = empty_scores(encoded)
        done = 0
        for group in groups:
            cache = packed.prefix(group.prefix)
            for batch in pack(group, self.batch_tokens):
                for part, loglikelihood in _within_memory(packed, batch, cache):
                    np.add.at(total, (part.reads[:, 2], part.reads[:, 3]), loglikelihood)
                done += len(batch.rows)
                if progress is not None:
                    progress(done, len(encoded))
        return _scores(total, tokens, sum(group.tokens for group in groups))

    def _check(self) -> None:
        """Decides once whether the packed way is right for this model."""
        if self._checked:
            return
        try:
            packed = PackedModel(self.model)
            if packed.masks.implementation != "sdpa":
                self.notes.append(
                    f"attention is '{packed.masks.implementation}': this model does not support sdpa."
                )
            encoded = _sample(self.model, self.limit)
            group = Group(
                encoded[0].sequences[0][:4],
                tuple(build_row(i, question, skip=4) for i, question in enumerate(encoded)),
            )
            with_prefix = self._score(packed, encoded, [group], None)
            plain = _plain(self.model, encoded, None)
        except Unmaskable as error:
            self._fall_back(str(error))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._fall_back(f"its forward pass does not take a token tree ({type(error).__name__}: {error})")
        else:
            options = plain.tokens > 0
            if not np.isfinite(plain.total[options]).all():
                # These values are broken, not the way; the check is made with the next ones.
                self._packed = packed
                return
            gap = float(np.abs(with_prefix.total[options] - plain.total[options]).max())
            allowed = 1e-3 if self.model.dtype == torch.float32 else 0.5
            if gap <= allowed:
                self._packed = packed
            else:
                self._fall_back(f"packed and plain scores differ by {gap:.3g} in a check on a few tokens")
        self._checked = True

    def _fall_back(self, reason: str) -> None:
        self._packed = None
        self.notes.append(f"{_SLOW}, which is slow: {' '.join(reason.split())[:300]}.")


def plain_loglikelihoods(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Scores:
    """The reference: one forward pass per option over its whole sequence, no cache, no packing, no mask."""
    encoded = encode_questions(questions, tokenizer, max_length(model.config, tokenizer))
    return _plain(model.eval(), encoded, None)


def _plain(model: Any, encoded: Sequence[EncodedQuestion], progress: Progress | None) -> Scores:
    total, tokens = empty_scores(encoded)
    device = model.get_input_embeddings().weight.device
    fed = 0
    with torch.inference_mode():
        for i, question in enumerate(encoded):
            for j, (sequence, start) in enumerate(zip(question.sequences, question.starts, strict=True)):
                ids = torch.tensor([sequence[:-1]], device=device)
                # In float64, since torch's float32 log_softmax is off by 1e-5 a token over 49k tokens.
                logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 :].double()
                wanted = torch.tensor(sequence[start:], device=logits.device)
                picked = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])
                total[i, j] = float(picked.sum())
                fed += len(sequence) - 1
            if progress is not None:
                progress(i + 1, len(encoded))
    return _scores(total, tokens, fed)


def _within_memory(
    packed: PackedModel, batch: Batch, cache: Any
) -> list[tuple[Batch, npt.NDArray[np.float64]]]:
    """Scores a batch; where an accelerator's memory does not hold it, its halves, and so on."""
    try:
        return [(batch, packed.read(batch, cache))]
    except torch.OutOfMemoryError:
        if len(batch.rows) == 1:
            raise
    torch.cuda.empty_cache()
    return [pair for half in batch.halves() for pair in _within_memory(packed, half, cache)]


def empty_scores(encoded: Sequence[EncodedQuestion]) -> tuple[Floats, Integers]:
    """Log-likelihoods of no token yet, `(n, k)` float64 of 0 padded with -inf, and the options' tokens `(n, k)`."""
    k = max((len(question.sequences) for question in encoded), default=1)
    total = np.full((len(encoded), k), -np.inf)
    tokens = np.zeros((len(encoded), k), dtype=np.int64)
    for i, question in enumerate(encoded):
        n = len(question.sequences)
        total[i, :n] = 0.0
        tokens[i, :n] = [len(s) - start for s, start in zip(question.sequences, question.starts, strict=True)]
    return total, tokens


def _scores(total: Floats, tokens: Integers, fed: int) -> Scores:
    return Scores(total, tokens, np.exp(total).sum(axis=1), fed)


def _sample(model: Any, limit: int) -> list[EncodedQuestion]:
    """Three made-up questions with a common beginning, for the check at the start."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = np.random.default_rng(0)
    n = min(6, max(1, limit // 4))

    def some(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in draw.integers(0, vocabulary, size=count))

    start = some(4)
    questions = []
    for own in (n, n + 3, 1):
        context = start + some(own)
        options = [context + some(length) for length in (1, n, 2)]
        questions.append(EncodedQuestion(tuple(options), (len(context),) * 3))
    return questions


def _refuse_non_finite(scores: Scores, questions: Sequence[Question]) -> None:
    bad = (scores.tokens > 0) & ~np.isfinite(scores.total)
    if bad.any():
        i, j = (int(at[0]) for at in np.nonzero(bad))
        raise EvaluationError(
            f"question {questions[i].key[:12]} (task {questions[i].task}), option {j}: log-likelihood is "
            f"{scores.total[i, j]}, {int(bad.any(axis=1).sum())} of {len(questions)} questions are so. "
            "The model's values are out of range; narrow the space's bounds or use float32."
        )
