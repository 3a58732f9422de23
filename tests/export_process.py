"""A study to export from, and exporting in a child process that meets a full disk or is killed at a chosen place."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import search.merging.save
import search.storage.staging
from search.config.study_file import load_study_file
from search.export.folder import export_rows
from search.merging.blend import merging
from search.results.board import read_board
from search.running.launch import create
from search.storage.files import file_sha256
from search.storage.store import StudyStore
from search.study import run
from tests.pico import pico_tokenizer
from tests.pico_study import write_questions, write_study
from tests.study_process import context


def made_study(folder: Path, **keys: Any) -> str:
    """A finished study with 15 questions on each split; returns its storage."""
    folder.mkdir(parents=True, exist_ok=True)
    options = keys.pop("parents", {"tokenizer": pico_tokenizer(chat_template="{{ messages[0]['content'] }}")})
    path = write_study(folder, parents=options, trials=3, **keys)
    write_questions(folder / "questions.jsonl", 30)
    for parent in ("pre", "post"):
        (folder / parent / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "post" / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 7}')
    url = f"sqlite:///{folder / 'study.db'}"
    store, problem = create(load_study_file(path), url, "cpu")
    run(store, problem)
    return url


def tree(folder: Path) -> dict[str, str]:
    """Every file below with its digest."""
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def exported(url: str, out: Path, trial: int, *, weights: bool = True, **options: Any) -> Path:
    """Exports one trial of the study `pico`; returns its folder."""
    store = StudyStore.open(url, "pico")
    board = read_board(store)
    options = {"overwrite": False, "overrides": [], **options}
    return export_rows(store, board, [board.row(trial)], out, weights=weights, **options)[0]


def in_child(url: str, out: Path, trial: int, prepare: Callable[[], None], **options: Any) -> tuple[Any, Any]:
    """Starts an export in a child that first calls `prepare`; returns the process and its outcome's queue."""
    queue = context.SimpleQueue()
    process = context.Process(target=_outcome, args=(url, str(out), trial, prepare, options, queue))
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
    setattr(search.storage.staging, "_put", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010


def kill_between_the_renames() -> None:
    """The old export is aside, the new one not yet in its place."""
    rename = os.rename

    def strike(source: Any, target: Any) -> None:
        rename(source, target)
        if str(target).endswith(".old"):
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, "rename", strike)  # noqa: B010
