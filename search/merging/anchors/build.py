"""From experts to a merged checkpoint: anchors for every expert and block, every block adapted, everything written.

Blocks are independent: none sees the output of another. Every finished piece is stored, so a killed run goes on where
it stood and ends with the same bytes (on the same machine, with the same number of threads).
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from objectives.printable import shown
from search.checkpoints.parents import Parents
from search.checkpoints.writing import save_tensors
from search.errors import ConfigError, ExportError, MergeError
from search.merging.anchors.options import AdaptOptions, AnchorOptions
from search.merging.anchors.pieces import Piece, Pieces
from search.merging.anchors.starts import FromPre, Start
from search.merging.save import check_saved, size_of
from search.storage.pieces import PieceStore
from search.storage.staging import check_space, lone_folder

Phase = Literal["sigma", "construct", "adapt", "write"]


@dataclass(frozen=True)
class Progress:
    """How far a build is; sent at the end of every piece, and every few steps within.

    Attributes:
        phase: what is being done.
        block, expert: to which, a place and a name; None where it concerns all.
        step, steps: within the piece.
        done, of: pieces.
        value: alignment (sigma, construct; higher is better) or loss (adapt; lower is better), as far as known.
        reused: the piece was in the store.
    """

    phase: Phase
    block: int | None
    expert: str | None
    step: int
    steps: int
    done: int
    of: int
    value: float | None = None
    reused: bool = False


@dataclass(frozen=True, eq=False)
class Built:
    """What a build came to.

    Attributes:
        folder: the checkpoint.
        sigma: of the first anchors, if they are drawn.
        alignment: for each block and expert, first and best mean cosine; NaN where the expert equals `pre`.
        losses: for each block the mean distance of an anchor before and after its adaptation.
        computed, reused: pieces.
        seconds: of this run, by phase.
    """

    folder: Path
    sigma: float | None
    alignment: tuple[tuple[tuple[float, float], ...], ...]
    losses: tuple[tuple[float, float], ...]
    computed: int
    reused: int
    seconds: dict[str, float]


def build(
    parents: Parents,
    out: Path,
    work: Path,
    *,
    anchors: AnchorOptions | None = None,
    adapt: AdaptOptions | None = None,
    start: Start | None = None,
    data: Sequence[torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    watch: Callable[[Progress], None] | None = None,
    seal: Callable[[Path], None] | None = None,
) -> Built:
    """Writes the merge of all experts as a checkpoint folder that transformers loads; whole or absent.

    Two controls take the same way: `AnchorOptions(steps=0)` adapts to anchors that were not optimised, and with
    `init="data"` to real hidden states.

    Args:
        parents: config, tokenizer and generation config come from the first expert. The order of the experts matters
            to the last bit only, their names not at all.
        out: the checkpoint's folder.
        work: the folder of finished pieces; delete it when it is no longer needed.
        start: default `FromPre()`.
        data: for `init="data"`, token ids `(n, tokens)` int64 for each expert, in order.
        dtype: of the stored tensors; default that of `pre`'s first tensor. Everything before is float32.
        device: where blocks are computed.
        overwrite: replace `out` if it is a checkpoint.
        watch: what it raises ends the build; finished pieces stay.
        seal: called with the written folder before it appears at `out`, to add a file.

    Raises:
        ConfigError: options, data, coefficients or folders that do not fit. MergeError: a number is not finite.
        ExportError: `out` exists. DiskError: `out` or `work` cannot be written.
    """
    options, fitting = anchors or AnchorOptions(), adapt or AdaptOptions()
    beginning = start or FromPre()
    beginning.check(parents)
    _check_places(parents, out, work, overwrite)
    kind = dtype or parents.pre.dtype(parents.names[0])
    pieces = Pieces(parents, PieceStore(work), options, fitting, beginning, data, device)
    check_space(work, pieces.bytes)
    check_space(out, size_of(parents, kind))
    builder = _Builder(pieces, watch)
    with pieces.store.writing():
        sigma = builder.settle_sigma()
        alignment, losses = builder.blocks()
        with lone_folder(out, overwrite=overwrite) as staging:
            builder.write(staging, beginning, kind)
            if seal is not None:
                seal(staging)
    return Built(
        out,
        sigma if options.init == "gauss" else None,
        alignment,
        losses,
        builder.counts["computed"],
        builder.counts["reused"],
        dict(builder.seconds),
    )


class _Builder:
    """Goes through the pieces in order, counting and reporting."""

    def __init__(self, pieces: Pieces, watch: Callable[[Progress], None] | None) -> None:
        self._pieces, self._watch = pieces, watch
        self._done = 0
        blocks, experts = len(pieces.blocks), len(pieces.parents.experts)
        self._of = len(pieces.options.sigmas) + blocks * (experts + 1) + 1
        self.counts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def settle_sigma(self) -> float:
        """The sigma of all anchors: given, or tried on the middle block of the first expert."""
        middle = len(self._pieces.blocks) // 2
        return self._pieces.settle_sigma(
            lambda options: (
                self._piece(
                    "sigma",
                    middle,
                    0,
                    options.steps,
                    lambda tell: self._pieces.anchors(middle, 0, tell, options=options),
                ).value
            )
        )

    def blocks(self) -> tuple[tuple[tuple[tuple[float, float], ...], ...], tuple[tuple[float, float], ...]]:
        """Constructs and adapts every block; alignments and losses as in `Built`."""
        alignment, losses = [], []
        for index in range(len(self._pieces.blocks)):
            found = [self._constructed(index, expert) for expert in range(len(self._pieces.parents.experts))]
            alignment.append(tuple((piece.before, piece.value) for piece in found))
            fitted = self._adapted(index)
            losses.append((fitted.before, fitted.value))
        return tuple(alignment), tuple(losses)

    def write(self, folder: Path, start: Start, dtype: torch.dtype) -> None:
        """The checkpoint, with one block in memory at a time; headers are read back."""
        began, parents = time.monotonic(), self._pieces.parents
        owner = {
            stored: (index, name)
            for index in range(len(self._pieces.blocks))
            for name, stored in self._pieces.blocks.names(index).items()
        }
        held: dict[int, Piece] = {}

        def tensor(stored: str) -> torch.Tensor:
            if stored in owner:
                index, name = owner[stored]
                if index not in held:
                    held.clear()
                    held[index] = self._pieces.adapted(index, None)
                found = held[index].tensors[name].to(dtype)
            else:
                found = start.outside(stored, parents, dtype)
            return found.contiguous()

        save_tensors(parents.post, parents.names, tensor, dtype, folder)
        check_saved(folder, parents, dtype)
        self._done += 1
        self.seconds["write"] += time.monotonic() - began
        self._tell(Progress("write", None, None, 1, 1, self._done, self._of))

    def _constructed(self, index: int, expert: int) -> Piece:
        return self._piece(
            "construct",
            index,
            expert,
            self._pieces.options.steps,
            lambda tell: self._pieces.anchors(index, expert, tell),
        )

    def _adapted(self, index: int) -> Piece:
        return self._piece(
            "adapt", index, None, self._pieces.adapt.epochs, lambda tell: self._pieces.adapted(index, tell)
        )

    def _piece(
        self,
        phase: Phase,
        block: int,
        expert: int | None,
        steps: int,
        make: Callable[[Callable[[int, float], None]], Piece],
    ) -> Piece:
        began = time.monotonic()
        whose = None if expert is None else list(self._pieces.parents.experts)[expert]

        def tell(step: int, value: float) -> None:
            if step % 25 == 0:
                self._tell(Progress(phase, block, whose, step, steps, self._done, self._of, value))

        try:
            piece = make(tell)
        except MergeError as error:
            raise MergeError(
                f"block {block}{'' if whose is None else f', {shown(whose)}'}: {error}"
            ) from error
        self._done += 1
        self.counts["reused" if piece.reused else "computed"] += 1
        self.seconds[phase] += time.monotonic() - began
        value = None if math.isnan(piece.value) else piece.value
        self._tell(Progress(phase, block, whose, steps, steps, self._done, self._of, value, piece.reused))
        return piece

    def _tell(self, progress: Progress) -> None:
        if self._watch is not None:
            self._watch(progress)


def _check_places(parents: Parents, out: Path, work: Path, overwrite: bool) -> None:
    """What would only come to light hours later, when the checkpoint is written."""
    place = out.resolve()
    for folder in (work.resolve(), *(one.folder for one in parents.everybody)):
        if folder.is_relative_to(place):
            raise ConfigError(f"{out}: holds {folder}, which the build needs. Give another folder.")
    if work.resolve() == place.parent:  # both are locked, and a process would wait for itself
        raise ConfigError(f"{work}: holds {out}. Give the pieces a folder of their own.")
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise ExportError(f"{out}: exists. Give another folder, or overwrite it.")
        if out.is_symlink() or not (out / "config.json").is_file():
            raise ExportError(f"{out}: is not a checkpoint, so it is not replaced. Remove it yourself.")
