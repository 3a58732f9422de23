"""Per-question probabilities on disk, named by their content, so that every metric can be computed again."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from objectives.evaluator import Evaluation
from search.database import sqlite_path
from search.errors import DiskError, StorageError


class EvidenceFolder:
    """`evidence/` beside the storage: `SHA256.safetensors`, one file an evaluation, never changed once written.

    For a server's storage it is `runs/NAME/evidence`, or `$MERGEFRONT_EVIDENCE/NAME/evidence`: a folder that all
    machines of the study share.
    """

    def __init__(self, url: str, name: str) -> None:
        database = sqlite_path(url)
        server = Path(os.environ.get("MERGEFRONT_EVIDENCE") or "runs") / name
        self.path = (database.parent if database is not None else server) / "evidence"

    def save(self, evaluation: Evaluation) -> str:
        """Writes the evaluation; returns its SHA-256, by which `load` finds it.

        Raises:
            DiskError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            staged = self.path / f"new-{uuid.uuid4().hex}.safetensors"
            digest = evaluation.save(staged)
            os.replace(staged, self._file(digest))
        except OSError as error:
            raise DiskError(f"{self.path}: evidence cannot be written: {error.strerror}.") from error
        return digest

    def load(self, digest: str) -> Evaluation:
        """Reads an evaluation back.

        Raises:
            StorageError: the file is missing. EvaluationError: it does not hold what its name promises.
        """
        path = self._file(digest)
        if not path.exists():
            raise StorageError(
                f"{path}: the evidence of a trial is missing. Copy the folder 'evidence' along with the storage."
            )
        return Evaluation.load(path, sha256=digest)

    def _file(self, digest: str) -> Path:
        return self.path / f"{digest}.safetensors"
