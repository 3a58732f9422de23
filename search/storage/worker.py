"""Who runs a trial, and whether that process is still there."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Worker:
    """One process, so named that no other process on any machine at any time has the same name."""

    host: str
    boot: str  # changes with every boot of the kernel
    namespace: str  # process ids mean nothing across containers
    pid: int
    started: str  # clock ticks after boot: tells a reused pid apart

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Worker:
        host, boot, namespace = (str(value[key]) for key in ("host", "boot", "namespace"))
        return cls(host, boot, namespace, int(value["pid"]), str(value["started"]))

    def is_known_dead(self, *, one_machine: bool) -> bool:
        """True if this process surely ended; False if it lives, or lives where nobody here can tell.

        Args:
            one_machine: the storage is a local file, so an equal host name means this very machine. Over a network,
                many machines may call themselves `localhost`.
        """
        here = this_worker()
        if self.host != here.host:
            return False
        if self.boot != here.boot:
            return one_machine
        return self.namespace == here.namespace and _start_time(self.pid) != self.started


@cache
def worker_of(pid: int) -> Worker:
    """A process of this machine, by its id."""
    return Worker(socket.gethostname(), _boot_id(), _pid_namespace(), pid, _start_time(pid))


def this_worker() -> Worker:
    """The calling process (correct after a fork, too)."""
    return worker_of(os.getpid())


def _start_time(pid: int) -> str:
    """The process's start in clock ticks after boot; '' if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        pass
    else:
        fields = stat.rsplit(")", 1)[1].split()  # the name in parentheses may hold spaces
        return "" if fields[0] in ("Z", "X") else fields[19]
    if Path("/proc/self/stat").exists():
        return ""
    try:  # no /proc (macOS): existence is all that can be told
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "alive"
    return "alive"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
