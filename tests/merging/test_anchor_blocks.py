"""The decoder layers of every architecture as functions of hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from search.checkpoints.parents import Parents
from search.errors import MergeError
from search.merging.anchors.blocks import Blocks
from search.merging.anchors.construct import construct, gauss
from search.merging.anchors.options import AnchorOptions
from tests.merging.test_anchor_builds import opened
from tests.pico import ARCHS, VOCAB, pico_model, save_pair

SLIDING = {"mistral": 4, "gemma2": 4, "gemma3": 4}


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_compute_what_the_model_computes(arch: str, tmp_path: Path) -> None:
    window = {"sliding_window": SLIDING[arch]} if arch in SLIDING else {}
    pair = Parents.pair(*map(str, save_pair(tmp_path, arch, **window)))
    blocks = Blocks(pair)
    model = pico_model(arch, 0, **window)
    model.set_attn_implementation("eager")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(
            lambda _, args, named, out: seen.append((args[0] if args else named["hidden_states"], out)),
            with_kwargs=True,
        )
    ids = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids)
    before = torch.get_rng_state()
    assert torch.equal(blocks.embed(ids, pair.pre), seen[0][0])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(blocks) == len(seen) == 2
    for index, (hidden, out) in enumerate(seen):
        weights = blocks.weights(index, pair.pre)
        assert torch.equal(blocks.outputs(index, weights, hidden), out)
        assert torch.allclose(blocks.outputs(index, weights, hidden[:, :2]), out[:, :2], atol=1e-5), "causal"
    inside = [stored for index in range(2) for stored in blocks.names(index).values()]
    assert sorted((*inside, *blocks.outside)) == list(pair.names)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_can_be_differentiated_twice(arch: str, tmp_path: Path) -> None:
    pair = opened(tmp_path, 1, arch=arch)
    blocks = Blocks(pair)
    pre, expert = blocks.weights(1, pair.pre), blocks.weights(1, pair.post)
    first = gauss((4, 3, blocks.width), 0.01, torch.Generator().manual_seed(0))
    made = construct(blocks[1], pre, expert, first, AnchorOptions(steps=12))
    assert made.best > float(made.alignment[0]) + 0.02


def test_token_ids_must_fit(tmp_path: Path) -> None:
    pair = opened(tmp_path, 1)
    blocks = Blocks(pair)
    with pytest.raises(MergeError, match=r"from 0 to 96 .wanted 0 to 95"):
        blocks.embed(torch.tensor([[0, VOCAB]]), pair.pre)
    with pytest.raises(MergeError, match=r"shape \(2,\)"):
        blocks.embed(torch.tensor([0, 1]), pair.pre)
