"""Exporting in a child process that meets a full disk or is killed at a chosen place."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import search.merging.save
import search.staging
from search.board import read_board
from search.export import export_rows
from search.merging.blend import merging
from search.storage import StudyStore

# Children are forked from a server that has imported everything and computed nothing.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "tests.study_process",
        "tests.export_process",
    ]
)


def exported(url: str, out: Path, trial: int, *, weights: bool = True, **options: Any) -> Path:
    """Exports one trial of the study `pico`; returns its folder."""
    store = StudyStore.open(url, "pico")
    board = read_board(store)
    options = {"overwrite": False, "overrides": [], **options}
    return export_rows(store, board, [board.row(trial)], out, weights=weights, **options)[0]


def in_child(url: str, out: Path, trial: int, prepare: Callable[[], None], **options: Any) -> tuple[Any, Any]:
    """Starts an export in a child that first calls `prepare`; returns the process and its outcome's queue."""
    queue = _context.SimpleQueue()
    process = _context.Process(target=_outcome, args=(url, str(out), trial, prepare, options, queue))
    process.start()
    return process, queue


def _outcome(
    url: str, out: str, trial: int, prepare: Callable[[], None], options: dict[str, Any], queue: Any
) -> None:
    prepare()
    try:
        exported(url, Path(out), trial, **options)
    except Exception as error:
        queue.put((type(error).__name__, str(error)))
    else:
        queue.put(("", ""))


def nothing() -> None:
    """No harm."""


def limit_files() -> None:
    """No file may grow beyond 60 kB: the checkpoint of a pico model does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def kill_in_the_middle() -> None:
    """At the tenth tensor."""
    calls: list[int] = []

    def strike(*arguments: Any) -> Any:
        for name, fill in merging(*arguments):
            calls.append(1)
            if len(calls) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, fill

    setattr(search.merging.save, "merging", strike)  # noqa: B010


def kill_before_the_rename() -> None:
    """Everything is written and synced."""
    setattr(search.staging, "_put", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010


def kill_between_the_renames() -> None:
    """The old export is aside, the new one not yet in its place."""
    rename = os.rename

    def strike(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(".old"):
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, "rename", strike)  # noqa: B010
