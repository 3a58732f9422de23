"""What a study was begun with, and that it has not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.config.strict_yaml import apply_overrides
from search.config.study_file import StudyConfig, differences, parse_study
from search.errors import ConfigError, StorageError
from search.storage.database import shown
from search.storage.store import StudyStore

STUDY_SCHEMA = 1


def read_config(url: str, name: str) -> StudyConfig | None:
    """The frozen config of a study that may not exist yet."""
    try:
        return stored_config(StudyStore.open(url, name))
    except StorageError:
        return None


def stored_config(store: StudyStore) -> StudyConfig:
    """The frozen config of a study."""
    return _stored_config(store, store.attribute("config"))


def moved_config(store: StudyStore, overrides: Sequence[str]) -> StudyConfig:
    """The frozen config of a study, with new places of parents and tasks.

    Raises:
        ConfigError: an override names anything else than a place.
    """
    stored = stored_config(store)
    value = stored.to_json()
    apply_overrides(value, overrides)
    config = parse_study(value, f"study '{store.name}'")
    changed = differences(stored, config)
    if config.trials != stored.trials:
        changed = ["trials (give --trials instead)"]
    if config.tokens != stored.tokens:
        changed = ["tokens (give --tokens instead)"]
    if changed:
        raise ConfigError(f"study '{store.name}': only places may be set when resuming, found {changed[0]}.")
    return config


def _stored_config(store: StudyStore, value: object) -> StudyConfig:
    if value is None:
        raise StorageError(
            f"{shown(store.url)}: study '{store.name}' was never launched to its end. Launch it again."
        )
    schema = store.attribute("schema")
    if schema != STUDY_SCHEMA:
        raise StorageError(
            f"{shown(store.url)}: study '{store.name}' has schema {schema}, this mergefront reads {STUDY_SCHEMA}. "
            "Use the version that wrote it."
        )
    return parse_study(value, f"{shown(store.url)}: study '{store.name}'")


def check_identity(store: StudyStore, found: Mapping[str, str]) -> None:
    """Compares digests of parents, questions or groups with those that the study began with.

    Raises:
        ConfigError: one differs.
    """
    began = store.attribute("identity")
    for what, digest in found.items():
        if began.get(what) != digest:
            raise ConfigError(
                f"study '{store.name}': {what} changed since it began (sha256 {str(began.get(what))[:12]} -> "
                f"{digest[:12]}). Restore them, name their place (--set parents.pre=FOLDER), or rename the study."
            )
