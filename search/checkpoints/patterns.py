"""Patterns of module names out of an adapter's config: peft's rule, in time that no pattern can stretch.

peft matches `rank_pattern` and `alpha_pattern` as regular expressions, `re.match(rf"(.*\\.)?({pattern})$", module)`. A
pattern from a stranger can keep Python's engine busy for years, so those here are a subset with the same meaning:
letters and other plain characters, `.`, `\\d`, `\\w`, escaped punctuation, `[...]`, `( | )`, `(?: )`, `*`, `+`, `?`,
their lazy forms, `^` and `$`, in 256 characters at most. Everything else is refused, and so is a repetition within a
repetition. All positions of a name are tracked at once, as bits of an integer, instead of one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

LONGEST = 256
_DEEPEST = 8  # groups in groups
_DIGITS = frozenset("0123456789")
_WORDS = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPECIAL = frozenset(".^$*+?{}[]\\|()")


@dataclass(frozen=True)
class _One:
    """One character: one of these, or one that is none of these."""

    chars: frozenset[str]
    negated: bool = False

    def fits(self, char: str) -> bool:
        return (char in self.chars) != self.negated


@dataclass(frozen=True)
class _Edge:
    end: bool


@dataclass(frozen=True)
class _Group:
    """Alternatives, each a sequence."""

    options: tuple[tuple[_Node, ...], ...]


@dataclass(frozen=True)
class _Repeat:
    node: _One | _Group
    kind: str  # one of * + ?


_Node: TypeAlias = _One | _Edge | _Group | _Repeat
_ANY = _One(frozenset("\n"), negated=True)


class Pattern:
    """A pattern that is matched against the end of a module's name, from its start or from behind a dot.

    Args:
        text: in the syntax above.

    Raises:
        ValueError: another syntax; says what.

    >>> Pattern("q_proj").matches("model.layers.0.q_proj"), Pattern("proj").matches("model.layers.0.q_proj")
    (True, False)
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"{len(text)} characters, at most {LONGEST}")
        self._whole = _Parser(text).parse()
        (first, *others) = self._whole.options
        plain = [node for node in first if isinstance(node, _One)]
        self._plain = None if others or len(plain) < len(first) else plain

    @property
    def is_plain(self) -> bool:
        """Whether it stands for names of one length: no repetition, no alternative, no edge."""
        return self._plain is not None

    def matches(self, name: str) -> bool:
        if "\n" in name:
            return False
        if self._plain is not None:
            start = len(name) - len(self._plain)
            if start < 0 or (start > 0 and name[start - 1] != "."):
                return False
            return all(node.fits(char) for node, char in zip(self._plain, name[start:], strict=True))
        run = _Run(name)
        return bool(run.ends(self._whole, 1 | run.where(frozenset(".").__contains__) << 1) >> len(name))


class _Run:
    """One name. A set of positions is an integer: bit i stands for the place before character i."""

    def __init__(self, name: str) -> None:
        self._at: dict[str, int] = {}
        for index, char in enumerate(name):
            self._at[char] = self._at.get(char, 0) | 1 << index
        self._last = 1 << len(name)

    def where(self, fits: Callable[[str], bool]) -> int:
        found = 0
        for char, bits in self._at.items():
            if fits(char):
                found |= bits
        return found

    def ends(self, node: _Node, starts: int) -> int:
        """Where a match of the node can end that begins at one of `starts`."""
        if isinstance(node, _One):
            return (starts & self.where(node.fits)) << 1
        if isinstance(node, _Edge):
            return starts & (self._last if node.end else 1)
        if isinstance(node, _Group):
            found = 0
            for option in node.options:
                reached = starts
                for each in option:
                    reached = reached and self.ends(each, reached)
                found |= reached
            return found
        if node.kind == "?":
            return starts | self.ends(node.node, starts)
        seen = 0 if node.kind == "+" else starts
        new = starts
        while new:
            new = self.ends(node.node, new) & ~seen
            seen |= new
        return seen


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0

    def parse(self) -> _Group:
        whole = self._group(0)
        if self._place < len(self._text):
            raise ValueError("a ) without its (")
        return whole

    def _next(self) -> str:
        return self._text[self._place : self._place + 1]

    def _take(self) -> str:
        char = self._next()
        if not char:
            raise ValueError("it ends too early")
        self._place += 1
        return char

    def _group(self, depth: int) -> _Group:
        if depth > _DEEPEST:
            raise ValueError(f"groups {depth} deep, at most {_DEEPEST}")
        options: list[tuple[_Node, ...]] = []
        nodes: list[_Node] = []
        while (char := self._next()) and char != ")":
            if char == "|":
                self._take()
                options.append(tuple(nodes))
                nodes = []
            else:
                nodes.append(self._repeated(depth))
        return _Group((*options, tuple(nodes)))

    def _repeated(self, depth: int) -> _Node:
        node = self._single(depth)
        kind = self._next()
        if not kind or kind not in "*+?":
            return node
        if not isinstance(node, _One | _Group):
            raise ValueError("an edge is repeated")
        self._take()
        if self._next() == "?":  # lazy: another order of search, the same names
            self._take()
        if (again := self._next()) and again in "*+?":
            raise ValueError(f"{again} after a repetition")
        if kind != "?" and _unbounded(node):
            raise ValueError("a repetition within a repetition")
        return _Repeat(node, kind)

    def _single(self, depth: int) -> _Node:
        char = self._take()
        if char == ".":
            return _ANY
        if char in "^$":
            return _Edge(char == "$")
        if char == "\\":
            return self._escaped()
        if char == "[":
            return self._listed()
        if char == "(":
            if self._next() == "?":
                self._take()
                if self._take() != ":":
                    raise ValueError("a group of a special kind")
            group = self._group(depth + 1)
            self._take()  # the ) that ended it; refuses its absence
            return group
        if char in _SPECIAL or not char.isprintable():
            raise ValueError(f"{char!r} has no place there")
        return _One(frozenset(char))

    def _escaped(self) -> _One:
        char = self._take()
        if char in "dw":
            return _One(_DIGITS if char == "d" else _WORDS)
        if char.isalnum() or not char.isascii() or not char.isprintable():
            raise ValueError(f"\\{char} is not among the escapes")
        return _One(frozenset(char))

    def _listed(self) -> _One:
        negated = self._next() == "^"
        if negated:
            self._take()
        chars: set[str] = set()
        while True:
            char = self._take()
            if char == "]" and chars:
                return _One(frozenset(chars), negated)
            if char == "\\":
                chars |= self._escaped().chars
            elif char not in _WORDS and char not in ".-/":
                raise ValueError(f"{char!r} in [ ]")
            elif (
                char in _WORDS
                and self._next() == "-"
                and self._text[self._place + 1 : self._place + 2] != "]"
            ):
                self._take()
                last = self._take()
                if last not in _WORDS or last < char:
                    raise ValueError(f"{char}-{last} in [ ]")
                chars |= {chr(code) for code in range(ord(char), ord(last) + 1)}
            else:
                chars.add(char)


def _unbounded(node: _Node) -> bool:
    if isinstance(node, _Repeat):
        return node.kind != "?" or _unbounded(node.node)
    return isinstance(node, _Group) and any(_unbounded(each) for option in node.options for each in option)
