"""Arms of `switch compare` on a launched study's board, beside its merges: shown everywhere, chosen nowhere."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation

from objectives.evaluation import Evaluation
from search.config.study_file import load_study_file
from search.errors import ConfigError
from search.results.arms import SWITCH, Arm, arm_key, stored_arms
from search.results.board import read_board
from search.results.front_table import front_table
from search.results.page import reliability_panels, write_report
from search.results.picks import named_picks, pick
from search.results.plots.front import front_figure
from search.results.remarks import read
from search.running.launch import create
from search.storage.evidence import EvidenceFolder
from search.storage.files import file_sha256
from search.storage.store import StudyStore
from search.study import run as search
from search.switching.arms import Arms
from tests.conftest import Cli
from tests.pico import CHAT_TEMPLATE, pico_tokenizer, save_experts
from tests.pico_switch import EVEN, STUDY, run
from tests.results.test_report import build_study

LABELS = [
    "switch",
    "untrained switcher",
    "random switching",
    "router",
    "refine",
    "logit average",
    "contrastive",
    "greedy soup",
    "dare-ties",
]


class Launched:
    """A finished study with a switcher: its board before `switch compare`, and what that printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"sqlite:///{folder / 'runs' / 'turns' / 'study.db'}"
        parents = save_experts(folder, ["sft", "dpo"])
        for one in parents.values():
            pico_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(one)
        self.study = folder / "study.yaml"
        self.study.write_text(STUDY.format(**parents) + "trials: 3\n")
        rows = [{"question": f"Letter {n}?", "answer": EVEN} for n in range(60)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        search(*create(load_study_file(self.study), self.url, "cpu"))
        board = read_board(self.store)
        self.json, self.csv = json.dumps(board.to_json()), board.to_csv()
        run(folder, "train", "study.yaml", "--out", "switcher")
        self.table = json.loads(run(folder, "compare", "study.yaml", "--switcher", "switcher", "--json"))

    @property
    def store(self) -> StudyStore:
        return StudyStore.open(self.url, "turns")

    def copy(self, to: Path) -> str:
        """URL of a copy that may be changed."""
        shutil.copytree(self.folder / "runs" / "turns", to, ignore=shutil.ignore_patterns("arms", "rollouts"))
        return f"sqlite:///{to / 'study.db'}"

    def compare(self, cli: Cli, url: str, *more: object) -> tuple[int, str, str]:
        """`switch compare` with the finished answers of the first time."""
        work = self.folder / "runs" / "turns" / "arms"
        switcher = () if "--switcher" in more else ("--switcher", self.folder / "switcher")
        return cli("switch", "compare", self.study, *switcher, "--storage", url, "--work", work, *more)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return Launched(tmp_path_factory.mktemp("launched"))


def test_arms_stand_beside_the_merges(launched: Launched) -> None:
    shown: dict[str, Any] = read_board(launched.store).to_json()
    arms = [row for row in shown["trials"] if row["trial"] is None]
    assert [arm["label"] for arm in arms] == LABELS
    printed = {arm["label"]: arm for arm in launched.table["arms"]}
    by_label = {row["label"]: row for row in shown["trials"]}
    for arm in arms:
        assert (arm["kind"], arm["front"], arm["recipe"]) == ("alternative", False, None)
        assert arm["tokens"] == printed[arm["label"]]["tokens"]
        # The table's numbers, by the same resamples of the same questions.
        assert arm["report"]["accuracy"] == printed[arm["label"]]["voted"]
        assert arm["report"]["ece"] == printed[arm["label"]]["ece"]
        assert {"accuracy", "ece"} <= arm["search"].keys()
        assert {"brier", "nll", "auroc"} <= arm["report"].keys()
        assert list(arm["against"]) == ["pre", "sft", "dpo"]
        for parent, cells in arm["against"].items():
            for name, cell in cells.items():
                difference = arm["report"][name]["value"] - by_label[parent]["report"][name]["value"]
                assert cell["value"] == pytest.approx(difference, abs=1e-12)
                assert cell["low"] <= cell["value"] <= cell["high"]
    assert by_label["logit average"]["tokens"] == 3.0
    # The parents were trials before; what the table says of them is what these say.
    assert sum(row["label"] == "sft" for row in shown["trials"]) == 1
    for name in ("pre", "sft", "dpo"):
        assert by_label[name]["report"]["accuracy"]["value"] == printed[name]["voted"]["value"]
    front = next(row for row in shown["trials"] if row["label"] == "uniform 0.5")
    assert SWITCH in front["against"]
    json.dumps(shown, allow_nan=False)


def test_what_is_stored_says_where_it_comes_from(launched: Launched) -> None:
    store = launched.store
    evidence = EvidenceFolder(store.url, store.name)
    digests = {
        split: evidence.load(digest).digest
        for split, digest in (
            ("search", store.trials()[0].attributes["evidence"]),
            ("report", store.attribute("report:0")),
        )
    }
    for arm in stored_arms(store.attributes()):
        for split, digest in arm.evidence.items():
            assert evidence.load(digest).digest == digests[split], "of the questions that the trials answered"
        wanted = file_sha256(launched.folder / "switcher" / "switcher.json") if arm.label == SWITCH else None
        assert arm.switcher == wanted


def test_tables_pictures_and_page_show_them(launched: Launched, tmp_path: Path) -> None:
    board = read_board(launched.store)
    for split in ("search", "report"):
        table = front_table(board, split)
        for arm in board.arms:
            line = next(line for line in table.splitlines() if line.strip().startswith(f"{arm.label}  "))
            assert line.endswith(f"{arm.tokens:.2f}x tokens")
            assert f"{arm.on(split)['accuracy'].value:.3f}" in line
        assert max(map(len, table.splitlines())) < 125
    assert "no number: no merge" in table
    assert any("Checkpoints that take turns (switch)" in remark.text for remark in read(board))
    header, *lines = csv.reader(io.StringIO(board.to_csv()))
    groups = len(board.rows[0].coefficients)
    assert header[-groups - 2 : -groups] == ["temperature", "tokens"]
    assert all(len(line) == len(header) for line in lines)
    last = dict(zip(header, lines[-1], strict=True))
    assert (last["trial"], last["kind"], last["label"]) == ("", "alternative", "dare-ties")
    assert lines[-1][-groups:] == [""] * groups
    assert float(last["tokens"]) == board.arms[-1].tokens
    panels, _ = reliability_panels(launched.store, board)
    assert [panel.title for panel in panels][-len(LABELS) :] == LABELS
    texts = [
        text.get_text() for text in front_figure(board, ["search", "report"]).findobj() if _has_text(text)
    ]
    caption = " ".join(" ".join(texts).split())
    assert "switch (1), untrained switcher (2)" in caption
    page = write_report(launched.store, tmp_path)[0].read_text()
    for arm in board.arms:
        assert f"{arm.label}<span" in page
    assert json.loads((tmp_path / "front.json").read_text()) == board.to_json()


def test_arms_that_coincide_or_lie_far_off_are_still_told(tmp_path: Path) -> None:
    """One as good as `post`, one as good as that, and one that would squeeze everything else."""
    store = build_study(tmp_path, search=6)
    evidence, post = EvidenceFolder(store.url, store.name), store.trials()[1].attributes["evidence"]
    found = evidence.load(post)
    wrong = np.roll(found.outcomes.probability, 1, axis=1) ** 8
    bad = replace(found.outcomes, probability=wrong / wrong.sum(axis=1, keepdims=True))
    for label, digest in (
        ("switch", post),
        ("router", post),
        ("refine", evidence.save(Evaluation.of_probabilities(bad, 0, found.digest))),
    ):
        value = {"evidence": digest, "tokens": 1.0, "switcher": None, "setting": ""}
        store.set_attribute(arm_key(label, "search"), value)
    board = read_board(store)
    figure = front_figure(board, ["search"])
    (axes,) = figure.axes
    balls = {text.get_text(): text for text in axes.texts if text.get_text() in ("1", "2", "3")}
    assert list(balls) == ["1", "2"]
    cells = board.row(1).search
    offsets = [np.zeros(2)]  # of the parent's own mark
    for ball in balls.values():
        assert isinstance(ball, Annotation)
        assert ball.xy == (cells["accuracy"].value, cells["ece"].value)
        offsets.append(np.array(ball.xyann))
    apart = [np.hypot(*(a - b)) for a, b in combinations(offsets, 2)]
    assert min(apart) >= 9, "points of paper; a ball is 8 wide"
    caption = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "switch (1), router (2), refine (3)" in caption
    assert "refine outside the frame" in caption
    assert not [row for row in board.arms if row.report or row.against]
    assert "router" in front_table(board, "search")
    assert write_report(store, tmp_path / "out")


def _has_text(artist: Any) -> bool:
    return hasattr(artist, "get_text") and bool(artist.get_text())


def test_a_board_without_arms_is_what_it_was(launched: Launched, tmp_path: Path) -> None:
    """Byte for byte, before any arm and after all were taken off."""
    store = StudyStore.open(launched.copy(tmp_path / "copy"), "turns")
    for arm in list(stored_arms(store.attributes())):
        for split in ("search", "report"):
            store.set_attribute(arm_key(arm.label, split), None)  # type: ignore[arg-type]
    board = read_board(store)
    assert json.dumps(board.to_json()) == launched.json
    assert board.to_csv() == launched.csv
    assert "tokens" not in launched.csv
    assert '"switch"' not in launched.json
    row = json.loads(launched.json)["trials"][3]
    assert list(row) == ["trial", "kind", "label", "front", "recipe", "search", "report", "against"]
    temperatures = [row for row in json.loads(launched.json)["trials"] if row["kind"] == "alternative"]
    assert list(temperatures[0])[-1] == "temperature"
    assert "x tokens" not in front_table(board)


def test_nobody_can_pick_them(launched: Launched, tmp_path: Path, cli: Cli) -> None:
    board = read_board(launched.store)
    assert not {row.label for row in (*board.front, *named_picks(board).values())} & {*LABELS}
    assert not any(isinstance(row, Arm) for row in board.front)
    with pytest.raises(ConfigError, match="--select router: is no trial and has no recipe"):
        pick(board, "router")
    for command in (
        ("export", "turns", "--out", tmp_path / "out"),
        ("calibrate", "turns", "--method", "temperature"),
    ):
        code, _, err = cli(*command, "--select", "switch", "--storage", launched.url)
        assert code == 2
        assert "--select switch: is no trial" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_twice(
    launched: Launched, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draws(*_: object) -> None:
        raise AssertionError("an answer was drawn again")

    url = launched.copy(tmp_path / "copy")
    before = StudyStore.open(url, "turns").attributes()
    monkeypatch.setattr(Arms, "_draft", draws)
    code, out, err = launched.compare(cli, url, "--json")
    assert code == 0, err
    assert json.loads(out) == launched.table
    assert StudyStore.open(url, "turns").attributes() == before
    for other in ("switching.margin=0.2", "switching.seed=1", "merge.dtype=bfloat16"):
        code, _, err = launched.compare(cli, f"sqlite:///{tmp_path / 'none.db'}", "--set", other)
        assert code == 1
        assert "drawn again" in err


def test_another_switcher_takes_the_place(launched: Launched, tmp_path: Path, cli: Cli) -> None:
    url = launched.copy(tmp_path / "copy")
    run(
        launched.folder, "train", "study.yaml", "--out", str(tmp_path / "other"),
        "--set", "switching.rollouts.completions=3",
    )  # fmt: skip
    before = {arm.label: arm for arm in stored_arms(StudyStore.open(url, "turns").attributes())}
    code, _, err = launched.compare(cli, url, "--switcher", tmp_path / "other", "--arm", "switch")
    assert code == 0, err
    assert "switch: takes the place of that of another switcher" in err
    assert err.count("takes the place") == 1
    after = {arm.label: arm for arm in stored_arms(StudyStore.open(url, "turns").attributes())}
    assert after[SWITCH].switcher == file_sha256(tmp_path / "other" / "switcher.json")
    assert {**before, SWITCH: None} == {**after, SWITCH: None}
    assert [arm.label for arm in read_board(StudyStore.open(url, "turns")).arms] == LABELS


def test_arms_under_other_rules_leave(launched: Launched, tmp_path: Path, cli: Cli) -> None:
    url = launched.copy(tmp_path / "copy")
    longer = ("--set", "switching.segment=3")
    run(launched.folder, "train", "study.yaml", "--out", str(tmp_path / "longer"), *longer)
    code, _, err = launched.compare(
        cli, url, "--arm", "logit average", "--switcher", tmp_path / "longer", *longer
    )
    assert code == 0, err
    assert "taken off the board, made under other rules of taking turns: switch, untrained" in err
    assert "2 arms are on the board of study 'turns'" in err
    board = read_board(StudyStore.open(url, "turns"))
    assert [arm.label for arm in board.arms] == ["random switching", "logit average"]
    code, out, err = cli("front", "turns", "--storage", url, "--format", "csv")
    assert code == 0, err
    assert out.count("alternative") == 2 + len(board.alternatives)


def test_only_the_study_itself_takes_them(
    launched: Launched, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = launched.copy(tmp_path / "copy")
    before = StudyStore.open(url, "turns").attributes()
    monkeypatch.setattr(Arms, "written", lambda *_: pytest.fail("something was written"))
    for override, said in (
        ("split.seed=1", "questions changed since it began"),
        ("tasks.0.generate.temperature=0.9", "questions changed since it began"),
        ("merge.dtype=bfloat16", "was launched with merge.dtype float32 (found bfloat16)"),
    ):
        code, _, err = launched.compare(cli, url, "--set", override)
        assert code == 2, err
        assert said in err
        assert err.count("error:") == err.count("\n") == 1
    assert StudyStore.open(url, "turns").attributes() == before
    monkeypatch.undo()
    others = tmp_path / "others"
    other = Launched.__new__(Launched)
    other.folder, other.study = others, others / "study.yaml"
    parents = save_experts(others, ["sft", "dpo"], hidden_size=16)
    other.study.write_text(STUDY.format(**parents))
    shutil.copy(launched.folder / "questions.jsonl", others)
    run(others, "train", "study.yaml", "--out", "switcher", "--set", "switching.rollouts.completions=8")
    monkeypatch.setattr(Arms, "written", lambda *_: pytest.fail("something was written"))
    code, _, err = other.compare(cli, url)
    assert code == 2, err
    assert "study 'turns': parents changed since it began" in err


def test_a_study_that_was_not_launched_has_the_table_alone(
    launched: Launched, tmp_path: Path, cli: Cli
) -> None:
    nowhere = tmp_path / "none" / "study.db"
    code, out, err = launched.compare(cli, f"sqlite:///{nowhere}")
    assert code == 0, err
    assert "study 'turns' was not launched: the table alone" in err
    assert "logit average" in out
    assert not nowhere.exists()
    StudyStore.create(f"sqlite:///{tmp_path / 'other.db'}", "another", [("accuracy", True)])
    code, _, err = launched.compare(cli, f"sqlite:///{tmp_path / 'other.db'}")
    assert code == 0, err
    assert "the table alone" in err
    (tmp_path / "text.db").write_text("no database")
    code, _, err = launched.compare(cli, f"sqlite:///{tmp_path / 'text.db'}")
    assert code == 4
    assert "wanted a SQLite database" in err
