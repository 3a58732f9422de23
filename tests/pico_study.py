"""A whole study in seconds: two pico parents, made-up questions, a real storage."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.pico import save_experts, save_pair

WORDS = ("red", "green", "blue", "old", "new", "fast", "slow", "big", "tiny", "warm")


def write_questions(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Four-option questions of random words; nothing is to be learnt from them."""
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        question = f"{index}: {' '.join(draw.choices(WORDS, k=draw.randint(2, 6)))}?"
        lines.append({"question": question, "choices": draw.sample(WORDS, 4), "answer": draw.randrange(4)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_open_questions(path: Path, count: int = 24, seed: int = 1) -> Path:
    """Questions without options: half of all letters and digits are right, so that random models are, now and then."""
    draw = random.Random(seed)
    lines = [
        {
            "question": f"{index} {draw.choice(WORDS)}?",
            "answer": draw.sample("bcdefghijklmnopqrstuvwxyz0123456789", 17),
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_prompts(path: Path, count: int = 10) -> Path:
    """Prompts that differ; nobody knows an answer."""
    path.write_text(
        "".join(json.dumps({"prompt": f"{index}: {WORDS[index % 10]}"}) + "\n" for index in range(count))
    )
    return path


def write_study(
    folder: Path,
    *,
    arch: str = "llama",
    parents: dict[str, Any] | None = None,
    experts: Sequence[str] = (),
    **keys: Any,
) -> Path:
    """Writes parents, questions and study file below `folder`; `keys` replace sections of the study file.

    Args:
        parents: options of the pico models. experts: several by name, instead of `post`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pre").exists():
        if experts:
            save_experts(folder, experts, arch, **(parents or {}))
        else:
            save_pair(folder, arch, **(parents or {}))
        write_questions(folder / "questions.jsonl")
    places: dict[str, Any] = {"post": "./post"}
    if experts:
        places = {"experts": {name: f"./{name}" for name in experts}}
    study = {
        "schema": 1,
        "name": "pico",
        "parents": {"pre": "./pre", **places},
        "space": {"granularity": "layer", "components": ["attention", "mlp"], "low": -0.2, "high": 1.2},
        "tasks": [{"path": "./questions.jsonl", "name": "made-up"}],
        "objectives": ["accuracy", "ece"],
        "sampler": {"engine": "optuna", "name": "nsga2", "seed": 0, "population": 12},
        "trials": 6,
        "batch_tokens": 512,  # measured ones may differ between two studies that shall be equal
        **keys,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path
