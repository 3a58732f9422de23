"""Proving an export: its files against the manifest, its checkpoint against the scores that chose it.

A one-off merge was chosen by no scores: its files are proved, and that its checkpoint loads whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from objectives.evaluation import Evaluation
from objectives.evaluator import Evaluator
from objectives.metrics.names import get_metric
from objectives.outcomes import Booleans, Floats
from objectives.printable import shown
from objectives.questions.tasks import load_questions
from objectives.scoring.scorer import Scorer
from search.checkpoints.checkpoint import FLOATS, Checkpoint, dtype_name
from search.checkpoints.layout import empty_model, load_config, read_layout
from search.checkpoints.loading import REFUSED, load_model
from search.checkpoints.parents import Parents
from search.checkpoints.placement import choose_device, place
from search.checkpoints.tokenizers import load_tokenizer
from search.config.study_file import StudyConfig
from search.errors import ConfigError, ExportError
from search.export.folder import MODEL
from search.merging.mergekit_config import CONFIG, check_config
from search.running.batches import batch_tokens
from search.running.problem import blend_of, make_space
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import moved_config
from search.storage.manifest import MANIFEST, MERGE, read_manifest
from search.storage.store import StudyStore
from search.storage.trials import TrialRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# How far a log-likelihood may lie from the stored one: absolute, and as a share of it. The weights are the same bits,
# so on the same machine the difference is zero or rounding of float32 sums; the wider bounds of the 16-bit types are
# for another processor or GPU, whose matrix products round in another order at 8 or 11 bits.
TOLERANCE = {"float32": (1e-4, 1e-6), "float16": (1e-2, 3e-3), "bfloat16": (5e-2, 2e-2)}
# Share of written questions whose answers may differ from the stored ones. On the same machine none does; on another
# one a draw within rounding of the border between two tokens turns, and with it the rest of that answer.
TURNED = {"float32": 0.02, "float16": 0.25, "bfloat16": 0.5}


def verify_folder(folder: Path, storage: str | None, overrides: Sequence[str], device: str) -> Iterator[str]:
    """Verifies one export, or a folder of them; yields what was found, line by line.

    With weights: every file has the manifest's SHA-256; the checkpoint has every tensor that its architecture needs and
    no other, all finite; transformers loads it with no missing and no unexpected key; on every split that is stored its
    per-question log-likelihoods equal the stored ones within `TOLERANCE`. Without weights: the files, and that
    the mergekit config gives every tensor exactly the recipe's weights. A one-off merge: the files and the checkpoint.

    Args:
        storage: where the study is, if not where the manifest says.
        overrides: new places of tasks and parents (`tasks.0.path=...`).
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `spread`.

    Raises:
        ExportError: the export is not what it promises. StorageError, ConfigError: the study cannot be read.
    """
    for one in _exports(folder):
        manifest = read_manifest(one)
        yield f"{one}: {len(manifest['files'])} files as in the manifest"
        if manifest.get("kind") == MERGE:
            _, said = _loaded(one, str(manifest.get("dtype")))
            yield f"{said}; a {shown(str(manifest.get('method')))} merge of no study, nothing was scored"
            continue
        study = ExportedStudy.open(one, manifest, storage, overrides)
        yield from (
            study.rescored(one / MODEL, device) if manifest.get("weights") else study.compared(one / CONFIG)
        )


class ExportedStudy:
    """The study behind one export, and the trial it ships."""

    def __init__(
        self, store: StudyStore, config: StudyConfig, record: TrialRecord, evidence: Mapping[str, str | None]
    ) -> None:
        self.store = store
        self.config = config
        self.record = record
        self.evidence = evidence

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], storage: str | None, overrides: Sequence[str]
    ) -> ExportedStudy:
        where = folder / MANIFEST
        missing = {"storage", "study", "trial", "recipe", "parents_digest", "evidence"} - manifest.keys()
        if missing or not isinstance(manifest["evidence"], dict):
            raise ExportError(f"{where}: has no {min(missing, default='evidence')}. Export again.")
        store = StudyStore.open(storage or str(manifest["storage"]), str(manifest["study"]))
        record = next((r for r in store.trials() if r.number == manifest["trial"]), None)
        if record is None or record.state != "complete":
            raise ExportError(
                f"{where}: study '{store.name}' has no complete trial {shown(str(manifest['trial']))}. "
                "Give the --storage it came from."
            )
        known = {
            "recipe": record.attributes["recipe"],
            "parents_digest": store.attribute("identity")["parents"],
        }
        for key, value in known.items():
            if manifest[key] != value:
                raise ExportError(
                    f"{where}: {key} is {shown(str(manifest[key]))[:16]}..., trial {record.number} of study "
                    f"'{store.name}' has {str(value)[:16]}.... Give the --storage it came from."
                )
        # What is stored now counts: the report split may have been scored after the export.
        evidence = {
            "search": record.attributes["evidence"],
            "report": store.attribute(f"report:{record.number}"),
        }
        return cls(store, moved_config(store, overrides), record, evidence)

    def compared(self, path: Path) -> Iterator[str]:
        """Without weights: what the mergekit config does to every tensor, against the recipe."""
        parents = Parents.open(self.config.parents.pre, self.config.parents.post_trained, check_values=False)
        if parents.digest != self.store.attribute("identity")["parents"]:
            raise ConfigError(
                f"study '{self.store.name}': parents changed since it began. "
                "Name their place: --set parents.pre=FOLDER."
            )
        space = make_space(self.config, parents)
        blend = blend_of(self.config, parents, space, self.record.recipe)
        check_config(path, parents, blend)
        count = len(blend.weights)
        yield f"{CONFIG} gives all {count} tensors the weights of the recipe; no checkpoint, nothing was scored"

    def rescored(self, folder: Path, device: str) -> Iterator[str]:
        """With weights: the checkpoint is checked, loaded, and scored on every stored split."""
        dtype = self.config.merge.dtype
        model, said = _loaded(folder, dtype)
        tokenizer = load_tokenizer(folder)
        where = choose_device(device)
        # The batches of the study: others would change the last bits.
        scorer = Scorer(place(model, where), tokenizer, batch_tokens(self.store, self.config, where))
        yield f"{MODEL}  {said}"
        questions = load_questions(self.config.tasks, self.config.split, tokenizer)
        began = self.store.attribute("identity")["questions"]
        if questions.digest != began:
            raise ConfigError(
                f"study '{self.store.name}': questions changed since it began (sha256 {str(began)[:12]} -> "
                f"{questions.digest[:12]}). Name their place: --set tasks.0.path=PATH."
            )
        folder_of_evidence = EvidenceFolder(self.store.url, self.store.name)
        for split, asked in (("search", questions.search), ("report", questions.report)):
            digest = self.evidence[split]
            if digest is None:
                yield f"{split}  was never scored for this trial"
                continue
            stored = folder_of_evidence.load(digest)
            measured = Evaluator(scorer, tokenizer, asked, self.config.tasks).evaluate()
            said = _compare(folder, split, measured, stored, self.config)
            yield f"{split}  {', '.join(self._metrics(measured, stored))}; {len(asked)} questions, {said}  ok"

    def _metrics(self, measured: Evaluation, stored: Evaluation) -> Iterator[str]:
        tasks = self.store.attribute("facts")["tasks"]
        for name, _ in self.store.attribute("objectives"):
            if name in self.config.sampled_objectives:
                continue  # answers are not sampled again: the log-likelihoods prove the weights
            metric = get_metric(str(name), tasks=tasks)
            now, then = metric.value(measured.outcomes), metric.value(stored.outcomes)
            yield f"{name} {now:.4f} {'= stored' if f'{now:.4f}' == f'{then:.4f}' else f'(stored {then:.4f})'}"


def _loaded(folder: Path, dtype: str) -> tuple[PreTrainedModel, str]:
    """A checkpoint as transformers loads it, and what was found."""
    saved = Checkpoint.open(folder)
    saved.check_finite()
    layout = {name: saved.shape(name) for name in saved.names}
    read_layout(empty_model(load_config(folder), folder), layout, folder)
    kind = {dtype_name(one): one for one in FLOATS}.get(dtype, torch.float32)
    refused = (*REFUSED, "unexpected_keys")
    model = load_model(folder, load_config(folder), kind, error=ExportError, refused=refused)
    return model, f"{len(saved.names)} tensors, all finite; loads with no missing and no unexpected key"


def _exports(folder: Path) -> list[Path]:
    if (folder / MANIFEST).exists():
        return [folder]
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder. Give one that mergefront export made.")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith("trial-"))
    if not found:
        raise ExportError(
            f"{folder}: no {MANIFEST}, and no trial folders. Give one that mergefront export made."
        )
    return found


def _compare(folder: Path, split: str, measured: Evaluation, stored: Evaluation, config: StudyConfig) -> str:
    """What the comparison found, of options and of written answers.

    Raises:
        ExportError: the scores are about other questions, or differ by more than is allowed.
    """
    if measured.digest != stored.digest or len(measured.outcomes) != len(stored.outcomes):
        raise ExportError(f"{folder}: {split} split: the stored scores are about other questions.")
    is_written = np.array([task.written for task in config.tasks])[stored.outcomes.task]
    widest = max(one.loglikelihood.shape[1] for one in (measured, stored))
    now, then = (
        np.pad(
            one.loglikelihood.astype(np.float64),
            ((0, 0), (0, widest - one.loglikelihood.shape[1])),
            constant_values=-np.inf,
        )
        for one in (measured, stored)
    )
    said = []
    if not is_written.all():
        said.append(_compare_options(folder, split, now, then, ~is_written, config.merge.dtype))
    if is_written.any():
        same = (now == then).all(axis=1) & (measured.outcomes.gold == stored.outcomes.gold)
        turned, count = int((is_written & ~same).sum()), int(is_written.sum())
        allowed = TURNED[config.merge.dtype]
        if turned > max(1.0, allowed * count):
            raise ExportError(
                f"{folder}: {split} split: {turned} of {count} written questions are answered otherwise than stored "
                f"(allowed {allowed:.0%}). This checkpoint is not what was scored, or was scored on other hardware: "
                "export it again there."
            )
        said.append(f"written answers differ for {turned} of {count} (allowed {allowed:.0%})")
    return "; ".join(said)


def _compare_options(folder: Path, split: str, now: Floats, then: Floats, rows: Booleans, dtype: str) -> str:
    """Compares the log-likelihoods `(n, k)` of the questions at `rows`."""
    real = np.isfinite(then) & rows[:, None]
    difference = np.where(real, np.abs(np.where(real, now - np.where(real, then, 0.0), 0.0)), 0.0)
    absolute, share = TOLERANCE[dtype]
    over = difference > absolute + share * np.where(real, np.abs(np.where(real, then, 0.0)), 0.0)
    if over.any():
        question = int(np.argwhere(over)[0, 0])
        raise ExportError(
            f"{folder}: {split} split: {int(over.any(axis=1).sum())} of {int(rows.sum())} questions score otherwise "
            f"than stored, by up to {difference.max():.3g} in log-likelihood (allowed {absolute:g}), the first is "
            f"question {question}. "
            "This checkpoint is not what was scored, or was scored on other hardware: export it again there."
        )
    return f"largest log-likelihood difference {difference.max(initial=0.0):.2g} (allowed {absolute:g})"
