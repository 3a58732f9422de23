"""Workers as Ray actors, one a device: placed, watched, replaced when they die, and ended.

The storage stays the single truth. Workers need nothing from each other nor from this process, which works on nothing
itself: a cluster's head has no device. Every worker is a child process of its actor and ends with it, whatever ends
the actor, since its input then ends (`interrupt.tether`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search import __version__
from search.errors import ConfigError, MergefrontError, StorageError
from search.interrupt import Interrupted, check_interrupted, held_back
from search.running.observer import Observer
from search.running.ray_actor import actor_class
from search.running.workers import END_SECONDS, resume_command
from search.storage.database import sqlite_path
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord

logger = logging.getLogger("mergefront")

LOCAL = "local"
MAX_DEATHS = 5  # of one worker in a row, without a trial finished in between; then it is not started again
LOOK_SECONDS = 1.0
LONGEST_PAUSE = 30.0  # seconds before a worker that died again and again is started anew
PATIENCE = 30.0  # seconds after which a worker that is not placed is mentioned

_PASSING = 4  # exit code of what may pass: a storage that restarts, a disk that is full
_MIB = 2**20


class WorkerError(MergefrontError):
    """What ended the workers, with the exit code that the worker's own process had."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class RayOptions:
    """Where Ray is: `local` starts one on this machine, `auto` and `HOST:PORT` join a cluster; and a worker's share.

    Attributes:
        gpus: GPUs of each worker; 0 for none, then the cores are shared.
    """

    address: str = LOCAL
    gpus: float = 1.0


@dataclass
class _Slot:
    """One of the workers, through all its lives."""

    number: int
    actor: Any = None
    began: Any = None  # reference to `begin`, until the actor is placed
    ended: Any = None  # reference to `wait`, from then on
    worker: dict[str, Any] | None = None  # as the storage names it
    deaths: int = 0
    again_at: float = 0.0
    placed_by: float = 0.0
    last: tuple[str, int] = ("", 1)  # why it died last, and the exit code for that

    @property
    def given_up(self) -> bool:
        return self.actor is None and self.deaths >= MAX_DEATHS

    @property
    def waits_for(self) -> Any:
        return self.ended if self.ended is not None else self.began


def run_on_ray(
    store: StudyStore,
    total: int,
    workers: int,
    options: RayOptions,
    device: str,
    overrides: Sequence[str],
    observer: Observer,
    local_parents: Path | None = None,
) -> None:
    """Runs the study with `workers` Ray actors until its budget is complete and the report split scored.

    Args:
        total: trials that the study shall have, baselines included.
        observer: sees every finished trial, whoever ran it.

    Raises:
        ConfigError: Ray is not installed, not there, or too small; or SQLite and a cluster of several machines.
        WorkerError: a worker's own error, or none is left to start again. Nothing is lost.
    """
    ray = _imported(options)
    # An exception that a signal's handler raises within Ray's own code comes out as a SystemError.
    with held_back(), _connected(ray, options, workers):
        check_interrupted()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        _check_nodes(nodes, store, options, workers)
        cpus, threads = _cores(nodes, workers, options.gpus)
        actor = ray.remote(
            num_cpus=cpus, num_gpus=options.gpus, max_restarts=0, max_task_retries=0, max_concurrency=4
        )(actor_class())
        path = sqlite_path(store.url)
        given = [_absolute(one) for one in overrides]
        job = {
            "version": __version__,
            # It may hold a password: Ray neither shows nor logs the arguments of methods, as it does environments.
            "url": store.url if path is None else f"sqlite:///{path.absolute()}",
            "host": None if path is None else socket.gethostname(),
            "command": [*resume_command(store, device, given, local_parents), "--tether"],
            "evidence": os.path.abspath(os.environ.get("MERGEFRONT_EVIDENCE") or "runs"),
            "threads": int(os.environ.get("OMP_NUM_THREADS") or threads),
            "gpus": options.gpus,
        }
        slots = [_Slot(number) for number in range(workers)]
        _Driver(ray, actor, job, store, observer, total, slots).run()


@dataclass
class _Driver:
    """Places, watches, replaces, ends."""

    ray: Any
    actor: Any
    job: dict[str, Any]
    store: StudyStore
    observer: Observer
    total: int
    slots: list[_Slot]
    check: Callable[[], None] = check_interrupted  # raises if this process shall end
    seen: set[int] = field(default_factory=set)
    read: Sequence[TrialRecord] = ()

    def run(self) -> None:
        self.read = self.store.trials()
        self.seen = {record.number for record in self.read if record.finished}
        self.observer.started(self.read, self.total)
        try:
            for slot in self.slots:
                self._start(slot)
            while not self._step():
                self.check()
                if all(slot.given_up for slot in self.slots):
                    why, code = self.slots[-1].last
                    raise WorkerError(
                        f"{why} Every worker died {MAX_DEATHS} times in a row. Finished trials are safe; mend the "
                        "cause, then resume.",
                        code,
                    )
            self._look()
            self.observer.ended(self._records())
            self._end(patience=END_SECONDS)  # they found the study complete, too
        finally:
            self._end()

    def _step(self) -> bool:
        """Waits a moment, then looks after storage and workers; True once the study is complete."""
        refs = [slot.waits_for for slot in self.slots if slot.actor is not None]
        ready: list[Any] = []
        if refs:
            ready, _ = self.ray.wait(refs, num_returns=1, timeout=LOOK_SECONDS)
            ready, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        else:
            time.sleep(LOOK_SECONDS)
        self._look()
        now = time.monotonic()
        for slot in self.slots:
            if slot.actor is None:
                if slot.deaths < MAX_DEATHS and now >= slot.again_at:
                    self._start(slot)
            elif slot.waits_for in ready:
                if self._answered(slot):
                    return True
            elif slot.ended is None and now > slot.placed_by:
                logger.info("worker %d is not placed yet: the cluster has no room for it", slot.number)
                slot.placed_by = float("inf")
        return False

    def _answered(self, slot: _Slot) -> bool:
        """What a worker's reference came to; True if its worker found the study complete."""
        try:
            answer = self.ray.get(slot.waits_for)
        except self.ray.exceptions.RayTaskError as error:
            raise WorkerError(f"worker {slot.number}: {_first_line(error.cause or error)}") from None
        except self.ray.exceptions.RayError as error:
            self._died(slot, _first_line(error))
            return False
        if slot.ended is None:
            if answer["refused"]:
                raise ConfigError(f"worker {slot.number} on {answer['host']}: {answer['refused']}")
            slot.worker, slot.ended = answer["worker"], slot.actor.wait.remote()
            logger.info("worker %d runs on %s", slot.number, answer["host"])
            return False
        code, line = answer
        if code == 0:
            return True
        if code < 0 or code > 128:
            self._died(slot, f"it was ended by {_signal_name(-code if code < 0 else code - 128)}.")
            return False
        if line and (code == _PASSING or (code == 1 and self._searching)):
            self._died(slot, line, code)
            return False
        raise WorkerError(line or f"worker {slot.number} ended with exit code {code}.", code)

    @property
    def _searching(self) -> bool:
        """Whether a candidate was scored: what fails from now on is a machine rather than the set-up."""
        return any(record.state == "complete" and record.kind == "search" for record in self.read)

    def _records(self) -> Sequence[TrialRecord]:
        """The trials; as last read while the server is away. Should it stay so, the workers' errors say it."""
        with suppress(StorageError), self.store.at_once():  # signals are seen between two looks
            self.read = self.store.trials()
        return self.read

    def _start(self, slot: _Slot) -> None:
        slot.actor = self.actor.remote()
        slot.began, slot.ended, slot.worker = slot.actor.begin.remote(self.job), None, None
        slot.placed_by = time.monotonic() + PATIENCE

    def _died(self, slot: _Slot, why: str, code: int = 1) -> None:
        finished = any(r.finished and r.attributes.get("worker") == slot.worker for r in self.read)
        slot.deaths = 1 if finished else slot.deaths + 1
        slot.last = why, code
        self._kill(slot)
        if slot.deaths >= MAX_DEATHS:
            logger.warning(
                "worker %d died %d times in a row and is given up: %s", slot.number, slot.deaths, why
            )
            return
        slot.again_at = time.monotonic() + min(2.0 ** (slot.deaths - 1), LONGEST_PAUSE)
        logger.warning("worker %d died and is replaced: %s", slot.number, why)

    def _look(self) -> None:
        """Tells the observer of trials that were finished since the last look."""
        for record in self._records():
            if not record.finished or record.number in self.seen:
                continue
            self.seen.add(record.number)
            if record.values is not None:
                self.observer.finished(record, record.values)
            elif record.state == "stopped":
                self.observer.stopped(record, str(record.attributes.get("reason", "")))
            else:
                self.observer.failed(record, str(record.attributes.get("error", "unknown")))

    def _end(self, patience: float = 0.0) -> None:
        """Ends all workers; those that do not end by themselves within `patience` seconds give their trials back."""
        live = [slot for slot in self.slots if slot.actor is not None]
        running = [slot.ended for slot in live if slot.ended is not None]
        if running and patience:
            self.ray.wait(running, num_returns=len(running), timeout=patience)
        with suppress(self.ray.exceptions.RayError):
            unseen = [slot.began for slot in live if slot.ended is None]
            placed = self.ray.wait(unseen, num_returns=len(unseen), timeout=0)[0] if unseen else []
            begun = [slot for slot in live if slot.ended is not None or slot.began in placed]
            stopped = [slot.actor.stop.remote(END_SECONDS) for slot in begun]
            if stopped:
                ended, late = self.ray.wait(stopped, num_returns=len(stopped), timeout=END_SECONDS + 5)
                if late or not all(self.ray.get(ended)):
                    logger.warning("a worker did not end within %d s; its trial is taken over", END_SECONDS)
        for slot in live:
            self._kill(slot)

    def _kill(self, slot: _Slot) -> None:
        with suppress(Exception):  # it is dead already, or Ray is
            self.ray.kill(slot.actor)
        slot.actor = slot.began = slot.ended = None


def _imported(options: RayOptions) -> Any:
    """Ray, told what it must not do before it is imported.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it reports to its makers otherwise
    if options.address == LOCAL:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # then it listens on loopback alone
        # Workers do this machine's work. At Ray's 15 another busy process leaves them a thirtieth of a core.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        # Else a line a second about a head that is not there.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray: pip install 'mergefront[ray]'.") from error
    return ray


@contextmanager
def _connected(ray: Any, options: RayOptions, workers: int) -> Iterator[None]:
    logging.getLogger("ray").setLevel(logging.ERROR)
    begun = options.address == LOCAL
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 * _MIB} if begun else {}
    handler = signal.getsignal(signal.SIGTERM)
    if not begun and options.address != "auto":
        _check_reachable(options.address)
    if begun:
        logger.info("starting Ray on this machine for %d workers", workers)
    try:
        ray.init(address=options.address, log_to_driver=False, configure_logging=False, **own)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"--address {options.address}: cannot join Ray there: {_first_line(error).rstrip('.')}. (A cluster with "
            "token authentication wants RAY_AUTH_MODE=token, and the token.)"
        ) from error
    except SystemExit as error:  # what Ray makes of a SIGTERM meanwhile
        raise Interrupted(signal.SIGTERM) from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in the place of ours
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and fills the screen meanwhile."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: nobody answers there ({error}). Give a Ray head's."
        ) from error


def _check_nodes(
    nodes: Sequence[dict[str, Any]], store: StudyStore, options: RayOptions, workers: int
) -> None:
    elsewhere = sorted({str(n["NodeManagerHostname"]) for n in nodes} - {socket.gethostname()})
    if elsewhere and sqlite_path(store.url) is not None:
        raise ConfigError(
            f"--engine ray: a SQLite storage serves one machine, and this cluster has {', '.join(elsewhere[:3])}, "
            "too. Give --storage postgresql+psycopg://..., or leave out --address."
        )
    if options.address == LOCAL:
        found = sum(float(node["Resources"].get("GPU", 0)) for node in nodes)
        if found < workers * options.gpus:
            raise ConfigError(
                f"--gpus-per-worker {options.gpus:g}: {workers} workers want {workers * options.gpus:g} GPUs, this "
                f"machine has {found:g}. Give fewer --workers, or --gpus-per-worker 0."
            )


def _cores(nodes: Sequence[dict[str, Any]], workers: int, gpus: float) -> tuple[int, int]:
    """Cores that Ray sets aside for each worker, and the threads that it uses.

    Without GPUs as many as let all workers be placed at once. With them one, so that a worker is not kept off a GPU by
    a busy core; its threads are its GPUs' share of their machine's cores.
    """
    cores = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    if gpus:
        has = [(int(n["Resources"].get("CPU", 0)), float(n["Resources"].get("GPU", 0))) for n in nodes]
        return 1, max(1, min((int(cpu * gpus / gpu) for cpu, gpu in has if gpu), default=1))
    fitting = (n for n in range(max(cores, default=1), 0, -1) if sum(core // n for core in cores) >= workers)
    each = next(fitting, 1)
    return each, each


def _absolute(override: str) -> str:
    """A place that was given from this folder; a worker stands in another one."""
    key, sign, value = override.partition("=")
    place = Path(value).expanduser()
    return f"{key}{sign}{place.absolute()}" if value and place.exists() else override


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
