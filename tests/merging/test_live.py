"""The live model computes what the merged checkpoint computes, in memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from search.checkpoints.checkpoint import SINGLE
from search.checkpoints.parents import Parents
from search.errors import MergeError
from search.merging.blend import make_blend
from search.merging.live import LiveModel
from search.merging.methods.linear import merge_linear
from tests.pico import ARCHS, VOCAB, block_network, save_pair

TOKENS = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    block_network(monkeypatch)


def coefficients_for(parents: Parents) -> dict[str, tuple[float]]:
    """Another coefficient for each tensor, extrapolation included."""
    return {name: (-0.2 + 1.4 * index / len(parents.names),) for index, name in enumerate(parents.names)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_equal_those_of_the_merged_checkpoint(
    arch: str, tied: bool, dtype: str, tmp_path: Path
) -> None:
    pre, post = save_pair(tmp_path, arch, tied=tied, dtype="bfloat16")
    parents = Parents.pair(str(pre), str(post))
    live = LiveModel(parents, dtype)
    coefficients = coefficients_for(parents)
    live.apply(make_blend(parents, coefficients))
    merged = {}
    for name, (c,) in coefficients.items():
        pair = [parents.pre.tensor(name).float(), parents.post.tensor(name).float()]
        merged[name] = merge_linear(pair, [1 - c, c]).to(live.dtype)
    for file in post.iterdir():
        if file.name != SINGLE:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(merged, tmp_path / SINGLE, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=live.dtype, attn_implementation=live.model.config._attn_implementation
    )
    with torch.no_grad():
        assert torch.equal(live.model(TOKENS).logits, loaded(TOKENS).logits)


def test_starts_as_post_and_returns_to_either_parent(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path, tied=True)
    parents = Parents.pair(str(pre), str(post))
    live = LiveModel(parents)
    for coefficient, folder in ((None, post), (0.0, pre), (0.37, None), (1.0, post), (0.0, pre)):
        if coefficient is not None:
            method = "slerp" if coefficient == 0.37 else "linear"
            live.apply(make_blend(parents, dict.fromkeys(parents.names, (coefficient,)), method))
        if folder is not None:
            with torch.no_grad():
                wanted = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
                assert torch.equal(live.model(TOKENS).logits, wanted)
    assert live.model.lm_head.weight.data_ptr() == live.model.model.embed_tokens.weight.data_ptr()


def test_parameters_are_not_the_mapped_file(tmp_path: Path) -> None:
    pre, post = save_pair(tmp_path)
    before = [(folder / SINGLE).read_bytes() for folder in (pre, post)]
    parents = Parents.pair(str(pre), str(post))
    live = LiveModel(parents)
    ranges = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    spans = [tuple(int(end, 16) for end in r[0].split("-")) for r in ranges]
    for parameter in live.model.parameters():
        assert not any(low <= parameter.data_ptr() < high for low, high in spans)
    addresses = {name: p.data_ptr() for name, p in live.model.named_parameters()}
    live.apply(make_blend(parents, dict.fromkeys(parents.names, (0.5,))))
    assert {name: p.data_ptr() for name, p in live.model.named_parameters()} == addresses  # in place
    assert [(folder / SINGLE).read_bytes() for folder in (pre, post)] == before
    assert torch.equal(parents.pre.tensor("model.norm.weight"), load_file(pre / SINGLE)["model.norm.weight"])


def test_eval_mode_without_gradients(tmp_path: Path) -> None:
    parents = Parents.pair(*map(str, save_pair(tmp_path)))
    model = LiveModel(parents, torch.float16).model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_recipe_that_does_not_fit(tmp_path: Path) -> None:
    parents = Parents.pair(*map(str, save_pair(tmp_path)))
    live = LiveModel(parents)
    full = dict.fromkeys(parents.names, (0.5,))
    short = {name: c for name, c in full.items() if name != "model.norm.weight"}
    for coefficients, method, wanted in (
        (short, "linear", "model.norm.weight has no coefficient"),
        ({**full, "lm_heat": (0.1,)}, "linear", "lm_heat is not a tensor"),
        ({**full, "model.norm.weight": (float("nan"),)}, "slerp", r"model.norm.weight is \[nan\]"),
        (full, "karcher", "karcher merges at least 2 experts"),
    ):
        with pytest.raises(MergeError, match=wanted):
            live.apply(make_blend(parents, coefficients, method))
