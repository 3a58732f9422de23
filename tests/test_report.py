"""The report of synthetic studies: every picture and the page, for odd studies too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from objectives.evaluator import Evaluation
from objectives.metrics import get_metric
from objectives.outcomes import Outcomes
from search.evidence import EvidenceFolder
from search.space import Recipe
from search.storage import StudyStore
from search.study import BASELINES

LAYERS = 4
GROUPS = (
    "embeddings",
    *(f"layer.{i}.{component}" for i in range(LAYERS) for component in ("attention", "mlp")),
    "final_norm",
)
PARTS = ("where", "revision", "sha256", "licence")


def answers(coefficients: Sequence[float], n: int, seed: int, odd: str = "") -> Outcomes:
    """Answers of a merge in a world with a tension: its first half of groups makes it accurate, its last over-confident."""
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
                kind: dict(zip(PARTS, (f"/models/{kind} $x$ & <co>", None, kind[1] * 64, "apache-2.0"), strict=True))
                for kind in ("pre", "post")
            },
        },
    )
    store.set_attribute("trials", search)
    config = {
        "schema": 1,
        "name": name,
        "parents": {"pre": "/models/pre $x$ & <co>", "post": "/models/post"},
        "tasks": [{"path": "/data/north.jsonl", "name": "north"}, {"path": "/data/south.jsonl", "name": "south"}],
        "objectives": list(objectives),
        "trials": search,
    }
    store.set_attribute("config", config)
    draw = np.random.default_rng(5)
    recipes = [(kind, np.full(len(groups), c)) for kind, c in BASELINES]
    center = np.linspace(1.1, 0.0, len(groups))
    for i in range(search):
        spread = 0.45 if i < search // 3 else 0.2
        shift = draw.uniform(-0.35, 0.35)
        recipes.append(("search", np.clip(center + shift + spread * draw.standard_normal(len(groups)), -0.2, 1.2)))
    for number, (kind, x) in enumerate(recipes):
        coefficients = dict(zip(groups, x.tolist(), strict=True))
        recipe = Recipe("linear", coefficients)
        with store.exclusive():
            trial = store.claim(
                kind, coefficients, (-0.2, 1.2), {"method": "linear", "recipe": recipe.key}, {}
            )
        if odd == "failed" and number == len(recipes) - 1:
            store.fail(trial.number, "out of memory <script>")
            continue
        used = x * 0 + 0.5 if odd == "identical" else x
        found = {split: evaluation(answers(used, questions, seed, odd)) for split, seed in (("search", 1), ("report", 2))}
        store.annotate(trial.number, "evidence", evidence.save(found["search"]))
        store.complete(trial.number, [metric.value(found["search"].outcomes) for metric in metrics])
        if report:
            store.set_attribute(f"report:{trial.number}", evidence.save(found["report"]))
    return store


def evaluation(outcomes: Outcomes) -> Evaluation:
    """Evidence with these outcomes."""
    score = np.log(np.maximum(outcomes.probability, 1e-30)).astype(np.float32)
    return Evaluation(outcomes, score, np.ones_like(score), np.ones(len(outcomes), np.float32), 1, "d" * 64)
