"""What models answered, on disk, named by its content, so that every metric can be computed again."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from objectives.evaluation import Evaluation
from objectives.evidence_file import checked_array, read_evidence, write_evidence
from objectives.metrics.diversity import Diversity
from objectives.outcomes import Floats
from search.errors import DiskError, StorageError
from search.storage.database import sqlite_path
from search.storage.staging import FULL

if TYPE_CHECKING:
    from objectives.generation.sampler import Generations


LAYERS = "mergefront-layers-1"


class EvidenceFolder:
    """`evidence/` beside the storage: `SHA256.safetensors`, one file an evaluation, never changed once written.

    For a server's storage it is `runs/NAME/evidence`, or `$MERGEFRONT_EVIDENCE/NAME/evidence`: a folder that all
    machines of the study share.
    """

    def __init__(self, url: str, name: str) -> None:
        database = sqlite_path(url)
        server = Path(os.environ.get("MERGEFRONT_EVIDENCE") or "runs") / name
        self.path = (database.parent if database is not None else server) / "evidence"

    def save(self, evidence: Evaluation | Diversity | Generations) -> str:
        """Writes what was measured; returns its SHA-256, by which `load` finds it.

        Raises:
            DiskError: it cannot be written.
        """
        return self._put(evidence.save)

    def save_layers(self, earlier: Floats) -> str:
        """Writes the scores after all layers but the last, `(n, L - 1, k)` float64; returns the file's SHA-256.

        They are kept in float32, which is what they were computed in.

        Raises:
            DiskError: they cannot be written.
        """
        return self._put(
            lambda path: write_evidence(path, {"earlier": earlier.astype(np.float32)}, {"format": LAYERS})
        )

    def load_layers(self, digest: str) -> Floats:
        """Reads what `save_layers` wrote.

        Raises:
            StorageError: the file is missing. EvaluationError: it does not hold what its name promises.
        """
        path = self._existing(digest)
        arrays, _ = read_evidence(path, LAYERS, sha256=digest)
        return np.asarray(checked_array(path, arrays, "earlier", np.float32), dtype=np.float64)

    def load(self, digest: str) -> Evaluation:
        """Reads an evaluation back.

        Raises:
            StorageError: the file is missing. EvaluationError: it does not hold what its name promises.
        """
        return Evaluation.load(self._existing(digest), sha256=digest)

    def load_diversity(self, digest: str) -> Diversity:
        """Reads a trial's diversities back; errors as `load`."""
        return Diversity.load(self._existing(digest), sha256=digest)

    def _put(self, write: Callable[[Path], str]) -> str:
        """Lets `write` make a file and gives it the name of its content."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            staged = self.path / f"new-{uuid.uuid4().hex}.safetensors"
            digest = write(staged)
            os.replace(staged, self._file(digest))
        except (OSError, DiskError) as error:
            cause = error.__cause__ if isinstance(error, DiskError) else error
            if isinstance(cause, OSError) and cause.errno in FULL:
                why = "no space left on the disk. Finished trials are safe; make room and resume."
            else:
                why = f"evidence cannot be written: {getattr(cause, 'strerror', None) or error}."
            raise DiskError(f"{self.path}: {why}") from error
        return digest

    def _existing(self, digest: str) -> Path:
        path = self._file(digest)
        if not path.exists():
            raise StorageError(
                f"{path}: the evidence of a trial is missing. Copy the folder 'evidence' along with the storage."
            )
        return path

    def _file(self, digest: str) -> Path:
        return self.path / f"{digest}.safetensors"
