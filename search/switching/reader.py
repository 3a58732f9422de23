"""One candidate's memory of a batch of rows: it reads every token once, and says what would come next.

Keys and values of position p lie in column p of a row, so rows of different lengths share one block of memory, a row
can be read on at any time, and rows that start alike are read once and copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from objectives.scoring.masks import Masks, Unmaskable

Integers = npt.NDArray[np.int64]
Tokens = tuple[int, ...]


class Reader(Protocol):
    """What a candidate knows of a batch of rows.

    Attributes:
        keeps: whether it keeps what it read.
        fed: tokens that went through the model so far.
        logits: `(rows, vocabulary)` float32 of the token after what was read; of rows without, not defined.
        hidden: `(rows, width)` float32: what the output head saw then, the last layer's state of the last token.
    """

    keeps: ClassVar[bool]
    fed: int
    logits: Tensor
    hidden: Tensor

    def read(self, rows: Integers, texts: Sequence[Tokens]) -> None:
        """Reads on: `texts` are whole, prompt included, and go on where the rows' earlier ones ended.

        Args:
            rows: `(r,)` distinct indices. texts: r token ids each.
        """

    def rewind(self, rows: Integers, lengths: Integers) -> None:
        """Forgets what lies behind the first `(r,)` tokens of some rows; what all of them start with stays.

        What comes next must be read before `logits` and `hidden` are asked for.
        """


def make_reader(model: Any, prefixes: Sequence[Tokens], width: int) -> Reader:
    """A reader of rows that start with these tokens and become at most `width` long.

    It keeps keys and values where the model's attention allows it, and reads everything again where not.
    """
    try:
        return CachedReader(model, prefixes, width)
    except Unmaskable:
        return PlainReader(model, prefixes, width)


def row_bytes(model: Any, width: int) -> int:
    """What the keys and values of a row of `width` tokens take."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * dim * width * model.dtype.itemsize)


class CachedReader:
    """Keeps keys and values; see `Reader`.

    Args:
        prefixes: of every row, at least one token: rows that start alike share the work on it.

    Raises:
        Unmaskable: the model takes no masks of our own.
    """

    keeps: ClassVar[bool] = True

    def __init__(self, model: Any, prefixes: Sequence[Tokens], width: int) -> None:
        self._model, self._masks = model, Masks(model)
        self._prefixes, self._device = list(prefixes), model.get_input_embeddings().weight.device
        self._store = _Store(len(prefixes), width)
        self._read = np.zeros(len(prefixes), dtype=np.int64)
        self.fed = 0
        self.logits = self.hidden = torch.empty(0)

    @torch.inference_mode()
    def read(self, rows: Integers, texts: Sequence[Tokens]) -> None:
        """See `Reader.read`."""
        self._begin(rows)
        behind = np.array([len(text) for text in texts]) - self._read[rows]
        due = np.flatnonzero(behind > 0)
        if due.size:
            unread = [texts[int(i)][self._read[rows[i]] :] for i in due]
            self._forward(rows[due], unread)

    def rewind(self, rows: Integers, lengths: Integers) -> None:
        """See `Reader.rewind`. Columns behind what was read are seen by nobody, and written over."""
        self._read[rows] = np.minimum(self._read[rows], lengths)

    def _begin(self, rows: Integers) -> None:
        """Reads the prefixes of rows that are new, each once, for all rows that start with it."""
        new = {self._prefixes[row]: int(row) for row in rows[::-1] if self._read[row] == 0}
        if not new:
            return
        first = np.array(list(new.values()))
        self._forward(first, list(new))
        for prefix, source in new.items():
            alike = [r for r, one in enumerate(self._prefixes) if one == prefix and self._read[r] == 0]
            self._store.copy(source, alike, len(prefix))
            self.logits[alike] = self.logits[source].clone()
            self.hidden[alike] = self.hidden[source].clone()
            self._read[alike] = len(prefix)

    def _forward(self, rows: Integers, unread: Sequence[Tokens]) -> None:
        n = max(map(len, unread))
        ids = np.array([(tokens[0],) * (n - len(tokens)) + tokens for tokens in unread], dtype=np.int64)
        # Padding stands on the left, so that the last column is every row's last token; it looks as the first one.
        start = self._read[rows][:, None]
        place = np.arange(n)[None, :] - np.array([n - len(tokens) for tokens in unread])[:, None]
        position = torch.from_numpy(start + np.maximum(place, 0)).to(self._device)
        width = int((self._read[rows] + [len(tokens) for tokens in unread]).max())
        column = torch.arange(width, device=self._device)[None]
        sees = column[:, None, :] <= position[:, :, None]
        index, real = torch.from_numpy(rows), torch.from_numpy(place >= 0)
        owner = index[:, None].expand_as(real)[real]
        self._store.view = _View(index, owner, position.cpu()[real], real, width)
        logits, hidden = _last(
            self._model,
            input_ids=torch.from_numpy(ids).to(self._device),
            attention_mask=self._masks.of(sees, position, column),
            position_ids=position,
            past_key_values=self._store.cache,
            use_cache=True,
        )
        self.logits = _put(self.logits, index, logits, len(self._prefixes))
        self.hidden = _put(self.hidden, index, hidden, len(self._prefixes))
        self._read[rows] += [len(tokens) for tokens in unread]
        self.fed += sum(map(len, unread))


class PlainReader:
    """Reads everything from the start, every time: for models without plain attention, and the oracle of the other."""

    keeps: ClassVar[bool] = False

    def __init__(self, model: Any, prefixes: Sequence[Tokens], width: int) -> None:
        self._model, self._rows = model, len(prefixes)
        self.fed = 0
        self.logits = self.hidden = torch.empty(0)

    @torch.inference_mode()
    def read(self, rows: Integers, texts: Sequence[Tokens]) -> None:
        """See `Reader.read`; one row at a time, so that nothing is padded."""
        device = self._model.get_input_embeddings().weight.device
        for row, text in zip(rows, texts, strict=True):
            logits, hidden = _last(
                self._model, input_ids=torch.tensor([text], device=device), use_cache=False
            )
            index = torch.tensor([row])
            self.logits = _put(self.logits, index, logits, self._rows)
            self.hidden = _put(self.hidden, index, hidden, self._rows)
            self.fed += len(text)

    def rewind(self, rows: Integers, lengths: Integers) -> None:
        """See `Reader.rewind`; there is nothing to forget."""


def _last(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """`(r, vocabulary)` logits after the last column, and `(r, width)` what the output head made them of; float32."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        out = model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    return out.logits[:, -1].float(), seen[-1][:, -1].float()


def _put(kept: Tensor, index: Tensor, values: Tensor, rows: int) -> Tensor:
    """`kept` with some rows replaced; made when the first values say how wide it is."""
    if kept.shape[0] != rows:
        kept = values.new_zeros((rows, values.shape[1]))
    kept[index.to(kept.device)] = values
    return kept


@dataclass
class _View:
    """Where one forward pass reads and writes.

    Attributes:
        rows: `(r,)`. place, column: of every real token, where its keys go. real: `(r, n)` bool, False for padding.
        width: columns to look at.
    """

    rows: Tensor
    place: Tensor
    column: Tensor
    real: Tensor
    width: int


class _Store:
    """Keys and values of all layers, `(rows, heads, width, dim)` each; made when a layer first writes."""

    def __init__(self, rows: int, width: int) -> None:
        from transformers.cache_utils import Cache, DynamicLayer

        # A class lives until the collector comes, and would keep all tensors with it.
        store = weakref.ref(self)

        class ColumnLayer(DynamicLayer):  # type: ignore[misc]
            """Keeps what it is given and gives back the columns of the rows that are looked at."""

            def update(
                self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
            ) -> tuple[Tensor, Tensor]:
                if not self.is_initialized:
                    self.lazy_initialization(keys, values)
                    shape = (rows, keys.shape[1], width)
                    self.keys = keys.new_zeros((*shape, keys.shape[3]))
                    self.values = values.new_zeros((*shape, values.shape[3]))
                here = store()
                assert here is not None, "it holds the cache that this layer belongs to"
                view, device = here.view, keys.device
                place, column, real = (one.to(device) for one in (view.place, view.column, view.real))
                found = []
                for kept, new in ((self.keys, keys), (self.values, values)):
                    kept[place, :, column] = new.transpose(1, 2)[real]
                    found.append(kept[view.rows.to(device), :, : view.width])
                return found[0], found[1]

        self.cache = Cache(layer_class_to_replicate=ColumnLayer)
        self.view: _View

    def copy(self, source: int, rows: Sequence[int], columns: int) -> None:
        """Gives some rows the first columns of another."""
        index = torch.tensor([row for row in rows if row != source], dtype=torch.int64)
        for layer in self.cache.layers if len(index) else ():
            for kept in (layer.keys, layer.values):
                kept[index.to(kept.device), :, :columns] = kept[source, :, :columns].clone()
