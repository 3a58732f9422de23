"""Whether two answers mean the same, by a given model: cosine of embeddings, or entailment both ways."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from objectives.metrics.diversity import Booleans
from search.checkpoints.judges import batches, load_judge, longest
from search.errors import CheckpointError, ConfigError


class EmbeddingEquivalence:
    """Answers are equivalent when the cosine of their embeddings reaches a threshold.

    The embedding is the mean of the last hidden states over the answer's tokens (the prompt is not embedded).
    The right threshold depends on the model: a causal model's embeddings all lie close to each other
    (Ethayarajh 2019, arXiv 1909.00512), those of a sentence encoder are spread out.

    Args:
        folder: a local encoder or causal checkpoint, safetensors, with a fast tokenizer.
        threshold: least cosine, above 0, at most 1.
        device: where the model runs, in float32.

    Raises:
        ConfigError: the threshold. CheckpointError: the folder is missing, broken or unsafe, or not such a model.
    """

    def __init__(self, folder: str | os.PathLike[str], *, threshold: float, device: str = "cpu") -> None:
        if not 0.0 < threshold <= 1.0:
            raise ConfigError(f"equivalence: threshold is {threshold} (wanted above 0, at most 1).")
        # Mean pooling has no use for a pooling layer, and some checkpoints come without one.
        self._model, self._tokenizer, checkpoint = load_judge(folder, "AutoModel", device, optional="pooler.")
        self._threshold = threshold
        self.title = f"embedding {checkpoint.sha256()[:12]}, cosine >= {threshold:g}"

    @torch.inference_mode()
    def __call__(self, prompt: str, answers: Sequence[str]) -> Booleans:
        encoded = self._tokenizer(
            list(answers), truncation=True, max_length=longest(self._model, self._tokenizer)
        )
        hidden = []
        for inputs in batches(encoded, self._model):
            state = self._model(**inputs).last_hidden_state.double()
            mask = inputs["attention_mask"][..., None].double()
            hidden.append((state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        unit = torch.nn.functional.normalize(torch.cat(hidden), dim=-1)
        return _symmetric((unit @ unit.T >= self._threshold).cpu().numpy())


class EntailmentEquivalence:
    """Answers are equivalent when each entails the other, given the prompt.  (Kuhn et al. 2023, section 3.2)

    Each ordered pair goes through a sequence-classification model as (prompt + answer, prompt + other answer);
    entailment must be the most probable class both ways. A pair that is too long loses tokens on the left.

    Args:
        folder: a local natural language inference checkpoint, safetensors, with a fast tokenizer and a class
            called entailment in its config.
        device: where the model runs, in float32.

    Raises:
        CheckpointError: the folder is missing, broken or unsafe, or not such a model.
    """

    def __init__(self, folder: str | os.PathLike[str], *, device: str = "cpu") -> None:
        self._model, self._tokenizer, checkpoint = load_judge(
            folder, "AutoModelForSequenceClassification", device
        )
        self._tokenizer.truncation_side = "left"  # the answers are on the right
        labels = {str(name).lower(): int(index) for index, name in self._model.config.id2label.items()}
        if "entailment" not in labels:
            raise CheckpointError(
                f"{folder}: no class called entailment (its classes: {', '.join(labels)}). "
                "Give a natural language inference model."
            )
        self._entailment = labels["entailment"]
        self.title = f"entailment {checkpoint.sha256()[:12]}"

    @torch.inference_mode()
    def __call__(self, prompt: str, answers: Sequence[str]) -> Booleans:
        k = len(answers)
        whole = [f"{prompt} {answer}" for answer in answers]
        pairs = [(i, j) for i in range(k) for j in range(k) if i != j]
        encoded = self._tokenizer(
            [whole[i] for i, _ in pairs],
            [whole[j] for _, j in pairs],
            truncation=True,
            max_length=longest(self._model, self._tokenizer),
        )
        logits = torch.cat([self._model(**inputs).logits for inputs in batches(encoded, self._model)])
        entails = np.eye(k, dtype=np.bool_)
        entails[tuple(np.array(pairs).T)] = (logits.argmax(dim=-1) == self._entailment).cpu().numpy()
        return _symmetric(entails)


def _symmetric(same: Booleans) -> Booleans:
    return np.asarray((same & same.T) | np.eye(len(same), dtype=np.bool_))
