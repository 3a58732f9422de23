"""The files in studies/cluster are sound, name options that exist, and slurm.sh does what it says, without SLURM."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from search.cli.main import app
from search.errors import StorageError
from search.merging.baselines import BASELINES
from search.storage.store import StudyStore
from tests.fault_table import Fault
from tests.pico_study import write_study

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "studies" / "cluster"
SLURM = CLUSTER / "slurm.sh"
JOB = CLUSTER / "kubernetes-job.yaml"
TRIALS = 12


def job() -> dict[str, Any]:
    """The manifest as a YAML 1.1 reader sees it, which is what Kubernetes' is."""
    (document,) = yaml.safe_load_all(JOB.read_text())
    assert isinstance(document, dict)
    return document


def commands() -> list[list[str]]:
    """Every call of mergefront in the files, as arguments."""
    lines = re.findall(r"^mergefront .*$", SLURM.read_text(), re.MULTILINE)
    (container,) = job()["spec"]["template"]["spec"]["containers"]
    return [shlex.split(line.rstrip("& ")) for line in lines] + [container["command"]]


def test_every_option_in_them_exists() -> None:
    """The command line's own parser reads them; nothing is run."""
    group: Any = typer.main.get_command(app)
    found = commands()
    assert len(found) == 2
    for program, name, *arguments in found:
        assert program == "mergefront"
        command = group.commands[name]
        given = command.make_context(name, list(arguments), resilient_parsing=False).params
        assert given["local_parents"] is not None
        assert given["storage"] is None, "it is in the environment, not on the command line"


@pytest.mark.parametrize("minor", range(31, 38))
def test_the_job_is_valid_in_every_kubernetes_that_has_its_fields(minor: int) -> None:
    """The schemas of Kubernetes' own sources; strictly: an unknown field is an error."""
    kubernetes_validate.validate(job(), f"1.{minor}", strict=True)


def test_the_job_runs_without_rights_and_keeps_the_password_in_a_secret() -> None:
    pod = job()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    environment = {one["name"]: one for one in container["env"]}
    assert "value" not in environment["MERGEFRONT_STORAGE"]
    assert "secretKeyRef" in environment["MERGEFRONT_STORAGE"]["valueFrom"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    written = [environment[key]["value"] for key in ("MERGEFRONT_EVIDENCE", "MERGEFRONT_CACHE", "HOME")]
    assert all(any(path.startswith(mount) for mount in mounted) for path in written), "the rest is read-only"
    assert {volume["name"] for volume in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert pod["terminationGracePeriodSeconds"] >= 60
    codes = [rule["onExitCodes"]["values"] for rule in job()["spec"]["podFailurePolicy"]["rules"][1:]]
    assert codes == [[2, 3, 5]], "storage and disk (4) may pass; these do not"


def test_the_script_is_sound_shell() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, SLURM], check=True)
    subprocess.run(["bash", "-n", SLURM], check=True)
    assert os.access(SLURM, os.X_OK)
    head = SLURM.read_text().split("set -euo")[0]
    for option in ("--array=", "--requeue", "--signal=B:TERM@120", "--gres=gpu:1"):
        assert f"\n#SBATCH {option}" in head


class Site:
    """What slurm.sh finds on a node: a study, a URL in a file, this checkout's mergefront, and a stub of scontrol."""

    def __init__(self, folder: Path, trials: int) -> None:
        self.folder = folder
        self.study = write_study(folder / "study", trials=trials)
        self.url = f"sqlite:///{folder / 'study.db'}"  # one machine: the honest stand-in for a server
        self.secret = folder / "storage"
        self.secret.write_text(self.url + "\n")
        self.secret.chmod(0o600)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (
            ("mergefront", f'echo $$ >> "{folder}/workers"; exec {sys.executable} -m search.cli.main "$@"'),
            ("scontrol", f'echo "$@" >> "{folder}/scontrol"'),
        ):
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        self.path = f"{programs}:{os.environ['PATH']}"

    def task(self, index: int, ends_in: float = 7200) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": self.path,
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "MERGEFRONT_STORAGE_FILE": str(self.secret),
            "SLURM_ARRAY_JOB_ID": "71",
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_END_TIME": str(int(time.time() + ends_in)),
        }
        with (self.folder / f"log-{index}").open("wb") as log:
            return subprocess.Popen(
                ["bash", SLURM, self.study], cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def requeued(self) -> str:
        return (self.folder / "scontrol").read_text() if (self.folder / "scontrol").exists() else ""

    @property
    def store(self) -> StudyStore | None:
        """None until a task has made it."""
        with suppress(StorageError):
            return StudyStore.find(self.url, "pico")
        return None


@pytest.mark.slow
@pytest.mark.fault(2)
def test_tasks_of_an_array_share_one_study_and_one_out_of_time_queues_itself_again(
    tmp_path: Path, fault: Fault
) -> None:
    site = Site(tmp_path, TRIALS)
    tasks = [site.task(0), site.task(1, ends_in=100)]
    until = time.monotonic() + 120
    while not ((store := site.store) and any(t.state == "complete" for t in store.trials())):
        assert time.monotonic() < until
        time.sleep(0.05)
    tasks[1].send_signal(signal.SIGTERM)
    assert tasks[1].wait(60) == 143, (tmp_path / "log-1").read_text()
    before = {t.number: t.values for t in store.trials() if t.state == "complete"}
    assert site.requeued() == "requeue 71_1\n"
    assert tasks[0].wait(120) == 0, (tmp_path / "log-0").read_text()
    trials = store.trials()
    assert [t.number for t in trials if t.state == "complete"] == list(range(len(BASELINES) + TRIALS))
    fault.kept(before, {t.number: t.values for t in trials})
    copies = list((tmp_path / f"mergefront-{getpass.getuser()}").iterdir())
    assert len(copies) == 2, "pre and post, once for both tasks"
    again = site.task(1)
    assert again.wait(120) == 0, "a complete study is left as it is"
    assert len(store.trials()) == len(trials)


def test_a_task_refuses_a_password_that_others_may_read(tmp_path: Path) -> None:
    site = Site(tmp_path, 1)
    site.secret.chmod(0o640)
    assert site.task(0).wait(30) == 2
    assert (tmp_path / "log-0").read_text() == f"error: {site.secret}: holds a password. chmod 600 it.\n"
    assert not (tmp_path / "workers").exists()
