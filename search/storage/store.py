"""The study's Optuna storage: opening, claiming, finishing, adopting. With `trials`, all that knows Optuna storages.

Every trial is created whole (all coefficients in one transaction) and under a lock, so its number is its place in the
sequence of draws. A trial whose worker died stays what it is and is adopted by the next worker: same number, same
recipe. That makes an interrupted study equal to an uninterrupted one.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from search.errors import LostConnectionError, StorageError
from search.storage.database import connect, exclusive, shown, sqlite_path, translated
from search.storage.postgresql import FewConnections
from search.storage.trials import History, State, TrialRecord, TrialTables
from search.storage.worker import Worker, this_worker

__all__ = ["State", "StudyStore", "TrialRecord"]

logger = logging.getLogger("mergefront")

MAX_TRIES = 5  # a search recipe that ended its worker that often is not tried again
BEAT_SECONDS = 20.0
GRACE_SECONDS = 150.0  # a worker of another machine that was silent so long is taken for dead

_ATTRIBUTE = "mergefront:"
T = TypeVar("T")


class StudyStore:
    """One study in one storage."""

    def __init__(self, url: str, storage: RDBStorage, name: str, grace: float = GRACE_SECONDS) -> None:
        self.url = url
        self.name = name
        self.grace = grace
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        self._tables = TrialTables(storage.engine, self._study_id)
        self._history = History(self._tables)
        # Another worker's last beat, and when it was first seen here.
        self._beats: dict[int, tuple[Any, float]] = {}

    # -- the study ----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, url: str, name: str, objectives: Sequence[tuple[str, bool]], **options: Any
    ) -> StudyStore:
        """The study of this name, made if it does not exist; `objectives` are (name, maximize) pairs."""
        storage = connect(url, create=True)
        with translated(url), exclusive(url):
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=["maximize" if maximize else "minimize" for _, maximize in objectives],
                load_if_exists=True,
            )
            names = [objective for objective, _ in objectives]
            # load_if_exists silently keeps stored directions, so a study that is not ours is refused, not reused.
            ours = any(key.startswith(_ATTRIBUTE) for key in study.user_attrs)
            if not ours and (study.trials or len(study.directions) != len(names)):
                raise StorageError(
                    f"{shown(url)}: study '{name}' was not made by mergefront. Choose another name."
                )
            if study.metric_names is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    study.set_metric_names(names)  # optuna-dashboard shows them
        return cls(url, storage, name, **options)

    @classmethod
    def open(cls, url: str, name: str, **options: Any) -> StudyStore:
        """An existing study.

        Raises:
            StorageError: no such storage, or it has no study of that name made by mergefront.
        """
        storage = connect(url, create=False)
        with translated(url):
            names = optuna.get_all_study_names(storage)
            if name not in names:
                has = ", ".join(sorted(names)[:8]) or "no study at all"
                raise StorageError(f"{shown(url)}: no study '{name}'. This storage has: {has}.")
            study = optuna.load_study(study_name=name, storage=storage)
            if not any(key.startswith(_ATTRIBUTE) for key in study.user_attrs):
                raise StorageError(
                    f"{shown(url)}: study '{name}' was not made by mergefront, so it cannot be continued here."
                )
        return cls(url, storage, name, **options)

    @classmethod
    def find(cls, url: str, name: str, **options: Any) -> StudyStore | None:
        """An existing study as `open` opens it; None if there is no such file, or no study of that name in it."""
        path = sqlite_path(url)
        if path is not None and not path.exists():
            return None
        storage = connect(url, create=False)
        with translated(url):
            names = optuna.get_all_study_names(storage)
        return cls.open(url, name, **options) if name in names else None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the study for this worker alone, over processes and machines. Not re-entrant."""
        with exclusive(self.url, self.name, self._storage.engine):
            yield

    def attribute(self, key: str) -> Any:
        """A study-level value, None if it was never set."""
        return self.attributes().get(key)

    def attributes(self) -> dict[str, Any]:
        attrs = self._reached(lambda: self._storage.get_study_user_attrs(self._study_id))
        return {k.removeprefix(_ATTRIBUTE): v for k, v in attrs.items() if k.startswith(_ATTRIBUTE)}

    def set_attribute(self, key: str, value: Any) -> None:
        self._reached(lambda: self._storage.set_study_user_attr(self._study_id, _ATTRIBUTE + key, value))

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs, this thread does not wait for a server that is away."""
        pool = self._storage.engine.pool
        with pool.at_once() if isinstance(pool, FewConnections) else nullcontext():
            yield

    # -- its trials ---------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """All trials of ours, by number; trials that others put into the study by hand are left out."""
        return list(self._refreshed().records)

    def scored(self, recipe: str) -> TrialRecord | None:
        """The first complete trial whose attribute `recipe` is this, else the first stopped one; None if neither."""
        return self._refreshed().scored(recipe)

    def claim(
        self,
        kind: str,
        coefficients: Mapping[str, float],
        distributions: Mapping[str, BaseDistribution],
        attributes: Mapping[str, Any],
        tags: Mapping[str, Any],
    ) -> TrialRecord:
        """Creates a running trial of this worker, whole in one transaction. Call it while `exclusive`.

        Args:
            coefficients: all numbers of the recipe; of a categorical one the index of the choice.
        """
        template = create_trial(
            state=TrialState.RUNNING,
            params={name: _external(value, distributions[name]) for name, value in coefficients.items()},
            distributions=dict(distributions),
            user_attrs={"kind": kind, **attributes, "worker": this_worker().to_json(), "tries": 1},
            system_attrs=dict(tags),
        )
        with translated(self.url):
            trial_id = self._storage.create_new_trial(self._study_id, template_trial=template)
        return self._refreshed().of(trial_id)

    def adopt(self) -> TrialRecord | None:
        """Takes over the first trial that was given back or whose worker died; None if there is none.

        Call it while `exclusive`. A recipe that ended its worker `MAX_TRIES` times is failed instead.
        """
        for record in self._refreshed().open:
            if record.state == "running" and not self._is_orphan(record):
                continue
            tries = int(record.attributes.get("tries", 1))
            if record.state == "running" and record.kind == "search" and tries >= MAX_TRIES:
                logger.warning("trial %d ended its worker %d times and is given up", record.number, tries)
                self._set_state(record.number, TrialState.FAIL, error=f"ended its worker {tries} times")
                continue
            trial_id = self._history.id_of(record.number)
            died = record.state == "running"
            with translated(self.url):
                self._storage.set_trial_user_attr(trial_id, "worker", this_worker().to_json())
                self._storage.set_trial_user_attr(trial_id, "tries", tries + died)
                if record.state == "waiting":
                    self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
            logger.info(
                "trial %d is taken over (%s)", record.number, "its worker died" if died else "given back"
            )
            return self._refreshed().of(trial_id)
        return None

    def all_taken(self) -> bool:
        """Whether trials are open and `adopt` would find none to take over; told without holding the study."""
        records = self._refreshed().open
        return bool(records) and not any(
            record.state == "waiting" or self._is_orphan(record) for record in records
        )

    def annotate(self, number: int, key: str, value: Any) -> None:
        """Writes an attribute of a running trial."""
        with translated(self.url):
            self._storage.set_trial_user_attr(self._history.id_of(number), key, value)

    def complete(
        self, number: int, values: Sequence[float], attributes: Mapping[str, Any] | None = None
    ) -> bool:
        """The commit point of a trial, attributes first.

        False if another worker took the trial over meanwhile: the result is dropped.
        """
        return self._finish(number, TrialState.COMPLETE, [float(value) for value in values], attributes or {})

    def stop(self, number: int, estimate: Sequence[float], attributes: Mapping[str, Any]) -> bool:
        """The commit point of a trial that was scored in part: pruned, in Optuna's words, and without values.

        Args:
            estimate: what its values would have come to, in the order of the objectives.

        Returns:
            As `complete`.
        """
        known = {"estimate": [float(value) for value in estimate], **attributes}
        return self._finish(number, TrialState.PRUNED, None, known)

    def fail(self, number: int, error: str) -> None:
        """Fails a trial of this worker, with the reason."""

        def fail(again: bool) -> None:
            if self._is_mine(number):
                self._set_state(number, TrialState.FAIL, error=error)

        self._held(fail)

    def give_back_all(self) -> None:
        """Puts interrupted trials of this very process back into the queue, to be run again with the same recipes:
        claimed a moment ago, or left by an earlier run of it that could not even give them back."""

        def give_back(again: bool) -> None:
            for record in self._refreshed().open:
                if record.state == "running" and self._owns(record):
                    self._set_state(record.number, TrialState.WAITING)

        self._held(give_back)

    @contextmanager
    def beating(self, number: int) -> Iterator[None]:
        """Shows workers elsewhere that this worker lives, while the block runs."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(BEAT_SECONDS):
                count += 1
                try:
                    if self._is_mine(number):
                        self.annotate(number, "beat", count)
                except Exception as error:  # a beat may be missed; the next one tries again
                    logger.debug("heartbeat of trial %d failed: %s", number, error)

        thread = threading.Thread(target=beat, name="mergefront-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            # It may be waiting for a server that is away; a beat too many does no harm.
            thread.join(BEAT_SECONDS / 4)

    # -- inside -------------------------------------------------------------------------------------------------

    def _finish(
        self, number: int, state: TrialState, values: list[float] | None, attributes: Mapping[str, Any]
    ) -> bool:
        def tell(again: bool) -> bool:
            record = self._read(number)
            if not self._owns(record):
                logger.warning(
                    "trial %d was taken over by another worker; this late result is dropped", number
                )
                return False
            if record.state != "running":
                return again and record.state in ("complete", "stopped")  # told, and the answer was lost
            for key, value in attributes.items():
                self.annotate(number, key, value)
            self._set_state(number, state, values=values)
            return True

        return self._held(tell)

    def _held(self, work: Callable[[bool], T]) -> T:
        """Does work under the lock, once more if the connection breaks meanwhile: servers restart at any moment.

        Args:
            work: is told whether it is done again; then what it writes may be there already.
        """
        try:
            with self.exclusive():
                return work(False)
        except LostConnectionError as error:
            logger.warning("writing once more: %s", error)
            with self.exclusive():
                return work(True)

    def _reached(self, work: Callable[[], T]) -> T:
        """Reads or sets something, once more if the connection breaks meanwhile. Under the lock that fails again: the
        lock is lost with its connection."""
        try:
            with translated(self.url):
                return work()
        except LostConnectionError:
            with translated(self.url):
                return work()

    def _refreshed(self) -> History:
        self._reached(self._history.refresh)
        return self._history

    def _is_mine(self, number: int) -> bool:
        record = self._read(number)
        return record.state == "running" and self._owns(record)

    def _owns(self, record: TrialRecord) -> bool:
        return bool(record.attributes.get("worker") == this_worker().to_json())

    def _read(self, number: int) -> TrialRecord:
        # Past the history: the heart beats in a thread of its own.
        with translated(self.url), self._tables.connected() as connection:
            ((_, record),) = self._tables.read([self._history.id_of(number)], connection)
        return record

    def _is_orphan(self, record: TrialRecord) -> bool:
        owner = record.attributes.get("worker")
        one_machine = sqlite_path(self.url) is not None
        if owner is None or Worker.from_json(owner).is_known_dead(one_machine=one_machine):
            return True
        if self._owns(record):
            return False
        # Seconds of this machine's monotonic clock between two looks at the same beat: no clock is compared with
        # another machine's, and a clock that is set back cannot make a live worker look dead.
        beat, now = (owner, record.attributes.get("beat")), time.monotonic()
        last, since = self._beats.get(record.number, (None, now))
        if beat != last:
            self._beats[record.number] = (beat, now)
            return False
        return now - since > self.grace

    def _set_state(
        self, number: int, state: TrialState, values: list[float] | None = None, error: str = ""
    ) -> None:
        with translated(self.url):
            if error:
                self._storage.set_trial_user_attr(self._history.id_of(number), "error", error[:2000])
            self._storage.set_trial_state_values(self._history.id_of(number), state, values)


def _external(value: float, distribution: BaseDistribution) -> Any:
    """A number as Optuna's users see it."""
    return (
        distribution.to_external_repr(value) if isinstance(distribution, CategoricalDistribution) else value
    )
