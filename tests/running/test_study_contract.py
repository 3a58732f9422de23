"""Whole studies of a pico model in every kind of storage: the same front, the same commands, the same budgets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.merging.baselines import BASELINES
from search.results.board import read_board
from search.results.status import read_status
from search.running.budget import set_budget, set_tokens
from search.running.launch import create, reopen
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.pico_study import write_study
from tests.postgresql_server import Server
from tests.study_process import ended, results, start, whole

FIRST = len(BASELINES)
TRIALS = 4


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sampler = {"engine": "optuna", "name": "nsga2", "seed": 5, "population": 12}
    return write_study(tmp_path_factory.mktemp("study"), trials=TRIALS, sampler=sampler)


@pytest.fixture(scope="module")
def uninterrupted(study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage of the same study that ran in one go; read it, do not change it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('uninterrupted') / 'study.db'}"
    assert ended(start(study, url)) == 0
    return url


def share_evidence(folder: str | None) -> None:
    """For a child, whose environment is older than the test."""
    if folder is not None:
        os.environ["MERGEFRONT_EVIDENCE"] = folder


class TestStudies:
    """`storage_url` is a new storage of either kind."""

    def test_killed_and_resumed_it_is_the_study_that_was_not(
        self, study: Path, uninterrupted: str, storage_url: str
    ) -> None:
        """Oracle: front JSON and all trials of the study that ran in one go, in a SQLite file."""
        share = partial(share_evidence, os.environ.get("MERGEFRONT_EVIDENCE"))
        before: dict[int, object] = {}
        for step, number in (("merged", 3), ("evidence", FIRST + 1)):
            assert ended(start(study, storage_url, step, number, before=share)) == -signal.SIGKILL
            after = results(storage_url)
            assert before.items() <= after.items()
            before = after
        assert ended(start(study, storage_url, before=share)) == 0
        assert whole(storage_url) == whole(uninterrupted)
        again = results(storage_url)
        assert ended(start(study, storage_url, before=share)) == 0
        assert results(storage_url) == again, "a finished study is left as it is"

    @pytest.mark.slow
    def test_two_workers_meet_one_budget_exactly(self, study: Path, storage_url: str) -> None:
        share = partial(share_evidence, os.environ.get("MERGEFRONT_EVIDENCE"))
        both = [start(study, storage_url, before=share) for _ in range(2)]
        assert [ended(process) for process in both] == [0, 0]
        trials = StudyStore.open(storage_url, "pico").trials()
        assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(FIRST + TRIALS)]

    def test_budgets_of_trials_and_tokens(self, study: Path, storage_url: str) -> None:
        store, problem = create(load_study_file(study), storage_url, "cpu")
        set_budget(store, 1)
        run(store, problem, report=False)
        assert len(store.trials()) == FIRST + 1
        assert set_budget(store, "+2") == 3
        store, problem = reopen(storage_url, "pico", "cpu")
        run(store, problem, report=False)
        assert len(store.trials()) == FIRST + 3
        spent = [t.tokens for t in store.trials()]
        assert len(set(spent)) == 1, "every trial scores the same questions"
        set_budget(store, "+5")
        set_tokens(store, sum(spent) + 2 * spent[0] + 1)
        run(store, problem, report=False)
        assert len(store.trials()) == FIRST + 5, "two more could be paid"
        assert read_status(store).to_json()["trials"]["complete"] == FIRST + 5
        with pytest.raises(ConfigError, match=r"space\.high: 1\.2 -> 1\.5"):
            create(load_study_file(study, ["space.high=1.5"]), storage_url, "cpu")

    def test_the_commands(self, study: Path, storage_url: str, cli: Cli, tmp_path: Path) -> None:
        """Launch, status, resume, front, report, export and verify; the password stays where it was given."""
        where = ("--storage", storage_url)
        printed = [cli("launch", study, *where)]
        printed.append(cli("resume", "pico", *where))
        printed.append(cli("status", "pico", *where, "--json"))
        assert json.loads(printed[-1][1])["trials"]["complete"] == FIRST + TRIALS
        printed.append(cli("front", "pico", *where, "--format", "json"))
        assert json.loads(printed[-1][1]) == read_board(StudyStore.open(storage_url, "pico")).to_json()
        printed.append(cli("report", "pico", *where, "--out", tmp_path / "report"))
        printed.append(
            cli("export", "pico", *where, "--select", "knee", "--weights", "--out", tmp_path / "export")
        )
        printed.append(cli("verify", tmp_path / "export", *where))
        assert [code for code, _, _ in printed] == [0] * len(printed), printed
        assert "next: mergefront report pico --storage" in printed[0][2]
        if storage_url.startswith("postgresql"):
            password = storage_url.partition("@")[0].rpartition(":")[2]
            assert not [text for _, out, err in printed for text in (out, err) if password in text]
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert len(files) > 20
            assert not [path for path in files if password.encode() in path.read_bytes()]


@pytest.mark.slow
def test_processes_of_the_command_line_on_a_server(
    study: Path, postgresql: Server, postgresql_url: str, tmp_path: Path
) -> None:
    """`launch --workers 2` as users start it; nobody who lists processes or reads files finds the password."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "search.cli.main", *map(str, arguments)]
        environment = {**os.environ, "MERGEFRONT_STORAGE": postgresql_url}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert postgresql.password not in done.stdout + done.stderr
        return done

    call("--log-file", tmp_path / "log", "launch", study, "--workers", "2", "--storage", postgresql_url)
    call("resume", "pico", "--trials", "+2", "--workers", "2")
    trials = StudyStore.open(postgresql_url, "pico").trials()
    assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(FIRST + TRIALS + 2)]
    assert json.loads(call("status", "pico", "--json").stdout)["trials"]["complete"] == len(trials)
    call("front", "pico")
    call("export", "pico", "--select", "knee", "--out", tmp_path / "export")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if postgresql.password.encode() in path.read_bytes()]
