"""A real Ray: workers placed, killed, replaced and ended; and what it may not see, say or leave behind.

Two are started in all: one by the product itself, one as a cluster that several drivers join one after another.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from search.config.study_file import load_study_file
from search.merging.baselines import BASELINES
from search.running.budget import set_budget
from search.running.launch import create
from search.storage.store import StudyStore
from tests.fault_table import Fault
from tests.pico_study import write_study
from tests.running.test_ray_driver import alive, finished, wait_for

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TRIALS = 30
TOTAL = len(BASELINES) + TRIALS
ON_RAY = ("--engine", "ray", "--workers", "2", "--gpus-per-worker", "0")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), trials=TRIALS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of logs of a Ray of two cores that is not ours, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(f"/tmp/mergefront-ray-{os.getpid()}")  # a socket's path has room for few characters
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [
        "--num-cpus=2",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
        "--object-store-memory=100000000",
    ]
    # Beside other tests, a worker has 20 s to give its trial back.
    environment = _environment(RAY_worker_niceness="0")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as ray:
        assert ray.stdout is not None
        for line in ray.stdout:
            if "Ray runtime started" in line:
                break
        yield f"127.0.0.1:{port}", folder
        ray.terminate()
        ray.stdout.read()
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _environment(**others: str) -> dict[str, str]:
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
    return {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **token, **given, **others}


def start(folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process of its own; what it prints goes to files."""
    command = [sys.executable, "-m", "search.cli.main", *map(str, arguments)]
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        return subprocess.Popen(
            command, cwd=folder, env=_environment(**environment), stdout=out, stderr=err, text=True
        )


def running(store: StudyStore) -> dict[int, int]:
    """Process ids of the workers that have a trial, and its number."""
    return {int(t.attributes["worker"]["pid"]): t.number for t in store.trials() if t.state == "running"}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def caught_in_a_trial(store: StudyStore) -> int:
    """A worker that is stopped within a trial."""
    while True:
        wait_for(lambda: len(running(store)) > 0)
        for pid in running(store):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            if pid in running(store):
                return pid
            os.kill(pid, signal.SIGCONT)


def opened(study: Path, folder: Path) -> StudyStore:
    """The study in its storage, before any worker came."""
    return create(load_study_file(study), f"sqlite:///{folder / 'runs' / 'pico' / 'study.db'}", "cpu")[0]


def whole(store: StudyStore, total: int = TOTAL) -> None:
    trials = store.trials()
    assert [(t.number, t.state) for t in trials] == [(number, "complete") for number in range(total)]
    known = store.attributes()
    assert all(f"report:{number}" in known for number in range(len(BASELINES))), "the report split is scored"


@pytest.mark.fault(7)
def test_workers_on_a_ray_of_our_own_are_replaced_and_the_budget_is_exact(
    study: Path, tmp_path: Path, fault: Fault
) -> None:
    store = opened(study, tmp_path)
    driver = start(tmp_path, "launch", study, *ON_RAY)
    # One worker is killed in a trial, then an actor.
    wait_for(lambda: len(running(store)) == 2 and len(finished(store)) >= 2, 180)
    listening = _listening(driver.pid)
    victim = caught_in_a_trial(store)
    before = finished(store)
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, victim) == here, "Ray's workers are nice by default"
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: any(pid != victim for pid in running(store)))
    orphan = next(pid for pid in running(store) if pid != victim)
    assert "ray::" in Path(f"/proc/{parent(orphan)}/cmdline").read_text()
    os.kill(parent(orphan), signal.SIGKILL)
    assert driver.wait(300) == 0, (tmp_path / "err").read_text()
    wait_for(lambda: not alive(orphan), 30)
    whole(store)
    fault.struck(2)
    fault.kept(before, finished(store))
    err = (tmp_path / "err").read_text()
    assert len(re.findall(r"worker [01] died and is replaced", err)) == 2, err
    assert "ended by SIGKILL" in err
    assert [len(re.findall(rf"trial {n} ", err)) for n in range(TOTAL)] == [1] * TOTAL, "each is told once"
    assert "next: mergefront report pico" in err
    assert "pre" in (tmp_path / "out").read_text()
    assert "Traceback" not in err
    assert not [pid for pid in listening if alive(pid)], "nothing of Ray is left"
    assert listening
    assert {address for addresses in listening.values() for address in addresses} == {"127.0.0.1"}


def _listening(root: int) -> dict[int, set[str]]:
    """Addresses that a process and its descendants listen on, by process id; from /proc, since `ss` may be missing."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(parent(int(stat.parent.name)), []).append(int(stat.parent.name))
        except OSError:
            continue
    family, new = [], [root]
    while new:
        family += new
        new = [child for one in new for child in children.get(one, [])]
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                sockets[fields[9]] = _address(fields[1].split(":")[0])
    found: dict[int, set[str]] = {}
    for pid in family:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            name = os.readlink(link) if link.is_symlink() else ""
            if name.startswith("socket:[") and name[8:-1] in sockets:
                found.setdefault(pid, set()).add(sockets[name[8:-1]])
    return found


def _address(packed: str) -> str:
    """An IPv4 address, or one in IPv6's clothes, as the kernel prints it: words in the machine's byte order."""
    words = [bytes.fromhex(packed[i : i + 8])[::-1] for i in range(0, len(packed), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")


@pytest.mark.fault(2)
def test_an_ended_driver_leaves_nothing_running_and_the_study_goes_on(
    study: Path, tmp_path: Path, cluster: tuple[str, Path], fault: Fault
) -> None:
    """Signals strike a study that is far from its end; its budget is then cut to what was begun and four more."""
    address, _ = cluster
    store = opened(study, tmp_path)
    set_budget(store, 10_000)
    before: dict[int, Any] = {}
    for strike, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        driver = start(tmp_path, "launch", study, *ON_RAY, "--address", address)
        wait_for(lambda driver=driver: len(running(store)) == 2 or driver.poll() is not None, 180)
        assert driver.poll() is None, (tmp_path / "err").read_text()
        workers = list(running(store))
        os.kill(driver.pid, strike)
        assert driver.wait(60) == code, (tmp_path / "err").read_text()
        if strike != signal.SIGKILL:
            err = (tmp_path / "err").read_text()
            assert not running(store), f"their trials were given back before the driver ended: {err}"
            assert "nothing is lost: resume" in err
        wait_for(lambda workers=workers: not any(alive(pid) for pid in workers), 30)
        fault.kept(before, finished(store))
        before = finished(store)
    fault.struck(3)
    total = len(store.trials()) + 4
    assert set_budget(store, total - len(BASELINES)) == total - len(BASELINES)
    driver = start(tmp_path, "resume", "pico", *ON_RAY, "--address", address)
    assert driver.wait(300) == 0, (tmp_path / "err").read_text()
    whole(store, total)
    fault.kept(before, finished(store))


def test_a_password_is_nowhere_and_errors_are_one_line(
    study: Path, tmp_path: Path, cluster: tuple[str, Path]
) -> None:
    """Neither the files that Ray writes nor any worker's arguments hold the storage's URL."""
    address, folder = cluster
    secret = "tOpSeCrEt-4711"
    code = f"""
import ray, json, sys
from search.running.ray_actor import actor_class
from tests.running.test_ray_driver import job
ray.init(address="{address}", log_to_driver=False, configure_logging=False)
actor = ray.remote(max_concurrency=4)(actor_class()).remote()
began = ray.get(actor.begin.remote(job("postgresql+psycopg://user:" + sys.stdin.read() + "@127.0.0.1:1/study")))
cmdline = open(f"/proc/{{began['worker']['pid']}}/cmdline").read()
print(json.dumps([cmdline, *ray.get(actor.wait.remote())]))
"""
    environment = _environment(RAY_BACKEND_LOG_LEVEL="debug")
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=secret,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "search.cli.main" in found.stdout
    assert "postgresql+psycopg://user:***@127.0.0.1:1/study: " in found.stdout
    assert secret not in found.stdout + found.stderr
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any("worker" in path.name for path in logs)
    assert not [path for path in logs if secret.encode() in path.read_bytes()]
    # A mistake that only the workers can make: this process copies no parents.
    driver = start(tmp_path, "launch", study, *ON_RAY, "--address", address, "--local-parents", "/dev/null/x")
    assert driver.wait(120) == 2
    *_, last = (tmp_path / "err").read_text().splitlines()
    assert last.startswith("error: ")
    assert "--local-parents /dev/null" in last
