"""Arms on the board of a launched study: what they wrote becomes evidence, and its digests study attributes."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from objectives.questions.questions import Split
from search.errors import ConfigError
from search.results.alternatives import SPLITS
from search.results.arms import arm_key, stored_arms
from search.running.problem import Problem
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import check_identity, stored_config
from search.storage.pieces import digest_of
from search.storage.store import StudyStore
from search.switching.arms import Written
from search.switching.train import switching_of

logger = logging.getLogger("mergefront")

# Parts of the section that say how a switcher is trained, not how candidates take turns.
_TRAINING = {"switcher", "margin", "rollouts", "lora"}


class Boarding:
    """Puts arms on a study's board.

    Args:
        problem: of the study file that the arms are made from.

    Raises:
        ConfigError: the study was launched with other parents or questions, or in another dtype.
    """

    def __init__(self, store: StudyStore, problem: Problem) -> None:
        identity = problem.identity
        check_identity(store, {what: identity[what] for what in ("parents", "questions")})
        began, here = stored_config(store).merge.dtype, problem.config.merge.dtype
        if began != here:
            raise ConfigError(
                f"study '{store.name}': was launched with merge.dtype {began} (found {here}). Take that back, or "
                "rename the study."
            )
        self._store, self._evidence = store, EvidenceFolder(store.url, store.name)
        rules = switching_of(problem).model_dump(mode="json", exclude=_TRAINING)
        self._setting = digest_of({"switching": rules})

    @classmethod
    def open(cls, url: str, problem: Problem) -> Boarding | None:
        """The board of the study of this file; None, which is said, if it was never launched in this storage."""
        store = StudyStore.find(url, problem.config.name)
        if store is None or store.attribute("config") is None:
            logger.info("study '%s' was not launched: the table alone", problem.config.name)
            return None
        return cls(store, problem)

    def put(self, label: str, found: Mapping[Split, Written], switcher: str | None) -> None:
        """Puts an arm on the board, in the place of an earlier one of its name.

        Args:
            switcher: SHA-256 of the `switcher.json` it used; None if it used none.

        Raises:
            DiskError, StorageError: it cannot be written.
        """
        values = {
            split: {
                "evidence": self._evidence.save(one.evaluation),
                "tokens": one.tokens / one.single,
                "switcher": switcher,
                "setting": self._setting,
            }
            for split, one in found.items()
        }
        with self._store.exclusive():
            known = self._store.attributes()
            for split, value in values.items():
                before = known.get(arm_key(label, split))
                if split == "report" and before and before["switcher"] != switcher:
                    logger.info("%s: takes the place of that of another switcher", label)
                if before != value:
                    self._store.set_attribute(arm_key(label, split), value)

    def finish(self) -> None:
        """Takes arms off the board that were made under other rules of taking turns: these are not comparable."""
        with self._store.exclusive():
            arms = list(stored_arms(self._store.attributes()))
            stale = [arm.label for arm in arms if arm.setting != self._setting]
            for label in stale:
                for split in SPLITS:
                    self._store.set_attribute(arm_key(label, split), None)
        if stale:
            logger.info("taken off the board, made under other rules of taking turns: %s", ", ".join(stale))
        logger.info("%d arms are on the board of study '%s'", len(arms) - len(stale), self._store.name)
