"""The merges of one seed: made by the product, timed, scored by its evaluator on either half of the questions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from experts import GROUPS, Settings, places, training_texts
from numpy.typing import NDArray

from objectives.evaluator import Evaluator
from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer
from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.layout import load_config
from search.checkpoints.loading import load_model
from search.checkpoints.parents import Parents
from search.cli.bars import MergeBar
from search.cli.console import stderr_console
from search.errors import ExportError
from search.merging.anchors.build import build
from search.merging.anchors.options import AdaptOptions, AnchorOptions
from search.merging.anchors.starts import FromExperts, FromMerge, FromPre, Start
from search.merging.oneoff.make import Place, make
from search.merging.oneoff.request import read_request

HALVES = ("search", "report")
SEARCH = 0.4  # of the questions


@dataclass(frozen=True)
class Anchors:
    """A kind of anchors: constructed ones, or a control that is not optimised.

    Attributes:
        name: in tables.
        tokens: of an anchor. The paper's 5; real questions are longer.
    """

    name: str
    init: str
    steps: int
    tokens: int = 5


@dataclass(frozen=True, eq=False)
class Made:
    """A merge and what it took.

    Attributes:
        label: method and choices.
        seconds: to make it from the experts; the merge that it refines and the choosing are not in it.
        rate: of the adaptation, if there was one.
    """

    label: str
    folder: Path
    seconds: float
    rate: float = 0.0


class Bench:
    """Base, experts and questions of one seed, and every merge that was made of them.

    Args:
        folder: from `experts.build`.
        anchors: shape and rate of all anchors.
    """

    def __init__(self, folder: Path, settings: Settings, anchors: AnchorOptions, adapt: AdaptOptions) -> None:
        self.folder, self._settings = folder, settings
        self._anchors, self._adapt = anchors, adapt
        self.parents = Parents.open(str(folder / "pre"), places(folder))
        tasks = [TaskConfig(path=str(folder / f"{group}.jsonl"), name=group) for group in GROUPS]
        self._tokenizer = self.parents.tokenizer()
        questions = load_questions(tasks, SplitConfig(search=SEARCH), self._tokenizer)
        self._tasks = tasks
        self._asked = {half: questions.of(half) for half in HALVES}  # type: ignore[arg-type]
        self.task = {half: np.array([q.task for q in asked]) for half, asked in self._asked.items()}
        self._out = folder / "merges"
        shutil.rmtree(self._out, ignore_errors=True)
        shutil.rmtree(folder / "pieces", ignore_errors=True)  # times are measured: nothing may be there
        self._made: dict[str, Made] = {}
        self._correct: dict[tuple[str, str], NDArray[np.bool_]] = {}
        self._construction: dict[Anchors, float] = {}

    def parent(self, name: str) -> Made:
        """`pre`, or an expert."""
        return self._kept(Made(name, self.folder / name, 0.0))

    def plain(self, method: str, coefficient: float) -> Made:
        """Task arithmetic, TSV-Merge or WUDI, all experts with one coefficient (for WUDI, its scaling)."""
        label = f"{method} {coefficient:g}"
        if label in self._made:
            return self._made[label]
        given = [f"{name}={coefficient}" for name in GROUPS] if method != "wudi" else []
        more = [f"scaling={coefficient}"] if method == "wudi" else []
        asked = [f"{name}={place}" for name, place in places(self.folder).items()]
        request = read_request(method, str(self.folder / "pre"), asked, given, more)
        began = time.perf_counter()
        with MergeBar(stderr_console(), quiet=True) as bar:
            out = make(request, Place(self._out / label.replace(" ", "-"), device="cpu"), bar)
        return self._kept(Made(label, out, time.perf_counter() - began))

    def adapted(
        self, kind: Anchors, start: Made | None, rate: float, *, coefficient: float | None = None
    ) -> Made:
        """The blocks fitted to anchors, from `pre` (Eq. 5) or refining a merge (Eq. 6).

        Args:
            coefficient: where `start` is task arithmetic, its: each expert then has factors of its own.
        """
        origin = "pre" if start is None else start.label
        label = f"{kind.name} {kind.steps} from {origin} at {rate:g}"
        if label in self._made:
            return self._made[label]
        options = replace(self._anchors, init=kind.init, steps=kind.steps, tokens=kind.tokens)  # type: ignore[arg-type]
        begun: Start = FromPre()
        if start is not None:
            begun = FromMerge(Checkpoint.open(start.folder))
            if coefficient is not None:
                begun = FromExperts((coefficient,) * len(GROUPS))
        built = build(
            self.parents,
            self._out / label.replace(" ", "-"),
            self.folder / "pieces",
            anchors=options,
            adapt=replace(self._adapt, rate=rate),
            start=begun,
            data=self._token_ids(kind.tokens) if kind.init == "data" else None,
        )
        self._construction.setdefault(kind, built.seconds["construct"])
        seconds = self._construction[kind] + built.seconds["adapt"] + built.seconds["write"]
        return self._kept(Made(label, built.folder, seconds, rate))

    def best(self, candidates: Sequence[Made]) -> Made:
        """The most accurate on the search half, the first of equal ones."""
        return max(candidates, key=lambda made: self.accuracy(made, "search"))

    def accuracy(self, made: Made, half: str) -> float:
        """Mean over the groups."""
        correct, task = self.correct(made, half), self.task[half]
        return float(np.mean([correct[task == number].mean() for number in range(len(GROUPS))]))

    def correct(self, made: Made, half: str) -> NDArray[np.bool_]:
        """What it gets right of one half, `(n,)`, in the order of `task`."""
        key = made.label, half
        if key not in self._correct:
            model = load_model(made.folder, load_config(made.folder), torch.float32, error=ExportError)
            evaluator = Evaluator(Scorer(model, self._tokenizer, 2048), None, self._asked[half], self._tasks)
            self._correct[key] = evaluator.evaluate().outcomes.correct
        return self._correct[key]

    def _kept(self, made: Made) -> Made:
        return self._made.setdefault(made.label, made)

    def _token_ids(self, tokens: int) -> list[torch.Tensor]:
        """What each expert was trained on: sequences of its questions and answers, cut to one length."""
        n, ids = self._anchors.n, []
        for group in GROUPS:
            rows = []
            texts = iter(training_texts(self._settings, group, 4 * n))
            for _ in range(n):
                row: list[int] = []
                while len(row) < tokens:
                    row += self._tokenizer(next(texts))["input_ids"] + [self._tokenizer.eos_token_id]
                rows.append(row[:tokens])
            ids.append(torch.tensor(rows))
        return ids
