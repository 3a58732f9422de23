"""Per-question probabilities on disk, named by their content, so that every metric can be computed again."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np

from objectives.evaluator import Evaluation
from objectives.outcomes import Floats
from search.database import sqlite_path
from search.errors import DiskError, EvaluationError, StorageError


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

    def save_layers(self, earlier: Floats) -> str:
        """Writes the scores after all layers but the last, `(n, L - 1, k)` float64; returns the file's SHA-256.

        They are kept in float32, which is what they were computed in.

        Raises:
            DiskError: they cannot be written.
        """
        from safetensors.numpy import save

        content = save({"earlier": np.ascontiguousarray(earlier, dtype=np.float32)})
        digest = hashlib.sha256(content).hexdigest()
        staged = self.path / f"new-{uuid.uuid4().hex}.safetensors"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with staged.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, self._file(digest))
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise DiskError(f"{self.path}: evidence cannot be written: {error.strerror}.") from error
        return digest

    def load_layers(self, digest: str) -> Floats:
        """Reads what `save_layers` wrote.

        Raises:
            StorageError: the file is missing. EvaluationError: it does not hold what its name promises.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        content = self._existing(digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise EvaluationError(f"{self._file(digest)}: SHA-256 is not its name: the file was changed.")
        try:
            return np.asarray(load(content)["earlier"], dtype=np.float64)
        except (SafetensorError, KeyError) as error:
            raise EvaluationError(f"{self._file(digest)}: holds no layer-wise scores ({error}).") from error

    def load(self, digest: str) -> Evaluation:
        """Reads an evaluation back.

        Raises:
            StorageError: the file is missing. EvaluationError: it does not hold what its name promises.
        """
        return Evaluation.load(self._existing(digest), sha256=digest)

    def _existing(self, digest: str) -> Path:
        path = self._file(digest)
        if not path.exists():
            raise StorageError(
                f"{path}: the evidence of a trial is missing. Copy the folder 'evidence' along with the storage."
            )
        return path

    def _file(self, digest: str) -> Path:
        return self.path / f"{digest}.safetensors"
