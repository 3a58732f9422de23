"""The first thing that is wrong with a study file, in one line: the key, what was found and what was wanted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from objectives.printable import printable

# What pydantic adds to the place of an error where a value may be of several types.
_NO_KEYS = ("[key]", "float", "str", "list[float]", "list[str]")
_MOST = 100  # characters of a key or a value that are shown


def explain(error: ValidationError, model: type[BaseModel], inside: Mapping[str, type[BaseModel]]) -> str:
    """One line on the first error, or on the first unknown key if there is one.

    Args:
        model: what was validated. inside: sections of it by their keys, where the annotation does not say.
    """
    details = error.errors()
    # A misspelt key often shows up twice, as unknown and as missing: the first says what to do.
    detail = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
    path = [part for part in detail["loc"] if part not in _NO_KEYS]
    key = ".".join(printable(str(part), limit=_MOST) for part in path)
    if detail["type"] == "extra_forbidden":
        hint = difflib.get_close_matches(str(path[-1])[:_MOST], _keys_at(path[:-1], model, inside), n=1)
        return f"{key}: unknown key." + (f" Did you mean '{hint[0]}'?" if hint else "")
    if detail["type"] == "missing":
        return f"{key}: missing."
    found = detail["input"]
    if detail["type"] == "model_type":
        return f"{key}: found {kind_of(found)}, wanted keys such as {_first_keys(path, model, inside)}."
    message = " ".join(detail["msg"].removeprefix("Value error, ").split()).rstrip(".")
    if detail["type"] != "value_error" and not isinstance(found, dict | list):
        message = f"found {_cut(repr(found))}: {message[0].lower()}{message[1:]}"
    message = _cut(message, 400)
    return f"{key}: {message}." if key else f"{message}."


def kind_of(value: object) -> str:
    """What a value is that should have been a section."""
    kinds = {type(None): "nothing", list: "a list", str: "plain text", bool: "a yes or no"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _first_keys(path: Sequence[Any], model: type[BaseModel], inside: Mapping[str, type[BaseModel]]) -> str:
    return ", ".join(_keys_at(path, model, inside)[:3]) or "a: b"


def _cut(text: str, limit: int = _MOST) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _keys_at(path: Sequence[Any], model: Any, inside: Mapping[str, type[BaseModel]]) -> list[str]:
    for index, part in enumerate(path):
        if isinstance(part, str) and not (index == 1 and path[0] == "preferences"):  # that is a name
            annotation = model.model_fields[part].annotation if part in model.model_fields else None
            model = inside.get(part, annotation)
    fields = getattr(model, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]
