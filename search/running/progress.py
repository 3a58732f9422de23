"""What a running study prints on stderr: a start-up block, then a bar on a terminal or a line a trial elsewhere."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from objectives.printable import printable
from search.checkpoints.placement import device_title
from search.front import hypervolume, non_dominated, worst_corner
from search.merging.baselines import PARENTS
from search.running.budget import expected_trials
from search.running.observer import Observer, Step
from search.running.problem import Problem
from search.storage.database import shown
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, base_label

logger = logging.getLogger("mergefront")


class ProgressPrinter(Observer):
    """Shows what moves: front size and hypervolume, not only a counter."""

    def __init__(self, store: StudyStore, problem: Problem, console: Console, *, quiet: bool = False) -> None:
        self._store = store
        self._config = problem.config
        self._problem = problem
        self._console = console
        self._quiet = quiet
        self._objectives = [(metric.name, metric.maximize) for metric in problem.metrics]
        self._values: dict[int, tuple[float, ...]] = {}
        self._stopped = 0
        self._parents: dict[int, tuple[float, ...]] = {}
        self._most = self._total = 0
        self._tokens: int | None = None
        self._before = 0
        self._began = self._trial_began = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._volume = 0.0

    # -- Observer -----------------------------------------------------------------------------------------------

    def started(self, trials: Sequence[TrialRecord], total: int) -> None:
        self._most, self._tokens = total, self._store.attribute("tokens")
        self._look(trials)
        self._before = self._tried
        self._began = time.monotonic()
        self._volume = self._hypervolume()
        if self._quiet:
            return
        for line in self._start_block(trials):
            self._console.print(line, markup=False, highlight=False)
        if self._live:
            self._bar = Progress(
                TextColumn("{task.completed:>4}/{task.total}"),
                BarColumn(bar_width=22),
                TextColumn("{task.description}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._summary(), total=self._total, completed=self._tried)

    def step(self, step: Step, trial: TrialRecord) -> None:
        if step == "asked":
            self._trial_began = time.monotonic()

    def batches(self, tokens: int) -> None:
        if not self._quiet:
            logger.info("batches of %d tokens, the fastest on %s", tokens, device_title(self._problem.device))

    def finished(self, trial: TrialRecord, values: Sequence[float]) -> None:
        self._look(self._store.trials())  # other workers' results, too
        volume = self._hypervolume()
        gained, self._volume = volume - self._volume, volume
        seconds = self._seconds(trial)
        rank = "front" if self._is_on_front(trial.number) else "dominated"
        scores = "  ".join(f"{n} {v:.4f}" for (n, _), v in zip(self._objectives, values, strict=True))
        kind = "" if trial.kind == "search" else f" ({base_label(trial)})"
        line = (
            f"trial {trial.number}{kind}  {scores}  {rank}  {seconds:.1f} s  "
            f"[{self._tried}/{self._total}  {self._summary(gained, scores=False)}]"
        )
        self._say(line, gained)

    def stopped(self, trial: TrialRecord, reason: str) -> None:
        self._look(self._store.trials())
        seconds = self._seconds(trial)
        self._say(
            f"trial {trial.number}  stopped early: {reason}  {seconds:.1f} s  "
            f"[{self._tried}/{self._total}  {self._summary(scores=False)}]"
        )

    def failed(self, trial: TrialRecord, reason: str) -> None:
        logger.warning("trial %d failed: %s", trial.number, reason)

    def ended(self, trials: Sequence[TrialRecord]) -> None:
        self.close()

    def reporting(self, done: int, of: int) -> None:
        if self._quiet or of == 0:
            return
        if done == 0:
            logger.info("scoring the report split: %d trials", of)
            self._began = time.monotonic()
        elif done == of:
            logger.info("report split scored in %s", _duration(time.monotonic() - self._began))

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _live(self) -> bool:
        return self._console.is_terminal and not os.environ.get("NO_COLOR")

    @property
    def _tried(self) -> int:
        return len(self._values) + self._stopped

    def _seconds(self, trial: TrialRecord) -> float:
        """What the storage says of another worker's trial; of one of this process, its own clock."""
        return time.monotonic() - self._trial_began if trial.seconds is None else trial.seconds

    def _say(self, line: str, gained: float = 0.0) -> None:
        """A line for who reads lines, and the bar for who sees it."""
        shown_elsewhere = self._quiet or self._bar is not None
        logger.log(logging.DEBUG if shown_elsewhere else logging.INFO, line)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=self._tried, total=self._total, description=self._summary(gained)
            )

    def _to_go(self) -> str:
        if self._tokens is None:
            return f"{max(self._total - self._before, 0)} to go"
        return f"at most {self._tokens:,} tokens" + (
            f", {self._total - self._before} to go" if self._before else ""
        )

    def _start_block(self, trials: Sequence[TrialRecord]) -> list[Text]:
        config, facts = self._config, self._store.attribute("facts")
        aims = ", ".join(f"{name} {'up' if maximize else 'down'}" for name, maximize in self._objectives)
        sampler = config.sampler
        open_ = sum(record.state in ("running", "waiting") for record in trials)
        state = "new" if not trials else f"resuming: {self._before} done"
        if open_:
            state += f", {open_} begun and not finished"
        split = facts["questions"]
        lines = [
            f"{config.name}  {len(self._objectives)} objectives ({aims})  {self._problem.space.dim} coefficients, "
            f"{' or '.join(config.merge.methods)}  {sampler.title} seed {sampler.seed}",
            f"parents    {'  +  '.join(config.parents.places.values())}  {_count(facts['parameters'])} parameters",
            f"questions  {split['search']} search, {split['report']} report  ({', '.join(facts['tasks'])})",
            f"storage    {shown(self._store.url)}  {state}, {self._to_go()}",
            *(f"note       {note}" for note in facts["notes"]),
        ]
        return [Text(printable(line)) for line in lines]

    def _summary(self, gained: float = 0.0, *, scores: bool = True) -> str:
        size = int(self._front_mask().sum()) if self._values else 0
        text = f"front {size}  HV {self._volume:.4f}"
        if gained > 0:
            text += f" (+{gained:.4f})"
        if scores and self._values:
            points = np.array(list(self._values.values()))
            for j, (name, maximize) in enumerate(self._objectives):
                best = points[:, j].max() if maximize else points[:, j].min()
                text += f"  best {name} {best:.3f}"
        if self._stopped:
            text += f"  {self._stopped} stopped early"
        ran = self._tried - self._before
        if ran > 0:
            each = (time.monotonic() - self._began) / ran
            text += f"  {each:.1f} s/trial  eta {_duration(each * max(self._total - self._tried, 0))}"
        return text

    def _look(self, trials: Sequence[TrialRecord]) -> None:
        self._total = expected_trials(trials, self._most, self._tokens)
        for record in trials:
            if record.state == "complete" and record.values is not None:
                self._remember(record, record.values)
        self._stopped = sum(record.state == "stopped" for record in trials)

    def _remember(self, trial: TrialRecord, values: tuple[float, ...]) -> None:
        self._values[trial.number] = values
        if trial.kind in PARENTS:
            self._parents[trial.number] = values

    def _front_mask(self) -> NDArray[np.bool_]:
        points = np.array(list(self._values.values()))
        return non_dominated(points, maximise=tuple(m for _, m in self._objectives))

    def _is_on_front(self, number: int) -> bool:
        return bool(self._front_mask()[list(self._values).index(number)])

    def _hypervolume(self) -> float:
        """Of all trials so far, over the corner of the parents' worst values; 0 until all parents are scored."""
        if len(self._parents) < 1 + len(self._problem.space.experts):
            return 0.0
        maximise = tuple(m for _, m in self._objectives)
        corner = worst_corner(np.array(list(self._parents.values())), maximise=maximise)
        return hypervolume(np.array(list(self._values.values())), corner, maximise=maximise)


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _duration(seconds: float) -> str:
    """`7:20` or `1:02:09`.

    >>> _duration(440), _duration(3729)
    ('7:20', '1:02:09')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
