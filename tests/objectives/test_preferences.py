"""Preferences: scorers, reward models, and studies of several experts that are searched and chosen from by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.metrics.diversity import Diversity, get_sampled_metric
from objectives.metrics.names import find_metric, is_sampled
from objectives.metrics.preferences import Length, Vocabulary, count_words, share_of_words, words_of
from search.checkpoints.reward_model import RewardModel, check_reward_model, make_preference
from search.config.sections import PreferenceConfig
from search.config.study_file import load_study_file
from search.errors import CheckpointError, ConfigError, EvaluationError
from search.export.folder import export_rows
from search.results.board import read_board
from search.results.front_table import front_table
from search.results.page import write_report
from search.results.picks import pick
from search.running.budget import set_budget
from search.running.launch import create, reopen
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.pico import pico_config, pico_tokenizer, save_pico
from tests.pico_study import write_prompts, write_study

TEXTS = st.lists(st.lists(st.text("ab -'.\n", max_size=12), min_size=2, max_size=2), min_size=1, max_size=4)
WANTED: dict[str, Any] = {
    "helpful": {"model": "./reward"},
    "concise": {"words": "fewer"},
    "red": {"mentions": ["a", "e"]},
}


def save_reward(folder: Path, seed: int = 0, *, outputs: int = 1, chat_template: str | None = None) -> Path:
    """A reward model as people publish them: a causal backbone with a linear head of one output."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(pico_config(num_labels=outputs))
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    pico_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def liked_study(folder: Path, **keys: Any) -> Path:
    """Two experts; two of three preferences are objectives."""
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl")
    if not (folder / "reward").exists():
        save_reward(folder / "reward")
    standing = {
        "space": {"granularity": "uniform", "low": 0.0, "high": 1.0},
        "objectives": ["helpful", "concise", "accuracy"],
        "diversity": {"prompts": "./prompts.jsonl", "samples": 3, "max_new_tokens": 6},
        "preferences": WANTED,
        "trials": 4,
    }
    return write_study(folder, experts=("brief", "kind"), **{**standing, **keys})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("liked")
    path = liked_study(folder)
    url = f"sqlite:///{folder / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    return path, url


# -- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" ... \n", []),
        ("It's well-kept; 42 times_over.", ["it's", "well-kept", "42", "times", "over"]),
        ("-a- 'b'", ["a", "b"]),
        ("\u00c4RGER don\u2019t", ["\u00e4rger", "don\u2019t"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_scores_by_hand() -> None:
    texts = [["Therefore, precisely that.", "So."], ["", "therefore therefore"]]
    assert count_words(texts).tolist() == [[3.0, 1.0], [0.0, 2.0]]
    assert Length(fewer=True)(["p", "q"], texts).tolist() == [[-3.0, -1.0], [0.0, -2.0]]
    shares = share_of_words(texts, ["THEREFORE", "precisely"])
    np.testing.assert_allclose(shares, [[2 / 3, 0.0], [0.0, 1.0]])
    avoided = Vocabulary(("therefore", "precisely"), avoided=True)(["p", "q"], texts)
    assert np.array_equal(avoided, -shares)
    assert not np.signbit(avoided[avoided == 0.0]).any()  # no negative zeros


@given(TEXTS)
def test_laws_of_words(texts: list[list[str]]) -> None:
    before = json.dumps(texts)
    prompts = ["p"] * len(texts)
    more, fewer = (Length(fewer=kind)(prompts, texts) for kind in (False, True))
    assert more.shape == (len(texts), 2)
    assert np.array_equal(more, -fewer)
    assert (fewer <= 0.0).all()
    shares = share_of_words(texts, ["a"])
    assert ((shares >= 0.0) & (shares <= 1.0)).all()
    assert np.array_equal(share_of_words(texts, ["a", "b"]) >= shares, np.ones_like(shares, dtype=bool))
    doubled = [[f"{answer} {answer}" for answer in answers] for answers in texts]
    assert np.array_equal(count_words(doubled), 2 * more)
    np.testing.assert_allclose(share_of_words(doubled, ["a"]), shares)
    turned = [answers[::-1] for answers in texts]
    assert np.array_equal(count_words(turned), more[:, ::-1])
    assert json.dumps(texts) == before


@pytest.mark.parametrize(
    ("wanted", "title"),
    [
        ({"words": "fewer"}, "fewer words"),
        ({"words": "more"}, "more words"),
        ({"mentions": list("abcdef")}, "mentions a, b, c, d and 2 more"),
        ({"avoids": ["thus"]}, "avoids thus"),
    ],
)
def test_titles_say_what_is_measured(wanted: dict[str, Any], title: str) -> None:
    assert make_preference(PreferenceConfig(**wanted)).title == title


def test_a_preference_is_a_metric_without_a_range() -> None:
    metric = find_metric("helpful", preferences=["helpful"])
    assert metric.maximize
    one = Diversity({"helpful": np.array([-3.0, 5.0, 1.0])}, "", preferences={"helpful": "x"})
    assert [m.name for m in one.metrics] == ["helpful"]
    assert get_sampled_metric("helpful", one.preferences).value(one) == 1.0
    low, high = metric.interval(1.0, np.linspace(-200.0, 200.0, 1000))
    assert low < -150.0 < 150.0 < high
    assert is_sampled("distinct-1", ())
    assert not is_sampled("accuracy", ["helpful"])
    with pytest.raises(ConfigError, match="Did you mean 'helpful'"):
        find_metric("helpfull", preferences=["helpful"])
    with pytest.raises(ConfigError, match=r"was not measured\.$"):
        get_sampled_metric("kind", ["kind"])(one)


# -- reward models ----------------------------------------------------------------------------------------------

PROMPTS = ["one: red", "two"]
ANSWERS = [["a long answer of many words", " so", ""], ["so", "so", "x" * 40]]


def test_a_reward_model_scores_each_pair_by_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = save_reward(tmp_path / "reward")
    reward = RewardModel(folder)
    found = reward(PROMPTS, ANSWERS)
    assert found.shape == (2, 3)
    assert found.dtype == np.float64
    tokenizer = pico_tokenizer()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for i, answers in enumerate(ANSWERS):
        for j, answer in enumerate(answers):
            ids = torch.tensor([tokenizer(f"{PROMPTS[i]} {answer.strip()}")["input_ids"]])
            with torch.no_grad():
                assert found[i, j] == pytest.approx(float(model(input_ids=ids).logits), abs=1e-5)
    assert found[1, 0] == found[1, 1]
    assert len(np.unique(found)) == 5
    assert np.array_equal(reward(PROMPTS, ANSWERS), found)
    np.testing.assert_allclose(reward(PROMPTS[::-1], ANSWERS[::-1]), found[::-1], atol=1e-6)
    assert reward.title.startswith("reward model ")
    assert reward.title != RewardModel(save_reward(tmp_path / "other", seed=1)).title


def test_a_reward_model_reads_its_own_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
    plain, chat = (
        RewardModel(save_reward(tmp_path / "a")),
        RewardModel(save_reward(tmp_path / "b", chat_template=template)),
    )
    assert chat(["hi"], [["you"]])[0, 0] != plain(["hi"], [["you"]])[0, 0]
    assert chat.title != plain.title, "another template is another judge of the study's answers"
    # Written out, the same text goes through the same weights.
    written = plain(["user: hi;assistant:"], [["you;"]])[0, 0]
    assert chat(["hi"], [["you"]])[0, 0] == pytest.approx(written, abs=1e-6)
    broken = RewardModel(save_reward(tmp_path / "c", chat_template="{{ raise_exception('no') }}"))
    with pytest.raises(ConfigError, match="chat template fails"):
        broken(["hi"], [["you"]])


def test_what_is_too_long_loses_its_start(tmp_path: Path) -> None:
    reward = RewardModel(save_reward(tmp_path / "reward"))
    ends = reward(["z" * 600, "y" * 600], [["a" * 511], ["a" * 511]])
    assert ends[0, 0] == ends[1, 0]


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such"):
        check_reward_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has 2 outputs, wanted 1"):
        check_reward_model(save_reward(tmp_path / "two", outputs=2))
    with pytest.raises(CheckpointError, match="outputs, wanted 1"):
        check_reward_model(save_pico(tmp_path / "causal"))
    headless = save_pico(tmp_path / "headless", num_labels=1)
    check_reward_model(headless)
    with pytest.raises(CheckpointError, match=r"score\.weight: missing"):
        RewardModel(headless)
    bare = save_reward(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        check_reward_model(bare)
    pickled = save_reward(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        check_reward_model(pickled)
    coded = save_reward(tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(CheckpointError):
        check_reward_model(coded)


# -- studies ----------------------------------------------------------------------------------------------------


def test_every_trial_is_measured_and_the_board_shows_it(study: tuple[Path, str], tmp_path: Path) -> None:
    store = StudyStore.open(study[1], "pico")
    evidence = EvidenceFolder(store.url, "pico")
    for record in store.trials():
        assert record.values is not None
        found = evidence.load_diversity(record.attributes["diversity"])
        assert set(found.preferences) == set(WANTED)
        assert record.values[:2] == tuple(float(found.values[n].mean()) for n in ("helpful", "concise"))
    assert len({record.values for record in store.trials()}) > 5
    board = read_board(store)
    assert board.objectives == (("helpful", True), ("concise", True), ("accuracy", True))
    assert board.preferences == tuple(WANTED)
    row = board.parents[1]
    for name in WANTED:  # objectives or not
        assert row.report[name].low <= row.report[name].value <= row.report[name].high
    assert row.report["concise"].value < 0.0
    header = front_table(board).splitlines()[2]
    assert "helpful up" in header
    assert "red" in header.split()
    assert "search.red" in board.to_csv().splitlines()[0]
    assert board.to_json()["objectives"][0] == {"name": "helpful", "direction": "maximize"}
    page = write_report(store, tmp_path / "report")[0].read_text()
    assert "red \u2191" in page or "red &uarr;" in page


def test_picks_follow_preferences(study: tuple[Path, str]) -> None:
    board = read_board(StudyStore.open(study[1], "pico"))
    front = board.front
    for name in ("helpful", "concise"):
        best = max(row.search[name].value for row in front)
        assert pick(board, f"best-{name}").search[name].value == best
        assert pick(board, f"prefer:{name}=1").search[name].value == best
    points = board.points(front, "search")[:, :2]
    span = np.ptp(points, axis=0)
    gain = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
    wanted = gain @ [0.5, 0.3]
    row = pick(board, "prefer:helpful=0.5,concise=0.3")
    assert wanted[[r.trial for r in front].index(row.trial)] == pytest.approx(wanted.max())
    with pytest.raises(ConfigError, match="'red' is no objective"):
        pick(board, "prefer:red=1")


def test_interrupted_or_not_the_scores_are_the_same(study: tuple[Path, str], tmp_path: Path) -> None:
    path = liked_study(tmp_path / "again", trials=1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    store, problem = reopen(url, "pico", "cpu")
    set_budget(store, 4)
    run(store, problem)
    wanted = StudyStore.open(study[1], "pico").trials()
    assert [r.values for r in store.trials()] == [r.values for r in wanted]
    assert [r.attributes["diversity"] for r in store.trials()] == [r.attributes["diversity"] for r in wanted]


def test_exports_verify_and_calibrators_stand_beside(
    study: tuple[Path, str], tmp_path: Path, cli: Cli
) -> None:
    store = StudyStore.open(study[1], "pico")
    board = read_board(store)
    rows = [pick(board, "prefer:helpful=1,concise=1")]
    folders = export_rows(store, board, rows, tmp_path / "out", weights=False, overwrite=False, overrides=())
    assert "| helpful (up) |" in (folders[0] / "README.md").read_text()
    code, out, err = cli(
        "export", "pico", "--storage", study[1], "--select", "prefer:concise=1", "--weights", "--out",
        tmp_path / "whole",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = cli("verify", tmp_path / "whole")
    assert code == 0, err
    assert "accuracy" in out
    code, out, err = cli(
        "calibrate", "pico", "--storage", study[1], "--method", "temperature", "--select", "kind"
    )
    assert code == 0, err
    assert "concise up" in out
    tempered = next(r for r in read_board(store).alternatives if r.label == "kind + temperature")
    assert {"helpful", "concise", "red"} <= set(tempered.report)


def test_check_names_them_and_another_reward_model_is_refused(tmp_path: Path, cli: Cli) -> None:
    path = liked_study(tmp_path / "study", trials=0)
    code, out, err = cli("check", path)
    assert code == 0, err
    assert "preference  helpful: reward model " in out
    assert "preference  concise: fewer words" in out
    assert "prompts     5 search, 5 report; 3 answers to each" in out
    assert "helpful up" in out
    url = f"sqlite:///{tmp_path / 'study.db'}"
    run(*create(load_study_file(path), url, "cpu"))
    assert StudyStore.open(url, "pico").attribute("identity")["preferences.helpful"]
    (tmp_path / "study" / "reward").rename(tmp_path / "moved")
    code, _, err = cli(
        "resume", "pico", "--storage", url, "--trials", "+1",
        "--set", f"preferences.helpful.model={tmp_path / 'moved'}",
    )  # fmt: skip
    assert code == 0, err
    save_reward(tmp_path / "study" / "reward", seed=5)
    code, _, err = cli("resume", "pico", "--storage", url, "--trials", "+1")
    assert code == 2
    assert "preferences.helpful changed since it began" in err
    code, _, err = cli(
        "resume", "pico", "--storage", url, "--set", "preferences.concise.words=more", "--trials", "+1"
    )
    assert code == 2
    assert "only places may be set" in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"diversity": None}, "preferences: need sampled answers; add a section diversity"),
        ({"preferences": None}, "no metric called 'helpful'"),
        ({"preferences": {}}, "preferences: found none"),
        ({"preferences": {**WANTED, "ece": {"words": "more"}}}, "'ece', which means something else"),
        ({"preferences": {**WANTED, "self-bleu": {"words": "more"}}}, "'self-bleu', which means"),
        ({"preferences": {**WANTED, "calibration": {"words": "more"}}}, "'calibration', which means"),
        ({"preferences": {**WANTED, "Kind": {"words": "more"}}}, "found name 'Kind', wanted"),
        ({"preferences": {**WANTED, "kind": {}}}, "preferences.kind: found nothing, wanted exactly one"),
        (
            {"preferences": {**WANTED, "kind": {"words": "more", "avoids": ["x"]}}},
            "preferences.kind: found words and avoids, wanted exactly one",
        ),
        ({"preferences": {**WANTED, "kind": {"words": "less"}}}, "preferences.kind.words"),
        ({"preferences": {**WANTED, "kind": {"mentions": ["two words"]}}}, "wanted single words"),
        ({"preferences": {**WANTED, "kind": {"avoids": []}}}, "preferences.kind.avoids: found none"),
        ({"preferences": {**WANTED, "kind": {"mention": ["x"]}}}, "Did you mean 'mentions'?"),
        ({"objectives": ["helpfull"]}, "Did you mean 'helpful'?"),
        ({"objectives": ["helpful", "helpful"]}, "objectives: found one twice"),
        ({"objectives": ["helpful@made-up"]}, "which have no task. Write helpful"),
        ({"sampler": {"engine": "composite", "seed": 0}}, "helpful is measured on sampled ones"),
        ({"sampler": {"engine": "gradient", "seed": 0}}, "no differentiable stand-in"),
        ({"racing": {}}, "racing: does not go with objective helpful"),
        ({"fidelity": {"questions": 5}}, "fidelity: does not go with objective helpful"),
    ],
)
def test_one_line_says_what_is_wrong(keys: dict[str, Any], message: str, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("launch", liked_study(tmp_path / "study", **keys))
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("fault", ["missing", "outputs", "head"])
def test_a_broken_reward_model_stops_a_study_before_its_first_trial(
    fault: str, tmp_path: Path, cli: Cli
) -> None:
    path = liked_study(tmp_path / "study")
    reward = tmp_path / "study" / "reward"
    for file in reward.iterdir():
        file.unlink()
    reward.rmdir()
    if fault != "missing":
        save_pico(reward, **({"num_labels": 1} if fault == "head" else {}))
    code, _, err = cli("launch", path)
    assert code == 3, err
    assert "reward" in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("runs/pico/evidence").exists()


def test_comparisons_of_engines_refuse_them(tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("compare", liked_study(tmp_path / "study"), "--engines", "random", "--budget", "20x")
    assert code == 2
    assert "compare: helpful is measured on sampled answers" in err


def test_evidence_says_what_was_measured(tmp_path: Path) -> None:
    one = Diversity({"kind": np.array([1.0, 2.0])}, "about", preferences={"kind": "fewer words"})
    digest = one.save(tmp_path / "d")
    again = Diversity.load(tmp_path / "d", sha256=digest, digest="about")
    assert again.preferences == {"kind": "fewer words"}
    assert np.array_equal(again.values["kind"], one.values["kind"])
    plain = Diversity({"distinct-1": np.array([0.5])}, "about")
    plain.save(tmp_path / "plain")
    assert b"preferences" not in (tmp_path / "plain").read_bytes()  # as it was before there were any
    with pytest.raises(EvaluationError, match="not finite"):
        Diversity({"kind": np.array([np.inf])}, "about", preferences={"kind": "reward model x"})
