"""What a switcher has learned, apart from any relay: a classifier, or a model that is asked in text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol

import torch

from objectives.evidence_file import read_evidence, write_evidence
from search.checkpoints.checkpoint import ADAPTER_WEIGHTS, Checkpoint
from search.config.switching import SwitchingConfig
from search.errors import ConfigError, EvaluationError, ExportError
from search.storage.files import file_sha256
from search.storage.staging import disk_errors
from search.switching.adapter import load_switcher
from search.switching.asked_switcher import AskedSwitcher, Asking
from search.switching.classifier import Classifier
from search.switching.classifier_switcher import ClassifierSwitcher
from search.switching.lora import Lora
from search.switching.relay import Relay
from search.switching.response import Policy
from search.switching.rollouts import derived

CLASSIFIER, ADAPTER = "classifier.safetensors", "adapter"
FORMAT = "mergefront-classifier-1"


class Brain(Protocol):
    """What was learned.

    Attributes:
        kind: as in a study file.
    """

    kind: ClassVar[str]

    def policy(self, relay: Relay, config: SwitchingConfig, seed: int | None = None) -> Policy:
        """The switcher at work in a relay.

        Args:
            seed: of a `draw`; None takes the section's.
        """

    def save(self, folder: Path) -> None:
        """Writes its files into a folder that exists."""


@dataclass(frozen=True, eq=False)
class ClassifierBrain:
    """A classifier on the hidden states of one candidate."""

    classifier: Classifier
    host: str
    kind: ClassVar[str] = "classifier"

    def policy(self, relay: Relay, config: SwitchingConfig, seed: int | None = None) -> Policy:
        """See `Brain.policy`."""
        return ClassifierSwitcher(
            self.classifier,
            relay.names.index(self.host),
            len(relay.names),
            relay.decoding.max_new_tokens,
            config.choice,
            config.top_p,
            _seed(config, seed),
        )

    def save(self, folder: Path) -> None:
        """See `Brain.save`."""
        write_evidence(folder / CLASSIFIER, self.classifier.arrays(), {"format": FORMAT, "about": self.host})

    @classmethod
    def load(cls, folder: Path, host: str) -> ClassifierBrain:
        """Raises ExportError where the file is not what `save` wrote."""
        try:
            arrays, _ = read_evidence(folder / CLASSIFIER, FORMAT, about=host)
            return cls(Classifier.from_arrays(arrays), host)
        except EvaluationError as error:
            raise ExportError(f"{folder}: {error} Train it again.") from error


@dataclass(frozen=True, eq=False)
class AskedBrain:
    """A model that is asked in text who writes next.

    Attributes:
        model: in eval mode. digest: of its weights. lora: what was trained, to be saved; None if nothing was.
    """

    model: Any
    digest: str
    lora: Lora | None = None
    kind: ClassVar[str] = "lora"

    def policy(self, relay: Relay, config: SwitchingConfig, seed: int | None = None) -> Policy:
        """See `Brain.policy`."""
        asking = Asking.of(relay.tokenizer, len(relay.names), relay.turns.segment)
        room = relay.decoding.max_new_tokens
        return AskedSwitcher(
            self.model, asking, room, self.digest, config.choice, config.top_p, _seed(config, seed)
        )

    def save(self, folder: Path) -> None:
        """See `Brain.save`."""
        if self.lora is None:
            raise ConfigError("switching: a switcher that was not trained has nothing to save.")
        (folder / ADAPTER).mkdir()
        self.lora.save(folder / ADAPTER)

    @classmethod
    def trained(cls, lora: Lora, base: Checkpoint, dtype: str, device: str) -> AskedBrain:
        """The base model with a trained adapter in it."""
        with TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
            lora.save(Path(scratch))
            found = cls.load(Path(scratch), base, dtype, device)
        return cls(found.model, found.digest, lora)

    @classmethod
    def load(cls, adapter: Path, base: Checkpoint, dtype: str, device: str) -> AskedBrain:
        """The base model with the adapter of a folder in it.

        Raises:
            CheckpointError: the adapter is broken, or is not one of this base.
        """
        model = load_switcher(base.folder, adapter, getattr(torch, dtype), device)
        return cls(model, f"{base.sha256()} {file_sha256(adapter / ADAPTER_WEIGHTS)}")


def _seed(config: SwitchingConfig, seed: int | None) -> int:
    return derived(config.seed if seed is None else seed, "choice")
