"""Arms beside a switcher: the same rules for all of them, every token counted, and routing as a limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.config.study_file import StudyConfig, load_study_file
from search.errors import ConfigError
from search.results.arms import RANDOM, ROUTER, SWITCH
from search.running.problem import Problem
from search.switching.arms import Arms, check_arms
from search.switching.arms_table import ORACLE, feasible, stand
from search.switching.candidates import open_settings
from search.switching.labels import label
from search.switching.train import Trained, groups_of, switching_of, taught, train
from tests.pico import save_experts
from tests.pico_switch import STUDY, questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file of three candidates, and its questions."""
    place = tmp_path_factory.mktemp("arms")
    (place / "study.yaml").write_text(STUDY.format(**save_experts(place, ["sft", "dpo"])))
    questions(place / "questions.jsonl", 60)
    return place


def study(folder: Path, *overrides: str) -> StudyConfig:
    return load_study_file(folder / "study.yaml", overrides)


def arms_of(config: StudyConfig, work: Path) -> tuple[Arms, Trained]:
    problem = Problem.open(config, "cpu")
    switching = switching_of(problem)
    settings = open_settings(problem, switching.turns)
    trained = train(problem, settings, work)
    return Arms(problem, settings, {SWITCH: lambda one: trained.brain.policy(one.relay, switching)}), trained


@pytest.mark.parametrize(
    "rollouts",
    ["{completions: 4}", "{branches: 3, completions: 2, traces: 2}", "{completions: 5, questions: 25}"],
)
@pytest.mark.parametrize("ties", ["drop", "stay"])
def test_a_segment_as_long_as_the_answer_is_routing(
    folder: Path, tmp_path: Path, rollouts: str, ties: str
) -> None:
    """Whatever the section says: labels, answers and tokens are those of the router."""
    overrides = ["switching.segment=6", f"switching.rollouts={rollouts}", f"switching.ties={ties}"]
    arms, trained = arms_of(study(folder, *overrides, "switching.host=sft"), tmp_path)
    assert arms.router.labels.label.tolist() == trained.lesson.labels.label.tolist()
    router, switch = (arms.written(name, "report") for name in (ROUTER, SWITCH))
    assert router.texts == switch.texts
    assert router.tokens == switch.tokens
    assert len({*arms.router.labels.label.tolist()} - {-1}) > 1


def test_a_graded_rule_teaches_everybody(folder: Path) -> None:
    """`score: f1` holds for the router as for the switcher."""
    config = study(folder, "switching.rollouts.score=f1", "switching.rollouts.questions=7")
    problem = Problem.open(config, "cpu")
    (one,) = open_settings(problem, switching_of(problem).turns)
    found = taught(one, switching_of(problem))
    assert [asked.rule.name for asked in found] == ["f1"] * 7
    assert [asked.rule.name for asked in one.asked["search"]] == ["number"] * 30
    assert groups_of([*found, *found[:2]]).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_the_ceiling_of_routing_is_a_bound_from_below(folder: Path, tmp_path: Path) -> None:
    arms, _ = arms_of(study(folder), tmp_path)
    score = np.stack([arms.written(name, "report").score for name in arms.names])
    ceiling = arms.oracle("report")
    n, s = score.shape[1:]
    for i in range(n):  # by hand
        taken = []
        for j in range(s):
            others = np.delete(score[:, i], j, axis=1).mean(axis=1)
            best = np.flatnonzero(others >= others.max() - 1e-12)
            overall = [arms.written(arms.names[k], "search").score.mean() for k in best]
            taken.append(score[best[int(np.argmax(overall))], i, j])
        assert ceiling[i] == pytest.approx(np.mean(taken))
    assert ceiling.mean() <= score.mean(axis=2).max(axis=0).mean() + 1e-12


def test_one_answer_to_a_question_has_a_table_without_ceiling(folder: Path, tmp_path: Path) -> None:
    arms, _ = arms_of(study(folder, "tasks.0.generate.samples=1"), tmp_path)
    found = stand(arms, "report", [ROUTER])
    assert [line.label for line in found.lines] == [*arms.names, RANDOM, ROUTER, "candidates in turn"]
    assert ORACLE not in found.text().splitlines()[-1]
    assert "None" not in found.text()


def test_an_arm_that_cannot_be_is_left_out_or_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, _ = arms_of(study(folder), tmp_path)

    def nobody(self: Arms) -> Any:
        raise ConfigError("classifier: there are no rows to fit.")

    monkeypatch.setattr(Arms, "router", property(nobody))
    with caplog.at_level("WARNING", "mergefront"):
        assert ROUTER not in feasible(arms, ["report"])
    assert "router is left out: classifier: there are no rows to fit" in caplog.text
    with pytest.raises(ConfigError, match="no rows to fit"):
        stand(arms, "report", [ROUTER])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tasks.0.format=continuation", "tasks.0.generate=", "switching="], "tasks.0: has options"),
        (["tasks.1.generate.samples=2"], "tasks.1.generate.samples: found 2 \\(wanted 4 as in tasks.0"),
        (["parents.experts.router=sft"], "found 'router', which an arm is called"),
    ],
)
def test_studies_whose_arms_cannot_be_compared(folder: Path, overrides: list[str], said: str) -> None:
    text = (folder / "study.yaml").read_text()
    second = "  - {path: questions.jsonl, name: again, format: generation, generate: {match: number, samples: 4}}\n"
    (folder / "two.yaml").write_text(text.replace("switching:", second + "switching:"))
    with pytest.raises(ConfigError, match=said):
        check_arms(load_study_file(folder / "two.yaml", overrides))


def test_texts_that_end_answers_cannot_be_inserted(folder: Path) -> None:
    overrides = ["switching.last=sft", "switching.segment=1", 'switching.closing="So\\n\\n"']
    config = study(folder, *overrides)
    problem = Problem.open(config, "cpu")
    with pytest.raises(
        ConfigError, match=r"switching\.closing: contains .* at which answers of tasks\.0 end"
    ):
        open_settings(problem, switching_of(problem).turns)


def test_prompts_that_do_not_fit_are_named_before_anything_is_tried(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "long"
    place.mkdir()
    (place / "study.yaml").write_text((folder / "study.yaml").read_text())
    questions(place / "questions.jsonl", 59)
    with (place / "questions.jsonl").open("a") as stream:
        stream.write('{"question": "' + "x" * 600 + '", "answer": "2"}\n')
    problem = Problem.open(load_study_file(place / "study.yaml"), "cpu")
    with pytest.raises(ConfigError, match=r"tasks\.0: prompt \d+ \('Question: xxx.*wanted 512 together"):
        open_settings(problem, switching_of(problem).turns)


@pytest.mark.parametrize(
    ("first", "last", "segment"), [("dpo", "dpo", 3), ("dpo", None, 6), (None, "dpo", 4)]
)
def test_ends_that_leave_no_choice(folder: Path, first: str | None, last: str | None, segment: int) -> None:
    given = {"first": first, "last": last, "segment": segment}
    overrides = [f"switching.{key}={value}" for key, value in given.items() if value is not None]
    with pytest.raises(ConfigError, match="leave no segment of 6 tokens to choose an author for"):
        study(folder, *overrides)
    assert study(folder, *overrides, f"switching.segment={segment - 1}")


def test_ties_may_teach() -> None:
    scores = [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.5, 0.45, 0.0], [0.0, 1.0, 0.95]]
    assert label(scores, 0.1).label.tolist() == [-1, -1, -1, -1]
    prefer = [[0.3, 0.2, 0.1]] * 4
    settled = label(scores, 0.1, prefer)
    assert settled.label.tolist() == [1, -1, 0, 1]
    assert settled.kept.tolist() == [True, False, True, True]
    stay = label(scores, 0.1, [[0.3, 0.2, 1.1]] * 4)
    assert stay.label.tolist() == [2, -1, 0, 2]
