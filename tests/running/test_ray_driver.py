"""Ray's driver and its actor without Ray: what is refused or tried again, and that a worker ends with its actor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import pytest

from search import __version__
from search.config.study_file import load_study_file
from search.errors import ConfigError, StorageError
from search.interrupt import Interrupted, check_interrupted, held_back, interruptible
from search.running import ray_workers
from search.running.launch import create
from search.running.observer import Observer
from search.running.ray_actor import actor_class
from search.running.ray_workers import (
    MAX_DEATHS,
    RayOptions,
    WorkerError,
    _check_nodes,
    _cores,
    _Driver,
    _Slot,
)
from search.storage.store import StudyStore
from tests.conftest import Cli
from tests.fault_table import Fault
from tests.pico_study import write_study

ROOT = Path(__file__).resolve().parents[2]
HERE = socket.gethostname()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), trials=200)


def node(name: str, cpu: int, gpu: float = 0.0) -> dict[str, Any]:
    return {"NodeManagerHostname": name, "Alive": True, "Resources": {"CPU": cpu, "GPU": gpu}}


def job(url: str, name: str = "pico", **others: Any) -> dict[str, Any]:
    command = ["resume", name, "--device", "cpu", "--as-worker", "--tether"]
    given = {"version": __version__, "url": url, "host": None, "command": command, "evidence": "/nowhere"}
    return {**given, "threads": 1, "gpus": 0, **others}


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--address", "auto"], "--address auto: is for Ray. Add --engine ray."),
        (["--gpus-per-worker", "2"], "--gpus-per-worker 2.0: is for Ray. Add --engine ray."),
        (
            ["--engine", "ray", "--address", "ray://head:10001"],
            "wanted auto, or HOST:PORT of a Ray cluster's head",
        ),
        (["--engine", "ray", "--address", "--help"], "wanted auto, or HOST:PORT"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_made(
    cli: Cli, study: Path, tmp_path: Path, options: Sequence[str], message: str
) -> None:
    code, out, err = cli("launch", study, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "runs").exists()
    assert cli("resume", "pico", *options)[0] == 2


def test_without_ray_the_extra_is_named(cli: Cli, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    code, out, err = cli("launch", study, "--engine", "ray")
    assert (code, out) == (2, "")
    assert err.endswith("error: --engine ray: pip install 'mergefront[ray]'.\n")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_head_that_is_not_there_is_named_within_seconds(cli: Cli, study: Path) -> None:
    pytest.importorskip("ray")
    began = time.monotonic()
    code, _, err = cli("launch", study, "--engine", "ray", "--address", "127.0.0.1:1")
    assert code == 2
    assert "error: --address 127.0.0.1:1: nobody answers there ([Errno 111] Connection refused)." in err
    assert time.monotonic() - began < 60, "Ray itself tries for minutes"


def test_sqlite_is_refused_on_several_machines_and_gpus_that_are_not_there(
    study: Path, tmp_path: Path
) -> None:
    store, _ = create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")
    cluster = [node(HERE, 2), node("other", 2)]
    with pytest.raises(
        ConfigError, match=r"a SQLite storage serves one machine, and this cluster has other, too"
    ):
        _check_nodes(cluster, store, RayOptions("auto", 0), 2)
    _check_nodes(cluster[:1], store, RayOptions("auto", 4), 2)  # more GPUs may join a cluster
    with pytest.raises(ConfigError, match=r"2 workers want 2 GPUs, this machine has 1"):
        _check_nodes([node(HERE, 2, 1)], store, RayOptions("local", 1), 2)
    _check_nodes([node(HERE, 2, 1)], store, RayOptions("local", 0.5), 2)
    store.url = "postgresql://user@host/study"
    _check_nodes(cluster, store, RayOptions("auto", 0), 2)


def test_cores_are_shared_so_that_every_worker_finds_room() -> None:
    assert _cores([node("a", 8)], 3, 0) == (2, 2)
    assert _cores([node("a", 16), node("b", 16)], 3, 0) == (8, 8), "two on one machine, not three tens"
    assert _cores([node("a", 2)], 5, 0) == (1, 1)
    assert _cores([node("head", 4), node("a", 64, 8)], 8, 1) == (1, 8)
    assert _cores([node("a", 64, 8), node("b", 16, 4)], 8, 0.5) == (1, 2)
    assert _cores([node("head", 4)], 8, 1) == (1, 1)


# -- the actor --------------------------------------------------------------------------------------------------


def test_an_actor_refuses_another_version_and_another_machine() -> None:
    actor = actor_class()()
    refused = actor.begin(job("sqlite:///nowhere.db", version="0.0.0"))
    assert refused["refused"] == f"found mergefront {__version__} there, wanted 0.0.0 as here."
    assert "serves one machine" in actor.begin(job("sqlite:///nowhere.db", host="elsewhere"))["refused"]
    assert actor.child is None


def test_a_machine_without_this_package_says_so() -> None:
    """The class is sent as it is: what receives it imports nothing of ours to unpack it."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    code = (
        "import sys, json; from ray import cloudpickle; "
        "print(json.dumps(cloudpickle.loads(sys.stdin.buffer.read())().begin({})))"
    )
    sent = cloudpickle.dumps(actor_class())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.modules['search'] = None; {code}"],
        input=sent,
        capture_output=True,
        env=environment,
        check=True,
    )
    assert "mergefront is not installed there" in json.loads(found.stdout)["refused"]


def test_a_workers_error_comes_back_in_one_line_without_the_password(tmp_path: Path) -> None:
    actor = actor_class()()
    began = actor.begin(job("postgresql+psycopg://user:tOpSeCrEt@127.0.0.1:1/study"))
    assert began["refused"] is None
    assert b"tOpSeCrEt" not in Path(f"/proc/{actor.child.pid}/cmdline").read_bytes()
    code, line = actor.wait()
    assert code == 4
    assert line.startswith("postgresql+psycopg://user:***@127.0.0.1:1/study: ")
    assert "tOpSeCrEt" not in line


@pytest.mark.fault(1)
def test_a_worker_ends_with_its_actor_and_gives_its_trial_back(
    study: Path, tmp_path: Path, fault: Fault
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    store, _ = create(load_study_file(study), url, "cpu")
    code = (
        "import sys, json; from search.running.ray_actor import actor_class; actor = actor_class()(); "
        "print(json.dumps(actor.begin(json.loads(sys.argv[1]))), flush=True); actor.wait()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(job(url))], env=environment, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        worker = json.loads(holder.stdout.readline())["worker"]
        wait_for(lambda: any(t.state == "running" for t in store.trials()))
        before = finished(store)
        holder.kill()
    wait_for(lambda: not alive(worker["pid"]))
    trials = store.trials()
    assert {t.attributes["worker"]["pid"] for t in trials} == {worker["pid"]}
    assert "running" not in {t.state for t in trials}, "given back, not left behind"
    fault.kept(before, finished(store))


# -- the driver -------------------------------------------------------------------------------------------------


class StandIn:
    """What the driver uses of Ray, in this process; an actor's life is the next of `lives`: exit code and line."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause: BaseException | None = None

    def __init__(self, lives: Sequence[tuple[int, str] | BaseException]) -> None:
        self.lives = list(lives)
        self.killed = self.started = 0
        self.stopped: list[float] = []

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        when = FIRST_COMPLETED if num_returns == 1 else ALL_COMPLETED
        done, open_ = wait(refs, timeout=min(timeout, 0.01), return_when=when)
        return list(done)[:num_returns], list(open_)

    def get(self, ref: Any) -> Any:
        return [one.result(0) for one in ref] if isinstance(ref, list) else ref.result(0)

    def kill(self, actor: Any) -> None:
        self.killed += 1

    def remote(self) -> Any:
        self.started += 1
        stand_in, number = self, self.started

        class Actor:
            class begin:
                remote = staticmethod(
                    lambda job: now({"refused": job["refused"], "host": "h", "worker": {"pid": number}})
                )

            class wait:
                remote = staticmethod(lambda: now(stand_in.lives.pop(0)) if stand_in.lives else Future())

            class stop:
                remote = staticmethod(lambda seconds: (stand_in.stopped.append(seconds), now(True))[1])

        return Actor()


def now(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def drive(
    store: StudyStore,
    lives: Sequence[Any],
    slots: int = 1,
    refused: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[StandIn, list[_Slot]]:
    ray, made = StandIn(lives), [_Slot(number) for number in range(slots)]
    try:
        _Driver(ray, ray, {"refused": refused}, store, Observer(), 3, made, check=check).run()
    finally:
        drive.last = ray  # type: ignore[attr-defined]
    return ray, made


@pytest.fixture
def store(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyStore:
    monkeypatch.setattr(ray_workers, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(ray_workers, "LOOK_SECONDS", 0.01)
    return create(load_study_file(study), f"sqlite:///{tmp_path / 'study.db'}", "cpu")[0]


def test_dead_workers_are_replaced_up_to_a_limit(store: StudyStore) -> None:
    ray, _ = drive(
        store, [(-9, ""), StandIn.exceptions.RayError("the node died"), (4, "no connection"), (0, "")]
    )
    assert (ray.started, ray.killed) == (4, 4)
    with pytest.raises(WorkerError, match=r"ended by SIGKILL\. Every worker died 5 times in a row") as error:
        drive(store, [(-9, "")] * MAX_DEATHS * 2, slots=2)
    assert error.value.exit_code == 1
    with pytest.raises(WorkerError, match=r"disk full Every worker died 5 times") as error:
        drive(store, [(4, "disk full")] * MAX_DEATHS)
    assert error.value.exit_code == 4
    # One that always dies is given up; the other one completes the study.
    ray, slots = drive(store, [(-9, "")] * MAX_DEATHS + [(0, "")], slots=1 + 1)
    assert ray.started <= MAX_DEATHS + 2
    assert all(slot.actor is None for slot in slots)


@pytest.mark.fault(13)
def test_a_storage_that_is_away_does_not_end_the_driver(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers say so when it stays away; until then the driver knows what it read last."""
    trials, there = store.trials, [True]

    def away() -> Any:
        if not there:
            raise StorageError("no connection")
        there.clear()  # the first read is the driver's start
        return trials()

    monkeypatch.setattr(store, "trials", away)
    ray, _ = drive(store, [(4, "no connection"), (-9, ""), (0, "")])
    assert ray.started == 3
    there.append(True)
    with pytest.raises(WorkerError, match="no connection Every worker died 5 times"):
        drive(store, [(4, "no connection")] * MAX_DEATHS)


def test_a_worker_that_finished_a_trial_starts_counting_anew(store: StudyStore) -> None:
    """It needs real trials: they are claimed and completed under the names of the stand-in's workers."""

    class Diligent(StandIn):
        def remote(self) -> Any:
            actor = super().remote()
            trial = store.claim("search", {}, {}, {"method": "linear", "recipe": str(self.started)}, {})
            store.complete(trial.number, [0.5, 0.1])
            actor.begin.remote = staticmethod(
                lambda job: now({"refused": None, "host": "h", "worker": trial.attributes["worker"]})
            )
            return actor

    told: list[int] = []
    observer = Observer()
    observer.finished = lambda trial, values: told.append(trial.number)  # type: ignore[method-assign]
    ray = Diligent([(-9, "")] * 3 * MAX_DEATHS + [(0, "")])
    _Driver(ray, ray, {"refused": None}, store, observer, 3, [_Slot(0)], lambda: None).run()
    assert ray.started == 3 * MAX_DEATHS + 1
    assert told == list(range(ray.started)), "every trial once"


@pytest.mark.parametrize(
    ("code", "line"), [(2, "parents changed"), (3, "no such folder"), (5, "trials 1 to 5 failed")]
)
def test_errors_of_the_set_up_end_all_workers_at_once(store: StudyStore, code: int, line: str) -> None:
    with pytest.raises(WorkerError, match=line) as error:
        drive(store, [(code, line)], slots=2)
    assert error.value.exit_code == code
    ray: StandIn = drive.last  # type: ignore[attr-defined]
    assert (ray.started, ray.killed, len(ray.stopped)) == (2, 2, 2), (
        "the other one was asked to give its trial back"
    )
    with pytest.raises(ConfigError, match=r"worker 0 on h: found mergefront 1"):
        drive(store, [], refused="found mergefront 1")


def test_other_errors_end_all_workers_only_while_the_set_up_is_unproven(store: StudyStore) -> None:
    with pytest.raises(WorkerError, match="CUDA error") as error:
        drive(store, [(1, "CUDA error")])
    assert error.value.exit_code == 1
    trial = store.claim("search", {}, {}, {"method": "linear", "recipe": "x"}, {})
    store.complete(trial.number, [0.5, 0.1])
    ray, _ = drive(store, [(1, "CUDA error"), (0, "")])
    assert ray.started == 2


def test_a_signal_is_raised_between_two_looks_and_workers_are_asked_to_end(store: StudyStore) -> None:
    looks: list[int] = []
    with interruptible(), held_back():

        def look() -> None:
            looks.append(1)
            if len(looks) == 3:
                os.kill(
                    os.getpid(), signal.SIGTERM
                )  # a handler that raises would do so in the next call of Ray
            elif len(looks) > 3:
                check_interrupted()

        with pytest.raises(Interrupted, match="SIGTERM"):
            drive(store, [], slots=2, check=look)
    ray: StandIn = drive.last  # type: ignore[attr-defined]
    assert (len(looks), ray.killed, len(ray.stopped)) == (4, 2, 2)


def finished(store: StudyStore) -> dict[int, Any]:
    return {t.number: (t.values, t.coefficients) for t in store.trials() if t.state == "complete"}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
