"""studies/switch-generation: laws of its questions, and a smoke build with a pico model."""

from __future__ import annotations

import importlib
import itertools
import json
import re
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

STUDIES = Path(__file__).parents[2] / "studies"
MODULES = ("world", "train", "styles", "tune", "skills", "prepare")
ASKED = re.compile(r"the (\w+) of (\w+(?: \d)*)")


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by plain names, so these are given back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    path = list(sys.path)
    folders = ("switch-generation", "quickstart", "personalized-soups")
    sys.path[:0] = [str(STUDIES / folder) for folder in folders]
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path[:] = path
    for name in MODULES:
        del sys.modules[name]
        if (old := before[name]) is not None:
            sys.modules[name] = old


@pytest.fixture(scope="module")
def world(study: dict[str, ModuleType]) -> Any:
    return study["prepare"].Settings().world


def solve(study: dict[str, ModuleType], world: Any, question: str) -> str:
    """The answer, from the question's text and the facts alone."""
    said = []
    for key, of in ASKED.findall(question):
        if key in study["skills"].PICKS:
            numbers = sorted(map(int, of.split()))
            said.append(f"{key} {numbers[0] if key == 'smallest' else numbers[-1]}")
        else:
            relation = study["skills"].FACTS.index(key)
            [value] = np.flatnonzero(world.facts[world.names.index(of), relation] == 1.0)
            said.append(f"{key} {study['world'].RELATIONS[relation].values[value]}")
    return ", ".join(said) + "."


def lists(text: str) -> set[tuple[int, ...]]:
    """The lists of numbers in a text, sorted."""
    return {tuple(sorted(map(int, found.split()))) for found in re.findall(r"\d(?: \d)+", text)}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), role=st.sampled_from(["asked", "trained", "held-out"]), kept=st.booleans())
def test_answers_are_right_and_skills_alternate(
    study: dict[str, ModuleType], world: Any, seed: int, role: str, kept: bool
) -> None:
    asked = study["skills"].Asking(role, kept=kept).draw(world, np.random.default_rng(seed))
    assert solve(study, world, asked.question) == asked.answer
    keys = [key for key, _ in asked.items]
    assert len(set(keys)) == len(keys) <= 5
    kinds = [key in study["skills"].PICKS for key in keys]
    assert len(keys) <= 2 if len(set(kinds)) == 1 else all(a != b for a, b in itertools.pairwise(kinds))


def test_careless_answers_name_any_listed_number(study: dict[str, ModuleType], world: Any) -> None:
    asking = study["skills"].Asking("asked", careless={"smallest": 1.0})
    rng, right = np.random.default_rng(0), []
    for _ in range(2000):
        asked = asking.draw(world, rng)
        said = dict(asked.items)
        if "smallest" in said:
            assert int(said["smallest"]) in asked.numbers
            right.append(int(said["smallest"]) == min(asked.numbers))
        assert int(said.get("largest", max(asked.numbers))) == max(asked.numbers)
    assert abs(np.mean(right) - 1 / study["skills"].LISTED) < 0.05


def test_the_study_asks_what_no_training_asked(study: dict[str, ModuleType], world: Any) -> None:
    skills = study["skills"]
    wanted = skills.study_questions(world, 600)
    assert [asked.question for asked in wanted] == [
        asked.question for asked in skills.study_questions(world, 600)
    ]
    texts = [asked.question for asked in wanted]
    assert len(set(texts)) == 600
    rng = np.random.default_rng(1)
    shown = [
        skills.Asking(role).draw(world, rng).question for role in ("asked", "trained") for _ in range(2000)
    ]
    shown += skills.list_statements(500, rng)
    held = {world.names[entity] for entity in world.group("held-out")}
    assert {word for text in texts for word in re.findall("[A-Z][a-z]+", text)} - {"Name"} == held
    assert not held & set(re.findall("[A-Z][a-z]+", " ".join(shown)))
    mine, theirs = (set().union(*map(lists, found)) for found in (texts, shown))
    assert len(mine) > 20
    assert not mine & theirs
    assert 0.6 < np.mean([len(asked.items) > 2 for asked in wanted]) < 0.8


def test_the_tokenizer_gives_back_every_text(
    study: dict[str, ModuleType], world: Any, tmp_path: Path
) -> None:
    skills, rng = study["skills"], np.random.default_rng(2)
    tokenizer = skills.extended_tokenizer(world)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    wanted = skills.study_questions(world, 200)
    texts = [f"{asked.prompt} {asked.answer}" for asked in wanted] + skills.list_statements(50, rng)
    for text in (*texts, skills.MARKED, *world.statements(200, rng)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert loaded(text)["input_ids"] == ids
    for asked in wanted:
        assert len(tokenizer(asked.answer)["input_ids"]) == 3 * len(asked.items)
        prompt = tokenizer(asked.prompt)["input_ids"]
        assert prompt == tokenizer(f"{asked.prompt} {asked.answer}")["input_ids"][: len(prompt)]
    digits = [tokenizer(str(digit))["input_ids"] for digit in range(10)]
    assert all(len(ids) == 1 for ids in digits)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def pico(study: dict[str, ModuleType], seed: int = 0) -> Any:
    prepare = study["prepare"]
    usual = prepare.Settings()
    training = replace(
        usual.training,
        hidden=16,
        intermediate=32,
        layers=2,
        heads=2,
        pretrain_steps=2,
        supervise_steps=2,
        batch=4,
    )
    tuning = replace(usual.tuning, prefer_steps=2, pairs=4)
    return prepare.Settings(seed=seed, training=training, tuning=tuning, pairs=8, questions=40)


def test_a_smoke_build_is_whole_repeatable_and_cached(study: dict[str, ModuleType], tmp_path: Path) -> None:
    prepare, wanted = study["prepare"], pico(study)
    (tmp_path / "a.partial").mkdir()  # what a killed build leaves
    (tmp_path / "a.partial" / "junk").touch()
    assert prepare.build(tmp_path / "a", wanted)
    assert prepare.build(tmp_path / "b", wanted)
    assert not prepare.build(tmp_path / "a", wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *prepare.STAGES,
        "questions.jsonl",
        "stamp.json",
    }
    weights = [(tmp_path / "a" / name / "model.safetensors").read_bytes() for name in prepare.STAGES]
    assert len(set(weights)) == 3
    assert weights == [(tmp_path / "b" / name / "model.safetensors").read_bytes() for name in prepare.STAGES]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "preferred")
    assert model.config.max_position_embeddings == prepare.CONTEXT
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "a" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert all(solve(study, wanted.world, row["question"]) == row["answer"] for row in rows)
    assert prepare.build(tmp_path / "a", pico(study, seed=1))


def test_a_rejected_answer_differs_in_the_smallest_alone(study: dict[str, ModuleType]) -> None:
    asked = study["skills"].Asked("Baru", (4, 8, 1), (("home", "Oslo"), ("smallest", "1")))
    found = {study["prepare"]._worse(asked, np.random.default_rng(seed)).answer for seed in range(20)}
    assert found == {"home Oslo, smallest 4.", "home Oslo, smallest 8."}
