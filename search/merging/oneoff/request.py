"""What a one-off merge is asked to be, checked as far as words go: nothing is opened, and torch is not needed.

    asked = read_request("ties", "./base", ["math=./math", "code=./code"], ["math=0.7"], ["density=0.3"])

Methods are those of `search.merging.methods.table` and four that no study can search: `tsv`, `wudi` and `fda`, which
work on whole sets of task vectors, and `lora_separate`, which works on the halves of adapters.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.config.methods import METHODS, OPTIONS
from search.config.sections import MAX_EXPERTS
from search.config.strict_yaml import load_yaml
from search.errors import ConfigError
from search.merging.anchors.options import AdaptOptions, AnchorOptions

TSV, WUDI, FDA, SEPARATE = "tsv", "wudi", "fda", "lora_separate"
KNOWN = (*METHODS, TSV, WUDI, FDA, SEPARATE)
START = "start"
_EXPERT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_MAX_STEPS = 1_000_000
_WUDI: dict[str, int | float] = {"scaling": 1.0, "steps": 300, "rate": 1e-5}


@dataclass(frozen=True)
class Request:
    """A merge that was asked for.

    Attributes:
        method: a name of `KNOWN`.
        pre, experts: folders or hub ids, experts by name.
        coefficients: of each expert, in the order of `experts`; empty where the method has none.
        options: every option of the method by its name in `--set`, given or not.
    """

    method: str
    pre: str
    experts: Mapping[str, str]
    coefficients: tuple[float, ...]
    options: Mapping[str, Any]

    @property
    def anchors(self) -> AnchorOptions:
        """The `anchors.` options of `fda`."""
        return AnchorOptions(**self._section("anchors."))

    @property
    def adapt(self) -> AdaptOptions:
        """The `adapt.` options of `fda`."""
        return AdaptOptions(**self._section("adapt."))

    def _section(self, prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): v for key, v in self.options.items() if key.startswith(prefix)}


def read_request(
    method: str, pre: str, experts: Sequence[str], weights: Sequence[str], settings: Sequence[str]
) -> Request:
    """The request in the words of the command line.

    Args:
        experts: `NAME=DIR`. weights: `NAME=NUMBER`. settings: `KEY=VALUE`.

    Raises:
        ConfigError: an unknown method, option or expert, one given twice or too few, a value out of its range.
    """
    if method not in KNOWN:
        raise ConfigError(f"'{method}' is no merge method. {_nearest(method, KNOWN)}")
    places = _experts(experts)
    if method in METHODS:
        fault = METHODS[method].fault(len(places))
        if fault is not None:
            raise ConfigError(f"{fault}.")
    options = _options(method, settings)
    return Request(method, pre, places, _coefficients(method, options, places, weights), options)


def _experts(given: Sequence[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    for name, place in _pairs("--expert", given, "math=./math"):
        if not _EXPERT.fullmatch(name) or name == "pre":
            raise ConfigError(f"--expert {name}: wanted a name of 1 to 32 of a-z, 0-9, _ and -, and not pre.")
        if name in places:
            raise ConfigError(f"--expert {name}: given twice. Name each expert once.")
        places[name] = place
    if not 1 <= len(places) <= MAX_EXPERTS:
        raise ConfigError(f"--expert: found {len(places)}, wanted 1 to {MAX_EXPERTS}, such as math=./math.")
    return places


def _coefficients(
    method: str, options: Mapping[str, Any], experts: Mapping[str, str], given: Sequence[str]
) -> tuple[float, ...]:
    found: dict[str, float] = {}
    for name, text in _pairs("--weight", given, "math=0.3"):
        if name not in experts:
            raise ConfigError(f"--weight {name}: there is no such expert. {_nearest(name, experts)}")
        if name in found:
            raise ConfigError(f"--weight {name}: given twice. Give one number for each expert.")
        found[name] = _number(f"--weight {name}", text)
    if method == FDA:
        start = options[START]
        if not isinstance(start, float):
            if found:
                raise ConfigError(
                    f"--weight: start={start} has none. Give start a number, or leave them out."
                )
            return ()
        default = start
    elif method in (TSV, WUDI):
        default = 1.0
    else:
        default = 1.0 / len(experts)
        if len(experts) == 1 and method in ("linear", "slerp") and not found:
            name = next(iter(experts))
            raise ConfigError(f"--weight: {method} of one expert needs one, such as --weight {name}=0.5.")
    each = tuple(found.get(name, default) for name in experts)
    if method in METHODS and METHODS[method].relative and not any(each):
        raise ConfigError(f"--weight: {method} takes a mean, so not all may be 0. Give one that is not.")
    return each


def _options(method: str, settings: Sequence[str]) -> dict[str, Any]:
    defaults = _defaults(method)
    given: dict[str, Any] = {}
    for key, text in _pairs("--set", settings, "density=0.3", empty=True):
        if key not in defaults:
            known = _nearest(key, defaults) if defaults else "It has none."
            raise ConfigError(f"--set {key}: {method} has no such option. {known}")
        if key in given:
            raise ConfigError(f"--set {key}: given twice. Keep one of them.")
        given[key] = _start(text) if key == START else _value(key, text, defaults[key])
    options = {**defaults, **given}
    if method == FDA:
        asked = Request(FDA, "", {}, (), options)
        if asked.anchors.init == "data":
            raise ConfigError("anchors.init: data takes token ids, which a command line has none of.")
        _ = asked.adapt
    elif method == WUDI:
        if not 0 <= options["steps"] <= _MAX_STEPS or not 0 < options["rate"] <= 1.0:
            raise ConfigError(
                f"wudi: {options['steps']} steps at rate {options['rate']:g} (wanted 0 to {_MAX_STEPS:,} steps, a rate "
                "above 0, at most 1)."
            )
    else:
        for key, value in options.items():
            fault = OPTIONS[key].fault(value) if key in OPTIONS else None
            if fault is not None:
                raise ConfigError(f"--set {key}: {fault}.")
        if not 0 <= options.get("seed", 0) < 2**32:
            raise ConfigError(f"--set seed: found {options['seed']}, wanted 0 to {2**32 - 1}.")
    return options


def _defaults(method: str) -> dict[str, Any]:
    if method == FDA:
        anchors, adapt = dataclasses.asdict(AnchorOptions()), dataclasses.asdict(AdaptOptions())
        return {
            START: "pre",
            **{f"anchors.{name}": value for name, value in anchors.items()},
            **{f"adapt.{name}": value for name, value in adapt.items()},
        }
    if method not in METHODS:
        return dict(_WUDI) if method == WUDI else {}
    kind = METHODS[method]
    return {name: OPTIONS[name].default for name in kind.options} | ({"seed": 0} if kind.seeded else {})


def _value(key: str, text: str, default: Any) -> Any:
    """A value of the default's type; what stands for none of them is left to who checks the range."""
    if isinstance(default, float) or default is None:
        return _number(f"--set {key}", text)
    value = load_yaml(text, f"--set {key}") if text.strip() else None
    if isinstance(default, tuple):
        several: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in several):
            raise ConfigError(f"--set {key}: found {text!r}, wanted numbers, such as [0.001, 0.01].")
        return tuple(float(one) for one in several)
    if isinstance(default, int) and type(value) is not int:
        raise ConfigError(f"--set {key}: found {text!r}, wanted a whole number.")
    return value


def _start(text: str) -> str | float:
    """`pre`, a number, or else a folder."""
    try:
        return _number("--set start", text)
    except ConfigError:
        if not text.strip() or text.strip().lower() in ("nan", "inf", "-inf"):
            raise
    return text


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: found {text!r}, wanted a number.")
    return value


def _pairs(
    option: str, given: Sequence[str], example: str, *, empty: bool = False
) -> Iterable[tuple[str, str]]:
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip() or not (value or empty):
            raise ConfigError(f"{option} {text}: wanted {example.partition('=')[0]}=..., such as {example}.")
        yield name.strip(), value


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Use one of {', '.join(names)}."
