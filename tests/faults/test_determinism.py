"""The same study again gives the same bytes; another number of threads gives the same scores within rounding.

Threads change the order in which float32 sums are formed, so the last bits of a log-likelihood differ: by no more than
`TOLERANCE`, the bound that `verify` allows on the same machine. No accuracy changes by it unless a question is tied
within that bound.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from search.config.study_file import load_study_file
from search.export.verify import TOLERANCE
from search.results.board import read_board
from search.running.launch import create
from search.storage.evidence import EvidenceFolder
from search.storage.store import StudyStore
from search.study import run
from tests.export_process import exported
from tests.faults.child import in_child
from tests.pico_study import write_study

pytestmark = pytest.mark.fault(28)

MERGES = {
    "linear": {"method": "linear", "dtype": "float32"},
    "slerp in bfloat16": {"method": "slerp", "dtype": "bfloat16"},
}


def _study(folder: str, url: str, threads: int) -> tuple[str, dict[str, bytes]]:
    """Runs and exports it in this process: front JSON, and every file of evidence and export by its name."""
    torch.set_num_threads(threads)
    run(*create(load_study_file(Path(folder) / "study.yaml"), url, "cpu"))
    store, out = StudyStore.open(url, "pico"), Path(url.removeprefix("sqlite:///")).parent / "out"
    board = read_board(store)
    exported(url, out, board.front[0].trial)
    files = {}
    for root in (EvidenceFolder(url, "pico").path, out):
        files |= {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    return json.dumps(board.to_json()), files


@pytest.mark.parametrize("merge", ["linear", pytest.param("slerp in bfloat16", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_bytes(merge: str, tmp_path: Path) -> None:
    """In two processes and two storages; an export differs only where it says in which storage its study is."""
    dtype = MERGES[merge]["dtype"]
    write_study(tmp_path, trials=2, merge=MERGES[merge], parents={"dtype": dtype})
    urls = [f"sqlite:///{tmp_path / name / 'study.db'}" for name in ("one", "two")]
    (front, files), (again, others) = (in_child(_study, str(tmp_path), url, 1) for url in urls)
    assert front == again
    assert files.keys() == others.keys()
    differing = {name for name in files if files[name] != others[name]}
    assert {Path(name).name for name in differing} <= {"manifest.json", "recipe.yaml", "README.md"}
    for name in differing:
        moved = files[name].replace(urls[0].encode(), urls[1].encode())
        assert _without_digests(moved) == _without_digests(others[name]), name


def _without_digests(text: bytes) -> list[bytes]:
    """The lines but for digests and sizes of files that name the storage."""
    return [line for line in text.splitlines() if b'"sha256"' not in line and b'"size"' not in line]


@pytest.mark.slow
def test_one_thread_against_two(tmp_path: Path) -> None:
    """Oracle: the log-likelihoods of the same recipes, question by question, and the objectives."""
    write_study(tmp_path, trials=3)
    stores = []
    for threads in (1, 2):
        url = f"sqlite:///{tmp_path / str(threads) / 'study.db'}"
        in_child(_study, str(tmp_path), url, threads)
        stores.append(StudyStore.open(url, "pico"))
    one, two = (store.trials() for store in stores)
    absolute, relative = TOLERANCE["float32"]
    compared = 0
    for first, second in zip(one, two, strict=True):
        if first.attributes["recipe"] != second.attributes["recipe"]:
            continue  # a sampler that read other last bits may go elsewhere
        scores = [
            EvidenceFolder(store.url, "pico").load(trial.attributes["evidence"]).loglikelihood
            for store, trial in zip(stores, (first, second), strict=True)
        ]
        np.testing.assert_allclose(scores[0], scores[1], rtol=relative, atol=absolute)
        np.testing.assert_allclose(first.values, second.values, rtol=0, atol=1e-3)
        compared += 1
    assert compared >= 11, "the baselines at least"
