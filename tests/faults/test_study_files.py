"""Study files that are mistaken, hostile or none: one line with the key, before anything that they name is opened."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from search.config.strict_yaml import MAX_BYTES, load_yaml
from search.config.study_file import load_study_file, parse_study
from search.errors import ConfigError
from tests.config.test_config import GOOD, load
from tests.conftest import Cli


@pytest.mark.fault(22)
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
        ("trials: 64", "trials: 1e9", "trials: found 1000000000.0: input should be a valid integer"),
        ("trials: 64", "trials: .inf", "trials: found inf"),
        ("trials: 64", "trials:", "trials: found None"),
        ("trials: 64", "trials: 64\ntokens: 0", "tokens: found 0: .* greater than or equal to 1"),
        ("trials: 64", "trials: 64\nbatch_tokens: 1.5", "batch_tokens: found 1.5"),
        ("trials: 64", "trials: 64\ntrial_seconds: 0", "trial_seconds: found 0.*greater than 0"),
        ("trials: 64", "trials: 64\ntrial_seconds: .nan", "trial_seconds: found nan"),
        ("trials: 64", "trials: 64\ntrial_seconds: 10m", "trial_seconds: found '10m'"),
        ("trials: 64", "trial_second: 64", r"trial_second: unknown key. Did you mean 'trial_seconds'\?"),
        ("seed: 0}\ntrials", "seed: -1}\ntrials", "sampler.seed: found -1"),
        (
            "seed: 0}\ntrials",
            "seed: 18446744073709551616}\ntrials",
            "sampler.seed: found 18446744073709551616",
        ),
        ("seed: 0}\ntrials", "seed: 1.5}\ntrials", "sampler.seed: found 1.5"),
        ("seed: 0}\ntrials", "seed: '0'}\ntrials", "sampler.seed: found '0'"),
        (
            "parents: {pre: ./models/pre, post: ./models/post}",
            "parents: {pre: ./models/pre}",
            "post, experts: found neither",
        ),
        (
            "parents: {pre: ./models/pre, post: ./models/post}",
            "parents: [a, b]",
            "parents: found a list, wanted keys such as pre, post",
        ),
        ("pre: ./models/pre", "pre: ''", "parents.pre: found ''"),
        (
            "post: ./models/post",
            "experts: {../../x: ./a, b: ./b}",
            "experts: found name '../../x', wanted 1 to 32 of a-z",
        ),
        ("post: ./models/post", "experts: {a/b: ./a, b: ./b}", "experts: found name 'a/b'"),
        ("post: ./models/post", "experts: {'a\\b': ./a, b: ./b}", "experts: found name"),
        ("post: ./models/post", "experts: {;DROP: ./a, b: ./b}", "experts: found name ';DROP'"),
        ("post: ./models/post", f"experts: {{{'x' * 300}: ./a, b: ./b}}", "experts: found name 'xxx"),
        ("post: ./models/post", "experts: {größe: ./a, b: ./b}", "experts: found name 'größe'"),
        ("post: ./models/post", "experts: {knee: ./a, b: ./b}", "experts: found name 'knee'"),
        ("name: smollm2-arc", "name:", "name: found None"),
        ("name: smollm2-arc", "name: ''", "name: found ''"),
        ("name: smollm2-arc", "name: a b", "name: found 'a b'"),
        ("name: smollm2-arc", 'name: "a\\n"', r"name: found 'a\\n'"),
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
    assert str(refusal.value).isprintable(), "wanted one line"
    assert len(str(refusal.value)) < 600


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such study file"):
        load_study_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study_file(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_study_file(tmp_path / "binary.yaml")
    for text, found in (("", "nothing"), ("- a", "a list"), ("abc", "plain text")):
        with pytest.raises(ConfigError, match=f"found {found}"):
            load(tmp_path, text)


@pytest.mark.fault(22)
def test_an_alias_bomb_is_refused_at_once() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
    )
    began = time.process_time()
    with pytest.raises(ConfigError, match="anchors and aliases"):
        load_yaml(bomb, "bomb")
    assert time.process_time() - began < 1


@pytest.mark.fault(22)
def test_a_key_with_a_line_break_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^x: parents\.\\n: unknown key\.$"):
        parse_study(load_yaml(GOOD, "good") | {"parents": {"\n": None}}, "x")


@pytest.mark.fault(22)
@pytest.mark.parametrize("place", [r"./a\0b", "~no-such-user-here/x", "./loop"])
@pytest.mark.parametrize("old", ["pre: ./models/pre", "path: ./questions/mine.jsonl"])
def test_places_that_are_no_paths(old: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    key, _, _ = old.partition(":")
    with pytest.raises(ConfigError, match="no path here") as refusal:
        load(tmp_path, GOOD.replace(old, f'{key}: "{place}"'))
    assert str(refusal.value).isprintable()


@pytest.mark.fault(22)
def test_long_values_and_keys_are_cut_short(tmp_path: Path) -> None:
    """Nobody reads 60 KiB of terminal output."""
    long = "x" * 60_000
    for old, new in (
        ("name: smollm2-arc", f"name: {long}"),
        ("trials: 64", f"{long}: 64"),
        ("granularity: layer", f"granularity: {long}"),
        ("[accuracy, ece]", f"[accuracy, {long}]"),
        ("method: linear", f"method: {long}"),
        ("name: tpe", f"name: {long}"),
    ):
        with pytest.raises(ConfigError) as refusal:
            load(tmp_path, GOOD.replace(old, new))
        assert len(str(refusal.value)) < 600


@pytest.mark.fault(22)
def test_a_mistaken_study_file_leaves_nothing_behind(cli: Cli, tmp_path: Path) -> None:
    """Oracle: the folder holds the study file and nothing else, and the exit code is that of usage."""
    study = tmp_path / "study.yaml"
    for text in (GOOD.replace("trials: 64", "trials: -1"), GOOD.replace("smollm2-arc", "../../x"), "{", ""):
        study.write_text(text)
        code, out, err = cli("launch", study)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {study}")
        assert list(tmp_path.iterdir()) == [study]
    assert list(tmp_path.parent.glob("x*")) == []
