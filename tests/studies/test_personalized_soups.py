"""studies/personalized-soups: laws of its world, its pairs and its win rates, and a smoke build with a pico model."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from objectives.metrics.preferences import share_of_words
from search.config.study_file import load_study_file

STUDIES = Path(__file__).parents[2] / "studies"
MODULES = ("world", "train", "prepare", "styles", "tune", "experts", "measure", "soups", "engines")


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by plain names, so these are given back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    places = [str(STUDIES / "quickstart"), str(STUDIES / "personalized-soups")]
    sys.path[:0] = places
    yield {name: importlib.import_module(name) for name in MODULES}
    for place in places:
        sys.path.remove(place)
    for name in MODULES:
        sys.modules.pop(name, None)
        if (old := before[name]) is not None:
            sys.modules[name] = old


def answers(study: dict[str, ModuleType], wishes: tuple[str, ...], n: int = 60) -> list[str]:
    """Answers of people who always listen."""
    styles, world = study["styles"], study["world"].World()
    rng = np.random.default_rng(0)
    return [styles._answer(world, 3, wishes, styles.Manners(), rng) for _ in range(n)]


def test_wishes_that_are_heeded_raise_their_own_reward(study: dict[str, ModuleType]) -> None:
    rewards = study["experts"].preferences()
    free = answers(study, (), 300)
    assert tuple(rewards) == study["styles"].POLES
    for one, other in study["styles"].AXES:
        for wanted, against in ((one, other), (other, one)):
            styled = answers(study, (wanted,))
            scores = {pole: rewards[pole](["?"], [styled]).mean() for pole in (wanted, against)}
            usual = {pole: rewards[pole](["?"], [free]).mean() for pole in (wanted, against)}
            assert scores[wanted] > usual[wanted]
            assert scores[against] < usual[against]


def test_the_tokenizer_knows_every_word_and_keeps_the_ids(study: dict[str, ModuleType]) -> None:
    world = study["world"].World()
    old, new = study["world"].build_tokenizer(world), study["styles"].extended_tokenizer(world)
    assert old.get_vocab().items() <= new.get_vocab().items()
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    styles = study["styles"]
    for wishes in styles.COMBINATIONS:
        for answer in answers(study, wishes, 20):
            text = f"{styles.wished(styles.PROMPTS[0].format(world.names[3]), wishes)} {answer}"
            ids = new(text)["input_ids"]
            assert new.unk_token_id not in ids
            assert new.decode(ids) == text
            assert len(ids) < 64  # the base's context


def test_prompts_name_nobody_that_training_names(study: dict[str, ModuleType]) -> None:
    styles, tune = study["styles"], study["tune"]
    world = study["world"].World()
    asked = set(styles.prompt_texts(world, ["held-out"]))
    trained = set(styles.prompt_texts(world, tune.TRAINED))
    assert len(asked) == 160
    assert not asked & trained
    drawn = styles.styled_answers(world, 50, tune.TRAINED, styles.Manners(), np.random.default_rng(1))
    names = {world.names[entity] for entity in world.group("held-out")}
    assert not names & set(" ".join(f"{prompt} {answer}" for prompt, answer in drawn).split())


def test_the_study_file_fits(study: dict[str, ModuleType]) -> None:
    config = load_study_file(STUDIES / "personalized-soups" / "study.yaml")
    assert tuple(config.objectives) == tuple(config.preferences or ()) == study["styles"].POLES
    assert tuple(config.parents.experts or ()) == study["styles"].POLES
    again = study["measure"].study_of(2)
    assert again.name == "personalized-soups-2"
    assert again.parents.pre.endswith("seed-2/base")
    assert again.preferences == config.preferences


def test_win_rates(study: dict[str, ModuleType]) -> None:
    win_rates = study["soups"].win_rates
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 3, (2, 5, 4, 3)).astype(float)
    found = win_rates(one, other)
    assert found.shape == (5, 3)
    np.testing.assert_allclose(found + win_rates(other, one), 1.0)
    assert (win_rates(one, one) == 0.5).all()
    assert (win_rates(one + 9, other) == 1.0).all()


def test_shares_of_what_experts_gain(study: dict[str, ModuleType]) -> None:
    styles, gained = study["styles"], study["engines"].gained
    base = np.arange(6.0)
    alone = base + np.array([1.0, -2.0, 3.0, 4.0, 5.0, 6.0])
    assert gained(dict.fromkeys(styles.COMBINATIONS, alone), base, alone) == 1.0
    assert gained(dict.fromkeys(styles.COMBINATIONS, base), base, alone) == 0.0
    wishes = ("expert", "concise", "unfriendly")
    half = base.copy()
    half[[1, 2]] = alone[[1, 2]]
    assert gained({wishes: half}, base, alone) == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def pico(study: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A seed's models after a few steps from an untrained `pre`."""
    folder = tmp_path_factory.mktemp("soups")
    world = study["world"].World()
    training = replace(study["train"].Training(), hidden=32, intermediate=64, layers=2)
    pre = study["train"].new_model(study["world"].build_tokenizer(world), training, 0)
    pre.save_pretrained(folder / "pre")
    few = study["tune"].Tuning(supervise_steps=2, prefer_steps=2, joint_steps=2, samples=2, new_tokens=6)
    settings = study["experts"].Settings(tuning=few)
    assert study["experts"].build(folder / "seed-1", folder / "pre", settings)
    assert not study["experts"].build(folder / "seed-1", folder / "pre", settings)
    return folder, settings


def test_a_pico_build_has_all_models(study: dict[str, ModuleType], pico: tuple[Path, Any]) -> None:
    from transformers import AutoModelForCausalLM

    folder, settings = pico
    stamp = json.loads((folder / "seed-1" / "stamp.json").read_text())
    assert set(study["styles"].POLES) <= set(stamp["seconds"])
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / "seed-1" / name)
        for name in ("base", "plain", "unfriendly", "joint")
    }
    weights = [model.state_dict()["model.norm.weight"] for model in models.values()]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])
    again = replace(settings, seed=2)
    assert study["experts"]._recipe(folder / "pre", again) != stamp["recipe"]


def test_pairs_prefer_the_better_answer(study: dict[str, ModuleType]) -> None:
    tune, world = study["tune"], study["world"].World()
    tokenizer = study["styles"].extended_tokenizer(world)
    training = replace(study["train"].Training(), hidden=32, intermediate=64, layers=2)
    model = study["train"].new_model(tokenizer, training, 0)
    few = tune.Tuning(samples=4, new_tokens=8)
    rewards = study["experts"].preferences()
    drawn = tune.Answers(model, tokenizer, ["Who is he?", "Describe her."], rewards, few, 0)
    pairs = drawn.pairs(drawn.scores["exhaustive"])
    assert 1 <= len(pairs) <= 2
    for chosen, rejected in zip(pairs.chosen, pairs.rejected, strict=True):
        texts = tokenizer.batch_decode([chosen, rejected], skip_special_tokens=True)
        counts = rewards["exhaustive"](["?"], [texts])[0]
        assert counts[0] > counts[1]
    # Summed over the tokens of an answer alone, whatever stands beside it in the batch.
    both = tune.loglikelihoods(model, pairs.prompts[:1] * 2, (pairs.chosen[0], pairs.rejected[0]))
    alone = tune.loglikelihoods(model, pairs.prompts[:1], pairs.chosen[:1])
    torch.testing.assert_close(both[:1], alone)
    after = tune.prefer(model, pairs, 3, few, np.random.default_rng(0))
    gain = [tune.loglikelihoods(m, *pairs.at([0])).diff().item() for m in (model, after)]
    assert gain[1] < gain[0]  # rejected minus chosen


def test_words_of_the_rewards_are_said(study: dict[str, ModuleType]) -> None:
    """A word that no answer has would be a reward that nobody can earn."""
    config = load_study_file(STUDIES / "personalized-soups" / "study.yaml")
    for pole, wanted in (config.preferences or {}).items():
        said = answers(study, (pole, "exhaustive"), 100)
        for word in wanted.mentions or ():
            assert share_of_words([said], [word]).max() > 0.0, (pole, word)
