"""Digests, and JSON that is read without trusting it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from objectives.printable import shown
from search.errors import CheckpointError

_MAX_JSON = 64 * 2**20  # bytes; the index of the largest public models has a few megabytes


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal text."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; no key twice, 64 MiB at most. Raises CheckpointError."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes (at most {_MAX_JSON}). Is it really {path.name}?"
            )
        parsed = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_pairs)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON ({shown(str(error))}). Download it again.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(
            f"{path}: a JSON {type(parsed).__name__} (wanted an object). Download it again."
        )
    return parsed


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for `json.loads` that refuses a key given twice (ValueError)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key '{shown(key)}' is given twice")
            seen.add(key)
    return result
