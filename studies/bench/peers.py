"""What a user would run instead: mergekit writes a checkpoint, transformers loads it, lm-eval scores it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from search.checkpoints.parents import Parents
from search.merging.blend import Blend
from search.merging.mergekit_config import config_text

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Answer:
    """lm-eval's result for one question: log-likelihood of each option, and whether `acc` and `acc_norm` count it."""

    loglikelihoods: tuple[float, ...]
    acc: bool
    acc_norm: bool


def merge_to_disk(parents: Parents, blend: Blend, out: Path) -> None:
    """mergekit's `linear`, from the config that this product exports, with mergekit's default options."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    places = (str(parents.pre.folder), str(parents.post.folder))
    text = config_text(parents, blend, places, "float32", [])
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), MergeOptions(quiet=True))


def load(folder: Path, batch: int) -> Any:
    """lm-eval's `hf` model on a CPU in float32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)


def task(file: str, splits: Mapping[str, Any], shots: int, examples: str) -> Any:
    """lm-eval's own task on local rows.

    Args:
        file: of the task, below `lm_eval/tasks`.
        splits: tables by split; `validation` is scored.
        examples: the split whose first rows are the few-shot examples, the same for all questions. (By default
            lm-eval draws others for every question, which nobody can share.)
    """
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    for key in ("training_split", "test_split", "tag"):
        config.pop(key, None)
    config |= {
        "validation_split": "validation",
        "fewshot_split": examples,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "custom_dataset": lambda **_: splits,
    }
    return ConfigurableTask(config=config)


def score(model: Any, name: str, make_task: Callable[[], Any]) -> dict[Pairs, Answer]:
    """Runs lm-eval; the (context, continuation) pairs of each question -> its answer. No bootstrap, no printing."""
    from lm_eval.evaluator import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = evaluate(model, {name: make_task()}, bootstrap_iters=0, log_samples=True)
    assert found is not None
    return {_pairs(sample): _answer(sample) for sample in found["samples"][name]}


def _pairs(sample: Mapping[str, Any]) -> Pairs:
    arguments: Any = sample["arguments"]
    rows: Sequence[Any] = list(arguments.values()) if isinstance(arguments, Mapping) else arguments
    return tuple((row["arg_0"], row["arg_1"]) if isinstance(row, Mapping) else tuple(row[:2]) for row in rows)


def _answer(sample: Mapping[str, Any]) -> Answer:
    totals = tuple(float(one[0]) for one in sample["filtered_resps"])
    return Answer(totals, bool(sample["acc"]), bool(sample["acc_norm"]))
