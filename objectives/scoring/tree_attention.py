"""Token trees: a question's options as branches of one row, and the questions' common prefix as a shared cache.

The options of a question are sequences that start alike. As a tree, every shared token is there once; a token
attends to its ancestors, and its position is its depth. Laid out depth-first, the descendants of token j are the
run `j .. end[j]-1`, so the attention mask of a whole row is one comparison:

    token i sees token j   iff   j <= i < end[j]

The last token of an option is predicted but never fed. Everything here depends on the questions alone, never on
the model's values: it is planned once and used for every recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from objectives.scoring.encoding import EncodedQuestion

Integers = npt.NDArray[np.int64]

GROUP_COST = 64  # tokens that one more group must save: each costs a forward pass of its own


@dataclass(frozen=True)
class Row:
    """One question's tree without the `skip` tokens that its group's prefix holds.

    Attributes:
        question: index of the question.
        tokens, position, end: `(nodes,)` int64: token id, distance from the start of the sequence, and end of
            the run of descendants.
        reads: `(r, 3)` int64: node that predicts, token predicted, option it belongs to.
    """

    question: int
    tokens: Integers
    position: Integers
    end: Integers
    reads: Integers

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Group:
    """Rows that start with the same `prefix` tokens (none: an empty prefix); longest row first."""

    prefix: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Tokens fed for this group, padding not counted."""
        return len(self.prefix) + sum(map(len, self.rows))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length; a pad token sees itself only, and nothing sees it.

    Attributes:
        tokens, position, end: `(b, n)` int64.
        nodes: `(u,)` int64, flat indices (row x n + node) of the tokens whose prediction is read, each once.
        reads: `(r, 4)` int64: index into `nodes`, token predicted, question, option.
        rows: what the batch was made of.
    """

    tokens: Integers
    position: Integers
    end: Integers
    nodes: Integers
    reads: Integers
    rows: tuple[Row, ...]

    def halves(self) -> tuple[Batch, Batch]:
        """The same rows as two batches; needs at least two rows."""
        middle = len(self.rows) // 2
        return make_batch(self.rows[:middle]), make_batch(self.rows[middle:])


def build_row(question: int, encoded: EncodedQuestion, skip: int = 0) -> Row:
    """The tree of one question below its first `skip` tokens, which all its options share.

    >>> row = build_row(0, EncodedQuestion(((1, 2, 3, 9), (1, 2, 4, 5)), (2, 2)))
    >>> row.tokens.tolist(), row.position.tolist(), row.end.tolist()
    ([1, 2, 3, 4], [0, 1, 2, 2], [4, 4, 3, 4])
    >>> row.reads.tolist()
    [[1, 3, 0], [2, 9, 0], [1, 4, 1], [3, 5, 1]]
    """
    tokens: list[int] = []
    position: list[int] = []
    end: list[int] = []
    reads: list[tuple[int, int, int]] = []
    path: list[int] = []  # nodes of the sequence being laid out
    previous: tuple[int, ...] = encoded.sequences[0][:skip]
    # In sorted order a shared beginning is contiguous, so each token of the tree is opened exactly once.
    for option in sorted(range(len(encoded.sequences)), key=lambda i: encoded.sequences[i]):
        sequence, start = encoded.sequences[option], encoded.starts[option]
        fed = sequence[:-1]
        shared = _common(previous, fed)
        for node in path[shared - skip :]:
            end[node] = len(tokens)
        del path[shared - skip :]
        for depth in range(shared, len(fed)):
            path.append(len(tokens))
            tokens.append(fed[depth])
            position.append(depth)
            end.append(-1)
        reads.extend((path[at - 1 - skip], sequence[at], option) for at in range(start, len(sequence)))
        previous = fed
    for node in path:
        end[node] = len(tokens)
    reads.sort(key=lambda read: read[2])
    nodes, depths, ends = (np.asarray(values, dtype=np.int64) for values in (tokens, position, end))
    return Row(question, nodes, depths, ends, np.asarray(reads, dtype=np.int64).reshape(-1, 3))


def plan_groups(encoded: Sequence[EncodedQuestion]) -> list[Group]:
    """Chooses the prefixes that save most tokens, and builds every row. Deterministic.

    The candidates are all beginnings that several questions share (few-shot examples, a subject's header, a
    system prompt, a passage); of nested ones, the level that feeds the fewest tokens is taken.
    """
    trunks = [_trunk(question) for question in encoded]
    order = sorted(range(len(encoded)), key=lambda i: trunks[i])
    chosen = _best(order, trunks, 0)[1]
    grouped = {i for _, members in chosen for i in members}
    loose = [i for i in range(len(encoded)) if i not in grouped]
    groups = [(0, loose)] if loose else []
    result = []
    for skip, members in groups + chosen:
        rows = [build_row(i, encoded[i], skip) for i in members]
        rows.sort(key=lambda row: (-len(row), row.question))
        result.append(Group(trunks[members[0]][:skip], tuple(rows)))
    return result


def pack(group: Group, batch_tokens: int) -> list[Batch]:
    """A group's rows, longest first, in batches of at most `batch_tokens` tokens, padding counted; one row at least."""
    batches = []
    at = 0
    while at < len(group.rows):
        count = max(1, batch_tokens // len(group.rows[at]))
        batches.append(make_batch(group.rows[at : at + count]))
        at += count
    return batches


def make_batch(rows: Sequence[Row]) -> Batch:
    """Pads rows to the longest of them."""
    n = max(map(len, rows))
    tokens = np.zeros((len(rows), n), dtype=np.int64)
    position = np.zeros((len(rows), n), dtype=np.int64)
    end = np.tile(np.arange(1, n + 1, dtype=np.int64), (len(rows), 1))
    reads = []
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row.tokens
        position[i, : len(row)] = row.position
        end[i, : len(row)] = row.end
        of_row = np.empty((len(row.reads), 4), dtype=np.int64)
        of_row[:, 0] = row.reads[:, 0] + i * n
        of_row[:, 1] = row.reads[:, 1]
        of_row[:, 2] = row.question
        of_row[:, 3] = row.reads[:, 2]
        reads.append(of_row)
    table = np.concatenate(reads)
    nodes, inverse = np.unique(table[:, 0], return_inverse=True)
    table[:, 0] = inverse.reshape(-1)
    return Batch(tokens, position, end, nodes, table, tuple(rows))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _trunk(question: EncodedQuestion) -> tuple[int, ...]:
    """What every option of the question starts with, less the last token before an answer, which is read."""
    low, high = min(question.sequences), max(question.sequences)
    return low[: min(_common(low, high), min(question.starts) - 1)]


def _best(
    order: list[int], trunks: list[tuple[int, ...]], depth: int
) -> tuple[int, list[tuple[int, list[int]]]]:
    """Most tokens saved among `order` (sorted by trunk), and the (prefix length, members) that save them."""
    if len(order) < 2 or depth > 100:  # deeper nesting than any real prompt has
        return 0, []
    length = _common(trunks[order[0]], trunks[order[-1]])
    together = length * (len(order) - 1) - GROUP_COST
    apart, split = 0, []
    first = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or trunks[order[i]][: length + 1] != trunks[order[first]][: length + 1]:
            if len(trunks[order[first]]) > length:
                saved, groups = _best(order[first:i], trunks, depth + 1)
                apart += saved
                split += groups
            first = i
    if together > 0 and together >= apart:
        return together, [(length, order)]
    return apart, split
