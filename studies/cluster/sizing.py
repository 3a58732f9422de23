"""What a search over large models takes: memory, disk, tokens, hours, bytes; computed from public configurations.

    python studies/cluster/sizing.py
    python studies/cluster/sizing.py --trials 300 --questions 2000 --tokens 150 --workers 64 --rate 7B=9000

Parameters are counted from the shapes that each configuration names. A worker's memory is the formula of `mergefront
check` (`search/running/check.py`): a live model of `merge.dtype`, and for methods that select by magnitude four
bytes for
each parameter of each expert, at most 4 GiB (`search/merging/blend.py: RANKS_BYTES`); the parents stay on disk, mapped.

ASSUMPTIONS, to be replaced by your own: `FLOPS` and `ACCELERATOR` (what one accelerator does and holds; --rate sets
tokens a second outright), `DISK` (bytes a second from the parents' disk). Measured by studies/bench, on a CPU: a merge
of two parents that are in memory takes 2.3 times as long as copying the model (`MERGE`, `COPY`), and the 135M model
scores `CPU_RATE` tokens a second.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass

from search.merging.blend import RANKS_BYTES
from search.merging.space import UNIFORM_LINE

GIB = 2**30
MERGE = 2.3  # times a copy of the model
COPY = 513 * 2**20 / (0.093 / 2.32)  # bytes a second
CPU_RATE = 459.0  # tokens a second
# ASSUMPTIONS:
FLOPS = 2e14  # floating-point operations a second, achieved: a fifth of what an H100 SXM promises in bfloat16
ACCELERATOR = 72 * GIB  # what a model and its activations may take of 80 GB
ACTIVATIONS = 1.1  # times the live model: with the activations of one batch
DISK = 2.0e9  # bytes a second from a local NVMe disk, where the parents do not fit into the page cache


@dataclass(frozen=True)
class Decoder:
    """A decoder as its public `config.json` describes it; `experts` of `active` a token in every layer, 0 if dense."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False
    head: int | None = None
    experts: int = 0
    active: int = 0

    def _parameters(self, experts: int) -> int:
        head = self.head or self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.key_value_heads)
        feed_forward = 3 * self.hidden * self.feed_forward * max(1, experts)
        router = self.hidden * self.experts
        layer = attention + feed_forward + router + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden

    @property
    def parameters(self) -> int:
        """All of them; biases, of which these have none or hardly any, left out."""
        return self._parameters(self.experts)

    @property
    def working(self) -> int:
        """Parameters that a token meets."""
        return self._parameters(self.active)


# Sizes from the configurations that are published with the models.
MODELS: Mapping[str, Decoder] = {
    "135M": Decoder(30, 576, 1536, 9, 3, 49_152, tied=True),  # SmolLM2-135M
    "7B": Decoder(32, 4096, 14_336, 32, 8, 32_000),  # Mistral-7B-v0.1
    "70B": Decoder(80, 8192, 28_672, 64, 8, 128_256),  # Llama-3.1-70B
    "MoE 8x7B": Decoder(32, 4096, 14_336, 32, 8, 32_000, experts=8, active=2),  # Mixtral-8x7B-v0.1
}


def rate_of(model: Decoder) -> float:
    """Tokens a second of scoring: two operations a parameter and token, one accelerator at work at a time."""
    return FLOPS / (2.0 * model.working)


@dataclass(frozen=True)
class Study:
    """What is asked for. `tokens`: of a question with all its options. `report`: questions of the report split."""

    trials: int = 200
    questions: int = 1000
    report: int = 2000
    on_front: int = 20
    tokens: int = 150
    workers: int = 8
    experts: int = 1
    bytes: int = 2  # of a number, bfloat16


@dataclass(frozen=True)
class Size:
    """What it takes: bytes, seconds, and hours of the search and of the report split (all workers busy).

    Attributes:
        merge: with the parents in the page cache. cold: reading them from disk.
    """

    live: float
    ranks: float
    parents: float
    moved: float
    merge: float
    cold: float
    score: float
    search: float
    report: float
    tokens: float

    @property
    def accelerators(self) -> int:
        return math.ceil(ACTIVATIONS * self.live / ACCELERATOR)


def size(model: Decoder, rate: float, study: Study) -> Size:
    """The formulas, for P parameters of b bytes and E post-trained models.

    live = P b; parents = (1 + E) P b; a merge reads all parents and writes one model; a trial merges and scores
    questions x tokens; search = (baselines + trials) x trial / workers; report = as many rounds as all workers need
    for front and baselines, of merge + report questions x tokens.
    """
    live = float(model.parameters * study.bytes)
    parents = (1 + study.experts) * live
    merge = MERGE * live / COPY * (2 + study.experts) / 3.0  # measured with one post-trained model
    score = study.questions * study.tokens / rate
    baselines = len(UNIFORM_LINE) if study.experts == 1 else len(UNIFORM_LINE) + study.experts
    every = baselines + study.trials
    reported = study.on_front + baselines
    return Size(
        live,
        float(min(4 * model.parameters * study.experts, RANKS_BYTES)),
        parents,
        parents + live,
        merge,
        max(merge, parents / DISK),
        score,
        every * (merge + score) / study.workers / 3600.0,
        math.ceil(reported / study.workers) * (merge + study.report * study.tokens / rate) / 3600.0,
        float(every * study.questions * study.tokens + reported * study.report * study.tokens),
    )


HEAD = (
    "model|parameters|live model, GiB|ranks, GiB|parents on disk, GiB|a merge moves, GiB|merge (cold), s|accelerators|"
    "tokens/s|score, s|search, hours|report split, hours|tokens"
)


def table(study: Study, rates: Mapping[str, float]) -> str:
    """One row a model, as Markdown; `rates` replaces what is assumed of a model's tokens a second."""
    rows = [HEAD.split("|"), ["---"] * (HEAD.count("|") + 1)]
    for name, model in MODELS.items():
        rate = rates.get(name, CPU_RATE if name == "135M" else rate_of(model))
        found = size(model, rate, study)
        gib = (f"{part / GIB:.1f}" for part in (found.live, found.ranks, found.parents, found.moved))
        rows.append(
            [
                name,
                f"{model.parameters / 1e9:.2f}B",
                *gib,
                f"{found.merge:.1f} ({found.cold:.1f})",
                "CPU" if name == "135M" else str(found.accelerators),
                f"{rate:,.0f}",
                f"{found.score:,.0f}",
                f"{found.search:.1f}",
                f"{found.report:.1f}",
                f"{found.tokens / 1e6:.0f}M",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    defaults = Study()
    for key, value in vars(defaults).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
    parser.add_argument(
        "--rate", action="append", default=[], metavar="MODEL=TOKENS", help="tokens a second of a worker"
    )
    arguments = vars(parser.parse_args())
    rates: dict[str, float] = {}
    for text in arguments.pop("rate"):
        name, _, value = text.partition("=")
        if name not in MODELS or not value:
            parser.error(f"--rate {text}: wanted MODEL=TOKENS, a model of {', '.join(MODELS)}")
        rates[name] = float(value)
    study = Study(**arguments)
    print(
        f"{study.trials} trials beyond the baselines, {study.questions} search and {study.report} report questions of "
        f"{study.tokens} tokens, {study.on_front} trials on the front, {study.workers} workers, "
        f"{study.experts} post-trained model(s), {study.bytes} bytes a number\n"
    )
    print(table(study, rates))


if __name__ == "__main__":
    main()
