"""`mergefront calibrate`: trials of a study with calibrators on its board, and temperatures written into models.

What a calibrator must read beyond a study's evidence is measured once and stored with the study.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from objectives.calibrators.cape import permuted_questions
from objectives.calibrators.fitted import FittedTemperature
from objectives.calibrators.layerwise import LayerwiseScorer
from objectives.calibrators.logits import OptionLogits, vocabulary_digest
from objectives.calibrators.methods import METHODS, Logits, fit
from objectives.evaluation import Evaluation
from objectives.evaluator import Evaluator
from objectives.questions.questions import Split, closed
from objectives.questions.tasks import load_questions
from search.checkpoints.layout import load_config
from search.checkpoints.loading import load_model
from search.checkpoints.placement import choose_device, place
from search.checkpoints.tokenizers import load_tokenizer
from search.config.study_file import StudyConfig, load_study_file
from search.errors import ConfigError, ExportError
from search.export.calibrated_model import write_into_checkpoint, write_into_export
from search.export.folder import MODEL
from search.export.verify import ExportedStudy
from search.results.alternatives import (
    AUTOMATIC,
    CAPE,
    READS_ONLY_OPTIONS,
    READS_OPTIONS,
    SPLITS,
    Scores,
    calibrators_key,
    cape_key,
    chosen_methods,
    diversity_key,
    layers_key,
    require_options,
)
from search.results.board import Row, read_board
from search.results.calibration_table import CalibrationTable, calibration_table
from search.results.picks import pick
from search.running.batches import size_batches
from search.running.launch import reopen
from search.running.problem import Problem
from search.storage.evidence import EvidenceFolder
from search.storage.frozen import check_identity
from search.storage.manifest import MANIFEST, MERGE, read_manifest
from search.storage.store import StudyStore

logger = logging.getLogger("mergefront")


def calibrate_board(
    url: str,
    name: str,
    methods: Sequence[str],
    selections: Sequence[str],
    overrides: Sequence[str],
    device: str,
) -> CalibrationTable:
    """`calibrate` of a study: measures what is missing, and returns its table.

    Args:
        methods: as the user named them; `all` leaves CAPE out where the questions do not list their options.
        selections: `pre`, `post`, an expert, or as for export; none: `post`, if it is there, and the knee.
    """
    chosen = chosen_methods(methods)
    store, problem = reopen(url, name, device, overrides)
    tasks = problem.config.tasks
    if "all" in methods and any(task.format != "letter" for task in tasks):
        chosen.remove(CAPE)
        logger.info("cape is left out: it needs prompts that list their options (format: letter)")
    if "all" in methods and any(task.written for task in tasks):
        out = READS_OPTIONS if all(task.written for task in tasks) else READS_ONLY_OPTIONS
        chosen = [method for method in chosen if method not in out]
        logger.info("%s left out: answers are written (format: generation)", ", ".join(out))
    require_options(chosen, tasks)
    board = read_board(store)
    named = {row.label: row for row in board.parents}
    asked = selections or (*([] if "post" not in named else ["post"]), "knee")
    rows = [named[one] if one in named else pick(board, one) for one in asked]
    calibrate_study(store, problem, rows, chosen, named["pre"].trial)
    return calibration_table(read_board(store), Scores(store))


def calibrate_model(
    folder: Path,
    methods: Sequence[str],
    reference: Path | None,
    study: Path | None,
    storage: str | None,
    overrides: Sequence[str],
    device: str,
) -> FittedTemperature:
    """`calibrate` of a folder: an export of a study, or any checkpoint with `study`, the file whose questions fit.

    Raises:
        ConfigError: several methods, or no study file for a checkpoint.
    """
    chosen = chosen_methods(methods)
    if len(chosen) != 1:
        raise ConfigError("--method: a model carries one temperature. Name one method.")
    if (folder / MANIFEST).is_file():
        if read_manifest(folder).get("kind") == MERGE:
            raise ConfigError(
                f"{folder}: a merge of no study. Give it to a study as an expert and calibrate that study."
            )
        fitted = calibrate_export(folder, chosen[0], storage, overrides, device)
    elif study is None:
        raise ConfigError(
            "--study: wanted a study file with the questions to fit on, such as --study STUDY.yaml."
        )
    else:
        fitted = calibrate_checkpoint(folder, reference, load_study_file(study, overrides), chosen[0], device)
    if fitted.reason:
        logger.warning("%s", fitted.reason)
    return fitted


def calibrate_study(
    store: StudyStore, problem: Problem, rows: Sequence[Row], methods: Sequence[str], pre: int
) -> None:
    """Puts these trials with these calibrators on the study's board; what is stored already is not measured again.

    Args:
        rows: the trials, complete.
        methods: names of `CALIBRATORS`.
        pre: number of the trial of the pre-trained parent.

    Raises:
        ConfigError: CAPE with questions that do not list their options; a model whose layers cannot be read.
    """
    numbers = [row.trial for row in rows]
    layers = [] if not any("layers" in METHODS.get(m, ()) for m in methods) else sorted({pre, *numbers})
    averages = numbers if CAPE in methods else []
    if averages:
        for split in SPLITS:  # before anything is scored
            permuted_questions(closed(problem.questions.of(split)))
    by_number = {record.number: record for record in store.trials()}
    worker = _Reader(store, problem)
    for number in dict.fromkeys([*layers, *averages, *numbers]):
        wanted = [layers_key(number, split) for split in SPLITS if number in layers]
        wanted += [cape_key(number, split) for split in SPLITS if number in averages]
        if number in numbers:
            wanted += [f"diversity:{number}"] if problem.prompts is not None else []
            wanted.append(
                f"report:{number}"
            )  # last, as after the search: its presence says that all is there
        known = store.attributes()
        missing = [key for key in wanted if key not in known]
        if missing:
            size_batches(store, problem)
            problem.merge(by_number[number].recipe)
            for key in missing:
                logger.info("trial %d: %s", number, key.replace(f":{number}", ""))
                store.set_attribute(key, worker.measured(key))
    _sample_answers(store, problem, numbers, list(dict.fromkeys([*AUTOMATIC, *methods])))
    for number in numbers:
        asked = store.attribute(calibrators_key(number)) or []
        store.set_attribute(calibrators_key(number), list(dict.fromkeys([*asked, *methods])))


def _sample_answers(
    store: StudyStore, problem: Problem, numbers: Sequence[int], methods: Sequence[str]
) -> None:
    """Samples answers at each fitted temperature, where the study samples answers: diversity changes with it."""
    if problem.prompts is None or all(task.written for task in problem.config.tasks):
        return  # a temperature of shares is none to sample at
    evidence = EvidenceFolder(store.url, store.name)
    records = {record.number: record for record in store.trials()}
    scores = Scores(store)
    for number in numbers:
        fitted = {method: scores.fitted(method, number) for method in methods if method != CAPE}
        known = store.attributes()
        wanted = [(m, s) for m in fitted for s in SPLITS if diversity_key(number, m, s) not in known]
        if wanted:
            problem.merge(records[number].recipe)
        for method, split in wanted:
            one = fitted[method]
            assert one is not None, "the scores were measured above"
            logger.info(
                "trial %d: answers at temperature %.3g (%s, %s)", number, one.temperature, method, split
            )
            sampled = problem.diversify(split, one.temperature)
            assert sampled is not None, "there are prompts"
            store.set_attribute(diversity_key(number, method, split), evidence.save(sampled))


def calibrate_export(
    folder: Path, method: str, storage: str | None, overrides: Sequence[str], device: str
) -> FittedTemperature:
    """Fits a temperature to an exported trial on the search split of its study, and writes it into the export.

    Raises:
        ExportError: the folder has no checkpoint, or was changed. ConfigError: CAPE, which is no temperature.
    """
    manifest = read_manifest(folder)
    if not manifest.get("weights"):
        raise ExportError(f"{folder}: has no checkpoint to write to. Export again with --weights.")
    study = ExportedStudy.open(folder, manifest, storage, overrides)
    _require_temperature(method, study.config)
    require_options([method], study.config.tasks)
    store = study.store
    records = [record for record in store.trials() if record.state == "complete"]
    pre = next(record.number for record in records if record.kind == "pre")
    number = study.record.number
    known = store.attributes()
    if "layers" in METHODS[method] and any(layers_key(n, "search") not in known for n in (pre, number)):
        problem = Problem.open(study.config, device)
        check_identity(store, problem.identity)
        rows = [row for row in read_board(store).rows if row.trial == number]
        calibrate_study(store, problem, rows, [method], pre)
    fitted = Scores(store).fitted(method, number)
    assert fitted is not None, "the scores were measured above"
    write_into_export(folder, MODEL, fitted, manifest)
    return fitted


def calibrate_checkpoint(
    folder: Path, reference: Path | None, config: StudyConfig, method: str, device: str
) -> FittedTemperature:
    """Fits a temperature to any checkpoint on the search split of a study file's questions, and writes it there.

    Args:
        folder: a checkpoint in Hugging Face layout with its tokenizer.
        reference: the pre-trained checkpoint, for the methods that need one.
        config: its tasks, split and dtype are used; its parents are not.

    Raises:
        ConfigError: a method that needs a reference without one, different vocabularies or depths.
        ExportError: a checkpoint does not load.
    """
    _require_temperature(method, config)
    if "reference" in METHODS[method] and reference is None:
        raise ConfigError(f"--method {method}: needs the pre-trained model. Give --reference DIR.")
    used = reference if "reference" in METHODS[method] else None
    if used is not None:
        _require_comparable(folder, used, method)
    post = _logits(folder, config, method, device)
    pre = None if used is None else _logits(used, config, method, device)
    fitted = fit(method, post, pre)
    write_into_checkpoint(folder, fitted)
    return fitted


def _require_temperature(method: str, config: StudyConfig) -> None:
    if method == CAPE:
        raise ConfigError(
            "--method cape: averages several prompts and is no temperature; a model cannot carry it."
        )
    if all(task.written for task in config.tasks):
        raise ConfigError(
            f"--method {method}: a model's temperature is fitted to likelihoods of options, but all tasks of study "
            f"'{config.name}' have written answers. Give it a task with choices."
        )


def _require_comparable(folder: Path, reference: Path, method: str) -> None:
    """Says before anything is scored what the fit would find out."""
    if "layers" in METHODS[method]:
        depths = [int(load_config(one).get_text_config().num_hidden_layers) for one in (folder, reference)]
        if depths[0] != depths[1]:
            raise ConfigError(
                f"--method {method}: {folder} has {depths[0]} layers but {reference} has {depths[1]}; it compares them "
                "layer by layer. Use daca, which does not."
            )
    if method != "daca":
        digests = [vocabulary_digest(load_tokenizer(one)) for one in (folder, reference)]
        if digests[0] != digests[1]:
            raise ConfigError(
                f"--method {method}: {folder} and {reference} have different vocabularies. Give the reference that "
                "the model was trained from, or use daca."
            )


def _logits(folder: Path, config: StudyConfig, method: str, device: str) -> Logits:
    """The scores of one checkpoint on the search split, of all layers where the method reads them."""
    tokenizer = load_tokenizer(folder)
    questions = closed(load_questions(config.tasks, config.split, tokenizer).search)
    dtype = getattr(torch, config.merge.dtype)
    model = place(load_model(folder, load_config(folder), dtype, error=ExportError), choose_device(device))
    scorer = LayerwiseScorer(model, tokenizer, config.batch_tokens)
    logger.info("%s: scoring %d questions", folder, len(questions))
    if "layers" in METHODS[method]:
        return scorer.layerwise(questions, config.tasks)
    evaluation = Evaluator(scorer, tokenizer, questions, config.tasks).evaluate()
    return OptionLogits.from_evaluation(evaluation, None if method == "daca" else tokenizer)


class _Reader:
    """Reads the live model for calibrators."""

    def __init__(self, store: StudyStore, problem: Problem) -> None:
        self._problem = problem
        self._evidence = EvidenceFolder(store.url, store.name)

    def measured(self, key: str) -> str:
        """Digest of the evidence that a study attribute of this name wants, for the model's present values."""
        what, _, rest = key.partition(":")
        if what == "report":
            return self._evidence.save(self._problem.evaluate("report"))
        if what == "diversity":
            sampled = self._problem.diversify("report")
            assert sampled is not None, "there are prompts"
            return self._evidence.save(sampled)
        split: Split = "search" if rest.endswith("search") else "report"
        if what == "layers":
            return self._layers(split)
        return self._evidence.save(self._averaged(split))

    def _layers(self, split: Split) -> str:
        scorer = self._problem.scorer
        reader = LayerwiseScorer(scorer.model, scorer.tokenizer, scorer.batch_tokens)
        questions = closed(self._problem.questions.of(split))
        return self._evidence.save_layers(reader.layerwise(questions, self._problem.config.tasks).earlier)

    def _averaged(self, split: Split) -> Evaluation:
        """CAPE's mean probabilities as an evaluation of the questions themselves, with log p as their scores."""
        problem = self._problem
        permuted = permuted_questions(closed(problem.questions.of(split)))
        found = Evaluator(
            problem.scorer, problem.tokenizer, permuted.questions, problem.config.tasks
        ).evaluate()
        return Evaluation.of_probabilities(
            permuted.average(found.outcomes), found.scored_tokens, problem.evaluator(split).digest
        )
