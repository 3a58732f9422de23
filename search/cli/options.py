"""The options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# What was given before the command: it holds for all of them.
GIVEN = {"quiet": False, "debug": False}

ADVANCED = "Advanced"


class Engine(StrEnum):
    local = "local"
    ray = "ray"


Study = Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name, or its study file.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Optuna storage: sqlite:///PATH or postgresql+psycopg://...  [default: $MERGEFRONT_STORAGE, "
        "$OPTUNA_STORAGE, or sqlite:///runs/NAME/study.db]",
    ),
]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key of the study file; repeatable."),
]
Device = Annotated[
    str, typer.Option(help="Where the model lives: auto, cpu, cuda, cuda:N, or spread over all GPUs.")
]
Workers = Annotated[
    int, typer.Option(min=1, max=256, help="Processes that share the study, on this machine or where Ray is.")
]
CLUSTER = "Cluster"
EngineName = Annotated[
    Engine,
    typer.Option("--engine", help="Who places the workers: this process, or Ray.", rich_help_panel=CLUSTER),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="A running Ray cluster, or auto for the one of this machine.  [default: one is started here]",
        rich_help_panel=CLUSTER,
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        min=0, help="GPUs of each worker under Ray; 0 for cores only.  [default: 1]", rich_help_panel=CLUSTER
    ),
]
LocalParents = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Copy the parents below this folder of the machine, once, and read them from there.",
        rich_help_panel=CLUSTER,
    ),
]
Grace = Annotated[
    float,
    typer.Option(min=1, help="Seconds of silence before a remote worker is dead.", rich_help_panel=ADVANCED),
]
Profile = Annotated[bool, typer.Option("--profile", help="Print where the trials' time went.")]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print the effective study file as JSON and stop.")
]
AsWorker = Annotated[bool, typer.Option("--as-worker", hidden=True)]
Tether = Annotated[bool, typer.Option("--tether", hidden=True)]


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SplitName(StrEnum):
    search = "search"
    report = "report"
