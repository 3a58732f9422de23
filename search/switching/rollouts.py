"""Rollouts: how well a response ends if this candidate writes next, for every candidate, from the same place.

For each question (Feng et al. 2025, arXiv 2510.09913):

1. A response is written by random switching and cut at a border between 10 and 90 % of its segments: the trace.
2. From there every candidate writes one segment.
3. Each is completed k times by random switching; a candidate's score is the mean over its completions.

The paper completes one segment of each candidate. `branches` draws several: a switcher chooses before it sees the
segment, so what it has to learn is the mean over them. All candidates draw with the same random numbers.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from objectives.generation.sampler import uniforms
from objectives.questions.matching import Rule
from search.errors import ConfigError, EvaluationError
from search.storage.pieces import PieceStore
from search.switching.policies import Always, AtRandom
from search.switching.reader import Tokens
from search.switching.relay import Relay
from search.switching.response import Cost, Response, Start

CHUNK = 16  # questions a piece: what a killed job loses at most

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RolloutOptions:
    """How much is tried.

    Attributes:
        traces: for each question. branches: segments that each candidate writes after a trace.
        completions: of each segment. A score is the mean over branches x completions.
        first, last: shares of a trace's segments between which it is cut.
        seed: of everything that is drawn.

    Raises:
        ConfigError: a value out of its range.
    """

    traces: int = 1
    branches: int = 1
    completions: int = 16
    first: float = 0.1
    last: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("traces", "branches", "completions"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"switching.rollouts.{name}: found {getattr(self, name)} (wanted 1 or more)."
                )
        if not 0.0 <= self.first <= self.last <= 1.0:
            raise ConfigError(
                f"switching.rollouts.cut: found {self.first:g} to {self.last:g} (wanted shares, the smaller first)."
            )


@dataclass(frozen=True)
class Asked:
    """A question for a relay.

    Attributes:
        key: its identity. prompt: token ids. accepted, rule: what is right.
    """

    key: str
    prompt: Tokens
    accepted: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What was tried.

    Attributes:
        question: `(m,)` index of each trace's question. starts: the traces.
        scores: `(m, n)` float64 in [0, 1], the mean score if candidate n writes next; higher is better.
        cost: tokens of this run alone; what was stored is not counted again.
        computed, reused: questions.
    """

    question: Integers
    starts: tuple[Start, ...]
    scores: Floats
    cost: Cost
    computed: int
    reused: int
    seconds: float


def roll(
    relay: Relay,
    questions: Sequence[Asked],
    options: RolloutOptions,
    store: PieceStore,
    facts: Mapping[str, Any],
    watch: Callable[[int, int, bool], None] | None = None,
) -> Rollouts:
    """Rollouts of all questions; finished pieces are found in the store, so that a killed run goes on.

    Args:
        facts: what identifies the candidates, such as their digests.
        watch: called with (questions done, questions, whether the last ones were stored).

    Raises:
        ConfigError: prompts that do not fit. EvaluationError: probabilities that are not numbers. DiskError.
    """
    began = time.monotonic()
    about = {
        **facts,
        "names": list(relay.names),
        "turns": asdict(relay.turns),
        "decoding": [relay.decoding.temperature, relay.decoding.top_p, relay.decoding.max_new_tokens],
        "stops": [list(relay.stopping.stops), list(relay.stopping.until)],
        "options": asdict(options),
    }
    question: list[int] = []
    starts: list[Start] = []
    scores: list[Floats] = []
    cost, counts = Cost(), {True: 0, False: 0}
    with store.writing():
        for first in range(0, len(questions), CHUNK):
            part = questions[first : first + CHUNK]
            own = {
                **about,
                "questions": [[list(q.prompt), list(q.accepted), q.rule.name] for q in part],
            }
            found = store.read("rollouts", own)
            stored = found is not None
            if found is None:
                found, spent = _rolled(relay, part, options)
                store.write("rollouts", own, found)
                cost += spent
            rows = _unpacked(part, found)
            question += [first + index for index, _ in rows]
            starts += [start for _, start in rows]
            scores.append(found["scores"].numpy())
            counts[stored] += len(part)
            if watch is not None:
                watch(first + len(part), len(questions), stored)
    every = np.concatenate([np.zeros((0, len(relay.names))), *scores])
    return Rollouts(
        np.array(question, dtype=np.int64),
        tuple(starts),
        every,
        cost,
        counts[False],
        counts[True],
        time.monotonic() - began,
    )


def derived(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose: no two draw the same numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:6], "little")


def _rolled(
    relay: Relay, questions: Sequence[Asked], options: RolloutOptions
) -> tuple[dict[str, torch.Tensor], Cost]:
    """Traces and scores of some questions, as they are stored."""
    n, b, k = len(relay.names), options.branches, options.completions
    lots = {step: AtRandom(n, derived(options.seed, f"{step} authors")) for step in ("trace", "completion")}
    begun = [Start(one.prompt, r) for one in questions for r in range(options.traces)]
    traces, cost = relay.run(begun, lots["trace"], derived(options.seed, "trace"), whole=options.traces)
    owner, starts = [], []
    for at, trace in enumerate(traces):
        start = _cut(trace, options)
        if start is not None:
            owner.append(at // options.traces)
            starts.append(start)
    branched: list[list[Response]] = []
    for author in range(n):
        rows = [replace(start, sample=start.sample * b + i) for start in starts for i in range(b)]
        found, spent = relay.run(rows, Always(author), branch_seed(options), segments=1, whole=b)
        branched.append(found)
        cost += spent
    open_ = [
        Start(
            one.start.prompt,
            one.start.sample * k + j,
            tuple(one.tokens),
            tuple(one.authors),
            one.called,
        )
        for found in branched
        for one in found
        if one.finish is None
        for j in range(k)
    ]
    completed, spent = relay.run(open_, lots["completion"], derived(options.seed, "completion"), whole=k)
    cost += spent
    rest = iter(completed)
    scores = np.empty((len(starts), n, b))
    for author, found in enumerate(branched):
        for at, one in enumerate(found):
            ends = [one] if one.finish is not None else [next(rest) for _ in range(k)]
            asked = questions[owner[at // b]]
            scores[at // b, author, at % b] = np.mean([_score(relay, asked, end) for end in ends])
    return _packed(owner, starts, scores.mean(axis=2)), cost


def branch_seed(options: RolloutOptions) -> int:
    """The seed of what candidates write after a trace; of whole answers, where a segment is one."""
    return derived(options.seed, "branch")


def _cut(trace: Response, options: RolloutOptions) -> Start | None:
    """The trace up to one of the borders at which an author was chosen; None if none was."""
    if not trace.free:
        return None
    seed = derived(options.seed, "cut")
    number = uniforms(trace.start.prompt, seed, trace.start.sample, 1)[0]
    share = options.first + (options.last - options.first) * number
    at = trace.free[min(int(share * len(trace.free)), len(trace.free) - 1)]
    return replace(trace.start, tokens=tuple(trace.tokens[:at]), authors=tuple(trace.authors[:at]))


def _score(relay: Relay, asked: Asked, response: Response) -> float:
    (text,) = relay.tokenizer.batch_decode(
        [response.tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return asked.rule.score(relay.stopping.cut(str(text)), asked.accepted)


def _packed(owner: Sequence[int], starts: Sequence[Start], scores: Floats) -> dict[str, torch.Tensor]:
    lengths = [len(start.tokens) for start in starts]
    return {
        "question": torch.tensor(owner, dtype=torch.int64),
        "sample": torch.tensor([start.sample for start in starts], dtype=torch.int64),
        "length": torch.tensor(lengths, dtype=torch.int64),
        "tokens": torch.tensor([t for start in starts for t in start.tokens], dtype=torch.int64),
        "authors": torch.tensor([a for start in starts for a in start.authors], dtype=torch.int8),
        "scores": torch.from_numpy(np.ascontiguousarray(scores)),
    }


def _unpacked(questions: Sequence[Asked], found: Mapping[str, torch.Tensor]) -> list[tuple[int, Start]]:
    ends = found["length"].cumsum(0).tolist()
    rows = []
    for owner, sample, length, end in zip(
        found["question"].tolist(), found["sample"].tolist(), found["length"].tolist(), ends, strict=True
    ):
        tokens, authors = (found[name][end - length : end].tolist() for name in ("tokens", "authors"))
        rows.append((owner, Start(questions[owner].prompt, sample, tuple(tokens), tuple(authors))))
    if len(rows) != len(found["scores"]):
        raise EvaluationError("rollouts: traces and scores of a stored piece do not fit together.")
    return rows
