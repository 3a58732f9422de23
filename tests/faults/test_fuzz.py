"""Any bytes, wherever bytes from outside are read: a valid object or one line of the documented error, in a second."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from search.config.strict_yaml import load_yaml
from search.config.study_file import StudyConfig, parse_study
from search.errors import ConfigError
from tests.config.test_config import GOOD
from tests.fault_table import Fault
from tests.faults import fuzz_targets
from tests.faults.fuzz_targets import TARGETS, WITH_ATHERIS, quickly

_HOSTILE = [b"\x00", b"\xff", b"\n", b"\\ud800", b"\\u0000", b"\x1b[2J", b"1e999", b"NaN", b"-1", b"9" * 5000]
_HOSTILE += [b"{}", b"[]", b"null", b"true", b"18446744073709551616", b"../", b'""', b"[" * 500, b"{" * 40]
_HOSTILE += [b"&a", b"*a", b"!!", b": "]


def _damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A good input with up to four pieces replaced by something hostile, or by a piece of itself."""

    @st.composite
    def strategy(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(seeds))
        for _ in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, len(data)))
            end = draw(st.integers(start, min(len(data), start + 24)))
            new = draw(
                st.one_of(st.sampled_from(_HOSTILE), st.binary(max_size=6), st.just(data[start // 2 : start]))
            )
            data = data[:start] + new + data[end:]
        return data

    return strategy()


_CASE = {"study_file": 22, "manifest": 16, "switcher": 16, "evidence": 16, "piece": 16, "prompts": 27}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault(_CASE.get(name, 15))) for name in TARGETS]
)
def test_any_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Oracle: the assertions of the target, and that it raises nothing else."""
    monkeypatch.setattr(fuzz_targets, "FOLDER", tmp_path)
    target, seeds = TARGETS[name]
    count = [0]

    @settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(_damaged(seeds), _damaged(seeds), st.binary(max_size=300)))
    def fuzz(data: bytes) -> None:
        count[0] += 1
        quickly(target, data)

    for seed in seeds:
        target(seed)
    for data in (b"{", b"\x00" * 16):  # what is imported at the first error is no reader's time
        target(data)
    fuzz()
    fault.struck(count[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.fault(_CASE.get(name, 15))) for name in WITH_ATHERIS]
)
def test_any_bytes_by_coverage(name: str, tmp_path: Path, fault: Fault) -> None:
    """libFuzzer in a process of its own looks for inputs that reach new lines; always the same ones."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: it has no wheel for this Python")
    (tmp_path / "corpus").mkdir()
    runs = 20_000 if name in ("study_file", "header") else 10_000
    command = [sys.executable, "-m", "tests.faults.fuzz_targets", name, str(tmp_path / "corpus")]
    command += [f"-runs={runs}", "-seed=1", "-max_len=4096", "-timeout=30", f"-artifact_prefix={tmp_path}/"]
    result = subprocess.run(command, capture_output=True, cwd=os.getcwd(), timeout=1200)
    said = result.stderr.decode(errors="replace")
    assert result.returncode == 0, said[-6000:]
    done = re.search(r"Done (\d+) runs in (\d+) second", said)
    assert done is not None, said[-2000:]
    fault.struck(int(done[1]))
    print(f"{name}: {done[1]} runs in {done[2]} s")


def _parsed_or_refused(study: object) -> StudyConfig | None:
    """The config, or None if it was refused in one line; any other exception is a failure."""
    with fuzz_targets.one_line(ConfigError):
        return parse_study(study, "fuzz")
    return None


@pytest.mark.fault(22)
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda b: b.decode("utf-8", "replace"))))
def test_any_text_is_a_config_error_or_a_value(text: str) -> None:
    with fuzz_targets.one_line(ConfigError):
        parse_study(load_yaml(text, "fuzz"), "fuzz")


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)


@pytest.mark.fault(22)
@settings(max_examples=200, deadline=None)
@given(key=st.sampled_from(list(StudyConfig.model_fields)), value=_VALUES)
def test_any_value_in_any_section_is_an_error_or_valid(key: str, value: object) -> None:
    study = load_yaml(GOOD, "good") | {"schema" if key == "schema_version" else key: value}
    config = _parsed_or_refused(study)
    assert config is None or parse_study(config.to_json(), "again") == config
