"""Running a study from the command line: workers beside it, progress on stderr, the table at the end."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.cli.naming import storage_url

if TYPE_CHECKING:
    from search.running.problem import Problem
    from search.running.ray_workers import RayOptions
    from search.storage.store import StudyStore


def ray_options(engine: str, address: str | None, gpus_per_worker: float | None) -> RayOptions | None:
    """What the options of a command say about Ray; None if it is not asked for.

    Raises:
        ConfigError: one of them is given without `--engine ray`, or the address is none.
    """
    from search.errors import ConfigError

    if engine != "ray":
        for option, value in (("--address", address), ("--gpus-per-worker", gpus_per_worker)):
            if value is not None:
                raise ConfigError(f"{option} {value}: is for Ray. Add --engine ray.")
        return None
    from search.running.ray_workers import LOCAL, RayOptions

    if address not in (None, LOCAL, "auto") and not re.fullmatch(
        r"[\w.-]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", address
    ):
        raise ConfigError(f"--address {address}: wanted auto, or HOST:PORT of a Ray cluster's head.")
    return RayOptions(address or LOCAL, 1.0 if gpus_per_worker is None else gpus_per_worker)


def run_study(
    store: StudyStore,
    problem: Problem,
    workers: int,
    device: str,
    overrides: list[str] | None = None,
    *,
    ray: RayOptions | None = None,
    local_parents: Path | None = None,
    as_worker: bool = False,
    profile: bool = False,
    quiet: bool = False,
) -> None:
    """Runs a study and prints its front to stdout.

    Args:
        ray: places all workers through Ray; this process then only watches them. None: they run on this machine.
        local_parents: where workers keep copies of the parents.
        as_worker: beside another process, which prints.
        profile: whether to say where the time went.
    """
    from search.cli.console import say, stderr_console
    from search.interrupt import held_back, let_through
    from search.results.board import read_board
    from search.results.front_table import front_table
    from search.running.profile import read_profile
    from search.running.progress import ProgressPrinter
    from search.running.workers import helpers, resume_command, use_threads
    from search.storage.database import shown, sqlite_path
    from search.study import run

    printer = ProgressPrinter(store, problem, stderr_console(), quiet=quiet or as_worker)
    if ray is not None:
        from search.running.ray_workers import run_on_ray

        total = len(problem.baselines) + int(store.attribute("trials"))
        with _closing(printer):
            run_on_ray(store, total, workers, ray, device, overrides or [], printer, local_parents)
    else:
        use_threads(workers)
        command = resume_command(store, device, overrides or [], local_parents)
        with held_back(), helpers(workers - 1, store, command), _closing(printer), let_through():
            run(store, problem, printer)
    if profile and (found := read_profile(store.trials())) is not None:
        say(found.text(), file=sys.stderr)
    if not as_worker and not quiet:
        say(front_table(read_board(store)))
        local = sqlite_path(store.url) is not None
        url = store.url if local else shown(store.url)  # a password is not printed
        where = "" if store.url == storage_url(None, store.name) else f" --storage {url}"
        say(
            f"next: mergefront report {store.name}{where} --out runs/{store.name}/report\n"
            f"      mergefront export {store.name}{where} --select knee --weights --out runs/{store.name}/export",
            file=sys.stderr,
        )


@contextmanager
def _closing(printer: Any) -> Iterator[None]:
    try:
        yield
    finally:
        printer.close()
