"""Prompts for sampled answers, in two splits that share none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from objectives.errors import ConfigError


@dataclass(frozen=True)
class PromptSet:
    """Prompts of the search and the report split; `digest` is over all of them, in order."""

    search: tuple[str, ...]
    report: tuple[str, ...]
    digest: str

    def of(self, split: Literal["search", "report"]) -> tuple[str, ...]:
        """The prompts of one split."""
        return self.search if split == "search" else self.report


def load_prompts(path: str, limit: int | None, share: float, seed: int) -> PromptSet:
    """Reads JSON lines with `prompt` (or `question`), drops repeats, and splits them in the order of a hash.

    Args:
        limit: at most so many prompts. share: of them that steer the search. seed: of the hash.

    Raises:
        ConfigError: a file that cannot be read, a line without a prompt, or a side without prompts.
    """
    where = f"diversity.prompts: {path}"
    prompts = dict.fromkeys(read_prompt_file(Path(path), where))
    ranked = sorted(prompts, key=lambda text: hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest())[:limit]
    count = round(share * len(ranked))
    if not 0 < count < len(ranked):
        raise ConfigError(f"{where}: {len(ranked)} prompts leave one split empty. Give more of them.")
    digest = hashlib.sha256(json.dumps([ranked, count]).encode()).hexdigest()
    return PromptSet(tuple(ranked[:count]), tuple(ranked[count:]), digest)


def read_prompt_file(path: Path, where: str) -> list[str]:
    """The prompts of JSON lines with `prompt` (or `question`), in order.

    Args:
        where: what an error names.

    Raises:
        ConfigError: a file that cannot be read, or a line without a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{where}: cannot be read: {reason}.") from error
    return [_prompt(line, f"{where}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is no JSON ({error}). Correct or remove it.") from error
    text = value.get("prompt", value.get("question")) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: has no text at 'prompt'. Correct or remove it.")
    return text
