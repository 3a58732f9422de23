"""studies/functional-dual-anchors: laws of its world, and the whole of it with pico models."""

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

from search.checkpoints.checkpoint import Checkpoint
from search.merging.anchors.options import AdaptOptions, AnchorOptions

STUDIES = Path(__file__).parents[2] / "studies"
MODULES = ("train", "world", "experts", "merges", "tables", "run")


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules. They import each other by plain names, so these are given back afterwards."""
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    path = list(sys.path)
    sys.path[:0] = [str(STUDIES / "functional-dual-anchors"), str(STUDIES / "quickstart")]
    yield {name: importlib.import_module(name) for name in MODULES}
    sys.path[:] = path
    for name in MODULES:
        del sys.modules[name]
        if (old := before[name]) is not None:
            sys.modules[name] = old


def small(study: dict[str, ModuleType], seed: int = 0) -> Any:
    experts = study["experts"]
    training = replace(
        experts.Settings().training, hidden=16, intermediate=24, layers=2, heads=2,
        pretrain_steps=2, supervise_steps=2, batch=8,
    )  # fmt: skip
    return replace(experts.Settings(seed=seed), training=training, questions=80)


def test_each_group_has_its_own_people_and_its_own_questions(study: dict[str, ModuleType]) -> None:
    experts = study["experts"]
    settings = experts.Settings()
    told = {group: experts.news(settings, group) for group in experts.GROUPS}
    names = [name for one in told.values() for name in one.names]
    assert sorted(names) == sorted(settings.world.names)
    assert len(set(names)) == len(names)
    for group, one in told.items():
        kept = {question.question for question in experts.kept_questions(one, settings.questions)}
        assert len(kept) == settings.questions
        assert kept == one.kept
        rng = np.random.default_rng(0)
        asked = {question.question for question in one.questions(5000, "trained", rng)}
        assert not asked & kept, "what is reported was never trained on"
        assert all(any(name in text for name in one.names) for text in asked)
        assert not any(text in kept for text in experts.training_texts(settings, group, 50))
    old = settings.world.facts.argmax(axis=2)[:30]
    new = told["north"].facts.argmax(axis=2)
    assert 0.75 < (old != new).mean() < 0.97, "news are drawn from eight values, whatever was true before"


@pytest.mark.slow
def test_the_whole_study_with_pico_models(
    study: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, tables, merges = study["run"], study["tables"], study["merges"]
    monkeypatch.setattr(run, "Settings", lambda seed: small(study, seed))
    monkeypatch.setattr(run, "COEFFICIENTS", (0.3, 0.6))
    monkeypatch.setattr(run, "SCALES", (1.0,))
    monkeypatch.setattr(run, "ANCHORS", AnchorOptions(n=4, tokens=20))
    monkeypatch.setattr(run, "ADAPT", AdaptOptions(epochs=2, batch=8))
    monkeypatch.setattr(run, "OPTIMISED", (merges.Anchors("anchors", "weight", 2),))
    monkeypatch.setattr(run, "CURVE", tuple(merges.Anchors("anchors", "weight", k) for k in (0, 2)))
    monkeypatch.setattr(tables, "STEPS", (0, 2))
    folders = [tmp_path / f"seed-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        run.seed_results(seed, folder)
    base = Checkpoint.open(folders[0] / "pre")
    for group in study["experts"].GROUPS:
        expert = Checkpoint.open(folders[0] / group)
        same = [name for name in base.names if bool((base.tensor(name) == expert.tensor(name)).all())]
        assert sorted(same) == ["model.embed_tokens.weight", "model.norm.weight"], "as under an adapter"
    text = tables.write_tables(folders, tmp_path)
    assert (tmp_path / "order.png").read_bytes()[:4] == b"\x89PNG"
    for row in ("task arithmetic", "FDA(pre)", "FDA(task arithmetic)", "FDA(TSV-Merge)", "FDA(WUDI)"):
        assert f"| {row} |" in text
    results = tables.Results.read(folders, "report")
    assert len(results.task) == 4 * 48
    pre = results.correct["pre"]
    assert results.mean("pre")[0] == pytest.approx(pre.mean(axis=1)), "groups of equal size"
    assert (results.share("north")[0] >= 0).all()
    facts = json.loads((folders[0] / "measured.json").read_text())["rows"]
    assert facts["real data(pre)"]["seconds"] > 0
    stamp = (folders[0] / "measured.json").stat().st_mtime_ns
    run.seed_results(0, folders[0])
    assert (folders[0] / "measured.json").stat().st_mtime_ns == stamp, "measured once"


def test_the_choice_is_made_on_the_search_half(study: dict[str, ModuleType]) -> None:
    merges = study["merges"]
    bench = object.__new__(merges.Bench)
    bench.task = {half: np.array([0, 1, 2, 3]) for half in merges.HALVES}
    answers = {
        "worse": {"search": [True, False, False, False], "report": [True] * 4},
        "better": {"search": [True, True, False, False], "report": [False] * 4},
        "equal": {"search": [True, True, False, False], "report": [False] * 4},
    }
    bench._correct = {
        (name, half): np.array(row) for name, halves in answers.items() for half, row in halves.items()
    }
    ones = [merges.Made(name, Path(name), 0.0) for name in answers]
    assert bench.best(ones).label == "better"
    assert bench.accuracy(ones[0], "report") == 1.0
