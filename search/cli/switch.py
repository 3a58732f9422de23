"""The commands on candidates that take turns: train a switcher, let it write, serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from search.cli.console import say
from search.cli.options import GIVEN, Device, Set, SplitName, Storage, Study
from search.errors import ConfigError
from search.interrupt import Interrupted, interruptible

switch = typer.Typer(
    name="switch",
    help="Checkpoints that take turns at one response (Switch Generation).",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that switch train made.")]
Moved = Annotated[
    list[str],
    typer.Option("--candidate", metavar="NAME=DIR", help="A candidate that lies elsewhere now; repeatable."),
]


@switch.command()
def train(
    study: Study,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the trained switcher.")],
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Finished rollouts.  [default: runs/NAME/rollouts]"),
    ] = None,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier switcher.", rich_help_panel="Dangerous"),
    ] = False,
) -> None:
    """Learns from rollouts on the search split who should write next; goes on where it was stopped."""
    from search.config.study_file import load_study_file

    config = load_study_file(study, overrides)
    if config.switching is None:
        raise ConfigError(f"{study}: has no section switching. Add one, such as switching: {{segment: 25}}.")
    from search.cli.bars import RolloutBar
    from search.cli.console import stderr_console
    from search.merging.oneoff.make import check_target
    from search.running.problem import Problem
    from search.switching.candidates import open_settings
    from search.switching.folder import save_switcher
    from search.switching.train import summary
    from search.switching.train import train as learn

    check_target(out, overwrite=overwrite)
    with interruptible():
        problem = Problem.open(config, device)
        settings = open_settings(problem, config.switching.turns)
        with RolloutBar(stderr_console(), quiet=GIVEN["quiet"]) as bar:
            trained = learn(
                problem, settings, work or Path("runs") / config.name / "rollouts", bar.watch, bar.learn
            )
        folder = save_switcher(trained, problem, settings, out, overwrite=overwrite)
    for line in summary(trained):
        say(line)
    say(folder)


@switch.command()
def compare(
    study: Study,
    switcher: Annotated[
        Path, typer.Option("--switcher", metavar="DIR", help="A folder that switch train made of this study.")
    ],
    split: Annotated[SplitName, typer.Option(help="Which questions.")] = SplitName.report,
    arm: Annotated[
        list[str],
        typer.Option(
            help="Beside candidates and random switching: switch, untrained switcher, router, refine, logit average, "
            "contrastive, greedy soup, dare-ties; repeatable.  [default: all]"
        ),
    ] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    storage: Storage = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Finished answers.  [default: runs/NAME/arms]")
    ] = None,
    overrides: Set = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """The switcher beside single checkpoints, chance, routing, ensembles and merges, on the same questions.

    Of a launched study, they write to both splits and are put on its board, beside its merges: see front and report.
    """
    from search.cli.naming import storage_url
    from search.config.study_file import load_study_file

    config = load_study_file(study, overrides)
    from search.switching.command import compare_arms

    url = storage_url(storage, config.name)
    with interruptible():
        found = compare_arms(
            config,
            switcher,
            split.value,
            arm,
            device,
            url=url,
            work=work or Path("runs") / config.name / "arms",
        )
    say(json.dumps(found.to_json(), indent=2) if as_json else f"{found.text()}\n\n{found.caption}")


@switch.command()
def generate(
    folder: Folder,
    prompt: Annotated[
        list[str], typer.Option("--prompt", metavar="TEXT", help="What to go on from; repeatable.")
    ] = [],  # noqa: B006
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="JSON lines with prompt or question.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Prompts are a user's messages.  [default: as the study's]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines: prompt, text, and who wrote what.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer.  [default: the study's]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0.  [default: the study's]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the nucleus.  [default: the study's]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    moved: Moved = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Writes one answer to each prompt, the candidates taking turns; says on stderr who wrote how much."""
    from search.switching.command import generate_answers, read_prompts

    texts = read_prompts(prompt, prompts)
    with interruptible():
        for line in generate_answers(
            folder,
            texts,
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p},
            seed=seed,
            chat=chat,
            as_json=as_json,
            moved=moved,
            device=device,
        ):
            say(line, flush=True)


@switch.command()
def serve(
    folder: Folder,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model id.  [default: the study's name]")] = None,
    moved: Moved = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """An OpenAI-compatible API: chat and text completions, streamed or not. Needs the extra serve."""
    from search.switching.command import serve_folder

    try:
        with interruptible():  # while models are loaded
            serve_folder(folder, host, port, name, moved, device)
    except Interrupted as stop:  # how a server ends
        raise typer.Exit(stop.exit_code) from None
