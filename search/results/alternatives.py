"""Alternatives to merging: a trial with a fitted temperature, computed from stored scores alone.

Fits are made on the search split and cost no forward pass: what a method reads beyond the trials' evidence (the
scores after every layer for Dual-Align, permuted prompts for CAPE) is measured once by `calibrate` and stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.logits import LayerwiseLogits, OptionLogits
from objectives.calibrators.methods import METHODS, Logits, fit
from objectives.outcomes import Outcomes
from objectives.questions.config import TaskConfig
from objectives.questions.questions import Split
from search.errors import ConfigError
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import stored_config
from search.storage.store import StudyStore
from search.storage.trials import base_label

CAPE = "cape"
CALIBRATORS = (*(name for name in METHODS if name != "vanilla"), CAPE)
AUTOMATIC = ("temperature", "daca")  # of `post`, on every board: they need nothing that is not stored anyway
# Written answers have no options that two models, or two orders, share.
READS_OPTIONS = tuple(name for name in CALIBRATORS if name != "temperature")
READS_ONLY_OPTIONS = ("dual-align", CAPE)  # refused where some answers are written
SPLITS: tuple[Split, ...] = ("search", "report")


def layers_key(trial: int, split: Split) -> str:
    """Study attribute with the digest of a trial's layer-wise scores."""
    return f"layers:{trial}:{split}"


def cape_key(trial: int, split: Split) -> str:
    """Study attribute with the digest of a trial's answers averaged over orders of the options."""
    return f"cape:{trial}:{split}"


def diversity_key(trial: int, method: str, split: Split) -> str:
    """Study attribute with the digest of the answers that a trial samples at a method's temperature."""
    return f"diversity:{trial}:{method}:{split}"


def calibrators_key(trial: int) -> str:
    """Study attribute with the methods that `calibrate` was asked for, for one trial."""
    return f"calibrators:{trial}"


@dataclass(frozen=True)
class Alternative:
    """A trial as a calibrator changes it.

    Attributes:
        trial: number of the trial underneath; its weights are used as they are.
        fitted: the temperature with its evidence; None for CAPE, which has none.
    """

    trial: int
    base: str
    method: str
    fitted: FittedTemperature | None

    @property
    def label(self) -> str:
        return f"{self.base} + {self.method}"


class Scores:
    """The stored scores of a study, as it stood when this was made, as calibrators read them."""

    def __init__(self, store: StudyStore) -> None:
        self._evidence = EvidenceFolder(store.url, store.name)
        self._records = {record.number: record for record in store.trials() if record.state == "complete"}
        self._attributes = store.attributes()
        tasks = stored_config(store).tasks
        self._samples = [task.generation.samples if task.written else 0 for task in tasks]
        self._known: dict[tuple[int, Split, bool], Logits] = {}

    def asked(self, trial: int) -> list[str]:
        """The methods that `calibrate` was asked for, for one trial."""
        return list(self._attributes.get(calibrators_key(trial), ()))

    def digest(self, trial: int, split: Split) -> str | None:
        """The evidence of a trial on a split; None if it was not scored there."""
        if split == "search":
            return str(self._records[trial].attributes["evidence"])
        return self._attributes.get(f"report:{trial}")

    def diversity(self, trial: int, split: Split, method: str = "") -> str | None:
        """The evidence of a trial's sampled answers, or of those at a method's temperature; None if there is none."""
        if method:
            return self._attributes.get(diversity_key(trial, method, split))
        if split == "search":
            return self._records[trial].attributes.get("diversity")
        return self._attributes.get(f"diversity:{trial}")

    def logits(self, trial: int, split: Split, layers: bool = False) -> Logits | None:
        """Option scores of a trial, of all layers if `layers`; None if they were not measured."""
        key = (trial, split, layers)
        if key not in self._known:
            digest, each = self.digest(trial, split), self._attributes.get(layers_key(trial, split))
            if digest is None or (layers and each is None):
                return None
            final = OptionLogits.from_evaluation(self._evidence.load(digest), samples=self._samples)
            self._known[key] = (
                LayerwiseLogits(final, self._evidence.load_layers(str(each))) if layers else final
            )
        return self._known[key]

    def averaged(self, trial: int, split: Split) -> Outcomes | None:
        """What CAPE makes of a trial on a split; None if that was not measured."""
        digest = self._attributes.get(cape_key(trial, split))
        return None if digest is None else self._evidence.load(str(digest)).outcomes

    def outcomes(self, trial: int, split: Split) -> Outcomes:
        """What a trial that was scored on a split answered."""
        return self._evidence.load(str(self.digest(trial, split))).outcomes

    def has(self, alternative: Alternative, split: Split) -> bool:
        """Whether an alternative's answers on a split are known."""
        if alternative.fitted is None:
            return cape_key(alternative.trial, split) in self._attributes
        return self.digest(alternative.trial, split) is not None

    def tempered(self, alternative: Alternative, split: Split) -> Outcomes:
        """What an alternative answers on a split for which it `has` answers."""
        if alternative.fitted is None:
            averaged = self.averaged(alternative.trial, split)
            assert averaged is not None, "`has` said so"
            return averaged
        evaluation = self._evidence.load(str(self.digest(alternative.trial, split)))
        return alternative.fitted.apply(OptionLogits.from_evaluation(evaluation, samples=self._samples))

    def fitted(self, method: str, trial: int) -> FittedTemperature | None:
        """The temperature of a trial by a method, fitted on the search split; None if a score is missing.

        So it is where the method does not suit the questions.
        """
        if not self.suits(method):
            return None
        layers = "layers" in METHODS[method]
        own, reference = (self.logits(number, "search", layers) for number in (trial, self._pre))
        if own is None or reference is None:
            return None
        return fit(method, own, reference)

    def suits(self, method: str) -> bool:
        """Whether a method has anything to read: some compare options, of which written answers have none."""
        return method not in READS_OPTIONS or not all(self._samples)

    def alternatives(self) -> Iterator[Alternative]:
        """`post` with the automatic methods, and all that `calibrate` was asked for."""
        for number, record in self._records.items():
            methods = [*(AUTOMATIC if record.kind in ("post", "expert") else ()), *self.asked(number)]
            for method in dict.fromkeys(methods):
                fitted = None if method == CAPE else self.fitted(method, number)
                if fitted is not None or (method == CAPE and cape_key(number, "search") in self._attributes):
                    yield Alternative(number, base_label(record), method, fitted)

    @property
    def _pre(self) -> int:
        return next(number for number, record in self._records.items() if record.kind == "pre")


def require_options(methods: Sequence[str], tasks: Sequence[TaskConfig]) -> None:
    """Refuses calibrators that the questions of these tasks do not suit.

    Raises:
        ConfigError: dual-align or cape with written answers, or a method that compares options where there are none.
    """
    for method in methods:
        if (method in READS_ONLY_OPTIONS and any(task.written for task in tasks)) or (
            method in READS_OPTIONS and all(task.written for task in tasks)
        ):
            raise ConfigError(
                f"--method {method}: compares likelihoods of options, but answers are written (format: generation). "
                f"Use temperature{'' if all(task.written for task in tasks) else ', naive or daca'}."
            )


def chosen_methods(names: Sequence[str]) -> list[str]:
    """The methods that a user named, each once; `all` stands for every one.

    Raises:
        ConfigError: no such method; the nearest is suggested.
    """
    import difflib

    found: list[str] = []
    for name in names:
        if name != "all" and name not in CALIBRATORS:
            near = difflib.get_close_matches(name.lower(), CALIBRATORS, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise ConfigError(
                f"--method {name}: no calibrator is called so. {hint}They are: {', '.join(CALIBRATORS)}, all."
            )
        found += CALIBRATORS if name == "all" else [name]
    return list(dict.fromkeys(found))
