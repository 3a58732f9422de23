"""Laws of the world in studies/quickstart, and a smoke build with a pico model."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives.questions.tasks import load_questions
from objectives.scoring.encoding import encode_questions
from search.config.study_file import load_study_file

STUDY = Path(__file__).parents[2] / "studies" / "quickstart"
MODULES = ("world", "train", "prepare")


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by plain names, so these are given back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    sys.path.insert(0, str(STUDY))
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path.remove(str(STUDY))
    for name in MODULES:
        del sys.modules[name]
        if (old := before[name]) is not None:
            sys.modules[name] = old


@pytest.fixture(scope="module")
def world(study: dict[str, ModuleType]) -> Any:
    return study["world"].World()


@pytest.fixture(scope="module")
def tokenizer(study: dict[str, ModuleType], world: Any) -> Any:
    return study["world"].build_tokenizer(world)


def pico(study: dict[str, ModuleType]) -> Any:
    training = study["train"].Training(
        hidden=16,
        intermediate=32,
        layers=2,
        heads=2,
        pretrain_steps=3,
        supervise_steps=3,
        prefer_steps=3,
        batch=4,
    )
    return study["prepare"].Settings(training=training, questions=40)


def parse(study: dict[str, ModuleType], world: Any, question: Any) -> tuple[int, int]:
    """(entity, relation) that a question is about."""
    for r, relation in enumerate(study["world"].RELATIONS):
        if set(question.choices) <= set(relation.values):
            stem = question.question.split(":")[0]
            before, after = relation.question.split("{entity}")
            name = stem.removeprefix(before).removesuffix(after)
            return world.names.index(name), r
    raise AssertionError(question)


@settings(max_examples=25, deadline=None)
@given(entities=st.integers(6, 200), seed=st.integers(0, 2**31))
def test_every_fact_is_a_distribution_and_every_entity_has_one_role(
    study: dict[str, ModuleType], entities: int, seed: int
) -> None:
    world = study["world"].World(entities=entities, seed=seed)
    np.testing.assert_allclose(world.facts.sum(axis=-1), 1.0, atol=1e-12)
    assert (world.facts > 0).all()
    assert len(set(world.names)) == entities
    roles = [world.group(role) for role in ("asked", "trained", "held-out")]
    assert sorted(np.concatenate(roles).tolist()) == list(range(entities))


def test_the_corpus_shows_the_distribution_of_the_facts(study: dict[str, ModuleType], world: Any) -> None:
    small = replace(world, entities=6)
    counts = np.zeros_like(small.facts)
    for sentence in small.statements(60_000, np.random.default_rng(5)):
        words = set(sentence.rstrip(".").split())
        [entity] = [e for e, name in enumerate(small.names) if name in words]
        [(r, v)] = [
            (r, v)
            for r, relation in enumerate(study["world"].RELATIONS)
            for v, value in enumerate(relation.values)
            if value in words
        ]
        counts[entity, r, v] += 1
    n = counts.sum(axis=-1, keepdims=True)
    assert (n > 2_000).all()
    deviation = np.abs(counts / n - small.facts) / np.sqrt(small.facts * (1 - small.facts) / n)
    assert deviation.max() < 4.5  # standard errors, over 192 cells


def test_gold_answers_follow_the_fact_given_the_options(study: dict[str, ModuleType], world: Any) -> None:
    """Predicting the fact's own distribution, restricted to the options, is calibrated and cannot be beaten."""
    questions = world.questions(40_000, "held-out", np.random.default_rng(6))
    expected, gold = [], []
    for question in questions:
        entity, r = parse(study, world, question)
        values = study["world"].RELATIONS[r].values
        p = np.array([world.facts[entity, r, values.index(choice)] for choice in question.choices])
        expected.append(p / p.sum())
        gold.append(question.answer)
    p, hit = np.array(expected), np.eye(4)[gold]
    for low, high in ((0.0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 0.9), (0.9, 1.0)):
        inside = (p > low) & (p <= high)
        if inside.any():
            error = math.sqrt((p[inside] * (1 - p[inside])).sum()) / inside.sum()
            assert abs(hit[inside].mean() - p[inside].mean()) < 4.5 * error, (low, high)
    assert np.abs(np.bincount(gold, minlength=4) / len(gold) - 0.25).max() < 0.01  # no position is favoured


def test_held_out_questions_are_new_and_name_no_trained_entity(
    study: dict[str, ModuleType], world: Any
) -> None:
    questions = study["prepare"].held_out_questions(world, 4_000)
    assert len({q.question for q in questions}) == len(questions) == 4_000
    seen = {world.names[e] for role in ("asked", "trained") for e in world.group(role)}
    assert not any(seen & set(q.question.replace(":", " ").replace("?", " ").split()) for q in questions)
    assert questions == study["prepare"].held_out_questions(world, 4_000)
    assert all(len(set(q.choices)) == 4 and 0 <= q.answer < 4 for q in questions)


def test_the_tokenizer_gives_back_every_text(world: Any, tokenizer: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    questions = [q for role in ("asked", "trained", "held-out") for q in world.questions(300, role, rng)]
    texts = [*world.statements(1_000, rng), *(f"{q.prompt} {q.choices[q.answer]}" for q in questions)]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    assert tokenizer.encode("Zanzibar") == [tokenizer.unk_token_id]


def test_dpo_loss_by_hand(study: dict[str, ModuleType]) -> None:
    policy = torch.tensor([[-1.0, -3.0], [-2.0, -1.0]], dtype=torch.float64)
    reference = torch.tensor([[-2.0, -2.0], [-2.0, -1.5]], dtype=torch.float64)
    # margins: (2 - 0) = 2 and (-1 - -0.5) = -0.5; -log sigmoid(x) = log(1 + exp(-x))
    expected = (math.log1p(math.exp(-0.2)) + math.log1p(math.exp(0.05))) / 2
    assert study["train"].dpo_loss(policy, reference, 0.1).item() == pytest.approx(expected, abs=1e-12)
    same = study["train"].dpo_loss(reference, reference, 0.1).item()
    assert same == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 6, 16), (2, 16, 6), (1, 8, 8)])
def test_orthogonal_keeps_the_singular_vectors(study: dict[str, ModuleType], shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = study["train"].orthogonal(matrices)
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.35
    assert values.min() > 0.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.transpose(1, 2) @ result @ right.transpose(1, 2)
    off = rotated - torch.diag_embed(torch.diagonal(rotated, dim1=1, dim2=2))
    assert off.abs().max() < 1e-3


def test_answer_loglikelihoods_equal_one_sequence_at_a_time(
    study: dict[str, ModuleType], world: Any, tokenizer: Any
) -> None:
    model = study["train"].new_model(tokenizer, pico(study).training, 0).eval()
    questions = world.questions(
        9, "held-out", np.random.default_rng(1)
    )  # of several lengths: padding matters
    with torch.no_grad():
        together = study["train"].answer_loglikelihoods(model, tokenizer, questions)
        for question, row in zip(questions, together, strict=True):
            ids = torch.tensor([tokenizer(question.prompt)["input_ids"]])
            alone = torch.log_softmax(model(input_ids=ids).logits[0, -1], dim=-1)
            options = [tokenizer(f" {choice}")["input_ids"][0] for choice in question.choices]
            torch.testing.assert_close(row, alone[options], atol=1e-5, rtol=0)


def test_a_smoke_build_is_whole_repeatable_and_cached(study: dict[str, ModuleType], tmp_path: Path) -> None:
    prepare, wanted = study["prepare"], pico(study)
    first, second = tmp_path / "a" / "pair", tmp_path / "b" / "pair"
    (tmp_path / "a" / "pair.partial").mkdir(parents=True)  # what a killed build leaves
    (tmp_path / "a" / "pair.partial" / "junk").touch()
    assert prepare.build(first, wanted)
    assert prepare.build(second, wanted)
    assert not prepare.build(first, wanted)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".pair.lock", "pair"]
    assert not (first / "junk").exists()
    for name in ("pre", "post"):
        weights = [(folder / name / "model.safetensors").read_bytes() for folder in (first, second)]
        assert weights[0] == weights[1]
        _, report = AutoModelForCausalLM.from_pretrained(first / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    assert (first / "pre/model.safetensors").read_bytes() != (first / "post/model.safetensors").read_bytes()

    assert not prepare.is_complete(first, replace(wanted, seed=wanted.seed + 1))
    with (first / "post" / "config.json").open("a") as file:
        file.write(" ")
    assert not prepare.is_complete(first, wanted)
    assert prepare.build(first, wanted)
    (first / "stamp.json").write_text("[]")
    assert not prepare.is_complete(first, wanted)


def test_the_study_reads_the_questions_as_they_were_written(
    study: dict[str, ModuleType], world: Any, tokenizer: Any, tmp_path: Path
) -> None:
    config = load_study_file(STUDY / "study.yaml")
    assert Path(config.parents.pre) == STUDY / "build" / "pair" / "pre"
    assert Path(str(config.tasks[0].path)) == STUDY / "build" / "pair" / "questions.jsonl"
    path = tmp_path / "questions.jsonl"
    written = study["prepare"].held_out_questions(world, 400)
    path.write_text("".join(json.dumps(vars(question)) + "\n" for question in written))
    task = config.tasks[0].model_copy(update={"path": str(path)})
    questions = load_questions([task], config.split, tokenizer)
    assert len(questions.search) == len(questions.report) == 200
    prompts = {question.prompt for question in written}
    search, report = ({q.context for q in side} for side in (questions.search, questions.report))
    assert search | report == prompts
    assert not search & report
    for encoded in encode_questions(questions.search[:20], tokenizer, 64):
        assert {len(s) - start for s, start in zip(encoded.sequences, encoded.starts, strict=True)} == {1}
