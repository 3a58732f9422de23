"""Evidence on disk: arrays and a few words about them in one safetensors file, whole or absent, named by its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from objectives.errors import DiskError, EvaluationError
from objectives.printable import printable

Arrays = dict[str, npt.NDArray[Any]]


def write_evidence(
    path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> str:
    """Writes a safetensors file: staged beside, synced, renamed. Equal contents give equal bytes.

    Args:
        metadata: `format` says what the file is, `about` (of evaluations: `questions`) what was measured:
            `read_evidence` checks both.

    Returns:
        SHA-256 of the file, in hex.

    Raises:
        DiskError: the file cannot be written; an earlier one stays as it was.
    """
    from safetensors.numpy import save

    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    content = _with_metadata(save(ordered), metadata)
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with staged.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, target)
        _sync_folder(target.parent)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise DiskError(f"{target}: cannot be written ({error.strerror}). Make room for it.") from error
    return hashlib.sha256(content).hexdigest()


def read_evidence(
    path: str | os.PathLike[str], wanted: str, *, sha256: str | None = None, about: str | None = None
) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of what `write_evidence` wrote.

    Args:
        wanted: the `format` it must have.
        sha256: what `write_evidence` returned; None skips the comparison.
        about: the digest of what it must be about; None skips the comparison.

    Raises:
        EvaluationError: no such file, another content, another format, or about something else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    where = Path(path)
    try:
        content = where.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{where}: cannot be read ({error.strerror}).") from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise EvaluationError(f"{where}: SHA-256 is not the recorded {sha256[:12]}...: the file was changed.")
    try:
        arrays: Arrays = load(content)
        metadata = _metadata(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise EvaluationError(f"{where}: no evidence file ({printable(str(error), limit=200)}).") from error
    if (named := metadata.get("format")) != wanted:
        raise EvaluationError(f"{where}: format is '{printable(str(named), limit=60)}', wanted '{wanted}'.")
    found = metadata.get("about", metadata.get("questions", ""))
    if about is not None and found != about:
        raise EvaluationError(
            f"{where}: is about other questions or settings ({printable(found[:12])}..., wanted {about[:12]}...)."
        )
    return arrays, metadata


def checked_array(
    where: object, arrays: Mapping[str, npt.NDArray[Any]], name: str, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """`arrays[name]`; EvaluationError when it is missing or of another dtype."""
    if name not in arrays or arrays[name].dtype != dtype:
        found = arrays[name].dtype if name in arrays else "nothing"
        raise EvaluationError(f"{where}: array '{name}' is {found}, wanted {np.dtype(dtype)}.")
    return arrays[name]


def _with_metadata(content: bytes, metadata: Mapping[str, str]) -> bytes:
    """Puts metadata into a safetensors header; the library's own writer orders it differently in every run."""
    size = int.from_bytes(content[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(content[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    return {str(k): str(v) for k, v in json.loads(content[8 : 8 + size]).get("__metadata__", {}).items()}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
