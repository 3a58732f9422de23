"""Calibrators on a study's board, in its table, and in a model folder: the same answers, other confidences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.methods import fit
from objectives.evaluation import Evaluation
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.export.calibrate import calibrate_study
from search.export.calibrated_model import CARD, GENERATION, with_section
from search.results.alternatives import CALIBRATORS, Scores, chosen_methods
from search.results.board import read_board
from search.results.calibration_table import METRICS, calibration_table
from search.running.launch import create, reopen
from search.storage.evidence import EvidenceFolder
from search.storage.manifest import read_manifest
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.pico import save_pico
from tests.pico_study import write_study

LETTERS = {"path": "./questions.jsonl", "name": "made-up", "format": "letter"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished study with letters, so that every calibrator applies."""
    folder = tmp_path_factory.mktemp("calibrated")
    path = write_study(folder, trials=4, tasks=[LETTERS])
    url = f"sqlite:///{folder / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    return path, url


def test_a_temperature_stands_on_every_board(study: tuple[Path, str]) -> None:
    board = read_board(StudyStore.open(study[1], "pico"))
    post = board.of_kind("post")[0]
    tempered = {row.label: row for row in board.alternatives}
    assert {"post + temperature", "post + daca"} <= set(tempered)
    for row in tempered.values():
        if row.label.startswith("post + ") and "cape" not in row.label:
            assert row.report["accuracy"] == post.report["accuracy"]
            assert row.report["auroc"].value != 0
    oracle = tempered["post + temperature"]
    assert oracle.search["nll"].value <= min(row.search["nll"].value for row in tempered.values()) + 1e-12
    for row in board.front:
        if row.kind == "search":
            difference = row.report["ece"].value - oracle.report["ece"].value
            assert row.against["post + temperature"]["ece"].value == pytest.approx(difference)


def test_every_calibrator_is_measured_once_and_shown(study: tuple[Path, str], cli: Cli) -> None:
    url = study[1]
    code, out, err = cli(
        "calibrate", "pico", "--storage", url, "--method", "all", "--select", "post", "--select", "trial:4"
    )
    assert code == 0, err
    for method in CALIBRATORS:
        assert f"post + {method}" in out
        assert f"uniform 0.3 + {method}" in out or "trial 4" not in out
    store, problem = reopen(url, "pico", "cpu")
    attributes = store.attributes()
    assert {"layers:0:search", "layers:1:report", "layers:4:report", "cape:1:report"} <= set(attributes)
    board = read_board(store)
    assert len([row for row in board.alternatives if row.trial == 1]) == len(CALIBRATORS)

    # The layers' scores as they are stored lead to the temperature that fresh ones lead to.
    fitted = Scores(store).fitted("dual-align", 1)
    assert fitted is not None
    assert sum(fitted.divergence_layers) == len(problem.questions.search)

    before = {path: path.stat().st_mtime_ns for path in EvidenceFolder(url, "pico").path.iterdir()}
    rows = [row for row in board.rows if row.trial in (1, 4)]
    calibrate_study(store, problem, rows, list(CALIBRATORS), 0)
    assert {path: path.stat().st_mtime_ns for path in EvidenceFolder(url, "pico").path.iterdir()} == before
    code, out, err = cli("front", "pico", "--storage", url)
    assert "post + dual-align" in out
    assert "temperature " in out


def test_the_table_tests_on_the_half_that_was_not_fitted(study: tuple[Path, str]) -> None:
    store = StudyStore.open(study[1], "pico")
    board, scores = read_board(store), Scores(store)
    table = calibration_table(board, scores)
    assert table.questions == (10, 10)
    by_label = {entry.label: entry for entry in table.entries}
    plain, daca = by_label["post"], by_label["post + daca"]
    assert daca.values["accuracy"] == plain.values["accuracy"]
    assert daca.values["auroc"] != plain.values["auroc"] or set(daca.temperatures) == {1.0}
    assert all(len(entry.values[name]) == 5 for entry in table.entries for name in METRICS)

    # One cell by hand.
    order = np.random.default_rng(3).permutation(20)
    half, rest = np.sort(order[:10]), np.sort(order[10:])
    own, reference = (scores.logits(trial, "report") for trial in (1, 0))
    assert own is not None
    assert reference is not None
    found = fit("daca", own.select(half), reference.select(half))
    assert daca.temperatures[3] == found.temperature
    outcomes = found.apply(own.final.select(rest))
    assert daca.values["accuracy"][3] == outcomes.correct.mean()


def test_cape_needs_listed_options(tmp_path: Path, cli: Cli) -> None:
    path = write_study(tmp_path, trials=0)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    code, _, err = cli("calibrate", "pico", "--storage", url, "--method", "cape")
    assert code == 2
    assert "does not list its 4 options by letter" in err
    assert not [key for key in StudyStore.open(url, "pico").attributes() if key.startswith(("cape", "calib"))]
    code, out, err = cli("calibrate", "pico", "--storage", url, "--method", "all")
    assert code == 0, err
    assert "cape is left out" in err
    assert "post + dual-align" in out
    assert "cape" not in out


def test_probabilities_become_an_evaluation(study: tuple[Path, str]) -> None:
    store = StudyStore.open(study[1], "pico")
    outcomes = Scores(store).outcomes(1, "report")
    again = Evaluation.of_probabilities(outcomes, 7, "d")
    assert np.allclose(again.outcomes.probability, outcomes.probability, atol=1e-6)
    assert np.array_equal(again.outcomes.predicted, outcomes.predicted)
    assert (again.scored_tokens, again.digest) == (7, "d")


def test_an_export_carries_its_temperature(study: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    url = study[1]
    code, out, err = cli(
        "export", "pico", "--storage", url, "--select", "trial:1", "--weights", "--out", tmp_path / "out"
    )
    assert code == 0, err
    folder = Path(out.strip())
    weights = next((folder / "model").glob("*.safetensors"))
    inode = weights.stat().st_ino
    for method in ("daca", "dual-align"):  # the second one replaces the first
        code, out, err = cli("calibrate", folder, "--method", method)
        assert code == 0, err
        assert "temperature" in out
    settings = json.loads((folder / "model" / GENERATION).read_text())
    store = StudyStore.open(url, "pico")
    fitted = Scores(store).fitted("dual-align", 1)
    assert fitted is not None
    assert settings["temperature"] == fitted.temperature
    assert settings["do_sample"] is True
    assert GenerationConfig.from_pretrained(folder / "model").temperature == fitted.temperature
    for card in (folder / CARD, folder / "model" / CARD):
        assert card.read_text().count("## Confidence temperature") == 1
        assert f"{fitted.temperature:.6g}" in card.read_text()
    assert read_manifest(folder)["calibration"]["method"] == "dual-align"
    assert weights.stat().st_ino == inode, "weights are linked, not copied"
    code, out, err = cli("verify", folder)
    assert code == 0, err
    assert "= stored" in out


def test_any_checkpoint_can_be_calibrated(study: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    path, _ = study
    post = save_pico(tmp_path / "model", seed=5)
    pre = path.parent / "pre"
    before = {one.name: one.read_bytes() for one in post.iterdir()}
    for method in ("temperature", "daca", "dual-align"):
        code, out, err = cli("calibrate", post, "--reference", pre, "--study", path, "--method", method)
        assert code == 0, err
        assert method in out
    assert "temperature" in json.loads((post / GENERATION).read_text())
    assert "## Confidence temperature" in (post / CARD).read_text()
    after = {one.name: one.read_bytes() for one in post.iterdir()}
    assert after.keys() == before.keys() | {GENERATION, CARD}
    assert all(after[name] == content for name, content in before.items() if name != GENERATION)
    assert [one.name for one in tmp_path.iterdir()] == ["model"], "the folder itself was not moved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dacca"], "Did you mean 'daca'?"),
        (["--method", "cape", "--study", "{study}"], "no temperature"),
        (["--method", "daca", "--study", "{study}"], "Give --reference DIR"),
        (["--method", "daca"], "wanted a study file"),
        (["--method", "daca", "--method", "naive", "--study", "{study}"], "Name one method"),
        (
            ["--method", "naive", "--study", "{study}", "--reference", "{other}"],
            "different vocabularies",
        ),
        (["--method", "dual-align", "--study", "{study}", "--reference", "{deep}"], "has 2 layers but"),
    ],
)
def test_one_line_says_what_is_wrong(
    arguments: list[str], message: str, study: tuple[Path, str], tmp_path: Path, cli: Cli
) -> None:
    model = save_pico(tmp_path / "model", seed=5)
    if "{deep}" in arguments:
        save_pico(tmp_path / "deep", seed=6, num_hidden_layers=3)
    if "{other}" in arguments:
        save_pico(tmp_path / "other", seed=6)
        tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    places = {"study": study[0], "other": tmp_path / "other", "deep": tmp_path / "deep"}
    code, _, err = cli("calibrate", model, *(a.format(**places) for a in arguments))
    assert code == 2, err
    assert message in err
    assert "scoring" not in err, "said before anything is scored"
    assert not (model / CARD).exists()


def test_methods_by_name() -> None:
    assert chosen_methods(["all"]) == list(CALIBRATORS)
    assert chosen_methods(["daca", "daca", "naive"]) == ["daca", "naive"]
    with pytest.raises(ConfigError, match="They are: temperature"):
        chosen_methods(["vanila"])


def test_a_card_keeps_one_section() -> None:
    once = with_section("# Model\n\ntext", FittedTemperature("daca", 2.0, 10, 9, 9))
    twice = with_section(once, FittedTemperature("naive", 3.0, 10, 10, 9, reason="at the edge"))
    assert twice.count("## Confidence temperature") == 1
    assert "`naive`" in twice
    assert "Caution: at the edge." in twice
    assert twice.startswith("# Model\n\ntext\n\n")
