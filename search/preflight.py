"""What `check` prints: what a study is made of and what it would take. Nothing is merged or scored."""

from __future__ import annotations

import shutil
from pathlib import Path

from search.config import StudyConfig
from search.materials import Materials
from search.study import BASELINES

MIB = 2**20
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def describe(materials: Materials) -> list[str]:
    """Lines on parents, groups, questions, memory, disk and work of a study."""
    config, parents, space = materials.config, materials.parents, materials.space
    numbers = parents.parameters
    live = numbers * _BYTES[config.merge.dtype]
    split = materials.questions
    texts = sum(len(q.context) + sum(map(len, q.options)) for q in split.search)
    free = shutil.disk_usage(Path.cwd()).free
    lines = [
        f"study       {config.name}",
        f"parents     {config.parents.pre}",
        f"            {config.parents.post}",
        f"            {numbers:,} parameters, {len(parents.names)} tensors; architecture and tokenizers agree; "
        "all finite",
        f"merge       {config.merge.method}, {config.merge.dtype}, coefficients in [{space.low:g}, {space.high:g}]",
        f"groups      {space.dim}: {_shortened(space.names)}",
        f"questions   {len(split.search)} search, {len(split.report)} report, of {', '.join(split.task_names)}",
        f"objectives  {', '.join(m.name + (' up' if m.maximize else ' down') for m in materials.metrics)}",
        f"search      {config.sampler.engine} {config.sampler.name}, {len(BASELINES)} baselines "
        f"+ {config.trials} trials",
        f"memory      {live / MIB:,.0f} MiB for the live model; the parents stay on disk, mapped",
        f"disk        {live / MIB:,.0f} MiB for each exported checkpoint; {free / MIB:,.0f} MiB free here",
        f"work        about {texts / 4:,.0f} tokens a trial, {_work(texts / 4, numbers)} on {materials.device}",
    ]
    if config.sampler.engine == "gradient":
        lines.append(f"gradient    {_gradient_cost(config):,} times that before each trial is proposed")
    if (racing := config.racing) is not None:
        lines.append(
            f"racing      {racing.looks} looks; a trial of the front is stopped with a probability of at most "
            f"{racing.error:g}"
        )
    if (fidelity := config.fidelity) is not None:
        lines.append(
            f"fidelity    {fidelity.questions} questions first, accuracy by {fidelity.estimator}; in full where the "
            "front is in reach"
        )
    lines += [f"note        {note}" for note in materials.notes]
    if idle := _equal_groups(materials):
        lines.append(
            f"note        {len(idle)} of {space.dim} groups are equal in both parents, their coefficients change "
            f"nothing: {_shortened(idle)}"
        )
    return [*lines, "ready       mergefront launch runs it"]


def _equal_groups(materials: Materials) -> tuple[str, ...]:
    """Groups that post-training left as they were, such as the embeddings under LoRA."""
    import torch

    pre, post = materials.parents.pre, materials.parents.post
    return tuple(
        group.name
        for group in materials.space.groups
        if all(torch.equal(pre.tensor(name), post.tensor(name)) for name in group.tensors)
    )


def _gradient_cost(config: StudyConfig) -> int:
    """Evaluations that one proposal of the gradient engine costs."""
    from objectives.backward import passes
    from objectives.losses import scalarized, stand_in
    from search.samplers.gradient_engine import STEPS

    losses = [stand_in(name) for name in config.objectives]
    return (config.sampler.steps or STEPS) * passes(scalarized(losses, [1.0] * len(losses)))


def _work(tokens: float, numbers: int) -> str:
    """Floating-point work of a trial: two operations a parameter and token."""
    return f"{2 * tokens * numbers / 1e12:,.2f} TFLOP"


def _shortened(names: tuple[str, ...]) -> str:
    if len(names) <= 6:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ... {', '.join(names[-2:])}"
