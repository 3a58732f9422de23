"""Tokens a batch: given in the study file, or measured once by a study on each kind of device."""

from __future__ import annotations

from objectives.questions.questions import closed
from search.checkpoints.placement import device_title
from search.config.study_file import StudyConfig
from search.running.problem import Problem
from search.storage.store import StudyStore


def size_batches(store: StudyStore, problem: Problem) -> int | None:
    """Sets tokens a batch to what the study's first worker on such a device measured, unless the study file says it.

    Another batch changes the last bits of a score, so a study keeps to one.

    Returns:
        The number, the first time; None once it is set.
    """
    if problem.config.batch_tokens is not None or problem.scorer.sized:
        return None
    with store.exclusive():
        return size_batches_held(store, problem)


def size_batches_held(store: StudyStore, problem: Problem) -> int | None:
    """`size_batches` for who holds the store."""
    if problem.scorer.sized:
        return None
    size = batch_tokens(store, problem.config, problem.device)
    if size is None:
        size = problem.scorer.measure(closed(problem.questions.search))
        store.set_attribute(_batch_key(problem.device), size)
    problem.scorer.use(size)
    return size


def batch_tokens(store: StudyStore, config: StudyConfig, device: str) -> int | None:
    """Tokens a batch of a study on such a device: given, or measured earlier; None if neither."""
    known = config.batch_tokens or store.attribute(_batch_key(device))
    return None if known is None else int(known)


def _batch_key(device: str) -> str:
    return f"batch_tokens:{device_title(device)}"
