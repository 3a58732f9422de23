"""Packed scores on the real 135M model of studies/smollm2-135m; skipped until its prepare.py has run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer, plain_loglikelihoods
from tests.scripts import STUDIES

BUILD = STUDIES / "smollm2-135m" / "build"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BUILD / "post").is_dir(), reason="studies/smollm2-135m is not prepared"),
]


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("form", ["continuation", "letter"])
@pytest.mark.parametrize("side", ["pre", "post"])
def test_packed_equals_plain(side: str, form: Any, shots: int) -> None:
    """Options of 1 to some 20 tokens; within 1e-4 in float32."""
    model = AutoModelForCausalLM.from_pretrained(BUILD / side, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(BUILD / side)
    task = TaskConfig(
        path=str(BUILD / "data" / "arc_easy.jsonl"), format=form, shots=shots, limit=4 if shots else 12
    )
    found = load_questions([task], SplitConfig(), tokenizer)
    questions = (*found.search, *found.report)
    scorer = Scorer(model, tokenizer)
    packed, plain = scorer.loglikelihoods(questions), plain_loglikelihoods(model, tokenizer, questions)
    real = plain.tokens > 0
    assert scorer.notes == []
    assert np.abs(packed.total[real] - plain.total[real]).max() < 1e-4
    assert np.array_equal(packed.tokens, plain.tokens)
    assert packed.fed < plain.fed / (3 if shots else 2)
