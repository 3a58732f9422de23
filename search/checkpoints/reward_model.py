"""Reward models: a local checkpoint with one output scores prompt and answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from objectives.metrics.preferences import Length, Preference, Vocabulary
from search.checkpoints.judges import batches, load_judge, longest
from search.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from search.checkpoints.checkpoint import Checkpoint
    from search.config.sections import PreferenceConfig


def make_preference(wanted: PreferenceConfig, device: str = "cpu") -> Preference:
    """What a study file's preference measures with; `device` is where a reward model runs.

    Raises:
        CheckpointError: the reward model is missing, broken or unsafe, or no reward model.
    """
    if wanted.model is not None:
        return RewardModel(wanted.model, device=device)
    if wanted.words is not None:
        return Length(fewer=wanted.words == "fewer")
    if wanted.mentions is not None:
        return Vocabulary(tuple(wanted.mentions))
    return Vocabulary(tuple(wanted.avoids or ()), avoided=True)


KIND = "AutoModelForSequenceClassification"


class RewardModel:
    """The raw score of a sequence-classification model with one output; higher is better.

    It reads prompt and answer as its tokenizer's chat template puts them, a user's message and the assistant's;
    without a template, the prompt, a space and the answer. What is too long for it loses tokens on the left. An empty
    answer is one like any other. Equal pairs are scored once.

    Args:
        folder: a local checkpoint, safetensors, with a fast tokenizer.
        device: where the model runs, in float32.

    Raises:
        CheckpointError: the folder is missing, broken or unsafe, or not such a model.
    """

    def __init__(self, folder: str | os.PathLike[str], *, device: str = "cpu") -> None:
        check_reward_model(folder)
        self._folder = folder
        self._model, self._tokenizer, checkpoint = load_judge(folder, KIND, device)
        self._tokenizer.truncation_side = "left"  # the answer is on the right
        self._template = bool(getattr(self._tokenizer, "chat_template", None))
        self.title = f"reward model {reward_digest(checkpoint)[:12]}"

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
        """`(n, s)` float64 scores of s answers to each of n prompts."""
        asked = [
            (prompt, answer) for prompt, answers in zip(prompts, texts, strict=True) for answer in answers
        ]
        # Neighbours pad little; the longest come first, so that too little memory shows at once.
        unique = sorted(set(asked), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        encoded = self._tokenizer(
            [self._read(*pair) for pair in unique],
            add_special_tokens=not self._template,  # a template writes its own
            truncation=True,
            max_length=longest(self._model, self._tokenizer),
        )
        scores = torch.cat([self._model(**inputs).logits[:, 0] for inputs in batches(encoded, self._model)])
        by_pair = dict(zip(unique, scores.double().cpu().tolist(), strict=True))
        return np.array([by_pair[pair] for pair in asked], dtype=np.float64).reshape(len(prompts), -1)

    def _read(self, prompt: str, answer: str) -> str:
        if not self._template:
            return f"{prompt} {answer.strip()}"
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except Exception as error:  # a template is a program: it raises what it likes
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            raise ConfigError(f"{self._folder}: the chat template fails ({reason}).") from error


def reward_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of all that a reward model's scores depend on: weights, config, tokenizer, chat template."""
    from search.checkpoints.writing import TAGALONG
    from search.storage.files import file_sha256

    whole = hashlib.sha256(checkpoint.sha256().encode())
    for name in TAGALONG:
        if (checkpoint.folder / name).is_file():
            whole.update(f"{name} {file_sha256(checkpoint.folder / name)}".encode())
    return whole.hexdigest()


def check_reward_model(folder: str | os.PathLike[str]) -> Checkpoint:
    """The opened checkpoint of what looks like a reward model; its weights are not read.

    Raises:
        CheckpointError: the folder is missing or unsafe, has no tokenizer, or not one output.
    """
    from search.checkpoints.checkpoint import Checkpoint
    from search.checkpoints.layout import load_config
    from search.checkpoints.tokenizers import load_tokenizer

    checkpoint = Checkpoint.open(Path(folder))
    outputs = int(load_config(checkpoint.folder).num_labels)
    if outputs != 1:
        raise CheckpointError(
            f"{folder}: has {outputs} outputs, wanted 1. Give a reward model: num_labels 1 in its config."
        )
    load_tokenizer(checkpoint.folder)
    return checkpoint
