"""A merge as a mergekit config: of weighted sums `linear`, not normalised, with one weight a tensor however it was
computed; of the other methods mergekit's own, with our defaults spelt out.

mergekit resolves a weight by the first filter that is a substring of the tensor's name. So `layers.1` also matches
`layers.10`, and a gradient list gives final norm and head the weight of the first layer. Here every filter is tested
against every tensor name; what the config does to each tensor is simulated before it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from objectives.printable import shown
from search.checkpoints.parents import Parents
from search.config.methods import OPTIONS
from search.errors import ExportError
from search.merging.blend import Blend, Weights

CONFIG = "mergekit_config.yml"
MERGEKIT = "0.1.5"  # older ones lose q_norm and k_norm of some architectures without a word
_NEOX_BUFFER = "rotary_emb.inv_freq"

Filters = list[tuple[str, Weights]]


def make_filters(weights: Mapping[str, Weights]) -> Filters:
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
    pure: dict[str, Weights | None] = {}
    chosen: dict[str, Weights] = {}
    whole: dict[str, Weights] = {}
    for name in natural(weights):
        for prefix in _prefixes(name):
            if prefix not in pure:
                found = {each for other, each in weights.items() if prefix in other}
                pure[prefix] = found.pop() if len(found) == 1 else None
            if pure[prefix] is not None:
                chosen[prefix] = weights[name]
                break
        else:
            whole[name] = weights[name]
    # A longer name is never a substring of a shorter one, so from long to short each finds its own filter first.
    filters = [*chosen.items(), *sorted(whole.items(), key=lambda item: -len(item[0]))]
    for name, each in weights.items():
        if first_match(name, filters) != each:
            raise ExportError(f"tensor {shown(name)}: mergekit's filters cannot address it alone.")
    return filters


def first_match(name: str, filters: Iterable[tuple[str, Weights]]) -> Weights | None:
    """The weights that mergekit gives a tensor; None if no filter matches, for which mergekit stops."""
    return next((each for text, each in filters if text == "*" or text in name), None)


def config_weights(parents: Parents, blend: Blend) -> dict[str, Weights]:
    """Weights of every name that mergekit may ask for: the merged tensors, tied aliases, and stored buffers.

    An alias gets the weights of what it is tied to. A buffer, which transformers computes itself, is the first
    expert's.
    """
    aliases = {alias: blend.weights[target] for alias, target in parents.tied.items()}
    first = tuple(float(place == 0) for place in range(len(parents.experts)))
    buffers = first if blend.method.kernel else (0.0, *first)
    return {**blend.weights, **aliases, **dict.fromkeys(parents.ignored, buffers)}


def parent_places(parents: Parents, found: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    """Where mergekit finds every parent, pre first: an adapter as what it was merged into pre to.

    Args:
        found: as from `search.checkpoints.origin.origins`.
    """
    return [
        str(one.folder)
        if label in parents.adapters
        else place_of(str(found[label]["where"]), found[label]["revision"])
        for label, one in zip(parents.labels, parents.everybody, strict=True)
    ]


def rebuild_header(
    parents: Parents, blend: Blend, found: Mapping[str, Mapping[str, str | None]]
) -> list[str]:
    """Comment lines of a config: how to rebuild the merge, from what exactly, and what stands in the way."""
    return [
        f"Rebuild it bit for bit with mergekit {MERGEKIT} or later:",
        f"  {rebuild_command(blend)}",
        *(f"{name:<4}  sha256 {facts['sha256']}  {facts['where']}" for name, facts in found.items()),
        *(f"CAUTION: {line}" for line in caveats(parents, blend)),
    ]


def config_text(
    parents: Parents, blend: Blend, places: Sequence[str], dtype: str, header: Sequence[str]
) -> str:
    """The text of `mergekit_config.yml`.

    Args:
        places: absolute folder or hub id of every parent, pre first.
        dtype: of the merged tensors.
        header: comment lines that come first.
    """
    same = len(set(blend.weights.values())) == 1
    filters = make_filters(blend.weights if same else config_weights(parents, blend))
    pre, *experts = (_model(place) for place in places)
    method, kernel = blend.method, blend.method.kernel
    lines = [f"# {shown(line)}".rstrip() for line in header]
    # Without a base model mergekit takes config and tokenizer from one of the parents at random.
    lines += [f"merge_method: {method.name}", f"base_model: {pre if kernel else experts[0]}", "models:"]
    for index, model in enumerate(experts if kernel else [pre, *experts]):
        lines += [f"  - model: {model}", "    parameters:"]
        for name, value in blend.options.items():
            if OPTIONS[name].each:
                lines.append(f"      {OPTIONS[name].mergekit}: {number(value)}")
        if same:
            lines.append(f"      weight: {number(filters[0][1][index])}")
            continue
        lines.append("      weight:")
        lines += [
            f"        - {{filter: {quoted(text)}, value: {number(each[index])}}}" for text, each in filters
        ]
    lines.append("parameters:")
    lines += [f"  {name}: {value}" for name, value in _shared(blend).items()]
    lines += ["dtype: float32", f"out_dtype: {dtype}"]
    return "\n".join(lines) + "\n"


def _shared(blend: Blend) -> dict[str, str]:
    """Parameters of the merge as a whole, as YAML writes them."""
    found = {"normalize": str(blend.method.normalize).lower()}
    if blend.method.kernel:
        found["rescale"] = str(blend.method.rescale).lower()
    each = {OPTIONS[name].mergekit: number(v) for name, v in blend.options.items() if not OPTIONS[name].each}
    return found | each


def check_config(path: Path, parents: Parents, blend: Blend) -> None:
    """Reads a mergekit config, as `config_text` writes it, and compares what it does to every tensor.

    Raises:
        ExportError: it cannot be read, is not of that form, or does something else; names the first difference.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        config = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        models = [dict(model["parameters"]) for model in config["models"]]
        sides = [_settings(parameters.pop("weight")) for parameters in models]
        found = config["merge_method"], config["dtype"], dict(config["parameters"]), models
    except (OSError, YAMLError, KeyError, TypeError, ValueError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ExportError(f"{path}: not a config that mergefront wrote ({reason}).") from error
    count = len(parents.experts) + (not blend.method.kernel)
    each = {OPTIONS[name].mergekit: v for name, v in blend.options.items() if OPTIONS[name].each}
    shared = YAML(typ="safe", pure=True).load(
        "{" + ", ".join(f"{name}: {value}" for name, value in _shared(blend).items()) + "}"
    )
    if found != (wanted := (blend.method.name, "float32", shared, [each] * count)):
        raise ExportError(f"{path}: found {shown(repr(found))}, wanted {wanted}. Export again.")
    for name, weights in blend.weights.items():
        known = tuple(
            next((value for text, value in side if text == "*" or text in name), None) for side in sides
        )
        if not _agree(known, weights):
            raise ExportError(
                f"{path}: tensor {shown(name)}: weights {known}, the recipe says {weights}. Export again."
            )


def _agree(known: Sequence[float | None], weights: Weights) -> bool:
    """Whether they are the same, but for the last bits that angles and lengths have on another kind of processor."""
    pairs = zip(known, weights, strict=True)
    return all(one is not None and math.isclose(one, other, abs_tol=1e-12) for one, other in pairs)


def caveats(parents: Parents, blend: Blend) -> list[str]:
    """What stands between this config and mergekit, one line each."""
    found = []
    if parents.config.model_type == "gpt_neox" and not any(_NEOX_BUFFER in name for name in parents.ignored):
        found.append(
            f"mergekit {MERGEKIT} asks GPT-NeoX parents for buffers that newer transformers do not store, and stops "
            "without them; export with --weights instead"
        )
    for label, folder in parents.adapters.items():
        found.append(
            f"{label} is the adapter {folder}; mergekit reads it merged into pre, from {parents.experts[label].folder}"
        )
    aliases = sorted(set(parents.tied).intersection(parents.pre.names))
    if blend.method.seeded and aliases:
        found.append(
            f"mergekit draws other random masks for the stored {aliases[0]} than for {parents.tied[aliases[0]]}, which "
            "config.json ties to it: its result is untied and not what was scored; export with --weights instead"
        )
    if blend.method.kernel:
        found.append(
            "mergekit ships the tokenizer of the base model, pre; the scores were made with the first expert's: "
            "copy it, or export with --weights"
        )
    return found


def rebuild_command(blend: Blend) -> str:
    """How mergekit makes the same weights, to the last bit."""
    command = f"mergekit-yaml {CONFIG} ./out"
    if blend.method.rescale:
        command = f"OMP_NUM_THREADS=1 {command}"  # it scales by sums over whole tensors
    return f"{command} --random-seed {blend.seed}" if blend.method.seeded else command


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
