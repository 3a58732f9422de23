"""Small studies without models, for tests of the storage alone."""

from __future__ import annotations

from optuna.distributions import FloatDistribution

from search.storage.store import StudyStore

OBJECTIVES = [("accuracy", True), ("ece", False)]
UNIT = FloatDistribution(0.0, 1.0)


def new_store(url: str, name: str = "s") -> StudyStore:
    store = StudyStore.create(url, name, OBJECTIVES)
    store.set_attribute("config", {"any": 1})
    return store


def claim(store: StudyStore, **coefficients: float) -> int:
    """Draws a trial for this process; returns its number."""
    with store.exclusive():
        values = coefficients or {"a": 0.5}
        said = {"recipe": "r"}
        return store.claim("search", values, dict.fromkeys(values, UNIT), said, {"tag": [1]}).number
