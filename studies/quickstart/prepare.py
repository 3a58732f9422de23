"""Builds the quickstart pair: `pre` reads a generated world, `post` is taught to answer questions about it.

    python studies/quickstart/prepare.py

Writes build/pair/{pre,post,questions.jsonl,stamp.json} beside this file, in at most two minutes on two cores, offline.
A second call finds the stamp and does nothing. The pair appears whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from train import Training, new_model, prefer, pretrain, supervise
from world import Question, World, build_tokenizer

HERE = Path(__file__).resolve().parent
SOURCES = ("prepare.py", "train.py", "world.py")
# One thread: the model is too small to share (two threads were up to ten times slower on a busy machine), and the
# order of float additions, so the bytes of the weights, may depend on the number.
THREADS = 1


@dataclass(frozen=True)
class Settings:
    """All that the pair depends on, beside the sources. `seed` is that of the training, not of the world."""

    world: World = field(default_factory=World)
    training: Training = field(default_factory=Training)
    seed: int = 1
    questions: int = 4000


def held_out_questions(world: World, n: int) -> list[Question]:
    """`n` questions, no text twice, about entities that no question of the corpus or of post-training names.

    Of two draws with one text the first is kept, whatever its answer: so the answers keep their distribution.
    """
    rng = np.random.default_rng([world.seed, 3])
    found: dict[str, Question] = {}
    while len(found) < n:
        for question in world.questions(n, "held-out", rng):
            found.setdefault(question.question, question)
    return list(found.values())[:n]


def recipe_digest(settings: Settings) -> str:
    """SHA-256 over the settings and the three sources: what a stored pair must have been built from."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def is_complete(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds the pair of these settings with every file as it was written."""
    try:
        stamp = json.loads((folder / "stamp.json").read_text(encoding="utf-8"))
        return bool(
            stamp["recipe"] == recipe_digest(settings)
            and stamp["files"]
            and all(_sha256(folder / name) == digest for name, digest in stamp["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build(folder: Path, settings: Settings) -> bool:
    """Builds the pair at `folder`, unless it is there already; returns whether it had to.

    Built in `FOLDER.partial`, synced, then renamed. Two builds at one place take turns.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / f".{folder.name}.lock"):
        if is_complete(folder, settings):
            return False
        staging = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)  # of a killed build: nobody else holds the lock
        staging.mkdir()
        recipe = recipe_digest(
            settings
        )  # before the work: a source edited meanwhile makes the pair a stale one
        _fill(staging, settings)
        names = sorted(str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file())
        files = {name: _sha256(staging / name) for name in names}
        stamp = {"recipe": recipe, "torch": torch.__version__, "files": files}
        (staging / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        for name in (*names, "stamp.json", "."):
            _sync(staging / name)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
        _sync(folder.parent)
    return True


def _fill(folder: Path, settings: Settings) -> None:
    """Trains both parents and writes them with their tokenizer and the study's questions."""
    world, training = settings.world, settings.training
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with _phase("world", f"{world.entities} entities, {settings.questions:,} held-out questions"):
            tokenizer = build_tokenizer(world)
            with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
                for question in held_out_questions(world, settings.questions):
                    file.write(json.dumps(asdict(question)) + "\n")
        pre = new_model(tokenizer, training, settings.seed)
        size = sum(tensor.numel() for tensor in pre.parameters())
        with _phase(
            "pre", f"language model of {size / 1e6:.1f}M parameters, {training.pretrain_steps:,} steps"
        ):
            pretrain(pre, tokenizer, world, training, np.random.default_rng([settings.seed, 0]))
        post = copy.deepcopy(pre)
        with _phase("post", f"supervised answers, {training.supervise_steps:,} steps"):
            supervise(post, tokenizer, world, training, np.random.default_rng([settings.seed, 1]))
        with _phase("post", f"preference tuning (DPO), {training.prefer_steps:,} steps"):
            prefer(post, tokenizer, world, training, np.random.default_rng([settings.seed, 2]))
    finally:
        torch.set_num_threads(threads)
    for name, model in (("pre", pre), ("post", post)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@contextlib.contextmanager
def _phase(name: str, what: str) -> Iterator[None]:
    """Says what goes on, and how long it took, in one line on stderr."""
    print(f"quickstart {name:<5} {what} ...", end="", flush=True, file=sys.stderr)
    start = time.perf_counter()
    yield
    print(f" {time.perf_counter() - start:.0f} s", flush=True, file=sys.stderr)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file; the system frees it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    """Command line: where to build, and with which seed."""
    parser = argparse.ArgumentParser(description="Builds the quickstart pair, offline, in about two minutes.")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "pair", help="folder of the pair")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed of the training (default: 1)")
    options = parser.parse_args()
    start = time.perf_counter()
    built = build(options.out, Settings(seed=options.seed))
    what = f"built in {time.perf_counter() - start:.0f} s" if built else "is there already"
    print(f"quickstart pair {what}: {options.out}/pre, {options.out}/post", file=sys.stderr)


if __name__ == "__main__":
    main()
