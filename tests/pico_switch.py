"""A study of three pico candidates that take turns, and the commands `mergefront switch` on it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from typer.testing import CliRunner

from search.cli.console import stderr_console
from search.cli.main import app
from tests.pico import CHAT_TEMPLATE, pico_tokenizer, save_experts

EVEN = list(range(0, 100, 2))  # random models write such a number often enough to differ by chance
STUDY = """
schema: 1
name: turns
parents: {{pre: {pre}, experts: {{sft: {sft}, dpo: {dpo}}}}}
tasks:
  - {{path: questions.jsonl, format: generation,
      generate: {{match: number, samples: 4, max_new_tokens: 6, temperature: 1.0}}}}
switching: {{segment: 2, margin: 0.0, rollouts: {{completions: 2}}}}
"""


def questions(file: Path, n: int) -> None:
    """Writes questions that every even number below 100 answers."""
    rows = [{"question": f"Letter {i}?", "answer": EVEN} for i in range(n)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_switch_study(folder: Path) -> Path:
    """A study file with three candidates and 60 questions, and `switcher`, trained on it; returns the folder."""
    parents = save_experts(folder, ["sft", "dpo"])
    for one in parents.values():  # with a chat template, as post-trained models have
        pico_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(one)
    (folder / "study.yaml").write_text(STUDY.format(**parents))
    questions(folder / "questions.jsonl", 60)
    found = run(folder, "train", "study.yaml", "--out", "switcher")
    assert found.splitlines()[-1] == "switcher"
    return folder


def run(folder: Path, *arguments: str) -> str:
    """What a command prints; its exception is raised."""
    stderr_console.cache_clear()  # it holds the runner's stream of the last call
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, ["switch", *arguments], catch_exceptions=False)
    finally:
        os.chdir(before)
        logging.getLogger("mergefront").handlers.clear()  # they write to the runner's stream, too
    assert result.exit_code == 0, result.output
    return result.stdout
