"""Makes the golden study of this version: `python -m tests.golden.make`, once for every release, before its tag.

tests/golden/VERSION.db    the study as a kill left it: complete trials, a failed one, and one of a worker that is dead
tests/golden/VERSION.json  its front
tests/golden/evidence/     what its trials answered, named by content
tests/golden/{pre,post}, questions.jsonl    shared by all versions, made once: another torch may draw other numbers

Nothing that was made before is changed. tests/faults/test_golden.py opens, resumes and exports every one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import search.storage.worker
from search import __version__
from search.config.study_file import load_study_file
from search.errors import EvaluationError
from search.results.board import read_board
from search.running.launch import create
from search.running.observer import Observer, Step
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.study import run
from tests.pico_study import write_study

HERE = Path(__file__).parent
BUILD = Path("/tmp/mergefront-golden")  # the study remembers where its parents were
SHARED = ("pre", "post", "questions.jsonl")
NAME = "golden"
PARENTS = {"dtype": "float16", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}


class Fates(Observer):
    """One trial fails; the last one is killed when everything is measured and nothing told."""

    def step(self, step: Step, trial: TrialRecord) -> None:
        if (step, trial.number) == ("merged", 13):
            raise EvaluationError("question 3: not a number.")
        if (step, trial.number) == ("evidence", 22):
            os.kill(os.getpid(), signal.SIGKILL)


def _study(folder: Path) -> Path:
    return write_study(
        folder,
        parents=PARENTS,
        name=NAME,
        trials=14,
        sampler={"engine": "optuna", "name": "nsga2", "seed": 3, "population": 4},
    )


def _run(url: str) -> None:
    socket.gethostname = lambda: "golden"
    search.storage.worker._boot_id = lambda: "boot"
    search.storage.worker._pid_namespace = lambda: "namespace"
    run(*create(load_study_file(BUILD / "study.yaml"), url, "cpu"), Fates())


def main() -> None:
    """Writes the files named above."""
    database = HERE / f"{__version__}.db"
    if database.exists():
        sys.exit(f"{database}: exists. It is never made again: its version is out.")
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir()
    for name in SHARED:
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, BUILD / name)
        elif (HERE / name).exists():
            shutil.copy(HERE / name, BUILD / name)
    _study(BUILD)
    url = f"sqlite:///{BUILD / 'study.db'}"
    if (child := os.fork()) == 0:
        _run(url)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    store = StudyStore.open(url, NAME)
    states = {record.state for record in store.trials()}
    assert states == {"complete", "failed", "running"}, states
    front = json.dumps(read_board(store).to_json(), indent=1) + "\n"
    store._storage.engine.dispose()
    with closing(sqlite3.connect(BUILD / "study.db")) as connection:
        connection.execute("pragma page_size = 1024")
        connection.execute("vacuum")
    shutil.copy(BUILD / "study.db", database)
    database.with_suffix(".json").write_text(front)
    shutil.copytree(BUILD / "evidence", HERE / "evidence", dirs_exist_ok=True)
    for name in SHARED:
        if (BUILD / name).is_dir():
            shutil.copytree(BUILD / name, HERE / name, dirs_exist_ok=True)
        else:
            shutil.copy(BUILD / name, HERE / name)
    shutil.rmtree(BUILD)


if __name__ == "__main__":
    main()
