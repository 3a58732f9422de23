"""Studies that released versions wrote still open, go on, and ship; tests/golden/make.py makes one for a version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from search import __version__
from search.results.board import read_board
from search.results.picks import pick
from search.running.budget import set_budget
from search.running.launch import reopen
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.fault_table import Fault
from tests.golden.make import NAME
from tests.study_process import results, sound

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.stem for path in GOLDEN.glob("*.db"))

pytestmark = pytest.mark.fault(14)


def _near(value: Any) -> Any:
    """Equal but for the last digits: intervals are sums of floats, which another processor may round otherwise."""
    if isinstance(value, dict):
        return {key: _near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_near(item) for item in value]
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value


@pytest.mark.parametrize("version", VERSIONS)
def test_a_study_of_a_released_version_opens_goes_on_and_ships(
    cli: Cli, tmp_path: Path, version: str, fault: Fault
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(GOLDEN, folder)
    url = f"sqlite:///{folder / version}.db"
    store = StudyStore.open(url, NAME)
    assert store.attribute("version") == version
    before = results(url, NAME)
    wanted = json.loads((GOLDEN / f"{version}.json").read_text())
    assert read_board(store).to_json() == _near(wanted), "the front says what it said"
    code, out, err = cli("status", NAME, "--storage", url, "--json")
    assert code == 0, err
    assert json.loads(out)["trials"]["running"] == 1

    # Its places are gone, and its worker was on another machine.
    places = [f"parents.{name}={folder / name}" for name in ("pre", "post")]
    places.append(f"tasks.0.path={folder / 'questions.jsonl'}")
    store, problem = reopen(url, NAME, "cpu", places, grace=0.5)
    set_budget(store, "+2")
    run(store, problem)
    fault.kept(before, results(url, NAME))
    trials = store.trials()
    assert [t.number for t in trials] == list(range(len(trials)))
    assert {t.state for t in trials} == {"complete", "failed"}
    (adopted,) = (t for t in trials if t.attributes["tries"] == 2)
    assert adopted.number not in before
    assert sum(t.kind == "search" and t.state == "complete" for t in trials) == store.attribute("trials")
    assert sound(url)

    overrides = [part for place in places for part in ("--set", place)]
    trial = pick(read_board(store), "knee").trial
    out_folder = tmp_path / "out"
    code, _, err = cli(
        "export",
        NAME,
        "--storage",
        url,
        "--weights",
        "--out",
        out_folder,
        *overrides,
        "--select",
        f"trial:{trial}",
    )
    assert code == 0, err
    code, out, err = cli("verify", out_folder, *overrides)
    assert code == 0, err
    assert "largest log-likelihood difference" in out, (
        "scored again to the stored numbers, which this version did not write"
    )


def test_this_version_has_its_golden_study() -> None:
    """`python -m tests.golden.make` makes it before a release."""
    assert __version__ in VERSIONS
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert size < 400_000 * len(VERSIONS)


def test_golden_studies_tell_nothing_about_the_machine_that_made_them() -> None:
    for path in [*GOLDEN.glob("*.db"), *GOLDEN.glob("*.json")]:
        content = path.read_bytes()
        assert b"/home/" not in content
        assert b"/root/" not in content
        assert content.count(b"/tmp/") == content.count(b"/tmp/mergefront-golden/")
