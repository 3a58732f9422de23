"""Evaluations: numbers from log-likelihoods, and evidence that outlives the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from objectives.evaluation import Evaluation, questions_digest
from objectives.evaluator import Evaluator
from objectives.questions.config import TaskConfig
from objectives.questions.questions import Question
from objectives.scoring.scorer import Scorer
from search.errors import ConfigError, DiskError, EvaluationError
from tests.pico import pico_model, pico_tokenizer

TASKS = [
    TaskConfig(path="a.jsonl"),
    TaskConfig(path="b.jsonl", normalize="tokens"),
    TaskConfig(path="c.jsonl", normalize="bytes"),
]


def questions() -> tuple[Question, ...]:
    made = []
    for i in range(9):
        options = (f" {'ab' * (i + 1)}", " c", " dd é"[: 3 + i % 3])[: 2 + i % 2]
        divisor = tuple(float(len(o.strip().encode())) for o in options) if i % 3 == 2 else None
        made.append(Question(f"key{i}", i % 3, f"Question: {i}\nAnswer:", options, i % 2, divisor))
    return tuple(made)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(pico_model("llama"), pico_tokenizer(), questions(), TASKS)


def test_probabilities_are_the_softmax_of_normalised_loglikelihoods(evaluator: Evaluator) -> None:
    found = evaluator.evaluate()
    scores = Scorer(evaluator.scorer.model, pico_tokenizer()).loglikelihoods(questions())
    for i, question in enumerate(questions()):
        n = len(question.options)
        total = scores.total[i, :n]
        divisor = (1.0, scores.tokens[i, :n], question.normalizer)[i % 3]
        odds = np.exp(total / np.asarray(divisor))
        assert found.outcomes.probability[i, :n] == pytest.approx(odds / odds.sum(), abs=1e-6)
        assert not found.outcomes.probability[i, n:].any()
    assert found.outcomes.task.tolist() == [0, 1, 2] * 3
    assert found.outcomes.gold.tolist() == [i % 2 for i in range(9)]
    assert found.loglikelihood.dtype == np.float32
    assert found.mass == pytest.approx(scores.mass, rel=1e-5)
    assert found.scored_tokens == evaluator.tokens == scores.fed
    assert found.seconds > 0


def test_saved_and_loaded_is_the_same(evaluator: Evaluator, tmp_path: Path) -> None:
    found = evaluator.evaluate()
    path = tmp_path / "trial.safetensors"
    digest = found.save(path)
    again = Evaluation.load(path, sha256=digest, digest=evaluator.digest)
    assert np.array_equal(again.outcomes.probability, found.outcomes.probability)
    for name in ("loglikelihood", "divisor", "mass"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
    assert (again.scored_tokens, again.digest, again.seconds) == (found.scored_tokens, found.digest, 0.0)
    assert os.listdir(tmp_path) == ["trial.safetensors"]


def test_equal_evaluations_are_equal_bytes(evaluator: Evaluator, tmp_path: Path) -> None:
    first = evaluator.evaluate().save(tmp_path / "a")
    assert evaluator.evaluate().save(tmp_path / "b") == first
    assert Evaluation.load(tmp_path / "a").save(tmp_path / "c") == first
    script = f"from objectives.evaluator import Evaluation; print(Evaluation.load({str(tmp_path / 'a')!r}).save('d'))"
    # another process: another hash seed, which the library's own metadata order depends on
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == first


def test_a_plain_safetensors_reader_opens_it(evaluator: Evaluator, tmp_path: Path) -> None:
    from safetensors import safe_open

    evaluator.evaluate().save(tmp_path / "e")
    with safe_open(str(tmp_path / "e"), framework="numpy") as file:
        assert file.metadata()["questions"] == evaluator.digest
        assert file.get_tensor("loglikelihood").shape == (9, 3)


def test_evidence_that_does_not_fit_is_refused(evaluator: Evaluator, tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    digest = evaluator.evaluate().save(path)
    good = path.read_bytes()
    with pytest.raises(EvaluationError, match="about other questions"):
        Evaluation.load(path, digest="0" * 64)
    with pytest.raises(EvaluationError, match="cannot be read"):
        Evaluation.load(tmp_path / "none")
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(EvaluationError, match="the file was changed"):
        Evaluation.load(path, sha256=digest)
    for broken in (
        b"",
        good[:-4],
        good[:30],
        b"\x00" * 8 + good[8:],
        good.replace(b"evaluation-1", b"evaluation-9"),
    ):
        path.write_bytes(broken)
        with pytest.raises(EvaluationError, match=r"e\.safetensors: "):
            Evaluation.load(path)
    path.write_bytes(save({"a": np.zeros(1)}, {"format": "9\n" * 4000}))
    with pytest.raises(EvaluationError, match=r"e\.safetensors: format is '9\\n9") as refusal:
        Evaluation.load(path)
    assert len(str(refusal.value).removeprefix(str(path))) < 150
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mass", np.zeros(3, np.float32)),
        ("gold", np.zeros(9, np.int32)),
        ("gold", np.full(9, 7, np.int64)),
        ("loglikelihood", np.zeros((9, 2), np.float32)),
        ("loglikelihood", np.full((9, 3), np.nan, np.float32)),
        ("divisor", np.zeros((9, 3), np.float32)),
    ],
)
def test_arrays_that_do_not_fit_together(evaluator: Evaluator, tmp_path: Path, name: str, value: Any) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    evaluator.evaluate().save(tmp_path / "e")
    with safe_open(str(tmp_path / "e"), framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        metadata = file.metadata()
    save_file({**arrays, name: value}, tmp_path / "f", metadata)
    with pytest.raises(EvaluationError, match="/f: "):
        Evaluation.load(tmp_path / "f")


def test_a_failing_write_leaves_the_old_file(evaluator: Evaluator, tmp_path: Path, monkeypatch: Any) -> None:
    found = evaluator.evaluate()
    found.save(tmp_path / "e")
    before = (tmp_path / "e").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        found.save(tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == before
    assert os.listdir(tmp_path) == ["e"]
    with pytest.raises(DiskError, match="No such file"):
        found.save(tmp_path / "no folder" / "e")


def test_the_digest_depends_on_questions_order_and_normalisation() -> None:
    some = questions()
    digests = {
        questions_digest(some, TASKS),
        questions_digest(some[::-1], TASKS),
        questions_digest(some[:-1], TASKS),
        questions_digest(some, [TASKS[0], TASKS[0], TASKS[2]]),
    }
    assert len(digests) == 4


def test_two_evaluators_share_a_scorer(evaluator: Evaluator) -> None:
    other = Evaluator(evaluator.scorer, None, questions()[:4], TASKS)
    whole = evaluator.evaluate().loglikelihood[:4]
    part = other.evaluate().loglikelihood
    real = np.isfinite(part)
    assert np.abs(part[real] - whole[:, : part.shape[1]][real]).max() < 1e-4


def test_bad_questions_are_refused_before_scoring_and_bad_values_while() -> None:
    model = pico_model("llama")
    with pytest.raises(ConfigError, match="question 0"):
        Evaluator(model, pico_tokenizer(), [Question("k", 0, "a", ("", "b"), 0)], TASKS)
    evaluator = Evaluator(model, pico_tokenizer(), questions(), TASKS)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(EvaluationError, match=r"question key0 \(task 0\), option 0"):
        evaluator.evaluate()
