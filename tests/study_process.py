"""Running a study in a child process that ends in an ugly way, at a chosen step or at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from search.config.study_file import load_study_file
from search.errors import MergefrontError
from search.interrupt import Interrupted, interruptible, pause
from search.results.board import read_board
from search.running.launch import create
from search.running.observer import Observer, Step
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run

# Children are forked from a server that imported everything and computed nothing: no start-up, no threads.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "tests.study_process",
        "tests.export_process",
        "search.merging.live",
    ]
)

AFTER_TELL = "told"
EVALUATING = "evaluating"
REPORTING = "reporting"
STEPS = ("asked", "merging", "merged", EVALUATING, "evaluated", "evidence", AFTER_TELL)


class Striker(Observer):
    """Calls `strike` whenever a trial of at least this number reaches a step.

    Args:
        diary: a file that gets a line `PID STEP NUMBER` for every step, whatever happens to the process afterwards.
    """

    def __init__(self, step: str, number: int, strike: Callable[[], None], diary: str = "") -> None:
        self._at, self._number, self._strike, self._diary = step, number, strike, diary
        self._trial = -1

    def _reached(self, step: str) -> None:
        if self._diary:
            with open(self._diary, "a") as stream:
                stream.write(f"{os.getpid()} {step} {self._trial}\n")
        if step == self._at and self._trial >= self._number:
            self._strike()

    def step(self, step: Step, trial: TrialRecord) -> None:
        self._trial = trial.number
        self._reached(step)

    def evaluating(self, done: int, of: int) -> None:
        self._reached(EVALUATING)

    def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
        self._reached(AFTER_TELL)

    def stopped(self, trial: TrialRecord, reason: str) -> None:
        self._reached(AFTER_TELL)

    def reporting(self, done: int, of: int) -> None:
        self._reached(REPORTING)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    pause(10)  # the handler raises here


@dataclass
class TerminateAfter:
    """SIGTERM after so many lines of Python code, whosever, from the first call on."""

    lines: int

    def __call__(self) -> None:
        if sys.gettrace() is None:
            sys.settrace(self._called)

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self.lines -= 1
        if self.lines == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return self._line


def nothing() -> None:
    """No harm."""


def _run(
    study: str,
    url: str,
    step: str,
    number: int,
    strike: Callable[[], None],
    before: Callable[[], None],
    diary: str,
    options: dict[str, Any],
) -> None:
    before()
    try:
        with interruptible():
            store, problem = create(load_study_file(Path(study)), url, "cpu", **options)
            run(store, problem, Striker(step, number, strike, diary))
    except Interrupted as stop:
        os._exit(stop.exit_code)
    except MergefrontError as error:
        if diary:
            _errors(diary).write_text(str(error))
        os._exit(error.exit_code)


def _errors(diary: Path | str) -> Path:
    return Path(f"{diary}.error")


def said(diary: Path) -> str:
    """The error that ended the last process which wrote this diary and ended with one."""
    return _errors(diary).read_text()


def start(
    study: Path,
    url: str,
    step: str = "",
    number: int = 0,
    strike: Callable[[], None] = kill_self,
    *,
    before: Callable[[], None] = nothing,
    diary: Path | str = "",
    forked: bool = False,
    **options: Any,
) -> Any:
    """Starts a run in a child process that strikes at `step` of the trials from `number` on.

    Args:
        before: what the child does first. diary: as in `Striker`.
        forked: from this process, which must be a child that computed nothing, to see the disks that it mounted.
        options: of `create`, such as `grace`.
    """
    arguments = (str(study), url, step, number, strike, before, str(diary), options)
    process = (multiprocessing.get_context("fork") if forked else context).Process(
        target=_run, args=arguments
    )
    process.start()
    return process


def ended(process: Any, seconds: float = 120) -> int:
    """Its exit code, negative for a signal."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the study did not end within {seconds} s")
    return int(process.exitcode)


def merges(diary: Path) -> Counter[int]:
    """How often each trial was merged for the search split, from the diary of all processes that ran the study."""
    count: Counter[int] = Counter()
    reporting = set()
    for line in diary.read_text().splitlines():
        process, step, number = line.split()
        if step == REPORTING:
            reporting.add(process)
        elif step == "merging" and process not in reporting:
            count[int(number)] += 1
    return count


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def sound(url: str) -> bool:
    """Whether SQLite finds its file whole."""
    database = sqlite3.connect(url.removeprefix("sqlite:///"))
    try:
        return bool(database.execute("pragma integrity_check").fetchone() == ("ok",))
    finally:
        database.close()


def results(url: str, name: str = "pico") -> dict[int, Any]:
    """What must stay as it is of every finished trial, by number."""
    return {
        t.number: (t.state, t.values, dict(t.coefficients), t.attributes.get("evidence"))
        for t in StudyStore.open(url, name).trials()
        if t.finished
    }


def whole(url: str, name: str = "pico") -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """What two equal studies have in common: front JSON, and every trial with recipe, state, values and tags."""
    store = StudyStore.open(url, name)
    trials = [
        (t.number, t.kind, t.state, dict(t.coefficients), t.values, dict(t.tags)) for t in store.trials()
    ]
    return read_board(store).to_json(), trials
