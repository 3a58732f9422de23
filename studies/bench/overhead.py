"""What a trial costs besides merging and scoring (drawing, claiming, finishing), and how soon a large study goes on.

    python studies/bench/overhead.py                                # all targets; about ten minutes
    python studies/bench/overhead.py --trials 400 --stored 1000     # a quick look

`study.run` itself runs, on a real SQLite file with real evidence files, but merging and scoring are two sums over the
coefficients: nearly all of a trial's time is overhead. All times are seconds of one process, wall time unless another
`clock` is given; files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from optuna.distributions import FloatDistribution, distribution_to_json

from objectives.evaluation import Evaluation
from objectives.metrics.names import Metric
from objectives.outcomes import Outcomes
from objectives.questions.questions import Split
from search.config.study_file import parse_study
from search.merging.baselines import BASELINES
from search.merging.groups import Group
from search.merging.space import CoefficientSpace
from search.recipe import Recipe
from search.running.observer import Observer, Step
from search.running.problem import Problem
from search.samplers import Engine, Proposal, Sources, make_engine
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord
from search.storage.worker import this_worker
from search.study import run

Clock = Callable[[], float]

ENGINES = ("optuna:nsga2", "pymoo:nsga2")
REAL_TRIAL = 12.0  # seconds that one trial of studies/smollm2-135m takes on two cores
EARLY = 200  # the trial whose cost the last ones are compared with


class FreeMaterials(Problem):
    """Problem whose merge and evaluation cost next to nothing."""

    @cached_property
    def idle(self) -> tuple[str, ...]:
        return ()

    def merge(self, recipe: Recipe) -> None:
        vars(self)["merged"] = recipe

    def evaluate(self, split: Split, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        distances = np.array(free_values(vars(self)["merged"].coefficients.values()))
        with np.errstate(divide="ignore"):
            score = np.log(np.stack([distances, 1 - distances], axis=1)).astype(np.float32)
        zeros, ones = np.zeros(2, dtype=np.int64), np.ones_like(score)
        outcomes = Outcomes.from_loglikelihoods(score.astype(np.float64), zeros + 2, zeros, zeros)
        return Evaluation(outcomes, score, ones, ones[:, 0], scored_tokens=0, digest="free")


def free_values(coefficients: Iterable[float]) -> tuple[float, float]:
    """Two numbers in [0, 1], both to be minimised: mean squared distances from 0.2 and from 0.8."""
    x = np.fromiter(coefficients, dtype=np.float64)
    return float(np.mean((x - 0.2) ** 2)), float(np.mean((x - 0.8) ** 2))


def free_study(folder: Path, engine: str, coefficients: int, trials: int) -> tuple[StudyStore, FreeMaterials]:
    """A new study in `folder`.

    Args:
        engine: engine and name of the sampler, such as `optuna:tpe`.
        trials: how many it shall have, baselines included.
    """
    library, sampler = engine.split(":")
    study = {
        "schema": 1,
        "name": "free",
        "parents": {"pre": "free", "post": "free"},
        "tasks": [{"path": "free.jsonl", "name": "free"}],
        "objectives": ["brier", "nll"],  # names only: what they compute is `free_values`
        "sampler": {"engine": library, "name": sampler, "seed": 0},
        "trials": trials - len(BASELINES),
        "batch_tokens": 1,
    }
    config = parse_study(study, "bench")
    metrics = tuple(
        Metric(name, False, 1.0, lambda outcomes, _, row=row: outcomes.probability[row, :1])
        for row, name in enumerate(config.objectives)
    )
    groups = tuple(Group(f"layer.{index}", (f"layers.{index}.weight",)) for index in range(coefficients))
    space = CoefficientSpace(groups, ("linear",), config.space.low, config.space.high)
    store = StudyStore.create(
        _url(folder), config.name, [(metric.name, metric.maximize) for metric in metrics]
    )
    store.set_attribute("trials", config.trials)
    nothing = cast(Any, None)
    return store, FreeMaterials(config, nothing, nothing, nothing, space, metrics, "cpu")


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


# -- the cost of a trial ----------------------------------------------------------------------------------------


class _Stopwatch(Observer):
    """Seconds of every trial, from the end of the one before, and when a step was first reached."""

    def __init__(self, clock: Clock) -> None:
        self.seconds: list[float] = []
        self.first: dict[str, float] = {}
        self._clock = clock
        self._last = 0.0

    def started(self, trials: Sequence[TrialRecord], total: int) -> None:
        self._last = self.first["started"] = self._clock()

    def step(self, step: Step, trial: TrialRecord) -> None:
        self.first.setdefault(step, self._clock())

    def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
        now = self._clock()
        self.seconds.append(now - self._last)
        self._last = now


def measure_trials(
    engine: str, coefficients: int, trials: int, window: int = 100, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Runs a free study to its end.

    Returns:
        `seconds`: median of the last `window` trials; `early`: of those around trial 200 (in a smaller study, around
        its tenth part); `growth`: their ratio; `slowest`: of the last `window`; `total`: of the whole study.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = _Stopwatch(clock)
        run(*free_study(Path(folder), engine, coefficients, trials), watch, report=False)
    at = min(EARLY, trials // 10)
    early = statistics.median(watch.seconds[max(at - window // 2, 0) : at + window // 2])
    late = watch.seconds[-window:]
    return {
        "seconds": statistics.median(late),
        "early": early,
        "growth": statistics.median(late) / early,
        "slowest": max(late),
        "total": sum(watch.seconds),
    }


# -- opening a large study --------------------------------------------------------------------------------------


def measure_reopening(
    engine: str, coefficients: int, trials: int, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Opens a study of many finished trials and goes on with it.

    Returns:
        `open`: connecting, with SQLite's own check of the file; `read`: all trials; `propose`: the engine built and
        brought up to date, the next trial drawn and claimed; `total`: the three; `next`: one more whole trial;
        `megabytes`: size of the file.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, problem = free_study(folder, engine, coefficients, trials + 2)
        fill(folder / "study.db", problem, trials)
        watch = _Stopwatch(clock)
        began = clock()
        store = StudyStore.open(_url(folder), store.name)
        opened = clock()
        run(store, problem, watch, report=False)
        return {
            "open": opened - began,
            "read": watch.first["started"] - opened,
            "propose": watch.first["asked"] - watch.first["started"],
            "total": watch.first["asked"] - began,
            "next": watch.seconds[-1],
            "megabytes": (folder / "study.db").stat().st_size / 1e6,
        }


def fill(database: Path, problem: FreeMaterials, trials: int) -> None:
    """Puts complete trials into an empty study as `study.run` would have left them, but in one transaction."""
    space = problem.space
    distribution = distribution_to_json(FloatDistribution(space.low, space.high))
    with sqlite3.connect(database) as connection:

        def insert(table: str, columns: str, rows: Iterable[Sequence[object]]) -> None:
            places = ", ".join("?" * len(columns.split()))
            sql = f"insert into {table} ({', '.join(columns.split())}) values ({places})"
            connection.executemany(sql, rows)

        def insert_json(table: str, trial: int, values: dict[str, Any]) -> None:
            insert(table, "trial_id key value_json", [(trial, k, json.dumps(v)) for k, v in values.items()])

        for record in made_up(problem, trials):
            key = record.number + 1
            when = ("2026-01-01 00:00:00.000000", "2026-01-01 00:00:12.000000")
            columns = "trial_id number study_id state datetime_start datetime_complete"
            insert("trials", columns, [(key, record.number, 1, "COMPLETE", *when)])
            insert(
                "trial_params",
                "trial_id param_name param_value distribution_json",
                [(key, name, value, distribution) for name, value in record.coefficients.items()],
            )
            insert(
                "trial_values",
                "trial_id objective value value_type",
                [(key, index, value, "FINITE") for index, value in enumerate(record.values or ())],
            )
            insert_json("trial_user_attributes", key, {"kind": record.kind, **record.attributes})
            insert_json("trial_system_attributes", key, dict(record.tags))
    connection.close()


def _none(*_: object) -> NoReturn:
    raise NotImplementedError("the engines timed here read neither gradients nor answers")


def made_up(problem: FreeMaterials, trials: int) -> Iterable[TrialRecord]:
    """Complete trials of an imagined run, with what the engine wants to find again on each."""
    config, space = problem.config.sampler, problem.space
    bounds = (space.low, space.high)
    sources = Sources(problem.metrics, _none, _none, _none)
    engine = make_engine(config, space.names, bounds, sources)
    last: list[TrialRecord] = []
    rng = np.random.default_rng(0)
    for number in range(trials):
        if number < len(BASELINES):
            kind, coefficient = BASELINES[number]
            proposal = Proposal(space.uniform(coefficient).coefficients, engine.baseline_tags(number))
        elif config.engine == "pymoo":
            kind, proposal = "search", _from_pymoo(engine, last, number)
        else:
            # What Optuna's sampler would draw does not matter to what it costs; drawing it would take minutes.
            drawn = dict(zip(space.names, rng.uniform(*bounds, space.dim).tolist(), strict=True))
            kind, proposal = "search", Proposal(drawn, dict.fromkeys(engine.baseline_tags(0), number // 16))
        recipe = Recipe("linear", proposal.coefficients)
        attributes = {
            "method": recipe.method,
            "recipe": recipe.key,
            "worker": this_worker().to_json(),
            "tries": 1,
            "evidence": recipe.key,
        }
        values = free_values(recipe.coefficients.values())
        record = TrialRecord(
            number, kind, "complete", recipe.coefficients, values, attributes, proposal.tags, 12.0
        )
        last = [*last[-99:], record]
        yield record


def _from_pymoo(engine: Engine, last: Sequence[TrialRecord], number: int) -> Proposal:
    """What the engine draws next: of one that was there all along, it needs the last two generations alone."""
    proposal = engine.propose(last, number)
    return replace(proposal, coefficients=dict(proposal.coefficients))


# -- all of it --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=2000, help="of the study that grows")
    parser.add_argument("--stored", type=int, default=10_000, help="trials of the study that is opened")
    arguments = parser.parse_args()
    print(f"share of a {REAL_TRIAL:.0f} s trial (target: under 2 %)")
    for coefficients in (14, 64):
        found = measure_trials("optuna:tpe", coefficients, 75, window=50)
        share = 100 * found["seconds"] / REAL_TRIAL
        print(f"  optuna:tpe    {coefficients} coefficients  {share:.2f} %   {_shown(found)}")
    print(f"{arguments.trials} free trials of 64 coefficients (target: growth at most 2)")
    for engine in ENGINES:
        print(f"  {engine:<13} {_shown(measure_trials(engine, 64, arguments.trials))}", flush=True)
    print(f"a study of {arguments.stored} trials goes on (target: total under 10 s)")
    for engine in ("optuna:tpe", *ENGINES):
        for coefficients in (10, 64):
            found = measure_reopening(engine, coefficients, arguments.stored)
            print(f"  {engine:<13} {coefficients} coefficients  {_shown(found)}", flush=True)


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


if __name__ == "__main__":
    main()
