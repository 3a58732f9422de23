"""Creating a study in a storage, and opening it again from there: what is frozen, and what must not have changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from search import __version__
from search.checkpoints.local_parents import LocalParents
from search.config.study_file import StudyConfig, differences
from search.errors import ConfigError, StorageError
from search.running.problem import Problem
from search.storage.database import exclusive, shown, sqlite_path
from search.storage.frozen import STUDY_SCHEMA, _stored_config, check_identity, moved_config
from search.storage.store import StudyStore


def create(
    config: StudyConfig,
    url: str,
    device: str = "auto",
    *,
    fresh: bool = False,
    problem: Problem | None = None,
    local_parents: Path | None = None,
    **options: Any,
) -> tuple[StudyStore, Problem]:
    """Creates the study, or opens it to continue if it exists with the same config.

    Args:
        fresh: refuse a study that exists already.
        problem: those of the config, opened before.
        local_parents: where copies of the parents are read from (`local_parents`); they are made if they are not there.

    Raises:
        ConfigError: the study exists with another config, or `fresh` and it exists, or its engine follows gradients
            and this model has none.
    """
    if problem is None:
        local = _local(local_parents, _begun(url, config.name) if local_parents else None)
        problem = Problem.open(config, device, local)
    if config.sampler.follows_gradients:
        _ = problem.gradient  # a model without one is refused now, not after the baselines
    _ = problem.preferences, problem.equivalence  # so is a model that judges answers and does not load
    objectives = [(metric.name, metric.maximize) for metric in problem.metrics]
    store = StudyStore.create(url, config.name, objectives, **options)
    with store.exclusive():
        stored = store.attribute("config")
        if stored is None:
            store.set_attribute("schema", STUDY_SCHEMA)
            store.set_attribute("version", __version__)
            store.set_attribute("objectives", [[name, maximize] for name, maximize in objectives])
            store.set_attribute("identity", problem.identity)
            store.set_attribute("facts", _facts(problem))
            store.set_attribute("trials", config.trials)
            store.set_attribute("tokens", config.tokens)
            store.set_attribute("config", config.to_json())  # last: its presence says that the study is whole
            return store, problem
    if fresh:
        raise ConfigError(
            f"{shown(url)}: study '{config.name}' exists. Leave out --fresh to continue it, or rename it."
        )
    changed = differences(_stored_config(store, stored), config)
    if changed:
        raise ConfigError(
            f"study '{config.name}' exists with another config: {'; '.join(changed[:6])}. "
            "Rename the study, or take the changes back."
        )
    check_identity(store, problem.identity)
    with store.exclusive():
        stored = store.attribute("config")
        if _stored_config(store, stored).tokens != config.tokens:  # else what `resume --tokens` gave stays
            store.set_attribute("tokens", config.tokens)
        if stored != config.to_json():
            # Places may have moved: other workers and `export` look where this file says.
            store.set_attribute("config", config.to_json())
    return store, problem


def reopen(
    url: str,
    name: str,
    device: str = "auto",
    overrides: Sequence[str] = (),
    *,
    local_parents: Path | None = None,
    **options: Any,
) -> tuple[StudyStore, Problem]:
    """Opens an existing study from its storage alone.

    Args:
        overrides: new places of parents and tasks (`parents.pre=...`), should they have moved.
        local_parents: as for `create`.

    Raises:
        StorageError: no such study. ConfigError: what lies at the places is not what the study began with.
    """
    store = StudyStore.open(url, name, **options)
    problem = Problem.open(moved_config(store, overrides), device, _local(local_parents, store))
    check_identity(store, problem.identity)
    return store, problem


def _local(root: Path | None, store: StudyStore | None) -> LocalParents | None:
    """Copies of the parents below `root`; of those that the study began with, if it did."""
    if root is None:
        return None
    facts = None if store is None else store.attribute("facts")
    known = {label: str(one["sha256"]) for label, one in facts["parents"].items()} if facts else {}
    return LocalParents(root, known)


def _begun(url: str, name: str) -> StudyStore | None:
    """The study, if another worker made it before; what is wrong with the storage is said when it is opened to stay."""
    path = sqlite_path(url)
    if path is not None and not path.exists():
        return None
    with suppress(StorageError), exclusive(url):  # it may be in the making
        return StudyStore.find(url, name)
    return None


def _facts(problem: Problem) -> dict[str, Any]:
    """What front, report and export must know without opening the parents."""
    return {
        "groups": [[group.name, len(group.tensors)] for group in problem.space.groups],
        "baselines": len(problem.baselines),
        "tasks": list(problem.questions.task_names),
        "questions": {"search": len(problem.questions.search), "report": len(problem.questions.report)},
        "prompts": problem.prompts
        and {"search": len(problem.prompts.search), "report": len(problem.prompts.report)},
        "parameters": problem.parents.parameters,
        "notes": problem.notes,
        "parents": problem.provenance(),
    }
