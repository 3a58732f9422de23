"""Shared fixtures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from search.config.study_file import load_study_file
from search.running.launch import create
from search.study import run
from tests.fault_table import (  # noqa: F401 -- hooks and a fixture
    fault,
    pytest_configure,
    pytest_runtest_teardown,
)
from tests.pico import save_pico
from tests.pico_study import write_study
from tests.storages import postgresql, postgresql_url, storage_url  # noqa: F401 -- fixtures

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Pico models are too small to share: threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One checkpoint in a single file and the same one in several shards; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("saved")
    return save_pico(folder / "single"), save_pico(folder / "sharded", shards=3)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study file and the storage in which it ran to its end; read it, do not change it."""
    study = write_study(tmp_path_factory.mktemp("finished"), trials=8)
    url = f"sqlite:///{study.parent / 'runs' / 'study.db'}"
    run(*create(load_study_file(study), url, "cpu"))
    return study, url


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Cli]:
    """Calls the command line in this process, in an empty folder: exit code, stdout, stderr."""
    from search.cli.console import stderr_console
    from search.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MERGEFRONT_STORAGE", raising=False)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        stderr_console.cache_clear()
        monkeypatch.setattr("sys.argv", ["mergefront", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    yield call
    stderr_console.cache_clear()
    logging.getLogger("mergefront").handlers.clear()
    logging.getLogger("mergefront").propagate = True
