"""Who writes next, learned: a classifier on the hidden state of one candidate, the host, after it has read the text.

What the host reads in order to choose it need not read again when it writes: they share keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from objectives.generation.sampler import uniforms
from search.errors import ConfigError
from search.switching.classifier import Classifier
from search.switching.reader import Integers
from search.switching.relay import Batch, Relay
from search.switching.response import Border, Response, Start

Choice = Literal["best", "draw"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassifierSwitcher:
    """Chooses by a classifier on `features`.

    Attributes:
        host: index of the candidate whose hidden states are read. candidates: how many there are.
        room: `max_new_tokens`.
        choice: `best` takes the most probable candidate, `draw` draws one from the nucleus of `top_p` (the paper does).
        seed: of what is drawn.
    """

    classifier: Classifier
    host: int
    candidates: int
    room: int
    choice: Choice = "best"
    top_p: float = 1.0
    seed: int = 0
    fed: int = 0  # it has no models of its own

    @property
    def key(self) -> object:
        arrays = {name: array.tolist() for name, array in self.classifier.arrays().items()}
        # -inf, of a class that was never seen, is no JSON
        arrays["bias"] = [str(value) for value in arrays["bias"]]
        return ["classifier", self.host, self.choice, self.top_p, self.seed, arrays]

    def begin(self, responses: Sequence[Response]) -> ClassifierSwitcher:
        return self

    def choose(self, border: Border) -> Integers:
        responses = [border.responses[row] for row in border.rows]
        hidden = border.read(self.host).double().cpu().numpy()
        logits = self.classifier.logits(features(hidden, responses, self.candidates, self.room))
        return chosen(logits, responses, self.choice, self.top_p, self.seed)


def chosen(
    logits: Floats, responses: Sequence[Response], choice: Choice, top_p: float, seed: int
) -> Integers:
    """`(r,)` candidates for `(r, n)` logits: the best, the first of equal ones, or drawn.

    A draw belongs to the prompt, the sample and the segment, as those of the tokens do.
    """
    if choice == "best":
        return np.asarray(logits.argmax(axis=1), dtype=np.int64)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    order = np.argsort(-weight, axis=1, kind="stable")
    ranked = np.take_along_axis(weight, order, axis=1)
    ranked[np.cumsum(ranked, axis=1) - ranked >= top_p] = 0.0  # the first that reaches top_p stays
    cumulative = np.cumsum(ranked, axis=1)
    number = [
        uniforms(one.start.prompt, seed, one.start.sample, len(one.borders) + 1)[-1] for one in responses
    ]
    place = (np.array(number)[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    return np.asarray(np.take_along_axis(order, place[:, None], axis=1)[:, 0], dtype=np.int64)


def features(hidden: Floats, responses: Sequence[Response], candidates: int, room: int) -> Floats:
    """`(r, width + n + 2)` float64: hidden state, last author (n and nobody), share of the room that is used."""
    last = np.zeros((len(responses), candidates + 1))
    for row, response in enumerate(responses):
        author = next((one for one in reversed(response.authors) if one >= 0), candidates)
        last[row, author] = 1.0
    used = np.array([[len(response.tokens) / room] for response in responses])
    return np.concatenate([hidden, last, used], axis=1)


def features_of(relay: Relay, starts: Sequence[Start], host: int) -> Floats:
    """`features` of traces, as the switcher will see them at their borders."""
    if relay.models[host].get_output_embeddings() is None:
        raise ConfigError(f"switching.host: {relay.names[host]} has no output head. Name another candidate.")
    found = []
    size = relay.batch_rows(starts)
    for first in range(0, len(starts), size):
        batch = Batch(relay, starts[first : first + size])
        hidden = batch.read(host, np.arange(len(batch.responses))).double().cpu().numpy()
        found.append(features(hidden, batch.responses, len(relay.names), relay.decoding.max_new_tokens))
    return np.concatenate(found)
