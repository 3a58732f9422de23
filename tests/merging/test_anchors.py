"""Functional Dual Anchors on one block: construction and adaptation against what can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad

from search.errors import ConfigError, MergeError
from search.merging.anchors.adapt import adapt
from search.merging.anchors.construct import (
    construct,
    cosines,
    gauss,
    pick_sigma,
    unit_directions,
    weight_rows,
)
from search.merging.anchors.functional import call, distances
from search.merging.anchors.options import DISTANCES, AdaptOptions, AnchorOptions

WIDTH = 12
SQUARED = AnchorOptions(distance="squared", decay=0.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_pair(power: float = 1.0, width: int = WIDTH, rank: int | None = None) -> Any:
    """y = W x, its weights in pre and in an expert, and the singular values and right vectors of their difference."""
    left, _ = torch.linalg.qr(drawn(width, width, seed=1))
    right, _ = torch.linalg.qr(drawn(width, width, seed=2))
    values = 0.05 * torch.arange(1, width + 1).float() ** -power
    values[rank:] = 0 if rank else values[rank:]
    change = (left * values) @ right.T
    pre = {"weight": 0.3 * drawn(width, width, seed=3)}
    block = torch.nn.Linear(width, width, bias=False)
    return block, pre, {"weight": pre["weight"] + change}, values, right


class Mixer(torch.nn.Module):
    """A residual block with a bias, a norm and a product of two branches, as decoder layers have."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 2 * width)
        self.gate = torch.nn.Linear(width, 2 * width, bias=False)
        self.down = torch.nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.norm(hidden)
        return hidden + self.down(self.up(inner) * torch.nn.functional.silu(self.gate(inner)))


def mixer_pair(dtype: torch.dtype = torch.float32) -> Any:
    block = Mixer()
    names = [(name, tensor.shape) for name, tensor in block.named_parameters()]
    pre = {name: (0.5 * drawn(*shape, seed=i)).to(dtype) for i, (name, shape) in enumerate(names)}
    expert = {
        name: pre[name] + (0.05 * drawn(*s, seed=90 + i)).to(dtype) for i, (name, s) in enumerate(names)
    }
    return block, pre, expert


# -- the linear block ----------------------------------------------------------------------------------------------


def test_one_anchor_reaches_the_first_singular_direction() -> None:
    block, pre, expert, values, right = linear_pair()
    optimum = float(values[0] / values.norm())
    at_optimum = cosines(block, pre, expert, right[:, 0].reshape(1, 1, -1), "squared")["weight"]
    assert float(at_optimum) == pytest.approx(optimum, abs=1e-6)
    first = gauss((1, 1, WIDTH), 1.0, torch.Generator().manual_seed(0))
    made = construct(block, pre, expert, first, replace(SQUARED, steps=300, rate=0.03))
    assert made.best == pytest.approx(optimum, abs=1e-4)
    found = made.anchors.flatten()
    assert float((found @ right[:, 0]).abs() / found.norm()) > 0.999


def test_isotropic_anchors_align_perfectly() -> None:
    block, pre, expert, _, _ = linear_pair()
    anchors = torch.linalg.qr(drawn(WIDTH, WIDTH, seed=7))[0].reshape(WIDTH, 1, WIDTH)
    assert float(cosines(block, pre, expert, anchors, "squared")["weight"]) == pytest.approx(1.0, abs=1e-6)


def test_the_printed_sign_gives_the_negative_cosine() -> None:
    block, pre, expert, _, _ = linear_pair()
    anchors = drawn(5, 1, WIDTH, seed=8)
    weight = pre["weight"].clone().requires_grad_()
    wanted = call(block, expert, anchors)
    printed = torch.autograd.grad(
        distances(call(block, {"weight": weight}, anchors), wanted, "squared").sum(), weight
    )[0]
    change = expert["weight"] - pre["weight"]
    cosine = float((printed * change).sum() / (printed.norm() * change.norm()))
    ours = float(cosines(block, pre, expert, anchors, "squared")["weight"])
    assert ours > 0
    assert cosine == pytest.approx(-ours, abs=1e-6)


def test_one_plain_step_scales_each_component_as_worked_out() -> None:
    """With one anchor the cosine is |Dx| / (|x| |D|); a step along its gradient scales component k by

        1 + rate (s_k^2 / |Dx|^2 - 1 / |x|^2) cos

    so components where D is zero only shrink together: no energy reaches them, and none leaves for the others.
    """
    block, pre, expert, values, right = linear_pair(rank=5)
    x, rate = drawn(1, 1, WIDTH, seed=9).requires_grad_(), 0.1
    cosine = cosines(block, pre, expert, x, "squared")["weight"]
    (slope,) = torch.autograd.grad(cosine, x)
    before, after = (x.detach().flatten() @ right, (x + rate * slope).detach().flatten() @ right)
    moved = values * before
    factor = 1 + rate * float(cosine.detach()) * (
        values**2 / moved.square().sum() - 1 / before.square().sum()
    )
    assert torch.allclose(after, before * factor, atol=1e-6)
    assert torch.allclose(factor[5:], factor[5])


def test_alignment_over_sigma_is_an_inverted_u_with_weight_rows_near_its_top() -> None:
    block, pre, expert, _, _ = linear_pair(width=24)
    options = AnchorOptions(distance="squared", steps=60)
    reached = {}
    for sigma in (100.0, 1.0, 1e-2, 1e-4, 1e-6):
        first = gauss((8, 1, 24), sigma, torch.Generator().manual_seed(0))
        reached[sigma] = float(construct(block, pre, expert, first, options).alignment[-1])
    assert reached[100.0] < reached[1.0] < reached[1e-2] > reached[1e-4] > reached[1e-6]
    rows = weight_rows(expert, (8, 1, 24), torch.Generator().manual_seed(0))
    assert float(construct(block, pre, expert, rows, options).alignment[-1]) > reached[1e-2] - 0.03


# -- any block -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_equal_nested_functional_gradients(distance: Any) -> None:
    block, pre, expert = mixer_pair(torch.float64)
    anchors = drawn(3, 2, 8, seed=4).double()

    def similarity(weights: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(block, weights, (x,)), functional_call(block, expert, (x,))
        return -distances(*outputs, distance).sum()

    def loss(x: torch.Tensor) -> torch.Tensor:
        found = grad(similarity)(pre, x)
        change = {name: expert[name] - pre[name] for name in pre}
        parts = [1 - (g * change[n]).sum() / (g.norm() * change[n].norm()) for n, g in found.items()]
        return torch.stack(parts).sum()

    x = anchors.clone().requires_grad_()
    ours = (1 - torch.stack(list(cosines(block, pre, expert, x, distance).values()))).sum()
    assert float(ours.detach()) == pytest.approx(float(loss(anchors)), abs=1e-12)
    assert torch.allclose(torch.autograd.grad(ours, x)[0], grad(loss)(anchors), atol=1e-10)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("init", ["weight", "gauss"])
def test_construction_improves_and_keeps_the_best(distance: Any, init: str) -> None:
    block, pre, expert = mixer_pair()
    draw = torch.Generator().manual_seed(0)
    first = weight_rows(expert, (6, 2, 8), draw) if init == "weight" else gauss((6, 2, 8), 0.01, draw)
    copies = first.clone(), {name: tensor.clone() for name, tensor in pre.items()}
    seen: list[int] = []
    options = AnchorOptions(steps=40, rate=0.05, distance=distance)
    with torch.no_grad():  # whatever the caller does
        made = construct(block, pre, expert, first, options, watch=lambda step, _: seen.append(step))
    assert made.best > float(made.alignment[0]) + 0.05
    again = torch.stack(list(cosines(block, pre, expert, made.anchors, distance).values())).mean()
    assert float(again) == pytest.approx(made.best, abs=1e-6)
    assert len(made.alignment) == 41
    assert seen == list(range(41))
    assert torch.equal(first, copies[0])
    assert all(torch.equal(pre[name], copies[1][name]) for name in pre)
    assert torch.equal(construct(block, pre, expert, first, options).anchors, made.anchors)


def test_zero_task_vectors_are_skipped() -> None:
    block, pre, expert = mixer_pair()
    expert = {**expert, "norm.weight": pre["norm.weight"], "up.bias": pre["up.bias"].clone()}
    anchors = drawn(4, 2, 8)
    assert set(unit_directions(pre, expert)) == set(pre) - {"norm.weight", "up.bias"}
    assert set(cosines(block, pre, expert, anchors)) == set(pre) - {"norm.weight", "up.bias"}
    made = construct(block, pre, dict(pre), anchors, AnchorOptions(steps=3))
    assert torch.equal(made.anchors, anchors)
    assert len(made.alignment) == 0
    assert math.isnan(made.best)


def test_an_unused_parameter_has_cosine_zero() -> None:
    block, pre, expert = mixer_pair()
    block.extra = torch.nn.Parameter(torch.zeros(3))
    found = cosines(
        block, {**pre, "extra": torch.zeros(3)}, {**expert, "extra": torch.ones(3)}, drawn(2, 2, 8)
    )
    assert float(found["extra"]) == 0


def test_a_tiny_change_still_has_a_direction() -> None:
    """Gradients far below 1e-8 must not be flattened by an epsilon."""
    block, pre, expert, values, right = linear_pair()
    near = {"weight": pre["weight"].double() + 1e-9 * (expert["weight"] - pre["weight"]).double()}
    wide = {"weight": pre["weight"].double()}
    anchor = 1e-3 * right[:, 0].double().reshape(1, 1, -1)
    found = cosines(block, wide, near, anchor, "squared")["weight"]
    assert float(found) == pytest.approx(float(values[0] / values.norm()), abs=1e-4)


def test_not_a_number_is_never_kept() -> None:
    block, pre, expert = mixer_pair()
    broken = {**expert, "up.bias": torch.full_like(expert["up.bias"], math.nan)}
    with pytest.raises(MergeError, match="not a number after 0 steps"):
        construct(block, pre, broken, drawn(2, 2, 8), AnchorOptions(steps=2))
    with pytest.raises(MergeError, match="not a number after 1 steps"):
        construct(block, pre, expert, drawn(2, 2, 8), AnchorOptions(steps=2, rate=1e30))
    anchors = drawn(4, 2, 8)
    with pytest.raises(MergeError, match="Use a smaller rate"):
        adapt(block, pre, [(anchors, call(block, expert, anchors))], AdaptOptions(epochs=3, rate=1e30))


def test_first_anchors_are_rows_of_the_width() -> None:
    weights = {"a": drawn(5, 8), "b": drawn(3, 8, seed=1), "narrow": drawn(8, 4), "bias": drawn(8)}
    rows = weight_rows(weights, (4, 2, 8), torch.Generator().manual_seed(0)).reshape(-1, 8)
    pool = torch.cat([weights["a"], weights["b"]])
    owners = [int((pool == row).all(1).nonzero()) for row in rows]
    assert sorted(owners) == list(range(8)), "every row once before any twice"
    assert len(weight_rows(weights, (5, 3, 8), torch.Generator())) == 5
    with pytest.raises(MergeError, match="no matrix of the block has rows of width 7"):
        weight_rows(weights, (1, 1, 7), torch.Generator())


def test_sigma_is_picked_from_the_same_noise() -> None:
    block, pre, expert, _, _ = linear_pair()
    shapes = []

    def align(options: AnchorOptions) -> float:
        first = gauss((4, 1, WIDTH), options.sigma, torch.Generator().manual_seed(3))
        shapes.append((options.steps, first / options.sigma))
        return construct(block, pre, expert, first, options).best

    options = AnchorOptions(
        init="gauss", distance="squared", sigmas=(10.0, 0.01, 1e-6), sigma_steps=30, steps=500
    )
    sigma, found = pick_sigma(align, options)
    assert sigma == 0.01
    assert list(found) == [10.0, 0.01, 1e-6]
    assert all(
        steps == 30 and torch.allclose(noise, shapes[0][1], rtol=1e-4, atol=1e-6) for steps, noise in shapes
    )


# -- adaptation ----------------------------------------------------------------------------------------------------


def test_one_expert_is_recovered_in_a_linear_block() -> None:
    block, pre, expert, _, _ = linear_pair()
    anchors = torch.cat([torch.linalg.qr(drawn(WIDTH, WIDTH, seed=s))[0] for s in (1, 2)])[:, None]
    pair = anchors, call(block, expert, anchors)
    options = AdaptOptions(epochs=250, batch=24, rate=2e-3, distance="squared")
    fitted = adapt(block, pre, [pair], options)
    gap = (fitted.weights["weight"] - expert["weight"]).norm()
    assert float(gap) < 1e-2 * float((expert["weight"] - pre["weight"]).norm())
    assert fitted.after < 1e-3 * fitted.before
    change = {"weight": expert["weight"] - pre["weight"]}
    factors = adapt(block, pre, [pair], replace(options, rate=2e-2), task_vectors=[change])
    assert float((factors.weights["weight"] - expert["weight"]).norm()) < 1e-2 * float(
        change["weight"].norm()
    )


def test_refinement_without_steps_is_the_start_and_does_not_touch_inputs() -> None:
    block, pre, expert = mixer_pair()
    anchors = drawn(4, 2, 8)
    pair = anchors, call(block, expert, anchors)
    start = {name: tensor + 0.3 * (expert[name] - tensor) for name, tensor in pre.items()}
    start["norm.bias"][0] = -0.0
    vectors = [{name: expert[name] - pre[name] for name in pre}]
    same = adapt(block, start, [pair], AdaptOptions(epochs=0), task_vectors=vectors)
    bits = {name: tensor.view(torch.int32) for name, tensor in same.weights.items()}
    assert all(torch.equal(bits[name], start[name].view(torch.int32)) for name in start)
    assert same.before == same.after
    kept = {name: tensor.clone() for name, tensor in start.items()}
    vectors[0]["up.weight"] = torch.zeros_like(pre["up.weight"])
    moved = adapt(
        block, start, [pair], AdaptOptions(epochs=60, batch=2, distance="squared"), task_vectors=vectors
    )
    assert moved.after < 0.5 * moved.before
    assert len(moved.losses) == 60
    assert torch.equal(moved.weights["up.weight"], kept["up.weight"]), "no task vector, no change"
    assert all(torch.equal(start[name], kept[name]) for name in kept)


def test_each_expert_has_factors_of_its_own() -> None:
    """Two experts that changed different columns, each seen through its own: both factors go from 0.5 to 1."""
    block, pre, expert, _, _ = linear_pair()
    masks = torch.ones(WIDTH), torch.ones(WIDTH)
    masks[0][6:], masks[1][:6] = 0, 0
    changes = [{"weight": (expert["weight"] - pre["weight"]) * mask} for mask in masks]
    experts = [{"weight": pre["weight"] + change["weight"]} for change in changes]
    anchors = [drawn(16, 1, WIDTH, seed=20 + k) * mask for k, mask in enumerate(masks)]
    pairs = [(x, call(block, one, x)) for x, one in zip(anchors, experts, strict=True)]
    start = {"weight": pre["weight"] + 0.5 * (changes[0]["weight"] + changes[1]["weight"])}
    fitted = adapt(
        block, start, pairs, AdaptOptions(epochs=300, batch=32, distance="squared"), task_vectors=changes
    )
    assert float((fitted.weights["weight"] - expert["weight"]).norm()) < 0.02 * float(
        (expert["weight"] - pre["weight"]).norm()
    )


def test_adaptation_depends_on_its_seed_alone() -> None:
    block, pre, expert = mixer_pair()
    anchors = drawn(6, 2, 8)
    pair = anchors, call(block, expert, anchors)
    options = AdaptOptions(epochs=3, batch=2, rate=1e-2)
    torch.manual_seed(1)
    one = adapt(block, pre, [pair], options).weights
    torch.manual_seed(2)
    two = adapt(block, pre, [pair], options).weights
    other = adapt(block, pre, [pair], replace(options, seed=1)).weights
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnchorOptions(n=0), "anchors.n: found 0"),
        (lambda: AnchorOptions(steps=True), "anchors.steps: found True"),
        (lambda: AnchorOptions(rate=math.nan), "anchors.rate: found nan"),
        (lambda: AnchorOptions(init="rows"), "anchors.init: found 'rows' .wanted weight, gauss, data"),  # type: ignore[arg-type]
        (lambda: AnchorOptions(init="gauss", sigmas=(1.0, 0.0)), "anchors.sigma: found 0.0"),
        (lambda: AnchorOptions(sigmas=(1.0,)), "only init gauss has a sigma"),
        (lambda: AdaptOptions(batch=0), "adapt.batch: found 0"),
        (lambda: AdaptOptions(distance="l2"), "adapt.distance: found 'l2'"),  # type: ignore[arg-type]
    ],
)
def test_senseless_options_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
