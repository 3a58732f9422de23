"""Where time goes: laps, nesting, and what launch and report show."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from search.config.study_file import load_study_file
from search.results.page import write_report
from search.running.launch import create, reopen
from search.running.profile import ATTRIBUTE, PARTS, Stopwatch, read_profile
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.pico_study import write_study


def test_a_nested_part_is_not_counted_twice() -> None:
    watch = Stopwatch()
    with watch.measuring("store"):
        time.sleep(0.02)
        with watch.measuring("propose"):
            time.sleep(0.05)
    time.sleep(0.05)  # in no part
    lap = watch.lap()
    assert 0.02 <= lap["store"] < 0.045
    assert 0.05 <= lap["propose"] < 0.09
    assert lap["merge"] == lap["score"] == 0
    assert set(watch.lap().values()) == {0.0}


def test_a_lap_within_a_part_goes_on_in_the_next() -> None:
    watch = Stopwatch()
    with watch.measuring("store"):
        time.sleep(0.01)
        assert watch.lap()["store"] >= 0.01
        time.sleep(0.02)
    assert watch.lap()["store"] >= 0.02


def test_every_scored_trial_has_its_seconds(tmp_path: Path) -> None:
    study = write_study(tmp_path, trials=3)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store, problem = create(load_study_file(study), url, "cpu")
    assert read_profile(store.trials()) is None
    began = time.perf_counter()
    run(store, problem)
    whole = time.perf_counter() - began
    records = store.trials()
    assert all(set(record.attributes[ATTRIBUTE]) == set(PARTS) for record in records)
    found = read_profile(records)
    assert found is not None
    assert found.mean["merge"] > 0
    assert found.mean["score"] > 0
    assert 0 < found.total * found.trials < whole
    assert found.rows()[-1] == ("trial", found.total, 1.0)
    page = next(path for path in write_report(store, tmp_path / "report") if path.suffix == ".html")
    assert "Where the time went" in page.read_text()


def test_batches_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = write_study(tmp_path, trials=1, batch_tokens=None)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store, problem = create(load_study_file(study), url, "cpu")
    run(store, problem)
    size = StudyStore.open(url, "pico").attribute("batch_tokens:cpu")
    assert size == problem.scorer.batch_tokens

    monkeypatch.setattr("objectives.scoring.scorer.Scorer.measure", lambda *_: pytest.fail("measured again"))
    store.set_attribute("batch_tokens:cpu", 77)
    store.set_attribute("trials", 2)
    store, problem = reopen(url, "pico", "cpu")
    run(store, problem)
    assert problem.scorer.batch_tokens == 77


def test_launch_prints_the_profile(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path, trials=1)
    code, out, err = cli("launch", study, "--profile")
    assert code == 0, err
    assert all(text in err for text in ("where time goes", *PARTS)), err
    assert "where time goes" not in out
