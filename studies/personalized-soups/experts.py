"""Builds base, six experts and the joint model of one seed, offline, from the quickstart's `pre`.

    PYTHONPATH=studies/quickstart python studies/personalized-soups/experts.py --seed 1

Writes build/seed-1/{base,plain,...,unfriendly,joint,stamp.json} and build/prompts.jsonl beside this file. A second call
finds the stamp and does nothing; the folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import prepare
import torch
import transformers
from styles import COMBINATIONS, POLES, Manners, extended_tokenizer, prompt_texts, wished
from tune import TRAINED, Answers, Pairs, Tuning, extend, prefer, supervise
from world import World

from objectives.metrics.preferences import Preference
from search.checkpoints.reward_model import make_preference
from search.config.study_file import load_study_file

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
PROMPTS = BUILD / "prompts.jsonl"
STUDY = HERE / "study.yaml"
SOURCES = ("styles.py", "tune.py", "experts.py", "study.yaml")
JOINT = "joint"
DEVELOPED = (
    40  # prompts about the first ten people: learning rates were tried on them, so the study has them not
)


@dataclass(frozen=True)
class Settings:
    """All that a seed's models depend on, beside the sources and the quickstart's pair."""

    seed: int = 1
    world: World = field(default_factory=World)
    manners: Manners = field(default_factory=Manners)
    tuning: Tuning = field(default_factory=Tuning)


def preferences() -> dict[str, Preference]:
    """The six rewards, as the study file has them: what ranks answers in training is what the search measures."""
    wanted = load_study_file(STUDY).preferences or {}
    return {pole: make_preference(wanted[pole]) for pole in POLES}


def build(folder: Path, pre: Path, settings: Settings) -> bool:
    """Builds the models of one seed at `folder` unless they are there; returns whether it had to."""
    recipe = _recipe(pre, settings)
    stamp = folder / "stamp.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8"))["recipe"] == recipe:
        return False
    staging = folder.with_name(f"{folder.name}.partial")
    for old in (staging, folder):
        shutil.rmtree(old, ignore_errors=True)
    staging.mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # too small to share, and the order of additions depends on it
    try:
        seconds = _fill(staging, pre, settings)
    finally:
        torch.set_num_threads(threads)
    stamp = {"recipe": recipe, "torch": torch.__version__, "seconds": seconds}
    (staging / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    staging.rename(folder)
    return True


def write_prompts(path: Path, world: World) -> None:
    """The study's prompts: every way to ask about people that no training asks about, without wishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = prompt_texts(world, ["held-out"])[DEVELOPED:]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")


def _fill(folder: Path, pre: Path, settings: Settings) -> dict[str, float]:
    """Trains and writes all models; returns seconds by phase."""
    world, tuning, seed = settings.world, settings.tuning, settings.seed
    seconds: dict[str, float] = {}
    tokenizer = extended_tokenizer(world)

    def save(name: str, model: transformers.LlamaForCausalLM) -> None:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    base = transformers.LlamaForCausalLM.from_pretrained(pre, dtype=torch.float32)
    extend(base, tokenizer, seed)
    with _phase("base", seconds):
        supervise(base, tokenizer, world, settings.manners, tuning, np.random.default_rng([seed, 0]))
    save("base", base)
    rewards = preferences()
    prompts = prompt_texts(world, TRAINED)
    with _phase("answers", seconds):
        drawn = Answers(base, tokenizer, prompts, rewards, tuning, seed)
    for number, pole in enumerate(POLES, 1):
        with _phase(pole, seconds):
            pairs = drawn.pairs(drawn.scores[pole])
            expert = prefer(base, pairs, tuning.prefer_steps, tuning, np.random.default_rng([seed, number]))
        save(pole, expert)
    spread = {pole: float(drawn.scores[pole].std()) for pole in POLES}  # rewards have different units
    with _phase("answers to wishes", seconds):
        pairs = Pairs((), (), ())
        for number, wishes in enumerate(COMBINATIONS):
            asked = [wished(prompt, wishes) for prompt in prompts[number % 4 :: 4]]
            answers = Answers(base, tokenizer, asked, rewards, tuning, seed)
            reward = np.mean([answers.scores[wish] / spread[wish] for wish in wishes], axis=0)
            pairs += answers.pairs(reward)
    with _phase(JOINT, seconds):
        joint = prefer(base, pairs, tuning.joint_steps, tuning, np.random.default_rng([seed, 7]))
    save(JOINT, joint)
    return seconds


def _recipe(pre: Path, settings: Settings) -> str:
    """SHA-256 over the settings, the sources and the quickstart's `pre`."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for path in (*(HERE / name for name in SOURCES), pre / "model.safetensors"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
    print(f"soups {name:<18} {seconds[name]:6.1f} s", flush=True, file=sys.stderr)


def build_all(seed: int, out: Path = BUILD) -> None:
    """The quickstart's pair, the prompts, and the models of one seed, each unless it is there."""
    transformers.utils.logging.disable_progress_bar()
    pair = prepare.HERE / "build" / "pair"
    prepare.build(pair, prepare.Settings())
    settings = Settings(seed)
    write_prompts(out / "prompts.jsonl", settings.world)
    build(out / f"seed-{seed}", pair / "pre", settings)


def main() -> None:
    """Command line: which seed."""
    parser = argparse.ArgumentParser(description="Builds base, experts and joint model of one seed, offline.")
    parser.add_argument("--seed", type=int, default=1)
    build_all(parser.parse_args().seed)


if __name__ == "__main__":
    main()
