"""The commands on single models: those that write a checkpoint, prove one, or repair its confidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.cli.console import say
from search.cli.naming import open_study, storage_url, study_name
from search.cli.options import GIVEN, Device, Dtype, Name, Set, Storage
from search.errors import ConfigError
from search.interrupt import interruptible

models = typer.Typer()


@models.command()
def export(
    name: Name,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder that gets one folder a trial.")
    ],
    storage: Storage = None,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="SEL",
            help="knee, best-accuracy, best-calibration, trial:N, or prefer:accuracy=0.7,ece=0.3  [default: knee]",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every trial of the front.")] = False,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Also write checkpoints.")] = False,
    overrides: Set = [],  # noqa: B006
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace earlier exports of these trials.", rich_help_panel="Dangerous"
        ),
    ] = False,
) -> None:
    """Merge configs that mergekit rebuilds bit for bit; with --weights, checkpoints too."""
    from search.export.folder import export_rows
    from search.results.board import read_board
    from search.results.picks import pick

    if select is not None and everything:
        raise ConfigError("--select and --all: give one of them.")
    with interruptible():
        store = open_study(name, storage)
        board = read_board(store)
        rows = list(board.front) if everything else [pick(board, select or "knee")]
        for folder in export_rows(
            store, board, rows, out, weights=weights, overwrite=overwrite, overrides=overrides
        ):
            say(folder)


@models.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="An export of one trial or of several, or a merge.")
    ],
    storage: Storage = None,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Re-reads an export or a merge, checks its manifest, and re-scores an export against the stored numbers."""
    from search.export.verify import verify_folder

    with interruptible():
        for line in verify_folder(folder, storage, overrides, device):
            say(line)


@models.command()
def calibrate(
    target: Annotated[
        str, typer.Argument(metavar="NAME|DIR", help="A study, an export with a checkpoint, or a checkpoint.")
    ],
    method: Annotated[
        list[str],
        typer.Option(help="temperature, naive, daca, dual-align, cape (studies only), or all; repeatable."),
    ] = ["daca"],  # noqa: B006
    select: Annotated[
        list[str],
        typer.Option(
            metavar="SEL", help="Of a study: pre, post, or as for export; repeatable.  [default: post, knee]"
        ),
    ] = [],  # noqa: B006
    reference: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The pre-trained model, for a checkpoint of no study.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(metavar="STUDY.yaml", help="Whose questions to fit on, for a checkpoint of no study."),
    ] = None,
    storage: Storage = None,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of a study in Markdown.")
    ] = False,
) -> None:
    """Fits confidence temperatures: on a study's board as alternatives, or into a model's generation_config.json."""
    from search.export.calibrate import calibrate_board, calibrate_model

    folder = Path(target)
    with interruptible():
        if (folder / "config.json").is_file() or (folder / "manifest.json").is_file():
            fitted = calibrate_model(folder, method, reference, study, storage, overrides, device)
            say(
                f"{folder}  temperature {fitted.temperature:.4g}  ({fitted.method}, {fitted.questions} questions)"
            )
            return
        name = study_name(target)
        table = calibrate_board(storage_url(storage, name), name, method, select, overrides, device)
    say(table.markdown() if markdown else table.text())
    say(f"\n{table.caption}")


@models.command()
def merge(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="Any method of a study file, such as ties, or tsv, wudi, fda, lora_separate (see README.md).",
        ),
    ],
    pre: Annotated[str, typer.Option("--pre", metavar="DIR", help="The pre-trained model, or a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The merged checkpoint's folder.")],
    experts: Annotated[
        list[str], typer.Option("--expert", metavar="NAME=DIR", help="What was made from it; repeatable.")
    ] = [],  # noqa: B006
    weights: Annotated[
        list[str],
        typer.Option(
            "--weight",
            metavar="NAME=0.3",
            help="Of an expert; repeatable.  [default: 1 for tsv and wudi, start for fda, else 1 / experts]",
        ),
    ] = [],  # noqa: B006
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="density, scaling, ...; of fda anchors.n, adapt.epochs, ... and start: pre, a number for task "
            "arithmetic, or the folder of another merge; repeatable.",
        ),
    ] = [],  # noqa: B006
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the stored tensors.  [default: the parents']")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Finished pieces of fda.  [default: a folder below runs/anchors]"),
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier merge.", rich_help_panel="Dangerous"),
    ] = False,
) -> None:
    """One merge without a study: a checkpoint with a manifest; fda goes on where it was stopped."""
    from search.merging.oneoff.request import read_request

    # Words first: the rest takes seconds to import.
    request = read_request(method, pre, experts, weights, settings)
    from search.cli.bars import MergeBar
    from search.cli.console import stderr_console
    from search.merging.oneoff.make import Place, make

    place = Place(out, work, None if dtype is None else dtype.value, device, overwrite)
    with interruptible(), MergeBar(stderr_console(), quiet=GIVEN["quiet"]) as bar:
        say(make(request, place, bar))
