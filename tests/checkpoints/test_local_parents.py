"""Parents copied to the machine that works with them: once, whole, and never mistaken for what a study began with."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.local_parents import LocalParents
from search.config.study_file import load_study_file
from search.errors import CheckpointError, ConfigError, DiskError
from search.running.launch import create, reopen
from search.storage.store import StudyStore
from search.study import run
from tests.conftest import Cli
from tests.fault_table import Fault
from tests.pico_study import write_study

ROOT = Path(__file__).resolve().parents[2]
_context = multiprocessing.get_context("forkserver")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "shared", trials=1)


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def copies(root: Path) -> list[Path]:
    return sorted(root.iterdir())


def test_a_study_reads_copies_and_names_the_parents_own_places(study: Path, tmp_path: Path, cli: Cli) -> None:
    local = tmp_path / "local"
    code, _, err = cli("launch", study, "--local-parents", local)
    assert code == 0, err
    assert len(copies(local)) == 2
    assert not any(path.name.startswith(".") for path in copies(local))
    store = StudyStore.open(f"sqlite:///{tmp_path / 'runs' / 'pico' / 'study.db'}", "pico")
    own = {"pre": str(study.parent / "pre"), "post": str(study.parent / "post")}
    assert {label: one["where"] for label, one in store.attribute("facts")["parents"].items()} == own
    assert store.attribute("config")["parents"]["pre"] == own["pre"]
    assert f"parents    {own['pre']}  +  {own['post']}" in err
    code, _, err = cli("export", "pico", "--select", "trial:0", "--out", tmp_path / "out")
    assert code == 0, err
    config = (tmp_path / "out" / "trial-00000" / "mergekit_config.yml").read_text()
    assert own["post"] in config
    assert str(local) not in config


def test_the_shared_weights_are_not_read_once_a_machine_has_its_copies(study: Path, tmp_path: Path) -> None:
    """The oracle is the kernel's: a mapped or opened file of the shared folder would be among the open ones."""
    local, url = tmp_path / "local", url_of(tmp_path)
    create(load_study_file(study), url, "cpu", local_parents=local)
    made = {path: path.stat().st_mtime_ns for path in local.rglob("*")}
    _, problem = reopen(url, "pico", "cpu", local_parents=local)
    assert {one.folder.parent for one in problem.parents.everybody} == {local}
    problem.merge(problem.baselines[3].recipe)
    maps = Path("/proc/self/maps").read_text()
    assert str(local) in maps
    assert {path: path.stat().st_mtime_ns for path in local.rglob("*")} == made, "nothing is copied again"
    # A damaged shared file is not noticed, since nobody reads it: what the study began with lies here.
    weights = study.parent / "post" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    _, again = reopen(url, "pico", "cpu", local_parents=local)
    assert again.identity == problem.identity


def test_scores_are_those_of_the_shared_parents(study: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for folder, local in ((there, None), (here, tmp_path / "local")):
        folder.mkdir()
        run(*create(load_study_file(study), url_of(folder), "cpu", local_parents=local))
    one, other = (StudyStore.open(url_of(folder), "pico").trials() for folder in (there, here))
    assert [(t.values, t.coefficients) for t in one] == [(t.values, t.coefficients) for t in other]


@pytest.mark.fault(5)
def test_changed_parents_are_refused_and_moved_ones_are_copied_from_their_new_place(
    study: Path, tmp_path: Path, fault: Fault
) -> None:
    url = url_of(tmp_path)
    store, problem = create(load_study_file(study), url, "cpu")
    run(store, problem)
    before = {t.number: t.values for t in store.trials()}
    moved = tmp_path / "moved"
    shutil.copytree(study.parent / "post", moved)
    shutil.rmtree(study.parent / "post")
    with pytest.raises(CheckpointError, match="no such folder"):
        reopen(url, "pico", "cpu", local_parents=tmp_path / "local")
    place = [f"parents.post={moved}"]
    _, found = reopen(url, "pico", "cpu", place, local_parents=tmp_path / "local")
    assert found.identity == problem.identity
    shutil.copytree(study.parent / "pre", study.parent / "post")
    other = tmp_path / "elsewhere"
    with pytest.raises(ConfigError, match=r"post changed since the study began .*--set parents\.post=FOLDER"):
        reopen(url, "pico", "cpu", local_parents=other)
    assert len(copies(other)) == 1, "pre, and nothing of the wrong one"
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_text(
        json.dumps(json.loads(tokenizer.read_text()) | {"normalizer": {"type": "Lowercase"}})
    )
    with pytest.raises(ConfigError, match="parents changed since it began"):
        reopen(url, "pico", "cpu", place, local_parents=tmp_path / "local")
    fault.kept(before, {t.number: t.values for t in store.trials()})


@pytest.mark.fault(16)
def test_a_damaged_copy_is_refused_with_what_to_do(study: Path, tmp_path: Path) -> None:
    local, url = tmp_path / "local", url_of(tmp_path)
    _, problem = create(load_study_file(study), url, "cpu", local_parents=local)
    copy = problem.parents.post.folder
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.unlink()  # not through the map
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"this copy of post is damaged .* Remove it: it is made again"):
        reopen(url, "pico", "cpu", local_parents=local)
    shutil.rmtree(copy)
    assert reopen(url, "pico", "cpu", local_parents=local)[1].identity == problem.identity


def _copy(root: Path, folder: Path, together: Any, out: Path) -> None:
    together.wait(60)
    copy = LocalParents(root, {}).copy_of("pre", folder, str(folder))
    with out.open("a") as stream:
        stream.write(f"{copy} {(copy / 'model.safetensors').stat().st_ino}\n")


def test_workers_that_ask_at_once_make_one_copy(study: Path, tmp_path: Path) -> None:
    together, out, root = _context.Barrier(3), tmp_path / "out", tmp_path / "local"
    processes = [
        _context.Process(target=_copy, args=(root, study.parent / "pre", together, out)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = out.read_text().splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1, "one folder, and it was not replaced"
    assert len(copies(root)) == 1


@pytest.mark.fault(1)
def test_a_copy_that_was_cut_off_is_absent_and_made_again(study: Path, tmp_path: Path, fault: Fault) -> None:
    root, pre = tmp_path / "local", study.parent / "pre"
    code = (
        "import os, shutil, signal, sys; from pathlib import Path; "
        "from search.checkpoints.local_parents import LocalParents; real = shutil.copyfile\n"
        "def once(a, b):\n    real(a, b)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.copyfile = once; LocalParents(Path(sys.argv[1]), {}).copy_of('pre', Path(sys.argv[2]), sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, root, pre], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (rest,) = copies(root)
    assert rest.name.startswith("."), "what was cut off has not the name of a copy"
    copy = LocalParents(root, {}).copy_of("pre", pre, str(pre))
    assert copies(root) == [copy], "and is cleared away"
    assert Checkpoint.open(copy).sha256() == Checkpoint.open(pre).sha256()


@pytest.mark.fault(11)
def test_a_full_disk_is_named_and_nothing_is_left(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    pre = study.parent / "pre"
    with pytest.raises(DiskError, match="no space left on the disk"):
        LocalParents(tmp_path / "local", {}).copy_of("pre", pre, str(pre))
    assert not (tmp_path / "local").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"--local-parents .*: is a file\. Give a folder"):
        LocalParents(tmp_path / "file", {}).copy_of("pre", pre, str(pre))


def test_adapters_are_copied_and_hub_ids_are_not(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"not read here")
    local = LocalParents(tmp_path / "local", {"post": "digest of base and adapter together"})
    copy = local.copy_of("post", adapter, str(adapter))
    assert sorted(path.name for path in copy.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert local.copy_of("post", adapter, str(adapter)) == copy
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    assert local.copy_of("post", adapter, str(adapter)) != copy
    cached = tmp_path / "models--org--name" / "snapshots" / "abc"
    assert local.copy_of("pre", cached, "org/name") == cached


def test_a_link_that_leads_out_is_refused_before_anything_is_copied(study: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    pre = study.parent / "pre"
    (pre / "generation_config.json").unlink(missing_ok=True)
    (pre / "generation_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="a link that leads out of the folder"):
        LocalParents(tmp_path / "local", {}).copy_of("pre", pre, str(pre))
    assert not (tmp_path / "local").exists()


@pytest.mark.slow
def test_workers_beside_read_the_same_copies(study: Path, tmp_path: Path, cli: Cli) -> None:
    """`--workers` hands the option on: two processes, two copies."""
    code, _, err = cli("launch", study, "--workers", "2", "--local-parents", "copies", "--set", "trials=2")
    assert code == 0, err
    assert len(copies(tmp_path / "copies")) == 2


def test_what_else_lies_in_the_folder_is_left_alone(study: Path, tmp_path: Path) -> None:
    """Names that look staged, but are no digest's, are somebody's own: a home folder may be given."""
    local = tmp_path / "local"
    for name in ("data", ".data.old", ".bashrc.old", ".mine.0.part"):
        (local / name).mkdir(parents=True)
        (local / name / "file").write_text(name)
    create(load_study_file(study), url_of(tmp_path), "cpu", local_parents=local)
    for name in ("data", ".data.old", ".bashrc.old", ".mine.0.part"):
        assert (local / name / "file").read_text() == name
    assert len(copies(local)) == 4 + 2
