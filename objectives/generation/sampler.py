"""Prompts in, sampled answers out: the raw material of output diversity (`diversity.py`).

What is drawn depends on the model's values, the prompt's tokens and the seed, and on nothing else: every
(prompt, sample) has random numbers of its own, keyed by the prompt's tokens, so that neither the other prompts
nor the order nor the batches matter. Two merges are therefore compared under the same random numbers. A batch
of another shape changes the last bits of the probabilities, as everywhere in floating point; a draw is turned by
that only where it falls within those bits of the border between two tokens (measured in float32: one answer in
4,800, of 64 tokens each). Keep to one `batch_rows` where two runs shall be equal to the letter.

The checkpoint's own `generation_config` is never read: it differs between the parents of a merge.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from objectives.errors import ConfigError, EvaluationError
from objectives.evidence_file import checked_array, read_evidence, write_evidence
from objectives.generation.drawing import draw_tokens
from objectives.generation.stopping import decoded, stopping
from objectives.questions.chat import rendered
from objectives.scoring.encoding import max_length

FORMAT = "mergefront-generations-1"
PADDING = -1
BATCH_ROWS = 64

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]
Booleans = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. The defaults draw from the model's own distribution.

    Attributes:
        samples: answers a prompt, 1 or more (a diversity needs at least 2).
        temperature: logits are divided by it; above 0.
        top_p: nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): only the smallest set of most probable
            tokens with at least this probability is drawn from; above 0, 1 keeps all tokens.
        max_new_tokens: where an answer that does not end by itself is cut.
        seed: of all random numbers.

    Raises:
        ConfigError: a value out of its range.
    """

    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("samples", self.samples >= 1, "1 or more"),
            ("temperature", 0.0 < self.temperature < math.inf, "a number above 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
        ):
            if not fits:
                raise ConfigError(f"decoding: {name} is {getattr(self, name)} (wanted {wanted}).")


@dataclass(frozen=True, eq=False)
class Generations:
    """The s answers that one model gave to each of n prompts, at most t tokens each; arrays are read-only.

    Attributes:
        tokens: `(n, s, t)` int32 token ids, -1 after the last; a token that ended an answer by itself is not kept.
        prompt_tokens: tokens of all prompts together; each prompt went through the model once.
        digest: SHA-256 over the prompts' tokens, in order, and how the answers were drawn.
        seconds: wall time; not saved, 0.0 after `load`.
        completed: answers of less than t tokens that ended with a text: the last token of it is kept.

    Raises:
        EvaluationError: a shape, a dtype, an id below -1, or a token after the padding.

    >>> one = Generations(np.array([[[5, 7], [5, -1]]], dtype=np.int32), prompt_tokens=3, digest="")
    >>> one.finished.tolist(), one.generated_tokens
    ([[False, True]], 4)
    """

    tokens: Integers
    prompt_tokens: int
    digest: str
    seconds: float = 0.0
    completed: int = 0

    def __post_init__(self) -> None:
        found = self.tokens
        if found.dtype != np.int32 or found.ndim != 3 or 0 in found.shape:
            raise EvaluationError(
                f"generations: tokens are {found.dtype} of shape {found.shape}, "
                "wanted int32 of shape (prompts, samples, tokens)."
            )
        tokens = np.array(found, order="C")
        tokens.flags.writeable = False
        object.__setattr__(self, "tokens", tokens)
        padding = tokens == PADDING
        late = (padding[..., :-1] & ~padding[..., 1:]).any(axis=-1)
        broken = (tokens < PADDING).any(axis=-1) | late
        if broken.any():
            i, j = (int(at[0]) for at in np.nonzero(broken))
            raise EvaluationError(f"generations: prompt {i}, sample {j}: is no padded list of token ids.")

    @property
    def finished(self) -> Booleans:
        """`(n, s)` whether the answer ended by itself; otherwise it was cut after t tokens."""
        return np.asarray(self.tokens[..., -1] == PADDING)

    @property
    def generated_tokens(self) -> int:
        """Tokens drawn, those that ended an answer included; with `prompt_tokens`, what the answers cost."""
        return int((self.tokens != PADDING).sum()) + int(self.finished.sum()) - self.completed

    def texts(self, tokenizer: Any) -> tuple[tuple[str, ...], ...]:
        """n tuples of s answers, decoded without special tokens."""
        n, s, t = self.tokens.shape
        ids = [answer[answer != PADDING].tolist() for answer in self.tokens.reshape(n * s, t)]
        texts = decoded(ids, tokenizer)
        return tuple(tuple(texts[i * s : (i + 1) * s]) for i in range(n))

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes a safetensors file, whole or not at all; equal generations give equal bytes.

        Returns:
            SHA-256 of the file, in hex.

        Raises:
            DiskError: the file cannot be written; an earlier one stays as it was.
        """
        metadata = {"format": FORMAT, "about": self.digest, "prompt_tokens": str(self.prompt_tokens)}
        if self.completed:
            metadata["completed"] = str(self.completed)
        return write_evidence(path, {"tokens": self.tokens}, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, sha256: str | None = None, digest: str | None = None
    ) -> Generations:
        """Reads what `save` wrote and checks it.

        Args:
            sha256: what `save` returned; None skips the comparison.
            digest: the prompts and settings it must be about; None skips the comparison.

        Raises:
            EvaluationError: no such file, another content, other prompts, or another array than promised.
        """
        arrays, metadata = read_evidence(path, FORMAT, sha256=sha256, about=digest)
        counts = {
            "prompt_tokens": metadata.get("prompt_tokens", ""),
            "completed": metadata.get("completed", "0"),
        }
        for name, count in counts.items():
            if not count.isdecimal():
                raise EvaluationError(f"{path}: {name} is {count!r}, wanted a number.")
        tokens = checked_array(path, arrays, "tokens", np.int32)
        try:
            return cls(
                tokens,
                int(counts["prompt_tokens"]),
                metadata.get("about", ""),
                completed=int(counts["completed"]),
            )
        except EvaluationError as error:
            raise EvaluationError(f"{path}: {error}") from error


class AnswerSampler:
    """Draws answers to one list of prompts, again and again, with whatever values the model holds at the moment.

    Args:
        model: a transformers causal language model with attention layers, on its device(s). Put into eval mode.
        tokenizer: with its EOS, which ends an answer; without one every answer has full length.
        prompts: at least one text. An empty one is the tokenizer's BOS (or EOS) alone.
        decoding: how the answers are drawn.
        chat_template: whether each prompt becomes a user's message in the tokenizer's chat template; the token
            with which the template ends an assistant's message then ends an answer, too.
        until: texts that end an answer, too; what was drawn up to the end of the first stays in its tokens, `texts`
            cuts it.
        batch_rows: answers at work at once, rounded down to whole prompts (at least one).

    Attributes:
        prompts: token ids of each prompt. stopping: what ends an answer.
        digest: as in `Generations`.

    Raises:
        ConfigError: no prompts, a prompt without tokens, a prompt that leaves no room for `max_new_tokens`
            within the model's context, no chat template or one that fails, or a model that keeps a recurrent
            state; nothing has been generated then.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        decoding: Decoding | None = None,
        *,
        chat_template: bool = False,
        until: Sequence[str] = (),
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.decoding = decoding or Decoding()
        self.batch_rows = batch_rows
        if not prompts:
            raise ConfigError("prompts: there are none. Give at least one.")
        if getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"prompts: {type(model).__name__} keeps a recurrent state, which the padding of a batch would "
                "change (wanted attention layers). Remove what this study samples."
            )
        self.stopping = stopping(tokenizer, chat_template=chat_template, until=until)
        self.prompts = encode_prompts(prompts, tokenizer, chat_template=chat_template)
        limit = max_length(model.config, tokenizer)
        for i, prompt in enumerate(self.prompts):
            if len(prompt) + self.decoding.max_new_tokens > limit:
                raise ConfigError(
                    f"prompt {i} ({prompts[i][:40]!r}): {len(prompt)} tokens and {self.decoding.max_new_tokens} new "
                    f"ones (wanted {limit} together: the model's context). Shorten it or lower max_new_tokens."
                )
        ends = [list(self.stopping.until)] if until else []
        content = json.dumps([self.prompts, self.stopping.stops, asdict(self.decoding), *ends])
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def generate(self, progress: Progress | None = None) -> Generations:
        """Draws all answers.

        Args:
            progress: called with (prompts done, prompts).

        Raises:
            EvaluationError: the model's values give probabilities that are not numbers; a prompt is named.
        """
        start = time.perf_counter()
        n, s, t = len(self.prompts), self.decoding.samples, self.decoding.max_new_tokens
        tokens = np.full((n, s, t), PADDING, dtype=np.int32)
        # Neighbours pad little; the longest come first, so that too little memory shows at once.
        order = sorted(range(n), key=lambda i: -len(self.prompts[i]))
        size = max(1, self.batch_rows // s)
        for first in range(0, n, size):
            batch = order[first : first + size]
            for part, drawn in self._within_memory(batch):
                tokens[part] = drawn.reshape(len(part), s, t)
            if progress is not None:
                progress(first + len(batch), n)
        found = Generations(tokens, sum(map(len, self.prompts)), self.digest)
        # An answer that contains a text of `until` was ended by it, since it went no further.
        texts = np.array(found.texts(self.tokenizer))[found.finished] if self.stopping.until else ()
        completed = sum(self.stopping.cut(text) != text for text in texts)
        return replace(found, seconds=time.perf_counter() - start, completed=completed)

    def texts(self, found: Generations) -> tuple[tuple[str, ...], ...]:
        """n tuples of s answers that this sampler drew, each up to the first of `until`."""
        return tuple(tuple(map(self.stopping.cut, answers)) for answers in found.texts(self.tokenizer))

    def _within_memory(self, batch: list[int]) -> list[tuple[list[int], Integers]]:
        """Answers of a batch; where an accelerator's memory does not hold it, of its halves, and so on."""
        try:
            return [(batch, self._batch(batch))]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._within_memory(batch[:half]) + self._within_memory(batch[half:])

    @torch.inference_mode()
    def _batch(self, batch: Sequence[int]) -> Integers:
        """`(b * s, t)` token ids for the prompts at `batch`, -1 after the last."""
        s, t = self.decoding.samples, self.decoding.max_new_tokens
        device = self.model.get_input_embeddings().weight.device
        ids, mask = (torch.from_numpy(a).to(device) for a in _left_padded([self.prompts[i] for i in batch]))
        cache = new_cache(self.model)
        logits = self._logits(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        # The prompt's keys and values are computed once, then copied for each of its samples.
        cache.batch_repeat_interleave(s)
        mask, logits = mask.repeat_interleave(s, dim=0), logits.repeat_interleave(s, dim=0)

        seed = self.decoding.seed
        uniform = np.array([uniforms(self.prompts[i], seed, j, t) for i in batch for j in range(s)])
        tokens = np.full(uniform.shape, PADDING, dtype=np.int32)
        alive = np.arange(len(uniform))
        for step in range(t):
            usable = torch.isfinite(logits.amax(dim=-1)).cpu().numpy()
            if not usable.all():
                raise EvaluationError(
                    f"prompt {batch[alive[usable.argmin()] // s]}: the probabilities of token {step} of an answer "
                    "are not numbers. The model's values are out of range; narrow the space's bounds or use float32."
                )
            drawn = draw_tokens(logits, uniform[alive, step], self.decoding.temperature, self.decoding.top_p)
            ended = self.stopping.ends(drawn)
            tokens[alive[~ended], step] = drawn[~ended]
            if self.stopping.until:
                going = np.flatnonzero(~ended)
                written = tokens[alive[going], : step + 1].tolist()
                ended[going] = self.stopping.reached(written, drawn[going].tolist())
            if ended.all() or step + 1 == t:
                break
            if ended.any():
                # Their rows leave the batch; the index is on the CPU, since layers may lie on several devices.
                kept = torch.from_numpy(np.flatnonzero(~ended))
                cache.batch_select_indices(kept)
                mask, alive, drawn = mask[kept], alive[~ended], drawn[~ended]
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            fed = torch.from_numpy(drawn[:, None]).to(device)
            logits = self._logits(fed, mask, mask.sum(dim=1, keepdim=True) - 1, cache)
        return tokens

    def _logits(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
        """`(rows, vocabulary)` logits of the token after the last of each row."""
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits


def new_cache(model: Any) -> Any:
    """An empty cache of keys and values: the model's own `new_cache()` where it has one, else a DynamicCache."""
    from transformers.cache_utils import DynamicCache

    own = getattr(model, "new_cache", None)
    return DynamicCache(config=model.config) if own is None else own()


def uniforms(prompt: tuple[int, ...], seed: int, sample: int, n: int) -> Floats:
    """`(n,)` uniform numbers in [0, 1) that depend on the prompt's tokens, the seed and the sample's index alone.

    More of them begin with the same ones.
    """
    key = hashlib.sha256(json.dumps([seed, sample, prompt]).encode()).digest()[:16]
    # Raw bits, whose stream NumPy guarantees; 53 of them make a float64.
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, *, chat_template: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Token ids of each prompt, as a user's message in the tokenizer's chat template where that is wanted.

    Raises:
        ConfigError: a prompt without tokens, no chat template, or one that fails.
    """
    texts = list(prompts)
    if chat_template:
        turns = [[{"role": "user", "content": text}] for text in prompts]
        texts = [rendered(turn, tokenizer, generate=True) for turn in turns]
    return tuple(_encoded(i, text, tokenizer) for i, text in enumerate(texts))


def _left_padded(prompts: Sequence[tuple[int, ...]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`(b, width)` ids and mask. Padding repeats the first token, which every vocabulary has; the mask hides it."""
    width = max(map(len, prompts))
    ids = np.array([(prompt[0],) * (width - len(prompt)) + prompt for prompt in prompts], dtype=np.int64)
    mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts], dtype=np.int64)
    return ids, mask


def _encoded(number: int, text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids, with the tokenizer's own special tokens unless the text brings its BOS, as chat templates do."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    mark = tokenizer.decode(first) if first is not None else ""
    bare = bool(mark) and text.startswith(mark)
    ids = tokenizer(text, add_special_tokens=not bare, verbose=False)["input_ids"]
    found = tuple(int(token) for token in ids) or (() if first is None else (int(first),))
    if not found:
        raise ConfigError(f"prompt {number}: has no token, and the tokenizer has neither BOS nor EOS for it.")
    return found
