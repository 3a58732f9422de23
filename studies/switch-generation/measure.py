"""One seed: a switcher trained on the search questions, all arms on the report questions, and segments of all lengths.

    python studies/switch-generation/measure.py --seed 1

Writes build/seed-1/results.json; finished rollouts lie in build/seed-1/rollouts and are found again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search.config.study_file import StudyConfig, load_study_file
from search.results.arms import RANDOM, ROUTER, SWITCH
from search.running.problem import Problem
from search.switching.arms import Arms
from search.switching.candidates import Setting, open_settings
from search.switching.policies import Always
from search.switching.relay import Relay
from search.switching.response import Cost
from search.switching.train import Trained, summary, switching_of, train

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
THREADS = 1  # the models are too small to share
LENGTHS = (1, 2, 3, 4, 6, 10, 20)  # 20: the whole answer
CANDIDATES = ("pre", "supervised", "preferred")


def study_of(seed: int, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study file with the checkpoints of a seed."""
    folder = BUILD / f"seed-{seed}"
    places = [
        f"parents.pre={folder / 'pre'}",
        *(f"parents.experts.{name}={folder / name}" for name in CANDIDATES[1:]),
        f"tasks.0.path={folder / 'questions.jsonl'}",
    ]
    return load_study_file(HERE / "study.yaml", [*places, *overrides])


class Seed:
    """The checkpoints of one seed, loaded once."""

    def __init__(self, seed: int) -> None:
        self.number = seed
        self.problem = Problem.open(study_of(seed), "cpu")
        self._first = open_settings(self.problem, switching_of(self.problem).turns)[0]

    def setting(self, config: StudyConfig) -> Setting:
        """The task with the turns of another config, the models shared."""
        assert config.switching is not None
        relay = self._first.relay
        models = dict(zip(relay.names, relay.models, strict=True))
        other = Relay(models, relay.tokenizer, config.switching.turns, relay.stopping, relay.decoding)
        return replace(self._first, relay=other)

    def trained(self, overrides: Sequence[str] = ()) -> tuple[Problem, Setting, Trained]:
        """A switcher of the study with other settings of `switching`."""
        config = study_of(self.number, overrides)
        problem = replace(self.problem, config=config)
        setting = self.setting(config)
        return problem, setting, train(problem, [setting], BUILD / f"seed-{self.number}" / "rollouts")


def arms_of(problem: Problem, setting: Setting, trained: Trained) -> Arms:
    """All arms beside this switcher."""
    switching = switching_of(problem)
    return Arms(problem, [setting], {SWITCH: lambda one: trained.brain.policy(one.relay, switching)})


def lengths(seed: Seed) -> list[dict[str, Any]]:
    """Switching and chance for every length of a segment; at the longest, routing must come out of it exactly."""
    found = []
    for length in LENGTHS:
        problem, setting, trained = seed.trained([f"switching.segment={length}"])
        arms = arms_of(problem, setting, trained)
        entry: dict[str, Any] = {"segment": length}
        for label in (SWITCH, RANDOM):
            written = arms.written(label, "report")
            entry[label] = written.score.mean(axis=1).tolist()
            entry[f"{label} tokens"] = written.tokens / written.single
        if length == LENGTHS[-1]:
            router, switch = arms.written(ROUTER, "report"), arms.written(SWITCH, "report")
            labels = arms.router.labels.label.tolist() == trained.lesson.labels.label.tolist()
            entry["equals routing"] = labels and router.texts == switch.texts
        found.append(entry)
        print(
            f"seed {seed.number}: segments of {length}: {np.mean(entry[SWITCH]):.3f}",
            file=sys.stderr,
            flush=True,
        )
    return found


def speed(setting: Setting, trained: Trained, problem: Problem) -> dict[str, float]:
    """Tokens of the switcher on the report questions, and wall time a token, as multiples of its host alone.

    Times are the best of three.
    """
    switching = switching_of(problem)
    prompts = [asked.prompt for asked in setting.asked["report"]]
    host = setting.relay.names.index(trained.host)
    seconds, cost = {}, Cost()
    for label, policy in (
        ("alone", Always(host)),
        ("switch", trained.brain.policy(setting.relay, switching)),
    ):
        tries = []
        for _ in range(3):
            began = time.perf_counter()
            cost = setting.relay.generate(prompts, policy).cost
            tries.append((time.perf_counter() - began) / cost.written)
        seconds[label] = min(tries)
    return {
        "relay": (cost.read + cost.written) / cost.single,
        "switcher": cost.switcher / cost.single,
        "time": seconds["switch"] / seconds["alone"],
    }


def measured(number: int) -> dict[str, Any]:
    """Everything about one seed, as plain JSON."""
    seed = Seed(number)
    problem, setting, trained = seed.trained()
    for line in summary(trained):
        print(f"seed {number}: {line}", file=sys.stderr, flush=True)
    arms = arms_of(problem, setting, trained)
    found: dict[str, Any] = {"seed": number, "best": arms.best, "arms": {}}
    for label in arms.labels:
        written = arms.written(label, "report")
        outcomes = written.evaluation.outcomes
        found["arms"][label] = {
            "right": written.right.astype(int).tolist(),
            "confidence": outcomes.confidence.tolist(),
            "correct": outcomes.correct.tolist(),
            "tokens": written.tokens / written.single,
            "seconds": written.seconds,
        }
        print(f"seed {number}: {label}: {written.score.mean():.3f}", file=sys.stderr, flush=True)
    found["oracle"] = arms.oracle("report").tolist()
    found["in turn"] = arms.in_turn("report").right.astype(int).tolist()
    found["soup"] = list(arms.soup.ingredients)
    found["labels"] = {**trained.lesson.counts, "entropy": trained.lesson.labels.entropy}
    found["held out"] = trained.held_out
    found["speed"] = speed(setting, trained, problem)
    found["lengths"] = lengths(seed)
    return found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Measures every arm of one seed on the report questions.")
    parser.add_argument("--seed", type=int, default=1)
    number = parser.parse_args().seed
    torch.set_num_threads(THREADS)
    out = BUILD / f"seed-{number}" / "results.json"
    out.write_text(json.dumps(measured(number)) + "\n", encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
