"""Laws of the merge kernels, and bit equality with the real mergekit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.checkpoints.checkpoint import SINGLE
from search.checkpoints.parents import Parents
from search.errors import MergeError
from search.merging.blend import make_blend
from search.merging.live import LiveModel
from search.merging.methods import linear
from search.merging.methods.linear import linear_weights, merge_linear, weighted_sum
from search.merging.methods.slerp import angle, slerp_weights
from tests.pico import ARCHS, save_pair

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
coefficient = st.floats(-0.5, 1.5, allow_nan=False)


def pair(
    seed: int, shape: tuple[int, ...] = (37, 11), dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@settings(max_examples=20, deadline=None)
@given(c=coefficient, seed=st.integers(0, 9), chunk=st.integers(1, 500))
def test_chunked_kernel_equals_the_definition(
    source: torch.dtype, target: torch.dtype, c: float, seed: int, chunk: int
) -> None:
    a, b = pair(seed, dtype=source)
    kept = a.clone(), b.clone()
    wanted = merge_linear([a.float(), b.float()], linear_weights([c])).to(target)
    out = torch.full(a.shape, 7.0, dtype=target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "CHUNK", chunk)
        patch.setattr(linear, "_zeros", lambda: torch.zeros(chunk))
        weighted_sum([a, b], linear_weights([c]), out)
    assert torch.equal(out.view(torch.uint8), wanted.view(torch.uint8))  # every bit, signs of zeros too
    assert torch.equal(a, kept[0])  # inputs are not changed
    assert torch.equal(b, kept[1])


@pytest.mark.parametrize("source", DTYPES)
def test_accelerator_path_equals_the_definition(source: torch.dtype) -> None:
    a, b = pair(4, dtype=source)
    out = torch.empty(a.numel(), dtype=torch.bfloat16)
    linear._fill_at_once([a.view(-1), b.view(-1)], [0.25, 0.75], out)
    assert torch.equal(out.view(a.shape), merge_linear([a.float(), b.float()], [0.25, 0.75]).bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_bits(tmp_path: Path) -> None:
    parents = Parents.pair(*map(str, save_pair(tmp_path, dtype="bfloat16")))
    coefficients = {n: (-0.25 + 1.5 * (i * 7 % 19) / 19,) for i, n in enumerate(parents.names)}
    host, guest = LiveModel(parents, "bfloat16"), LiveModel(parents, "bfloat16", "cuda")
    for live in (host, guest):
        live.apply(make_blend(parents, coefficients))
    for name, tensor in host.model.state_dict().items():
        assert torch.equal(tensor, guest.model.state_dict()[name].cpu()), name


@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_does_not_depend_on_threads_or_real_chunks(threads: int) -> None:
    a, b = pair(0, (3, 2 * linear.CHUNK // 3 + 17))
    wanted, out = merge_linear([a, b], [0.3, 0.7]), torch.empty_like(a)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weighted_sum([a, b], [0.3, 0.7], out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "weights",
    [lambda c: linear_weights([c]), lambda c: slerp_weights(c, 1.1), lambda c: slerp_weights(c, None)],
)
def test_vertices_reproduce_the_parents(dtype: torch.dtype, weights: Any) -> None:
    parents = pair(3, dtype=dtype)
    for vertex, parent in enumerate(parents):
        out = torch.empty_like(parent)
        weighted_sum(parents, weights(float(vertex)), out)
        assert torch.equal(out, parent)


@settings(max_examples=50, deadline=None)
@given(c=coefficient)
def test_reference_is_a_fused_sum_in_float32(c: float) -> None:
    """Against exact arithmetic: float64 holds a product of two float32 exactly, and its sum is then rounded."""
    a, b = pair(1)
    w = [float(torch.tensor(x, dtype=torch.float32)) for x in linear_weights([c])]
    first = (a.double() * w[0]).float()
    exact = first.double() + b.double() * w[1]
    assert torch.allclose(
        merge_linear([a, b], linear_weights([c])).double(), exact, rtol=0, atol=2.0**-23 * 8
    )


def test_near_coefficients_stay_apart_in_bfloat16_parents() -> None:
    a, b = pair(2, dtype=torch.bfloat16)
    outs = [torch.empty(a.shape, dtype=torch.float32) for _ in range(2)]
    for out, c in zip(outs, (0.3, 0.301), strict=True):
        weighted_sum([a, b], linear_weights([c]), out)
    assert not torch.equal(*outs)


def test_refusals() -> None:
    a, b = torch.ones(3, 4), torch.ones(4)
    for call in (
        lambda: merge_linear([a, b], [0.5, 0.5]),
        lambda: merge_linear([a, a], [0.5]),
        lambda: merge_linear([], []),
        lambda: merge_linear([a, a], [0.5, float("nan")]),
        lambda: merge_linear([a, a.bfloat16()], [0.5, 0.5]),
        lambda: weighted_sum([a, b], [0.5, 0.5], torch.empty(3, 4)),
        lambda: weighted_sum([a, a], [0.5, 0.5], torch.empty(4, 3)),
        lambda: weighted_sum([a, a], [0.5, 0.5], torch.empty(4, 3).t()),
        lambda: weighted_sum([a, a], [0.5, float("inf")], torch.empty(3, 4)),
        lambda: weighted_sum([a, a], [1e39, 0.5], torch.empty(3, 4)),
    ):
        with pytest.raises(MergeError):
            call()


def test_float16_overflow_is_refused_not_stored() -> None:
    a = torch.full((5,), 60_000.0)
    out = torch.empty(5, dtype=torch.float16)
    weighted_sum([a, a], [0.5, 0.5], out)
    with pytest.raises(MergeError, match="w: a merged value does not fit into float16"):
        weighted_sum([a, a], [1.0, 1.0], out, name="w")
    weighted_sum([a, a], [1.0, 1.0], torch.empty(5, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 4), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    a, b = pair(0, shape)
    out = torch.empty(shape)
    weighted_sum([a, b], [0.25, 0.75], out)
    assert torch.equal(out, merge_linear([a, b], [0.25, 0.75]))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30, deadline=None)
@given(c=coefficient, seed=st.integers(0, 20), closeness=st.sampled_from([0.0, 0.5, 0.95, 0.999, 1.0]))
def test_slerp_equals_mergekit(dtype: torch.dtype, c: float, seed: int, closeness: float) -> None:
    """Within 2 units of the last place of the largest value: mergekit sums the angle in float32."""
    from mergekit.merge_methods.slerp import slerp

    a, b = pair(seed, dtype=torch.float32)
    a, b = a.to(dtype), (closeness * a + (1 - closeness) * b).to(dtype)
    wanted = slerp(torch.tensor([c]), a[None], b[None])[0]
    out = torch.empty_like(a)
    weighted_sum([a, b], slerp_weights(c, angle(a, b)), out)
    scale = max(float(a.abs().max()), float(b.abs().max()))
    unit = torch.finfo(dtype).eps * scale
    assert float((out.float() - wanted.float()).abs().max()) <= (
        2 * unit if dtype != torch.float32 else 1e-5 * scale
    )


def test_angle_rules() -> None:
    a, b = pair(0)
    assert angle(a, torch.zeros_like(a)) is None
    assert angle(a, a) is None
    assert angle(a, -a) is None
    assert angle(torch.ones(0), torch.ones(0)) is None
    assert angle(a, b) == angle(b, a)
    assert angle(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])) == pytest.approx(math.pi / 2)
    assert slerp_weights(0.25, None) == linear_weights([0.25])


@settings(max_examples=50, deadline=None)
@given(c=coefficient, omega=st.floats(0.04, 3.1))
def test_slerp_keeps_the_norm_of_unit_parents(c: float, omega: float) -> None:
    w = slerp_weights(c, omega)
    assert w[0] ** 2 + w[1] ** 2 + 2 * w[0] * w[1] * math.cos(omega) == pytest.approx(1.0, abs=1e-6)


def test_many_chunks_do_not_change_the_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(5, (1000, 30), torch.bfloat16)
    whole = angle(a, b)
    monkeypatch.setattr("search.merging.methods.slerp._CHUNK", 7)
    assert angle(a, b) == pytest.approx(whole, abs=1e-12)


def rebuild_with_mergekit(
    parents: Parents, weights: dict[str, tuple[float, float]], dtype: str, out: Path
) -> None:
    """Write the recipe as mergekit `linear` with one filter a tensor and run the real mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = []
    for position, one in enumerate((parents.pre, parents.post)):
        values: list[dict[str, Any]] = [{"filter": name, "value": w[position]} for name, w in weights.items()]
        values.append({"value": float(position)})  # for buffers that mergekit plans and we leave out
        models.append({"model": str(one.folder), "parameters": {"weight": values}})
    config = {
        "merge_method": "linear", "models": models, "parameters": {"normalize": False},
        "dtype": "float32", "out_dtype": dtype,
    }  # fmt: skip
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def add_buffers(folder: Path) -> None:
    """mergekit's GPT-NeoX definition requires the masks that only old checkpoints store."""
    tensors = load_file(folder / SINGLE)
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[prefix + "bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors[prefix + "masked_bias"] = torch.tensor(-1e4)
        tensors[prefix + "rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("stored", "dtype", "method", "tied"),
    [
        ("float32", "float32", "linear", None),
        ("bfloat16", "bfloat16", "linear", True),
        ("bfloat16", "bfloat16", "slerp", None),
        ("float16", "float32", "linear", None),
        ("float32", "float16", "linear", None),
    ],
)
def test_mergekit_rebuilds_what_was_scored(
    arch: str, stored: str, dtype: str, method: str, tied: bool | None, tmp_path: Path
) -> None:
    folders = save_pair(tmp_path, arch, dtype=stored, tied=tied)
    if arch == "gpt_neox":
        if tied:
            pytest.skip("mergekit's GPT-NeoX definition has no tied form")
        for folder in folders:
            add_buffers(folder)
    parents = Parents.pair(*map(str, folders))
    coefficients = {n: (-0.25 + 1.5 * (i * 7 % 19) / 19,) for i, n in enumerate(parents.names)}
    live = LiveModel(parents, dtype)
    live.apply(make_blend(parents, coefficients, method))
    rebuild_with_mergekit(parents, make_blend(parents, coefficients, method).weights, dtype, tmp_path / "out")
    rebuilt = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert sorted(set(rebuilt) - set(parents.ignored)) == list(parents.names)
    state = live.model.state_dict()
    for name in parents.names:
        tensor, scored = rebuilt[name], state[parents.parameter[name]]
        assert tensor.dtype == scored.dtype
        assert torch.equal(tensor.view(torch.uint8), scored.view(torch.uint8)), name
