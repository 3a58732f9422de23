"""Functional Dual Anchors on whole checkpoints: what a build writes, what it keeps, and builds that are killed."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from search.checkpoints.checkpoint import Checkpoint
from search.checkpoints.parents import Parents
from search.errors import (
    CheckpointError,
    ConfigError,
    DiskError,
    ExportError,
    IncompatibleModelsError,
    MergeError,
)
from search.merging.anchors.blocks import Blocks
from search.merging.anchors.build import Progress, build
from search.merging.anchors.options import AdaptOptions, AnchorOptions
from search.merging.anchors.starts import FromExperts, FromMerge, FromPre
from search.merging.methods.linear import merge_linear
from search.storage.pieces import PieceStore
from tests.pico import VOCAB, block_network, pico_model, pico_tokenizer

OPTIONS = AnchorOptions(n=4, tokens=3, steps=3)
ADAPT = AdaptOptions(epochs=2, batch=4)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def save_experts(folder: Path, count: int = 2, arch: str = "llama", **overrides: Any) -> list[Path]:
    """pre and experts that are near it, as fine-tuning leaves them."""
    model = pico_model(arch, 0, **overrides)
    pre = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    places = []
    for number in range(count + 1):
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = 0.01 * torch.randn(parameter.shape, generator=draw)
                parameter.copy_(pre[name] + (noise if number else 0))
        places.append(folder / ("pre" if not number else f"expert{number}"))
        model.save_pretrained(places[-1])
        pico_tokenizer().save_pretrained(places[-1])
    return places


def opened(folder: Path, count: int = 2, **overrides: Any) -> Parents:
    pre, *experts = save_experts(folder, count, **overrides)
    return Parents.open(str(pre), {one.name: str(one) for one in experts})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- builds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt_neox"])
def test_a_build_is_a_checkpoint_that_loads_whole(arch: str, tmp_path: Path) -> None:
    parents = opened(tmp_path, arch=arch)
    told: list[Progress] = []
    built = build(
        parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, watch=told.append
    )
    model, report = AutoModelForCausalLM.from_pretrained(built.folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    assert (built.computed, built.reused) == (6, 0)
    assert [progress.done for progress in told if progress.step == progress.steps][-1] == told[-1].of == 7
    assert {progress.phase for progress in told} == {"construct", "adapt", "write"}
    assert all(best >= first for row in built.alignment for first, best in row)
    assert set(built.seconds) == {"construct", "adapt", "write"}
    saved, blocks = Checkpoint.open(built.folder), Blocks(parents)
    for name in blocks.outside:
        mean = merge_linear([one.tensor(name) for one in parents.everybody], [0, 0.5, 0.5])
        assert torch.equal(saved.tensor(name), mean)
    for index in range(2):
        for name in blocks.names(index).values():
            assert not torch.equal(saved.tensor(name), parents.pre.tensor(name))


def test_anchors_bring_the_blocks_nearer_to_the_experts(tmp_path: Path) -> None:
    parents = opened(tmp_path, 1)
    options = replace(OPTIONS, n=16, steps=20)
    for start, rate in ((FromPre(), 1e-3), (FromExperts((0.3,)), 1e-2)):
        fitting = AdaptOptions(epochs=40, batch=16, rate=rate)
        built = build(
            parents,
            tmp_path / "out",
            tmp_path / "work",
            anchors=options,
            adapt=fitting,
            start=start,
            overwrite=True,
        )
        assert all(after < 0.2 * before for before, after in built.losses)


def test_refinement_without_steps_is_the_merge_that_was_given(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    still = replace(ADAPT, epochs=0)
    one = build(
        parents,
        tmp_path / "one",
        tmp_path / "work",
        anchors=OPTIONS,
        adapt=still,
        start=FromExperts((0.3, 0.5)),
    )
    merged = Checkpoint.open(one.folder)
    for name in parents.names:
        tensors = [one.tensor(name) for one in parents.everybody]
        assert torch.equal(merged.tensor(name), merge_linear(tensors, [1 - 0.8, 0.3, 0.5]))
    two = build(
        parents,
        tmp_path / "two",
        tmp_path / "work",
        anchors=OPTIONS,
        adapt=still,
        start=FromMerge(merged),
    )
    assert content(one.folder)["model.safetensors"] == content(two.folder)["model.safetensors"]
    assert (two.computed, two.reused) == (2, 4), "the anchors serve every start"
    moved = build(
        parents,
        tmp_path / "three",
        tmp_path / "work",
        anchors=OPTIONS,
        adapt=ADAPT,
        start=FromMerge(merged),
    )
    assert all(after < before for before, after in moved.losses)


def test_bfloat16_parents_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    for place in save_experts(tmp_path / "wide"):
        model = AutoModelForCausalLM.from_pretrained(place).to(torch.bfloat16)
        model.save_pretrained(tmp_path / place.name)
        pico_tokenizer().save_pretrained(tmp_path / place.name)
    parents = Parents.open(
        str(tmp_path / "pre"), {name: str(tmp_path / name) for name in ("expert1", "expert2")}
    )
    built = build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT)
    wide = build(
        parents, tmp_path / "out32", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, dtype=torch.float32
    )
    narrow, exact = Checkpoint.open(built.folder), Checkpoint.open(wide.folder)
    assert all(torch.equal(narrow.tensor(name), exact.tensor(name).bfloat16()) for name in parents.names)
    assert wide.computed == 0


def test_controls_take_the_same_way(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCAB, (4, 3), generator=draw) for _ in parents.experts]
    unoptimised = replace(OPTIONS, steps=0)
    build(
        parents,
        tmp_path / "random",
        tmp_path / "work",
        anchors=replace(unoptimised, init="gauss"),
        adapt=ADAPT,
    )
    work = tmp_path / "data-work"
    build(
        parents,
        tmp_path / "data",
        work,
        anchors=replace(unoptimised, init="data"),
        adapt=ADAPT,
        data=ids,
    )
    model = pico_model("llama", 0)
    model.set_attn_implementation("eager")
    stored = {
        name: piece["anchors"]
        for path in work.glob("anchors-*")
        for name, piece in [(path.name, torch_load(path))]
    }
    with torch.no_grad():
        states = [state for one in ids for state in model(one, output_hidden_states=True).hidden_states[:2]]
    assert len(stored) == 4
    for state in states:
        assert any(torch.allclose(state, found, atol=1e-6) for found in stored.values())


def torch_load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_sigma_is_tried_on_one_block_and_used_for_all(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    options = replace(OPTIONS, init="gauss", sigmas=(1e-5, 0.05, 50.0), sigma_steps=4)
    built = build(parents, tmp_path / "out", tmp_path / "work", anchors=options, adapt=ADAPT)
    assert built.sigma == 0.05
    assert built.computed == 3 + 6
    same = build(
        parents,
        tmp_path / "same",
        tmp_path / "work2",
        anchors=replace(options, sigma=0.05, sigmas=()),
        adapt=ADAPT,
    )
    assert content(same.folder) == content(built.folder)


def test_an_expert_that_equals_pre_holds_the_blocks_there(tmp_path: Path) -> None:
    pre, expert = map(str, save_experts(tmp_path, 1))
    built = build(
        Parents.open(pre, {"moved": expert, "still": pre}, check_values=False),
        tmp_path / "out",
        tmp_path / "work",
        anchors=OPTIONS,
        adapt=ADAPT,
    )
    assert all(best == best and nothing != nothing for (_, best), (_, nothing) in built.alignment)


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_killed_build_resumes_to_the_same_bytes(stop: int, tmp_path: Path) -> None:
    parents = opened(tmp_path)
    whole = build(parents, tmp_path / "whole", tmp_path / "whole-work", anchors=OPTIONS, adapt=ADAPT)

    def strike(progress: Progress) -> None:
        if progress.done == stop and progress.step < progress.steps:  # within the next piece
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with suppress(BaseException):
            build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, watch=strike)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (tmp_path / "work" / ".anchors-0.safetensors.1.part").write_bytes(b"half")
    (tmp_path / ".out.1.part").mkdir()
    resumed = build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT)
    assert (resumed.computed, resumed.reused) == (6 - stop, stop)
    assert content(resumed.folder) == content(whole.folder)
    assert content(tmp_path / "work") == content(tmp_path / "whole-work")
    assert not (tmp_path / ".out.1.part").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "empty"])
def test_a_torn_piece_is_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mergefront"), "propagate", True)
    parents = opened(tmp_path)
    built = build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT)
    before = content(tmp_path / "work")
    victim, other, *_ = sorted((tmp_path / "work").glob("anchors-*"))
    whole = victim.read_bytes()
    bad = {
        "cut": whole[:-7],
        "flipped": whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:],
        "renamed": other.read_bytes(),
        "empty": b"",
    }[damage]
    victim.write_bytes(bad)
    with caplog.at_level("WARNING", "mergefront"):
        again = build(
            parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, overwrite=True
        )
    assert (again.computed, again.reused) == (1, 5)
    assert content(tmp_path / "work") == before
    assert again.losses == built.losses
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(victim) in line
    assert "computed again" in line
    assert "\n" not in line


def test_file_names_say_what_a_piece_depends_on(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    out, work = tmp_path / "same", tmp_path / "work"
    build(parents, tmp_path / "out", work, anchors=OPTIONS, adapt=ADAPT)
    for changed in (
        replace(OPTIONS, seed=1),
        replace(OPTIONS, steps=4),
        replace(OPTIONS, distance="squared"),
    ):
        other = build(parents, tmp_path / "out", work, anchors=changed, adapt=ADAPT, overwrite=True)
        assert other.reused == 0
    same = build(
        parents,
        tmp_path / "out",
        work,
        anchors=replace(OPTIONS, sigma=5.0),
        adapt=replace(ADAPT, seed=3),
        overwrite=True,
    )
    assert (same.computed, same.reused) == (2, 4), "sigma has no part in rows of matrices"
    pre, one, two = (str(checkpoint.folder) for checkpoint in parents.everybody)
    turned = Parents.open(pre, {"two": two, "one": one})
    reverse = build(turned, tmp_path / "out", work, anchors=OPTIONS, adapt=ADAPT, overwrite=True)
    assert (reverse.computed, reverse.reused) == (2, 4), "an expert's anchors do not depend on its place"
    renamed = Parents.open(pre, {"two": one, "one": two})
    called = build(renamed, tmp_path / "named", work, anchors=OPTIONS, adapt=ADAPT)
    assert (called.computed, called.reused) == (0, 6), "nor does anything on names"
    assert content(called.folder) == content(build(parents, out, work, anchors=OPTIONS, adapt=ADAPT).folder)


def test_a_watcher_that_raises_leaves_finished_pieces_and_no_checkpoint(tmp_path: Path) -> None:
    parents = opened(tmp_path)

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT, watch=stop)
    assert not (tmp_path / "out").exists()
    assert build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT).reused == 3


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    out, work = tmp_path / "out", tmp_path / "work"
    ids = torch.zeros(4, 3, dtype=torch.int64)
    data = replace(OPTIONS, init="data")

    def refused(kind: type[Exception], message: str, *where: Path, **named: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            build(parents, *(where or (out, work)), **{"anchors": OPTIONS, "adapt": ADAPT, **named})
        assert "\n" not in str(caught.value)
        assert not out.exists()

    refused(ConfigError, "coefficients .0.3. for 2 experts", start=FromExperts((0.3,)))
    refused(ConfigError, "weight with token ids", data=[ids, ids])
    refused(ConfigError, "data with no token ids", anchors=data)
    refused(ConfigError, "token ids for 1 experts .wanted 2", anchors=data, data=[ids])
    refused(ConfigError, r"expert2: shape \(4, 2\) .wanted \(4, 3\)", anchors=data, data=[ids, ids[:, :2]])
    refused(ConfigError, "holds .*work, which the build needs", tmp_path, work)
    refused(ConfigError, "holds .*pre, which the build needs", tmp_path / "pre", work)
    refused(ConfigError, "holds .*inner, which the build needs", out, out / "inner")
    refused(ConfigError, "Give the pieces a folder of their own", work / "out", work)
    refused(ExportError, "expert1/config.json: exists", tmp_path / "expert1" / "config.json", work)
    work.mkdir()
    refused(ExportError, "work: exists. Give another", work, tmp_path / "other")
    refused(ExportError, "is not a checkpoint", work, tmp_path / "other", overwrite=True)
    refused(MergeError, "block 0: adapt: the loss went from", adapt=replace(ADAPT, rate=1e30))
    refused(
        MergeError,
        "block 0, expert1: anchors: the alignment is not a number",
        anchors=replace(OPTIONS, rate=1e30),
    )


def test_a_merge_of_other_models_is_not_refined(tmp_path: Path) -> None:
    parents = opened(tmp_path)
    wider = Checkpoint.open(save_experts(tmp_path / "wider", 0, intermediate_size=72)[0])
    with pytest.raises(IncompatibleModelsError, match="Give a merge of the same models"):
        build(parents, tmp_path / "out", tmp_path / "work", start=FromMerge(wider))
    model = pico_model("llama", 0)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(CheckpointError, match="NaN"):
        build(
            parents, tmp_path / "out", tmp_path / "work", start=FromMerge(Checkpoint.open(tmp_path / "nan"))
        )


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = opened(tmp_path)

    def full(self: PieceStore, *arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("search.storage.pieces.write_whole", full)
    with pytest.raises(DiskError, match="no space left"):
        build(parents, tmp_path / "out", tmp_path / "work", anchors=OPTIONS, adapt=ADAPT)
