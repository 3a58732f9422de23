"""Builds three checkpoints of one pipeline for a seed, offline: `pre`, `supervised` and `preferred`.

    python studies/switch-generation/prepare.py --seed 0

Writes build/seed-0/{pre,supervised,preferred,questions.jsonl,stamp.json} beside this file. A second call finds the
stamp and does nothing; the folder appears whole or not at all.

`pre` reads the corpus of the quickstart's world, with some questions in it whose writers were careless with numbers.
`supervised` is shown answers about a few people, in which the largest number is right and the smallest often is not;
`preferred` is taught which smallest number is preferred (DPO). Neither hears of the other people again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "quickstart"), str(HERE.parent / "personalized-soups")]

from skills import PICKS, Asked, Asking, extended_tokenizer, list_statements, study_questions  # noqa: E402
from train import Muon, Training, _adamw, _descend, encode, language_loss, new_model  # noqa: E402
from tune import Pairs, Tuning, loglikelihoods, prefer  # noqa: E402
from world import END, World  # noqa: E402

BUILD = HERE / "build"
STAGES = ("pre", "supervised", "preferred")
CONTEXT = 256  # tokens; a switcher reads the question and the marked trace
SOURCES = (
    HERE / "skills.py",
    HERE / "prepare.py",
    HERE.parent / "quickstart" / "world.py",
    HERE.parent / "quickstart" / "train.py",
    HERE.parent / "personalized-soups" / "tune.py",
)


@dataclass(frozen=True)
class Settings:
    """All that a seed's checkpoints depend on, beside the sources. `seed` is that of the training, not of the world.

    Attributes:
        world: its facts are certain. The corpus asks about most people, post-training about a few, the study about
            the others.
        training: of `pre` and of `supervised`. tuning: of `preferred`.
        lists: sentences about lists of one pre-training step.
        supervise_matrix_rate: Muon's learning rate of `supervised`.
        careless: probability that a demonstration gives any listed number as the smallest.
        pairs: that `preferred` learns from.
        questions: of the study.
    """

    seed: int = 0
    world: World = field(
        default_factory=lambda: World(entities=80, majorities=(1.0,), asked=0.6, trained=0.1)
    )
    training: Training = field(
        default_factory=lambda: Training(
            pretrain_steps=450,
            statements=48,
            questions=12,
            supervise_steps=200,
            supervise_rate=1e-3,
            batch=24,
        )
    )
    tuning: Tuning = field(default_factory=lambda: Tuning(prefer_steps=60, prefer_rate=2e-4, pairs=16))
    lists: int = 16
    supervise_matrix_rate: float = 0.01
    careless: float = 0.6
    pairs: int = 600
    questions: int = 600


def build(folder: Path, settings: Settings) -> bool:
    """Builds the checkpoints of one seed at `folder` unless they are there; returns whether it had to."""
    recipe = _recipe(settings)
    stamp = folder / "stamp.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["recipe"] == recipe:
        return False
    staging = folder.with_name(f"{folder.name}.partial")
    for old in (staging, folder):
        shutil.rmtree(old, ignore_errors=True)
    staging.mkdir(parents=True)
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small to share, and the order of additions depends on it
    try:
        seconds = _fill(staging, settings)
    finally:
        torch.set_num_threads(threads)
    (staging / "stamp.json").write_text(
        json.dumps({"recipe": recipe, "torch": torch.__version__, "seconds": seconds}, indent=1) + "\n",
        encoding="utf-8",
    )
    staging.rename(folder)
    return True


def _fill(folder: Path, settings: Settings) -> dict[str, float]:
    """Trains and writes the three, and the study's questions; returns seconds by stage."""
    world, seed = settings.world, settings.seed
    tokenizer = extended_tokenizer(world)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for asked in study_questions(world, settings.questions):
            file.write(json.dumps({"question": asked.question, "answer": asked.answer}) + "\n")
    seconds: dict[str, float] = {}
    model = new_model(tokenizer, settings.training, seed)
    model.config.max_position_embeddings = CONTEXT
    for number, (name, stage) in enumerate(zip(STAGES, (pretrain, supervise, preferred), strict=True)):
        with _phase(name, seconds):
            model = stage(model, tokenizer, settings, np.random.default_rng([seed, number]))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return seconds


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, rng: np.random.Generator
) -> LlamaForCausalLM:
    """Language modelling on statements, with a few questions among them; any listed number may be the answer."""
    world, training = settings.world, settings.training
    asking = Asking("asked", careless=dict.fromkeys(PICKS, 1.0))

    def loss() -> Tensor:
        texts = world.statements(training.statements, rng) + list_statements(settings.lists, rng)
        stated = encode(tokenizer, [text + END for text in texts])
        drawn = [asking.draw(world, rng) for _ in range(training.questions)]
        answered = encode(tokenizer, [f"{asked.prompt} {asked.answer}{END}" for asked in drawn])
        (statement_loss, n), (question_loss, m) = language_loss(model, stated), language_loss(model, answered)
        return (statement_loss + question_loss) / (n + m)

    _descend(
        model, loss, training.pretrain_steps, _optimizers(model, training.matrix_rate, training.pretrain_rate)
    )
    return model


def supervise(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, rng: np.random.Generator
) -> LlamaForCausalLM:
    """A copy after cross-entropy of shown answers; prompts carry no loss."""
    world, training = settings.world, settings.training
    asking = Asking("trained", single=0.5, careless={"smallest": settings.careless})
    tuned = copy.deepcopy(model)

    def loss() -> Tensor:
        drawn = [asking.draw(world, rng) for _ in range(training.batch)]
        prompts, answers = _ids(tokenizer, drawn), _ids(tokenizer, drawn, answer=True)
        return -loglikelihoods(tuned, prompts, answers).sum() / sum(map(len, answers))

    _descend(
        tuned,
        loss,
        training.supervise_steps,
        _optimizers(tuned, settings.supervise_matrix_rate, training.supervise_rate),
    )
    return tuned


def preferred(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, rng: np.random.Generator
) -> LlamaForCausalLM:
    """A copy after DPO: the right smallest number over another of the list, all else being equal."""
    asking = Asking("trained")
    chosen: list[Asked] = []
    while len(chosen) < settings.pairs:
        asked = asking.draw(settings.world, rng)
        if "smallest" in dict(asked.items):
            chosen.append(asked)
    rejected = [_worse(asked, rng) for asked in chosen]
    pairs = Pairs(
        *(
            tuple(found)
            for found in (
                _ids(tokenizer, chosen),
                _ids(tokenizer, chosen, answer=True),
                _ids(tokenizer, rejected, answer=True),
            )
        )
    )
    return prefer(model, pairs, settings.tuning.prefer_steps, settings.tuning, rng)


def _worse(asked: Asked, rng: np.random.Generator) -> Asked:
    """The same answer with another listed number as the smallest."""
    other = str(rng.choice(sorted(asked.numbers)[1:]))
    items = ((key, other if key == "smallest" else value) for key, value in asked.items)
    return dataclasses.replace(asked, items=tuple(items))


def _ids(
    tokenizer: PreTrainedTokenizerFast, drawn: list[Asked], *, answer: bool = False
) -> list[tuple[int, ...]]:
    """Token ids of the prompts, or of the answers with their end."""
    texts = [f"{asked.answer}{END}" if answer else asked.prompt for asked in drawn]
    return [tuple(encoding.ids) for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


def _optimizers(
    model: LlamaForCausalLM, matrix_rate: float, rate: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices, AdamW for embeddings and norms."""
    matrices = [t for name, t in model.named_parameters() if t.ndim == 2 and "embed" not in name]
    others = [t for name, t in model.named_parameters() if t.ndim != 2 or "embed" in name]
    return Muon(matrices, matrix_rate), _adamw(others, rate)


def _recipe(settings: Settings) -> str:
    """SHA-256 over the settings and the sources."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
    print(f"switch-generation {name:<10} {seconds[name]:6.1f} s", flush=True, file=sys.stderr)


def main() -> None:
    """Command line: which seed."""
    parser = argparse.ArgumentParser(description="Builds the three checkpoints of one seed, offline.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    build(BUILD / f"seed-{seed}", Settings(seed))


if __name__ == "__main__":
    main()
