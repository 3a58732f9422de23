"""The study file: every wrong one gets one line with the key, every right one survives a round trip."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.config import StudyConfig, differences, load_study_file, parse_study
from search.errors import ConfigError
from search.strict_yaml import MAX_BYTES, load_yaml

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


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("high: 1.0", "hihg: 1.0", r"study.yaml: space.hihg: unknown key. Did you mean 'high'\?"),
        ("sampler:", "samplr:", r"samplr: unknown key. Did you mean 'sampler'\?"),
        ("limit: 200", "limti: 200", r"tasks.1.limti: unknown key. Did you mean 'limit'\?"),
        ("trials: 64", "trials: '64'", "trials: found '64': input should be a valid integer"),
        ("trials: 64", "trials: -1", "trials: found -1: .* greater than or equal to 0"),
        ("trials: 64", "trials: 1000000000", "trials: found 1000000000: .* less than or equal to 1000000"),
        ("trials: 64", "trials: yes", "trials: found 'yes'"),
        ("seed: 0}\ntrials", "seed: zero}\ntrials", "sampler.seed: found 'zero'"),
        ("name: smollm2-arc", "name: ../../x", "name: found '../../x'"),
        ("name: smollm2-arc", "name: a/b", "name: found 'a/b'"),
        ("name: smollm2-arc", f"name: {'x' * 300}", "name: found 'x"),
        ("name: smollm2-arc", "name: ;DROP", "name: found ';DROP'"),
        ("name: smollm2-arc", 'name: "C:\\\\"', "name: found"),
        ("name: smollm2-arc", "name: größe", "name: found 'größe'"),
        ("low: 0.0", "low: .nan", "space.low: found nan"),
        ("low: 0.0", "low: 0.2", "space.low: found 0.2: .* less than or equal to 0"),
        ("high: 1.0", "high: -1.0", "space.high: found -1.0"),
        ("high: 1.0", "high: .inf", "space.high: found inf"),
        (
            "granularity: layer",
            "granularity: layers",
            "space.granularity: found 'layers', wanted uniform, layer, tensor or block:N",
        ),
        ("granularity: layer", "granularity: block:0", "space.granularity: found 'block:0'"),
        ("granularity: layer", "granularity: tensor", "components: do not go with granularity tensor"),
        ("[attention, mlp]", "[attention, attention]", "components: found one twice"),
        ("[attention, mlp]", "[attention, moe]", "space.components.1: found 'moe'"),
        ("name: tpe", "name: tpee", "sampler: name: optuna has no 'tpee' here. Choose one of: tpe, nsga2"),
        ("engine: optuna", "engine: pymoo", "sampler: name: pymoo has no 'tpe' here"),
        ("seed: 0}\ntrials", "seed: 0, population: 9}\ntrials", "population: does not go with optuna tpe"),
        ("[accuracy, ece]", "[accuracy, eec]", "objectives: .*'eec'.*Did you mean 'ece'"),
        ("[accuracy, ece]", "[ece, ece]", "objectives: found one twice"),
        ("[accuracy, ece]", "[]", "objectives: .* at least 1 item"),
        ("schema: 1", "schema: 2", "schema: found 2"),
        ("schema: 1\n", "", "schema: missing"),
        ("search: 0.5", "search: 1.0", "split.search: found 1.0"),
        ("path: ./questions/mine.jsonl, ", "", "tasks.1: names no source"),
        ("trials: 64", "trials: 64\ntrials: 65", "line 13: .*duplicate key"),
        ("trials: 64", "trials: &a 64", "line 12: anchors and aliases are not read"),
        ("trials: 64", "trials: !!python/object:os.system 64", "line 12: tags .* are not read"),
        ("trials: 64", "trials: 64\n---\nb: 1", "more than one YAML document"),
        ("trials: 64", "trials: [[[", "line .*not valid YAML"),
        ("trials: 64", "trials: " + "[" * 5000, "nested deeper than 16 levels"),
        ("trials: 64", "trials: 64 # " + "x" * MAX_BYTES, "larger than 64 KiB"),
    ],
)
def test_one_line_names_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message) as refusal:
        load(tmp_path, GOOD.replace(old, new))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space", "wanted key=value"),
        ("=3", "wanted key=value"),
        ("space.high=[", "--set space.high.*not valid YAML"),
        ("tasks.7.limit=1", "'7' leads nowhere"),
        ("name.x=1", "'x' leads nowhere"),
        ("space.hgih=1", "space.hgih: unknown key"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD, override)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such study file"):
        load_study_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study_file(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_study_file(tmp_path / "binary.yaml")
    for text, found in (("", "an empty file"), ("- a", "a list"), ("abc", "plain text")):
        with pytest.raises(ConfigError, match=f"found {found}"):
            load(tmp_path, text)


def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="anchors and aliases"):
        load_yaml(bomb, "bomb")
    assert time.monotonic() - began < 1


def test_yaml_is_1_2() -> None:
    value = load_yaml("{a: 1e-3, b: no, c: 012, d: 1:30, e: on, f: 0o17}", "x")
    assert value == {"a": 0.001, "b": "no", "c": 12, "d": "1:30", "e": "on", "f": 15}


def _parsed_or_refused(parse: Callable[[], StudyConfig]) -> StudyConfig | None:
    """The config, or None if it was refused in one line; any other exception is a failure."""
    refusal = ""
    try:
        return parse()
    except ConfigError as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal
    return None


@settings(max_examples=300, deadline=1000)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda b: b.decode("utf-8", "replace"))))
def test_any_text_is_a_config_error_or_a_value(text: str) -> None:
    _parsed_or_refused(lambda: parse_study(load_yaml(text, "fuzz"), "fuzz"))


def test_a_key_with_a_line_break_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^x: parents\.\\n: unknown key\.$"):
        parse_study(load_yaml(GOOD, "good") | {"parents": {"\n": None}}, "x")


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)


@settings(max_examples=200, deadline=1000)
@given(key=st.sampled_from(list(StudyConfig.model_fields)), value=_VALUES)
def test_any_value_in_any_section_is_an_error_or_valid(key: str, value: object) -> None:
    study = load_yaml(GOOD, "good") | {"schema" if key == "schema_version" else key: value}
    config = _parsed_or_refused(lambda: parse_study(study, "fuzz"))
    assert config is None or parse_study(config.to_json(), "again") == config
