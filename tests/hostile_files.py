"""Checkpoint folders to damage, and the one line with which a damaged one must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.checkpoints.checkpoint import SINGLE, Checkpoint
from search.config.study_file import load_study_file
from search.errors import CheckpointError, IncompatibleModelsError
from search.running.launch import create
from tests.pico_study import write_questions, write_study


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def shard(header: object, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def entry(start: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, **values: torch.Tensor | None) -> None:
    """Add or replace tensors of a single-file checkpoint; None removes one."""
    tensors = {**load_file(folder / SINGLE), **values}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / SINGLE)


def refused_pair(pre: Path, post: Path, kind: type[Exception] = IncompatibleModelsError) -> str:
    """What launching a study of the pair says; afterwards there is no study, and no folder for one."""
    write_questions(pre.parent / "questions.jsonl", 8)
    study = write_study(pre.parent)
    config = load_study_file(study, [f"parents.pre={pre}", f"parents.post={post}"])
    with pytest.raises(kind) as caught:
        create(config, f"sqlite:///{pre.parent / 'runs' / 'study.db'}", "cpu")
    assert not (pre.parent / "runs").exists(), "something was stored"
    message = str(caught.value)
    assert message.isprintable(), "wanted one line"
    return message
