"""A LoRA learns to name who writes next (Feng et al. 2025, arXiv 2510.09913).

A row is a trace and its label. The loss is the cross-entropy of the candidates' numbers alone, as only they are asked
for; the released training code takes it over the whole vocabulary, most of which a model knows at once to be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from objectives.scoring.encoding import max_length
from search.config.switching import LoraOptions
from search.errors import ConfigError, EvaluationError
from search.switching.adapter import adapted, save_adapter
from search.switching.asked_switcher import Asking, asked_logits, digit_logits
from search.switching.reader import Tokens
from search.switching.response import Start

BATCH_ROWS = 8  # rows that are in memory at once, with all that their gradients need

_CLIP = 1.0  # length of the gradient at most, as transformers' Trainer has it

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """What one pass over the rows came to.

    Attributes:
        number: from 1.
        loss: mean log loss of the rows that were learned from, in nats, dropout on and each before its step; lower is
            better, and log n is guessing.
        held_loss, held_accuracy: of the rows that were held out, after the epoch; None if there are none.
    """

    number: int
    loss: float
    held_loss: float | None
    held_accuracy: float | None


Watch = Callable[[int, int, Epoch | None], None]


@dataclass(frozen=True, eq=False)
class Lora:
    """A trained adapter.

    Attributes:
        config, tensors: of a plain PEFT adapter, tensors on the CPU.
        epochs: in order. held: groups that were held out, sorted.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    epochs: tuple[Epoch, ...]
    held: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Writes the adapter into a folder that exists, to be read by `load_switcher` or peft. Raises OSError."""
        save_adapter(self.config, self.tensors, folder)


def train_lora(
    model: Any,
    asking: Asking,
    starts: Sequence[Start],
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    options: LoraOptions | None = None,
    *,
    watch: Watch | None = None,
    batch_rows: int = BATCH_ROWS,
) -> Lora:
    """An adapter with which the model names each trace's label; that of the last epoch.

    The same rows, options and machine give the same adapter. The model is the same afterwards, and in eval mode.

    Args:
        model: a transformers causal language model of the candidates' tokenizer.
        starts: m traces. labels: `(m,)` the candidate that should write next. groups: `(m,)` the question of each.
        watch: called after every step with (steps done, steps, the epoch that ended with it or None).
        batch_rows: rows that are in memory at once. It changes the adapter by rounding, and by what dropout draws.

    Raises:
        MergefrontError: peft is not installed.
        ConfigError: no rows, rows of one label, a text that is too long, or targets that the model does not have.
        EvaluationError: shapes that do not fit together, a label that is no candidate's, a loss that is not a number.
    """
    options = options or LoraOptions()
    label, group = _checked(len(starts), labels, groups, len(asking.digits))
    texts = [asking.asked(start) for start in starts]
    longest, context = max(map(len, texts)), max_length(model.config, asking.tokenizer)
    if longest > context:
        raise ConfigError(
            f"switching.lora: a marked trace has {longest} tokens (wanted {context} at most, the model's context). "
            "Take shorter prompts or responses, or longer segments."
        )
    held = _held_out(group, options)
    rows = _Rows(model, asking, texts, label, batch_rows)
    learned, rest = (np.flatnonzero(np.isin(group, held, invert=invert)) for invert in (True, False))
    with adapted(model, options) as (trained, collect):
        epochs = tuple(_epochs(rows, trained, learned, rest, options, watch))
        return Lora(*collect(), epochs, tuple(int(one) for one in held))


@dataclass(frozen=True, eq=False)
class _Rows:
    """Texts of `asked` and their labels, before a model."""

    model: Any
    asking: Asking
    texts: Sequence[Tokens]
    label: Integers
    batch_rows: int

    def learn(self, rows: Integers, trained: Sequence[nn.Parameter]) -> float:
        """Gradients of the mean loss of some rows, clipped; gives the sum of their losses."""
        total = 0.0
        ordered = rows[np.argsort([-len(self.texts[row]) for row in rows], kind="stable")]
        for first in range(0, len(ordered), self.batch_rows):
            part = ordered[first : first + self.batch_rows]
            logits = digit_logits(self.model, self.asking, [self.texts[row] for row in part])
            wanted = torch.from_numpy(self.label[part]).to(logits.device)
            loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
            total += float(loss.detach())
            (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
        length = float(nn.utils.clip_grad_norm_(trained, _CLIP))
        if not math.isfinite(total) or not math.isfinite(length):
            raise EvaluationError(
                "switching.lora: the loss or its gradient is not a number. Lower switching.lora.rate, or use dtype "
                "float32."
            )
        return total

    def judge(self, rows: Integers) -> tuple[float | None, float | None]:
        """Mean log loss in nats and accuracy of some rows; None for none."""
        if not rows.size:
            return None, None
        self.model.eval()
        logits = asked_logits(self.model, self.asking, [self.texts[row] for row in rows], self.batch_rows)
        top = logits.max(axis=1, keepdims=True)
        logits = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        right = logits.argmax(axis=1) == self.label[rows]
        return float(-logits[np.arange(len(rows)), self.label[rows]].mean()), float(right.mean())


def _epochs(
    rows: _Rows,
    trained: Sequence[nn.Parameter],
    learned: Integers,
    rest: Integers,
    options: LoraOptions,
    watch: Watch | None,
) -> Iterator[Epoch]:
    """Trains; gives what every epoch came to."""
    steps = math.ceil(len(learned) / options.batch) * options.epochs
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    done = 0
    for number in range(1, options.epochs + 1):
        rows.model.train()
        order = learned[np.random.default_rng([options.seed, 0, number]).permutation(len(learned))]
        total = 0.0
        for first in range(0, len(order), options.batch):
            for setting in optimizer.param_groups:
                setting["lr"] = options.rate * _share(done, steps, math.ceil(options.warmup * steps))
            total += rows.learn(order[first : first + options.batch], trained)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            if watch is not None and first + options.batch < len(order):
                watch(done, steps, None)
        epoch = Epoch(number, total / len(order), *rows.judge(rest))
        if watch is not None:
            watch(done, steps, epoch)
        yield epoch


def _share(done: int, steps: int, warm: int) -> float:
    """Of the highest rate, for the next step: it rises evenly to 1, then falls as a cosine towards 0.

    >>> [round(_share(done, 10, 2), 2) for done in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


def _checked(
    rows: int, labels: npt.ArrayLike, groups: npt.ArrayLike, candidates: int
) -> tuple[Integers, Integers]:
    label, group = np.asarray(labels), np.asarray(groups)
    if label.shape != (rows,) or group.shape != (rows,):
        raise EvaluationError(
            f"switching.lora: {rows} traces, labels of shape {label.shape} and groups of shape {group.shape} (wanted "
            "one of each for every trace)."
        )
    if not ((label >= 0) & (label < candidates)).all():
        raise EvaluationError(f"switching.lora: a label is none of the candidates, 0 to {candidates - 1}.")
    if len(np.unique(label)) < 2:
        raise ConfigError(
            f"switching.lora: {rows} rows with {len(np.unique(label))} different labels (wanted 2 or more): there is "
            "nothing to choose. Collect rows of more questions."
        )
    return label.astype(np.int64), group.astype(np.int64)


def _held_out(group: Integers, options: LoraOptions) -> Integers:
    """The questions that are held out: at least one if any shall be, and never all."""
    known = np.unique(group)
    if not options.held:
        return known[:0]
    if len(known) < 2:
        raise ConfigError(
            "switching.lora.held: all rows are of one question (wanted 2 or more, to hold one out). Set it to 0."
        )
    number = min(max(1, round(options.held * len(known))), len(known) - 1)
    return np.sort(np.random.default_rng([options.seed, 1]).permutation(known)[:number])
