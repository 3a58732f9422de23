"""Running a study from the command line: workers beside it, progress on stderr, the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from search.naming import storage_url

if TYPE_CHECKING:
    from search.materials import Materials
    from search.storage import StudyStore


def run_study(
    store: StudyStore,
    materials: Materials,
    workers: int,
    device: str,
    overrides: list[str] | None = None,
    *,
    as_worker: bool = False,
    profile: bool = False,
    quiet: bool = False,
) -> None:
    """Runs a study and prints its front to stdout.

    Args:
        as_worker: beside another process, which prints.
        profile: whether to say where the time went.
    """
    from search.board import read_board
    from search.console import stderr_console
    from search.database import shown, sqlite_path
    from search.profile import read_profile
    from search.progress import ProgressPrinter
    from search.study import run
    from search.tables import front_table
    from search.workers import helpers, use_threads

    use_threads(workers)
    printer = ProgressPrinter(store, materials, stderr_console(), quiet=quiet or as_worker)
    with helpers(workers - 1, store, device, overrides or []), _closing(printer):
        run(store, materials, printer)
    if profile and (found := read_profile(store.trials())) is not None:
        print(found.text(), file=sys.stderr)
    if not as_worker and not quiet:
        print(front_table(read_board(store)))
        local = sqlite_path(store.url) is not None
        url = store.url if local else shown(store.url)  # a password is not printed
        where = "" if store.url == storage_url(None, store.name) else f" --storage {url}"
        print(
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
