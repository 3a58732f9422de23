"""Pictures of a study and one self-contained page about it, from its storage and evidence alone."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from ruamel.yaml import YAML

from objectives.printable import printable
from objectives.questions.questions import Split
from search.config.study_file import StudyConfig
from search.errors import DiskError
from search.results.alternatives import Scores
from search.results.arms import stored_arms
from search.results.board import Board, Row, read_board
from search.results.calibration_table import CalibrationTable, calibration_table
from search.results.picks import named_picks
from search.results.plots.coefficients import coefficients_figure
from search.results.plots.front import front_figure
from search.results.plots.history import hypervolume_figure
from search.results.plots.reliability import Panel, reliability_figure
from search.results.plots.style import Picture, render, render_svg
from search.results.remarks import beats, read, report_is_scored
from search.running.profile import read_profile
from search.storage.database import shown, sqlite_path
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import stored_config
from search.storage.staging import write_whole
from search.storage.store import StudyStore

TEMPLATES = Path(__file__).parents[1] / "templates"
BESIDE = ("brier", "nll", "auroc")


def write_report(store: StudyStore, out: Path) -> list[Path]:
    """Writes the page, `front.json`, `front.csv` and `plots/` into a folder; returns their paths, the page first.

    Every file is staged beside its place and renamed, so that a kill leaves old or new files, never half ones.
    The same study gives the same bytes.

    Raises:
        ConfigError: the parents are not scored yet. StorageError: evidence is missing.
        DiskError: a file cannot be written.
    """
    board, config = read_board(store), stored_config(store)
    _make_folder(out / "plots")  # before the work: most of what can go wrong with `out` shows here
    setting = f"{config.sampler.title}, seed {config.sampler.seed}"
    panels, split = reliability_panels(store, board)
    where = f"{split.capitalize()} split{', unseen by the search' if split == 'report' else ''}"
    pictures = {
        "front": render(front_figure(board, ["search", "report"], setting)),
        "front-search": render(front_figure(board, ["search"], setting)),
        "front-report": render(front_figure(board, ["report"], setting)),
        "hypervolume": render(hypervolume_figure(board, setting)),
        "coefficients": render(coefficients_figure(board)),
        "reliability": render(reliability_figure(panels, where=where)),
    }
    alone = [render_svg(reliability_figure([panel], share=panels, bare=True)) for panel in panels]
    page = _page(store, board, config, pictures, list(zip(panels, alone, strict=True)), where)
    files: dict[str, bytes] = {"report.html": page.encode()}
    files["front.json"] = (json.dumps(board.to_json(), indent=2, allow_nan=False) + "\n").encode()
    files["front.csv"] = board.to_csv().encode()
    for name, picture in pictures.items():
        files |= {f"plots/{name}.png": picture.png, f"plots/{name}.svg": picture.svg}
    return [_write(out / name, content) for name, content in files.items()]


def reliability_panels(store: StudyStore, board: Board) -> tuple[list[Panel], Split]:
    """Answers of parents and named picks, each trial once; on the report split if all were scored there."""
    titles: dict[int, list[str]] = {}
    for row in board.parents:
        titles[row.trial] = [row.label]
    picks = named_picks(board)
    names = list(picks)
    for name in (
        [names[0], names[-1], *names[1:-1]] if len(names) > 2 else names
    ):  # the knee between the extremes
        row = picks[name]
        titles.setdefault(row.trial, [row.label] if row.kind == "uniform" else []).append(name)
    split: Split = "report" if all(board.row(trial).report for trial in titles) else "search"
    evidence, attributes = EvidenceFolder(store.url, store.name), store.attributes()
    digests = {record.number: record.attributes.get("evidence") for record in store.trials()}
    panels = []
    for trial, names in titles.items():
        digest = attributes[f"report:{trial}"] if split == "report" else digests[trial]
        title = ", ".join(names) + (f" (trial {trial})" if board.row(trial).kind == "search" else "")
        panels.append(Panel(title, evidence.load(str(digest)).outcomes))
    scores = Scores(store)
    panels += [
        Panel(one.label, scores.tempered(one, split))
        for one in scores.alternatives()
        if scores.has(one, split)
    ]
    panels += [
        Panel(arm.label, evidence.load(arm.evidence[split]).outcomes)
        for arm in stored_arms(attributes)
        if split in arm.evidence
    ]
    return panels, split


def _page(
    store: StudyStore,
    board: Board,
    config: StudyConfig,
    pictures: dict[str, Picture],
    panels: Sequence[tuple[Panel, bytes]],
    where: str,
) -> str:
    """The HTML page. All text from outside is escaped, control characters are shown as such."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters["data_uri"] = _data_uri
    attributes, records = store.attributes(), store.trials()
    failed = sum(record.state == "failed" for record in records)
    notes: dict[int, list[str]] = {}
    for name, row in named_picks(board).items():
        notes.setdefault(row.trial, []).append(name)
    return environment.get_template("report.html.j2").render(
        board=board,
        config=config,
        facts=attributes["facts"],
        identity=attributes["identity"],
        version=attributes["version"],
        budget=attributes["trials"],
        storage=shown(store.url),
        scored=report_is_scored(board),
        some_scored=any(row.report for row in board.rows),
        remarks=read(board, failed),
        picks=[(board.row(trial), names) for trial, names in notes.items()],
        notes=notes,
        rows=[
            *board.front,
            *(row for row in board.uniform_line() if not row.front),
            *board.alternatives,
            *board.arms,
        ],
        beside=[name for name in (*BESIDE, *board.preferences) if name not in dict(board.objectives)],
        rising=["auroc", *board.preferences],
        wins=lambda row, name: all(beats(row, board, parent.label, name) for parent in board.parents),
        searched=len(board.of_kind("search")),
        baselines=len(board.uniform_line()),
        pictures=pictures,
        panels=panels,
        profile=read_profile(records),
        calibration=_calibration(store, board),
        where=where,
        settings=_yaml(config).splitlines(),
        commands=list(_commands(store, board)),
    )


def _calibration(store: StudyStore, board: Board) -> CalibrationTable | None:
    """Calibrators side by side; None until the report split is scored, or where it is too small to split again."""
    if board.questions["report"] < 4 or not all(row.report for row in board.parents):
        return None
    return calibration_table(board, Scores(store))


def _commands(store: StudyStore, board: Board) -> Iterator[tuple[str, str]]:
    """What to do next: (purpose, command)."""
    path = sqlite_path(store.url)
    usual = path == Path("runs") / store.name / "study.db"
    url = shown(store.url) if path is None else f"sqlite:///{path}"
    study = store.name + ("" if usual else f" --storage {shlex.quote(printable(url))}")
    knee: Row = named_picks(board)["knee"]
    yield (
        f"the knee ({knee.label}) as a checkpoint",
        f"mergefront export {study} --select knee --weights --out export",
    )
    yield "the whole front as mergekit configs", f"mergefront export {study} --all --out export"
    yield "check an exported checkpoint against these numbers", "mergefront verify export"
    yield "search further", f"mergefront resume {study} --trials +50"


def _yaml(config: StudyConfig) -> str:
    """The frozen study file; keys that were left at nothing are left out."""
    writer = YAML()
    writer.width = 10_000
    writer.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    writer.dump(_without_nulls(config.to_json()), text)
    return text.getvalue()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _data_uri(svg: bytes) -> Markup:
    return Markup("data:image/svg+xml;base64," + base64.b64encode(svg).decode())


def _write(path: Path, content: bytes) -> Path:
    try:
        write_whole(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DiskError:
    reason = error.strerror or type(error).__name__
    return DiskError(f"{path}: cannot be written ({reason}). Make room, or choose another --out.")
