"""The main path: ask -> merge -> evaluate -> tell, and the report split when the search is over.

    store, problem = create(config, url)      # `opening`; or reopen(url, name)
    run(store, problem)

A reader who knows this file knows the product: `space` gives vectors a meaning, `samplers` propose, `merging` makes
weights, `objectives` measures, `fidelity` measures no more than it takes, `storage` remembers, `front` compares.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from objectives.evaluation import Evaluation
from objectives.metrics.diversity import Diversity
from objectives.metrics.names import Metric
from objectives.questions.questions import Split
from search.errors import (
    DiskError,
    EvaluationError,
    LostConnectionError,
    MergeError,
    MergefrontError,
    StorageError,
    TooManyFailuresError,
)
from search.interrupt import Interrupted, check_interrupted, held_back, let_through, pause
from search.merging.baselines import missing_baseline
from search.running.batches import size_batches, size_batches_held
from search.running.budget import within_tokens
from search.running.deadline import Deadline
from search.running.fidelity.rules import stages_of
from search.running.fidelity.stages import Scored, Stages, as_learnt
from search.running.memory import Memory, Result
from search.running.observer import Observer
from search.running.problem import Problem
from search.running.profile import ATTRIBUTE, Stopwatch
from search.running.report_split import score_report_split
from search.samplers import Engine, Proposal, Sources, WeightedGradient, make_engine
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord, front_of

logger = logging.getLogger("mergefront")

MAX_FAILURES_IN_A_ROW = 5  # then the set-up is broken, not the recipes
POLL_SECONDS = 0.5
LONGEST_POLL_SECONDS = 5.0  # a server may have hundreds of workers that wait for the last trials


@dataclass(frozen=True)
class _Worker:
    """One process at work on a study."""

    store: StudyStore
    problem: Problem
    evidence: EvidenceFolder
    engine: Engine
    observer: Observer
    watch: Stopwatch
    memory: Memory

    def seen(self, record: TrialRecord) -> TrialRecord:
        """A trial as engines see it: every number in the box."""
        space = self.problem.space
        return replace(record, coefficients=space.coordinates(record.coefficients)) if space.axes else record

    @cached_property
    def stages(self) -> Stages | None:
        """How candidates are scored in parts; None if they are not. It takes the live model."""
        return stages_of(self.problem, self.evidence)

    @property
    @let_through()  # it may load the model
    def trial_tokens(self) -> int:
        """What a candidate takes that is scored in full."""
        return self.problem.evaluator("search").tokens if self.stages is None else self.stages.tokens


def run(
    store: StudyStore,
    problem: Problem,
    observer: Observer | None = None,
    *,
    report: bool = True,
    checkpoints: Sequence[int] = (),
    memory: Memory | None = None,
) -> None:
    """Runs the study until its budget is complete, then scores the report split.

    Several processes may do this at once: every trial is claimed by one of them, and the budget counts them all. One
    process runs a study once at a time.

    Args:
        checkpoints: scored tokens; the fronts as they stood then are scored on the report split, too.
        memory: what earlier studies of the same problem scored; this one adds to it.

    Raises:
        TooManyFailuresError: several trials in a row failed. EvaluationError: a baseline failed.
        Interrupted: a signal; the trial under way is back in the queue.
    """

    def gradient() -> WeightedGradient:
        size_batches_held(store, problem)  # called while a trial is drawn, so the store is held
        return problem.gradient

    evidence = EvidenceFolder(store.url, store.name)

    def answers(record: TrialRecord) -> Evaluation:
        return evidence.load(str(record.attributes["evidence"]))

    bounds = (problem.space.low, problem.space.high)
    sources = Sources(problem.metrics, gradient, answers, lambda record: problem.losses(answers(record)))
    space, first = problem.space, len(problem.baselines)
    engine = make_engine(
        problem.config.sampler, space.names, bounds, sources, problem.idle, first, space.neutral
    )
    worker = _Worker(
        store, problem, evidence, engine, observer or Observer(), Stopwatch(), memory or Memory()
    )
    store.give_back_all()
    before = store.trials()
    worker.observer.started(before, first + int(store.attribute("trials")))
    try:
        with held_back():
            for trial in _asked(worker, first=len(before)):
                worker.observer.step("asked", trial)
                _run_trial(worker, trial)
    except (Interrupted, MergefrontError):
        with suppress(DiskError, StorageError):  # what cannot be put back is adopted as a dead worker's
            store.give_back_all()
        raise
    worker.observer.ended(store.trials())
    if report:
        _score_report_split(worker, checkpoints)


def _asked(worker: _Worker, first: int) -> Iterator[TrialRecord]:
    """Trials for this worker, until the budget is complete and no trial is left to take over.

    Args:
        first: number of the first trial of this run: earlier failures may have been mended.
    """
    store = worker.store
    while True:
        check_interrupted()
        try:
            trial, left = _ask(worker, first)
        except LostConnectionError as error:
            # The lock went with it; the trial may have been claimed before the answer was lost.
            logger.warning("asking once more: %s", error)
            store.give_back_all()
            trial, left = _ask(worker, first)
        if trial is not None:
            yield trial
        elif left:
            # Other workers have the last ones; should one die, its trial is ours. Looking does not hold the store: idle
            # workers would keep it from those that have something to tell. Who failed a trial draws in its place.
            pause(seconds := POLL_SECONDS)
            while store.all_taken():
                pause(seconds)
                seconds = min(LONGEST_POLL_SECONDS, 1.3 * seconds)
        else:
            return


def _ask(worker: _Worker, first: int) -> tuple[TrialRecord | None, bool]:
    """A trial for this worker, if there is one to take over or to draw; else whether others have some."""
    store = worker.store
    with worker.watch.measuring("store"), store.exclusive():
        trial = store.adopt() or _drawn(worker, first)
        # Looked up while none can fail: who leaves says by that that the study is complete.
        return trial, trial is None and any(
            record.state in ("running", "waiting") for record in store.trials()
        )


def _drawn(worker: _Worker, first: int) -> TrialRecord | None:
    """A new trial, or None if the budget is given out. Failed trials do not count: others are drawn in their place;
    trials that were stopped early do: they were tried.
    """
    store, engine, space = worker.store, worker.engine, worker.problem.space
    history = store.trials()
    _stop_after_failures(history[first:])
    given_out = sum(record.state != "failed" for record in history)
    every = worker.problem.baselines
    if given_out >= len(every) + int(store.attribute("trials")):
        return None
    missing = missing_baseline(history, every)
    if missing is None and not _affordable(worker, history):
        return None
    if missing is not None:
        kind, recipe, tags = every[missing].kind, every[missing].recipe, engine.baseline_tags(missing)
        known = {"label": every[missing].label}
    else:
        with worker.watch.measuring("propose"):
            proposal = _proposed(engine, [worker.seen(record) for record in as_learnt(history)])
        kind, tags, known = "search", proposal.tags, {}
        recipe = space.from_vector([proposal.coefficients[name] for name in space.names])
    return store.claim(
        kind,
        recipe.coefficients,
        worker.problem.distributions,
        {"method": recipe.method, "recipe": recipe.key, **known},
        tags,
    )


@let_through()
def _proposed(engine: Engine, history: Sequence[TrialRecord]) -> Proposal:
    """The next proposal. There is no trial yet that could fail, so the study stops if there is none.

    Raises:
        EvaluationError: a gradient is not finite, or does not fit into memory.
    """
    try:
        return engine.propose(history, draw=len(history))
    except (EvaluationError, MergeError, MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluationError(f"trial {len(history)} could not be proposed: {reason}") from error


def _affordable(worker: _Worker, history: Sequence[TrialRecord]) -> bool:
    """Whether the study's tokens, if it counts them, suffice for one more trial beside those under way."""
    limit = worker.store.attribute("tokens")
    if limit is None:
        return True
    open_ = sum(record.state in ("running", "waiting") for record in history)
    # Those under way have paid for their proposals.
    due = (open_ + 1) * worker.trial_tokens + worker.engine.cost(history)
    return sum(record.tokens for record in history) + due <= int(limit)


def _run_trial(worker: _Worker, trial: TrialRecord) -> None:
    """merge -> evaluate -> evidence -> tell. The tell is the commit point: whatever ends the process before it, the
    next worker runs the same recipe again."""
    store, observer, failure = worker.store, worker.observer, ""
    with store.beating(trial.number):  # until the end: who waits for the store to tell lives, too
        try:
            result = _known(store, trial) or _measured(worker, trial)
            observer.step("evidence", trial)
            with worker.watch.measuring("store"):
                tell = store.stop if result.stopped else store.complete
                told = tell(trial.number, result.values, {**result.attributes, ATTRIBUTE: worker.watch.lap()})
        except (EvaluationError, MergeError, MemoryError, RuntimeError) as error:
            # RuntimeError is how torch says out of memory; what it says is kept with the trial.
            failure = " ".join(str(error).split()) or type(error).__name__
            store.fail(trial.number, failure)
            if trial.kind != "search":
                raise EvaluationError(
                    f"trial {trial.number} ({trial.kind}): {failure} A study needs its baselines."
                ) from error
    if failure:
        _free_memory()  # out here: within the handler the error still holds what the trial had allocated
        observer.failed(trial, failure)
        return
    if told and result.stopped:
        observer.stopped(trial, str(result.attributes["reason"]))
    elif told:
        observer.finished(trial, result.values)


def _known(store: StudyStore, trial: TrialRecord) -> Result | None:
    """The result of a finished trial with the same recipe: genetic algorithms propose exact duplicates.

    What was stopped once stays stopped: the front has not become worse since.
    """
    twin = store.scored(trial.attributes["recipe"])
    if twin is None:
        return None
    kept = ("evidence", "diversity", "partial", "scored", "reason")
    attributes = {key: twin.attributes[key] for key in kept if key in twin.attributes}
    values = twin.attributes["estimate"] if twin.values is None else twin.values
    return Result(values, {**attributes, "same_as": twin.number}, stopped=twin.values is None)


def _measured(worker: _Worker, trial: TrialRecord) -> Result:
    key, known = (worker.evidence.path, trial.attributes["recipe"]), worker.memory.search
    if key in known:
        return known[key]
    found = _scored(worker, trial)
    if worker.stages is None:  # in parts, a result is one of this study's front, too
        known[key] = found
    return found


def _scored(worker: _Worker, trial: TrialRecord) -> Result:
    scored, diversity = _evaluated(worker, trial, "search")
    evaluation, verdict = scored.evaluation, scored.verdict
    values: list[float] = [] if verdict is None else list(verdict.estimate)
    for metric in worker.problem.metrics[len(values) :]:
        if isinstance(metric, Metric):
            values.append(float(metric.value(evaluation.outcomes)))
        else:
            assert diversity is not None, "the study file was refused otherwise"
            values.append(float(metric.value(diversity)))
    for metric, value in zip(worker.problem.metrics, values, strict=True):
        if not math.isfinite(value):
            raise EvaluationError(f"{metric.name}: found {value}, wanted a finite number.")
    with worker.watch.measuring("store"):
        saved, tokens = worker.evidence.save(evaluation), evaluation.scored_tokens
        if verdict is not None:
            part = [len(evaluation.outcomes), scored.questions]
            attributes = {"partial": saved, "scored": part, "tokens": tokens, "reason": verdict.reason}
            return Result(values, attributes, stopped=True)
        attributes = {"evidence": saved, "tokens": tokens}
        if diversity is not None:
            attributes["diversity"] = worker.evidence.save(diversity)
        return Result(values, attributes)


@let_through()
def _evaluated(worker: _Worker, trial: TrialRecord, split: Split) -> tuple[Scored, Diversity | None]:
    """What the recipe answers to a split; a candidate that is stopped samples no answers."""
    problem, observer, watch = worker.problem, worker.observer, worker.watch
    if (tokens := size_batches(worker.store, problem)) is not None:
        observer.batches(tokens)
    limit = problem.config.trial_seconds if split == "search" else None
    stages = worker.stages if split == "search" and trial.kind == "search" else None
    if limit is not None:
        problem.load(split)  # once, which no trial's time limit shall pay for
    deadline = Deadline(limit)
    progress = deadline.watching(observer.evaluating)
    observer.step("merging", trial)
    with watch.measuring("merge"):
        problem.merge(trial.recipe)
    deadline.check("the merge")
    observer.step("merged", trial)
    with watch.measuring("score"):
        if stages is None:
            evaluation = problem.evaluate(split, progress)
            scored = Scored(evaluation, len(evaluation.outcomes))
        else:
            scored = stages.score(trial, worker.store.trials(), progress)
        diversity = None if scored.verdict is not None else problem.diversify(split)
    deadline.check("its end")
    observer.step("evaluated", trial)
    return scored, diversity


@held_back()
def _score_report_split(worker: _Worker, checkpoints: Sequence[int]) -> None:
    """Scores parents, uniform line and front (or all trials, see `split.report`) on the report split.

    Nothing is chosen here: who is on the front was decided on the search split.
    """
    store = worker.store
    done = [record for record in store.trials() if record.state == "complete"]
    maximize = [metric.maximize for metric in worker.problem.metrics]
    on_front = front_of(done, maximize)
    for tokens in checkpoints:
        on_front |= front_of(within_tokens(store.trials(), tokens), maximize)
    everybody = worker.problem.config.split.report == "all"
    due = [record for record in done if everybody or record.kind != "search" or record.number in on_front]
    by_recipe, folder, known = worker.memory.report, worker.evidence.path, store.attributes()
    for record in done:
        if (answered := known.get(f"report:{record.number}")) is not None:
            by_recipe[folder, record.attributes["recipe"]] = answered, known.get(f"diversity:{record.number}")

    def score(record: TrialRecord) -> tuple[str, str | None]:
        key = (folder, record.attributes["recipe"])
        if key not in by_recipe:
            scored, diversity = _evaluated(worker, record, "report")
            sampled = None if diversity is None else worker.evidence.save(diversity)
            by_recipe[key] = (worker.evidence.save(scored.evaluation), sampled)
        return by_recipe[key]

    score_report_split(store, due, score, worker.observer)


def _stop_after_failures(history: Sequence[TrialRecord]) -> None:
    last = [record for record in history if record.finished][-MAX_FAILURES_IN_A_ROW:]
    if len(last) == MAX_FAILURES_IN_A_ROW and all(record.state == "failed" for record in last):
        raise TooManyFailuresError(
            f"trials {last[0].number} to {last[-1].number} failed in a row; the last one: "
            f"{last[-1].attributes.get('error', 'unknown')} Mend the cause, then resume."
        )


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
