"""The study file: every wrong one gets one line with the key, every right one survives a round trip."""

from __future__ import annotations

from pathlib import Path

from search.config.strict_yaml import load_yaml
from search.config.study_file import StudyConfig, differences, load_study_file, parse_study

GOOD = """\
schema: 1
name: smollm2-arc
parents: {pre: ./models/pre, post: ./models/post}
merge: {method: linear, dtype: float32}
space: {granularity: layer, components: [attention, mlp], low: 0.0, high: 1.0}
tasks:
  - {preset: arc_easy, path: ./data/ARC-Easy, split: validation, format: continuation, normalize: tokens, shots: 0}
  - {path: ./questions/mine.jsonl, format: letter, shots: 5, limit: 200}
split: {search: 0.5, seed: 0}
objectives: [accuracy, ece]
sampler: {engine: optuna, name: tpe, seed: 0}
trials: 64
"""


def load(tmp_path: Path, text: str, *overrides: str) -> StudyConfig:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_study_file(path, overrides)


def test_the_example_of_the_contract(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.parents.pre == str(tmp_path / "models/pre")
    assert config.tasks[1].limit == 200
    assert parse_study(config.to_json(), "stored") == config
    assert differences(config, config) == []


def test_a_hub_id_is_left_alone_and_a_folder_of_that_name_is_not(tmp_path: Path) -> None:
    text = GOOD.replace("./models/pre", "org/name@main")
    assert load(tmp_path, text).parents.pre == "org/name@main"
    (tmp_path / "org/name@main").mkdir(parents=True)
    assert load(tmp_path, text).parents.pre == str(tmp_path / "org/name@main")


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        GOOD,
        "space.high=1.2",
        "tasks.1.limit=9",
        "objectives=[accuracy, 'ece:10', nll]",
        "trials=7",
    )
    assert (config.space.high, config.tasks[1].limit, config.trials) == (1.2, 9, 7)
    assert config.objectives == ["accuracy", "ece:10", "nll"]
    assert differences(load(tmp_path, GOOD), config) == [
        "space.high: 1.0 -> 1.2",
        "tasks.1.limit: 200 -> 9",
        "objectives.1: 'ece' -> 'ece:10'",
        "objectives.2: None -> 'nll'",
    ]


def test_yaml_is_1_2() -> None:
    value = load_yaml("{a: 1e-3, b: no, c: 012, d: 1:30, e: on, f: 0o17}", "x")
    assert value == {"a": 0.001, "b": "no", "c": 12, "d": "1:30", "e": "on", "f": 15}
