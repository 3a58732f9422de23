"""Where questions come from: JSON lines, `datasets` folders, or the hub. Yields rows; knows no formats."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from objectives.errors import ConfigError

HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?$")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Rows:
    """The rows of one split, each with the place an error names, e.g. `mine.jsonl:3`."""

    rows: tuple[tuple[str, dict[str, Any]], ...]


@dataclass(frozen=True)
class Source:
    """One set of questions to score and, when another split of it was asked for and found, the examples.

    Attributes:
        rows: the scored split. split: its name, None for a file or a folder without splits.
        examples: rows of the few-shot split, None when examples come from the front of `rows`.
        examples_split: its name.
    """

    rows: Rows
    split: str | None
    examples: Rows | None = None
    examples_split: str | None = None
    notes: tuple[str, ...] = field(default=())


def read_sources(
    path: str,
    *,
    where: str,
    split: str | None,
    subset: str | None,
    default_split: str | None = None,
    default_subset: str | None = None,
    fewshot: tuple[str, ...] = (),
    all_subsets: bool = False,
) -> list[Source]:
    """Opens what `path` names: a JSON lines file, a `datasets` folder, or a hub id (`name`, `org/name`, `@revision`).

    A folder may be one saved `Dataset`, a folder of splits (a saved `DatasetDict` too), or a folder of
    subsets that hold splits. Only a path that does not exist here and reads like a hub id uses the network.

    Args:
        where: how messages name the task, e.g. `tasks[0]`.
        split, subset: as configured; the defaults apply where the folder has them.
        fewshot: names of splits to take examples from, in order of preference; empty for none.
        all_subsets: without a subset, one Source per subset of the folder.

    Raises:
        ConfigError: naming the path and, in a file, the line.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if split is not None or subset is not None:
            raise ConfigError(
                f"{where}: '{path}' is a file and has no splits or subsets. Remove split and subset."
            )
        return [Source(Rows(tuple(_json_lines(place))), None)]
    if place.is_dir():
        wanted = (split, default_split)
        folders = _subset_folders(place, where, subset, default_subset, all_subsets)
        return [_from_folder(folder, where, wanted, fewshot) for folder in folders]
    if place.exists():
        raise ConfigError(f"{where}.path: '{path}' is neither a file nor a folder. Give one of them.")
    looks_local = path.startswith((".", "/", "~")) or path.endswith(JSON_SUFFIXES)
    if looks_local or not HUB_ID.match(path):
        raise ConfigError(
            f"{where}.path: no such file or folder: '{path}'. Give JSON lines, a dataset folder or a hub id."
        )
    return [_from_hub(path, where, split or default_split, subset or default_subset, fewshot)]


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = True
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            where = f"{path}:{line}"
            try:
                content = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{where}: not UTF-8 text ({error.reason}). Save the file as UTF-8."
                ) from None
            if not content.strip():
                continue
            try:
                row = json.loads(content, object_pairs_hook=_unique_keys)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
                raise ConfigError(
                    f"{where}: not a line of JSON ({reason}). Write one object per line."
                ) from None
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{where}: {type(row).__name__} instead of an object. Write one object per line."
                )
            empty = False
            yield where, row
    if empty:
        raise ConfigError(f"{path}: holds no questions. Write one JSON object per line.")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is given twice")
    return row


def _is_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _children(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _has_splits(folder: Path) -> bool:
    return _is_dataset(folder) or any(map(_is_dataset, _children(folder)))


def _subset_folders(
    folder: Path, where: str, subset: str | None, default: str | None, all_subsets: bool
) -> list[Path]:
    """The folders that hold splits: `folder` itself, or below it the chosen subset or all of them."""
    if _has_splits(folder):
        if subset is not None and subset != folder.name:
            raise ConfigError(
                f"{where}.subset: '{folder}' holds splits, no subsets. Remove subset or give its parent."
            )
        return [folder]
    found = [child for child in _children(folder) if _has_splits(child)]
    names = [child.name for child in found]
    if not found:
        raise ConfigError(
            f"{where}.path: no dataset in folder '{folder}' (no state.json in it or one or two levels below). "
            "Give a folder written by datasets' save_to_disk."
        )
    if subset is not None and subset not in names:
        raise ConfigError(f"{where}.subset: '{subset}' is not in '{folder}' (found: {_some(names)}).")
    chosen = subset or (default if default in names else None)
    if chosen is not None:
        return [found[names.index(chosen)]]
    if all_subsets or len(found) == 1:
        return found
    raise ConfigError(f"{where}.subset: '{folder}' holds {len(found)} subsets. Choose one: {_some(names)}.")


def _from_folder(
    folder: Path, where: str, wanted: tuple[str | None, str | None], fewshot: tuple[str, ...]
) -> Source:
    split, default = wanted
    if _is_dataset(folder):
        if split is not None and split != folder.name:
            raise ConfigError(f"{where}.split: '{folder}' is one dataset without splits. Remove split.")
        # A folder that is called like a split is taken to be it, so that `test` is noticed.
        return Source(_disk_rows(folder), folder.name if split or folder.name == "test" else None)
    splits = {child.name: child for child in _children(folder) if _is_dataset(child)}
    if split is not None and split not in splits:
        raise ConfigError(f"{where}.split: '{split}' is not in '{folder}' (found: {_some(list(splits))}).")
    chosen = (
        split
        or (default if default in splits else None)
        or (next(iter(splits)) if len(splits) == 1 else None)
    )
    if chosen is None:
        raise ConfigError(
            f"{where}.split: '{folder}' holds {len(splits)} splits. Choose one: {_some(list(splits))}."
        )
    other = next((name for name in fewshot if name in splits and name != chosen), None)
    return Source(
        _disk_rows(splits[chosen]), chosen, _disk_rows(splits[other]) if other is not None else None, other
    )


def _disk_rows(folder: Path) -> Rows:
    import datasets

    _refuse_outside_files(folder)
    try:
        data = datasets.load_from_disk(str(folder))
        rows = tuple((f"{folder} row {i}", dict(row)) for i, row in enumerate(data))
    except Exception as error:  # the reader raises whatever its parts raise: Arrow, OS, JSON, key errors
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{folder}: cannot be read as a dataset ({type(error).__name__}: {reason})."
        ) from error
    if not rows:
        raise ConfigError(f"{folder}: holds no rows. Choose another split.")
    return Rows(rows)


def _refuse_outside_files(folder: Path) -> None:
    """The data files a dataset folder names must lie in it."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{folder / 'state.json'}: broken ({type(error).__name__}). Save the data again."
        ) from None
    for name in names:
        if not isinstance(name, str) or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder / 'state.json'}: data file {name!r} is not in this folder. Refused.")


def _from_hub(
    path: str, where: str, split: str | None, subset: str | None, fewshot: tuple[str, ...]
) -> Source:
    import datasets

    name, _, revision = path.partition("@")
    options = {"name": subset, "revision": revision or None}
    try:
        splits = datasets.get_dataset_split_names(name, subset, revision=revision or None)
        chosen = split or (splits[0] if len(splits) == 1 else None)
        if chosen not in splits:
            raise ConfigError(
                f"{where}.split: '{chosen}' is not in hub dataset '{path}' (found: {_some(splits)})."
            )
        other = next((one for one in fewshot if one in splits and one != chosen), None)
        loaded = {one: datasets.load_dataset(name, split=one, **options) for one in (chosen, other) if one}
    except ConfigError:
        raise
    except Exception as error:  # network, permission, unknown name, script-based dataset
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{where}.path: '{path}' is no file or folder here, and as a hub dataset it cannot be read "
            f"({type(error).__name__}: {reason})."
        ) from error
    rows = {
        one: Rows(tuple((f"{path} [{one}] row {i}", dict(row)) for i, row in enumerate(data)))
        for one, data in loaded.items()
    }
    examples = rows[other] if other is not None else None
    return Source(rows[chosen], chosen, examples, other, (f"{where}: questions read from the hub: '{path}'",))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown}, and {len(names) - 12} more"
