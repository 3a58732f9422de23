"""The command line as a user meets it: result on stdout, the rest on stderr, one line an error, the right exit code."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.pico_study import write_study


def test_help_and_version(cli: Cli) -> None:
    code, out, _ = cli("--version")
    assert (code, out.split()[0]) == (0, "mergefront")
    code, out, err = cli()
    assert code == 2
    assert "launch" in out + err
    for command in ("check", "launch", "resume", "status", "front", "export", "verify", "report"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert "Usage" in out


def test_the_command_line_starts_light() -> None:
    """`--help` must not wait for torch."""
    heavy = "{'torch', 'transformers', 'optuna', 'matplotlib'}"
    code = f"import search.cli.main, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_launch_resume_status_front(cli: Cli, tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", trials=3)
    code, out, err = cli("check", study)
    assert code == 0
    assert "architecture and tokenizers agree" in out
    assert "change nothing" not in out
    assert not (tmp_path / "runs").exists(), "check runs nothing"
    code, out, err = cli("check", study, "--set", f"parents.post={tmp_path / 'study' / 'pre'}")
    assert "7 of 7 coefficients change nothing" in out
    code, out, err = cli("launch", study)
    assert code == 0, err
    assert "Traceback" not in err
    assert "\r" not in err, "no bar where nobody looks"
    assert "\x1b" not in err
    assert "new, 14 to go" in err
    assert "trial 0 (pre)" in err
    assert "next: mergefront report pico" in err
    assert "report split" in out
    code, out, err = cli("launch", study)
    assert code == 0
    assert "resuming: 14 done, 0 to go" in err
    assert "trial 0" not in err
    code, out, err = cli("resume", "pico", "--trials", "+2")
    assert code == 0
    assert "resuming: 14 done, 2 to go" in err
    code, out, _ = cli("status", study)
    assert "16 complete; 0 of 16 to go" in out
    code, out, _ = cli("status", "pico", "--json")
    assert json.loads(out)["trials"] == {
        "complete": 16,
        "stopped": 0,
        "running": 0,
        "waiting": 0,
        "failed": 0,
    }
    code, out, err = cli("launch", study, "--fresh")
    assert (code, "exists" in err) == (2, True)
    code, out, err = cli("launch", study, "--set", "space.high=1.1")
    assert code == 2
    assert "space.high: 1.2 -> 1.1" in err
    code, out, err = cli("launch", study, "--show-config", "--set", "space.high=1.1")
    assert json.loads(out)["space"]["high"] == 1.1


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_front_json_follows_the_contract(cli: Cli, finished_study: tuple[Path, str]) -> None:
    study, url = finished_study
    code, out, err = cli("front", "pico", "--storage", url, "--format", "json")
    assert (code, err) == (0, "")
    front = json.loads(out)
    assert front["study"] == "pico"
    assert front["objectives"] == [
        {"name": "accuracy", "direction": "maximize"},
        {"name": "ece", "direction": "minimize"},
    ]
    assert set(front["reference"]) == {"accuracy", "ece"}
    assert set(front["hypervolume"]) == {"search", "report"}
    assert all(math.isfinite(x) for x in numbers(front))
    assert [t["kind"] for t in front["trials"]] == [
        "pre",
        "post",
        *["uniform"] * 9,
        *["search"] * 8,
        *["alternative"] * 2,
    ]
    calibrated = front["trials"][-2:]
    assert [trial["label"] for trial in calibrated] == ["post + temperature", "post + daca"]
    assert all(trial["temperature"] > 0 and not trial["front"] for trial in calibrated)
    for trial in front["trials"]:
        assert set(trial["recipe"]["coefficients"]) >= {"embeddings", "layer.0.attention", "final_norm"}
        for cell in trial["search"].values():
            assert cell["low"] <= cell["value"] <= cell["high"]
        if trial["front"] or trial["kind"] != "search":
            assert set(trial["report"]) == {"accuracy", "ece", "brier", "nll", "auroc"}
    assert any(trial["front"] for trial in front["trials"])
    assert cli("front", study, "--storage", url, "--format", "json")[1] == out, (
        "same bytes twice, by name or by file"
    )
    code, out, _ = cli("front", "pico", "--storage", url, "-f", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row["trial"]) for row in rows] == [*range(19), 1, 1]
    assert float(rows[1]["layer.1.mlp"]) == 1.0
    for split in ("search", "report"):
        code, out, _ = cli("front", "pico", "--storage", url, "--split", split)
        assert out.startswith(f"pico: {split} split, 20 questions")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("launch", "none.yaml"), 2, "none.yaml: no such study file"),
        (("status", "none"), 4, "runs/none/study.db: no such storage. Launch a study first"),
        (("front", "pico", "--storage", "mysql://x"), 4, "wanted sqlite:///PATH or postgresql"),
        (("front", "pico", "--storage", "{url}", "--split", "test"), 2, "Invalid value"),
        (
            ("export", "lama", "--storage", "{url}", "--out", "x"),
            4,
            "no study 'lama'. This storage has: pico",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "trial:99"),
            2,
            "no complete trial",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "bset"),
            2,
            "wanted knee, best-accuracy",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "best-nll"),
            2,
            "'nll' is no objective",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "prefer:ece=-1"),
            2,
            "prefer: weights",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "prefer:ece"),
            2,
            "wanted such as",
        ),
        (
            ("export", "pico", "--storage", "{url}", "--out", "x", "--select", "knee", "--all"),
            2,
            "give one of them",
        ),
        (
            ("resume", "pico", "--storage", "{url}", "--trials", "many"),
            2,
            "wanted a number such as 80, or +50",
        ),
        (("resume", "pico", "--storage", "{url}", "--device", "tpu"), 2, "wanted auto, cpu, cuda"),
        (("resume", "pico", "--storage", "{url}", "--device", "cuda:7"), 2, "CUDA devices here"),
        (("launch", "{study}", "--set", "space.hgih=1"), 2, "Did you mean 'high'?"),
        (("launch", "{study}", "--set", "objectives=[accuracy@nowhere]"), 2, "nowhere"),
        (("verify", "nowhere"), 1, "nowhere"),
    ],
)
def test_errors_are_one_line(
    cli: Cli, finished_study: tuple[Path, str], arguments: tuple[str, ...], code: int, message: str
) -> None:
    study, url = finished_study
    before = (study.parent / "runs" / "study.db").read_bytes()
    found, out, err = cli(*(a.replace("{url}", url).replace("{study}", str(study)) for a in arguments))
    assert (found, out) == (code, ""), err
    assert message in err
    assert "Traceback" not in err
    if "Usage" not in err:
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert (study.parent / "runs" / "study.db").read_bytes() == before
    assert not Path("x").exists()


def test_storage_from_the_environment(
    cli: Cli, finished_study: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = finished_study
    monkeypatch.setenv("OPTUNA_STORAGE", url)
    assert cli("status", "pico")[0] == 0
    monkeypatch.setenv("MERGEFRONT_STORAGE", "sqlite:///nowhere.db")
    assert cli("status", "pico")[0] == 4
    assert cli("status", "pico", "--storage", url)[0] == 0
