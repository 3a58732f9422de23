"""From what the study file says about a parent to a local folder. Only this module may use the network."""

from __future__ import annotations

import re
from pathlib import Path

from objectives.printable import shown
from search.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[A-Za-z0-9][\w./-]{0,127})?")
_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.*"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights, often as large again


def resolve(where: str) -> tuple[Path, str | None]:
    """A folder as it is, or a hub id `org/name[@revision]` downloaded (or found in the hub cache).

    A relative path whose first part exists here is a folder, never a hub id, so that a mistyped folder does
    not become a download. With `HF_HUB_OFFLINE=1` only the cache is used.

    Returns:
        the folder, and the commit hash when it lies in a hub cache (None for an ordinary folder).

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
    """
    folder = Path(where).expanduser() if where and "\0" not in where else None
    try:
        there = folder is not None and folder.exists()
    except OSError as error:  # a name that is too long for a file system
        raise CheckpointError(f"{shown(where[:80])}...: {error.strerror}. Give a folder.") from error
    if folder is not None and there:
        return folder, _cached_revision(folder.resolve())
    first = where.split("/", 1)[0]
    if folder is None or not _HUB_ID.fullmatch(where) or Path(first).exists():
        raise CheckpointError(
            f"{shown(where)}: no such folder. Give a folder holding config.json and *.safetensors, "
            "or a hub id such as org/name."
        )
    name, _, revision = where.partition("@")
    snapshot = _download(name, revision or None)
    return snapshot, _cached_revision(snapshot.resolve())


def _cached_revision(folder: Path) -> str | None:
    inside = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if inside else None


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    full = f"{name}@{revision}" if revision else name
    try:
        return Path(
            snapshot_download(
                repo_id=name, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except GatedRepoError as error:
        reason, fix = "the hub wants you to accept its terms", "Accept them there, then `hf auth login`."
        raise CheckpointError(f"{full}: {reason}. {fix}") from error
    except RepositoryNotFoundError as error:
        reason = "neither a folder here nor a model on the hub that you may read"
        raise CheckpointError(f"{full}: {reason}. Check the name, or `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{full}: the model has no such revision. Check what follows '@'.") from error
    except LocalEntryNotFoundError as error:
        reason = "no such folder here, not in the hub cache, and the hub cannot be reached"
        raise CheckpointError(
            f"{full}: {reason}. Check the path or the connection (HF_HUB_OFFLINE is obeyed)."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = shown((str(error) or type(error).__name__).strip().splitlines()[0])
        raise CheckpointError(f"{full}: the download failed ({reason}). Try again; it continues.") from error
