"""What `mergefront switch compare`, `generate` and `serve` do."""

from __future__ import annotations

import difflib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from objectives.questions.prompts import read_prompt_file
from search.errors import ConfigError
from search.results.alternatives import SPLITS
from search.results.arms import SWITCH
from search.storage.files import file_sha256
from search.storage.manifest import MANIFEST
from search.switching.folder import (
    SWITCHER,
    check_same,
    check_taught,
    open_switcher,
    read_brain,
    read_switcher,
)
from search.switching.writer import SwitchWriter

if TYPE_CHECKING:
    from objectives.questions.questions import Split
    from search.config.study_file import StudyConfig
    from search.switching.arms_table import Standing


logger = logging.getLogger("mergefront")


def compare_arms(
    config: StudyConfig,
    folder: Path,
    split: Split,
    labels: Sequence[str],
    device: str,
    *,
    url: str | None = None,
    work: Path | None = None,
) -> Standing:
    """The table of all arms, or of some, beside a trained switcher.

    Args:
        url: storage of the study, on whose board the arms are put if it was launched; None puts them nowhere.
        work: folder of finished answers, which are not drawn again; None keeps none.

    Raises:
        ConfigError: no such arm, or a study with options. IncompatibleModelsError: the switcher was trained with other
            candidates. Others as `read_switcher`, `Problem.open`, `Boarding`.
    """
    from search.running.problem import Problem
    from search.switching.arms import Arms, check_arms
    from search.switching.arms_cache import Kept
    from search.switching.arms_on_board import Boarding
    from search.switching.arms_table import feasible, stand
    from search.switching.candidates import open_settings
    from search.switching.train import switching_of

    check_arms(config)
    about = read_switcher(folder)
    problem = Problem.open(config, device)
    check_same(about, {name: facts["sha256"] for name, facts in problem.provenance().items()}, folder)
    switching = switching_of(problem)
    board = None if url is None else Boarding.open(url, problem)
    check_taught(about, problem, folder)
    brain = read_brain(folder, about, problem.parents, problem.device)
    settings = open_settings(problem, switching.turns)
    kept = None if work is None else Kept(work, problem, settings, file_sha256(folder / MANIFEST), SWITCH)
    arms = Arms(problem, settings, {SWITCH: lambda one: brain.policy(one.relay, about.switching)}, kept)
    for label in labels:
        if label not in arms.labels:
            near = difflib.get_close_matches(label, arms.labels, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise ConfigError(f"--arm {label}: found no such arm. {hint}They are: {', '.join(arms.labels)}.")
    if board is not None:
        for label in feasible(arms, SPLITS, labels or None)[len(arms.names) :]:
            own = file_sha256(folder / SWITCHER) if label == SWITCH else None
            board.put(label, {one: arms.written(label, one) for one in SPLITS}, own)
        board.finish()
    return stand(arms, split, labels or None)


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of the command line, then those of a file of JSON lines.

    Raises:
        ConfigError: there are none, or the file cannot be read.
    """
    found = [*given, *(read_prompt_file(file, f"--prompts {file}") if file is not None else ())]
    if not found:
        raise ConfigError("--prompt: there is none. Give --prompt TEXT, or --prompts FILE with JSON lines.")
    return found


def generate_answers(
    folder: Path,
    prompts: Sequence[str],
    given: Mapping[str, Any],
    *,
    seed: int,
    chat: bool | None,
    as_json: bool,
    moved: Sequence[str],
    device: str,
) -> Iterator[str]:
    """A line for each prompt: the answer, or JSON with prompt, text and segments.

    Args:
        given: `max_new_tokens`, `temperature` and `top_p`; None takes the study's.
        chat: whether prompts are a user's messages; None if those of the study's task were.

    Raises:
        ConfigError: a number out of its range, or a prompt that does not fit. Others as `open_switcher`.
    """
    about = read_switcher(folder)
    default = about.generate
    drawn = {name: getattr(default, name) if value is None else value for name, value in given.items()}
    chat = about.chat_template if chat is None else chat
    writer = SwitchWriter(open_switcher(folder, places(moved), device), about.study)
    shares: Counter[str] = Counter()
    for prompt in prompts:
        asked = writer.encode([{"role": "user", "content": prompt}] if chat else prompt)
        pieces = list(writer.write(asked, **drawn, seed=seed, chat=chat))
        for piece in pieces:
            shares[piece.author] += piece.tokens
        text = "".join(piece.text for piece in pieces)
        if as_json:
            segments = [{"author": piece.author, "text": piece.text} for piece in pieces]
            finish = pieces[-1].finish if pieces else "length"
            yield json.dumps({"prompt": prompt, "text": text, "finish": finish, "segments": segments})
        else:
            yield text
    total = max(1, sum(shares.values()))
    said = ", ".join(f"{name} {count / total:.0%}" for name, count in shares.most_common())
    logger.info("%d tokens: %s", sum(shares.values()), said)


def serve_folder(
    folder: Path, host: str, port: int, name: str | None, moved: Sequence[str], device: str
) -> None:
    """Serves a switcher until a signal ends it.

    Raises:
        ConfigError: the extra is not installed, or no such address. Others as `open_switcher`.
    """
    for module in ("fastapi", "uvicorn", "h11"):
        if find_spec(module) is None:
            raise ConfigError(
                f"switch serve: {module} is not installed. Install it: pip install 'mergefront[serve]'."
            )
    from search.switching.serving.server import listen, serve

    # The address first: models may take minutes to load. Who asks meanwhile waits.
    with closing(listen(host, port)) as listener:
        opened = open_switcher(folder, places(moved), device)
        serve(SwitchWriter(opened, name or opened.about.study), host, port, listener=listener)


def places(given: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` texts as a mapping."""
    found = {}
    for one in given:
        name, equals, place = one.partition("=")
        if not (name and equals and place):
            raise ConfigError(f"--candidate {one}: wanted NAME=DIR.")
        found[name] = place
    return found
