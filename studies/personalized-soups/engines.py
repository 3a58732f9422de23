"""How near the search comes to what can be had, on the search prompts of one seed: engines, budgets, and fixed merges.

    PYTHONPATH=studies/quickstart python studies/personalized-soups/engines.py 'engine: optuna, name: nsga2'

A number is the mean over combinations and axes of (merge - base) / (expert alone - base) in that axis' reward: 1 is
what three whole experts would have at once. Chosen merges are those that `prefer:` names. Storage: build/engines.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping

import numpy as np
import torch
import transformers
from experts import BUILD, build_all
from measure import study_of
from styles import COMBINATIONS, POLES

from search.results.board import Row, read_board
from search.results.picks import pick
from search.running.launch import create
from search.running.memory import Memory
from search.running.problem import Problem
from search.study import run

SHARES = (1 / 3, 2 / 3, 1.0)

Rewards = np.ndarray  # (preferences,) float64


def rewards(row: Row) -> Rewards:
    """Of a trial, on the search prompts."""
    return np.array([row.search[pole].value for pole in POLES])


def gained(found: Mapping[tuple[str, ...], Rewards], base: Rewards, alone: Rewards) -> float:
    """Mean share of what the experts alone gain, by combination.

    >>> one = {("plain", "concise", "friendly"): np.array([0.5, 9, 1.0, 9, 0.0, 9])}
    >>> gained(one, np.zeros(6), np.ones(6))
    0.5
    """
    share = {wishes: (reward - base) / (alone - base) for wishes, reward in found.items()}
    return float(np.mean([share[wishes][[POLES.index(w) for w in wishes]].mean() for wishes in found]))


def fixed(problem: Problem, wishes: tuple[str, ...], share: float) -> Rewards:
    """Of the three experts, a coefficient each, on the search prompts."""
    names = [name.partition("/")[0] for name in problem.space.names]
    problem.merge(problem.space.from_vector([share if name in wishes else 0.0 for name in names]))
    found = problem.diversify("search")
    assert found is not None, "the study file has prompts"
    return np.array([found.values[pole].mean() for pole in POLES])


def main() -> None:
    """Prints a line a fixed share and a line an engine."""
    parser = argparse.ArgumentParser(
        description="Engines and fixed merges on the search prompts of one seed."
    )
    parser.add_argument("samplers", nargs="+", help="as in a study file's sampler, without braces")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    build_all(options.seed)
    problem, memory = Problem.open(study_of(options.seed), "cpu"), Memory()
    url = f"sqlite:///{BUILD / 'engines' / 'study.db'}"
    said = False
    for sampler in options.samplers:
        name = hashlib.sha256(f"{sampler} {options.trials} {options.seed}".encode()).hexdigest()[:12]
        changes = [f"sampler={{{sampler}, seed: {options.seed}}}", f"trials={options.trials}", f"name={name}"]
        config = study_of(options.seed, changes)
        store, opened = create(config, url, "cpu", problem=problem.under(config))
        run(store, opened, report=False, memory=memory)
        board = read_board(store)
        parents = {row.label: rewards(row) for row in board.parents}
        base = parents["pre"]
        alone = np.array([parents[pole][index] for index, pole in enumerate(POLES)])
        if not said:
            for share in SHARES:
                merges = {wishes: fixed(problem, wishes, share) for wishes in COMBINATIONS}
                print(f"three experts, {share:.2f} each: {gained(merges, base, alone):.3f}", flush=True)
            said = True
        chosen = {
            wishes: rewards(pick(board, "prefer:" + ",".join(f"{wish}=1" for wish in wishes)))
            for wishes in COMBINATIONS
        }
        print(
            f"{sampler}, {options.trials} trials: {gained(chosen, base, alone):.3f}, {len(board.front)} of "
            f"{len(board.rows)} on the front",
            flush=True,
        )


if __name__ == "__main__":
    main()
