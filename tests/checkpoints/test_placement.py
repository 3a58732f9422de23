"""Devices: what `--device` takes, and a model whose layers are on devices of their own (here: one CPU, with hooks)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from objectives.scoring.scorer import Scorer
from search.checkpoints.parents import Parents
from search.checkpoints.placement import choose_device, device_title, dispatch
from search.errors import ConfigError
from search.merging import live
from search.merging.blend import make_blend
from tests.objectives.test_scoring import some_questions
from tests.pico import pico_model, pico_tokenizer, save_pair


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "wanted auto, cpu, cuda"),
        ("meta", "wanted auto, cpu, cuda"),
        ("cuda:99", "CUDA devices here"),
    ],
)
def test_a_device_that_is_not_here_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert choose_device("auto") == device_title("cpu") == "cpu"
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        choose_device("spread")


def spread_by_hand(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """Every module on a device of its own, all of them this CPU: accelerate's hooks are the real ones."""
    assert device == "spread"
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    named = ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]
    return dispatch(model, dict.fromkeys(named, "cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mistral"])
def test_scores_through_hooks_are_the_same(arch: str) -> None:
    questions = some_questions(8, 3, False)
    wanted = Scorer(pico_model(arch), pico_tokenizer()).loglikelihoods(questions).total
    scorer = Scorer(spread_by_hand(pico_model(arch), "spread"), pico_tokenizer())
    assert np.array_equal(scorer.loglikelihoods(questions).total, wanted)
    assert not scorer.notes


def test_merges_reach_spread_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = Parents.pair(*map(str, save_pair(tmp_path)))
    coefficients = dict.fromkeys(parents.names, (0.4,))
    here = live.LiveModel(parents)
    here.apply(make_blend(parents, coefficients))
    monkeypatch.setattr(live, "place", spread_by_hand)
    spread = live.LiveModel(parents, device="spread")
    spread.apply(make_blend(parents, coefficients))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(spread.model(tokens).logits, here.model(tokens).logits)
    assert hasattr(spread.model.model.layers[0], "_hf_hook")


def test_no_room_on_the_gpus() -> None:
    with pytest.raises(ConfigError, match=r"no room for model\.norm on the GPUs"):
        dispatch(pico_model("llama"), {"model.embed_tokens": 0, "model.norm": "disk"})
