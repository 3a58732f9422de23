"""A merge as a mergekit config: `linear`, not normalised, with one weight a tensor however it was computed.

mergekit resolves a weight by the first filter that is a substring of the tensor's name. So `layers.1` also matches
`layers.10`, and a gradient list gives final norm and head the weight of the first layer. Here every filter is tested
against every tensor name; what the config does to each tensor is simulated before it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search.errors import ExportError
from search.merging.header import shown
from search.merging.parents import Parents

MERGEKIT = "0.1.5"  # older ones lose q_norm and k_norm of some architectures without a word
_NEOX_BUFFER = "rotary_emb.inv_freq"

Pair = tuple[float, float]
Filters = list[tuple[str, Pair]]


def make_filters(weights: Mapping[str, Pair]) -> Filters:
    """Few filters of whole name parts that give every tensor its own weights under mergekit's rule.

    For each tensor this is the shortest dotted prefix that occurs in names of equal weights only. A name that occurs
    inside names of other weights goes whole, after those. One weight for everything needs no filter: `[("*", w)]`.

    >>> make_filters({"h.1.a": (1.0, 0.0), "h.1.b": (1.0, 0.0), "h.10.a": (0.5, 0.5)})
    [('h.1.', (1.0, 0.0)), ('h.10.', (0.5, 0.5))]

    Raises:
        ExportError: no filter list can tell the tensors apart.
    """
    if len(set(weights.values())) == 1:
        return [("*", next(iter(weights.values())))]
    pure: dict[str, Pair | None] = {}
    chosen: dict[str, Pair] = {}
    whole: dict[str, Pair] = {}
    for name in natural(weights):
        for prefix in _prefixes(name):
            if prefix not in pure:
                found = {pair for other, pair in weights.items() if prefix in other}
                pure[prefix] = found.pop() if len(found) == 1 else None
            if pure[prefix] is not None:
                chosen[prefix] = weights[name]
                break
        else:
            whole[name] = weights[name]
    # A longer name is never a substring of a shorter one, so from long to short each finds its own filter first.
    filters = [*chosen.items(), *sorted(whole.items(), key=lambda item: -len(item[0]))]
    for name, pair in weights.items():
        if first_match(name, filters) != pair:
            raise ExportError(f"tensor {shown(name)}: mergekit's filters cannot address it alone.")
    return filters


def first_match(name: str, filters: Iterable[tuple[str, Pair]]) -> Pair | None:
    """The weights that mergekit gives a tensor; None if no filter matches, for which mergekit stops."""
    return next((pair for text, pair in filters if text == "*" or text in name), None)


def config_weights(parents: Parents, weights: Mapping[str, Pair]) -> dict[str, Pair]:
    """Weights of every name that mergekit may ask for: the merged tensors, tied aliases, and stored buffers.

    An alias gets the weights of what it is tied to. A buffer, which transformers computes itself, is post's.
    """
    aliases = {alias: weights[target] for alias, target in parents.tied.items()}
    return {**weights, **aliases, **dict.fromkeys(parents.ignored, (0.0, 1.0))}


def config_text(
    parents: Parents, weights: Mapping[str, Pair], places: tuple[str, str], dtype: str, header: Sequence[str]
) -> str:
    """The text of `mergekit_config.yml`.

    Args:
        weights: of the merged tensors, as `tensor_weights` gives them.
        places: absolute folder or hub id of `pre` and `post`.
        dtype: of the merged tensors.
        header: comment lines that come first.
    """
    same = len(set(weights.values())) == 1
    filters = make_filters(weights if same else config_weights(parents, weights))
    pre, post = (_model(place) for place in places)
    lines = [f"# {shown(line)}".rstrip() for line in header]
    lines += ["merge_method: linear"]
    # Without a base model mergekit takes config and tokenizer from one of the parents at random.
    lines += [f"base_model: {post}", "models:"]
    for place, index in ((pre, 0), (post, 1)):
        lines += [f"  - model: {place}", "    parameters:"]
        if same:
            lines.append(f"      weight: {number(filters[0][1][index])}")
            continue
        lines.append("      weight:")
        lines += [
            f"        - {{filter: {quoted(text)}, value: {number(pair[index])}}}" for text, pair in filters
        ]
    lines += ["parameters:", "  normalize: false", "dtype: float32", f"out_dtype: {dtype}"]
    return "\n".join(lines) + "\n"


def read_config_weights(path: Path, names: Iterable[str]) -> dict[str, Pair]:
    """What a mergekit config, as `config_text` writes it, gives each of these tensors.

    Raises:
        ExportError: it cannot be read, is not of that form, or has no weight for a tensor.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        config = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        sides = [_settings(model["parameters"]["weight"]) for model in config["models"]]
        fixed = config["merge_method"], config["parameters"]["normalize"], config["dtype"], len(sides)
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ExportError(f"{path}: not a config that mergefront wrote ({reason}).") from error
    if fixed != ("linear", False, "float32", 2):
        raise ExportError(f"{path}: found {fixed}, wanted linear, normalize false, float32 and two models.")
    found = {}
    for name in names:
        pre, post = (
            next((value for text, value in side if text == "*" or text in name), None) for side in sides
        )
        if pre is None or post is None:
            raise ExportError(f"{path}: no filter matches tensor {shown(name)}.")
        found[name] = (pre, post)
    return found


def caveats(parents: Parents) -> list[str]:
    """What stands between this config and mergekit, one line each."""
    if parents.config.model_type == "gpt_neox" and not any(_NEOX_BUFFER in name for name in parents.ignored):
        return [
            f"mergekit {MERGEKIT} asks GPT-NeoX parents for buffers that newer transformers do not store, and stops "
            "without them; export with --weights instead"
        ]
    return []


def place_of(where: str, revision: str | None) -> str:
    """A parent as mergekit finds it again: an absolute folder, or `org/name@commit`."""
    folder = Path(where).expanduser()
    if folder.exists():
        return str(folder.absolute())
    name, _, asked = where.partition("@")
    exact = revision or asked
    return f"{name}@{exact}" if exact else name


def natural(names: Iterable[str]) -> list[str]:
    """Sorted with layer 2 before layer 10."""
    return sorted(
        names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]
    )


def number(value: float) -> str:
    """The shortest text that YAML 1.1 and 1.2 read as this very float64."""
    text = repr(float(value))
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text  # 1e-05 is a string in YAML 1.1


def quoted(text: str) -> str:
    """A YAML scalar in double quotes, on one line, whatever the text holds."""
    escaped = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escaped.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) + "." for i in range(len(parts) - 1)] + [name]


def _model(place: str) -> str:
    # mergekit splits plain text at '+' (LoRA) and '@' (revision), even in the path of a folder.
    if place.startswith("/") and ("+" in place or "@" in place):
        return f"{{model: {{path: {quoted(place)}}}}}"
    return quoted(place)


def _settings(value: Any) -> list[tuple[str, float]]:
    if isinstance(value, float):
        return [("*", value)]
    return [(str(item["filter"]), float(item["value"])) for item in value]
