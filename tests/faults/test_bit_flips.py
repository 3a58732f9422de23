"""One flipped bit in a file: found wherever its digest was written down. Elsewhere nothing can see it (SECURITY.md)."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest

from search.checkpoints.adapters import merged_adapter
from search.checkpoints.checkpoint import SINGLE, Checkpoint
from search.config.study_file import load_study_file
from search.errors import ConfigError, EvaluationError, ExportError
from search.export.verify import verify_folder
from search.results.board import read_board
from search.running.launch import create, reopen
from search.storage.evidence import EvidenceFolder
from search.storage.manifest import MANIFEST, read_manifest
from search.storage.store import StudyStore
from tests.checkpoints.test_adapter_files import pair, write
from tests.export_process import exported
from tests.fault_table import Fault
from tests.hostile_files import copy
from tests.pico_study import write_study

pytestmark = pytest.mark.fault(16)


def flip(path: Path, draw: random.Random) -> None:
    """Turns one bit of a file over."""
    with path.open("r+b") as stream:
        place = draw.randrange(path.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << draw.randrange(8))]))


def test_in_any_file_of_an_export(finished_study: tuple[Path, str], tmp_path: Path, fault: Fault) -> None:
    """Oracle: the error names the very file, the manifest itself included, for three bits of each."""
    draw = random.Random(0)
    _, url = finished_study
    best = read_board(StudyStore.open(url, "pico")).front[0].trial
    original = exported(url, tmp_path / "out", best)
    files = sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file())
    assert {Path(MANIFEST), Path("model") / SINGLE, Path("mergekit_config.yml")} <= set(files)
    tries = 0
    for file in files:
        if file == Path(MANIFEST):
            continue
        for _ in range(3):
            folder = tmp_path / f"copy-{tries}"
            shutil.copytree(original, folder)
            flip(folder / file, draw)
            with pytest.raises(ExportError) as caught:
                list(verify_folder(folder, None, [], "cpu"))
            assert str(caught.value).startswith(f"{folder / file}: was changed")
            shutil.rmtree(folder)
            tries += 1
    fault.struck(tries)


def test_in_the_manifest_it_is_an_error_or_a_fact_that_is_compared(
    finished_study: tuple[Path, str], tmp_path: Path, fault: Fault
) -> None:
    """A digest, a size or a name that was hit no longer fits its file; JSON may be broken; nothing raises otherwise."""
    draw = random.Random(1)
    _, url = finished_study
    original = exported(url, tmp_path / "out", 1, weights=False)
    whole, refused, files = (original / MANIFEST).read_text(), 0, read_manifest(original)["files"]
    for _ in range(40):
        flip(original / MANIFEST, draw)
        try:
            assert read_manifest(original)["files"] == files
        except ExportError:
            refused += 1
        (original / MANIFEST).write_text(whole)
    assert refused >= 10
    fault.struck(40)


def test_in_evidence(finished_study: tuple[Path, str], tmp_path: Path, fault: Fault) -> None:
    _, url = finished_study
    shutil.copytree(EvidenceFolder(url, "pico").path, tmp_path / "evidence")
    folder = EvidenceFolder(f"sqlite:///{tmp_path / 'study.db'}", "pico")
    draw, files = random.Random(2), sorted(folder.path.iterdir())
    for file in files:
        flip(file, draw)
        with pytest.raises(EvaluationError, match="SHA-256 is not the recorded"):
            folder.load(file.stem)
    fault.struck(len(files))


def test_in_a_parent_after_the_study_began(tmp_path: Path) -> None:
    """The weights are as legal as before; the study knows the digest of what it began with."""
    study = write_study(tmp_path, trials=1)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    create(load_study_file(study), url, "cpu")
    with (tmp_path / "post" / SINGLE).open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"\x01")
    for again in (lambda: create(load_study_file(study), url, "cpu"), lambda: reopen(url, "pico", "cpu")):
        with pytest.raises(ConfigError, match="parents changed since it began"):
            again()


def test_without_a_digest_nobody_can_know(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """What SECURITY.md does not promise: a checkpoint that was damaged before it was first read."""
    folder = copy(saved[0], tmp_path / "model")
    with (folder / SINGLE).open("r+b") as stream:
        stream.seek(-4, 2)
        stream.write(b"\x01")
    one = Checkpoint.open(folder)
    assert one.check_finite() == []
    assert one.sha256() != Checkpoint.open(saved[0]).sha256()


@pytest.mark.parametrize("how", ["flipped", "removed", "added", "no manifest"])
def test_in_a_merged_adapter_of_the_cache(
    how: str,
    saved: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is merged again, with a warning, to the same bytes; a sound one is used as it is."""
    monkeypatch.setenv("MERGEFRONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("mergefront"), "propagate", True)
    adapter, base = write(tmp_path / "adapter", pair()), Checkpoint.open(saved[0])
    folder = merged_adapter(adapter, base)
    weights = folder / SINGLE
    before, inode = weights.read_bytes(), weights.stat().st_ino
    assert merged_adapter(adapter, base) == folder
    assert weights.stat().st_ino == inode
    if how == "flipped":
        flip(weights, random.Random(3))
    elif how == "removed":
        (folder / "tokenizer.json").unlink()
    elif how == "added":
        (folder / "evil.py").write_text("x")
    else:
        (folder / MANIFEST).unlink()
    with caplog.at_level("WARNING", "mergefront"):
        assert merged_adapter(adapter, base) == folder
    assert weights.read_bytes() == before
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "evil.py").exists()
    assert "does not hold what was written there; it is made again" in caplog.text
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
