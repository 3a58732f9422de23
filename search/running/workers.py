"""Several processes of one machine at one study."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from search.interrupt import let_through
from search.storage.store import StudyStore

logger = logging.getLogger("mergefront")

END_SECONDS = 20


def use_threads(workers: int) -> None:
    """Shares this machine's cores among the workers, unless OMP_NUM_THREADS says otherwise."""
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(_threads(workers))


def resume_command(
    store: StudyStore, device: str, overrides: Sequence[str], local_parents: Path | None = None
) -> list[str]:
    """The arguments with which a process works on the study beside others; the storage is named in its environment."""
    command = ["resume", store.name, "--device", device, "--grace", str(store.grace), "--as-worker"]
    if local_parents is not None:
        command += ["--local-parents", str(local_parents.expanduser().absolute())]
    for override in overrides:
        command += ["--set", override]
    return command


@contextmanager
def helpers(count: int, store: StudyStore, command: Sequence[str]) -> Iterator[None]:
    """Runs `count` further workers of the study beside the block, which stop when there is nothing left to do."""
    with beside([command] * count, store.url):
        yield


@contextmanager
def beside(commands: Sequence[Sequence[str]], url: str) -> Iterator[None]:
    """Runs commands of the product on one storage beside the block, and ends those that are left when it ends.

    To be entered where signals are held back, else one that comes while it starts or ends a process leaves it running.

    On an error or a signal they get SIGTERM, upon which each gives its trial back; one that does not end in time is
    killed, and its trial is adopted later like any dead worker's.
    """
    # The URL may hold a password, and arguments are seen by everybody on the machine.
    environment = {
        "OMP_NUM_THREADS": str(_threads(len(commands) + 1)),
        **os.environ,
        "MERGEFRONT_STORAGE": url,
    }
    # A session of their own: Ctrl-C reaches this process alone, which then ends them once.
    start = [sys.executable, "-m", "search.cli.main", "-q"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            running.append(subprocess.Popen([*start, *command], env=environment, start_new_session=True))
        yield
        with let_through():
            for process in running:
                process.wait()
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode not in (0, -15, 143, 130):
                logger.warning("worker %d ended with exit code %d", process.pid, process.returncode)


def _threads(workers: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // workers)
