"""`manifest.json`: what an export holds, file by file, and where its numbers come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from objectives.printable import shown
from search.errors import CheckpointError, ExportError
from search.storage.files import file_sha256, read_json

MANIFEST = "manifest.json"
FORMAT = "mergefront-export-1"
MERGE = "merge"  # `kind` of a one-off merge; a trial's kind is another


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest over every file in the folder. Nothing may be written after it.

    Raises:
        OSError: the disk refused.
    """
    files = {
        name: {"sha256": file_sha256(folder / name), "size": (folder / name).stat().st_size}
        for name in _files(folder)
    }
    text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every file compared to it: none missing, none more, none changed.

    Raises:
        ExportError: no manifest, another format, or a difference; names the file and both digests.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ExportError(f"{folder}: no {MANIFEST}. Give a folder that mergefront export or merge made.")
    try:
        manifest = read_json(path)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if manifest.get("format") != FORMAT:
        raise ExportError(
            f"{path}: format is {shown(repr(manifest.get('format')))}, wanted '{FORMAT}'. "
            "Use the version of mergefront that made it."
        )
    listed = _listed(path, manifest.get("files"))
    found = _files(folder)
    for name in sorted(listed.keys() | set(found)):
        if name not in listed:
            raise ExportError(f"{folder / shown(name)}: is not in the manifest. Remove it, or export again.")
        if name not in found:
            raise ExportError(
                f"{folder / shown(name)}: the manifest lists it but it is missing. Export again."
            )
    for name, (digest, size) in listed.items():
        actual = (folder / name).stat().st_size
        if actual != size:
            raise ExportError(
                f"{folder / name}: was changed: {actual} bytes, the manifest says {size}. Export again."
            )
        read = file_sha256(folder / name)
        if read != digest:
            raise ExportError(
                f"{folder / name}: was changed: sha256 {read[:16]}..., the manifest says {digest[:16]}.... "
                "Export again."
            )
    return manifest


def _files(folder: Path) -> list[str]:
    """All files below, as POSIX paths, without the manifest itself. Links are refused: they could lead anywhere."""
    found = []
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (Path(path) / name).is_symlink():
                raise ExportError(f"{Path(path) / name}: is a link; an export holds files only. Remove it.")
        found += [(Path(path) / name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in found if name != MANIFEST)


def _listed(path: Path, files: object) -> dict[str, tuple[str, int]]:
    """name -> (sha256, size) of the manifest, each name a plain path that stays in the folder."""
    if not isinstance(files, dict):
        raise ExportError(f"{path}: has no list of files. Export again.")
    listed = {}
    for name, entry in files.items():
        parts = name.split("/")
        if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise ExportError(f"{path}: '{shown(name)}' leads out of the folder. Do not use this export.")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ExportError(f"{path}: {shown(name)} has no sha256 and size. Export again.")
        listed[name] = (digest, size)
    return listed
