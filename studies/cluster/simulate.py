"""How many workers a study takes: virtual workers at real storages, and real ones beside them.

    make quickstart                     # the pair that is simulated, and a study with answers
    mergefront launch studies/quickstart/study.yaml --storage sqlite:///runs/quickstart/study.db \\
        --set name=quickstart-qmc --set 'sampler={engine: optuna, name: qmc, seed: 0}' --set trials=100 \\
        --set split.report=front        # answers from all over the box
    make smollm2                        # latencies; without it the quickstart's are used
    python -m tests.postgresql_server python studies/cluster/simulate.py      # without a server: SQLite alone

Prints Markdown; writes results.json, results.md and scaling.png below runs/cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import service
import surrogate
from events import Draw, Plan, Priced, Record, drawn_from, simulate
from figures import document, picture
from proxy import measure_calls
from reality import real_rate
from service import Lock, Proposals
from virtual import Prices, cluster_in_memory

from search.errors import MergefrontError
from search.front import hypervolume
from search.storage.store import StudyStore

ENGINES = ("random", "qmc", "tpe", "nsga2", "pymoo:nsga2", "composite", "gp")
# Seconds of an evaluation; None: as measured. The others are assumptions, see sizing.py.
LATENCIES = {"135M, as measured": None, "7B, 2 minutes": 120.0, "70B, 20 minutes": 1200.0}


@dataclass(frozen=True)
class Sizes:
    """How much is done; `searched` and `dear` are trials of a search, of an engine and of one in `service.DEAR`."""

    workers: Sequence[int]
    seeds: int
    engines: Sequence[str]
    left_out: Sequence[str] = ("gp",)  # of the searches: an hour
    searched: int = 256
    dear: int = 64
    dear_workers: int = 64
    questions: int = 250
    after: Sequence[int] = service.AFTER
    real_workers: Sequence[int] = (1, 4, 8)
    real_seconds: float = 20.0
    clients: int = 64


FULL = Sizes((1, 8, 64, 256), 3, ENGINES)
QUICK = Sizes(
    (1, 4),
    1,
    ("random", "nsga2"),
    searched=40,
    questions=100,
    after=(16, 32),
    real_workers=(2,),
    real_seconds=5.0,
    clients=4,
)


def prices(lock: Lock, proposals: Proposals, workers: int) -> Prices:
    """What one engine costs on one storage; between two of its proposals a worker has missed `workers` trials."""
    return Prices(lock.ask, lock.tell, lambda trials: proposals.at(trials) + proposals.each * workers)


def throughput(cost: Prices, workers: int, plan: Plan, at: int = 256) -> Record:
    """The cluster without a search, as after `at` trials."""
    return simulate([Priced(cost.ask + cost.proposal(at), cost.tell) for _ in range(workers)], plan)


def saturation(locks: Sequence[Lock], proposals: Proposals, latency: float, at: int = 256) -> int:
    """The least number of workers that keep the lock busy: N (ask + tell) >= latency + ask + tell."""
    known = [lock.workers for lock in locks]
    slope = (locks[-1].both - locks[0].both) / max(1, known[-1] - known[0])
    for workers in range(1, 100_000):
        held = float(np.interp(workers, known, [lock.both for lock in locks]))
        held += max(0, workers - known[-1]) * max(0.0, slope)
        held += proposals.at(at) + proposals.each * workers
        if workers * held >= latency + held:
            return workers
    return 100_000


@dataclass(frozen=True)
class Search:
    """One simulated search. `volume`: hypervolume after each complete trial; `done`: when, in seconds."""

    engine: str
    workers: int
    seed: int
    volume: list[float]
    done: list[float]
    running_twice: int
    finished_twice: int
    near: int
    proposals: int
    utilisation: float
    wait: float
    deaths: int


def search(problem: Any, label: str, workers: int, seed: int, plan: Plan, cost: Prices) -> Search:
    """One engine with so many workers; engine and cluster take the seed."""
    made = service.fresh(problem, label, plan.trials + workers, seed)
    members, store = cluster_in_memory(made, workers, cost)
    record = simulate(members, replace(plan, seed=seed))
    values = [one.values for one in store.completed]
    maximise, corner = [metric.maximize for metric in made.metrics], made.corner()
    volume = [hypervolume(values[: i + 1], corner, maximise=maximise) for i in range(len(values))]
    proposed = sum(one.kind == "search" for one in store.trials())
    waits = float(np.mean(record.waits))
    return Search(
        label,
        workers,
        seed,
        volume,
        record.done,
        store.running_twice,
        store.finished_twice,
        store.near,
        proposed,
        record.utilisation,
        waits,
        record.deaths,
    )


@contextmanager
def storages(url: str | None) -> Iterator[dict[str, str]]:
    """SQLite in a folder of its own, and the server at the URL."""
    place = Path("runs/cluster")
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        found = {"SQLite": f"sqlite:///{folder}/study.db"}
        yield found | ({} if url is None else {"PostgreSQL": url})


def latencies(url: str, name: str, otherwise: surrogate.Answers) -> tuple[str, list[float], int, int]:
    """Of a real study: its name, seconds a trial, failed trials, finished ones."""
    try:
        store = StudyStore.open(url, name)
    except MergefrontError:
        return "quickstart", otherwise.seconds.tolist(), 0, 0
    finished = [record for record in store.trials() if record.finished]
    failed = sum(record.state == "failed" for record in finished)
    return name, surrogate.trial_seconds(store), failed, len(finished)


def run(arguments: argparse.Namespace, sizes: Sizes, say: Any = print) -> dict[str, Any]:
    """Everything that is measured and simulated, as JSON."""
    begin = time.time()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    arguments.out.mkdir(parents=True, exist_ok=True)

    def stamp(what: str) -> None:
        say(f"[{time.time() - begin:6.0f} s] {what}", flush=True)
        result["load"], result["minutes"] = os.getloadavg()[2], (time.time() - begin) / 60.0
        (arguments.out / "results.json").write_text(json.dumps(result, indent=1))

    problem, answers = surrogate.load(arguments.study, arguments.names.split(","))
    errors = surrogate.held_out(answers, lambda o: [metric.value(o) for metric in problem.metrics])
    of, seconds, failed, finished = latencies(*arguments.latency.rsplit("#", 1), answers)
    failed, finished = failed + answers.failed, finished + answers.tried
    death = (failed or 3.0) / finished  # none of n: the upper end of a 95 % interval
    result |= {
        "surrogate": {
            "recipes": len(answers.x),
            "questions": len(answers.like),
            "ridge": problem._surrogate.ridge,
            "error": np.abs(errors[:, 1] - errors[:, 0]).mean(axis=0).tolist(),
            "mean_error": np.abs(errors[:, 2] - errors[:, 0]).mean(axis=0).tolist(),
        },
        "latency": {"of": of, "trials": len(seconds), "mean": float(np.mean(seconds)),
                    "percentiles": np.percentile(seconds, [5, 50, 95]).tolist()},
        "death": {"failed": failed, "finished": finished, "probability": death},
    }  # fmt: skip
    stamp("surrogate fitted")
    draws = {key: drawn_from(seconds, mean) for key, mean in LATENCIES.items()}
    means = {key: mean or float(np.mean(seconds)) for key, mean in LATENCIES.items()}
    with storages(arguments.storage) as urls:
        locks = {
            storage: [service.measure_lock(url, problem, workers) for workers in sizes.workers]
            for storage, url in urls.items()
        }
        stamp("locks measured")
        proposals = {}
        for engine in sizes.engines:
            after = sizes.after[:2] if engine == "gp" else sizes.after
            with tempfile.TemporaryDirectory(dir="runs/cluster") as folder:
                proposals[engine] = service.measure_proposals(engine, problem, folder, after)
            stamp(f"proposals of {engine} measured")
        result["locks"] = {storage: [asdict(lock) for lock in every] for storage, every in locks.items()}
        result["proposals"] = {engine: asdict(one) for engine, one in proposals.items()}
        result["throughput"], result["saturation"] = [], []
        for storage, every in locks.items():
            for engine in sizes.engines:
                for key, draw in draws.items():
                    for lock in every:
                        workers = lock.workers
                        plan = Plan(200 + 10 * workers, draw, death)
                        cost = prices(lock, proposals[engine], workers)
                        record = throughput(cost, workers, plan)
                        row = {"storage": storage, "engine": engine, "latency": key, "workers": workers}
                        row["rate"] = record.rate(2 * workers)
                        row["wait"] = float(np.mean(record.waits))
                        row["utilisation"] = record.utilisation
                        result["throughput"].append(row)
                    limit = saturation(every, proposals[engine], means[key])
                    result["saturation"].append(
                        {"storage": storage, "engine": engine, "latency": key, "workers": limit}
                    )
        gradients = service.fresh(problem, "gradient", 1).proposal_evaluations
        result["gradient"] = {
            "evaluations": gradients,
            "workers": int(np.ceil((1.0 + gradients) / gradients)),
        }
        stamp("throughput simulated")
        result["searches"] = []
        draw, last = draws["135M, as measured"], list(locks.values())[-1]
        for one in searches(arguments, sizes, last, proposals, draw, death, stamp):
            result["searches"].append(asdict(one))
        result["reality"] = []
        for storage, url in urls.items():
            for workers in sizes.real_workers:
                result["reality"].append(reality(storage, url, problem, proposals["random"], workers, sizes))
                stamp(f"{workers} real workers on {storage}: {result['reality'][-1]}")
        if "PostgreSQL" in urls:
            result["proxy"] = [asdict(one) for one in measure_calls(urls["PostgreSQL"], sizes.clients)]
            stamp("proxy measured")
    return result


def reality(
    storage: str, url: str, problem: Any, proposals: Proposals, workers: int, sizes: Sizes
) -> dict[str, Any]:
    """Real processes, and what the simulation says of them; the lock is measured just before, and just after, since
    other jobs on the machine come and go."""
    before = service.measure_lock(url, problem, workers)
    real = real_rate(url, problem, "random", workers, sizes.real_seconds, 1.0)
    after = service.measure_lock(url, problem, workers)
    lock = replace(before, ask=(before.ask + after.ask) / 2.0, tell=(before.tell + after.tell) / 2.0)
    cost = prices(lock, proposals, workers)
    expected = throughput(cost, workers, Plan(400, lambda rng: 1.0)).rate(50)
    return {"storage": storage, **asdict(real), "held": lock.both, "expected": expected}


def searches(
    arguments: Any,
    sizes: Sizes,
    locks: Sequence[Lock],
    proposals: dict[str, Proposals],
    draw: Draw,
    death: float,
    stamp: Any,
) -> Iterator[Search]:
    """Every engine, number of workers and seed, on fewer questions, with the lock's times as measured."""
    problem, _ = surrogate.load(arguments.study, arguments.names.split(","), sizes.questions)
    for engine in sizes.engines:
        if engine in sizes.left_out:
            continue
        dear = engine in service.DEAR
        for lock in locks:
            if dear and lock.workers > sizes.dear_workers:
                continue
            for seed in range(sizes.seeds):
                plan = Plan(sizes.dear if dear else sizes.searched, draw, death)
                cost = prices(lock, proposals[engine], lock.workers)
                yield search(problem, engine, lock.workers, seed, plan, cost)
        stamp(f"{engine} searched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--study", default="sqlite:///runs/quickstart/study.db", help="storage of the real studies"
    )
    parser.add_argument("--names", default="quickstart,quickstart-qmc", help="studies of one pair")
    parser.add_argument("--latency", default="sqlite:///runs/smollm2-135m/study.db#smollm2-135m")
    parser.add_argument(
        "--storage", default=os.environ.get("MERGEFRONT_STORAGE"), help="URL of a PostgreSQL server"
    )
    parser.add_argument(
        "--quick", action="store_true", help="everything in small: seconds, no figures to quote"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/cluster"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        result = run(arguments, QUICK if arguments.quick else FULL)
    except MergefrontError as error:
        parser.error(f"{error} See the first lines of this script for the studies that it needs.")
    text = document(result)
    (arguments.out / "results.md").write_text(text)
    picture(result, arguments.out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
