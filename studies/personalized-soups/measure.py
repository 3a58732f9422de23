"""Measures every arm of one seed on the report prompts: what it answers to each combination of wishes, scored.

    PYTHONPATH=studies/quickstart python studies/personalized-soups/measure.py --seed 1

Runs the study of the seed (or continues it), chooses one merge of its front a combination with `prefer:`, on the search
prompts, exports it, and samples answers of all arms. Writes build/seed-1/measured-DIGEST.npz and chosen.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from experts import BUILD, JOINT, STUDY, build_all
from styles import AXES, COMBINATIONS, POLES, wished
from transformers import AutoModelForCausalLM

from objectives.generation.sampler import AnswerSampler, Decoding
from search.config.study_file import StudyConfig, load_study_file
from search.export.folder import export_rows
from search.results.board import read_board
from search.results.picks import pick
from search.running.launch import create
from search.running.problem import Problem
from search.storage.store import StudyStore
from search.study import run

Scores = np.ndarray  # (prompts, samples, preferences) float64
PLAIN = "-"  # in the place of a combination: no wish is meant
# Arms that know the combination, with and without the wishes behind the prompt.
SOUP, SUM, CHOSEN = "soup of 3", "sum of 3", "search"
SPOKEN = " + wishes"


def study_of(seed: int, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study file, with the parents of this seed."""
    folder = BUILD / f"seed-{seed}"
    places = [f"parents.experts.{pole}={folder / pole}" for pole in POLES]
    named = [f"name=personalized-soups-{seed}", f"sampler.seed={seed}", f"parents.pre={folder / 'base'}"]
    return load_study_file(STUDY, [*named, *places, *overrides])


class Tasting:
    """Samples answers of one model after another, with the study's decoding, and scores them.

    Attributes:
        prompts: the report prompts, without wishes.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.prompts is not None, "the study file has prompts"
        assert problem.config.diversity is not None
        drawn = problem.config.diversity
        self.decoding = Decoding(
            drawn.samples, drawn.temperature, drawn.top_p, drawn.max_new_tokens, drawn.seed
        )
        self.prompts = problem.prompts.report
        self._problem = problem

    def scores(self, model: Any, wishes: Sequence[str] = ()) -> Scores:
        """Scores of a model's answers by all preferences; the wishes are spoken behind every prompt."""
        asked = [wished(prompt, wishes) for prompt in self.prompts] if wishes else list(self.prompts)
        tokenizer = self._problem.tokenizer
        texts = AnswerSampler(model, tokenizer, asked, self.decoding).generate().texts(tokenizer)
        found = [self._problem.preferences[pole](asked, texts) for pole in POLES]
        return np.stack(found, axis=-1)

    def merged(self, shares: dict[str, float], wishes: Sequence[str] = ()) -> Scores:
        """The same of a merge: one coefficient an expert, 0 for the others."""
        space = self._problem.space
        vector = [shares.get(name.partition("/")[0], 0.0) for name in space.names]
        self._problem.merge(space.from_vector(vector))
        return self.scores(self._problem.live.model, wishes)


def measure(store: StudyStore, problem: Problem, folder: Path) -> dict[str, Scores]:
    """All arms by `ARM|COMBINATION`; the chosen merges are exported below `folder`, and read from there."""
    tasting = Tasting(problem)
    found = {f"base|{PLAIN}": tasting.merged({})}
    for pole in POLES:
        found[f"{pole}|{PLAIN}"] = tasting.merged({pole: 1.0})
    found[f"soup of 6|{PLAIN}"] = tasting.merged(dict.fromkeys(POLES, 1 / 6))
    for one, other in AXES:
        found[f"{one} and {other}|{PLAIN}"] = tasting.merged({one: 0.5, other: 0.5})
    joint = AutoModelForCausalLM.from_pretrained(folder / JOINT, dtype=torch.float32)
    for wishes in COMBINATIONS:
        name = " ".join(wishes)
        found[f"base{SPOKEN}|{name}"] = tasting.merged({}, wishes)
        found[f"{JOINT}{SPOKEN}|{name}"] = tasting.scores(joint, wishes)
        for arm, share in ((SOUP, 1 / 3), (SUM, 1.0)):
            shares = dict.fromkeys(wishes, share)
            found[f"{arm}|{name}"] = tasting.merged(shares)
            found[f"{arm}{SPOKEN}|{name}"] = tasting.merged(shares, wishes)
    for name, trial in choose(store, folder).items():
        model = AutoModelForCausalLM.from_pretrained(
            folder / "export" / f"trial-{trial:05d}" / "model", dtype=torch.float32
        )
        found[f"{CHOSEN}|{name}"] = tasting.scores(model)
        found[f"{CHOSEN}{SPOKEN}|{name}"] = tasting.scores(model, name.split())
    return found


def choose(store: StudyStore, folder: Path) -> dict[str, int]:
    """A trial of the front for every combination, by the search prompts; all of them are exported with weights."""
    board = read_board(store)
    rows = {
        " ".join(wishes): pick(board, "prefer:" + ",".join(f"{wish}=1" for wish in wishes))
        for wishes in COMBINATIONS
    }
    chosen = {
        name: {"trial": row.trial, "kind": row.kind, "coefficients": dict(row.coefficients)}
        for name, row in rows.items()
    }
    (folder / "chosen.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
    unique = list({row.trial: row for row in rows.values()}.values())
    export_rows(store, board, unique, folder / "export", weights=True, overwrite=True, overrides=())
    return {name: row.trial for name, row in rows.items()}


def measured(seed: int) -> Path:
    """The scores of a seed; made unless they are there, as this file and the study file make them."""
    folder = BUILD / f"seed-{seed}"
    sources = Path(__file__).read_bytes() + STUDY.read_bytes()
    path = folder / f"measured-{hashlib.sha256(sources).hexdigest()[:8]}.npz"
    build_all(seed)
    if path.is_file():
        return path
    config = study_of(seed)
    start = time.perf_counter()
    # Beside the models: built again, they are another study's.
    store, problem = create(config, f"sqlite:///{folder / 'study.db'}", "cpu")
    run(store, problem, report=False)  # the chosen merges are measured on the report prompts below
    searched = time.perf_counter() - start
    print(f"soups search {searched:6.1f} s, {len(store.trials())} trials", file=sys.stderr, flush=True)
    found = measure(store, problem, folder)
    staged = folder / f"partial-{path.name}"
    np.savez_compressed(staged, **found)
    os.replace(staged, path)
    total = time.perf_counter() - start - searched
    print(f"soups arms   {total:6.1f} s, {len(found)} of them", file=sys.stderr, flush=True)
    return path


def main() -> None:
    """Command line: which seed."""
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Measures every arm of one seed on the report prompts.")
    parser.add_argument("--seed", type=int, default=1)
    print(measured(parser.parse_args().seed))


if __name__ == "__main__":
    main()
