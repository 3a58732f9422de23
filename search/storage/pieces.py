"""Finished pieces of work on disk: one safetensors file each, named by everything that its content depends on.

A piece is written whole or not at all, and its content is compared with its digest when it is read: a torn or changed
file counts as missing. So work goes on where a killed process left it, and nothing is computed twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from objectives.printable import shown
from search.storage.files import unique_pairs
from search.storage.staging import disk_errors, locked_folder, write_whole

logger = logging.getLogger("mergefront")

FORMAT = 1  # part of every name: another way to compute a piece makes another file
_KEY = "mergefront"  # one only: the library writes several metadata in random order


class PieceStore:
    """A folder of pieces. A piece is a few tensors, found again by its facts: what it was computed from.

    Args:
        folder: made at the first `writing`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the folder for this process; another one that wants to write waits, then finds all pieces there.

        Raises:
            ExportError: there is a file of this name. DiskError: the folder cannot be made.
        """
        with locked_folder(self.folder):
            for part in self.folder.glob(".*.safetensors.*.part"):  # of a killed process
                part.unlink(missing_ok=True)
            yield

    def path(self, kind: str, facts: Mapping[str, Any]) -> Path:
        """Where the piece lies, or would lie: its kind, and the SHA-256 of its facts."""
        return self.folder / f"{kind}-{digest_of({'format': FORMAT, 'kind': kind, **facts})}.safetensors"

    def read(self, kind: str, facts: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """The tensors of a piece on the CPU; None if there is none, or if it is damaged, which is logged.

        Raises:
            DiskError: the file is there and cannot be read.
        """
        path = self.path(kind, facts)
        if not path.exists():
            return None
        with disk_errors(path):
            content = path.read_bytes()
        try:
            header = json.loads(
                content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=unique_pairs
            )
            stored = json.loads(header["__metadata__"][_KEY])
            tensors: dict[str, torch.Tensor] = load(content)
            if stored["facts"] != json.loads(_canonical(facts)):
                raise ValueError("it belongs to other facts")
            if stored["sha256"] != _digest(tensors):
                raise ValueError("its content does not match its digest")
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as problem:
            reason = shown(str(problem) or type(problem).__name__)
            logger.warning("%s: damaged (%s); it is computed again", path, reason)
            return None
        return tensors

    def write(self, kind: str, facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Stores a piece; equal tensors and facts give equal bytes.

        Raises:
            DiskError: no space or no permission; an earlier file stays as it was.
        """
        path = self.path(kind, facts)
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        note = {"facts": json.loads(_canonical(facts)), "sha256": _digest(own)}
        with disk_errors(path):
            write_whole(path, save(own, metadata={_KEY: _canonical(note)}))


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of anything that JSON can hold; the order of keys does not matter.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(_canonical(facts).encode()).hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    return _digest({"": tensor.detach().cpu().contiguous()})


def _canonical(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
