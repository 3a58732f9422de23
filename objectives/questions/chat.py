"""Chat templates around prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from objectives.errors import ConfigError

PROBE = "ANSWER"


class Chat:
    """Wraps a prompt as a user's turn, up to where the assistant's answer starts."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"{where}.chat_template: the post parent's tokenizer has none. Set chat_template: false."
            )
        self._tokenizer = tokenizer
        self._where = where
        start = self.wrap("Question")
        turn = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": PROBE}]
        whole = self._render(turn, generate=False)
        between = whole[len(start) :].split(PROBE)[0] if whole.startswith(start) and PROBE in whole else ""
        self.space = between if between.isspace() else ""

    def wrap(self, prompt: str) -> str:
        return self._render([{"role": "user", "content": prompt}], generate=True)

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{self._where}.chat_template: the template fails ({reason}).") from error
        return str(rendered)


def rendered(messages: Sequence[Mapping[str, str]], tokenizer: Any, *, generate: bool) -> str:
    """Messages (role, content) in the tokenizer's chat template, with `generate` up to where the next answer starts.

    Raises:
        ConfigError: no chat template, or one that fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("prompts: chat_template is asked for, but the tokenizer has none. Set it to false.")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise ConfigError(f"prompts: the chat template fails ({reason}).") from error
    return str(text)
