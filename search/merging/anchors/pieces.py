"""The pieces a build is made of, each computed once: anchors of an expert in a block, and adapted blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from objectives.printable import shown
from search.checkpoints.parents import Parents
from search.errors import ConfigError, MergeError
from search.merging.anchors.adapt import adapt as adapt_block
from search.merging.anchors.blocks import Blocks
from search.merging.anchors.construct import construct, gauss, pick_sigma, weight_rows
from search.merging.anchors.functional import Weights
from search.merging.anchors.options import AdaptOptions, AnchorOptions
from search.merging.anchors.starts import Start
from search.storage.pieces import PieceStore, digest_of, tensor_digest

Tell = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored result.

    Attributes:
        tensors: `anchors`, `targets` and `alignment`, or the parameters of an adapted block with `losses`.
        before, value: alignment of the first and the best anchors (NaN if there is none), or the loss at start and end.
        reused: it was in the store.
    """

    tensors: dict[str, torch.Tensor]
    before: float
    value: float
    reused: bool


class Pieces:
    """Computes pieces, or finds them in the store.

    Args:
        data: see `build`.

    Raises:
        ConfigError: the data do not fit the options. MergeError: the architecture has no blocks.
    """

    def __init__(
        self,
        parents: Parents,
        store: PieceStore,
        options: AnchorOptions,
        adapt: AdaptOptions,
        start: Start,
        data: Sequence[torch.Tensor] | None,
        device: str,
    ) -> None:
        _check_data(options, data, tuple(parents.experts))
        self.parents, self.store = parents, store
        self.options, self.adapt, self._start = options, adapt, start
        self.blocks = Blocks(parents)
        self._data = tuple(data or ())
        self._device = device
        self._pre, self._posts = parents.pre, tuple(parents.experts.values())
        self._hidden: dict[int, tuple[int, torch.Tensor]] = {}  # expert -> block, hidden states that enter it

    @property
    def bytes(self) -> int:
        """About how much the store grows at most."""
        anchors = 2 * self.options.n * self.options.tokens * self.blocks.width * len(self._posts)
        inside = set(self.parents.names) - set(self.blocks.outside)
        weights = sum(math.prod(self._pre.shape(name)) for name in inside)
        return 4 * ((anchors + 2**12) * len(self.blocks) + weights)

    def settle_sigma(self, align: Callable[[AnchorOptions], float]) -> float:
        """Fixes the sigma of all further anchors."""
        sigma = pick_sigma(align, self.options)[0] if self.options.sigmas else self.options.sigma
        self.options = dataclasses.replace(self.options, sigma=sigma, sigmas=())
        return sigma

    def anchors(
        self, index: int, expert: int, tell: Tell | None, *, options: AnchorOptions | None = None
    ) -> Piece:
        """Anchors of an expert in a block, with its outputs on them.

        Raises:
            MergeError: a number is not finite.
        """
        chosen = options or self.options
        facts = self._anchor_facts(index, expert, chosen)
        found = self.store.read("anchors", facts)
        if found is not None:
            return _anchor_piece(found, reused=True)
        pre = self._weights(index)
        other = self._weights(index, expert)
        made = construct(
            self.blocks[index], pre, other, self._first(index, expert, other, chosen), chosen, watch=tell
        )
        targets = self.blocks.outputs(index, other, made.anchors)
        if not bool(made.anchors.isfinite().all() and targets.isfinite().all()):
            raise MergeError(
                "anchors: an anchor or the expert's output on it is not finite. Use a smaller rate."
            )
        tensors = {"anchors": made.anchors.cpu(), "targets": targets.cpu(), "alignment": made.alignment}
        self.store.write("anchors", facts, tensors)
        return _anchor_piece(tensors, reused=False)

    def adapted(self, index: int, tell: Tell | None) -> Piece:
        """A block fitted to the anchors of all experts.

        Raises:
            MergeError: a number is not finite.
        """
        facts = {
            "anchors": [
                digest_of(self._anchor_facts(index, k, self.options)) for k in range(len(self._posts))
            ],
            "options": dataclasses.asdict(self.adapt),
            "start": self._start.facts(),
        }
        found = self.store.read("block", facts)
        if found is not None:
            return _block_piece(found, reused=True)
        pairs = []
        for expert in range(len(self._posts)):
            piece = self.anchors(index, expert, None).tensors
            pairs.append((piece["anchors"].to(self._device), piece["targets"].to(self._device)))
        begun = self._start.block(self.blocks, index, self._weights(index), lambda: self._experts(index))
        made = adapt_block(
            self.blocks[index], begun.weights, pairs, self.adapt, task_vectors=begun.task_vectors, watch=tell
        )
        ends = torch.tensor([made.before, made.after], dtype=torch.float64)
        tensors = {name: tensor.cpu() for name, tensor in made.weights.items()}
        tensors |= {"losses": made.losses, "ends": ends}
        self.store.write("block", facts, tensors)
        return _block_piece(tensors, reused=False)

    def _anchor_facts(self, index: int, expert: int, options: AnchorOptions) -> dict[str, Any]:
        chosen = dataclasses.asdict(options)
        for name in ("sigmas", "sigma_steps", *(() if options.init == "gauss" else ("sigma",))):
            del chosen[name]  # it has no part in the anchors
        return {
            "pre": self._pre.sha256(),
            "expert": self._posts[expert].sha256(),
            "block": index,
            "options": chosen,
            "data": tensor_digest(self._data[expert]) if options.init == "data" else None,
        }

    def _first(self, index: int, expert: int, weights: Weights, options: AnchorOptions) -> torch.Tensor:
        if options.init == "data":
            return self._states(index, expert)
        shape = (options.n, options.tokens, self.blocks.width)
        # From the expert's content, not its place: anchors stay valid when another expert joins. Not from sigma either.
        source = {"seed": options.seed, "expert": self._posts[expert].sha256(), "block": index}
        draw = torch.Generator().manual_seed(int(digest_of(source)[:15], 16))
        rows = (
            weight_rows(weights, shape, draw)
            if options.init == "weight"
            else gauss(shape, options.sigma, draw)
        )
        return rows.to(self._device)

    def _states(self, index: int, expert: int) -> torch.Tensor:
        """Hidden states of the expert's tokens in `pre`, as they enter a block."""
        at, hidden = self._hidden.get(expert, (-1, torch.empty(0)))
        if at < 0 or at > index:
            at, hidden = 0, self.blocks.embed(self._data[expert], self._pre).to(self._device)
        while at < index:
            hidden = self.blocks.outputs(at, self._weights(at), hidden)
            at += 1
        self._hidden[expert] = at, hidden
        return hidden

    def _experts(self, index: int) -> list[Weights]:
        return [self._weights(index, expert) for expert in range(len(self._posts))]

    def _weights(self, index: int, expert: int | None = None) -> dict[str, torch.Tensor]:
        one = self._pre if expert is None else self._posts[expert]
        return self.blocks.weights(index, one, self._device)


def _anchor_piece(tensors: dict[str, torch.Tensor], *, reused: bool) -> Piece:
    alignment = tensors["alignment"]
    if not len(alignment):
        return Piece(tensors, math.nan, math.nan, reused)
    return Piece(tensors, float(alignment[0]), float(alignment.max()), reused)


def _block_piece(tensors: dict[str, torch.Tensor], *, reused: bool) -> Piece:
    before, after = tensors["ends"].tolist()
    return Piece(tensors, before, after, reused)


def _check_data(options: AnchorOptions, data: Sequence[torch.Tensor] | None, experts: Sequence[str]) -> None:
    if (options.init == "data") != (data is not None):
        found = "no token ids" if data is None else "token ids"
        raise ConfigError(
            f"anchors.init: {options.init} with {found}. Give token ids with init data, and only then."
        )
    if data is not None and len(data) != len(experts):
        raise ConfigError(f"anchors: token ids for {len(data)} experts (wanted {len(experts)}).")
    for expert, ids in zip(experts, data or (), strict=data is not None):
        if tuple(ids.shape) != (options.n, options.tokens):
            raise ConfigError(
                f"anchors: token ids of {shown(expert)}: shape {tuple(ids.shape)} (wanted "
                f"{(options.n, options.tokens)}, from anchors.n and anchors.tokens)."
            )
