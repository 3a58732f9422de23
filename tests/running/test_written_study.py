"""A study with written answers, from launch to a verified checkpoint, and the same after any kill."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from objectives.generation.sampler import AnswerSampler, Decoding
from objectives.metrics.names import get_metric
from objectives.outcomes import Outcomes
from objectives.questions.matching import get_rule
from objectives.questions.questions import WrittenQuestion, closed, written
from search.config.study_file import load_study_file
from search.errors import ConfigError, ExportError
from search.export.calibrate import calibrate_board
from search.export.verify import verify_folder
from search.merging.baselines import BASELINES
from search.results.alternatives import Scores
from search.results.board import read_board
from search.running.launch import create, reopen
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.export_process import exported
from tests.pico_study import write_open_questions, write_study
from tests.study_process import ended, start, whole

DRAWN = {"samples": 4, "max_new_tokens": 2, "temperature": 0.02, "until": ["\n"]}
OPEN = {"path": "./open.jsonl", "name": "open", "format": "generation", "shots": 1, "generate": DRAWN}
CLOSED = {"path": "./questions.jsonl", "name": "closed"}


def written_study(folder: Path, **keys: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_open_questions(folder / "open.jsonl")
    return write_study(folder, **{"tasks": [CLOSED, OPEN], "trials": 3, **keys})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_study(tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="module")
def url(study: Path) -> str:
    url = f"sqlite:///{study.parent / 'study.db'}"
    run(*create(load_study_file(study), url, "cpu"))
    return url


def test_what_is_stored_is_what_the_merges_wrote(study: Path, url: str) -> None:
    store, problem = reopen(url, "pico", "cpu")
    evidence = EvidenceFolder(url, "pico")
    searched = [record for record in store.trials() if record.kind == "search"]
    assert len(searched) == 3
    rule = get_rule("exact")
    accuracies = []
    for record in (store.trials()[0], searched[-1]):
        problem.merge(record.recipe)
        stored = evidence.load(str(record.attributes["evidence"]))
        assert record.tokens == stored.scored_tokens
        asked = problem.questions.search
        assert len(closed(asked)) + len(written(asked)) == len(asked) == len(stored.outcomes)
        sampler = AnswerSampler(
            problem.live.model,
            problem.tokenizer,
            [question.context for question in written(asked)],
            Decoding(4, 0.02, 1.0, 2, 0),
            until=("\n",),
        )
        texts = sampler.texts(sampler.generate())
        places = [i for i, question in enumerate(asked) if isinstance(question, WrittenQuestion)]
        right, sure = [], []
        for question, answers in zip(written(asked), texts, strict=True):
            keys = [rule.key(text) for text in answers]
            best = max(keys, key=keys.count)
            right.append(best in question.accepted)
            sure.append(keys.count(best) / 4)
        np.testing.assert_allclose(stored.outcomes.confidence[places], sure, rtol=1e-6)
        assert stored.outcomes.correct[places].tolist() == right
        # ECE of the metric by hand, as of any confidences: an option for the answer, one for every other.
        one = np.array(sure)
        plain = Outcomes(
            np.stack([one, 1 - one], axis=1),
            np.full(len(one), 2),
            1 - np.array(right, dtype=np.int64),
            np.zeros(len(one), dtype=np.int64),
        )
        mine = stored.outcomes.select(places)
        for name in ("accuracy", "ece", "auroc"):
            assert get_metric(name).value(mine) == pytest.approx(get_metric(name).value(plain), abs=1e-6)
        accuracies.append(np.mean(right))
    assert 0 < max(accuracies) < 1


def test_the_board_shows_them_with_calibrated_parents(url: str, cli: Cli) -> None:
    code, out, err = cli("front", "pico", "--storage", url, "--format", "json", "--split", "report")
    assert code == 0, err
    shown = json.loads(out)
    labels = {row["label"]: row for row in shown["trials"]}
    assert {"pre", "post", "uniform 0.5", "post + temperature", "post + daca"} <= labels.keys()
    assert {"accuracy", "ece", "brier", "nll", "auroc"} <= labels["post + temperature"]["report"].keys()
    board, scores = read_board(StudyStore.open(url, "pico")), Scores(StudyStore.open(url, "pico"))
    post = next(row.trial for row in board.parents if row.label == "post")
    own = scores.logits(post, "report")
    assert own is not None
    rows = own.final.written
    assert rows.any()
    assert not rows.all()
    by_method = {one.method: scores.tempered(one, "report") for one in scores.alternatives()}
    before = scores.outcomes(post, "report")
    np.testing.assert_allclose(by_method["daca"].probability[rows], before.probability[rows], atol=1e-12)
    assert not np.allclose(by_method["temperature"].probability[rows], before.probability[rows])
    assert by_method["temperature"].correct.tolist() == before.correct.tolist()


def test_commands_that_read_a_study_read_it(study: Path, url: str, tmp_path: Path, cli: Cli) -> None:
    code, out, err = cli("check", study)
    assert code == 0, err
    assert (
        "written     open: 12 search questions, 4 answers to each, of at most 2 tokens; right by exact" in out
    )
    code, out, err = cli("resume", "pico", "--storage", url)
    assert code == 0, err
    assert cli("status", "pico", "--storage", url)[0] == 0
    code, out, err = cli("report", "pico", "--storage", url, "--out", tmp_path / "report")
    assert code == 0, err
    assert "post + temperature" in (tmp_path / "report" / "report.html").read_text()
    before = whole(url)
    assert cli("launch", study, "--storage", url)[0] == 0
    assert whole(url) == before


def test_an_exported_merge_writes_the_stored_answers_again(url: str, tmp_path: Path) -> None:
    best = read_board(StudyStore.open(url, "pico")).front[0].trial
    folder = exported(url, tmp_path / "out", best)
    *_, search, report = verify_folder(folder, None, [], "cpu")
    for line in (search, report):
        assert "= stored, ece" in line
        assert (
            "questions, largest log-likelihood difference 0 (allowed 0.0001); written answers differ for 0 of 1"
            in line
        )
        assert line.endswith(" (allowed 2%)  ok")


def test_another_checkpoint_writes_other_answers(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import search.export.verify

    folder = exported(url, tmp_path / "out", 0)
    model, said = search.export.verify._loaded(folder / "model", "float32")
    for parameter in model.parameters():
        parameter.data.mul_(-1.0)
    monkeypatch.setattr(search.export.verify, "_loaded", lambda *_: (model, said))
    monkeypatch.setattr(
        search.export.verify, "TOLERANCE", {"float32": (1e9, 0.0)}
    )  # options would say it first
    with pytest.raises(
        ExportError, match=r"search split: \d+ of 12 written questions are answered otherwise"
    ):
        list(verify_folder(folder, None, [], "cpu"))


def test_calibrate_says_which_methods_written_answers_have(study: Path, url: str, tmp_path: Path) -> None:
    for method in ("dual-align", "cape"):
        with pytest.raises(
            ConfigError, match=f"--method {method}: compares likelihoods of options, .*naive or daca"
        ):
            calibrate_board(url, "pico", [method], ["post"], [], "cpu")
    only = written_study(
        tmp_path / "only", tasks=[OPEN], trials=0, objectives=["accuracy", "ece"], batch_tokens=None
    )
    own = f"sqlite:///{tmp_path / 'only.db'}"
    run(
        *create(load_study_file(only), own, "cpu")
    )  # batches are not measured on questions that are not there
    with pytest.raises(ConfigError, match=r"--method daca: .* Use temperature\.$"):
        calibrate_board(own, "pico", ["daca"], ["post"], [], "cpu")
    table = calibrate_board(own, "pico", ["all"], ["post"], [], "cpu")
    assert {entry.method for entry in table.entries} == {"vanilla", "temperature"}
    labels = [row.label for row in read_board(StudyStore.open(own, "pico")).alternatives]
    assert labels == ["post + temperature"]


@pytest.mark.parametrize(
    "keys",
    [{"racing": {"looks": 3}}, {"fidelity": {"estimator": "gmp-irt", "questions": 12}}],
    ids=["racing", "irt"],
)
def test_candidates_are_scored_in_parts(tmp_path: Path, keys: dict[str, object]) -> None:
    study = written_study(tmp_path, **keys)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(study), url, "cpu"))
    trials = StudyStore.open(url, "pico").trials()
    assert {trial.state for trial in trials} <= {"complete", "stopped"}
    assert len(trials) == len(BASELINES) + 3


def test_killed_it_ends_with_the_same_front(study: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    url, other = (f"sqlite:///{tmp_path / name / 'study.db'}" for name in ("whole", "killed"))
    assert ended(start(study, url)) == 0  # in a child, too: it may have other threads, and so other last bits
    for step, number in (("evaluating", 1), ("evaluated", 5), ("evidence", len(BASELINES) + 1)):
        assert ended(start(study, other, step, number)) == -signal.SIGKILL, step
    assert ended(start(study, other)) == 0
    assert whole(other) == whole(url)
    mine, theirs = (
        {trial.number: trial.attributes["evidence"] for trial in StudyStore.open(one, "pico").trials()}
        for one in (other, url)
    )
    assert mine == theirs  # to the byte
