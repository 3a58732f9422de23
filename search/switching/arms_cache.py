"""Answers of arms on disk, so that a second table, or one after a kill, draws nothing again that is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from objectives.questions.questions import Split
from search import __version__
from search.running.problem import Problem
from search.storage.pieces import PieceStore, digest_of
from search.switching.candidates import Setting
from search.switching.train import switching_of

Texts = tuple[tuple[str, ...], ...]
Draft = tuple[Texts, int, int]  # of one task: answers, tokens of all models, tokens of a single one

_KIND, _CONTENT = "answers", "content"
_FORMAT = 2  # another way to write or to count makes another one


class Kept:
    """What arms wrote, found again where candidates, prompts, the section and mergefront's version are the same.

    Args:
        switcher: digest of a trained switcher's folder, on which its own arm depends.
    """

    def __init__(
        self, folder: Path, problem: Problem, settings: Sequence[Setting], switcher: str, its_arm: str
    ) -> None:
        self._pieces = PieceStore(folder)
        self._switcher, self._its_arm = switcher, its_arm
        prompts = [
            [[list(one.prompt) for one in each.asked[s]] for s in ("search", "report")] for each in settings
        ]
        self._facts: dict[str, Any] = {
            "format": _FORMAT,
            "version": __version__,
            "parents": problem.parents.digest,
            "dtype": problem.config.merge.dtype,
            "questions": problem.questions.digest,
            "prompts": digest_of({"prompts": prompts}),
            "switching": switching_of(problem).model_dump(mode="json"),
        }

    def read(self, label: str, split: Split) -> tuple[list[Draft], float] | None:
        """What an arm wrote to each task of a split, and the seconds it took; None if that is not known."""
        found = self._pieces.read(_KIND, self._of(label, split))
        if found is None:
            return None
        content = json.loads(found[_CONTENT].numpy().tobytes())
        drafts = [
            (tuple(tuple(texts) for texts in answers), int(tokens), int(single))
            for answers, tokens, single in content["drafts"]
        ]
        return drafts, float(content["seconds"])

    def write(self, label: str, split: Split, drafts: Sequence[Draft], seconds: float) -> None:
        """Stores the same.

        Raises:
            ExportError, DiskError: the folder cannot be made or written.
        """
        content = json.dumps({"drafts": drafts, "seconds": seconds}).encode()
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        with self._pieces.writing():
            self._pieces.write(_KIND, self._of(label, split), {_CONTENT: tensor})

    def _of(self, label: str, split: Split) -> dict[str, Any]:
        own = {"switcher": self._switcher} if label == self._its_arm else {}
        return {**self._facts, "arm": label, "split": split, **own}
