"""Reading YAML that cannot surprise: YAML 1.2 scalars, no duplicate keys, aliases or tags, bounded size and depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
)

from search.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16


def load_yaml(text: str, where: str) -> Any:
    """The plain Python value of one YAML 1.2 document.

    Args:
        text: the document.
        where: how errors call it, usually the file's path.

    Raises:
        ConfigError: too large or too deep, not YAML, more than one document, a duplicate key, an alias, anchor or tag.

    >>> load_yaml("{a: 1e-3, b: no, c: 012}", "x")
    {'a': 0.001, 'b': 'no', 'c': 12}
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(
            f"{where}: larger than {MAX_BYTES // 1024} KiB. A study file is a page of settings."
        )
    try:
        _check_events(text, where)
        return _yaml().load(text)
    except DuplicateKeyError as error:
        raise ConfigError(f"{_at(where, error)}: {_one_line(error.problem)}. Keep one of them.") from error
    except ConstructorError as error:
        raise ConfigError(f"{_at(where, error)}: {_one_line(error.problem)}.") from error
    except MarkedYAMLError as error:
        raise ConfigError(f"{_at(where, error)}: not valid YAML: {_one_line(error.problem)}.") from error
    except (YAMLError, ValueError, TypeError, RecursionError, OverflowError, AttributeError) as error:
        # ruamel lets some malformed scalars escape as plain Python errors.
        raise ConfigError(f"{where}: not valid YAML: {_one_line(error)}.") from error


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 2)
    yaml.allow_duplicate_keys = False
    return yaml


def _check_events(text: str, where: str) -> None:
    """Refuses what could explode or run code, before anything is constructed."""
    depth = documents = 0
    for event in _yaml().parse(text):
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ConfigError(f"{where}: holds more than one YAML document. Keep one study a file.")
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            raise ConfigError(
                f"{_line(where, event)}: anchors and aliases are not read. Write the value out."
            )
        if isinstance(event, NodeEvent) and getattr(event, "tag", None):
            raise ConfigError(f"{_line(where, event)}: tags (found '{event.tag}') are not read. Remove it.")
        if isinstance(event, CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{_line(where, event)}: nested deeper than {MAX_DEPTH} levels.")
        elif isinstance(event, CollectionEndEvent):
            depth -= 1


def _line(where: str, event: Any) -> str:
    return f"{where}, line {event.start_mark.line + 1}"


def _at(where: str, error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return where if mark is None else f"{where}, line {mark.line + 1}"


def _one_line(problem: object) -> str:
    return " ".join(str(problem).split())[:200].rstrip(".")


def apply_overrides(value: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies `space.high=1.2` or `tasks.0.limit=50` to a nested value in place.

    Raises:
        ConfigError: no `=`, or a path that leads nowhere. (Unknown last keys are left to the validation.)
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: wanted key=value, such as space.high=1.2.")
        target: Any = value
        *parents, last = key.strip().split(".")
        for part in parents:
            if isinstance(target, dict):
                target = target.setdefault(part, {})
            elif isinstance(target, list) and part.isdigit() and int(part) < len(target):
                target = target[int(part)]
            else:
                raise ConfigError(f"--set {override}: '{part}' leads nowhere in the study file.")
        new = load_yaml(text, f"--set {key}") if text.strip() else None
        if isinstance(target, dict):
            target[last] = new
        elif isinstance(target, list) and last.isdigit() and int(last) < len(target):
            target[int(last)] = new
        else:
            raise ConfigError(f"--set {override}: '{last}' leads nowhere in the study file.")
