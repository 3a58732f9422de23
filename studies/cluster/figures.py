"""The tables and the picture of `simulate.py`, from what it measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.results.plots import style

# Okabe and Ito (2008), and a grey.
COLOURS = {
    "random": "#B4B8BD",
    "qmc": "#5F6368",
    "tpe": "#0072B2",
    "nsga2": "#E69F00",
    "pymoo:nsga2": "#D55E00",
    "composite": "#009E73",
    "gp": "#A0487B",
}


def document(result: dict[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [
        _sources(result),
        "## The lock\n\n" + _locks(result),
        "## Proposals\n\n" + _proposals(result),
        "## Workers at which the lock is busy all the time\n\n" + _saturation(result),
        *(f"## Trials a second, {key}\n\n" + _throughput(result, key) for key in _latencies(result)),
        "## Searches\n\n" + _searches(result),
        "## Beside real processes\n\n" + _reality(result),
    ]
    if "proxy" in result:
        parts.append("## Optuna's gRPC proxy\n\n" + _proxy(result))
    return (
        "\n\n".join(parts)
        + f"\n\n{result['date']}, {result['minutes']:.0f} minutes, load {result['load']:.1f}.\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _sources(result: dict[str, Any]) -> str:
    made, latency, death = result["surrogate"], result["latency"], result["death"]
    (accuracy, ece), (plain, plain_ece) = made["error"], made["mean_error"]
    low, middle, high = latency["percentiles"]
    return (
        f"Surrogate: {made['recipes']} recipes, {made['questions']} questions, ridge {made['ridge']:g}; mean absolute "
        f"error on held-out recipes {accuracy:.4f} in accuracy, {ece:.4f} in ECE (their mean: {plain:.4f}, "
        f"{plain_ece:.4f}).\n"
        f"Latency: {latency['trials']} trials of {latency['of']}, mean {latency['mean']:.1f} s; 5 %, median, 95 %: "
        f"{low:.1f}, {middle:.1f}, {high:.1f} s.\n"
        f"Deaths: {death['failed']} of {death['finished']} real trials failed; a worker dies in a trial with "
        f"probability {death['probability']:.4f}."
    )


def _locks(result: dict[str, Any]) -> str:
    rows = [
        [
            storage,
            lock["workers"],
            *(_ms(lock[key]) for key in ("ask", "tell", "look", "beat")),
            f"{lock['statements']:.0f}",
            f"{lock['transactions']:.0f}",
        ]
        for storage, locks in result["locks"].items()
        for lock in locks
    ]
    units = "storage|workers|ask, ms|tell, ms|idle look, ms|heartbeat, ms|statements|transactions"
    return table(units.split("|"), rows)


def _proposals(result: dict[str, Any]) -> str:
    after = sorted({int(key) for one in result["proposals"].values() for key in one["after"]})
    rows = []
    for engine, one in result["proposals"].items():
        known = {int(key): value for key, value in one["after"].items()}
        cells = [_ms(known[key]) if key in known else "-" for key in after]
        rows.append([engine, *cells, _ms(one["each"])])
    return table(["engine", *(f"after {key}, ms" for key in after), "each new trial, ms"], rows)


def _latencies(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["latency"] for row in result["throughput"]))


def _saturation(result: dict[str, Any]) -> str:
    rows = []
    most = max(lock["workers"] for locks in result["locks"].values() for lock in locks)
    for storage in result["locks"]:
        for engine in result["proposals"]:
            cells = {
                row["latency"]: row["workers"] if row["workers"] <= most else f"over {most}"
                for row in result["saturation"]
                if row["storage"] == storage and row["engine"] == engine
            }
            rows.append([storage, engine, *(cells[key] for key in _latencies(result))])
    gradient = result["gradient"]
    rows.append(["any", "gradient", *([gradient["workers"]] * len(_latencies(result)))])
    return table(["storage", "engine", *_latencies(result)], rows)


def _throughput(result: dict[str, Any], latency: str) -> str:
    rows = []
    for storage in result["locks"]:
        for engine in result["proposals"]:
            cells = [
                f"{row['rate']:.3g} ({row['utilisation']:.0%})"
                for row in result["throughput"]
                if (row["storage"], row["engine"], row["latency"]) == (storage, engine, latency)
            ]
            rows.append([storage, engine, *cells])
    workers = [lock["workers"] for lock in next(iter(result["locks"].values()))]
    return table(["storage", "engine", *(f"{n} worker{'s' * (n > 1)}" for n in workers)], rows)


def _groups(result: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Searches by engine and workers, a list of seeds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in result["searches"]:
        found.setdefault((one["engine"], one["workers"]), []).append(one)
    return found


def _marks(result: dict[str, Any]) -> list[int]:
    """Numbers of trials after which hypervolumes are compared: where the dear engines end, and where all others do."""
    return sorted({len(one["volume"]) for one in result["searches"]})


def limit(result: dict[str, Any]) -> float:
    """The largest hypervolume that any search found."""
    return max(one["volume"][-1] for one in result["searches"])


def _searches(result: dict[str, Any]) -> str:
    marks, best = _marks(result), limit(result)
    head = ["engine", "workers", *(f"HV after {mark} trials" for mark in marks), "HV after 10 minutes"]
    head += [
        "minutes to .9 of the best",
        "minutes in all",
        "twice, running",
        "twice, finished",
        "nearly, running",
    ]
    rows = [
        [
            engine,
            workers,
            *(_after(ones, mark) for mark in marks),
            _spread([1000.0 * _at(one, 600.0) for one in ones]),
            _reached(ones, 0.9 * best),
            f"{max(one['done'][-1] for one in ones) / 60.0:.0f}",
            *(_share(ones, key) for key in ("running_twice", "finished_twice", "near")),
            f"{np.mean([one['utilisation'] for one in ones]):.0%}",
            f"{np.mean([one['wait'] for one in ones]):.2f}",
        ]
        for (engine, workers), ones in _groups(result).items()
    ]
    return (
        table([*head, "utilisation", "wait, s"], rows) + f"\n\nBest hypervolume of all: {1000.0 * best:.2f}."
    )


def _after(ones: Sequence[dict[str, Any]], mark: int) -> str:
    return _spread([1000.0 * one["volume"][mark - 1] for one in ones if len(one["volume"]) >= mark])


def _at(one: dict[str, Any], seconds: float) -> float:
    """The hypervolume of a search at a time; after its end, at its end."""
    complete = int(np.searchsorted(one["done"], seconds, side="right"))
    return float(one["volume"][complete - 1]) if complete else 0.0


def _reached(ones: Sequence[dict[str, Any]], volume: float) -> str:
    """Median minutes until the seeds had a hypervolume, of those that ever had it."""
    places = [next((i for i, v in enumerate(one["volume"]) if v >= volume), None) for one in ones]
    minutes = [one["done"][i] / 60.0 for one, i in zip(ones, places, strict=True) if i is not None]
    if not minutes:
        return "-"
    return f"{np.median(minutes):.0f}" + (
        "" if len(minutes) == len(ones) else f" ({len(minutes)} of {len(ones)})"
    )


def _share(ones: Sequence[dict[str, Any]], key: str) -> str:
    """Share of the proposals, mean of the seeds."""
    return f"{np.mean([one[key] / one['proposals'] for one in ones]):.1%}"


def _reality(result: dict[str, Any]) -> str:
    rows = []
    for one in result["reality"]:
        seen = "-" if one["connections"] is None else "{:.1f}, at most {}".format(*one["connections"])
        ratio = one["rate"] / one["expected"]
        rates = (f"{value:.2f}" for value in (one["rate"], one["expected"], ratio))
        rows.append([one["storage"], one["workers"], _ms(one["held"]), *rates, seen])
    head = ["storage", "processes", "ask + tell, ms", "trials/s", "simulated", "ratio", "connections"]
    return table(head, rows)


def _proxy(result: dict[str, Any]) -> str:
    rows = [
        [
            one["way"],
            *(f"{one[key]:.1f}" for key in ("create", "tell")),
            " / ".join(f"{value:.0f}" for value in one["history"]),
            one["clients"],
            one["connections"],
            "refused" if one["rate"] is None else f"{one['rate']:.1f}",
        ]
        for one in result["proxy"]
    ]
    trials = result["proxy"][0]["trials"]
    head = ["way", "create, ms", "tell, ms", f"all {trials} trials, first / again, ms"]
    return table([*head, "clients", "connections", "trials/s, all clients"], rows)


def _ms(seconds: float) -> str:
    return f"{1000.0 * seconds:.3g}"


def _spread(values: Sequence[float]) -> str:
    """Mean and range over the seeds; of a search that ended before, nothing."""
    if not len(values):
        return "-"
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def picture(result: dict[str, Any], path: Path) -> None:
    """Throughput at two latencies, and hypervolumes after two numbers of trials, against workers."""
    path.write_bytes(style.render(_figure(result)).png)


@style.drawn
def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(2 * style.COLUMN, 4.7), layout="constrained")
    axes = figure.subplots(2, 2)
    storage = list(result["locks"])[-1]
    for axis, latency in zip(axes[0], _latencies(result)[:2], strict=True):
        _rates(axis, result, storage, latency)
    marks = _marks(result)
    for axis, mark in zip(axes[1], (marks[0], marks[-1]), strict=True):
        _volumes(axis, result, mark)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _rates(axis: Axes, result: dict[str, Any], storage: str, latency: str) -> None:
    rows = [row for row in result["throughput"] if (row["storage"], row["latency"]) == (storage, latency)]
    workers = sorted({row["workers"] for row in rows})
    ideal = max(row["rate"] for row in rows if row["workers"] == workers[0])
    axis.plot(
        workers, [ideal * n / workers[0] for n in workers], color=style.FAINT, linestyle=":", linewidth=1
    )
    axis.annotate(
        "N times one",
        (workers[-1], ideal * workers[-1] / workers[0]),
        xytext=(-3, -1),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=6.5,
        color=style.QUIET,
    )
    for engine in result["proposals"]:
        mine = [row for row in rows if row["engine"] == engine]
        axis.plot(
            [row["workers"] for row in mine],
            [row["rate"] for row in mine],
            color=COLOURS[engine],
            marker="o",
            markersize=2.5,
            label=engine,
        )
    axis.set(xscale="log", yscale="log", xlabel="workers", ylabel="trials a second")
    axis.set_title(f"{latency} ({storage})")
    _ticks(axis, workers)


def _volumes(axis: Axes, result: dict[str, Any], mark: int) -> None:
    """Mean of the seeds, smallest to largest; engines that ended before are left out."""
    best = limit(result)
    workers = sorted({one["workers"] for one in result["searches"]})
    engines = list(dict.fromkeys(one["engine"] for one in result["searches"]))
    for place, engine in enumerate(engines):
        values = {
            n: np.array([one["volume"][mark - 1] / best for one in ones if len(one["volume"]) >= mark])
            for (name, n), ones in _groups(result).items()
            if name == engine
        }
        values = {n: found for n, found in values.items() if len(found)}
        if not values:
            continue
        x = np.array(list(values)) * 1.05 ** (place - len(engines) / 2)
        mean = np.array([found.mean() for found in values.values()])
        low, high = (np.array([end(found) for found in values.values()]) for end in (np.min, np.max))
        axis.errorbar(
            x,
            mean,
            [mean - low, high - mean],
            color=COLOURS[engine],
            marker="o",
            markersize=2.5,
            elinewidth=0.8,
        )
    axis.set(xscale="log", xlabel="workers", ylabel="hypervolume over the best found", ylim=(0.4, 1.03))
    axis.set_title(f"the front after {mark} trials")
    _ticks(axis, workers)


def _ticks(axis: Axes, workers: Sequence[int]) -> None:
    axis.set_xticks(workers, labels=[str(n) for n in workers])
    axis.minorticks_off()
