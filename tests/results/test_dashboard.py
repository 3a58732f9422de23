"""The storage is a plain Optuna one: optuna-dashboard shows it unchanged, with the objectives' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import optuna_dashboard


def get(url: str, path: str) -> Any:
    """What the dashboard of a storage answers to a request."""
    environment: dict[str, Any] = {"PATH_INFO": path, "QUERY_STRING": ""}
    setup_testing_defaults(environment)
    status: list[str] = []
    app = optuna_dashboard.wsgi(url)
    body = b"".join(app(environment, lambda code, headers, exc_info=None: status.append(code)))
    assert status == ["200 OK"]
    return json.loads(body)


def test_the_dashboard_opens_a_study(finished_study: tuple[Path, str]) -> None:
    (study,) = get(finished_study[1], "/api/studies")["study_summaries"]
    assert study["study_name"] == "pico"
    detail = get(finished_study[1], f"/api/studies/{study['study_id']}")
    assert detail["objective_names"] == ["accuracy", "ece"]
    assert len(detail["trials"]) == 19
    assert detail["trials"][1]["state"] == "Complete"
