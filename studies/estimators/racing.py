"""What racing and fidelity would have saved in a finished study, and what they would have cost its front.

    python studies/estimators/racing.py quickstart
    python studies/estimators/racing.py quickstart --objectives accuracy brier     # as if it had been about these

Replays the stored answers of a study, trial by trial in the order in which they were proposed, under many seeds of
the questions' order (racing) or of the subset (fidelity). Every trial is judged as it would have been, beside those
that the rule let through before. Proposals are as recorded: what an engine would have proposed in their place is not
replayed. Nothing is merged or scored.

A row is the mean over the seeds, ± standard deviation. `saved`: questions of the search trials that were not scored,
which with questions of equal length and no examples before them are tokens. `wrong`: stopped trials that would have
been on the front at that time, of those that were. `front`: the final front's hypervolume over that of the study as it
was run. `beyond`: share of the seeds whose final front has a hypervolume below the 95 % bootstrap interval of the
study's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from objectives.metrics.bootstrap import interval, resample_weights
from objectives.metrics.names import Metric, get_metric
from objectives.outcomes import Floats, Outcomes
from search.cli.naming import storage_url
from search.config.sections import FidelityConfig, RacingConfig
from search.front import hypervolume, hypervolume_batch, non_dominated, worst_corner
from search.running.fidelity.estimating import Estimating
from search.running.fidelity.predicting import Predicting
from search.running.fidelity.racing import Racing
from search.running.fidelity.stages import Rule
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import stored_config
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord

SEEDS = 10
RESAMPLES = 500


class Answered:
    """All complete trials of a study with their answers, each recipe once; on given objectives, or its own."""

    def __init__(self, url: str, name: str, objectives: Sequence[str] = ()) -> None:
        store, folder = StudyStore.open(url, name), EvidenceFolder(url, name)
        self.records = [
            record
            for record in store.trials()
            if record.state == "complete" and "same_as" not in record.attributes
        ]
        self.outcomes = {
            record.number: folder.load(str(record.attributes["evidence"])).outcomes for record in self.records
        }
        tasks = store.attribute("facts")["tasks"]
        space = stored_config(store).space
        self.bounds = space.low, space.high
        names = objectives or [one for one, _ in store.attribute("objectives")]
        self.metrics: list[Metric] = [get_metric(one, tasks) for one in names]
        self.records = [
            replace(record, values=tuple(one.value(self.outcomes[record.number]) for one in self.metrics))
            for record in self.records
        ]
        self.maximise = tuple(metric.maximize for metric in self.metrics)
        self.task = self.outcomes[0].task
        parents = np.array([r.values for r in self.records if r.kind in ("pre", "post")])
        self.corner = worst_corner(parents, maximise=self.maximise)
        weights = resample_weights(len(self.task), RESAMPLES, strata=self.task)
        drawn = [
            np.stack([metric(self.outcomes[r.number], weights) for metric in self.metrics], axis=-1)
            for r in self.records
        ]
        self.drawn = dict(zip((record.number for record in self.records), drawn, strict=True))
        self.volume, drawn_volumes = self.volumes(self.records)
        self.low, self.high = interval(drawn_volumes, value=self.volume)

    def __call__(self, record: TrialRecord) -> Outcomes:
        return self.outcomes[record.number]

    def volumes(self, records: Sequence[TrialRecord]) -> tuple[float, Floats]:
        """Hypervolume of their front, and that front's on every resample of the questions."""
        values = np.array([record.values for record in records])
        front = np.flatnonzero(non_dominated(values, maximise=self.maximise))
        stack = np.stack([self.drawn[records[i].number] for i in front], axis=1)
        return hypervolume(values, self.corner, maximise=self.maximise), hypervolume_batch(
            stack, self.corner, maximise=self.maximise
        )


@dataclass(frozen=True)
class Outcome:
    """What one replay came to."""

    saved: float
    stopped: int
    wrong: int
    deserving: int
    volume: float
    lost: bool


def replay(study: Answered, rule: Rule) -> Outcome:
    """One study under a rule."""
    n = study.task.size
    complete = [record for record in study.records if record.kind != "search"]
    taken, stopped, wrong, deserving = 0, 0, 0, 0
    searched = [record for record in study.records if record.kind == "search"]
    for record in searched:
        judge = rule.judge(record, complete)
        values = np.array([*(one.values for one in complete), record.values])
        belongs = bool(non_dominated(values, maximise=study.maximise)[-1])
        deserving += belongs
        verdict = None
        for look in range(1, len(rule.parts)):
            places = np.sort(np.concatenate(rule.parts[:look]))
            verdict = judge(study(record).select(places), places)
            if verdict is not None:
                taken, stopped, wrong = taken + places.size, stopped + 1, wrong + belongs
                break
        if verdict is None:
            taken += n
            complete.append(record)
    values = np.array([one.values for one in complete])
    volume = hypervolume(values, study.corner, maximise=study.maximise)
    saved = 1.0 - taken / (n * len(searched))
    return Outcome(saved, stopped, wrong, deserving, volume / study.volume, volume < study.low)


def row(study: Answered, name: str, rules: Sequence[Rule]) -> str:
    """A line of the table."""
    found = [replay(study, rule) for rule in rules]

    def spread(values: Sequence[float], digits: str) -> str:
        return f"{np.mean(values):{digits}} ± {np.std(values, ddof=1):{digits}}"

    wrong, deserving = sum(one.wrong for one in found), sum(one.deserving for one in found)
    return (
        f"| {name} | {spread([one.saved for one in found], '.0%')} | {spread([one.stopped for one in found], '.1f')} "
        f"| {wrong} of {deserving} ({wrong / max(deserving, 1):.1%}) "
        f"| {spread([one.volume for one in found], '.3f')} | {np.mean([one.lost for one in found]):.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="of a finished study")
    parser.add_argument("--storage", help="default: sqlite:///runs/NAME/study.db")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--objectives", nargs="+", default=(), help="default: the study's own")
    parser.add_argument("--rule", choices=("racing", "fidelity"), help="default: both")
    arguments = parser.parse_args()
    url = storage_url(arguments.storage, arguments.name)
    study = Answered(url, arguments.name, arguments.objectives)
    seeds = range(arguments.seeds)
    interval_of = f"[{study.low:.4f}, {study.high:.4f}]"
    print(
        f"{len(study.records)} trials, {study.task.size} questions, hypervolume {study.volume:.4f} {interval_of}\n"
    )
    print("| rule | saved | stopped | wrong | front | beyond |\n|---|---|---|---|---|---|", flush=True)
    for size in (study.task.size // 20, study.task.size // 5) if arguments.rule != "racing" else ():
        for name in ("mean", "p-irt", "gmp-irt"):
            config = FidelityConfig(estimator=name, questions=size)
            guesses: list[Rule] = [
                Estimating(config.model_copy(update={"seed": seed}), study.metrics, study.task, study)
                for seed in seeds
            ]
            print(row(study, f"fidelity, {name}, {size} questions", guesses), flush=True)
        config = FidelityConfig(estimator="answers", questions=size)
        guesses = [
            Predicting(
                config.model_copy(update={"seed": seed}), study.metrics, study.task, study, study.bounds
            )
            for seed in seeds
        ]
        print(row(study, f"fidelity, answers, {size} questions", guesses), flush=True)
    for error, looks in ((0.05, 5), (0.2, 5), (0.2, 10)) if arguments.rule != "fidelity" else ():
        races = [
            Racing(RacingConfig(error=error, looks=looks, seed=seed), study.metrics, study.task, study)
            for seed in seeds
        ]
        print(row(study, f"racing, error {error}, {looks} looks", races), flush=True)


if __name__ == "__main__":
    main()
