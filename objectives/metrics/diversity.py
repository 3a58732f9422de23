"""How different the answers to one prompt are from each other: `distinct-1`, `distinct-2`, `self-bleu` and
`semantic-entropy`. The loss of it is a loss of alignment that accuracy and calibration do not show.

Each is computed per prompt over its s sampled answers and averaged over the prompts, so that a bootstrap over
prompts gives its interval. All depend on how the answers were drawn, and the lexical ones on how long they are:
compare models under one `Decoding` only. A study's preferences (`preferences.py`) are measured on the same answers
and kept with them.

Words are sacrebleu's `13a` tokens: split at white space and punctuation, case kept. An empty answer (no words) is
an answer like any other: equal to other empty ones, different from the rest.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from objectives.errors import ConfigError, EvaluationError
from objectives.evidence_file import checked_array, read_evidence, write_evidence
from objectives.metrics.bootstrap import checked_weights, interval, weighted_mean

if TYPE_CHECKING:
    # Not imported: they bring torch, which reading a board does not need.
    from sacrebleu.metrics.bleu import BLEU

    from objectives.generation.sampler import Generations
    from objectives.metrics.preferences import Preference


FORMAT = "mergefront-diversity-1"

Texts = Sequence[Sequence[str]]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def distinct_n(texts: Texts, n: int) -> Floats:
    """Different n-grams of a prompt's answers divided by all their n-grams.  (Li et al. 2016, arXiv 1510.03055)

    The paper divides by the number of words; dividing by the number of n-grams lets 1 be reached. An answer of
    fewer than n words is one n-gram, itself, so that short and empty answers count.

    Args:
        texts: s answers for each prompt. n: words in an n-gram.

    Returns:
        `(prompts,)` float64 in (0, 1]; higher is more diverse; equal answers have at most 1 / s.

    Raises:
        ConfigError: fewer than two answers to a prompt.

    >>> distinct_n([["a b", "a c"], ["yes", "yes"]], 1).tolist()
    [0.75, 0.5]
    """
    _require_answers(texts)
    values = []
    for answers in texts:
        grams = [gram for answer in answers for gram in _ngrams(_words(answer), n)]
        values.append(len(set(grams)) / len(grams))
    return np.array(values, dtype=np.float64)


def self_bleu(texts: Texts) -> Floats:
    """Mean BLEU of each answer against the prompt's other answers.  (Self-BLEU, Zhu et al. 2018, arXiv 1802.01886)

    sacrebleu's sentence BLEU: n-grams up to 4 (up to the answer's length where that is less: effective order),
    `13a` words, exponential smoothing of orders without a match, closest reference length; 0 without any
    common word. Among answers without words the BLEU is 1, between one with and one without 0.

    Args:
        texts: s answers for each prompt.

    Returns:
        `(prompts,)` float64 in [0, 1]; LOWER is more diverse, 1 when all answers are equal.

    Raises:
        ConfigError: fewer than two answers to a prompt.

    >>> self_bleu([["so be it", "so be it"], ["yes", "no"]]).tolist()
    [1.0, 0.0]
    """
    _require_answers(texts)
    values = []
    for answers in texts:
        scores = []
        for i, answer in enumerate(answers):
            others = [*answers[:i], *answers[i + 1 :]]
            if _words(answer):
                scores.append(min(1.0, _bleu().sentence_score(answer, others).score / 100.0))
            else:
                scores.append(0.0 if all(_words(other) for other in others) else 1.0)
        values.append(math.fsum(scores) / len(scores))
    return np.array(values, dtype=np.float64)


def semantic_clusters(prompts: Sequence[str], texts: Texts, equivalence: Equivalence) -> Integers:
    """Which answers to a prompt mean the same.  (Kuhn et al. 2023, arXiv 2302.09664, algorithm 1)

    An answer joins the first cluster whose first member it is equivalent to, or founds one. Texts that differ only
    in white space around them are equal; the predicate is asked once a prompt, for different non-empty texts.

    Args:
        prompts: n texts. texts: s answers for each. equivalence: the predicate.

    Returns:
        `(n, s)` int64, clusters numbered from 0 by their first member.

    Raises:
        ConfigError: fewer than two answers to a prompt, or prompts and answers of different number.
    """
    _require_answers(texts)
    if len(prompts) != len(texts):
        raise ConfigError(f"diversity: {len(prompts)} prompts, but answers to {len(texts)} (wanted as many).")
    clusters = []
    for prompt, answers in zip(prompts, texts, strict=True):
        plain = [answer.strip() for answer in answers]
        different = list(dict.fromkeys(plain))
        same = np.eye(len(different), dtype=np.bool_)
        asked = [i for i, answer in enumerate(different) if answer]
        if len(asked) > 1:
            same[np.ix_(asked, asked)] = equivalence(prompt, [different[i] for i in asked])
        founders: list[int] = []
        cluster = {}
        for i, answer in enumerate(different):
            joined = next((c for c, founder in enumerate(founders) if same[i, founder]), len(founders))
            if joined == len(founders):
                founders.append(i)
            cluster[answer] = joined
        clusters.append([cluster[answer] for answer in plain])
    return np.array(clusters, dtype=np.int64)


def semantic_entropy(clusters: npt.ArrayLike) -> Floats:
    """Entropy of the cluster frequencies of each prompt.  (discrete semantic entropy, Farquhar et al. 2024, Nature 630)

    Args:
        clusters: `(n, s)` integers, as from `semantic_clusters`.

    Returns:
        `(n,)` float64 in nats, 0 (all answers mean the same) to ln(s); higher is more diverse.

    >>> semantic_entropy([[0, 0, 0, 0], [0, 1, 0, 1]]).round(4).tolist()
    [0.0, 0.6931]
    """
    values = []
    for row in np.asarray(clusters):
        share = np.unique(row, return_counts=True)[1] / len(row)
        values.append(math.fsum(-p * math.log(p) for p in share) + 0.0)  # + 0.0: no negative zero
    return np.array(values, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Diversity:
    """The diversities of one model's answers and how well they are liked, prompt by prompt: what is kept as evidence.

    Attributes:
        values: metric name -> `(n,)` float64, one number a prompt; the same prompts for all.
        digest: `Generations.digest`: which prompts, and how the answers were drawn.
        equivalence: `Equivalence.title`, empty where no model was given.
        preferences: name -> `Preference.title` of the values that are no diversities.

    Raises:
        EvaluationError: values of different shapes, none, or one that is not finite.
    """

    values: Mapping[str, Floats]
    digest: str
    equivalence: str = ""
    preferences: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = {array.shape for array in self.values.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise EvaluationError(f"diversity: shapes do not fit together: {sorted(shapes)}.")
        for name, array in self.values.items():
            if not np.isfinite(array).all():
                raise EvaluationError(
                    f"diversity: {name} of prompt {np.isfinite(array).argmin()} is not finite."
                )

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def metrics(self) -> tuple[DiversityMetric, ...]:
        """What is measured here, in the order of `values`."""
        return tuple(get_sampled_metric(name, self.preferences) for name in self.values)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Writes a safetensors file, whole or not at all; equal values give equal bytes.

        Returns:
            SHA-256 of the file, in hex.

        Raises:
            DiskError: the file cannot be written; an earlier one stays as it was.
        """
        metadata = {"format": FORMAT, "about": self.digest, "equivalence": self.equivalence}
        if self.preferences:
            metadata["preferences"] = json.dumps(dict(self.preferences))
        return write_evidence(path, self.values, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, sha256: str | None = None, digest: str | None = None
    ) -> Diversity:
        """Reads what `save` wrote and checks it; arguments and errors as for `Generations.load`."""
        arrays, metadata = read_evidence(path, FORMAT, sha256=sha256, about=digest)
        values = {name: checked_array(path, arrays, name, np.float64) for name in arrays}
        try:
            liked = json.loads(metadata.get("preferences", "{}"))
            return cls(values, metadata.get("about", ""), metadata.get("equivalence", ""), liked)
        except (EvaluationError, ValueError) as error:
            raise EvaluationError(f"{path}: {error}") from error


def measure_diversity(
    generations: Generations,
    tokenizer: Any,
    prompts: Sequence[str],
    equivalence: Equivalence | None = None,
    preferences: Mapping[str, Preference] | None = None,
) -> Diversity:
    """All diversities of some generations, the semantic one where a model is given, and the preferences that are given.

    Args:
        tokenizer: the one that the answers were drawn with.
        prompts: the n texts that were answered, without a chat template.
        preferences: by name; their values are means over a prompt's answers.

    Raises:
        ConfigError: fewer than two answers to a prompt, or another number of prompts.
    """
    texts = generations.texts(tokenizer)
    values = {
        "distinct-1": distinct_n(texts, 1),
        "distinct-2": distinct_n(texts, 2),
        "self-bleu": self_bleu(texts),
    }
    if equivalence is not None:
        values["semantic-entropy"] = semantic_entropy(semantic_clusters(prompts, texts, equivalence))
    liked = preferences or {}
    values |= {name: preference(prompts, texts).mean(axis=1) for name, preference in liked.items()}
    titles = {name: preference.title for name, preference in liked.items()}
    return Diversity(values, generations.digest, "" if equivalence is None else equivalence.title, titles)


@dataclass(frozen=True)
class DiversityMetric:
    """The mean over the prompts of one diversity or preference, and which way is better.

    Attributes:
        name: as in a study file. maximize: whether higher is more diverse, or preferred.
        worst, best: the metric's range, where its intervals are cut. `worst` means no diversity at all and is the
            neutral reference point; `best` is inf where it depends on the number of samples. A preference has no range.
        needs_model: whether an `Equivalence` must be given.
    """

    name: str
    maximize: bool
    worst: float
    best: float
    needs_model: bool = False

    def __call__(self, diversity: Diversity, weights: Floats | None = None) -> Floats:
        """`(b,)` float64 means, one per row of `(b, n)` weights over the prompts; b is 1 without weights.

        Raises:
            ConfigError: no equivalence model was given. EvaluationError: weights that are not counts of the prompts.
        """
        if self.name not in diversity.values:
            raise ConfigError(
                f"objectives: {self.name}: was not measured"
                + ("; it needs an equivalence model. Give one." if self.needs_model else ".")
            )
        rows = None if weights is None else checked_weights(weights, len(diversity))
        return weighted_mean(diversity.values[self.name], rows, self.name)

    def value(self, diversity: Diversity) -> float:
        """The metric on the prompts themselves."""
        return float(self(diversity)[0])

    def interval(self, value: float, samples: Floats, level: float = 0.95) -> tuple[float, float]:
        """The basic bootstrap interval of `value` from its `(b,)` samples, cut to the metric's range."""
        bounds = (min(self.worst, self.best), max(self.worst, self.best))
        return interval(samples, level, value=value, bounds=bounds)


_METRICS = {
    metric.name: metric
    for metric in (
        DiversityMetric("distinct-1", True, 0.0, 1.0),
        DiversityMetric("distinct-2", True, 0.0, 1.0),
        DiversityMetric("self-bleu", False, 1.0, 0.0),
        DiversityMetric("semantic-entropy", True, 0.0, math.inf, needs_model=True),
    )
}
DIVERSITY_NAMES = tuple(_METRICS)


def get_diversity_metric(name: str) -> DiversityMetric:
    """The diversity metric called `name`.

    Raises:
        ConfigError: no such metric; the nearest name is suggested.

    >>> get_diversity_metric("self-bleu").maximize
    False
    """
    if name not in _METRICS:
        near = difflib.get_close_matches(name.lower(), DIVERSITY_NAMES, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"objectives: no diversity called {name!r}. {hint}They are: {', '.join(DIVERSITY_NAMES)}."
        )
    return _METRICS[name]


def get_sampled_metric(name: str, preferences: Collection[str]) -> DiversityMetric:
    """The metric of sampled answers called `name`: a diversity, or one of the preferences that are named.

    Raises:
        ConfigError: as `get_diversity_metric`.

    >>> get_sampled_metric("helpful", ["helpful"]).maximize
    True
    """
    if name in preferences:
        return DiversityMetric(name, True, -math.inf, math.inf)
    return get_diversity_metric(name)


def _require_answers(texts: Texts) -> None:
    for i, answers in enumerate(texts):
        if len(answers) < 2 or len(answers) != len(texts[0]):
            raise ConfigError(
                f"diversity: prompt {i} has {len(answers)} answers (wanted at least 2, as many for each prompt). "
                "Raise samples."
            )


@cache
def _bleu() -> BLEU:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True, tokenize="13a", smooth_method="exp")


def _words(text: str) -> list[str]:
    return str(_bleu().tokenizer(text.rstrip())).split()


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


Booleans = npt.NDArray[np.bool_]


class Equivalence(Protocol):
    """Says which answers to a prompt mean the same.

    Attributes:
        title: which model and which rule, so that numbers of two of them are not compared.
    """

    @property
    def title(self) -> str: ...

    def __call__(self, prompt: str, answers: Sequence[str]) -> Booleans:
        """`(k, k)` bool, symmetric with a true diagonal, for k >= 2 different, non-empty answers."""
