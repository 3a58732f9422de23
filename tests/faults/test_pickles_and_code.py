"""Pickles and code in a model folder are never run, and nobody is called: canary files and blocked sockets say so."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from search.checkpoints.checkpoint import SINGLE
from search.checkpoints.parents import Parents
from search.errors import CheckpointError
from search.merging.live import LiveModel
from tests.conftest import Cli
from tests.hostile_files import copy, edit_json, edit_tensors, refused, refused_pair
from tests.pico import save_pair, save_pico
from tests.pico_study import write_study


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "broken JSON"),
        ("[1]", "JSON list"),
        ("[" * 100_000, "broken JSON"),
        ("{}", "no model_type"),
        ('{"model_type": "llama", "model_type": "llama"}', "given twice"),
        (
            '{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}',
            "auto_map: the model brings",
        ),
        ('{"model_type": "llama", "text_config": {"auto_map": {"A": "b.C"}}}', "text_config.auto_map"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "weights are quantised"),
    ],
)
def test_config_json_with_code_or_damage(
    text: str, wanted: str, saved: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert wanted in message
    assert "config.json" in message


class Canary:
    """Pickles into a command that writes a file; the tests look for the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.fault(19)
@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickle_by_name(suffix: str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(saved[0], tmp_path / "model")
    (folder / SINGLE).unlink()
    (folder / f"pytorch_model.{suffix}").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert "pickled weights are never opened" in refused(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault(19)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "zip", "torch"])
def test_pickle_under_another_name(protocol: int | str, saved: tuple[Path, Path], tmp_path: Path) -> None:
    folder, canary = copy(saved[0], tmp_path / "model"), Canary(tmp_path / "canary")
    target = folder / SINGLE
    if protocol == "torch":
        torch.save({"a": canary}, target)
    elif protocol == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(canary))
    else:
        target.write_bytes(pickle.dumps(canary, protocol=int(protocol)))
    message = refused(folder)
    assert "not a safetensors file" in message
    assert protocol == 0 or "Pickled weights are never opened" in message
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault(20)
def test_tokenizer_missing_or_with_code(tmp_path: Path) -> None:
    pre, bare = save_pico(tmp_path / "pre"), save_pico(tmp_path / "bare", tokenizer=False)
    assert "no tokenizer can be loaded" in refused_pair(pre, bare, CheckpointError)
    evil = save_pico(tmp_path / "evil")
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    edit_json(evil / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    assert "tokenizer_config.json: auto_map" in refused_pair(pre, evil, CheckpointError)
    edit_json(evil / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "config.json: auto_map" in refused_pair(evil, pre, CheckpointError)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault(20)
def test_config_that_transformers_does_not_know(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_json(pre / "config.json", model_type="no-such-type")
    assert "transformers cannot read it" in refused_pair(pre, post, CheckpointError)
    edit_json(pre / "config.json", model_type="llama", hidden_act="no-such-function")
    edit_json(post / "config.json", hidden_act="no-such-function")
    assert "no causal language model can be built" in refused_pair(pre, post, CheckpointError)


@pytest.mark.fault(20)
def test_config_cannot_choose_the_attention_code(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    edit_json(
        post / "config.json", _attn_implementation="some-org/some-kernel", attn_implementation="some-org/k"
    )
    assert Parents.pair(str(pre), str(post)).names


@pytest.mark.fault(20)
def test_files_of_code_beside_good_weights_are_left_alone(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """What transformers would import or unpickle if it were asked to: none of it is opened, none of it runs."""
    canary = tmp_path / "canary"
    pre, post = (copy(saved[0], tmp_path / name) for name in ("pre", "post"))
    edit_tensors(post, **{"model.norm.weight": torch.full((32,), 1.5)})
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization.py", "__init__.py", "setup.py"):
        (post / name).write_text(f"open({str(canary)!r}, 'w')")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (post / name).write_bytes(pickle.dumps(Canary(canary)))
    LiveModel(Parents.pair(str(pre), str(post)))
    assert not canary.exists()


@pytest.mark.fault(20)
def test_a_launch_and_its_export_call_nobody(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the list of attempts, which an error that was swallowed cannot hide."""
    attempts: list[object] = []

    def blocked(*arguments: object, **named: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, blocked)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, blocked)
    study = write_study(tmp_path / "study", trials=2)
    for command in (
        ("launch", study),
        ("export", "pico", "--select", "knee", "--weights", "--out", "out"),
    ):
        code, _, err = cli(*command)
        assert code == 0, err
    assert attempts == []


def _alone(*command: str) -> list[str]:
    """The command in a network namespace of its own, where nothing is but a loopback device that is down."""
    return ["unshare", "--map-root-user", "--net", *command]


@pytest.mark.slow
@pytest.mark.fault(20)
def test_a_launch_needs_no_network(tmp_path: Path) -> None:
    try:
        allowed = subprocess.run(_alone("true"), capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("no network namespaces here")
    study = write_study(tmp_path / "study", trials=2)
    mergefront = (sys.executable, "-m", "search.cli.main")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for command in (
        ("launch", str(study), "--workers", "2"),
        ("export", "pico", "--select", "knee", "--weights", "--out", "out"),
    ):
        run = subprocess.run(
            _alone(*mergefront, *command), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
