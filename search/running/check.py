"""What `check` prints: what a study is made of, what it would take, what it can show. Nothing is merged or scored."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from objectives.metrics.power import differences
from objectives.outcomes import Outcomes
from objectives.questions.questions import closed, written
from search.checkpoints.reward_model import make_preference
from search.config.methods import OPTIONS, get_method
from search.config.sections import MergeConfig, ParentsConfig
from search.errors import MergefrontError
from search.merging.blend import ranks_bytes
from search.running.problem import Problem
from search.storage.database import sqlite_path
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore

MIB = 2**20
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe(problem: Problem, url: str) -> list[str]:
    """Lines on parents, groups, questions, memory, disk, work and power of a study; `url` is that of its storage."""
    config, parents, space = problem.config, problem.parents, problem.space
    numbers = parents.parameters
    live = numbers * _BYTES[config.merge.dtype]
    split = problem.questions
    texts = sum(len(q.context) + sum(len(text) for text in q.options) for q in closed(split.search))
    texts += sum(len(q.context) for q in written(split.search))
    tokens = texts / 4 + _drawn(problem)
    free = shutil.disk_usage(Path.cwd()).free
    lines = [
        f"study       {config.name}",
        f"parents     {config.parents.pre}",
        *(f"            {place}" for place in _named(config.parents)),
        f"            {numbers:,} parameters, {len(parents.names)} tensors; architecture and tokenizers agree; "
        "all finite",
        f"merge       {_merge(config.merge)}, {config.merge.dtype}, coefficients in [{space.low:g}, {space.high:g}]"
        + (" that add up to 1" if space.simplex else ""),
        f"groups      {len(space.groups)}: {_shortened([group.name for group in space.groups])}"
        + (f"; {len(space.coefficients)} coefficients" if len(space.experts) > 1 else ""),
        f"questions   {len(split.search)} search, {len(split.report)} report, of {', '.join(split.task_names)}",
        f"objectives  {', '.join(m.name + (' up' if m.maximize else ' down') for m in problem.metrics)}",
        *_written(problem),
        *_sampled(problem),
        f"search      {config.sampler.title}, {len(problem.baselines)} baselines + {config.trials} trials",
        f"memory      {live / MIB:,.0f} MiB for the live model{_ranks(problem)}; the parents stay on disk, mapped",
        f"disk        {live / MIB:,.0f} MiB for each exported checkpoint; {free / MIB:,.0f} MiB free here",
        f"work        about {tokens:,.0f} tokens a trial, {_work(tokens, numbers)} on {problem.device}",
    ]
    if config.sampler.follows_gradients:
        which = (
            "each trial" if config.sampler.warm is None else f"each of the first {config.sampler.warm} trials"
        )
        lines.append(f"gradient    {problem.proposal_evaluations:.3g} times that before {which} is proposed")
    if (racing := config.racing) is not None:
        lines.append(
            f"racing      {racing.looks} looks; a trial of the front is stopped with a probability of at most "
            f"{racing.error:g}"
        )
    if (fidelity := config.fidelity) is not None:
        lines.append(
            f"fidelity    {fidelity.questions} questions first, estimates by {fidelity.estimator}; in full where the "
            "front is in reach"
        )
    lines += _power(problem, url)
    lines += [f"note        {note}" for note in problem.notes]
    if idle := problem.idle:
        left = " and are left at 0" if len(idle) < space.dim else ""
        lines.append(
            f"note        {len(idle)} of {space.dim} coefficients change nothing{left}, the tensors of their groups "
            f"are as in pre: {_shortened(idle)}"
        )
    return [*lines, "ready       mergefront launch runs it"]


def _drawn(problem: Problem) -> int:
    """Tokens of the written answers of a trial, none of which ends early."""
    each = [task.generation.samples * task.generation.max_new_tokens for task in problem.config.tasks]
    return sum(each[question.task] for question in written(problem.questions.search))


def _written(problem: Problem) -> list[str]:
    """What is written in every trial, a line a task."""
    lines = []
    for number, task in enumerate(problem.config.tasks):
        if task.written:
            asked, drawn = written(problem.questions.search), task.generation
            lines.append(
                f"written     {problem.questions.task_names[number]}: "
                f"{sum(question.task == number for question in asked)} search questions, {drawn.samples} answers to "
                f"each, of at most {drawn.max_new_tokens} tokens; right by {drawn.match}"
            )
    return lines


def _sampled(problem: Problem) -> list[str]:
    """What is sampled in every trial, and what the preferences measure on it."""
    config, prompts = problem.config, problem.prompts
    if config.diversity is None or prompts is None:
        return []
    drawn = config.diversity
    lines = [
        f"prompts     {len(prompts.search)} search, {len(prompts.report)} report; {drawn.samples} answers to each, "
        f"of at most {drawn.max_new_tokens} tokens"
    ]
    for name, one in (config.preferences or {}).items():
        said = f"reward model {one.model}" if one.model else make_preference(one).title
        lines.append(f"preference  {name}: {said}")
    return lines


def _power(problem: Problem, url: str) -> list[str]:
    """What the report split can show, from the answers of an expert and a uniform 0.5 once they are stored."""
    pair = _stored_pair(problem, url)
    found = problem.power("report", pair)
    if not found:
        return []
    errors = ", ".join(f"{one.standard_error:.3f}" for one in found)
    return [
        f"power       differences {differences(found)} show on {len(problem.questions.report)} report questions "
        f"(80 % power); standard errors {errors}; "
        + (
            "spreads assumed"
            if pair is None
            else f"from the stored answers of {problem.space.experts[0]} and uniform 0.5"
        )
    ]


def _stored_pair(problem: Problem, url: str) -> tuple[Outcomes, Outcomes] | None:
    """Answers of the first expert and the uniform 0.5 to the search split, if a study of this name has scored both.

    Looked for in SQLite files only: a server may be slow to answer, and gets its tables from whoever asks first.
    """
    database = sqlite_path(url)
    if database is None or not database.exists():
        return None
    try:
        store = StudyStore.open(url, problem.config.name)
        if (store.attribute("identity") or {}).get("questions") != problem.questions.digest:
            return None
        evidence = EvidenceFolder(url, store.name)
        space = problem.space
        keys = [space.alone(space.experts[0]).key, space.uniform(0.5).key]
        trials = [trial for key in keys if (trial := store.scored(key)) is not None]
        answers = [evidence.load(str(trial.attributes["evidence"])).outcomes for trial in trials]
    except (
        MergefrontError
    ):  # nothing there yet, or broken: `launch` says so, `check` is not about the storage
        return None
    return (answers[0], answers[1]) if len(answers) == 2 else None


def _work(tokens: float, numbers: int) -> str:
    """Floating-point work of a trial: two operations a parameter and token."""
    return f"{2 * tokens * numbers / 1e12:,.2f} TFLOP"


def _ranks(problem: Problem) -> str:
    """What methods that select by magnitude keep beside the live model."""
    most = ranks_bytes(problem.parents, problem.space.methods)
    return f", {most / MIB:,.0f} MiB for the order of magnitudes" if most else ""


def _merge(merge: MergeConfig) -> str:
    """Methods, and hyper-parameters with their values or ranges."""
    said = [" or ".join(merge.methods)]
    for option in OPTIONS:
        if any(option in get_method(method).options for method in merge.methods):
            low, high = merge.range_of(option)
            said.append(f"{option} {low:g}" + (f" to {high:g}" if high > low else ""))
    return ", ".join(said)


def _named(parents: ParentsConfig) -> list[str]:
    if parents.post is not None:
        return [parents.post]
    return [f"{name}: {place}" for name, place in parents.post_trained.items()]


def _shortened(names: Sequence[str]) -> str:
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ... {', '.join(names[-2:])}"
