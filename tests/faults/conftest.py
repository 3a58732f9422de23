"""A study for the tests that end it in ugly ways, and the same study left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pico_study import write_study
from tests.study_process import ended, start, url_in

TRIALS = 10


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file: 11 baselines and `TRIALS` proposals of an engine that learns from what went before."""
    sampler = {"engine": "optuna", "name": "nsga2", "seed": 3, "population": 12}
    return write_study(tmp_path_factory.mktemp("study"), trials=TRIALS, sampler=sampler)


@pytest.fixture(scope="session")
def uninterrupted(study: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The storage in which that study ran to its end in one process; read it, do not change it."""
    url = url_in(tmp_path_factory.mktemp("uninterrupted"))
    assert ended(start(study, url)) == 0
    return url
