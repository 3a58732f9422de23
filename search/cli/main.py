"""The command line: parse, call, print, translate errors. stdout carries results only; all else goes to stderr.

The commands on studies are here, those on single models in `search.model_commands`, those on
candidates that take turns in `search.switch_commands`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from objectives.printable import printable
from search import __version__
from search.cli.console import say
from search.cli.models import models
from search.cli.naming import open_study, storage_url, study_name
from search.cli.options import (
    GIVEN,
    Address,
    AsWorker,
    Device,
    Engine,
    EngineName,
    Format,
    GpusPerWorker,
    Grace,
    LocalParents,
    Name,
    Profile,
    Set,
    ShowConfig,
    SplitName,
    Storage,
    Study,
    Tether,
    Workers,
)
from search.cli.run import ray_options, run_study
from search.cli.switch import switch
from search.errors import MergefrontError
from search.interrupt import Interrupted, interruptible, tether

app = typer.Typer(
    name="mergefront",
    help="Finds, proves and ships the best merges between a pre-trained and a post-trained checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"mergefront {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    log_file: Annotated[
        Path | None, typer.Option("--log-file", metavar="FILE", help="Also log to this file.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    from search.cli.console import start_logging

    GIVEN.update(quiet=quiet, debug=debug)
    start_logging(verbose or debug, quiet, log_file)


@app.command()
def check(
    study: Study,
    storage: Storage = None,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Validates a study, says what it would take and what its questions can show; runs nothing."""
    from search.config.study_file import load_study_file
    from search.running.check import describe
    from search.running.problem import Problem

    config = load_study_file(study, overrides)
    for line in describe(Problem.open(config, device), storage_url(storage, config.name)):
        say(line)


@app.command()
def launch(
    study: Study,
    storage: Storage = None,
    trials: Annotated[
        str | None, typer.Option(metavar="N", help="Search trials beyond the baselines.")
    ] = None,
    workers: Workers = 1,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to continue a study that exists.")] = False,
    show_config: ShowConfig = False,
    profile: Profile = False,
    grace: Grace = 150.0,
    engine: EngineName = Engine.local,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    local_parents: LocalParents = None,
) -> None:
    """Creates the study, or continues it when it exists with the same config."""
    from search.config.study_file import load_study_file
    from search.running.budget import set_budget
    from search.running.launch import create

    config = load_study_file(study, overrides)
    if show_config:
        print(json.dumps(config.to_json(), indent=2))
        return
    url = storage_url(storage, config.name)
    ray = ray_options(engine, address, gpus_per_worker)
    with interruptible():
        here = "cpu" if ray else device  # the devices are elsewhere, and this process only watches
        store, problem = create(
            config, url, here, fresh=fresh, grace=grace, local_parents=None if ray else local_parents
        )
        # A budget that was extended before is not taken back by launching the same file again.
        set_budget(store, trials, at_least=config.trials)
        run_study(
            store,
            problem,
            workers,
            device,
            ray=ray,
            local_parents=local_parents,
            profile=profile,
            quiet=GIVEN["quiet"],
        )


@app.command()
def resume(
    name: Name,
    storage: Storage = None,
    trials: Annotated[
        str | None,
        typer.Option(metavar="N", help="New number of search trials, or +N to extend a finished study."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="New number of scored tokens to spend at most.")
    ] = None,
    workers: Workers = 1,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
    profile: Profile = False,
    grace: Grace = 150.0,
    engine: EngineName = Engine.local,
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    local_parents: LocalParents = None,
    as_worker: AsWorker = False,
    tethered: Tether = False,
) -> None:
    """Continues a study from its storage alone. A finished one is left as it is."""
    from search.running.budget import set_budget, set_tokens
    from search.running.launch import reopen

    ray = ray_options(engine, address, gpus_per_worker)
    with interruptible():
        if tethered:
            tether()
        store, problem = reopen(
            storage_url(storage, study_name(name)),
            study_name(name),
            "cpu" if ray else device,
            overrides,
            grace=grace,
            local_parents=None if ray else local_parents,
        )
        set_budget(store, trials)
        set_tokens(store, tokens)
        run_study(
            store,
            problem,
            workers,
            device,
            overrides,
            ray=ray,
            local_parents=local_parents,
            as_worker=as_worker,
            profile=profile,
            quiet=GIVEN["quiet"],
        )


@app.command()
def status(
    name: Name,
    storage: Storage = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Trials by state, front size, hypervolume, rate, time left."""
    from search.results.status import read_status

    found = read_status(open_study(name, storage))
    say(json.dumps(found.to_json(), indent=2) if as_json else found.text())


@app.command()
def front(
    name: Name,
    storage: Storage = None,
    format: Annotated[Format, typer.Option("-f", "--format", help="How to print it.")] = Format.table,
    split: Annotated[
        SplitName | None, typer.Option(help="The table's split [default: report once it is scored].")
    ] = None,
) -> None:
    """The front with parents, uniform line and intervals."""
    from search.results.board import read_board
    from search.results.front_table import front_table

    board = read_board(open_study(name, storage))
    if format is Format.json:
        say(json.dumps(board.to_json(), indent=2, allow_nan=False))
    elif format is Format.csv:
        say(board.to_csv(), end="")
    else:
        say(front_table(board, None if split is None else split.value))


@app.command()
def report(
    name: Name,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder for pictures and page.")],
    storage: Storage = None,
) -> None:
    """Plots and one self-contained HTML page."""
    from search.results.page import write_report

    for path in write_report(open_study(name, storage), out):
        say(path)


@app.command()
def compare(
    study: Study,
    engines: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Such as composite,gp,pymoo:nsga2:population=10; the uniform line is always among them.",
        ),
    ] = "composite,gp,tpe,nsga2,gradient",
    budget: Annotated[
        str, typer.Option(metavar="TOKENS", help="Scored tokens for each study, or 60x for 60 evaluations.")
    ] = "60x",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Studies for each engine.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Folder for table and picture.  [default: runs/NAME/compare]"
        ),
    ] = None,
    storage: Storage = None,
    workers: Workers = 1,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
    helping: Annotated[bool, typer.Option("--helping", hidden=True)] = False,
) -> None:
    """Engines side by side at equal scored tokens, on the same splits, with intervals over questions and seeds."""
    from search.config.study_file import load_study_file
    from search.results.compare.command import compare as run_comparison

    config = load_study_file(study, overrides)
    with interruptible():
        table = run_comparison(
            config,
            storage_url(storage, config.name),
            out or Path("runs") / config.name / "compare",
            engines=engines,
            budget=budget,
            seeds=seeds,
            device=device,
            workers=workers,
            helping=helping,
            study=study,
            overrides=overrides,
        )
    if table:
        say(table)


app.add_typer(models)
app.add_typer(switch)


def main() -> None:
    """Entry point of the `mergefront` command."""
    try:
        app()
    except MergefrontError as error:
        _fail(str(error), error.exit_code)
    except Interrupted as stop:
        logging.getLogger("mergefront").warning(
            "stopped by %s; nothing is lost: resume (without --trials +N), or the same merge again, continues",
            stop,
        )
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of stdout went away
        sys.exit(1)
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}. This is a defect of mergefront; --debug shows where.", 1)


def _fail(message: str, code: int) -> None:
    if GIVEN["debug"]:
        import traceback

        traceback.print_exc()
    say(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
