"""Copies of the parents on the machine that works with them: one of each for all workers there, named by its content.

Parents on a shared file system are read by every worker at its start, and as mapped files in every trial; a local disk
is faster and does not go away. Exports and model cards name the parents' own places all the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from search.checkpoints.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    Checkpoint,
    checked_folder,
    is_adapter,
)
from search.checkpoints.writing import TAGALONG
from search.errors import CheckpointError, ConfigError, ExportError
from search.storage.files import file_sha256
from search.storage.staging import check_space, disk_errors, locked_folder, staged_folder

logger = logging.getLogger("mergefront")

# Of a parent, beside its config and weights; the card names its licence.
_BESIDE = (*TAGALONG, "README.md", INDEX)


class LocalParents:
    """Copies below one folder of this machine.

    Args:
        root: made if it does not exist. Copies that nobody needs any more may be removed.
        known: SHA-256 of the parents that a study began with, by label. A copy of these is found without reading the
            parent's own weights; without it they are read for their digest.
    """

    def __init__(self, root: Path, known: Mapping[str, str]) -> None:
        self._root = root.expanduser()
        self._wanted = dict(known)

    def copy_of(self, label: str, folder: Path, place: str) -> Path:
        """The copy of a parent; made now if this machine has none. Several workers that ask at once make one.

        Args:
            folder: where the parent lies. place: what the study file says; a hub id is left in the hub's own cache.

        Raises:
            CheckpointError: the parent cannot be opened. ConfigError: it is not what the study began with, or the
                folder of the copies is a file. DiskError: no space, no permission.
        """
        if not Path(place).expanduser().exists():
            return folder
        folder = checked_folder(folder)
        if is_adapter(folder):
            self._wanted.pop(label, None)  # it is that of base and adapter together
            weights, files = "", [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]
            beside = files
        else:
            source = Checkpoint.open(folder)
            if label not in self._wanted:
                self._wanted[label] = source.sha256()
            weights = self._wanted[label]
            files, beside = [folder / "config.json", *source.files], []
        extra = [folder / name for name in _BESIDE if (folder / name).is_file()]
        facts = {"weights": weights, "beside": {file.name: file_sha256(file) for file in (*beside, *extra)}}
        final = self._root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        if not final.exists():
            self._make(label, (*files, *extra), final)
        return final

    def check(self, label: str, copy: Checkpoint) -> None:
        """Refuses a copy whose weights are not those that it was made of; the digest is computed once in any case.

        Raises:
            CheckpointError: it is damaged.
        """
        wanted = self._wanted.get(label)
        if wanted is not None and copy.folder.parent == self._root.resolve() and copy.sha256() != wanted:
            raise CheckpointError(
                f"{copy.folder}: this copy of {label} is damaged (sha256 {copy.sha256()[:12]}, wanted {wanted[:12]}). "
                "Remove it: it is made again."
            )

    def _make(self, label: str, files: Sequence[Path], final: Path) -> None:
        waiting = "another worker that copies a parent here"
        try:
            with locked_folder(
                self._root, stale="[0-9a-f]" * 32, other=waiting, remedy="Give another --local-parents."
            ):
                if final.exists():  # another worker was first
                    return
                check_space(self._root, sum(file.stat().st_size for file in files))
                logger.info("%s: copying %s there", final, label)
                with staged_folder(final) as staging:
                    with disk_errors(final):
                        for file in files:
                            shutil.copyfile(file, staging / file.name)
                    self._check_source(label, files[0].parent, staging)
        except ExportError as error:
            if not (final / files[0].name).is_file():  # else made meanwhile, where a file system has no locks
                raise ConfigError(f"--local-parents {error}") from error

    def _check_source(self, label: str, folder: Path, staging: Path) -> None:
        """What was copied is what the study began with."""
        wanted = self._wanted.get(label)
        if wanted is not None and (found := Checkpoint.open(staging).sha256()) != wanted:
            raise ConfigError(
                f"{folder}: {label} changed since the study began (sha256 {wanted[:12]} -> {found[:12]}). "
                f"Restore it, or name its place (--set parents.{label}=FOLDER)."
            )
