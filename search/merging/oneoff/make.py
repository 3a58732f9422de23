"""Making a one-off merge: parents opened and compared, one checkpoint folder written with its manifest, or nothing."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from search import __version__
from search.checkpoints.adapters import average_adapters
from search.checkpoints.checkpoint import Checkpoint, dtype_name
from search.checkpoints.lora import Adapter
from search.checkpoints.origin import origins
from search.checkpoints.parents import Parents, compare_experts
from search.checkpoints.placement import SPREAD, choose_device
from search.checkpoints.writing import save_tensors
from search.config.methods import METHODS
from search.errors import CheckpointError, ConfigError, ExportError, IncompatibleModelsError, MergeError
from search.merging.anchors.build import Progress, build
from search.merging.anchors.starts import FromExperts, FromMerge, FromPre, Start
from search.merging.blend import make_blend
from search.merging.mergekit_config import CONFIG, config_text, natural, parent_places, rebuild_header
from search.merging.oneoff.request import FDA, SEPARATE, START, WUDI, Request
from search.merging.oneoff.singular import Singular
from search.merging.save import check_saved, save_checkpoint, size_of
from search.storage.manifest import MANIFEST, MERGE, write_manifest
from search.storage.staging import check_space, disk_errors, lone_folder

logger = logging.getLogger("mergefront")

WORK = Path("runs") / "anchors"


class Shown(Protocol):
    """Whoever shows how far a merge is."""

    def show(self, done: float, of: float, text: str) -> None: ...

    def watch(self, progress: Progress) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where and how a merge is written.

    Attributes:
        out: the checkpoint's folder.
        work: folder of the finished pieces of `fda`; None is one below `runs/anchors`, of the base model's own.
        dtype: of the stored tensors; None is the parents'.
        device: computes `tsv`, `wudi` and `fda`; the others are merged on the CPU, where their bits are mergekit's.
    """

    out: Path
    work: Path | None = None
    dtype: str | None = None
    device: str = "auto"
    overwrite: bool = False


def make(request: Request, place: Place, bar: Shown) -> Path:
    """Writes a merge as a checkpoint folder that transformers loads; whole or absent. Returns the folder.

    Raises:
        ConfigError: options or folders that do not fit. CheckpointError, IncompatibleModelsError: as `Parents.open`,
            or a task vector is zero. ExportError: `out` exists. MergeError: a number is not finite.
            DiskError: no space or no permission.
    """
    began = time.monotonic()
    check_target(place.out, overwrite=place.overwrite)
    device = choose_device(place.device)
    if device == SPREAD:
        raise ConfigError("--device spread: a merge is made on one device. Give auto, cpu, cuda or cuda:N.")
    parents = Parents.open(request.pre, request.experts)
    notes = parents.notes if len(parents.experts) > 1 else [*parents.notes, *compare_experts(parents)]
    for note in notes:
        logger.warning("%s", note)
    merge = _Merge(request, place, parents, device, bar)
    merge.check_places()
    merge.write()
    seconds = time.monotonic() - began
    logger.info("%s: %s of %s in %.1f s", place.out, request.method, ", ".join(parents.experts), seconds)
    return place.out


def check_target(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that exists, or that is no merge of mergefront where it is to be replaced.

    Raises:
        ExportError: as above.
    """
    with disk_errors(out):
        there = out.exists() or out.is_symlink()
    if not there:
        return
    if not overwrite:
        raise ExportError(f"{out}: exists. Give another --out, or --overwrite to replace it.")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise ExportError(f"{out}: is not a merge of mergefront, so it is not replaced. Remove it yourself.")


class _Merge:
    """A merge whose parents are open."""

    def __init__(self, request: Request, place: Place, parents: Parents, device: str, bar: Shown) -> None:
        self._request, self._place, self._parents = request, place, parents
        self._device, self._bar = device, bar
        stored = parents.pre.dtype(parents.names[0])
        self._dtype: torch.dtype = stored if place.dtype is None else getattr(torch, place.dtype)
        self._start: Start = self._begin() if request.method == FDA else FromPre()
        self._work = place.work or WORK / parents.pre.sha256()[:16]

    def check_places(self) -> None:
        """The result must not replace what it is made from."""
        final = self._place.out.resolve()
        read = [one.folder for one in self._parents.everybody]
        read += [self._start.merge.folder] if isinstance(self._start, FromMerge) else []
        for folder in read:
            if folder.is_relative_to(final):
                raise ConfigError(f"{self._place.out}: holds {folder}, which is merged. Give another --out.")

    def write(self) -> None:
        if self._request.method == FDA:
            self._build()
            return
        check_space(self._place.out, size_of(self._parents, self._dtype))
        with lone_folder(self._place.out, overwrite=self._place.overwrite) as folder:
            if self._request.method in METHODS:
                self._blend(folder)
            elif self._request.method == SEPARATE:
                self._separate(folder)
            else:
                self._singular(folder)
            check_saved(folder, self._parents, self._dtype)
            self._seal(folder)

    def _blend(self, folder: Path) -> None:
        parents, options = self._parents, dict(self._request.options)
        seed = int(options.pop("seed", 0))
        each = dict.fromkeys(parents.names, self._request.coefficients)
        blend = make_blend(parents, each, self._request.method, options, seed)
        blend = blend.in_order(natural(blend.weights))
        save_checkpoint(parents, blend, self._dtype, folder)
        found = origins(self._where, parents)
        header = [f"A {self._request.method} merge.", *rebuild_header(parents, blend, found)]
        places = parent_places(parents, found)
        text = config_text(parents, blend, places, dtype_name(self._dtype), header)
        (folder / CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")

    def _singular(self, folder: Path) -> None:
        wudi = dict(self._request.options) if self._request.method == WUDI else None
        coefficients, names = self._request.coefficients, self._parents.names
        tensors = Singular(self._parents, coefficients, self._dtype, self._device, wudi)
        place = {name: number for number, name in enumerate(names)}

        def tensor(name: str) -> torch.Tensor:
            self._bar.show(place[name], len(names), name)
            return tensors.tensor(name)

        save_tensors(self._parents.post, names, tensor, self._dtype, folder)

    def _separate(self, folder: Path) -> None:
        parents = self._parents
        whole = [label for label in parents.experts if label not in parents.adapters]
        if whole:
            raise ConfigError(
                f"{SEPARATE}: {whole[0]} is a whole checkpoint (wanted LoRA adapters, whose halves are averaged)."
            )
        with tempfile.TemporaryDirectory() as scratch:
            mean = Path(scratch) / "mean"
            try:
                average_adapters(list(parents.adapters.values()), self._request.coefficients, mean)
                adapter = Adapter.open(mean, parents.pre)
                save_tensors(
                    parents.post,
                    parents.names,
                    lambda name: adapter.apply(parents.pre, name).to(self._dtype, copy=True).contiguous(),
                    self._dtype,
                    folder,
                )
            except (CheckpointError, MergeError) as error:
                raise type(error)(
                    str(error).replace(str(mean), f"{SEPARATE}: the mean of the adapters")
                ) from error

    def _begin(self) -> Start:
        start = self._request.options[START]
        if isinstance(start, float):
            return FromExperts(self._request.coefficients)
        if start == "pre":
            return FromPre()
        merge = Checkpoint.open(Path(start).expanduser())
        begun = FromMerge(merge)
        begun.check(self._parents)
        names = self._parents.names
        if all(torch.equal(merge.tensor(n).float(), self._parents.pre.tensor(n).float()) for n in names):
            raise IncompatibleModelsError(
                f"{start}: every tensor is as in pre, so its task vector is zero. Give another merge, or start=pre."
            )
        return begun

    def _build(self) -> None:
        request, place = self._request, self._place
        built = build(
            self._parents,
            place.out,
            self._work,
            anchors=request.anchors,
            adapt=request.adapt,
            start=self._start,
            dtype=self._dtype,
            device=self._device,
            overwrite=place.overwrite,
            watch=self._bar.watch,
            seal=self._seal,
        )
        spent = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in built.seconds.items())
        logger.info(
            "%d pieces computed, %d were there: %s  (%s)", built.computed, built.reused, self._work, spent
        )

    def _seal(self, folder: Path) -> None:
        write_manifest(folder, self._facts())

    def _facts(self) -> dict[str, Any]:
        """All that the merge depends on, and nothing of how it went: an interrupted one says the same."""
        request = self._request
        facts: dict[str, Any] = {
            "mergefront": __version__,
            "torch": torch.__version__,
            "kind": MERGE,
            "method": request.method,
            "coefficients": dict(zip(request.experts, request.coefficients, strict=False)),
            "options": dict(request.options),
            "dtype": dtype_name(self._dtype),
            "parents": origins(self._where, self._parents),
            "parents_digest": self._parents.digest,
        }
        if request.method == FDA:
            facts["start"] = self._start.facts()
        if request.method not in METHODS:  # the last bits of matrix products depend on them
            facts |= {"device": self._device, "threads": torch.get_num_threads()}
        return facts

    @property
    def _where(self) -> Mapping[str, str]:
        return {"pre": self._request.pre, **self._request.experts}
