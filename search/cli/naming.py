"""What `NAME` and `--storage` of a command stand for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.storage.store import StudyStore


def study_name(name: str) -> str:
    """`NAME` is a study's name or its study file."""
    if name.endswith((".yaml", ".yml")) or os.sep in name:
        from search.config.study_file import load_study_file

        return load_study_file(Path(name)).name
    return name


def storage_url(storage: str | None, name: str) -> str:
    """The storage that was given, that of the environment, or a file below the current folder."""
    given = storage or os.environ.get("MERGEFRONT_STORAGE") or os.environ.get("OPTUNA_STORAGE")
    return given or f"sqlite:///{Path('runs') / name / 'study.db'}"


def open_study(name: str, storage: str | None) -> StudyStore:
    """An existing study.

    Raises:
        StorageError: there is none of that name, or its launch was cut off before its first trial.
    """
    from search.storage.frozen import stored_config
    from search.storage.store import StudyStore

    store = StudyStore.open(storage_url(storage, study_name(name)), study_name(name))
    stored_config(store)
    return store
