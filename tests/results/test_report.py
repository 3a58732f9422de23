"""The report of synthetic studies: every picture and the page, for odd studies too."""

from __future__ import annotations

import csv
import errno
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from PIL import Image
from scipy.stats import binomtest

from objectives.evaluation import Evaluation
from objectives.metrics.names import get_metric
from objectives.outcomes import Floats, Outcomes
from search.errors import ConfigError, DiskError
from search.front import hypervolume
from search.merging.baselines import BASELINES
from search.recipe import Recipe
from search.results.board import Board, read_board
from search.results.page import reliability_panels, write_report
from search.results.plots.coefficients import Scale, coefficient_grid, coefficients_figure
from search.results.plots.front import front_figure, staircase
from search.results.plots.history import hypervolume_figure, hypervolumes
from search.results.plots.reliability import Panel, reliability_figure, wilson
from search.results.plots.style import POST, PRE, Picture, render, render_svg
from search.results.remarks import read, report_is_scored
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from tests.pico import pico_model

LAYERS = 4
GROUPS = (
    "embeddings",
    *(f"layer.{i}.{component}" for i in range(LAYERS) for component in ("attention", "mlp")),
    "final_norm",
)
PARTS = ("where", "revision", "sha256", "licence")


def answers(coefficients: Floats, n: int, seed: int, odd: str = "") -> Outcomes:
    """Answers of a merge where the first half of its groups brings accuracy and the last over-confidence."""
    draw = np.random.default_rng([seed, 1])
    gold = draw.integers(0, 4, n)
    noise = draw.standard_normal((n, 4)) + 0.35 * np.random.default_rng([seed, 2]).standard_normal((n, 4))
    half = max(len(coefficients) // 2, 1)
    early, late = float(np.mean(coefficients[:half])), float(np.mean(coefficients[-half:]))
    own = np.random.default_rng([seed, 3, int(1e6 * (early + 7 * late + 20)) if odd != "identical" else 0])
    skill = 0.55 + 0.75 * early - 0.25 * early**2 + 0.1 * late
    claimed = skill * (1.05 + 0.95 * late**2)
    seen = skill * np.eye(4)[gold] + noise + 0.25 * own.standard_normal((n, 4))
    score = claimed * seen
    return Outcomes.from_loglikelihoods(score, np.full(n, 4), gold, np.arange(n) % 2)


def build_study(
    folder: Path,
    *,
    name: str = "synthetic",
    objectives: Sequence[str] = ("accuracy", "ece"),
    groups: Sequence[str] = GROUPS,
    search: int = 24,
    report: bool = True,
    questions: int = 400,
    odd: str = "",
) -> StudyStore:
    """A study as `search.study` leaves it, with made-up answers."""
    url = f"sqlite:///{folder / 'study.db'}"
    metrics = [get_metric(objective, tasks=["north", "south"]) for objective in objectives]
    store = StudyStore.create(url, name, [(metric.name, metric.maximize) for metric in metrics])
    evidence = EvidenceFolder(url, name)
    store.set_attribute("schema", 1)
    store.set_attribute("version", "0.0.0")
    store.set_attribute("objectives", [[metric.name, metric.maximize] for metric in metrics])
    store.set_attribute("identity", {"parents": "a" * 64, "questions": "b" * 64, "groups": "c" * 64})
    store.set_attribute(
        "facts",
        {
            "groups": [[group, 2] for group in groups],
            "tasks": ["north", "south"],
            "questions": {"search": questions, "report": questions},
            "parameters": 828_032,
            "notes": ["tokenizers: <b>not</b> compared \x1b[31m"],
            "parents": {
                kind: dict(
                    zip(PARTS, (f"/models/{kind} $x$ & <co>", None, kind[1] * 64, "apache-2.0"), strict=True)
                )
                for kind in ("pre", "post")
            },
        },
    )
    store.set_attribute("trials", search)
    config = {
        "schema": 1,
        "name": name,
        "parents": {"pre": "/models/pre $x$ & <co>", "post": "/models/post"},
        "tasks": [
            {"path": "/data/north.jsonl", "name": "north"},
            {"path": "/data/south.jsonl", "name": "south"},
        ],
        "objectives": list(objectives),
        "trials": search,
    }
    store.set_attribute("config", config)
    draw = np.random.default_rng(5)
    recipes: list[tuple[str, Floats]] = [(kind, np.full(len(groups), c)) for kind, c in BASELINES]
    center = np.linspace(1.1, 0.0, len(groups))
    for i in range(search):
        spread = 0.45 if i < search // 3 else 0.2
        shift = draw.uniform(-0.35, 0.35)
        recipes.append(
            ("search", np.clip(center + shift + spread * draw.standard_normal(len(groups)), -0.2, 1.2))
        )
    for number, (kind, x) in enumerate(recipes):
        coefficients = dict(zip(groups, x.tolist(), strict=True))
        recipe = Recipe("linear", coefficients)
        with store.exclusive():
            trial = store.claim(
                kind,
                coefficients,
                dict.fromkeys(coefficients, FloatDistribution(-0.2, 1.2)),
                {"method": "linear", "recipe": recipe.key},
                {},
            )
        if odd == "failed" and number == len(recipes) - 1:
            store.fail(trial.number, "out of memory <script>")
            continue
        used = x * 0 + 0.5 if odd == "identical" else x
        found = {
            split: evaluation(answers(used, questions, seed, odd))
            for split, seed in (("search", 1), ("report", 2))
        }
        store.annotate(trial.number, "evidence", evidence.save(found["search"]))
        store.complete(trial.number, [metric.value(found["search"].outcomes) for metric in metrics])
        if report:
            store.set_attribute(f"report:{trial.number}", evidence.save(found["report"]))
    return store


def evaluation(outcomes: Outcomes) -> Evaluation:
    """Evidence with these outcomes."""
    score = np.log(np.maximum(outcomes.probability, 1e-30)).astype(np.float32)
    return Evaluation(outcomes, score, np.ones_like(score), np.ones(len(outcomes), np.float32), 1, "d" * 64)


# -- the parts ---------------------------------------------------------------------------------------------------

SMALL = st.integers(0, 6).map(float)


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(SMALL, SMALL), max_size=8), directions=st.tuples(st.booleans(), st.booleans())
)
def test_the_area_under_the_staircase_is_the_hypervolume(
    points: list[tuple[float, float]], directions: tuple[bool, bool]
) -> None:
    """In every combination of directions: the picture shows what the number says."""
    limit = np.where(directions, -1.0, 7.0)
    corners = staircase(points, limit, maximise=directions)
    x, y = np.vstack([corners, limit]).T
    shoelace = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert shoelace == pytest.approx(hypervolume(points, limit, maximise=directions))
    assert (len(corners) == 0) == (not points)


@pytest.mark.parametrize("right", [0, 1, 7, 20])
def test_wilson_intervals_equal_those_of_scipy(right: int) -> None:
    low, high = wilson([right], [20])
    expected = binomtest(right, 20).proportion_ci(method="wilson")
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_without_questions_nothing_is_known_of_a_share() -> None:
    low, high = wilson([0], [0])
    assert (low[0], high[0]) == (0.0, 1.0)


def test_tensor_coefficients_are_averaged_by_layer_and_component() -> None:
    names = [name for name, _ in pico_model("llama").named_parameters()]
    values = {name: float(i) for i, name in enumerate(names)}
    grid = coefficient_grid({**values, "vision.patch": 3.0, "vision.bias": 5.0})
    mlp = [value for name, value in values.items() if "layers.1.mlp" in name]
    assert (1.0, "mlp", "1", float(np.mean(mlp))) in grid.layers
    assert grid.components == ("attention", "mlp", "norms")
    assert dict(grid.outside)["embeddings"] == 0.0
    assert dict(grid.outside)["other"] == 4.0
    assert grid.averaged


def test_groups_keep_their_coefficients() -> None:
    grid = coefficient_grid({"embeddings": 0.1, "block.0-3.mlp": 0.2, "block.4-5.mlp": 0.3, "head": 0.4})
    assert grid.columns == ((1.5, "0-3"), (4.5, "4-5"))
    assert [value for *_, value in grid.layers] == [0.2, 0.3]
    assert grid.outside == (("embeddings", 0.1), ("head", 0.4))
    assert not grid.averaged
    assert coefficient_grid({"all": 0.5}).outside == (("all", 0.5),)


@pytest.mark.parametrize("values", [[0.5], [0.0, 1.0], [-0.2, 0.4], [3.0]])
def test_the_parents_have_their_colours_whatever_the_bounds(values: list[float]) -> None:
    scale = Scale.over(values)
    for coefficient, colour in ((0.0, PRE), (1.0, POST)):
        assert scale(coefficient)[:3] == pytest.approx(matplotlib.colors.to_rgb(colour), abs=0.02)


def test_reliability_of_no_answers_and_of_no_panels() -> None:
    nothing = answers(np.array([0.5]), 30, 1).select([])
    for panels in ([Panel("empty", nothing)], []):
        assert render_svg(reliability_figure(panels)).startswith(b"<?xml")


# -- odd studies -------------------------------------------------------------------------------------------------

ODD_STUDIES: dict[str, dict[str, Any]] = {
    "no search trials": {"search": 0},
    "report split not scored": {"search": 3, "report": False},
    "identical points": {"search": 2, "odd": "identical"},
    "one objective": {"search": 3, "objectives": ["ece"]},
    "three objectives": {"search": 3, "objectives": ["accuracy", "nll", "auroc"]},
    "one group": {"search": 2, "groups": ["all"], "report": False},
    "tensors": {
        "search": 2,
        "groups": [f"model.layers.{i}.mlp.w" for i in range(40)] + ["odd"],
        "report": False,
    },
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("kind", ODD_STUDIES)
def test_odd_studies_have_pictures_and_words(kind: str, tmp_path: Path) -> None:
    store = build_study(tmp_path, questions=60, **ODD_STUDIES[kind])
    board = read_board(store)
    panels, split = reliability_panels(store, board)
    for figure in pictures(board, panels):
        ET.fromstring(render_svg(figure))
    remarks = read(board)
    assert split == ("report" if ODD_STUDIES[kind].get("report", True) else "search")
    assert remarks[0].text.startswith(
        "On the 60" if split == "report" else "The report split is not scored yet"
    )
    assert remarks[0].tone != "good" or ODD_STUDIES[kind]["search"] > 0


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without the time that drawing takes."""
    monkeypatch.setattr("search.results.page.render", lambda figure: Picture(b"png", b"svg", 3.0))
    monkeypatch.setattr("search.results.page.render_svg", lambda figure: b"svg")


def pictures(board: Board, panels: Sequence[Panel]) -> list[Figure]:
    return [
        front_figure(board, ["search", "report"]),
        front_figure(board, ["search"]),
        hypervolume_figure(board),
        coefficients_figure(board),
        reliability_figure(panels),
    ]


@pytest.mark.usefixtures("undrawn")
def test_a_partly_scored_report_split_is_not_taken_for_whole(tmp_path: Path) -> None:
    store = build_study(tmp_path, questions=60, search=2, report=False)
    board = read_board(store)
    assert not report_is_scored(board)
    first = board.rows[0].trial
    store.set_attribute(f"report:{first}", store.trials()[0].attributes["evidence"])
    board = read_board(store)
    assert not report_is_scored(board)
    assert read(board)[0].tone == "bad"
    assert "report.html" in [path.name for path in write_report(store, tmp_path / "out")]


def test_a_study_without_parents_has_no_report(tmp_path: Path) -> None:
    store = StudyStore.create(f"sqlite:///{tmp_path / 'study.db'}", "empty", [("accuracy", True)])
    store.set_attribute("objectives", [["accuracy", True]])
    store.set_attribute("facts", {"tasks": ["north"]})
    store.set_attribute("config", {"parents": {"pre": "a", "post": "b"}})
    with pytest.raises(ConfigError, match="has not scored its parents"):
        write_report(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the whole report --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyStore:
    return build_study(tmp_path_factory.mktemp("study"), search=12, questions=150, odd="failed")


@pytest.fixture(scope="module")
def written(study: StudyStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("out") / "a" / "b"
    return {str(path.relative_to(out)): path for path in write_report(study, out)}


class Page(HTMLParser):
    """All tags, with their attributes, and all text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_whole(study: StudyStore, written: dict[str, Path]) -> None:
    names = ["front", "front-search", "front-report", "hypervolume", "coefficients", "reliability"]
    plots = [f"plots/{name}.{kind}" for name, kind in product(names, ("png", "svg"))]
    assert list(written) == ["report.html", "front.json", "front.csv", *plots]
    folder = written["report.html"].parent
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(written)
    board = read_board(study)
    assert json.loads(written["front.json"].read_text()) == board.to_json()
    assert len(list(csv.reader(written["front.csv"].open()))) == len(board.rows) + len(board.alternatives) + 1
    for name in plots:
        if name.endswith("png"):
            with Image.open(written[name]) as image:
                assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
                assert image.width >= 1000
        else:
            assert b"<dc:date>" not in written[name].read_bytes()
            ET.parse(written[name])


def test_the_page_stands_alone(written: dict[str, Path]) -> None:
    page = Page(written["report.html"].read_text(encoding="utf-8"))
    used = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")
    ]
    assert used
    assert all(value is not None and value.startswith("data:image/svg+xml;base64,") for value in used)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


@pytest.mark.fault(23)
def test_text_from_outside_is_escaped(written: dict[str, Path]) -> None:
    page = Page(written["report.html"].read_text(encoding="utf-8"))
    assert "<b>not</b> compared \\x1b[31m" in page.text  # as text: the parser found no tag in it
    assert "b" not in {tag for tag, _ in page.tags}
    assert "/models/pre $x$ & <co>" in page.text
    assert all(char.isprintable() or char == "\n" for char in page.text)


def test_the_page_says_what_matters(study: StudyStore, written: dict[str, Path]) -> None:
    page = " ".join(Page(written["report.html"].read_text(encoding="utf-8")).text.split())
    board = read_board(study)
    gain = board.hypervolume["report"].gain
    assert f"a gain of {gain.value:+.4f} (95 % interval {gain.low:+.4f} to {gain.high:+.4f})" in page
    assert "winner's curse" in page
    assert "1 trial failed and is not shown" in page
    assert f"mergefront export synthetic --storage {study.url}" in page
    assert "engine: optuna" in page
    assert "a" * 64 not in page  # parents are shown by their own hashes
    assert "r" * 64 in page
    for row in board.front:
        assert row.label in page
        assert f"{row.report['nll'].value:.4f}" in page


def test_the_same_study_gives_the_same_bytes(
    study: StudyStore, written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the user's own matplotlib settings are."""
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.transparent", True)
    again = write_report(study, tmp_path)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written.values()]
    assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_leaves_the_old_report(
    study: StudyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"report\.html: cannot be written \(No space left on device\)"):
        write_report(study, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


def test_a_file_in_the_way_is_named(study: StudyStore, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DiskError, match="out"):
        write_report(study, tmp_path / "out")


def test_hypervolume_over_trials_ends_at_that_of_the_board(study: StudyStore) -> None:
    board = read_board(study)
    volumes = hypervolumes(board)
    assert volumes[-1] == pytest.approx(board.hypervolume["search"].front)
    assert (np.diff(volumes) >= 0).all()
    assert volumes[len(BASELINES) - 1] == pytest.approx(board.hypervolume["search"].uniform)


def test_every_panel_is_one_trial(study: StudyStore) -> None:
    board = read_board(study)
    panels, split = reliability_panels(study, board)
    assert split == "report"
    assert [panel.title.split(",")[0] for panel in panels[:2]] == ["pre", "post"]
    assert len({panel.title for panel in panels}) == len(panels)
    pre = board.of_kind("pre")[0]
    assert panels[0].outcomes.correct.mean() == pytest.approx(pre.report["accuracy"].value)
    assert render(reliability_figure(panels[:1], share=panels, bare=True)).width < 3
