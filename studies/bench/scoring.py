"""Scoring against lm-eval, whole trials against the file route, and tokens a second against a bare forward pass."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from timing import Ratio, seconds

from objectives.evaluation import Evaluation
from objectives.evaluator import Evaluator
from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.questions import Question
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer
from search.merging.blend import Blend, make_blend
from search.merging.live import LiveModel

EXAMPLES = 5  # first rows: never scored, the few-shot examples of all questions
PEER_BATCHES = (1, 4, 8, 16, 32)
SHAPES = ((1, 256), (2, 256), (4, 128), (8, 64), (8, 128), (16, 32), (16, 64), (32, 32), (32, 64))


@dataclass(frozen=True)
class Rows:
    """The same questions for both sides: as lm-eval's tables, and as ours.

    Attributes:
        tables: `validation` (scored) and `train` (examples).
        folder: the same two, saved.
    """

    tables: Any
    folder: Path

    @classmethod
    def take(cls, source: Path, questions: int, folder: Path) -> Rows:
        """The first rows of a saved table: `EXAMPLES` examples, then `questions` questions."""
        from datasets import load_from_disk

        table = load_from_disk(str(source))
        parts = {
            "train": table.select(range(EXAMPLES)),
            "validation": table.select(range(EXAMPLES, EXAMPLES + questions)),
        }
        for name, part in parts.items():
            part.save_to_disk(str(folder / name))
        return cls(parts, folder)

    def ours(self, tokenizer: Any, shots: int) -> tuple[tuple[Question, ...], TaskConfig]:
        task = TaskConfig(
            preset="arc_easy",
            path=str(self.folder),
            split="validation",
            shots=shots,
            normalize="characters",
        )
        found = load_questions([task], SplitConfig(), tokenizer)
        return (*found.search, *found.report), task

    def theirs(self, shots: int, limit: int | None = None) -> Any:
        scored = self.tables["validation"]
        scored = scored.select(range(limit)) if limit else scored
        return peers.task("arc/arc_easy.yaml", {**self.tables, "validation": scored}, shots, "train")


@dataclass
class TrialTimes:
    """Seconds of the parts of whole trials, a value for each repeat.

    Attributes:
        tokens: that went through the model here in one trial.
        batch: lm-eval's batch size, the fastest of `PEER_BATCHES` on ten questions.
        gap: largest difference of two log-likelihoods (natural log) in the last trial.
        equal: questions whose `acc` and `acc_norm` agree with lm-eval's in the last trial, of `questions`.
    """

    shots: int
    questions: int
    tokens: int
    batch: int
    merge: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    mergekit: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    lm_eval: list[float] = field(default_factory=list)
    gap: float = 0.0
    equal: int = 0

    @property
    def scoring(self) -> Ratio:
        """lm-eval's seconds over ours."""
        return Ratio.of(self.lm_eval, self.score)

    @property
    def trial(self) -> Ratio:
        """Seconds of the file route over ours."""
        route = [sum(parts) for parts in zip(self.mergekit, self.load, self.lm_eval, strict=True)]
        return Ratio.of(route, [sum(parts) for parts in zip(self.merge, self.score, strict=True)])


def measure_trials(
    live: LiveModel, tokenizer: Any, rows: Rows, shots: int, repeats: int, scratch: Path
) -> TrialTimes:
    """Whole trials of both sides in turns, each of another recipe; prompts must be equal, word for word.

    Raises:
        AssertionError: the two sides do not ask the same questions in the same words.
    """
    questions, task = rows.ours(tokenizer, shots)
    scorer = Scorer(live.model, tokenizer)
    evaluator = Evaluator(scorer, tokenizer, questions, [task])
    scorer.measure(questions)
    batch = _peers_best_batch(live.parents.post.folder, rows, shots)
    times = TrialTimes(shots, len(questions), evaluator.tokens, batch)

    for repeat in range(repeats):
        coefficients = {
            name: (((i * 7 + repeat * 3) % 19) / 19,) for i, name in enumerate(live.parents.names)
        }
        blend = make_blend(live.parents, coefficients)
        out = scratch / f"merge-{shots}-{repeat}"
        found: dict[str, Any] = {}

        def here(blend: Blend = blend, found: Any = found) -> None:
            times.merge.append(seconds(lambda: live.apply(blend)))
            times.score.append(seconds(lambda: found.update(ours=evaluator.evaluate())))

        def there(blend: Blend = blend, out: Path = out, found: Any = found) -> None:
            times.mergekit.append(seconds(lambda: peers.merge_to_disk(live.parents, blend, out)))
            times.load.append(seconds(lambda: found.update(model=peers.load(out, batch))))
            times.lm_eval.append(
                seconds(
                    lambda: found.update(
                        theirs=peers.score(found["model"], "arc_easy", lambda: rows.theirs(shots))
                    )
                )
            )

        for call in (here, there) if repeat % 2 == 0 else (there, here):
            call()
        shutil.rmtree(out)
        _compare(times, questions, found["ours"], found["theirs"])
    return times


def _peers_best_batch(folder: Path, rows: Rows, shots: int) -> int:
    """The batch size with which lm-eval scores ten questions fastest, each tried once after a warm-up."""
    taken = {}
    for batch in (PEER_BATCHES[0], *PEER_BATCHES):
        model = peers.load(folder, batch)
        taken[batch] = seconds(lambda m=model: peers.score(m, "arc_easy", lambda: rows.theirs(shots, 10)))
    return min(taken, key=lambda batch: taken[batch])


def _compare(times: TrialTimes, questions: Sequence[Question], ours: Evaluation, theirs: Any) -> None:
    """Sets `gap` and `equal`."""
    times.gap, times.equal = 0.0, 0
    assert {tuple(q.pairs()) for q in questions} == set(theirs), "the two sides ask in other words"
    plain = ours.loglikelihood
    for i, question in enumerate(questions):
        answer = theirs[tuple(question.pairs())]
        wanted = np.array(answer.loglikelihoods)
        times.gap = max(times.gap, float(np.abs(plain[i, : len(wanted)] - wanted).max()))
        acc = bool(plain[i].argmax() == question.gold)
        times.equal += (acc, bool(ours.outcomes.correct[i])) == (answer.acc, answer.acc_norm)


@dataclass(frozen=True)
class ForwardTimes:
    """Tokens a second: of scoring (padding not counted), and of the model's bare forward pass at each shape."""

    score: list[float]
    forward: dict[str, list[float]]

    @property
    def best(self) -> str:
        """The shape with the highest median, such as `8 x 128`."""
        return max(self.forward, key=lambda shape: statistics.median(self.forward[shape]))

    @property
    def share(self) -> Ratio:
        return Ratio.of(self.score, self.forward[self.best])


def measure_forward(live: LiveModel, tokenizer: Any, rows: Rows, repeats: int) -> ForwardTimes:
    """Scores at 0 shots, and runs `model(input_ids)` with its head on full rows of random tokens, in turns."""
    questions, task = rows.ours(tokenizer, 0)
    scorer = Scorer(live.model, tokenizer)
    evaluator = Evaluator(scorer, tokenizer, questions, [task])
    scorer.measure(questions)
    vocabulary = live.model.get_input_embeddings().weight.shape[0]
    inputs = {f"{b} x {n}": torch.randint(0, vocabulary, (b, n)) for b, n in SHAPES}

    def forward(ids: torch.Tensor) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> None:
            live.model(input_ids=ids, use_cache=False)

        return run

    score: list[float] = []
    speeds: dict[str, list[float]] = {shape: [] for shape in inputs}
    evaluator.evaluate()
    for ids in inputs.values():
        forward(ids)()
    for _ in range(repeats):
        score.append(evaluator.tokens / seconds(evaluator.evaluate))
        for shape, ids in inputs.items():
            speeds[shape].append(ids.numel() / seconds(forward(ids)))
    return ForwardTimes(score, speeds)
