"""Running a study in a child process that ends in an ugly way, at a chosen step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from search.board import read_board
from search.config import load_study_file
from search.interrupt import Interrupted, interruptible
from search.observer import Observer, Step
from search.opening import create
from search.storage import StudyStore, TrialRecord
from search.study import run

# Children are forked from a server that imported everything and computed nothing: no start-up, no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "tests.study_process",
        "search.merging.live",
    ]
)

AFTER_TELL = "told"
EVALUATING = "evaluating"
STEPS = ("asked", "merging", "merged", EVALUATING, "evaluated", "evidence", AFTER_TELL)


class Striker(Observer):
    """Calls `strike` when a trial of at least this number reaches a step."""

    def __init__(self, step: str, number: int, strike: Callable[[], None]) -> None:
        self._at, self._number, self._strike = step, number, strike
        self._trial = -1

    def _reached(self, step: str) -> None:
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


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_self() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # the handler raises here


def _run(
    study: str, url: str, step: str, number: int, strike: Callable[[], None], options: dict[str, Any]
) -> None:
    try:
        with interruptible():
            store, materials = create(load_study_file(Path(study)), url, "cpu", **options)
            run(store, materials, Striker(step, number, strike))
    except Interrupted as stop:
        os._exit(stop.exit_code)


def start(
    study: Path,
    url: str,
    step: str = "",
    number: int = 0,
    strike: Callable[[], None] = kill_self,
    **options: Any,
) -> Any:
    """Starts a run in a child process that strikes at `step` of the first trial from `number` on."""
    process = _context.Process(target=_run, args=(str(study), url, step, number, strike, options))
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


def whole(url: str, name: str = "pico") -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """What two equal studies have in common: front JSON, and every trial with recipe, state, values and tags."""
    store = StudyStore.open(url, name)
    trials = [
        (t.number, t.kind, t.state, dict(t.coefficients), t.values, dict(t.tags)) for t in store.trials()
    ]
    return read_board(store).to_json(), trials
