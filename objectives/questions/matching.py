"""Whether a written answer is right: `exact`, `number` and `f1`, with the normalisation that each is published with.

A rule gives every answer a key, in which answers that say the same are equal, and says which keys are right:

>>> rule = get_rule("number")
>>> rule.key("So she pays $1,200.50."), rule.right("1200.5", ("1200.50",))
('1200.5', True)
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from objectives.errors import ConfigError

F1_RIGHT = 0.5  # of `f1`: from this overlap on an answer counts as right

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# A sign counts where no digit or letter stands before it ("3-4" is 3 and 4); commas stand between groups of three.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?<=\d)|\d+(?:\.\d+)?")
_LONGEST = 10_000  # characters of an answer that are read for numbers


def normalized(text: str) -> str:
    """Lower case, without punctuation and the articles a, an and the, one space between words.

    (Rajpurkar et al. 2016, arXiv 1606.05250: the evaluation of SQuAD, which TriviaQA and others use.) An answer of
    articles alone keeps them: "A" may be a letter.

    >>> normalized("The  Eiffel-Tower!"), normalized("A.")
    ('eiffeltower', 'a')
    """
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split())


def last_number(text: str) -> str:
    """The last number of a text in its shortest decimal form; empty if there is none.

    So a worked solution is read that ends with its result (Cobbe et al. 2021, arXiv 2110.14168: GSM8K).

    >>> [last_number(text) for text in ("3 + 4 = 7.0", "-1,000 or so", "none")]
    ['7', '-1000', '']
    """
    found = [match for match in _NUMBER.findall(text[-_LONGEST:]) if match]
    if not found:
        return ""
    value = Decimal(found[-1].replace(",", ""))
    if value == 0:
        return "0"  # of any sign and length
    shortest = format(value.normalize(), "f")
    return shortest


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the answer's normalised words, in [0, 1]; higher is better.

    Without words on one side it is 1 if the other has none either, else 0.  (Rajpurkar et al. 2016)

    >>> round(token_f1("the red house", "a red door"), 3)
    0.5
    """
    mine, wanted = normalized(answer).split(), normalized(truth).split()
    if not mine or not wanted:
        return float(mine == wanted)
    common = sum((Counter(mine) & Counter(wanted)).values())
    return 2.0 * common / (len(mine) + len(wanted))


@dataclass(frozen=True)
class Rule:
    """A way to tell right answers from wrong ones.

    Attributes:
        name: as in a study file.
        key: answer -> its key; answers with equal keys are one answer. An empty key is no answer: never right.
        right: whether a key is right, given the accepted answers.
    """

    name: str
    key: Callable[[str], str]
    right: Callable[[str, Sequence[str]], bool]

    def score(self, answer: str, accepted: Sequence[str]) -> float:
        """How good an answer is, in [0, 1]; higher is better: of `f1` the best overlap, of the others 1 if it is right.

        >>> round(get_rule("f1").score("the red house", ("a red door",)), 3)
        0.5
        """
        if self.name == "f1":
            return max(token_f1(answer, one) for one in accepted)
        return float(self.right(self.key(answer), accepted))


def _equal(key: Callable[[str], str]) -> Callable[[str, Sequence[str]], bool]:
    return lambda found, accepted: bool(found) and any(found == key(one) for one in accepted)


def _overlaps(found: str, accepted: Sequence[str]) -> bool:
    return bool(found) and max(token_f1(found, one) for one in accepted) >= F1_RIGHT


_RULES = {
    rule.name: rule
    for rule in (
        Rule("exact", normalized, _equal(normalized)),
        Rule("number", last_number, _equal(last_number)),
        Rule("f1", normalized, _overlaps),
    )
}
RULE_NAMES = tuple(_RULES)


def get_rule(name: str) -> Rule:
    """The rule called `name`.

    Raises:
        ConfigError: no such rule; the nearest name is suggested.
    """
    if name not in _RULES:
        near = difflib.get_close_matches(name.lower(), RULE_NAMES, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"match: no rule called {name!r}. {hint}They are: {', '.join(RULE_NAMES)}.")
    return _RULES[name]
