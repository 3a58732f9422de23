"""`mergefront compare`: opening, sharing the entries among processes, writing table and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from objectives.questions.questions import closed
from search.config.study_file import StudyConfig
from search.errors import ConfigError, DiskError
from search.interrupt import held_back, let_through
from search.results.compare.entrants import Entry, budget_tokens, entries, parse_entrants
from search.results.compare.runs import checkpoints, run_entries
from search.results.compare.standings import Standings, read_standings
from search.results.compare.table import comparison_table
from search.running.problem import Problem
from search.running.workers import beside, use_threads
from search.storage.database import shown
from search.storage.frozen import read_config
from search.storage.staging import write_whole
from search.storage.store import StudyStore

logger = logging.getLogger("mergefront")


def compare(
    config: StudyConfig,
    url: str,
    out: Path,
    *,
    engines: str,
    budget: str,
    seeds: int,
    device: str,
    workers: int = 1,
    helping: bool = False,
    study: Path | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Runs a comparison, or continues it, and writes `comparison.md`, `.json`, `.png` and `.svg`.

    Args:
        helping: as a further process, which writes nothing.
        study, overrides: where the config came from, for further processes.

    Returns:
        The table; empty for a further process.

    Raises:
        ConfigError: engines, budget or objectives do not fit, before anything is scored.
    """
    if sampled := config.sampled_objectives:
        raise ConfigError(
            f"compare: {sampled[0]} is measured on sampled answers; leave it out of the objectives."
        )
    if not config.has_line:
        raise ConfigError(
            "compare: there is no uniform line to compare with in a simplex or under a method that takes a mean; use "
            "space.simplex false and such as merge.method linear."
        )
    entrants = parse_entrants(engines)
    use_threads(workers)
    problem = Problem.open(config, device)
    tokens = budget_tokens(budget, problem.evaluator("search").tokens, len(problem.baselines))
    first, *_ = entries(config, entrants, 1, tokens)
    config = _with_batches(config, url, problem, first.config.name)
    every = entries(config, entrants, seeds, tokens)
    if helping:
        run_entries(every, problem, url, helping=True)
        return ""
    logger.info(
        "%d studies of %s tokens (%.0f evaluations) in %s",
        len(every),
        f"{tokens:,}",
        tokens / problem.evaluator("search").tokens,
        shown(url),
    )
    start = ["compare", str(study), "--engines", engines, "--budget", budget, "--seeds", str(seeds)]
    start += ["--device", device, "--workers", str(workers)]
    for override in (*overrides, f"batch_tokens={config.batch_tokens}"):
        start += ["--set", override]
    with held_back(), beside([[*start, "--helping"]] * (workers - 1), url), let_through():
        stores = run_entries(every, problem, url, done=_say)
    found = read_standings(config.name, every, stores, checkpoints(tokens))
    return _written(found, out)


def _with_batches(config: StudyConfig, url: str, problem: Problem, first: str) -> StudyConfig:
    """The config with tokens a batch: given, or as an earlier run of the comparison measured them, or measured now.

    All processes and all runs keep to one number: another one changes the last bits of the scores.

    Args:
        first: name of the comparison's first study.
    """
    size = config.batch_tokens
    if size is None and (known := read_config(url, first)) is not None:
        size = known.batch_tokens
    if size is None:
        size = problem.scorer.measure(closed(problem.questions.search))
    problem.scorer.use(size)
    return config.model_copy(update={"batch_tokens": size})


def _say(entry: Entry, store: StudyStore, seconds: float) -> None:
    records = store.trials()
    logger.info(
        "%s, seed %d: %d trials, %s tokens, %.0f s",
        entry.entrant.label,
        entry.seed,
        sum(record.state == "complete" for record in records),
        f"{sum(record.tokens for record in records):,}",
        seconds,
    )


def _written(found: Standings, out: Path) -> str:
    from search.results.compare.picture import comparison_figure
    from search.results.plots.style import render

    table = comparison_table(found)
    picture = render(comparison_figure(found))
    files = {
        "comparison.md": (table + "\n").encode(),
        "comparison.json": (json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n").encode(),
        "comparison.png": picture.png,
        "comparison.svg": picture.svg,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(out / name, content)
    except OSError as error:
        raise DiskError(f"{out}: the comparison cannot be written: {error.strerror}.") from error
    return table
